"""Replay buffer: what is recorded comes back, in batches that mix steps where the denoiser allows it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aquabit.pipelines import replay_recorder
from aquabit.quant.finetuning.replay import Recorded, Recording, Replay, record_outputs
from aquabit.scheme import AquabitError, Calibration
from tests.conftest import tiny_pipeline

CPU = torch.device("cpu")


class Net(nn.Module):
    """Rows of x times a function of the timestep, plus the condition; ``per_sample`` says whether
    timesteps may differ within a batch."""

    def __init__(self, per_sample: bool = True):
        super().__init__()
        self.bias, self.per_sample = nn.Parameter(torch.tensor(0.5)), per_sample

    def forward(
        self, x: Tensor, timestep: Tensor, condition: dict[str, Any], scale: float = 1.0
    ) -> tuple[Tensor]:
        if not self.per_sample and timestep.ndim:
            raise ValueError("one timestep a call")
        factor = timestep.view(-1, 1) if timestep.ndim else timestep
        return (x * factor * scale + condition["pooled"][0] + condition["table"].sum() + self.bias,)


def recorded(net: Net, runs: int = 4, steps: int = 3, rows: int = 4) -> list[Recorded]:
    generator = torch.Generator().manual_seed(0)

    def run(seed: int) -> None:
        with torch.inference_mode():
            for step in range(steps):
                x = torch.randn(rows, 5, generator=generator)
                net(
                    x,
                    torch.tensor(float(10 - step)),
                    condition={"pooled": [x.mean(1, keepdim=True)], "table": torch.ones(7)},
                    scale=2.0,
                )

    return record_outputs(net, [partial(run, i) for i in range(runs)])


@pytest.mark.parametrize("per_sample", [True, False])
def test_batches_are_what_was_recorded(per_sample: bool) -> None:
    net = Net(per_sample)
    replay = Replay(Recording(recorded(net)), net)
    assert len(replay) == 4 * 3 * 4 and len(replay.kinds) == (1 if per_sample else 3)
    seen: list[int] = []
    for step in range(9):
        samples = replay.training(step, "shuffled", 4, seed=0)
        (args, kwargs), target = replay.batch(samples, CPU)
        torch.testing.assert_close(net(*args, **kwargs)[0], target)  # inputs and outputs belong together
        assert not target.is_inference()
        steps = {replay.places[s][2] for s in samples}
        assert len(steps) == 1 or per_sample
        seen += samples
    assert sorted(seen) == sorted(set(seen)) and len(seen) == 36  # an epoch: each training sample once
    mixed = [len({replay.places[s][2] for s in replay.training(step, "shuffled", 4, 0)}) for step in range(9)]
    assert max(mixed) == (3 if per_sample else 1)
    held = {s for batch in replay.validation(4, 100) for s in batch}
    assert held and {replay.places[s][0] for s in held} == {3} and not held & set(seen)
    assert (
        len({replay.places[s][2] for batch in replay.validation(4, 3) for s in batch}) == 3
    )  # few, but of every step


def test_orders_are_functions_of_step_and_seed() -> None:
    net = Net()
    replays = [Replay(Recording(recorded(net)), net) for _ in range(2)]
    late = [
        r.training(step, "shuffled", 4, 0)
        for r, steps in zip(replays, (range(25), (24,)), strict=True)
        for step in steps
    ]
    assert late[24] == late[25]  # no matter what was asked for before
    assert replays[0].training(3, "shuffled", 4, 0) != replays[0].training(3, "shuffled", 4, 1)
    assert replays[0].training(0, "shuffled", 4, 0) != replays[0].training(
        9, "shuffled", 4, 0
    )  # epochs differ


def test_walking_goes_along_trajectories() -> None:
    net = Net()
    replay = Replay(Recording(recorded(net)), net)
    walk = [replay.training(step, "walking", 4, 0) for step in range(10)]
    assert [replay.places[batch[0]][::2] for batch in walk] == [
        (r, s) for r in range(3) for s in range(3)
    ] + [(0, 0)]
    follows = [replay.continues(a, b) for a, b in pairwise(walk)]
    assert follows == [True, True, False] * 3
    assert not replay.continues(walk[0], walk[1][::-1])  # row by row


@pytest.mark.parametrize("conditional_first", [True, False])
def test_branches_of_guidance_stay_together(conditional_first: bool) -> None:
    net = Net()
    calls = recorded(net)
    replay = Replay(Recording(calls, conditional_first), net, branches=2)
    assert len(replay) == 4 * 3 * 2
    samples = replay.training(0, "shuffled", 3, 0)
    (args, kwargs), target = replay.batch(samples, CPU)
    torch.testing.assert_close(net(*args, **kwargs)[0], target)
    for i, sample in enumerate(samples):
        run, row, step = replay.places[sample]
        output = next(c.output for c in calls if (c.run, c.step) == (run, step))
        first, second = (row, row + 2) if conditional_first else (row + 2, row)
        assert torch.equal(target[i], output[first]) and torch.equal(target[i + 3], output[second])
    with pytest.raises(AquabitError, match="call of 3 rows is not two branches"):
        Replay(Recording(recorded(net, rows=3)), net, branches=2)


def test_pipelines_are_recorded_on_their_own_seeds() -> None:
    pipe = tiny_pipeline("dit")
    record = replay_recorder(pipe)
    recording = record(Calibration(images=6, steps=3, seed=5, guidance=2.0), 2)
    assert len(recording.calls) == 9 and recording.conditional_first
    assert [(c.run, c.step) for c in recording.calls[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    replay = Replay(recording, pipe.denoiser, 2)
    assert len(replay.kinds) == 1 and len(replay) == 18
    (args, kwargs), target = replay.batch(replay.training(0, "shuffled", 4, 0), CPU)
    assert (
        len(set(kwargs["timestep"].tolist())) > 1 and kwargs["class_labels"][4:].tolist() == [10] * 4
    )  # no condition
    with torch.no_grad():
        torch.testing.assert_close(pipe.denoiser(*args, **kwargs).sample, target, rtol=1e-4, atol=1e-5)


def test_what_cannot_teach_is_refused() -> None:
    net = Net()
    with pytest.raises(AquabitError, match="no denoiser call was recorded from 1 micro-batches"):
        record_outputs(net, [lambda: None])
    with pytest.raises(AquabitError, match="one batch of images"):
        Replay(Recording(recorded(net, runs=1)), net)
    net.bias.data.fill_(float("nan"))
    with pytest.raises(AquabitError, match="NaN or infinity in step 0"):
        recorded(net)
