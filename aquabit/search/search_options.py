"""What a search is asked for: the budget, the method, and the other budgets of its front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aquabit.budget import OTHERS, SPREAD
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget, QuantConfig
from aquabit.search.evolution import check_installed
from aquabit.search.options import Options, fixed_act

METHODS = ("program", "surrogate", "evolve")  # see ``SearchOptions``
PER_ROUND, SCREEN = 8, 4


@dataclass(frozen=True)
class SearchOptions:
    """``method``: "program" (the program over damages, refined in context), or "surrogate" and "evolve",
    which also propose from a surrogate of the study's measurements. ``rounds`` of refinement for the
    budget (half as many for the front's other targets), or of fitting and proposing ``per_round``
    configurations (None: PER_ROUND); ``screen``: configurations proposed for each that is measured (None:
    SCREEN). ``against``: (name, configuration) that the winner must not lose to. ``front``: other budgets
    that are answered and measured beside this one, 0 to ``budget.OTHERS``. Raises AquabitError for values
    out of range, and for ``per_round`` and ``screen`` where no surrogate proposes."""

    budget: Budget
    method: str = "program"
    rounds: int | None = None
    per_round: int | None = None
    screen: int | None = None
    seed: int = 0
    against: Sequence[tuple[str, QuantConfig]] = ()
    front: int = OTHERS

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.screened < 1:
            raise AquabitError(
                f"screen is {self.screen}; it must be at least 1 (1: every proposed configuration is"
                " measured)"
            )
        if self.rounds is not None and self.rounds < 0:
            raise AquabitError(
                f"rounds is {self.rounds}; it must be at least 0 (0: the program's answer as it is)"
            )
        if not 0 <= self.front <= OTHERS:
            raise AquabitError(f"front is {self.front}; it must be 0 to {OTHERS} other budgets")
        idle = [name for name in ("per_round", "screen") if getattr(self, name) is not None]
        if idle and self.method == "program":
            raise AquabitError(
                f"{idle[0]} is {getattr(self, idle[0])}, but method program proposes nothing from a"
                " surrogate; leave it out, or use method surrogate or evolve"
            )

    @property
    def spread(self) -> Sequence[float]:
        """Limits of the other budgets relative to this one's."""
        return SPREAD[: self.front]

    @property
    def proposed(self) -> int:
        """Configurations a round that are measured, where a surrogate proposes."""
        return PER_ROUND if self.per_round is None else self.per_round

    @property
    def screened(self) -> int:
        """Configurations proposed for each of them."""
        return SCREEN if self.screen is None else self.screen

    @property
    def refinements(self) -> int:
        return 3 if self.rounds is None or self.method != "program" else self.rounds

    @property
    def proposals(self) -> int:
        return 2 if self.rounds is None else max(1, self.rounds)


def check_method(method: str) -> None:
    """Raise AquabitError for an unknown search method, and for one whose library is not installed."""
    if method not in METHODS:
        raise AquabitError(f"the search method {method!r} is unknown; known: {', '.join(METHODS)}")
    if method == "evolve":
        check_installed()


def ladder(cost_model: CostModel, budget: Budget, spread: Sequence[float] = SPREAD) -> list[Budget]:
    """The budget with all limits scaled by each factor of ``spread``, kept within what the space can
    reach; none twice."""
    limits = cost_model.limits(fixed_act(Options.of(cost_model, budget).columns.activations))
    found: list[Budget] = []
    for factor in spread:
        scaled: dict[str, float] = {}
        for name, value in budget.limits().items():
            rest = 0.0
            if name == "bytes":  # biases and norms are not quantized
                rest = float(cost_model.other_bytes)
            elif name == "bops":
                rest = cost_model.other_bops
            elif name == "latency_ms" and cost_model.latency is not None:
                rest = cost_model.latency.rest
            goal = min(rest + (value - rest) * factor, limits[name][1])
            scaled[name] = int(goal) if name == "bytes" else goal
        target = Budget(**scaled)  # type: ignore[arg-type]
        if all(scaled[k] > limits[k][0] for k in scaled) and target not in (budget, *found):
            found.append(target)
    return found
