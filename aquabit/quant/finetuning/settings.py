"""FineTuning: how a quantized model is tuned against its full-precision teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import cos, pi
from pathlib import Path
from typing import Any, Literal

from aquabit.jsonio import read_json, record
from aquabit.scheme import AquabitError, digest

COARSE_RATE, FINE_RATE, FINE_BITS = 1e-2, 2.5e-3, 2.5  # of codes: below and from FINE_BITS a weight on

Order = Literal["shuffled", "walking"]
Method = Literal["pv", "straight_through"]


@dataclass(frozen=True)
class FineTuning:
    """PV-Tuning's settings (Malinovskii et al. 2024; SeMI: AQUATIC-Diff).

    ``steps`` of the optimizer, each on ``batch`` samples of a replay buffer: the denoiser's inputs and
    outputs while full precision makes ``images`` images from ``images_seed`` on. ``order``: "shuffled" mixes
    samples of all trajectories and steps in a batch, "walking" goes along one batch of trajectories after
    another. Rates are relative to the root mean square of what they change at the start, rise over ``warmup``
    steps and fall to zero along a cosine; ``code_rate`` None is chosen by the bits of the codes. A step
    changes codes of at most the share ``tau`` of a layer's groups, and a layer's weight by at most
    ``trust_ratio`` of its norm (None: no limit); ``delta_decay`` is the share of the difference between the
    dense proxy and the decoded weight that is forgotten in a step (0: straight-through, 1: none is kept).
    ``semi_groups``: a group whose code changes loses its optimizer state and its difference;
    ``semi_discontinuity``: first moments of codebooks, scales and offsets are forgotten where a batch is not
    the next step of the trajectories of the batch before (shuffled batches never are). ``guidance``: the loss
    is on outputs that are combined with this scale, and images are made with it. ``method``
    "straight_through" is plain Adam on dense proxies, every code the nearest in every step. Raises
    AquabitError for values out of range.
    """

    steps: int = 1500
    batch: int = 32
    images: int = 2048
    images_seed: int = 800_000_001
    seed: int = 0
    order: Order = "shuffled"
    method: Method = "pv"
    code_rate: float | None = None
    codebook_rate: float = 1e-3
    scale_rate: float = 1e-3
    code_betas: tuple[float, float] = (0.0, 0.95)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: int = 20
    tau: float = 0.01
    trust_ratio: float | None = 0.01
    delta_decay: float = 0.0
    beam: int = 4
    semi_groups: bool = True
    semi_discontinuity: bool = False
    guidance: float | None = None
    check_every: int = 100

    def __post_init__(self) -> None:
        for name in ("code_betas", "betas"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        for name in ("steps", "batch", "images", "beam", "check_every"):
            self._demand(name, getattr(self, name) >= 1, "at least 1")
        self._demand(
            "code_rate",
            self.code_rate is None or 0 <= self.code_rate < float("inf"),
            "0 or more, or null to suit the codes",
        )
        for name in ("codebook_rate", "scale_rate", "weight_decay", "warmup"):
            self._demand(name, 0 <= getattr(self, name) < float("inf"), "0 or more")
        for name in ("code_betas", "betas"):
            self._demand(
                name,
                len(getattr(self, name)) == 2 and all(0 <= b < 1 for b in getattr(self, name)),
                "two numbers from 0 to below 1",
            )
        self._demand("tau", 0 < self.tau <= 1, "above 0 and at most 1")
        self._demand(
            "trust_ratio",
            self.trust_ratio is None or 0 < self.trust_ratio < float("inf"),
            "positive, or null for no limit",
        )
        self._demand("delta_decay", 0 <= self.delta_decay <= 1, "from 0 to 1")
        self._demand("order", self.order in ("shuffled", "walking"), "shuffled or walking")
        self._demand("method", self.method in ("pv", "straight_through"), "pv or straight_through")
        self._demand(
            "images",
            self.images >= 2 * self.batch,
            f"at least two batches of {self.batch}, since one is held out",
        )
        self._demand(
            "guidance",
            self.guidance is None or abs(self.guidance) < float("inf"),
            "a number, or null for none",
        )

    def _demand(self, name: str, good: bool, what: str) -> None:
        if not good:
            raise AquabitError(
                f"fine-tuning with {name} {getattr(self, name)!r} cannot work; it must be {what}"
            )

    def resolved(self, code_bits: float) -> FineTuning:
        """With a ``code_rate`` that suits codes of so many bits a weight where none is given: at the rate
        that serves 2 bits, finer codes change so often (half of them at 4 bits) that images lose 3 dB to
        full precision's."""
        if self.code_rate is not None:
            return self
        return replace(self, code_rate=COARSE_RATE if code_bits < FINE_BITS else FINE_RATE)

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    def rate_at(self, step: int) -> float:
        """The factor of all rates in a step (from 0): a linear rise, then half a cosine down to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + cos(pi * (step - self.warmup) / max(1, self.steps - self.warmup)))

    @staticmethod
    def from_dict(value: Any, source: str = "fine-tuning settings") -> FineTuning:
        """Validate untrusted JSON, whose absent fields keep their defaults; raises AquabitError with the
        field and the value."""
        return record(FineTuning, value, source)

    @staticmethod
    def load(path: str | Path) -> FineTuning:
        """Read settings from a JSON file; raises AquabitError for one that is missing or wrong."""
        return FineTuning.from_dict(read_json(path), str(path))
