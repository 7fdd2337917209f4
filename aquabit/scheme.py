"""Plain values without torch: Scheme, QuantConfig, Protocol, Measurement, Budget."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal

from aquabit.errors import AquabitError as AquabitError  # with the values, for whoever uses these
from aquabit.jsonio import read_json
from aquabit.scheme_kinds import KINDS, Layout, Look, SchemeKind

ACTIVATION_BITS = (16, 8, 6, 4)
CORRECTIONS = ("cnc", "bc", "vsc", "match", "qdrift")
SCHEDULERS: Mapping[str, str] = {  # what samplers are called here, and their classes in diffusers
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
CODE_SHIFT = 5  # bits of a code that one group of steps takes: widths are below 32
RANGES = ("dynamic", "static", "step")
SCHEMA_VERSION = 1
METHOD = "aquabit"  # the quantization method that diffusers knows packed models by
Progress = Callable[[str, int, int], None]  # called as progress(what, done, total)


def no_progress(what: str, done: int, total: int) -> None:
    """The silent progress callback."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored; ``Scheme.parse(str(s)) == s``.

    ``fp`` full precision at 16 bits; ``usq4`` uniform per output channel, ``usq4g64`` per 64 inputs; ``vq3``
    k-means over the tensor, ``vq3c`` per output channel; ``aq2x8g8`` two codebooks of 2^8 vectors of 8
    weights, ``aq2x8k`` one k x k kernel slice a group (where the kernel is 1 x 1, 8 inputs); ``aq2x8g8s`` the
    same with its codebooks shared by the layers of one operator type and shape. A final ``h`` means fitted
    output-aware; ``aq`` always is.
    """

    kind: str = "fp"  # a name in scheme_kinds.KINDS; ask ``record`` what it means
    bits: int = 16  # bits of one code
    codebooks: int = 1
    # usq: inputs that share a scale; aq: weights a codeword covers; None: the whole row, or kernel slice
    group: int | None = None
    per_channel: bool = False
    output_aware: bool = False
    shared: bool = False

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """The scheme that ``text`` names; raises AquabitError where it names none."""
        if isinstance(text, Scheme):
            return text
        for record in KINDS.values():
            match = re.fullmatch(record.pattern, text)
            if match is None:
                continue
            scheme, most = Scheme(record.name, **record.fields(match)), record.most_bits
            if (
                not 1 <= scheme.bits <= most
                or scheme.group == 0
                or scheme.codebooks < 1
                or str(scheme) != text
            ):
                raise AquabitError(
                    f"scheme {text!r} is out of range: codes have 1 to {most} bits, counts start at 1;"
                    f" {_known_forms()}"
                )
            return scheme
        raise AquabitError(f"unknown scheme {text!r}; {_known_forms()}")

    def __str__(self) -> str:
        return self.record.text(self)

    @property
    def record(self) -> SchemeKind:
        """What is known of the kind: the one place where ``kind`` is asked."""
        return KINDS[self.kind]

    @property
    def calibrated(self) -> bool:
        """Fitted with the second moments of the layer's input (H), so that a fit belongs to a calibration."""
        return self.output_aware or self.record.always_calibrated

    @property
    def additive(self) -> bool:
        """Whether a weight is a sum of codewords."""
        return self.record.additive

    @property
    def range_group(self) -> int | None:
        """Inputs that share a scale; None where a row has one scale, or none."""
        return self.group if self.record.ranged else None

    @property
    def look(self) -> Look:
        """How reports show it."""
        return self.record.look(self)

    def code_bits(self, kernel_area: int = 1) -> float:
        """Bits of codes per weight, without codebooks and scales; ``kernel_area`` = kh * kw serves the
        ``k`` form."""
        return self.codebooks * self.bits / self.group_size(kernel_area)

    def group_size(self, kernel_area: int = 1) -> int:
        """Weights that one codeword covers (1 where each weight has a code of its own), by the kernel's area
        kh * kw."""
        return self.record.codeword(self, kernel_area)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """What is stored of a weight [out, in] or [out, in, kh, kw]."""
        return self.record.layout(self, shape)

    def stored_bytes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of one stored weight [out, in] or [out, in, kh, kw]: (packed codes with float16 scales and
        offsets, float16 codebooks)."""
        return self.layout(shape).stored_bytes(shape)

    def table_operations(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """(multiply-adds, adds) of the table kernel relative to the dense layer's multiply-adds: M K / out
        to make the tables, divided by the kernel's area where its taps share them (groups of ``gN``), and
        M / g table entries added (AQUATIC-Diff). (1, 0) for schemes that are counted as decoded and
        multiplied: those that are not additive."""
        if not self.additive:
            return 1.0, 0.0
        area = prod(shape[2:])
        size, taps = self.group_size(area), 1 if self.group is None else area
        return self.codebooks * 2**self.bits / (taps * shape[0]), self.codebooks / size

    def operations(self, shape: tuple[int, ...]) -> float:
        """Both parts of ``table_operations`` as one number: an add is half a multiply-add."""
        multiply_adds, adds = self.table_operations(shape)
        return multiply_adds + adds / 2


def _known_forms() -> str:
    return f"known forms: {', '.join(form for kind in KINDS.values() for form in kind.examples)}"


FP = Scheme()


Act = int | tuple[int, ...]  # activation bits (16 = off), or those of each group of steps


@dataclass(frozen=True)
class LayerChoice:
    """What one layer gets: a weight scheme, activation bits (16 = off; a tuple: one number per group of
    steps), and the name of a shared codebook."""

    weight: Scheme = FP
    act: Act = 16
    codebook: str | None = None


@dataclass(frozen=True)
class StepGroups:
    """Contiguous groups of the ``total`` denoising steps: ``starts`` are the first steps of the groups, in
    order of sampling."""

    total: int
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        rising = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if (
            not 2 <= len(self.starts) <= 5
            or self.starts[0] != 0
            or not rising
            or self.starts[-1] >= self.total
        ):
            raise AquabitError(
                f"step groups that start at {list(self.starts)} of {self.total} steps are not usable; give 2"
                " to 5 rising starts from 0"
            )

    def of(self, step: int) -> int:
        """The group that a step (from 0) belongs to."""
        return sum(start <= step for start in self.starts) - 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Each group's share of the steps; they add up to 1."""
        ends = (*self.starts[1:], self.total)
        return tuple((end - start) / self.total for start, end in zip(self.starts, ends, strict=True))


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


