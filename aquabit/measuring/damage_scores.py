"""How true damages from gradients are: those that were probed too, beside their probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aquabit.space import SearchSpace
from aquabit.study import Study

FEWEST = 5  # cells that are compared


@dataclass(frozen=True)
class DamageScore:
    """``count`` (layer, scheme) have a damage from gradients and from a probe: the rank correlation of both,
    and the median and quartiles of the gradients' over the probes'."""

    count: int
    srcc: float
    ratio: float
    low: float
    high: float


def damage_score(features: Mapping[tuple[str, str], Mapping[str, Any]]) -> DamageScore | None:
    """Of a study's features; None where fewer than FEWEST are compared."""
    both = [(v["damage"], v["probed"]) for v in features.values() if "gradient" in v and v.get("probed")]
    if len(both) < FEWEST:
        return None
    own, probed = np.array(both).T
    ratio = np.quantile(own / probed, (0.25, 0.5, 0.75))
    return DamageScore(
        len(both), float(spearmanr(own, probed).statistic), float(ratio[1]), *ratio[[0, 2]].tolist()
    )


def damage_notes(space: SearchSpace, study: Study) -> list[str]:
    """What is to be said of the study's damages; nothing where all were probed."""
    known = study.features()
    by_gradients = sum("gradient" in v for v in known.values())
    if not by_gradients:
        told = []
    elif score := damage_score(known):
        told = [
            "What each scheme does to each layer alone is predicted from gradients, to first order;"
            f" {score.count} that were probed too have a rank correlation of {score.srcc:.2f} with that, and"
            f" the predicted are {score.ratio:.2f} times as large ({score.low:.2f} to {score.high:.2f}, the"
            " middle half)."
        ]
    else:
        told = [
            "What each scheme does to each layer alone is predicted from gradients, to first order; probes"
            " measure it (--damages probes)."
        ]
    untold: dict[str, str] = {k: v for k, v in (study.get("untold") or {}).items() if k in space.choices}
    if untold:
        layer, why = next(iter(untold.items()))
        more = f", and {len(untold) - 1} more" if len(untold) > 1 else ""
        told.append(f"Probes tell what schemes do where gradients do not: layer {layer}{more} ({why}).")
    return told
