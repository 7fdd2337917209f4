"""The table backend: codebook_linear and codebook_conv2d for codebooks that all rows share, by lut.cpp.

``exact``: float32 tables. Else int16 tables, each column (token; for a convolution with groups across
channels each tile) in units of its own for every block of lookups; their error was measured at 1e-4 to 8e-4
of the result's norm on Gaussian inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt, prod
from typing import NamedTuple

import torch  # before the extension: one libgomp then serves both
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from aquabit.kernels.arranged import NIBBLE, Arranged, Segment
from aquabit.scheme import AquabitError

try:
    from aquabit.kernels import _native  # type: ignore[attr-defined]  # built by CMake
except ImportError:
    _native = None

SPAN = 64  # inputs of a lookup, at most
TAPS = 64  # of a kernel, at most
LOOKUPS = 32
TABLE_BYTES = 1 << 18
DOTS = 4  # inputs of a lookup from which on tables are made by 16-bit dot products
LOSS = 4608  # of a block, at most: see _loss
TAP_LOSS = 3500  # the same where taps share tables: one unit serves a tile
TAP_LOSS_MOST = 5000  # above it convolutions take float32 tables


class _Block(NamedTuple):
    """Groups of inputs from a first channel on, and the runs of codes that refer to them: (tap, byte in a
    row, group of scales). The last group may reach beyond the inputs: what lies there belongs to other
    scales, or is not there at all."""

    first: int
    inputs: int
    groups: int
    runs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the extension is told of an arranged weight besides its codes."""

    codewords: Tensor  # [M, K, span], centred; fused: [half, span / 2], which serves both halves
    # the same in int16, in units of word_unit, an even number of them to a codeword; empty where fused
    words: Tensor
    by_input: Tensor  # the same [M, span, K padded]
    aux_weights: Tensor  # [span]: what centring took away is a sum of inputs, which aux_scale multiplies
    aux_scale: Tensor  # [out, n]
    blocks: Tensor  # int64 [blocks, 4]: first channel, channels, groups, runs
    runs: Tensor  # int64 [runs, 3]
    norms: Tensor  # [blocks]: length of the longest row of weights
    numbers: list[int]
    longest: float
    word_unit: float

    def tensors(self) -> list[Tensor]:
        return [
            self.codewords,
            self.words,
            self.by_input,
            self.aux_weights,
            self.aux_scale,
            self.blocks,
            self.runs,
            self.norms,
        ]


def lut_refuses(weight: Arranged) -> str | None:
    """Why the table kernel cannot run ``weight``, or None."""
    if not hasattr(_native, "lut_linear"):
        return "needs the C++ extension, which is not there"
    if weight.codes.device.type != "cpu":
        return f"runs on a CPU, not on {weight.codes.device}"
    if weight.tables is not None and len(weight.tables) > 1:
        return "needs codebooks that all rows share"
    if weight.span > SPAN or (weight.offset is not None and not weight.scalar):
        return f"takes groups of at most {SPAN} inputs, and offsets with scalar codes only"
    if prod(weight.shape[2:]) > TAPS:
        return f"takes kernels of at most {TAPS} taps, not {prod(weight.shape[2:])}"
    if weight.order == "inputs" and _taps(weight) is None:
        return "needs the groups of scales of a convolution to be the same at every tap"
    return None


def lut_linear(
    x: Tensor, weight: Arranged, bias: Tensor | None = None, exact: bool = False, level: int = 0
) -> Tensor:
    """x [..., in] times ``weight`` [out, in], plus bias [out]: [..., out] in x's dtype. Raises
    AquabitError for what does not fit."""
    _check(x, weight, bias, 2, x.shape[-1] if x.ndim else 0)
    plan = _plan(weight)
    y: Tensor = torch.ops.aquabit.lut_linear(
        x,
        weight.codes,
        weight.scale,
        _float(bias),
        *plan.tensors(),
        plan.numbers,
        plan.longest,
        plan.word_unit,
        exact,
        level,
    )
    return y


