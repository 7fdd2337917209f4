"""Following a pipeline's sampler: which step runs, what the denoiser returns in it, and what the scheduler
makes of that."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from aquabit.parts import Parts
from aquabit.quant.calibration.recording import output_tensor, with_output
from aquabit.scheme import AquabitError

FOLLOWED = "_aquabit_sampling"  # the attribute of a denoiser that holds what follows it for good


class Watcher:
    """What takes part in sampling. Every method does nothing unless it is replaced. ``needs_steps``: it does
    not take part where there is no scheduler to follow."""

    needs_steps = False

    def begin(self, scheduler: Any) -> None:
        """The scheduler's timesteps were set: an image, or a batch of them, begins."""

    def before(self, step: int) -> None:
        """The denoiser is about to run in ``step`` (from 0)."""

    def output(self, step: int, call: int, output: Tensor) -> Tensor:
        """The denoiser's raw output of its ``call``-th call (from 0) in ``step``, or what is to replace
        it."""
        return output

    def advance(self, step: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's step; ``run`` is the one to call, with its own arguments (model_output,
        timestep, sample, ...)."""
        return run(*args, **kwargs)


def steps_of(scheduler: Any) -> list[int]:
    """The step (from 0) that each timestep of a scheduler belongs to.

    Samplers of higher order have more timesteps than steps were asked for: PNDM repeats the second, Heun all
    but the first; those that are equal are one step. Others stand between two steps, which share them evenly.
    """
    times = [float(t) for t in scheduler.timesteps]
    asked = int(getattr(scheduler, "num_inference_steps", None) or len(times))
    distinct = list(accumulate((a != b for a, b in pairwise(times)), initial=0))
    if len(times) > asked and distinct[-1] + 1 == asked:
        return distinct
    return (
        [k * asked // len(times) for k in range(len(times))]
        if len(times) > asked
        else list(range(len(times)))
    )


TIME_INPUTS = ("timestep", "timesteps", "t")  # what denoisers of diffusers call the time of a call


def first_place(scheduler: Any, denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Which of a scheduler's timesteps a pipeline begins with, by the inputs of the denoiser's first call:
    the one that it told the scheduler, or, of those that are told nothing, that of the call; else 0."""
    if hasattr(scheduler, "begin_index"):
        return int(scheduler.begin_index or 0)
    if isinstance(denoiser, Parts):
        denoiser, args = denoiser.get_submodule(args[0]), args[1:]
    names = inspect.signature(denoiser.forward).parameters
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    value = next((given[name] for name in TIME_INPUTS if name in given), None)
    if not hasattr(scheduler, "config") or not isinstance(value, Tensor | int | float):
        return 0
    time, times = float(torch.as_tensor(value).flatten()[0]), [float(t) for t in scheduler.timesteps]
    return times.index(time) if time in times else 0


