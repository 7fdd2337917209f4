"""What noise correction gives to a chosen configuration: the noise it adds, and its quality without and
with correction, same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aquabit.jsonio import defined
from aquabit.measuring.model import check_correctable
from aquabit.measuring.session import Session, uniform_references
from aquabit.quant.correction.corrector import DEFAULT_CORRECTION, Corrector
from aquabit.runtime import single_thread
from aquabit.scheme import (
    AquabitError,
    Calibration,
    Progress,
    Protocol,
    QuantConfig,
    no_progress,
    parse_correction,
)
from aquabit.sensitivity.surrogate.fit import training_table
from aquabit.sensitivity.surrogate.regressor import Target

KIND = "correction"  # of the measurements that are made only to be set beside the chosen configuration's own


def without_and_with(config: QuantConfig, calibration: Calibration) -> tuple[QuantConfig, QuantConfig]:
    """A configuration without correction and with its own, or the default one where it has none, measured
    on ``calibration``."""
    corrected = config
    if not config.correction:
        measured_on = config.calibration or calibration
        corrected = replace(config, correction=DEFAULT_CORRECTION, calibration=measured_on)
    return replace(config, correction=None), corrected


def noise_facts(
    session: Session, config: QuantConfig, protocols: Sequence[Protocol], progress: Progress = no_progress
) -> dict[str, Any]:
    """Measure, packed, on each of ``protocols`` what ``config`` is without its correction (with the default
    one where it has none), and say what a report shows of it.

    Gives {"correction", "without", "with" (digests), "protocols" (digests), "images", "rows" (one a step and
    guidance branch, as ``Statistics.table``, undefined numbers as None)}; empty for full precision. Where the
    noise cannot be measured or corrected, nothing is measured and "reason" says why: the search that asks has
    found its winner without it.
    """
    if not config.layers:
        return {}
    calibration = Calibration.of(session.protocol)
    pair = without_and_with(config, calibration)
    correction = str(pair[1].correction)
    facts: dict[str, Any] = {
        "correction": correction,
        "without": pair[0].digest,
        "with": pair[1].digest,
        "protocols": [],
        "rows": [],
    }
    progress("quantization noise of the winner", 0, 1)
    try:
        with single_thread(session.device):
            statistics = session.here.noise(config, calibration)  # kept in the bank, where workers find it
        rows = statistics.table().to_dict("records")
        facts |= {"images": statistics.about.images, "rows": defined(rows)}
        check_correctable(session.model, session.protocol, correction)
        Corrector(statistics, correction)
    except AquabitError as error:
        return {**facts, "reason": str(error)}
    progress("quantization noise of the winner", 1, 1)
    other, what = [c for c in pair if c.digest != config.digest], "without and with correction"
    session.measure(other, KIND, progress, protocols, what, packed=True)
    return {**facts, "protocols": [p.digest for p in protocols]}


def corrected_session(session: Session, correction: str, progress: Progress = no_progress) -> Session:
    """A session whose configurations are all corrected, on a study that was measured without: a search in it
    measures its candidates, and chooses among them, after correction.

    The study's surrogate still learns from what was measured without correction alone (``training_table``),
    never from both: it orders the candidates, and ``correction_shift`` moves what it predicts. The uniform
    references are measured after correction here, which makes the pairs that the shift is read from. The same
    session where the study was measured with this correction. Raises AquabitError where it was measured with
    another one, and where the sampler cannot be corrected so.
    """
    wanted, own = "+".join(parse_correction(correction)), session.space.correction or ""
    if wanted == own:
        return session
    if own:
        raise AquabitError(
            f"{session.study.path} was measured with --correction {own}; search with that, or without"
            " --correction"
        )
    # too few measurements are said before anything is measured
    training_table(session.study, session.protocol.objective)
    check_correctable(session.model, session.protocol, wanted)
    calibration = session.space.calibration or Calibration.of(session.protocol)
    corrected = session.with_space(replace(session.space, correction=wanted, calibration=calibration))
    uniform, what = uniform_references(corrected.space), "uniform references, corrected"
    corrected.measure(uniform, "candidate", progress, what=what)
    return corrected


def correction_shift(session: Session, objective: str, target: Target) -> float:
    """What correction adds on average to the oriented target of the uniform references, each measured without
    and with it under the study's protocol; 0 where the session corrects as its study does, and where no
    reference was measured both ways.
    """
    measured = session.study.need("space", "run `aquabit measure` first")
    if session.space.correction == measured.get("correction"):
        return 0.0
    table = session.study.measurements(session.protocol)
    value = dict(zip(table.config, table[objective].astype(float), strict=True))
    pairs = [(c.digest, replace(c, correction=None).digest) for c in uniform_references(session.space)]
    known = np.array([(value[a], value[b]) for a, b in pairs if a in value and b in value]).reshape(-1, 2)
    with np.errstate(all="ignore"):
        changes = target(known[:, 0]) - target(known[:, 1])
    finite = changes[np.isfinite(changes)]
    return float(finite.mean()) if len(finite) else 0.0
