"""A session on a study: the model, its space and protocol, and the pool that measures and fits for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import networkx as nx
from diffusers import DiffusionPipeline

from aquabit.cost import CostModel
from aquabit.graph import to_json
from aquabit.measuring.evaluator import Evaluator, own_source
from aquabit.measuring.output_errors import stored
from aquabit.measuring.pools import InlinePool, Pool, Task, WorkerPool
from aquabit.measuring.ray_pool import RayPool
from aquabit.pipelines import (
    Adapter,
    check_scheduler,
    denoiser_of,
    family_notes,
    load,
    scheduler_named,
    trace,
)
from aquabit.pipelines.sizes import image_size
from aquabit.quality import QualityMeter, QualityOptions, Source
from aquabit.quality.meter import check_available, default_objective
from aquabit.quant.bank import Bank
from aquabit.quant.correction.corrector import check_correction
from aquabit.quant.model import fingerprint
from aquabit.scheme import (
    FP,
    AquabitError,
    Calibration,
    Progress,
    Protocol,
    QuantConfig,
    Scheme,
    act_code,
    act_text,
    digest,
    no_progress,
)
from aquabit.space import SearchSpace, make_space
from aquabit.study import Study

UNIFORM = (
    "usq2",
    "usq3",
    "usq4",
)  # measured beside samples, output-aware where anything is: what one would take without a search
NO_REAL_IMAGES = (
    "{} names no real images, so the objective is {}, the distance to its own full-precision images; for FID"
    " give --reference DIR with --features inception=FILE, or choose psnr or ssim by --objective"
)
OUTPUTS_TASK = 8  # configurations whose output errors are one task: an interruption loses at most so many


@dataclass(frozen=True)
class Model:
    """A traced model, ready to be measured."""

    reference: str
    fingerprint: str
    graph: nx.DiGraph
    source: str | DiffusionPipeline  # what workers load
    scheduler: Any  # the pipeline's own
    own: Source | None  # its feature extractor and real images; None where it names none
    prompts: bool  # it makes images from text
    size: tuple[int, int] | None  # of its images, in pixels
    notes: tuple[str, ...] = ()  # what is to be said of a pipeline of no known family


def open_model(model: str | DiffusionPipeline) -> Model:
    """Load, check and trace a model; raises AquabitError for one that cannot be measured."""
    pipe = load(model)
    name = str(model) if isinstance(model, str) else type(pipe).__name__
    adapter = Adapter(pipe)
    own, prompts = own_source(adapter), adapter.kind == "prompt"
    notes = tuple(family_notes(pipe))
    return Model(
        name,
        fingerprint(denoiser_of(pipe)),
        trace(pipe),
        model,
        pipe.scheduler,
        own,
        prompts,
        image_size(pipe),
        notes,
    )


def protocol_for(
    model: Model, protocol: Protocol | None, gauge: QualityMeter, progress: Progress = no_progress
) -> Protocol:
    """A protocol with what ``gauge`` measures by; without real images the default objective is the distance
    to the full-precision images.

    Raises AquabitError for an objective that cannot be measured, saying what it needs.
    """
    given = protocol or Protocol()
    check_scheduler(given.scheduler)
    given = replace(given, measures=gauge.measures)
    given.direction()  # raises for an unknown objective
    available, objective = gauge.available(model.prompts), given.objective
    if objective == Protocol.objective and objective not in available:
        objective = default_objective(available)
        if objective == "mse":
            gauge.notes.append(NO_REAL_IMAGES.format(model.reference, objective))
    check_available(objective, available, model.reference)
    size = model.size if given.resolution is None else (given.resolution, given.resolution)
    return replace(given, reference=gauge.reference_digest(size, progress), objective=objective)


def check_correctable(model: Model, protocol: Protocol, correction: str | None) -> None:
    """Raise AquabitError where the sampler of a protocol cannot be corrected so, before anything is fitted
    or measured."""
    check_correction(scheduler_named(model.scheduler, protocol.scheduler), correction, protocol.eta)


@contextmanager
def pool_for(
    model: Model,
    bank: Bank,
    workers: int,
    device: str,
    dtype: str,
    quality: QualityOptions | None = None,
    ray: str | None = None,
) -> Iterator[Pool]:
    """An inline pool for one worker, else fresh processes, or the cluster at a Ray address; an in-memory
    model reaches them through a temporary folder."""
    if workers < 1:
        raise AquabitError(f"workers is {workers}; it must be at least 1")
    if ray is not None and workers != 1:
        raise AquabitError(
            f"--workers {workers} counts processes of this machine, --ray takes every slot of a cluster; give"
            " one of them"
        )
    if workers == 1 and ray is None:
        yield InlinePool(
            Evaluator(model.source, model.graph, bank, model.fingerprint, device, dtype, quality)
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        source = model.source
        if isinstance(source, DiffusionPipeline):
            source.save_pretrained(folder)
            source = folder
        begin = {
            "task": "begin",
            "model": source,
            "graph": to_json(model.graph),
            "bank": str(bank.folder),
            "fingerprint": model.fingerprint,
            "device": device,
            "dtype": dtype,
            "quality": quality.to_dict() if quality else None,
        }
        pool: Pool = WorkerPool(workers, begin) if ray is None else RayPool(ray, begin)
        try:
            yield pool
        finally:
            pool.close()


def fit_all(
    pool: Pool, study: Study, space: SearchSpace, protocol: Protocol, progress: Progress = no_progress
) -> None:
    """Every (layer, scheme) of the space into the bank, and what it does alone into the study; what is
    known is skipped."""
    known = study.features()
    schemes = {
        k: [s for s in row if s != FP and "damage" not in known.get((k, str(s)), {})]
        for k, row in space.choices.items()
    }
    choices = [a for a in space.act_choices if a != 16]
    probes = {
        k: [act_code(a) for a in choices if row != (FP,) and (k, act_text(a)) not in known]
        for k, row in space.choices.items()
    }
    acts = sorted(space.activations, reverse=True)
    calibration = None if space.calibration is None else asdict(space.calibration)
    common = {
        "task": "fit",
        "acts": acts,
        "protocol": protocol.to_dict(),
        "calibration": calibration,
        "step_groups": space.to_dict().get("step_groups"),
    }
    layers = [k for k in space.choices if schemes[k] or probes[k]]
    if not layers:
        return
    portions: list[list[str]] = [[k] for k in layers]
    if calibration is not None:  # H of a portion is measured in one run
        progress("calibrating", 0, 1)
        aware = [k for k in layers if any(s.calibrated for s in space.choices[k])]
        request: Task = {"task": "chunks", "layers": aware, "acts": acts, "calibration": calibration}
        portions = [part for _, found in pool.run([request]) for whole in found for part in _parts(whole)]
        portions += [[k] for k in layers if k not in aware]
        progress("calibrating", 1, 1)
    own = {k: [str(s) for s in schemes[k] if not s.shared] for k in layers}
    tasks: list[Task] = [
        {**common, "schemes": {k: own[k] for k in part}, "probes": {k: probes[k] for k in part}}
        for part in portions
    ]
    together: dict[str, dict[str, list[str]]] = {}  # layers that share codebooks are fitted together
    for k in layers:
        for scheme in schemes[k]:
            if scheme.shared:
                together.setdefault(space.codebook(k), {}).setdefault(k, []).append(str(scheme))
    tasks += [{**common, "schemes": row, "probes": {k: [] for k in row}} for row in together.values()]
    for done, (task, found) in enumerate(pool.run(tasks), 1):
        study.add_features(
            {(layer, scheme): value for layer, facts in found.items() for scheme, value in facts.items()}
        )
        worst = max(
            (v.get("output", v.get("error", 0.0)) for facts in found.values() for v in facts.values()),
            default=0.0,
        )
        progress(
            f"fitting and probing: {next(iter(task['schemes']))}, largest error {worst:.3f}", done, len(tasks)
        )


def _parts(layers: list[str], size: int = 6) -> list[list[str]]:
    """Small portions, so that workers share the work evenly and an interruption loses little."""
    return [layers[i : i + size] for i in range(0, len(layers), size)]


def measure_configs(
    pool: Pool,
    study: Study,
    costs: CostModel,
    configs: Iterable[QuantConfig],
    protocols: Sequence[Protocol],
    kind: str,
    progress: Progress = no_progress,
    what: str = "measuring",
    packed: bool = False,
) -> int:
    """Measure what the study does not have yet, one transaction each; the number of new measurements.
    ``packed``: as it runs in the end, from codes on the kernels; else with decoded weights, which is
    quicker to set up."""
    tasks: list[Task] = []
    pending: dict[tuple[str, str], QuantConfig] = {}
    listed = {c.digest: c for c in configs}
    for protocol in protocols:
        study.add_protocol(protocol)
        known = study.known(protocol)
        for key, config in listed.items():
            if key not in known:
                pending[key, protocol.digest] = config
                tasks.append(
                    {
                        "task": "measure",
                        "config": config.to_dict(),
                        "protocol": protocol.to_dict(),
                        "packed": packed,
                    }
                )
    progress(what, 0, len(tasks))
    for done, (_, (measurement, png)) in enumerate(pool.run(tasks), 1):
        config = pending[measurement.config, measurement.protocol]
        study.record(config, measurement, kind, costs.totals_of(config), png)
        progress(what, done, len(tasks))
    return len(tasks)


def uniform_references(space: SearchSpace) -> list[QuantConfig]:
    """What random configurations are seen beside: one scheme for all layers, and the layers' additive
    formats at each level they have."""
    act = max(space.activations)
    levels = sorted(
        {round(2 * space.code_bits(k, s)) / 2 for k, row in space.choices.items() for s in row if s.additive}
    )
    first = [Scheme.parse(s + ("h" if any(q.calibrated for q in space.schemes) else "")) for s in UNIFORM] + [
        Scheme.parse("usq8")
    ]
    own = [
        s for s in space.schemes if s.record.even and all(s in space.choices[k] for k in space.free_layers())
    ]
    return [
        *(space.uniform(s, act) for s in dict.fromkeys((*first, *own))),
        *(space.level("aq", b, act) for b in levels),
    ]


class Session:
    """A model, a study bound to it, and a pool: what every verb that makes images works with. Use
    ``open_session``."""

    def __init__(
        self,
        model: Model,
        study: Study,
        space: SearchSpace,
        protocol: Protocol,
        pool: Pool,
        bank: Bank,
        device: str = "cpu",
        quality: QualityOptions | None = None,
    ):
        self.quality = quality
        self.model, self.study, self.space, self.protocol, self.pool, self.bank = (
            model,
            study,
            space,
            protocol,
            pool,
            bank,
        )
        self.costs, self.device = CostModel(model.graph, space), device
        self._here: Evaluator | None = pool.evaluator if isinstance(pool, InlinePool) else None

    @property
    def here(self) -> Evaluator:
        """An evaluator in this process (workers have their own), made when it is first needed: latencies
        are measured where nothing else runs."""
        if self._here is None:
            model = self.model
            self._here = Evaluator(
                model.source,
                model.graph,
                self.bank,
                model.fingerprint,
                self.device,
                self.protocol.dtype,
                self.quality,
            )
        return self._here

    def measure(
        self,
        configs: Iterable[QuantConfig],
        kind: str,
        progress: Progress = no_progress,
        protocols: Sequence[Protocol] | None = None,
        what: str = "measuring",
        packed: bool = False,
    ) -> int:
        return measure_configs(
            self.pool,
            self.study,
            self.costs,
            configs,
            protocols or [self.protocol],
            kind,
            progress,
            what,
            packed,
        )

    def outputs(
        self, configs: Iterable[QuantConfig], progress: Progress = no_progress
    ) -> dict[str, dict[str, Any]]:
        """digest -> output errors of configurations on stored inputs (``fidelity.OutputErrors``); what the
        study has is not measured again.

        Each costs about a fifteenth of a measurement.
        """
        return {key: values[0] for key, values in self.outputs_of(configs, (0,), progress).items()}

    def outputs_of(
        self, configs: Iterable[QuantConfig], parts: Sequence[int], progress: Progress = no_progress
    ) -> dict[str, list[dict[str, Any]]]:
        """digest -> output errors on each of several parts of stored inputs (``fidelity.stored``), in
        their order."""
        listed = {c.digest: c for c in configs}
        inputs = {part: stored(self.protocol, part)[0].digest for part in parts}
        known = {part: self.study.outputs(inputs[part]) for part in parts}
        tasks: list[Task] = []
        for part in parts:
            missing = [c for key, c in listed.items() if key not in known[part]]
            for i in range(0, len(missing), OUTPUTS_TASK):
                some = [c.to_dict() for c in missing[i : i + OUTPUTS_TASK]]
                tasks.append(
                    {"task": "outputs", "configs": some, "protocol": self.protocol.to_dict(), "part": part}
                )
        done, total = 0, sum(len(t["configs"]) for t in tasks)
        for task, values in self.pool.run(tasks):
            found = {QuantConfig.from_dict(c).digest: v for c, v in zip(task["configs"], values, strict=True)}
            self.study.add_outputs(inputs[task["part"]], found)
            known[task["part"]].update(found)
            progress("output errors", done := done + len(found), total)
        return {key: [known[part][key] for part in parts] for key in listed}

    def slopes(
        self,
        config: QuantConfig,
        weights: Sequence[float],
        parts: Sequence[int],
        progress: Progress = no_progress,
    ) -> list[dict[str, Any]]:
        """``Evaluator.slopes`` of a configuration on each part of stored inputs, for all that the space
        offers; what the study has is not made again. Each costs about three output errors, and decoding
        every weight of the space."""
        choices = {layer: [str(s) for s in row] for layer, row in self.space.choices.items() if len(row) > 1}
        share = [float(f"{w:.9g}") for w in weights]
        keys = {
            part: digest(["slopes", stored(self.protocol, part)[0].digest, share, choices]) for part in parts
        }
        known = {part: self.study.outputs(key).get(config.digest) for part, key in keys.items()}
        tasks: list[Task] = [
            {
                "task": "slopes",
                "config": config.to_dict(),
                "protocol": self.protocol.to_dict(),
                "part": part,
                "weights": share,
                "choices": choices,
            }
            for part, value in known.items()
            if value is None
        ]
        for done, (task, value) in enumerate(self.pool.run(tasks), 1):
            self.study.add_outputs(keys[task["part"]], {config.digest: value})
            known[task["part"]] = value
            progress("slopes in context", done, len(tasks))
        return [value for part in parts if (value := known[part]) is not None]

    def first(self) -> list[QuantConfig]:
        """What is measured before anything else: full precision (paired metrics need its images), then
        uniform configurations."""
        return [self.space.full_precision(), *uniform_references(self.space)]

    def references(
        self, progress: Progress = no_progress, protocols: Sequence[Protocol] | None = None
    ) -> None:
        full, *uniform = self.first()
        self.measure([full], "reference", progress, protocols, "full precision")
        self.measure(uniform, "uniform", progress, protocols, "uniform references")


def meter_of(
    opened: Model, study: Study | None, quality: QualityOptions | None, bank: Bank, device: str
) -> QualityMeter:
    """What images are measured with: a study's own options where none are given."""
    stored = QualityOptions.from_dict(study.get("quality") if study is not None else None)
    return QualityMeter(quality or stored, opened.own, bank.folder, device)


