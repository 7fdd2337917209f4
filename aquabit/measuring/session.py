"""Session: a model, a study bound to it, and the pool that measures and fits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from aquabit.cost import CostModel
from aquabit.graph import LayerGraph, layers, to_json
from aquabit.measuring.damage_scores import damage_notes
from aquabit.measuring.evaluator import Evaluator, Slopes
from aquabit.measuring.fitting import GRADIENTS, PROBES, fit_all, source_of
from aquabit.measuring.model import Model, open_model
from aquabit.measuring.output_errors import StepErrors, stored
from aquabit.measuring.pools import InlinePool, Pool, local_evaluator, pool_for
from aquabit.measuring.settings import AS_BEGUN, MeasureOptions, meter_of, settings
from aquabit.measuring.tasks import Measure, MeasureOutputErrors, MeasureSlopes
from aquabit.measuring.where import HERE, Where
from aquabit.memory import check_measuring
from aquabit.pipelines import Pipeline
from aquabit.pipelines.loading import check_device
from aquabit.quant.bank import Bank
from aquabit.quant.calibration.fitting import CALIBRATED_FITS
from aquabit.scheme import FP, Progress, Protocol, QuantConfig, Scheme, digest, no_progress
from aquabit.scheme_kinds import ADDITIVE
from aquabit.space import SearchSpace, without_additive
from aquabit.study import Study
from aquabit.targets import target_named

# measured beside samples, output-aware where anything is: what one would take without a search
UNIFORM = ("usq2", "usq3", "usq4")
OUTPUTS_TASK = 8  # configurations whose output errors are one task: an interruption loses at most so many


def uniform_references(space: SearchSpace) -> list[QuantConfig]:
    """What random configurations are seen beside: one scheme for all layers, and the layers' additive
    formats at each level they have. Of a target's space, each scheme that at least half of the free layers
    may take: nothing that cannot be deployed."""
    act = space.closest_act
    if space.target is not None:
        free = [space.choices[k] for k in space.free_layers()]
        usual = [s for s in space.schemes if s != FP and 2 * sum(s in row for row in free) >= len(free)]
        return [space.near_uniform(s, act) for s in usual]
    levels = sorted(
        {round(2 * space.code_bits(k, s)) / 2 for k, row in space.choices.items() for s in row if s.additive}
    )
    first = [Scheme.parse(s + ("h" if any(q.calibrated for q in space.schemes) else "")) for s in UNIFORM] + [
        Scheme.parse("usq8")
    ]
    own = [s for s in space.common_schemes() if s.record.even]
    return [
        *(space.uniform(s, act) for s in dict.fromkeys((*first, *own))),
        *(space.level(ADDITIVE.name, b, act) for b in levels),
    ]


@dataclass(frozen=True)
class Session:
    """What every verb that makes images works with; ``open_session`` gives one. ``costs`` are of ``space``;
    ``local`` makes the evaluator of this process when it is first asked."""

    model: Model
    study: Study
    space: SearchSpace
    protocol: Protocol
    pool: Pool
    costs: CostModel
    device: str
    local: Callable[[], Evaluator]

    @property
    def here(self) -> Evaluator:
        """An evaluator in this process (workers have their own), made when it is first needed: latencies
        are measured where nothing else runs."""
        return self.local()

    def with_space(self, space: SearchSpace) -> Session:
        """The same session with configurations of another space."""
        return replace(self, space=space, costs=CostModel(self.model.graph, space))

    def measure(
        self,
        configs: Iterable[QuantConfig],
        kind: str,
        progress: Progress = no_progress,
        protocols: Sequence[Protocol] | None = None,
        what: str = "measuring",
        packed: bool | None = None,
    ) -> int:
        """Measure what the study does not have yet, one transaction each; the number of new measurements.
        ``packed``: as it runs in the end, from codes on the kernels; else with decoded weights on
        torch's own; None: whichever is faster (``Evaluator.faster_packed``)."""
        tasks: list[Measure] = []
        listed = {c.digest: c for c in configs}
        for protocol in protocols or [self.protocol]:
            self.study.add_protocol(protocol)
            known = self.study.known(protocol)
            tasks += [Measure(c, protocol, packed) for key, c in listed.items() if key not in known]
            self.study.show(listed, protocol.digest)
        progress(what, 0, len(tasks))
        for done, (place, (measurement, png)) in enumerate(self.pool.run(tasks), 1):
            config = tasks[place].config
            self.study.record(config, measurement, kind, self.costs.totals_of(config), png)
            progress(what, done, len(tasks))
        return len(tasks)

    def outputs(
        self, configs: Iterable[QuantConfig], progress: Progress = no_progress
    ) -> dict[str, StepErrors]:
        """digest -> output errors of configurations on stored inputs (``output_errors.OutputErrors``); what
        the study has is not measured again.

        Each costs about a fifteenth of a measurement.
        """
        return {key: values[0] for key, values in self.outputs_of(configs, (0,), progress).items()}

    def outputs_of(
        self, configs: Iterable[QuantConfig], parts: Sequence[int], progress: Progress = no_progress
    ) -> dict[str, list[StepErrors]]:
        """digest -> output errors on each of several parts of stored inputs (``output_errors.stored``), in
        their order."""
        listed = {c.digest: c for c in configs}
        inputs = {part: stored(self.protocol, part)[0].digest for part in parts}
        known: dict[int, dict[str, Any]] = {part: self.study.outputs(inputs[part]) for part in parts}
        tasks: list[MeasureOutputErrors] = []
        for part in parts:
            missing = [c for key, c in listed.items() if key not in known[part]]
            for i in range(0, len(missing), OUTPUTS_TASK):
                tasks.append(MeasureOutputErrors(tuple(missing[i : i + OUTPUTS_TASK]), self.protocol, part))
        done, total = 0, sum(len(t.configs) for t in tasks)
        for place, values in self.pool.run(tasks):
            task = tasks[place]
            found = {c.digest: dict(v) for c, v in zip(task.configs, values, strict=True)}
            self.study.add_outputs(inputs[task.part], found)
            known[task.part].update(found)
            progress("output errors", done := done + len(found), total)
        return {key: [known[part][key] for part in parts] for key in listed}

    def slopes(
        self,
        config: QuantConfig,
        weights: Sequence[float],
        parts: Sequence[int],
        progress: Progress = no_progress,
    ) -> list[Slopes]:
        """``Evaluator.slopes`` of a configuration on each part of stored inputs, for all that the space
        offers; what the study has is not made again. Each costs about three output errors, and decoding
        every weight of the space."""
        choices = {k: tuple(str(s) for s in row) for k, row in self.space.choices.items() if len(row) > 1}
        share = tuple(float(f"{w:.9g}") for w in weights)
        inputs = {part: stored(self.protocol, part)[0].digest for part in parts}
        keys = {part: digest(["slopes", inputs[part], share, choices]) for part in parts}
        known: dict[int, Any] = {p: self.study.outputs(key).get(config.digest) for p, key in keys.items()}
        missing = [part for part, value in known.items() if value is None]
        tasks = [MeasureSlopes(config, self.protocol, part, share, choices) for part in missing]
        for done, (place, value) in enumerate(self.pool.run(tasks), 1):
            part = tasks[place].part
            self.study.add_outputs(keys[part], {config.digest: dict(value)})
            known[part] = value
            progress("slopes in context", done, len(tasks))
        return [value for part in parts if (value := known[part]) is not None]

    def first(self) -> list[QuantConfig]:
        """What is measured before anything else: full precision (paired metrics need its images), then
        uniform configurations."""
        return [self.space.full_precision(), *uniform_references(self.space)]

    def references(self, progress: Progress = no_progress) -> None:
        """Measure what is ``first``."""
        full, *uniform = self.first()
        self.measure([full], "reference", progress, what="full precision")
        self.measure(uniform, "uniform", progress, what="uniform references")

    def measure_full(self, protocols: Sequence[Protocol], seeds: str, progress: Progress) -> None:
        """Measure full precision on other ``seeds``, as they are called: paired metrics need its images."""
        full = [self.space.full_precision()]
        self.measure(full, "reference", progress, protocols, f"full precision, {seeds}")


