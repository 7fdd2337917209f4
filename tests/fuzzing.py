"""Hostile input for everything that reads: mutations of good inputs, and what came of each.

A ``Target`` reads one kind of input as the product does, and checks what it accepted (``WrongNumber``).
Inputs follow from (target, number) alone, so that a case can be run again. ``benchmarks/robustness.py`` runs
many, in processes that may crash; ``tests/test_fuzz.py`` some.
"""

from __future__ import annotations

import gzip
import json
import math
import resource
import shutil
import signal
import sqlite3
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from aquabit.errors import AquabitError

OLD = Path(__file__).parent / "data" / "old"
SECONDS = 20  # one case; more is a hang
ACCEPTED, REFUSED, INTERNAL, WRONG, HANGS = "accepted", "refused", "internal error", "wrong number", "hangs"


class WrongNumber(Exception):
    """Something was accepted and then said another number than it should."""


class Hangs(BaseException):
    pass


@dataclass(frozen=True)
class Target:
    """``made`` draws an input, ``use`` reads it."""

    name: str
    made: Callable[[Random], Any]
    use: Callable[[Any], object]

    @property
    def share(self) -> float:
        """How many cases it gets for each one of the others: those that take long fewer, the fast ones
        more."""
        return 0.3 if self.name in SLOW else 2.0 if self.name in FAST else 1.0


SLOW = ("study", "one bit of a study", "artifact", "one bit of an artifact", "command line")
FAST = (
    "scheme",
    "swap, correction, design, shape",
    "configuration",
    "config.json",
    "quantization_config",
    "fine-tuning settings",
    "--against FILE",
)


@dataclass(frozen=True)
class Outcome:
    kind: str
    said: str = ""


def outcome(target: Target, number: int) -> Outcome:
    """What comes of one case."""
    random = Random(f"{target.name} {number}")
    made = target.made(random)
    try:
        with _limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.use(made)
    except AquabitError as error:
        text = str(error)
        plain = text.strip() and "\n" not in text and text.isprintable()
        return Outcome(REFUSED) if plain else Outcome(INTERNAL, f"not one plain sentence: {text!r:.200}")
    except WrongNumber as error:
        return Outcome(WRONG, f"{error}; {made!r:.200}")
    except Hangs:
        return Outcome(HANGS, f"{made!r:.200}")
    except Exception as error:
        return Outcome(INTERNAL, f"{type(error).__name__}: {error!s:.120}; {made!r:.200}")
    return Outcome(ACCEPTED)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(size: int) -> None:
    """More than ``size`` bytes of address space end in MemoryError, which counts as an internal error."""
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


# ---- mutations

