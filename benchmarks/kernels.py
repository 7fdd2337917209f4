"""The kernels' figures on this machine: python benchmarks/kernels.py PART ... [--quick]

linear     DiT-XL/2's layers at 1, 256 and 1024 tokens, one and two threads, against MKL float32 and oneDNN
           bfloat16, with errors against float64
conv       convolutions of U-Nets: 3 x 3, 1 x 1, of stride 2 and in groups, against oneDNN in float32 (the
           better of two layouts) and bfloat16
groups     formats with a scale for each 16, 32 or 64 weights in a row, against uniform codes of their bits
levels     layers and attention with each set of instructions that this processor has
attention  attention with rounded probabilities against torch's own in float32 and bfloat16, and against its
           form in torch
peers      against torchao's compiled W8A8 and the aqlm package's CPU kernel (extra ``peers``)
models     a whole DiT-XL/2, one block of it, and a whole U-Net with LDM-4's shapes, at 2 bits of random
           codes, memory packed and auto
denoiser_peers
           a call of SD 1.5's U-Net and of DiT-XL/2, at 2, 4 and 8 bits, against torchao, OpenVINO, SDNQ and
           stable-diffusion.cpp, which --python has
bundled    denoisers of the classes and sizes of the bundled ones, 1 and 16 samples, one thread
sharing    layers that read the same tensor (q, k, v) as they are, and as one product that rounds it once
functions  whole models whose feed-forward blocks leave GELU and its like to torch, and where kernels apply it
compiled   a bundled denoiser, packed, as it is and by torch.compile
roofline   what the machine can do, what each format asks of it, and the share that ``linear`` and ``conv``
           reached (after them)
all        every part

Each part takes up to four minutes (``models`` and ``denoiser_peers`` up to twelve, and more where files are
missing; ``--quick``: a few rounds of fewer cases) and replaces its own section of
benchmarks/results/kernels.json and kernels.md: on a processor without AVX-512 VNNI one beside that of
processors with it. Contenders of one case run in turn, in an order that changes
from round to round, so that weights come from memory as in a model; ratios are within rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from aquabit.runtime import reuse_memory
from aquabit.scheme import Progress
from benchmarks.common import RESULTS, section_of
from benchmarks.kernel_timing import Layer, case, expected, load, threads

LINEAR = {"1152 -> 1152": (1152, 1152), "1152 -> 4608": (4608, 1152), "4608 -> 1152": (1152, 4608)}
LINEAR_FORMATS = (
    "aq1x8g8",
    "aq2x6g8",
    "aq3x4g8",
    "aq2x8g8",
    "aq4x4g8",
    "usq2",
    "usq3",
    "usq4",
    "vq3",
    "vq3c",
)
TOKENS = (1, 256, 1024)
CONV_FORMATS = ("aq1x8k", "aq2x6k", "aq3x4k", "aq4x4k", "aq1x8g8", "aq2x6g8", "aq4x4g8", "usq2", "usq4")
UNIFORM = ("usq2", "usq4")


class Convolution(NamedTuple):
    """Of one image, ``side`` pixels wide and high."""

    inputs: int
    out: int
    side: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    formats: tuple[str, ...] = UNIFORM

    @property
    def name(self) -> str:
        channels = f"{self.inputs}" if self.inputs == self.out else f"{self.inputs} -> {self.out}"
        marks = f", {self.kernel} x {self.kernel}" if self.kernel != 3 else ""
        marks += f", stride {self.stride}" if self.stride > 1 else ""
        marks += f", {self.groups} groups" if self.groups > 1 else ""
        return f"{channels} at {self.side}x{self.side}{marks}"


CONV = (
    *(Convolution(c, c, s, formats=CONV_FORMATS) for c, s in ((192, 32), (384, 32), (576, 16), (960, 16))),
    *(Convolution(c, c, s) for c, s in ((320, 64), (192, 64), (1280, 8))),
    *(Convolution(i, o, s, 1) for i, o, s in ((960, 576, 16), (384, 192, 32), (320, 320, 64))),
    *(Convolution(c, c, s, stride=2) for c, s in ((320, 64), (384, 32), (576, 16))),
    *(Convolution(c, c, s, groups=g) for c, s, g in ((384, 32, 2), (576, 16, 4), (384, 32, 8))),
)
THREADS = (1, 2)
SECONDS = {1: 1.0, 256: 6.0, 1024: 11.0}  # of a case, by tokens
CONV_SECONDS, UNIFORM_SECONDS = 12.0, 4.0

WORK = Path(__file__).parent / "work"
MACHINE = ("cpu", "level", "torch", "extension")  # what is said of it

Rows = list[dict[str, Any]]


def linear(progress: Progress, quick: bool) -> Rows:
    """Every format and kernel at every layer of DiT-XL/2."""
    torch.manual_seed(0)
    rows: Rows = []
    shapes = dict(list(LINEAR.items())[: 1 if quick else None])
    tokens = TOKENS[:2] if quick else TOKENS
    total = len(shapes) * len(tokens) * len(THREADS)
    for name, shape in shapes.items():
        layers = [Layer(scheme, shape, seed) for seed, scheme in enumerate(LINEAR_FORMATS)]
        for count in tokens:
            x = torch.randn(count, shape[1])
            rows += _cases(
                "linear",
                name,
                layers,
                x,
                {"tokens": count},
                0.0 if quick else SECONDS[count],
                progress,
                len(rows) == 0,
                total,
            )
    return rows


def conv(progress: Progress, quick: bool) -> Rows:
    """Every kernel at convolutions of one image: every format, or the uniform ones."""
    torch.manual_seed(0)
    rows: Rows = []
    shapes = CONV[2::3] if quick else CONV
    for c in shapes:
        shape = (c.out, c.inputs // c.groups, c.kernel, c.kernel)
        layers = [Layer(scheme, shape, seed, c.stride, c.groups) for seed, scheme in enumerate(c.formats)]
        x = torch.randn(1, c.inputs, c.side, c.side)
        pixels = prod(layers[0].geometry.output(x.shape[2:], shape[2:]))
        total = len(shapes) * len(THREADS)
        rows += _cases(
            "conv",
            c.name,
            layers,
            x,
            {"channels": c.inputs, "side": c.side, "weight": shape, "pixels": pixels},
            0.0 if quick else CONV_SECONDS if c.formats == CONV_FORMATS else UNIFORM_SECONDS,
            progress,
            not rows,
            total,
        )
    return rows


_done: dict[str, int] = {}


def _cases(
    part: str,
    name: str,
    layers: list[Layer],
    x: Tensor,
    facts: dict[str, Any],
    seconds: float,
    progress: Progress,
    first: bool,
    total: int,
) -> Rows:
    """One input on so many threads after another."""
    _done[part] = 0 if first else _done[part]
    bias, rows = torch.zeros(layers[0].shape[0]), Rows()
    exact = {(layer.scheme, act): expected(layer, x, bias, act) for layer in layers for act in (16, 8)}
    with torch.inference_mode():
        for count in THREADS:
            progress(part, _done[part], total)
            with threads(count):
                rows += case(layers, x, seconds, exact, {"shape": name, **facts, "threads": count})
            _done[part] += 1
            progress(part, _done[part], total)
    return rows


def peers(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_peers import peers as run

    return run(progress, quick)


def attention(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_attention import attention as run

    return run(progress, quick)


def groups(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_groups import groups as run

    return run(progress, quick)


def levels(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_levels import levels as run

    return run(progress, quick)


def models(progress: Progress, quick: bool, only: str = "") -> Rows:
    from benchmarks.kernel_models import models as run

    return _with_others("models", run(progress, quick, only), only)


def denoiser_peers(
    progress: Progress, quick: bool, python: Path, folder: Path, only: str = ""
) -> Iterator[Rows]:
    """All rows again after every case, with those of cases that are not run."""
    from benchmarks.kernel_denoiser_peers import denoiser_peers as run

    rows = _section(_read(), "denoiser_peers") if only else []
    for fresh in run(progress, quick, python, folder, only):
        done = {(row["model"], row["threads"]) for row in fresh}
        rows = [row for row in rows if (row["model"], row["threads"]) not in done] + fresh
        yield rows


def bundled(progress: Progress, quick: bool, only: str = "", processor_time: bool = False) -> Rows:
    from benchmarks.kernel_models import BUNDLED_CASES
    from benchmarks.kernel_models import models as run

    clock = time.process_time if processor_time else time.perf_counter
    return _with_others("bundled", run(progress, quick, only, BUNDLED_CASES, clock), only)


def _with_others(part: str, fresh: Rows, only: str) -> Rows:
    """Rows of models that were timed now, after those of others that ``only`` left out."""
    done = {row["model"] for row in fresh}
    return [row for row in _section(_read(), part) if only and row["model"] not in done] + fresh


def sharing(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_ways import sharing as run

    return run(progress, quick)


def functions(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_ways import functions as run

    return run(progress, quick)


def compiled(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_ways import compiled as run

    return run(progress, quick)


def roofline(progress: Progress, quick: bool) -> Rows:
    from benchmarks.kernel_roofline import roofline as run

    return run(progress, quick, *(_section(_read(), part) for part in ("linear", "conv")))


PARTS: dict[str, Callable[..., Rows | Iterator[Rows]]] = {
    "linear": linear,
    "conv": conv,
    "groups": groups,
    "levels": levels,
    "attention": attention,
    "peers": peers,
    "models": models,
    "bundled": bundled,
    "sharing": sharing,
    "functions": functions,
    "compiled": compiled,
    "roofline": roofline,
    "denoiser_peers": denoiser_peers,  # last: the only one that needs another Python
}


def _read() -> dict[str, Any]:
    path = RESULTS / "kernels.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _section(found: dict[str, Any], part: str) -> Rows:
    return found.get(section_of(part), {}).get("rows", [])


def _text(found: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    parts = []
    for part, about in found.items():
        rows = ",\n".join(json.dumps(_short(row), allow_nan=False) for row in about["rows"])
        rest = json.dumps({k: _short(v) for k, v in about.items() if k != "rows"}, allow_nan=False)
        parts.append(f'{json.dumps(part)}: {rest[:-1]}, "rows": [\n{rows}\n]}}')
    return "{" + ",\n".join(parts) + "}\n"


def _short(value: Any) -> Any:
    """Five digits of every number with a fraction."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value


