"""A denoiser of your own, that diffusers does not know, through the public functions of aquabit.

    python examples/own_model.py --out own

takes a minute or two on a CPU; ``--samples 4 --images 8 --width 8`` make it smaller.

Three things are yours: the network, a ModelMixin around it (so that it can be saved), and a pipeline that
makes images with it. The pipeline's ``__call__`` takes ``generator`` (a list, one for each image) and one of
``batch_size``, ``class_labels`` and ``prompt``: that is how aquabit makes the same images again, whatever the
layers are quantized to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import aquabit


class Network(nn.Module):
    """Your network: noisy images [n, 1, 8, 8] and steps [n] to the noise in them."""

    def __init__(self, width: int):
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        embedded = self.steps(step.to(x.dtype)[:, None] / 1000)[:, :, None, None]
        h = self.first(x)
        for layer in self.middle:
            h = h + layer(nn.functional.silu(h + embedded))
        return self.last(nn.functional.silu(h))


class OwnDenoiser(ModelMixin, ConfigMixin):
    """The network as diffusers saves and loads models. ``sample_size`` is the side of the images [pixels]."""

    @register_to_config
    def __init__(self, width: int = 32, sample_size: int = 8):
        super().__init__()
        self.network = Network(width)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.network(sample, timestep)


class OwnPipeline(DiffusionPipeline):
    """Images [n, 1, 8, 8] from noise. aquabit looks for the network under ``denoiser``, ``transformer`` or
    ``unet``."""

    def __init__(self, denoiser: Any, scheduler: Any):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 10,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        size = self.denoiser.config.sample_size
        x = randn_tensor(
            (batch_size, 1, size, size), generator, torch.device(self.device), self.denoiser.dtype
        )
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoiser(x, t.expand(batch_size)), t, x).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).float().cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)


def own_pipeline(width: int = 32) -> OwnPipeline:
    """Your trained model; here its weights are random, so that nothing must be trained or downloaded."""
    torch.manual_seed(0)
    # by keyword: diffusers takes what is given by position for the default, and forgets it
    return OwnPipeline(OwnDenoiser(width=width).eval(), DDIMScheduler(clip_sample=False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("own"))
    parser.add_argument("--width", type=int, default=32, help="channels of the network")
    parser.add_argument("--samples", type=int, default=40, help="configurations to measure")
    parser.add_argument("--images", type=int, default=32, help="images of a measurement")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--bits", type=float, default=4.0, help="bits per weight of the result")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    pipe = own_pipeline(given.width)
    graph = aquabit.trace(pipe)
    print(f"{graph.graph['model_class']}: {graph.graph['weights']:,} weights in layers")

    # There are no real images here, so quality is the distance to the full-precision images, in decibels.
    protocol = aquabit.Protocol(
        images=given.images, steps=given.steps, micro_batch=given.images, objective="psnr"
    )
    study = aquabit.Study(given.out / "study.db")
    space = {"schemes": ["usq2h", "usq3h", "usq4h", "fp"], "activations": [8]}
    bank = str(given.out / "bank")
    count = aquabit.measure(pipe, study, given.samples, protocol=protocol, space=space, bank=bank)
    print(f"{count} new measurements")

    front = aquabit.find(study, bits=given.bits, pipe=pipe, bank=bank)
    for member in front.to_list():
        print(f"{member['bits_per_weight']:.2f} bits: {member['measured']['psnr']['value']:.1f} dB")

    packed = aquabit.quantize(pipe, front.best, bank=bank)
    print(f"{packed.save(given.out / 'packed'):,} bytes in {given.out / 'packed'}")
    images = packed(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    print(f"images {list(images.shape)} from codes")


if __name__ == "__main__":
    main()
