"""Tiny random pipelines of other classes of diffusers, most of no known family: for the table of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d

from tests import tiny_pipelines as tiny
from tests import tiny_recent as recent
from tests.tiny_pipelines import clip, clip_tokenizer, ddim, t5, t5_tokenizer, unet, vae


def like(name: str, base: Callable[[], Any], **more: Any) -> Callable[[], Any]:
    """The pipeline class ``name`` with the components of another, and others in the place of some."""

    def make() -> Any:
        import inspect

        cls, parts = getattr(d, name), base().components
        wanted = inspect.signature(cls.__init__).parameters
        given = {k: v for k, v in parts.items() if k in wanted}
        given |= {k: v() if callable(v) else v for k, v in more.items()}
        if "requires_safety_checker" in wanted:
            given["requires_safety_checker"] = False
        missing = [
            k for k, p in wanted.items() if p.default is inspect.Parameter.empty and k not in (*given, "self")
        ]
        return cls(**given, **dict.fromkeys(missing))

    return make


def changed(base: Callable[[], Any], name: str, **more: Any) -> Callable[[], Any]:
    """A pipeline whose denoiser has another config."""

    def make() -> Any:
        pipe = base()
        net = getattr(pipe, name)
        own = {k: v for k, v in net.config.items() if not k.startswith("_")}
        setattr(pipe, name, type(net)(**{**own, **more}))
        return pipe

    return make


MIDDLE = {"mid_block_type": "UNetMidBlock2DCrossAttn"}
sd_with_middle = changed(tiny.sd, "unet", **MIDDLE)
sdxl_with_middle = changed(tiny.sdxl, "unet", **MIDDLE)


def lcm_unet() -> Any:
    return unet(time_cond_proj_dim=16)


def motion_unet() -> Any:
    return d.UNetMotionModel.from_unet2d(unet(mid_block_type="UNetMidBlock2DCrossAttn"), motion_adapter())


def motion_adapter() -> Any:
    return d.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=32,
    )


def unet_3d() -> Any:
    return d.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def amused() -> Any:
    net = d.UVit2DModel(
        hidden_size=8,
        cond_embed_dim=12,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        block_out_channels=8,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        codebook_size=16,
        vocab_size=17,
        in_channels=8,
        num_res_blocks=1,
        sample_size=8,
        use_bias=False,
    )
    codes = d.VQModel(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=16,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        lookup_from_codebook=True,
        mid_block_add_attention=False,
    )
    mask = d.AmusedScheduler(mask_token_id=16)
    return d.AmusedPipeline(codes, clip_tokenizer(), clip(projected=True), net, mask)


def latte() -> Any:
    net = d.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=24,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        attention_bias=True,
        video_length=16,
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    return d.LattePipeline(t5_tokenizer(), t5(), vae(), net, ddim())


def lumina() -> Any:
    net = d.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=8,
        learn_sigma=True,
    )
    return d.LuminaPipeline(
        net, recent.flow(), recent.eighth(), recent.language("GemmaModel"), recent.letters()
    )


def cosmos2() -> Any:
    net = d.CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    )
    images = d.AutoencoderKLWan(**recent.wide_vae())
    checker = type("Checker", (d.ModelMixin, d.ConfigMixin), {"check_video_safety": 1})
    return d.Cosmos2TextToImagePipeline(t5(), t5_tokenizer(), net, images, recent.flow(), checker())


def ovis() -> Any:
    net = d.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    return d.OvisImagePipeline(
        recent.flow(), vae(shift_factor=0.1), recent.language("Qwen3Model"), recent.letters(), net
    )


def skyreels() -> Any:
    import diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2 as module

    recent.without_ftfy(module)
    net = d.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=24,
        num_layers=1,
    )
    parts = recent.wan().components
    scheduler = d.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return d.SkyReelsV2Pipeline(parts["tokenizer"], parts["text_encoder"], net, parts["vae"], scheduler)


def mochi() -> Any:
    net = d.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=24,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    images = d.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 12,
        latents_std=(1.0,) * 12,
    )
    return d.MochiPipeline(recent.flow(), images, t5(), t5_tokenizer(), net)


def unclip() -> Any:
    """Four denoisers: refused."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    prior = d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=12, num_embeddings=16
    )
    big = tiny.unet_alone(6)
    return d.UnCLIPPipeline(
        prior,
        unet(),
        clip(projected=True),
        clip_tokenizer(),
        UnCLIPTextProjModel(clip_embeddings_dim=12, time_embed_dim=32, cross_attention_dim=16),
        big,
        big,
        d.UnCLIPScheduler(),
        d.UnCLIPScheduler(),
        d.UnCLIPScheduler(),
    )


