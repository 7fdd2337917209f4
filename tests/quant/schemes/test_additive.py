"""The additive quantizer: laws of its parts, what it reaches, odd shapes, and bad input."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquabit.cost import weight_bytes
from aquabit.quant.calibration.hessian import check_hessian, output_error
from aquabit.quant.schemes.additive.codes import Feedback, feedback, sweep
from aquabit.quant.schemes.additive.first_tables import initial_tables
from aquabit.quant.schemes.additive.tables import fit_scales, fit_tables
from aquabit.quant.schemes.aq import _problem, additive, input_order
from aquabit.quant.weights import quantize_weight, quantize_weights
from aquabit.scheme import AquabitError, Scheme
from benchmarks.aqlm_plain import aqlm

pytestmark = pytest.mark.filterwarnings("ignore:aq")  # tiny layers have fewer groups than codewords


def layer(shape: tuple[int, ...], seed: int = 0, rank: int = 4, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A random weight, and H of inputs that are strongly correlated."""
    g, row = torch.Generator().manual_seed(seed), int(torch.tensor(shape[1:]).prod())
    inputs = torch.randn(groups, 6 * row, rank, generator=g) @ torch.randn(groups, rank, row, generator=g)
    inputs = inputs + 0.3 * torch.randn(groups, 6 * row, row, generator=g)
    hessian = inputs.mT @ inputs / inputs.shape[1]
    return torch.randn(shape, generator=g), hessian if groups > 1 else hessian[0]


SHAPES = st.one_of(
    st.tuples(st.integers(2, 20), st.integers(3, 40)),
    st.tuples(st.integers(2, 12), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
)


@settings(max_examples=25)
@given(
    SHAPES,
    st.sampled_from(["aq1x3g4", "aq2x2g8", "aq2x4k", "aq3x2g3", "aq2x3g4"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape_is_coded_at_exactly_its_bytes(
    shape: tuple[int, ...], scheme: str, with_h: bool, seed: int
) -> None:
    weight, hessian = layer(shape, seed)
    coded = quantize_weight(weight, scheme, hessian if with_h else None)
    assert coded.nbytes == weight_bytes(shape, Scheme.parse(scheme))
    assert (
        coded.dequantize().shape == weight.shape
        and output_error(weight, coded.dequantize(), hessian if with_h else None) < 1
    )


def test_the_loss_never_rises_and_parts_are_optimal() -> None:
    weight, hessian = layer((24, 40), rank=6)
    problem, order = _problem([weight], (24, 40), Scheme.parse("aq2x4g8"), [hessian], False)
    assert sorted(order[0].tolist()) == list(range(5))
    factor = Feedback.of(problem)
    state = initial_tables(problem, factor.metric, 0)
    feedback(problem, state, factor, 4)

    def carried() -> None:
        assert state.gradient is not None
        made = problem.times(problem.weight - state.decoded())
        torch.testing.assert_close(state.gradient, made, rtol=1e-4, atol=1e-4 * float(made.abs().max()))

    losses = [float(fit_tables(problem, state))]
    for _ in range(4):
        losses.append(sweep(problem, state, 4))
        carried()
        fit_scales(problem, state)
        carried()
        losses.append(float(fit_tables(problem, state, 30)))
        carried()
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses)), losses

    def loss(tables: Tensor, scale: Tensor) -> Tensor:
        left = problem.weight - state.unscaled(tables) * scale[..., None]
        return (problem.times(left) * left).sum()

    assert losses[-1] == pytest.approx(float(loss(state.tables, state.scale)), rel=1e-4)
    fit_tables(problem, state, 200)
    tables = state.tables.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(tables, state.scale), tables)
    assert slope.norm() < 2e-3 * losses[-1], "conjugate gradients end where the gradient is zero"
    fit_scales(problem, state)
    scale = state.scale.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(state.tables, scale), scale)
    assert slope.abs().max() < 1e-3 * losses[-1]


