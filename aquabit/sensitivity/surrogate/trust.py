"""What may be believed of a fit: whether there are enough measurements for a claim, and whether it beats
average bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aquabit.stats import percent

PER_LAYER = 2.0  # measurements per free layer that a claim about layers needs


def needed(layers: int) -> int:
    """Measurements that a claim about ``layers`` free layers needs."""
    return round(PER_LAYER * layers)


def assess(scores: Mapping[str, Any], estimator: str, count: int, layers: int) -> dict[str, Any]:
    """``scores`` of ``cross_validate`` with "estimator", "needed" and "cautions": sentences to be read
    before the ranking."""
    cautions, low_high = [], scores["within_budget_interval"]
    level = percent(scores["within_budget_level"])
    if not scores["useful"]:
        cautions.append(
            "The surrogate is no better than average bits at ranking configurations of one size"
            f" (within-budget SRCC {scores['within_budget_srcc']:.2f}, {level} interval {low_high[0]:.2f} to"
            f" {low_high[1]:.2f}): its ranking of layers is not to be trusted."
        )
    if count < needed(layers):
        cautions.append(
            f"{count} measurements are few for {layers} layers, a claim needs {needed(layers)}: "
            "intervals of what no real swap checks may be too narrow."
        )
    facts = {"estimator": estimator, "needed": needed(layers), "cautions": cautions}
    return {**scores, "within_budget_interval": list(low_high), **facts}
