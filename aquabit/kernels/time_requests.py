"""What requests take on this machine: medians of interleaved runs on random codes. Nothing here runs
unless it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from math import prod
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from aquabit.kernels.arranged import Arranged
from aquabit.kernels.backends import BACKENDS, backend_named
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.direct import Direct
from aquabit.kernels.dispatch import (
    codebook_conv2d,
    codebook_linear,
    context_of,
    held,
    machine_timings,
    remember,
)
from aquabit.kernels.request import Format, Request
from aquabit.scheme import Progress, no_progress

ROUNDS = (5, 100)  # timed runs of each contender: at least, at most
SECONDS = 0.15  # after which no further round begins, once there are enough
HOPELESS = 3.0  # what takes so many times as long as the fastest is not run again
PLAIN = ("float32", "bfloat16")  # types of the dense layer that coded ones are compared with
SAVED = 16  # entries after which the table is written, so that an interruption loses little

Run = Callable[[], object]


def random_weight(form: Format, device: str = "cpu", seed: int = 0) -> CodebookWeight:
    """A weight of that format with random codes, codebooks and scales: no kernel's time depends on the
    numbers, but for levels that a format is defined by."""
    rng = torch.Generator().manual_seed(seed)
    out, row = form.shape[0], prod(form.shape[1:])
    groups = form.shape[1] if form.order == "kernel" else -(-row // form.group)
    codes = torch.randint(0, 1 << form.bits, (groups, form.codebooks, out), generator=rng, dtype=torch.int32)
    own = form.levels == "uniform"
    count = {"uniform": 0, "shared": 1, "channel": out}[form.tables] if own else 0
    tables = torch.randn(count, form.codebooks, 1 << form.bits, form.group, generator=rng) if count else None
    many = [out, form.scales] if form.scales and form.scales > 1 else [out]
    scale = None if form.scales is None else torch.rand(many, generator=rng) * 0.01 + 0.001
    offset = torch.rand(many, generator=rng) * 0.01 if form.offset and own else None
    weight = CodebookWeight.from_codes(
        codes, tables, scale, offset, form.shape, form.bits, form.order, form.levels
    )
    return weight.to(device)


def random_input(request: Request, seed: int = 1) -> Tensor:
    """An input that the request describes: [rows, in], or [rows, cin, h, w]."""
    shape = (request.rows, request.format.shape[1] * request.geometry.groups)
    size = shape if request.kind == "linear" else (*shape, *request.size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return x.to(request.device, getattr(torch, request.dtype))


def interleaved(
    runs: Mapping[str, Run],
    device: str = "cpu",
    rounds: tuple[int, int] = ROUNDS,
    seconds: float = SECONDS,
    hopeless: float = HOPELESS,
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn after one that is not counted; those ``hopeless`` times behind
    the fastest stop after two."""
    wait: Run = torch.cuda.synchronize if device == "cuda" else _no_wait
    for run in runs.values():
        run()
    wait()
    found: dict[str, list[float]] = {name: [] for name in runs}
    begun, last = time.perf_counter(), 0.0
    for number in range(rounds[1]):
        best = min((median(v) for v in found.values() if v), default=0.0)
        for name, run in runs.items():
            if len(found[name]) > 1 and median(found[name]) > hopeless * best:
                continue
            start = time.perf_counter()
            run()
            wait()
            found[name].append(time.perf_counter() - start)
        last = time.perf_counter() - begun
        if number + 1 >= rounds[0] and last > seconds:
            break
    return found


def _no_wait() -> None:
    """On a CPU a call is done when it returns."""


