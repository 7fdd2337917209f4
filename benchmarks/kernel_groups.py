"""Part ``groups`` of benchmarks/kernels.py: formats with a scale for each 16, 32 or 64 weights of a row,
beside uniform codes of as many bits with one scale a row."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from aquabit.activation_bits import Rounding, act_text
from aquabit.scheme import Progress, Scheme
from benchmarks.kernel_timing import Layer, Run, call, errors, expected, paired, quartiles, ratio, threads

Rows = list[dict[str, Any]]
FORMATS = (
    *("usq4g32", "int4g32", "int4g64", "nf4g64", "mxfp4", "nvfp4", "q4_0", "q4_1", "iq4_nl"),
    *("q5_0", "q5_1", "q8_0", "mxfp8"),
)
SUPER_BLOCKS = ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K")  # of rows that are a multiple of 256
SHAPES = {  # name -> outputs, inputs, formats
    "192 -> 192": (192, 192, FORMATS),
    "1152 -> 1152": (1152, 1152, FORMATS),
    "1152 -> 4608": (4608, 1152, FORMATS),
    "1280 -> 1280": (1280, 1280, SUPER_BLOCKS),
}
TOKENS = (1, 256)
ACTS: tuple[Rounding, ...] = (8, "i8", 16)
SECONDS = 9.0  # of a case
ROUNDS = (6, 400)
SHORTEST = 5e-4  # seconds of what is timed in one go: small calls are repeated


def groups(progress: Progress, quick: bool) -> Rows:
    """Every format at every shape on one thread; ``quick``: the smallest."""
    torch.manual_seed(0)
    shapes = dict(list(SHAPES.items())[: 1 if quick else None])
    cases = [(name, tokens, act) for name in shapes for tokens in TOKENS for act in ACTS]
    rows: Rows = []
    with threads(1), torch.inference_mode():
        for done, (name, tokens, act) in enumerate(cases):
            progress("groups", done, len(cases))
            out, inputs, formats = shapes[name]
            facts = {"shape": name, "tokens": tokens, "threads": 1, "kernel": f"decode {act_text(act)}"}
            found = _case(formats, (out, inputs), tokens, act, 0.0 if quick else SECONDS)
            rows += [facts | row for row in found]
        progress("groups", len(cases), len(cases))
    return rows


def _case(
    formats: tuple[str, ...], shape: tuple[int, int], tokens: int, act: Rounding, seconds: float
) -> Rows:
    """A row for each format: ``over_uniform`` is how many times as long uniform codes of its bits take."""
    uniform = {text: f"usq{Scheme.parse(text).layout(shape).bits}" for text in formats}
    layers = {text: Layer(text, shape) for text in (*dict.fromkeys(uniform.values()), *formats)}
    x, bias = torch.randn(tokens, shape[1]), torch.zeros(shape[0])
    calls = {text: call(layer, x, bias, "decode", "fast", act) for text, layer in layers.items()}
    repeats = _repeats(calls[uniform[formats[0]]])
    times = paired({text: _repeated(run, repeats) for text, run in calls.items()}, seconds, ROUNDS)
    rows: Rows = []
    for text, layer in layers.items():
        stored = sum(Scheme.parse(text).layout(shape).stored_bytes(shape))
        row = {
            "format": text,
            "bits": 8 * stored / prod(shape),
            "ms": 1e3 * quartiles(times[text])["median"] / repeats,
        }
        if text in uniform:
            row["over_uniform"] = ratio(times[uniform[text]], times[text])
        error = errors(calls[text](), expected(layer, x, bias, act))
        rows.append(row | {"rounds": len(times[text]), **error})
    return rows


def _repeats(run: Run) -> int:
    """How often a call is made in one go."""
    seconds = min(paired({"": run}, 0.0, (5, 5))[""])
    return max(1, round(SHORTEST / seconds))


def _repeated(run: Run, times: int) -> Run:
    def runs() -> torch.Tensor:
        for _ in range(times - 1):
            run()
        return run()

    return runs