def consistency() -> Any:
    return d.ConsistencyModelPipeline(tiny.unet_alone(), d.CMStochasticIterativeScheduler())


VARIANTS: dict[str, Callable[[], Any]] = {
    "StableDiffusionPAGPipeline": like("StableDiffusionPAGPipeline", sd_with_middle),
    "StableDiffusionXLPAGPipeline": like("StableDiffusionXLPAGPipeline", sdxl_with_middle),
    "StableDiffusion3PAGPipeline": like(
        "StableDiffusion3PAGPipeline", changed(tiny.sd3, "transformer", num_layers=2)
    ),
    "HunyuanDiTPAGPipeline": like(
        "HunyuanDiTPAGPipeline", tiny.hunyuan, vae=recent.eighth, pag_applied_layers="blocks.1"
    ),
    "PixArtSigmaPAGPipeline": like(
        "PixArtSigmaPAGPipeline", changed(tiny.pixart_sigma, "transformer", num_layers=2)
    ),
    "SanaPAGPipeline": like("SanaPAGPipeline", recent.sana, pag_applied_layers="blocks.0"),
    "LatentConsistencyModelPipeline": like(
        "LatentConsistencyModelPipeline", tiny.sd, unet=lcm_unet, scheduler=d.LCMScheduler
    ),
    "StableDiffusionSAGPipeline": like("StableDiffusionSAGPipeline", sd_with_middle),
    "StableDiffusionPanoramaPipeline": like("StableDiffusionPanoramaPipeline", tiny.sd),
    "StableDiffusionLDM3DPipeline": like("StableDiffusionLDM3DPipeline", tiny.sd),
    "SemanticStableDiffusionPipeline": like("SemanticStableDiffusionPipeline", tiny.sd),
    "StableDiffusionModelEditingPipeline": like("StableDiffusionModelEditingPipeline", tiny.sd),
    "TextToVideoSDPipeline": like("TextToVideoSDPipeline", tiny.sd, unet=unet_3d),
    "AnimateDiffPipeline": like(
        "AnimateDiffPipeline", tiny.sd, unet=motion_unet, motion_adapter=motion_adapter
    ),
    "AnimateDiffPAGPipeline": like(
        "AnimateDiffPAGPipeline", tiny.sd, unet=motion_unet, motion_adapter=motion_adapter
    ),
    "LTXConditionPipeline": like("LTXConditionPipeline", recent.ltx),
    "AmusedPipeline": amused,
    "LattePipeline": latte,
    "LuminaPipeline": lumina,
    "Cosmos2TextToImagePipeline": cosmos2,
    "OvisImagePipeline": ovis,
    "SkyReelsV2Pipeline": skyreels,
    "MochiPipeline": mochi,
    "ConsistencyModelPipeline": consistency,
    "PNDMPipeline": like("PNDMPipeline", tiny.ddpm, scheduler=d.PNDMScheduler),
    "WanPipeline (2.2)": lambda: recent.wan(second=True),
    "UnCLIPPipeline": unclip,
}
VIDEOS = (
    "TextToVideoSDPipeline",
    "AnimateDiffPipeline",
    "AnimateDiffPAGPipeline",
    "LTXConditionPipeline",
    "SkyReelsV2Pipeline",
    "MochiPipeline",
    "WanPipeline (2.2)",
)
# what they need is not in their folders
IN_MEMORY = ("Cosmos2TextToImagePipeline", "UnCLIPPipeline")
