"""Packed artifacts: a diffusers pipeline directory whose denoiser is stored as codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import networkx as nx
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aquabit.graph import described_inputs, trace
from aquabit.kernels.codebook import CodebookWeight, from_tensors
from aquabit.quant.finetune_store import SHARED, shared_name
from aquabit.quant.layers import QuantConv2d, QuantLinear, quant_layer
from aquabit.quant.model import QuantizedDenoiser, storage_dtype
from aquabit.quant.sampling import follow_
from aquabit.quant.statistics import FILE, Statistics
from aquabit.quant.switch import input_parts, settings_of, share_out_, switches
from aquabit.scheme import FP, AquabitError, QuantConfig, read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
RANGES = "ranges/"  # before the names of layers whose static ranges are stored
CONFIG = "_aquabit_quantization"  # the attribute of a loaded denoiser that holds its configuration
RECIPE = "quantization.json"  # configuration and, for each coded layer, how its codes are to be read


def is_packed(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def packed_tensors(model: QuantizedDenoiser, config: QuantConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors to store, full-precision ones at 16 bits, and per coded layer its shape, code bits and order, and the name of the tensor
    that holds its codebooks where it shares them."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    coded = {n: weight for n, layer in model.layers.items() if (weight := layer.coded) is not None}
    for name, tensor in model.denoiser.state_dict().items():
        if name.removesuffix(".weight") not in coded:
            tensors[name] = tensor.detach().to(storage_dtype(tensor)).contiguous().cpu()
    for name, weight in coded.items():
        choice = config[name]
        own = {f"{name}.weight.{k}": v for k, v in weight.tensors().items() if k != "codebooks" or not choice.weight.shared}
        shared = shared_name(choice)
        specs[name] = {"shape": list(weight.shape), "bits": weight.bits, "order": weight.order, "codebooks": shared}
        if shared is not None:
            assert weight.codebooks is not None
            own[shared] = weight.codebooks
        tensors |= {k: v.contiguous().cpu() for k, v in own.items()}
    tensors |= {f"{RANGES}{name}": ends for name, ends in (model.ranges(config) or {}).items()}
    return tensors, specs


def save_packed_denoiser(model: QuantizedDenoiser, config: QuantConfig, folder: Path) -> int:
    """Write a packed denoiser into a component folder; the bytes of its tensors, which are the file's size without its header."""
    tensors, specs = packed_tensors(model, config)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    try:
        save_file(tensors, folder / WEIGHTS)
        recipe = {"config": config.to_dict(), "layers": specs, "class": type(model.denoiser).__name__}
        if model.inputs is not None:
            recipe["inputs"] = model.inputs
        (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
        model.denoiser.save_config(folder)  # type: ignore[operator]
    except (OSError, SafetensorError) as error:
        raise AquabitError(f"the packed model could not be written to {folder}: {error}") from error
    return sum(t.numel() * t.element_size() for t in tensors.values())


def load_packed_denoiser(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A denoiser that runs from its codes; raises AquabitError for missing, truncated or inconsistent files."""
    recipe = read_json(folder / RECIPE)
    if not isinstance(recipe, dict) or not {"config", "layers", "class"} <= set(recipe):
        raise AquabitError(f"{folder / RECIPE} needs config, layers and class")
    config = QuantConfig.from_dict(recipe["config"], str(folder / RECIPE))
    cls: Any = getattr(diffusers, str(recipe["class"]), None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
    if not known:
        raise AquabitError(f"{folder / RECIPE}: {recipe['class']!r} is no model class of diffusers")
    with init_empty_weights(include_buffers=False):
        denoiser: nn.Module = cls.from_config(read_json(folder / "config.json"))
    graph = trace(denoiser, described_inputs(recipe["inputs"]) if "inputs" in recipe else None)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AquabitError(f"{folder / WEIGHTS} cannot be read ({error}); it may be truncated: quantize again") from error
    _fill(denoiser, graph, config, recipe["layers"], tensors, dtype, folder)
    object.__setattr__(denoiser, CONFIG, config)  # no module or parameter of it
    return denoiser.eval().requires_grad_(False)


def config_of(denoiser: nn.Module) -> QuantConfig | None:
    """The configuration that a denoiser was packed by; None where it was not loaded from an artifact."""
    return getattr(denoiser, CONFIG, None)


def load_statistics(folder: Path, config: QuantConfig) -> Statistics:
    """The noise statistics beside a packed denoiser; raises AquabitError where they are missing or of another configuration."""
    if not (folder / FILE).is_file():
        raise AquabitError(
            f"{folder} is to be corrected ({config.correction}), but {FILE} is missing; run `aquabit quantize --correct` again"
        )
    statistics = Statistics.load(folder / FILE)
    statistics.check(config.fingerprint, replace(config, correction=None).digest)
    return statistics


def _fill(
    denoiser: nn.Module,
    graph: nx.DiGraph,
    config: QuantConfig,
    specs: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Quantized layers and every other tensor from the file, none left over and none missing."""
    from aquabit.quant.attention import patch_attention_

    coded = {name: _coded(name, spec, tensors, folder) for name, spec in specs.items()}
    nodes, placed = {n: a for n, a in graph.nodes(data=True) if a["kind"] != "merge"}, dict[str, QuantLinear | QuantConv2d]()
    wrong = [n for n in (*coded, *config.layers) if n not in nodes]
    if wrong:
        raise AquabitError(f"{folder}: layer {wrong[0]!r} is not in this model")
    for name in graph.graph.get("uncalled", ()):  # the model reads their weights: they stay as they are, in its dtype
        if name in coded:
            raise AquabitError(f"{folder}: layer {name!r} is stored as codes, but the model never calls it; quantize again")
        del nodes[name]
    for name, node in nodes.items():
        layer = quant_layer(denoiser.get_submodule(name), node.get("split"))
        if name in coded and tuple(coded[name].shape) != tuple(layer.shape):
            raise AquabitError(f"{folder}: layer {name!r} is stored as {list(coded[name].shape)}, the model has {list(layer.shape)}")
        _place(denoiser, name, layer, coded.get(name), config)
        placed[name] = layer
    own = {f"{n}.{part}" for n in nodes for part in ("weight", "bias")}  # layers widen their own 16-bit tensors as they use them
    rest = {k: v for k, v in tensors.items() if not _is_code(k, coded)}
    left = {k: v.to(dtype) if v.is_floating_point() and k not in own else v for k, v in rest.items()}
    missing, unexpected = denoiser.load_state_dict(left, strict=False, assign=True)
    missing = [m for m in missing if m.removesuffix(".weight") not in coded]
    if missing or unexpected:
        raise AquabitError(f"{folder / WEIGHTS} does not fit the model: missing {missing[:2]}, unexpected {list(unexpected)[:2]}")
    patch_attention_(denoiser)
    attention = {n for n, a in nodes.items() if a.get("attention")}
    settings = settings_of(config, placed, attention, _ranges(config, placed, attention, tensors, folder))
    share_out_(config, placed, settings)
    follow_(denoiser, None, switches(config, placed, settings))  # the pipeline's scheduler comes later


def _place(denoiser: nn.Module, name: str, layer: QuantLinear | QuantConv2d, coded: CodebookWeight | None, config: QuantConfig) -> None:
    if coded is not None:
        layer.weight = torch.empty(0)
        layer.set_packed_(coded, config[name].weight)
    elif config[name].weight != FP:
        raise AquabitError(f"layer {name!r} should be {config[name].weight}, but no codes are stored for it")
    owner, _, leaf = name.rpartition(".")
    setattr(denoiser.get_submodule(owner), leaf, layer)


def _ranges(
    config: QuantConfig, layers: dict[str, QuantLinear | QuantConv2d], attention: set[str], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The stored static ranges; raises AquabitError where one is missing or of another shape than the configuration asks for."""
    found = {}
    for name, layer in layers.items():
        shape, ends = (config.range_parts(name), input_parts(layer) + (name in attention), 2), tensors.get(f"{RANGES}{name}")
        if shape[0] and (ends is None or tuple(ends.shape) != shape or not bool(torch.isfinite(ends).all())):
            raise AquabitError(f"{folder}: layer {name!r} needs static ranges of shape {list(shape)}, which are not stored")
        if ends is not None:
            found[name] = ends
    return found


def _is_code(key: str, coded: dict[str, CodebookWeight]) -> bool:
    layer, _, part = key.rpartition(".weight.")
    return key.startswith((SHARED, RANGES)) or (part in ("codes", "codebooks", "scale", "offset") and layer in coded)


def _coded(name: str, spec: Any, tensors: dict[str, Tensor], folder: Path) -> CodebookWeight:
    own = {k: tensors[f"{name}.weight.{k}"] for k in ("codes", "codebooks", "scale", "offset") if f"{name}.weight.{k}" in tensors}
    shared = spec.get("codebooks") if isinstance(spec, dict) else None
    if shared is not None:
        if shared not in tensors or not str(shared).startswith(SHARED):
            raise AquabitError(f"{folder}: layer {name!r} shares the codebooks {shared!r}, which are not stored")
        own["codebooks"] = tensors[shared]
    try:
        return from_tensors(own, tuple(int(s) for s in spec["shape"]), int(spec["bits"]), str(spec["order"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AquabitError(f"{folder}: the codes of layer {name!r} are not usable: {error}") from error
