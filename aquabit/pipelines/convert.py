"""The original class-conditional LDM checkpoint (LDM-4, ImageNet) as a diffusers pipeline: configs from
shapes, tensors by name."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aquabit.files import check_apart, writing_folder
from aquabit.jsonio import read_object
from aquabit.pipelines.class_latent import ClassEmbedder, ClassLatentPipeline
from aquabit.scheme import AquabitError

Tensors = Mapping[str, Tensor]
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
_UNUSED = ("model_ema.", "first_stage_model.loss.")  # averages of training, and its loss
_SCHEDULE = (  # buffers of the noise schedule
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "lvlb_weights",
    "scale_factor",
)
_RESNET = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
)
_UNET_ENDS = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
    ("middle_block.0.", "mid_block.resnets.0."),
    ("middle_block.1.", "mid_block.attentions.0."),
    ("middle_block.2.", "mid_block.resnets.1."),
)
_VQ_PARTS = (
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("mid.attn_1.", "mid_block.attentions.0.to_"),
    ("norm_out.", "conv_norm_out."),
    ("nin_shortcut.", "conv_shortcut."),
)


def convert_ldm4(
    path: str | Path, out: str | Path, sample_size: int = 64, heads: int = 1
) -> ClassLatentPipeline:
    """Write the pipeline of a checkpoint (.ckpt or .safetensors) to the folder ``out``, and return it.

    Architecture follows from the tensors' shapes; what they do not tell is the side of the latents and the
    number of attention heads, which are those of LDM-4. Every tensor finds its place with its shape, or
    AquabitError names the first that do not; it is raised too for a file that cannot be read as tensors
    alone.
    """
    tensors = read_tensors(Path(path))
    wanted = {k: v.float() for k, v in tensors.items() if not k.startswith(_UNUSED) and k not in _SCHEDULE}
    unknown = [k for k in wanted if not k.startswith((UNET, FIRST_STAGE)) and k != CLASSES]
    if unknown or CLASSES not in wanted:
        what = f"holds {_some(unknown)}" if unknown else f"lacks {CLASSES}"
        raise AquabitError(f"{path} is no class-conditional LDM checkpoint: it {what}")
    parts = {
        p: {k.removeprefix(p): v for k, v in wanted.items() if k.startswith(p)} for p in (UNET, FIRST_STAGE)
    }
    scale = float(tensors.get("scale_factor", torch.ones(())))
    try:
        unet_config = _unet_config(parts[UNET], sample_size, heads)
        vq_config = _vq_config(parts[FIRST_STAGE], scale)
    except KeyError as error:
        raise AquabitError(
            f"{path} is no LDM checkpoint with cross-attention and a VQ first stage: it lacks {error}"
        ) from error
    embedding = wanted[CLASSES]
    unet = _filled(UNet2DConditionModel, unet_config, _unet_names(parts[UNET], unet_config), f"{path}: U-Net")
    vqvae = _filled(VQModel, vq_config, _vq_names(parts[FIRST_STAGE], vq_config), f"{path}: first stage")
    classes = {"classes": embedding.shape[0], "width": embedding.shape[1]}
    embedder = _filled(ClassEmbedder, classes, {"embedding.weight": embedding}, f"{path}: classes")
    pipe = ClassLatentPipeline(
        unet, vqvae, embedder, _scheduler(tensors, path), classes=embedding.shape[0] - 1
    )
    check_apart(out, path, inside=False)
    with writing_folder(out, ours=_is_converted) as folder:
        pipe.save_pretrained(folder)
    return pipe


def _is_converted(folder: Path) -> bool:
    """Whether a folder holds a pipeline that was converted before."""
    with suppress(AquabitError):
        index = read_object(folder / "model_index.json")
        return index.get("_class_name") == ClassLatentPipeline.__name__
    return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint; raises AquabitError for a file that is missing, damaged, or holds
    more than tensors."""
    if not path.is_file():
        raise AquabitError(f"checkpoint {path} is not there; give a .ckpt or .safetensors file")
    try:
        found: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise AquabitError(
            f"{path} holds more than tensors, which is not read; save its state_dict as .safetensors"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise AquabitError(
            f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise AquabitError(f"{path} holds no named tensors; a checkpoint has them in state_dict")
    return tensors


def _filled(model_class: Any, config: Mapping[str, Any], tensors: Tensors, what: str) -> Any:
    """The model with these tensors: all of them, each with its shape, none missing."""
    with init_empty_weights():
        model: nn.Module = model_class(**config)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    problems = {
        "missing": [k for k in own if k not in tensors],
        "without a place": [k for k in tensors if k not in own],
        "of another shape": [
            f"{k} {tuple(v.shape)} for {own[k]}"
            for k, v in tensors.items()
            if k in own and tuple(v.shape) != own[k]
        ],
    }
    said = "; ".join(
        f"{len(names)} tensors {problem}: {_some(names)}" for problem, names in problems.items() if names
    )
    if said:
        raise AquabitError(f"{what} does not fit {type(model).__name__}: {said}")
    model.load_state_dict({k: v.contiguous() for k, v in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _count(tensors: Tensors, pattern: str) -> int:
    """One more than the largest number that ``pattern`` finds in a name; 0 where it finds none."""
    return max((int(m[1]) + 1 for k in tensors if (m := re.match(pattern, k))), default=0)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """``name`` with the first of ``pairs`` whose old part stands in it, after a dot or at its start,
    replaced."""
    for old, new in pairs:
        if f".{old}" in f".{name}":
            return f".{name}".replace(f".{old}", f".{new}", 1)[1:]
    return name


def _unet_config(tensors: Tensors, sample_size: int, heads: int) -> dict[str, Any]:
    """Levels end in a downsampling (``op``), but for the last; attention lies beside a level's residual
    blocks (openaimodel.UNetModel)."""
    blocks = _count(tensors, r"input_blocks\.(\d+)\.")
    ends = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in tensors] + [blocks]
    attention = [f"input_blocks.{end - 1}.1.norm.weight" in tensors for end in ends]
    context = tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return {
        "sample_size": sample_size,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors["out.2.weight"]),
        "block_out_channels": tuple(
            len(tensors[f"input_blocks.{end - 1}.0.out_layers.3.weight"]) for end in ends
        ),
        "layers_per_block": ends[0] - 1,
        "cross_attention_dim": context,
        "attention_head_dim": heads,  # which diffusers takes for heads
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "transformer_layers_per_block": max(
            1, _count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
        ),
    }


def _unet_names(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    layers, named = int(config["layers_per_block"]), dict[str, Tensor]()
    for name, tensor in tensors.items():
        new = _renamed(name, _UNET_ENDS)
        if match := re.match(r"input_blocks\.(\d+)\.(\d)\.(.+)", new):
            level, layer = divmod(int(match[1]) - 1, layers + 1)
            part = ("resnets", "attentions")[int(match[2])]
            new = f"down_blocks.{level}.{part}.{layer}.{match[3]}"
            if match[3].startswith("op."):
                new = f"down_blocks.{level}.downsamplers.0.conv.{match[3].removeprefix('op.')}"
        elif match := re.match(r"output_blocks\.(\d+)\.(\d)\.(.+)", new):
            level, layer = divmod(int(match[1]), layers + 1)
            part = "resnets" if match[2] == "0" else "attentions"
            new = f"up_blocks.{level}.{part}.{layer}.{match[3]}"
            if match[3].startswith("conv."):
                new = f"up_blocks.{level}.upsamplers.0.{match[3]}"
        named[_renamed(new, _RESNET)] = tensor
    return named


def _vq_config(tensors: Tensors, scale: float) -> dict[str, Any]:
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    embeddings = tensors["quantize.embedding.weight"]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "block_out_channels": tuple(
            len(tensors[f"encoder.down.{i}.block.0.conv2.weight"]) for i in range(levels)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": len(tensors["encoder.conv_out.weight"]),
        "num_vq_embeddings": len(embeddings),
        "vq_embed_dim": embeddings.shape[1],
        "scaling_factor": scale,
    }


def _vq_names(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
    levels, named = len(config["block_out_channels"]), dict[str, Tensor]()
    for name, tensor in tensors.items():
        new = _renamed(name, _VQ_PARTS)
        if match := re.match(r"(encoder|decoder)\.(down|up)\.(\d+)\.(.+)", new):
            level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
            rest = match[4].replace("block.", "resnets.").replace("sample.", "samplers.0.")
            new = f"{match[1]}.{match[2]}_blocks.{level}.{rest}"
        if ".attentions.0." in new and new.endswith("weight") and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]  # 1 x 1 convolutions became linear layers
        named[new] = tensor
    return named


def _scheduler(tensors: Tensors, path: Any) -> DDIMScheduler:
    """LDM's schedule: linear in the roots of beta; from the checkpoint's own betas where it has them."""
    betas = tensors.get("betas", _roots(0.0015, 0.0195, 1000)).double()
    if not torch.allclose(betas, _roots(float(betas[0]), float(betas[-1]), len(betas)), rtol=1e-3):
        raise AquabitError(
            f"{path} was trained with betas that are not linear in their roots; its schedule is not known"
        )
    return DDIMScheduler(
        len(betas),
        float(betas[0]),
        float(betas[-1]),
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def _roots(first: float, last: float, steps: int) -> Tensor:
    return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
