"""A found configuration in the words of other libraries, with a statement of what each of them cannot
express.

What is exported are bits, groups and activations per layer; the library fits its own ranges to the dense
model. Read and tried with torchao 0.18, optimum-quanto 0.2.7 and nvidia-modelopt 0.47
(benchmarks/exports.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from typing import Any, Literal

from aquabit.graph import LayerGraph, layers
from aquabit.scheme import FP, AquabitError, LayerChoice, QuantConfig, Scheme

Status = Literal["same", "nearest", "full precision"]
MODELOPT_LEAST = 2  # symmetric whole numbers of 1 bit have no step


@dataclass(frozen=True)
class Said:
    """How one layer is exported: ``status``, what it becomes, and what is lost.

    "same": the bits and groups are ours, by affine whole numbers of the library's own ranges; "nearest":
    something of it differs, which ``lost`` names; "full precision": the library has nothing near.
    """

    status: Status
    form: str
    lost: tuple[str, ...] = ()


@dataclass
class Export:
    """``config`` is what the library reads (JSON values; ModelOpt's block sizes have whole numbers as
    keys, which JSON turns into text)."""

    to: str
    config: Any
    layers: dict[str, Said] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(said.status for said in self.layers.values())
        return {status: found[status] for status in ("same", "nearest", "full precision")}

    def losses(self) -> dict[str, int]:
        """What is lost -> in how many layers."""
        return dict(Counter(lost for said in self.layers.values() for lost in said.lost).most_common())

    def to_dict(self) -> dict[str, Any]:
        said = {name: asdict(one) for name, one in self.layers.items()}
        return {
            "to": self.to,
            "config": self.config,
            "statement": {"counts": self.counts, "whole": self.whole, "layers": said},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"


def export_config(config: QuantConfig, graph: LayerGraph, to: str) -> Export:
    """The configuration as ``to`` reads it: "torchao" (an ``FqnToConfig`` as
    ``torchao.core.config.config_to_dict`` writes it), "quanto" (a map of layers as
    ``optimum.quanto.quantization_map`` gives it) or "modelopt" (the ``config`` of ``mtq.quantize``).

    ``graph`` is the model's, for shapes and kinds of layers. Raises AquabitError for an unknown library and
    for layers not in the graph.
    """
    if to not in TARGETS:
        raise AquabitError(f"export to {to!r} is unknown; known: {', '.join(TARGETS)}")
    nodes = layers(graph)
    wrong = [n for n in config.layers if n not in nodes]
    if wrong:
        raise AquabitError(
            f"layer {wrong[0]!r} of the configuration is not in this model; is it another model's?"
        )
    whole, found = TARGETS[to]
    forms: dict[str, Any] = {}
    said: dict[str, Said] = {}
    for name, choice in config.layers.items():
        form, text, lost = found(choice, nodes[name])
        lost = [*_weight_losses(choice.weight), *lost, *_activation_losses(choice, nodes[name])]
        if form is None:
            said[name] = Said("full precision", "fp", tuple(lost))
            continue
        forms[name], said[name] = form, Said("nearest" if lost else "same", text, tuple(lost))
    return Export(to, whole(forms), said, _whole(config))


# ---- what is lost in every library
# -----------------------------------------------------------------------------------------------------


def _weight_losses(scheme: Scheme) -> list[str]:
    found = []
    if scheme.kind == "vq":
        found.append("k-means codebook: evenly spaced levels instead")
    if scheme.kind == "aq":
        found.append("additive codebooks: evenly spaced levels instead")
    if scheme.calibrated:
        found.append("output-aware fit")
    return found


def _activation_losses(choice: LayerChoice, node: Mapping[str, Any]) -> list[str]:
    found, least = [], choice.act if isinstance(choice.act, int) else min(choice.act)
    if isinstance(choice.act, tuple):
        found.append("activation bits per step: the most of its steps throughout")
    if least < 16 and node.get("attention"):
        found.append("its output (Q, K or V) is not quantized")
    if least < 16 and node.get("split") is not None:
        found.append("one range of the input, not one on each side of the skip")
    return found


def _whole(config: QuantConfig) -> list[str]:
    found = ["ranges of the weights are the library's own: ours are shrunk to the least error"]
    acts = [b for c in config.layers.values() for b in ((c.act,) if isinstance(c.act, int) else c.act)]
    if any(b < 16 for b in acts):
        found.append("softmax outputs, 8 bits here, are not quantized")
    if config.correction:
        found.append(f"noise correction {config.correction} is not applied")
    if config.tuned:
        found.append(f"the fine-tuned codes {config.tuned} are not carried over")
    if config.ranges != "dynamic":
        found.append(
            f"activation ranges of kind {config.ranges!r} are not carried over: dynamic ones instead"
        )
    return found


def code_bits(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """The whole number of bits per weight that is not below the scheme's codes."""
    return ceil(scheme.code_bits(prod(shape[2:])) - 1e-9)


