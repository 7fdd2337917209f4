"""ClassConditionalPipeline: a pixel-space denoiser with class labels, for which diffusers has no pipeline
of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Images [n, c, h, w] in [0, 1] from class labels; the label after the last class stands for "no
    condition"."""

    def __init__(self, denoiser: Any, scheduler: Any, classes: int = 10, real_images: str = ""):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(classes=classes, real_images=real_images)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        generator: Any = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image a label; ``generator`` is one per image (or one for all). ``output_type`` is pil, np
        or pt."""
        x = sample_classes(
            self,
            self.denoiser,
            class_labels,
            lambda labels: {"class_labels": labels},
            num_inference_steps,
            guidance_scale,
            generator,
            eta,
        )
        return images_output(x, output_type, return_dict)


def sample_classes(
    pipe: Any,
    net: Any,
    class_labels: Sequence[int],
    conditions: Callable[[Tensor], dict[str, Any]],
    steps: int,
    guidance_scale: float,
    generator: Any,
    eta: float,
) -> Tensor:
    """What ``net`` makes of noise for class labels, one sample a label; ``conditions`` are the arguments that
    it takes for labels. With guidance the label after the last class is run beside each."""
    n, device, size = len(class_labels), pipe._execution_device, net.config.sample_size
    x = randn_tensor((n, net.config.in_channels, size, size), generator, device, net.dtype)
    labels, guided = torch.as_tensor(list(class_labels), device=device), guidance_scale != 1.0
    labels = torch.cat([labels, torch.full_like(labels, pipe.config.classes)]) if guided else labels
    given = conditions(labels)
    pipe.scheduler.set_timesteps(steps, device=device)
    x = x * pipe.scheduler.init_noise_sigma
    extra = step_arguments(pipe.scheduler, generator, eta)
    for t in pipe.progress_bar(pipe.scheduler.timesteps):
        scaled = pipe.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        noise = net(scaled, timestep=t.expand(len(labels)), **given).sample[:, : x.shape[1]]
        if guided:
            conditional, unconditional = noise.chunk(2)
            noise = unconditional + guidance_scale * (conditional - unconditional)
        x = pipe.scheduler.step(noise, t, x, **extra).prev_sample
    return x


def step_arguments(scheduler: Any, generator: Any, eta: float) -> dict[str, Any]:
    """Those of ``generator`` and ``eta`` that a scheduler's step takes."""
    known = inspect.signature(scheduler.step).parameters
    return {k: v for k, v in (("generator", generator), ("eta", eta)) if k in known}


def images_output(x: Tensor, output_type: str, return_dict: bool) -> Any:
    """A pipeline's output from images in [-1, 1]; what is not finite is NaN, which clamping would hide."""
    x = torch.where(torch.isfinite(x), x / 2 + 0.5, torch.nan).clamp(0, 1).float()
    images: Any = x.cpu() if output_type == "pt" else x.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "pil":
        images = DiffusionPipeline.numpy_to_pil(images)
    return ImagePipelineOutput(images=images) if return_dict else (images,)
