"""What is known about each model family: operator types and blocks by name, and inputs for one denoiser
call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aquabit._inputs import AT_SIZE, meta
from aquabit.scheme import AquabitError

Patterns = tuple[tuple[str, str], ...]


def _attention(path: str, operator: str) -> Patterns:
    """The patterns of one attention module at ``path``, its projections of added (context) tokens
    included."""
    own = tuple((rf"{path}\.to_{part}$", f"{operator}.{part}") for part in "qkv")
    added = tuple((rf"{path}\.add_{part}_proj$", f"{operator}.add_{part}") for part in "qkv")
    fused = tuple((rf"{path}\.to_{part}$", f"{operator}.{part}") for part in ("qkv", "kv"))
    return (
        *own,
        *added,
        *fused,
        (rf"{path}\.to_added_qkv$", f"{operator}.add_qkv"),
        (rf"{path}\.to_out(\.0)?$", f"{operator}.out"),
        (rf"{path}\.to_add_out$", f"{operator}.add_out"),
    )


_FEED_FORWARD: Patterns = (
    (r"\bff\.net\.0\.proj$", "ff.up"),
    (r"\bff\.net\.2$", "ff.down"),
    (r"\bff_context\.net\.0\.proj$", "ff_context.up"),
    (r"\bff_context\.net\.2$", "ff_context.down"),
)
_CONDITION: Patterns = (
    (r"\btimestep_embedder\.linear_\d$|^time_embedding\.linear_\d$", "time_embed"),
    (r"\bguidance_embedder\.linear_\d$|^time_embedding\.cond_proj$", "guidance_embed"),
    (
        r"\btext_embedder\.linear_\d$|\b(resolution|aspect_ratio)_embedder\.linear_\d$|^add_embedding\.",
        "add_embed",
    ),
    (r"^caption_projection\.|^context_embedder$|^encoder_hid_proj\b", "caption_embed"),
    (r"^class_embedding\.", "class_embed"),
)
_ENDS: Patterns = (
    (r"^pos_embed\.proj$|^x_embedder$", "patch_embed"),
    (r"^norm_out\.linear$|^proj_out_1$", "adaln"),
    (r"^proj_out(_2)?$", "proj_out"),
)
_JOINT: Patterns = (
    (r"^transformer_blocks\.\d+\.norm1\.linear$", "adaln"),
    (r"^transformer_blocks\.\d+\.norm1_context\.linear$", "adaln_context"),
    *_attention(r"^transformer_blocks\.\d+\.attn", "joint_attn"),
    *_attention(r"^transformer_blocks\.\d+\.attn2", "self_attn"),
    *_FEED_FORWARD,
    *_CONDITION,
    *_ENDS,
)
_PER_BLOCK: Patterns = (
    *_attention(r"\battn1", "self_attn"),
    *_attention(r"\battn2", "cross_attn"),
    *_FEED_FORWARD,
)

_SINGLE: Patterns = (
    *_attention(r"^single_transformer_blocks\.\d+\.attn", "single"),
    (r"^single_transformer_blocks\.\d+\.norm1?\.linear$", "single.adaln"),
    (r"^single_transformer_blocks\.\d+\.proj_mlp$", "single.mlp"),
    (r"^single_transformer_blocks\.\d+\.proj_out$", "single.out"),
)
_GATED: Patterns = (  # feed-forward layers of language models, (act(gate(x)) * up(x)) -> down
    (r"\.w1$|\bgate_proj$", "ff.gate"),
    (r"\.w3$|\bup_proj$", "ff.up"),
    (r"\.w2$|\bdown_proj$", "ff.down"),
)

_GUIDED: Patterns = (  # OpenAI's guided-diffusion, and what came of it: latent diffusion, consistency models
    (r"^input_blocks\.0\.0$", "conv_in"),
    (r"^out\.2$", "conv_out"),
    (r"\bin_layers\.\d+$", "res.conv1"),
    (r"\bout_layers\.\d+$", "res.conv2"),
    (r"\bemb_layers\.\d+$", "res.time"),
    (r"\bskip_connection$", "res.shortcut"),
    (r"_blocks?\..*\bop$", "downsample"),
    (r"_blocks?\.\d+\.\d+\.conv$", "upsample"),
    (r"_blocks?\..*\bqkv$", "self_attn.qkv"),
    (r"^label_emb\.", "class_embed"),
)

_SELF = r"\b(?:self_attn|SelfAttention|attention\.self)\."
_QKV = (("q", "query"), ("k", "key"), ("v", "value"))

OPERATORS: Mapping[str, Patterns] = {
    "unet": (
        (r"^conv_in$", "conv_in"),
        (r"^conv_out$", "conv_out"),
        (r"\b(resnets|downsamplers|upsamplers)\.\d+\.conv1$", "res.conv1"),
        (r"\b(resnets|downsamplers|upsamplers)\.\d+\.conv2$", "res.conv2"),
        (r"\.time_emb_proj$", "res.time"),
        (r"\.conv_shortcut$", "res.shortcut"),
        (r"\bdownsamplers\.\d+\.conv$", "downsample"),
        (r"\bupsamplers\.\d+\.conv$", "upsample"),
        *_PER_BLOCK,
        *_attention(r"\battentions\.\d+", "self_attn"),
        (r"\bproj_in$", "proj_in"),
        (r"\bproj_out$", "proj_out"),
        *_CONDITION,
    ),
    "dit": (*_PER_BLOCK, (r"\.norm1\.linear$", "adaln"), *_CONDITION, *_ENDS),
    "pixart": (*_PER_BLOCK, (r"^adaln_single\.linear$", "adaln"), *_CONDITION, *_ENDS),
    "sd3": _JOINT,
    "flux": (*_SINGLE, *_JOINT),
    "flux2": (
        (r"\.to_qkv_mlp_proj$", "single.qkv_mlp"),
        *_SINGLE,
        (r"\bff\.linear_in$", "ff.up"),
        (r"\bff\.linear_out$", "ff.down"),
        (r"\bff_context\.linear_in$", "ff_context.up"),
        (r"\bff_context\.linear_out$", "ff_context.down"),
        (r"^(double|single)_stream_modulation(_img)?\.linear$", "adaln"),
        (r"^double_stream_modulation_txt\.linear$", "adaln_context"),
        *_JOINT,
    ),
    "chroma": ((r"^distilled_guidance_layer\.", "adaln"), *_SINGLE, *_JOINT),
    "qwen": (
        (r"\.img_mod\.1$", "adaln"),
        (r"\.txt_mod\.1$", "adaln_context"),
        (r"\.img_mlp\.net\.0\.proj$", "ff.up"),
        (r"\.img_mlp\.net\.2$", "ff.down"),
        (r"\.txt_mlp\.net\.0\.proj$", "ff_context.up"),
        (r"\.txt_mlp\.net\.2$", "ff_context.down"),
        (r"^img_in$", "patch_embed"),
        (r"^txt_in$", "caption_embed"),
        *_JOINT,
    ),
    "hunyuan-video": (
        (r"^context_embedder\.", "caption_embed"),
        (r"^x_embedder\.proj$", "patch_embed"),
        *_SINGLE,
        *_JOINT,
    ),
    "auraflow": (
        *_attention(r"^joint_transformer_blocks\.\d+\.attn", "joint_attn"),
        (r"^joint_transformer_blocks\.\d+\.norm1\.linear$", "adaln"),
        (r"^joint_transformer_blocks\.\d+\.norm1_context\.linear$", "adaln_context"),
        (r"\bff\.linear_[12]$", "ff.up"),
        (r"\bff\.out_projection$", "ff.down"),
        (r"\bff_context\.linear_[12]$", "ff_context.up"),
        (r"\bff_context\.out_projection$", "ff_context.down"),
        (r"^time_step_proj\.", "time_embed"),
        *_SINGLE,
        *_CONDITION,
        *_ENDS,
    ),
    "hidream": (
        (r"\battn1\.to_([qkv])_t$", r"joint_attn.add_\1"),
        (r"\battn1\.to_out_t$", "joint_attn.add_out"),
        *_attention(r"^double_stream_blocks\..*\battn1", "joint_attn"),
        *_attention(r"^single_stream_blocks\..*\battn1", "single"),
        (r"\bff_t\.w[13]$", "ff_context.up"),
        (r"\bff_t\.w2$", "ff_context.down"),
        *_GATED,
        (r"\badaLN_modulation\.1$", "adaln"),
        (r"^p_embedder\.", "add_embed"),
        (r"^x_embedder\.proj$", "patch_embed"),
        (r"^final_layer\.linear$", "proj_out"),
        *_CONDITION,
    ),
    "next": (  # Lumina 2, Z-Image: one stream of text and image tokens
        *_attention(r"\b(attn|attention)", "self_attn"),
        (r"\bfeed_forward\.linear_1$", "ff.gate"),
        (r"\bfeed_forward\.linear_3$", "ff.up"),
        (r"\bfeed_forward\.linear_2$", "ff.down"),
        *_GATED,
        (r"\badaLN_modulation\.\d$|\bnorm1\.linear$|^norm_out\.linear_1$", "adaln"),
        (r"\bcap(tion)?_embedder\.1$", "caption_embed"),
        (r"^t_embedder\.mlp\.\d$", "time_embed"),
        (r"^(all_)?x_embedder\b", "patch_embed"),
        (r"^all_final_layer\..*\.linear$|^norm_out\.linear_2$", "proj_out"),
        *_CONDITION,
    ),
    "sana": (
        *_PER_BLOCK,
        (r"\bff\.conv_inverted$", "ff.up"),
        (r"\bff\.conv_depth$", "ff.depth"),
        (r"\bff\.conv_point$", "ff.down"),
        (r"^time_embed\.linear$", "adaln"),
        (r"^patch_embed\.proj$", "patch_embed"),
        *_CONDITION,
        *_ENDS,
    ),
    "prx": (
        (r"\battention\.img_qkv_proj$", "joint_attn.qkv"),
        (r"\battention\.txt_kv_proj$", "joint_attn.add_kv"),
        (r"\battention\.to_out\.0$", "joint_attn.out"),
        *_GATED,
        (r"\bmodulation\.lin$|\badaLN_modulation\.1$", "adaln"),
        (r"^time_in\.", "time_embed"),
        (r"^img_in$", "patch_embed"),
        (r"^txt_in$", "caption_embed"),
        (r"^final_layer\.linear$", "proj_out"),
    ),
    "cogview": (  # CogView 3 and 4, CogVideoX: text and image tokens share their projections
        *_attention(r"\battn1", "joint_attn"),
        *_FEED_FORWARD,
        (r"\.norm[12]\.linear$", "adaln"),
        (r"\bcondition_embedder\.linear_\d$", "add_embed"),
        (r"^patch_embed\.proj$", "patch_embed"),
        (r"^patch_embed\.text_proj$", "caption_embed"),
        *_CONDITION,
        (r"^time_embedding\.", "time_embed"),
        *_ENDS,
    ),
    "video": (  # Wan, LTX-Video
        *_PER_BLOCK,
        (r"\bffn\.net\.0\.proj$", "ff.up"),
        (r"\bffn\.net\.2$", "ff.down"),
        (r"^condition_embedder\.time_embedder\.", "time_embed"),
        (r"^condition_embedder\.time_proj$|^time_embed\.linear$", "adaln"),
        (r"^condition_embedder\.(text|image)_embedder\.", "caption_embed"),
        (r"^patch_embedding$|^proj_in$", "patch_embed"),
        *_CONDITION,
        *_ENDS,
    ),
    "ltx2": (  # a stream of video, one of sound, and attention between them
        *_attention(r"\baudio_attn1", "audio.self_attn"),
        *_attention(r"\baudio_attn2", "audio.cross_attn"),
        *_attention(r"\bvideo_to_audio_attn", "audio.video_attn"),
        *_attention(r"\baudio_to_video_attn", "audio_attn"),
        (r"\b(audio_attn\d|video_to_audio_attn)\.to_gate_logits$", "audio.attn.gate"),
        (r"\.to_gate_logits$", "attn.gate"),
        (r"\baudio_ff\.net\.0\.proj$", "audio.ff.up"),
        (r"\baudio_ff\.net\.2$", "audio.ff.down"),
        *_PER_BLOCK,
        (r"_embed\.linear$|_scale_shift\.linear$|_gate\.linear$|prompt_adaln\.linear$", "adaln"),
        (r"^(audio_)?proj_in$", "patch_embed"),
        (r"^audio_caption_projection\.", "caption_embed"),
        (r"^audio_proj_out$", "proj_out"),
        *_CONDITION,
        *_ENDS,
    ),
    "hunyuan": (
        *_PER_BLOCK,
        (r"\.norm1\.linear$", "adaln"),
        (r"\.skip_linear$", "skip"),
        (r"^time_extra_emb\.pooler\.", "caption_embed.pool"),
        (r"^time_extra_emb\.extra_embedder\.", "add_embed"),
        (r"^text_embedder\.", "caption_embed"),
        *_CONDITION,
        *_ENDS,
    ),
    "text": (  # encoders of transformers: CLIP, T5, BERT, language models
        *((rf"{_SELF}(?:{p}_proj|{p}|{word})$", f"self_attn.{p}") for p, word in _QKV),
        (r"\b(?:self_attn\.(?:out|o)_proj|SelfAttention\.o|attention\.output\.dense)$", "self_attn.out"),
        (r"\bmlp\.fc1$|\bDenseReluDense\.wi(_1)?$|\bintermediate\.dense$", "ff.up"),
        (r"\bDenseReluDense\.wi_0$", "ff.gate"),
        (r"\bmlp\.fc2$|\bDenseReluDense\.wo$|\boutput\.dense$", "ff.down"),
        *_GATED,
        (r"\btext_projection$|\bpooler\.", "proj_out"),
    ),
    "generic": (
        *_PER_BLOCK,
        *_GUIDED,
        *_attention(r"", "attn"),
        (r"\bconv_in$", "conv_in"),
        (r"\bconv_out$", "conv_out"),
        (r"\bproj_in$", "proj_in"),
        (r"\bproj_out$", "proj_out"),
        (r"(?i)norm\w*\.linear|adaln|modulation", "adaln"),
        (r"\btime\w*\.", "time_embed"),
        *_CONDITION,
        *_ENDS,
    ),
}

_BLOCK = re.compile(
    r"(.*\b(?:(?:joint_|single_)?transformer_blocks|(?:double|single)_stream_blocks|(?:noise_|context_)refiner|refiner_blocks|(?:input|output)_blocks|resnets|attentions|downsamplers|upsamplers|blocks|block|layers|layer)\.\d+)\."
)
_GROUP_OF_OPERATOR: Mapping[str, str] = {
    "time_embed": "time_embed",
    "guidance_embed": "time_embed",
    "add_embed": "add_embed",
    "class_embed": "add_embed",
    "caption_embed": "caption_embed",
    "caption_embed.pool": "caption_embed",
    "conv_in": "stem",
    "patch_embed": "stem",
}


def module_config(module: torch.nn.Module) -> dict[str, Any]:
    """The configuration of a model of diffusers, without its notes to itself; empty where a module has none,
    or keeps something else under that name."""
    config = getattr(module, "config", None)
    return {k: v for k, v in config.items() if not k.startswith("_")} if isinstance(config, Mapping) else {}


def family_of(model_class: type, family: str | None = None) -> str:
    """The family to read layer names by: ``family`` where given (AquabitError if unknown), else by class,
    else "generic"."""
    if family is not None and family not in OPERATORS:
        raise AquabitError(f"unknown model family {family!r}; known: {', '.join(OPERATORS)}")
    return family or _known(model_class)[0]


def known_class(model_class: type) -> bool:
    """Whether the inputs of a denoiser class (or of one of its bases) are made from its config, and not
    those of its pipeline's first call."""
    return _known(model_class)[1] is not None


def operator_of(name: str, family: str) -> str:
    """The operator type of the layer ``name``: the first pattern of its family that matches, else "other"."""
    found = ((re.search(pattern, name), operator) for pattern, operator in OPERATORS[family])
    return next((match.expand(operator) for match, operator in found if match), "other")


def block_of(name: str, operator: str) -> str:
    """The innermost repeated block that holds the layer; outside of blocks a group such as "stem",
    "time_embed" or "head"."""
    match = _BLOCK.match(name)
    if match:
        return match[1]
    if name.startswith(("mid_block.", "middle_block.")):
        return name.partition(".")[0]
    shared = "adaln" if name.startswith("adaln_single.") else "head"
    return _GROUP_OF_OPERATOR.get(operator, shared)


def attention_role(operator: str) -> str | None:
    """ "q", "k" or "v" for the projections that make the queries, keys and values of own or added tokens."""
    part = operator.rpartition(".")[2].removeprefix("add_")
    return part if part in ("q", "k", "v") else None


def _latent(config: Mapping[str, Any], default: int) -> torch.Tensor:
    size = config.get("sample_size") or default
    height, width = (size, size) if isinstance(size, int) else size
    return meta(1, config["in_channels"], height, width)


def _label() -> torch.Tensor:
    return meta(1, dtype=torch.long)


