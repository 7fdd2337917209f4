"""The words of the page: what speaks against the answer, the answer in three sentences, the run card, and
numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pandas as pd

from aquabit.reports import tables
from aquabit.reports.facts import METRIC_NAMES, Facts, number


@dataclass(frozen=True)
class Sentence:
    """One part of the answer; ``command`` makes what is missing."""

    text: str
    command: str = ""


def figures(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` significant digits (all digits before the point), a true minus sign, a dash
    where it is undefined."""
    value = float(value) if value is not None else math.nan
    if not math.isfinite(value):
        return "–"
    size = math.floor(math.log10(abs(value))) if value else 0
    text = (
        "0"
        if not value
        else f"{value:.{digits - 1}e}"
        if size < -4
        else f"{value:,.{max(0, digits - 1 - size)}f}"
    )
    return text.replace("-", "\N{MINUS SIGN}")


def score(value: Any) -> str:
    """A correlation or the like, to two digits after the point."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def interval(low: Any, high: Any, level: str = "") -> str:
    """`` (1.2 to 3.4, 95 %)`` or nothing where an end is unknown."""
    ends = [number(None if pd.isna(v) else float(v)) for v in (low, high)]
    known = f"{figures(ends[0])} to {figures(ends[1])}{f', {level}' if level else ''}"
    return "" if any(math.isnan(v) for v in ends) else f" ({known})"


def count(value: Any) -> str:
    """A whole number with thousands apart."""
    return "–" if value is None or pd.isna(value) else f"{int(value):,}".replace("-", "\N{MINUS SIGN}")


def short(value: Any) -> str:
    """A large count to three digits, with k, M, G or T."""
    size = number(value)
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= factor:
            return figures(size / factor) + unit
    return count(None if math.isnan(size) else size)


def span(seconds: float) -> str:
    """Seconds as a time that people read."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def summary(
    facts: Facts, found: Mapping[str, pd.DataFrame], lacks: Mapping[str, tuple[str, str]]
) -> list[Sentence]:
    """What speaks against the fit, where there is something; then where it hurts, what to choose, and
    whether to believe it."""
    where = _where(facts, found["layers"], found["operators"])
    return [
        *(
            Sentence(str(caution))
            for caution in (facts.sensitivity.get("surrogate") or {}).get("cautions") or []
        ),
        where if where else Sentence(*lacks.get("layers", ("The effects of layers are unknown.", ""))),
        _which(facts, found)
        or Sentence(*(lacks.get("front") or lacks.get("comparison") or ("There is no comparison.", ""))),
        _trust(facts, found["surrogate"], lacks),
    ]


def _where(facts: Facts, layers: pd.DataFrame, operators: pd.DataFrame) -> Sentence | None:
    ranked = layers[layers.effect.notna()]
    if ranked.empty:
        return None
    what = f"the swap from {' to '.join(facts.swap.split(':'))}" if facts.swap else "a swap of its scheme"
    first, rest, level = ranked.iloc[0], ranked.iloc[1:3], facts.effect_level
    source = "a combined (predicted and measured)" if facts.effects == "combined" else "a predicted"
    text = (
        f"Quantization hurts most in {first.layer}: in {facts.contexts}, {what} worsens {facts.metric} there"
        f" by {source} "
    )
    text += figures(first.effect) + interval(first.low, first.high, level)
    if math.isfinite(first.psnr_effect):
        text += (
            f" and loses {figures(first.psnr_effect)} dB of"
            f" PSNR{interval(first.psnr_low, first.psnr_high, level)}"
        )
    if len(rest):
        text += ", followed by " + " and ".join(
            f"{r.layer} {figures(r.effect)}{interval(r.low, r.high)}" for r in rest.itertuples()
        )
    if len(operators) and math.isfinite(operators.effect.iloc[0]):
        o = operators.iloc[0]
        text += (
            f"; the operator type that suffers most is {o['name']},"
            f" {figures(o.effect)}{interval(o.low, o.high)} a layer"
        )
    clear = int((ranked.low > 0).sum())
    return Sentence(f"{text}; {clear} of {len(ranked)} layers have a {level} interval above zero.")


