"""The search: the program over damages for all budgets, refined in context, judged in pairs, and a front
measured on fresh seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, log10
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.measuring.latency import latency_table, packed_latencies
from aquabit.measuring.session import Session, uniform_references
from aquabit.scheme import (
    FP,
    LOWER_IS_BETTER,
    AquabitError,
    Budget,
    Progress,
    Protocol,
    QuantConfig,
    no_progress,
)
from aquabit.search.bounds import EnsembleBound
from aquabit.search.context_model import InContext
from aquabit.search.front import Front, FrontMember, Interval, interval, paired_difference, smallest_uniform
from aquabit.search.integer_program import Solution, solve
from aquabit.search.judging import PAIRED, Judgement, fidelity_of, judge, pieces
from aquabit.search.loop import check_method, find_candidates, ladder
from aquabit.search.options import activation_choices, fixed_act
from aquabit.search.proof import Proof
from aquabit.search.refine import refine
from aquabit.sensitivity.correction_gain import correction_shift
from aquabit.sensitivity.damages import Damages
from aquabit.sensitivity.effects.context_effects import screened
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, fit_from_study, training_table

SPREAD = (
    0.9,
    1.1,
    0.8,
    1.25,
    0.6,
    1.5,
    0.5,
    2.0,
)  # limits of the front's other targets relative to the budget's
REFINED = 3  # targets that are refined in context: the budget and those nearest to it
FINALISTS = 8  # candidates under the budget that are judged on common seeds
FRESH_BLOCKS = (11, 12, 13, 14, 15)  # what is reported; block 1 belongs to validation, 2 to judging
OBJECTIVE_BLOCKS = (3, 4)  # where the objective is no paired distance, finalists have it on these too
GAP = 1e-4  # of the program, relative: far below what damages are known to


@dataclass(frozen=True)
class SearchOptions:
    """``method``: "program" (the program over damages, refined in context), or "surrogate" and "evolve",
    which also propose from a surrogate of the study's measurements. ``rounds`` of refinement for the
    budget (half as many for the front's other targets), or of fitting and proposing ``per_round``
    configurations; ``screen``: configurations proposed for each that is measured. ``against``: (name,
    configuration) that the winner must not lose to."""

    budget: Budget
    method: str = "program"
    rounds: int | None = None
    per_round: int = 8
    screen: int = 4
    seed: int = 0
    against: Sequence[tuple[str, QuantConfig]] = ()
    spread: Sequence[float] = SPREAD

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.screen < 1:
            raise AquabitError(
                f"screen is {self.screen}; it must be at least 1 (1: every proposed configuration is"
                " measured)"
            )
        if self.rounds is not None and self.rounds < 0:
            raise AquabitError(
                f"rounds is {self.rounds}; it must be at least 0 (0: the program's answer as it is)"
            )

    @property
    def refinements(self) -> int:
        return 3 if self.rounds is None or self.method != "program" else self.rounds

    @property
    def proposals(self) -> int:
        return 2 if self.rounds is None else max(1, self.rounds)


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

    def __post_init__(self) -> None:
        session, budget = self.session, self.options.budget
        if budget.latency_ms is not None:
            session.costs = session.costs.timed(
                latency_table(session.here, session.space, self.progress, session.protocol)
            )
        self.activations = activation_choices(session.space, budget)
        self.costs.check(budget, fixed_act(self.activations))
        self.damages = Damages.of(session.space, session.study.features())
        self.targets = [budget, *ladder(self.costs, budget, self.options.spread)]
        self.given = [(name, self._at_budget(config)) for name, config in self.options.against]

    @property
    def costs(self) -> CostModel:
        return self.session.costs

    def run(self) -> Front:
        """Propose, measure, choose, and measure the front on fresh seeds."""
        return self._front(*self.choose())

    def choose(self) -> tuple[QuantConfig, Judgement]:
        """The winner under the budget, and how it was told apart: proposals are measured, and the best of
        all that is known are judged."""
        session, progress = self.session, self.progress
        starts = self._programs()
        self.told(self._expected(starts[self.options.budget]))
        session.references(progress)
        self._refine(starts)
        for config in uniform_references(session.space):
            self._add(config, f"uniform {_name(config)}")
        for name, config in self.given:
            self._add(config, name)
        session.measure(
            [c.config for c in self.candidates.values()], "candidate", progress, what="measuring candidates"
        )
        if self.options.method != "program":
            self._from_surrogate()
        return self._winner()

    def _at_budget(self, config: QuantConfig) -> QuantConfig:
        """A given configuration with its activations at the bits that the budget fixes, where it fixes
        them: rivals are compared alike."""
        if len(self.activations) > 1:
            return replace(config, correction=self.session.space.correction)
        excluded = {k for k, row in self.session.space.choices.items() if row == (FP,)}
        act = self.activations[0]
        changed = {
            k: replace(config[k], act=16 if k in excluded else act) for k in self.session.space.choices
        }
        space = self.session.space
        return replace(
            config,
            layers=changed,
            correction=space.correction,
            calibration=config.calibration or space.calibration,
        )

    def _expected(self, solved: Solution) -> str:
        """What the damages let expect of the budget, before anything is measured."""
        space, here = self.session.space, solved.choices
        offset = psnr_offset(self.session, self.damages)
        bits = float(self.costs.totals(here)["bits"][0])
        psnr = expected_psnr(self.damages, here, offset)
        text = f"expected at {self.options.budget}: PSNR {psnr:.1f} dB to full precision at {bits:.2f} bits"
        uniform = smallest_uniform(self.costs, space, "usq", self.costs(here.config).bytes)
        if uniform is not None and self._inside(uniform):
            value = expected_psnr(self.damages, Choices.of(space, [uniform]), offset)
            text += (
                f"; {_name(uniform)} for all layers, {self.costs(uniform).bits_per_weight:.2f} bits:"
                f" {value:.1f} dB"
            )
        return text + " (predicted from damages; nothing was measured for it)"

    def _add(self, config: QuantConfig, source: str, expected: float = float("nan")) -> None:
        self.candidates.setdefault(config.digest, Candidate(config, source, expected))

    def _programs(self) -> dict[Budget, Solution]:
        """The program's answer for every target."""
        found = {}
        for done, target in enumerate(self.targets):
            self.progress("integer program over damages", done, len(self.targets))
            scores = self.damages.scores(activation_choices(self.session.space, target))
            try:
                solved = solve(
                    scores, self.costs, target, relative_gap=0.0 if target is self.options.budget else GAP
                )
            except AquabitError:  # scaled limits may exclude each other where the budget's do not
                if target is self.options.budget:
                    raise
                continue
            found[target] = solved
            self._add(solved.choices.config, "program", solved.score)
        self.progress("integer program over damages", len(self.targets), len(self.targets))
        self.targets = list(found)
        first = found[self.options.budget]
        self.proof = Proof(first.score, first.bound, first.gap, first.score)
        return found

    def _refine(self, starts: Mapping[Budget, Solution]) -> None:
        """The program again, in the context of its own answers."""
        context = InContext(self.session, self.damages, self.activations, self.options.seed, self.progress)
        for number, target in enumerate(self.targets[:REFINED]):
            rounds = self.options.refinements if number == 0 else self.options.refinements // 2
            if rounds and context.ready:
                try:
                    steps = refine(
                        starts[target].choices, context.look, context.judge, self.costs, target, rounds=rounds
                    )
                except AquabitError as error:
                    self.told(f"not refined in context: {error}")
                    break
                for step in steps[1:]:
                    self._add(step.choices.config, "refined", step.value)
        self.spent = context.spent / 15

    def _from_surrogate(self) -> None:
        """What a surrogate of the study's measurements proposes; it is measured as it is proposed."""
        session, study, options, progress = self.session, self.session.study, self.options, self.progress
        training_table(
            study, session.protocol.objective
        )  # too few measurements are said before anything is proposed
        last: list[FittedSurrogate] = []

        def predict_factory() -> Any:
            last[:] = [fit_from_study(study)]
            return last[0].badness

        def bound(each: Choices, allowed: np.ndarray) -> Any:
            return EnsembleBound(last[0].surrogate, last[0].encoder, each, allowed)

        def measure(configs: list[QuantConfig]) -> None:
            session.measure(configs, "candidate", progress, what="measuring candidates")

        def screen(configs: list[QuantConfig]) -> np.ndarray:
            return screened(session, last[0], configs, progress)

        found = find_candidates(
            session.space,
            self.costs,
            options.budget,
            predict_factory,
            measure,
            self._measured,
            rounds=options.proposals,
            per_round=options.per_round,
            seed=options.seed,
            method="evolve" if options.method == "evolve" else "program",
            bound=bound,
            screen=screen if options.screen > 1 else None,
            pool=options.screen,
            progress=progress,
        )
        for candidate in found:
            self._add(candidate.config, "surrogate")
        proofs = [c.proof for c in found if c.proof is not None]
        self.proof = proofs[-1] if proofs else self.proof

    def _measured(self) -> list[tuple[QuantConfig, float]]:
        """Every configuration that was measured under the study's protocol and may win, with its objective
        (larger = worse)."""
        values = self._values(self.session.protocol.objective)
        return [(config, values[key]) for key, config in self._usable().items() if key in values]

    def _usable(self) -> dict[str, QuantConfig]:
        """Measured configurations by digest: corrected as the study corrects, not tuned, and either
        proposed here or with schemes that the space leaves open."""
        session = self.session
        table, configs = session.study.measurements(session.protocol, failed=True), session.study.configs()
        own = table[
            (table.kind != "reference")
            & (table.correction.fillna("") == (session.space.correction or ""))
            & table.tuned.isna()
        ]
        rows = session.space.choices
        return {
            key: configs[key]
            for key in own.config
            if key in self.candidates or all(configs[key][layer].weight in row for layer, row in rows.items())
        }

    def _values(self, metric: str, protocol: Protocol | None = None) -> dict[str, float]:
        """digest -> a metric under a protocol, larger = worse; NaN where the measurement failed."""
        session, given = self.session, protocol or self.session.protocol
        table = session.study.measurements(given, failed=True)
        if metric not in table:
            return {}
        sign = 1.0 if given.direction(metric) == "min" else -1.0
        return {key: sign * float(v) for key, v in zip(table.config, table[metric], strict=True)}

    def _within(self, configs: Sequence[QuantConfig]) -> np.ndarray:
        """Boolean [n]: keeps every limit, at the activation bits that the budget leaves open."""
        kept = []
        for config in configs:
            cost, budget = self.costs(config), self.options.budget
            allowed_activations = {config[k].act for k in self.session.space.free_layers()} <= set(
                self.activations
            )
            fits = (budget.bits is None or cost.bits_per_weight <= budget.bits * (1 + 1e-12)) and (
                budget.bytes is None or cost.bytes <= budget.bytes
            )
            fits = fits and (budget.bops is None or cost.bops <= budget.bops * (1 + 1e-12))
            kept.append(bool(allowed_activations and fits))
        return np.array(kept, bool)

    def _winner(self) -> tuple[QuantConfig, Judgement]:
        """The best configuration under the budget: by paired distances on common seeds, and by the
        objective where it can tell."""
        session, protocol = self.session, self.session.protocol
        fidelity = fidelity_of(protocol)
        values, usable = self._values(fidelity), self._usable()
        configs = [
            c for c, ok in zip(usable.values(), self._within(list(usable.values())), strict=True) if ok
        ]
        configs = [c for c in configs if isfinite(values.get(c.digest, float("nan")))]
        given = {c.digest for _, c in self.given}
        configs.sort(key=lambda c: (values[c.digest], self.costs(c).bytes, c.digest))
        if self.options.budget.latency_ms is not None:
            configs = self._fast(configs)
        if not configs:
            raise AquabitError(
                f"no measured configuration keeps the budget ({self.options.budget}); every candidate failed"
            )
        objective = self._values(protocol.objective)
        best_by_objective = sorted(configs, key=lambda c: objective.get(c.digest, float("inf")))[:1]
        finalists = list(
            {
                c.digest: c
                for c in (
                    *configs[:FINALISTS],
                    *best_by_objective,
                    *(c for c in configs if c.digest in given),
                )
            }.values()
        )

        def measure(indices: Sequence[int], count: int) -> np.ndarray:
            blocks = pieces(protocol, count, self.options.seed, self._conditions(protocol))
            session.measure(
                [session.space.full_precision()],
                "reference",
                self.progress,
                blocks,
                "full precision, judging seeds",
            )
            session.measure(
                [finalists[i] for i in indices], "selection", self.progress, blocks, "telling finalists apart"
            )
            tables = [self._values(fidelity, b) for b in blocks]
            return np.array([[t.get(finalists[i].digest, float("nan")) for t in tables] for i in indices])

        judgement = judge(range(len(finalists)), measure)
        winner = finalists[judgement.winner]
        if protocol.objective not in PAIRED and ":" not in protocol.objective:
            winner = self._by_objective(winner, finalists)
        return winner, judgement

    def _conditions(self, protocol: Protocol) -> tuple[str | int, ...] | None:
        """The prompts or classes of a protocol, so that small blocks go on in them; None where images are
        made from nothing."""
        adapter = self.session.here.adapter
        return None if adapter.kind == "batch_size" else tuple(adapter.conditions(protocol))

    def _fast(self, configs: Sequence[QuantConfig]) -> list[QuantConfig]:
        """The first FINALISTS whose whole packed call keeps the limit of latency; raises AquabitError
        where none does."""
        limit, kept, calls = self.options.budget.latency_ms, list[QuantConfig](), list[float]()
        assert limit is not None
        for config in configs[: 3 * FINALISTS]:
            calls += packed_latencies(self.session.here, [config], self.progress, self.session.protocol)
            if calls[-1] <= limit:
                kept.append(config)
            if len(kept) == FINALISTS:
                break
        if not kept and calls:
            least = min(calls)
            raise AquabitError(
                f"the layers of {len(calls)} configurations add up to {limit:g} ms or less, but whole calls"
                f" take {least:.3g} ms or more; allow a latency of {1.05 * least:.3g}"
            )
        return kept

    def _by_objective(self, winner: QuantConfig, finalists: Sequence[QuantConfig]) -> QuantConfig:
        """``winner``, or where its objective is shown to be worse than full precision's, the finalist whose
        objective is better beyond doubt (95 % paired intervals over blocks of seeds).

        A quantized model is to be like the model that it replaces: what lies below full precision's FID is no
        gain, it is noise of another kind (36 dB can have a lower FID than 47).
        """
        session, metric = self.session, self.session.protocol.objective
        protocols = [session.protocol, *(session.protocol.block(b) for b in OBJECTIVE_BLOCKS)]
        first = self._values(metric)
        rivals = [
            c
            for c in finalists
            if c.digest != winner.digest and first.get(c.digest, np.inf) < first.get(winner.digest, np.inf)
        ]
        rivals = sorted(rivals, key=lambda c: first[c.digest])[:2]
        if not rivals:
            return winner
        session.measure(
            [session.space.full_precision()],
            "reference",
            self.progress,
            protocols,
            "full precision, judging seeds",
        )
        session.measure(
            [winner, *rivals], "selection", self.progress, protocols, f"telling finalists apart by {metric}"
        )
        tables = [self._values(metric, p) for p in protocols]

        def blocks(config: QuantConfig) -> list[float]:
            return [t.get(config.digest, float("nan")) for t in tables]

        if not paired_difference(blocks(winner), blocks(session.space.full_precision())).low > 0:
            return winner
        for rival in rivals:
            if paired_difference(blocks(rival), blocks(winner)).high < 0:
                return rival
        return winner

    def _members(self, winner: QuantConfig) -> list[QuantConfig]:
        """The winner, and for each other target its best candidate by fidelity."""
        values, found = self._values(fidelity_of(self.session.protocol)), {winner.digest: winner}
        known = [c for c in self.candidates.values() if isfinite(values.get(c.config.digest, float("nan")))]
        sizes = {
            c.config.digest: self.costs.totals(Choices.of(self.session.space, [c.config]))
            for c in known
            if self._inside(c.config)
        }
        for target in self.targets[1:]:
            fits = [
                c
                for c in known
                if c.config.digest in sizes and bool(self.costs.within(sizes[c.config.digest], target)[0])
            ]
            if fits:
                best = min(fits, key=lambda c: (values[c.config.digest], c.config.digest))
                found[best.config.digest] = best.config
        return list(found.values())

    def _inside(self, config: QuantConfig) -> bool:
        schemes, acts = set(self.session.space.schemes), {*self.session.space.act_choices, 16}
        return all(config[k].weight in schemes and config[k].act in acts for k in self.session.space.choices)

    def _front(self, winner: QuantConfig, judgement: Judgement) -> Front:
        """Measure members, uniform baselines and full precision on fresh seeds."""
        session, costs, progress = self.session, self.costs, self.progress
        members = self._members(winner)
        protocols = [session.protocol.block(b) for b in FRESH_BLOCKS]
        uniforms = uniform_references(session.space)  # what each family reaches, beside the front
        baseline = smallest_uniform(costs, session.space, "usq", costs(winner).bytes)
        session.measure(
            [session.space.full_precision()], "reference", progress, protocols, "full precision, fresh seeds"
        )
        packed = list({c.digest: c for c in (*members, *([baseline] if baseline else []))}.values())
        session.measure(packed, "fresh", progress, protocols, "the front on fresh seeds", packed=True)
        rivals = [
            *uniforms,
            *(c for _, c in self.given),
        ]  # from decoded weights, which takes half the time and changes PSNR by little
        session.measure(rivals, "fresh", progress, protocols, "rivals on fresh seeds")
        latency = packed_latencies(session.here, members, progress, session.protocol)
        predict, metric = self._predictor(), session.protocol.objective
        rows = []
        for config, call in zip(members, latency, strict=True):
            found = {m: interval(self._blocks(config, protocols, m)) for m in self._metrics()}
            rows.append(FrontMember.of(costs, config, predict(config), found, call))
        fidelity = fidelity_of(session.protocol)
        front = Front(rows, self.options.budget, winner.digest, {}, self.proof)
        front = front.pruned(fidelity, session.protocol.direction(fidelity) == "min")
        comparison = self._comparison(winner, baseline, protocols, metric) if baseline else {}
        comparison |= {
            "metric": metric,
            "spent": {"output_errors": self.spent},
            "same_quality": self._same_quality(front, uniforms, protocols, fidelity),
            "judged": self._judged(judgement),
            "against": [self._side(c, protocols, metric) | {"name": n} for n, c in self.given],
        }
        return replace(front, comparison=comparison)

    def _predictor(self) -> Any:
        """config -> {metric: predicted value}: PSNR from the sum of damages, the objective from the
        surrogate where one can be fitted."""
        session, metric = self.session, self.session.protocol.objective
        fitted: FittedSurrogate | None = None
        try:
            fitted = fit_from_study(session.study)
            shift = correction_shift(session, metric, fitted.surrogate.target_)
        except AquabitError:
            fitted = None  # too few measurements: the damages speak alone
        offset = psnr_offset(session, self.damages)

        def predict(config: QuantConfig) -> dict[str, float]:
            inside, found = self._inside(config), {}
            if fitted is not None and inside:
                value = fitted.surrogate.to_units(
                    fitted.surrogate.predict(fitted.encoder.encode([config])) + shift
                )
                found[metric] = float(np.ravel(value)[0])
            if inside and "psnr" not in found:
                found["psnr"] = expected_psnr(self.damages, Choices.of(session.space, [config]), offset)
            return found

        return predict

    def _metrics(self) -> list[str]:
        known = self.session.study.measurements().columns
        return [
            m for m in known if m in LOWER_IS_BETTER or ":" in m
        ]  # the user's own are named module:function

    def _blocks(self, config: QuantConfig, protocols: Sequence[Protocol], metric: str) -> list[float]:
        """The metric in its units on each block (NaN where it failed)."""
        sign = 1.0 if self.session.protocol.direction(metric) == "min" else -1.0
        return [sign * self._values(metric, p).get(config.digest, float("nan")) for p in protocols]

    def _side(self, config: QuantConfig, protocols: Sequence[Protocol], metric: str) -> dict[str, Any]:
        cost, blocks = self.costs(config), self._blocks(config, protocols, metric)
        mean = interval(blocks)
        return {
            "config": config.digest,
            "bytes": cost.bytes,
            "bits": cost.bits_per_weight,
            "blocks": blocks,
            "value": mean.value,
            "low": mean.low,
            "high": mean.high,
            "psnr": float(np.mean(self._blocks(config, protocols, "psnr"))),
        }

    def _comparison(
        self, winner: QuantConfig, uniform: QuantConfig, protocols: Sequence[Protocol], metric: str
    ) -> dict[str, Any]:
        """The winner against the smallest uniform USQ that is no smaller, in paired differences over fresh
        blocks."""
        gap = {
            m: paired_difference(self._blocks(winner, protocols, m), self._blocks(uniform, protocols, m))
            for m in (metric, "psnr")
        }
        shown: dict[str, dict[str, Any]] = {
            m: {"value": d.value, "low": d.low, "high": d.high} for m, d in gap.items()
        }
        shown[metric]["images_needed"] = images_to_tell(
            gap[metric], len(protocols), self.session.protocol.images
        )
        images = self.session.protocol.images
        return {
            "metric": metric,
            "blocks": len(protocols),
            "images": images,
            "winner": self._side(winner, protocols, metric),
            "uniform": {"scheme": _name(uniform), **self._side(uniform, protocols, metric)},
            "difference": shown[metric],
            "psnr_difference": shown["psnr"],
        }

    def _same_quality(
        self, front: Front, uniforms: Sequence[QuantConfig], protocols: Sequence[Protocol], metric: str
    ) -> list[dict[str, Any]]:
        """For each uniform configuration the smallest member of the front that is measured as good by
        fidelity, or None: how much smaller."""
        sign, rows = (1.0 if self.session.protocol.direction(metric) == "min" else -1.0), []
        for config in uniforms:
            cost, value = self.costs(config), float(np.mean(self._blocks(config, protocols, metric)))
            good = [m for m in front.members if sign * m.measured[metric]["value"] <= sign * value]
            least = min((m.bytes for m in good), default=None)
            rows.append(
                {
                    "uniform": _name(config),
                    "bytes": cost.bytes,
                    "metric": metric,
                    "value": value,
                    "found_bytes": least,
                }
            )
        return rows

    def _judged(self, judgement: Judgement) -> dict[str, Any]:
        """How the finalists were told apart, for the page."""
        second = min(judgement.worse.items(), key=lambda row: row[1].value, default=None)
        gap = (
            None
            if second is None
            else {"value": second[1].value, "low": second[1].low, "high": second[1].high}
        )
        images = max(judgement.blocks.values()) * pieces(self.session.protocol, 1)[0].images
        return {
            "metric": fidelity_of(self.session.protocol),
            "finalists": len(judgement.mean),
            "images": images,
            "next_best": gap,
        }


def images_to_tell(gap: Interval, blocks: int, images: int) -> int | None:
    """How many images would tell two configurations apart whose paired difference over ``blocks`` of
    ``images`` each is ``gap`` (95 %): the interval's half width falls with their square root. None where it
    tells already, or the difference is nothing.
    """
    half = (gap.high - gap.low) / 2
    if not isfinite(half) or gap.low > 0 or gap.high < 0 or gap.value == 0:
        return None
    return int(blocks * images * (half / abs(gap.value)) ** 2) + 1


def _name(config: QuantConfig) -> str:
    """``usq3h``, or ``aq, 3 bits`` of a family whose layers have formats of their own."""
    found = {str(c.weight) for c in config.layers.values() if c.weight != FP}
    kinds = {c.weight.kind for c in config.layers.values() if c.weight != FP}
    return next(iter(found)) if len(found) == 1 else "+".join(sorted(kinds)) if found else "fp"


def expected_psnr(damages: Damages, chosen: Choices, offset: float = 0.0) -> float:
    """PSNR in dB that the sum of damages of one configuration (one row) lets expect."""
    total = float(damages.total(chosen)[0])
    return offset - 10 * log10(max(total, 1e-10))


def psnr_offset(session: Session, damages: Damages) -> float:
    """What mean PSNR is above that of the summed damages, in the median of what was measured: a mean of
    logarithms is not the logarithm of a mean, and few probes are noisy. 0 where nothing was measured."""
    table, configs, known = (
        session.study.measurements(session.protocol),
        session.study.configs(),
        set(session.space.schemes),
    )
    if "psnr" not in table:
        return 0.0
    gaps = []
    for key, psnr in zip(table.config, table.psnr, strict=True):
        config = configs[key]
        if config.layers and isfinite(psnr) and all(config[k].weight in known for k in session.space.choices):
            gaps.append(float(psnr) - expected_psnr(damages, Choices.of(session.space, [config])))
    return float(np.median(gaps)) if gaps else 0.0
