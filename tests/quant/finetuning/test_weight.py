"""Trained weights: gradients against autograd, codes searched and chosen, state forgotten as SeMI says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight
from aquabit.quant.finetuning.settings import FineTuning
from aquabit.quant.finetuning.step import Optimizer, shared_parameters, within_trust
from aquabit.quant.finetuning.weight import Parameter, TrainedWeight
from aquabit.quant.weights import quantize_weight, quantize_weights
from aquabit.scheme import Scheme

SCHEMES = ["usq2", "usq3g4", "usq2g5", "vq3", "vq2c", "aq2x4g8", "aq3x3g4", "aq2x3k"]
SHAPES = [(6, 24), (6, 22), (5, 4, 3, 3), (5, 6, 1, 1)]
CASES = [(s, shape) for s in SCHEMES for shape in SHAPES]


def made(scheme: str, shape: tuple[int, ...], seed: int = 0) -> tuple[CodebookWeight, TrainedWeight]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    coded = quantize_weight(
        weight, scheme, torch.eye(weight[0].numel()) if Scheme.parse(scheme).kind == "aq" else None
    )
    tables = None if coded.codebooks is None else Parameter(coded.codebooks)
    return coded, TrainedWeight(coded, tables)


def decoded(
    coded: CodebookWeight, tables: Tensor | None, scale: Tensor | None, offset: Tensor | None
) -> Tensor:
    """The weight in float64 by plain indexing, with gradients for autograd to follow."""
    codes, out = coded.codes.long(), coded.shape[0]
    if tables is None:
        values = codes[:, 0].double()
    elif len(tables) == 1:
        values = (
            sum(tables[0, m][codes[:, m]] for m in range(codes.shape[1])).permute(0, 2, 1).reshape(-1, out)
        )
    else:
        values = tables[torch.arange(out), 0, codes[:, 0]].permute(0, 2, 1).reshape(-1, out)
    row = 1
    for side in coded.shape[1:]:
        row *= side
    values = values[:row]  # [row, out]
    for factor, apply in ((scale, torch.mul), (offset, torch.add)):
        if factor is not None:
            per = -(-row // (factor.shape[1] if factor.ndim == 2 else 1))
            wide = factor.view(out, -1).t()[torch.arange(row) // per]
            values = apply(values, wide)
    if len(coded.shape) == 2:
        return values.t()
    out, cin, kh, kw = coded.shape
    if coded.order == "kernel":
        return values.t().reshape(coded.shape)
    return values.reshape(kh, kw, cin, out).permute(3, 2, 0, 1)


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_gradients_are_those_of_autograd(scheme: str, shape: tuple[int, ...]) -> None:
    coded, weight = made(scheme, shape)
    parts = [
        None if t is None else t.double().requires_grad_()
        for t in (coded.codebooks, coded.scale, coded.offset)
    ]
    dense = decoded(coded, *parts)
    torch.testing.assert_close(weight.dense().double(), dense.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.dense(), coded.dequantize(), rtol=1e-6, atol=1e-6)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    asked = [p for p in parts if p is not None]
    expected = torch.autograd.grad((dense * gradient.double()).sum(), asked)
    weight.add_gradients_(weight.grouped(gradient))
    assert len(weight.parameters) == len(asked)
    for parameter, value in zip(weight.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.gradient.double(), value, rtol=1e-4, atol=1e-5)


def test_gradients_of_shared_codebooks_add_up() -> None:
    weights = [torch.randn(6, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    coded = quantize_weights(weights, "aq2x3g4s", [torch.eye(16)] * 2)
    tables = shared_parameters({str(i): c.codebooks for i, c in enumerate(coded)})
    assert tables["0"] is tables["1"]
    trained = [TrainedWeight(c, tables[str(i)]) for i, c in enumerate(coded)]
    table = coded[0].codebooks.double().requires_grad_()
    dense = [decoded(c, table, c.scale.double(), None) for c in coded]
    gradients = [torch.randn(6, 16, generator=torch.Generator().manual_seed(5 + i)) for i in range(2)]
    (expected,) = torch.autograd.grad(
        sum((d * g.double()).sum() for d, g in zip(dense, gradients, strict=True)), [table]
    )
    for weight, gradient in zip(trained, gradients, strict=True):
        weight.add_gradients_(weight.grouped(gradient))
    torch.testing.assert_close(tables["0"].gradient.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("beam", [1, 4])
def test_searched_codes_are_never_farther(scheme: str, beam: int) -> None:
    _, weight = made(scheme, (6, 24))
    target = weight.decoded + 0.7 * torch.randn(
        weight.decoded.shape, generator=torch.Generator().manual_seed(3)
    )
    flat, chosen = target.view(-1, weight.size), torch.arange(0, weight.groups, 2)
    index, found = weight.nearest(chosen, flat[chosen], beam)
    before = (weight.decoded.view(-1, weight.size)[chosen] - flat[chosen]).square().sum(1)
    after = (found - flat[chosen]).square().sum(1)
    assert bool((after <= before + 1e-5).all()) and float(after.sum()) < float(before.sum())
    weight.set_codes_(chosen, index, found)
    kept = weight.decoded.clone()
    weight.decode_()
    torch.testing.assert_close(
        weight.decoded, kept, rtol=1e-6, atol=1e-6
    )  # what is said of the codes is what they decode to
    if weight.index.shape[2] == 1:  # scalar codes: none of all the codes is nearer
        _, everything = weight.nearest(torch.arange(weight.groups), flat, 1)
        best = (
            torch.stack([_with_code(weight, code) for code in range(1 << weight.bits)])
            .sub(target)
            .square()
            .amin(0)
        )
        torch.testing.assert_close((everything.view_as(target) - target).square(), best, rtol=1e-4, atol=1e-5)


def _with_code(weight: TrainedWeight, code: int) -> Tensor:
    index = torch.full_like(weight.index, code) + (0 if weight.tables is None else weight._bases())
    scale, offset = (None if p is None else p.value for p in (weight.scale, weight.offset))
    return weight._affine(weight.looked_up(index), scale, offset)


def optimizer(scheme: str = "aq2x4g8", shape: tuple[int, ...] = (16, 32), **settings: object) -> Optimizer:
    _, weight = made(scheme, shape)
    base = FineTuning(steps=100, warmup=0, code_rate=0.3, semi_groups=False, trust_ratio=None)
    return Optimizer({"layer": weight}, replace(base, **settings))  # type: ignore[arg-type]


def gradient_at(step: int, shape: tuple[int, ...] = (16, 32)) -> dict[str, Tensor]:
    return {"layer": torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))}


@pytest.mark.parametrize("scheme", ["usq2", "vq2c", "aq2x4g8"])
def test_no_more_than_tau_of_the_groups_change_and_those_are_the_farthest(scheme: str) -> None:
    tuned = optimizer(scheme, tau=0.1)
    weight, proxy, total = tuned.weights["layer"], tuned.proxies["layer"], 0
    for step in range(6):
        before = weight.index.clone()
        tuned.step_(gradient_at(step), step)
        moved = (weight.index != before).any(2).view(-1)
        assert int(moved.sum()) == tuned.flipped <= -(-weight.groups // 10)
        total += tuned.flipped
        if (
            tuned.flipped
        ):  # without flips' own effect: what the others are off by is no more than what the moved ones were
            before_flip = weight.looked_up(before)
            off = (
                (
                    proxy.value
                    - weight._affine(before_flip, *(p and p.value for p in (weight.scale, weight.offset)))
                )
                .square()
                .sum(2)
                .view(-1)
            )
            assert (
                float(off[moved].min())
                >= float(off.sort(descending=True).values[-(-weight.groups // 10) - 1]) - 1e-6
            )
    assert total


def test_trust_ratio_bounds_a_steps_change() -> None:
    free, bound = optimizer(tau=1.0), optimizer(tau=1.0, trust_ratio=0.05)
    for step in range(4):
        for tuned, limit in ((free, None), (bound, 0.05)):
            weight = tuned.weights["layer"]
            before = weight.index.clone()
            tuned.step_(gradient_at(step), step)
            undone = weight._affine(weight.looked_up(before), weight.scale.value, None)
            change = float((weight.decoded - undone).norm() / undone.norm())
            assert limit is None or change <= limit + 1e-6
    assert 0 < bound.changed < free.changed
    squares, weight = torch.tensor([4.0, 3.0, 2.0]), torch.full((1, 1), 10.0)
    assert within_trust(squares, weight, 0.27).tolist() == [True, True, False]


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_delta_decay_takes_the_difference_back(decay: float) -> None:
    kept, decayed = optimizer(), optimizer(delta_decay=decay)
    for tuned in (kept, decayed):
        tuned.step_(gradient_at(0), 0)
    difference = [t.proxies["layer"].value - t.weights["layer"].decoded for t in (kept, decayed)]
    torch.testing.assert_close(difference[1], (1 - decay) * difference[0], rtol=1e-4, atol=1e-6)


def test_semi_groups_resets_flipped_groups_and_no_others() -> None:
    plain, semi = optimizer(tau=0.2), optimizer(tau=0.2, semi_groups=True)
    step = 0
    while not semi.flipped:
        before = semi.weights["layer"].index.clone()
        for tuned in (plain, semi):
            tuned.step_(gradient_at(step), step)
        step += 1
    weight, proxy, other = semi.weights["layer"], semi.proxies["layer"], plain.proxies["layer"]
    moved = (weight.index != before).any(2)
    assert bool((proxy.second[moved] == 0).all()) and bool((proxy.mass[moved] == 0).all())
    torch.testing.assert_close(proxy.value[moved], weight.decoded[moved])
    assert torch.equal(proxy.second[~moved], other.second[~moved]) and torch.equal(
        proxy.value[~moved], other.value[~moved]
    )
    assert bool((other.second[moved] > 0).all()) and not torch.allclose(
        other.value[moved], weight.decoded[moved]
    )
    before, start = weight.index.clone(), proxy.value.clone()
    semi.step_(
        gradient_at(step), step
    )  # Adam starts anew there: every weight moves by the rate itself, as in a first step
    again = moved & (weight.index == before).all(2)
    rate = semi.settings.code_rate * semi.settings.rate_at(step) * weight.unit
    torch.testing.assert_close(
        (proxy.value - start)[again].abs(), torch.full_like(start[again], rate), rtol=1e-3, atol=1e-6
    )
    assert bool(again.any())


def test_semi_discontinuity_forgets_first_moments_where_batches_do_not_continue() -> None:
    semi, plain = optimizer(semi_discontinuity=True, code_rate=0.0), optimizer(code_rate=0.0)
    for tuned in (semi, plain):
        tuned.step_(gradient_at(0), 0)
        tuned.step_(gradient_at(1), 1, continues=True)
    for a, b in zip(semi.parameters, plain.parameters, strict=True):
        assert torch.equal(a.value, b.value) and torch.equal(a.first, b.first)
    for tuned in (semi, plain):
        tuned.step_(gradient_at(2), 2, continues=False)
    weight = semi.weights["layer"]
    for a, b in zip(semi.parameters, plain.parameters, strict=True):
        assert not torch.allclose(a.first, b.first) and torch.allclose(a.second, b.second, rtol=1e-2)
        assert a.masses[0] == pytest.approx(0.1) and b.masses[0] == pytest.approx(1 - 0.9**3)
    assert weight.scale is not None


def test_adam_is_torchs() -> None:
    value = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ours, theirs = Parameter(value), value.clone().requires_grad_()
    reference = torch.optim.AdamW(
        [theirs], lr=0.01 * ours.unit, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1 / ours.unit
    )
    for step in range(5):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(step))
        theirs.grad = gradient.clone()
        reference.step()
        ours.gradient += gradient
        ours.step_(0.01, (0.9, 0.95), 0.1)
    torch.testing.assert_close(ours.value, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_straight_through_gives_every_group_its_nearest_code() -> None:
    tuned = optimizer("vq2", method="straight_through", code_betas=(0.9, 0.95), tau=0.01)
    weight, proxy = tuned.weights["layer"], tuned.proxies["layer"]
    for step in range(3):
        tuned.step_(gradient_at(step), step)
    table = weight.tables.value.view(-1)
    assert torch.equal(weight.index, (proxy.value - table).abs().argmin(2, keepdim=True))
    assert tuned.changed > 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_decodes_to_what_was_trained(scheme: str) -> None:
    tuned = optimizer(scheme, (5, 4, 3, 3), tau=0.2)
    for step in range(3):
        tuned.step_(gradient_at(step, (5, 4, 3, 3)), step)
    weight = tuned.weights["layer"]
    coded = weight.coded(None if weight.tables is None else weight.tables.value.half())
    torch.testing.assert_close(coded.dequantize(), weight.stored(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coded.dequantize(), weight.dense(), rtol=1e-2, atol=5e-3)
    assert weight.changed == int(
        (coded.codes.long() != made(scheme, (5, 4, 3, 3))[0].codes.long()).any(1).sum()
    )
