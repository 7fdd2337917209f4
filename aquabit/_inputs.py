"""Inputs of one denoiser call with one sample at the published size, on the meta device, made from a
configuration; of the families whose pipelines are asked first (``_operators``).

Images have 1024 pixels a side (PRX 512), videos the size and the number of frames that their pipelines make
by default. Texts have the length that a pipeline pads them to, 256 words where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch

Config = Mapping[str, Any]
WORDS = 256  # of a prompt that is not padded
_SIDE = 64  # tokens a side of 1024 pixels, in patches of 16


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _mask(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def _guided(inputs: dict[str, Any], config: Config) -> dict[str, Any]:
    return {**inputs, "guidance": meta(1)} if config.get("guidance_embeds") else inputs


def _flux2(config: Config) -> dict[str, Any]:
    tokens, words = _SIDE**2, 512
    inputs = {
        "hidden_states": meta(1, tokens, config["in_channels"]),
        "encoder_hidden_states": meta(1, words, config["joint_attention_dim"]),
        "timestep": meta(1),
        "img_ids": _mask(1, tokens, 4),
        "txt_ids": _mask(1, words, 4),
    }
    return _guided(inputs, config)


def _qwen(config: Config) -> dict[str, Any]:
    inputs = {
        "hidden_states": meta(1, _SIDE**2, config["in_channels"]),
        "encoder_hidden_states": meta(1, WORDS, config["joint_attention_dim"]),
        "timestep": meta(1),
        "img_shapes": [[(1, _SIDE, _SIDE)]],
    }
    return _guided(inputs, config)


def _z_image(config: Config) -> dict[str, Any]:
    image = meta(config["in_channels"], 1, 2 * _SIDE, 2 * _SIDE)
    return {"x": [image], "t": meta(1), "cap_feats": [meta(WORDS, config["cap_feat_dim"])]}


def _chroma(config: Config) -> dict[str, Any]:
    tokens, words = _SIDE**2, 512
    return {
        "hidden_states": meta(1, tokens, config["in_channels"]),
        "encoder_hidden_states": meta(1, words, config["joint_attention_dim"]),
        "timestep": meta(1),
        "img_ids": meta(tokens, 3),
        "txt_ids": meta(words, 3),
        "attention_mask": meta(1, words + tokens),
    }


def _image(config: Config, side: int = 2 * _SIDE) -> torch.Tensor:
    """Latents of eight pixels."""
    return meta(1, config["in_channels"], side, side)


def _cogview4(config: Config) -> dict[str, Any]:
    sizes = {name: meta(1, 2) for name in ("original_size", "target_size", "crop_coords")}
    text = meta(1, WORDS, config["text_embed_dim"])
    return {"hidden_states": _image(config), "encoder_hidden_states": text, "timestep": meta(1), **sizes}


def _lumina2(config: Config) -> dict[str, Any]:
    return {
        "hidden_states": _image(config),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, config["cap_feat_dim"]),
        "encoder_attention_mask": _mask(1, 256),
    }


def _hidream(config: Config) -> dict[str, Any]:
    t5, llama = config["caption_channels"]
    return {
        "hidden_states": _image(config),
        "timesteps": meta(1),
        "encoder_hidden_states_t5": meta(1, 128, t5),
        "encoder_hidden_states_llama3": meta(max(config["llama_layers"]) + 1, 1, 128, llama),
        "pooled_embeds": meta(1, config["text_emb_dim"]),
    }


def _sana(config: Config) -> dict[str, Any]:
    inputs = {
        "hidden_states": _image(config, config["sample_size"]),
        "encoder_hidden_states": meta(1, 300, config["caption_channels"]),
        "encoder_attention_mask": _mask(1, 300),
        "timestep": meta(1),
    }
    return _guided(inputs, config)


def _prx(config: Config) -> dict[str, Any]:
    return {
        "hidden_states": _image(config, _SIDE),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, config["context_in_dim"]),
        "attention_mask": meta(1, 256, dtype=torch.bool),
    }


def _auraflow(config: Config) -> dict[str, Any]:
    side = min(_SIDE, isqrt(config["pos_embed_max_size"]))  # patches that have a position
    return {
        "hidden_states": _image(config, side * config["patch_size"]),
        "encoder_hidden_states": meta(1, 256, config["joint_attention_dim"]),
        "timestep": meta(1),
    }


def _wan(config: Config) -> dict[str, Any]:
    inputs = {
        "hidden_states": meta(1, config["in_channels"], 21, 60, 104),  # 81 frames of 480 x 832
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 512, config["text_dim"]),
    }
    image = config.get("image_dim")
    return {**inputs, "encoder_hidden_states_image": meta(1, 257, image)} if image else inputs


def _ltx(config: Config) -> dict[str, Any]:
    frames, height, width = 21, 16, 22  # 161 frames of 512 x 704
    return {
        "hidden_states": meta(1, frames * height * width, config["in_channels"]),
        "encoder_hidden_states": meta(1, 128, config["caption_channels"]),
        "timestep": meta(1),
        "encoder_attention_mask": meta(1, 128, dtype=torch.bool),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx2(config: Config) -> dict[str, Any]:
    frames, height, width, sound, words = 16, 16, 24, 126, 1024  # 121 frames of 512 x 768, 5 seconds
    tokens = frames * height * width
    text = [config["caption_channels"]] * 2
    if not config.get("use_prompt_embeddings", True):  # LTX-2.3 projects them before
        text = [config["cross_attention_dim"], config["audio_cross_attention_dim"]]
    return {
        "hidden_states": meta(1, tokens, config["in_channels"]),
        "audio_hidden_states": meta(1, sound, config["audio_in_channels"]),
        "encoder_hidden_states": meta(1, words, text[0]),
        "audio_encoder_hidden_states": meta(1, words, text[1]),
        "timestep": meta(1),
        "sigma": meta(1),
        "encoder_attention_mask": _mask(1, words),
        "audio_encoder_attention_mask": _mask(1, words),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": sound,
        "video_coords": meta(1, 3, tokens, 2),
        "audio_coords": meta(1, 1, sound, 2),
        "use_cross_timestep": True,
    }


def _hunyuan_video(config: Config) -> dict[str, Any]:
    inputs = {
        "hidden_states": meta(1, config["in_channels"], 33, 90, 160),  # 129 frames of 720 x 1280
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, config["text_embed_dim"]),
        "encoder_attention_mask": _mask(1, 256),
        "pooled_projections": meta(1, config["pooled_projection_dim"]),
    }
    return _guided(inputs, config)


def _cogvideox(config: Config) -> dict[str, Any]:
    height, width, p = config["sample_height"], config["sample_width"], config["patch_size"]
    deep = config.get("patch_size_t") or 1
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    frames += -frames % deep  # as its pipeline fills the first patch
    inputs: dict[str, Any] = {
        "hidden_states": meta(1, frames, config["in_channels"], height, width),
        "encoder_hidden_states": meta(1, config["max_text_seq_length"], config["text_embed_dim"]),
        "timestep": meta(1),
    }
    if config.get("use_rotary_positional_embeddings"):
        tokens = frames // deep * (height // p) * (width // p)
        inputs["image_rotary_emb"] = tuple(meta(tokens, config["attention_head_dim"]) for _ in range(2))
    if config.get("ofs_embed_dim"):
        inputs["ofs"] = meta(1)
    return inputs


AT_SIZE: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "Lumina2Transformer2DModel": _lumina2,
    "ChromaTransformer2DModel": _chroma,
    "CogView4Transformer2DModel": _cogview4,
    "HiDreamImageTransformer2DModel": _hidream,
    "SanaTransformer2DModel": _sana,
    "PRXTransformer2DModel": _prx,
    "AuraFlowTransformer2DModel": _auraflow,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "CogVideoXTransformer3DModel": _cogvideox,
}
