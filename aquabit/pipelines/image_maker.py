"""ImageMaker: what aquabit asks of whatever makes images with a denoiser, a pipeline or a model of the
user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from aquabit.quality import Source
from aquabit.quant.calibration.recording import Call
from aquabit.scheme import Protocol as Measuring


class ImageMaker(Protocol):
    """Makes images [n, c, h, w] float32 in [0, 1]: image i from its own seed, so that it depends on no other
    image. ``Adapter`` does it for diffusers pipelines, ``OwnAdapter`` for ``own_model.Model``."""

    pipe: Any
    makes_images: bool  # and no other numbers
    makes_videos: bool  # a sample is a video, each frame of it an image
    kind: Any  # "class_labels", "prompt", or "batch_size" where images are made from nothing

    @property
    def network(self) -> nn.Module: ...

    def conditions(self, protocol: Measuring) -> list[Any]:
        """One condition an image."""

    def check(self, protocol: Measuring) -> None:
        """Raise AquabitError where what the protocol asks for would be ignored."""

    def check_taken(self, protocol: Measuring) -> None:
        """The same as far as it is told without running anything."""

    def batches(self, protocol: Measuring) -> list[range]:
        """The indices of each micro-batch."""

    def alone(self, protocol: Measuring) -> bool:
        """Whether a call makes one sample, whatever the micro-batch."""

    def first_step(self, protocol: Measuring) -> int:
        """The first of the protocol's steps that runs."""

    def calls(self, protocol: Measuring) -> int:
        """Steps of the sampler that all of a protocol's images take, each of a micro-batch."""

    def images(self, protocol: Measuring, indices: range, gradients: bool = False) -> Tensor:
        """The images of some indices as one micro-batch; with ``gradients`` they pass to the denoiser."""

    def first_inputs(self, protocol: Measuring) -> Call:
        """Inputs of the first denoiser call of the first micro-batch; no image is finished."""

    def first_call(self, protocol: Measuring) -> Callable[[], object]:
        """That call, to be made again; of several networks the first of each."""

    def step_call(self, protocol: Measuring) -> Callable[[], object]:
        """The first call of what runs in every step of the sampler, whatever is quantized, to be made
        again."""

    def reference(self) -> Source | None:
        """Feature extractor and statistics of the real images that belong to the model; None where it names
        no such set."""


class Reached(BaseException):
    """The denoiser was reached; no Exception, which a sampler of the user's may catch."""


def first_inputs(denoiser: nn.Module, run: Callable[[], object]) -> Call | None:
    """Inputs of the first call of a denoiser that ``run`` makes, which is stopped there; None where it makes
    none."""
    found: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise Reached

    handle = denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Reached:
        pass
    finally:
        handle.remove()
    return found[0] if found else None
