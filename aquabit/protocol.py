"""How images are made and what is measured of them: Protocol, Calibration, Measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil
from typing import Any, Literal

from aquabit.errors import AquabitError
from aquabit.inputs import Inputs
from aquabit.jsonio import digest, record

SCHEDULERS: Mapping[str, str] = {  # what samplers are called here, and their classes in diffusers
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}


# what sampling can take: beyond lie numbers that nobody means, and that would fill memory
BOUNDS = {
    "images": (1, 10_000_000),
    "steps": (1, 100_000),
    "micro_batch": (1, 65_536),
    "resolution": (1, 65_536),
    "frames": (1, 65_536),
    "seed": (0, (1 << 63) - 1),
    "eta": (0, 1000),
    "guidance": (-1000, 1000),
    "strength": (0.001, 1),
}
LATER = ("frames", "inputs", "strength")  # absent where they are not asked for: digests stay what they were


def _check(settings: Calibration | Protocol) -> None:
    """Raise AquabitError for a number that is out of BOUNDS."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(settings, name, None)
        if value is not None and not low <= value <= high:
            raise AquabitError(f"{name} is {value}; it must be at least {low} and at most {high:,}")


def _as_dict(settings: Calibration | Protocol) -> dict[str, Any]:
    found = {f.name: getattr(settings, f.name) for f in fields(settings)}
    if settings.inputs is not None:
        found["inputs"] = settings.inputs.to_dict()
    return {k: v for k, v in found.items() if k not in LATER or v is not None}


def _identity(settings: Calibration | Protocol) -> dict[str, Any]:
    """What digests are made of: where pictures lie is no part of what is done."""
    found = _as_dict(settings)
    return found if settings.inputs is None else {**found, "inputs": settings.inputs.identity}


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
    frames: int | None = None
    inputs: Inputs | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        for name in ("eta", "guidance"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 2 and 2.0 have one digest
        if self.conditions is not None:
            object.__setattr__(self, "conditions", tuple(self.conditions[: self.images]))  # no more are used
        if self.inputs is not None and len(self.inputs.pictures) > self.images:
            object.__setattr__(self, "inputs", self.inputs.turned(range(self.images)))

    @staticmethod
    def of(protocol: Protocol) -> Calibration:
        """Sampled as ``protocol`` samples."""
        own = {f.name for f in fields(Calibration)} - {"images", "seed"}
        kept = [f.name for f in fields(Protocol) if f.name in own]
        return Calibration(**{k: getattr(protocol, k) for k in kept})

    def protocol(self, micro_batch: int) -> Protocol:
        """As a protocol, to make images by in even batches of at most ``micro_batch``: what is padded would
        be calibrated on twice."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Protocol(**own, micro_batch=micro_batch).evened()

    @property
    def identity(self) -> dict[str, Any]:
        """What it is, wherever its pictures lie."""
        return _identity(self)

    @property
    def digest(self) -> str:
        return digest(self.identity)

    def to_dict(self) -> dict[str, Any]:
        return _as_dict(self)


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
    # prompts or class labels, repeated in order; None: the model's own
    conditions: tuple[str | int, ...] | None = None
    micro_batch: int = 64  # images that are made together; the last ones padded to as many
    objective: str = "fid"
    reference: str = "bundled"  # digest or name of the real images
    dtype: str = "float32"
    # what the user's files and functions measure by: "clip=DIGEST", and "module:function=min:DIGEST" with the
    # direction of a metric
    measures: tuple[str, ...] = ()
    frames: int | None = None  # of each video; None: the model's own
    inputs: Inputs | None = None  # pictures that images are made from, repeated in order
    strength: float | None = None  # how far from its picture an image may be; None: the pipeline's own

    def __post_init__(self) -> None:
        _check(self)
        if self.conditions is not None:
            object.__setattr__(self, "conditions", tuple(self.conditions))
        object.__setattr__(self, "measures", tuple(self.measures))

    @property
    def digest(self) -> str:
        """Changes with everything but the objective (all metrics are always stored)."""
        absent = {"objective"} if self.measures else {"objective", "measures"}  # digests stay what they were
        return digest({k: v for k, v in _identity(self).items() if k not in absent})

    def direction(self, metric: str | None = None) -> Literal["min", "max"]:
        """Whether lower ("min") or higher ("max") values are better, of the objective or of another
        metric; the user's say it themselves."""
        name = metric or self.objective
        for measure in self.measures:
            own, _, rest = measure.rpartition("=")
            if own == name and ":" in name:
                return "max" if rest.startswith("max") else "min"
        return direction(name)

    def sign(self, metric: str | None = None) -> float:
        """What values are multiplied by so that larger = worse."""
        return 1.0 if self.direction(metric) == "min" else -1.0

    def evened(self) -> Protocol:
        """The same images in as few micro-batches, which are no larger and of one size: of 8 images in
        micro-batches of 64, one of 8; of 100, two of 50. What is padded costs as much as an image."""
        calls = ceil(self.images / self.micro_batch)
        return replace(self, micro_batch=ceil(self.images / calls))

    def block(self, index: int) -> Protocol:
        """The same protocol on the ``index``-th block of fresh seeds (index 0 = this protocol itself)."""
        return replace(self, seed=self.seed + 1_000_003 * index)

    @staticmethod
    def from_dict(value: Any, source: str = "the stored protocol") -> Protocol:
        """The inverse of ``to_dict``; raises AquabitError where it is none."""
        return record(Protocol, value, source)

    def to_dict(self) -> dict[str, Any]:
        return _as_dict(self)


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
    "temporal_psnr": False,
    "feature_distance": True,
    "lpips": True,
    "clip_score": False,
    "cmmd": True,
    "fd_dinov2": True,
    "kd_dinov2": True,
    "precision_dinov2": False,
    "recall_dinov2": False,
    "effnet_fd": True,
    "effnet_kd": True,
    "precision_effnet": False,
    "recall_effnet": False,
    "effnet_distance": True,
}


def direction(metric: str) -> Literal["min", "max"]:
    """Whether lower ("min") or higher ("max") values of a metric are better; an unknown metric is an
    error."""
    if metric not in LOWER_IS_BETTER:
        raise AquabitError(f"unknown metric {metric!r}; known: {', '.join(LOWER_IS_BETTER)}")
    return "min" if LOWER_IS_BETTER[metric] else "max"
