"""What a search proposes: the integer program's answers for all budgets, refined in context, uniform
configurations, rivals, and what a surrogate proposes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.measuring.session import uniform_references
from aquabit.scheme import AquabitError, Budget, QuantConfig
from aquabit.search.bounds import EnsembleBound
from aquabit.search.context_model import ContextModel
from aquabit.search.expectations import config_name, expectation
from aquabit.search.integer_program import Solution, solve
from aquabit.search.options import activation_choices
from aquabit.search.proof import Proof
from aquabit.search.refine import refine
from aquabit.search.search import Search
from aquabit.search.surrogate_search import Experiment, find_candidates
from aquabit.sensitivity.effects.context_effects import rank_by_output_errors
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, fit_from_study, training_table

REFINED = 3  # targets that are refined in context: the budget and those nearest to it
GAP = 1e-4  # of the program, relative: far below what damages are known to


def propose(search: Search) -> None:
    """Put what may win among the candidates, and measure it: the program's answers, refined in context,
    uniform configurations, the rivals that were given, and what a surrogate proposes."""
    session, progress = search.session, search.progress
    starts = program_answers(search)
    search.told(expectation(search, starts[search.options.budget]))
    session.references(progress)
    _refine(search, starts)
    for config in uniform_references(session.space):
        search.add(config, f"uniform {config_name(config)}")
    for name, config in search.given:
        search.add(config, name)
    session.measure(
        [c.config for c in search.candidates.values()], "candidate", progress, what="measuring candidates"
    )
    if search.options.method != "program":
        _from_surrogate(search)


def program_answers(search: Search) -> dict[Budget, Solution]:
    """The program's answer for every target."""
    found = {}
    for done, target in enumerate(search.targets):
        search.progress("integer program over damages", done, len(search.targets))
        scores = search.damages.scores(activation_choices(search.session.space, target))
        try:
            solved = solve(
                scores, search.costs, target, relative_gap=0.0 if target is search.options.budget else GAP
            )
        except AquabitError:  # scaled limits may exclude each other where the budget's do not
            if target is search.options.budget:
                raise
            continue
        found[target] = solved
        search.add(solved.choices.config, "program", solved.score)
    search.progress("integer program over damages", len(search.targets), len(search.targets))
    search.targets = list(found)
    first = found[search.options.budget]
    search.proof = Proof(first.score, first.bound, first.gap, first.score)
    return found


def _refine(search: Search, starts: Mapping[Budget, Solution]) -> None:
    """The program again, in the context of its own answers."""
    seed = search.options.seed
    context = ContextModel(search.session, search.damages, search.activations, seed, search.progress)
    for number, target in enumerate(search.targets[:REFINED]):
        rounds = search.options.refinements if number == 0 else search.options.refinements // 2
        if rounds and context.ready:
            try:
                steps = refine(
                    starts[target].choices, context.look, context.judge, search.costs, target, rounds=rounds
                )
            except AquabitError as error:
                search.told(f"not refined in context: {error}")
                break
            for step in steps[1:]:
                search.add(step.choices.config, "refined", step.value)
    search.spent = context.spent / 15


def _from_surrogate(search: Search) -> None:
    """What a surrogate of the study's measurements proposes; it is measured as it is proposed."""
    session, study, options, progress = search.session, search.session.study, search.options, search.progress
    # too few measurements are said before anything is proposed
    training_table(study, session.protocol.objective)
    last: list[FittedSurrogate] = []

    def fit() -> Any:
        last[:] = [fit_from_study(study)]
        return lambda choices: last[0].badness(choices.moved(last[0].space))

    def bound(each: Choices, allowed: np.ndarray) -> Any:
        fitted, groups = last[0], each.space.groups
        return EnsembleBound(fitted.surrogate, fitted.encoder, each.moved(fitted.space), allowed, groups)

    def measure(configs: list[QuantConfig]) -> None:
        session.measure(configs, "candidate", progress, what="measuring candidates")

    def screen(configs: list[QuantConfig]) -> np.ndarray:
        return rank_by_output_errors(session, last[0], configs, progress)

    judge = screen if options.screened > 1 else None
    experiment = Experiment(fit, measure, search.measured, judge, bound)
    found = find_candidates(search.costs, options, experiment, progress=progress)
    for candidate in found:
        search.add(candidate.config, "surrogate")
    proofs = [c.proof for c in found if c.proof is not None]
    search.proof = proofs[-1] if proofs else search.proof