def measure(request: Request, rounds: tuple[int, int] = ROUNDS, seconds: float = SECONDS) -> dict[str, float]:
    """Median seconds of every backend that can serve the request, of "dense" (a dense copy in the request's
    type, activations rounded as asked), and of the plain layer without any quantization, "plain float32" and
    "plain bfloat16" (a convolution's in the better of two memory layouts). A format that is not coded gives
    "full": a weight kept at 16 bits and widened as it is used. Threads are torch's.
    """
    with torch.inference_mode():
        runs = _runs(request)
        found = {name: median(v) for name, v in interleaved(runs, request.device, rounds, seconds).items()}
    for name in PLAIN:
        last = found.pop(f"plain {name} channels_last", None)
        if last is not None:
            found[f"plain {name}"] = min(last, found[f"plain {name}"])
    return found


def _runs(request: Request) -> dict[str, Run]:
    x, form = random_input(request), request.format
    bias = torch.zeros(form.shape[0], device=x.device)
    if form.tables == "none":
        stored = torch.randn(form.shape, generator=torch.Generator().manual_seed(0)).to(
            x.device, torch.float16
        )
        return {"full": lambda: _layer(request, x, stored.to(x.dtype), bias.to(x.dtype))}
    weight = random_weight(form, request.device)
    dense = weight.dequantize()
    own = dense.to(x.dtype)
    can = [b.name for b in BACKENDS if b.name != "dense" and b.refuses(request) is None]
    runs = {name: _coded(request, x, weight, bias.to(x.dtype), own, name) for name in (*can, "dense")}
    for name in PLAIN:
        kind = getattr(torch, name)
        runs[f"plain {name}"] = _plain(request, x.to(kind), dense.to(kind), bias.to(kind))
        if request.kind == "conv2d":
            last = [t.to(kind, memory_format=torch.channels_last) for t in (x, dense)]
            runs[f"plain {name} channels_last"] = _plain(request, last[0], last[1], bias.to(kind))
    return runs


def _coded(
    request: Request, x: Tensor, weight: CodebookWeight, bias: Tensor, dense: Tensor, backend: str
) -> Run:
    """As a packed layer runs it: directly where it can."""
    r, g, copy = request, request.geometry, dense if backend == "dense" else None
    arranged = None if backend_named(backend, BACKENDS).raw is None else held(weight)
    if isinstance(arranged, Arranged):
        direct, context = Direct(arranged, bias, lambda _: r), context_of({r.key: {backend: 1.0}})
        if context.run(direct, x) is not None:
            return lambda: context.run(direct, x)
    if r.kind == "linear":
        return lambda: codebook_linear(x, weight, bias, r.accuracy, backend, act=r.act, dense=copy)
    return lambda: codebook_conv2d(
        x,
        weight,
        bias,
        g.stride,
        g.padding,
        g.dilation,
        g.groups,
        r.accuracy,
        backend,
        act=r.act,
        split=r.split,
        dense=copy,
    )


def _plain(request: Request, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
    return lambda: _layer(request, x, weight, bias)


def _layer(request: Request, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if request.kind == "linear":
        return linear(x, weight, bias)
    g = request.geometry
    return conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def measure_missing(
    requests: Iterable[Request], progress: Progress = no_progress, what: str = "timing kernels"
) -> dict[str, dict[str, float]]:
    """Times of all requests: those that this machine's table lacks are measured and kept in it. Requests
    are of torch's threads now."""
    table = machine_timings()
    by_key = {r.key: r for r in requests}
    missing, fresh = table.missing(by_key), dict[str, dict[str, float]]()
    progress(what, 0, len(missing))
    for done, key in enumerate(missing, 1):
        fresh[key] = measure(by_key[key])
        if len(fresh) >= SAVED or done == len(missing):
            remember(fresh)
            fresh = {}
        progress(what, done, len(missing))
    return {key: machine_timings().entries[key] for key in by_key}


def best_of(times: Mapping[str, float], packed: bool = True) -> float:
    """Seconds of the fastest way to run a coded layer that keeps no dense copy (or of any, where
    ``packed`` is false)."""
    known = [b.name for b in BACKENDS if not (packed and b.name == "dense")]
    return min(times[name] for name in (*known, "full") if name in times)
