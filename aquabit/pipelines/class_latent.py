"""ClassLatentPipeline: latent diffusion from class labels by cross-attention, as LDM-4 on ImageNet;
diffusers has no pipeline for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from aquabit.pipelines.class_conditional import images_output, sample_classes


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Class labels [n] to the context [n, 1, width] of cross-attention (LDM, appendix E)."""

    @register_to_config
    def __init__(self, classes: int = 1001, width: int = 512):
        super().__init__()
        self.embedding = nn.Embedding(classes, width)

    def forward(self, labels: Tensor) -> Tensor:
        found: Tensor = self.embedding(labels)[:, None]
        return found


class ClassLatentPipeline(DiffusionPipeline):
    """Images [n, c, h, w] in [0, 1] from class labels; the label after the last class stands for "no
    condition".

    ``unet`` takes the class as its context; ``vqvae`` decodes latents, divided by its ``scaling_factor``.
    """

    def __init__(self, unet: Any, vqvae: Any, class_embedder: Any, scheduler: Any, classes: int = 1000):
        super().__init__()
        self.register_modules(unet=unet, vqvae=vqvae, class_embedder=class_embedder, scheduler=scheduler)
        self.register_to_config(classes=classes)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        generator: Any = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image a label; ``generator`` is one per image (or one for all). ``output_type`` is pil, np
        or pt."""
        x = sample_classes(
            self,
            self.unet,
            class_labels,
            lambda labels: {"encoder_hidden_states": self.class_embedder(labels)},
            num_inference_steps,
            guidance_scale,
            generator,
            eta,
        )
        decoded = self.vqvae.decode(x / self.vqvae.config.scaling_factor).sample
        self.maybe_free_model_hooks()
        return images_output(decoded, output_type, return_dict)