def _which(facts: Facts, found: Mapping[str, pd.DataFrame]) -> Sentence | None:
    """The found configuration beside uniform: what cannot be told apart first, then PSNR, how much
    smaller, and the objective."""
    comparison = found["comparison"]
    if comparison.empty:
        return None
    row = {r.which: r for r in comparison.itertuples()}
    ours, theirs, change = row["found"], row["uniform"], row["difference"]
    sizes = [f"{count(r.bytes)} bytes, {figures(r.bits, 4)} bits a weight" for r in (ours, theirs)]
    budget, blocks = _budget(facts), f"over {ours.blocks} blocks of fresh seeds"
    who = f"Within {budget}, the found configuration" if budget else "The found configuration"
    winner = facts.winner()
    corrected = f", both corrected by {winner.correction}" if winner and winner.correction else ""
    gap = f"{figures(change.value)}{interval(change.low, change.high, '95 %')}"
    values = f"{facts.metric} {figures(ours.value)}", f"{figures(theirs.value)}{corrected}"
    if not math.isfinite(change.psnr) or facts.objective == "psnr":
        verdict = _verdict(facts.direction, change.value, change.low, change.high)
        verdict = verdict if math.isnan(change.value) else f"a paired difference of {gap} {blocks}: {verdict}"
        text = (
            f"{who} ({sizes[0]}) measures {values[0]} and uniform {theirs.scheme} ({sizes[1]}) {values[1]},"
            f" {verdict}."
        )
        return Sentence(text + _smaller(found["same_quality"], theirs))
    undecided = change.low <= 0 <= change.high
    text = _cannot_tell(facts, theirs.scheme) if undecided else ""
    text += (
        f"{who} ({sizes[0]}) has {figures(ours.psnr, 4)} dB of PSNR to full precision and uniform"
        f" {theirs.scheme} ({sizes[1]}) "
    )
    text += f"{figures(theirs.psnr, 4)}{corrected}, a paired difference of {figures(change.psnr)} dB"
    text += f"{interval(change.psnr_low, change.psnr_high, '95 %')} {blocks}: "
    text += f"{_verdict('max', change.psnr, change.psnr_low, change.psnr_high)}."
    text += _smaller(found["same_quality"], theirs)
    text += (
        f" The found configuration measures {values[0]} and uniform {theirs.scheme} {figures(theirs.value)},"
        f" a paired difference of {gap}"
    )
    return Sentence(
        text
        + ("." if undecided else f": {_verdict(facts.direction, change.value, change.low, change.high)}.")
    )


def _budget(facts: Facts) -> str:
    limits = {k: number(v) for k, v in (facts.front.get("budget") or {}).items()}
    units = {"bits": "bits a weight", "bops": "BOPs", "latency_ms": "ms a denoiser call"}
    return " and ".join(
        f"{count(v) if k == 'bytes' else figures(v)} {units.get(k, k)}"
        for k, v in limits.items()
        if not math.isnan(v)
    )


def _verdict(direction: str, value: float, low: float, high: float) -> str:
    """Which one a paired difference (found minus uniform) speaks for."""
    worse = 1 if direction == "min" else -1
    low, high = sorted((worse * low, worse * high))
    if math.isnan(value):
        return "the paired difference is not stored"
    if math.isnan(low):
        return "the difference has no interval, so nothing is decided"
    if high < 0:
        return "the found configuration wins"
    return (
        "the uniform configuration wins"
        if low > 0
        else "the interval includes zero, so neither is shown to win"
    )


