"""Output errors on stored inputs: against outputs compared by hand, known errors, and activations that
change between steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.output_errors import OutputErrors, stored
from aquabit.pipelines import replay_recorder, trace
from aquabit.quant.bank import Bank
from aquabit.quant.finetuning.replay import Recorded, Recording
from aquabit.quant.model import fingerprint
from aquabit.scheme import Protocol, StepGroups
from aquabit.space import make_space

PROTOCOL = Protocol(images=4, steps=4, micro_batch=4)


class Known(nn.Module):
    """Returns its input, with a slope, a shift that all images share, and noise of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift, self.noise = nn.Parameter(torch.tensor(0.0)), 0.0, 0.0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        return x * (1 + self.gain) + self.shift + self.noise * torch.randn(x.shape, generator=g)


def known(steps: int = 3, images: int = 64) -> tuple[Known, OutputErrors]:
    net, g = Known(), torch.Generator().manual_seed(0)
    calls = []
    for run in range(2):
        for step in range(steps):
            x = torch.randn(images // 2, 1, 16, 16, generator=g)
            calls.append(Recorded(((x, torch.tensor(float(step))), {}), x.clone(), run, step))
    return net, OutputErrors(Recording(calls), net)


def test_known_slope_shift_and_noise_are_found() -> None:
    net, errors = known()
    assert errors() == {"error": [0.0] * 3, "common": [0.0] * 3, "gain": [0.0] * 3}
    net.gain.data.fill_(-0.2)
    found = errors()
    assert found["gain"] == pytest.approx([-0.2] * 3, rel=1e-3) and found["error"] == pytest.approx(
        [0.04] * 3, rel=1e-3
    )
    net.gain.data.fill_(0.0)
    net.shift = 0.1
    found = errors()
    assert found["common"] == pytest.approx([0.01] * 3, rel=0.05) == found["error"]
    net.shift, net.noise = 0.0, 0.3
    found = errors()
    assert found["error"] == pytest.approx([0.09] * 3, rel=0.05)
    assert max(map(abs, found["common"])) < 2e-4, (
        "what images do not share is left out: 64 of them leave 0.0014 by chance"
    )
    net.noise = float("nan")
    assert errors()["error"] == [1e6] * 3


def test_many_steps_are_thinned_out_evenly() -> None:
    assert known(steps=25)[1].steps == [0, 3, 5, 8, 11, 13, 16, 19, 21, 24]


def test_equals_outputs_compared_by_hand(pipe, tmp_path) -> None:
    graph, name = trace(pipe), fingerprint(pipe.denoiser)
    evaluator = Evaluator(pipe, graph, Bank(tmp_path), name)
    space = make_space(graph, name, schemes=["usq2", "usq4"])
    config = space.uniform("usq2", 16)  # rounded activations flip codes where a batch is summed otherwise
    found = evaluator.output_errors(config, PROTOCOL)
    made = replay_recorder(pipe)(*stored(PROTOCOL)).calls  # the pipeline given is not quantized
    evaluator.quantized.apply(config)
    change: dict[int, list[torch.Tensor]] = {}
    full: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for c in made:
            change.setdefault(c.step, []).append(
                evaluator.adapter.network(*c.call[0], **c.call[1])[0] - c.output
            )
            full.setdefault(c.step, []).append(c.output)
    for step, error, common, gain in zip(
        range(4), found["error"], found["common"], found["gain"], strict=True
    ):
        d, e = torch.cat(change[step]), torch.cat(full[step])
        assert error == pytest.approx(float(d.square().sum() / e.square().sum()), rel=1e-3)
        assert gain == pytest.approx(float((d * e).sum() / e.square().sum()), rel=5e-3, abs=1e-4)
        assert common == pytest.approx(
            float((d.mean(0).square().mean() - d.var(0).mean() / len(d)) / e.square().mean()),
            rel=1e-2,
            abs=1e-6,
        )
    assert evaluator.output_errors(space.full_precision(), PROTOCOL)["error"] == pytest.approx(
        [0.0] * 4, abs=1e-9
    )
    assert evaluator.output_errors(config, PROTOCOL.block(3)) == found, "seeds of the protocol do not matter"


def test_parts_are_of_other_trajectories() -> None:
    runs = [stored(PROTOCOL, part) for part in range(4)]
    seeds = [set(range(c.seed, c.seed + c.images)) for c, _ in runs]
    assert len(set.union(*seeds)) == sum(map(len, seeds)) and stored(PROTOCOL) == runs[0]
    assert len({c.digest for c, _ in runs}) == 4 and {c.steps for c, _ in runs} == {4}


def test_the_gradient_is_that_of_the_weighted_errors() -> None:
    net, errors = known(steps=3)
    net.gain.data.fill_(-0.2)
    weights = [1.0, 0.0, 5.0]
    value = errors.backward(weights)
    assert value == pytest.approx(float(torch.tensor(errors()["error"]) @ torch.tensor(weights)), rel=1e-4)
    assert net.gain.grad is not None and float(net.gain.grad) == pytest.approx(
        2 * -0.2 * sum(weights), rel=1e-4
    )
    assert value == pytest.approx(0.04 * sum(weights), rel=1e-3)


@pytest.fixture
def sloped(pipe, tmp_path):
    """An evaluator of a tiny pipeline and its space."""
    graph, name = trace(pipe), fingerprint(pipe.denoiser)
    return Evaluator(pipe, graph, Bank(tmp_path), name), make_space(
        graph, name, schemes=["usq2", "usq4", "usq8"]
    )


WEIGHTS = (0.5, 2.0, 0.0, 1.0)


def test_slopes_are_what_small_changes_of_weights_do(sloped) -> None:
    evaluator, space = sloped
    config = space.uniform("usq4", 16)
    choices = {layer: ["fp", "usq2", "usq4", "usq8"] for layer in space.layers}
    before = evaluator.output_errors(config, PROTOCOL)
    found = evaluator.slopes(config, PROTOCOL, 0, WEIGHTS, choices)
    share = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert found["value"] == pytest.approx(
        float(torch.tensor(before["error"], dtype=torch.float64) @ share), rel=1e-4
    )
    assert evaluator.output_errors(config, PROTOCOL) == before, "nothing is left of it"
    assert not any(layer.weight.requires_grad for layer in evaluator.quantized.layers.values())
    errors, largest = (
        evaluator._stored[stored(PROTOCOL)[0].digest],
        max(abs(v) for row in found["slopes"].values() for v in row.values()),
    )
    for name in (space.layers[0], space.layers[len(space.layers) // 2], space.layers[-2]):
        slopes, overlap, layer = (
            found["slopes"][name],
            found["overlap"][name],
            evaluator.quantized.layers[name],
        )
        full, own = evaluator.quantized.full(name), layer.weight.clone()
        assert (
            slopes["fp"] == 0 == overlap["fp"]
            and overlap["usq4"] == pytest.approx(1, abs=1e-5)
            and -1 <= overlap["usq2"] < 0.999
        )
        for scheme in ("fp", "usq2"):
            other = full if scheme == "fp" else evaluator.quantized.decoded(name, scheme, config)
            ends = []
            for t in (0.05, -0.05):
                layer.weight = own + t * (other - own)
                ends.append(float(torch.tensor(errors()["error"], dtype=torch.float64) @ share))
            layer.weight = own
            assert slopes[scheme] - slopes["usq4"] == pytest.approx(
                (ends[0] - ends[1]) / 0.1, rel=0.02, abs=1e-4 * largest
            )


def test_slopes_pass_through_rounded_activations_to_every_layer(sloped) -> None:
    evaluator, space = sloped
    choices = {layer: ["usq2", "usq4"] for layer in space.layers}
    plain, rounded = (
        evaluator.slopes(space.uniform("usq4", act), PROTOCOL, 0, WEIGHTS, choices)["slopes"]
        for act in (16, 8)
    )
    some = [(rounded[k]["usq2"], plain[k]["usq2"]) for k in choices if plain[k]["usq2"]]
    assert len(some) > len(choices) / 2 and all(a for a, _ in some)
    a, b = torch.tensor(some).T
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.95


def test_full_precision_has_no_slope_and_overlaps_with_nothing(sloped) -> None:
    evaluator, space = sloped
    found = evaluator.slopes(space.full_precision(), PROTOCOL, 1, WEIGHTS, {space.layers[0]: ["usq2"]})
    assert found["value"] == pytest.approx(0, abs=1e-9) and list(found["slopes"]) == [space.layers[0]]
    assert (
        found["overlap"] == {space.layers[0]: {"usq2": 0.0, "fp": 0.0}}
        and abs(found["slopes"][space.layers[0]]["usq2"]) < 1e-5
    )


def test_activations_that_change_between_steps_are_followed(dit, tmp_path) -> None:
    graph, name = trace(dit), fingerprint(dit.denoiser)
    evaluator = Evaluator(dit, graph, Bank(tmp_path), name)
    groups = {"total": 4, "starts": [0, 1]}
    space = make_space(graph, name, schemes=["usq4"], step_groups=groups)

    def errors(act):
        config = space.full_precision()
        for layer in space.choices:
            config = config.with_layer(layer, "usq4", act, steps=StepGroups(4, (0, 1)))
        return evaluator.output_errors(config, PROTOCOL)["error"]

    low, high, mixed = errors(4), errors(8), errors((4, 8))
    assert mixed == pytest.approx([low[0], *high[1:]], rel=1e-4) and low[1] > 2 * high[1]
