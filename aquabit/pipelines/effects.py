"""Whether what a protocol asks for changes what a pipeline does: told by the denoiser's calls of one sample,
not by the names of arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any
from typing import Protocol as Interface
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from aquabit.pipelines.family import scheduler_of
from aquabit.pipelines.image_maker import Reached, first_inputs
from aquabit.pipelines.network import denoiser_of, network_of
from aquabit.scheme import AquabitError, Protocol


class Run(Interface):
    """Makes the samples of a protocol with some indices."""

    def __call__(self, protocol: Protocol, indices: range) -> Any: ...


# a pipeline's answers, by what was asked
_TOLD: WeakKeyDictionary[DiffusionPipeline, dict[tuple[str, Any], bool]] = WeakKeyDictionary()


def check_effects(pipe: DiffusionPipeline, run: Run, protocol: Protocol) -> None:
    """Raise AquabitError where guidance, the resolution or the number of frames that a protocol asks for
    would change nothing.

    Each question is asked once a pipeline. Guidance acts where the first denoiser call is another than
    without it, or what the scheduler is given after the first step, or the sample itself; a size acts where
    the inputs of the first denoiser call have another than at twice the size.
    """
    told, name = _TOLD.setdefault(pipe, {}), type(pipe).__name__
    one = replace(protocol, images=1, micro_batch=1)

    def acts(what: str, value: Any, ask: Callable[[], bool]) -> bool:
        key = what, (value, protocol.resolution, protocol.frames)
        if key not in told:
            with _alone(pipe):
                told[key] = ask()
        return told[key]

    if protocol.guidance != 1.0 and not acts("guidance", protocol.guidance, partial(_guided, pipe, run, one)):
        raise AquabitError(
            f"guidance is {protocol.guidance:g}, but it changes nothing of what this {name} makes: it has no"
            " guidance there; use 1"
        )
    for what, value in (("resolution", protocol.resolution), ("frames", protocol.frames)):
        if value is not None and not acts(what, value, partial(_resized, pipe, run, one, what)):
            raise AquabitError(
                f"{what} is {value}, but the denoiser of this {name} works at the same size whatever is asked"
                f" for; leave --{what} out"
            )


def _guided(pipe: DiffusionPipeline, run: Run, protocol: Protocol) -> bool:
    net = denoiser_of(pipe)
    asked, plain = (partial(run, p, range(1)) for p in (protocol, replace(protocol, guidance=1.0)))
    return (
        not _same(first_inputs(net, asked), first_inputs(net, plain))
        or not _same(_first_step(pipe, asked), _first_step(pipe, plain))
        or not _same(asked(), plain())
    )


def _resized(pipe: DiffusionPipeline, run: Run, protocol: Protocol, what: str) -> bool:
    """Whether the denoiser's inputs have another size at twice the size (at half of it where twice as much
    is refused)."""
    own = getattr(protocol, what)
    here = first_inputs(denoiser_of(pipe), partial(run, protocol, range(1)))
    for other in (2 * own, max(1, own // 2)):
        with suppress(AquabitError):
            there = first_inputs(
                denoiser_of(pipe), partial(run, replace(protocol, **{what: other}), range(1))
            )
            return _shapes(here) != _shapes(there)
    return True


def _first_step(pipe: DiffusionPipeline, run: Callable[[], Any]) -> Any:
    """What the scheduler is given for its first step; what ``run`` makes where there is none."""
    scheduler, found = scheduler_of(pipe), list[Any]()
    if scheduler is None:
        return run()

    def stop(*args: Any, **kwargs: Any) -> Any:
        found.append((args, kwargs))
        raise Reached

    scheduler.step = update_wrapper(stop, scheduler.step, updated=())  # pipelines read its signature
    try:
        return run()
    except Reached:
        return found[0]
    finally:
        del scheduler.step


def _leaves(value: Any) -> Iterator[Tensor | int | float]:
    """Tensors and numbers, in order; generators and other objects do not count."""
    if isinstance(value, Tensor | bool | int | float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)


def _shapes(value: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _same(a: Any, b: Any) -> bool:
    """Whether two calls are equal in every number."""
    mine, theirs = list(_leaves(a)), list(_leaves(b))
    if _shapes(a) != _shapes(b) or len(mine) != len(theirs):
        return False
    return all(
        torch.equal(x, y)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else type(x) is type(y) and x == y
        for x, y in zip(mine, theirs, strict=True)
    )


@contextmanager
def _alone(pipe: DiffusionPipeline) -> Iterator[None]:
    """Nothing sees the pipeline for a while: no hook of its denoiser's modules, and of what is quantized,
    runs, and nothing that follows its scheduler hears of a step."""
    modules, scheduler = {*denoiser_of(pipe).modules(), *network_of(pipe).modules()}, scheduler_of(pipe)
    kept = [(module, name, module.__dict__[name]) for module in modules for name in _HOOKS]
    for module, name, _ in kept:
        module.__dict__[name] = OrderedDict()
    if scheduler is not None:
        pipe.__dict__["scheduler"] = type(scheduler).from_config(scheduler.config)
    try:
        yield
    finally:
        for module, name, hooks in kept:
            module.__dict__[name] = hooks
        if scheduler is not None:
            pipe.__dict__["scheduler"] = scheduler


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