def _write(found: dict[str, Any]) -> None:
    from benchmarks.kernel_tables import markdown

    for name, text in {"kernels.json": _text(found), "kernels.md": markdown(found)}.items():
        (RESULTS / f".{name}").write_text(text)
        (RESULTS / f".{name}").replace(RESULTS / name)


def main() -> None:
    from aquabit.cli.progress import bars
    from aquabit.kernels.timings import machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part",
        nargs="+",
        choices=[*PARTS, "all", "tables"],
        help="tables: only the Markdown, from what was measured",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds of fewer cases, to see that it runs"
    )
    parser.add_argument(
        "--retime",
        action="store_true",
        help="models: measure anew what chooses the kernels, which is kept in benchmarks/work/timings",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="models, bundled: those whose name holds TEXT; denoiser_peers: those of whose name and threads"
        " (... , 1 thread) it is part; the others keep their rows",
    )
    parser.add_argument(
        "--python",
        type=Path,
        default=WORK / "denoiser-peers" / "bin" / "python",
        help="denoiser_peers: the Python that has the other programs",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=WORK / "denoiser-peers-files",
        help="denoiser_peers: where the files that they read are kept (8 GB)",
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="bundled: count this process's time alone, where the machine has other work",
    )
    options = parser.parse_args()
    reuse_memory()
    folder = Path(os.environ.setdefault("AQUABIT_TIMINGS", str(WORK / "timings")))
    if options.retime:
        shutil.rmtree(folder, ignore_errors=True)
    special = {
        "models": (options.only,),
        "bundled": (options.only, options.processor_time),
        "denoiser_peers": (options.python, options.folder, options.only),
    }
    for part in PARTS if "all" in options.part else [p for p in options.part if p != "tables"]:
        started, before = time.perf_counter(), load()
        with bars() as progress:
            made = PARTS[part](progress, options.quick, *special.get(part, ()))
            for rows in [made] if isinstance(made, list) else made:
                about = {k: v for k, v in machine(torch.get_num_threads()).items() if k in MACHINE}
                marks = {" --quick": options.quick, " --processor-time": options.processor_time}
                command = f"python benchmarks/kernels.py {part}{''.join(m for m, on in marks.items() if on)}"
                seconds = time.perf_counter() - started
                facts = {"command": command, "machine": about, "load": before, "seconds": seconds}
                _write(_read() | {section_of(part): {**facts, "rows": rows}})
        print(
            f"{part}: {len(rows)} rows in {time.perf_counter() - started:.0f} s (load before: {before:.1f})",
            flush=True,
        )
    _write(_read())
    print((RESULTS / "kernels.md").read_text())


if __name__ == "__main__":
    main()
