"""This machine's kernels against dense layers, per format and shape; and a packed denoiser against itself,
decoded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from aquabit.kernels.backends import BACKENDS
from aquabit.kernels.dispatch import remember
from aquabit.kernels.geometry import Geometry
from aquabit.kernels.request import Request, bucket
from aquabit.kernels.time_requests import PLAIN, best_of, interleaved, measure
from aquabit.kernels.timings import machine
from aquabit.quant.artifact import contents_of, is_packed, load_packed_denoiser
from aquabit.quant.kernel_tuning import MEMORY, example_call, format_for, layers_of, place_
from aquabit.quant.layers import Setting
from aquabit.runtime import reuse_memory
from aquabit.scheme import FP, AquabitError, Progress, Rounding, Scheme, no_progress

ADDITIVE = ("aq1x8g8", "aq2x6g8", "aq4x4g8", "aq2x8g8", "aq2x6k", "aq4x4k")
FORMATS = ("usq2", "usq3", "usq4", "usq8", "vq4", "vq3c", *ADDITIVE)
# of DiT-XL/2 and of LDM-4's U-Net
SHAPES = ("1152x1152@256", "4608x1152@256", "1152x4608@256", "384x384x3x3@32", "576x576x3x3@16")
CALLS, SECONDS = (5, 60), 4.0  # of whole denoisers: rounds at least, at most; the time after which they end
LARGEST = 1 << 24  # of a side, or of tokens
_SHAPE = re.compile(r"(\d+)x(\d+)(?:x(\d+)x(\d+))?@(\d+)(?:x(\d+))?", re.ASCII)


@dataclass(frozen=True)
class Row:
    """One format at one shape: median milliseconds of each backend, and of the dense layer in float32 and
    bfloat16 without quantization."""

    format: str
    shape: str
    act: Rounding
    machine: dict[str, str]
    milliseconds: dict[str, float]
    dense: dict[str, float]  # dtype -> milliseconds
    best: str

    @property
    def ratio(self) -> dict[str, float]:
        """How many times as long as the best backend the dense layer takes, by its dtype."""
        return {dtype: ms / self.milliseconds[self.best] for dtype, ms in self.dense.items()}

    def to_dict(self) -> dict[str, Any]:
        return {**{k: getattr(self, k) for k in self.__dataclass_fields__}, "ratio": self.ratio}


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """So many torch threads (None: as they are) for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def parse_shape(text: str, scheme: Scheme, act: Rounding = 16) -> Request:
    """``4608x1152@256`` (outputs x inputs @ tokens) or ``384x384x3x3@32`` (a convolution's weight @ side,
    or height x width, of one image, padded to keep its size) as a request; raises AquabitError for other
    text."""
    match = _SHAPE.fullmatch(text) if len(text) < 100 else None
    numbers = [int(n) for n in match.groups() if n] if match else [0]
    if not match or not all(1 <= n <= LARGEST for n in numbers) or (match[6] and not match[3]):
        raise AquabitError(
            f"shape {text[:100]!r} must be OUTxIN@TOKENS, as in 4608x1152@256, or OUTxINxKHxKW@SIDE, as in"
            f" 384x384x3x3@32, each from 1 to {LARGEST}"
        )
    out, inputs, side = int(match[1]), int(match[2]), int(match[5])
    common: dict[str, Any] = {"act": act, "threads": torch.get_num_threads()}
    if not match[3]:
        return Request("linear", format_for(scheme, (out, inputs)), bucket(side), **common)
    kernel, size = (int(match[3]), int(match[4])), (side, int(match[6] or side))
    return Request(
        "conv2d",
        format_for(scheme, (out, inputs, *kernel)),
        1,
        size,
        Geometry(padding=(kernel[0] // 2, kernel[1] // 2)),
        **common,
    )


def bench_formats(
    formats: str | None = None, shapes: str | None = None, act: Rounding = 8, progress: Progress = no_progress
) -> list[Row]:
    """Every format at every shape that it fits, measured now with torch's threads; what the table of timings
    lacks is added to it.

    ``formats`` and ``shapes`` are separated by commas (default: FORMATS, SHAPES). Raises AquabitError for
    those that are none.
    """
    schemes = {f: Scheme.parse(f) for f in _listed(formats, FORMATS)}
    pairs = [(f, s, parse_shape(s, q, act)) for s in _listed(shapes, SHAPES) for f, q in schemes.items()]
    asked = [
        (f, s, r)
        for f, s, r in pairs
        if not schemes[f].additive or schemes[f].group or r.format.order == "kernel"
    ]
    if any(q == FP for q in schemes.values()) or not asked:
        raise AquabitError(
            "formats of bench are coded ones, as usq4 or aq2x8g8, and kernel slices (k) need a kernel; given"
            f" were {formats}"
        )
    rows = []
    for done, (form, shape, request) in enumerate(asked):
        progress(f"timing: {form} at {shape}", done, len(asked))
        found = measure(request)
        remember({request.key: found})
        names = [b.name for b in BACKENDS if b.name in found and b.name != "dense"]
        best = min(names, key=lambda n: found[n])
        assert found[best] == best_of(found)
        dense = {dtype: 1e3 * found[f"plain {dtype}"] for dtype in PLAIN}
        rows.append(
            Row(
                form,
                shape,
                act,
                machine(torch.get_num_threads()),
                {n: 1e3 * found[n] for n in names},
                dense,
                best,
            )
        )
    progress("timing", len(asked), len(asked))
    return rows


def _listed(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


# ---- whole denoisers


@dataclass(frozen=True)
class Whole:
    """Median milliseconds of one denoiser call with one sample at the model's own size, and bytes that
    layers' weights and biases hold."""

    name: str
    milliseconds: float
    resident: int
    backends: dict[str, int]  # layers by kernel
    machine: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in self.__dataclass_fields__}


def packed_component(folder: str | Path) -> Path:
    """The folder of the packed denoiser in an artifact; raises AquabitError where there is none."""
    found = [p for p in sorted(Path(folder).glob("*")) if is_packed(p)]
    if not found:
        raise AquabitError(f"{folder} holds no packed denoiser; `aquabit quantize` makes one")
    return found[0]


def bench_artifact(
    folder: str | Path, dtype: str = "float32", progress: Progress = no_progress
) -> list[Whole]:
    """A packed artifact in ``dtype`` (float32 or bfloat16), with and without dense copies, against its
    decoded weights in float32 and bfloat16 without quantized activations: calls of all four in turn, with
    torch's threads."""
    if dtype not in PLAIN:
        raise AquabitError(f"dtype {dtype!r} is not timed; it must be {' or '.join(PLAIN)}")
    reuse_memory()
    component, calls, placed = packed_component(folder), dict[str, Callable[[], object]](), {}
    for memory in MEMORY:
        denoiser = load_packed_denoiser(component, getattr(torch, dtype))
        calls[f"packed, memory={memory}"] = call = _call(denoiser)
        placed[f"packed, memory={memory}"] = place_(layers_of(denoiser), call, memory, progress)
    for name in PLAIN:
        kind: torch.dtype = getattr(torch, name)
        denoiser = decoded_(load_packed_denoiser(component, kind), kind)
        calls[f"dense {name}"] = call = _call(denoiser)
        placed[f"dense {name}"] = place_(layers_of(denoiser), call)
    progress("timing denoiser calls", 0, 1)
    seconds = interleaved(calls, "cpu", CALLS, SECONDS, inf)
    progress("timing denoiser calls", 1, 1)
    here = machine(torch.get_num_threads())
    return [
        Whole(name, 1e3 * median(seconds[name]), p.resident, dict(p.backends), here)
        for name, p in placed.items()
    ]


def _call(denoiser: nn.Module) -> Callable[[], object]:
    found = contents_of(denoiser)
    return example_call(denoiser, None if found is None else found.inputs)


def decoded_(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A packed denoiser with its weights decoded to ``dtype`` and its activations left alone: the dense
    model of the same weights."""
    for layer in layers_of(denoiser).values():
        coded = layer.coded
        layer.set_dense_((layer.weight if coded is None else coded.dequantize()).to(dtype), layer.scheme)
        layer.bias = None if layer.bias is None else layer.bias.to(dtype)
        layer.set_activations_(Setting())
        layer.shares = {}
    return denoiser
