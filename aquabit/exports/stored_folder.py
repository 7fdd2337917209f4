"""A quantized model's folder of another program, as it lies there: what its ``config.json`` says, and its
tensors. Files are untrusted input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from aquabit.graph import LayerGraph, layers
from aquabit.jsonio import clear_errors, read_json
from aquabit.scheme import AquabitError

Value = TypeVar("Value")
CONFIG = "quantization_config"


@dataclass(frozen=True)
class StoredFolder:
    """``path`` is what was named, ``described`` its ``quantization_config``; ``files`` says in which file
    each tensor lies, empty where there is a configuration alone."""

    path: str
    described: Mapping[str, Any]
    files: Mapping[str, Path]

    @property
    def method(self) -> str:
        """The program whose it is."""
        return str(self.described.get("quant_method"))

    def shape(self, name: str) -> tuple[int, ...]:
        with opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, U8, ..."""
        with opened(self.files[name]) as file:
            return str(file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        with opened(self.files[name]) as file:
            found: Tensor = file.get_tensor(name)
        return found


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of tensors; raises AquabitError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AquabitError(f"{path} cannot be read ({error}); it may be truncated") from error


def described_in(path: str | Path) -> StoredFolder | None:
    """What lies at ``path``: a model's folder, a pipeline's with one such model, or a JSON file that is or
    holds a ``quantization_config``; None where none of these says how it is quantized."""
    place = Path(path)
    if place.is_file():
        found = _described(place) if place.suffix == ".json" else None
        return None if found is None else StoredFolder(str(path), found, {})
    if not place.is_dir():
        return None
    models = [place] if (place / "config.json").is_file() else sorted(place.iterdir())
    said = {model: _described(model / "config.json") for model in models if (model / "config.json").is_file()}
    quantized = {model: value for model, value in said.items() if value is not None}
    if len(quantized) > 1:
        listed = ", ".join(model.name for model in quantized)
        raise AquabitError(f"{path} holds several quantized models ({listed}); name the folder of one")
    for model, value in quantized.items():
        return StoredFolder(str(model), value, dict(_tensors(model)))
    return None


def _described(path: Path) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a JSON file."""
    value = read_json(path)
    inner = value.get(CONFIG, value) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) and "quant_method" in inner else None


def _tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as file:
            yield from ((name, path) for name in file.keys())  # noqa: SIM118


def validated(kind: type[Value], value: Any, source: str) -> Value:
    """A dataclass from the JSON object of its fields, others left out; raises AquabitError for values of
    other types."""
    from pydantic import TypeAdapter  # 0.1 s to import: only where a file is read

    with clear_errors(source):
        return TypeAdapter(kind).validate_python(value)


def one_network(graph: LayerGraph, path: str) -> dict[str, dict[str, Any]]:
    """The layers of a model of one network; raises AquabitError for one of several."""
    if "parts" in graph.graph:
        several = ", ".join(graph.graph["parts"])
        raise AquabitError(f"{path} holds one network, and the model has {several}; give one component")
    return layers(graph)


def lacking(folder: StoredFolder, name: str) -> AquabitError:
    return AquabitError(f"{folder.path} is no folder of this model: it lacks {name!r}")


FLOATS = ("F64", "F32", "F16", "BF16")


def check_shape(
    folder: StoredFolder, name: str, wanted: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS
) -> None:
    """Raise AquabitError where a tensor is missing, or of another shape or type."""
    if name not in folder.files:
        raise lacking(folder, name)
    found, dtype = folder.shape(name), folder.dtype(name)
    if found != wanted or dtype not in dtypes:
        raise AquabitError(
            f"{folder.path} is no folder of this model: {name} is {dtype} {list(found)} there,"
            f" {' or '.join(dtypes)} {list(wanted)} is needed"
        )
