"""Every option of every verb: how it is called, and what it changes. An option without a row here fails."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from aquabit import workflows
from aquabit.cli.app import app
from aquabit.measuring.model import Model
from aquabit.pipelines import loading, trace
from aquabit.quant.bank import Bank
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Budget, QuantConfig, StepGroups
from aquabit.search.front import Front
from aquabit.search.search_options import SearchOptions
from aquabit.sensitivity.plan import PARTS
from aquabit.sensitivity.result import Sensitivity
from aquabit.space import make_space
from aquabit.study import Study
from aquabit.within import Fitted
from tests.command_line import call, fails, run
from tests.conftest import tiny_pipeline
from tests.pipelines.test_lora import state_for
from tests.tiny_inputs import WITH_PICTURES, pictures
from tests.tiny_pipelines import randomised
from tests.worlds import near_study


def brightness(images: torch.Tensor, full: torch.Tensor, conditions: Any) -> torch.Tensor:
    """A metric of the user's."""
    return images.mean((1, 2, 3))


brightness.direction = "max"  # type: ignore[attr-defined]


# ---- what is called, and what is seen of it


@dataclass(frozen=True)
class Row:
    """An option: ``given`` is added to the verb's words, and what is seen of ``key`` differs from a call
    without it. ``more`` is added to both, ``words`` stand in the place of the verb's own. ``reach``: the
    function whose arguments are seen, instead of its work (a key of REACHED). ``refused``: what is said where
    the option cannot act here."""

    given: str
    key: str
    more: str = ""
    reach: str = ""
    refused: str = ""
    words: str | None = None


SPACE = {"schemes": ["usq2", "usq4"], "activations": [8]}
MEASURED = "pipe --space space.json --images 2 --steps 2 --workers 1"
AGAIN = f"{MEASURED} --samples 0 --study s.db"  # everything is measured
WORDS = {  # of every verb; {here} is a new folder for each call
    "run": f"{MEASURED} --out {{here}}/run",
    "models": "",
    "inspect": "pipe",
    "convert": "checkpoint.ckpt --out {here}/pipe",
    "measure": f"{MEASURED} --samples 0 --study {{here}}/s.db",
    "status": "s.db",
    "merge": "s.db --out {here}/s.db",
    "explain": "near.db --estimator average_bits",
    "validate": "s.db --workers 1",
    "search": "s.db --workers 1",
    "quantize": "pipe config.json --out {here}/packed",
    "export": "pipe config.json --to torchao --out {here}/e.json",
    "generate": "packed --deterministic --images 2 --out {here}/a.png",
    "report": "s.db --out {here}/page",
    "bench": "--formats usq4 --shapes 4x8@2 --json -",
}
FAILING = {  # a call of every verb that fails
    "run": "nothing --out {here}/run",
    "models": "--json {here}/none/x.json",
    "inspect": "nothing",
    "convert": "nothing --out {here}/pipe",
    "measure": "nothing --study {here}/s.db",
    "status": "nothing",
    "merge": "nothing --out {here}/s.db",
    "explain": "nothing",
    "validate": "nothing",
    "search": "nothing",
    "quantize": "nothing config.json --out {here}/packed",
    "export": "nothing config.json --to torchao --out {here}/e.json",
    "generate": "nothing --out {here}/a.png",
    "report": "nothing --out {here}/page",
    "bench": "--shapes wide",
}
REACHED: dict[str, tuple[str, str]] = {  # functions that take too long, and what they return instead
    "run": ("aquabit.workflows:run_flow", "run"),
    "pool": ("aquabit.measuring.session:pool_for", "stop"),
    "contexts": ("aquabit.workflows:run_contexts", "nothing"),
    "validate": ("aquabit.workflows:validate_study", "sensitivity"),
    "search": ("aquabit.workflows:search", "front"),
    "quantize": ("aquabit.packing:quantize", "stop"),
    "export_files": ("aquabit.workflows:export_files", "stop"),
    "generate": ("aquabit.packing:generate", "stop"),
    "convert": ("aquabit.pipelines:convert_ldm4", "pipe"),
    "report": ("aquabit.reports:report", "nothing"),
}

