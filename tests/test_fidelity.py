"""Output errors on stored inputs: against outputs compared by hand, known errors, and activations that change between steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aquabit.pipelines import replay_recorder, trace
from aquabit.quant.bank import Bank
from aquabit.quant.model import fingerprint
from aquabit.quant.replay import Recorded, Recording
from aquabit.scheme import Protocol, StepGroups
from aquabit.sensitivity.evaluator import Evaluator
from aquabit.sensitivity.fidelity import OutputErrors, stored
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
    assert found["gain"] == pytest.approx([-0.2] * 3, rel=1e-3) and found["error"] == pytest.approx([0.04] * 3, rel=1e-3)
    net.gain.data.fill_(0.0)
    net.shift = 0.1
    found = errors()
    assert found["common"] == pytest.approx([0.01] * 3, rel=0.05) == found["error"]
    net.shift, net.noise = 0.0, 0.3
    found = errors()
    assert found["error"] == pytest.approx([0.09] * 3, rel=0.05)
    assert max(map(abs, found["common"])) < 2e-4, "what images do not share is left out: 64 of them leave 0.0014 by chance"
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
            change.setdefault(c.step, []).append(evaluator.adapter.denoiser(*c.call[0], **c.call[1])[0] - c.output)
            full.setdefault(c.step, []).append(c.output)
    for step, error, common, gain in zip(range(4), found["error"], found["common"], found["gain"], strict=True):
        d, e = torch.cat(change[step]), torch.cat(full[step])
        assert error == pytest.approx(float(d.square().sum() / e.square().sum()), rel=1e-3)
        assert gain == pytest.approx(float((d * e).sum() / e.square().sum()), rel=5e-3, abs=1e-6)
        assert common == pytest.approx(
            float((d.mean(0).square().mean() - d.var(0).mean() / len(d)) / e.square().mean()), rel=1e-2, abs=1e-6
        )
    assert evaluator.output_errors(space.full_precision(), PROTOCOL)["error"] == pytest.approx([0.0] * 4, abs=1e-9)
    assert evaluator.output_errors(config, PROTOCOL.block(3)) == found, "seeds of the protocol do not matter"


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
