"""Effects in context: the denoiser runs with every layer's swap in a few good configurations; a screen turns
its output errors to effects.

The surrogate predicts swaps from what each layer does alone; how layers amplify or cancel each other in a
context is seen here, on a few stored inputs instead of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.measuring.output_errors import stored
from aquabit.measuring.session import Session
from aquabit.scheme import Progress, QuantConfig, no_progress, parse_swap
from aquabit.sensitivity.damages import damages_of
from aquabit.sensitivity.effects.predicted import (
    Effects,
    Player,
    draw_contexts,
    find_players,
    named_swap,
    refits,
)
from aquabit.sensitivity.shared_contexts import group_numbers
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, training_table
from aquabit.sensitivity.surrogate.output_error_surrogate import (
    OutputErrorSurrogate,
    fit_output_error_surrogate,
)
from aquabit.sensitivity.surrogate.regressor import Estimator
from aquabit.study import Study

DRAWN = 64  # contexts that effects are predicted in; the first few of them are run
IN_CONTEXT = 4  # contexts in which output errors of every layer's swap are seen by default
MIN_CONTEXTS = 2  # contexts below which nothing is averaged


def swapped(contexts: Choices, players: Sequence[Player]) -> Choices:
    """2 x players x contexts rows: each player's first scheme in every context, then its second, then the
    next."""
    column = contexts.space.columns
    return contexts.under([p.at(column[s]) for p in players for s in (p.before, p.after)])


def measure_in_context(
    session: Session,
    contexts: int,
    bits: float = 3.0,
    swap: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Output errors of all training configurations, and of both ends of every layer's ``swap`` in the first
    ``contexts`` contexts that ``explain`` draws for the same ``bits`` and ``seed``; each costs about a
    fifteenth of a measurement. ``swap``: default, the space's own.

    Raises AquabitError, before anything runs, for a swap that no layer has and ``bits`` out of reach.
    """
    space, known = session.space, session.study.configs()
    players = find_players(space, parse_swap(named_swap(space, swap)))
    rng, damages = np.random.default_rng([seed, 0]), damages_of(session)
    drawn = draw_contexts(space, session.costs, bits, DRAWN, rng, damages)
    ends = swapped(drawn[:contexts], players).configs()
    table = training_table(session.study, session.protocol.objective)
    session.outputs([*(known[c] for c in table.config), *ends], progress)


def refine(
    study: Study,
    fitted: FittedSurrogate,
    effects: Effects,
    contexts: Choices,
    replicates: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[Effects, OutputErrorSurrogate, int] | None:
    """``effects`` with those of the named swap as a screen sees them in the first of ``contexts``, the
    screen, and how many contexts that are; None where output errors of the training configurations, or of the
    swaps in MIN_CONTEXTS contexts, are not known.
    """
    outputs = study.outputs(stored(study.protocol)[0].digest)
    if any(c not in outputs for c in fitted.configs):
        return None
    count, players = 0, effects.players
    values: list[list[Mapping[str, Any]]] = []
    for context in contexts:
        ends = [c.digest for c in swapped(context, players).configs()]
        if any(key not in outputs for key in ends):
            break
        values.append([outputs[key] for key in ends])
        count += 1
    if count < MIN_CONTEXTS:
        return None
    screen = fit_output_error_surrogate(fitted, outputs, seed=seed, blend=True)
    ends_of = swapped(contexts[:count], players)
    features = screen.features(ends_of, [values[k][i] for i in range(2 * len(players)) for k in range(count)])
    trained = screen.features(fitted.choices, [outputs[c] for c in fitted.configs])
    groups = group_numbers(fitted.choices)
    models = refits(screen.estimator, trained, fitted.y, groups, replicates, seed, progress)
    estimators = (screen.estimator, *models)
    change = np.array([_changes(m, features, len(players), count) for m in estimators]) * fitted.sign
    drawn = [np.random.default_rng([seed, 2, r]).integers(count, size=count) for r in range(replicates)]
    effect = change[0].mean(1)
    again = np.array([change[r + 1][:, rows].mean(1) for r, rows in enumerate(drawn)])
    column = fitted.space.columns
    rows, value = np.arange(len(players)), effects.value.copy()
    before, after = [column[p.before] for p in players], [column[p.after] for p in players]
    value[rows, after] = value[rows, before] + effect
    return replace(effects, value=value, replicates=again.reshape(replicates, len(players))), screen, count


def _changes(model: Estimator, features: np.ndarray, players: int, contexts: int) -> np.ndarray:
    """Change of the objective in its units, [players, contexts]."""
    units = model.to_units(model.predict(features)).reshape(players, 2, contexts)
    return np.asarray(units[:, 1] - units[:, 0])


def rank_by_output_errors(
    session: Session,
    fitted: FittedSurrogate,
    configs: Sequence[QuantConfig],
    progress: Progress = no_progress,
) -> np.ndarray:
    """Oriented predictions [n], larger = worse, of configurations by their output errors, which are
    measured where they are not known."""
    known = session.study.configs()
    outputs = session.outputs([*(known[c] for c in fitted.configs), *configs], progress)
    return fit_output_error_surrogate(fitted, outputs)(configs, outputs)
