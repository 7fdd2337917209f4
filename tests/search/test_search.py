"""The whole search on the smallest model there is: what it promises of its winner, and what it refuses
before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aquabit import workflows as flow
from aquabit.cost import CostModel
from aquabit.measuring.session import open_session, uniform_references
from aquabit.measuring.settings import MeasureOptions
from aquabit.measuring.where import Where
from aquabit.pipelines import Adapter, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Budget, Calibration, Protocol, QuantConfig, no_progress
from aquabit.search import fresh_front
from aquabit.search.fresh_front import FRESH_BLOCKS, images_to_tell
from aquabit.search.front import Front
from aquabit.search.integer_program import solve
from aquabit.search.judging import ROUNDS, pieces
from aquabit.search.options import activation_choices
from aquabit.search.proposals import program_answers
from aquabit.search.search import Search
from aquabit.search.search_options import SearchOptions, ladder
from aquabit.search.winner import FINALISTS
from aquabit.sensitivity.damages import Damages
from aquabit.space import SearchSpace, make_space
from aquabit.stats import Interval, paired_difference
from aquabit.study import Study
from benchmarks.research.searchers import random_within
from tests.conftest import tiny_pipeline
from tests.worlds import every, model

PROTOCOL = Protocol(images=8, steps=2, micro_batch=8, objective="psnr")
SPACE: dict[str, Any] = {"schemes": ["usq2h", "usq4h"], "activations": [8]}


@dataclass
class World:
    """A tiny model, its empty study, and a budget in the middle of what its space reaches."""

    pipe: Any
    study: Study
    bank: str
    space: SearchSpace
    costs: CostModel
    budget: Budget
    given: QuantConfig

    @staticmethod
    def at(folder: Path) -> World:
        pipe = tiny_pipeline("dit")
        graph = trace(pipe)
        space = make_space(
            graph,
            fingerprint(pipe.denoiser),
            type(pipe).__name__,
            calibration=Calibration.of(PROTOCOL),
            **SPACE,
        )
        costs = CostModel(graph, space)
        low, high = costs.limits(8)["bits"]
        budget = Budget(bits=low + 0.5 * (high - low))
        given = random_within(space, costs, budget, 1, 5).config.with_layer(
            space.layers[0], "usq3", 16
        )  # a scheme that the space does not offer
        return World(pipe, Study(folder / "s.db"), str(folder / "bank"), space, costs, budget, given)

    def find(self, bits: float | None = None, **options: Any) -> Front:
        given: dict[str, Any] = {"rounds": 1, "against": [self.given], **options}
        if "space" not in self.study:  # begun, and nothing measured
            begun, where = MeasureOptions(PROTOCOL, SPACE), Where(bank=self.bank)
            with open_session(self.pipe, self.study, begun, where):
                pass
        return flow.find(self.study, bits or self.budget.bits, pipe=self.pipe, bank=self.bank, **given)

    def classes(self) -> tuple[int, ...]:
        return tuple(Adapter(self.pipe).conditions(self.study.protocol))

    def rows(self) -> int:
        return len(self.study.measurements(failed=True))

    def psnr(self, config: str, protocols: list[Protocol]) -> list[float]:
        """PSNR of a configuration on those of the protocols that it was measured on, in order."""
        tables = [self.study.measurements(p) for p in protocols]
        return [
            float(t[t.config == config].psnr.iloc[0]) for t in tables if len(t) and (t.config == config).any()
        ]


@pytest.fixture(scope="module")
def cheap() -> Iterator[None]:
    """No timing of packed calls, which nothing here depends on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_front, "packed_latencies", lambda here, configs, *_: [1.0] * len(configs))
        yield


