"""The tile-decode backend on CPU: a few rows of a weight decoded at a time, multiplied, forgotten.

Three ways, by what is asked:

- *bytes*: codes that are whole numbers of 8 bits (uniform and signed ones, e2m1, iq4_nl: native/decode/
  integers.h) with activations of at most 8 bits or "i8". Activations are quantized as ``fake_quantize`` does,
  products of 8 bits are summed in int32 over the inputs that share a scale, and these sums in float32, so the
  result is exact to float32 rounding, whatever the accuracy. (Of groups of at most 128 inputs, what tokens'
  zero points differ by is taken off in float32, up to 64 steps from their middle: 1e-5 was lost where all
  codes had one sign and all inputs but two were zero, 1e-6 or less elsewhere.)
- *shorts*: everything else under "fast": weights as 16-bit integers of one scale per row (decoded, scale and
  offset included), the
  activations' integers, or, unquantized, 15 bits per token or sample. What the rounding loses is measured in
  each call; a relative error above 1e-3 (outliers that leave nothing for the rest) makes the call "exact".
- *tiles*: "exact", and weights that cannot be arranged: tiles of rows in the activations' dtype for the dense
  library.

At most FEW tokens, twice as many where codes are of single weights, are multiplied row by row, by the bytes
or in float32. Decoded weights take at most 1/16 of the dense weight in bfloat16 in all threads together
(tiles: in the activations' dtype), or 16 KiB a thread where that is more; but a thread needs a row and a
block of rows (6, or 4 below AVX-512; tiles 8). The activations' integers take 1 or 2 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from typing import Any

import torch
from torch import Tensor

from aquabit.activation_bits import OTHERS, Rounding, act_bits, act_code, rounding_of
from aquabit.errors import AquabitError
from aquabit.kernels.arranged import Arranged, arrange, arranges
from aquabit.kernels.backends.decode_tiles import Decoder, conv_by_tiles, linear_by_tiles, rows_of
from aquabit.kernels.backends.raw import Raw, Run
from aquabit.kernels.backends.reference import Accuracy
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.extension import native as _native
from aquabit.kernels.extension import plain, plain_bias
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.kernels.geometry import UNPADDED, Geometry
from aquabit.kernels.registry import weight_at

FEW = 4  # tokens
LONGEST = 32768  # inputs that int32 holds the products of
MOST_LOST = 1e-3  # relative error of "fast"
DTYPES = (torch.float32, torch.bfloat16)
_LEVELS: tuple[str, ...] = tuple(_native.decode_levels()) if hasattr(_native, "decode_levels") else ()


def decode_levels() -> list[str]:
    """Instruction sets that this machine can run, best first; none without the extension."""
    return list(_LEVELS)


def multiplies_integers() -> bool:
    """Whether activations of at most 8 bits meet codes as integers in one instruction here (VNNI): whole
    models then run faster packed than dense (benchmarks/results/kernels.md)."""
    return _LEVELS[:1] in (("amx",), ("avx512vnni",), ("avxvnni",))


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
    act: Rounding = 16,
    accuracy: Accuracy = "fast",
    *,
    level: str | None = None,
) -> Tensor:
    """x [..., in], rounded per token as ``act`` says, times a coded weight [out, in], plus bias [out]:
    [..., out] in x's dtype.

    A CodebookWeight is arranged in every call: keep an Arranged where it is used again. ``level`` forces an
    instruction set of ``decode_levels``. Raises AquabitError for arguments that do not fit.
    """
    _check(x, weight, bias, act, accuracy, 2)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise AquabitError(
            f"the input is {list(x.shape)}, the weight {list(weight.shape)} takes {weight.shape[1]} inputs"
        )
    prepared = _arranged(weight)
    if isinstance(prepared, CodebookWeight):
        return linear_by_tiles(fake_quantize(x, act), prepared.shape, rows_of(prepared), bias)
    y: Tensor = torch.ops.aquabit.decode_linear(
        x, bias, prepared.number, prepared.shape[0], act_code(act), accuracy == "exact", _level(level)
    )
    return y


def decode_conv2d(
    x: Tensor,
    weight: CodebookWeight | Arranged,
    bias: Tensor | None = None,
    geometry: Geometry = UNPADDED,
    act: Rounding = 16,
    split: int | None = None,
    accuracy: Accuracy = "fast",
    *,
    level: str | None = None,
) -> Tensor:
    """x [n, cin, h, w], quantized per sample (and side of ``split``), convolved with a coded weight [out, cin
    / groups, kh, kw].

    The result is channels_last where x is. Else as ``decode_linear``.
    """
    _check(x, weight, bias, act, accuracy, 4)
    groups = geometry.groups
    if x.ndim != 4 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise AquabitError(
            f"an input {list(x.shape)} does not fit a weight {list(weight.shape)} in {groups} groups"
        )
    if split is not None and not 0 < split < x.shape[1]:
        raise AquabitError(f"{split=} needs 0 < split < channels; got shape {tuple(x.shape)}")
    if min(geometry.output(x.shape[2:], weight.shape[2:])) < 1:
        raise AquabitError(
            f"an input {list(x.shape)} is smaller than the kernel {list(weight.shape[2:])}; pad it more"
        )
    prepared = _arranged(weight)
    if isinstance(prepared, CodebookWeight):
        quantized = fake_quantize(x, act, "sample", split)
        return conv_by_tiles(quantized, prepared.shape, rows_of(prepared), bias, geometry)
    y: Tensor = torch.ops.aquabit.decode_conv2d(
        x,
        bias,
        prepared.number,
        prepared.shape,
        geometry.numbers,
        act_code(act),
        split or 0,
        accuracy == "exact",
        _level(level),
    )
    return y


def _check(
    x: Tensor, weight: CodebookWeight | Arranged, bias: Tensor | None, act: Rounding, accuracy: str, ndim: int
) -> None:
    if accuracy not in ("fast", "exact"):
        raise AquabitError(f"accuracy {accuracy!r} is unknown; it must be fast or exact")
    if act not in OTHERS and not (isinstance(act, int) and act >= 2):
        raise AquabitError(f"{act=} rounds no activations; give 2 to 15 bits, i8, f8, or 16 for off")
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


def _arranged(weight: CodebookWeight | Arranged) -> CodebookWeight | Arranged:
    """Arranged where that is possible and there is a kernel for it."""
    if isinstance(weight, Arranged) or not decode_levels() or arranges(weight):
        return weight
    return arrange(weight)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A weight in the extension (``native``), which holds its tensors by their addresses, and has checked
    them; the shape of what it decodes to."""

    native: Any
    shape: tuple[int, ...]
    integers: bool  # codes are multiplied as integers with activations that are
    single: bool  # codes of single weights, which tokens meet as they lie
    addresses: tuple[int, ...]  # of the weight's tensors then

    def tensors(self) -> list[Tensor]:
        """None besides the weight's own."""
        return []

    def rows(self, level: int) -> Decoder:
        """Rows decoded by the extension, [rows, in] or [rows, cin, kh, kw] float32."""

        def decode(first: int, last: int) -> Tensor:
            rows = torch.empty(last - first, *self.shape[1:])
            self.native.rows(first, last, rows.data_ptr(), torch.get_num_threads(), level)
            return rows

        return decode


