"""The tile-decode backend on CPU: a few rows of a weight decoded at a time, multiplied, forgotten.

Three ways, by what is asked:

- *bytes*: uniform codes (usq) with activations of at most 8 bits. Both are integers as they stand:
  activations are quantized as
  ``fake_quantize`` does, products of 8 bits are summed in int32, so the result is exact to float32 rounding,
  whatever the accuracy.
- *shorts*: everything else under "fast": weights as 16-bit integers of one scale per row (decoded, scale and
  offset included), the
  activations' integers, or, unquantized, 15 bits per token or sample. What the rounding loses is measured in
  each call; a relative error above 1e-3 (outliers that leave nothing for the rest) makes the call "exact".
- *tiles*: "exact", and weights that cannot be arranged: tiles of rows in the activations' dtype for the dense
  library.

At most FEW tokens are multiplied row by row, by the bytes or in float32. Decoded weights take at most 1/16 of
the dense weight in bfloat16 in all threads together (tiles: in the activations' dtype), but a thread needs a
row and a block of rows (6, or 4 below AVX-512; tiles 8): that is the floor for layers of fewer than about 60
outputs a thread by bytes, 140 by shorts. The activations' integers take 1 or 2 bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aquabit.kernels.arranged import Arranged, arrange, arranges
from aquabit.kernels.backends.decode_tiles import Decoder, conv_by_tiles, linear_by_tiles, rows_of
from aquabit.kernels.backends.reference import Accuracy
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.scheme import AquabitError

try:
    from aquabit.kernels import _native  # type: ignore[attr-defined]  # built by CMake
except ImportError:
    _native = None

FEW = 4  # tokens
LONGEST = 32768  # inputs that int32 holds the products of
MOST_LOST = 1e-3  # relative error of "fast"
DTYPES = (torch.float32, torch.bfloat16)
Pair = int | tuple[int, int]
_LEVELS: tuple[str, ...] = tuple(_native.decode_levels()) if hasattr(_native, "decode_levels") else ()
_segments: WeakKeyDictionary[Arranged, Tensor] = WeakKeyDictionary()


def decode_levels() -> list[str]:
    """Instruction sets that this machine can run, best first; none without the extension."""
    return list(_LEVELS)


def decode_refuses(
    weight: CodebookWeight | Arranged, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """Why this backend does not serve such a weight and activations, or None."""
    if torch.device(device).type not in ("cpu", "meta"):
        return f"decode runs on the CPU, not on {device}"
    if dtype not in DTYPES:
        return f"decode takes float32 or bfloat16, not {dtype}"
    if not decode_levels() and isinstance(weight, Arranged):
        return "the C++ extension was not built"
    return None


def decode_linear(
    x: Tensor,
    weight: CodebookWeight | Arranged,
    bias: Tensor | None = None,
    act: int = 16,
    accuracy: Accuracy = "fast",
    *,
    level: str | None = None,
) -> Tensor:
    """x [..., in], quantized per token at ``act`` bits, times a coded weight [out, in], plus bias [out]:
    [..., out] in x's dtype.

    A CodebookWeight is arranged in every call: keep an Arranged where it is used again. ``level`` forces an
    instruction set of ``decode_levels``. Raises AquabitError for arguments that do not fit.
    """
    _check(x, weight, bias, act, accuracy, 2)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise AquabitError(
            f"the input is {list(x.shape)}, the weight {list(weight.shape)} takes {weight.shape[1]} inputs"
        )
    prepared = _prepared(weight)
    if isinstance(prepared, CodebookWeight):
        return linear_by_tiles(fake_quantize(x, act), prepared.shape, rows_of(prepared), bias)
    y: Tensor = torch.ops.aquabit.decode_linear(
        x, *_operands(prepared, bias), act, accuracy == "exact", _level(level)
    )
    return y


def decode_conv2d(
    x: Tensor,
    weight: CodebookWeight | Arranged,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: int = 16,
    split: int | None = None,
    accuracy: Accuracy = "fast",
    *,
    level: str | None = None,
) -> Tensor:
    """x [n, cin, h, w], quantized per sample (and side of ``split``), convolved with a coded weight [out, cin
    / groups, kh, kw].

    Arguments as ``torch.nn.functional.conv2d``; the result is channels_last where x is. Else as
    ``decode_linear``.
    """
    _check(x, weight, bias, act, accuracy, 4)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if groups < 1 or x.ndim != 4 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise AquabitError(
            f"an input {list(x.shape)} does not fit a weight {list(weight.shape)} in {groups} groups"
        )
    if split is not None and not 0 < split < x.shape[1]:
        raise AquabitError(f"{split=} needs 0 < split < channels; got shape {tuple(x.shape)}")
    pads = _pads(padding, weight.shape[2:], stride, dilation)
    if min(_conv_shape(x, weight.shape, stride, pads, dilation)[2:]) < 1:
        raise AquabitError(
            f"an input {list(x.shape)} is smaller than the kernel {list(weight.shape[2:])}; pad it more"
        )
    prepared = _prepared(weight)
    if isinstance(prepared, CodebookWeight):
        quantized = fake_quantize(x, act, "sample", split)
        return conv_by_tiles(
            quantized, prepared.shape, rows_of(prepared), bias, stride, pads, dilation, groups
        )
    y: Tensor = torch.ops.aquabit.decode_conv2d(
        x,
        *_operands(prepared, bias),
        stride,
        pads,
        dilation,
        groups,
        act,
        split or 0,
        accuracy == "exact",
        _level(level),
    )
    return y


def _check(
    x: Tensor, weight: CodebookWeight | Arranged, bias: Tensor | None, act: int, accuracy: str, ndim: int
) -> None:
    if accuracy not in ("fast", "exact"):
        raise AquabitError(f"accuracy {accuracy!r} is unknown; it must be fast or exact")
    if act < 2:
        raise AquabitError(f"{act=} is too few for activations; give 2 to 15, or 16 for off")
    why = decode_refuses(weight, x.device, x.dtype)
    if why:
        raise AquabitError(why)
    if len(weight.shape) != ndim:
        raise AquabitError(
            f"a weight of shape {list(weight.shape)} does not fit here; {ndim} dimensions are needed"
        )
    held = weight.codes.device if isinstance(weight, Arranged) else weight.packed.device
    if held != x.device:
        raise AquabitError(f"the input is on {x.device}, the weight on {held}; move one of them")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.device != x.device):
        raise AquabitError(
            f"bias is {list(bias.shape)} on {bias.device}; needed is [{weight.shape[0]}] on {x.device}"
        )


def _level(name: str | None) -> int:
    known = decode_levels()
    if name is not None and name not in known:
        raise AquabitError(f"level {name!r} is unknown; this machine has {', '.join(known)}")
    return 0 if name is None else known.index(name)


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise AquabitError(f"{name} is {value}; one or two integers of at least {least} are needed")
    return pair[0], pair[1]


def _pads(
    padding: Pair | str, kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, ...]:
    """Padding above, below, left and right."""
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and stride != (1, 1)):
            raise AquabitError(
                f"{padding=} does not fit {stride=}; it must be valid, or same with stride 1, or integers"
            )
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return tuple(side for total in totals for side in (total // 2, total - total // 2))
    y, x = _pair("padding", padding, 0)
    return y, y, x, x


def _conv_shape(
    x: Tensor, weight: Sequence[int], stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    sizes = [
        (x.shape[2 + i] + pads[2 * i] + pads[2 * i + 1] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    ]
    return [x.shape[0], weight[0], *sizes]


def _prepared(weight: CodebookWeight | Arranged) -> CodebookWeight | Arranged:
    """Arranged where that is possible and there is a kernel for it."""
    if isinstance(weight, Arranged) or not decode_levels() or arranges(weight):
        return weight
    return arrange(weight)


def _operands(weight: Arranged, bias: Tensor | None) -> tuple[Any, ...]:
    """The tensors and integers of an op that stand for a weight."""
    facts = [
        weight.bits,
        weight.codebooks,
        weight.group,
        weight.fused,
        weight.order == "kernel",
        *weight.shape,
    ]
    if torch.compiler.is_compiling():
        segments = _segment_table(weight)
    else:
        if weight not in _segments:
            _segments[weight] = _segment_table(weight)
        segments = _segments[weight]
    return weight.codes, weight.tables, weight.scale, weight.offset, bias, segments, facts


def _segment_table(weight: Arranged) -> Tensor:
    """[segments, 5]: tap, start, count, scales, first byte."""
    rows, at = [], 0
    for segment in weight.segments:
        rows.append([*segment, at])
        at += weight.segment_bytes(segment)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


# ---- The ops

_WEIGHT = (
    "Tensor codes, Tensor? tables, Tensor scale, Tensor? offset, Tensor? bias, Tensor segments, int[] facts"
)
_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(f"decode_linear(Tensor x, {_WEIGHT}, int act, bool exact, int level) -> Tensor")
_library.define(
    f"decode_conv2d(Tensor x, {_WEIGHT}, int[] stride, int[] pads, int[] dilation, int groups, int act, int"
    " split, bool exact, int level) -> Tensor"
)


def _fits(name: str, tensor: Tensor | None, dtype: torch.dtype, size: list[int], shape: list[int]) -> None:
    if tensor is not None and (
        tensor.dtype != dtype or list(tensor.shape) != size or not tensor.is_contiguous()
    ):
        raise AquabitError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; a weight {shape} needs contiguous {dtype} {size}"
        )


class _Weight:
    """An op's weight as the extension takes it; keeps what the pointers point to."""

    def __init__(
        self,
        codes: Tensor,
        tables: Tensor | None,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        segments: Tensor,
        facts: list[int],
    ) -> None:
        bits, books, group, fused, kernel, *shape = facts
        out, codewords, area = shape[0], 1 << bits, prod(shape[2:])
        self.shape, self.scalar = tuple(shape), tables is None
        self.bias = None if bias is None else bias.detach().float().contiguous()
        sets = out if tables is not None and len(tables) == out else 1
        _fits("codes", codes, torch.uint8, [out, codes.shape[-1]], shape)
        _fits("tables", tables, torch.float32, [sets, books, codewords, group], shape)
        _fits("scale", scale, torch.float32, [out, scale.shape[-1]], shape)
        _fits("offset", offset, torch.float32, [out, 1 if offset is None else offset.shape[-1]], shape)
        _fits("segments", segments, torch.int64, [len(segments), 5], shape)
        plain = tables is not None or group * books == 1
        if (
            not plain
            or bits > 8
            or (kernel and group != area)
            or fused not in (1, 2, 4, 8)
            or bits * fused > 8
        ):
            raise AquabitError(
                f"a weight {shape} cannot have {bits} bits, {books} codebooks, groups of {group} and {fused}"
                " codes a lookup"
            )
        self.held = [codes, tables, scale, offset, self.bias, segments]
        pointers = [0 if t is None else t.data_ptr() for t in self.held]
        widths = [
            0 if tables is None else sets,
            codewords,
            scale.shape[1],
            0 if offset is None else offset.shape[1],
        ]
        self.numbers = [
            *pointers,
            len(segments),
            codes.shape[1],
            out,
            shape[1],
            area,
            bits,
            books,
            group,
            fused,
            int(kernel),
            *widths,
        ]

    def rows(self, level: int) -> Decoder:
        """Rows decoded by the extension, [rows, in] or [rows, cin, kh, kw] float32."""

        def decode(first: int, last: int) -> Tensor:
            rows = torch.empty(last - first, *self.shape[1:])
            _native.decode_rows(self.numbers, first, last, rows.data_ptr(), torch.get_num_threads(), level)
            return rows

        return decode


