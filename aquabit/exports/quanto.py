"""optimum-quanto: a map of layers as ``optimum.quanto.quantization_map`` gives it; tried with 0.2.7."""

from __future__ import annotations

from math import prod
from typing import Any

from aquabit.exports.statement import Form, Node, closest_act, code_bits
from aquabit.scheme import FP, LayerChoice


def layer(choice: LayerChoice, node: Node) -> Form:
    """Weights alone, at 2, 4 or 8 bits: its activations take static ranges."""
    scheme, shape, act = choice.weight, tuple(node["shape"]), closest_act(choice)
    lost = [] if act == 16 else [f"input at 16 bits instead of {act}: its ranges are static and one a tensor"]
    if scheme == FP:
        return Form(None, "fp", lost)
    row, wanted = prod(shape[1:]), code_bits(scheme, shape)
    bits = next((b for b in (2, 4, 8) if b >= wanted), 8)
    if bits != wanted:
        lost.append(f"{bits} bits instead of {wanted}")
    group = None if bits == 8 else _quanto_group(row)
    asked = scheme.range_group or row
    if bits == 8 and scheme.kind != "int":
        lost.append("symmetric levels: no offset")
    if min(asked, row) != (group or row):
        ours, theirs = ("a row" if n is None or n >= row else f"groups of {n}" for n in (asked, group))
        lost.append(f"one range for {theirs}, not {ours}")
    elif group is not None and len(shape) == 4 and prod(shape[2:]) > 1:
        lost.append("groups along (channel, tap), not (tap, channel)")
    where = "" if group is None else f" in groups of {group}"
    return Form({"weights": f"qint{bits}", "activations": "none"}, f"qint{bits}{where}, a16", lost)


def whole(forms: dict[str, Any]) -> dict[str, Any]:
    """The configuration of all layers, from the form of each."""
    return forms


def _quanto_group(row: int) -> int | None:
    """The groups that its modules take by themselves at 2 and 4 bits: the most of 128, 96, 64 and 32 that
    divides the row."""
    return next((g for g in (128, 96, 64, 32) if row % g == 0), None) if row > 128 else None
