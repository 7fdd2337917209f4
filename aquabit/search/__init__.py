"""Search under hard budgets: the integer program over damages, refined in context, judged in pairs,
measured on fresh seeds."""

from aquabit.search.front import (
    Front,
    FrontMember,
    Interval,
    hypervolume,
    interval,
    paired_difference,
    pareto,
    smallest_uniform,
)
from aquabit.search.integer_program import Solution, additive_scores, choice_effects, solve
from aquabit.search.judging import Judgement, judge
from aquabit.search.local import Improved, improve
from aquabit.search.loop import Candidate, check_method, find_candidates, ladder
from aquabit.search.options import Columns, Options, activation_choices
from aquabit.search.proof import Bound, Bounded, Proof, branch_and_bound, columns_of
from aquabit.search.refine import Seen, Step, refine
from aquabit.search.searcher import FRESH_BLOCKS, Search, SearchOptions

__all__ = [
    "FRESH_BLOCKS",
    "Bound",
    "Bounded",
    "Candidate",
    "Columns",
    "Front",
    "FrontMember",
    "Improved",
    "Interval",
    "Judgement",
    "Options",
    "Proof",
    "Search",
    "SearchOptions",
    "Seen",
    "Solution",
    "Step",
    "activation_choices",
    "additive_scores",
    "branch_and_bound",
    "check_method",
    "choice_effects",
    "columns_of",
    "find_candidates",
    "hypervolume",
    "improve",
    "interval",
    "judge",
    "ladder",
    "paired_difference",
    "pareto",
    "refine",
    "smallest_uniform",
    "solve",
]
