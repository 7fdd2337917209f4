"""Which tables and figures a report has. A new subject is one file in ``subjects``: its tables, its
figures and their captions (``plans``), and one line here."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from aquabit.reports.facts import Facts
from aquabit.reports.plan import Plan, Tables
from aquabit.reports.subjects import (
    chosen,
    comparison,
    first,
    fronts,
    groups,
    interactions,
    layer_graph,
    measurements,
    noise,
    quality,
    ranking,
    scheme_scores,
    shap_values,
    swaps,
    trust,
)

TABLES = (
    measurements.counts,
    measurements.failures,
    quality.quality_vs_bits,
    quality.psnr_vs_bits,
    quality.temporal_vs_bits,
    fronts.front,
    comparison.comparison,
    comparison.same_quality,
    fronts.budgets,
    fronts.proof,
    fronts.frontiers,
    fronts.progress,
    chosen.chosen_bits,
    chosen.step_bits,
    first.first_ranking,
    ranking.layers,
    groups.operators,
    groups.blocks,
    ranking.layer_schemes,
    interactions.pairs,
    scheme_scores.scheme_scores,
    shap_values.shap_swarm,
    trust.learning_curve,
    chosen.chosen_schemes,
    trust.surrogate,
    trust.surrogate_scatter,
    swaps.swaps,
    swaps.agreement,
    noise.noise,
    noise.correction,
    groups.block_operator,
    layer_graph.layer_graph,
)
# in the order of the page
FIGURES = (
    ranking.plans,
    groups.plans,
    layer_graph.plans,
    noise.plans,
    trust.plans,
    swaps.plans,
    quality.plans,
    fronts.plans,
    chosen.plans,
    shap_values.plans,
    interactions.plans,
    scheme_scores.plans,
)


def all_tables(facts: Facts) -> dict[str, pd.DataFrame]:
    """Every table by the name of its files, which is that of the function that makes it."""
    return {table.__name__: table(facts) for table in TABLES}


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    """Every figure of a study, in the order of the page."""
    for figures in FIGURES:
        yield from figures(facts, found)
