"""The verbs that join the packages: measure, validate, find, run. ``import aquabit`` gives those with
keywords; the command line calls those that take values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from aquabit.budget import OTHERS
from aquabit.exports import WRITERS, check_known
from aquabit.exports.exported import (
    Exported,
    check_activations,
    check_layers,
    check_replaceable,
    each_network,
    place_of,
)
from aquabit.files import check_apart, check_writable, write_bytes
from aquabit.graph import LayerGraph, layers
from aquabit.jsonio import write_json
from aquabit.measuring.session import Session, open_session, target_notes
from aquabit.measuring.settings import MeasureOptions, check_target
from aquabit.measuring.where import HERE, Where, WhereOptions
from aquabit.packing import AnyModel, coded, generate, quantize
from aquabit.pipelines.loading import sources_of
from aquabit.pipelines.pictures import thumbnail
from aquabit.progress import span
from aquabit.quality import QualityOptions
from aquabit.reports import report as write_report
from aquabit.scheme import AquabitError, Budget, Progress, Protocol, QuantConfig, no_progress
from aquabit.search.continuing import continuing
from aquabit.search.first_answer import FirstAnswer, damage_answer, quick_answer
from aquabit.search.fresh_front import FRESH_BLOCKS, measure_front
from aquabit.search.front import Front
from aquabit.search.options import activation_choices, fixed_act
from aquabit.search.proposals import propose
from aquabit.search.search import Search
from aquabit.search.search_options import SearchOptions
from aquabit.search.winner import choose_winner
from aquabit.search.worth_fitting import worth_fitting
from aquabit.sensitivity.correction_gain import corrected_session, noise_facts
from aquabit.sensitivity.designs import DEFAULT, draw, measure_disagreement, shard_of
from aquabit.sensitivity.effects.context_effects import IN_CONTEXT, measure_in_context
from aquabit.sensitivity.effects.predicted import named_swap
from aquabit.sensitivity.effects.validation import validate_in
from aquabit.sensitivity.explaining import explain
from aquabit.sensitivity.plan import ALL, WANTED, Planner, SampleOptions
from aquabit.sensitivity.result import Sensitivity, save
from aquabit.sensitivity.surrogate.fit import TooFewError
from aquabit.space import SearchSpace, narrowed
from aquabit.study import Study
from aquabit.study_status import start_plan
from aquabit.targets import TARGETS
from aquabit.user_code import names_function
from aquabit.within import Fitted, compared, fit_within, parse_time


class FindOptions(WhereOptions, total=False):
    """Keywords of ``find``: fields of ``Where``, and these of ``SearchOptions``."""

    method: str
    rounds: int | None
    per_round: int | None
    screen: int | None
    front: int


class RunOptions(WhereOptions, total=False):
    """Keywords of ``measure`` and ``run``: the fields of ``Where`` and of ``MeasureOptions``."""

    protocol: Protocol | None
    space: Mapping[str, Any] | None
    target: str | None
    quality: QualityOptions | None
    damages: str | None


SAMPLES = 32  # images, or videos, of the grid that a run ends with
WRITTEN = (  # by ``run``, beside study.db and folders
    "first.json",
    "first-config.json",
    "sensitivity.json",
    "front.json",
    "config.json",
    "samples.png",
)


@dataclass(frozen=True)
class FlowOptions:
    """What ``run`` explains, checks and searches: the budget in bits per weight, real swaps that check the
    explanation, and the two schemes of a swap, "A:B" (None: ``effects.default_swap``)."""

    bits: float = 3.0
    swaps: int = 40
    swap: str | None = None
    within: float | None = None  # seconds that a run is to take: settings are lowered until its plan does
    kept: tuple[str, ...] = ()  # of "samples", "swaps", "images", "steps", "fits": what is not lowered
    # additive formats: ALL, or only WANTED ones (``search.worth_fitting``); None: as begun, else ALL
    fits: str | None = None
    front: int = OTHERS  # other budgets that the search answers, too

    def __post_init__(self) -> None:
        if self.fits not in (None, ALL, WANTED):
            raise AquabitError(f"fits {self.fits!r} is unknown; it must be {ALL} or {WANTED}")


def _source(study: Study, pipe: AnyModel | None) -> AnyModel:
    """What a study is measured with: what the user gave, else what the study names, unless that is code: a
    file does not say what is run."""
    if pipe is not None:
        return pipe
    named = str(study.need("model", "run `aquabit measure MODEL --study` first"))
    if names_function(named):
        raise AquabitError(
            f"{study.path} was measured with the code {named}, which runs only where you name it: give it as"
            f" pipe={named!r}, or by --model {named}"
        )
    return named


def validate(
    study: Study,
    flips: int = 40,
    swap: str | None = None,
    bits: float = 3.0,
    *,
    pipe: AnyModel | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    **where: Unpack[WhereOptions],
) -> Sensitivity:
    """Measure ``flips`` real (layer, context) swaps on seeds of their own and set them beside the predicted
    effects: half of the layers that the ranking puts first, half drawn at random. ``swap``: "A:B" (default:
    ``effects.default_swap``).

    ``pipe`` is needed where the study's model was an object; ``where``: workers, device, dtype, bank and
    ray, see ``measuring.where.Where``.
    """
    flow = FlowOptions(bits, flips, swap)
    return validate_study(study, flow, Where(**where), pipe=pipe, seed=seed, progress=progress)


def validate_study(
    study: Study,
    flow: FlowOptions,
    where: Where = HERE,
    *,
    pipe: AnyModel | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Sensitivity:
    """``validate`` with values."""
    with _opened(study, pipe, where, flow.swap, progress) as session:
        validate_in(session, flow.swaps, flow.swap, flow.bits, seed, progress)
    return explained(study, flow.bits, flow.swap, progress)


def run_contexts(
    study: Study,
    contexts: int = IN_CONTEXT,
    bits: float = 3.0,
    where: Where = HERE,
    *,
    swap: str | None = None,
    pipe: AnyModel | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Run every layer's swap in good configurations near ``bits`` on stored inputs, so that ``explain`` knows
    what layers do in context.

    Costs about a fifteenth of a measurement for each training measurement and each of 2 x layers x
    ``contexts`` configurations. Raises AquabitError for fewer than 2 contexts.
    """
    check_contexts(contexts)
    with _opened(study, pipe, where, swap, progress) as session:
        measure_in_context(session, contexts, bits, swap, seed, progress)


