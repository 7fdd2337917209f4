"""What the parts of benchmarks/kernels.py share: paired timings, ratios, errors, layers of random codes
and the calls that run them."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from aquabit.activation_bits import Rounding
from aquabit.kernels import fake_quantize
from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends import Weight, backend_named
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.dispatch import context_of, conv2d_request, held, linear_request
from aquabit.kernels.geometry import UNPADDED, Geometry
from aquabit.kernels.request import Request, format_of
from aquabit.kernels.time_requests import random_weight
from aquabit.quant.kernel_tuning import format_for
from aquabit.quant.layers import quant_layer
from aquabit.scheme import Scheme

Run = Callable[[], Tensor]
ROUNDS = (4, 40)  # of all contenders: at least, at most
KERNELS = {  # name -> backend, accuracy, activation bits
    "lut fast": ("lut", "fast", 16),
    "lut exact": ("lut", "exact", 16),
    "decode a16": ("decode", "fast", 16),
    "decode a8": ("decode", "fast", 8),
}
FAST = ("lut fast", "decode a16")  # activations as they are
DENSE = ("float32", "bfloat16")  # what ratios are to


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many torch threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def paired(
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: tuple[int, int] = ROUNDS,
    pause: float = 0.0,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run in every round: each round takes them all, in an order of its own, so that none
    always follows the same one.

    A round that is not counted comes first. No round begins after ``seconds``, once there were as many as the
    least of ``rounds``. ``pause`` seconds pass before each run: threads of another library may spin for a
    while after theirs. ``clock``: process_time counts this process alone, where the machine has other work.
    """
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle, begun = list(runs), random.Random(seed), time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - begun > seconds:
            break
        shuffle.shuffle(order)
        for name in order:
            time.sleep(pause)
            started = clock()
            runs[name]()
            found[name].append(clock() - started)
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = (float(v) for v in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "low": low, "high": high}


def ratio(other: list[float], own: list[float]) -> dict[str, float]:
    """How many times as long ``other`` took as ``own`` in the same round: median and quartiles."""
    return quartiles([a / b for a, b in zip(other, own, strict=True)])


def over_best(others: list[list[float]], own: list[float]) -> dict[str, float]:
    """The ratio to that of ``others`` whose median is least."""
    return ratio(min(others, key=statistics.median), own)


def errors(y: Tensor, expected: Tensor) -> dict[str, float]:
    """``error``: max|y - y64| / max|y64|; ``error_norm``: |y - y64| / |y64|."""
    gap = y.double() - expected
    return {
        "error": float(gap.abs().max() / expected.abs().max()),
        "error_norm": float(gap.norm() / expected.norm()),
    }


