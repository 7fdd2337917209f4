"""The bundled denoisers before training, and with which settings each is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from zoo.data import DATA

WARM_UP = 200  # steps

DIGITS_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
}
# Noise to where no mean of an image shows (alpha of 2.5e-5 at the end), and a last step of ten from little
# noise (sigma 0.18, where a linear schedule has 0.32).
FASHION_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 1e-4,
    "beta_end": 0.03,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Recipe:
    """``horizon`` is the length of a cosine of the rate, in steps (None: the rate is constant); either ends
    in a linear ``cooldown`` to zero over the last of ``steps``. ``min_snr`` caps the weight of a timestep
    (Min-SNR, arXiv 2303.09556); ``muon`` has Muon turn the hidden matrices, AdamW the rest; ``bfloat16``
    multiplies in bfloat16."""

    data: str
    scheduler: Mapping[str, Any]
    rate: float
    steps: int
    cooldown: int
    batch: int = 128
    horizon: int | None = None
    min_snr: float | None = None
    muon: bool = False
    bfloat16: bool = False

    @property
    def digest(self) -> str:
        """Of what may not change while a training goes on: all but its length."""
        fixed = {k: v for k, v in asdict(self).items() if k not in ("steps", "cooldown")}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]

    def rate_at(self, step: int) -> float:
        """Linear warm-up, a cosine or a constant, and the linear cooldown."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.horizon)) if self.horizon else 1.0
        cooldown = min(1.0, max(0, self.steps - step) / max(1, self.cooldown))
        return self.rate * min(1.0, (step + 1) / WARM_UP) * cosine * cooldown


RECIPES: Mapping[str, Recipe] = {
    "digits-unet": Recipe("digits", DIGITS_SCHEDULE, 6e-4, 2600, 800, horizon=4200),
    "digits-dit": Recipe("digits", DIGITS_SCHEDULE, 5e-4, 3000, 800, horizon=6000),
    "fashion-unet": Recipe(
        "fashion", FASHION_SCHEDULE, 8e-4, 80_000, 16_000, batch=32, min_snr=5.0, bfloat16=True
    ),
    "fashion-dit": Recipe(
        "fashion", FASHION_SCHEDULE, 1.5e-3, 40_000, 8000, batch=64, min_snr=5.0, bfloat16=True, muon=True
    ),
    "emoji-dit": Recipe("emoji", FASHION_SCHEDULE, 1.5e-3, 20_000, 4000, batch=32, min_snr=5.0, muon=True),
}


def build(name: str) -> nn.Module:
    """The untrained denoiser, from seed 0; its class embedding drops nothing, since training does."""
    torch.manual_seed(0)
    return _BUILT[name]()


def _digits_unet() -> nn.Module:
    """51 layers of 2.8 M weights."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=DATA["digits"].classes + 1,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def _fashion_unet() -> nn.Module:
    """91 layers of 6.3 M weights, attention at 8 x 8 and 4 x 4."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48, 96, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=DATA["fashion"].classes + 1,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def _dit(data: str, heads: int, blocks: int, patch: int) -> nn.Module:
    channels, size, _ = DATA[data].shape
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=blocks,
        sample_size=size,
        patch_size=patch,
        num_embeds_ada_norm=DATA[data].classes,
        norm_elementwise_affine=False,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)  # adaLN-Zero (DiT, section 3.2): blocks start as identity
        nn.init.zeros_(block.norm1.linear.bias)
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for head in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return model


_BUILT: Mapping[str, Callable[[], nn.Module]] = {
    "digits-unet": _digits_unet,
    "digits-dit": lambda: _dit("digits", heads=6, blocks=6, patch=2),  # 57 layers of 4.6 M weights
    "fashion-unet": _fashion_unet,
    "fashion-dit": lambda: _dit("fashion", heads=5, blocks=11, patch=4),  # 102 layers of 5.9 M weights
    "emoji-dit": lambda: _dit("emoji", heads=4, blocks=8, patch=4),  # 75 layers of 2.8 M weights
}
