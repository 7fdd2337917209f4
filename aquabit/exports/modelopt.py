"""NVIDIA ModelOpt: the ``config`` of ``mtq.quantize``; tried with nvidia-modelopt 0.47."""

from __future__ import annotations

from math import prod
from typing import Any

from aquabit.exports.statement import Form, Node, closest_act, code_bits, even_group, uneven_groups
from aquabit.scheme import FP, LayerChoice, Scheme, act_bits, act_text

LEAST_BITS = 2  # symmetric whole numbers of 1 bit have no step
FLOATS: dict[str, dict[str, Any]] = {  # those that it has, with scales as ours are stored
    "fp8": {"num_bits": [4, 3]},
    "nvfp4": {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}},
    "mxfp4": {"num_bits": [2, 1], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}},
    "mxfp8": {"num_bits": [4, 3], "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}},
}


def layer(choice: LayerChoice, node: Node) -> Form:
    """Weights at 2 bits or more, activations at their own."""
    scheme, shape, act = choice.weight, tuple(node["shape"]), closest_act(choice)
    form, words, lost = dict[str, Any](), [], list[str]()
    if scheme != FP:
        form["weight"], said, lost = _float(scheme, shape) or _whole_numbers(scheme, shape)
        words.append(said)
    if act != 16:
        if isinstance(act, int):
            lost.append("symmetric activations: no offset")
        per_token = {"block_sizes": {-1: None, "type": "dynamic"}}
        form["input"] = {
            "num_bits": [4, 3] if act == "f8" else act_bits(act),
            **(per_token if len(shape) == 2 else {"axis": 0, "type": "dynamic"}),
        }
    return Form(form or None, ", ".join([*words, act_text(act)]), lost, _float(scheme, shape) is not None)


def _float(scheme: Scheme, shape: tuple[int, ...]) -> tuple[dict[str, Any], str, list[str]] | None:
    """One of FLOATS; None for others, and for a convolution in groups, which it has along the kernel."""
    if scheme.kind not in FLOATS or (len(shape) == 4 and scheme.group is not None):
        return None
    axis = {"axis": 0 if scheme.per_channel else None} if scheme.group is None else {}
    return {**FLOATS[scheme.kind], **axis}, str(scheme).removesuffix("h"), []


def _whole_numbers(scheme: Scheme, shape: tuple[int, ...]) -> tuple[dict[str, Any], str, list[str]]:
    wanted, row, lost = code_bits(scheme, shape), prod(shape[1:]), list[str]()
    bits, group = max(wanted, LEAST_BITS), even_group(scheme, row)
    if bits != wanted:
        lost.append(f"{bits} bits instead of {wanted}")
    if scheme.kind != "int":
        lost.append("symmetric levels: no offset")
    if len(shape) == 4 and scheme.range_group is not None and scheme.range_group < row:
        group = None
        lost.append(f"groups of {scheme.group} inputs: one range for each output channel")
    else:
        lost += uneven_groups(scheme, row)
    if group is None:
        return {"num_bits": bits, "axis": 0}, f"{bits} bits", lost
    return {"num_bits": bits, "block_sizes": {-1: group}}, f"{bits} bits in groups of {group}", lost


def whole(forms: dict[str, Any]) -> dict[str, Any]:
    """The configuration of all layers, from the form of each."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, form in forms.items():
        entries += [{"quantizer_name": f"{name}.{part}_quantizer", "cfg": cfg} for part, cfg in form.items()]
    # "max" would leave three levels up to the largest weight at 2 bits
    return {"quant_cfg": entries, "algorithm": "mse"}
