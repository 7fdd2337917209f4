"""Pipelines of the real classes with tiny random weights, text encoders and tokenizers included, built in
memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
import transformers as t
from torch import nn

from aquabit.pipelines import ClassEmbedder, ClassLatentPipeline

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ("a cat", "two dogs", "a red car", "the sea")
GUIDED = 3.0


def clip_tokenizer() -> Any:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    return t.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in LETTERS)]
    return t.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def bert_tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    return t.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=77)


def clip(projected: bool = False, width: int = 16, words: int = 16) -> Any:
    config = t.CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (t.CLIPTextModelWithProjection if projected else t.CLIPTextModel)(config)


def t5(width: int = 24) -> Any:
    return t.T5EncoderModel(
        t.T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def bert() -> Any:
    return t.BertModel(
        t.BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=77,
        )
    )


def vae(channels: int = 4, **more: Any) -> Any:
    """One halving: 8 latents make 16 pixels."""
    return d.AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    )


def vq(channels: int = 3) -> Any:
    return d.VQModel(
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        num_vq_embeddings=16,
        layers_per_block=1,
        scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def ddim() -> Any:
    return d.DDIMScheduler(
        clip_sample=False,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
    )


def unet(**more: Any) -> Any:
    given = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "mid_block_type": None,
    }
    return d.UNet2DConditionModel(**{**given, **more})


def unet_alone(channels: int = 3) -> Any:
    return d.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        mid_block_type=None,
    )


_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "sample_size": 8,
    "in_channels": 4,
}


def sd() -> Any:
    return d.StableDiffusionPipeline(
        vae(), clip(), clip_tokenizer(), unet(), ddim(), None, None, requires_safety_checker=False
    )


def sdxl() -> Any:
    net = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
    )
    return d.StableDiffusionXLPipeline(
        vae(),
        clip(),
        clip(projected=True),
        clip_tokenizer(),
        clip_tokenizer(),
        net,
        ddim(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _pixart() -> Any:
    return d.PixArtTransformer2DModel(
        **_TRANSFORMER,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
        norm_num_groups=4,
    )


def pixart_alpha() -> Any:
    return d.PixArtAlphaPipeline(t5_tokenizer(), t5(), vae(), _pixart(), ddim())


def pixart_sigma() -> Any:
    return d.PixArtSigmaPipeline(t5_tokenizer(), t5(), vae(), _pixart(), ddim())


def hunyuan() -> Any:
    net = d.HunyuanDiT2DModel(
        **{**_TRANSFORMER, "num_layers": 4},
        patch_size=2,
        hidden_size=16,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        text_len=77,
        text_len_t5=256,
        pooled_projection_dim=16,
        activation_fn="gelu-approximate",
    )
    return d.HunyuanDiTPipeline(
        vae(),
        bert(),
        bert_tokenizer(),
        net,
        ddim(),
        None,
        None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def sd3() -> Any:
    net = d.SD3Transformer2DModel(
        **_TRANSFORMER,
        patch_size=2,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    return d.StableDiffusion3Pipeline(
        net,
        d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        clip(projected=True),
        clip_tokenizer(),
        clip(projected=True),
        clip_tokenizer(),
        t5(32),
        t5_tokenizer(),
    )


def flux(guidance_embeds: bool = True) -> Any:
    net = d.FluxTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        in_channels=16,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = d.FluxPipeline(
        d.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.1),
        clip(),
        clip_tokenizer(),
        t5(),
        t5_tokenizer(),
        net,
    )
    pipe.default_sample_size = 8
    return pipe


def dit() -> Any:
    return d.DiTPipeline(
        d.DiTTransformer2DModel(**_TRANSFORMER, out_channels=8, num_embeds_ada_norm=1000, norm_num_groups=4),
        vae(),
        ddim(),
    )


def ldm_class() -> Any:
    return ClassLatentPipeline(
        unet(in_channels=3, out_channels=3, cross_attention_dim=12),
        vq(),
        ClassEmbedder(11, 12),
        ddim(),
        classes=10,
    )


def ldm() -> Any:
    return d.LDMPipeline(vq(), unet_alone(), ddim())


def ddpm() -> Any:
    return d.DDPMPipeline(unet_alone(), d.DDPMScheduler())


def ddim_pipeline() -> Any:
    return d.DDIMPipeline(unet_alone(), ddim())


def cogview3() -> Any:
    """Of no family that is known."""
    net = d.CogView3PlusTransformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return d.CogView3PlusPipeline(t5_tokenizer(), t5(), vae(), net, ddim())


def aura() -> Any:
    net = d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return d.AuraFlowPipeline(t5_tokenizer(), t5(), vae(), net, d.FlowMatchEulerDiscreteScheduler())


TINY_PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart_sigma,
    "hunyuan": hunyuan,
    "sd3": sd3,
    "flux": flux,
    "dit": dit,
    "ldm-class": ldm_class,
    "ldm": ldm,
    "ddpm": ddpm,
    "ddim": ddim_pipeline,
    "auraflow": aura,
    "generic": cogview3,
}
UNGUIDED = ("ldm", "ddpm", "ddim")
PROMPTED = ("sd", "sdxl", "pixart-alpha", "pixart-sigma", "hunyuan", "sd3", "flux", "auraflow", "generic")


def tiny(name: str, seed: int = 0) -> Any:
    """The pipeline of a family, with weights such that its outputs depend on what goes in."""
    return randomised(TINY_PIPELINES[name], seed)


def randomised(make: Callable[[], Any], seed: int = 0) -> Any:
    """The pipeline that ``make`` makes, with weights drawn anew: new networks end in zeros."""
    torch.manual_seed(seed)
    pipe = make()
    generator = torch.Generator().manual_seed(seed)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
            for path, p in module.named_parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
                else:
                    nn.init.normal_(p, float(path.endswith("weight")), 0.1, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe
