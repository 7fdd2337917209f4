"""Which kernel runs a coded layer: the fastest measured one of those that can, else a fixed order; the
functions that everyone calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from functools import lru_cache
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from aquabit.kernels.arranged import Arranged, arrange, arranges
from aquabit.kernels.backends import BACKENDS, Backend, Weight, backend_named
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.kernels.geometry import Geometry, Pair, padded, pair
from aquabit.kernels.registry import numbered
from aquabit.kernels.request import MOST_ROWS, Accuracy, Format, Request, bucket, format_of
from aquabit.kernels.timings import Table, Timings
from aquabit.scheme import AquabitError, Rounding, act_code, act_text

REMEMBERED = 4096  # requests: of every layer of a large model, at some sizes
FEW = 4  # tokens up to which the weight, not the arithmetic, takes the time
TRITON_FEW = 8  # the same on a GPU (triton_kernels.FEW_TOKENS)
_DTYPES = {
    d: str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}

Seen = Callable[[Weight, Request, str], None]  # told of each call: its weight, request and backend


# ---- the choice


def serving(request: Request) -> dict[str, str | None]:
    """Every backend with the reason why it cannot serve ``request``; None for those that can."""
    return {b.name: b.refuses(request) for b in BACKENDS}


def static_order(request: Request) -> tuple[str, ...]:
    """The order in which backends are tried where nothing was measured.

    A dense copy where one is kept: on a GPU it is the fastest at every size that was timed
    (benchmarks/results/triton.md), and ``memory=auto`` keeps those that pay most. Then, on a GPU, Triton: as
    integers where codes and activations are, unless there are only a few tokens (TRITON_FEW); but codewords
    of vectors for MOST_ROWS tokens or pixels by decoding the weight first, as was faster there. On a CPU
    codes of several weights, and those of single ones where tables win, on tables before decoded tiles, all
    else the other way round; the reference last.
    """
    form = request.format
    # Up to 3 bits a lookup is for two scalar codes or four. It beats products of 16-bit integers (1152 x 1152
    # at 2 bits, 256 tokens: 2.7 and 3.8 ms), not those of 8 bits (2.1 ms), nor rows read for few tokens (0.23
    # and 0.04 ms), nor where sums end with each group of scales.
    fused = request.kind == "linear" and form.bits <= 3 and (form.scales or 1) == 1
    tables = not form.scalar or (fused and not request.integers and request.rows > FEW)
    native = ("lut", "decode") if tables else ("decode", "lut")
    triton = ("triton", "triton_int8") if request.rows <= TRITON_FEW else ("triton_int8", "triton")
    many = request.rows >= bucket(MOST_ROWS, prod(request.size) if request.kind == "conv2d" else 1)
    if request.device == "cuda" and not form.scalar and many:
        return ("dense", "reference", *triton, *native)
    return ("dense", *triton, *native, "reference")


def select(request: Request, timings: Table, backend: str | None = None) -> str:
    """The name of the backend for a request: ``backend`` itself where it is given, else the fastest of those
    in ``timings`` that can serve, else the first that can in ``static_order``. Of equally fast ones the first
    in that order.

    Raises AquabitError for a ``backend`` that is unknown or cannot serve, saying why and which can.
    """
    if backend is not None:
        why = backend_named(backend, BACKENDS).refuses(request)
        if why:
            can = ", ".join(name for name, reason in serving(request).items() if reason is None)
            raise AquabitError(
                f"backend {backend!r} cannot run {request.kind} {request.format} at {act_text(request.act)}:"
                f" {why}; these can: {can}"
            )
        return backend
    order = [name for name in static_order(request) if backend_named(name, BACKENDS).refuses(request) is None]
    measured = timings.get(request.key, {})
    timed = [name for name in order if name in measured]
    return min(timed, key=lambda name: measured[name]) if timed else order[0]


class _Choices:
    """A table and what was chosen by it so far."""

    def __init__(self, table: Callable[[int], Table]):
        self.table, self.made = table, dict[tuple[Request, str | None], Backend]()

    def __call__(self, request: Request, backend: str | None) -> Backend:
        found = self.made.get((request, backend))
        if found is None:
            found = self.made[request, backend] = backend_named(
                select(request, self.table(request.threads), backend), BACKENDS
            )
        return found


_opened: dict[int, Timings] = {}  # threads -> this machine's table


def machine_timings(threads: int | None = None) -> Timings:
    """This machine's table for so many threads (default: torch's now), read once a process."""
    count = threads or torch.get_num_threads()
    if count not in _opened:
        _opened[count] = Timings(count)
    return _opened[count]


def remember(found: Table, threads: int | None = None) -> None:
    """Add measured times to this machine's table; choices are made anew."""
    machine_timings(threads).add(found)
    _by_machine.made = {}


def forget() -> None:
    """Read the machine's tables again when they are next needed."""
    _opened.clear()
    _by_machine.made = {}


_by_machine = _Choices(lambda threads: machine_timings(threads).entries)
_choices: ContextVar[_Choices] = ContextVar("choices", default=_by_machine)
_seen: ContextVar[Seen | None] = ContextVar("seen", default=None)


def choices_so_far() -> object:
    """What is the same object for as long as every request keeps the choice that was made for it."""
    return _choices.get().made


def backend_for(request: Request) -> Backend:
    """The backend that runs a request now."""
    return _choices.get()(request, None)


def observer() -> Seen | None:
    """Who is told of each call."""
    return _seen.get()


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Choose by ``table`` instead of this machine's; an empty one means the static order, which is the
    same everywhere."""
    token = _choices.set(_Choices(lambda _: table))
    try:
        yield
    finally:
        _choices.reset(token)


def context_of(table: Table) -> Context:
    """A context in which kernels are chosen by ``table``, for calls that come again and again."""
    context = copy_context()
    context.run(_choices.set, _Choices(lambda _: table))
    return context


@contextmanager
def observed(seen: Seen) -> Iterator[None]:
    """Call ``seen(weight, request, backend)`` for every coded layer that runs meanwhile."""
    token = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(token)


# ---- weights as kernels read them

_arranged: WeakKeyDictionary[CodebookWeight, Arranged] = WeakKeyDictionary()
_formats: WeakKeyDictionary[Weight, Format] = WeakKeyDictionary()
_tables: Any = (
    WeakIdKeyDictionary()
)  # stored codebooks -> as float32: layers that share the ones share the others


def held(weight: Weight) -> Weight:
    """``weight`` as kernels read it: arranged where it can be. Weights that share codebooks share their
    float32 form too."""
    if isinstance(weight, Arranged) or arranges(weight) is not None:
        return numbered(weight)
    arranged = arrange(weight)
    if weight.codebooks is not None:
        object.__setattr__(arranged, "tables", _tables.setdefault(weight.codebooks, arranged.tables))
    return numbered(arranged)


def format_held(weight: Arranged) -> Format:
    """The facts of a weight, made once."""
    return _known(weight)[1]


def _known(weight: Weight) -> tuple[Weight, Format]:
    """A weight as kernels read it, and its facts; both made once."""
    form = _formats.get(weight)
    if form is None:
        form = _formats[weight] = format_of(weight)
    if isinstance(weight, Arranged) or form.unarranged is not None:
        return weight, form
    found = _arranged.get(weight)
    if found is None:
        arranged = held(weight)
        assert isinstance(weight, CodebookWeight) and isinstance(arranged, Arranged)
        found = _arranged[weight] = arranged
    return found, form


def device_of(weight: Weight) -> torch.device:
    return weight.held_codes.device


# ---- the functions


def codebook_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    accuracy: Accuracy = "fast",
    backend: str | None = None,
    *,
    act: Rounding = 16,
    dense: Tensor | None = None,
) -> Tensor:
    """x [..., in] times a coded weight [out, in], plus bias [out]: [..., out] in x's dtype.

    ``accuracy``: "exact" is float32 arithmetic (relative error 1e-6), "fast" stays within 1e-3. ``act``: x is
    rounded first, per token: to so many bits, or as "i8" or "f8" (16: off). ``backend`` names a kernel
    (default: see ``select``); ``dense`` is the decoded weight where the caller keeps it. A CodebookWeight is
    arranged for the kernels at its first call and remembered. Raises AquabitError for shapes, devices,
    accuracies or backends that do not fit.
    """
    _check(x, weight, x.shape[-1] if x.ndim else 0, accuracy, 2)
    handle = _compiled(weight, backend)
    if handle is not None:
        return torch.ops.aquabit.coded_linear(
            x, bias, dense, handle, weight.shape[0], accuracy, act_code(act)
        )
    own, form = _known(weight)
    request = linear_request(x, form, accuracy, act, dense is not None)
    chosen = _chosen(own, request, backend, x.numel())
    if act != 16 and not chosen.quantizes:
        x = fake_quantize(x, act, "token")
    return chosen.linear(x, own, bias, request, dense)


def codebook_conv2d(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | str | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    accuracy: Accuracy = "fast",
    backend: str | None = None,
    *,
    act: Rounding = 16,
    split: int | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """x [n, cin, h, w] or [cin, h, w] convolved with a coded weight [out, cin / groups, kh, kw]; as
    ``torch.nn.functional.conv2d``.

    ``act``: x is rounded first, per sample with zero in its range; ``split`` makes it two
    ranges, over channels ``[:split]`` and ``[split:]``. The rest as ``codebook_linear``.
    """
    if x.ndim == 3:
        options: dict[str, Any] = {"act": act, "split": split, "dense": dense}
        return codebook_conv2d(
            x[None], weight, bias, stride, padding, dilation, groups, accuracy, backend, **options
        )[0]
    if x.ndim != 4:
        raise AquabitError(
            f"an input of shape {list(x.shape)} does not fit a convolution; it takes [n, channels, height,"
            " width]"
        )
    steps, spread = pair(stride, "stride"), pair(dilation, "dilation")
    if not isinstance(groups, int) or groups < 1:
        raise AquabitError(f"groups is {groups!r:.60}; it must be a whole number, at least 1")
    _check(x, weight, x.shape[1] // groups, accuracy, 4)
    if x.shape[1] % groups or weight.shape[0] % groups:
        raise AquabitError(
            f"{groups} groups do not divide {x.shape[1]} input and {weight.shape[0]} output channels"
        )
    x, edges = padded(x, padding, steps, spread, weight.shape[2:])
    geometry = Geometry(steps, edges, spread, groups)
    if min(geometry.output(x.shape[2:], weight.shape[2:])) < 1:
        raise AquabitError(
            f"an image of {x.shape[2]} x {x.shape[3]} with padding {edges} is smaller than a kernel of"
            f" {list(weight.shape[2:])} with dilation {spread}"
        )
    handle = _compiled(weight, backend)
    if handle is not None:
        y: Tensor = torch.ops.aquabit.coded_conv2d(
            x, bias, dense, handle, weight.shape, geometry.numbers, accuracy, act_code(act), split
        )
        return y
    own, form = _known(weight)
    request = conv2d_request(x, form, geometry, accuracy, act, split, dense is not None)
    chosen = _chosen(own, request, backend, x.numel())
    if act != 16 and not chosen.quantizes:
        x = fake_quantize(x, act, "sample", split)
    return chosen.conv2d(x, own, bias, request, dense)


def _compiled(weight: Weight, backend: str | None) -> Tensor | None:
    """The handle of a weight while torch.compile traces: compiled code calls one op (compiled.py), which
    chooses when it runs. None elsewhere."""
    return getattr(weight, "handle", None) if torch.compiler.is_compiling() and backend is None else None


def linear_request(
    x: Tensor, form: Format, accuracy: Accuracy, act: Rounding, dense: bool = False
) -> Request:
    """What ``codebook_linear`` asks for."""
    return _linear_request(form, x.numel(), accuracy, act, *_of(x, dense))


@lru_cache(maxsize=REMEMBERED)
def _linear_request(form: Format, elements: int, accuracy: Accuracy, act: Rounding, *of: Any) -> Request:
    dtype, device, threads, dense, gradient = of
    return Request(
        "linear",
        form,
        bucket(elements // form.shape[1]),
        act=act,
        accuracy=accuracy,
        dtype=dtype,
        device=device,
        threads=threads,
        dense=dense,
        gradient=gradient,
    )


def conv2d_request(
    x: Tensor,
    form: Format,
    geometry: Geometry,
    accuracy: Accuracy,
    act: Rounding,
    split: int | None,
    dense: bool = False,
) -> Request:
    """What ``codebook_conv2d`` asks for."""
    return _conv2d_request(form, x.shape, geometry, act, split, accuracy, *_of(x, dense))


@lru_cache(maxsize=REMEMBERED)
def _conv2d_request(form: Format, shape: tuple[int, ...], *rest: Any) -> Request:
    n, _, height, width = shape
    return Request("conv2d", form, bucket(n, height * width), (height, width), *rest)


def _of(x: Tensor, dense: bool) -> tuple[str, str, int, bool, bool]:
    """The last facts of a request: dtype, device, threads, dense, gradient."""
    gradient = torch.is_grad_enabled() and x.requires_grad
    return _DTYPES.get(x.dtype, str(x.dtype)), x.device.type, torch.get_num_threads(), dense, gradient


def _chosen(weight: Weight, request: Request, backend: str | None, size: int) -> Backend:
    found = _choices.get()(request, backend)
    seen = observer()
    if seen is not None:
        seen(weight, request, found.name)
    return found if size else backend_named("reference")  # nothing to multiply


def _check(x: Tensor, weight: Weight, inputs: int, accuracy: str, ndim: int) -> None:
    if accuracy not in ("fast", "exact"):
        raise AquabitError(f"accuracy {accuracy!r} is unknown; it must be fast or exact")
    if len(weight.shape) != ndim:
        raise AquabitError(
            f"a weight of shape {list(weight.shape)} does not fit here; {ndim} dimensions are needed"
        )
    if inputs != weight.shape[1]:
        raise AquabitError(
            f"the input has {inputs} channels, the weight {list(weight.shape)} takes {weight.shape[1]}"
        )
    # what compiled code is of depends on no tensor of the weight; its ops check them
    if not torch.compiler.is_compiling() and x.device != device_of(weight):
        raise AquabitError(f"the input is on {x.device}, the weight on {device_of(weight)}; move one of them")