def _good(outcome: tuple[int, float, float, int]) -> bool:
    return bool(outcome[0]) and hypot(outcome[1], outcome[2]) <= MOST_LOST


@torch.library.impl(_library, "decode_linear", "CPU")
def _decode_linear_cpu(x: Tensor, *args: Any) -> Tensor:
    *parts, act, exact, level = args
    weight, x = _Weight(*parts), x.detach()
    tokens, shape = x.numel() // max(x.shape[-1], 1), (*x.shape[:-1], weight.shape[0])
    if tokens * weight.shape[0] == 0:
        return x.new_empty(shape)
    few = tokens <= FEW and weight.shape[1] <= LONGEST
    fused = act <= 8 and (weight.scalar or not (few or exact))  # the kernel quantizes
    if fused or few or not exact:
        rows = (x if fused else fake_quantize(x, act)).float().reshape(tokens, -1).contiguous()
        y = torch.empty(tokens, weight.shape[0])
        threads, bits = torch.get_num_threads(), act if fused else 16
        if _good(
            _native.decode_linear(
                weight.numbers, rows.data_ptr(), y.data_ptr(), tokens, bits, few, threads, level
            )
        ):
            return y.reshape(shape).to(x.dtype)
    return linear_by_tiles(fake_quantize(x, act), weight.shape, weight.rows(level), weight.bias)