@contextmanager
def open_session(
    model: str | Pipeline,
    study: Study,
    options: MeasureOptions = AS_BEGUN,
    where: Where = HERE,
    *,
    check: Callable[[SearchSpace], object] | None = None,
    early: Callable[[Session], object] | None = None,
    wanted: Callable[[Session], SearchSpace] | None = None,
    progress: Progress = no_progress,
) -> Iterator[Session]:
    """Bind ``study`` to the model, hold its writer lock, start the pool, and see that every scheme is fitted.

    ``check`` sees the space before anything is fitted, and may raise; ``early`` gets the session before its
    schemes are fitted. ``wanted`` gets it when all but the additive ones are, and says of which space the
    study is to be from then on (a part of its own). Raises AquabitError for a study of another model,
    protocol or space.
    """
    if where.ray is None:
        check_device(where.device)
    damages = source_of(study, options.damages)
    opened = open_model(model)
    with study.writing():
        bank = Bank(where.bank)
        meter = meter_of(opened, study, options.quality, bank, where.device)
        protocol, space = settings(opened, study, options, where.dtype, meter, progress)
        if where.ray is None:
            need = {"gradients": damages == GRADIENTS, "bound": "fingerprint" in study}
            check_measuring(opened.graph, protocol, where.device, where.workers, **need)
        if check is not None:
            check(space)
        notes = [*opened.notes, *target_notes(space, opened.graph), *_fit_notes(study, space)]
        if notes:
            study.set(family_notes=notes)
        if damages != (study.get("damages") or PROBES):
            study.set(damages=damages)  # absent: probes, as in studies of before there were gradients
        study.begin(opened.reference, opened.fingerprint, to_json(opened.graph), space.to_dict(), protocol)
        if meter.options or meter.notes:
            said = meter.notes or (study.get("quality") or {}).get("notes", [])
            study.set(quality={**meter.options.to_dict(), "notes": said})
        where = replace(where, dtype=protocol.dtype)  # a study continues in its own
        with pool_for(opened, bank, where, meter.options) as pool:

            @cache
            def local() -> Evaluator:
                if isinstance(pool, InlinePool):
                    return pool.evaluator
                return local_evaluator(opened, bank, where, meter.options)

            if "offered" in study:
                space = replace(SearchSpace.from_dict(study.get("space")), sampled=space.sampled)
            costs = CostModel(opened.graph, space)
            session = Session(opened, study, space, protocol, pool, costs, where.device, local)
            if early is not None:
                early(session)
            if wanted is not None and "offered" not in study:
                fit_all(pool, study, without_additive(space), protocol, progress, damages, scored=False)
                session = session.with_space(wanted(session))
                study.set(offered=space.to_dict(), space=session.space.to_dict())
                space = session.space
            fit_all(pool, study, space, protocol, progress, damages, beside=uniform_references(space))
            if told := [*_wanted_notes(study, space), *damage_notes(space, study)]:
                study.set(family_notes=[*notes, *told])
            yield session
            bank.trim()


