"""The verbs that join the packages: validate, find, quantize, generate, run. The command line and ``import
aquabit`` both call these."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from aquabit.measuring.evaluator import thumbnail
from aquabit.measuring.session import Session, open_session
from aquabit.packing import Model, generate, quantize
from aquabit.quality import QualityOptions
from aquabit.reports import report as write_report
from aquabit.scheme import AquabitError, Budget, Progress, Protocol, QuantConfig, no_progress
from aquabit.search import (
    FRESH_BLOCKS,
    Front,
    Search,
    SearchOptions,
    activation_choices,
    choose_winner,
    measure_front,
    propose,
)
from aquabit.search.options import fixed_act
from aquabit.sensitivity.correction_gain import noise_facts, search_corrected
from aquabit.sensitivity.designs import DEFAULT, Design, draw, measure_disagreement, shard_of
from aquabit.sensitivity.effects.context_effects import measure_in_context
from aquabit.sensitivity.effects.predicted import named_swap
from aquabit.sensitivity.effects.validation import validate_in
from aquabit.sensitivity.result import Sensitivity, explain, save
from aquabit.study import Study
from aquabit.study_status import start_plan

IN_CONTEXT = 4  # contexts in which ``run`` sees the output errors of every layer's swap


def _source(study: Study, pipe: Model | None) -> Model:
    return pipe if pipe is not None else str(study.need("model", "run `aquabit measure MODEL --study` first"))


def validate(
    study: Study,
    flips: int = 40,
    swap: str | None = None,
    bits: float = 3.0,
    *,
    pipe: Model | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    **options: Any,
) -> Sensitivity:
    """Measure ``flips`` real (layer, context) swaps on seeds of their own and set them beside the predicted
    effects: half of the layers that the ranking puts first, half drawn at random. ``swap``: "A:B" (default:
    ``effects.default_swap``).

    ``pipe`` is needed where the study's model was an object; ``options`` are ``open_session``'s (workers,
    device, bank).
    """
    with open_session(
        _source(study, pipe), study, progress=progress, check=lambda s: named_swap(s, swap), **options
    ) as session:
        validate_in(session, flips, swap, bits, seed, progress)
    return explained(study, bits, swap, progress)


def see_in_context(
    study: Study,
    contexts: int = IN_CONTEXT,
    bits: float = 3.0,
    swap: str | None = None,
    *,
    pipe: Model | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    **options: Any,
) -> None:
    """Run every layer's swap in good configurations near ``bits`` on stored inputs, so that ``explain`` knows
    what layers do in context.

    Costs about a fifteenth of a measurement for each training measurement and each of 2 x layers x
    ``contexts`` configurations. Raises AquabitError for fewer than 2 contexts.
    """
    if contexts < 2:
        raise AquabitError(f"contexts is {contexts}; an average needs at least 2")
    with open_session(
        _source(study, pipe), study, progress=progress, check=lambda s: named_swap(s, swap), **options
    ) as session:
        measure_in_context(session, contexts, bits, swap, seed, progress)


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
    pipe: Model | None = None,
    rounds: int | None = None,
    per_round: int = 8,
    seed: int = 0,
    method: str = "program",
    screen: int = 4,
    against: Sequence[QuantConfig] = (),
    progress: Progress = no_progress,
    **options: Any,
) -> Front:
    """The best configuration under a hard budget, and a front around it, packed, on fresh seeds; the winner
    without and with noise correction. Stored in the study.

    The integer program over the study's damages gives an answer for every budget before anything is measured;
    it is refined in context, and judged in pairs beside uniform families, one format a layer, everything that
    the study measured, and ``against``. ``latency_ms`` limits a denoiser call with one sample at the model's
    own size, on this machine with torch's threads. ``correction`` (as "cnc+bc"): candidates are measured and
    chosen after it, in a study that was measured without (``search_corrected``); a study that was measured
    with one needs none. ``method``, ``rounds``, ``per_round`` and ``screen``: see ``search.SearchOptions``.
    Raises AquabitError for a budget that the space cannot meet (both ends are named), and for a configuration
    of ``against`` that is of another model.
    """
    budget = Budget(
        bits=3.0 if not any((bits, bytes, bops, latency_ms)) else bits,
        bytes=bytes,
        bops=bops,
        latency_ms=latency_ms,
    )
    named = [(f"given {i}", c) for i, c in enumerate(against, 1)]
    return search(
        study,
        SearchOptions(budget, method, rounds, per_round, screen, seed, named),
        correction=correction,
        pipe=pipe,
        progress=progress,
        **options,
    )


def search(
    study: Study,
    options: SearchOptions,
    *,
    correction: str | None = None,
    pipe: Model | None = None,
    progress: Progress = no_progress,
    told: Callable[[str], object] = lambda _: None,
    **where: Any,
) -> Front:
    """``find`` with its options as one value; ``told`` gets what is to be said before anything is
    measured, ``where`` are ``open_session``'s (workers, device, bank)."""
    with open_session(_source(study, pipe), study, progress=progress, **where) as session:
        _check(session, options)
        if correction is not None:
            search_corrected(session, correction, progress)
        return find_in(session, options, progress, told)


