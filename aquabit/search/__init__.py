"""Search under hard budgets: integer program on additive scores, local search on the surrogate, measurement, and again."""

from aquabit.search.assign import assign
from aquabit.search.front import (
    Front,
    FrontMember,
    Interval,
    choose,
    elect,
    hypervolume,
    interval,
    paired_difference,
    pareto,
    remeasure_plan,
    smallest_uniform,
    uniform_within,
)
from aquabit.search.integer_program import Solution, additive_scores, choice_effects, solve
from aquabit.search.local import Improved, improve
from aquabit.search.loop import Candidate, check_method, find_candidates, ladder
from aquabit.search.options import Columns, Options, activation_choices
from aquabit.search.proof import Bound, Bounded, Proof, branch_and_bound, columns_of
from aquabit.search.searchers import SEARCHERS, Problem, find_searcher

__all__ = [
    "SEARCHERS",
    "Bound",
    "Bounded",
    "Candidate",
    "Columns",
    "Front",
    "FrontMember",
    "Improved",
    "Interval",
    "Options",
    "Problem",
    "Proof",
    "Solution",
    "activation_choices",
    "additive_scores",
    "assign",
    "branch_and_bound",
    "check_method",
    "choice_effects",
    "choose",
    "columns_of",
    "elect",
    "find_candidates",
    "find_searcher",
    "hypervolume",
    "improve",
    "interval",
    "ladder",
    "paired_difference",
    "pareto",
    "remeasure_plan",
    "smallest_uniform",
    "solve",
    "uniform_within",
]
