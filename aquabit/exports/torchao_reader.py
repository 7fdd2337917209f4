"""torchao: the format that a configuration gives to each layer, as a configuration of ours. Files are
untrusted input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aquabit.exports.stored_folder import StoredFolder, check_shape, one_network
from aquabit.graph import LayerGraph, fixed_layers
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

DEFAULT = "_default"  # of an FqnToConfig: every layer that nothing else names
LONGEST_PATTERN, MOST_REPEATS = 200, 3  # of a regular expression
NEWEST = 2  # of what torchao 0.18 writes as ``_version``
INT4_GROUP = 128  # of Int4WeightOnlyConfig, where nothing is said


def read(folder: StoredFolder, graph: LayerGraph, fingerprint: str) -> QuantConfig:
    """The configuration that a ``quantization_config`` of torchao is of this model: its weights at the scheme
    of their bits and groups, ``usq`` where ranges are asymmetric; Linear layers alone, as diffusers has it;
    activations off.

    Raises AquabitError for what no scheme here is, for weights beside it that are another model's, and for
    one that names layers, of which the model has none.
    """
    nodes, fixed = one_network(graph, folder.path), fixed_layers(graph)
    kept = folder.described.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise AquabitError(
            f"{folder.path}: modules_to_not_convert is {kept!r:.60}; it must be a list of names"
        )
    rules = _rules(folder)
    _check_named(folder, rules, nodes)
    found = {}
    for name, node in nodes.items():
        if folder.files:
            _check_weight(folder, name, tuple(node["shape"]))
        skipped = any(f"{entry}." in f"{name}.weight" or entry == f"{name}.weight" for entry in kept)
        dense = name in fixed or node["kind"] != "linear" or skipped
        asked = None if dense else _asked(rules, name)
        found[name] = LayerChoice(FP if asked is None else _scheme(asked, f"{folder.path}: {name}"), 16)
    return QuantConfig(fingerprint, found)


def _check_named(folder: StoredFolder, rules: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
    """Raise AquabitError where every layer that is named is another model's."""
    named = [name for name in rules if name != DEFAULT and not name.startswith("re:")]
    if named and len(named) == len(rules) and not any(n.removesuffix(".weight") in nodes for n in named):
        raise AquabitError(
            f"{folder.path} is of another model: this one has none of the {len(named)} layers that it names,"
            f" as {named[0]!r:.80}"
        )


def _check_weight(folder: StoredFolder, name: str, shape: tuple[int, ...]) -> None:
    """Raise AquabitError where a layer's weight, as it is or as torchao's codes, is missing or of another
    shape; codes of 4 bits may lie two a byte."""
    codes, packed = f"{name}._weight_qdata", (*shape[:-1], shape[-1] // 2)
    if codes not in folder.files:
        check_shape(folder, f"{name}.weight", shape)
    elif folder.shape(codes) not in (shape, packed):
        raise AquabitError(
            f"{folder.path} is no folder of this model: {codes} is {list(folder.shape(codes))} there, the"
            f" weight {list(shape)}"
        )


def _rules(folder: StoredFolder) -> dict[str, Any]:
    """Configurations by layer, pattern, or ``DEFAULT``."""
    value = folder.described.get("quant_type")
    whole = value.get("default") if isinstance(value, Mapping) else None
    kind, data = _parts(whole, f"{folder.path}: quant_type")
    if kind != "FqnToConfig":
        return {DEFAULT: whole}
    rules = data.get("fqn_to_config") or data.get("module_fqn_to_config")
    if not isinstance(rules, Mapping):
        raise AquabitError(f"{folder.path}: fqn_to_config is {rules!r:.60}; it must map layers to settings")
    return {str(k): v for k, v in rules.items()}


def _parts(value: Any, source: str) -> tuple[str, Mapping[str, Any]]:
    """The class of a configuration and its fields."""
    kind, data = (value.get("_type"), value.get("_data")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(kind, str) or not isinstance(data, Mapping):
        raise AquabitError(f"{source} is {value!r:.60}; it must have _type and _data, as torchao writes it")
    version = value.get("_version", 1)
    if type(version) is not int or not 0 < version <= NEWEST:
        raise AquabitError(f"{source} has {kind} of version {version!r:.20}; known are 1 to {NEWEST}")
    return kind, data


def _asked(rules: Mapping[str, Any], layer: str) -> Any:
    """What is asked for a layer: by its own name or its weight's, then by patterns, then by default."""
    names = (f"{layer}.weight", layer)
    for name in names:
        if name in rules:
            return rules[name]
    for name in names:
        for pattern, asked in rules.items():
            if pattern.startswith("re:") and _fits(pattern[3:], name):
                return asked
    return rules.get(DEFAULT)


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern of a file matches; those that could take for ever are refused."""
    repeats = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > LONGEST_PATTERN or repeats > MOST_REPEATS or re.search(r"\)[*+?{]", pattern):
        raise AquabitError(
            f"the pattern {pattern!r:.60} repeats too much: {MOST_REPEATS} times at most, and no group"
        )
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise AquabitError(f"the pattern {pattern!r:.60} is no regular expression ({error})") from error


def _scheme(value: Any, source: str) -> Scheme:
    """The scheme of a layer's configuration."""
    kind, data = _parts(value, source)
    if kind.startswith("Intx") or kind == "Int8DynamicActivationIntxWeightConfig":
        mapping = data.get("mapping_type") or data.get("weight_mapping_type")
        symmetric = isinstance(mapping, Mapping) and str(mapping.get("_data", "")).startswith("SYMMETRIC")
        bits = re.fullmatch(r"int([1-8])", _named(data.get("weight_dtype")))
        grain = data.get("granularity") or data.get("weight_granularity")
        if bits is not None and not (symmetric and bits[1] == "1"):
            return Scheme.parse(f"{'int' if symmetric else 'usq'}{bits[1]}{_group(grain, source)}")
    elif kind.startswith("Int8"):
        old = data.get("group_size")
        return Scheme.parse(
            "int8" + (f"g{old}" if type(old) is int else _group(data.get("granularity"), source))
        )
    elif kind == "Int4WeightOnlyConfig":
        size = data.get("group_size", INT4_GROUP)
        if type(size) is int and size > 0:
            return Scheme.parse(f"usq4g{size}")
    elif kind.startswith("Float8"):
        whole = "PerTensor" in str(data.get("granularity"))
        if _named(data.get("weight_dtype")) in ("", "float8_e4m3fn"):
            return Scheme.parse("fp8" if whole else "fp8c")
    elif kind.startswith("NVFP4"):
        return Scheme.parse("nvfp4")
    raise AquabitError(
        f"{source} is {kind} of {_named(data.get('weight_dtype')) or 'its'} weights, which no scheme here is"
    )


def _named(value: Any) -> str:
    """The name in an encoded type."""
    found = value.get("_data") if isinstance(value, Mapping) else None
    return found if isinstance(found, str) else ""


def _group(grain: Any, source: str) -> str:
    """A scheme's ending for a granularity: groups of inputs, or none."""
    if grain is None:
        return ""
    kind, data = _parts(grain, source)
    size = data.get("group_size")
    if kind == "PerGroup" and type(size) is int and 0 < size < 1 << 31:
        return f"g{size}"
    if kind in ("PerAxis", "PerRow", "PerTensor") and kind != "PerTensor":
        return ""
    raise AquabitError(f"{source} has scales {kind} {size!r:.20}, which no scheme here has")
