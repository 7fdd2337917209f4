"""How ComfyUI calls the tensors of a model: a denoiser's as they were first published (``gguf_names``), those
of a text encoder as they are in the files that it was made for.

Facts of ComfyUI 0.29.0: comfy/sd.py (detect_te_model tells an encoder by its names and sizes,
load_text_encoder_state_dicts), comfy/sd1_clip.py and comfy/text_encoders. transformers 5 calls some of them
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from aquabit.exports.gguf_names import EMBEDDING, Place, reference_names

Prefixes = tuple[tuple[str, str], ...]  # ours, theirs: of the first that a name begins with

INSIDE: Prefixes = (("", "model."),)
ENCODERS: Mapping[str, Prefixes] = {  # by transformers' class
    "T5EncoderModel": (),
    "UMT5EncoderModel": (),
    "LlamaModel": INSIDE,
    "LlamaForCausalLM": (),
    "Qwen3Model": INSIDE,
    "Qwen3ForCausalLM": (),
    "Gemma2Model": INSIDE,
    "Gemma2ForCausalLM": (),
    "Qwen2_5_VLForConditionalGeneration": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "Mistral3ForConditionalGeneration": (("model.language_model.", "model."),),
}
TOKENIZERS = {  # of encoders whose tokenizer ComfyUI takes from the same file: the tensor
    "UMT5EncoderModel": "spiece_model",
    "Gemma2Model": "spiece_model",
    "Gemma2ForCausalLM": "spiece_model",
    "Mistral3ForConditionalGeneration": "tekken_model",
}


class Plan(NamedTuple):
    """Where the tensors of a file lie, and what is to be said of their names."""

    places: tuple[Place, ...]
    said: str
    is_encoder: bool = False


def plan_of(network: nn.Module) -> Plan:
    """What a file of this network is to hold."""
    own, names = type(network).__name__, list(network.state_dict())
    if own in ENCODERS:
        known = "the names of ComfyUI's text encoders, among which it goes (models/text_encoders)"
        return Plan(encoder_places(own, names), known, True)
    found = reference_names(own, names)
    if found is not None:
        return Plan(found[1], "the published names")
    return Plan(tuple(Place(n, (n,)) for n in names), "its own names: ComfyUI knows no such model")


def encoder_places(model_class: str, names: Sequence[str]) -> tuple[Place, ...]:
    """Where the tensors of a text encoder lie; empty for a class that ComfyUI does not have."""
    prefixes = ENCODERS.get(model_class)
    if prefixes is None:
        return ()
    return tuple(Place(_renamed(name, prefixes), (name,)) for name in names if name != EMBEDDING)


def _renamed(name: str, prefixes: Prefixes) -> str:
    for ours, theirs in prefixes:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