ATOMS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    16,
    2**31 - 1,
    2**31,
    2**63,
    -(2**63),
    2**64 + 1,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    " ",
    "fp",
    "usq4",
    "usq0",
    "vq99",
    "a8",
    "auto",
    "\x00",
    "\x1b[31m",
    "a\nb",
    "\ud800",
    "é" * 3,
    "٣",
    "usq٣",
    "x" * 5000,
    "9" * 5000,
    "../../etc",
    "=1+1",
    [],
    {},
    [[]],
    [None],
    {"": 1},
    [1, 2, 3],
    {"a": {}},
    [["usq4"]],
    ["usq4", "usq4"],
    [0],
    [-1],
    [16, 8],
)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutated(value: Any, random: Random) -> Any:
    """A JSON value with one to three of its parts changed, taken away or added."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _changed(value, random)
    return value


def _changed(value: Any, random: Random) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.93:
        key = random.choice(list(value))
        way = random.random()
        if way < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.14:
            return {**value, random.choice((key + "x", "", "__class__", "\x1b[2J")): random.choice(ATOMS)}
        if way < 0.18:
            return {**value, key: value[random.choice(list(value))]}
        return {**value, key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.93:
        at, way = random.randrange(len(value)), random.random()
        if way < 0.1:
            return value[:at] + value[at + 1 :]
        if way < 0.2:
            return [*value[:at], random.choice((random.choice(ATOMS), value[at])), *value[at:]]
        return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    if isinstance(value, str) and random.random() < 0.4:
        return text(value, random)
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.3:
        return random.choice(
            (value + 1, -value, value / 3 if abs(value) < 1e300 else 0, [value], value * 10**9)
        )
    return nested(300) if random.random() < 0.003 else random.choice(ATOMS)


LETTERS = "0123456789abchgkxuvqsfp:.,+-_/@*[]{}\"'\\ \t\n\x00\x1bé٣�"


def text(value: str, random: Random) -> str:
    """A text with letters changed, taken away, added or repeated."""
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(value) + 1)
        way = random.random()
        if way < 0.3:
            value = value[:at] + random.choice(LETTERS) + value[at:]
        elif way < 0.6:
            value = value[:at] + random.choice(LETTERS) + value[at + 1 :]
        elif way < 0.8:
            value = value[:at] + value[at + random.randrange(1, 4) :]
        elif way < 0.9:
            value = value[:at]
        else:
            value = value[:at] + value[at:] * random.choice((2, 2, 500))
    return value


def file_text(value: Any, random: Random) -> bytes:
    """The bytes of a JSON file: a changed value, changed text, or bytes that are no text."""
    way = random.random()
    if way < 0.6:
        with suppress(ValueError):
            return json.dumps(mutated(value, random), ensure_ascii=False).encode("utf-8", "surrogatepass")
    plain = json.dumps(value)
    if way < 0.85:
        return text(plain, random).encode("utf-8", "surrogatepass")
    if way < 0.87:
        return b"[" * 100_000 + b"]" * 100_000
    if way < 0.89:
        return b'{"schema": ' + b"9" * 5000 + b"}"
    return flipped(plain.encode(), random)


def flipped(data: bytes, random: Random) -> bytes:
    """Bytes with one bit turned, a stretch lost, zeroed or doubled, or the end cut off."""
    if not data:
        return b"\x00"
    changed, way, at = bytearray(data), random.random(), random.randrange(len(data))
    if way < 0.6:
        changed[at] ^= 1 << random.randrange(8)
    elif way < 0.7:
        del changed[at : at + random.randrange(1, 64)]
    elif way < 0.8:
        length = min(len(data) - at, random.randrange(1, 64))
        changed[at : at + length] = bytes(length)
    elif way < 0.9:
        changed[at:at] = changed[at : at + 32]
    else:
        del changed[at:]
    return bytes(changed)


def tensor_file(data: bytes, random: Random) -> bytes:
    """A safetensors file with a bit turned, or with its header changed and written anew."""
    if random.random() < 0.5:
        return flipped(data, random)
    (length,) = struct.unpack("<Q", data[:8])
    header = mutated_header(json.loads(data[8 : 8 + length]), random)
    body = json.dumps(header).encode("utf-8", "surrogatepass")
    size = random.choice((len(body), len(body), len(body), len(body), len(body) + 1, 2**63))
    return struct.pack("<Q", size) + body + data[8 + length :]


def mutated_header(header: dict[str, Any], random: Random) -> dict[str, Any]:
    """Metadata whose JSON is changed within, or tensors of other dtypes, shapes and names."""
    metadata = header.get("__metadata__")
    if metadata and random.random() < 0.6:
        key = random.choice(list(metadata))
        with suppress(ValueError):
            within = json.dumps(mutated(json.loads(metadata[key]), random))
            return header | {"__metadata__": {**metadata, key: within}}
    names = [k for k in header if k != "__metadata__"]
    if names and random.random() < 0.5:
        a, b = random.choice(names), random.choice((*names, "scale", "offset", "codebooks", "codes"))
        other = dict(header)
        other[b] = other.pop(a)
        return other
    return mutated(header, random) if isinstance(header, dict) else header


# ---- good inputs


@cache
def folder() -> Path:
    """A copy of the old files, with the study unpacked."""
    out = Path(tempfile.mkdtemp(prefix="aquabit-fuzz-")) / "old"
    shutil.copytree(OLD, out)
    (out / "study.db").write_bytes(gzip.decompress((out / "study.db.gz").read_bytes()))
    return out


@contextmanager
def written(data: bytes, name: str) -> Iterator[Path]:
    path = folder().parent / name
    path.write_bytes(data)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@cache
def study_facts() -> dict[str, Any]:
    with sqlite3.connect(folder() / "study.db") as db:
        return {k: json.loads(v) for k, v in db.execute("SELECT name, value FROM facts")}


def same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise WrongNumber(f"{what}: {found!r:.80} instead of {expected!r:.80}")


# ---- targets: texts and values


def scheme_text() -> Target:
    from aquabit.scheme import Scheme

    known = ("fp", "usq4", "usq3h", "usq4g64", "vq3c", "aq2x8g8", "aq1x4k", "aq2x6g8s", "usq2g32h")

    def use(value: Any) -> None:
        parsed = Scheme.parse(value)
        same(Scheme.parse(str(parsed)), parsed, "a scheme read again")
        for shape in ((8, 16), (8, 4, 3, 3)):
            with suppress(AquabitError):
                if not all(math.isfinite(b) and b >= 0 for b in parsed.stored_bytes(shape)):
                    raise WrongNumber("stored bytes")

    return Target("scheme", lambda r: _odd(r, text(r.choice(known), r)), use)


def _odd(random: Random, value: Any) -> Any:
    """``value``, or now and then what is no text."""
    return random.choice(ATOMS) if random.random() < 0.05 else value


def other_texts() -> Target:
    from aquabit.quant.bench import parse_shape
    from aquabit.scheme import Scheme, parse_correction, parse_swap
    from aquabit.sensitivity.designs import Design

    readers: dict[str, Callable[[str], object]] = {
        "usq4h:usq2h": parse_swap,
        "cnc+bc+vsc": parse_correction,
        "near:0.75": Design.parse,
        "swaps": Design.parse,
        "4608x1152@256": lambda t: parse_shape(t, Scheme.parse("usq4")),
        "384x384x3x3@32": lambda t: parse_shape(t, Scheme.parse("vq3")),
    }

    def use(case: tuple[str, str]) -> None:
        readers[case[0]](case[1])

    def made(random: Random) -> tuple[str, str]:
        name = random.choice(list(readers))
        return name, text(name, random)

    return Target("swap, correction, design, shape", made, use)


def configuration() -> Target:
    from aquabit.scheme import QuantConfig

    good = json.loads((OLD / "config.json").read_text())

    def use(value: Any) -> None:
        config = QuantConfig.from_dict(value)
        again = QuantConfig.from_dict(json.loads(config.to_json()))
        same(again, config, "a configuration read again")
        same(again.digest, config.digest, "its digest")

    return Target("configuration", lambda r: mutated(good, r), use)


def configuration_file() -> Target:
    from aquabit.scheme import QuantConfig

    good = json.loads((OLD / "config.json").read_text())

    def use(data: bytes) -> None:
        with written(data, "config.json") as path:
            QuantConfig.load(path)

    return Target("config.json", lambda r: file_text(good, r), use)


def packed_configuration() -> Target:
    from aquabit.quant.artifact import parsed

    good = json.loads((OLD / "packed" / "denoiser" / "config.json").read_text())["quantization_config"]
    return Target("quantization_config", lambda r: mutated(good, r), parsed)


def space_file() -> Target:
    from aquabit.graph import from_json
    from aquabit.space import make_space, read_space

    good = {
        "schemes": ["usq4", "usq2h"],
        "levels": [2, 1.5],
        "formats": {"self_attn.*": ["aq2x4g8"]},
        "activations": [8, 16],
        "pinned": {"pos_embed*": "usq8"},
        "excluded": ["proj_out_1"],
        "correction": "cnc+bc",
        "step_groups": {"total": 10, "starts": [0, 5]},
    }
    graph = from_json(study_facts()["graph"])

    def use(data: bytes) -> None:
        with written(data, "space.json") as path:
            space = make_space(graph, "f", **read_space(path))
        space.check(space.full_precision())

    return Target("space.json", lambda r: file_text(good, r), use)


def stored_values() -> Target:
    """What a study holds as JSON."""
    from aquabit.graph import from_json
    from aquabit.quality.meter import QualityOptions
    from aquabit.scheme import Protocol
    from aquabit.search.front import Front
    from aquabit.sensitivity.result import Sensitivity
    from aquabit.space import SearchSpace
    from aquabit.stats import Interval

    readers: dict[str, Callable[[Any], object]] = {
        "graph": from_json,
        "space": SearchSpace.from_dict,
        "sensitivity": Sensitivity.from_dict,
        "front": Front.from_dict,
        "quality": QualityOptions.from_dict,
        "protocol": Protocol.from_dict,
        "interval": Interval.from_dict,
    }
    facts = study_facts()
    given = {k: facts[k] for k in readers if facts.get(k)}
    given |= {"protocol": Protocol().to_dict(), "interval": {"value": 1.0, "low": 0.0, "high": 2.0}}

    def made(random: Random) -> tuple[str, Any]:
        name = random.choice(list(given))
        return name, mutated(given[name], random)

    return Target("values in a study", made, lambda case: readers[case[0]](case[1]))


def finetuning_settings() -> Target:
    from dataclasses import asdict

    from aquabit.quant.finetuning.settings import FineTuning

    good = asdict(FineTuning())
    return Target("fine-tuning settings", lambda r: mutated(good, r), FineTuning.from_dict)


def given_configuration() -> Target:
    """What ``search --against`` reads."""
    from aquabit.search.given_configs import read_given
    from aquabit.space import SearchSpace

    space = SearchSpace.from_dict(study_facts()["space"])
    ours = json.loads((OLD / "config.json").read_text())
    theirs = {
        "quant_cfg": {
            "*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 32}},
            "*ff*": {"enable": False},
            "default": {"num_bits": 8, "axis": 0},
        }
    }

    def use(data: bytes) -> None:
        with written(data, "against.json") as path:
            config = read_given(path, space)
        space.check(config, extra_schemes=True)

    return Target("--against FILE", lambda r: file_text(r.choice((ours, theirs)), r), use)


# ---- targets: files


def gguf_file() -> Target:
    """What ``search --against`` reads of a GGUF file; what is accepted lies in the file."""
    import networkx as nx

    from aquabit.exports.gguf_file import Written, read_file, write_file
    from aquabit.exports.gguf_reader import read

    graph = nx.DiGraph()
    graph.add_node("a", kind="linear", shape=(4, 64), depth=0)
    graph.add_node("b", kind="conv", shape=(2, 32, 1, 1), depth=1)
    with written(b"", "net.gguf") as path:
        blocks = Written("a.weight", "Q4_0", (4, 64), lambda: torch.zeros(144, dtype=torch.uint8))
        conv = Written("b.weight", "Q8_0", (2, 32), lambda: torch.zeros(68, dtype=torch.uint8))
        values = {"general.architecture": "x", "comfy.gguf.orig_shape.b.weight": (2, 32, 1, 1), "n": 3}
        write_file(path, values, [blocks, conv])
        good = path.read_bytes()

    def use(data: bytes) -> None:
        with written(data, "net.gguf") as path:
            config, file = read(path, graph, "f"), read_file(path)
            for name, one in file.tensors.items():
                same(len(file.bytes_of(name)), one.nbytes, "a tensor's bytes")
        same(set(config.layers), {"a", "b"}, "layers")

    return Target("GGUF file", lambda r: flipped(good, r), use)


def comfy_file() -> Target:
    """What ``search --against`` reads of a file of ComfyUI's."""
    import networkx as nx
    from safetensors.torch import save

    from aquabit.exports.comfy import METADATA
    from aquabit.exports.readers import read_others

    graph = nx.DiGraph()
    graph.add_node("a", kind="linear", shape=(4, 64), depth=0)
    graph.add_node("b", kind="linear", shape=(2, 32), depth=1)
    graph.add_node("c", kind="linear", shape=(2, 32), depth=2)
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    tensors = {
        "a.weight": torch.zeros(4, 32, dtype=torch.uint8),
        "b.weight": torch.zeros(2, 32, dtype=torch.int8),
        "b.comfy_quant": mark,
        "c.weight": torch.zeros(2, 32),
    }
    good = save(tensors, {METADATA: json.dumps({"layers": {"a": {"format": "nvfp4"}}})})

    def use(data: bytes) -> None:
        with written(data, "net.safetensors") as path:
            config = read_others(path, graph, "f")
        if config is not None:
            known = {"fp", "nvfp4", "int8", "fp8", "mxfp8"}
            same({str(config[n].weight) for n in graph} - known, set(), "unknown schemes")

    return Target("ComfyUI file", lambda r: flipped(good, r), use)


