"""Calibrator: recorded calls, groups of layers and second moments of a calibration, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from aquabit.quant.calibration.full_precision import FullPrecision
from aquabit.quant.calibration.input_groups import Group, input_groups
from aquabit.quant.calibration.moments import Moments, moments, portions
from aquabit.quant.calibration.recording import Call
from aquabit.scheme import AquabitError, Calibration

Record = Callable[[Calibration], list[Call]]  # denoiser calls of a full-precision run


class Calibrator:
    """Measures H of layers on the denoiser calls that ``record`` makes; None where nothing can be recorded.

    The calls of the last calibration are kept, and the last H. Measuring leaves the denoiser in full
    precision.
    """

    def __init__(self, model: FullPrecision, record: Record | None = None):
        self.model, self.record = model, record
        self._recorded: tuple[Calibration, list[Call], list[Group]] | None = None
        self._moments: tuple[Calibration, dict[tuple[str, int], Moments]] | None = None

    def recorded(self, calibration: Calibration) -> tuple[list[Call], list[Group]]:
        """Denoiser calls, and the layers that read the same tensors. Raises AquabitError where there are none
        to record."""
        if self._recorded is None or self._recorded[0] != calibration:
            if self.record is None:
                raise AquabitError(
                    "calibrated schemes need images to measure H on, and this model was opened without a"
                    " pipeline"
                )
            self.model.set_()
            calls = self.record(calibration)
            self._recorded = calibration, calls, input_groups(self.model, calls)
        return self._recorded[1], self._recorded[2]

    def portions(
        self, layers: Iterable[str], acts: Sequence[int], calibration: Calibration | None
    ) -> list[list[Group]]:
        """Groups of layers that read the same tensor, in portions whose H at ``acts`` fit into memory
        together. Raises AquabitError for a layer that did not run."""
        wanted = set(layers)
        groups = self._groups(wanted, calibration or Calibration())
        never = wanted - {n for group in groups for n in group}
        if never:
            raise AquabitError(
                f"layer {min(never)!r} did not run during calibration; exclude it or pin it to a scheme that"
                " needs no H"
            )
        return portions(groups, self.model.layers, acts)

    def moments(
        self, layers: Iterable[str], acts: Sequence[int], calibration: Calibration | None
    ) -> dict[tuple[str, int], Moments]:
        """H by layer and activation bits; layers that did not run are left out."""
        wanted, asked = set(layers), calibration or Calibration()
        if (
            self._moments is None
            or self._moments[0] != asked
            or any((n, a) not in self._moments[1] for n in wanted for a in acts)
        ):
            self._moments = None  # no two at a time
            groups = self._groups(wanted, asked)
            self._moments = asked, moments(self.model, self.recorded(asked)[0], groups, acts)
        return self._moments[1]

    def _groups(self, layers: set[str], calibration: Calibration) -> list[Group]:
        """Groups without the layers that were not asked for."""
        own = (tuple(n for n in group if n in layers) for group in self.recorded(calibration)[1])
        return [group for group in own if group]
