"""Full precision must be sound before anything is compared with it: images that are checked, and where they
first break."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aquabit.pipelines.family import scheduler_of
from aquabit.pipelines.image_maker import ImageMaker
from aquabit.pipelines.network import denoiser_of
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.scheme import AquabitError
from aquabit.scheme import Protocol as Settings

ADVICE = {torch.float16: "use --dtype bfloat16 or float32", torch.bfloat16: "use --dtype float32"}
DAMAGED = "the model's files may be damaged, or of another pipeline"


class NotFinite(AquabitError):
    """Something that full precision computes is NaN or infinite."""


class _Steps(Watcher):
    """Knows the step of the sampler."""

    step = 0

    def before(self, step: int) -> None:
        self.step = step


def finite_images(adapter: ImageMaker, protocol: Settings, indices: range) -> Tensor:
    """``adapter.images`` of a denoiser in full precision. Raises AquabitError, naming the dtype, the sampling
    step and the layer, where what the denoiser returns, or an image, is NaN or infinite."""
    try:
        return checked_images(adapter, protocol, indices)
    except NotFinite:
        raise broken(adapter, protocol, indices) from None


def checked_images(
    adapter: ImageMaker, protocol: Settings, indices: range, gradients: bool = False
) -> Tensor:
    """``adapter.images``; raises NotFinite at the first output of the denoiser that is NaN or infinite, and
    for such images. ``broken`` then says where."""

    def check(*given: Any) -> None:
        if not _finite(given[-1]):
            raise NotFinite("the denoiser's output is not finite")

    handle = adapter.network.register_forward_hook(check)
    try:
        images = adapter.images(protocol, indices, gradients=gradients)
    finally:
        handle.remove()
    if not _finite(images):
        raise NotFinite("the images are not finite")
    return images


def broken(adapter: ImageMaker, protocol: Settings, indices: range) -> AquabitError:
    """What to say of images that are not finite: they are made again, and every layer is looked at."""
    pipe, denoiser, steps, found = adapter.pipe, denoiser_of(adapter.pipe), _Steps(), list[str]()
    components: Mapping[str, Any] = getattr(pipe, "components", {"denoiser": denoiser})

    def look(name: str, values: Sequence[tuple[str, Any]], masks: bool = False) -> None:
        for what, value in values:
            every = (t.clamp_min(0) if masks else t for t in _tensors(value))  # masks are -inf
            bad = next((t for t in every if not bool(torch.isfinite(t).all())), None)
            if bad is not None:
                dtype = str(bad.dtype).removeprefix("torch.")
                found.append(
                    f"full precision is broken: in {dtype}, {what} of {name} is not finite in sampling step"
                    f" {steps.step + 1} of {protocol.steps}; {ADVICE.get(bad.dtype, DAMAGED)}"
                )
                raise NotFinite(found[0])

    try:
        with ExitStack() as stack:
            if scheduler_of(pipe) is not None:
                stack.enter_context(following(adapter.network, scheduler_of(pipe), [steps]))
            for part, module in components.items():
                if isinstance(module, nn.Module):
                    stack.enter_context(_looking(module, "" if module is denoiser else part, look))
            look(f"the pipeline {type(pipe).__name__}", [("an image", adapter.images(protocol, indices))])
    except NotFinite:
        return AquabitError(found[0])
    return AquabitError(
        "full precision is broken: images were not finite once and finite when they were made again; the"
        " memory or the device may be at fault"
    )


@contextmanager
def _looking(module: nn.Module, part: str, look: Callable[..., None]) -> Iterator[None]:
    """For a while ``look`` sees what a component takes, and each output of its layers, innermost
    first."""
    handles = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = [(f"input {i}", value) for i, value in enumerate(args)]
        named += [(f"the input {k}", value) for k, value in kwargs.items()]
        look(f"the {part or 'denoiser'}", named, masks=True)

    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    for name, layer in module.named_modules():
        where = f"layer {name!r}{f' of {part}' if part else ''}" if name else f"the {part or 'denoiser'}"

        def after(_: nn.Module, __: Any, output: Any, where: str = where) -> None:
            look(where, [("the output", output)])

        handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a network takes or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
