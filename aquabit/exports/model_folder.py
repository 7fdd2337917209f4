"""A model's folder as diffusers or transformers reads it: ``config.json`` with the program's
``quantization_config``, the tensors in one file, and a note of what was written. Of a model that neither
knows ``config.json`` says nothing else: the program puts the tensors into the user's own network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from aquabit.exports.exported import Exported
from aquabit.files import follow_umask, write_text, writing_folder
from aquabit.graph import fixed_layers, rebuilt, repeated_names
from aquabit.jsonio import read_object
from aquabit.quant.model import storage_dtype
from aquabit.scheme import FP, AquabitError, LayerChoice

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
MODEL_WEIGHTS = "model.safetensors"  # that transformers looks for
NOTE = "aquabit.json"  # tells a folder that was written here, and may be written again
DROPPED = (
    "quantization_config",
    "_name_or_path",
)  # of a model's configuration: what is said anew, or of here


Loader = Literal["diffusers", "transformers", "none"]


def loader_of(network: nn.Module) -> Loader:
    """The package whose ``from_pretrained`` builds a model of this class again from a folder."""
    if hasattr(network, "register_to_config"):
        return "diffusers"
    is_pretrained = hasattr(network, "base_model_prefix") and hasattr(network, "config")
    return "transformers" if is_pretrained else "none"


def choices(exported: Exported) -> dict[str, LayerChoice]:
    """Every place of a layer that is quantized: those that share a weight are named each."""
    config, tied = exported.config, exported.graph.graph.get("tied", {})
    every = {**config.layers, **{place: config[first] for place, first in tied.items()}}
    return {name: choice for name, choice in every.items() if choice.weight != FP}


def check_model(exported: Exported, program: str) -> None:
    """Raise AquabitError for what a model's folder cannot hold: a model of diffusers that was changed after
    it was built, and layers that must stay dense."""
    network = exported.network
    model = rebuilt(network)
    sizes, built = (_sizes(net) for net in (network, model or network))
    changed = [name for name in {**sizes, **built} if sizes.get(name) != built.get(name)]
    if changed:
        raise AquabitError(
            f"{type(network).__name__} was changed after it was built ({changed[0]}), and its config.json"
            " does not say so: the folder would not load; undo that, as with unfuse_qkv_projections()"
        )
    found, repeated = choices(exported), repeated_names(network)
    for name, why in fixed_layers(exported.graph).items():
        if name in found:
            raise AquabitError(f"layer {name!r} cannot be {found[name].weight}: {why}; it must be fp")
    for name, choice in found.items():
        if f"{name}.weight" in repeated:
            raise AquabitError(
                f"layer {name!r} is a module with two names, which {program} would take for two layers; leave"
                f" it at fp instead of {choice.weight}"
            )


def _sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def dense_tensors(network: nn.Module, coded: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor but the weights of ``coded`` layers, at the 16 bits at which they are counted and run; of
    a model of the user's own, whose names ``load_state_dict`` wants all, also those that others repeat."""
    repeated = repeated_names(network) if loader_of(network) != "none" else set()
    left_out = {f"{name}.weight" for name in coded} | repeated
    return {
        name: tensor.detach().to(storage_dtype(tensor)).cpu()
        for name, tensor in network.state_dict().items()
        if name not in left_out
    }


def write_model(
    exported: Exported,
    out: Path,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    to: str,
    said: list[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folder with ``described`` as its ``quantization_config``. It may take the place of one that was
    written here for the same program; raises AquabitError where other files would be lost."""
    weights = WEIGHTS if loader_of(exported.network) == "diffusers" else MODEL_WEIGHTS
    note = {"to": to, "config": exported.config.digest, "said": said}
    own = {
        name: tensor.contiguous().clone() for name, tensor in tensors.items()
    }  # none shares another's memory
    with writing_folder(out, (), lambda folder: is_ours(folder, to)) as made:
        write_text(
            made / "config.json", _text({**_described(exported.network), "quantization_config": described})
        )
        write_text(made / NOTE, _text(note))
        save_file(own, made / weights, {"format": "pt", **(metadata or {})})
        follow_umask(made, [made / weights])


def _described(network: Any) -> dict[str, Any]:
    """What ``config.json`` says of a model besides its quantization; nothing of one of the user's own."""
    found: dict[str, Any] = {}
    if loader_of(network) == "diffusers":
        found = json.loads(network.to_json_string())
    elif loader_of(network) == "transformers":
        found = {**network.config.to_dict(), "architectures": [type(network).__name__]}
    return {key: value for key, value in found.items() if key not in DROPPED}


def loading(network: nn.Module, by_hand: str) -> list[str]:
    """How a folder is loaded that diffusers does not load; ``by_hand`` is said of a model of one's own."""
    name, loader = type(network).__name__, loader_of(network)
    if loader == "transformers":
        return [f"transformers loads it: {name}.from_pretrained(DIR)"]
    if loader == "none":
        return [
            f"no package builds {name} again, so the folder holds its tensors and the quantization_config"
            f" alone: {by_hand}"
        ]
    return []


def is_ours(folder: Path, to: str) -> bool:
    """Whether a folder was written here for the same program, and may be written again."""
    with suppress(AquabitError):
        return read_object(folder / NOTE).get("to") == to
    return False


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def counted(exported: Exported, tensors: Mapping[str, Tensor]) -> str:
    """The bytes that are written of coded layers beside those that the configuration counts."""
    names = set(choices(exported))
    held = sum(t.numel() * t.element_size() for k, t in tensors.items() if _owner(k, names))
    ours = sum(weight.nbytes for weight in exported.weights.values())
    return f"the weights of {len(names)} layers take {held:,} bytes; the configuration counts {ours:,}"


def _owner(key: str, names: set[str]) -> bool:
    """Whether a stored tensor is one of a coded layer's weight."""
    parts = key.split(".")
    return not key.endswith(".bias") and any(".".join(parts[:n]) in names for n in range(1, len(parts)))