@cache
def _folders_of_others() -> tuple[Any, tuple[tuple[bytes, bytes], ...]]:
    """A small model's graph, and (config.json, weights) as the writers of folders make them."""
    from diffusers import DiTTransformer2DModel

    from aquabit.exports import bitsandbytes, sdnq, torchao_files
    from aquabit.exports.model_folder import WEIGHTS
    from tests.exports.small_models import case

    def net() -> Any:
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 1, "sample_size": 4}
        return DiTTransformer2DModel(
            **sizes, in_channels=1, out_channels=1, num_embeds_ada_norm=4, norm_num_groups=4
        )

    found, made = [], case(net(), lambda *_: "fp", again=net())
    for module, row in (
        (sdnq, ("int4g32", "usq3g16", "nvfp4", "fp8c", "vq3")),
        (bitsandbytes, ("nf4g64", "nf4g64d")),
        (torchao_files, ("int4g32", "int8")),
    ):
        made = case(
            net(), lambda i, _, shape, row=row: row[i % len(row)] if len(shape) == 2 else "fp", again=net()
        )
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            module.write(made.exported, out)
            found.append(((out / "config.json").read_bytes(), (out / WEIGHTS).read_bytes()))
    return made.exported.graph, tuple(found)


def folder_of_others() -> Target:
    """What ``search --against`` reads of other programs' folders, and the weights in them; what is accepted
    has the layers and shapes of the model."""
    from aquabit.exports import bitsandbytes_reader, sdnq_reader
    from aquabit.exports.model_folder import WEIGHTS
    from aquabit.exports.readers import read_others
    from aquabit.exports.stored_folder import described_in
    from aquabit.graph import layers

    graph, folders = _folders_of_others()
    nodes = layers(graph)
    weights = {"sdnq": sdnq_reader.read_weights, "bitsandbytes": bitsandbytes_reader.read_weights}

    def made(random: Random) -> tuple[bytes, bytes]:
        config, tensors = random.choice(folders)
        if random.random() < 0.1:
            return config, random.choice(folders)[1]  # another program's weights
        if random.random() < 0.5:
            return file_text(mutated(json.loads(config), random), random), tensors
        return config, tensor_file(tensors, random)

    def use(case: tuple[bytes, bytes]) -> None:
        with tempfile.TemporaryDirectory() as place:
            for name, data in zip(("config.json", WEIGHTS), case, strict=True):
                (Path(place) / name).write_bytes(data)
            config = read_others(place, graph, "f")
            if config is None:
                return
            same(set(config.layers) - set(nodes), set(), "layers that are not there")
            for name, choice in config.layers.items():
                choice.weight.layout(tuple(nodes[name]["shape"]))
            folder = described_in(place)
            assert folder is not None
            if folder.method in weights:
                shapes = {n: tuple(w.shape) for n, w in weights[folder.method](folder, graph)}
                same(shapes, {n: tuple(node["shape"]) for n, node in nodes.items()}, "shapes")

    return Target("folder of another program", made, use)