def lut_conv2d(
    x: Tensor,
    weight: Arranged,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    exact: bool = False,
    level: int = 0,
) -> Tensor:
    """x [n, cin, h, w] convolved with ``weight`` [out, cin / groups, kh, kw]; arguments as
    ``torch.nn.functional.conv2d``'s."""
    _check(x, weight, bias, 4, x.shape[1] if x.ndim == 4 else 0, groups)
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0 or groups < 1 or weight.shape[0] % groups:
        raise AquabitError(
            f"{stride=}, {padding=}, {dilation=} and {groups=} do not fit a weight {list(weight.shape)}"
        )
    size = _size(x, weight.shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise AquabitError(
            f"an image of {x.shape[2]} x {x.shape[3]} with {padding=} is smaller than a kernel of"
            f" {list(weight.shape[2:])}"
        )
    plan = _plan(weight)
    exact = exact or _rough(weight)
    y: Tensor = torch.ops.aquabit.lut_conv2d(
        x,
        weight.codes,
        weight.scale,
        _float(bias),
        *plan.tensors(),
        plan.numbers,
        plan.longest,
        plan.word_unit,
        exact,
        level,
        list(stride),
        list(padding),
        list(dilation),
        list(weight.shape[2:]),
        size,
        groups,
    )
    return y


def _size(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of the result."""
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _check(
    x: Tensor, weight: Arranged, bias: Tensor | None, ndim: int, channels: int, groups: int = 1
) -> None:
    refused = lut_refuses(weight)
    if refused:
        raise AquabitError(f"the table kernel {refused}")
    if len(weight.shape) != ndim or (ndim == 4 and x.ndim != 4):
        raise AquabitError(
            f"an input {list(x.shape)} and a weight {list(weight.shape)} do not go together here"
        )
    if channels != weight.shape[1] * groups:
        takes = weight.shape[1] * groups
        raise AquabitError(
            f"the input {list(x.shape)} has {channels} channels, the weight {list(weight.shape)} takes"
            f" {takes}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device != weight.codes.device:
        raise AquabitError(
            f"the table kernel takes float32 and bfloat16 on {weight.codes.device}, not {x.dtype} on"
            f" {x.device}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise AquabitError(
            f"bias is {list(bias.shape)}; a weight {list(weight.shape)} needs [{weight.shape[0]}]"
        )
    if bias is not None and bias.device != x.device:
        raise AquabitError(f"bias is on {bias.device}, the input on {x.device}; move one of them")


def _taps(weight: Arranged) -> list[list[Segment]] | None:
    """Segments by tap, or None where taps are not cut alike."""
    by_tap: dict[int, list[Segment]] = {}
    for segment in weight.segments:
        by_tap.setdefault(segment.tap, []).append(segment)
    taps = list(by_tap.values())
    return taps if all([s[1:3] for s in tap] == [s[1:3] for s in taps[0]] for tap in taps) else None


def _blocks(weight: Arranged) -> list[_Block]:
    """Each segment's groups in blocks, which end at whole bytes."""
    taps, starts, at = _taps(weight), {}, 0
    assert taps is not None
    for segment in weight.segments:
        starts[segment] = at
        at += weight.segment_bytes(segment)
    shared = len(taps) > 1
    per_byte = 2 if weight.width == NIBBLE else 1
    rows = 256 if weight.width == NIBBLE else 1 << weight.bits * weight.fused
    most = min(LOOKUPS, TABLE_BYTES // (64 * rows) * per_byte) // weight.codebooks
    most = isqrt(TAP_LOSS // _loss(weight)) if shared else min(most, isqrt(LOSS // _loss(weight)))
    even = _even(weight)
    most = max(most // even, 1) * even
    blocks = []
    for column in zip(*taps, strict=True):
        count = ceil(column[0].inputs / weight.channels)
        for group in range(0, count, most):
            byte = group * weight.codebooks * weight.width // 8
            runs = tuple((s.tap, starts[s] + byte, s.scales) for s in column)
            first, held = group * weight.channels, min(most, count - group)
            inputs = min(held * weight.channels, column[0].inputs - first)
            blocks.append(_Block(column[0].start + first, inputs, held, runs))
    return blocks


def _loss(weight: Arranged) -> int:
    """Roundings times inputs of one group (at all taps, where they share tables); a block of n groups has
    n^2 as many, and a relative error of about 1.2e-5 times the root of that (measured with Gaussian
    inputs)."""
    runs = prod(weight.shape[2:]) if weight.order == "inputs" else 1
    return runs * weight.codebooks * (2 if weight.fused > 1 else 1) * runs * weight.span


def _even(weight: Arranged) -> int:
    """Groups that blocks have a multiple of, to end at whole bytes."""
    return 2 if weight.width == NIBBLE and weight.codebooks % 2 else 1


def _rough(weight: Arranged) -> bool:
    """Whether even the smallest block would lose too much in int16."""
    return (
        weight.order == "inputs"
        and prod(weight.shape[2:]) > 1
        and _loss(weight) * _even(weight) ** 2 > TAP_LOSS_MOST
    )


def _plan(weight: Arranged) -> _Plan:
    plan = weight.derived.get("lut")
    if plan is None:
        with unset_fake_temporarily():  # the weight is real, whatever the input is
            plan = weight.derived["lut"] = _planned(weight)
    assert isinstance(plan, _Plan)
    return plan


def _planned(weight: Arranged) -> _Plan:
    codewords, aux_weights, aux_scale = _centred(weight)
    half = 1 << weight.bits * weight.fused // 2 if weight.fused > 1 else 0
    padded = ceil(codewords.shape[1] / 16) * 16
    by_input = torch.nn.functional.pad(
        codewords.transpose(1, 2), (0, padded - codewords.shape[1])
    ).contiguous()
    blocks = _blocks(weight)
    table = torch.tensor([[b.first, b.inputs, b.groups, len(b.runs)] for b in blocks])
    runs = torch.tensor([r for b in blocks for r in b.runs])
    numbers = [
        weight.shape[0],
        weight.shape[1],
        weight.codes.shape[1],
        weight.width,
        weight.codebooks,
        1 << weight.bits * weight.fused,
        weight.span,
        weight.channels,
        weight.scale.shape[1],
        half,
    ]
    if not weight.codes.data_ptr():
        raise AquabitError(
            f"a weight {list(weight.shape)} has no numbers in it: the table kernel cannot be prepared"
        )
    norms = torch.empty(len(blocks))
    addresses = [t.data_ptr() for t in (weight.codes, weight.scale, aux_scale, aux_weights)] + [
        0,
        codewords.data_ptr(),
        0,
    ]
    settings = [*numbers, 0, int(weight.order == "kernel")]
    _native.lut_norms(settings, addresses, table.data_ptr(), len(blocks), runs.data_ptr(), norms.data_ptr())
    longest = float(codewords.double().norm(dim=2).max()) * (2**0.5 if half else 1)
    words, word_unit = (
        _integers(codewords) if not half and weight.span >= DOTS else (torch.empty(0, dtype=torch.int16), 1.0)
    )
    return _Plan(
        codewords, words, by_input, aux_weights, aux_scale, table, runs, norms, numbers, longest, word_unit
    )


def _integers(codewords: Tensor) -> tuple[Tensor, float]:
    """[M, K, span] in int16 of 15 bits, padded to an even span, and their unit: inputs get the bits that
    are left."""
    unit = float(codewords.abs().max()) / 16383 or 1.0
    words = (codewords / unit).round().to(torch.int16)
    return torch.nn.functional.pad(words, (0, words.shape[2] % 2)).contiguous(), unit


def _centred(weight: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """Codewords around their mean [M, K, span] (fused: of half a lookup), and what the mean is worth:
    weights of inputs, scale by row."""
    if not weight.scalar:
        assert weight.tables is not None
        mean = weight.tables[0].double().mean(1, keepdim=True)
        return (
            (weight.tables[0] - mean).float().contiguous(),
            mean.sum(0)[0].float().contiguous(),
            weight.scale,
        )
    count = 1 << weight.bits
    values = torch.arange(count).double() if weight.tables is None else weight.tables[0, 0, :, 0].double()
    centre = values.mean()
    parts = max(weight.fused // 2, 1)
    codes = torch.arange(count**parts)
    words = torch.stack(
        [(values - centre)[(codes >> weight.bits * i) & (count - 1)] for i in range(parts)], 1
    )
    aux_scale = weight.scale.double() * centre + (0 if weight.offset is None else weight.offset.double())
    return words.float()[None].contiguous(), torch.ones(weight.span), aux_scale.float().contiguous()


_COMMON = (
    "Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor codewords, Tensor words, Tensor by_input,"
    " Tensor aux_weights, Tensor aux_scale, Tensor blocks, Tensor runs, Tensor norms, int[] numbers, float"
    " longest, float word_unit, bool exact, int level"
)
_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define(f"lut_linear({_COMMON}) -> Tensor")
_library.define(
    f"lut_conv2d({_COMMON}, int[] stride, int[] padding, int[] dilation, int[] kernel, int[] size, int"
    " groups) -> Tensor"
)


def _trust(
    op: str,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    codewords: Tensor,
    words: Tensor,
    by_input: Tensor,
    aux_weights: Tensor,
    aux_scale: Tensor,
    blocks: Tensor,
    runs: Tensor,
    norms: Tensor,
    numbers: list[int],
    taps: int,
    level: int,
) -> None:
    """Raises AquabitError where the extension would read beyond a tensor: it sees addresses only."""
    if len(numbers) != 10 or numbers[3] not in (NIBBLE, 8):
        raise AquabitError(f"{op}: numbers are {numbers}; they come from the weight, ten of them")
    out, _, row_bytes, width, codebooks, count, span, channels, scales, half = numbers
    table = (1, half, span // 2) if half else (codebooks, count, span)
    runs_of_block = taps if channels > 1 or span == 1 or taps != span else 1
    real, whole = torch.float32, torch.int64
    for name, held, dtype, shape in (
        ("codes", codes, torch.uint8, (out, row_bytes)),
        ("scale", scale, real, (out, scales)),
        ("aux_scale", aux_scale, real, (out, scales)),
        ("bias", bias, real, (out,)),
        ("codewords", codewords, real, table),
        ("aux_weights", aux_weights, real, (span,)),
        ("by_input", by_input, real, (table[0], table[2], ceil(table[1] / 16) * 16)),
        ("words", words, torch.int16, (codebooks, count, span + span % 2) if len(words) else (0,)),
        ("blocks", blocks, whole, (len(norms), 4)),
        ("runs", runs, whole, (len(norms) * runs_of_block, 3)),
        ("norms", norms, real, (len(blocks),)),
    ):
        if held is not None and (held.dtype != dtype or held.shape != shape or not held.is_contiguous()):
            raise AquabitError(
                f"{op}: {name} is {held.dtype} {list(held.shape)}; needed is {dtype} {list(shape)},"
                " contiguous"
            )
    if count > (16 if width == NIBBLE else 256) or not 0 < span <= SPAN or (half and half * half != count):
        raise AquabitError(f"{op}: numbers are {numbers}; they do not belong together")
    if not 0 <= level < len(_native.lut_levels()):
        raise AquabitError(
            f"{op}: level {level} is not there; this processor has {', '.join(_native.lut_levels())}"
        )


@torch.library.impl(_library, "lut_linear", "CPU")
def _linear_cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    codewords: Tensor,
    words: Tensor,
    by_input: Tensor,
    aux_weights: Tensor,
    aux_scale: Tensor,
    blocks: Tensor,
    runs: Tensor,
    norms: Tensor,
    numbers: list[int],
    longest: float,
    word_unit: float,
    exact: bool,
    level: int,
) -> Tensor:
    _trust(
        "lut_linear",
        codes,
        scale,
        bias,
        codewords,
        words,
        by_input,
        aux_weights,
        aux_scale,
        blocks,
        runs,
        norms,
        numbers,
        1,
        level,
    )
    if not x.ndim or x.shape[-1] != numbers[1]:
        raise AquabitError(f"lut_linear: x is {list(x.shape)}; its rows need {numbers[1]} inputs")
    rows = x.float().contiguous()
    y = torch.empty(*x.shape[:-1], numbers[0])
    if y.numel():
        addresses = [
            0 if t is None else t.data_ptr()
            for t in (codes, scale, aux_scale, aux_weights, bias, codewords, words if len(words) else None)
        ]
        _native.lut_linear(
            [*numbers, int(exact), 0],
            addresses,
            longest,
            word_unit,
            blocks.data_ptr(),
            len(blocks),
            runs.data_ptr(),
            norms.data_ptr(),
            by_input.data_ptr(),
            by_input.shape[2],
            rows.data_ptr(),
            y.data_ptr(),
            y.numel() // numbers[0],
            torch.get_num_threads(),
            level,
        )
    return y.to(x.dtype)


@torch.library.register_fake("aquabit::lut_linear", lib=_library)
def _linear_fake(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.impl(_library, "lut_conv2d", "CPU")
def _conv2d_cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    codewords: Tensor,
    words: Tensor,
    by_input: Tensor,
    aux_weights: Tensor,
    aux_scale: Tensor,
    blocks: Tensor,
    runs: Tensor,
    norms: Tensor,
    numbers: list[int],
    longest: float,
    word_unit: float,
    exact: bool,
    level: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    kernel: list[int],
    size: list[int],
    groups: int,
) -> Tensor:
    taps = prod(kernel)
    _trust(
        "lut_conv2d",
        codes,
        scale,
        bias,
        codewords,
        words,
        by_input,
        aux_weights,
        aux_scale,
        blocks,
        runs,
        norms,
        numbers,
        taps,
        level,
    )
    if groups < 1 or numbers[0] % groups or x.ndim != 4 or x.shape[1] != numbers[1] * groups:
        raise AquabitError(
            f"lut_conv2d: x is {list(x.shape)}; {groups} groups of {numbers[1]} channels are needed, for"
            f" {numbers[0]} outputs"
        )
    if (
        [len(p) for p in (stride, padding, dilation, kernel)] != [2] * 4
        or min(*stride, *dilation, *kernel) < 1
        or min(padding) < 0
    ):
        raise AquabitError(
            f"lut_conv2d: {stride=}, {padding=}, {dilation=} and {kernel=} do not fit an image"
        )
    if size != _size(x, kernel, stride, padding, dilation) or min(size) < 1:
        raise AquabitError(f"lut_conv2d: the result of x {list(x.shape)} cannot be of {size=}")
    y = torch.empty(len(x), numbers[0], *size)
    if not y.numel():
        return y.to(x.dtype)
    image = x.float().contiguous()
    channels, rows = numbers[1], numbers[0] // groups
    kernel_order = numbers[7] == 1 and numbers[6] == prod(kernel) > 1
    settings = [rows, *numbers[1:], int(exact), int(kernel_order)]
    shape = [len(x), *x.shape[2:], *stride, *padding, *dilation, *kernel, *size]
    for g in range(groups):  # a group is a convolution of its own
        own = slice(g * rows, (g + 1) * rows)
        part = image if groups == 1 else image[:, g * channels : (g + 1) * channels].contiguous()
        out = y if groups == 1 else torch.empty(len(x), rows, *size)
        held = (
            codes[own],
            scale[own],
            aux_scale[own],
            aux_weights,
            None if bias is None else bias[own],
            codewords,
        )
        addresses = [0 if t is None else t.data_ptr() for t in (*held, words if len(words) else None)]
        _native.lut_conv2d(
            settings,
            addresses,
            longest,
            word_unit,
            blocks.data_ptr(),
            len(blocks),
            runs.data_ptr(),
            norms.data_ptr(),
            shape,
            part.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
            level,
        )
        if groups > 1:
            y[:, own] = out
    return y.to(x.dtype)


@torch.library.register_fake("aquabit::lut_conv2d", lib=_library)
def _conv2d_fake(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    size = rest[-2]
    assert isinstance(size, list)
    return x.new_empty(len(x), codes.shape[0], *size)
