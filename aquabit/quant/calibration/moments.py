"""Second moments H of layers' inputs, which output-aware quantizers weigh their errors with.

H of a layer at a bits is the mean of x x^T over its inputs x, rounded to a bits as the layer would round
them; what stands before the layer stays in full precision (GPTQ, section 3; AQLM, eq. 3). Recorded calls are
replayed once for a few layers at a time, so that only the H of those are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.quant.calibration.full_precision import FullPrecision, Layer, watching
from aquabit.quant.calibration.hessian import damped
from aquabit.quant.calibration.input_groups import Group
from aquabit.quant.calibration.recording import Call
from aquabit.quant.layers import QuantConv2d, QuantLinear
from aquabit.scheme import AquabitError, Progress, no_progress

WIDEST = 18432  # inputs; a wider layer keeps the diagonal of H alone (the whole takes 1.3 GB there)
LIMIT_BYTES = 512 * 2**20  # of all H that one replay sums up
PATCHES = 1 << 24  # elements of the patches that are gathered at a time: 64 MB
# columns; skipping what lies under the diagonal blocks takes 60 % of the whole product's time on a CPU (R =
# 576 to 2304)
BLOCK = 192


@dataclass(frozen=True)
class Moments:
    """H in the order of ``weight.flatten(1)``: [R, R], [groups, R, R] for a grouped convolution, or [R] where
    ``diagonal``.

    ``hessian`` is float32 and damped: ``hessian.DAMPING`` (1 %) of its mean diagonal is added to the
    diagonal. ``rows`` inputs (tokens or output pixels) were averaged. A diagonal is that of a layer wider
    than ``WIDEST``; with groups it is their mean.
    """

    hessian: Tensor
    rows: int
    diagonal: bool


def _width(layer: Layer) -> int:
    """R: inputs of one output."""
    return prod(layer.shape[1:])


def _sum_shape(layer: Layer) -> tuple[int, ...]:
    groups = layer.groups if isinstance(layer, QuantConv2d) else 1
    return (groups, _width(layer), _width(layer)) if _width(layer) <= WIDEST else (groups, _width(layer))


def portions(
    groups: Sequence[Group], layers: Mapping[str, Layer], acts: Sequence[int], limit_bytes: int = LIMIT_BYTES
) -> list[list[Group]]:
    """Consecutive groups to calibrate in one replay: their H at all ``acts`` take at most ``limit_bytes``,
    or it is one group alone."""
    found: list[list[Group]] = []
    used = 0
    for group in groups:
        size = 4 * prod(_sum_shape(layers[group[0]])) * len(set(acts))
        if not found or used + size > limit_bytes:
            found.append([])
            used = 0
        found[-1].append(group)
        used += size
    return found


def shared_out(portion: Sequence[Group], layers: Mapping[str, Layer], count: int) -> list[list[Group]]:
    """A portion in at most ``count`` parts of about the same work, each in the portion's order: calibrating
    one takes a replay of all calls, whatever it holds."""
    work = [sum(_work(layers[name]) for name in group) for group in portion]
    parts: list[list[int]] = [[] for _ in range(min(count, len(portion)))]
    loads = [0.0] * len(parts)
    for place in sorted(range(len(portion)), key=lambda i: -work[i]):
        least = loads.index(min(loads))
        parts[least].append(place)
        loads[least] += work[place]
    return [[portion[i] for i in sorted(part)] for part in sorted(parts, key=min)]


def _work(layer: Layer) -> float:
    """About what H and a few fits of a layer cost: R^2 for each of the 6 R rows of H, and ten times that for
    each output (of 192 outputs and 1,728 inputs three fits take about as long as H)."""
    return _width(layer) ** 2 * (6.0 * _width(layer) + 10.0 * 3 * layer.shape[0]) + 1e7


def moments(
    model: FullPrecision,
    calls: Sequence[Call],
    groups: Sequence[Group],
    acts: Sequence[int],
    rows: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[tuple[str, int], Moments]:
    """H of every layer of ``groups`` at each of ``acts`` bits (16: not rounded); layers of a group share one
    Moments.

    At most ``rows`` inputs (tokens, or output pixels of a convolution) are averaged, max(4096, 6 R) unless
    given: as many from each call, drawn without replacement by ``seed`` and the call's index, so that a
    layer's H does not depend on what else is calibrated. (A layer that runs k times in a call gives k times
    as many.) Leaves the model in full precision. Raises AquabitError, naming the layer, for inputs that are
    NaN or infinite and for a layer that does not run; and for a packed model.
    """
    if rows is not None and rows < 1:
        raise AquabitError(f"{rows=} inputs cannot be averaged; give at least 1")
    sums = {group[0]: _Sums(group[0], model.layers[group[0]], acts, rows, len(calls)) for group in groups}
    call = 0

    def see(name: str, x: Tensor) -> None:
        sums[name].add_(x, seed, call)

    with watching({name: model.layers[name] for name in sums}, see):
        for call in model.replay(calls):
            progress("calibrating", call, len(calls))
    progress("calibrating", len(calls), len(calls))
    found: dict[tuple[str, int], Moments] = {}
    for group in groups:
        for bits, result in sums.pop(group[0]).results():
            found |= {(name, bits): result for name in group}
    return found


class _Sums:
    """Running sums of x x^T of one layer's inputs, one for each of ``acts``; above the diagonal blocks
    only."""

    def __init__(self, name: str, layer: Layer, acts: Sequence[int], rows: int | None, calls: int):
        self.name, self.layer, self.calls, self.count = name, layer, calls, 0
        self.limit = max(4096, 6 * _width(layer)) if rows is None else rows
        self.sums = {
            bits: torch.zeros(_sum_shape(layer), device=layer.weight.device) for bits in dict.fromkeys(acts)
        }

    def add_(self, x: Tensor, seed: int, call: int) -> None:
        """Add this call's share of the rows of an input x."""
        if not bool(torch.isfinite(torch.stack(x.aminmax())).all()):
            raise AquabitError(
                f"{self.name} reads NaN or infinity in recorded call {call + 1} of {self.calls}; it cannot be"
                " calibrated"
            )
        total = _row_count(self.layer, x)
        share = self.limit * (call + 1) // self.calls - self.limit * call // self.calls
        index = _drawn(total, share, (seed * 1_000_003 + call) % 2**63).to(x.device)
        self.count += len(index)
        for bits, into in self.sums.items():
            for some in _rows(self.layer, x, bits, index):
                _add_gram_(into, some)

    def results(self) -> Iterator[tuple[int, Moments]]:
        """(bits, Moments); each sum is let go when its result is made."""
        if not self.count:
            raise AquabitError(
                f"{self.name} read nothing in the {self.calls} recorded calls; it cannot be calibrated"
            )
        for bits in list(self.sums):
            mean = self.sums.pop(bits).div_(self.count)
            if not bool(torch.isfinite(mean).all()):
                raise AquabitError(
                    f"the second moments of the inputs of {self.name} overflow float32; it cannot be"
                    " calibrated"
                )
            diagonal = mean.ndim == 2
            mean = _weight_order(mean.mean(0) if diagonal else mean.triu_().add_(mean.triu(1).mT), self.layer)
            yield bits, Moments(damped(mean), self.count, diagonal)


