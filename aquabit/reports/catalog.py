"""Which tables and figures a report has: every table by name, every figure with the table that it is drawn
from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

from aquabit.reports import attribution, costs, figures, layer_graph, noise, style, tables
from aquabit.reports.facts import Facts, number

Tables = Mapping[str, pd.DataFrame]
Size = Callable[[pd.DataFrame], tuple[float, float]]
Draw = Callable[[pd.DataFrame, Axes], None]


@dataclass(frozen=True)
class Plan:
    """One figure: its section, the fact it needs, its table, its size in inches, and who draws it. Where
    an ``optional`` one has no rows the page says nothing of it."""

    name: str
    section: str
    needs: str
    table: str
    size: Size
    draw: Draw
    caption: str
    optional: bool = False


def all_tables(facts: Facts) -> dict[str, pd.DataFrame]:
    """Every table by the name of its files."""
    functions = (
        tables.counts,
        tables.failures,
        tables.quality_vs_bits,
        tables.psnr_vs_bits,
        tables.front,
        tables.comparison,
        tables.same_quality,
        costs.budgets,
        costs.proof,
        costs.frontiers,
        costs.progress,
        costs.chosen_bits,
        costs.step_bits,
        tables.layers,
        tables.operators,
        tables.blocks,
        tables.layer_schemes,
        attribution.pairs,
        attribution.scheme_scores,
        attribution.shap_swarm,
        attribution.learning_curve,
        tables.chosen_schemes,
        tables.surrogate,
        tables.surrogate_scatter,
        tables.swaps,
        tables.agreement,
        noise.noise,
        noise.correction,
    )
    found = {f.__name__: f(facts) for f in functions}
    found["block_operator"] = attribution.block_operator(found["layers"], facts)
    found["layer_graph"] = layer_graph.layer_graph(facts, found["layers"])
    return found


def _flat(width: float, height: float) -> Size:
    return lambda table: (width, height)


def _rows(width: float, row: float, most: int, column: str, extra: float = 0.75) -> Size:
    return lambda table: (width, extra + row * max(2, min(table[column].nunique(), most)))


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    """Every figure of a study, in the order of the page."""
    yield from _where(facts, found)
    yield from _trust(facts)
    yield from _choose(facts)
    yield from _why(facts)


def _where(facts: Facts, found: Tables) -> Iterator[Plan]:
    metric, swap, effects = facts.metric, facts.swap, facts.effects
    big, wide, layers = effects.capitalize(), style.SINGLE * 1.3, found["layers"]
    between = f"{facts.effect_level} interval"
    yield Plan(
        "layer_ranking",
        "where",
        "layers",
        "layers",
        _rows(style.DOUBLE, 0.2, 20, "layer"),
        lambda t, a: figures.layer_ranking(t, a, metric, swap, effects=effects),
        f"The most harmful layers: {effects} effects with their {between}s, and the mean of measured swaps of"
        f" the same layer with its 90 % interval, both in {facts.contexts}.",
    )
    yield Plan(
        "operators",
        "where",
        "operators",
        "operators",
        _rows(wide, 0.21, 40, "name", 0.95),
        lambda t, a: figures.group_effects(t, a, layers, "operator", metric, swap, effects=effects),
        f"{big} effects by operator type (number of layers): boxes and ticks are layers, points the mean with"
        f" its {between}.",
    )
    yield Plan(
        "blocks",
        "where",
        "blocks",
        "blocks",
        _rows(wide, 0.21, 40, "name", 0.95),
        lambda t, a: figures.group_effects(t, a, layers, "block", metric, swap, effects=effects),
        f"{big} effects by block in execution order (number of layers), with {between}s; of more than 40"
        " blocks the most harmful.",
    )
    yield Plan(
        "block_operator",
        "where",
        "layers",
        "block_operator",
        _rows(style.DOUBLE, 0.17, attribution.BLOCKS_MOST, "block", 1.3),
        lambda t, a: attribution.draw_block_operator(t, a, metric, swap),
        f"{big} effects, mean of the layers of an operator type in a block; blocks in execution order, of"
        f" more than {attribution.BLOCKS_MOST} the most harmful.",
    )
    yield Plan(
        "layer_graph",
        "where",
        "graph",
        "layer_graph",
        lambda table: (style.DOUBLE, layer_graph.height(table)),
        lambda t, a: layer_graph.draw_layer_graph(t, a, metric),
        "The layers as data flows, from left to right; colour is the effect, size the number of weights,"
        f" small dots are merges, arcs are edges that pass over others. Above {layer_graph.MOST} layers a"
        " node is a block.",
    )
    for panel in noise.PANELS:
        yield Plan(
            panel.name,
            "steps",
            "noise",
            "noise",
            _flat(style.SINGLE, 1.9),
            lambda t, a, p=panel: noise.over_steps(t, a, p),  # type: ignore[misc]
            f"{panel.caption} Bands are 95 % intervals over images.",
            optional=not facts.noise,
        )
    yield Plan(
        "step_bits",
        "steps",
        "winner",
        "step_bits",
        _flat(style.SINGLE, 1.9),
        costs.draw_step_bits,
        "Activation bits of the winner over the denoising steps.",
        optional=True,
    )


def _trust(facts: Facts) -> Iterator[Plan]:
    metric, checked = facts.metric, facts.validation
    scores = facts.sensitivity.get("surrogate") or {}
    ceiling = number(scores.get("noise_ceiling"))
    baselines = {
        str(k): number(v.get("within_budget_srcc")) for k, v in (scores.get("baselines") or {}).items()
    }
    yield Plan(
        "surrogate_scatter",
        "trust",
        "scatter",
        "surrogate_scatter",
        _flat(style.SINGLE, 2.7),
        lambda t, a: figures.surrogate_scatter(t, a, metric, number(scores.get("within_budget_srcc"))),
        f"{metric} predicted for configurations that the surrogate was not trained on, beside its measured"
        " value. Size alone spreads the points along the diagonal: the within-budget SRCC is what counts.",
    )
    yield Plan(
        "swaps",
        "trust",
        "swaps",
        "swaps",
        _flat(style.SINGLE, 2.7),
        lambda t, a: figures.swaps_scatter(
            t,
            a,
            metric,
            number(checked.get("srcc")),
            number(checked.get("sign_agreement")),
            int(checked.get("flips") or 0),
        ),
        "Effects of layers as predicted, beside the mean of real swaps with its 90 % interval.",
    )
    yield Plan(
        "learning_curve",
        "trust",
        "curve",
        "learning_curve",
        _flat(style.SINGLE, 2.3),
        lambda t, a: attribution.draw_curve(t, a, ceiling, {k: v for k, v in baselines.items() if v == v}),
        "What the surrogate scores after a part of the measurements, out of fold, with its 90 % interval:"
        " whether more would help.",
    )


def _choose(facts: Facts) -> Iterator[Plan]:
    metric, direction = facts.metric, facts.direction
    fresh = "95 % intervals" if facts.front_level == "95 %" else "95 % intervals (found: 90 %)"
    yield Plan(
        "quality_vs_bits",
        "choose",
        "points",
        "quality_vs_bits",
        _flat(style.DOUBLE, 3.3),
        lambda t, a: figures.quality_vs_bits(t, a, metric, direction),
        f"Measured {metric} against bits per weight. Found configurations, and whatever else was measured on"
        f" fresh seeds, are means over blocks of seeds that the search never saw, with {fresh}; those of the"
        " design were measured on the study's own seeds.",
    )
    if facts.objective != "psnr":
        yield Plan(
            "psnr_vs_bits",
            "choose",
            "front",
            "psnr_vs_bits",
            _flat(style.DOUBLE, 3.3),
            lambda t, a: figures.quality_vs_bits(t, a, "PSNR", "max"),
            "Measured PSNR to the images of full precision of the same seeds, against bits per weight: the"
            " found front, the uniform families, and what the search tried on its way. Fresh seeds with"
            f" {fresh}, the rest on the study's own seeds. Full precision has no place here: it is what PSNR"
            " is measured against.",
            optional=True,
        )
    called = "the measured time of a packed denoiser call"
    for cost, needs, what in (
        ("bytes", "front", "their stored size"),
        ("latency_ms", "latency", called),
        ("operations", "operations", "the kernel's operations"),
    ):
        yield Plan(
            f"frontier_{cost.removesuffix('_ms')}",
            "choose",
            needs,
            "frontiers",
            _flat(style.SINGLE, 2.3),
            lambda t, a, c=cost: costs.draw_frontier(t, a, c, metric, direction),  # type: ignore[misc]
            f"{metric} of the found configurations on fresh seeds, with {facts.front_level} intervals,"
            f" against {what}.",
        )
    yield Plan(
        "progress",
        "choose",
        "samples",
        "progress",
        _flat(style.SINGLE, 2.3),
        costs.draw_progress,
        f"The area in bits and {metric} that the measurements so far dominate (hypervolume), as a share of"
        " the final one.",
    )
    yield Plan(
        "chosen_schemes",
        "choose",
        "winner",
        "chosen_schemes",
        _rows(style.DOUBLE, 0.22, 60, "operator"),
        figures.chosen_schemes,
        "Weight schemes that the winner gives to the layers of each operator type (number of layers).",
    )
    yield Plan(
        "chosen_bits",
        "choose",
        "winner",
        "chosen_bits",
        _flat(style.DOUBLE, 2.3),
        costs.draw_chosen_bits,
        "Code bits of every layer in the winner and in the uniform configuration that it was compared with;"
        " blocks are shaded in turn.",
    )


def _why(facts: Facts) -> Iterator[Plan]:
    metric = facts.metric
    yield Plan(
        "shap_swarm",
        "why",
        "swarm",
        "shap_swarm",
        _rows(style.DOUBLE, 0.27, attribution.OPERATORS_MOST, "operator"),
        lambda t, a: attribution.draw_swarm(t, a, metric),
        "SHAP values of single configurations, summed over the layers of an operator type, in the objective's"
        " units; colour is the mean bits that a configuration gives to these layers.",
    )
    yield Plan(
        "pairs",
        "why",
        "pairs",
        "pairs",
        _flat(style.DOUBLE, 3.6),
        lambda t, a: attribution.draw_pairs(t, a, metric),
        f"What swapping both layers worsens {metric} beyond the sum of each alone, predicted, for the layers"
        f" in the {attribution.LAYERS_MOST} strongest pairs.",
    )
    high = _rows(style.SINGLE * 1.3, 0.2, 40, "name")
    for level, text in (("operator", "operator type"), ("block", "block")):
        yield Plan(
            f"scores_{level}",
            "why",
            "scores",
            "scheme_scores",
            lambda t, k=level: high(t[t.level == k]),  # type: ignore[misc]
            lambda t, a, k=level: attribution.draw_scores(t, a, k),  # type: ignore[misc]
            f"Predicted scores of weight schemes by {text}: boxes span the schemes; a group far to the left"
            " is sensitive whatever it gets.",
        )
