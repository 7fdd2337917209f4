"""Whether a loaded pipeline has all its weights: libraries leave those that a file lacks on the meta device,
or draw them at random."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from aquabit.scheme import AquabitError

WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile and DataParallel put before the names of a part
NAMED = 3  # missing weights that a message names
UNUSED = ("safety_checker",)  # components that are off while images are made
UNREAD = ("pooler.",)  # weights of text encoders that pipelines do not read, and that many files lack


def check_complete(pipe: DiffusionPipeline) -> None:
    """Raise AquabitError, naming the component, the weights that its files lack, and the prefix that their
    names have there, where a part of a pipeline was not loaded whole."""
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module) or part in UNUSED:
            continue
        lacking = missing(module)
        if not lacking:
            continue
        some, rest = ", ".join(lacking[:NAMED]), len(lacking) - NAMED
        more = f" and {rest} more" if rest > 0 else ""
        raise AquabitError(
            f"{part} lacks {len(lacking)} of {len(module.state_dict())} weights ({some}{more})"
            f"{_why(module, lacking)}"
        )


def missing(module: nn.Module) -> list[str]:
    """The weights of a model that its files did not hold."""
    left = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if left or not hasattr(module, "all_tied_weights_keys"):  # only transformers draws what is not there
        return left
    folder, stored = folder_of(module), set(stored_names(module))
    if folder is None or not stored or set(module.state_dict()) <= stored:
        return []
    # some names are others than the model's: transformers knows which of them are the same
    cls: Any = type(module)
    found = cls.from_pretrained(folder, output_loading_info=True, device_map="meta")[1]["missing_keys"]
    return sorted(name for name in found if not name.removeprefix("bert.").startswith(UNREAD))


def origin(part: Any) -> str | None:
    """What diffusers and transformers remember of where a pipeline or a component was loaded from: a folder,
    or an id of the hub."""
    config = getattr(part, "config", None)
    if isinstance(config, Mapping):
        named = config.get("_name_or_path")
    else:
        named = getattr(config, "_name_or_path", None)
    return str(named) if isinstance(named, str | Path) and str(named) else None


def folder_of(module: nn.Module) -> Path | None:
    """Where a component was loaded from; None where that is no folder of this machine."""
    named = origin(module)
    return Path(named) if named is not None and Path(named).is_dir() else None


def stored_names(module: nn.Module) -> Iterator[str]:
    """The names of all tensors in a component's safetensors files."""
    folder = folder_of(module)
    for path in () if folder is None else sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                yield from file.keys()
        except (OSError, SafetensorError):
            return


def _why(module: nn.Module, lacking: list[str]) -> str:
    """What the names in the files have in them that the model's do not; what to do."""
    own, wanted = set(module.state_dict()), set(lacking)
    for name in stored_names(module):
        if name in own:
            continue
        parts = name.split(".")
        tails = (i for i in range(1, len(parts)) if ".".join(parts[i:]) in wanted)
        extra = next((".".join(parts[:i]) + "." for i in tails), None)
        extra = extra or next((w for w in WRAPPERS if name.replace(w, "") in wanted), None)
        if extra is not None:
            return (
                f": the names in its file have {extra!r} in them, as {name}; save the state_dict of the model"
                " itself, not of what wraps it"
            )
    return "; its file is incomplete, or of another model: save or download it again"