def find_in(
    session: Session,
    options: SearchOptions,
    progress: Progress = no_progress,
    told: Callable[[str], object] = lambda _: None,
) -> Front:
    """The search of ``find`` in an open session."""
    _check(session, options)
    search = Search(session, options, progress, told)
    propose(search)
    front = measure_front(search, *choose_winner(search))
    noise = noise_facts(session, front.best, [session.protocol.block(b) for b in FRESH_BLOCKS], progress)
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
        session.space.check(config, extra_schemes=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with undefined numbers refused, written atomically."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error


def run(
    model: Model,
    out: str | Path,
    bits: float = 3.0,
    samples: int = 120,
    flips: int = 40,
    *,
    protocol: Protocol | None = None,
    space: Mapping[str, Any] | None = None,
    workers: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    bank: str | None = None,
    quality: QualityOptions | None = None,
    sample_seed: int = 0,
    swap: str | None = None,
    design: str = DEFAULT,
    progress: Progress = no_progress,
) -> Front:
    """The whole flow into a folder; run again, it continues where it stopped.

    Writes study.db, sensitivity.json, front.json, config.json, packed/, samples.png and report/index.html.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AquabitError(f"the folder {out} cannot be made: {error.strerror}") from error
    study = Study(out / "study.db")
    given: dict[str, Any] = {
        "protocol": protocol,
        "space_options": dict(space) if space else None,
        "quality": quality,
    }
    given["check"] = lambda made: named_swap(
        made, swap
    )  # an impossible swap is said before anything is fitted
    with open_session(
        model, study, workers=workers, device=device, dtype=dtype, bank=bank, progress=progress, **given
    ) as session:
        session.costs.check(Budget(bits=bits), max(session.space.activations))
        session.references(progress)
        new = session.measure(draw(session, design, samples, sample_seed), "sample", progress)
        found = study.get("front")
        if found is not None and not new and found["budget"] == asdict(Budget(bits=bits)):
            front = Front.from_dict(found)  # everything was there: nothing is searched twice
        else:
            front = find_in(session, SearchOptions(Budget(bits=bits), seed=sample_seed), progress)
        measure_in_context(session, IN_CONTEXT, bits, swap, progress=progress)
        validate_in(
            session, flips, swap, bits, sample_seed, progress
        )  # last: real swaps check the layers that the ranking puts first
        sensitivity = explained(study, bits, swap, progress)
    write_json(out / "sensitivity.json", sensitivity.to_dict())
    write_json(out / "front.json", front.to_list())
    (out / "config.json").write_text(front.best.to_json())
    progress("packing", 0, 1)
    quantize(model, front.best, bank=bank, device=device).save(out / "packed")
    (out / "samples.png").write_bytes(
        thumbnail(
            generate(
                str(out / "packed"),
                32,
                study.protocol.seed,
                study.protocol.steps,
                study.protocol.conditions,
                device,
                progress=progress,
            )
        )
    )
    progress("packing", 1, 1)
    write_report(study, out / "report", progress=progress)
    return front


def measure(
    model: str | DiffusionPipeline,
    study: Study,
    samples: int = 120,
    *,
    configs: Sequence[QuantConfig] | None = None,
    protocol: Protocol | None = None,
    space: dict[str, Any] | None = None,
    workers: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    bank: str | None = None,
    quality: QualityOptions | None = None,
    ray: str | None = None,
    sample_seed: int = 0,
    design: str = DEFAULT,
    shard: str | None = None,
    progress: Progress = no_progress,
) -> int:
    """Measure ``samples`` configurations of a design (``sensitivity.designs.DESIGNS``) in total, or
    ``configs``, references first; the number of new measurements. In ``workers`` processes, or on the cluster
    at a ``ray`` address (auto, local, host:port).

    Measured again, only what is missing is made: interrupted anywhere, the same call continues, and with more
    samples it adds to them. Raises AquabitError for an unknown design, and for a shard of one that depends on
    what was measured.
    """
    chosen = Design.parse(design)
    if chosen.name == "disagreement" and shard is not None:
        raise AquabitError(
            f"design disagreement chooses by all measurements, so shard {shard} cannot be made alone; shard"
            " another design"
        )
    with open_session(
        model,
        study,
        protocol=protocol,
        space_options=space,
        workers=workers,
        device=device,
        dtype=dtype,
        bank=bank,
        quality=quality,
        ray=ray,
        progress=progress,
    ) as session:
        before = study.known(session.protocol)
        fixed = configs is not None or chosen.name != "disagreement"
        drawn = (
            list(configs)
            if configs is not None
            else draw(session, design, samples, sample_seed)
            if fixed
            else []
        )
        for config in drawn:
            session.space.check(config, extra_schemes=True)
        drawn = shard_of(drawn, shard)
        asked = {c.digest for c in (*session.first(), *drawn)} - before
        missing = (
            len(asked)
            if fixed
            else len(asked)
            + max(0, samples - len(study.measurements(session.protocol, "sample", failed=True)))
        )
        start_plan(study, samples, chosen.name, shard, missing)
        session.references(progress)
        if fixed:
            session.measure(drawn, "sample", progress)
        else:
            measure_disagreement(session, samples, sample_seed, progress)
        return len(study.known(session.protocol) - before)
