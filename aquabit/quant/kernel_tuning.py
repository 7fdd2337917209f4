"""What a model asks of the kernels on this machine: its requests, their times, and the dense copies that
are worth their memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.graph import described_inputs, example_inputs
from aquabit.kernels.arranged import arranges
from aquabit.kernels.dispatch import conv2d_request, linear_request, observed
from aquabit.kernels.geometry import Geometry, padded
from aquabit.kernels.request import Format, Request, format_of, format_of_layout, full_format, hollow_weight
from aquabit.kernels.time_requests import best_of, measure_missing
from aquabit.quant.layers import QuantConv2d, QuantLinear, resident_bytes
from aquabit.scheme import FP, AquabitError, Progress, Rounding, Scheme, no_progress

MEMORY = ("packed", "auto")  # no dense copies; copies where they save most time per byte
COPIES = 0.25  # of the dense size: at most so much for copies
GAIN = 1.03  # a copy is kept where coded kernels take so many times as long

Layers = Mapping[str, QuantLinear | QuantConv2d]
# layer -> its requests in one denoiser call, and how often (on average over the steps)
Asked = dict[str, dict[Request, float]]


def layers_of(denoiser: nn.Module) -> dict[str, QuantLinear | QuantConv2d]:
    """The quantizable layers of a denoiser, by name; none where it is not quantized."""
    return {name: m for name, m in denoiser.named_modules() if isinstance(m, QuantLinear | QuantConv2d)}


def example_call(denoiser: nn.Module, described: Mapping[str, Any] | None = None) -> Callable[[], object]:
    """One call of a denoiser with one sample at the model's own size, inputs random; ``described`` inputs
    (``graph.describe_inputs``) where the class does not tell them. Raises AquabitError for a class that is
    not known without."""
    first = next((t for t in denoiser.parameters() if t.is_floating_point()), None)
    dtype, device = (first.dtype, first.device) if first is not None else (torch.float32, torch.device("cpu"))
    dtype = getattr(denoiser, "dtype", dtype)
    rng = torch.Generator().manual_seed(0)

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: real(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(real(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=rng).to(device, dtype)
        return torch.zeros(value.shape, dtype=value.dtype, device=device)

    inputs = real(described_inputs(described) if described else example_inputs(denoiser))

    def call() -> object:
        with torch.inference_mode():
            return denoiser(**inputs)

    return call


def requests_of(layers: Layers, call: Callable[[], object]) -> Asked:
    """What ``call`` asks of the kernels: for coded layers as they run, for others with the format "not
    coded"; where activation bits change while sampling, at all of them by their share of the steps."""
    found: Asked = {name: {} for name in layers}

    def see(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def count(layer: Any, inputs: tuple[Any, ...]) -> None:
            for act, share in layer.kernel_acts().items():
                request = _request(layer, inputs[0], act)
                found[name][request] = found[name].get(request, 0) + share

        return count

    handles = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _request(layer: QuantLinear | QuantConv2d, x: Tensor, act: Rounding) -> Request:
    form = full_format(layer.shape) if layer.packed is None else format_of(layer.packed)
    if isinstance(layer, QuantLinear):
        return linear_request(x, form, layer.accuracy, act)
    x, padding = padded(
        x if x.ndim == 4 else x[None], layer.padding, layer.stride, layer.dilation, layer.shape[2:]
    )
    geometry = Geometry(layer.stride, padding, layer.dilation, layer.groups)
    return conv2d_request(x, form, geometry, layer.accuracy, act, layer.split)


def tune(layers: Layers, call: Callable[[], object], progress: Progress = no_progress) -> Asked:
    """Measure what this machine's table lacks of the requests that ``call`` makes; returns the requests of
    every layer."""
    asked = requests_of(layers, call)
    measure_missing((r for row in asked.values() for r in row), progress)
    return asked


def milliseconds(
    asked: Mapping[Request, float], times: Mapping[str, Mapping[str, float]], packed: bool = True
) -> float:
    """What a layer takes in one denoiser call."""
    return 1e3 * sum(count * best_of(times[r.key], packed) for r, count in asked.items())


# ---- memory


@dataclass(frozen=True)
class Placement:
    """How a packed model runs: layers by backend, what their weights hold in memory, what dense ones
    would, both in bytes, the layers that keep a dense copy, and how many others would be faster with one."""

    backends: Mapping[str, int]
    resident: int
    dense: int
    copies: tuple[str, ...] = ()
    slower: int = 0


def place_(
    layers: Layers, call: Callable[[], object], memory: str = "packed", progress: Progress = no_progress
) -> Placement:
    """Time the kernels for what ``call`` asks, keep dense copies as ``memory`` says ("packed": none;
    "auto": those that save most time per byte, up to a quarter of the dense size), and say what runs
    where."""
    if memory not in MEMORY:
        raise AquabitError(f"memory {memory!r} is unknown; it must be {' or '.join(MEMORY)}")
    for layer in layers.values():
        layer.keep_dense_(None)
    asked = tune(layers, call, progress)
    dtype = _dtype(asked)
    gains, dense = _gains(layers, asked, dtype), _dense_bytes(layers.values(), dtype)
    copies = _within(gains, COPIES * dense) if memory == "auto" else ()
    for name in copies:
        layers[name].keep_dense_(dtype)
    slower = len(gains) - len(copies)
    return Placement(ran(layers, call), resident_bytes(layers.values()), dense, copies, slower)


def _dtype(asked: Asked) -> torch.dtype:
    first = next((r.dtype for row in asked.values() for r in row), "float32")
    dtype: torch.dtype = getattr(torch, first)
    return dtype


def _dense_bytes(layers: Iterable[QuantLinear | QuantConv2d], dtype: torch.dtype) -> int:
    return sum(prod(layer.shape) for layer in layers) * dtype.itemsize


def _gains(layers: Layers, asked: Asked, dtype: torch.dtype) -> list[tuple[float, str, int]]:
    """Milliseconds saved per byte, name and bytes of the layers whose dense copies save time."""
    times = measure_missing(r for row in asked.values() for r in row)
    gains = []
    for name, row in asked.items():
        if layers[name].packed is None or not row:
            continue
        coded = milliseconds(row, times)
        dense = 1e3 * sum(n * times[r.key]["dense"] for r, n in row.items())
        if coded > GAIN * dense:
            size = prod(layers[name].shape) * dtype.itemsize
            gains.append(((coded - dense) / size, name, size))
    return gains


def _within(gains: Iterable[tuple[float, str, int]], room: float) -> tuple[str, ...]:
    """The names of those that save most per byte, as far as ``room`` goes."""
    kept = []
    for _, name, size in sorted(gains, reverse=True):
        if size <= room:
            kept.append(name)
            room -= size
    return tuple(kept)


def ran(layers: Layers, call: Callable[[], object]) -> dict[str, int]:
    """Layers by the backend that ``call`` runs them on ("full": not coded); one that runs on several
    counts for its last."""
    names = {id(layer.packed): name for name, layer in layers.items() if layer.packed is not None}
    found = dict.fromkeys(layers, "full")
    with observed(
        lambda weight, _, backend: found.update({names[id(weight)]: backend} if id(weight) in names else {})
    ):
        call()
    return dict(Counter(found.values()).most_common())


# ---- what layers would take


@cache
def format_for(scheme: Scheme, shape: tuple[int, ...]) -> Format:
    """The format of a weight of ``shape`` at ``scheme``, without fitting one."""
    if scheme == FP:
        return full_format(shape)
    form = format_of_layout(scheme.layout(shape), shape)
    return replace(form, unarranged=arranges(hollow_weight(form)))


def at_scheme(request: Request, scheme: Scheme, act: Rounding) -> Request:
    """The same call of a layer that has another scheme and other activations."""
    return replace(request, format=format_for(scheme, request.format.shape), act=act)
