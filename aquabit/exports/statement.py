"""An export and its statement: what each layer becomes, and what every library loses of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aquabit.jsonio import read_object
from aquabit.scheme import (
    AquabitError,
    LayerChoice,
    QuantConfig,
    Rounding,
    Scheme,
    act_parts,
    closest,
    output_rounding,
)

Node = Mapping[str, Any]  # a layer's attributes in the graph
Status = Literal["same", "nearest", "full precision"]


@dataclass(frozen=True)
class LayerExport:
    """How one layer is exported: ``status``, what it becomes, and what is lost.

    "same": the bits and groups are ours, by affine whole numbers of the library's own ranges; "nearest":
    something of it differs, which ``lost`` names; "full precision": the library has nothing near.
    """

    status: Status
    form: str
    lost: tuple[str, ...] = ()


class Form(NamedTuple):
    """One layer for one library: the library's form of it (None: it stays in full precision), in words, what
    is lost besides what every library loses, and whether it has the scheme's levels where they are uneven."""

    form: Any
    words: str
    lost: list[str]
    has_levels: bool = False


@dataclass
class Export:
    """``config`` is what the library reads (JSON values; ModelOpt's block sizes have whole numbers as
    keys, which JSON turns into text)."""

    to: str
    config: Any
    layers: dict[str, LayerExport] = field(default_factory=dict)
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


def is_recipe(path: Path) -> bool:
    """Whether a file is one of ``Export.to_json``, and may be written again."""
    with suppress(AquabitError):
        return read_object(path).keys() == {"to", "config", "statement"}
    return False


def weight_losses(scheme: Scheme, has_levels: bool = False) -> list[str]:
    """What every library loses of a weight's scheme, but for levels that it has."""
    lost = [scheme.record.unlike_even] if scheme.record.unlike_even and not has_levels else []
    return [*lost, "output-aware fit"] if scheme.calibrated else lost


def activation_losses(choice: LayerChoice, node: Node) -> list[str]:
    """What every library loses of a layer's activations; ``node`` is the layer's in the graph."""
    found, parts = [], act_parts(choice.act)
    if len(parts) > 1:
        found.append("activation bits per step: the most of its steps throughout")
    if node.get("attention") and any(output_rounding(a) != 16 for a in parts):
        found.append("its output (Q, K or V) is not quantized")
    if any(a != 16 for a in parts) and node.get("split") is not None:
        found.append("one range of the input, not one on each side of the skip")
    return found


def losses_of_all(config: QuantConfig) -> list[str]:
    """What every library loses of the configuration as a whole."""
    found = ["ranges of the weights are the library's own: ours are shrunk to the least error"]
    acts = {a for c in config.layers.values() for a in act_parts(c.act)}
    if any(output_rounding(a) != 16 for a in acts):
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


def closest_act(choice: LayerChoice) -> Rounding:
    """How a layer's activations are rounded, of its steps the way that is closest to full precision."""
    return closest(act_parts(choice.act))


def even_group(scheme: Scheme, row: int) -> int | None:
    """The size of a group of inputs where groups are even and less than a row."""
    size = scheme.range_group
    return size if size is not None and size < row and row % size == 0 else None


def uneven_groups(scheme: Scheme, row: int) -> list[str]:
    """What is lost where groups of inputs do not divide a row."""
    size = scheme.range_group
    if size is not None and size < row and row % size:
        return [f"groups of {size} do not divide {row} inputs: one range a row"]
    return []
