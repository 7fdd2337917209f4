"""One family of schemes, a format per layer, within a budget: what LAQ chooses, and a fair comparison of
families at equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import networkx as nx
import numpy as np

from aquabit.cost import CostModel
from aquabit.layer_formats import expected_loss
from aquabit.scheme import FP, AquabitError, Budget, QuantConfig, Scheme
from aquabit.search.integer_program import solve
from aquabit.search.options import activation_choices, fixed_act
from aquabit.space import SearchSpace


def assign(
    graph: nx.DiGraph,
    space: SearchSpace,
    budget: Budget,
    errors: Mapping[tuple[str, str], float] | None = None,
    keep: Callable[[str, Scheme], bool] = lambda layer, scheme: scheme.additive,
) -> QuantConfig:
    """The configuration of least summed ``errors`` within ``budget``, of the schemes that ``keep(layer,
    scheme)`` accepts: AQUATIC-Diff's LAQ (a format per layer by shape), as an exact integer program with
    shared codebooks.

    ``errors`` maps (layer, scheme) to what the scheme alone does (relative output error, or the damage of
    probes); by default it is what is expected of an additive format on Gaussian weights. A layer with no
    accepted scheme keeps its output-aware uniform ones, else all. A limit above what the schemes can cost is
    none. Raises AquabitError for a budget that they cannot meet, and for a scheme without an error.
    """
    choices = {}
    for layer, row in space.choices.items():
        accepted = tuple(s for s in row if keep(layer, s))
        aware = tuple(s for s in row if s.record.even and s.output_aware)
        choices[layer] = row if len(row) == 1 else accepted or aware or row
    restricted = replace(space, choices=choices)
    cost_model = CostModel(graph, restricted)
    activations = activation_choices(restricted, budget)
    scores = np.zeros((len(choices), len(restricted.schemes), len(activations)))
    for i, (layer, row) in enumerate(choices.items()):
        for scheme in row:
            scores[i, restricted.schemes.index(scheme)] = _error(space, errors, layer, scheme)
    limits = cost_model.limits(fixed_act(activations))
    # more than all can cost is no limit
    capped = {k: min(v, limits[k][1]) if k in limits else v for k, v in budget.limits().items()}
    found = solve(scores, cost_model, Budget(**capped))  # type: ignore[arg-type]
    config: QuantConfig = found.choices.config
    return config


def _error(
    space: SearchSpace, errors: Mapping[tuple[str, str], float] | None, layer: str, scheme: Scheme
) -> float:
    if scheme == FP:
        return 0.0
    if errors is None:
        return expected_loss(scheme) * 4.0 ** -space.code_bits(layer, scheme)
    if (layer, str(scheme)) not in errors:
        raise AquabitError(
            f"no error is known for layer {layer!r} at {scheme}; measure the space first, or give no errors"
        )
    return errors[layer, str(scheme)]