def _unet(config: Mapping[str, Any]) -> dict[str, Any]:
    learned = config.get("time_embedding_type") == "learned"  # then steps index an embedding table
    inputs: dict[str, Any] = {"sample": _latent(config, 64), "timestep": _label() if learned else meta(1)}
    if config.get("class_embed_type") in ("projection", "simple_projection"):
        inputs["class_labels"] = meta(1, config["projection_class_embeddings_input_dim"])
    elif config.get("class_embed_type") or config.get("num_class_embeds"):
        inputs["class_labels"] = _label()
    return inputs


def _unet_condition(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    inputs = _unet(config)
    inputs["encoder_hidden_states"] = meta(1, 77, width if isinstance(width, int) else width[0])
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": meta(1, pooled), "time_ids": meta(1, 6)}
    return inputs


def _dit(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_states": _latent(config, 32), "timestep": meta(1), "class_labels": _label()}


def _pixart(config: Mapping[str, Any]) -> dict[str, Any]:
    conditions = config.get("use_additional_conditions")
    if conditions is None:  # PixArt-alpha's 1024 px models, as diffusers decides it
        conditions = config["sample_size"] == 128
    sizes = (
        {"resolution": meta(1, 2), "aspect_ratio": meta(1, 1)}
        if conditions
        else {"resolution": None, "aspect_ratio": None}
    )
    text = meta(1, 300, config.get("caption_channels") or config["cross_attention_dim"])
    return {
        "hidden_states": _latent(config, 128),
        "encoder_hidden_states": text,
        "timestep": meta(1),
        "added_cond_kwargs": sizes,
    }


def _sd3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": _latent(config, 128),
        "encoder_hidden_states": meta(1, 77 + 256, config["joint_attention_dim"]),
        "pooled_projections": meta(1, config["pooled_projection_dim"]),
        "timestep": meta(1),
    }


def _flux(config: Mapping[str, Any]) -> dict[str, Any]:
    tokens, words = 64 * 64, 512  # 1024 x 1024 pixels, patches of 16
    inputs = {
        "hidden_states": meta(1, tokens, config["in_channels"]),
        "encoder_hidden_states": meta(1, words, config["joint_attention_dim"]),
        "pooled_projections": meta(1, config["pooled_projection_dim"]),
        "timestep": meta(1),
        "img_ids": meta(tokens, 3),
        "txt_ids": meta(words, 3),
    }
    return {**inputs, "guidance": meta(1)} if config.get("guidance_embeds") else inputs


def _hunyuan(config: Mapping[str, Any]) -> dict[str, Any]:
    words, words_t5 = config["text_len"], config["text_len_t5"]
    return {
        "hidden_states": _latent(config, 128),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, words, config["cross_attention_dim"]),
        "text_embedding_mask": meta(1, words),
        "encoder_hidden_states_t5": meta(1, words_t5, config["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": meta(1, words_t5),
        "image_meta_size": meta(1, 6),
        "style": _label(),
    }


def describe_inputs(value: Any) -> Any:
    """The inputs of a call as JSON: a tensor is {"shape", "dtype"}, what else is no number, text or
    collection of such its text."""
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {str(k): describe_inputs(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe_inputs(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def described_inputs(value: Any) -> Any:
    """What ``describe_inputs`` described, tensors on the meta device; raises AquabitError for a dtype that
    torch does not have."""
    if isinstance(value, dict) and value.keys() == {"shape", "dtype"}:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise AquabitError(f"example inputs have the dtype {value['dtype']!r}, which torch does not know")
        return meta(*(int(s) for s in value["shape"]), dtype=dtype)
    if isinstance(value, dict):
        return {k: described_inputs(v) for k, v in value.items()}
    return [described_inputs(v) for v in value] if isinstance(value, list) else value


Inputs = Callable[[Mapping[str, Any]], dict[str, Any]]
# None: inputs are those of the pipeline's own first call, of a bare denoiser those of AT_SIZE
_CLASSES: Mapping[str, tuple[str, Inputs | None]] = {
    "UNet2DModel": ("unet", _unet),
    "UNet2DConditionModel": ("unet", _unet_condition),
    "DiTTransformer2DModel": ("dit", _dit),
    "PixArtTransformer2DModel": ("pixart", _pixart),
    "SD3Transformer2DModel": ("sd3", _sd3),
    "FluxTransformer2DModel": ("flux", _flux),
    "HunyuanDiT2DModel": ("hunyuan", _hunyuan),
    "Flux2Transformer2DModel": ("flux2", None),
    "QwenImageTransformer2DModel": ("qwen", None),
    "ZImageTransformer2DModel": ("next", None),
    "Lumina2Transformer2DModel": ("next", None),
    "ChromaTransformer2DModel": ("chroma", None),
    "CogView4Transformer2DModel": ("cogview", None),
    "HiDreamImageTransformer2DModel": ("hidream", None),
    "SanaTransformer2DModel": ("sana", None),
    "PRXTransformer2DModel": ("prx", None),
    "AuraFlowTransformer2DModel": ("auraflow", None),
    "WanTransformer3DModel": ("video", None),
    "LTXVideoTransformer3DModel": ("video", None),
    "LTX2VideoTransformer3DModel": ("ltx2", None),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video", None),
    "CogVideoXTransformer3DModel": ("cogview", None),
}


def _class_of(model_class: type) -> str | None:
    """The class or the nearest of its bases that is known; None where none is."""
    # a class of the user's that bears the name of one of diffusers is another
    bases = [base for base in model_class.__mro__ if base.__module__.partition(".")[0] == "diffusers"]
    return next((base.__name__ for base in bases if base.__name__ in _CLASSES), None)


def _known(model_class: type) -> tuple[str, Inputs | None]:
    """Family and input maker of a class."""
    if any(base.__module__.partition(".")[0] == "transformers" for base in model_class.__mro__):
        return "text", None
    name = _class_of(model_class)
    return ("generic", None) if name is None else _CLASSES[name]


def example_inputs(denoiser: torch.nn.Module) -> dict[str, Any]:
    """Keyword arguments of one call with one sample at the model's own size, on the meta device, made from
    its config.

    Text lengths are those of the family's pipeline (77 words for U-Nets, 300 for PixArt, 333 for SD3, 512 for
    Flux). Raises AquabitError for a class that is not known.
    """
    name = _class_of(type(denoiser))
    make = None if name is None else _CLASSES[name][1] or AT_SIZE.get(name)
    if make is None:
        raise AquabitError(
            f"no example inputs are known for {type(denoiser).__name__}; pass example_inputs, or use one of:"
            f" {', '.join(_CLASSES)}"
        )
    config: Any = denoiser.config
    return make(config)
