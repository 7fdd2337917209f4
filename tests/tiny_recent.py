"""Tiny random pipelines of this year's families, of images and of videos; all make samples of 32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.tiny_pipelines import LETTERS, clip, clip_tokenizer, t5, t5_tokenizer, vae

CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{{ message.content[0].text }}{% endif %}{% endfor %}"
)
SPECIAL = ("<pad>", "</s>", "<unk>")


def letters(padding_side: str = "right") -> Any:
    """One token a character, with a chat template: what stands for the tokenizers of language models."""
    words = [*SPECIAL, " ", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
        padding_side=padding_side,
        model_max_length=512,
    )


_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "max_position_embeddings": 2048,
}


def language(name: str, layers: int = 2, **more: Any) -> Any:
    """A language model of a class of transformers, ``layers`` deep and 8 wide."""
    cls = getattr(t, name)
    return cls(cls.config_class(**{**_TEXT, "num_hidden_layers": layers, **more}))


def qwen_vl() -> Any:
    text = {**_TEXT, "num_hidden_layers": 2, "rope_scaling": {"type": "default", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def without_ftfy(module: Any) -> None:
    """Prompts pass as they are where the package that cleans them is not installed."""
    if not hasattr(module, "ftfy"):
        module.ftfy = type("ftfy", (), {"fix_text": staticmethod(lambda text: text)})


def flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler()


def _flux2_parts(layers: int, guidance: bool) -> tuple[Any, Any]:
    net = d.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    images = d.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=32,
    )
    return net, images


def flux2() -> Any:
    net, images = _flux2_parts(31, True)
    return d.Flux2Pipeline(flow(), images, language("MistralForCausalLM", 31), letters(), net)


def flux2_klein() -> Any:
    net, images = _flux2_parts(28, False)
    return d.Flux2KleinPipeline(flow(), images, language("Qwen3ForCausalLM", 28), letters(), net)


def wide_vae() -> dict[str, Any]:
    """As the VAEs of Wan and Qwen-Image are: eight pixels a latent, four frames."""
    return {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }


def qwen_image() -> Any:
    net = d.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    return d.QwenImagePipeline(flow(), d.AutoencoderKLQwenImage(**wide_vae()), qwen_vl(), letters(), net)


def z_image() -> Any:
    net = d.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 512, 512],
    )
    return d.ZImagePipeline(flow(), vae(shift_factor=0.1), language("Qwen3Model"), letters(), net)


def chroma() -> Any:
    net = d.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return d.ChromaPipeline(flow(), vae(shift_factor=0.1), t5(), t5_tokenizer(), net)


def cogview4() -> Any:
    net = d.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=16,
    )
    return d.CogView4Pipeline(letters("left"), language("GlmModel"), vae(), net, flow())


def lumina2() -> Any:
    net = d.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(1024, 512, 512),
        cap_feat_dim=8,
    )
    pipe = d.Lumina2Pipeline(net, flow(), eighth(), language("Gemma2Model"), letters())
    return pipe


def eighth() -> Any:
    """A VAE of three halvings, where a pipeline takes eight pixels a latent for granted."""
    return d.AutoencoderKL(
        block_out_channels=(4,) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1,
    )


def hidream() -> Any:
    net = d.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[24, 8],
        text_emb_dim=24,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    pipe = d.HiDreamImagePipeline(
        flow(),
        vae(shift_factor=0.1),
        clip(projected=True, words=128),
        clip_tokenizer(),
        clip(projected=True, words=128),
        clip_tokenizer(),
        t5(),
        t5_tokenizer(),
        language("LlamaForCausalLM"),
        letters(),
        net,
    )
    pipe.default_sample_size = 16  # it makes images of this many latents, whatever is asked for
    return pipe


def _dc() -> Any:
    return d.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
    )


def sana_net(guidance: bool = False) -> Any:
    return d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
        guidance_embeds=guidance,
        qk_norm="rms_norm_across_heads" if guidance else None,
    )


def sana() -> Any:
    return d.SanaPipeline(
        letters(),
        language("Gemma2Model"),
        _dc(),
        sana_net(),
        d.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def sana_sprint() -> Any:
    return d.SanaSprintPipeline(letters(), language("Gemma2Model"), _dc(), sana_net(True), d.SCMScheduler())


def prx() -> Any:
    import diffusers.pipelines.prx.pipeline_prx as module

    without_ftfy(module)
    net = d.PRXTransformer2DModel(
        in_channels=4, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[4, 4]
    )
    return d.PRXPipeline(
        net, flow(), language("Gemma2Model"), letters(), vae(shift_factor=0.1), default_sample_size=32
    )


def wan(second: bool = False) -> Any:
    def net() -> Any:
        return d.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=24,
            num_layers=1,
        )

    encoder = t.UMT5EncoderModel(
        t.UMT5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    more = {"transformer_2": net(), "boundary_ratio": 0.5} if second else {}
    images = d.AutoencoderKLWan(**wide_vae())
    return d.WanPipeline(t5_tokenizer(), encoder, images, flow(), net(), **more)


def ltx() -> Any:
    net = d.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=24,
    )
    images = d.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
    )
    images.use_framewise_encoding = images.use_framewise_decoding = False
    return d.LTXPipeline(flow(), images, t5(), t5_tokenizer(), net)


def ltx2() -> Any:
    """Video and sound; the VAE makes 8 pixels of a latent, where the published one makes 32."""
    from diffusers.pipelines.ltx2 import connectors, vocoder

    net = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=8,
        rope_double_precision=False,
    )
    images = d.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    images.use_framewise_encoding = images.use_framewise_decoding = False
    sound = d.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        sample_rate=16000,
        mel_hop_length=160,
        mel_bins=8,
    )
    text = connectors.LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )
    waves = vocoder.LTX2Vocoder(
        in_channels=sound.config.output_channels * sound.config.mel_bins,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return d.LTX2Pipeline(flow(), images, sound, language("Gemma2Model"), letters("left"), text, net, waves)


def hunyuan_video() -> Any:
    net = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    images = d.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    encoder = language("LlamaModel", 3)
    return d.HunyuanVideoPipeline(encoder, letters(), net, images, flow(), clip(words=77), clip_tokenizer())


def cogvideox() -> Any:
    net = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=24,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
    )
    images = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return d.CogVideoXPipeline(t5_tokenizer(), t5(), images, net, d.CogVideoXDDIMScheduler())


RECENT: dict[str, Callable[[], Any]] = {
    "flux2": flux2,
    "flux2-klein": flux2_klein,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "chroma": chroma,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "hidream": hidream,
    "sana": sana,
    "sana-sprint": sana_sprint,
    "prx": prx,
    "wan": wan,
    "ltx": ltx,
    "ltx2": ltx2,
    "hunyuan-video": hunyuan_video,
    "cogvideox": cogvideox,
}
VIDEO = ("wan", "ltx", "ltx2", "hunyuan-video", "cogvideox")
