"""A layer's calls of a native kernel, prepared: what follows from the weight, the layer's setting, the shape
of the input and the threads is looked up once. Then a call is a few tests, an output, and one call of the
extension.

Only where nothing else has a say: what is traced, mapped, differentiated or laid out otherwise goes through
``codebook_linear`` or ``codebook_conv2d``, and so does what no kernel serves directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends.raw import Run
from aquabit.kernels.dispatch import backend_for, choices_so_far, observer
from aquabit.kernels.extension import native as _native
from aquabit.kernels.functions import Function
from aquabit.kernels.request import Request
from aquabit.scheme import Rounding, act_code

SHAPES = 64  # of inputs that a layer's calls are kept for

_keys = torch._C._dispatch_keys
_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_gradients, _threads = torch.is_grad_enabled, torch.get_num_threads
_CPU, _LAST = torch.device("cpu"), torch.channels_last


def _kinds() -> frozenset[int]:
    """What torch's dispatcher knows of plain tensors on the CPU, made with and without inference_mode."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_keys(torch.empty(0, device=_CPU)).raw_repr())
    return frozenset(found)


_PLAIN = _kinds()


def is_plain(x: Tensor) -> bool:
    """Whether x is values in memory of the CPU, and nobody misses the operators that a kernel reading them
    passes over: no subclass, no functorch level, no gradient, no tracing, no mode."""
    return (
        type(x) is Tensor
        and _keys(x).raw_repr() in _PLAIN
        and not (x.requires_grad and _gradients())
        and not _modes()
        and _tracing() is None
    )


class _Call(NamedTuple):
    """For inputs of one shape: the kernel, the shape of the result, and what rounds the input before
    (addresses of both) and the result after it (its address); the request that it serves, and which
    backend's it is."""

    run: Run
    shape: tuple[int, ...]
    before: Callable[[int, int], object] | None
    after: Callable[[int], object] | None
    follows: bool  # whether it lies as the input does, channels last
    request: Request
    backend: str


_Made: TypeAlias = tuple[object, tuple[int, ...], dict[Any, _Call | None]]  # choices, addresses, calls


class Direct:
    """The calls of a layer with a weight, a bias, one setting (``ask`` makes requests of inputs; None where
    they do not fit) and ``act_output``, which its output is rounded to. They are prepared anew where tensors
    have other addresses, and where kernels are chosen by other times."""

    def __init__(
        self,
        weight: Arranged,
        bias: Tensor | None,
        ask: Callable[[Tensor], Request | None],
        act_output: Rounding = 16,
    ):
        self.weight, self.bias, self.ask, self.act_output = weight, bias, ask, act_output
        self._made: _Made = (None, (), {})

    def __call__(self, x: Tensor, function: Function | None = None) -> Tensor | None:
        """What the layer makes of x, or of what ``function`` makes of it; None where that takes the whole
        way."""
        if not is_plain(x):
            return None
        call, bias = self._call_for(x, function), self.bias
        if call is None:
            return None
        run, shape, before, after, follows, request, backend = call
        last = False
        if not x.is_contiguous():
            last = follows and x.is_contiguous(memory_format=_LAST)
            x = x.contiguous()
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        y, read = x.new_empty(shape), x
        if before is not None:
            read = torch.empty_like(x)
            before(x.data_ptr(), read.data_ptr())
        if not run(read.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr()):
            return None
        if after is not None:
            after(y.data_ptr())
        seen = observer()
        if seen is not None:
            seen(self.weight, request, backend)
        return y.contiguous(memory_format=_LAST) if last else y

    def _call_for(self, x: Tensor, function: Function | None) -> _Call | None:
        choices, addresses = choices_so_far(), self.weight.addresses
        if self.bias is not None:
            addresses = (*addresses, self.bias.data_ptr())
        made = self._made  # read and replaced as a whole: other threads may call with choices of their own
        if choices is not made[0] or addresses != made[1] or len(made[2]) > SHAPES:
            made = self._made = (choices, addresses, {})
        threads = _threads()
        key = (x.shape, x.dtype, threads, function)
        if key not in made[2]:
            made[2][key] = self._prepared(x, threads, function)
        return made[2][key]

    def _prepared(self, x: Tensor, threads: int, function: Function | None) -> _Call | None:
        if function is not None and function.gated:
            if x.shape[-1] % 2:
                return None
            x = x.chunk(2, -1)[0]  # of the shape that the layer reads
        request = self.ask(x)
        if request is None or not x.numel() or not self._fits(x):
            return None
        backend = backend_for(request)
        if backend.raw is None:
            return None
        raw = backend.raw(self.weight, request, tuple(x.shape))
        wide = x.dtype == torch.float32
        if raw is None or not (wide or raw.narrow):
            return None
        out, act, before, after = self.weight.shape[0], act_code(request.act), None, None
        linear = request.kind == "linear"
        shape = (*x.shape[:-1], out) if linear else (len(x), out, *request.output)
        if act != 16 and not raw.rounds:
            rows = x.numel() // x.shape[-1] if linear else len(x)
            length = x.numel() // rows
            split = 0 if request.split is None else request.split * (length // x.shape[1])
            before = _rounding(rows, length, split, act, not linear, threads)
        if self.act_output != 16:
            inside = _rounding(x.numel() // x.shape[-1], out, 0, act_code(self.act_output), False, threads)
            after = lambda y: inside(y, y)  # noqa: E731
        if not wide and (before or after):  # values would be rounded to 16 bits between the steps
            return None
        run: Run | None = raw.run
        if function is not None:
            run = None if raw.reading is None or before else raw.reading(function.code)
        if run is None:
            return None
        return _Call(run, shape, before, after, raw.follows, request, backend.name)

    def _fits(self, x: Tensor) -> bool:
        """Whether the extension can be given addresses: of what it would read without looking."""
        weight, bias = self.weight, self.bias
        whole = bias is None or (bias.shape == weight.shape[:1] and bias.is_cpu and bias.is_contiguous())
        return whole and weight.codes.is_cpu and x.dtype in (torch.float32, torch.bfloat16)


def _rounding(
    rows: int, length: int, split: int, act: int, zero_in_range: bool, threads: int
) -> Callable[[int, int], object]:
    """``fake_quantize`` of addresses, by the code ``act``."""
    rounded = _native.fake_quant_rows
    return lambda x, y: rounded(x, y, rows, length, split, act, zero_in_range, threads)