def plain_act(act: Act) -> Act:
    """Activation bits as they are kept: groups that are all equal are one number."""
    return act if isinstance(act, int) or len(set(act)) > 1 else act[0]


def act_code(act: Act) -> int:
    """Activation bits as one whole number, for index matrices: themselves, and for groups of steps a
    number above all widths."""
    act = plain_act(act)
    return act if isinstance(act, int) else sum(bits << CODE_SHIFT * g for g, bits in enumerate(act))


def act_of(code: int) -> Act:
    """The inverse of ``act_code``."""
    parts = []
    while code:
        parts.append(code & (1 << CODE_SHIFT) - 1)
        code >>= CODE_SHIFT
    return parts[0] if len(parts) == 1 else tuple(parts)


def act_text(act: Act) -> str:
    """``a8``, or ``a6/8`` where groups of steps differ: how an activation choice is named."""
    return f"a{act}" if isinstance(act, int) else "a" + "/".join(map(str, act))


def digest(value: Any) -> str:
    """Sixteen hex digits of SHA-256 over the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Calibration:
    """The full-precision images whose denoiser inputs H is made of: seeds that nothing is measured on, the
    sampler as it is measured."""

    images: int = 64
    seed: int = 600_000_001
    steps: int = 10
    scheduler: str = "default"
    eta: float = 0.0
    guidance: float = 1.0
    resolution: int | None = None
    conditions: tuple[str | int, ...] | None = None

    def __post_init__(self) -> None:
        if self.images < 1 or self.steps < 1:
            raise AquabitError(
                f"calibration with {self.images} images and {self.steps} steps has no input; give at least"
                " one of each"
            )
        for name in ("eta", "guidance"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 2 and 2.0 have one digest
        if self.conditions is not None:
            object.__setattr__(self, "conditions", tuple(self.conditions[: self.images]))  # no more are used

    @staticmethod
    def of(protocol: Protocol) -> Calibration:
        """Sampled as ``protocol`` samples."""
        kept = ("steps", "scheduler", "eta", "guidance", "resolution", "conditions")
        return Calibration(**{k: getattr(protocol, k) for k in kept})

    def protocol(self, micro_batch: int) -> Protocol:
        """As a protocol, to make images by."""
        return Protocol(**{**asdict(self), "micro_batch": micro_batch})

    @property
    def digest(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True)
class QuantConfig:
    """Which scheme and activation bits each layer of one model gets; layers not named stay in full precision.

    ``calibration`` says what H the calibrated schemes are fitted with, and what a correction's statistics and
    static ranges are measured on (None: ``Calibration()``). ``steps`` are the groups that activation bits
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

    def main_act(self, layer: str) -> int:
        """The activation bits that a layer has in most steps, the higher of two that share them: what its
        weight is fitted for."""
        act = self[layer].act
        if isinstance(act, int):
            return act
        assert self.steps is not None  # checked when it was made
        return max(set(act), key=lambda bits: (round(self.share(layer, bits), 9), bits))

    def mean_act(self, layer: str) -> float:
        """The activation bits of a layer, averaged over the steps."""
        act = self[layer].act
        return act if isinstance(act, int) else sum(bits * self.share(layer, bits) for bits in set(act))

    def share(self, layer: str, bits: int) -> float:
        """The share of steps in which a layer has so many activation bits."""
        act = self[layer].act
        if isinstance(act, int) or self.steps is None:
            return float(act == bits)
        return sum(s for s, b in zip(self.steps.shares, act, strict=True) if b == bits)

    def range_parts(self, layer: str) -> int:
        """How many static ranges each tensor of a layer has: one for each step, one for each group of
        steps where bits change, else one; 0 where ranges are dynamic."""
        act = self[layer].act
        if self.ranges == "dynamic" or act == 16:
            return 0
        if self.ranges == "step":
            return self.total_steps or 1
        return 1 if isinstance(act, int) else len(act)

    def range_part(self, layer: str, step: int) -> int:
        """Which of them a step uses."""
        if self.ranges == "step":
            return step
        return 0 if self.steps is None or isinstance(self[layer].act, int) else self.steps.of(step)

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
    def digest(self) -> str:
        """Equal for equal configurations, whatever name the model goes by."""
        body = {k: v for k, v in self.to_dict().items() if k not in ("model", "schema", "calibration")}
        if (
            self.correction
            or self.ranges != "dynamic"
            or any(choice.weight.calibrated for choice in self.layers.values())
        ):
            body["calibration"] = asdict(self.calibration or Calibration())
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
        later = {
            "tuned": self.tuned,
            "ranges": None if self.ranges == "dynamic" else self.ranges,
        }  # absent: digests stay what they were
        return {
            "schema": SCHEMA_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layers": layers,
            "steps": (
                None if self.steps is None else {"total": self.steps.total, "starts": list(self.steps.starts)}
            ),
            "correction": self.correction,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            **{k: v for k, v in later.items() if v is not None},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_dict(value: Any, source: str = "configuration") -> QuantConfig:
        """Validate untrusted JSON; raises AquabitError with the place and the value that is wrong."""
        file = _validated(_config_model(), value, source)
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
        calibration = None if file.calibration is None else Calibration(**file.calibration.model_dump())
        steps = None if file.steps is None else StepGroups(file.steps.total, tuple(file.steps.starts))
        return QuantConfig(
            file.fingerprint, layers, file.model, steps, file.correction, calibration, file.tuned, file.ranges
        )

    @staticmethod
    def load(path: str | Path) -> QuantConfig:
        """Read ``config.json``; raises AquabitError for a missing, truncated or invalid file."""
        return QuantConfig.from_dict(read_json(path), str(path))


@lru_cache(1)
def _config_model() -> Any:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Field,
    )  # pydantic costs 0.1 s to import: only where a file is read

    class Layer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        weight: str
        act: Literal[16, 8, 6, 4] | list[Literal[16, 8, 6, 4]]
        codebook: str | None = None

    class Groups(BaseModel):
        model_config = ConfigDict(extra="forbid")
        total: int = Field(ge=2)
        starts: list[int]

    class CalibrationPart(BaseModel):
        model_config = ConfigDict(extra="forbid")
        images: int = Field(ge=1)
        seed: int
        steps: int = Field(ge=1)
        scheduler: str
        eta: float
        guidance: float
        resolution: int | None
        conditions: list[str | int] | None

    class ConfigFile(BaseModel):
        model_config = ConfigDict(extra="forbid")
        schema_: Literal[1]
        model: str
        fingerprint: str
        layers: dict[str, Layer]
        steps: Groups | None = None
        correction: str | None = None
        calibration: CalibrationPart | None = None
        tuned: str | None = Field(None, pattern="^[0-9a-f]{16}$")
        ranges: str = "dynamic"

    return ConfigFile