def test_no_single_code_can_be_improved() -> None:
    weight, hessian = layer((6, 16), 3)
    coded = quantize_weight(weight, "aq2x3g4", hessian)
    tables, scale, codes = coded.codebooks[0].double(), coded.scale.double(), coded.codes.long()
    wide, h = weight.double(), hessian.double()

    def loss(codes: Tensor) -> Tensor:
        decoded = (
            (sum(tables[m][codes[:, m]] for m in range(2)) * scale[None, :, None])
            .permute(1, 0, 2)
            .reshape(6, 16)
        )
        return ((wide - decoded) @ h * (wide - decoded)).sum(1)

    base = loss(codes)
    torch.testing.assert_close(
        coded.dequantize().double(),
        (sum(tables[m][codes[:, m]] for m in range(2)) * scale[None, :, None])
        .permute(1, 0, 2)
        .reshape(6, 16),
        rtol=1e-5,
        atol=1e-6,
    )
    better = 0
    for group in range(4):
        for m in range(2):
            for code in range(8):
                changed = codes.clone()
                changed[group, m] = code
                better += int((loss(changed) < base * (1 - 1e-5)).sum())
    assert better <= 6, (
        f"{better} of {6 * 64} changes lower the loss: only what later groups of the last sweep left may"
    )


@pytest.mark.parametrize("scheme", ["2x4", "1x6", "4x2"])
def test_at_most_the_loss_of_aqlm(scheme: str) -> None:
    m, b = map(int, scheme.split("x"))
    for seed in range(2):
        weight, hessian = layer((64, 64), seed, rank=16)
        theirs = aqlm(weight, hessian, m, b, 8, seed)
        ours = quantize_weight(weight, f"aq{scheme}g8", hessian)
        assert output_error(weight, ours.dequantize(), hessian) < output_error(
            weight, theirs.decoded, hessian
        )


def test_h_matters_and_identity_is_no_h() -> None:
    weight, hessian = layer((48, 64), rank=8)
    aware, blind = quantize_weight(weight, "aq2x4g8", hessian), quantize_weight(weight, "aq2x4g8")
    assert output_error(weight, aware.dequantize(), hessian) < 0.6 * output_error(
        weight, blind.dequantize(), hessian
    )
    eye = quantize_weight(weight, "aq2x4g8", torch.ones(64))
    assert torch.equal(eye.packed, blind.packed) and torch.equal(eye.codebooks, blind.codebooks)
    full = output_error(weight, quantize_weight(weight, "aq2x4g8", torch.eye(64)).dequantize())
    assert full == pytest.approx(output_error(weight, blind.dequantize()), rel=0.05)


def test_deterministic_under_a_seed_and_batched_as_alone_up_to_rounding() -> None:
    layers = [layer((32, 48), seed) for seed in range(3)]
    weights, hessians = [w for w, _ in layers], [h for _, h in layers]
    together = quantize_weights(weights, "aq2x4g8", hessians, seed=1)
    alone = [quantize_weight(w, "aq2x4g8", h, seed=1) for w, h in layers]
    for (w, h), a, b in zip(layers, together, alone, strict=True):
        assert output_error(w, a.dequantize(), h) == pytest.approx(
            output_error(w, b.dequantize(), h), rel=0.02
        )
        assert (a.codes == b.codes).float().mean() > 0.9
    again = quantize_weight(*layers[0][:1], "aq2x4g8", layers[0][1], seed=1)
    assert torch.equal(again.packed, alone[0].packed) and torch.equal(again.codebooks, alone[0].codebooks)
    other = quantize_weight(*layers[0][:1], "aq2x4g8", layers[0][1], seed=2)
    assert not torch.equal(other.packed, alone[0].packed)


def test_shared_codebooks_are_one_tensor_and_fit_all_members() -> None:
    layers = [layer((32, 48), seed) for seed in range(3)]
    weights, hessians = [w for w, _ in layers], [h for _, h in layers]
    shared = quantize_weights(weights, "aq2x4g8s", hessians)
    assert len({id(c.codebooks) for c in shared}) == 1
    own = quantize_weights(weights, "aq2x4g8", hessians)
    for weight, hessian, a, b in zip(weights, hessians, shared, own, strict=True):
        error = output_error(weight, a.dequantize(), hessian)
        assert (
            output_error(weight, b.dequantize(), hessian)
            < error
            < 1.6 * output_error(weight, b.dequantize(), hessian)
        )


def test_grouped_and_depthwise_convolutions_use_the_h_of_their_group() -> None:
    for shape, groups in (((12, 4, 3, 3), 3), ((16, 1, 3, 3), 16)):
        weight, hessian = layer(shape, 1, groups=groups)
        aware = quantize_weight(weight, "aq2x3k", hessian)
        swapped = quantize_weight(weight, "aq2x3k", hessian.flip(0))
        assert output_error(weight, aware.dequantize(), hessian) < output_error(
            weight, swapped.dequantize(), hessian
        )