def _cannot_tell(facts: Facts, scheme: str) -> str:
    """That the objective's noise swallows the difference, how many images would tell, and what decides."""
    stored = facts.front.get("comparison") or {}
    blocks, needed = (
        int(number(stored.get("blocks"))),
        number((stored.get("difference") or {}).get("images_needed")),
    )
    images = (
        f"{blocks} \N{MULTIPLICATION SIGN} {facts.protocol.images} images"
        if facts.protocol
        else f"{blocks} blocks of images"
    )
    would = f" (about {count(needed)} images would)" if math.isfinite(needed) else ""
    decides = ", so PSNR decides" if (stored.get("judged") or {}).get("metric") == "psnr" else ""
    return (
        f"{facts.metric} of {images} cannot tell the found configuration from uniform"
        f" {scheme}{would}{decides}. "
    )


def _smaller(table: pd.DataFrame, theirs: Any) -> str:
    """How much smaller a found configuration of uniform quality is: of the uniform one that the winner is
    compared with, or else of the one nearest to it in size."""
    known = table[table.bytes.gt(0)]
    if known.empty:
        return ""
    r = known.loc[(known.bytes - theirs.bytes).abs().idxmin()]
    value = (
        f"{figures(r['value'], 4)} dB"
        if r.metric == "psnr"
        else f"{METRIC_NAMES.get(r.metric, r.metric)} {figures(r['value'])}"
    )
    if math.isnan(r.found_bytes):
        return (
            f" No found configuration reaches the {value} that uniform {r.uniform} has at {count(r.bytes)}"
            " bytes."
        )
    return (
        f" A found configuration of {count(r.found_bytes)} bytes, {100 * r.share:.0f} % of the"
        f" {count(r.bytes)} of uniform {r.uniform}, has the {value} of that."
    )


def _trust(facts: Facts, scores: pd.DataFrame, lacks: Mapping[str, tuple[str, str]]) -> Sentence:
    if scores.empty or math.isnan(scores.within_budget_srcc.iloc[0]):
        return Sentence(
            *lacks.get(
                "surrogate",
                (
                    "The surrogate's within-budget SRCC is not stored, so the ranking is not to be trusted.",
                    "",
                ),
            )
        )
    own, rest = scores.within_budget_srcc.iloc[0], scores.iloc[1:]
    beside = "; ".join(f"{r.model} {score(r.within_budget_srcc)}" for r in rest.itertuples())
    ceiling = scores.noise_ceiling.iloc[0]
    beside += f"; noise ceiling {score(ceiling)}" if math.isfinite(ceiling) else ""
    text = (
        "Between unseen configurations of equal size, the surrogate reaches a within-budget SRCC of"
        f" {score(own)}"
    )
    text += f" ({beside})" if beside else ""
    if len(rest) and own <= rest.within_budget_srcc.max():
        text += ", no better than a baseline, so its ranking is not to be trusted"
    good, among = scores.good.iloc[0], scores.among_good.iloc[0]
    if math.isfinite(good):
        few = (
            f"; the {count(good)} good ones among them (at most 1.25 times the least error at their size) are"
            " too few to be scored alone"
        )
        text += f"; among the {count(good)} good ones {score(among)}" if math.isfinite(among) else few
    if "swaps" in lacks:
        return Sentence(
            f"{text}; its effects have not been checked against real swaps yet.", lacks["swaps"][1]
        )
    v = facts.validation
    agreement = tables.agreement(facts)
    if agreement.empty:
        agree = _agree(number(v.get("srcc")), number(v.get("sign_agreement")))
        text += f"; its predicted effects and {count(v.get('flips'))} real swaps {agree}"
        return Sentence(text + ".")
    parts = [
        f"{count(r.flips)} real swaps of {count(r.layers)} layers {r.half} {_agree(r.srcc, r.sign_agreement)}"
        for r in agreement.itertuples()
        if r.layers
    ]
    return Sentence(f"{text}; its predicted effects and {'; they and '.join(parts)}.")


def _agree(srcc: float, sign: float) -> str:
    same = f", with the same sign in {100 * sign:.0f} % of them" if math.isfinite(sign) else ""
    return f"agree at SRCC {score(srcc)}{same}"