def target_notes(space: SearchSpace, graph: LayerGraph) -> list[str]:
    """What is to be said of layers that stay dense, or are fused, in a target's space, and without a target
    of schemes that some layers cannot have."""
    goal = target_named(space.target)
    if goal is None:
        return _shape_notes(space, graph)
    return goal.on(layers(graph), str(graph.graph.get("model_class")), space.schemes).notes


def _shape_notes(space: SearchSpace, graph: LayerGraph) -> list[str]:
    """What is to be said of schemes that are offered, but not to layers whose shape cannot be stored so."""
    nodes, found = layers(graph), list[str]()
    shapes = {k: tuple(nodes[k]["shape"]) for k, row in space.choices.items() if row != (FP,)}
    for scheme in space.schemes:
        why = {k: scheme.refuses(s) for k, s in shapes.items() if scheme not in space.choices[k]}
        names = [k for k, reason in why.items() if reason is not None]
        if names:
            found.append(
                f"{scheme} is left out for {len(names)} of {len(shapes)} layers, as {names[0]}:"
                f" {why[names[0]]}"
            )
    return found


def _wanted_notes(study: Study, space: SearchSpace) -> list[str]:
    """What is to be said where formats of the space were left out before they were fitted."""
    if "offered" not in study:
        return []

    def count(choices: Mapping[str, Sequence[Scheme]]) -> int:
        return sum(s.additive for row in choices.values() for s in row)

    offered = SearchSpace.from_dict(study.get("offered"))
    return [
        f"Of {count(offered.choices)} additive formats of layers {count(space.choices)} were fitted: those"
        " that a configuration near the budget was expected to want (--fits wanted); the others were not"
        " looked at."
    ]


def _fit_notes(study: Study, space: SearchSpace) -> list[str]:
    """What is to be said of a study whose measurements were made with calibrated fits of another version; a
    new one notes its own."""
    if "fingerprint" not in study:
        study.set(calibrated_fits=CALIBRATED_FITS)
    begun = study.get("calibrated_fits", 1)
    if begun == CALIBRATED_FITS or not any(s.calibrated for s in space.schemes):
        return []
    return [
        "Some measurements were made with calibrated fits of another version; the output errors of nearly all"
        " layers differ by less than 1 % between them."
    ]
