"""How a pipeline runs while it is measured: images of its own only, decoded one by one, its errors in one
sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from aquabit.pipelines.family import DECODERS
from aquabit.runtime import out_of_memory
from aquabit.scheme import AquabitError, Protocol


@contextmanager
def as_measured(pipe: DiffusionPipeline, protocol: Protocol, first: int) -> Iterator[None]:
    """For a while: no safety checker and no watermark, images decoded one by one, and what a pipeline draws
    without the generators that it was given drawn from the seed of image ``first``.

    Raises AquabitError where memory ends, and for what the pipeline itself refuses.
    """
    with ExitStack() as stack:
        for name in ("safety_checker", "watermark"):  # they replace or change images
            if getattr(pipe, name, None) is not None:
                stack.callback(pipe.__dict__.__setitem__, name, pipe.__dict__[name])
                pipe.__dict__[name] = (
                    _LetsPass() if hasattr(pipe.__dict__[name], "check_video_safety") else None
                )
        if hasattr(guider := getattr(pipe, "guider", None), "guidance_scale"):
            stack.callback(pipe.__dict__.__setitem__, "guider", guider)
            pipe.__dict__["guider"] = guider.new(guidance_scale=protocol.guidance)  # type: ignore[union-attr]
        for name in DECODERS:
            if (
                isinstance(decoder := getattr(pipe, name, None), nn.Module)
                and "decode" not in decoder.__dict__
            ):
                stack.enter_context(_one_by_one(decoder))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(protocol.seed + first)
        stack.enter_context(_said(type(pipe).__name__, protocol))
        yield


class _LetsPass:
    """Stands for a safety checker that a pipeline does not run without (Cosmos): everything passes, as where
    others have none."""

    def to(self, device: Any) -> _LetsPass:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


@contextmanager
def _one_by_one(decoder: Any) -> Iterator[None]:
    """``decoder.decode`` on one image at a time: a batch at full resolution takes more memory than the
    denoiser, and an image then does not depend on its neighbours."""
    whole = decoder.decode

    def decode(latents: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
        if "num_frames" in kwargs:  # rows are frames of one video, which are decoded together
            return whole(latents, *args, **kwargs)
        rows = len(latents)

        def of(value: Any, i: int) -> Any:
            """What an argument is for one image: its row where it has one for each, as timesteps."""
            own = isinstance(value, Tensor) and value.ndim and len(value) == rows
            return value[i : i + 1] if own else value

        parts = []
        for i, row in enumerate(latents.split(1)):
            if generator is None:
                own = {}
            else:
                own = {"generator": generator[i] if isinstance(generator, list) else generator}
            own |= {k: of(v, i) for k, v in kwargs.items()}
            parts.append(whole(row, *(of(a, i) for a in args), **own))
        if isinstance(parts[0], tuple):
            return (torch.cat([part[0] for part in parts]), *parts[0][1:])
        parts[0].sample = torch.cat([part.sample for part in parts])
        return parts[0]

    decoder.decode = decode
    try:
        yield
    finally:
        del decoder.decode


# what says in plain words that a pipeline does not do a thing, or lacks a package that is not installed
_PLAIN = (ValueError, NotImplementedError, ImportError, NameError)


@contextmanager
def _said(name: str, protocol: Protocol) -> Iterator[None]:
    try:
        yield
    except AquabitError:
        raise
    except Exception as error:  # of the pipeline's own code
        if out_of_memory(error):
            raise AquabitError(
                f"out of memory while {name} made {protocol.micro_batch} images at once; lower --micro-batch"
                " or the resolution, use --dtype bfloat16, or load it with offload on a GPU (generate"
                " --offload)"
            ) from error
        if not (isinstance(error, _PLAIN) or type(error) is Exception):
            raise
        raise AquabitError(
            f"{name} does not make these images: {' '.join(str(error).split()).rstrip('.')}"
        ) from error