def test_groups_of_a_convolution_run_across_channels_or_along_the_kernel() -> None:
    shape = (4, 3, 2, 2)
    assert input_order(shape, "kernel").tolist() == list(range(12))
    flat = torch.arange(12).reshape(3, 2, 2)
    assert input_order(shape, "inputs").tolist() == [
        int(flat[c, y, x]) for y in range(2) for x in range(2) for c in range(3)
    ]
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    slices = weight.clone()
    slices[:] = torch.randn(
        1, 1, 3, 3, generator=torch.Generator().manual_seed(1)
    )  # every slice alike: one codeword holds them all
    assert output_error(slices, quantize_weight(slices, "aq1x1k").dequantize()) < 1e-6
    assert output_error(slices, quantize_weight(slices, "aq1x1g9").dequantize()) > 1e-2
    along = (
        weight[:, :1].expand(-1, 6, -1, -1) * 0 + weight[:1, :1]
    )  # constant over channels: groups across channels hold one value
    assert output_error(along, quantize_weight(along, "aq1x4g6").dequantize()) < 1e-6
    assert quantize_weight(weight[:, :, :1, :1], "aq2x2k").group == 8


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("scheme", ["aq2x3g8", "aq2x3k"])
def test_constant_weights(value: float, scheme: str) -> None:
    weight = torch.full((6, 16, 3, 3), value)
    weight[2] = 0
    _, hessian = layer((6, 16, 3, 3))
    torch.testing.assert_close(
        quantize_weight(weight, scheme, hessian).dequantize(), weight, rtol=2e-3, atol=1e-6
    )


def test_extreme_scales_do_not_overflow() -> None:
    weight, hessian = layer((16, 32))
    for factor in (1e-6, 1e4):
        coded = quantize_weight(weight * factor, "aq2x4g8", hessian * 1e-3)
        assert output_error(weight * factor, coded.dequantize(), hessian) < 0.2
        assert torch.isfinite(coded.dequantize()).all()


@pytest.mark.parametrize("h", ["zero", "rank one", "tiny"])
def test_degenerate_h_is_no_crash(h: str) -> None:
    weight, hessian = layer((8, 24))
    hessian = {"zero": hessian * 0, "rank one": torch.ones(24, 24), "tiny": hessian * 1e-20}[h]
    for scheme in ("aq2x3g8", "usq3h", "vq2h", "vq2ch", "usq3g8h"):
        assert torch.isfinite(quantize_weight(weight, scheme, hessian).dequantize()).all()


def test_bad_h_is_one_sentence() -> None:
    weight, hessian = layer((8, 24))
    broken = hessian.clone()
    broken[3, 3] = float("nan")
    indefinite = hessian - 0.9 * float(torch.linalg.eigvalsh(hessian)[-1]) * torch.eye(24)
    indefinite.diagonal().clamp_(min=0.1)
    cases = [
        (broken, "1 of 576 entries of H are not finite"),
        (indefinite, "not positive semi-definite"),
        (-hessian, "negative diagonal"),
        (hessian[:5, :5], r"needs \[24, 24\]"),
        (hessian[None].expand(3, -1, -1), "3 groups"),
    ]
    for bad, said in cases:
        for scheme in ("aq2x3g8", "usq3h", "vq2h"):
            with pytest.raises(AquabitError, match=said):
                quantize_weight(weight, scheme, bad)
    assert check_hessian(hessian + 1e-8 * torch.randn(24, 24), weight).shape == (1, 24, 24)
    with pytest.raises(AquabitError, match="one shape"):
        additive([weight, weight[:4]], Scheme.parse("aq2x3g8"), [None, None])


def test_formats_that_fit_badly_are_reported_once() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coded = quantize_weight(weight, "aq1x4g8")
    assert [str(w.message).split(": ")[1][:20] for w in caught] == [
        "groups of 8 are long",
        "4 groups use at most",
    ]
    torch.testing.assert_close(coded.dequantize(), weight, rtol=2e-3, atol=2e-3)
    assert int((coded.codebooks[0, 0].abs().sum(1) == 0).sum()) == 12, (
        "codewords that no group needs are zero"
    )
