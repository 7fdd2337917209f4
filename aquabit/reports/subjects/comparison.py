"""The found configuration beside uniform ones, on the same fresh seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from aquabit.reports import words
from aquabit.reports.facts import METRIC_NAMES, Facts, number
from aquabit.reports.plan import Tables
from aquabit.reports.subjects.fronts import limits_of
from aquabit.reports.subjects.quality import fresh
from aquabit.scheme_kinds import uniform_name
from aquabit.stats import LEVEL, Interval, percent

ENDS = ("value", "low", "high")


def comparison(facts: Facts) -> pd.DataFrame:
    """which, scheme, config, bits, bytes, value, low, high, psnr, psnr_low, psnr_high, level, blocks:
    found and uniform on the same fresh seeds, then found minus uniform (paired), then what the winner was
    held against."""
    columns = ["which", "scheme", "config", "bits", "bytes", *ENDS, "psnr", "psnr_low", "psnr_high"]
    columns += ["level", "blocks"]
    stored = facts.comparison
    if "winner" not in stored:
        return pd.DataFrame([], columns=columns)
    better = [fresh(facts, m) for m in (facts.objective, "psnr")]
    blocks = int(stored.get("blocks") or 0)
    sides = [("found", stored["winner"]), ("uniform", stored.get("uniform") or {})]
    rows: list[list[Any]] = []
    for which, side in [*sides, *(("against", row) for row in stored.get("against") or [])]:
        config = str(side.get("config", ""))
        values = [number(v) for v in next((v for v in side.values() if isinstance(v, list)), [])]
        means = float(np.mean(values)) if values else math.nan, number(side.get("psnr"))
        row: list[Any] = [which, str(side.get("scheme") or side.get("name") or "mixed"), config]
        row += [number(side.get("bits")), number(side.get("bytes"))]
        for known, mean in zip(better, means, strict=True):
            found, _ = known.get(config, (Interval(math.nan, math.nan, math.nan), 0))
            row += [mean if math.isfinite(mean) else found.value, found.low, found.high]
        rows.append([*row, percent(LEVEL), blocks])
    sizes = [rows[0][i] - rows[1][i] for i in (3, 4)]
    gaps = [Interval.from_dict(stored.get(k)) for k in ("difference", "psnr_difference")]
    ends = [v for gap in gaps for v in gap]
    rows.insert(2, ["difference", "found minus uniform", "", *sizes, *ends, gaps[0].percent, blocks])
    return pd.DataFrame(rows, columns=columns)


def same_quality(facts: Facts) -> pd.DataFrame:
    """uniform, metric, value, bytes, found_bytes, share: for each uniform configuration the size from
    which on the front is measured as good on fresh seeds, and its share of the uniform one's (NaN where no
    member is), smallest first."""
    rows = []
    for r in facts.comparison.get("same_quality") or []:
        size, found = number(r.get("bytes")), number(r.get("found_bytes"))
        rows.append(
            (str(r.get("uniform")), str(r.get("metric")), number(r.get("value")), size, found, found / size)
        )
    return pd.DataFrame(
        rows, columns=["uniform", "metric", "value", "bytes", "found_bytes", "share"]
    ).sort_values("bytes", kind="stable", ignore_index=True)


def sentence(facts: Facts, found: Tables) -> words.Sentence | None:
    """The found configuration beside uniform: what cannot be told apart first, then PSNR, how much
    smaller, and the objective."""
    comparison = found["comparison"]
    if comparison.empty:
        return None
    row = {r.which: r for r in comparison.itertuples()}
    ours, theirs, change = row["found"], row["uniform"], row["difference"]
    uniform = f"uniform {uniform_name(theirs.scheme)}"
    sizes = [
        f"{words.count(r.bytes)} bytes, {words.figures(r.bits, 4)} bits a weight" for r in (ours, theirs)
    ]
    budget, blocks = _budget(facts), f"over {ours.blocks} blocks of fresh seeds"
    who = f"Within {budget}, the found configuration" if budget else "The found configuration"
    winner = facts.winner()
    corrected = f", both corrected by {winner.correction}" if winner and winner.correction else ""
    gap = f"{words.figures(change.value)}{words.ends(change.low, change.high, change.level)}"
    values = f"{facts.metric} {words.figures(ours.value)}", f"{words.figures(theirs.value)}{corrected}"
    if not math.isfinite(change.psnr) or facts.objective == "psnr":
        verdict = _verdict(facts.direction, change.value, change.low, change.high)
        verdict = verdict if math.isnan(change.value) else f"a paired difference of {gap} {blocks}: {verdict}"
        text = f"{who} ({sizes[0]}) measures {values[0]} and {uniform} ({sizes[1]}) {values[1]}, {verdict}."
        return words.Sentence(text + _smaller(found["same_quality"], theirs))
    undecided = change.low <= 0 <= change.high
    text = _cannot_tell(facts, uniform) if undecided else ""
    text += (
        f"{who} ({sizes[0]}) has {words.figures(ours.psnr, 4)} dB of PSNR to full precision and"
        f" {uniform} ({sizes[1]}) "
    )
    text += (
        f"{words.figures(theirs.psnr, 4)}{corrected}, a paired difference of {words.figures(change.psnr)} dB"
    )
    text += f"{words.ends(change.psnr_low, change.psnr_high, change.level)} {blocks}: "
    text += f"{_verdict('max', change.psnr, change.psnr_low, change.psnr_high)}."
    text += _smaller(found["same_quality"], theirs)
    text += (
        f" The found configuration measures {values[0]} and {uniform}"
        f" {words.figures(theirs.value)}, a paired difference of {gap}"
    )
    return words.Sentence(
        text
        + ("." if undecided else f": {_verdict(facts.direction, change.value, change.low, change.high)}.")
    )


def _budget(facts: Facts) -> str:
    units = {"bits": "bits a weight", "bops": "BOPs", "latency_ms": "ms a denoiser call"}
    return " and ".join(
        f"{words.count(v) if k == 'bytes' else words.figures(v)} {units.get(k, k)}"
        for k, v in limits_of(facts).items()
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
    if low > 0:
        return "the uniform configuration wins"
    return "the interval includes zero, so neither is shown to win"


def _cannot_tell(facts: Facts, uniform: str) -> str:
    """That the objective's noise swallows the difference, how many images would tell, and what decides."""
    stored = facts.comparison
    blocks, needed = int(stored.get("blocks") or 0), number(stored["difference"].get("images_needed"))
    each = f" \N{MULTIPLICATION SIGN} {facts.protocol.images}" if facts.protocol else " blocks of"
    images = f"{blocks}{each} images"
    would = f" (about {words.count(needed)} images would)" if math.isfinite(needed) else ""
    decides = ", so PSNR decides" if (stored.get("judged") or {}).get("metric") == "psnr" else ""
    return f"{facts.metric} of {images} cannot tell the found configuration from {uniform}{would}{decides}. "


def _smaller(table: pd.DataFrame, theirs: Any) -> str:
    """How much smaller a found configuration of uniform quality is: of the uniform one that the winner is
    compared with, or else of the one nearest to it in size."""
    known = table[table.bytes.gt(0)]
    if known.empty:
        return ""
    r = known.loc[(known.bytes - theirs.bytes).abs().idxmin()]
    if r.metric == "psnr":
        value = f"{words.figures(r['value'], 4)} dB"
    else:
        value = f"{METRIC_NAMES.get(r.metric, r.metric)} {words.figures(r['value'])}"
    if math.isnan(r.found_bytes):
        return (
            f" No found configuration reaches the {value} that uniform {uniform_name(r.uniform)} has at"
            f" {words.count(r.bytes)} bytes."
        )
    return (
        f" A found configuration of {words.count(r.found_bytes)} bytes, {100 * r.share:.0f} % of the"
        f" {words.count(r.bytes)} of uniform {uniform_name(r.uniform)}, has the {value} of that."
    )