def settings(
    opened: Model,
    study: Study | None,
    protocol: Protocol | None,
    space_options: dict[str, Any] | None,
    dtype: str,
    gauge: QualityMeter,
    progress: Progress = no_progress,
) -> tuple[Protocol, SearchSpace]:
    """The protocol and the space to measure with: a study's own where nothing else is given."""
    if study is not None and protocol is None and "protocol" in study:
        given = study.protocol
    else:
        given = protocol_for(opened, replace(protocol or Protocol(), dtype=dtype), gauge, progress)
    if (
        study is not None
        and space_options is None
        and "space" in study
        and study.get("fingerprint") == opened.fingerprint
    ):
        space = SearchSpace.from_dict(study.get("space"))
    else:
        options = {"calibration": Calibration.of(given), **(space_options or {})}
        space = make_space(opened.graph, opened.fingerprint, opened.reference, **options)
    check_correctable(opened, given, space.correction)
    if space.steps is not None and space.steps.total != given.steps:
        raise AquabitError(
            f"the step groups are of {space.steps.total} steps, the images are made in {given.steps}; give"
            " both the same number"
        )
    return given, space


@contextmanager
def open_session(
    model: str | DiffusionPipeline,
    study: Study,
    *,
    protocol: Protocol | None = None,
    space_options: dict[str, Any] | None = None,
    workers: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    bank: str | None = None,
    quality: QualityOptions | None = None,
    ray: str | None = None,
    check: Callable[[SearchSpace], object] | None = None,
    progress: Progress = no_progress,
) -> Iterator[Session]:
    """Bind ``study`` to the model, hold its writer lock, start the pool, and see that every scheme is fitted.

    ``protocol=None`` continues the study's own; ``quality`` (what images are measured with) too. ``ray``: the
    address of a Ray cluster that makes the images, instead of ``workers``. ``check`` sees the space before
    anything is fitted, and may raise. Raises AquabitError for a study of another model, protocol or space.
    """
    opened = open_model(model)
    with study.writing():
        store = Bank(bank)
        gauge = meter_of(opened, study, quality, store, device)
        given, space = settings(opened, study, protocol, space_options, dtype, gauge, progress)
        if check is not None:
            check(space)
        if opened.notes:
            study.set(family_notes=list(opened.notes))
        study.begin(opened.reference, opened.fingerprint, to_json(opened.graph), space.to_dict(), given)
        if gauge.options or gauge.notes:
            notes = gauge.notes or (study.get("quality") or {}).get("notes", [])
            study.set(quality={**gauge.options.to_dict(), "notes": notes})
        with pool_for(opened, store, workers, device, given.dtype, gauge.options, ray) as pool:
            session = Session(opened, study, space, given, pool, store, device, gauge.options)
            fit_all(pool, study, space, given, progress)
            yield session
            store.trim()
