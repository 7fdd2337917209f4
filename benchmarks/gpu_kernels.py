"""The part ``kernels`` of benchmarks/gpu.py: a few shapes of each Triton kernel beside what torch has. The
short form of benchmarks/triton_kernels.py, products of integers, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.kernels.attention import rounded_attention_reference
from aquabit.kernels.backends.triton_attention import triton_attention
from aquabit.kernels.backends.triton_int8 import triton_int8_linear
from aquabit.kernels.backends.triton_kernels import triton_linear, triton_weight
from aquabit.kernels.fake_quant import fake_quantize
from benchmarks.gpu_steps import Steps
from benchmarks.triton_kernels import made, paired

DECODE = ("usq4", "aq2x8g8")
INTEGERS = ("usq4", "usq8")
# out, in; tokens: a layer of DiT-XL/2
LINEAR = {"sdxl": ((4608, 1152), (1, 16, 256, 4096)), "tiny": ((24, 32), (9,))}
# images, heads, queries, keys, width: DiT-XL/2 with 8 images; SDXL's first attention at 1024 pixels, to
# itself and to the words of the prompt
ATTENTION = {
    "sdxl": ((8, 16, 256, 256, 72), (2, 10, 4096, 4096, 64), (2, 10, 4096, 77, 64)),
    "tiny": ((1, 2, 9, 20, 8),),
}
Run = Callable[[], Tensor]


def error(y: Tensor, expected: Tensor) -> float:
    """max|y - y64| / max|y64|"""
    return float((y.double() - expected).abs().max() / expected.abs().max())


def compared(runs: dict[str, Run], off: float, device: str) -> dict[str, Any]:
    """Median microseconds of each, and how many times as fast as each other one the first is (in pairs)."""
    first, times = next(iter(runs)), paired(runs, device)
    ratios = {
        name: median(b / a for a, b in zip(times[first], times[name], strict=True)) for name in list(runs)[1:]
    }
    return {"us": {n: 1e3 * median(t) for n, t in times.items()}, "faster_than": ratios, "error": off}


def decode(name: str, shape: tuple[int, int], tokens: int, device: str) -> dict[str, Any]:
    weight = made(name, shape, device)
    x = torch.randn(tokens, shape[1], device=device).bfloat16()
    laid, dense = triton_weight(weight), weight.dequantize()
    held, bias = dense.bfloat16(), torch.zeros(shape[0], device=device).bfloat16()
    runs: dict[str, Run] = {
        "triton": lambda: triton_linear(x, laid, bias),
        "dense bfloat16": lambda: functional.linear(x, held, bias),
        "decode first": lambda: functional.linear(x, weight.dequantize().bfloat16(), bias),
    }
    return compared(runs, error(runs["triton"](), x.double() @ dense.double().T), device)


def integers(name: str, shape: tuple[int, int], tokens: int, device: str) -> dict[str, Any]:
    """Rounding activations included, but for the dense layer that rounds none."""
    weight = made(name, shape, device)
    x = torch.randn(tokens, shape[1], device=device).bfloat16()
    laid, dense = triton_weight(weight), weight.dequantize()
    held, bias = dense.bfloat16(), torch.zeros(shape[0], device=device).bfloat16()
    runs: dict[str, Run] = {
        "triton_int8": lambda: triton_int8_linear(x, laid, bias),
        "triton": lambda: triton_linear(fake_quantize(x, 8), laid, bias),
        "dense bfloat16, rounded": lambda: functional.linear(fake_quantize(x, 8), held, bias),
        "dense bfloat16": lambda: functional.linear(x, held, bias),
    }
    expected = fake_quantize(x.double(), 8) @ dense.double().T
    return compared(runs, error(runs["triton_int8"](), expected), device)


def attention(sizes: tuple[int, int, int, int, int], device: str) -> dict[str, Any]:
    images, heads, n, m, d = sizes
    q, k, v = (torch.randn(images, heads, s, d, device=device).bfloat16() for s in (n, m, m))
    runs: dict[str, Run] = {
        "triton_attention": lambda: triton_attention(q, k, v),
        "in torch": lambda: rounded_attention_reference(q, k, v, None, d**-0.5),
        "not rounded": lambda: functional.scaled_dot_product_attention(q, k, v),
    }
    few = [t[:1, :1] for t in (q, k, v)]  # of one head: the scores of all in float64 are gigabytes
    off = error(
        triton_attention(*few), rounded_attention_reference(*(t.double() for t in few), None, d**-0.5)
    )
    return compared(runs, off, device)


def steps(device: str, size: str) -> Steps:
    torch.manual_seed(0)
    shape, counts = LINEAR[size]
    found: dict[str, Any] = {}
    for tokens in counts:
        layer = f"{shape[1]} -> {shape[0]}, {tokens} tokens"
        found |= {f"{n}, {layer}": partial(decode, n, shape, tokens, device) for n in DECODE}
        if tokens > 8:
            found |= {f"{n} a8, {layer}": partial(integers, n, shape, tokens, device) for n in INTEGERS}
    for sizes in ATTENTION[size]:
        name = "attention, {} x {} heads of {d}, {} queries, {} keys".format(*sizes[:4], d=sizes[4])
        found[name] = partial(attention, sizes, device)
    return found