def _prepared(weight: Arranged) -> _Prepared:
    """What the extension has of a weight, made once."""
    found, addresses = weight.derived.get("decode"), weight.addresses
    if found is None or found.addresses != addresses:
        native = _native.DecodeWeight(weight)
        found = _Prepared(native, weight.shape, native.integers, weight.scalar, addresses)
        weight.derived["decode"] = found
    assert isinstance(found, _Prepared)
    return found


def _ways(own: _Prepared, tokens: int, act: int, exact: bool) -> tuple[bool, bool]:
    """Whether tokens are multiplied row by row, and whether the kernel rounds them, as the code ``act``
    says."""
    few = tokens <= (2 * FEW if own.single else FEW) and own.shape[1] <= LONGEST
    return few, _integers(act) and (own.integers or not (few or exact))


# ---- Calls by addresses


def decode_linear_raw(
    weight: Arranged, tokens: int, act: int, exact: bool, threads: int, narrow: bool
) -> Raw | None:
    """``decode_linear`` of ``tokens`` rows, rounded by the code ``act``, float32 or (``narrow``) bfloat16;
    None where tiles of floats serve."""
    own = _prepared(weight)
    few, fused = _ways(own, tokens, act, exact)
    if not (fused or few or not exact):
        return None
    linear, bits = own.native.linear, act if fused else 16

    def reading(function: int) -> Run:
        def run(x: int, y: int, bias: int) -> bool:
            return _good(linear(x, y, bias, tokens, bits, few, threads, 0, narrow, function))

        return run

    return Raw(reading(0), fused, True, reading=reading)


def decode_conv2d_raw(
    weight: Arranged,
    sizes: tuple[int, ...],
    geometry: Geometry,
    act: int,
    split: int | None,
    exact: bool,
    threads: int,
    narrow: bool,
) -> Raw | None:
    """``decode_conv2d`` of images of such sizes, rounded by the code ``act``, float32 or (``narrow``)
    bfloat16; None where tiles of floats serve."""
    own, fused = _prepared(weight), _integers(act)
    if exact and not (fused and own.integers):
        return None
    conv2d, numbers, bits = own.native.conv2d, geometry.numbers, act if fused else 16
    parted = (split or 0) if fused else 0

    def run(x: int, y: int, bias: int) -> bool:
        return _good(conv2d(x, y, bias, sizes, numbers, parted, bits, threads, 0, narrow))

    return Raw(run, fused, True, follows=True)


