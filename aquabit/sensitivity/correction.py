"""What noise correction gives to a chosen configuration: the noise it adds, and its quality without and with correction, same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from aquabit.quant.correct import Corrector
from aquabit.scheme import AquabitError, Calibration, Progress, Protocol, QuantConfig, no_progress
from aquabit.sensitivity.evaluator import single_thread
from aquabit.sensitivity.measure import Session, check_correction

DEFAULT_CORRECTION = "cnc+bc"  # defined for every sampler
KIND = "correction"  # of the measurements that are made only to be set beside the chosen configuration's own


def without_and_with(config: QuantConfig, calibration: Calibration) -> tuple[QuantConfig, QuantConfig]:
    """A configuration without correction and with its own, or the default one where it has none, measured on ``calibration``."""
    corrected = (
        config if config.correction else replace(config, correction=DEFAULT_CORRECTION, calibration=config.calibration or calibration)
    )
    return replace(config, correction=None), corrected


def noise_facts(session: Session, config: QuantConfig, protocols: Sequence[Protocol], progress: Progress = no_progress) -> dict[str, Any]:
    """Measure, packed, on each of ``protocols`` what ``config`` is without its correction (with the default one where it has none), and say
    what a report shows of it.

    Gives {"correction", "without", "with" (digests), "protocols" (digests), "images", "rows" (one a step and guidance branch, as
    ``Statistics.table``, undefined numbers as None)}; empty for full precision. Where the noise cannot be measured or corrected, nothing is
    measured and "reason" says why: the search that asks has found its winner without it.
    """
    if not config.layers:
        return {}
    calibration = Calibration.of(session.protocol)
    pair = without_and_with(config, calibration)
    correction = str(pair[1].correction)
    facts: dict[str, Any] = {"correction": correction, "without": pair[0].digest, "with": pair[1].digest, "protocols": [], "rows": []}
    progress("quantization noise of the winner", 0, 1)
    try:
        with single_thread(session.device):
            statistics = session.here.noise(config, calibration)  # kept in the bank, where workers find it
        rows = statistics.table().to_dict("records")
        facts |= {"images": statistics.about.images, "rows": [{str(k): _defined(v) for k, v in row.items()} for row in rows]}
        check_correction(session.model, session.protocol, correction)
        Corrector(statistics, correction)
    except AquabitError as error:
        return {**facts, "reason": str(error)}
    progress("quantization noise of the winner", 1, 1)
    session.measure([c for c in pair if c.digest != config.digest], KIND, progress, protocols, "without and with correction", packed=True)
    return {**facts, "protocols": [p.digest for p in protocols]}


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
