"""The first answer: what gradients alone say, before anything is measured."""

from __future__ import annotations

import pandas as pd

from aquabit.reports import words
from aquabit.reports.facts import Facts


def first_ranking(facts: Facts) -> pd.DataFrame:
    """layer, operator, damage: the layers by what the swap is predicted to add to the mean squared change of
    images, worst first; empty once effects are known."""
    told = facts.first.ranking if facts.first and facts.sensitivity is None else ()
    rows = [(r.layer, str(facts.layers.get(r.layer, {}).get("operator", "")), r.damage) for r in told]
    return pd.DataFrame(rows, columns=["layer", "operator", "damage"])


def sentences(facts: Facts) -> list[words.Sentence]:
    """How far a run is, and its first answer while there is no better one."""
    found = []
    if facts.running:
        found.append(
            words.Sentence(
                f"This run goes on: {facts.running} comes next, and this page is written again after it."
                " A run that was interrupted continues with the same command."
            )
        )
    if facts.first and facts.sensitivity is None:
        text = facts.first.text
        found.append(words.Sentence(text[0].upper() + text[1:] + "."))
    return found