def _validated(model: Any, value: Any, source: str) -> Any:
    from pydantic import ValidationError

    if isinstance(value, dict) and "schema" in value:
        value = {("schema_" if k == "schema" else k): v for k, v in value.items()}
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]).replace("schema_", "schema") or "the top level"
        raise AquabitError(
            f"{source} is not a configuration: {place}: {first['msg']} (got {first.get('input')!r:.60})"
        ) from error


@dataclass(frozen=True)
class Protocol:
    """How quality is measured; its digest keys every measurement, so numbers of different protocols never
    mix."""

    images: int = 128
    steps: int = 10
    seed: int = 0  # image i is made from seed + i
    scheduler: str = "default"
    eta: float = 0.0
    guidance: float = 1.0
    resolution: int | None = None
    conditions: tuple[str | int, ...] | None = (
        None  # prompts or class labels, repeated in order; None: the model's own
    )
    micro_batch: int = 64  # the last one padded, so that images do not depend on the number of images
    objective: str = "fid"
    reference: str = "bundled"  # digest or name of the real images
    dtype: str = "float32"
    # what the user's files and functions measure by: "clip=DIGEST", and "module:function=min:DIGEST" with the
    # direction of a metric
    measures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "steps", "micro_batch"):
            if getattr(self, name) < 1:
                raise AquabitError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.conditions is not None:
            object.__setattr__(self, "conditions", tuple(self.conditions))
        object.__setattr__(self, "measures", tuple(self.measures))

    @property
    def digest(self) -> str:
        """Changes with everything but the objective (all metrics are always stored)."""
        absent = {"objective"} if self.measures else {"objective", "measures"}  # digests stay what they were
        return digest({k: v for k, v in asdict(self).items() if k not in absent})

    def direction(self, metric: str | None = None) -> Literal["min", "max"]:
        """Whether lower ("min") or higher ("max") values are better, of the objective or of another
        metric; the user's say it themselves."""
        name = metric or self.objective
        for measure in self.measures:
            own, _, rest = measure.rpartition("=")
            if own == name and ":" in name:
                return "max" if rest.startswith("max") else "min"
        return direction(name)

    def block(self, index: int) -> Protocol:
        """The same protocol on the ``index``-th block of fresh seeds (index 0 = this protocol itself)."""
        return replace(self, seed=self.seed + 1_000_003 * index)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Protocol:
        return Protocol(**value)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """One configuration measured under one protocol; ``status`` is "ok" or "failed" (then ``reason`` says
    why)."""

    config: str
    protocol: str
    metrics: Mapping[str, float]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""