def check_contexts(contexts: int) -> None:
    """Raise AquabitError for a number of contexts that no average can be made of."""
    if contexts < 2:
        raise AquabitError(f"contexts is {contexts}; an average needs at least 2")


def _opened(
    study: Study, pipe: AnyModel | None, where: Where, swap: str | None, progress: Progress
) -> AbstractContextManager[Session]:
    """A session on a study as it was begun; an impossible swap is said before anything is fitted."""
    check = partial(named_swap, swap=swap)
    return open_session(_source(study, pipe), study, where=where, check=check, progress=progress)


def explained(
    study: Study,
    bits: float = 3.0,
    swap: str | None = None,
    progress: Progress = no_progress,
    estimator: str = "gbdt",
) -> Sensitivity:
    """Sensitivities of a study, stored in it."""
    result = explain(study, bits, swap, progress=progress, estimator=estimator)
    with study.writing():
        save(study, result)
    return result


def find(
    study: Study,
    bits: float | None = None,
    *,
    bytes: int | None = None,
    bops: float | None = None,
    latency_ms: float | None = None,
    correction: str | None = None,
    target: str | None = None,
    pipe: AnyModel | None = None,
    seed: int = 0,
    against: Sequence[QuantConfig] = (),
    progress: Progress = no_progress,
    **options: Unpack[FindOptions],
) -> Front:
    """The best configuration under a hard budget, and a front around it, packed, on fresh seeds; the winner
    without and with noise correction. Stored in the study.

    The integer program over the study's damages gives an answer for every budget before anything is measured;
    it is refined in context, and judged in pairs beside uniform families, one format a layer, everything that
    the study measured, and ``against``. ``latency_ms`` limits a denoiser call with one sample at the model's
    own size, on this machine with torch's threads. ``correction`` (as "cnc+bc"): candidates are measured and
    chosen after it, in a study that was measured without (``corrected_session``); a study that was measured
    with one needs none. ``target`` (a name of ``targets.TARGETS``): only what that program can hold, of what
    the study measured. ``method``, ``rounds``, ``per_round``, ``screen`` and ``front``: see
    ``search_options.SearchOptions``; workers, device, dtype, bank and ray: see ``measuring.where.Where``.
    Raises AquabitError for a budget that the space cannot meet (both ends are named), and for a configuration
    of ``against`` that is of another model.
    """
    budget = Budget.of(bits, bytes, bops, latency_ms)
    named = [(f"given {i}", c) for i, c in enumerate(against, 1)]
    how, where = _split(options, SearchOptions)
    asked = SearchOptions(budget, seed=seed, against=named, **how)
    kept: dict[str, Any] = {"correction": correction, "target": target, "pipe": pipe}
    return search(study, asked, Where(**where), **kept, progress=progress)