def study_file() -> Target:
    """A study with a value of a row, or a bit of the file, changed; read by all that reads one."""
    from aquabit.study import Study
    from aquabit.study_status import study_status

    whole = (folder() / "study.db").read_bytes()
    columns = [
        ("facts", "value"),
        ("protocols", "value"),
        ("measurements", "metrics"),
        ("measurements", "status"),
        ("measurements", "kind"),
        ("configs", "value"),
        ("features", "value"),
    ]

    def made(random: Random) -> bytes:
        if random.random() < 0.4:
            return flipped(whole, random)
        with written(whole, "study-made.db") as path:
            db = sqlite3.connect(path)
            known = {r[0] for r in db.execute("SELECT name FROM sqlite_master")}
            table, column = random.choice([c for c in columns if c[0] in known])
            with suppress(sqlite3.Error, ValueError, IndexError):
                rows = db.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
                rowid, value = random.choice(rows)
                try:
                    changed: Any = json.dumps(mutated(json.loads(value), random))
                except (ValueError, TypeError):
                    changed = text(str(value), random)
                changed = random.choice((changed, changed, changed, None, 5, b"\xff", "", "{"))
                db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (changed, rowid))
                db.commit()
            db.close()
            return path.read_bytes()

    def use(data: bytes) -> None:
        with written(data, "study.db") as path:
            study = Study(path, create=False)
            try:
                for read in (
                    study.protocols,
                    study.measurements,
                    study.configs,
                    study.features,
                    study.errors,
                    study.notes,
                    study.probes,
                    study.thumbnails,
                    lambda: study_status(study),
                ):
                    read()
            finally:
                study.close()
                for beside in path.parent.glob("study.db-*"):
                    beside.unlink()

    return Target("study", made, use)


