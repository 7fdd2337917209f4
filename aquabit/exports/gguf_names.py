"""How the tensors of a denoiser are named where its weights were first published: what ComfyUI-GGUF and
stable-diffusion.cpp know them by, and what diffusers' ``from_single_file`` takes apart; of a text encoder
those of llama.cpp, which ComfyUI-GGUF knows.

An architecture is a table (``gguf_tables``), or what makes one of a model's names; a new one is entered in
``ARCHITECTURES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aquabit.exports import gguf_tables as tables

LDM = "model.diffusion_model."  # before the denoiser's names in a checkpoint that holds other networks too


@dataclass(frozen=True)
class Place:
    """A tensor of a file, and the tensors of ours whose rows make it, in order; ``swapped``: then its halves
    change places."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


class Architecture(NamedTuple):
    """A kind of denoiser: its name in files (``general.architecture``), as ComfyUI-GGUF knows it, and its
    table; ``open``: what no line names keeps its name; ``split``: how a tensor's name ends of whose first
    part diffusers takes the rows for granted, and how many; ``repeated``: tensors that are others by a second
    name, which files leave out."""

    name: str
    table: str | Callable[[Sequence[str]], str]
    open: bool = False
    split: tuple[str, int] | None = None
    repeated: tuple[str, ...] = ()


UNET_RESNET = """
norm1          in_layers.0
conv1          in_layers.2
norm2          out_layers.0
conv2          out_layers.3
time_emb_proj  emb_layers.1
conv_shortcut  skip_connection
"""
UNET_ATTENTION = "\n".join(f"{n} {n}" for n in ("norm", "proj_in", "proj_out", "transformer_blocks"))
UNET_ENDS = """
@ - -
time_embedding.linear_1  time_embed.0
time_embedding.linear_2  time_embed.2
add_embedding.linear_1   label_emb.0.0
add_embedding.linear_2   label_emb.0.2
conv_in                  input_blocks.0.0
conv_norm_out            out.0
conv_out                 out.2
"""


def unet(names: Sequence[str]) -> str:
    """The table of a U-Net of latent diffusion, whose blocks are numbered through."""
    resnet = re.compile(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.")
    numbers = [(m[1], int(m[2]), int(m[3])) for n in names if (m := resnet.match(n))]
    per = 1 + max((r for side, block, r in numbers if side == "down" and block == 0), default=0)
    attentive = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}

    def count(side: str) -> int:
        return 1 + max((block for s, block, _ in numbers if s == side), default=-1)

    def parts() -> Iterator[str]:
        for b in range(count("down")):
            for r in range(per):
                there = f"input_blocks.{b * (per + 1) + r + 1}"
                yield f"@ down_blocks.{b}.resnets.{r} {there}.0{UNET_RESNET}"
                yield f"@ down_blocks.{b}.attentions.{r} {there}.1\n{UNET_ATTENTION}"
            yield f"@ down_blocks.{b}.downsamplers.0 input_blocks.{(b + 1) * (per + 1)}.0\nconv op"
        for b in range(count("up")):
            for r in range(per + 1):
                there = f"output_blocks.{b * (per + 1) + r}"
                yield f"@ up_blocks.{b}.resnets.{r} {there}.0{UNET_RESNET}"
                yield f"@ up_blocks.{b}.attentions.{r} {there}.1\n{UNET_ATTENTION}"
            after = f"output_blocks.{b * (per + 1) + per}.{2 if str(b) in attentive else 1}"
            yield f"@ up_blocks.{b}.upsamplers.0 {after}\nconv conv"
        yield f"@ mid_block.resnets.0 middle_block.0\n@ mid_block.resnets.1 middle_block.2{UNET_RESNET}"
        yield f"@ mid_block.attentions.0 middle_block.1\n{UNET_ATTENTION}"

    return "\n".join((*parts(), UNET_ENDS))


