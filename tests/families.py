"""Published denoiser configs, as plain dicts: (diffusers class, config, number of Linear and Conv2d
layers)."""

from __future__ import annotations

from typing import Any

Family = tuple[str, dict[str, Any], int]
_CROSS = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]

DIT_XL_2: Family = (  # facebook/DiT-XL-2-256
    "DiTTransformer2DModel",
    {
        "sample_size": 32,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
    },
    255,
)
SD_1_5: Family = (  # stable-diffusion-v1-5
    "UNet2DConditionModel",
    {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": _CROSS,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    282,
)
SDXL: Family = (  # stabilityai/stable-diffusion-xl-base-1.0
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    794,
)
_PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "interpolation_scale": 2,
}
PIXART_SIGMA: Family = (
    "PixArtTransformer2DModel",
    {**_PIXART, "use_additional_conditions": False},
    287,
)  # PixArt-Sigma-XL-2-1024-MS
PIXART_ALPHA: Family = (
    "PixArtTransformer2DModel",
    _PIXART,
    291,
)  # PixArt-XL-2-1024-MS: resolution and aspect ratio embedders too
_SD3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD3_MEDIUM: Family = ("SD3Transformer2DModel", _SD3, 341)  # stabilityai/stable-diffusion-3-medium: 24 blocks
SD3_DEFAULT: Family = ("SD3Transformer2DModel", {}, 257)  # diffusers' defaults: 18 blocks
# stabilityai/stable-diffusion-3.5-medium: a second, image-only attention in 13 blocks
SD3_5_MEDIUM: Family = (
    "SD3Transformer2DModel",
    {**_SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
    393,
)
FLUX_DEV: Family = (  # black-forest-labs/FLUX.1-dev
    "FluxTransformer2DModel",
    {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    504,
)
HUNYUAN: Family = (  # Tencent-Hunyuan/HunyuanDiT-Diffusers
    "HunyuanDiT2DModel",
    {
        "sample_size": 128,
        "in_channels": 4,
        "patch_size": 2,
        "num_layers": 40,
        "num_attention_heads": 16,
        "attention_head_dim": 88,
        "hidden_size": 1408,
        "mlp_ratio": 4.3637,
        "cross_attention_dim": 1024,
        "cross_attention_dim_t5": 2048,
        "text_len": 77,
        "text_len_t5": 256,
        "pooled_projection_dim": 1024,
        "activation_fn": "gelu-approximate",
    },
    472,
)
LDM_4: Family = (  # CompVis/latent-diffusion, cin256-v2: LDM-4 on ImageNet
    "UNet2DConditionModel",
    {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [192, 384, 576, 960],
        "layers_per_block": 2,
        "cross_attention_dim": 512,
        "attention_head_dim": 1,
        "down_block_types": [
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    283,
)
DIGITS_DIT: Family = (
    "DiTTransformer2DModel",
    {
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 6,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_elementwise_affine": False,
    },
    57,
)
DIGITS_UNET: Family = (
    "UNet2DModel",
    {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [64, 128],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": 11,
        "attention_head_dim": 32,
        "norm_num_groups": 16,
    },
    51,
)

FAMILIES: dict[str, Family] = {
    "dit-xl-2": DIT_XL_2,
    "sd-1.5": SD_1_5,
    "sdxl": SDXL,
    "pixart-sigma": PIXART_SIGMA,
    "pixart-alpha": PIXART_ALPHA,
    "sd3-medium": SD3_MEDIUM,
    "sd3-default": SD3_DEFAULT,
    "sd3.5-medium": SD3_5_MEDIUM,
    "flux-dev": FLUX_DEV,
    "hunyuan": HUNYUAN,
    "ldm-4": LDM_4,
    "digits-dit": DIGITS_DIT,
    "digits-unet": DIGITS_UNET,
}

_SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
TINY: dict[str, tuple[str, dict[str, Any]]] = {  # small enough to run on real numbers
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "cross_attention_dim": 24,
            "attention_head_dim": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 4,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
    ),
    "digits-unet": DIGITS_UNET[:2],
    "dit": ("DiTTransformer2DModel", {**_SMALL, "sample_size": 8, "num_embeds_ada_norm": 10}),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_SMALL,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 24,
            "use_additional_conditions": False,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_SMALL,
            "sample_size": 8,
            "joint_attention_dim": 24,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 8,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            **_SMALL,
            "num_single_layers": 1,
            "in_channels": 4,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "guidance_embeds": True,
            "axes_dims_rope": [2, 2, 4],
        },
    ),
}