LOWER_IS_BETTER: Mapping[str, bool] = {
    "fid": True,
    "sfid": True,
    "kid": True,
    "is": False,
    "precision": False,
    "recall": False,
    "accuracy": False,
    "mse": True,
    "psnr": False,
    "ssim": False,
    "feature_distance": True,
    "lpips": True,
    "clip_score": False,
    "cmmd": True,
    "fd_dinov2": True,
    "kd_dinov2": True,
    "precision_dinov2": False,
    "recall_dinov2": False,
}


def direction(metric: str) -> Literal["min", "max"]:
    """Whether lower ("min") or higher ("max") values of a metric are better; an unknown metric is an
    error."""
    if metric not in LOWER_IS_BETTER:
        raise AquabitError(f"unknown metric {metric!r}; known: {', '.join(LOWER_IS_BETTER)}")
    return "min" if LOWER_IS_BETTER[metric] else "max"


@dataclass(frozen=True)
class Budget:
    """Hard upper limits, together where several are given: bits per weight, bytes, BOPs, milliseconds per
    denoiser call."""

    bits: float | None = None
    bytes: int | None = None
    bops: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if not self.limits():
            raise AquabitError("a budget needs at least one of bits, bytes, bops or latency")
        for name, value in self.limits().items():
            if not value > 0:
                raise AquabitError(f"budget {name} is {value}; it must be positive")

    def limits(self) -> dict[str, float]:
        """Only the limits that are set."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def __str__(self) -> str:
        return ", ".join(f"{k} <= {v:g}" for k, v in self.limits().items())


def parse_swap(text: str) -> tuple[Scheme, Scheme]:
    """``"usq4:usq2"`` as two schemes."""
    parts: Iterable[str] = text.split(":")
    schemes = tuple(Scheme.parse(p) for p in parts)
    if len(schemes) != 2 or schemes[0] == schemes[1]:
        raise AquabitError(f"swap {text!r} must name two different schemes, as in usq4:usq2")
    return schemes[0], schemes[1]
