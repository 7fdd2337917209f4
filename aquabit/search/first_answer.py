"""A first answer, before anything is measured: a ranking and a configuration from gradients alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from aquabit.cost import CostModel
from aquabit.jsonio import record
from aquabit.measuring.evaluator import PROBE_IMAGES
from aquabit.measuring.fitting import GRADIENTS, source_of
from aquabit.measuring.gradient_damages import gradient_features
from aquabit.measuring.session import Session
from aquabit.scheme import FP, AquabitError, Budget, Progress, Scheme, no_progress, parse_swap
from aquabit.search.expectations import expected_psnr
from aquabit.search.integer_program import solve
from aquabit.search.options import activation_choices
from aquabit.sensitivity.damages import Damages
from aquabit.sensitivity.effects.predicted import find_players, named_swap
from aquabit.space import SearchSpace

PLAIN = ("usq2", "usq3", "usq4", "usq6", "usq8")  # formats that are fitted in seconds, without calibration
IMAGES, PASSES = 2 * PROBE_IMAGES, 1  # a quarter of what damages are taken from in the end


@dataclass(frozen=True)
class RankedLayer:
    """A layer, and what a swap of its scheme alone adds to the mean squared change of images."""

    layer: str
    damage: float


@dataclass(frozen=True)
class FirstAnswer:
    """Predicted from damages alone, which come from gradients or probes (``source``): ``ranking`` has the
    layers by what ``swap`` does there, worst first; ``config`` is the program's choice within ``budget`` bits
    per weight, of ``bits`` and ``psnr`` dB (predicted) to full precision; None where the formats that were
    looked at do not reach the budget. ``formats`` says which these are."""

    formats: str
    swap: str
    ranking: tuple[RankedLayer, ...]
    budget: float
    bits: float | None = None
    psnr: float | None = None
    config: dict[str, Any] | None = None
    source: str = GRADIENTS

    @property
    def text(self) -> str:
        """The answer as a sentence."""
        worst = ", ".join(row.layer for row in self.ranking[:3])
        text = f"first answer, predicted from {self.source} alone ({self.formats}): it hurts most in {worst}"
        if self.psnr is None or self.bits is None:
            return f"{text}; {self.budget:g} bits a weight are out of reach of these formats"
        return f"{text}; {self.psnr:.1f} dB to full precision at {self.bits:.2f} bits a weight"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: Any, source: str = "the first answer") -> FirstAnswer:
        """The inverse of ``to_dict``; raises AquabitError where it is none."""
        return record(FirstAnswer, value, source)


def quick_answer(session: Session, bits: float, progress: Progress = no_progress) -> FirstAnswer | None:
    """From plain uniform formats, which are fitted in seconds, and few backward passes; None where gradients
    do not tell of every layer, and in a study that takes its damages from probes."""
    if source_of(session.study, None) != GRADIENTS:
        return None
    space = plain_space(session.space)
    found, untold = gradient_features(
        session.pool, session.study, space, session.protocol, progress, IMAGES, PASSES, "a first look"
    )
    if untold:
        return None
    return _answer(space, CostModel(session.model.graph, space), found, bits, "plain uniform formats")


def damage_answer(session: Session, bits: float, swap: str | None = None) -> FirstAnswer:
    """From what the study knows of every scheme of its space."""
    features, source = session.study.features(), source_of(session.study, None)
    found = _answer(session.space, session.costs, features, bits, "all formats of the space", swap)
    return replace(found, source=source)


def plain_space(space: SearchSpace) -> SearchSpace:
    """The same layers with PLAIN formats, or those of its target without H: fewer where a layer is pinned or
    excluded."""
    if space.target is not None:
        rows = {k: tuple(replace(s, output_aware=False) for s in row) for k, row in space.choices.items()}
        return replace(space, choices={k: tuple(dict.fromkeys(row)) for k, row in rows.items()})
    plain, choices = [Scheme.parse(s) for s in PLAIN], dict[str, tuple[Scheme, ...]]()
    for layer, row in space.choices.items():
        if len(row) > 1:
            choices[layer] = (*([FP] if FP in row else []), *plain)
        elif row == (FP,):
            choices[layer] = row
        else:  # as good as its own, or as that of the layer that it is tied to
            first = space.tied_to(layer)[0]
            own = space.code_bits(first, row[0])
            choices[layer] = (min(plain, key=lambda s, first=first: abs(space.code_bits(first, s) - own)),)  # type: ignore[misc]
    about = space.operators, space.kernel_area, space.model
    return SearchSpace(space.fingerprint, choices, (space.closest_act,), *about, tied=space.tied)


def _answer(
    space: SearchSpace,
    costs: CostModel,
    features: Mapping[tuple[str, str], Mapping[str, Any]],
    bits: float,
    formats: str,
    swap: str | None = None,
) -> FirstAnswer:
    damages, budget = Damages.of(space, features), Budget(bits)
    named = named_swap(space, swap)
    players = find_players(space, parse_swap(named))
    added = {p.layer: damages.swap(p.columns, p.before, p.after) for p in players}
    worst = sorted(added, key=lambda layer: -added[layer])
    ranking = tuple(RankedLayer(layer, float(added[layer])) for layer in worst)
    try:
        found = solve(damages.scores(activation_choices(space, budget)), costs, budget).choices
    except AquabitError:  # out of reach of these formats
        return FirstAnswer(formats, named, ranking, bits)
    size, psnr = float(costs.totals(found)["bits"][0]), expected_psnr(damages, found)
    return FirstAnswer(formats, named, ranking, bits, size, psnr, found.config.to_dict())
