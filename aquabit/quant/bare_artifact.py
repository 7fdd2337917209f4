"""Packed artifacts of a denoiser that diffusers does not know: a folder with the tensors and, in config.json,
the configuration; the model around them is the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aquabit.files import follow_umask, write_text, writing_folder
from aquabit.jsonio import read_json
from aquabit.quant.artifact import DIGEST, building, contents_of, described, digest_of, is_packed, verify
from aquabit.quant.bank import weight_hash
from aquabit.quant.diffusers_quantizer import AquabitConfig, attach_
from aquabit.quant.unpacking import Unpacking
from aquabit.scheme import AquabitError

CONFIG, CLASS = "config.json", "_class_name"
NAME = "model{suffix}.safetensors"  # of weights, numbered where there are several


def save_bare_denoiser(
    denoiser: nn.Module,
    folder: Path,
    max_shard_size: int | str = "10GB",
    config: Mapping[str, Any] | None = None,
    name: str = NAME,
) -> int:
    """Write a packed denoiser into a new folder, or in the place of another artifact, with the ``config`` of
    the model around it where that is known, weights in files of this ``name``; the bytes of its tensors.
    Raises AquabitError for a folder that holds something else."""
    if folder.is_dir() and any(folder.iterdir()) and not is_bare(folder):
        raise AquabitError(f"{folder} holds files that are no packed model of one's own; give another folder")
    found = contents_of(denoiser)
    assert found is not None
    tensors = _own_storage(found.tensors(denoiser.state_dict()))
    plain = described(found.config, found.statistics, found.inputs, found.tied, found.about)
    hashes = {name: weight_hash(tensor) for name, tensor in tensors.items()}
    model = {**(config or {}), CLASS: type(denoiser).__name__}
    value = {**model, "quantization_config": {**plain, DIGEST: digest_of(plain, hashes, model)}}
    parts = split_torch_state_dict_into_shards(tensors, filename_pattern=name, max_shard_size=max_shard_size)
    with writing_folder(folder, [name.format(suffix="*")], is_bare) as made:
        write_text(made / CONFIG, json.dumps(value, indent=2) + "\n")
        for file, keys in parts.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, made / file)
        follow_umask(made, made.glob("*.safetensors"))
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as safetensors wants them."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def is_bare(folder: Path) -> bool:
    """Whether a folder is an artifact that belongs to no pipeline and to no model of diffusers."""
    return (folder / CONFIG).is_file() and not (folder / "model_index.json").exists() and is_packed(folder)


def load_bare_denoiser_(
    denoiser: nn.Module, folder: Path, name: str = NAME, dtype: torch.dtype = torch.float32
) -> None:
    """Let a dense denoiser run from the codes in a folder: all its tensors are replaced. Raises AquabitError
    for one of another class or shape, and for missing, truncated or changed files."""
    if not is_bare(folder):
        raise AquabitError(f"{folder} holds no packed model of one's own; `aquabit quantize` makes one")
    value = read_json(folder / CONFIG)
    if value.get(CLASS) != type(denoiser).__name__:
        raise AquabitError(
            f"{folder} was made of a {value.get(CLASS)}, and the model's denoiser is a"
            f" {type(denoiser).__name__}; give the model that it was made of"
        )
    files = sorted(folder.glob(name.format(suffix="*")))
    with building(folder):
        asked = AquabitConfig.from_dict(value["quantization_config"])
        if not files:
            raise AquabitError(f"{folder} lacks its weights, {name.format(suffix='')}; quantize again")
        loading = Unpacking(denoiser, asked.weights, asked.facts, dtype)
        every = (
            denoiser.named_parameters(remove_duplicate=False),
            denoiser.named_buffers(remove_duplicate=False),
        )
        there = dict(chain(*every))
        missing = set(loading.expected) - loading.coded
        for path in files:
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for key, tensor in loading.take(state).items():
                missing.discard(key)
                _set(loading, there, key, tensor)
        loading.missing(missing)
        contents = loading.finish_()
        verify(files, asked.to_dict(), asked.digest)
    attach_(denoiser, contents)


def _set(loading: Unpacking, there: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """One dense tensor in its place; raises AquabitError where it has another shape."""
    own: Any = there.get(name)
    shape = None if own is None else own.shape
    if name in loading.own:
        layer, _, part = name.rpartition(".")
        own = getattr(loading.layers[layer], part)
        shape = loading.layers[layer].shape if part == "weight" else own.shape
    if shape != tensor.shape:
        wanted = "nothing of that name" if shape is None else list(shape)
        raise AquabitError(f"{name} is stored as {list(tensor.shape)}, the model has {wanted}")
    if name in loading.own:
        loading.set_(name, tensor, own.device)
    else:
        with torch.no_grad():
            own.copy_(tensor)
