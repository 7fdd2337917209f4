"""Following a sampler: what watchers see, and that nothing stays where it should not."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from aquabit.pipelines import Adapter, set_scheduler
from aquabit.quant.correction.corrector import Corrector, corrected_, statistics_of
from aquabit.quant.correction.sampling import (
    Watcher,
    follow_,
    following,
    refollow_,
    steps_of,
    unfollowed,
    watchers_of,
)
from aquabit.scheme import AquabitError, Protocol
from tests.chains import OPEN, STILL, Given, known, sampled
from tests.conftest import tiny_pipeline

DDIM = STILL[0]
PROTOCOL = Protocol(images=4, steps=3, micro_batch=4)


class Log(Watcher):
    def __init__(self, name: str = "", scale: float = 1.0):
        self.name, self.scale, self.seen = name, scale, list[Any]()

    def begin(self, scheduler: Any) -> None:
        self.seen.append(("begin", len(scheduler.timesteps)))

    def before(self, step: int) -> None:
        self.seen.append(("before", step))

    def output(self, step: int, call: int, output: Tensor) -> Tensor:
        self.seen.append(("output", step, call))
        return output if self.scale == 1 else output * self.scale

    def advance(self, step: int, run: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(("advance", step))
        return run(*args, **kwargs)


def untouched(denoiser: nn.Module, scheduler: Any) -> bool:
    return (
        not denoiser._forward_hooks
        and not denoiser._forward_pre_hooks
        and not {"step", "set_timesteps"} & set(vars(scheduler))
    )


def run(denoiser: nn.Module, scheduler: Any, steps: int = 3) -> Tensor:
    return sampled(denoiser, scheduler, torch.ones(1, 2, 2, 2), steps)


def test_watchers_see_every_call_and_step() -> None:
    log, denoiser, scheduler = Log(), Given(lambda x, t: x), DDIM.made(2)
    before = vars(scheduler).copy()
    with following(denoiser, scheduler, [log]) as sampling:
        assert list(inspect.signature(scheduler.step).parameters)[:4] == [
            "model_output",
            "timestep",
            "sample",
            "eta",
        ]
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            x = denoiser(torch.ones(1, 2, 2, 2), t)
            denoiser(x, t)
            scheduler.step(x, t, x)
        assert sampling is not None and sampling.step == 2
    per_step = [
        (("before", s), ("output", s, 0), ("before", s), ("output", s, 1), ("advance", s)) for s in range(2)
    ]
    assert log.seen == [("begin", 2), *per_step[0], *per_step[1]]
    assert untouched(denoiser, scheduler) and set(vars(scheduler)) == set(before)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "output"])
def test_outputs_are_replaced_whatever_holds_them(kind: str) -> None:
    def give(x: Tensor, t: Any) -> Any:
        return {"tensor": x, "tuple": (x, "rest"), "output": Transformer2DModelOutput(sample=x)}[kind]

    denoiser, x = Given(give), torch.ones(1, 2)
    with following(denoiser, DDIM.made(2), [Log(scale=2), Log(scale=3)]):
        found = denoiser(x, 0)
    assert torch.equal(found if kind == "tensor" else found[0], 6 * x)
    if kind == "output":
        assert torch.equal(found.sample, 6 * x)
    if kind == "tuple":
        assert found[1] == "rest"


def test_the_first_watcher_is_the_outermost() -> None:
    order = []

    class Around(Watcher):
        def __init__(self, name: str):
            self.name = name

        def output(self, step: int, call: int, output: Tensor) -> Tensor:
            order.append(f"output {self.name}")
            return output

        def advance(self, step: int, run: Any, *args: Any, **kwargs: Any) -> Any:
            order.append(f"into {self.name}")
            found = run(*args, **kwargs)
            order.append(f"out of {self.name}")
            return found

    denoiser, scheduler = Given(lambda x, t: x), DDIM.made(1)
    with following(denoiser, scheduler, [Around("a"), Around("b")]):
        run(denoiser, scheduler, 1)
    assert order == ["output a", "output b", "into a", "into b", "out of b", "out of a"]


def test_nothing_is_touched_without_watchers() -> None:
    denoiser, scheduler = Given(lambda x, t: x), DDIM.made(2)
    with following(denoiser, scheduler, []) as sampling:
        assert sampling is None and untouched(denoiser, scheduler)


def test_nothing_stays_attached_after_an_exception() -> None:
    def interrupted(x: Tensor, t: Any) -> Tensor:
        raise KeyboardInterrupt

    denoiser, scheduler = Given(interrupted), DDIM.made(2)
    with pytest.raises(KeyboardInterrupt), following(denoiser, scheduler, [Log()]):
        run(denoiser, scheduler)
    assert untouched(denoiser, scheduler)


def test_sampling_anew_after_an_interruption() -> None:
    log, denoiser, scheduler = Log(), Given(lambda x, t: x), DDIM.made(3)
    follow_(denoiser, scheduler, [log])
    scheduler.set_timesteps(3)
    t, x = scheduler.timesteps[0], torch.ones(1, 2, 2, 2)
    scheduler.step(denoiser(x, t), t, x)
    denoiser(x, t)
    log.seen.clear()
    run(denoiser, scheduler, 2)
    assert log.seen == [("begin", 2)] + [
        e for s in range(2) for e in (("before", s), ("output", s, 0), ("advance", s))
    ]


def test_who_follows_for_good_comes_back_after_who_follows_for_a_while() -> None:
    ever, now, denoiser, scheduler = Log(), Log(), Given(lambda x, t: x), DDIM.made(2)
    follow_(denoiser, scheduler, [ever])
    with following(denoiser, scheduler, [now]):
        run(denoiser, scheduler, 2)
    assert len(now.seen) == len(ever.seen) == 7
    ever.seen.clear()
    run(denoiser, scheduler, 2)
    assert (
        len(now.seen) == 7
        and [e[0] for e in ever.seen].count("advance") == 2
        and ever.seen[0] == ("begin", 2)
    )
    follow_(denoiser, scheduler, [])
    assert untouched(denoiser, scheduler) and watchers_of(denoiser) == []


def test_two_denoisers_may_share_a_scheduler_in_any_order() -> None:
    logs, denoisers, scheduler = (
        [Log(), Log(), Log()],
        [Given(lambda x, t: x) for _ in range(3)],
        DDIM.made(2),
    )
    for denoiser, log in zip(denoisers, logs, strict=True):
        follow_(denoiser, scheduler, [log])
    follow_(denoisers[1], scheduler, [])  # neither the first nor the last to attach
    run(denoisers[0], scheduler, 2)
    assert [len([e for e in log.seen if e[0] == "advance"]) for log in logs] == [2, 0, 2]
    follow_(denoisers[0], scheduler, [])
    follow_(denoisers[2], scheduler, [])
    assert untouched(denoisers[0], scheduler) and untouched(denoisers[2], scheduler)


def test_a_replaced_scheduler_is_followed(dit) -> None:
    log = Log()
    old = dit.scheduler
    follow_(dit.denoiser, old, [log])
    set_scheduler(dit, "euler")
    assert dit.scheduler is not old and not {"step", "set_timesteps"} & set(vars(old))
    Adapter(dit).images(PROTOCOL, range(4))
    assert [e for e in log.seen if e[0] == "advance"] == [("advance", i) for i in range(3)]
    handles = len(dit.denoiser._forward_hooks)
    refollow_(dit.denoiser, dit.scheduler)  # the same again: nothing twice
    assert len(dit.denoiser._forward_hooks) == handles == 1


def test_calls_that_are_no_sampling() -> None:
    log, denoiser, scheduler = Log(scale=2), Given(lambda x, t: x), DDIM.made(2)
    follow_(denoiser, scheduler, [log])
    with unfollowed(denoiser):
        assert untouched(denoiser, scheduler) and torch.equal(denoiser(torch.ones(1), 0), torch.ones(1))
    with pytest.raises(RuntimeError), unfollowed(denoiser):
        raise RuntimeError
    assert torch.equal(denoiser(torch.ones(1), 0), 2 * torch.ones(1))
    with unfollowed(Given(lambda x, t: x)):
        pass


def test_images_that_are_made_while_nothing_follows_are_no_sampling(dit) -> None:
    """Adapters look for replaced schedulers; that must not attach what is to stay away, as when kernels
    are timed."""
    log = Log()
    follow_(dit.denoiser, dit.scheduler, [log])
    with unfollowed(dit.denoiser), unfollowed(dit.denoiser):
        Adapter(dit).images(PROTOCOL, range(4))
        assert not log.seen and untouched(dit.denoiser, dit.scheduler)
    Adapter(dit).images(PROTOCOL, range(4))
    assert [e[0] for e in log.seen].count("advance") == 3


def corrected_pipeline() -> Any:
    pipe = tiny_pipeline("dit")
    for p in pipe.denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pipe.scheduler.set_timesteps(3)
    corrected_(pipe.denoiser, pipe.scheduler, known(pipe.scheduler, k=0.5, bias=0.2, channels=1), "cnc+bc")
    return pipe


def test_a_copied_pipeline_is_corrected_as_the_first() -> None:
    """Each by its own watchers and scheduler, before and after either has sampled."""
    pipe = corrected_pipeline()
    twin = copy.deepcopy(pipe)
    images = Adapter(pipe).images(PROTOCOL, range(4))
    later = copy.deepcopy(pipe)
    for other in (twin, later):
        assert torch.equal(Adapter(other).images(PROTOCOL, range(4)), images)
        assert other.scheduler.step.original.__self__ is other.scheduler
        assert watchers_of(other.denoiser)[0] is not watchers_of(pipe.denoiser)[0]
    corrected_(twin.denoiser, twin.scheduler, statistics_of(twin.denoiser), None)
    plain = Adapter(twin).images(PROTOCOL, range(4))
    assert not torch.equal(plain, images) and torch.equal(Adapter(pipe).images(PROTOCOL, range(4)), images)


def test_a_copied_denoiser_in_another_pipeline_is_corrected() -> None:
    pipe, other = corrected_pipeline(), tiny_pipeline("dit")
    images = Adapter(pipe).images(PROTOCOL, range(4))
    other.denoiser = copy.deepcopy(pipe.denoiser)
    assert torch.equal(Adapter(other).images(PROTOCOL, range(4)), images)
    assert len(other.denoiser._forward_hooks) == 1
    assert torch.equal(Adapter(pipe).images(PROTOCOL, range(4)), images)


def test_corrections_taken_away_leave_the_pipeline_as_it_was() -> None:
    pipe = corrected_pipeline()
    statistics = statistics_of(pipe.denoiser)
    assert statistics is not None
    corrected_(pipe.denoiser, pipe.scheduler, statistics, None)
    plain = Adapter(pipe).images(PROTOCOL, range(4))
    follow_(pipe.denoiser, pipe.scheduler, [])
    assert untouched(pipe.denoiser, pipe.scheduler) and statistics_of(pipe.denoiser) is None
    assert torch.equal(Adapter(pipe).images(PROTOCOL, range(4)), plain)


def test_two_samplings_give_the_same() -> None:
    pipe = corrected_pipeline()
    first = Adapter(pipe).images(PROTOCOL, range(4))
    with pytest.raises(AquabitError):
        Adapter(pipe).images(Protocol(images=4, steps=4, micro_batch=4), range(4))
    assert torch.equal(Adapter(pipe).images(PROTOCOL, range(4)), first)


def test_the_denoiser_alone_is_not_corrected_outside_of_sampling() -> None:
    denoiser, scheduler, x = Given(lambda x, t: x), DDIM.made(3), torch.ones(1, 2, 2, 2)
    follow_(denoiser, scheduler, [Corrector(known(scheduler, bias=1.0), "bc")])
    for _ in range(3):
        assert torch.equal(denoiser(x, 0), x)
    assert not torch.equal(run(denoiser, scheduler), run(Given(lambda x, t: x), DDIM.made(3)))
    for _ in range(3):
        assert torch.equal(denoiser(x, 0), x)


def test_timesteps_that_were_set_before_are_no_silence() -> None:
    scheduler = diffusers.DDIMScheduler(**OPEN)
    scheduler.set_timesteps(3)
    denoiser, x = Given(lambda x, t: x), torch.ones(1, 2, 2, 2)
    follow_(denoiser, scheduler, [Corrector(known(scheduler, bias=1.0), "bc")])
    with pytest.raises(AquabitError, match="timesteps were set before"):
        scheduler.step(denoiser(x, 0), scheduler.timesteps[0], x)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DDIMScheduler", [0, 1, 2, 3]),
        ("EulerAncestralDiscreteScheduler", [0, 1, 2, 3]),
        ("PNDMScheduler", [0, 1, 1, 2, 3]),  # one step twice
        ("HeunDiscreteScheduler", [0, 1, 1, 2, 2, 3, 3]),
        ("KDPM2DiscreteScheduler", [0, 0, 1, 1, 2, 2, 3]),  # between two steps
        ("FlowMatchHeunDiscreteScheduler", [0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_steps_are_those_that_were_asked_for(name: str, expected: list[int]) -> None:
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name)(**more)
    scheduler.set_timesteps(4)
    assert steps_of(scheduler) == expected


def test_without_a_scheduler_every_call_is_a_step() -> None:
    denoiser, log = nn.Linear(2, 2), Log()
    with following(denoiser, None, [log]):
        for _ in range(3):
            denoiser(torch.zeros(1, 2))
    assert [seen[1] for seen in log.seen if seen[0] == "before"] == [0, 1, 2]
    log.needs_steps = True  # type: ignore[misc]
    with pytest.raises(AquabitError, match="this pipeline has none"), following(denoiser, None, [log]):
        pass


@pytest.mark.parametrize("held", ["list", "tuple", "output"])
def test_outputs_may_be_lists_of_samples(held: str) -> None:
    class Lists(nn.Module):
        def forward(self, x: list[Tensor]) -> Any:
            made = [2 * row for row in x]
            return {"list": made, "tuple": (made, 1), "output": Transformer2DModelOutput(sample=made)}[held]  # type: ignore[arg-type]

    class Adds(Watcher):
        def output(self, step: int, call: int, output: Tensor) -> Tensor:
            assert output.shape == (3, 4, 1, 2)
            return output + 1

    denoiser, rows = Lists(), list(torch.randn(3, 4, 1, 2))
    with following(denoiser, None, [Adds()]):
        result = denoiser(rows)
    found = result if held == "list" else result[0]
    assert all(torch.equal(a, 2 * b + 1) for a, b in zip(found, rows, strict=True))
