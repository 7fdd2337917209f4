"""One search: its options, the budgets it answers, what was proposed for each, and what is measured of
that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from aquabit.cost import CostModel
from aquabit.graph import layers
from aquabit.measuring.latency import latency_table
from aquabit.measuring.session import Session
from aquabit.scheme import (
    FP,
    Calibration,
    LayerChoice,
    Progress,
    Protocol,
    QuantConfig,
    act_parts,
    no_progress,
)
from aquabit.search.options import activation_choices, fixed_act
from aquabit.search.proof import Proof
from aquabit.search.search_options import SearchOptions, ladder
from aquabit.sensitivity.damages import Damages
from aquabit.study import comparable
from aquabit.targets import target_named


@dataclass(frozen=True)
class Candidate:
    """A configuration, where it comes from ("program", "refined", "uniform usq3h", ...), and the damage
    that is expected of it (NaN where it is not known)."""

    config: QuantConfig
    source: str
    expected: float = float("nan")


@dataclass
class Search:
    """One search in a session: its targets and what is proposed for each."""

    session: Session
    options: SearchOptions
    progress: Progress = no_progress
    told: Callable[[str], object] = lambda _: None  # what is to be said before anything is measured
    candidates: dict[str, Candidate] = field(default_factory=dict)  # by digest
    proof: Proof | None = None
    spent: float = 0.0  # measurements' worth of output errors
    costs: CostModel = field(init=False)

    def __post_init__(self) -> None:
        session, budget = self.session, self.options.budget
        self.costs = session.costs
        if budget.latency_ms is not None:
            self.costs = self.costs.timed(
                latency_table(session.here, session.space, self.progress, session.protocol)
            )
        self.activations = activation_choices(session.space, budget)
        self.costs.check(budget, fixed_act(self.activations))
        self.damages = Damages.of(session.space, session.study.features())
        self.targets = [budget, *ladder(self.costs, budget, self.options.spread)]
        self.given = [(name, self._at_budget(config)) for name, config in self.options.against]

    def _at_budget(self, config: QuantConfig) -> QuantConfig:
        """A given configuration with its activations at the bits that the budget fixes, where it fixes
        them: rivals are compared alike."""
        space, act = self.session.space, self.activations[0]
        if len(self.activations) > 1:
            return replace(config, correction=space.correction)
        rows = space.choices.items()
        changed = {k: replace(config[k], act=16 if row == (FP,) else act) for k, row in rows}
        calibration = config.calibration or space.calibration
        return replace(config, layers=changed, correction=space.correction, calibration=calibration)

    def add(self, config: QuantConfig, source: str, expected: float = float("nan")) -> None:
        """Make it a candidate; one that is there already keeps its source."""
        self.candidates.setdefault(config.digest, Candidate(config, source, expected))

    def measured(self) -> list[tuple[QuantConfig, float]]:
        """Every configuration that was measured under the study's protocol and may win, with its objective
        (larger = worse)."""
        values = self.values(self.session.protocol.objective)
        return [(config, values[key]) for key, config in self.usable().items() if key in values]

    def usable(self) -> dict[str, QuantConfig]:
        """Measured configurations by digest: corrected as the study corrects, not tuned, and either
        proposed here or with schemes that the space leaves open."""
        session = self.session
        table, configs = session.study.measurements(session.protocol, failed=True), session.study.configs()
        own = table[(table.kind != "reference") & comparable(table, session.space.correction)]

        def offered(config: QuantConfig) -> bool:
            return all(config[layer].weight in row for layer, row in session.space.choices.items())

        sampled = Calibration.of(session.protocol)  # earlier versions said it of calibrated ones only
        usable = (k for k in own.config if k in self.candidates or offered(configs[k]))
        return {k: configs[k].sampled_as(sampled) for k in usable if self.deployable(configs[k])}

    def deployable(self, config: QuantConfig) -> bool:
        """Whether it keeps the space's ties, and the space's target can hold it: rivals that it cannot are
        compared, and never the answer."""
        space, graph = self.session.space, self.session.model.graph
        goal = target_named(space.target)
        if space.broken_tie(config) is not None:
            return False
        nodes, model = layers(graph), str(graph.graph.get("model_class"))

        def goes_with(layer: str, choice: LayerChoice) -> bool:
            """Its scheme with its activations: what the space offers does, as its study was begun with it."""
            if choice.weight in space.choices[layer] and choice.act in space.activations:
                return True
            return goal is None or all(
                goal.beside(choice.weight, act) is None for act in act_parts(choice.act)
            )

        return goal is None or all(
            goal.refusal(c.weight, k, nodes[k], model) is None and goes_with(k, c)
            for k, c in config.layers.items()
        )

    def values(self, metric: str, protocol: Protocol | None = None) -> dict[str, float]:
        """digest -> a metric under a protocol, larger = worse; NaN where the measurement failed."""
        session, given = self.session, protocol or self.session.protocol
        table = session.study.measurements(given, failed=True)
        if metric not in table:
            return {}
        sign = given.sign(metric)
        return {key: sign * float(v) for key, v in zip(table.config, table[metric], strict=True)}

    def within(self, configs: Sequence[QuantConfig]) -> np.ndarray:
        """Boolean [n]: keeps every limit, at the activation bits that the budget leaves open."""
        kept = []
        for config in configs:
            cost, budget = self.costs(config), self.options.budget
            acts = {config[k].act for k in self.session.space.free_layers()}
            fits = (
                acts <= set(self.activations)
                and (budget.bits is None or cost.bits_per_weight <= budget.bits * (1 + 1e-12))
                and (budget.bytes is None or cost.bytes <= budget.bytes)
                and (budget.bops is None or cost.bops <= budget.bops * (1 + 1e-12))
            )
            kept.append(fits)
        return np.array(kept, bool)

    def inside(self, config: QuantConfig) -> bool:
        """Whether damages, costs of choices and surrogates of the space know all that it gives layers."""
        schemes, acts = set(self.session.space.schemes), {*self.session.space.act_choices, 16}
        return all(config[k].weight in schemes and config[k].act in acts for k in self.session.space.choices)