@torch.library.impl(_library, "decode_conv2d", "CPU")
def _decode_conv2d_cpu(x: Tensor, *args: Any) -> Tensor:
    *parts, stride, pads, dilation, groups, act, split, exact, level = args
    weight, x = _Weight(*parts), x.detach()
    shape, form = _conv_shape(x, weight.shape, stride, pads, dilation), _memory_format(x)
    if prod(shape) == 0:
        return x.new_empty(shape)
    fused = act <= 8  # the kernel quantizes
    if not exact or (fused and weight.scalar):
        image = (x if fused else fake_quantize(x, act, "sample", split or None)).float().contiguous()
        y = torch.empty(shape)
        numbers = [
            *image.shape,
            *shape[2:],
            groups,
            *weight.shape[2:],
            *stride,
            pads[0],
            pads[2],
            *dilation,
            split if fused else 0,
        ]
        threads, bits = torch.get_num_threads(), act if fused else 16
        if _good(
            _native.decode_conv2d(
                weight.numbers, numbers, image.data_ptr(), y.data_ptr(), bits, threads, level
            )
        ):
            return y.to(x.dtype, memory_format=form)
    quantized = fake_quantize(x, act, "sample", split or None)
    y = conv_by_tiles(
        quantized, weight.shape, weight.rows(level), weight.bias, stride, pads, dilation, groups
    )
    return y.contiguous(memory_format=form)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.register_fake("aquabit::decode_linear", lib=_library)
def _decode_linear_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], args[6][5])


@torch.library.register_fake("aquabit::decode_conv2d", lib=_library)
def _decode_conv2d_fake(x: Tensor, *args: Any) -> Tensor:
    *_, facts, stride, pads, dilation, _groups, _act, _split, _exact, _level = args
    return x.new_empty(_conv_shape(x, facts[5:], stride, pads, dilation)).contiguous(
        memory_format=_memory_format(x)
    )