SOURCE = {
    "--variant": Row("--variant fp16", "loaded"),
    "--base": Row("--base pipe", "exit", words="net.safetensors"),
    "--lora": Row("--lora lora.safetensors:0.5", "loaded"),
    "--component": Row("--component vae", "", refused="component 'vae' is no network of"),
}
SAMPLED = {  # how images are made
    "--steps": Row("--steps 1", "pictures"),
    "--scheduler": Row("--scheduler ddpm", "pictures"),
    "--eta": Row("--eta 0.7", "pictures"),
    "--guidance": Row("--guidance 3", "pictures"),
    "--prompts": Row("--prompts classes.txt", "pictures"),
    "--resolution": Row("--resolution 16", "", refused="resolution is 16, but Class"),
    "--frames": Row("--frames 3", "", refused="frames is 3, but Class"),
    "--inputs": Row("--inputs colours", "", refused="ClassConditionalPipeline takes no pictures"),
    "--strength": Row("--strength 0.5", "", refused="strength is 0.5, but Class"),
}
EDITED = {  # of a pipeline that takes pictures
    "--inputs": Row("--inputs colours", "", more="--prompts words.txt"),
    "--strength": Row("--strength 0.3", "", more="--prompts words.txt --inputs colours --steps 5"),
}
MACHINE = {
    "--workers": Row("--workers 3", "reached"),
    "--device": Row("--device meta", "reached"),
    "--bank": Row("--bank elsewhere", "reached"),
}
MEASURING = {
    **SAMPLED,
    "--images": Row("--images 4", "pictures"),
    "--seed": Row("--seed 5", "pictures"),
    "--dtype": Row("--dtype bfloat16", "numbers"),
    "--space": Row("--space other.json", "space"),
    "--target": Row("--target sdnq", "", refused="a8 is none of sdnq's activations"),
    "--objective": Row("--objective psnr", "objective"),
    "--reference": Row("--reference photos", "numbers"),
    "--features": Row("--features lpips=nowhere", "", refused="nowhere"),
    "--preset": Row("--preset qua2sedimo-dit", "", refused="resolution is 256"),
    "--metric": Row("--metric tests.cli.test_options:brightness", "numbers"),
    "--correction": Row("--correction cnc+bc", "space"),
    "--step-groups": Row("--step-groups 0,1", "space"),
    "--micro-batch": Row("--micro-batch 1", "calls"),
    "--damages": Row("--damages probes", "damages"),
}