def bank_file() -> Target:
    """A fit is what was stored, or is not there."""
    from aquabit.quant.bank import Bank
    from aquabit.scheme import Scheme

    bank, old = Bank(folder() / "fits"), Bank(folder() / "bank")

    def parts(path: Path) -> tuple[str, Any, str]:
        words = path.stem.split("-")
        return words[0], Scheme.parse(words[1]), "-".join(words[2:])

    for path in (OLD / "bank").glob("*.safetensors"):
        fit = old.get(*parts(path))
        assert fit is not None
        bank.put(*parts(path), fit)  # written anew: the old ones have no digest
    files = sorted(bank.folder.glob("*.safetensors"))
    whole = {f.name: f.read_bytes() for f in files}
    truth = {f.name: bank.get(*parts(f)) for f in files}

    def made(random: Random) -> tuple[str, bytes]:
        path = random.choice(files)
        if random.random() < 0.05:  # another layer's, under this name
            return path.name, whole[random.choice(files).name]
        return path.name, tensor_file(whole[path.name], random)

    def use(case: tuple[str, bytes]) -> None:
        name, data = case
        path = bank.folder / name
        try:
            path.unlink()  # fits are mapped: not written over
            path.write_bytes(data)
            found = bank.get(*parts(path))
            expected = truth[name]
            if found is not None and expected is not None:
                equal = found.coded.shape == expected.coded.shape and torch.equal(
                    found.coded.dequantize(), expected.coded.dequantize()
                )
                same(equal, True, "the weight of a changed bank file")
                same((found.error, found.output), (expected.error, expected.output), "its errors")
        finally:
            path.unlink()
            path.write_bytes(whole[name])

    return Target("bank file", made, use)


def noise_file() -> Target:
    from aquabit.quant.correction.statistics import Statistics

    path = folder().parent / "noise.safetensors"
    _noise().save(path)
    good = path.read_bytes()

    def use(data: bytes) -> None:
        with written(data, "noise-made.safetensors") as made:
            found = Statistics.load(made)
        for key, value in found.tensors()[0].items():
            same(torch.equal(value, _noise().tensors()[0][key]), True, f"noise statistics {key}")

    return Target("noise statistics", lambda r: tensor_file(good, r), use)


@cache
def _noise() -> Any:
    from diffusers import DDIMScheduler

    from tests.chains import known

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    return known(scheduler, 0.1, 0.2, 0.3)


def artifact() -> Target:
    """A packed denoiser makes the outputs that it made, or is refused."""
    from aquabit.quant.artifact import load_packed_denoiser, save_packed_denoiser
    from aquabit.quant.kernel_tuning import layers_of

    source = folder() / "written" / "denoiser"
    save_packed_denoiser(load_packed_denoiser(OLD / "packed" / "denoiser"), source)  # the old has no digest
    config, tensors = source / "config.json", source / "diffusion_pytorch_model.safetensors"

    def weights(path: Path) -> dict[str, torch.Tensor]:
        layers = layers_of(load_packed_denoiser(path))
        found = {
            n: layer.weight if layer.coded is None else layer.coded.dequantize()
            for n, layer in layers.items()
        }
        return found | {f"{n}.bias": layer.bias for n, layer in layers.items() if layer.bias is not None}

    truth = weights(source)

    def made(random: Random) -> tuple[bytes, bytes]:
        if random.random() < 0.5:
            return file_text(json.loads(config.read_text()), random), tensors.read_bytes()
        return config.read_bytes(), tensor_file(tensors.read_bytes(), random)

    def use(case: tuple[bytes, bytes]) -> None:
        out = Path(tempfile.mkdtemp(dir=folder().parent))
        try:
            (out / config.name).write_bytes(case[0])
            (out / tensors.name).write_bytes(case[1])
            found = weights(out)
            if case[1] != tensors.read_bytes():
                for name, value in truth.items():
                    same(torch.equal(found[name], value), True, f"weight {name} of a changed artifact")
        finally:
            shutil.rmtree(out)

    return Target("artifact", made, use)