def measured_row(
    name: str, times: Mapping[str, list[float]], dense: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Milliseconds, rounds, and the ratio to the best of each of ``dense`` (name -> the runs that are it)."""
    own = times[name]
    ratios = {f"over_{other}": over_best([times[n] for n in names], own) for other, names in dense.items()}
    return {"ms": 1e3 * statistics.median(own), "rounds": len(own), **ratios}


# ---- layers
# ------------------------------------------------------------------------------------------------------------


class Layer:
    """A layer of random codes at one format: its weight as kernels hold it, and decoded; how a convolution
    moves (its kernel's middle meets every edge)."""

    def __init__(self, scheme: str, shape: tuple[int, ...], seed: int = 0, stride: int = 1, groups: int = 1):
        self.scheme, self.shape = scheme, shape
        side = shape[-1] // 2 if len(shape) == 4 else 0
        self.geometry = Geometry((stride, stride), (side, side), groups=groups)
        weight: CodebookWeight = random_weight(format_for(Scheme.parse(scheme), shape), seed=seed)
        self.bits, self.decoded = weight.bits_per_weight, weight.dequantize()
        self.weight: Weight = held(weight)
        self.coded = weight

    @property
    def bytes(self) -> int:
        """Resident."""
        return self.weight.nbytes if isinstance(self.weight, Arranged) else self.coded.nbytes


def request(layer: Layer, x: Tensor, accuracy: Any = "fast", act: Rounding = 16) -> Request:
    form = format_of(layer.weight)
    if x.ndim == 4:
        return conv2d_request(x, form, layer.geometry, accuracy, act, None)
    return linear_request(x, form, accuracy, act)


def contenders(layer: Layer, x: Tensor, bias: Tensor) -> dict[str, Run]:
    """The kernels that serve a layer, by name."""
    return {
        name: call(layer, x, bias, backend, accuracy, act)
        for name, (backend, accuracy, act) in KERNELS.items()
        if backend_named(backend).refuses(request(layer, x, accuracy, act)) is None
    }


def call(layer: Layer, x: Tensor, bias: Tensor, backend: str, accuracy: Any, act: Rounding) -> Run:
    """A layer's call as a model makes it, where that kernel is the fastest that is known."""
    shape, g = layer.shape, layer.geometry
    plain = (
        nn.Conv2d(x.shape[1], shape[0], shape[2:], g.stride, g.padding, groups=g.groups, device="meta")
        if x.ndim == 4
        else nn.Linear(shape[1], shape[0], device="meta")
    )
    own = quant_layer(plain.to_empty(device="cpu"))
    own.set_packed_(layer.weight, Scheme.parse(layer.scheme))
    own.bias, own.accuracy, own.act = bias, accuracy, act
    context = context_of({request(layer, x, accuracy, act).key: {backend: 1.0}})
    return lambda: context.run(own, x)


def expected(layer: Layer, x: Tensor, bias: Tensor, act: Rounding) -> Tensor:
    """The layer in float64, of activations rounded as ``act`` says."""
    x = fake_quantize(x, act, "sample" if x.ndim == 4 else "token").double()
    weight = layer.decoded.double()
    return (
        _convolved(x, weight, bias.double(), layer.geometry)
        if x.ndim == 4
        else functional.linear(x, weight, bias.double())
    )


def dense_runs(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry = UNPADDED
) -> tuple[dict[str, Run], dict[str, list[str]]]:
    """The dense layer in float32 and bfloat16 as torch runs it (convolutions: float32 in both layouts),
    and which runs are which type."""
    if x.ndim == 2:
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        return {n: _linear(x.to(k), weight.to(k), bias.to(k)) for n, k in kinds.items()}, {
            n: [n] for n in kinds
        }
    last = torch.channels_last
    runs = {
        "float32": _conv(x, weight, bias, geometry),
        "float32 channels_last": _conv(
            x.to(memory_format=last), weight.to(memory_format=last), bias, geometry
        ),
        "bfloat16 channels_last": _conv(
            x.to(torch.bfloat16, memory_format=last),
            weight.to(torch.bfloat16, memory_format=last),
            bias.bfloat16(),
            geometry,
        ),
    }
    return runs, {"float32": ["float32", "float32 channels_last"], "bfloat16": ["bfloat16 channels_last"]}


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    return lambda: functional.linear(x, weight, bias)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry) -> Run:
    return lambda: _convolved(x, weight, bias, geometry)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, g: Geometry) -> Tensor:
    return functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def case(
    layers: list[Layer],
    x: Tensor,
    seconds: float,
    exact: Mapping[tuple[str, int], Tensor],
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Every kernel of every layer and the dense ones in one paired run; ``exact`` holds the float64
    results by (format, activation bits)."""
    bias = torch.zeros(layers[0].shape[0])
    runs, dense = dense_runs(x, layers[0].decoded, bias, layers[0].geometry)
    ours = {(layer.scheme, name): run for layer in layers for name, run in contenders(layer, x, bias).items()}
    runs |= {" ".join(key): run for key, run in ours.items()}
    times = paired(runs, seconds)
    plain = {
        name: errors(run(), exact[layers[0].scheme, 16])
        for name, run in dense_runs(x, layers[0].decoded, bias, layers[0].geometry)[0].items()
    }
    rows = [
        {**facts, "format": None, "kernel": n, **measured_row(n, times, dense), **e} for n, e in plain.items()
    ]
    for layer in layers:
        for (scheme, name), run in ours.items():
            if scheme == layer.scheme:
                found = errors(run(), exact[scheme, KERNELS[name][2]])
                row = measured_row(f"{scheme} {name}", times, dense)
                rows.append({**facts, "format": scheme, "kernel": name, "bits": layer.bits, **row, **found})
    return rows


def load() -> float:
    """Processes that wanted to run in the last minute, on average: a quiet machine has less than one
    besides this."""
    return os.getloadavg()[0]
