"""Configurations that a user gives as rivals: our config.json, or what NVIDIA ModelOpt quantizes by."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquabit.jsonio import read_json
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme
from aquabit.space import SearchSpace

WEIGHT = "weight_quantizer"  # what ModelOpt calls the part of a layer that rounds its weight


def read_given(path: str | Path, space: SearchSpace) -> QuantConfig:
    """The configuration in a file: ``config.json``, or JSON with ModelOpt's ``quant_cfg`` (as
    ``mtq.quantize`` takes it, or as ``aquabit export --to modelopt`` writes it), whose bits and blocks become
    schemes (``int4``, ``int4g32``, ``fp8``, ``nvfp4``, ``mxfp4``, ``mxfp8``) and whose layers that it leaves
    alone stay ``fp``; activations are left off. Raises AquabitError for anything else, and for a file of
    another model.
    """
    _check_kind(Path(path))
    value = read_json(path)
    if isinstance(value, dict) and "statement" in value and value.get("to") != "modelopt":
        raise AquabitError(
            f"{path} is a recipe for {value.get('to')!r:.40}, as `aquabit export` writes it; give the"
            " config.json that it was made of"
        )
    inner = value.get("config", value) if isinstance(value, dict) else None
    if isinstance(inner, dict) and "quant_cfg" in inner:
        return _of_modelopt(inner["quant_cfg"], space, str(path))
    config = QuantConfig.from_dict(value, str(path))
    try:
        space.check(config, extra_schemes=True)
    except AquabitError as error:
        raise AquabitError(f"{path}: {error}") from error
    return config


def _check_kind(path: Path) -> None:
    """Raise AquabitError for what is no JSON and, by what it is, nothing of another program either."""
    why = None
    if path.is_dir():
        why = "is a folder of no model that another program quantized; give its config.json, if it is ours"
    elif path.is_file() and path.suffix == ".gguf":
        why = "is no GGUF file: it does not begin as these do"
    elif path.is_file() and path.suffix == ".safetensors":
        why = "is no quantized file of ComfyUI: it says of no layer how it is stored, and has no 8-bit floats"
    if why is not None:
        raise AquabitError(f"{path} {why}")


def within_space(config: QuantConfig, space: SearchSpace) -> QuantConfig:
    """A configuration that was read from weights as one of a study: layers that are excluded there stay
    ``fp``, images are made as there."""
    pinned = {layer for layer, row in space.choices.items() if row == (FP,)}
    return space.config({k: LayerChoice() if k in pinned else c for k, c in config.layers.items()})


def _of_modelopt(rules: Any, space: SearchSpace, source: str) -> QuantConfig:
    """The last rule that names a layer's weight quantizer counts, as in ModelOpt."""
    entries = _entries(rules, source)
    choices: dict[str, LayerChoice] = {}
    for layer, row in space.choices.items():
        scheme = FP
        for pattern, cfg in entries:
            if fnmatch.fnmatchcase(f"{layer}.{WEIGHT}", pattern):
                scheme = _scheme(cfg, f"{source}: {pattern}")
        choices[layer] = LayerChoice(FP if row == (FP,) else scheme, 16)
    named = [k for k, cfg in entries if k.endswith(WEIGHT) and cfg.get("enable") is not False]
    every = [f"{layer}.{WEIGHT}" for layer in space.choices]
    if named and not any(fnmatch.filter(every, pattern) for pattern in named):
        raise AquabitError(
            f"{source} is of another model: of the {len(named)} weights that it quantizes, as"
            f" {named[0]!r:.80}, this one has none"
        )
    return space.config(choices)


def _entries(rules: Any, source: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(pattern, settings) in order, of either of ModelOpt's forms: a mapping, or a list of rules with
    names."""
    if isinstance(rules, Mapping):
        found = list(rules.items())
    elif isinstance(rules, list) and all(
        isinstance(r, Mapping) and isinstance(r.get("quantizer_name"), str) for r in rules
    ):
        plain = [r for r in rules if "parent_class" not in r]  # those name kinds of modules, not layers
        found = [(r["quantizer_name"], _settings(r)) for r in plain]
    else:
        raise AquabitError(
            f"{source}: quant_cfg is {rules!r:.60}; it must map quantizers, as *weight_quantizer, to settings"
        )
    bad = [k for k, v in found if not isinstance(k, str) or not isinstance(v, Mapping)]
    if bad:
        raise AquabitError(f"{source}: the settings of {bad[0]!r:.60} are no object")
    return found


def _settings(rule: Mapping[str, Any]) -> Any:
    """A rule's settings: its ``cfg``, with what stands beside it."""
    cfg = rule.get("cfg") or {}
    beside = {k: v for k, v in rule.items() if k not in ("quantizer_name", "cfg")}
    return {**cfg, **beside} if isinstance(cfg, Mapping) else cfg


# exponent, mantissa (, block) -> scheme
FLOATS = {(4, 3): "fp8", (2, 1, 16): "nvfp4", (2, 1, 32): "mxfp4", (4, 3, 32): "mxfp8"}


def _scheme(cfg: Mapping[str, Any], source: str) -> Scheme:
    """A weight quantizer's settings as the scheme of its bits and block size: whole numbers are symmetric,
    floats those of FLOATS."""
    enabled = cfg.get("enable", True)
    if type(enabled) is not bool:
        raise AquabitError(f"{source} has enable {enabled!r:.30}; it must be true or false")
    if not enabled:
        return FP
    bits, blocks = cfg.get("num_bits", 8), cfg.get("block_sizes") or {}
    if not isinstance(blocks, Mapping):
        raise AquabitError(f'{source} has block_sizes {blocks!r:.30}; they must be as {{"-1": 32}}')
    other = [k for k in blocks if re.fullmatch("-?[0-9]+", str(k)) and str(k) != "-1"]
    if other:
        raise AquabitError(f"{source} has blocks along axis {other[0]!r:.20}; those of inputs, -1, are read")
    group = next((v for k, v in blocks.items() if str(k) == "-1"), None)
    if group and (type(group) is not int or not 0 < group < 1 << 31):
        raise AquabitError(f"{source} has block_sizes whose -1 is no whole number of inputs above 0")
    parts = tuple(bits) if isinstance(bits, list | tuple) else (bits,)
    if all(type(part) is int for part in parts):
        name = FLOATS.get((*parts, group) if group else parts)
        if name is not None:
            return Scheme.parse(f"{name}c" if name == "fp8" and cfg.get("axis") is not None else name)
        if len(parts) == 1 and 2 <= parts[0] <= 8:
            return Scheme.parse(f"int{parts[0]}" + (f"g{group}" if group else ""))
    where = f" in blocks of {group}" if group else ""
    raise AquabitError(
        f"{source} has num_bits {bits!r:.30}{where}; 2 to 8, [4, 3] and, in blocks of 32 (or 16), [2, 1] can"
        " be compared"
    )