def reaching(where: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """The same options, seen by what reaches a function."""
    return {
        k: replace(r, key="reached", reach=where, refused="")
        if r.key not in ("loaded", "exit")
        else replace(r, reach=where)
        for k, r in rows.items()
    }


def edited(words: str, key: str, first: str = "") -> dict[str, Row]:
    """The options of pictures for ``words``, which are called with the pictures ``first`` without."""
    return {
        k: replace(r, key=key, words=f"{words} {first if k == '--inputs' else ''}") for k, r in EDITED.items()
    }


TO_FILES = "pipe config.json --to gguf --out {here}/e.gguf"
WEAK = "edit --space edit.json --images 2 --steps 3 --workers 1 --samples 0 --study weak.db"
EDIT = "edit --space edit.json --images 2 --steps 3 --workers 1 --samples 0 --study {here}/s.db"
ROWS: dict[str, dict[str, Row]] = {
    "run": reaching(
        "run",
        {
            **SOURCE,
            **MEASURING,
            **MACHINE,
            "--out": Row("--out {here}/other", ""),
            "--bits": Row("--bits 4.5", ""),
            "--samples": Row("--samples 30", ""),
            "--flips": Row("--flips 8", ""),
            "--swap": Row("--swap usq8:usq4", ""),
            "--within": Row("--within 2h", ""),
            "--fits": Row("--fits wanted", ""),
            "--front": Row("--front 0", ""),
            "--plan": Row("--plan", "", more="--bits 4"),
            "--features": Row("--features lpips=nowhere", ""),
        },
    )
    | {
        "--variant": Row("--variant fp16", "reached", reach="run"),
        "--base": Row("--base pipe", "reached", reach="run"),
        "--lora": Row("--lora lora.safetensors", "reached", reach="run"),
        "--component": Row("--component denoiser", "reached", reach="run"),
        "--json": Row("--json -", "said", reach="run"),
        "--mlflow": Row("--mlflow ftp://none", "", refused="MLflow"),
    },
    "models": {"--json": Row("--json -", "said")},
    "inspect": {
        **SOURCE,
        "--memory": Row("--memory", "said"),
        "--micro-batch": Row("--micro-batch 9", "said", more="--memory --json -"),
        "--guidance": Row("--guidance 3", "said", more="--memory --json -"),
        "--target": Row("--target gguf", "said"),
        "--json": Row("--json {here}/x.json", "files"),
    },
    "convert": {"--out": Row("--out {here}/other", "reached", reach="convert")},
    "measure": {
        **SOURCE,
        "--base": Row("--base pipe", "exit", words=WORDS["measure"].replace("pipe", "net.safetensors", 1)),
        **MEASURING,
        **edited(EDIT, "pictures", "--inputs greys"),
        **reaching("pool", MACHINE),
        "--study": Row("--study {here}/t.db", "files"),
        "--samples": Row("--samples 2", "rows"),
        "--design": Row("--design random", "numbers", more="--samples 2"),
        "--shard": Row("--shard 1/2", "rows", more="--samples 2"),
        "--contexts": Row("--contexts 2", "reached", reach="contexts", words=AGAIN),
        "--bits": Row("--bits 6", "reached", more="--contexts 2", reach="contexts", words=AGAIN),
        "--ray": Row("--ray local", "reached", reach="pool"),
        "--plan": Row("--plan", "files"),
        "--json": Row("--json {here}/x.json", "files"),
    },
    "status": {"--json": Row("--json -", "said")},
    "merge": {"--out": Row("--out {here}/t.db", "files")},
    "explain": {
        "--top": Row("--top 3", "said"),
        "--bits": Row("--bits 3.5", "said"),
        "--swap": Row("--swap vq4:vq2", "said"),
        "--estimator": Row("--estimator sum_of_damages", "said"),
        "--json": Row("--json {here}/x.json", "files"),
    },
    "validate": reaching(
        "validate",
        {
            **MACHINE,
            "--flips": Row("--flips 8", ""),
            "--swap": Row("--swap usq8:usq4", ""),
            "--bits": Row("--bits 4.5", ""),
            "--seed": Row("--seed 1", ""),
            "--model": Row("--model pipe", ""),
        },
    )
    | {"--json": Row("--json -", "said", reach="validate")},
    "search": reaching(
        "search",
        {
            **MACHINE,
            "--bits": Row("--bits 0.5", ""),
            "--bytes": Row("--bytes 900", ""),
            "--bops": Row("--bops 1e6", ""),
            "--latency": Row("--latency 5", ""),
            "--against": Row("--against config.json", ""),
            "--rounds": Row("--rounds 1", ""),
            "--per-round": Row("--per-round 2", "", more="--method surrogate"),
            "--method": Row("--method surrogate", ""),
            "--screen": Row("--screen 2", "", more="--method surrogate"),
            "--seed": Row("--seed 1", ""),
            "--front": Row("--front 0", ""),
            "--correction": Row("--correction cnc", ""),
            "--target": Row("--target sdnq", ""),
            "--model": Row("--model pipe", ""),
        },
    )
    | {
        "--out": Row("--out {here}/c.json", "files", reach="search"),
        "--json": Row("--json -", "said", reach="search"),
    },
    "quantize": {
        "--variant": Row("--variant fp16", "", refused="this is model"),
        "--base": Row("--base pipe", "exit", words=WORDS["quantize"].replace("pipe", "same.safetensors", 1)),
        "--lora": Row("--lora lora.safetensors", "", refused="this is model"),
        "--component": SOURCE["--component"],
        "--out": Row("--out {here}/other", "files"),
        "--finetune": Row("--finetune", "reached", reach="quantize"),
        "--finetune-steps": Row("--finetune-steps 2", "reached", "--finetune", reach="quantize"),
        "--finetune-settings": Row("--finetune-settings tuning.json", "files"),
        **{k: replace(r, key="files") for k, r in SAMPLED.items()},
        **edited("edit uniform.json --out {here}/packed", "files"),
        "--correct": Row("--correct", "files"),
        "--correction": Row("--correction bc", "files", more="--correct"),
        "--device": Row("--device meta", "reached", reach="quantize"),
        "--bank": Row("--bank {here}/bank", "files"),
    },
    "export": {
        "--variant": Row("--variant fp16", "", refused="this is model"),
        "--base": Row("--base pipe", "exit", words=WORDS["export"].replace("pipe", "same.safetensors", 1)),
        "--lora": Row("--lora lora.safetensors", "", refused="this is model"),
        "--component": SOURCE["--component"],
        "--to": Row("--to quanto", "files"),
        "--device": Row("--device meta", "reached", words=TO_FILES, reach="export_files"),
        "--bank": Row("--bank elsewhere", "reached", words=TO_FILES, reach="export_files"),
        "--out": Row("--out {here}/f.json", "files"),
        "--json": Row("--json {here}/x.json", "files"),
    },
    "generate": {
        **{k: replace(r, key="files") for k, r in SAMPLED.items()},
        **edited("edit --steps 3 --images 2 --out {here}/a.png", "files", "--inputs greys"),
        "--out": Row("--out {here}/b.png", "files"),
        "--images": Row("--images 3", "files"),
        "--seed": Row("--seed 4", "files"),
        "--correction": Row(
            "--correction none", "files", words=WORDS["generate"].replace("packed", "corrected")
        ),
        "--deterministic": Row("--deterministic", "said", words="packed --images 2 --out {here}/a.png"),
        "--device": Row("--device meta", "reached", reach="generate"),
        "--memory": Row("--memory auto", "reached", reach="generate"),
        "--offload": Row("--offload", "", refused="offload lets components wait"),
        "--model": Row("--model tests.cli.test_options:brightness", "", refused="brightness"),
    },
    "report": {
        "--out": Row("--out {here}/other", "reached", reach="report"),
        "--mlflow": Row("--mlflow ftp://none", "", refused="MLflow"),  # missing, or at such an address
    },
    "bench": {
        "--formats": Row("--formats usq8", "timed"),
        "--shapes": Row("--shapes 8x8@2", "timed"),
        "--act": Row("--act i8", "timed"),
        "--threads": Row("--threads 3", "timed"),
        "--dtype": Row("--dtype float64", "", words="packed", refused="dtype 'float64' is not timed"),
        "--json": Row("--json {here}/x.json", "files", words="--formats usq4 --shapes 4x8@2"),
    },
}
for verb, words in FAILING.items():
    ROWS[verb]["--debug"] = Row("--debug", "raised", words=words)


# ---- calling


class Calls:
    """Calls in a folder with a tiny pipeline and what is made of it, each made once."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, count()
        self.seen = cache(self._seen)

    def _seen(self, verb: str, words: str, reach: str = "") -> dict[str, Any]:
        """What is seen of a call, by name."""
        here = self.folder / f"call{next(self.number)}"
        here.mkdir()
        seen: dict[str, Any] = {"loaded": [], "calls": set(), "reached": []}
        with ExitStack() as stack:
            for patched in (*self._watching(seen), *self._reaching(reach, seen, here)):
                stack.enter_context(patched)
            result = call(self.folder, verb, *words.format(here=here).split(), ok=False)
        said = result.output.replace(str(here), "HERE")
        seen |= {"exit": result.exit_code, "said": said, "raised": type(result.exception).__name__}
        files = [p for p in sorted(here.rglob("*")) if p.is_file() and not p.name.endswith(".lock")]
        seen["files"] = {
            str(p.relative_to(here)): "" if p.suffix == ".db" else hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        }
        if (here / "s.db").exists() and "protocol" in (study := Study(here / "s.db")):
            seen |= facts(study)
        if verb == "bench" and result.stdout.startswith("{"):
            rows = json.loads(result.stdout)["rows"]
            seen["timed"] = [[r[k] for k in ("format", "shape", "act", "machine")] for r in rows]
        return seen

    def _watching(self, seen: dict[str, Any]) -> Iterator[Any]:
        """Patches that note what is loaded, and how many samples calls of the denoiser have."""
        bound, fuse, forward = loading._bound, loading.fuse_loras_, DiTTransformer2DModel.forward

        def loads(pipe: Any, reference: Any, *rest: Any) -> Any:
            seen["loaded"].append(reference.text)
            return bound(pipe, reference, *rest)

        def fuses(pipe: Any, loras: Any) -> Any:
            seen["loaded"].append(str(loras))
            return fuse(pipe, loras)

        def calls(self: Any, hidden_states: Any, *rest: Any, **named: Any) -> Any:
            seen["calls"].add(len(hidden_states))
            return forward(self, hidden_states, *rest, **named)

        yield patch.object(loading, "_bound", loads)
        yield patch.object(loading, "fuse_loras_", fuses)
        yield patch.object(DiTTransformer2DModel, "forward", calls)

    def _reaching(self, reach: str, seen: dict[str, Any], here: Path) -> Iterator[Any]:
        """The patch of a function that notes what it is given, and returns something at once."""
        if not reach:
            return
        place, returned = REACHED[reach]

        def noted(*given: Any, **named: Any) -> Any:
            seen["reached"].append(plainly([given, named]).replace(str(here), "HERE"))
            if returned == "stop":
                raise AquabitError("far enough")
            if returned == "run":
                shutil.copytree(self.folder / "run", given[1])
            return {"pipe": pipe, "run": front, "front": front, "sensitivity": found}.get(returned, int)()

        def pipe() -> Any:
            return SimpleNamespace(unet=torch.nn.Linear(1, 1), config=SimpleNamespace(classes=1))

        def front() -> Front:
            return Front.from_dict(Study(self.folder / "s.db").get("front"))

        def found() -> Sensitivity:
            return Sensitivity.from_dict(Study(self.folder / "near.db").get("sensitivity"))

        module, _, name = place.partition(":")
        yield patch(f"{module}.{name}", noted)


def plainly(value: Any) -> str:
    """Values as text, without what differs from call to call."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(plainly, value))})"
    if isinstance(value, dict):
        return plainly(list(value.items()))
    if isinstance(value, Bank):
        return str(value.folder)
    plain = value is None or is_dataclass(value) or isinstance(value, str | int | float | Path)
    return f"{value}" if plain and not isinstance(value, Model) else type(value).__name__


def facts(study: Study) -> dict[str, Any]:
    """What a study holds."""
    table, protocol = study.measurements(failed=True), study.protocol
    named = table.drop(columns=["seconds", "created", "protocol"]).sort_values(["kind", "config"])
    full = table[table.kind == "reference"].config
    return {
        "pictures": [study.thumbnails().get((c, protocol.digest)) for c in full],
        "numbers": named.to_csv(),
        "rows": len(table),
        "space": study.get("space"),
        "objective": protocol.objective,
        "damages": study.get("damages"),
    }


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    folder = tmp_path_factory.mktemp("options")
    pipe, other = tiny_pipeline("dit"), tiny_pipeline("dit", seed=1)
    pipe.save_pretrained(folder / "pipe")
    other.save_pretrained(folder / "pipe", variant="fp16")
    save_file(other.denoiser.state_dict(), folder / "net.safetensors")
    save_file(pipe.denoiser.state_dict(), folder / "same.safetensors")
    save_file(state_for(pipe), folder / "lora.safetensors")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    edit = randomised(WITH_PICTURES["StableDiffusion3Img2ImgPipeline"])
    edit.save_pretrained(folder / "edit")
    uniform = make_space(trace(edit), fingerprint(edit.transformer), schemes=["usq4"]).uniform("usq4", 8)
    (folder / "uniform.json").write_text(uniform.to_json())
    (folder / "edit.json").write_text(json.dumps({"schemes": ["usq4"], "activations": [8]}))
    for name, grey in (("colours", False), ("greys", True)):
        for file in pictures(folder / name, 2).iterdir():
            Image.open(file).convert("L" if grey else "RGB").save(file)
    (folder / "space.json").write_text(json.dumps(SPACE))
    (folder / "other.json").write_text(json.dumps(SPACE | {"schemes": ["usq3", "usq4"]}))
    (folder / "classes.txt").write_text("7\n3\n")
    (folder / "tuning.json").write_text('{"steps": 1, "batch": 1, "images": 2}')
    (folder / "checkpoint.ckpt").write_bytes(b"")
    measured = WORDS["measure"].format(here=".").split()
    call(folder, "measure", *measured)
    found = "search s.db --bits 4 --rounds 0 --workers 1 --out config.json"
    call(folder, *found.split())
    call(folder, *["quantize", "pipe", "config.json", "--out", "packed"])
    call(folder, *["quantize", "pipe", "config.json", "--out", "corrected", "--correct"])
    _, near = near_study(folder / "near.db", 60)
    workflows.explained(near, estimator="average_bits")
    (folder / "words.txt").write_text("a cat\n")
    chosen = QuantConfig.load(folder / "config.json")
    layers = {k: replace(c, act=(8, 6)) for k, c in chosen.layers.items()}
    grouped = replace(chosen, layers=layers, steps=StepGroups(2, (0, 1)))
    (folder / "groups.json").write_text(grouped.to_json())
    (folder / "begun").mkdir()
    begun = Study(folder / "begun" / "study.db")
    begun.set(planned=Fitted(3600.0, 24, 8, 16, 5, {"sample": 60.0}).to_dict())
    (folder / "wanted").mkdir()
    Study(folder / "wanted" / "study.db").set(formats="wanted")
    (folder / "run").mkdir()
    shutil.copy(folder / "near.db", folder / "run" / "study.db")
    return Calls(folder)


# ---- the tests

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = [
    (verb, p.opts[0]) for verb, c in COMMANDS.items() for p in c.params if p.param_type_name == "option"
]


def test_every_option_has_a_row() -> None:
    assert {(verb, option) for verb, rows in ROWS.items() for option in rows} == set(OPTIONS)


@pytest.mark.parametrize(("verb", "option"), OPTIONS)
def test_every_option_changes_something(verb: str, option: str, calls: Calls) -> None:
    row = ROWS[verb][option]
    assert option in row.given
    words = f"{WORDS[verb] if row.words is None else row.words} {row.more}"
    without, with_ = (calls.seen(verb, w, row.reach) for w in (words, f"{words} {row.given}"))
    if row.refused:
        said = with_["said"].splitlines()
        assert with_["exit"] == 2 and len(said) <= 2 and row.refused in said[-1], with_["said"]
        return
    if row.key != "raised":
        assert with_["exit"] == 0 or "far enough" in with_["said"], with_["said"]
        assert without["exit"] == 0 or row.key == "exit" or "far enough" in without["said"], without["said"]
    assert with_[row.key] != without[row.key], with_[row.key]


@pytest.mark.parametrize("verb", ["measure", "quantize", "generate", "inspect", "bench"])
def test_without_a_change_nothing_differs(verb: str, calls: Calls) -> None:
    """Else a difference would tell nothing."""
    first, again = (calls.seen(verb, WORDS[verb] + space) for space in (" ", "  "))
    noisy = ("said",) if verb == "bench" else ()
    assert {k: v for k, v in first.items() if k not in noisy} == {
        k: v for k, v in again.items() if k not in noisy
    }


PACK = "quantize pipe config.json --out new"
PLAN = f"run {MEASURED} --out new --plan"
IDLE = {  # what an option would do nothing in, and what is said
    "inspect pipe --micro-batch 9": "--micro-batch changes nothing without --memory; leave it out",
    "inspect pipe --guidance 3": "--guidance changes nothing without --memory",
    "bench packed --formats usq4": "--formats changes nothing beside packed, a packed model",
    "bench packed --act 8": "--act changes nothing beside packed",
    "bench --formats usq4 --dtype bfloat16": "--dtype changes nothing without DIR",
    "explain near.db --json - --top 3": "--top changes nothing beside --json -",
    f"measure {AGAIN} --bits 4": "--bits changes nothing without --contexts",
    f"measure {AGAIN} --contexts 1": "contexts is 1; an average needs at least 2",
    f"measure {AGAIN} --plan --contexts 2 --bits 9": "budget bits = 9 is out of range",
    f"measure {AGAIN} --plan --ray local": "a plan times this machine",
    f"measure {AGAIN} --damages probes": "s.db was begun with --damages gradients, not probes",
    f"{PLAN} --bits 9": "budget bits = 9 is out of range",
    f"{PLAN} --bits 4 --swap usq3:usq2": "usq3",
    "run pipe --out begun --within 2h": "was begun with --within 60 min, not 2 h 0 min",
    "run pipe --out begun --within 1h --samples 50": "--samples 24, not 50",
    "run pipe --out begun --within 1h --flips 9": "--flips 8, not 9",
    "run pipe --out begun --within 1h --steps 7": "--steps 5, not 7",
    "run pipe --out begun --within 1h --fits wanted": "--fits all, not wanted",
    "run pipe --out wanted --fits all": "wanted/study.db was begun with --fits wanted, not all",
    "search s.db --bits 0": "budget bits is 0.0; it must be positive",
    "search s.db --bits 0 --bytes 9000": "budget bits is 0.0; it must be positive",
    "search s.db --bits 4 --per-round 3": "per_round is 3, but method program",
    "search s.db --bits 4 --screen 3": "screen is 3, but method program",
    "quantize pipe groups.json --out new --steps 3": "is set for groups of 2 steps",
    f"{PACK} --scheduler euler --eta 0.5": "EulerDiscreteScheduler has no eta",
    f"{PACK} --prompts words.txt": "condition 'a cat' is no class label",
    f"{PACK} --inputs colours": "ClassConditionalPipeline takes no pictures; leave them out",
    "generate edit --out new.png --prompts words.txt": "makes no images without image; give --inputs DIR",
    f"measure {WEAK} --strength 0.2 --inputs greys --prompts words.txt": (
        "strength 0.2 of 3 steps leaves none to run; give at least 5"
    ),
    "generate pipe --out new.png --memory auto": "memory 'auto' is for packed layers",
}


@pytest.mark.parametrize("words", IDLE)
def test_what_would_change_nothing_is_refused(words: str, calls: Calls) -> None:
    assert IDLE[words] in fails(calls.folder, *words.split())
    assert not (calls.folder / "new").exists()


def test_a_plan_counts_contexts(calls: Calls) -> None:
    plans = [
        json.loads(run(calls.folder, "measure", *AGAIN.split(), "--plan", "--json", "-", *more))
        for more in ((), ("--contexts", "2", "--bits", "4"))
    ]
    assert plans[0]["contexts_seconds"] == 0 < plans[1]["contexts_seconds"]
    assert plans[1]["seconds"] == pytest.approx(sum(plans[1][part] for part in PARTS))


def test_a_front_answers_one_budget_and_one_objective(calls: Calls) -> None:
    study = Study(calls.folder / "s.db")
    front, objective = study.get("front"), study.protocol.objective
    asked = SearchOptions(Budget(**front["budget"]), front=0)
    assert workflows._answers(front, asked, objective)
    assert not workflows._answers(front, asked, "psnr")
    assert not workflows._answers(front, replace(asked, budget=Budget(bits=3.0)), objective)
    for known, wanted, enough in ((2, 2, True), (2, 1, True), (2, 3, False)):
        stored = front | {"comparison": front["comparison"] | {"front": known}}
        assert workflows._answers(stored, replace(asked, front=wanted), objective) == enough


def test_a_model_in_memory_is_not_offloaded() -> None:
    with pytest.raises(AquabitError, match="offload says how a model is loaded"):
        loading.load(tiny_pipeline("dit"), "cuda", offload=True)