def _most(choice: LayerChoice) -> int:
    return choice.act if isinstance(choice.act, int) else max(choice.act)


def _divides(scheme: Scheme, row: int) -> int | None:
    """The size of a group of inputs where groups are even and less than a row."""
    size = scheme.group if scheme.kind == "usq" else None
    return size if size is not None and size < row and row % size == 0 else None


def _uneven(scheme: Scheme, row: int) -> list[str]:
    size = scheme.group if scheme.kind == "usq" else None
    return (
        [f"groups of {size} do not divide {row} inputs: one range a row"]
        if size is not None and size < row and row % size
        else []
    )


Found = tuple[
    Any, str, list[str]
]  # the library's form of a layer (None: left in full precision), in words, what is lost


# ---- torchao
# ------------------------------------------------------------------------------------------------------------


def _torchao(choice: LayerChoice, node: Mapping[str, Any]) -> Found:
    scheme, shape, act = choice.weight, tuple(node["shape"]), _most(choice)
    if scheme == FP:
        return None, "fp", [f"a{act} of a weight in full precision"]
    row, lost = prod(shape[1:]), list[str]()
    bits, group = code_bits(scheme, shape), _divides(scheme, row)
    if len(shape) == 4:
        if act < 16:
            lost.append(f"input at 16 bits instead of {act}: convolutions are weight-only")
        if scheme.kind == "usq" and scheme.group is not None and scheme.group < row:
            lost.append(f"groups of {scheme.group} inputs: one range for each output channel and tap")
        elif prod(shape[2:]) > 1:
            lost.append("one range for each output channel and tap, not for each output channel")
        if shape[1] == 1:
            return None, "fp", ["convolution of one input channel: a range would hold one weight"]
        return _weight_only(bits, None), f"int{bits}, a16", lost
    lost += _uneven(scheme, row)
    where = "" if group is None else f" in groups of {group}"
    if act >= 16:
        return _weight_only(bits, group), f"int{bits}{where}, a16", lost
    if act != 8:
        lost.append(f"input at 8 bits instead of {act}")
    data = {
        "weight_dtype": _dtype(bits),
        "weight_granularity": _granularity(group),
        "weight_mapping_type": _enum("MappingType", "ASYMMETRIC"),
        "weight_scale_dtype": None,
        "act_mapping_type": _enum("MappingType", "ASYMMETRIC"),
        **_PACKING,
    }
    return (
        {"_type": "Int8DynamicActivationIntxWeightConfig", "_version": 2, "_data": data},
        f"int{bits}{where}, a8",
        lost,
    )


def _weight_only(bits: int, group: int | None) -> dict[str, Any]:
    data = {
        "weight_dtype": _dtype(bits),
        "granularity": _granularity(group),
        "mapping_type": _enum("MappingType", "ASYMMETRIC"),
        "scale_dtype": None,
        **_PACKING,
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def _enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}


def _dtype(bits: int) -> dict[str, str]:
    return _enum("torch.dtype", f"int{bits}")


def _granularity(group: int | None) -> dict[str, Any]:
    if group is None:
        return {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group}}


_PACKING = {
    "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
    "intx_choose_qparams_algorithm": _enum("IntxChooseQParamsAlgorithm", "AFFINE"),
}