_WAN = Architecture("wan", tables.WAN)
ARCHITECTURES: dict[str, Architecture] = {  # by diffusers' class
    "UNet2DConditionModel": Architecture("sd1", unet),
    "SD3Transformer2DModel": Architecture("sd3", tables.SD3),
    "FluxTransformer2DModel": Architecture("flux", tables.FLUX, split=("linear1", 3072)),
    "ChromaTransformer2DModel": Architecture("flux", tables.CHROMA, split=("linear1", 3072)),
    "Flux2Transformer2DModel": Architecture("flux", tables.FLUX2),
    "AuraFlowTransformer2DModel": Architecture("aura", tables.AURA),
    "HiDreamImageTransformer2DModel": Architecture("hidream", "", True),
    "CosmosTransformer3DModel": Architecture("cosmos", tables.COSMOS),
    "LTXVideoTransformer3DModel": Architecture("ltxv", tables.LTX, True),
    "LTX2VideoTransformer3DModel": Architecture("ltxv", tables.LTX2, True),
    "HunyuanVideoTransformer3DModel": Architecture("hyvid", tables.HUNYUAN_VIDEO, split=("linear1", 3072)),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "Lumina2Transformer2DModel": Architecture("lumina2", tables.LUMINA2, split=("qkv", 2304)),
    "ZImageTransformer2DModel": Architecture("lumina2", tables.Z_IMAGE, True),
    "QwenImageTransformer2DModel": Architecture("qwen_image", "", True),
    "QwenImage21Transformer2DModel": Architecture("qwen_image", tables.QWEN_IMAGE21, True),
}

EMBEDDING = "encoder.embed_tokens.weight"  # of T5, whose first name is shared.weight
TEXT_ENCODERS: dict[
    str, Architecture
] = {  # by transformers' class; with wi_0 and wi_1, as llama.cpp has them
    "T5EncoderModel": Architecture("t5encoder", tables.T5, repeated=(EMBEDDING,))
}


class Rule(NamedTuple):
    """How one module of ours is called."""

    pattern: re.Pattern[str]
    theirs: str
    swapped: bool

    def of(self, name: str) -> str | None:
        """What a tensor of ours is called there; None where it is none of this module's."""
        found = self.pattern.match(name)
        if found is None:
            return None
        numbers = iter(found.groups())
        return re.sub("#", lambda _: next(numbers), self.theirs) + name[found.end() :]


def _rules(table: str, names: Sequence[str]) -> Iterator[Rule]:
    """The rules of a table, those of a line's names in order."""
    last = str(max((int(n) for name in names for n in re.findall(r"^\w+blocks\.(\d+)\.", name)), default=0))
    heads: list[tuple[str, str]] = []
    in_head = False
    for line in filter(None, table.splitlines()):
        ours, theirs = line.removeprefix("@").split()
        if line.startswith("@"):
            heads = [*(heads if in_head else []), (ours, theirs)]
        else:
            for before, there in heads:
                for one in ours.split(","):
                    yield _rule(
                        _joined(before, one), _joined(there, theirs.lstrip("~")), last, theirs[0] == "~"
                    )
        in_head = line.startswith("@")


def _joined(prefix: str, name: str) -> str:
    return name if prefix == "-" else f"{prefix}.{name}"


def _rule(ours: str, theirs: str, last: str, swapped: bool) -> Rule:
    pattern = re.escape(ours).replace(r"\#", r"(\d+)").replace("!", last)
    return Rule(re.compile(pattern + r"(?=\.|$)"), theirs.replace("!", last), swapped)


def places_of(architecture: Architecture, names: Sequence[str]) -> tuple[Place, ...]:
    """Where the tensors of a model lie (``names``: all of them); empty where no line names one of them."""
    table = architecture.table
    rules = list(_rules(table(names) if callable(table) else table, names))
    parts: dict[str, list[tuple[int, str]]] = {}
    swapped: set[str] = set()
    for name in names:
        if name in architecture.repeated:
            continue
        found = ((rank, rule.of(name), rule.swapped) for rank, rule in enumerate(rules))
        hit = next((one for one in found if one[1] is not None), None)
        if hit is None and not architecture.open:
            return ()
        rank, there, swaps = hit or (0, None, False)
        parts.setdefault(there or name, []).append((rank, name))
        if swaps:
            swapped.add(there or name)
    prefix = LDM if callable(table) else ""
    return tuple(
        Place(prefix + there, tuple(part for _, part in sorted(row)), there in swapped)
        for there, row in parts.items()
    )


def reference_names(model_class: str, names: Sequence[str]) -> tuple[str, tuple[Place, ...]] | None:
    """The architecture and the places of the tensors of a class of denoisers or text encoders; None where
    they are not known."""
    architecture = ARCHITECTURES.get(model_class) or TEXT_ENCODERS.get(model_class)
    places = () if architecture is None else places_of(architecture, names)
    if architecture is None or not places:
        return None
    is_xl = architecture.name == "sd1" and any(n.startswith("add_embedding.") for n in names)
    return ("sdxl" if is_xl else architecture.name), places
