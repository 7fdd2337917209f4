"""Fine-tuned weights in the bank: one file a set, named by the digest of its tensors; records of finished
runs; checkpoints of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight, from_tensors
from aquabit.quant.bank import TUNED, Bank, weight_hash
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig
from aquabit.scheme_record import Layout

SCALES = tuple(f"{name}{part}" for name in ("scale", "offset") for part in ("", "_over", "_base"))
PARTS = ("codes", "codebooks", *SCALES)

SHARED = "codebooks/"  # before the names of tensors that several layers use


def shared_name(choice: LayerChoice) -> str | None:
    """What the codebooks of a layer are stored under where it shares them."""
    return f"{SHARED}{choice.codebook}: {choice.weight}" if choice.weight.shared else None


def stored_tensors(weights: Mapping[str, CodebookWeight], config: QuantConfig) -> dict[str, Tensor]:
    """All tensors of coded weights by name, shared codebooks once."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        shared = shared_name(config[name])
        for part, tensor in weight.tensors().items():
            key = shared if shared is not None and part == "codebooks" else f"{name}.weight.{part}"
            found[key] = tensor.detach().cpu().contiguous()
    return found


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of SHA-256 over names, types, shapes and values, in order of name."""
    body = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        body.update(f"{name} {weight_hash(tensor)}\n".encode())
    return body.hexdigest()[:16]


def path_of(bank: Bank, tuned: str) -> Path:
    return bank.folder / f"{TUNED}{tuned}.safetensors"


def save_tuned(bank: Bank, weights: Mapping[str, CodebookWeight], config: QuantConfig) -> str:
    """Store weights that a configuration is tuned to; their digest, which becomes ``QuantConfig.tuned``."""
    tensors = stored_tensors(weights, config)
    digest = tensors_digest(tensors)
    bank.write(path_of(bank, digest), tensors)
    return digest


def load_tuned(
    bank: Bank, config: QuantConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, CodebookWeight]:
    """The weights of a tuned configuration; layers that share codebooks hold the same tensor. ``shapes`` are
    those of the model's weights.

    Raises AquabitError where the bank has no such file, where its tensors are not those that were stored, and
    where they belong to other schemes or shapes.
    """
    path = path_of(bank, str(config.tuned))
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError as error:
        raise AquabitError(
            f"the bank {bank.folder} has no fine-tuned tensors {config.tuned}; name the bank that they were"
            " tuned in, or fine-tune again"
        ) from error
    except (OSError, SafetensorError) as error:
        raise AquabitError(f"{path} cannot be read ({error}); it is damaged: fine-tune again") from error
    found = tensors_digest(tensors)
    if found != config.tuned:
        raise AquabitError(
            f"{path} holds tensors of digest {found}, not those that were tuned; it is damaged: fine-tune"
            " again"
        )
    return weights_from(tensors, config, shapes, path)


def weights_from(
    tensors: Mapping[str, Tensor], config: QuantConfig, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, CodebookWeight]:
    """What ``stored_tensors`` took apart; ``path`` is where it was read."""
    names = coded_layers(config)
    return {n: stored_weight(n, config[n], shapes[n], tensors, str(path)) for n in names}


def coded_layers(config: QuantConfig) -> list[str]:
    """The layers whose weight is coded."""
    return [name for name, choice in config.layers.items() if choice.weight != FP]


def stored_weight(
    name: str, choice: LayerChoice, shape: tuple[int, ...], tensors: Mapping[str, Tensor], source: str
) -> CodebookWeight:
    """A layer's weight from stored tensors; raises AquabitError, naming ``source``, where parts are missing,
    are there without a need, or do not fit scheme and shape."""
    own = {part: tensors[key] for part in PARTS if (key := f"{name}.weight.{part}") in tensors}
    shared = shared_name(choice)
    if shared is not None:
        if shared not in tensors:
            raise AquabitError(
                f"{source}: layer {name!r} shares the codebooks {shared!r}, which are not there"
            )
        own["codebooks"] = tensors[shared]
    layout = choice.weight.layout(shape)
    for part, wanted in _shapes(layout, shape[0]).items():
        found = tuple(own[part].shape) if part in own else None
        if found not in wanted:
            raise AquabitError(
                f"{source}: the {part} of layer {name!r} are {_said(found)}; {choice.weight} needs"
                f" {' or '.join(map(_said, wanted))}"
            )
    try:
        return from_tensors(own, shape, layout.bits, layout.order, layout)
    except AquabitError as error:
        raise AquabitError(
            f"{source}: the tensors of layer {name!r} do not fit {choice.weight}: {error}"
        ) from error


def _shapes(layout: Layout, out: int) -> dict[str, list[tuple[int, ...] | None]]:
    """What each part of a weight beside its codes may be; None where it has none."""
    found: dict[str, list[tuple[int, ...] | None]] = {part: [None] for part in PARTS[1:]}
    found["codebooks"] = [layout.codebook_shape(out)]
    if layout.scales is None:
        return found
    factors, n = layout.factors, layout.scales
    rows, _ = factors.shape(out, n)
    for name in ("scale", "offset") if layout.offset else ("scale",):
        found[name] = [(rows, n), *([(rows,)] if n == 1 else [])]
        if factors.coded:
            found[name] = [(ceil(out * n * factors.bits / 8),)]
        if factors.over is not None:
            found[f"{name}_over"] = [(factors.overs(out, n),)]
        if factors.base:
            found[f"{name}_base"] = [(1,)]
    return found


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def read_record(bank: Bank, key: str) -> dict[str, Any] | None:
    """What a finished run wrote; None where there is none whose tensors are still there."""
    try:
        value = json.loads((bank.folder / f"finetuned-{key}.json").read_text())
        return value if isinstance(value, dict) and path_of(bank, value["tuned"]).exists() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_record(bank: Bank, key: str, value: Mapping[str, Any]) -> None:
    bank.write_text(
        bank.folder / f"finetuned-{key}.json", json.dumps(value, indent=1, allow_nan=False) + "\n"
    )


def checkpoint_path(bank: Bank, key: str) -> Path:
    return bank.folder / f"tuning-{key}.safetensors"


def read_checkpoint(bank: Bank, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of an interrupted run; None where there is none, or it is not readable."""
    try:
        with safe_open(checkpoint_path(bank, key), "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["aquabit"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None
