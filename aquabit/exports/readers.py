"""What others made of a model, as a configuration of ours, by what a path is: a GGUF file, a quantized file
of ComfyUI's, a folder or a ``quantization_config`` of SDNQ, bitsandbytes or torchao."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from aquabit.exports import bitsandbytes_reader, comfy_reader, gguf_reader, sdnq_reader, torchao_reader
from aquabit.exports.comfy_reader import is_comfy
from aquabit.exports.gguf_file import is_gguf
from aquabit.exports.stored_folder import StoredFolder, described_in
from aquabit.graph import LayerGraph
from aquabit.scheme import METHOD, AquabitError, QuantConfig

Reader = Callable[[LayerGraph, str], QuantConfig]  # of a model's graph and its fingerprint
FOLDERS: dict[str, Callable[[StoredFolder, LayerGraph, str], QuantConfig]] = {
    "sdnq": sdnq_reader.read,
    "bitsandbytes": bitsandbytes_reader.read,
    "torchao": torchao_reader.read,
}


def reader_of(path: str | Path) -> Reader | None:
    """What reads the configuration of a model that lies at ``path``, activations off; None where that is
    nothing of another program. Raises AquabitError for a program that is not known; the reader does where
    something is damaged, of another model, or in a format that no scheme here is."""
    if is_gguf(path):
        return partial(gguf_reader.read, path)
    if is_comfy(path):
        return partial(comfy_reader.read, path)
    folder = described_in(path)
    if folder is None or folder.method == METHOD:
        return None
    if folder.method not in FOLDERS:
        known = ", ".join(FOLDERS)
        raise AquabitError(
            f"{folder.path} is quantized by {folder.method!r:.40}; known are {known},"
            " and files of GGUF and ComfyUI"
        )
    return partial(FOLDERS[folder.method], folder)


def read_others(path: str | Path, graph: LayerGraph, fingerprint: str) -> QuantConfig | None:
    """The configuration of a model that lies at ``path``, as ``reader_of``'s; None where it has none."""
    read = reader_of(path)
    return None if read is None else read(graph, fingerprint)
