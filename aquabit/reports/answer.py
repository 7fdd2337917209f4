"""The answer at the head of the page: what speaks against it, then where it hurts, what to choose, and
whether to believe it."""

from __future__ import annotations

from aquabit.reports.facts import Facts
from aquabit.reports.lacks import Lacks
from aquabit.reports.plan import Tables
from aquabit.reports.subjects import comparison, first, ranking, trust
from aquabit.reports.words import Sentence


def answer(facts: Facts, found: Tables, lacks: Lacks) -> list[Sentence]:
    """The sentences of the answer; each that cannot be given names the command that makes it."""
    no_effects = lacks.get("layers", ("The effects of layers are unknown.", ""))
    no_front = lacks.get("front") or lacks.get("comparison") or ("There is no comparison.", "")
    return [
        *first.sentences(facts),
        *(Sentence(str(caution)) for caution in facts.scores.get("cautions") or []),
        ranking.sentence(facts, found) or Sentence(*no_effects),
        comparison.sentence(facts, found) or Sentence(*no_front),
        trust.sentence(facts, found, lacks),
    ]