@pytest.fixture(scope="module")
def searched(
    cheap: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, Front, list[str], list[int]]:
    """A world that was searched before any sample was measured; what was said, and how many measurements
    there were then."""
    world = World.at(tmp_path_factory.mktemp("searching"))
    said, rows = list[str](), list[int]()
    with pytest.raises(AquabitError, match=r"budget bits = 0\.5 is out of range: this space can reach"):
        world.find(0.5)
    rows.append(world.rows())
    stranger = QuantConfig("another", world.given.layers)
    with pytest.raises(
        AquabitError, match="given 1 is a configuration of model another, the study is of model"
    ):
        world.find(against=[stranger])
    rows.append(world.rows())

    def told(text: str) -> None:
        said.append(text)
        rows.append(world.rows())

    front = flow.search(world.study, options(world), Where(bank=world.bank), pipe=world.pipe, told=told)
    return world, front, said, rows


def options(world: World) -> SearchOptions:
    return SearchOptions(world.budget, rounds=2, against=[("rival", world.given)], front=2)


def test_a_budget_out_of_reach_and_a_stranger_are_refused_before_anything_is_measured(searched: Any) -> None:
    _, _, said, rows = searched
    assert rows == [0, 0, 0] and len(said) == 1, (
        "refused twice, then the expectation, all before the first measurement"
    )
    assert "expected at" in said[0] and "predicted from damages" in said[0] and "dB" in said[0]


def test_the_winner_keeps_the_budget_and_is_the_front_s_best(searched: Any) -> None:
    world, front, _, _ = searched
    assert front.budget == world.budget and world.costs(front.best).bits_per_weight <= world.budget.bits * (
        1 + 1e-9
    )
    assert front.winner in {m.config.digest for m in front.members} and len(front.members) >= 2
    assert {c.act for c in front.best.layers.values()} == {8}
    for member in front.members:
        assert member.measured["psnr"].known and member.measured["psnr"].level == 0.95
        blocks = world.psnr(member.config.digest, [world.study.protocol.block(b) for b in FRESH_BLOCKS])
        assert len(blocks) == 5 and member.measured["psnr"].value == pytest.approx(np.mean(blocks))


def test_damages_predict_where_nothing_else_does(searched: Any) -> None:
    _, front, _, _ = searched
    assert all(np.isfinite(m.predicted.get("psnr", np.nan)) for m in front.members)


def test_the_winner_is_not_worse_than_any_known_rival(searched: Any) -> None:
    world, front, _, _ = searched
    protocol = world.study.protocol
    blocks = pieces(protocol, ROUNDS[-1], 0, world.classes())
    table = world.study.measurements(protocol)
    assert world.study.get("space") == world.space.to_dict()
    rival = front.comparison["against"][0]
    assert rival["name"] == "rival" and len(world.psnr(rival["config"], blocks)) >= ROUNDS[0], (
        "what the user gives is judged always"
    )
    first = dict(zip(table.config, table.psnr, strict=True))
    whole = {
        key: c
        for key, c in world.study.configs().items()
        if key in first and c.layers and c.correction is None
    }
    kept = [
        key for key, c in whole.items() if world.costs(c).bits_per_weight <= world.budget.bits * (1 + 1e-9)
    ]
    uniforms = {c.digest for c in uniform_references(world.space)}
    assert uniforms <= set(first) and len(uniforms & set(kept)) >= 1, (
        "uniform configurations are known, one of them within the budget"
    )
    damages = Damages.of(world.space, world.study.features())
    solved = solve(damages.scores((8,)), world.costs, world.budget)
    program = solved.choices.config.digest
    assert program in kept and rival["config"] in kept and program in first
    own = world.psnr(front.winner, blocks)
    assert len(own) >= ROUNDS[0]
    judged = {k: world.psnr(k, blocks) for k in kept if k != front.winner}
    for key, values in judged.items():
        if len(values) >= ROUNDS[0]:
            n = min(len(values), len(own))
            assert paired_difference(values[:n], own[:n]).low <= 0, (key, values, own)
        else:
            better = sum(first[k] > first[key] for k in kept if k in first)
            assert better >= FINALISTS, "who is not judged was seen to be worse than all finalists"


