"""The front that is reported: the winner and the best of other budgets, uniform baselines and rivals,
measured on fresh seeds, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np

from aquabit.choices import Choices
from aquabit.measuring.latency import packed_latencies
from aquabit.measuring.session import uniform_references
from aquabit.scheme import LOWER_IS_BETTER, AquabitError, Protocol, QuantConfig
from aquabit.search.expectations import config_name, expected_psnr, psnr_offset
from aquabit.search.front import Front, FrontMember, smallest_uniform
from aquabit.search.judging import Judgement, paired_metric, pieces
from aquabit.search.search import Search
from aquabit.sensitivity.correction_gain import correction_shift
from aquabit.sensitivity.surrogate.fit import FittedSurrogate, fit_from_study
from aquabit.stats import Interval, mean_interval, paired_difference

FRESH_BLOCKS = (11, 12, 13, 14, 15)  # what is reported; block 1 belongs to validation, 2 to judging


def measure_front(search: Search, winner: QuantConfig, judgement: Judgement) -> Front:
    """Measure members, uniform baselines and full precision on fresh seeds; the winner and the uniform
    of its size packed, as they run in the end."""
    session, costs, progress = search.session, search.costs, search.progress
    members = _members(search, winner)
    protocols = [session.protocol.block(b) for b in FRESH_BLOCKS]
    uniforms = uniform_references(session.space)  # what each family reaches, beside the front
    baseline = smallest_uniform(costs, session.space, costs(winner).bytes)
    session.measure_full(protocols, "fresh seeds", progress)
    packed = list({c.digest: c for c in (winner, *([baseline] if baseline else []))}.values())
    session.measure(packed, "fresh", progress, protocols, "the winner on fresh seeds", packed=True)
    others = [*members, *uniforms, *(c for _, c in search.given)]
    session.measure(others, "fresh", progress, protocols, "the front on fresh seeds")
    latency = packed_latencies(session.here, members, progress, session.protocol)
    predict, metric = _predictor(search), session.protocol.objective
    rows = []
    for config, call in zip(members, latency, strict=True):
        found = {m: mean_interval(_blocks(search, config, protocols, m)) for m in _metrics(search)}
        rows.append(FrontMember.of(costs, config, predict(config), found, call))
    fidelity = paired_metric(session.protocol)
    front = Front(rows, search.options.budget, winner.digest, {}, search.proof)
    front = front.pruned(fidelity, session.protocol.direction(fidelity) == "min")
    comparison = _comparison(search, winner, baseline, protocols, metric) if baseline else {}
    comparison |= {
        "metric": metric,
        "front": search.options.front,
        "spent": {"output_errors": search.spent},
        "same_quality": _same_quality(search, front, uniforms, protocols, fidelity),
        "judged": _judged(search, judgement),
        "against": [_side(search, c, protocols, metric) | {"name": n} for n, c in search.given],
    }
    return replace(front, comparison=comparison)


def _members(search: Search, winner: QuantConfig) -> list[QuantConfig]:
    """The winner, and for each other target its best candidate by fidelity."""
    values, found = search.values(paired_metric(search.session.protocol)), {winner.digest: winner}
    known = [c for c in search.candidates.values() if isfinite(values.get(c.config.digest, float("nan")))]
    inside = [c.config for c in known if search.inside(c.config)]
    sizes = [search.costs.totals(Choices.of(search.session.space, [c])) for c in inside]
    for target in search.targets[1:]:
        fits = [c for c, s in zip(inside, sizes, strict=True) if bool(search.costs.within(s, target)[0])]
        if fits:
            best = min(fits, key=lambda c: (values[c.digest], c.digest))
            found[best.digest] = best
    return list(found.values())


def _predictor(search: Search) -> Any:
    """config -> {metric: predicted value}: PSNR from the sum of damages, the objective from the
    surrogate where one can be fitted."""
    session, metric = search.session, search.session.protocol.objective
    fitted: FittedSurrogate | None = None
    try:
        fitted = fit_from_study(session.study)
        shift = correction_shift(session, metric, fitted.surrogate.target_)
    except AquabitError:
        fitted = None  # too few measurements: the damages speak alone
    offset = psnr_offset(session, search.damages)

    def predict(config: QuantConfig) -> dict[str, float]:
        inside, found = search.inside(config), {}
        if fitted is not None and inside:
            model = fitted.surrogate
            value = model.to_units(model.predict(fitted.encoder.encode([config])) + shift)
            found[metric] = float(np.ravel(value)[0])
        if inside and "psnr" not in found:
            found["psnr"] = expected_psnr(search.damages, Choices.of(session.space, [config]), offset)
        return found

    return predict


def _metrics(search: Search) -> list[str]:
    known = search.session.study.measurements().columns
    return [m for m in known if m in LOWER_IS_BETTER or ":" in m]  # the user's own are named module:function


def _blocks(search: Search, config: QuantConfig, protocols: Sequence[Protocol], metric: str) -> list[float]:
    """The metric in its units on each block (NaN where it failed)."""
    sign = search.session.protocol.sign(metric)
    return [sign * search.values(metric, p).get(config.digest, float("nan")) for p in protocols]


def _side(search: Search, config: QuantConfig, protocols: Sequence[Protocol], metric: str) -> dict[str, Any]:
    cost, blocks = search.costs(config), _blocks(search, config, protocols, metric)
    mean = mean_interval(blocks)
    return {
        "config": config.digest,
        "bytes": cost.bytes,
        "bits": cost.bits_per_weight,
        "blocks": blocks,
        **mean.to_dict(),
        "psnr": float(np.mean(_blocks(search, config, protocols, "psnr"))),
    }


def _comparison(
    search: Search, winner: QuantConfig, uniform: QuantConfig, protocols: Sequence[Protocol], metric: str
) -> dict[str, Any]:
    """The winner against the smallest uniform USQ that is no smaller, in paired differences over fresh
    blocks."""

    def gap(metric: str) -> Interval:
        return paired_difference(*(_blocks(search, c, protocols, metric) for c in (winner, uniform)))

    images, difference = search.session.protocol.images, gap(metric)
    needed = images_to_tell(difference, len(protocols), images)
    return {
        "metric": metric,
        "blocks": len(protocols),
        "images": images,
        "winner": _side(search, winner, protocols, metric),
        "uniform": {"scheme": config_name(uniform), **_side(search, uniform, protocols, metric)},
        "difference": {**difference.to_dict(), "images_needed": needed},
        "psnr_difference": gap("psnr").to_dict(),
    }


def _same_quality(
    search: Search, front: Front, uniforms: Sequence[QuantConfig], protocols: Sequence[Protocol], metric: str
) -> list[dict[str, Any]]:
    """For each uniform configuration the smallest member of the front that is measured as good by
    fidelity, or None: how much smaller. Of one that is smaller than every member the front tells nothing."""
    sign, rows = search.session.protocol.sign(metric), []
    smallest = min(m.bytes for m in front.members)
    for config in uniforms:
        cost, value = search.costs(config), float(np.mean(_blocks(search, config, protocols, metric)))
        if cost.bytes < smallest:
            continue
        good = [m for m in front.members if sign * m.measured[metric].value <= sign * value]
        least = min((m.bytes for m in good), default=None)
        named = {"uniform": config_name(config), "bytes": cost.bytes, "metric": metric, "value": value}
        rows.append({**named, "found_bytes": least})
    return rows


def _judged(search: Search, judgement: Judgement) -> dict[str, Any]:
    """How the finalists were told apart, for the page."""
    second = min(judgement.worse.items(), key=lambda row: row[1].value, default=None)
    gap = None if second is None else second[1].to_dict()
    images = max(judgement.blocks.values()) * pieces(search.session.protocol, 1)[0].images
    return {
        "metric": paired_metric(search.session.protocol),
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
