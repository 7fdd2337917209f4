"""torchao: an ``FqnToConfig`` as ``torchao.core.config.config_to_dict`` writes it; tried with 0.18."""

from __future__ import annotations

from math import prod
from typing import Any

from aquabit.exports.statement import Form, Node, closest_act, code_bits, even_group, uneven_groups
from aquabit.scheme import FP, LayerChoice, Scheme, act_text

SCALES = "torchao's scales of inputs at i8 are the largest value / 127.5, not / 127"


def layer(choice: LayerChoice, node: Node) -> Form:
    """A linear layer with rounded activations gets dynamic ones of 8 bits: asymmetric integers, or symmetric
    ones beside int8 weights, or float8 beside float8; all else is weight-only."""
    scheme, shape, act = choice.weight, tuple(node["shape"]), closest_act(choice)
    if scheme == FP:
        return Form(None, "fp", [f"{act_text(act)} of a weight in full precision"])
    row, lost, symmetric = prod(shape[1:]), list[str](), scheme.kind == "int"
    bits, group = code_bits(scheme, shape), even_group(scheme, row)
    if len(shape) == 4:
        if act != 16:
            lost.append(f"input at 16 bits instead of {act}: convolutions are weight-only")
        if scheme.range_group is not None and scheme.range_group < row:
            lost.append(f"groups of {scheme.group} inputs: one range for each output channel and tap")
        elif prod(shape[2:]) > 1:
            lost.append("one range for each output channel and tap, not for each output channel")
        if shape[1] == 1:
            return Form(None, "fp", ["convolution of one input channel: a range would hold one weight"])
        return Form(weight_only(bits, None, symmetric), f"int{bits}, a16", lost)
    if act == "f8" and scheme.kind == "fp8":
        one = [] if scheme.per_channel else ["one scale of the input for all tokens, as its weight has"]
        return Form(float8(scheme), f"{str(scheme).removesuffix('h')}, f8", one, True)
    lost += uneven_groups(scheme, row)
    where = "" if group is None else f" in groups of {group}"
    if act == "i8" and symmetric and bits == 8 and group is None:
        return Form(INT8, "int8, i8", [*lost, SCALES])
    if act == 16:
        return Form(weight_only(bits, group, symmetric), f"int{bits}{where}, a16", lost)
    if act == "i8":
        lost.append("asymmetric activations: symmetric ones are of int8 weights with a scale for each output")
    elif act != 8:
        lost.append(
            f"input at 8 bits instead of {act}" if isinstance(act, int) else "input in int8, not float8"
        )
    data = {
        "weight_dtype": _dtype(bits),
        "weight_granularity": granularity(group),
        "weight_mapping_type": _mapping(symmetric),
        "weight_scale_dtype": None,
        "act_mapping_type": _enum("MappingType", "ASYMMETRIC"),
        **_PACKING,
    }
    return Form(
        {"_type": "Int8DynamicActivationIntxWeightConfig", "_version": 2, "_data": data},
        f"int{bits}{where}, a8",
        lost,
    )


def float8(scheme: Scheme) -> dict[str, Any]:
    """Both factors in float8, weights with a scale for each output or, as activations then too, one."""
    data = {
        "activation_dtype": _enum("torch.dtype", "float8_e4m3fn"),
        "weight_dtype": _enum("torch.dtype", "float8_e4m3fn"),
        "granularity": [_ROW if scheme.per_channel else _TENSOR] * 2,
    }
    return {"_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2, "_data": data}


def weight_only(bits: int, group: int | None, symmetric: bool = False) -> dict[str, Any]:
    """A weight of whole numbers with a scale for each output, or for each group of inputs."""
    data = {
        "weight_dtype": _dtype(bits),
        "granularity": granularity(group),
        "mapping_type": _mapping(symmetric),
        "scale_dtype": None,
        **_PACKING,
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def _enum(kind: str, value: str) -> dict[str, str]:
    return {"_type": kind, "_data": value}


def _mapping(symmetric: bool) -> dict[str, str]:
    return _enum("MappingType", "SYMMETRIC" if symmetric else "ASYMMETRIC")


def _dtype(bits: int) -> dict[str, str]:
    return _enum("torch.dtype", f"int{bits}")


def granularity(group: int | None) -> dict[str, Any]:
    """Weights that share a scale: those of an output, or of a group of its inputs."""
    if group is None:
        return {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group}}


_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_TENSOR: dict[str, Any] = {"_type": "PerTensor", "_version": 1, "_data": {}}
INT8 = {
    "_type": "Int8DynamicActivationInt8WeightConfig",
    "_version": 2,
    "_data": {"act_mapping_type": _enum("MappingType", "SYMMETRIC"), "granularity": _ROW},
}
_PACKING = {
    "intx_packing_format": _enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
    "intx_choose_qparams_algorithm": _enum("IntxChooseQParamsAlgorithm", "AFFINE"),
}


def whole(forms: dict[str, Any]) -> dict[str, Any]:
    """The configuration of all layers, from the form of each."""
    return {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": forms, "module_fqn_to_config": forms},
    }