class Sampling:
    """Tells watchers about the sampling of one pipeline: ``attach`` to its scheduler and denoiser, ``detach``
    from both.

    Steps are those that were asked for, as ``steps_of`` counts the calls of the scheduler's ``step`` since
    its ``set_timesteps``; without a scheduler every call of the denoiser is one. A pipeline that begins with
    a later step, from an image that is partly noise, makes none of those before. Watchers see the denoiser's
    output in order, and wrap the scheduler's step so that the first is the outermost.
    """

    def __init__(self, watchers: Sequence[Watcher]):
        self.watchers, self.calls = list(watchers), 0
        self._count = 0  # of the scheduler's steps; of the denoiser's calls where there is no scheduler
        self._places: list[int] = []  # the step that each of them belongs to
        self._handles: list[Any] = []
        self._scheduler: Any = None
        self.paused = False  # ``refollow_`` is to wait

    @property
    def step(self) -> int:
        """The step that runs, from 0; beyond the last one after it."""
        if self._count < len(self._places):
            return self._places[self._count]
        return self._count - len(self._places) + (self._places[-1] + 1 if self._places else 0)

    def attach(self, denoiser: nn.Module, scheduler: Any) -> None:
        if scheduler is None and any(watcher.needs_steps for watcher in self.watchers):
            raise AquabitError("what changes between steps follows a scheduler, and this pipeline has none")
        self.detach()
        self._count = self.calls = 0
        self._places = []
        self._handles = [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after),
        ]
        self._scheduler = scheduler
        if scheduler is None:
            return
        for name, run in (("set_timesteps", self._set_timesteps), ("step", self._advance)):
            setattr(scheduler, name, _Followed(run, getattr(scheduler, name), vars(scheduler).get(name)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in ("set_timesteps", "step"):
            now = vars(self._scheduler).get(name) if self._scheduler is not None else None
            # who attached later and is still there
            while isinstance(now, _Followed) and now.run.__self__ is not self:
                now = now.before
            if isinstance(now, _Followed):
                now.leave(self._scheduler, name)
        self._scheduler = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._places and not self._count and not self.calls:
            self._count = first_place(self._scheduler, module, args, kwargs)
        for watcher in self.watchers:
            watcher.before(self.step)

    def _after(self, module: nn.Module, args: Any, result: Any) -> Any:
        """The denoiser's result with the tensor in it passed through all watchers."""
        first = seen = output_tensor(result)
        for watcher in self.watchers:
            seen = watcher.output(self.step, self.calls, seen)
        self.calls += 1
        if self._scheduler is None:
            self._count, self.calls = self._count + 1, 0
        return None if seen is first else with_output(result, seen)

    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        self._count = self.calls = 0
        self._places = steps_of(self._scheduler)
        for watcher in self.watchers:
            watcher.begin(self._scheduler)
        return found

    def _advance(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def through(watcher: Watcher, run: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: watcher.advance(self.step, run, *args, **kwargs)

        run = original
        for watcher in reversed(self.watchers):
            run = through(watcher, run)
        found = run(*args, **kwargs)
        self._count, self.calls = self._count + 1, 0
        return found


class _Followed:
    """A scheduler's method while it is followed: ``run`` gets the ``original`` one and its arguments.

    An object and no closure, so that a deep copy of a pipeline follows the copied scheduler, not the one that
    it was copied from. A scheduler that is copied alone is followed by nobody: pipelines do that for what
    they sample beside images, as LTX-2 for its sound. ``before`` is what the scheduler had as an attribute of
    its own: another's, or None where that is the class's method.
    """

    def __init__(self, run: Any, original: Callable[..., Any], before: Any):
        update_wrapper(self, original, updated=())  # pipelines read the signature
        self.run, self.original, self.before = run, original, before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not any(isinstance(made, nn.Module | DiffusionPipeline) for made in memo.values()):
            return copy.deepcopy(self.original, memo)
        made = memo[id(self)] = object.__new__(_Followed)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.original, *args, **kwargs)

    def leave(self, scheduler: Any, name: str) -> None:
        """Leave the scheduler as it was before, or to those who attached since."""
        later = vars(scheduler)[name]
        if later is not self:
            while later.before is not self:
                later = later.before
            later.original, later.before = self.original, self.before
        elif self.before is None:
            delattr(scheduler, name)  # the class's own is seen again
        else:
            setattr(scheduler, name, self.before)


@contextmanager
def following(denoiser: nn.Module, scheduler: Any, watchers: Sequence[Watcher]) -> Iterator[Sampling | None]:
    """Watchers take part in sampling for a while; nothing is touched where there are none."""
    if not watchers:
        yield None
        return
    sampling = Sampling(watchers)
    sampling.attach(denoiser, scheduler)
    try:
        yield sampling
    finally:
        sampling.detach()


def follow_(denoiser: nn.Module, scheduler: Any, watchers: Sequence[Watcher]) -> None:
    """Watchers take part in sampling for good, instead of those that did; ``refollow_`` after the
    scheduler was replaced, or where there was none yet (None)."""
    found: Sampling | None = getattr(denoiser, FOLLOWED, None)
    if found is not None:
        found.detach()
    sampling = Sampling(watchers)
    object.__setattr__(denoiser, FOLLOWED, sampling)  # no module or parameter of it
    if watchers and scheduler is not None:
        sampling.attach(denoiser, scheduler)


def unfollow_parts_(network: Parts) -> list[Watcher]:
    """What followed the parts of a network for good, each on its own; it does not any more."""
    found = list[Watcher]()
    for part in network.children():
        found += watchers_of(part)
        follow_(part, None, [])
    return found


@contextmanager
def unfollowed(denoiser: nn.Module) -> Iterator[None]:
    """Nothing follows a denoiser for a while: its calls are no sampling (they are timed, say)."""
    found: Sampling | None = getattr(denoiser, FOLLOWED, None)
    if found is None or found.paused:
        yield
        return
    scheduler = found._scheduler
    found.detach()
    found.paused = True
    try:
        yield
    finally:
        found.paused = False
        if scheduler is not None:
            found.attach(denoiser, scheduler)


def refollow_(denoiser: nn.Module, scheduler: Any) -> None:
    """Attach what follows a denoiser for good to its new scheduler."""
    found: Sampling | None = getattr(denoiser, FOLLOWED, None)
    if found is not None and found.watchers and not found.paused and found._scheduler is not scheduler:
        found.attach(denoiser, scheduler)


def watchers_of(denoiser: nn.Module) -> list[Watcher]:
    """What follows a denoiser for good."""
    found: Sampling | None = getattr(denoiser, FOLLOWED, None)
    return [] if found is None else found.watchers
