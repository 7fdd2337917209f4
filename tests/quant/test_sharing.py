"""Work that the schemes of a layer share is done once, and changes nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.calibration import hessian as hessian_module
from aquabit.quant.calibration.hessian import damped, output_error
from aquabit.quant.schemes import output_aware
from aquabit.quant.sharing import shared, shared_work
from aquabit.quant.weights import quantize_weights
from aquabit.scheme import AquabitError

SCHEMES = ("usq2h", "usq6h", "usq3g8h", "vq2h", "vq2ch", "aq1x4g4", "q4_0h", "usq2h")


class Thing:
    """What can be watched when it goes away."""


def layer(seed: int, shape: tuple[int, ...] = (12, 32)) -> tuple[Tensor, Tensor]:
    """A weight, and a damped H of as many inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, shape[1], generator=generator) * torch.linspace(0.2, 3, shape[1])
    return torch.randn(shape, generator=generator), damped(inputs.t() @ inputs / 64)


def same(a: CodebookWeight, b: CodebookWeight) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_last_result_is_kept_while_work_is_shared() -> None:
    calls: list[tuple[object, int]] = []

    @shared
    def made(thing: object, number: int) -> Thing:
        calls.append((thing, number))
        return Thing()

    first, other = Thing(), Thing()
    assert made(first, 1) is not made(first, 1), "nothing is kept otherwise"
    calls.clear()
    with shared_work():
        found = made(first, 1)
        with shared_work():
            assert made(first, 1) is found
        assert made(first, 1) is found and len(calls) == 1
        assert made(first, 2) is not found and made(other, 2) is not found and made(other, 1) is not found
        assert calls == [(first, 1), (first, 2), (other, 2), (other, 1)]
        gone = weakref.ref(found)
        del found
        gc.collect()
        assert gone() is None, "only the last one is kept"
    made(other, 1)
    assert len(calls) == 5


def test_the_last_result_is_gone_before_another_is_made() -> None:
    alive: list[weakref.ref[Thing]] = []

    @shared
    def made(_: object) -> Thing:
        gc.collect()
        assert all(ref() is None for ref in alive)
        thing = Thing()
        alive.append(weakref.ref(thing))
        return thing

    with shared_work():
        for _ in range(3):
            made(object())
    assert len(alive) == 3 and alive[-1]() is None


def test_fits_are_those_of_schemes_alone() -> None:
    layers = [layer(0), layer(1)]
    alone = [[quantize_weights([w], s, [h])[0] for s in SCHEMES] for w, h in layers]
    errors = [
        output_error(w, a.dequantize(), h) for (w, h), row in zip(layers, alone, strict=True) for a in row
    ]
    with shared_work():
        found = [[quantize_weights([w], s, [h])[0] for s in SCHEMES] for w, h in layers]
        told = [
            output_error(w, a.dequantize(), h) for (w, h), row in zip(layers, found, strict=True) for a in row
        ]
        for s, *pair in zip(
            SCHEMES, *found, strict=True
        ):  # layers in turns: nothing of the other one is taken
            again = [quantize_weights([w], s, [h])[0] for w, h in layers]
            assert all(same(a, b) for a, b in zip(pair, again, strict=True)), s
    assert all(same(a, b) for x, y in zip(alone, found, strict=True) for a, b in zip(x, y, strict=True))
    assert told == errors


def test_one_weight_with_several_h_and_one_h_of_several_weights() -> None:
    (w, h), (other, g) = layer(0), layer(1)
    pairs = ((w, h), (w, g), (other, g), (other, h), (w, h.diagonal()), (w, h))
    alone = [quantize_weights([a], "usq2h", [b])[0] for a, b in pairs]
    with shared_work():
        found = [quantize_weights([a], "usq2h", [b])[0] for a, b in pairs]
    assert all(same(a, b) for a, b in zip(alone, found, strict=True))


def test_a_layers_h_is_factored_once_for_all_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    (w, h), factored = layer(0), []
    factor = output_aware._factor
    monkeypatch.setattr(output_aware, "_factor", lambda *given: factored.append(1) or factor(*given))
    lifted = hessian_module._raised
    monkeypatch.setattr(hessian_module, "_raised", lambda *given: factored.append(2) or lifted(*given))
    with shared_work():
        for scheme in ("usq1h", "usq2h", "usq6h", "vq2h"):
            output_error(w, quantize_weights([w], scheme, [h])[0].dequantize(), h)
    assert sorted(factored) == [1, 2, 2], "for the feedback; whether it is damped, and definite"


def test_what_is_wrong_is_said_each_time() -> None:
    (w, _), bad = layer(0), torch.full((32, 32), float("nan"))
    with shared_work():
        for _ in range(2):
            with pytest.raises(AquabitError, match="not finite"):
                quantize_weights([w], "usq2h", [bad])
