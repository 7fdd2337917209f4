"""What pairs of layers, and whole operator types and blocks, do together: second differences and scores of
schemes, by the surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from aquabit.choices import Choices, Variant
from aquabit.graph import layers as graph_layers
from aquabit.scheme import Progress, no_progress
from aquabit.sensitivity.effects.predicted import Effects, mean_predictions
from aquabit.sensitivity.result import INTERACTIONS, SCORES
from aquabit.sensitivity.surrogate.fit import FittedSurrogate
from aquabit.sensitivity.surrogate.regressor import Estimator
from aquabit.stats import around_replicates

STRONGEST = 20  # layers whose pairs are looked at


def interactions(
    fitted: FittedSurrogate,
    effects: Effects,
    order: Sequence[int],
    models: Sequence[Estimator],
    contexts: Choices,
    seed: int = 0,
    progress: Progress = no_progress,
    ratio: float = 1.0,
) -> pd.DataFrame:
    """INTERACTIONS of every pair of the STRONGEST players, ``order`` naming the strongest first; rows with
    the largest first.

    The interaction of a and b is f(ab) - f(a) - f(b) + f(): what swapping both worsens the objective beyond
    the sum of each swap alone, in its units, as the mean over contexts near the budget; a 95 % interval from
    the refitted ``models``, ``ratio`` times as wide (``combine_effects.Combined.ratio``).
    """
    column = fitted.space.columns
    players = [effects.players[i] for i in order[:STRONGEST]]
    pairs = list(combinations(players, 2))
    variants = [
        (*a.at(column[i]), *b.at(column[j]))
        for a, b in pairs
        for i in (a.before, a.after)
        for j in (b.before, b.after)
    ]
    if not pairs:
        return pd.DataFrame(columns=INTERACTIONS)
    found = mean_predictions(
        fitted, models, contexts, variants, seed, progress=progress, what="predict pairs of swaps"
    )
    neither, second, first, both = np.moveaxis(found.reshape(len(found), len(pairs), 4), 2, 0)
    change = both - first - second + neither
    low, high = around_replicates(change[0], change[1:], ratio)
    values = zip(pairs, change[0], low, high, strict=True)
    rows = [(a.layer, b.layer, *map(float, ends)) for (a, b), *ends in values]
    table = pd.DataFrame(rows, columns=INTERACTIONS)
    return table.iloc[np.argsort(-table.interaction.abs(), kind="stable")].reset_index(drop=True)


def scheme_scores(
    fitted: FittedSurrogate,
    models: Sequence[Estimator],
    contexts: Choices,
    seed: int = 0,
    progress: Progress = no_progress,
    ratio: float = 1.0,
) -> pd.DataFrame:
    """SCORES of each scheme for each operator type and each block (``level``), comparable as Qua²SeDiMo's are
    (SCIENCE section 1).

    ``change`` is the mean over contexts near the budget of what happens to the prediction, on the fitted
    (mostly logarithmic) scale and positive = worse, when all ``layers`` of the group that have a choice take
    the scheme, which each of them must allow. ``score`` is minus that change, less the mean and over the
    standard deviation of all changes of the level: larger = better, 0 = like the average group and scheme,
    and a unit means the same for every group; ``low`` and ``high`` are its 95 % interval from the refitted
    models, ``ratio`` times as wide.
    """
    nodes, space = graph_layers(fitted.graph), fitted.space
    groups: dict[tuple[str, str], list[int]] = {}
    for i, layer in enumerate(space.choices):
        if len(space.choices[layer]) > 1:
            for level in ("operator", "block"):
                groups.setdefault((level, str(nodes[layer][level])), []).append(i)
    allowed, rows, variants = space.allowed(), list[tuple[str, str, str, int]](), list[Variant]([()])
    for (level, name), members in groups.items():
        for j in np.flatnonzero(allowed[members].all(0)):
            rows.append((level, name, str(space.schemes[j]), len(members)))
            variants.append(tuple((i, int(j)) for i in members))
    found = mean_predictions(
        fitted, models, contexts, variants, seed, False, progress, "predict whole groups"
    )
    table, change = pd.DataFrame(rows, columns=SCORES[:4]), found[:, 1:] - found[:, :1]
    table["change"] = change[0]
    for level in ("operator", "block"):
        own = (table.level == level).to_numpy()
        center, spread = change[0, own].mean(), change[0, own].std() or 1.0
        low, high = around_replicates(change[0, own], change[1:, own], ratio)
        scores = np.stack([center - change[0, own], center - high, center - low], 1) / spread
        table.loc[own, ["score", "low", "high"]] = scores
    order, rising = ["level", "name", "score"], [False, True, False]
    return table.sort_values(order, ascending=rising, kind="stable").reset_index(drop=True)
