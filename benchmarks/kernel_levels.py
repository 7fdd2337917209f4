"""Part ``levels`` of benchmarks/kernels.py: the same layers and attention with each set of instructions that
this processor has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aquabit.kernels import rounded_attention
from aquabit.kernels.attention import attention_levels
from aquabit.kernels.backends.decode import decode_conv2d, decode_levels, decode_linear
from aquabit.scheme import Progress
from benchmarks.kernel_timing import Layer, paired, ratio, threads

Rows = list[dict[str, Any]]
FORMATS = ("usq2", "usq4", "usq8", "int4g32", "usq4g32")
LAYERS = ((1, 1152, 1152), (256, 1152, 1152))  # tokens, inputs, outputs
IMAGE = (1, 384, 32, 32)  # of a convolution with 384 outputs, 3 x 3
HEADS = (1, 8, 1024, 64)
SECONDS = 4.0  # of a case
ROUNDS = (5, 200)
SLOWEST = ("baseline",)  # not timed: SSE2, which any x86-64 processor has more than


def levels(progress: Progress, quick: bool) -> Rows:
    """Every format at every layer, activations at 8 bits, and attention; one thread; ``quick``: one
    format."""
    torch.manual_seed(0)
    cases: list[tuple[str, str, dict[str, Callable[[], Any]]]] = []
    for text in FORMATS[: 1 if quick else None]:
        for tokens, inputs, out in LAYERS:
            layer, x = Layer(text, (out, inputs)), torch.randn(tokens, inputs)
            cases.append((f"{inputs} -> {out}, {tokens} token{'s' * (tokens > 1)}", text, _linears(layer, x)))
        layer, image = Layer(text, (IMAGE[1], IMAGE[1], 3, 3)), torch.randn(IMAGE)
        cases.append((f"{IMAGE[1]} at {IMAGE[2]}x{IMAGE[3]}, 3 x 3", text, _convolutions(layer, image)))
    q, k, v = torch.randn(3, *HEADS)
    cases.append(("attention, 8 heads of 64, 1024 tokens", "", _attentions(q, k, v)))
    rows: Rows = []
    with threads(1), torch.inference_mode():
        for done, (name, text, calls) in enumerate(cases):
            progress("levels", done, len(cases))
            times = paired(calls, 0.0 if quick else SECONDS, ROUNDS)
            rows += [
                {"case": name, "scheme": text, "level": level, "rounds": len(own)}
                | {"ms": 1e3 * sorted(own)[len(own) // 2], "over_avx2": ratio(times["avx2"], own)}
                for level, own in times.items()
                if "avx2" in times
            ]
        progress("levels", len(cases), len(cases))
    return rows


def _timed(found: list[str]) -> list[str]:
    return [level for level in found if level not in SLOWEST]


def _linears(layer: Layer, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def call(level: str) -> Callable[[], Any]:
        return lambda: decode_linear(x, layer.weight, None, 8, level=level)

    return {level: call(level) for level in _timed(decode_levels())}


def _convolutions(layer: Layer, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def call(level: str) -> Callable[[], Any]:
        return lambda: decode_conv2d(x, layer.weight, None, layer.geometry, 8, level=level)

    return {level: call(level) for level in _timed(decode_levels())}


def _attentions(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def call(level: str) -> Callable[[], Any]:
        return lambda: rounded_attention(q, k, v, level=level)

    return {level: call(level) for level in _timed(attention_levels())}