def test_run_twice_nothing_is_measured_and_the_front_is_the_same(searched: Any) -> None:
    world, front, _, _ = searched
    rows = world.rows()
    again = flow.search(world.study, options(world), Where(bank=world.bank), pipe=world.pipe)
    assert (
        world.rows() == rows
        and again.to_dict() == front.to_dict() == Front.from_dict(world.study.get("front")).to_dict()
    )


# ---- parts


def test_options_that_make_no_sense_are_refused() -> None:
    budget = Budget(bits=3.0)
    for wrong, reason in (
        ({"method": "luck"}, "'luck' is unknown"),
        ({"screen": 0}, "screen is 0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"front": 9}, "front is 9; it must be 0 to 8"),
    ):
        with pytest.raises(AquabitError, match=reason):
            SearchOptions(budget, **wrong)  # type: ignore[arg-type]
    assert SearchOptions(budget).refinements > 0 and SearchOptions(budget, rounds=0).refinements == 0


def test_a_front_may_answer_fewer_budgets() -> None:
    budget = Budget(bits=3.0)
    assert SearchOptions(budget, front=0).spread == ()
    assert SearchOptions(budget, front=3).spread == SearchOptions(budget).spread[:3] == (0.9, 1.1, 0.8)


def test_a_surrogate_may_propose() -> None:
    assert SearchOptions(Budget(bits=3.0), method="surrogate").proposals == 2


def searches(space: SearchSpace, costs: CostModel, budget: Budget) -> Search:
    """A search of made-up damages whose targets are set, without a session."""
    rng, shape = np.random.default_rng(0), space.allowed().shape
    made: Any = object.__new__(Search)
    made.session, made.costs, made.options, made.progress = (
        SimpleNamespace(space=space),
        costs,
        SearchOptions(budget),
        no_progress,
    )
    made.damages = Damages(
        space,
        np.where(space.allowed(), rng.random(shape), np.inf),
        np.zeros((shape[0], len(space.act_choices))),
    )
    made.candidates, made.targets = {}, [budget, *ladder(costs, budget)]
    return made  # type: ignore[no-any-return]


def test_the_program_answers_every_target() -> None:
    space, costs = model(6, 1, schemes=["usq2", "usq3", "usq4", "usq8"])
    low, high = costs.limits(8)["bits"]
    search = searches(space, costs, Budget(bits=low + 0.4 * (high - low)))
    found = program_answers(search)
    assert list(found) == search.targets and len(search.targets) > 4
    for target, solved in found.items():
        assert costs.within(costs.totals(solved.choices), target)[0]
    assert (
        {c.source for c in search.candidates.values()} == {"program"}
        and search.proof is not None
        and search.proof.optimum_gap < 1e-6
    )


def test_a_target_of_the_front_whose_limits_exclude_each_other_is_left_out() -> None:
    space, costs = model(
        5, 1, schemes=["usq2g2", "usq3", "usq8"], activations=[8]
    )  # usq2g2: fewer BOPs than usq3, but more bytes
    rows = every(space, (8,))
    totals = costs.totals(rows)
    budgets = [Budget(bits=float(totals["bits"][i]), bops=float(totals["bops"][i])) for i in range(len(rows))]
    narrow = [
        b
        for b in budgets
        if any(not costs.within(totals, t).any() for t in ladder(costs, b)) and costs.within(totals, b).any()
    ]
    assert narrow and activation_choices(space, narrow[0]) == (8,)
    assert narrow[0] in program_answers(searches(space, costs, narrow[0]))


def test_how_many_images_would_tell() -> None:
    assert (
        images_to_tell(Interval(-0.25, -0.75, 0.25), 5, 128) == 2561
    )  # four times as many halve the interval: 640 x (0.5 / 0.25)^2
    assert images_to_tell(Interval(-0.2, -0.3, -0.1), 5, 128) is None, "it tells already"
    assert images_to_tell(Interval(0.0, -1.0, 1.0), 5, 128) is None
    assert images_to_tell(Interval(0.2, float("nan"), float("nan")), 1, 128) is None
