"""Tiny denoisers of the classes whose published names are known, wide enough for blocks of 32 weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers as d
import torch
from diffusers.loaders import single_file_model, single_file_utils

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


def unet(**more: Any) -> Any:
    given: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    return d.UNet2DConditionModel(**{**given, **more})


def sdxl() -> Any:
    return unet(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=96,
    )


def sd3(**more: Any) -> Any:
    return d.SD3Transformer2DModel(
        **{**HEADS, "num_layers": 3, **more},
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=more.get("num_attention_heads", 2) * 16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )


def flux(**more: Any) -> Any:
    given: dict[str, Any] = {
        **HEADS,
        "num_layers": 2,
        "num_single_layers": 2,
        "in_channels": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return d.FluxTransformer2DModel(**{**given, **more})


def chroma() -> Any:
    return d.ChromaTransformer2DModel(
        **HEADS,
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=32,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )


def flux2() -> Any:
    return d.Flux2Transformer2DModel(
        **HEADS,
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )


def aura() -> Any:
    return d.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )


def hidream() -> Any:
    return d.HiDreamImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[32, 32],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(128, 128),
        llama_layers=[0, 1],
        force_inference_output=True,
    )


def cosmos() -> Any:
    return d.CosmosTransformer3DModel(
        **HEADS,
        in_channels=5,
        out_channels=4,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=32,
        adaln_lora_dim=32,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    )


def ltx() -> Any:
    return d.LTXVideoTransformer3DModel(
        **HEADS, in_channels=32, out_channels=32, cross_attention_dim=32, num_layers=2, caption_channels=32
    )


def hunyuan_video() -> Any:
    return d.HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8),
    )


WAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}


def wan(**more: Any) -> Any:
    return d.WanTransformer3DModel(**{**WAN, **more})


def lumina2() -> Any:
    return d.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(1024, 512, 512),
        cap_feat_dim=32,
    )


def z_image() -> Any:
    return d.ZImageTransformer2DModel(
        in_channels=4,
        dim=96,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 512, 512],
    )


def qwen_image() -> Any:
    return d.QwenImageTransformer2DModel(
        **HEADS,
        in_channels=32,
        out_channels=8,
        num_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )


def ltx2() -> Any:
    return d.LTX2VideoTransformer3DModel(
        **HEADS,
        in_channels=32,
        out_channels=32,
        cross_attention_dim=32,
        audio_in_channels=32,
        audio_out_channels=32,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
        rope_double_precision=False,
    )


def qwen_image21() -> Any:
    return d.QwenImage21Transformer2DModel(
        **HEADS, in_channels=32, out_channels=32, num_layers=2, context_in_dim=32, axes_dims_rope=(8, 4, 4)
    )


NETWORKS: dict[str, tuple[str, Callable[[], Any]]] = {  # name -> architecture, and how it is made
    "sd15": ("sd1", unet),
    "sdxl": ("sdxl", sdxl),
    "sd3": ("sd3", sd3),
    "sd35": ("sd3", lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm")),
    "flux": ("flux", flux),
    "flux-schnell": ("flux", lambda: flux(guidance_embeds=False)),
    "chroma": ("flux", chroma),
    "flux2": ("flux", flux2),
    "auraflow": ("aura", aura),
    "hidream": ("hidream", hidream),
    "cosmos2": ("cosmos", cosmos),
    "ltx": ("ltxv", ltx),
    "ltx2": ("ltxv", ltx2),
    "hunyuan-video": ("hyvid", hunyuan_video),
    "wan": ("wan", wan),
    "wan-i2v": ("wan", lambda: wan(image_dim=32, added_kv_proj_dim=32)),
    "wan-vace": ("wan", lambda: d.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=4)),
    "skyreels": ("wan", lambda: d.SkyReelsV2Transformer3DModel(**WAN, patch_size=(1, 2, 2))),
    "chronoedit": ("wan", lambda: d.ChronoEditTransformer3DModel(**WAN, patch_size=(1, 2, 2))),
    "lumina2": ("lumina2", lumina2),
    "z-image": ("lumina2", z_image),
    "qwen-image": ("qwen_image", qwen_image),
    "qwen-image21": ("qwen_image", qwen_image21),
}


def made(name: str, seed: int = 0) -> Any:
    """A network with every tensor drawn, so that no two are equal; weights are what 16 bits hold."""
    torch.manual_seed(seed)
    network = NETWORKS[name][1]().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                size = tensor[0].numel() if tensor.dim() > 1 else 4
                tensor.copy_((torch.randn_like(tensor) / size**0.5).half())
    return network.requires_grad_(False)


@contextmanager
def own_sizes(network: Any) -> Any:
    """diffusers' loader, which takes the sizes of published models for granted, with this one's in their
    place."""
    name = type(network).__name__
    known = dict(single_file_model.SINGLE_FILE_LOADABLE_CLASSES)
    held = next(c.__name__ for c in type(network).__mro__ if c.__name__ in known)
    convert = known[held]["checkpoint_mapping_fn"]
    config = network.config
    width = (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0)
    sizes = {"inner_dim = 3072": f"inner_dim = {width}", "hidden_size = 3072": f"hidden_size = {width}"}
    if name == "Lumina2Transformer2DModel":
        heads = config.hidden_size // config.num_attention_heads * config.num_kv_heads
        sizes = {"q_dim = 2304": f"q_dim = {config.hidden_size}", "v_dim = 768": f"v_dim = {heads}"}
    source = inspect.getsource(convert) if convert.__name__ != "<lambda>" else ""
    for old, new in sizes.items():
        source = source.replace(old, new)
    space = dict(vars(single_file_utils))
    if any(new in source for new in sizes.values()):
        exec(source, space)
        convert = space[convert.__name__]
    changed = {**known, held: {**known[held], "checkpoint_mapping_fn": convert}}
    with patch.object(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", changed):
        yield


def loaded(network: Any, source: Any, folder: Path, **more: Any) -> Any:
    """The network as diffusers' ``from_single_file`` makes it of a file or a dict of tensors."""
    network.save_config(folder)
    with own_sizes(network):
        return type(network).from_single_file(source, config=str(folder), **more)