# ---- targets: one bit


def one_bit(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def bit_of_a_study() -> Target:
    """A study of which one bit turned says what it said, or is refused."""
    from aquabit.study import Study

    summed = folder().parent / "summed.db"
    shutil.copyfile(folder() / "study.db", summed)
    study = Study(summed)
    study.set(model=study.get("model"))  # gives it its checksums
    truth = _said_by(study)
    study.close()
    data = summed.read_bytes()

    def use(data: bytes) -> None:
        with written(data, "bit.db") as path:
            study = Study(path, create=False)
            try:
                for what, found in _said_by(study).items():
                    same(found, truth[what], what)
            finally:
                study.close()

    return Target("one bit of a study", lambda r: one_bit(data, r), use)


def _said_by(study: Any) -> dict[str, Any]:
    """All that a study says."""
    facts = {name: study.get(name) for name in study_facts()}
    protocol = study.protocol
    return facts | {
        "protocols": {k: p.to_dict() for k, p in study.protocols().items()},
        "measurements": study.measurements(failed=True).to_csv(),
        "measurements of a protocol": study.measurements(protocol).to_csv(),
        "known": study.known(protocol),
        "configs": {k: c.to_dict() for k, c in study.configs().items()},
        "features": study.features(),
        "thumbnails": study.thumbnails(),
        "swaps": study.swaps(protocol.objective).to_csv(),
    }


def bit_of_a_fit() -> Target:
    fits = bank_file()

    def use(case: tuple[str, bytes]) -> None:
        from aquabit.quant.bank import Bank

        fits.use(case)  # what is read is what was stored
        bank = Bank(folder() / "bits")
        (bank.folder / case[0]).write_bytes(case[1])
        words = Path(case[0]).stem.split("-")
        from aquabit.scheme import Scheme

        if bank.get(words[0], Scheme.parse(words[1]), "-".join(words[2:])) is None:
            raise AquabitError("it is not there, and is fitted again")

    files = {f.name: f.read_bytes() for f in sorted((folder() / "fits").glob("*.safetensors"))}

    def made(random: Random) -> tuple[str, bytes]:
        name = random.choice(list(files))
        return name, one_bit(files[name], random)

    return Target("one bit of a fit", made, use)


def bit_of_noise() -> Target:
    noise = noise_file()
    path = folder().parent / "noise.safetensors"
    data = path.read_bytes()
    return Target("one bit of noise statistics", lambda r: one_bit(data, r), noise.use)


def bit_of_an_artifact() -> Target:
    whole = artifact()
    source = folder() / "written" / "denoiser"
    config = (source / "config.json").read_bytes()
    tensors = (source / "diffusion_pytorch_model.safetensors").read_bytes()

    def made(random: Random) -> tuple[bytes, bytes]:
        if random.random() < 0.2:
            return one_bit(config, random), tensors
        return config, one_bit(tensors, random)

    def use(case: tuple[bytes, bytes]) -> None:
        whole.use(case)
        with suppress(ValueError):
            changed, good = json.loads(case[0]), json.loads(config)
            for key in ("_diffusers_version", "_name_or_path"):  # by what and from where it was written
                changed.pop(key, None), good.pop(key, None)
            same(changed, good, "the configuration of a changed artifact")

    return Target("one bit of an artifact", made, use)


def timings_file() -> Target:
    from aquabit.kernels.timings import Timings

    place = folder().parent / "timings"
    place.mkdir(exist_ok=True)
    own = Timings(1, place)
    own.add({"linear usq4": {"lut": 1e-3, "decode": 2e-3}})
    good = json.loads(own.path.read_text())

    def use(data: bytes) -> None:
        own.path.write_bytes(data)
        for row in Timings(1, place).entries.values():
            if not all(type(v) in (int, float) and 0 < v < math.inf for v in row.values()):
                raise WrongNumber(f"timings {row!r:.80}")

    return Target("timings", lambda r: file_text(good, r), use)


# ---- targets: kernels

SIZES = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 100_000, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


def geometry() -> Target:
    """Convolutions of any stride, padding, dilation and groups, on every backend that serves, against
    torch."""
    from aquabit.kernels import codebook_conv2d
    from tests.coded_weights import coded

    weights = {n: coded(n, (4, 8, 3, 3)) for n in ("usq4", "vq3c", "aq2x4g8", "aq1x4k")}

    def value(random: Random) -> Any:
        one = random.choice((1, 1, 1, 2, random.choice(SIZES)))
        return random.choice((one, one, (one, random.choice((1, random.choice(SIZES))))))

    def made(random: Random) -> Any:
        name, backend = random.choice(list(weights)), random.choice((None, "lut", "decode", "reference"))
        shape = random.choice(((2, 8, 5, 6), (1, 8, 1, 1), (0, 8, 4, 4), (1, 7, 4, 4), (8, 4, 4)))
        padding = random.choice((1, "same", "valid", value(random)))
        return (
            name,
            backend,
            shape,
            value(random),
            padding,
            value(random),
            random.choice((1, 1, 2, value(random))),
        )

    def use(case: Any) -> None:
        name, backend, shape, stride, padding, dilation, groups = case
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        weight = weights[name].weight
        given: dict[str, Any] = {} if backend is None else {"backend": backend}
        y = codebook_conv2d(x, weight, None, stride, padding, dilation, groups, accuracy="exact", **given)
        expected = torch.nn.functional.conv2d(
            x.double(), weight.dequantize().double(), None, stride, padding, dilation, groups
        )
        _close(y, expected)

    return Target("convolution geometry", made, use)


def _close(y: torch.Tensor, expected: torch.Tensor, reach: float = 0.0) -> None:
    """``reach``: how large an output could be, whose rounding is left where terms cancel."""
    same(tuple(y.shape), tuple(expected.shape), "the shape of an output")
    allowed = 1e-4 * float(expected.abs().max()) + 1e-5 + 1e-6 * reach if y.numel() else 0.0
    if y.numel() and float((y.double() - expected).abs().max()) > allowed:
        raise WrongNumber("an output of a kernel")


def _reach(x: torch.Tensor, weight: Any) -> float:
    """The largest output that evenly spaced levels could give for x; 0 where levels are those of a table."""
    if weight.codebooks is not None or weight.scale is None:
        return 0.0
    largest = float(weight.scale.float().abs().max()) * ((1 << weight.bits) - 1)
    return largest * float(x.abs().flatten(1).sum(1).max())


def contradictions() -> Target:
    """Weights whose parts contradict each other; those that exist run as they decode."""
    from aquabit.kernels import codebook_conv2d, codebook_linear
    from aquabit.kernels.codebook import CodebookWeight
    from tests.coded_weights import coded

    known = [
        coded(n, s).weight
        for n in ("usq4", "usq4g64", "vq3c", "aq2x4g8", "aq1x4k")
        for s in ((4, 64), (4, 8, 3, 3))
    ]

    def made(random: Random) -> Any:
        weight = random.choice(known)
        changes: dict[str, Any] = {}
        for _ in range(random.choice((1, 1, 2))):
            field = random.choice(("packed", "codebooks", "scale", "offset", "shape", "bits", "order"))
            changes[field] = _part(field, getattr(weight, field), random)
        return weight, changes, random.choice((None, "lut", "decode", "reference"))

    def use(case: Any) -> None:
        weight, changes, backend = case
        changed = replace(weight, **changes)
        assert isinstance(changed, CodebookWeight)
        given: dict[str, Any] = {} if backend is None else {"backend": backend}
        generator = torch.Generator().manual_seed(0)
        if len(changed.shape) == 2:
            x = torch.randn(3, changed.shape[1], generator=generator)
            y = codebook_linear(x, changed, accuracy="exact", **given)
            _close(y, x.double() @ changed.dequantize().double().T, _reach(x, changed))
        else:
            x = torch.randn(2, changed.shape[1], 5, 6, generator=generator)
            y = codebook_conv2d(x, changed, None, 1, 1, accuracy="exact", **given)
            expected = torch.nn.functional.conv2d(x.double(), changed.dequantize().double(), None, 1, 1)
            _close(y, expected, _reach(x, changed))

    return Target("contradicting weights", made, use)


def _part(field: str, value: Any, random: Random) -> Any:
    """Another value of a field of a weight."""
    if isinstance(value, torch.Tensor):
        ways: list[Callable[[], Any]] = [
            lambda: None,
            lambda: value[:-1],
            lambda: value.repeat(2, *[1] * (value.ndim - 1)),
            lambda: value.to(
                random.choice((torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool))
            ),
            lambda: value.reshape(-1),
            lambda: value[..., None],
            lambda: value.unsqueeze(0).transpose(0, -1).squeeze(-1) if value.ndim > 1 else value,
            lambda: torch.full_like(value, random.choice((0, 1, 255 if value.dtype == torch.uint8 else 7))),
            lambda: value.float().mul(random.choice((math.nan, math.inf, 1e30))).to(value.dtype),
            lambda: value.to("meta"),
            lambda: torch.empty(0, dtype=value.dtype),
            lambda: value.expand(2, *value.shape)[0] if value.ndim else value,
            lambda: value.repeat_interleave(2, 0)[::2],
        ]
        return random.choice(ways)()
    if field == "shape":
        shapes = (
            (4,),
            (),
            (64, 4),
            (4, 64, 1, 1),
            (4, 8, 3, 3),
            (4, 72),
            (5, 64),
            (2**40, 64),
            (4, 0),
            (-4, 64),
            (4, 64.0),
        )
        return random.choice(shapes)
    if field == "bits":
        return random.choice((0, 1, 2, 3, 8, 9, 16, 63, -1, 2**40, 4.0, None, "4"))
    if field == "order":
        return random.choice(("kernel", "inputs", "", None, "rows"))
    return random.choice(
        (torch.ones(4), torch.ones(4, 2, dtype=torch.float16), torch.ones(4, 64, dtype=torch.float16))
    )


def new_weights() -> Target:
    """``quantize_weight`` of weights that no model has: what is stored decodes to numbers near them."""
    import aquabit

    def made(random: Random) -> Any:
        shape = random.choice(((4, 16), (1, 1), (3, 8, 3, 3), (4,), (0, 4), (2, 2, 2)))
        values = np.random.default_rng(random.randrange(2**32)).normal(size=shape)
        factor = random.choice((1.0, 1.0, 0.0, 1e-30, 1e-8, 1e5, 1e30, math.inf, math.nan))
        with np.errstate(all="ignore"):
            values = values * factor
        if values.size and random.random() < 0.2:
            values.flat[random.randrange(values.size)] = random.choice((math.nan, math.inf, 1e38, -1e38))
        dtype = random.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.int32))
        scheme = random.choice(("usq4", "usq2", "usq4g8", "vq3", "vq2c", "aq1x4g4", "aq1x4k"))
        return torch.from_numpy(np.nan_to_num(values, nan=math.nan)).to(dtype), scheme

    def use(case: Any) -> None:
        weight, scheme = case
        coded = aquabit.quantize_weight(weight, scheme, seed=0)
        decoded = coded.dequantize()
        if not bool(decoded.isfinite().all()):
            raise WrongNumber("a weight that is not finite was stored")
        largest = float(weight.float().abs().max()) if weight.numel() else 0.0
        if weight.numel() and float((decoded - weight.float()).abs().max()) > 2.5 * largest + 1e-30:
            raise WrongNumber("a stored weight is far from what was given")

    return Target("quantize_weight", made, use)


