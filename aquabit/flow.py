"""The verbs that join the packages: validate, find, quantize, generate, run. The command line and ``import aquabit`` both call these."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from aquabit.packing import Model, generate, quantize
from aquabit.quality import QualityOptions
from aquabit.reports import report as write_report
from aquabit.scheme import LOWER_IS_BETTER, AquabitError, Budget, Progress, Protocol, QuantConfig, no_progress
from aquabit.search import (
    Bound,
    Front,
    FrontMember,
    activation_choices,
    check_method,
    choose,
    elect,
    find_candidates,
    interval,
    paired_difference,
    remeasure_plan,
    smallest_uniform,
    uniform_within,
)
from aquabit.sensitivity.attribution import Sensitivity, explain, save
from aquabit.sensitivity.bounds import EnsembleBound
from aquabit.sensitivity.correction import correction_shift, noise_facts, search_corrected
from aquabit.sensitivity.evaluator import thumbnail
from aquabit.sensitivity.in_context import measure_in_context, screened
from aquabit.sensitivity.latency import latency_table, packed_latencies
from aquabit.sensitivity.measure import Session, open_session, uniform_references
from aquabit.sensitivity.surrogate import FittedSurrogate, fit_from_study, training_table
from aquabit.sensitivity.validation import validate_in
from aquabit.study import Study

FINALISTS, SELECTION_BLOCKS, TRIES = 4, (2, 3), 3  # the best few are told apart on seeds that nothing was fitted to
SCREEN = 4  # configurations proposed for each that is measured
IN_CONTEXT = 4  # contexts in which ``run`` sees the output errors of every layer's swap
FRESH_BLOCKS = (11, 12, 13, 14, 15)  # what is reported; block 1 belongs to validation


def _source(study: Study, pipe: Model | None) -> Model:
    return pipe if pipe is not None else str(study.need("model", "run `aquabit measure MODEL --study` first"))


def validate(
    study: Study, flips: int = 40, swap: str = "usq4:usq2", bits: float = 3.0, *, pipe: Model | None = None, seed: int = 0,
    progress: Progress = no_progress, **options: Any,
) -> Sensitivity:  # fmt: skip
    """Measure ``flips`` real (layer, context) swaps on seeds of their own and set them beside the predicted effects.

    ``pipe`` is needed where the study's model was an object; ``options`` are ``open_session``'s (workers, device, bank).
    """
    with open_session(_source(study, pipe), study, progress=progress, **options) as session:
        validate_in(session, flips, swap, bits, seed, progress)
    return explained(study, bits, swap, progress)


def see_in_context(
    study: Study, contexts: int = IN_CONTEXT, bits: float = 3.0, swap: str = "usq4:usq2", *, pipe: Model | None = None, seed: int = 0,
    progress: Progress = no_progress, **options: Any,
) -> None:  # fmt: skip
    """Run every layer's swap in random contexts near ``bits`` on stored inputs, so that ``explain`` knows what layers do in context.

    Costs about a fifteenth of a measurement for each training measurement and each of 2 x layers x ``contexts`` configurations.
    Raises AquabitError for fewer than 2 contexts.
    """
    if contexts < 2:
        raise AquabitError(f"contexts is {contexts}; an average needs at least 2")
    with open_session(_source(study, pipe), study, progress=progress, **options) as session:
        measure_in_context(session, contexts, bits, swap, seed, progress)


def explained(
    study: Study, bits: float = 3.0, swap: str = "usq4:usq2", progress: Progress = no_progress, estimator: str = "gbdt"
) -> Sensitivity:
    """Sensitivities of a study, stored in it."""
    result = explain(study, bits, swap, progress=progress, estimator=estimator)
    with study.writing():
        save(study, result)
    return result


def find(
    study: Study, bits: float | None = None, *, bytes: int | None = None, bops: float | None = None, latency_ms: float | None = None,
    correction: str | None = None, pipe: Model | None = None, rounds: int = 2, per_round: int = 8, seed: int = 0, method: str = "program",
    screen: int = SCREEN, progress: Progress = no_progress, **options: Any,
) -> Front:  # fmt: skip
    """Search under a hard budget, measure the candidates, refit, repeat; then the front packed, on fresh seeds, and the winner without and
    with noise correction. Stored in the study.

    ``latency_ms`` limits a denoiser call with one sample at the model's own size, on this machine with torch's threads: the search adds up
    measured times of layers, and the winner's whole call is measured. Raises AquabitError for a budget that the space cannot meet (both
    ends are named) and for a study with too few measurements. ``correction`` (as "cnc+bc"): candidates are measured and chosen after it, in
    a study that was measured without (``search_corrected``); a study that was measured with one needs none. ``method``: "program" (integer
    program and local search) or "evolve" (NSGA-II; needs pymoo). ``screen``: configurations proposed for each that is measured; the errors
    of their denoiser outputs on stored inputs, a fifteenth of the cost of a measurement, choose among them (1: none of this).
    """
    if screen < 1:
        raise AquabitError(f"screen is {screen}; it must be at least 1 (1: every proposed configuration is measured)")
    check_method(method)
    budget = Budget(bits=3.0 if not any((bits, bytes, bops, latency_ms)) else bits, bytes=bytes, bops=bops, latency_ms=latency_ms)
    with open_session(_source(study, pipe), study, progress=progress, **options) as session:
        if correction is not None:
            search_corrected(session, correction, progress)
        return find_in(session, budget, rounds, per_round, seed, progress, method, screen)


def find_in(
    session: Session, budget: Budget, rounds: int, per_round: int, seed: int, progress: Progress, method: str = "program",
    screen: int = SCREEN,
) -> Front:  # fmt: skip
    study, space, metric = session.study, session.space, session.protocol.objective
    training_table(study, metric)  # too few measurements are said before anything is searched
    if budget.latency_ms is not None:
        session.costs = session.costs.timed(latency_table(session.here, space, progress, session.protocol))
    costs, open_ = session.costs, activation_choices(space, budget)
    costs.check(budget, max(open_) if len(open_) == 1 else None)
    sign = 1.0 if session.protocol.direction() == "min" else -1.0
    uniform = [
        space.uniform(s, max(space.activations))
        for s in space.schemes
        if s.kind == "usq" and all(s in space.choices[k] for k in space.free_layers())
    ]

    last: list[FittedSurrogate] = []

    def predict_factory() -> Any:
        last[:] = [fit_from_study(study)]
        return last[0].badness

    def bound(weights: np.ndarray, acts: np.ndarray, allowed: np.ndarray) -> Bound:
        return EnsembleBound(last[0].surrogate, last[0].encoder, weights, acts, allowed)

    def measured() -> list[tuple[QuantConfig, float]]:
        table, configs = study.measurements(session.protocol, failed=True), study.configs()
        ours = table[(table.kind != "reference") & (table.correction.fillna("") == (space.correction or "")) & table.tuned.isna()]
        values = sign * ours[metric].to_numpy(float)
        return [(configs[c], float(v)) for c, v in zip(ours.config, values, strict=True)]

    def measure(configs: list[QuantConfig]) -> None:
        session.measure(configs, "candidate", progress, what="measuring candidates")

    def judge(configs: list[QuantConfig]) -> np.ndarray:
        return screened(session, last[0], configs, progress)

    found = find_candidates(
        space, costs, budget, predict_factory, measure, measured, uniform, rounds=rounds, per_round=per_round, seed=seed, method=method,
        bound=bound, screen=judge if screen > 1 else None, pool=screen, progress=progress,
    )  # fmt: skip
    pairs = [(c, v) for c, v in measured() if np.isfinite(v)]
    chosen = _finalists(session, [c for c, _ in pairs], np.array([v for _, v in pairs]), budget, metric, sign, progress)
    proofs = [c.proof for c in found if c.proof is not None]
    front = replace(_front(session, *chosen, budget, metric, progress), proof=proofs[-1] if proofs else None)
    noise = noise_facts(session, front.best, [session.protocol.block(b) for b in FRESH_BLOCKS], progress)
    study.set(front=front.to_dict(), noise=noise)
    return front


def _finalists(
    session: Session, configs: list[QuantConfig], values: np.ndarray, budget: Budget, metric: str, sign: float, progress: Progress
) -> tuple[list[QuantConfig], QuantConfig]:
    """The front's configurations and its winner: the best few within the budget, and uniform ones that come near them, are measured again
    before one is chosen."""
    best = _best_few(session, configs, values, budget, progress)
    rivals = uniform_within(configs, list(values), session.costs, budget)
    if budget.latency_ms is not None:
        calls = packed_latencies(session.here, [configs[i] for i in rivals], progress, session.protocol)
        rivals = [i for i, call in zip(rivals, calls, strict=True) if call <= budget.latency_ms]
    protocols = [session.protocol.block(b) for b in SELECTION_BLOCKS]
    session.measure([session.space.full_precision()], "reference", progress, protocols, "full precision, selection seeds")

    def again(indices: list[int]) -> list[float]:
        session.measure([configs[i] for i in indices], "selection", progress, protocols, "telling finalists apart")
        blocks = _blocks(session, [configs[i] for i in indices], protocols, metric)
        return [float(np.mean([values[i], *(sign * v for v in blocks[configs[i].digest])])) for i in indices]

    sizes = [session.costs(c).bytes for c in configs]
    best_one, means = elect(best, rivals, list(values), sizes, again)
    winner, refined = configs[best_one], values.copy()
    refined[list(means)] = list(means.values())
    planned = [configs[i] for i in remeasure_plan(configs, list(refined), session.costs, budget)]
    return ([winner] if winner not in planned else []) + planned, winner


def _best_few(session: Session, configs: list[QuantConfig], values: np.ndarray, budget: Budget, progress: Progress) -> list[int]:
    """The best measured configurations within the budget, at most FINALISTS; each keeps a limit of latency in a whole measured call too.

    Raises AquabitError, saying why, where there is none.
    """
    left, best, calls = values.copy(), list[int](), list[float]()
    while len(best) < FINALISTS and len(calls) < TRIES * FINALISTS and np.isfinite(left).any():
        try:
            found = choose(configs, list(left), session.costs, budget)
        except AquabitError:
            break
        left[found] = np.nan
        if budget.latency_ms is not None:
            calls += packed_latencies(session.here, [configs[found]], progress, session.protocol)
        if budget.latency_ms is None or calls[-1] <= budget.latency_ms:
            best.append(found)
    if best:
        return best
    if budget.latency_ms is not None and calls:
        least = min(calls)
        raise AquabitError(
            f"the layers of {len(calls)} configurations add up to {budget.latency_ms:g} ms or less, but whole calls take {least:.3g} ms "
            f"or more; allow a latency of {1.05 * least:.3g}"
        )
    choose(configs, list(values), session.costs, budget)  # raises with the reason
    return best


def _blocks(session: Session, configs: Sequence[QuantConfig], protocols: Sequence[Protocol], metric: str) -> dict[str, list[float]]:
    """digest -> the metric on each block of seeds (NaN where it failed)."""
    table = session.study.measurements(failed=True)
    value = {(c, p): v for c, p, v in zip(table.config, table.protocol, table[metric], strict=True)}
    return {c.digest: [float(value.get((c.digest, p.digest), np.nan)) for p in protocols] for c in configs}


def _front(session: Session, members: list[QuantConfig], winner: QuantConfig, budget: Budget, metric: str, progress: Progress) -> Front:
    """Measure members, uniform baselines and full precision on fresh seeds."""
    space, costs = session.space, session.costs
    protocols = [session.protocol.block(b) for b in FRESH_BLOCKS]
    baseline = smallest_uniform(costs, space, "usq", costs(winner).bytes)
    uniforms = uniform_references(space)  # what each family reaches, beside the front
    every = list({c.digest: c for c in (*members, *([baseline] if baseline else []), *uniforms)}.values())
    session.measure([space.full_precision()], "reference", progress, protocols, "full precision, fresh seeds")
    session.measure(every, "fresh", progress, protocols, "the front on fresh seeds", packed=True)
    latency = packed_latencies(session.here, members, progress, session.protocol)
    fitted, rows = fit_from_study(session.study), []
    shift = correction_shift(session, metric, fitted.surrogate.target_)
    for config, call in zip(members, latency, strict=True):
        predicted = fitted.surrogate.to_units(fitted.surrogate.predict(fitted.encoder.encode([config])) + shift)
        found = {m: interval(_blocks(session, [config], protocols, m)[config.digest]) for m in _metrics(session)}
        rows.append(FrontMember.of(costs, config, {metric: float(np.ravel(predicted)[0])}, found, call))
    comparison = _comparison(session, winner, baseline, protocols, metric) if baseline else {}
    return Front(rows, budget, winner.digest, comparison).pruned(metric, session.protocol.direction() == "min")


def _metrics(session: Session) -> list[str]:
    known = session.study.measurements().columns
    return [m for m in known if m in LOWER_IS_BETTER or ":" in m]  # the user's own are named module:function


def _comparison(session: Session, winner: QuantConfig, uniform: QuantConfig, protocols: Sequence[Protocol], metric: str) -> dict[str, Any]:
    """The winner against the smallest uniform USQ that is no smaller, in paired differences over fresh blocks."""
    blocks = _blocks(session, [winner, uniform], protocols, metric)
    psnr = _blocks(session, [winner, uniform], protocols, "psnr")

    def side(config: QuantConfig) -> dict[str, Any]:
        cost = session.costs(config)
        mean = interval(blocks[config.digest])
        return {"config": config.digest, "bytes": cost.bytes, "bits": cost.bits_per_weight, "blocks": blocks[config.digest],
                "value": mean.value, "low": mean.low, "high": mean.high, "psnr": float(np.mean(psnr[config.digest]))}  # fmt: skip

    difference = paired_difference(blocks[winner.digest], blocks[uniform.digest])
    name = next((str(c.weight) for c in uniform.layers.values()), "fp")
    return {"metric": metric, "blocks": len(protocols), "winner": side(winner), "uniform": {"scheme": name, **side(uniform)},
            "difference": {"value": difference.value, "low": difference.low, "high": difference.high}}  # fmt: skip


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
    model: Model, out: str | Path, bits: float = 3.0, samples: int = 120, flips: int = 40, *, protocol: Protocol | None = None,
    space: Mapping[str, Any] | None = None, workers: int = 1, device: str = "cpu", dtype: str = "float32", bank: str | None = None,
    quality: QualityOptions | None = None, sample_seed: int = 0, progress: Progress = no_progress,
) -> Front:  # fmt: skip
    """The whole flow into a folder; run again, it continues where it stopped.

    Writes study.db, sensitivity.json, front.json, config.json, packed/, samples.png and report/index.html.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AquabitError(f"the folder {out} cannot be made: {error.strerror}") from error
    study, swap = Study(out / "study.db"), "usq4:usq2"
    given: dict[str, Any] = {"protocol": protocol, "space_options": dict(space) if space else None, "quality": quality}
    with open_session(model, study, workers=workers, device=device, dtype=dtype, bank=bank, progress=progress, **given) as session:
        session.costs.check(Budget(bits=bits), max(session.space.activations))
        session.references(progress)
        new = session.measure(session.space.sample(samples, sample_seed), "sample", progress)
        validate_in(session, flips, swap, bits, sample_seed, progress)
        found = study.get("front")
        if found is not None and not new and found["budget"] == asdict(Budget(bits=bits)):
            front = Front.from_dict(found)  # everything was there: nothing is searched twice
        else:
            front = find_in(session, Budget(bits=bits), 2, 8, sample_seed, progress)
        measure_in_context(session, IN_CONTEXT, bits, swap, progress=progress)
        sensitivity = explained(study, bits, swap, progress)
    write_json(out / "sensitivity.json", sensitivity.to_dict())
    write_json(out / "front.json", front.to_list())
    (out / "config.json").write_text(front.best.to_json())
    progress("packing", 0, 1)
    quantize(model, front.best, bank=bank, device=device).save(out / "packed")
    (out / "samples.png").write_bytes(
        thumbnail(
            generate(
                str(out / "packed"), 32, study.protocol.seed, study.protocol.steps, study.protocol.conditions, device, progress=progress
            )
        )
    )
    progress("packing", 1, 1)
    write_report(study, out / "report", progress=progress)
    return front