def _split(options: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are fields of a dataclass, and the others."""
    own = {field.name for field in fields(kind)}
    return {k: v for k, v in options.items() if k in own}, {k: v for k, v in options.items() if k not in own}


def _measured(options: Mapping[str, Any]) -> tuple[MeasureOptions, Where]:
    """Keywords of ``measure`` and ``run`` as values; the target is one of the space."""
    how, where = _split({k: v for k, v in options.items() if k != "target"}, MeasureOptions)
    if options.get("target") is not None:
        how["space"] = {**(how.get("space") or {}), "target": options["target"]}
    return MeasureOptions(**how), Where(**where)


def search(
    study: Study,
    options: SearchOptions,
    where: Where = HERE,
    *,
    correction: str | None = None,
    target: str | None = None,
    pipe: AnyModel | None = None,
    progress: Progress = no_progress,
    told: Callable[[str], object] = lambda _: None,
) -> Front:
    """``find`` with values; ``told`` gets what is to be said before anything is measured."""
    check_target(study, target)
    with open_session(_source(study, pipe), study, where=where, progress=progress) as session:
        space = narrowed(session.space, session.model.graph, target)
        if space is not session.space:
            session = session.with_space(space)
            for note in target_notes(space, session.model.graph):
                told(note)
        _check(session, options)
        if correction is not None:
            session = corrected_session(session, correction, progress)
        return find_in(session, options, progress, told)


def find_in(
    session: Session,
    options: SearchOptions,
    progress: Progress = no_progress,
    told: Callable[[str], object] = lambda _: None,
) -> Front:
    """The search of ``find`` in an open session."""
    _check(session, options)
    with continuing(session, options):
        search = Search(session, options, progress, told)
        propose(search)
        front = measure_front(search, *choose_winner(search))
        fresh = [session.protocol.block(b) for b in FRESH_BLOCKS]
        noise = noise_facts(session, front.best, fresh, progress)
        session.study.set(front=front.to_dict(), noise=noise)
    return front


def _check(session: Session, options: SearchOptions) -> None:
    """Raise AquabitError, before anything is measured, for a budget out of reach and for rivals that
    cannot be compared."""
    if options.budget.latency_ms is None:
        session.costs.check(options.budget, fixed_act(activation_choices(session.space, options.budget)))
    for name, config in options.against:
        if config.fingerprint != session.space.fingerprint:
            raise AquabitError(
                f"{name} is a configuration of model {config.fingerprint}, the study is of model"
                f" {session.space.fingerprint}"
            )
        if config.tuned:
            raise AquabitError(
                f"{name} is fine-tuned, and the search compares configurations as they are fitted; give it"
                " without tuning"
            )
        try:
            _check_config(session, config)
        except AquabitError as error:
            raise AquabitError(f"{name}: {error}") from error


def _check_config(session: Session, config: QuantConfig) -> None:
    """Raise AquabitError for a configuration that a session cannot measure."""
    session.space.check(config, extra_schemes=True)
    config.check_shapes(layers(session.model.graph))


def run(
    model: AnyModel,
    out: str | Path,
    bits: float = 3.0,
    samples: int = 120,
    flips: int = 40,
    *,
    sample_seed: int = 0,
    swap: str | None = None,
    design: str = DEFAULT,
    within: str | None = None,
    fits: str | None = None,
    front: int = OTHERS,
    progress: Progress = no_progress,
    **options: Unpack[RunOptions],
) -> Front:
    """The whole flow into a folder; run again, it continues where it stopped. ``within`` ("90s", "20min",
    "2h"): samples, swaps, images, steps and formats are lowered until the plan fits that time. ``fits``
    "wanted": additive formats are fitted only to layers where a configuration near ``bits`` is expected to
    want them (``search.worth_fitting``); None: as the study was begun, else "all". ``front``: other budgets
    that the search answers, too (``search_options.SearchOptions``).

    Writes study.db, sensitivity.json, front.json, config.json, packed/, samples.png and report/index.html;
    early on, first.json (``first_answer.FirstAnswer``, from gradients alone) with first-config.json, and the
    page as far as it is.
    Protocol, space and quality: see ``measuring.settings.MeasureOptions``; workers, device, dtype, bank and
    ray: see ``measuring.where.Where``; ``target``: see ``space.make_space``.
    """
    time_given = None if within is None else parse_time(within)
    flow = FlowOptions(bits, flips, swap, time_given, fits=fits, front=front)
    sample = SampleOptions(samples, sample_seed, design)
    how, where = _measured(options)
    return run_flow(model, Path(out), flow, sample, how, where, progress)


def run_flow(
    model: AnyModel,
    out: Path,
    flow: FlowOptions,
    sample: SampleOptions,
    options: MeasureOptions,
    where: Where = HERE,
    progress: Progress = no_progress,
    told: Callable[[str], object] = lambda _: None,
) -> Front:
    """``run`` with values; ``told`` gets the first answers as they come."""
    for source in sources_of(model):
        check_apart(out, source, inside=False)
        check_apart(out / "packed", source)
    others = [out / name for name in WRITTEN if (out / name).exists()]
    if others and not (out / "study.db").exists():
        raise AquabitError(
            f"{others[0]} is of no run in {out} and would be overwritten; choose another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AquabitError(f"the folder {out} cannot be made: {error.strerror}") from error
    study, budget, clock = Study(out / "study.db"), Budget(bits=flow.bits), _Clock()
    if flow.within is not None:
        flow, sample, options = _within(model, study, flow, sample, options, where, told, progress)
    check_fits(study, flow.fits)
    fits = flow.fits or _begun_fits(study)
    if fits == WANTED:
        with study.writing():
            study.set(formats=WANTED)  # interrupted before formats are left out, it goes on so
    early = _Early(study, out, told, progress)

    def look(session: Session) -> None:
        session.costs.check(budget, session.space.closest_act)
        clock.mark("loading")
        early.first(lambda: quick_answer(session, flow.bits, progress), "fitting every format")
        clock.mark("first look")

    def wanted(session: Session) -> SearchSpace:
        return worth_fitting(session.space, session.costs, study.features(), flow.bits)

    hooks: dict[str, Any] = {"early": look, "wanted": wanted if fits == WANTED else None}
    check = partial(named_swap, swap=flow.swap)  # an impossible swap is said before anything is fitted
    with open_session(model, study, options, where, check=check, progress=progress, **hooks) as session:
        clock.mark("fits and gradients")
        early.first(lambda: damage_answer(session, flow.bits, flow.swap), "measuring a sample")
        session.references(progress)
        drawn = draw(session, sample.design, sample.samples, sample.seed)
        new = session.measure(drawn, "sample", progress)
        clock.mark("sample")
        found = study.get("front")
        asked = SearchOptions(budget, seed=sample.seed, front=flow.front)
        if found is not None and not new and _answers(found, asked, session.protocol.objective):
            front = Front.from_dict(found)  # everything was there: nothing is searched twice
        else:
            front = find_in(session, asked, progress)
            early.page("checking the ranking by real swaps")
        clock.mark("search")
        if flow.swaps:  # last: real swaps check the layers that the ranking puts first
            validate_in(session, flow.swaps, flow.swap, flow.bits, sample.seed, progress)
        clock.mark("checks by swaps")
        try:
            sensitivity = explained(study, flow.bits, flow.swap, progress)
            write_json(out / "sensitivity.json", sensitivity.to_dict())
        except TooFewError as error:  # so few samples were asked for: the search needs none
            told(f"layers are not ranked: {error}")
    write_json(out / "front.json", front.to_list())
    write_json(out / "config.json", front.best.to_dict())
    progress("packing", 0, 1)
    packed = quantize(model, front.best, bank=where.bank, device=where.device)
    packed.save(out / "packed")
    protocol = study.protocol
    settings = ("eta", "guidance", "resolution", "scheduler", "frames", "inputs", "strength")
    sampling = {k: getattr(protocol, k) for k in settings}
    made = generate(
        packed.pipe if packed.is_own else str(out / "packed"),
        SAMPLES,
        protocol.seed,
        protocol.steps,
        protocol.conditions,
        where.device,
        progress=progress,
        **sampling,
    )
    if not packed.is_own or packed.pipe.images:
        write_bytes(out / "samples.png", thumbnail(made, len(made) // SAMPLES))
    progress("packing", 1, 1)
    early.end(clock.spent)
    write_report(study, out / "report", progress=progress)
    clock.mark("explaining and pages")
    planned = study.get("planned")
    if planned is not None:
        told(compared(Fitted.from_dict(planned), clock.spent))
    return front


def _answers(front: Mapping[str, Any], asked: SearchOptions, objective: str) -> bool:
    """Whether a stored front is that of a budget, an objective, and at least so many other budgets (which
    older ones do not tell)."""
    told = front["comparison"] or {}
    alike = front["budget"] == asdict(asked.budget) and told.get("metric", objective) == objective
    return bool(alike and told.get("front", OTHERS) >= asked.front)


def _within(
    model: AnyModel,
    study: Study,
    flow: FlowOptions,
    sample: SampleOptions,
    options: MeasureOptions,
    where: Where,
    told: Callable[[str], object],
    progress: Progress,
) -> tuple[FlowOptions, SampleOptions, MeasureOptions]:
    """With the settings that fit ``flow.within``."""
    found = settled_within(
        lambda: Planner(model, study, options, where, progress, flow.front), study, flow, sample, options
    )
    if "planned" not in study:
        with study.writing():
            study.set(planned=found.to_dict())
    told(found.text)
    protocol = options.protocol or (study.protocol if "protocol" in study else Protocol())
    return (
        replace(flow, swaps=found.swaps, fits=found.fits),
        replace(sample, samples=found.samples),
        replace(
            options,
            protocol=replace(protocol, images=found.images, steps=found.steps),
            space=options.space if found.space is None else found.space,
        ),
    )


def settled_within(
    planner: Callable[[], Planner],
    study: Study | None,
    flow: FlowOptions,
    sample: SampleOptions,
    options: MeasureOptions,
) -> Fitted:
    """Settings that fit ``flow.within``: those that the study was begun with, else the best that fit. Raises
    AquabitError where it was begun with another time, or with others than are given."""
    assert flow.within is not None
    if study is None or "planned" not in study:
        kept = (*flow.kept, *(("images", "steps") if study is not None and "fingerprint" in study else ()))
        begun_fits = _begun_fits(study)
        kept = (*kept, *(("fits",) if begun_fits is not None else ()))
        fits = flow.fits or begun_fits or ALL
        return fit_within(planner(), flow.within, sample, flow.swaps, options.space, kept, fits)
    begun, protocol = Fitted.from_dict(study.get("planned")), options.protocol or Protocol()
    asked: dict[str, Any] = {"samples": sample.samples, "swaps": flow.swaps, "fits": flow.fits}
    asked |= {"images": protocol.images, "steps": protocol.steps}
    for name, value in {"within": flow.within, **{k: asked[k] for k in flow.kept}}.items():
        if (known := getattr(begun, name)) != value:
            known, value = (span(t) if name == "within" else t for t in (known, value))
            option = {"swaps": "flips"}.get(name, name)
            raise AquabitError(
                f"{study.path} was begun with --{option} {known}, not {value}; use that or another folder"
            )
    return begun


def check_fits(study: Study | None, fits: str | None) -> None:
    """Raise AquabitError where formats were left out of a study that are to be fitted now, and where
    additive ones were fitted to all layers."""
    begun = _begun_fits(study)
    if begun is not None and fits not in (None, begun):
        assert study is not None
        raise AquabitError(
            f"{study.path} was begun with --fits {begun}, not {fits}; use that or another folder"
        )


def _begun_fits(study: Study | None) -> str | None:
    """Which additive formats a study fits; None where it has fitted none yet."""
    if study is None:
        return None
    if study.get("formats") == WANTED:
        return WANTED
    if "space" not in study:
        return None
    space, known = SearchSpace.from_dict(study.get("space")), study.features()
    cells = ((k, str(s)) for k, row in space.choices.items() for s in row if s.additive)
    return ALL if any(cell in known for cell in cells) else None


class _Clock:
    """Seconds of the parts of a run."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What passed since the last mark was this."""
        now = time.perf_counter()
        self.spent[part], self.last = self.spent.get(part, 0.0) + now - self.last, now


@dataclass(frozen=True)
class _Early:
    """Answers while a run goes on: first.json, and the page as far as it is."""

    study: Study
    out: Path
    told: Callable[[str], object]
    progress: Progress

    def first(self, answer: Callable[[], FirstAnswer | None], coming: str) -> None:
        """Make an answer from damages, store and show it; nothing where the study knows better already."""
        if "sensitivity" in self.study:
            return
        found = answer()
        if found is not None:
            self.study.set(first=found.to_dict())
            write_json(self.out / "first.json", found.to_dict())
            if found.config is not None:
                write_json(self.out / "first-config.json", found.config)
            self.told(f"{found.text} (page: {self.out / 'report' / 'index.html'})")
        self.page(coming)

    def page(self, coming: str) -> None:
        """The page, which says that the run goes on and what comes next."""
        if "sensitivity" not in self.study:
            with self.study.writing():
                self.study.set(running=coming)
            write_report(self.study, self.out / "report", progress=self.progress)

    def end(self, spent: Mapping[str, float]) -> None:
        """No more is to come; where the answer is new, what it took so far is kept."""
        with self.study.writing():
            self.study.set(running=None)
            if self.study.get("spent") is None:
                self.study.set(spent={part: round(seconds, 1) for part, seconds in spent.items()})


def measure(
    model: AnyModel,
    study: Study,
    samples: int = 120,
    *,
    configs: Sequence[QuantConfig] | None = None,
    sample_seed: int = 0,
    design: str = DEFAULT,
    shard: str | None = None,
    progress: Progress = no_progress,
    **options: Unpack[RunOptions],
) -> int:
    """Measure ``samples`` configurations of a design (``sensitivity.designs.DESIGNS``) in total, or
    ``configs``, references first; the number of new measurements. In ``workers`` processes, or on the cluster
    at a ``ray`` address (auto, local, host:port). Protocol, space and quality: see
    ``measuring.settings.MeasureOptions``; workers, device, dtype, bank and ray: see
    ``measuring.where.Where``; ``target``: see ``space.make_space``.

    Measured again, only what is missing is made: interrupted anywhere, the same call continues, and with more
    samples it adds to them. Raises AquabitError for an unknown design, and for a shard of one that depends on
    what was measured.
    """
    sample = SampleOptions(samples, sample_seed, design, shard)
    how, where = _measured(options)
    return measure_model(model, study, sample, how, where, configs, progress)


def measure_model(
    model: AnyModel,
    study: Study,
    sample: SampleOptions,
    options: MeasureOptions,
    where: Where = HERE,
    configs: Sequence[QuantConfig] | None = None,
    progress: Progress = no_progress,
) -> int:
    """``measure`` with values."""
    with open_session(model, study, options, where, progress=progress) as session:
        return _measure_in(session, sample, configs, progress)


def _measure_in(
    session: Session, sample: SampleOptions, configs: Sequence[QuantConfig] | None, progress: Progress
) -> int:
    """References, then what is drawn, in an open session."""
    study, samples = session.study, sample.samples
    before = study.known(session.protocol)
    drawn: list[QuantConfig] | None = None  # a design that depends on measurements draws as they are made
    if configs is not None or not sample.adaptive:
        every = draw(session, sample.design, samples, sample.seed) if configs is None else configs
        for config in every:
            _check_config(session, config)
        drawn = shard_of(every, sample.shard)
    asked = {c.digest for c in (*session.first(), *(drawn or ()))} - before
    missing = len(asked)
    if drawn is None:
        missing += max(0, samples - len(study.measurements(session.protocol, "sample", failed=True)))
    start_plan(study, samples, sample.name, sample.shard, missing)
    session.references(progress)
    if drawn is None:
        measure_disagreement(session, samples, sample.seed, progress)
    else:
        session.measure(drawn, "sample", progress)
    return len(study.known(session.protocol) - before)


def export_files(
    pipe: AnyModel,
    config: QuantConfig,
    to: str,
    out: str | Path,
    *,
    bank: str | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> list[str]:
    """Write a model as a program of ``exports.WRITERS`` reads it, with the weights that ``quantize`` would
    pack; what is lost or worth saying, a sentence each. Of several components that were quantized together
    (``load(..., component=...)``) each is written by itself: ``out/NAME`` where the program reads folders,
    else beside each other, as ``STEM-NAME.ENDING``.

    Raises AquabitError, before anything is fitted, for an unknown program, a configuration of another model,
    what the program cannot hold, and a place that the model is read from or that holds something else.
    """
    check_known(to)
    if to not in WRITERS:
        raise AquabitError(f"{to} gets a configuration, not files with weights; use exports.export_config")
    for source in sources_of(pipe):
        check_apart(out, source)
    writer = WRITERS[to]
    check_writable(out, folder=writer.folder)

    def check(network: nn.Module, graph: LayerGraph) -> None:
        check_layers(config, graph)
        check_activations(config, TARGETS[to].beside)
        for part, one in each_network(Exported(network, config, graph)).items():
            place = place_of(out, part, folder=writer.folder)
            check_replaceable(place, to, writer.may_replace)
            writer.check(one)

    found = coded(pipe, config, check=check, bank=bank, device=device, progress=progress)
    whole, said = Exported(found.network, config, found.graph, found.weights), list[str]()
    for part, one in each_network(whole).items():
        place = place_of(out, part, folder=writer.folder)
        before = f"{place}: " if part else ""
        said += [before + sentence for sentence in writer.write(one, place)]
    return said
