"""Parts ``sharing``, ``functions`` and ``compiled`` of benchmarks/kernels.py: packed models, and the same
run another way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.kernels.dispatch import using
from aquabit.quant.layers import QuantLinear, quant_layer
from aquabit.scheme import Progress, Scheme
from benchmarks.kernel_models import BUNDLED_CASES, CASES, Maker, call_of
from benchmarks.kernel_tables import count
from benchmarks.kernel_timing import Layer, call, paired, ratio, threads

Rows = list[dict[str, Any]]
SCHEME, ACT = "usq4", 8
TRIPLES = ((1, 1152), (256, 1152), (1024, 1152), (2048, 320))  # tokens, inputs and outputs of each of three
WHOLE = {n: CASES[n][0] for n in ("DiT-XL/2, one block", "U-Net of LDM-4's shapes")}
SMALL = {n: case[0] for n, case in BUNDLED_CASES.items()}
COMPILED = "digits-unet"
SECONDS, ROUNDS = 15.0, (5, 400)


def sharing(progress: Progress, quick: bool) -> Rows:
    """Three layers that read the same tensor, and q, k and v (k and v of cross-attention) of whole models, as
    they are, and as one product of all their outputs, which rounds its input once; one thread."""
    cases: list[tuple[str, Callable[[], tuple[Callable[[], object], Callable[[], object]]]]] = [
        (
            f"three layers {width} -> {width}, {count(tokens, 'token')}",
            lambda t=tokens, w=width: _layers(t, w),
        )
        for tokens, width in TRIPLES
    ]
    sizes = [(n, c, (1, 16)) for n, c in SMALL.items()] + [(n, c, (2,)) for n, c in WHOLE.items()]
    cases += [
        (f"{name}, batch {batch}", lambda c=config, b=batch: _models(c, b))
        for name, config, batches in sizes[: 1 if quick else None]
        for batch in batches
    ]
    return _rows(cases, ("apart", "joined"), progress, quick)


def functions(progress: Progress, quick: bool) -> Rows:
    """Packed models whose feed-forward blocks leave their function to torch, and the same where the kernel of
    the second layer applies it; one thread."""
    sizes = [(n, c, (1, 16)) for n, c in SMALL.items()] + [(n, c, (2,)) for n, c in WHOLE.items()]
    cases = [
        (f"{name}, batch {batch}", lambda c=config, b=batch: _functions(c, b))
        for name, config, batches in sizes[: 1 if quick else None]
        for batch in batches
    ]
    return _rows(cases, ("torch", "kernel"), progress, quick)


def compiled(progress: Progress, quick: bool) -> Rows:
    """A bundled model packed, as it is and by torch.compile (inductor); one thread."""
    maker = Maker(SMALL[COMPILED])
    model, made = maker(SCHEME, ACT), maker(SCHEME, ACT)
    made.compile(fullgraph=True)
    cases = [
        (f"{COMPILED}, batch {b}", lambda b=b: tuple(call_of(m, b, torch.float32) for m in (model, made)))
        for b in ((1,) if quick else (1, 16))
    ]
    return _rows(cases, ("eager", "compiled"), progress, quick)


def _rows(cases: list[Any], names: tuple[str, str], progress: Progress, quick: bool) -> Rows:
    """A row a case: milliseconds both ways, and how many times as long the first takes."""
    rows: Rows = []
    with threads(1), torch.inference_mode(), using({}):
        for done, (case, make) in enumerate(cases):
            progress(case, done, len(cases))
            first, second = names
            times = paired(
                dict(zip(names, make(), strict=True)),
                0.0 if quick else SECONDS,
                ROUNDS,
                clock=time.process_time,
            )
            ms = {name: 1e3 * statistics.median(times[name]) for name in names}
            rows.append(
                {
                    "case": case,
                    "ms": ms,
                    "ratio": ratio(times[first], times[second]),
                    "rounds": len(times[first]),
                }
            )
        progress("done", len(cases), len(cases))
    return rows


def _layers(tokens: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    x, bias = torch.randn(tokens, width), torch.zeros(3 * width)
    three = [call(Layer(SCHEME, (width, width), i), x, bias[:width], "decode", "fast", ACT) for i in range(3)]
    return lambda: [one() for one in three], call(
        Layer(SCHEME, (3 * width, width)), x, bias, "decode", "fast", ACT
    )


def _models(config: dict[str, Any], batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    maker = Maker(config)
    apart, joined = maker(SCHEME, ACT), maker(SCHEME, ACT)
    _join_(joined, maker)
    return call_of(apart, batch, torch.float32), call_of(joined, batch, torch.float32)


def _functions(config: dict[str, Any], batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    maker = Maker(config)
    apart, inside = maker(SCHEME, ACT, functions=False), maker(SCHEME, ACT)
    return call_of(apart, batch, torch.float32), call_of(inside, batch, torch.float32)


class _Part(nn.Module):
    """The place of one of several layers that read the same tensor: the first runs ``joined`` and leaves the
    others their parts."""

    def __init__(self, joined: QuantLinear, parts: list[Tensor], many: int):
        super().__init__()
        self.joined, self.parts, self.many, self.act = joined, parts, many, joined.act

    def forward(self, x: Tensor, *_: object) -> Tensor:
        if not self.parts:
            y = self.joined(x)
            self.parts += y.view(*y.shape[:-1], self.many, -1).unbind(-2)
        return self.parts.pop(0)


def _join_(denoiser: nn.Module, maker: Maker) -> None:
    """Random codes stand for those of the layers: it is their time that counts."""
    for module in list(denoiser.modules()):
        layers = {n: getattr(module, n, None) for n in ("to_q", "to_k", "to_v")}
        if not all(isinstance(layer, QuantLinear) for layer in layers.values()):
            continue
        if getattr(module, "is_cross_attention", False):
            del layers["to_q"]
        first: Any = layers["to_v"]
        shape = (len(layers) * first.out_features, first.in_features)
        joined: Any = quant_layer(nn.Linear(shape[1], shape[0], first.bias is not None))
        joined.set_packed_(maker._weight((SCHEME, shape)), Scheme.parse(SCHEME))
        joined.act, joined.act_output, parts = first.act, first.act_output, list[Tensor]()
        for name in layers:
            setattr(module, name, _Part(joined, parts, len(layers)))