def _drawn(total: int, share: int, seed: int) -> Tensor:
    if share >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:share].sort().values


def _add_gram_(into: Tensor, rows: Tensor) -> None:
    """Add rows^T rows, or its diagonal; rows [groups, k, R]. Entries more than BLOCK columns under the
    diagonal may be left out."""
    if into.ndim == 2:
        into += rows.square().sum(1)
    elif len(into) > 1 or rows.device.type != "cpu":
        into.baddbmm_(rows.mT, rows)
    else:
        for i in range(0, rows.shape[2], BLOCK):
            into[0, i : i + BLOCK, i:].addmm_(rows[0, :, i : i + BLOCK].T, rows[0, :, i:])


def _extent(layer: QuantConv2d, side: int) -> int:
    """Pixels from the first to the last that a kernel covers, along height (0) or width (1)."""
    return layer.dilation[side] * (layer.shape[2 + side] - 1) + 1


def _pads(layer: QuantConv2d) -> tuple[int, int, int, int]:
    """Padding top, bottom, left, right; as torch does for "same", an odd pixel goes to the end."""
    if layer.padding == "same":
        tall, wide = (_extent(layer, side) - 1 for side in (0, 1))
        return tall // 2, tall - tall // 2, wide // 2, wide - wide // 2
    tall, wide = (0, 0) if isinstance(layer.padding, str) else layer.padding
    return tall, tall, wide, wide


def _output_size(layer: QuantConv2d, x: Tensor) -> tuple[int, int]:
    top, bottom, left, right = _pads(layer)
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    return (height - _extent(layer, 0)) // layer.stride[0] + 1, (width - _extent(layer, 1)) // layer.stride[
        1
    ] + 1


def _row_count(layer: Layer, x: Tensor) -> int:
    """Tokens, or output pixels of all samples."""
    if isinstance(layer, QuantConv2d):
        return x.shape[0] * prod(_output_size(layer, x))
    return x.numel() // x.shape[-1]


def _rows(layer: Layer, x: Tensor, bits: int, index: Tensor) -> Iterator[Tensor]:
    """The inputs ``index`` as [groups, k, R] float32, k bounded by PATCHES; R in order (kh, kw, channel)
    for a convolution."""
    parts = index.split(
        max(1, PATCHES // prod(x.shape[-1:] if isinstance(layer, QuantLinear) else layer.shape[1:]))
    )
    if isinstance(layer, QuantLinear):
        tokens = x.reshape(-1, x.shape[-1])
        yield from (layer.quantized_input(tokens[part], bits).float()[None] for part in parts)
        return
    top, bottom, left, right = _pads(layer)
    pixels = functional.pad(
        layer.quantized_input(x, bits).permute(0, 2, 3, 1), (0, 0, left, right, top, bottom)
    ).contiguous()
    height, width = pixels.shape[1:3]
    flat = pixels.view(-1, pixels.shape[3])  # channels last: a patch is gathered as whole rows
    tall, wide = _output_size(layer, x)
    down = torch.arange(layer.shape[2], device=x.device)[:, None] * layer.dilation[0] * width
    offsets = (down + torch.arange(layer.shape[3], device=x.device) * layer.dilation[1]).flatten()
    for part in parts:
        y, column = part // wide % tall * layer.stride[0], part % wide * layer.stride[1]
        corner = part // (tall * wide) * (height * width) + y * width + column
        patches = flat.index_select(0, (corner[:, None] + offsets).flatten()).float()
        patches = patches.view(len(part), len(offsets), layer.groups, layer.shape[1])
        yield patches.permute(2, 0, 1, 3).reshape(layer.groups, len(part), -1)


def _weight_order(h: Tensor, layer: Layer) -> Tensor:
    """H (or its diagonal) of ``_rows`` in the order of ``weight.flatten(1)``; one group is not a
    dimension."""
    if isinstance(layer, QuantLinear):
        return h if h.ndim == 1 else h[0]
    channels, taps = layer.shape[1], prod(layer.shape[2:])
    if h.ndim == 1:
        return h.view(taps, channels).T.flatten()
    h = h.view(-1, taps, channels, taps, channels).permute(0, 2, 1, 4, 3).reshape(h.shape)
    return h if layer.groups > 1 else h[0]