# ---- targets: the command line


def command_line() -> Target:
    """Options with values that nobody should give; the exit code is 0 or 2, with one sentence."""
    import os

    from typer.testing import CliRunner

    from aquabit.cli.app import app

    names = (
        "samples images steps seed guidance eta micro-batch shard design objective scheduler device dtype"
        " bits bytes bops swap top resolution workers space prompts reference metric preset features json"
        " correction"
    )
    given = [f"--{name}" for name in names.split()]
    plain = (
        "-1 0 1e400 nan inf 1e-400 99999999999999999999 2**3 1_0 a:b usq4:usq4 cuda mps meta cpu:7 0/0 1/0"
        " 5/2 /nowhere/x . near:nan near:2 swaps:x 0x10 1e3"
    )
    values = [*plain.split(), "", "٣", "x" * 300, "\x1b[31m", "é", "\udcff", "9" * 5000]
    verbs = (
        ("explain", "study.db"),
        ("status", "study.db"),
        ("search", "study.db", "--plan"),
        ("measure", "model", "--study", "new.db", "--plan"),
        ("inspect", "model"),
        ("models",),
        ("bench", "--shapes", "8x8@1", "--formats", "usq4", "--threads", "1"),
    )

    def made(random: Random) -> tuple[str, ...]:
        words = [*random.choice(verbs)]
        for _ in range(random.choice((1, 1, 2))):
            words += [random.choice(given), random.choice(values)]
        return tuple(words)

    def use(words: tuple[str, ...]) -> None:
        before = os.getcwd()
        os.chdir(folder())
        os.environ["AQUABIT_BANK"] = str(folder() / "bank")
        try:
            result = CliRunner().invoke(app, list(words))
        finally:
            os.chdir(before)
        if result.exit_code not in (0, 2):
            raise RuntimeError(f"exit code {result.exit_code}: {result.output[-200:]} {result.exception!r}")
        if "Traceback" in result.output:
            raise RuntimeError("a traceback was shown")

    return Target("command line", made, use)


MAKERS: tuple[Callable[[], Target], ...] = (
    scheme_text,
    other_texts,
    configuration,
    configuration_file,
    packed_configuration,
    space_file,
    stored_values,
    finetuning_settings,
    given_configuration,
    gguf_file,
    comfy_file,
    folder_of_others,
    study_file,
    bank_file,
    noise_file,
    artifact,
    bit_of_a_study,
    bit_of_a_fit,
    bit_of_noise,
    bit_of_an_artifact,
    timings_file,
    geometry,
    contradictions,
    new_weights,
    command_line,
)


@cache
def targets() -> dict[str, Target]:
    return {t.name: t for t in (make() for make in MAKERS)}
