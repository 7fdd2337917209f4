"""The tables behind every figure: each function returns a DataFrame, ``write`` puts it beside the figure
as CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from aquabit.reports.facts import Facts, family, number, scheme_name
from aquabit.scheme import QuantConfig, Scheme

LEVEL = 0.95  # of the intervals that are computed here
EFFECT_COLUMNS = ["name", "effect", "low", "high", "layers"]


def _table(rows: list[Any], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns)


def _count(value: Any) -> int:
    return 0 if math.isnan(number(value)) else int(value)


def counts(facts: Facts) -> pd.DataFrame:
    """kind, measured, failed, seconds: how many measurements there are."""
    rows = [
        (kind, int((part.status == "ok").sum()), int((part.status != "ok").sum()), float(part.seconds.sum()))
        for kind, part in facts.measured.groupby("kind", sort=False)
    ]
    return _table(rows, ["kind", "measured", "failed", "seconds"])


def failures(facts: Facts) -> pd.DataFrame:
    """kind, reason, times, example: why measurements failed, most frequent first."""
    failed = facts.measured[facts.measured.status != "ok"]
    rows = [
        (kind, reason, len(part), part.config.iloc[0])
        for (kind, reason), part in failed.groupby(["kind", "reason"], sort=False)
    ]
    return _table(rows, ["kind", "reason", "times", "example"]).sort_values(
        "times", ascending=False, kind="stable", ignore_index=True
    )


def fresh(facts: Facts, metric: str | None = None) -> pd.DataFrame:
    """config, value, low, high, blocks: means of ``metric`` (default: the objective) over blocks of seeds
    that the search never saw, t intervals at ``LEVEL``."""
    from scipy.stats import t

    rows = []
    for config, part in facts.rows("fresh", metric).groupby("config", sort=False):
        values, n = part.value.to_numpy(float), len(part)
        half = float(t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        rows.append((config, values.mean(), values.mean() - half, values.mean() + half, n))
    return _table(rows, ["config", "value", "low", "high", "blocks"])


def frontier(bits: np.ndarray, value: np.ndarray, direction: str) -> np.ndarray:
    """Boolean [n]: points that no other point beats in bits and in quality at once."""
    cost = np.where(np.isfinite(value), value if direction == "min" else -value, np.inf)
    keep, best = np.zeros(len(bits), bool), np.inf
    for i in np.lexsort((cost, bits)):
        if cost[i] < best:
            keep[i], best = True, cost[i]
    return keep


def quality_vs_bits(facts: Facts) -> pd.DataFrame:
    """group, label, family, config, bits, bytes, value, low, high, blocks, frontier: what the scatter of
    quality against bits shows.

    Groups: design (configurations that were drawn), uniform, full precision, found (measured values of the
    front), and budget (its bits). Where a configuration was measured on blocks of fresh seeds, value and
    interval are theirs and ``blocks`` counts them; 0 blocks are the study's own seeds. ``family`` is that of
    uniform configurations: usq, usq h, vq, aq.
    """
    return _against_bits(facts, facts.objective, facts.direction)


def psnr_vs_bits(facts: Facts) -> pd.DataFrame:
    """As ``quality_vs_bits``, of PSNR to full precision in dB; beside it in the group "candidate" what the
    search measured on the study's own seeds: answers of the program, and their refinements. Empty without
    a front that has it."""
    table = _against_bits(facts, "psnr", "max")
    found, columns = table.group == "found", list(table.columns)
    if not found.any():
        return table.iloc[:0]
    known = set(table.config[found])
    rows = [
        ("candidate", "candidate", "", r.config, r.bits, r.bytes, r.value, math.nan, math.nan, 0, False)
        for r in facts.rows("candidate", "psnr").drop_duplicates("config").itertuples()
        if r.config not in known
    ]
    return pd.concat([table, _table(rows, columns)], ignore_index=True) if rows else table


def _against_bits(facts: Facts, metric: str, direction: str) -> pd.DataFrame:
    columns = [
        "group",
        "label",
        "family",
        "config",
        "bits",
        "bytes",
        "value",
        "low",
        "high",
        "blocks",
        "frontier",
    ]
    better = fresh(facts, metric).set_index("config")
    rows: list[tuple[Any, ...]] = []
    samples = facts.rows("sample", metric)
    edge = frontier(samples.bits.to_numpy(float), samples.value.to_numpy(float), direction)
    rows += [
        ("design", "design", "", r.config, r.bits, r.bytes, r.value, math.nan, math.nan, 0, bool(e))
        for r, e in zip(samples.itertuples(), edge, strict=True)
    ]
    for group, source in (("uniform", "uniform"), ("full precision", "reference")):
        for r in facts.rows(source, metric).drop_duplicates("config").itertuples():
            kind = family(facts.configs[r.config]) if group == "uniform" else ""
            name = f"aq {round(2 * r.bits) / 2:g}" if kind == "aq" else scheme_name(facts.configs[r.config])
            value = (r.value, math.nan, math.nan, 0)
            if r.config in better.index:
                f = better.loc[r.config]
                value = (f.value, f.low, f.high, int(f.blocks))
            rows.append((group, name, kind, r.config, r.bits, r.bytes, *value, False))
    for m in front(facts, metric).itertuples():
        if not math.isnan(m.measured):
            rows.append(
                (
                    "found",
                    "winner" if m.winner else "found",
                    "",
                    m.config,
                    m.bits,
                    m.bytes,
                    m.measured,
                    m.low,
                    m.high,
                    m.blocks,
                    False,
                )
            )
    limit = number((facts.front.get("budget") or {}).get("bits"))
    if not math.isnan(limit):
        rows.append(("budget", "budget", "", "", limit, math.nan, math.nan, math.nan, math.nan, 0, False))
    return _table(rows, columns)


def front(facts: Facts, metric: str | None = None) -> pd.DataFrame:
    """config, winner, bits, bytes, bops, latency_ms, predicted, measured, low, high, blocks of every
    member, smallest first, the values of ``metric`` (default: the objective); then psnr_predicted, psnr,
    psnr_low, psnr_high, in dB."""
    metric = metric or facts.objective
    rows, blocks = [], _count((facts.front.get("comparison") or {}).get("blocks"))
    for member in facts.front.get("members") or []:
        body = member.get("config")
        config = QuantConfig.from_dict(body, "a member of the front").digest if isinstance(body, dict) else ""
        cost = [number(member.get(k)) for k in ("bits_per_weight", "bytes", "bops", "latency_ms")]
        row: list[Any] = [config, bool(config) and config == facts.front.get("winner"), *cost]
        for name, more in ((metric, [blocks]), ("psnr", [])):
            measured = (member.get("measured") or {}).get(name) or {}
            row += [
                number((member.get("predicted") or {}).get(name)),
                *(number(measured.get(k)) for k in ("value", "low", "high")),
                *more,
            ]
        rows.append(row)
    columns = [
        "config",
        "winner",
        "bits",
        "bytes",
        "bops",
        "latency_ms",
        "predicted",
        "measured",
        "low",
        "high",
        "blocks",
    ]
    columns += ["psnr_predicted", "psnr", "psnr_low", "psnr_high"]
    return _table(rows, columns).sort_values("bits", kind="stable", ignore_index=True)


def layers(facts: Facts) -> pd.DataFrame:
    """One row a layer, most harmful first: its place and size, the effect that ranks it, the real swaps, and
    what the winner gives it, mean |SHAP| and its signed form (log units) of the surrogate, and the decibels
    of PSNR that the swap loses, with their interval.
    """
    effects = {str(r.get("name")): r for r in facts.sensitivity.get("layers") or []}
    real = {str(r.get("layer")): r for r in facts.validation.get("rows") or []}
    winner, rows = facts.winner(), []
    for name in facts.layers or dict.fromkeys([*effects, *real]):
        node, effect, swap = facts.layers.get(name, {}), effects.get(name, {}), real.get(name, {})
        operator, block = (str(node.get(k) or effect.get(k) or "") for k in ("operator", "block"))
        size = float(np.prod(node["shape"])) if "shape" in node else math.nan
        chosen = winner[name] if winner else None
        rows.append(
            (
                name,
                operator,
                block,
                size,
                number(node.get("macs")),
                *(number(effect.get(k)) for k in ("effect", "low", "high")),
                *(number(swap.get(k)) for k in ("real", "low", "high")),
                _count(swap.get("n")),
                str(chosen.weight) if chosen else "",
                winner.mean_act(name) if winner else math.nan,
                *(
                    number(effect.get(k))
                    for k in ("shap", "shap_signed", "psnr_effect", "psnr_low", "psnr_high")
                ),
            )
        )
    columns = [
        "layer",
        "operator",
        "block",
        "weights",
        "macs",
        "effect",
        "low",
        "high",
        "real",
        "real_low",
        "real_high",
        "swaps",
        "scheme",
        "act",
        "shap",
        "shap_signed",
        "psnr_effect",
        "psnr_low",
        "psnr_high",
    ]
    return _table(rows, columns).sort_values(
        "effect", ascending=False, na_position="last", kind="stable", ignore_index=True
    )


def layer_schemes(facts: Facts) -> pd.DataFrame:
    """layer, scheme, error, damage, effect, shap: of every layer with every weight scheme or activation
    width (a8) that was fitted: relative squared error of its output (of its weight, where inputs are
    unknown) and of the denoiser's output with that layer alone, predicted effect of going there from the
    swap's first scheme, and mean SHAP value, in the objective's units, of configurations that give it
    that."""
    effects = {str(r.get("name")): r for r in facts.sensitivity.get("layers") or []}
    keys = dict.fromkeys(facts.features)
    for name, row in effects.items():
        keys |= dict.fromkeys(
            (name, str(s)) for part in ("schemes", "shap_schemes") for s in row.get(part) or {}
        )
    rows = []
    for name, scheme in keys:
        row, known = effects.get(name, {}), facts.features.get((name, scheme), {})
        parts = [number((row.get(k) or {}).get(scheme)) for k in ("schemes", "shap_schemes")]
        rows.append((name, scheme, number(known.get("error")), number(known.get("damage")), *parts))
    return _table(rows, ["layer", "scheme", "error", "damage", "effect", "shap"])


def operators(facts: Facts) -> pd.DataFrame:
    """name, effect, low, high, layers: the mean effect of a layer of each operator type, most harmful
    first."""
    return _effects(facts, "operators").sort_values(
        "effect", ascending=False, na_position="last", kind="stable", ignore_index=True
    )


def blocks(facts: Facts) -> pd.DataFrame:
    """name, effect, low, high, layers: the mean effect of a layer of each block, in execution order."""
    order: dict[str, int] = {}
    for node in facts.layers.values():
        order.setdefault(str(node.get("block")), len(order))
    table = _effects(facts, "blocks")
    place = table.name.map(lambda name: order.get(name, len(order)))
    return (
        table.assign(place=place).sort_values("place", kind="stable", ignore_index=True).drop(columns="place")
    )


def _effects(facts: Facts, key: str) -> pd.DataFrame:
    rows = []
    for r in facts.sensitivity.get(key) or []:
        members = r.get("layers")
        count = len(members) if isinstance(members, list) else number(members)
        rows.append((str(r.get("name")), *(number(r.get(k)) for k in ("effect", "low", "high")), count))
    return _table(rows, EFFECT_COLUMNS)


def chosen_schemes(facts: Facts) -> pd.DataFrame:
    """operator, scheme, layers, weights, share: what the winner gives to each operator type; ``share`` of
    its layers."""
    winner, columns = facts.winner(), ["operator", "scheme", "layers", "weights", "share"]
    if winner is None or not facts.layers:
        return _table([], columns)
    rows = [
        (str(n["operator"]), str(winner[k].weight), 1, float(np.prod(n["shape"])))
        for k, n in facts.layers.items()
    ]
    table = _table(rows, columns[:-1]).groupby(["operator", "scheme"], as_index=False, sort=False).sum()
    table["share"] = table.layers / table.groupby("operator").layers.transform("sum")
    rank = {s: (Scheme.parse(s).code_bits(9), s) for s in set(table.scheme)}
    table["rank"] = table.scheme.map(rank)
    place = {
        operator: i
        for i, operator in enumerate(dict.fromkeys(str(n["operator"]) for n in facts.layers.values()))
    }
    table["place"] = table.operator.map(place)
    return table.sort_values(["place", "rank"], ignore_index=True)[columns]


def surrogate(facts: Facts) -> pd.DataFrame:
    """model, within_budget_srcc, among_good, good, srcc, kendall, ndcg10, r2, noise_ceiling, good_ceiling:
    out-of-fold scores of the surrogate, then its baselines; ``among_good`` is the within-budget SRCC among
    the ``good`` configurations, of which there are so many (NaN where they are too few, or the model has
    none)."""
    keys = ["within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling"]
    own: Mapping[str, Any] = facts.sensitivity.get("surrogate") or {}
    good = own.get("among_good") or {}
    models = {"surrogate": own, **(own.get("baselines") or {})} if own else {}
    among = {"surrogate": good.get("srcc"), **(good.get("baselines") or {})}
    ceilings = {"surrogate": good.get("noise_ceiling")}
    rows = []
    for name, scores in models.items():
        first, *rest = (number(scores.get(k)) for k in keys)
        rows.append(
            (
                str(name),
                first,
                number(among.get(name)),
                number(good.get("count")),
                *rest,
                number(ceilings.get(name)),
            )
        )
    return _table(rows, ["model", keys[0], "among_good", "good", *keys[1:], "good_ceiling"])


def surrogate_scatter(facts: Facts) -> pd.DataFrame:
    """config, bits, predicted, measured: out-of-fold predictions beside the measured objective."""
    rows = [
        (str(r.get("config", "")), *(number(r.get(k)) for k in ("bits", "predicted", "measured")))
        for r in facts.sensitivity.get("scatter") or []
    ]
    return (
        _table(rows, ["config", "bits", "predicted", "measured"])
        .dropna(subset=["predicted", "measured"])
        .reset_index(drop=True)
    )


def swaps(facts: Facts) -> pd.DataFrame:
    """layer, operator, predicted, real, low, high, n, checks: predicted effects beside the mean of n real
    swaps and its 90 % interval; ``checks``: "random" layers, or "top" ones, which were swapped because the
    ranking puts them first."""
    rows = [
        (
            str(r.get("layer")),
            str(facts.layers.get(str(r.get("layer")), {}).get("operator", "")),
            *(number(r.get(k)) for k in ("predicted", "real", "low", "high")),
            _count(r.get("n")),
            str(r.get("checks") or "random"),
        )
        for r in facts.validation.get("rows") or []
    ]
    return _table(rows, ["layer", "operator", "predicted", "real", "low", "high", "n", "checks"])


def agreement(facts: Facts) -> pd.DataFrame:
    """half, srcc, sign_agreement, layers, flips: how predicted effects agree with real swaps of layers
    drawn at random, and of those that the ranking puts first; empty where these were not kept apart."""
    halves = {
        "drawn at random": facts.validation.get("random"),
        "first in the ranking": facts.validation.get("top"),
    }
    rows = [
        (
            name,
            number(half.get("srcc")),
            number(half.get("sign_agreement")),
            _count(half.get("layers")),
            _count(half.get("flips")),
        )
        for name, half in halves.items()
        if half
    ]
    return _table(rows, ["half", "srcc", "sign_agreement", "layers", "flips"])


def comparison(facts: Facts) -> pd.DataFrame:
    """which, scheme, config, bits, bytes, value, low, high, psnr, psnr_low, psnr_high, blocks: found and
    uniform on the same fresh seeds, then found minus uniform (paired), then what the winner was held
    against; intervals are 95 %."""
    columns = [
        "which",
        "scheme",
        "config",
        "bits",
        "bytes",
        "value",
        "low",
        "high",
        "psnr",
        "psnr_low",
        "psnr_high",
        "blocks",
    ]
    stored = facts.front.get("comparison") or {}
    if "winner" not in stored:
        return _table([], columns)
    better, blocks = (
        [fresh(facts, m).set_index("config") for m in (facts.objective, "psnr")],
        _count(stored.get("blocks")),
    )
    found = [
        ("found", stored["winner"]),
        ("uniform", stored.get("uniform")),
        *(("against", row) for row in stored.get("against") or []),
    ]
    rows: list[list[Any]] = []
    for which, side in found:
        side = side or {}
        config = str(side.get("config", ""))
        values = [number(v) for v in next((v for v in side.values() if isinstance(v, list)), [])]
        row = [
            which,
            str(side.get("scheme") or side.get("name") or "mixed"),
            config,
            number(side.get("bits")),
            number(side.get("bytes")),
        ]
        for table, mean in zip(
            better, (float(np.mean(values)) if values else math.nan, number(side.get("psnr"))), strict=True
        ):
            known = table.loc[config] if config in table.index else None
            row += [mean if known is None or math.isfinite(mean) else float(known.value)]
            row += [math.nan, math.nan] if known is None else [float(known.low), float(known.high)]
        rows.append([*row, blocks])
    sizes, changes = (
        [rows[0][i] - rows[1][i] for i in (3, 4)],
        [stored.get(k) or {} for k in ("difference", "psnr_difference")],
    )
    ends = [number(change.get(k)) for change in changes for k in ("value", "low", "high")]
    rows.insert(2, ["difference", "found minus uniform", "", *sizes, *ends, blocks])
    return _table(rows, columns)


def same_quality(facts: Facts) -> pd.DataFrame:
    """uniform, metric, value, bytes, found_bytes, share: for each uniform configuration the size from
    which on the front is measured as good on fresh seeds, and its share of the uniform one's (NaN where no
    member is), smallest first."""
    rows = []
    for r in (facts.front.get("comparison") or {}).get("same_quality") or []:
        size, found = number(r.get("bytes")), number(r.get("found_bytes"))
        rows.append(
            (str(r.get("uniform")), str(r.get("metric")), number(r.get("value")), size, found, found / size)
        )
    return _table(rows, ["uniform", "metric", "value", "bytes", "found_bytes", "share"]).sort_values(
        "bytes", kind="stable", ignore_index=True
    )
