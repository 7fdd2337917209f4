"""The words of the page: what speaks against the answer, the answer in three sentences, the run card, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pandas as pd

from aquabit.reports import tables
from aquabit.reports.facts import Facts, number


@dataclass(frozen=True)
class Sentence:
    """One part of the answer; ``command`` makes what is missing."""

    text: str
    command: str = ""


def figures(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` significant digits (all digits before the point), a true minus sign, a dash where it is undefined."""
    value = float(value) if value is not None else math.nan
    if not math.isfinite(value):
        return "–"
    size = math.floor(math.log10(abs(value))) if value else 0
    text = "0" if not value else f"{value:.{digits - 1}e}" if size < -4 else f"{value:,.{max(0, digits - 1 - size)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def score(value: Any) -> str:
    """A correlation or the like, to two digits after the point."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def interval(low: Any, high: Any) -> str:
    """`` (1.2 to 3.4)`` or nothing where an end is unknown."""
    ends = [number(None if pd.isna(v) else float(v)) for v in (low, high)]
    return "" if any(math.isnan(v) for v in ends) else f" ({figures(ends[0])} to {figures(ends[1])})"


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


def summary(facts: Facts, found: Mapping[str, pd.DataFrame], lacks: Mapping[str, tuple[str, str]]) -> list[Sentence]:
    """What speaks against the fit, where there is something; then where it hurts, what to choose, and whether to believe it."""
    where = _where(facts, found["layers"], found["operators"])
    return [
        *(Sentence(str(caution)) for caution in (facts.sensitivity.get("surrogate") or {}).get("cautions") or []),
        where if where else Sentence(*lacks.get("layers", ("The effects of layers are unknown.", ""))),
        _which(facts, found["comparison"]) or Sentence(*(lacks.get("front") or lacks.get("comparison") or ("There is no comparison.", ""))),
        _trust(facts, found["surrogate"], lacks),
    ]


def _where(facts: Facts, layers: pd.DataFrame, operators: pd.DataFrame) -> Sentence | None:
    ranked = layers[layers.effect.notna()]
    if ranked.empty:
        return None
    what = f"the swap from {' to '.join(facts.swap.split(':'))}" if facts.swap else "a swap of its scheme"
    first, rest = ranked.iloc[0], ranked.iloc[1:3]
    source = "a combined (predicted and measured)" if facts.effects == "combined" else "a predicted"
    text = f"Quantization hurts most in {first.layer}: {what} worsens {facts.metric} there by {source} {figures(first.effect)}"
    text += interval(first.low, first.high)
    if len(rest):
        text += ", followed by " + " and ".join(f"{r.layer} {figures(r.effect)}{interval(r.low, r.high)}" for r in rest.itertuples())
    if len(operators) and math.isfinite(operators.effect.iloc[0]):
        o = operators.iloc[0]
        text += f"; the operator type that suffers most is {o['name']}, {figures(o.effect)}{interval(o.low, o.high)} a layer"
    clear = int((ranked.low > 0).sum())
    return Sentence(f"{text}; {clear} of {len(ranked)} layers have an interval above zero.")


def _which(facts: Facts, comparison: pd.DataFrame) -> Sentence | None:
    if comparison.empty:
        return None
    row = {r.which: r for r in comparison.itertuples()}
    found, uniform, change = row["found"], row["uniform"], row["difference"]
    limits = {k: number(v) for k, v in (facts.front.get("budget") or {}).items()}
    units = {"bits": "bits a weight", "bops": "BOPs", "latency_ms": "ms a denoiser call"}
    budget = " and ".join(f"{count(v) if k == 'bytes' else figures(v)} {units.get(k, k)}" for k, v in limits.items() if not math.isnan(v))
    worse = 1 if facts.direction == "min" else -1
    low, high = sorted((worse * change.low, worse * change.high))
    if math.isnan(change.value):
        verdict = "the paired difference is not stored"
    else:
        if math.isnan(low):
            verdict = "the difference has no interval, so nothing is decided"
        elif high < 0:
            verdict = "the found configuration wins"
        elif low > 0:
            verdict = "the uniform configuration wins"
        else:
            verdict = "the interval includes zero, so neither is shown to win"
        gap = f"{figures(change.value)}{interval(change.low, change.high)}"
        verdict = f"a paired difference of {gap} over {found.blocks} blocks of fresh seeds: {verdict}"
    text = f"Within {budget}, the found" if budget else "The found"
    winner = facts.winner()
    corrected = f", both corrected by {winner.correction}" if winner and winner.correction else ""
    ours, theirs = (f"{count(r.bytes)} bytes, {figures(r.bits, 4)} bits a weight" for r in (found, uniform))
    return Sentence(
        f"{text} configuration ({ours}) measures {facts.metric} {figures(found.value)} and uniform {uniform.scheme} ({theirs}) "
        f"{figures(uniform.value)}{corrected}, {verdict}."
    )


def _trust(facts: Facts, scores: pd.DataFrame, lacks: Mapping[str, tuple[str, str]]) -> Sentence:
    if scores.empty or math.isnan(scores.within_budget_srcc.iloc[0]):
        return Sentence(
            *lacks.get("surrogate", ("The surrogate's within-budget SRCC is not stored, so the ranking is not to be trusted.", ""))
        )
    own, rest = scores.within_budget_srcc.iloc[0], scores.iloc[1:]
    beside = "; ".join(f"{r.model} {score(r.within_budget_srcc)}" for r in rest.itertuples())
    ceiling = scores.noise_ceiling.iloc[0]
    beside += f"; noise ceiling {score(ceiling)}" if math.isfinite(ceiling) else ""
    text = f"Between unseen configurations of equal size, the surrogate reaches a within-budget SRCC of {score(own)}"
    text += f" ({beside})" if beside else ""
    if len(rest) and own <= rest.within_budget_srcc.max():
        text += ", no better than a baseline, so its ranking is not to be trusted"
    if "swaps" in lacks:
        return Sentence(f"{text}; its effects have not been checked against real swaps yet.", lacks["swaps"][1])
    v = facts.validation
    agree = number(v.get("sign_agreement"))
    text += f"; its predicted effects and {count(v.get('flips'))} real swaps agree at SRCC {score(number(v.get('srcc')))}"
    return Sentence(text + (f", with the same sign in {100 * agree:.0f} % of them." if math.isfinite(agree) else "."))


def run_card(facts: Facts) -> list[tuple[str, str]]:
    """What was run, as (name, value) pairs."""
    nodes, table = facts.layers.values(), facts.measured
    card = [("model", facts.model or "unknown"), ("fingerprint", facts.fingerprint or "unknown"), ("study", facts.source)]
    if nodes:
        weights = sum(math.prod(n["shape"]) for n in nodes)
        card.append(
            (
                "layers",
                f"{len(nodes)} with {weights:,} weights, {short(sum(n.get('macs', 0) for n in nodes))} multiply-adds a denoiser call",
            )
        )
    if facts.space:
        schemes = list(dict.fromkeys(s for row in facts.space.get("choices", {}).values() for s in row))
        card.append(("search space", f"{', '.join(schemes)}; activations {', '.join(f'a{a}' for a in facts.space.get('activations', []))}"))
    card += _protocol(facts)
    if facts.correction:
        card.append(("noise correction", f"{facts.correction}, of every quantized configuration"))
    card.append(("objective", f"{facts.metric} ({'lower' if facts.direction == 'min' else 'higher'} is better)"))
    if facts.swap:
        bits = number(facts.sensitivity.get("bits"))
        around = f", in random contexts near {figures(bits)} bits" if math.isfinite(bits) else ""
        card.append(("effect", f"the swap {' to '.join(facts.swap.split(':'))}{around}"))
    ok = table[table.status == "ok"]
    kinds = tables.counts(facts)
    listed = ", ".join(f"{r.measured} {r.kind}" + (f" ({r.failed} more failed)" if r.failed else "") for r in kinds.itertuples())
    card.append(("measurements", f"{len(ok)}: {listed}" if len(table) else "none"))
    card.append(
        (
            "time",
            f"{span(float(table.seconds.sum()))} of measuring, {figures(ok.seconds.median())} s a configuration" if len(ok) else "none",
        )
    )
    if facts.notes:
        card.append(("fits", f"{len(facts.notes)} with a remark, the first: {facts.notes[0]}"))
    return [*card, *_environment(facts)]


def _protocol(facts: Facts) -> list[tuple[str, str]]:
    p = facts.protocol
    if p is None:
        return [("protocol", "none yet")]
    card = [(
        "protocol", f"{p.digest}: {p.images} images, {p.steps} steps, scheduler {p.scheduler}, eta {p.eta:g}, guidance {p.guidance:g}, "
        f"{p.dtype}, micro-batch {p.micro_batch}, reference {p.reference}" + (f", {p.resolution} pixels" if p.resolution else ""),
    )]  # fmt: skip
    if p.conditions:
        some = ", ".join(map(str, p.conditions[:3]))
        card.append(("conditions", f"{len(p.conditions)}: {some}{', ...' if len(p.conditions) > 3 else ''}"))
    used = set(facts.rows("fresh").protocol)
    seeds = sorted(q.seed for d, q in facts.protocols.items() if d in used)
    fresh = (
        f"; {len(seeds)} blocks of fresh seeds from {', '.join(f'{s:,}' for s in seeds[:5])}{', ...' if len(seeds) > 5 else ''}"
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
