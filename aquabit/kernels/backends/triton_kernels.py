"""The Triton backend: decode tiles of a coded weight on a CUDA device and feed the matrix units; no dense
copy is stored.

Linear layers and convolutions (implicit GEMM) share one kernel; at most 8 tokens take a path of their own.
Triton is imported at the first call, so this module can be imported without it. Under Triton's interpreter
(TRITON_INTERPRET=1 before the first import of triton) the same kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from math import prod
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends.triton_weight import TritonWeight, lay_out, why_not_laid_out
from aquabit.kernels.codebook import CodebookWeight, ceil_divide
from aquabit.kernels.geometry import Geometry
from aquabit.kernels.registry import weight_at
from aquabit.scheme import AquabitError

Accuracy = Literal["fast", "exact"]
Pair = int | tuple[int, int]
Weight = CodebookWeight | Arranged | TritonWeight
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 8  # up to here one pass over the codes without matrix units
_ROWS_FEW, _BLOCK_FEW = 8, 128  # outputs and inputs that a program of the path for few tokens takes at a time
_TILE_INTERPRETED = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SWIZZLE": 2}
_BY_GROUP = (2, 4, 8, 16)  # lengths of codewords that are loaded as vectors


@cache
def _device() -> Any:
    """The module of kernels, or a sentence that says why there is none."""
    try:
        from aquabit.kernels.backends import triton_device
    except ImportError as error:
        return f"triton is not installed ({error}); pip install 'aquabit[cuda]'"
    return triton_device


def triton_available() -> str | None:
    """Why Triton's kernels cannot run here, or None: they need triton and a CUDA device of capability 8.0,
    or the interpreter."""
    device = _device()
    if isinstance(device, str):
        return device
    if device.INTERPRETED:
        return "TRITON_INTERPRET was set after triton was imported; set it before" if device.MIXED else None
    return _gpu_refusal()


@cache
def _gpu_refusal() -> str | None:
    """Why the CUDA device cannot serve, or None; asked once, as each call of a layer asks."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the CUDA device has capability {major}.{minor}; 8.0 is needed"


