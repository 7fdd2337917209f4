"""Where: on what images are made, and where fitted weights are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from aquabit.scheme import AquabitError


class WhereOptions(TypedDict, total=False):
    """The fields of ``Where`` as keywords of public functions."""

    workers: int
    device: str
    dtype: str
    bank: str | None
    ray: str | None


@dataclass(frozen=True)
class Where:
    """``workers`` processes of this machine (1: this process itself), or the Ray cluster at an address
    (``ray``: auto, local, host:port); ``device`` as torch names it, ``dtype`` of full-precision weights
    (float32, float16, bfloat16); ``bank``: the folder of fitted weights (None: AQUABIT_BANK, or
    ~/.cache/aquabit/bank).

    Raises AquabitError for fewer than one worker, and for workers beside a cluster.
    """

    workers: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    bank: str | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise AquabitError(f"workers is {self.workers}; it must be at least 1")
        if self.ray is not None and self.workers != 1:
            raise AquabitError(
                f"--workers {self.workers} counts processes of this machine, --ray takes every slot of a"
                " cluster; give one of them"
            )

    @property
    def inline(self) -> bool:
        """Whether all is done in this process."""
        return self.workers == 1 and self.ray is None


HERE = Where()  # this process, on the CPU