def run_card(facts: Facts) -> list[tuple[str, str]]:
    """What was run, as (name, value) pairs."""
    nodes, table = facts.layers.values(), facts.measured
    card = [
        ("model", facts.model or "unknown"),
        ("fingerprint", facts.fingerprint or "unknown"),
        ("study", facts.source),
    ]
    if nodes:
        weights = sum(math.prod(n["shape"]) for n in nodes)
        card.append(
            (
                "layers",
                (
                    f"{len(nodes)} with {weights:,} weights, {short(sum(n.get('macs', 0) for n in nodes))}"
                    " multiply-adds a denoiser call"
                ),
            )
        )
    if facts.space:
        schemes = list(dict.fromkeys(s for row in facts.space.get("choices", {}).values() for s in row))
        card.append(
            (
                "search space",
                (
                    f"{', '.join(schemes)}; activations"
                    f" {', '.join(f'a{a}' for a in facts.space.get('activations', []))}"
                ),
            )
        )
    card += _protocol(facts)
    if facts.correction:
        card.append(("noise correction", f"{facts.correction}, of every quantized configuration"))
    card.append(
        ("objective", f"{facts.metric} ({'lower' if facts.direction == 'min' else 'higher'} is better)")
    )
    if facts.swap:
        card.append(("effect", f"the swap {' to '.join(facts.swap.split(':'))}, in {facts.contexts}"))
    ok = table[table.status == "ok"]
    kinds = tables.counts(facts)
    listed = ", ".join(
        f"{r.measured} {r.kind}" + (f" ({r.failed} more failed)" if r.failed else "")
        for r in kinds.itertuples()
    )
    card.append(("measurements", f"{len(ok)}: {listed}" if len(table) else "none"))
    card.append(
        (
            "time",
            (
                f"{span(float(table.seconds.sum()))} of measuring, {figures(ok.seconds.median())} s a"
                " configuration"
                if len(ok)
                else "none"
            ),
        )
    )
    if facts.notes:
        card.append(("fits", f"{len(facts.notes)} with a remark, the first: {facts.notes[0]}"))
    return [*card, *_environment(facts)]


def _protocol(facts: Facts) -> list[tuple[str, str]]:
    p = facts.protocol
    if p is None:
        return [("protocol", "none yet")]
    card = [
        (
            "protocol",
            f"{p.digest}: {p.images} images, {p.steps} steps, scheduler {p.scheduler}, eta {p.eta:g},"
            f" guidance {p.guidance:g}, {p.dtype}, micro-batch {p.micro_batch}, reference {p.reference}"
            + (f", {p.resolution} pixels" if p.resolution else ""),
        )
    ]
    if p.conditions:
        some = ", ".join(map(str, p.conditions[:3]))
        card.append(("conditions", f"{len(p.conditions)}: {some}{', ...' if len(p.conditions) > 3 else ''}"))
    used = set(facts.rows("fresh").protocol)
    seeds = sorted(q.seed for d, q in facts.protocols.items() if d in used)
    fresh = (
        f"; {len(seeds)} blocks of fresh seeds from"
        f" {', '.join(f'{s:,}' for s in seeds[:5])}{', ...' if len(seeds) > 5 else ''}"
        if seeds
        else ""
    )
    return [*card, ("seeds", f"{p.seed:,} to {p.seed + p.images - 1:,}{fresh}")]


def _environment(facts: Facts) -> list[tuple[str, str]]:
    values: dict[str, list[str]] = {}
    for environment in facts.environments:
        for key, value in environment.items():
            if str(value) not in values.setdefault(str(key), []):
                values[str(key)].append(str(value))
    try:
        version = metadata.version("aquabit")
    except metadata.PackageNotFoundError:
        version = "from source"
    listed = ", ".join(f"{k} {' / '.join(v)}" for k, v in values.items())
    return [("environment", listed or "not recorded"), ("report by", f"aquabit {version}")]
