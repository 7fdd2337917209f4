"""Static ranges of activations: the quantizer, the choice of ranges, how they are measured, used in each
step, kept and stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aquabit import packing
from aquabit.cost import CostModel
from aquabit.graph import layers as graph_layers
from aquabit.kernels import fake_quantize, fake_quantize_static
from aquabit.measuring.evaluator import Evaluator
from aquabit.pipelines import Adapter, load, sampler, trace
from aquabit.quant.bank import Bank
from aquabit.quant.calibration import ranges as ranges_module
from aquabit.quant.calibration.ranges import RangeRecorder, best_range
from aquabit.quant.kernel_tuning import layers_of, requests_of
from aquabit.quant.layers import QuantConv2d, quant_layer
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.scheme import (
    AquabitError,
    Calibration,
    LayerChoice,
    Protocol,
    QuantConfig,
    Rounding,
    Scheme,
    StepGroups,
)
from aquabit.space import SearchSpace, make_space

CALIBRATION = Calibration(images=6, steps=4)
PROTOCOL = Protocol(images=4, steps=4, micro_batch=4)
USQ4 = Scheme.parse("usq4")


def by_hand(x: np.ndarray, bits: int, low: float, high: float) -> np.ndarray:
    """The nearest of the 2^bits points k * step, k whole, that start at the one nearest to ``low``."""
    step = (high - low) / (2**bits - 1)
    points = (np.rint(low / step) + np.arange(2**bits)) * step
    return points[np.abs(x[..., None] - points).argmin(-1)]


@given(st.integers(2, 8), st.floats(-5, 4), st.floats(0.1, 9), st.integers(0, 1000))
def test_the_static_quantizer_is_the_nearest_point_of_its_grid(
    bits: int, low: float, width: float, seed: int
) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    y, expected = fake_quantize_static(x, bits, low, low + width), by_hand(x.numpy(), bits, low, low + width)
    step = width / (2**bits - 1)
    tie = np.abs(np.abs(x.numpy() / step % 1) - 0.5) < 1e-6
    np.testing.assert_allclose(y.numpy()[~tie], expected[~tie], atol=1e-9)
    assert len(y.unique()) <= 2**bits


@pytest.mark.parametrize("act", ["i8", "f8"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-3.0, 1.0), (0.0, 3.0)])
def test_symmetric_ones_reach_as_far_as_the_larger_end(act: Rounding, low: float, high: float) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 4
    x[0] = 3  # of a token it is the largest then
    inside = x.clamp(-3, 3)
    assert torch.equal(fake_quantize_static(inside, act, low, high), fake_quantize(inside, act))
    assert torch.equal(fake_quantize_static(x, act, low, high), fake_quantize(inside, act))
    y = fake_quantize_static(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]), act, low, high)
    assert y[:2].tolist() == [3, -3] and y[2].isnan() and y[3] == 0
    assert fake_quantize_static(x, act, 0.0, 0.0).count_nonzero() == 0
    assert best_range(inside, -1.0, 3.0, act, zero=False) == (-3.0, 3.0)


def test_ends_of_the_static_quantizer() -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 0.4, 2.0, torch.inf, torch.nan])
    y = fake_quantize_static(x, 2, -1.0, 2.0)
    assert y[:6].tolist() == [-1, -1, 0, 0, 2, 2] and y[6].isnan()
    assert fake_quantize_static(x, 16, -1, 2) is x
    assert fake_quantize_static(x[:5], 8, 0.0, 0.0).tolist() == [0] * 5
    assert fake_quantize_static(torch.tensor([1.0]).half(), 8, 0, 2).dtype == torch.float16
    for low, high in ((1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(AquabitError, match="finite ends in order"):
            fake_quantize_static(x, 8, low, high)


def test_percentiles_are_taken_where_they_round_better() -> None:
    rng = torch.Generator().manual_seed(0)
    flat = torch.rand(8192, generator=rng) * 2 - 0.5
    low, high = float(flat.min()), float(flat.max())
    assert best_range(flat, low, high, 8, zero=False) == pytest.approx((low, high), abs=1e-2), (
        "uniform values lose by cuts"
    )
    spiked = torch.cat([flat, torch.tensor([12.0])])
    found = best_range(spiked, low, 12.0, 4, zero=False)
    assert found[1] < 4, "one outlier costs all others their resolution"
    assert (
        best_range(flat + 3, low + 3, high + 3, 8, zero=True)[0] == 0
        and best_range(flat - 3, low - 3, high - 3, 8, zero=True)[1] == 0
    )
    assert best_range(flat + 3, low + 3, high + 3, 8, zero=False)[0] > 2


def evaluator(pipe, tmp_path) -> tuple[Evaluator, SearchSpace]:
    graph, own = trace(pipe), fingerprint(pipe.denoiser)
    return Evaluator(pipe, graph, Bank(tmp_path), own), make_space(
        graph, own, schemes=["usq4"], activations=[16, 8, 6, 4]
    )


def ranged(space: SearchSpace, kind: str, act: Rounding = 8) -> QuantConfig:
    return replace(space.uniform("usq4", act), ranges=kind, calibration=CALIBRATION)


def seen_by_hand(pipe) -> dict[str, list[list[torch.Tensor]]]:
    """layer -> step -> its inputs, in the untouched pipeline."""
    found: dict[str, list[list[torch.Tensor]]] = {}
    names = [n for n, a in graph_layers(trace(pipe)).items()]
    step = [-1]
    handles = [pipe.denoiser.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))]
    for name in names:
        found[name] = [[] for _ in range(4)]
        see = lambda _, args, name=name: found[name][step[0] % 4].append(args[0].clone())  # noqa: E731
        handles.append(pipe.denoiser.get_submodule(name).register_forward_pre_hook(see))
    protocol, adapter = CALIBRATION.protocol(16), Adapter(pipe)
    for batch in adapter.batches(protocol):
        adapter.images(protocol, batch)
    for handle in handles:
        handle.remove()
    return found


def test_ranges_are_those_of_full_precision_inputs(tmp_path, pipe, monkeypatch) -> None:
    monkeypatch.setattr(ranges_module, "TAILS", (0.0,))  # the smallest and largest values alone
    here, space = evaluator(pipe, tmp_path)
    inputs = seen_by_hand(pipe)
    still, moving = (here.quantized.ranges(ranged(space, kind)) for kind in ("static", "step"))
    attention = {n for n, a in graph_layers(trace(pipe)).items() if a.get("attention")}
    splits = 0
    for name, by_step in inputs.items():
        layer = here.quantized.layers[name]
        parts = 2 if layer.split and isinstance(layer, QuantConv2d) else 1
        splits += parts == 2
        assert still[name].shape == (1, parts + (name in attention), 2) and moving[name].shape == (
            4,
            parts + (name in attention),
            2,
        )
        for part in range(parts):
            cut = (
                slice(None)
                if parts == 1
                else slice(0, layer.split)
                if part == 0
                else slice(layer.split, None)
            )
            values = [
                torch.cat([x[:, cut].flatten() if parts == 2 else x.flatten() for x in xs]) for xs in by_step
            ]
            ends = [(float(v.min()), float(v.max())) for v in values]
            if isinstance(layer, QuantConv2d):
                ends = [(min(a, 0.0), max(b, 0.0)) for a, b in ends]
            torch.testing.assert_close(moving[name][:, part], torch.tensor(ends), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(
                still[name][0, part],
                torch.stack([moving[name][:, part, 0].min(), moving[name][:, part, 1].max()]),
            )
    assert splits == sum(
        bool(a.get("split")) and len(a["shape"]) > 2 for a in graph_layers(trace(pipe)).values()
    )


@pytest.mark.parametrize("packed", [False, True])
def test_each_step_reads_its_own_range(tmp_path, unet, packed: bool) -> None:
    here, space = evaluator(unet, tmp_path)
    config = ranged(space, "step")
    tables = here.quantized.ranges(config)
    name = next(n for n, layer in here.quantized.layers.items() if layer.split)
    layer, seen = here.quantized.layers[name], []
    layer.register_forward_pre_hook(lambda *_: seen.append(layer.ranges))
    here.generate(config, PROTOCOL, packed)
    assert (
        seen == [tuple((float(a), float(b)) for a, b in row) for row in tables[name]] and len(set(seen)) > 1
    )
    seen.clear()
    here.generate(ranged(space, "static"), PROTOCOL, packed)
    assert len(set(seen)) == 1 and len(seen) == 4
    seen.clear()
    here.generate(ranged(space, "dynamic"), PROTOCOL, packed)
    assert set(seen) == {None}


@pytest.mark.parametrize("act", [4, "i8", "f8"])
def test_layers_round_to_their_static_range(tmp_path, unet, act: Rounding) -> None:
    here, space = evaluator(unet, tmp_path)
    here.quantized.apply(ranged(space, "static", act))
    tables = here.quantized.ranges(ranged(space, "static", act))
    g = torch.Generator().manual_seed(0)
    for name, layer in here.quantized.layers.items():
        ends = tables[name][0].tolist()
        if isinstance(layer, QuantConv2d):
            x = torch.randn(2, layer.in_channels, 4, 4, generator=g)
            parts = [x] if layer.split is None else [x[:, : layer.split], x[:, layer.split :]]
            rounded = torch.cat(
                [fake_quantize_static(p, act, *e) for p, e in zip(parts, ends, strict=True)], 1
            )
            expected = torch.nn.functional.conv2d(
                rounded, layer.weight, layer.bias, layer.stride, layer.padding
            )
        else:
            x = torch.randn(3, layer.in_features, generator=g)
            expected = torch.nn.functional.linear(
                fake_quantize_static(x, act, *ends[0]), layer.weight, layer.bias
            )
            if len(ends) == 2 and act == 4:
                expected = fake_quantize_static(expected, 4, *ends[1])
        torch.testing.assert_close(layer(x), expected)
    assert all(
        r.act == 16
        for row in requests_of(here.quantized.layers, here.adapter.first_call(PROTOCOL)).values()
        for r in row
    )


def test_ranges_are_measured_once(tmp_path, dit) -> None:
    here, space = evaluator(dit, tmp_path)
    here.generate(ranged(space, "step"), PROTOCOL)
    (file,) = tmp_path.glob("ranges-*.safetensors")
    again = QuantizedDenoiser(load_again(dit), trace(dit), Bank(tmp_path), space.fingerprint)
    found = again.ranges(ranged(space, "step"))
    assert all(torch.equal(found[n], t) for n, t in here.quantized.ranges(ranged(space, "step")).items())
    assert (
        again.ranges(ranged(space, "static")) is not None and again.ranges(ranged(space, "dynamic")) is None
    )
    with pytest.raises(AquabitError, match="need images to be measured on"):
        again.ranges(ranged(space, "step", 6))
    file.write_bytes(b"damaged")
    fresh = QuantizedDenoiser(
        dit.denoiser, trace(dit), Bank(tmp_path), space.fingerprint, sample=sampler(dit)
    )
    assert fresh.ranges(ranged(space, "static")).keys() == found.keys(), "what is damaged is measured again"


def load_again(pipe):
    import copy

    return copy.deepcopy(pipe.denoiser)


@pytest.mark.parametrize("kind", ["static", "step"])
def test_artifacts_hold_ranges(tmp_path, pipe, kind: str) -> None:
    here, space = evaluator(pipe, tmp_path)
    base, groups = ranged(space, kind), StepGroups(4, (0, 1))
    names = space.layers
    config = replace(
        base,
        layers={
            **base.layers,
            names[0]: LayerChoice(USQ4, (8, 6)),
            names[1]: LayerChoice(USQ4, (16, 8)),
            names[2]: LayerChoice(USQ4, 16),
            names[3]: LayerChoice(USQ4, "i8"),
            names[4]: LayerChoice(USQ4, ("f8", "i8")),
        },
        steps=groups,
    )
    packed = packing.quantize(pipe, config, bank=str(tmp_path))
    written = packed.save(tmp_path / "packed")
    assert (
        written
        == CostModel(trace(pipe), space)(config).bytes
        > CostModel(trace(pipe), space)(replace(config, ranges="dynamic")).bytes
    )
    loaded = load(str(tmp_path / "packed"))
    adapter = Adapter(loaded)
    made = torch.cat([adapter.images(PROTOCOL, b) for b in adapter.batches(PROTOCOL)])
    assert torch.equal(made, here.generate(config, PROTOCOL, packed=True))
    dense, full = here.generate(config, PROTOCOL), here.generate(space.full_precision(), PROTOCOL)
    assert (made - dense).square().mean() < 0.3 * (dense - full).square().mean()
    layers = layers_of(loaded.denoiser)
    assert (
        layers[names[1]].act == 8 and layers[names[1]].ranges is not None and layers[names[2]].ranges is None
    )
    if kind == "step":
        with pytest.raises(AquabitError, match="set for 4 steps, not for 6"):
            packing.generate(str(tmp_path / "packed"), 2, steps=6)
    file = tmp_path / "packed" / "denoiser" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    save_file({k: v for k, v in stored.items() if k != f"ranges/{names[0]}"}, file)
    with pytest.raises(AquabitError, match="needs static ranges of shape"):
        load(str(tmp_path / "packed"))


def test_groups_of_the_static_range_follow_their_bits(tmp_path, dit) -> None:
    here, space = evaluator(dit, tmp_path)
    name = space.layers[3]
    config = replace(
        ranged(space, "static"), layers={name: LayerChoice(USQ4, (4, 8))}, steps=StepGroups(4, (0, 2))
    )
    found = here.quantized.ranges(config)[name]
    alone = [here.quantized.ranges(replace(ranged(space, "static", a)))[name] for a in (4, 8)]
    assert torch.equal(found, torch.cat(alone)) and found.shape[0] == 2
    moving = here.quantized.ranges(replace(config, ranges="step"))[name]
    both = [here.quantized.ranges(ranged(space, "step", a))[name] for a in (4, 8)]
    assert torch.equal(moving, torch.cat([both[0][:2], both[1][2:]]))


def test_configurations_with_ranges() -> None:
    base = QuantConfig("f", {"a": LayerChoice(USQ4, 8), "b": LayerChoice(USQ4, 16)}, calibration=CALIBRATION)
    still, moving = replace(base, ranges="static"), replace(base, ranges="step")
    assert (
        len(
            {
                base.digest,
                still.digest,
                moving.digest,
                replace(moving, calibration=replace(CALIBRATION, seed=1)).digest,
            }
        )
        == 4
    )
    assert replace(base, calibration=replace(CALIBRATION, seed=1)).digest == base.digest, (
        "nothing of it is calibrated"
    )
    assert [c.range_parts("a") for c in (base, still, moving)] == [0, 1, 4] and moving.range_parts("b") == 0
    assert (base.total_steps, still.total_steps, moving.total_steps) == (None, None, 4)
    assert QuantConfig.from_dict(moving.to_dict()) == moving
    with pytest.raises(AquabitError, match="calibration's 4 steps, and the step groups are of 10"):
        replace(moving, layers={"a": LayerChoice(USQ4, (8, 6))}, steps=StepGroups(10, (0, 5)))
    with pytest.raises(AquabitError, match="ranges 'wide' are unknown"):
        replace(base, ranges="wide")


def test_ranges_of_convolutions_hold_zero() -> None:
    layers = {"conv": quant_layer(torch.nn.Conv2d(2, 2, 1)), "linear": quant_layer(torch.nn.Linear(4, 2))}
    recorder = RangeRecorder(layers, (), 4096)
    recorder.steps = 1
    with recorder.watching():
        layers["conv"](torch.rand(2, 2, 4, 4) + 3)
        layers["linear"](torch.rand(8, 4) + 3)
    found = recorder.tables(8)
    assert found["conv"][:, 0, 0].tolist() == [0, 0] and (found["linear"][:, 0, 0] >= 3).all()