def triton_refuses(weight: Weight, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot multiply ``weight`` with an input of ``dtype`` on ``device``, or None."""
    why = triton_available()
    if why:
        return why
    kind = torch.device(device).type
    needed = "cpu" if _device().INTERPRETED else "cuda"
    if kind != needed:
        return f"the input is on {device}; it must be on {needed}" + (
            ", which the interpreter takes" if needed == "cpu" else ""
        )
    if dtype not in DTYPES:
        return f"the input is {dtype}; it must be float32, bfloat16 or float16"
    return why_not_laid_out(weight)


_laid_out: WeakKeyDictionary[CodebookWeight | Arranged, TritonWeight] = WeakKeyDictionary()


def triton_weight(weight: Weight) -> TritonWeight:
    """``weight`` as the kernels read it, made at the first call, kept while ``weight`` lives and stays on its
    device; raises AquabitError where it cannot be."""
    if isinstance(weight, TritonWeight):
        return weight
    found = _laid_out.get(weight)
    if found is None or found.codes.device != weight.held_codes.device:
        found = _laid_out[weight] = lay_out(weight)
    return found


def triton_linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, accuracy: Accuracy = "fast"
) -> Tensor:
    """x [..., in] times a coded weight [out, in], plus bias [out]: [..., out] in x's dtype.

    "exact": float32 arithmetic, relative error 1e-6 before rounding to x's dtype. "fast": float32 inputs and
    weights are rounded to tf32 (relative error at most 1e-3), others multiply in x's dtype; sums are float32
    always. Raises AquabitError for shapes, devices, dtypes or accuracies that do not fit.
    """
    laid = _checked(x, weight, bias, accuracy, 2)
    if x.ndim == 0 or x.shape[-1] != laid.shape[1]:
        raise AquabitError(
            f"the input is {list(x.shape)}; a weight {list(laid.shape)} takes [..., {laid.shape[1]}]"
        )
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.aquabit.triton_linear(
        rows, _contiguous(bias), laid.number, laid.shape[0], accuracy == "exact"
    )
    return y.reshape(*x.shape[:-1], laid.shape[0])


def triton_conv2d(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    accuracy: Accuracy = "fast",
) -> Tensor:
    """x [n, cin, h, w] convolved with a coded weight [out, cin / groups, kh, kw]: [n, out, h', w'] in x's
    dtype and memory format.

    Arguments as ``torch.nn.functional.conv2d``, accuracy as ``triton_linear``; raises AquabitError for what
    does not fit.
    """
    laid = _checked(x, weight, bias, accuracy, 4)
    out, cin, kh, kw = laid.shape
    if x.ndim != 4 or groups < 1 or x.shape[1] != cin * groups:
        raise AquabitError(
            f"the input is {list(x.shape)}; a weight {list(laid.shape)} in {groups} groups takes [n,"
            f" {cin * groups}, h, w]"
        )
    if out % groups:
        raise AquabitError(f"{groups} groups do not divide the weight's {out} outputs")
    steps, spread = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
    reach = (spread[0] * (kh - 1), spread[1] * (kw - 1))
    before, after = _pads(padding, reach, steps)
    sizes = [(x.shape[2 + i] + before[i] + after[i] - reach[i] - 1) // steps[i] + 1 for i in (0, 1)]
    if min(sizes) < 1:
        image, extent = list(x.shape[2:]), [r + 1 for r in reach]
        raise AquabitError(
            f"an image of {image} with padding {padding} is smaller than the kernel, which reaches over"
            f" {extent}"
        )
    y: Tensor = torch.ops.aquabit.triton_conv2d(
        x,
        _contiguous(bias),
        laid.number,
        laid.shape,
        Geometry(steps, before, spread, groups).numbers,
        sizes,
        accuracy == "exact",
    )
    return y


def _checked(x: Tensor, weight: Weight, bias: Tensor | None, accuracy: str, ndim: int) -> TritonWeight:
    if accuracy not in ("fast", "exact"):
        raise AquabitError(f"accuracy {accuracy!r} is unknown; it must be fast or exact")
    if len(weight.shape) != ndim:
        raise AquabitError(
            f"a weight of shape {list(weight.shape)} does not fit here; {ndim} dimensions are needed"
        )
    why = why_not_laid_out(weight) if x.device.type == "meta" else triton_refuses(weight, x.device, x.dtype)
    if why:
        raise AquabitError(f"the triton backend cannot serve: {why}")
    laid = triton_weight(weight)
    if bias is not None and tuple(bias.shape) != (laid.shape[0],):
        raise AquabitError(
            f"the bias is {list(bias.shape)}; a weight {list(laid.shape)} needs [{laid.shape[0]}]"
        )
    for name, other in (("weight", laid.codes), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise AquabitError(f"the input is on {x.device}, the {name} on {other.device}; move one of them")
    return laid


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _pair(value: Pair, name: str, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise AquabitError(f"{name} {value} does not fit; it is one or two integers of at least {least}")
    return int(pair[0]), int(pair[1])


def _pads(
    padding: Pair | str, reach: tuple[int, int], steps: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of zeros before and after the image."""
    if padding == "same" and steps == (1, 1):
        before = (reach[0] // 2, reach[1] // 2)
        return before, (reach[0] - before[0], reach[1] - before[1])
    if isinstance(padding, str) and padding != "valid":
        raise AquabitError(
            f"padding {padding!r} with stride {steps} does not fit; it is valid, same (stride 1) or one or"
            " two integers"
        )
    both = (0, 0) if isinstance(padding, str) else _pair(padding, "padding", 0)
    return both, both


_library = torch.library.Library("aquabit", "FRAGMENT")
_library.define("triton_linear(Tensor x, Tensor? bias, int weight, int outputs, bool exact) -> Tensor")
_library.define(
    "triton_conv2d(Tensor x, Tensor? bias, int weight, int[] shape, int[] geometry, int[] size, bool exact)"
    " -> Tensor"
)


def _linear(x: Tensor, bias: Tensor | None, weight: int, outputs: int, exact: bool) -> Tensor:
    y, laid = _linear_fake(x, bias, weight, outputs, exact), weight_at(weight)
    if y.numel() == 0:
        return y
    with _on(x):
        if len(x) <= FEW_TOKENS:
            _launch_few(x, y, laid, bias)
        else:
            placed = (*x.stride(), 0, 0, *y.stride(), 0, 0, laid.shape[1], 1, 1, 1, 1, 1, 1, 0, 0, 1, 1)
            _launch(x, y, laid, bias, exact, len(x), 1, placed)
    return y


def _linear_fake(x: Tensor, bias: Tensor | None, weight: int, outputs: int, exact: bool) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _conv2d(
    x: Tensor,
    bias: Tensor | None,
    weight: int,
    shape: list[int],
    geometry: list[int],
    size: list[int],
    exact: bool,
) -> Tensor:
    y = _conv2d_fake(x, bias, weight, shape, geometry, size, exact)
    if y.numel() == 0:
        return y
    placed = (*x.stride(), *y.stride(), shape[1], x.shape[2], x.shape[3], *size, *geometry[:6])
    with _on(x):
        _launch(x, y, weight_at(weight), bias, exact, len(x) * prod(size), geometry[6], placed)
    return y


def _conv2d_fake(
    x: Tensor,
    bias: Tensor | None,
    weight: int,
    shape: list[int],
    geometry: list[int],
    size: list[int],
    exact: bool,
) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y = x.new_empty(x.shape[0], shape[0], *size)
    return y.contiguous(memory_format=torch.channels_last) if last else y


for _name, _run, _fake in (
    ("triton_linear", _linear, _linear_fake),
    ("triton_conv2d", _conv2d, _conv2d_fake),
):
    for _key in ("CUDA", "CPU"):  # CPU: the interpreter; triton_refuses guards it
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"aquabit::{_name}", _fake, lib=_library)


def _on(x: Tensor) -> Any:
    """Launches go to the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _constants(laid: TritonWeight, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are specialised for."""
    row, counts = prod(laid.shape[1:]), _counts(laid)
    # A row scale alone is applied to sums: decoded codewords then stay as they are stored, exact in half
    # precision where there is one codebook. Not where sums of codewords leave float16.
    in_tile = laid.offset is not None or counts[0] > 1 or (dtype == torch.float16 and laid.wide)
    return {
        "BITS": laid.bits,
        "WIDTH": laid.width,
        "FUSED": laid.fused,
        "GROUP": laid.group,
        "BOOKS": laid.codebooks,
        "UNIFORM": laid.tables is None,
        "PER_ROW": laid.per_row,
        "BY_GROUP": laid.group in _BY_GROUP,
        "IN_TILE": in_tile,
        "HAS_SCALE": laid.scale is not None,
        "HAS_OFFSET": laid.offset is not None,
        "SCALE_SIZE": ceil_divide(row, counts[0]) if counts[0] > 1 else 0,
        "OFFSET_SIZE": ceil_divide(row, counts[1]) if counts[1] > 1 else 0,
    }


def _counts(laid: TritonWeight) -> tuple[int, ...]:
    """How many scales and offsets each row has."""
    return tuple(1 if t is None or t.ndim == 1 else t.shape[1] for t in (laid.scale, laid.offset))


def _launch(
    x: Tensor,
    y: Tensor,
    laid: TritonWeight,
    bias: Tensor | None,
    exact: bool,
    tokens: int,
    groups: int,
    placed: tuple[int, ...],
) -> None:
    """The kernel with matrix units, over tiles of tokens x outputs. ``placed``: strides of x and y, and the
    geometry, as the kernel takes them."""
    conv, codes = len(laid.shape) == 4, laid.codes
    out, row = len(codes) // groups, prod(laid.shape[1:])

    def chosen() -> tuple[Any, Any, dict[str, Any]]:
        device = _device()
        constants = _constants(laid, torch.float32 if exact else x.dtype) | {
            "HAS_BIAS": bias is not None,
            "CONV": conv,
            "KERNEL_ORDER": laid.kernel_order,
            "EXACT": exact,
            "KERNEL_H": laid.shape[2] if conv else 1,
            "KERNEL_W": laid.shape[3] if conv else 1,
        }
        if device.INTERPRETED:
            constants |= _TILE_INTERPRETED

        def grid(tile: dict[str, int]) -> tuple[int, int, int]:
            tiles = ceil_divide(tokens, tile["BLOCK_M"]) * ceil_divide(out, tile["BLOCK_N"])
            return tiles, groups, 1

        return device.tuned_matmul, grid, constants

    sizes = (tokens, out, row, codes.shape[1], *_counts(laid), 1 << (tokens - 1).bit_length())
    pointers = (x, y, codes, *_pointers(laid, bias))
    _start(("matmul", exact, laid.facts), codes, pointers, sizes + placed, chosen)


def _pointers(laid: TritonWeight, bias: Tensor | None) -> list[Tensor]:
    """Tables, scale, offset and bias; the codes in the place of what is not there, which is not read."""
    return [laid.codes if t is None else t for t in (laid.tables, laid.scale, laid.offset, bias)]


LAUNCHES = 4096  # launches remembered: shapes of layers and inputs; past that all are forgotten
_launches: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _start(
    key: tuple[Any, ...],
    unread: Tensor,
    pointers: tuple[Tensor, ...],
    integers: tuple[int, ...],
    chosen: Callable[[], tuple[Any, Any, dict[str, Any]]],
) -> None:
    """Launch a kernel. Of a call like one before, with the same ``key``, integers, dtypes and alignment of
    pointers, the compiled kernel and its grid are known, and Triton's own look-up, which takes longer than
    most of our kernels run, is left out. ``chosen``: the kernel (or its tuner), its grid and constants;
    ``unread`` stands for a pointer that is not read, so the key tells which there are.
    """
    pointed = tuple((p.dtype, p is unread, p.data_ptr() & 15) for p in pointers)
    known = (*key, pointers[0].device.index, *integers, *pointed)
    found = _launches.get(known)
    if found is not None:
        launch, constants = found
        launch(*pointers, *integers, *constants)
        return
    kernel, grid, named = chosen()
    compiled = kernel[grid](*pointers, *integers, **named)
    if not _device().DIRECT:
        return
    best = getattr(kernel, "best_config", None)
    named = named | (best.kwargs if best is not None else {})
    constants = tuple(named[name] for name in kernel.arg_names[len(pointers) + len(integers) :])
    if len(_launches) >= LAUNCHES:
        _launches.clear()
    _launches[known] = compiled[grid(named) if callable(grid) else grid], constants


def _launch_few(x: Tensor, y: Tensor, laid: TritonWeight, bias: Tensor | None) -> None:
    """The path for few tokens: the row is split where the outputs alone would leave processors idle."""
    (tokens, row), codes = x.shape, laid.codes
    out = len(codes)
    tiles, blocks = ceil_divide(out, _ROWS_FEW), ceil_divide(row, _BLOCK_FEW)
    steps = ceil_divide(blocks, max(1, min(blocks, ceil_divide(4 * _processors(x.device), tiles))))
    splits = ceil_divide(blocks, steps)
    parts = x.new_empty(splits, tokens, out, dtype=torch.float32) if splits > 1 else y

    def constants() -> dict[str, Any]:
        padded = 1 << (tokens - 1).bit_length()
        return _constants(laid, torch.float32) | {"HAS_BIAS": bias is not None, "TOKENS": padded}

    def few() -> tuple[Any, Any, dict[str, Any]]:
        tile = {"SPLIT": splits > 1, "BLOCK_N": _ROWS_FEW, "BLOCK_K": _BLOCK_FEW}
        return _device().few_tokens, (tiles, splits, 1), constants() | tile

    def add() -> tuple[Any, Any, dict[str, Any]]:
        names = ("IN_TILE", "HAS_SCALE", "HAS_BIAS", "TOKENS")
        named = {name: value for name, value in constants().items() if name in names}
        return _device().add_parts, (ceil_divide(out, 128), 1, 1), named | {"BLOCK_N": 128}

    counts, (tables, scale, offset, held) = _counts(laid), _pointers(laid, bias)
    sizes = (tokens, out, row, codes.shape[1], *counts, *x.stride(), steps)
    _start(("few", laid.facts), codes, (x, y, parts, codes, tables, scale, offset, held), sizes, few)
    if splits > 1:
        key = ("add", laid.facts, laid.offset is None, counts)  # what it sees nothing else of
        _start(key, codes, (parts, y, scale, held), (tokens, out, splits), add)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; under the interpreter few, so that tests see rows split and not."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