# ---- The ops

_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(
    "decode_linear(Tensor x, Tensor? bias, int weight, int outputs, int act, bool exact, int level) -> Tensor"
)
_library.define(
    "decode_conv2d(Tensor x, Tensor? bias, int weight, int[] shape, int[] geometry, int act, int split, bool"
    " exact, int level) -> Tensor"
)


def _integers(act: int) -> bool:
    """Whether the code of a rounding is of integers of at most 8 bits, which the kernel makes itself."""
    rounding = rounding_of(act)
    return rounding != "f8" and act_bits(rounding) <= 8


def _narrow(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel reads and writes bfloat16 as it lies."""
    return x.dtype == torch.bfloat16 and (bias is None or bias.dtype == x.dtype)


def _good(outcome: tuple[int, float, float, int]) -> bool:
    return bool(outcome[0]) and hypot(outcome[1], outcome[2]) <= MOST_LOST


@torch.library.impl(_library, "decode_linear", "CPU")
def _decode_linear_cpu(
    x: Tensor, bias: Tensor | None, weight: int, _: int, act: int, exact: bool, level: int
) -> Tensor:
    own = _prepared(weight_at(weight))
    out, inputs = own.shape
    if not x.ndim or x.shape[-1] != inputs:
        raise AquabitError(f"decode_linear: x is {list(x.shape)}; its rows need {inputs} inputs")
    added, tokens = plain_bias(bias, out), x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], out)
    if tokens == 0:
        return y
    few, fused = _ways(own, tokens, act, exact)
    if fused or few or not exact:
        rows = x if fused else fake_quantize(x, rounding_of(act))
        narrow = _narrow(x, bias)
        if narrow:
            rows, added = rows.contiguous(), None if bias is None else bias.contiguous()
        else:
            rows = plain(rows)
        wide = y if narrow or x.dtype == torch.float32 else torch.empty(y.shape)
        outcome = own.native.linear(
            rows.data_ptr(),
            wide.data_ptr(),
            0 if added is None else added.data_ptr(),
            tokens,
            act if fused else 16,
            few,
            torch.get_num_threads(),
            level,
            narrow,
        )
        if _good(outcome):
            return wide.to(x.dtype)
    return linear_by_tiles(fake_quantize(x.detach(), rounding_of(act)), own.shape, own.rows(level), bias)


@torch.library.impl(_library, "decode_conv2d", "CPU")
def _decode_conv2d_cpu(
    x: Tensor,
    bias: Tensor | None,
    weight: int,
    _: list[int],
    geometry: list[int],
    act: int,
    split: int,
    exact: bool,
    level: int,
) -> Tensor:
    own, x, window = _prepared(weight_at(weight)), x.detach(), Geometry.of(geometry)
    if x.ndim != 4 or len(own.shape) != 4:
        raise AquabitError(
            f"decode_conv2d: x is {list(x.shape)}, the weight {list(own.shape)}; 4 dimensions needed"
        )
    added, form = plain_bias(bias, own.shape[0]), _memory_format(x)
    size = [len(x), own.shape[0], *(max(s, 0) for s in window.output(x.shape[2:], own.shape[2:]))]
    if 0 in size:
        return x.new_empty(size)
    fused, rounding = _integers(act), rounding_of(act)  # fused: the kernel quantizes
    if not exact or (fused and own.integers):
        image, narrow = x if fused else fake_quantize(x, rounding, "sample", split or None), _narrow(x, bias)
        if narrow:
            image, added = image.contiguous(), None if bias is None else bias.contiguous()
        else:
            image = plain(image)
        y = torch.empty(size, dtype=x.dtype if narrow else torch.float32)
        outcome = own.native.conv2d(
            image.data_ptr(),
            y.data_ptr(),
            0 if added is None else added.data_ptr(),
            image.shape,
            geometry,
            split if fused else 0,
            act if fused else 16,
            torch.get_num_threads(),
            level,
            narrow,
        )
        if _good(outcome):
            return y.to(x.dtype, memory_format=form)
    quantized = fake_quantize(x, rounding, "sample", split or None)
    y = conv_by_tiles(quantized, own.shape, own.rows(level), added, window)
    return y.contiguous(memory_format=form)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.register_fake("aquabit::decode_linear", lib=_library)
def _decode_linear_fake(x: Tensor, bias: Tensor | None, weight: int, outputs: int, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.register_fake("aquabit::decode_conv2d", lib=_library)
def _decode_conv2d_fake(
    x: Tensor, bias: Tensor | None, weight: int, shape: list[int], geometry: list[int], *_: object
) -> Tensor:
    size = Geometry.of(geometry).output(x.shape[2:], shape[2:])
    return x.new_empty(x.shape[0], shape[0], *size).contiguous(memory_format=_memory_format(x))