def _torchao_whole(forms: dict[str, Any]) -> dict[str, Any]:
    return {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": forms, "module_fqn_to_config": forms},
    }


# ---- optimum-quanto
# ------------------------------------------------------------------------------------------------------------


def _quanto(choice: LayerChoice, node: Mapping[str, Any]) -> Found:
    scheme, shape, act = choice.weight, tuple(node["shape"]), _most(choice)
    lost = [] if act >= 16 else [f"input at 16 bits instead of {act}: its ranges are static and one a tensor"]
    if scheme == FP:
        return None, "fp", lost
    row, wanted = prod(shape[1:]), code_bits(scheme, shape)
    bits = next(b for b in (2, 4, 8) if b >= wanted)
    if bits != wanted:
        lost.append(f"{bits} bits instead of {wanted}")
    group = None if bits == 8 else _quanto_group(row)
    asked = (scheme.group if scheme.kind == "usq" else None) or row
    if bits == 8:
        lost.append("symmetric levels: no offset")
    if min(asked, row) != (group or row):
        ours, theirs = ("a row" if n is None or n >= row else f"groups of {n}" for n in (asked, group))
        lost.append(f"one range for {theirs}, not {ours}")
    elif group is not None and len(shape) == 4 and prod(shape[2:]) > 1:
        lost.append("groups along (channel, tap), not (tap, channel)")
    where = "" if group is None else f" in groups of {group}"
    return {"weights": f"qint{bits}", "activations": "none"}, f"qint{bits}{where}, a16", lost


def _quanto_group(row: int) -> int | None:
    """The groups that its modules take by themselves at 2 and 4 bits: the most of 128, 96, 64 and 32 that
    divides the row."""
    return next((g for g in (128, 96, 64, 32) if row % g == 0), None) if row > 128 else None


# ---- NVIDIA ModelOpt
# ------------------------------------------------------------------------------------------------------------


def _modelopt(choice: LayerChoice, node: Mapping[str, Any]) -> Found:
    scheme, shape, act = choice.weight, tuple(node["shape"]), _most(choice)
    form, words, lost = dict[str, Any](), [], list[str]()
    if scheme != FP:
        wanted, row = code_bits(scheme, shape), prod(shape[1:])
        bits, group = max(wanted, MODELOPT_LEAST), _divides(scheme, row)
        if bits != wanted:
            lost.append(f"{bits} bits instead of {wanted}")
        lost.append("symmetric levels: no offset")
        if len(shape) == 4 and scheme.kind == "usq" and scheme.group is not None and scheme.group < row:
            group = None
            lost.append(f"groups of {scheme.group} inputs: one range for each output channel")
        else:
            lost += _uneven(scheme, row)
        form["weight"] = (
            {"num_bits": bits, "axis": 0} if group is None else {"num_bits": bits, "block_sizes": {-1: group}}
        )
        words.append(f"{bits} bits" + ("" if group is None else f" in groups of {group}"))
    if act < 16:
        lost.append("symmetric activations: no offset")
        per_token = {"block_sizes": {-1: None, "type": "dynamic"}}
        form["input"] = {
            "num_bits": act,
            **(per_token if len(shape) == 2 else {"axis": 0, "type": "dynamic"}),
        }
    return form or None, ", ".join([*words, f"a{act}"]), lost


def _modelopt_whole(forms: dict[str, Any]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, form in forms.items():
        entries += [{"quantizer_name": f"{name}.{part}_quantizer", "cfg": cfg} for part, cfg in form.items()]
    return {
        "quant_cfg": entries,
        "algorithm": "mse",
    }  # of "max", 2 bits leave three levels up to the largest weight


Whole = Callable[[dict[str, Any]], Any]
TARGETS: dict[str, tuple[Whole, Callable[[LayerChoice, Mapping[str, Any]], Found]]] = {
    "torchao": (_torchao_whole, _torchao),
    "quanto": (dict, _quanto),
    "modelopt": (_modelopt_whole, _modelopt),
}
