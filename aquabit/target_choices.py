"""What a target leaves of a space: the schemes that it can hold, the activations that it rounds, and the
layers that it fuses, tied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aquabit.scheme import FP, AquabitError, Rounding, Scheme, act_text
from aquabit.targets import WEIGHTS_ONLY, Target
from aquabit.ties import Tied, find_ties, in_order, joined


def held(
    goal: Target,
    nodes: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, tuple[Scheme, ...]],
    model: str,
    excluded: Collection[str],
    activations: Sequence[Rounding] = (16,),
) -> dict[str, tuple[Scheme, ...]]:
    """Choices without what a target refuses, and without what does not go with each of ``activations``, which
    are chosen apart from schemes; a layer that is left with nothing stays ``fp``. Raises AquabitError where
    that is all layers."""
    found = {}
    for name, row in choices.items():
        kept = tuple(s for s in row if goal.refusal(s, name, nodes[name], model) is None)
        kept = tuple(s for s in kept if all(goal.beside(s, a) is None for a in activations))
        found[name] = kept or (FP,)
    if all(set(row) == {FP} for name, row in found.items() if name not in excluded):
        schemes = dict.fromkeys(s for row in choices.values() for s in row if s != FP)
        why = goal.on(nodes, model, schemes).dense
        if any(name not in why and name not in excluded for name in choices):
            apart = (goal.beside(s, a) for a in activations for s in schemes)
            why = {"": next(reason for reason in apart if reason is not None)}
        raise AquabitError(
            f"no layer can hold for {goal.name} any of {', '.join(map(str, schemes))}"
            f" ({next(iter(why.values()), 'all are excluded')}); its own schemes are"
            f" {', '.join(goal.schemes)}: measure with --target {goal.name} and no schemes, levels or formats"
            " of other programs"
        )
    return found


def check_pins(
    goal: Target,
    nodes: Mapping[str, Mapping[str, Any]],
    pins: Mapping[str, str],
    pinned: Mapping[str, str],
    model: str,
    activations: Sequence[Rounding] = (16,),
) -> None:
    """Raise AquabitError where a layer is pinned to a scheme that a target refuses, by itself or with one of
    ``activations``."""
    for name, pattern in pins.items():
        scheme = Scheme.parse(pinned[pattern])
        reasons = [goal.beside(scheme, a) for a in activations]
        reasons.insert(0, goal.refusal(scheme, name, nodes[name], model))
        why = next((reason for reason in reasons if reason is not None), None)
        if why is not None:
            raise AquabitError(
                f"layer {name!r} is pinned to {pinned[pattern]}, which {goal.name} refuses: {why}"
            )


def fused(
    goal: Target, model: str, choices: dict[str, tuple[Scheme, ...]], tied: Tied
) -> tuple[dict[str, tuple[Scheme, ...]], Tied]:
    """Choices and ties with the layers tied that a target fuses; of those that it fuses all stay dense where
    one must."""
    together = find_ties(goal.tied(model), list(choices), strict=False)
    found = dict(choices)
    for group in together:
        if any(choices[name] == (FP,) for name in group):
            found |= dict.fromkeys(group, (FP,))
    return found, in_order(joined(tied, together), list(choices))


def rounded(
    goal: Target | None, activations: Sequence[Rounding] | None, default: tuple[Rounding, ...]
) -> tuple[Rounding, ...]:
    """Activations of a space; raises AquabitError for those that a target does not round."""
    if activations is None:
        return default if goal is None else WEIGHTS_ONLY
    wrong = [a for a in activations if goal is not None and a not in goal.activations]
    if goal is not None and wrong:
        raise AquabitError(
            f"{act_text(wrong[0])} is none of {goal.name}'s activations, which are"
            f" {', '.join(map(act_text, goal.activations))}; leave it out"
        )
    return tuple(activations)
