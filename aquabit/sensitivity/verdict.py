"""What may be believed of a fit: whether there are enough measurements for a claim, and whether it beats average bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_LAYER = 2.0  # measurements per free layer that a claim about layers needs


def needed(layers: int) -> int:
    """Measurements that a claim about ``layers`` free layers needs."""
    return round(PER_LAYER * layers)


def widening(count: int, layers: int) -> float:
    """Factor on the intervals of effects where there are fewer measurements than ``needed``: the fourth root of how many times fewer.

    Bootstrap intervals grow by themselves, but too slowly: on synthetic truth (60 layers, 3 draws) the factor that makes them hold 90 % of
    the true effects was 1.3 times as large at 25, 40 and 60 measurements as at 120; the fourth root says 1.5, 1.3 and 1.2.
    """
    return float(max(1.0, needed(layers) / count) ** 0.25)


def judged(scores: Mapping[str, Any], estimator: str, count: int, layers: int) -> dict[str, Any]:
    """``scores`` of ``cross_validate`` with "estimator", "needed", "widen" and "cautions": sentences to be read before the ranking."""
    cautions, low_high = [], scores["within_budget_interval"]
    if not scores["useful"]:
        cautions.append(
            f"The surrogate is no better than average bits at ranking configurations of one size (within-budget SRCC "
            f"{scores['within_budget_srcc']:.2f}, 90 % interval {low_high[0]:.2f} to {low_high[1]:.2f}): "
            "its ranking of layers is not to be trusted."
        )
    if count < needed(layers):
        cautions.append(
            f"{count} measurements are few for {layers} layers, a claim needs {needed(layers)}: "
            f"intervals are widened by {widening(count, layers):.2f}."
        )
    facts = {"estimator": estimator, "needed": needed(layers), "widen": widening(count, layers), "cautions": cautions}
    return {**scores, "within_budget_interval": list(low_high), **facts}
