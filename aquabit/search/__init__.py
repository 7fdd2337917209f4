"""Search under hard budgets: the integer program over damages, refined in context, judged in pairs,
measured on fresh seeds."""

from aquabit.search.fresh_front import FRESH_BLOCKS, measure_front
from aquabit.search.front import Front, FrontMember, hypervolume, pareto, smallest_uniform
from aquabit.search.integer_program import Solution, additive_scores, choice_effects, solve
from aquabit.search.judging import Judgement, judge
from aquabit.search.local_search import Improved, improve
from aquabit.search.options import Columns, Options, activation_choices
from aquabit.search.proof import Bound, Bounded, Proof, branch_and_bound
from aquabit.search.proposals import propose
from aquabit.search.refine import Seen, Step, refine
from aquabit.search.search import Search, SearchOptions
from aquabit.search.surrogate_search import Candidate, check_method, find_candidates, ladder
from aquabit.search.winner import choose_winner

__all__ = [
    "FRESH_BLOCKS",
    "Bound",
    "Bounded",
    "Candidate",
    "Columns",
    "Front",
    "FrontMember",
    "Improved",
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
    "choose_winner",
    "find_candidates",
    "hypervolume",
    "improve",
    "judge",
    "ladder",
    "measure_front",
    "pareto",
    "propose",
    "refine",
    "smallest_uniform",
    "solve",
]
