"""QuantConfig: what each layer of one model gets, and its JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from aquabit.activation_bits import Act, Rounding, StepGroups, act_bits, act_parts, plain_act
from aquabit.errors import AquabitError
from aquabit.inputs import Inputs
from aquabit.jsonio import clear_errors, digest, read_json
from aquabit.protocol import Calibration
from aquabit.scheme_kinds import FP, Scheme

CORRECTIONS = ("cnc", "bc", "vsc", "match", "qdrift")  # see ``quant.correction.corrector``
RANGES = ("dynamic", "static", "step")  # of activations, see ``QuantConfig``
SCHEMA_VERSION = 1  # of config.json
METHOD = "aquabit"  # the quantization method that diffusers knows packed models by


@dataclass(frozen=True)
class LayerChoice:
    """What one layer gets: a weight scheme, how activations are rounded (``ROUNDINGS``, 16 is off; a tuple:
    in each group of steps), and the name of a shared codebook."""

    weight: Scheme = FP
    act: Act = 16
    codebook: str | None = None


def parse_correction(text: str | None) -> tuple[str, ...]:
    """The corrections that ``text`` joins by "+", in the order of ``CORRECTIONS``; none for None and "none".

    Raises AquabitError for unknown ones and for those that exclude each other.
    """
    parts = [] if text in (None, "none") else str(text).split("+")
    unknown = [p for p in parts if p not in CORRECTIONS]
    if unknown or len(set(parts)) < len(parts):
        raise AquabitError(
            f"correction {text!r} is unknown; it joins some of {', '.join(CORRECTIONS)} by +, as cnc+bc, or"
            " is none"
        )
    if len([p for p in parts if p in ("vsc", "match", "qdrift")]) > 1 or (
        "qdrift" in parts and len(parts) > 1
    ):
        raise AquabitError(
            f"correction {text!r} treats the residual twice; vsc and match exclude each other, and qdrift"
            " stands alone"
        )
    return tuple(p for p in CORRECTIONS if p in parts)


@dataclass(frozen=True)
class QuantConfig:
    """Which scheme and activation bits each layer of one model gets; layers not named stay in full precision.

    ``calibration`` says how images are made: what H the calibrated schemes are fitted with, what a
    correction's statistics and static ranges are measured on, and the defaults of whoever makes images with
    it (None: ``Calibration()``). ``steps`` are the groups that activation bits
    given as a tuple refer to. ``correction`` joins the noise corrections that act while sampling by "+"
    (``CORRECTIONS``). ``tuned`` is the digest of fine-tuned tensors that replace the fitted ones. ``ranges``
    are those of activations: "dynamic" (per token or sample), "static" (one per layer) or "step" (one per
    layer and step).
    """

    fingerprint: str
    layers: Mapping[str, LayerChoice]
    model: str = ""
    steps: StepGroups | None = None
    correction: str | None = None
    calibration: Calibration | None = None
    tuned: str | None = None
    ranges: str = "dynamic"

    def __post_init__(self) -> None:
        kept = {k: replace(v, act=plain_act(v.act)) for k, v in sorted(self.layers.items())}
        object.__setattr__(self, "layers", {k: v for k, v in kept.items() if v != LayerChoice()})
        object.__setattr__(self, "correction", "+".join(parse_correction(self.correction)) or None)
        if self.ranges not in RANGES:
            raise AquabitError(f"ranges {self.ranges!r} are unknown; known: {', '.join(RANGES)}")
        groups = 1 if self.steps is None else len(self.steps.starts)
        wrong = [
            (k, v.act) for k, v in self.layers.items() if isinstance(v.act, tuple) and len(v.act) != groups
        ]
        if wrong:
            raise AquabitError(
                f"layer {wrong[0][0]!r} has activation bits {list(wrong[0][1])} for {groups} groups of steps;"
                " give one each"
            )
        if not any(isinstance(v.act, tuple) for v in self.layers.values()):
            object.__setattr__(self, "steps", None)  # groups that nothing refers to
        measured = (self.calibration or Calibration()).steps
        if self.ranges == "step" and self.steps is not None and self.steps.total != measured:
            raise AquabitError(
                f"ranges per step are measured over the calibration's {measured} steps, and the step groups"
                f" are of {self.steps.total}; give both the same number"
            )

    def __getitem__(self, layer: str) -> LayerChoice:
        return self.layers.get(layer, LayerChoice())

    def mean_act(self, layer: str) -> float:
        """The activation bits of a layer, averaged over the steps."""
        act = self[layer].act
        return sum(act_bits(part) * self.share(layer, part) for part in set(act_parts(act)))

    def share(self, layer: str, rounding: Rounding) -> float:
        """The share of steps in which a layer's activations are rounded so."""
        act = self[layer].act
        if not isinstance(act, tuple) or self.steps is None:
            return float(act == rounding)
        return sum(s for s, part in zip(self.steps.shares, act, strict=True) if part == rounding)

    def range_parts(self, layer: str) -> int:
        """How many static ranges each tensor of a layer has: one for each step, one for each group of
        steps where bits change, else one; 0 where ranges are dynamic."""
        act = self[layer].act
        if self.ranges == "dynamic" or act == 16:
            return 0
        if self.ranges == "step":
            return self.total_steps or 1
        return len(act_parts(act))

    def range_part(self, layer: str, step: int) -> int:
        """Which of them a step uses."""
        if self.ranges == "step":
            return step
        return self.steps.of(step) if self.steps and isinstance(self[layer].act, tuple) else 0

    def group_of_part(self, part: int) -> int:
        """The group of steps that a part belongs to."""
        return self.steps.of(part) if self.ranges == "step" and self.steps is not None else part

    @property
    def total_steps(self) -> int | None:
        """The number of steps that it can be sampled with; None where any will do."""
        if self.steps is not None:
            return self.steps.total
        return (self.calibration or Calibration()).steps if self.ranges == "step" else None

    @property
    def uses_images(self) -> bool:
        """Whether what it makes of a model depends on its calibration."""
        calibrated = any(choice.weight.calibrated for choice in self.layers.values())
        return calibrated or self.correction is not None or self.ranges != "dynamic"

    def sampled_as(self, calibration: Calibration) -> QuantConfig:
        """The same configuration, which also says how images are made with it where it did not; its digest
        stays what it was."""
        if self.calibration is not None or self.uses_images:
            return self
        return replace(self, calibration=calibration)

    @property
    def digest(self) -> str:
        """Equal for equal configurations, whatever name the model goes by."""
        body = {k: v for k, v in self.to_dict().items() if k not in ("model", "schema", "calibration")}
        if self.uses_images:
            body["calibration"] = (self.calibration or Calibration()).identity
        return digest(body)

    def with_layer(
        self,
        layer: str,
        weight: Scheme | str,
        act: Act | None = None,
        codebook: str | None = None,
        steps: StepGroups | None = None,
    ) -> QuantConfig:
        """The same configuration with one layer changed (its activation bits kept unless given);
        ``codebook`` names a shared one, ``steps`` the groups of activation bits where the configuration
        has none yet."""
        choice = LayerChoice(Scheme.parse(weight), self[layer].act if act is None else act, codebook)
        return replace(self, layers={**self.layers, layer: choice}, steps=self.steps or steps)

    def check_shapes(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise AquabitError for a layer whose weight cannot be stored at its scheme; ``nodes`` are those of
        a graph's layers."""
        for name, choice in self.layers.items():
            why = choice.weight.refuses(tuple(nodes[name]["shape"])) if name in nodes else None
            if why is not None:
                raise AquabitError(f"layer {name!r} cannot be {choice.weight}: {why}")

    def to_dict(self) -> dict[str, Any]:
        """The value of ``config.json``."""
        layers = {
            k: {
                "weight": str(v.weight),
                "act": list(v.act) if isinstance(v.act, tuple) else v.act,
                "codebook": v.codebook,
            }
            for k, v in self.layers.items()
        }
        # what later versions brought: absent by default, so that digests stay what they were
        later = {"tuned": self.tuned, "ranges": None if self.ranges == "dynamic" else self.ranges}
        return {
            "schema": SCHEMA_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layers": layers,
            "steps": None if self.steps is None else self.steps.to_dict(),
            "correction": self.correction,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            **{k: v for k, v in later.items() if v is not None},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_dict(value: Any, source: str = "configuration") -> QuantConfig:
        """Validate untrusted JSON; raises AquabitError with the place and the value that is wrong."""
        with clear_errors(f"{source} is not a configuration"):
            file = _config_model().model_validate(value)
        acts = {k: tuple(v.act) if isinstance(v.act, list) else v.act for k, v in file.layers.items()}
        layers = {k: LayerChoice(Scheme.parse(v.weight), acts[k], v.codebook) for k, v in file.layers.items()}
        for name, choice in layers.items():
            if choice.weight.shared != (choice.codebook is not None):
                what = (
                    "shares its codebooks and must name them"
                    if choice.weight.shared
                    else f"has codebooks of its own, not {choice.codebook!r}"
                )
                raise AquabitError(f"{source}: layer {name!r} at {choice.weight} {what}")
        calibration = None if file.calibration is None else _calibration(file.calibration.model_dump())
        steps = None if file.steps is None else StepGroups(**file.steps.model_dump())
        return QuantConfig(
            file.fingerprint, layers, file.model, steps, file.correction, calibration, file.tuned, file.ranges
        )

    @staticmethod
    def load(path: str | Path) -> QuantConfig:
        """Read ``config.json``; raises AquabitError for a missing, truncated or invalid file."""
        return QuantConfig.from_dict(read_json(path), str(path))


def _calibration(read: dict[str, Any]) -> Calibration:
    given = read.pop("inputs")
    return Calibration(**read, inputs=None if given is None else Inputs(**given))


@lru_cache(1)
def _config_model() -> Any:
    # pydantic costs 0.1 s to import: only where a file is read
    from pydantic import BaseModel, ConfigDict, Field

    One = Literal[16, 8, "i8", "f8", 6, 4]  # ``ROUNDINGS``

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")

    class Layer(Strict):
        weight: str
        act: One | Annotated[list[One], Field(min_length=1)]
        codebook: str | None = None

    class Groups(Strict):
        total: int = Field(ge=2)
        starts: list[int]
        first: int = 0

    class InputsPart(Strict):
        folder: str
        pictures: list[tuple[str, str]]
        roles: list[str]

    class CalibrationPart(Strict):
        images: int = Field(ge=1)
        seed: int
        steps: int = Field(ge=1)
        scheduler: str
        eta: float = Field(allow_inf_nan=False)
        guidance: float = Field(allow_inf_nan=False)
        resolution: int | None
        conditions: list[str | int] | None
        frames: int | None = None
        inputs: InputsPart | None = None
        strength: float | None = Field(None, allow_inf_nan=False)

    class ConfigFile(Strict):
        version: Literal[1] = Field(alias="schema")
        model: str
        fingerprint: str
        layers: dict[str, Layer]
        steps: Groups | None = None
        correction: str | None = None
        calibration: CalibrationPart | None = None
        tuned: str | None = Field(None, pattern="^[0-9a-f]{16}$")
        ranges: str = "dynamic"

    return ConfigFile
