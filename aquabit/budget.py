"""Budget: hard limits of what a configuration may cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from aquabit.errors import AquabitError

BITS = 3.0  # a weight, where no limit is given
# limits of a front's other budgets relative to the one that is asked for, the nearest first
SPREAD = (0.9, 1.1, 0.8, 1.25, 0.6, 1.5, 0.5, 2.0)
OTHERS = len(SPREAD)


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

    @staticmethod
    def of(
        bits: float | None, bytes: int | None = None, bops: float | None = None, latency: float | None = None
    ) -> Budget:
        """The limits that are given; BITS bits per weight where none is."""
        none = bits is None and bytes is None and bops is None and latency is None
        return Budget(BITS if none else bits, bytes, bops, latency)

    def limits(self) -> dict[str, float]:
        """Only the limits that are set."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def __str__(self) -> str:
        return ", ".join(f"{k} <= {v:g}" for k, v in self.limits().items())
