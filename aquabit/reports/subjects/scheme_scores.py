"""Scores of schemes by operator type and by block."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from aquabit.reports import drawing, style
from aquabit.reports.facts import Facts
from aquabit.reports.plan import Plan, Tables, rows_high

GROUPS_MOST = 40  # rows that can be read in print


def scheme_scores(facts: Facts) -> pd.DataFrame:
    """level, name, scheme, layers, change, score, low, high, interval: predicted scores of schemes by
    operator type and by block (``level``), larger = better; ``interval`` is the level of low and high."""
    columns = ["level", "name", "scheme", "layers", "change", "score", "low", "high", "interval"]
    if facts.sensitivity is None:
        return pd.DataFrame([], columns=columns)
    return facts.sensitivity.scores.assign(interval=facts.effect_level).reindex(columns=columns)


def draw_scores(table: pd.DataFrame, axes: Axes, level: str = "operator", top: int = GROUPS_MOST) -> None:
    """Scores of schemes by operator type or block (``level``), as Qua²SeDiMo's box plots: a box over the
    schemes, a mark a scheme."""
    table = table[(table.level == level) & table.score.notna()]
    order = table.groupby("name", sort=False).score.median().sort_values()
    names = list(order.index[:top])
    at = {n: i for i, n in enumerate(names)}
    table = table[table.name.isin(names)]
    boxed = [n for n in names if (table.name == n).sum() >= 4]
    scores = [table.score[table.name == n].to_numpy(float) for n in boxed]
    drawing.boxes(axes, [at[n] for n in boxed], scores)
    handles, groups = [], table.scheme.map(style.scheme_group)
    for group in sorted(set(groups), key=style.group_order):
        part = table[groups == group]
        look = style.scheme_mark(part.scheme.iloc[0])
        dots = axes.plot(
            part.score, [at[n] for n in part.name], ls="", ms=4, mec=style.BLACK, mew=0.4, zorder=3, **look
        )[0]
        style.name_points(
            axes,
            dots,
            [f"{n}, {s}: {v:+.2f}" for n, s, v in zip(part.name, part.scheme, part.score, strict=True)],
            "tip",
        )
        handles.append(Line2D([], [], ls="", ms=4.5, mec=style.BLACK, mew=0.4, label=f"{group} bits", **look))
    axes.set_yticks(range(len(names)), [style.label(n, 30) for n in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("score of a scheme for the group (larger = better), predicted")
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), handletextpad=0.2, borderaxespad=0.0
    )


def plans(facts: Facts, found: Tables) -> Iterator[Plan]:
    high = rows_high(style.SINGLE * 1.3, 0.2, GROUPS_MOST, "name")
    for level, text in (("operator", "operator type"), ("block", "block")):
        yield Plan(
            f"scores_{level}",
            "why",
            "scores",
            "scheme_scores",
            lambda t, k=level: high(t[t.level == k]),  # type: ignore[misc]
            lambda t, a, k=level: draw_scores(t, a, k),  # type: ignore[misc]
            f"Predicted scores of weight schemes by {text}: boxes span the schemes; a group far to the left"
            " is sensitive whatever it gets.",
        )
