"""The tables behind every figure: each function returns a DataFrame, ``write`` puts it beside the figure as CSV and LaTeX."""

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
    rows = [(kind, reason, len(part), part.config.iloc[0]) for (kind, reason), part in failed.groupby(["kind", "reason"], sort=False)]
    return _table(rows, ["kind", "reason", "times", "example"]).sort_values("times", ascending=False, kind="stable", ignore_index=True)


def fresh(facts: Facts) -> pd.DataFrame:
    """config, value, low, high, blocks: means over blocks of seeds that the search never saw, t intervals at ``LEVEL``."""
    from scipy.stats import t

    rows = []
    for config, part in facts.rows("fresh").groupby("config", sort=False):
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
    """group, label, family, config, bits, bytes, value, low, high, blocks, frontier: what the scatter of quality against bits shows.

    Groups: random, uniform, full precision, found (measured values of the front), and budget (its bits). Where a configuration was
    measured on blocks of fresh seeds, value and interval are theirs and ``blocks`` counts them; 0 blocks are the study's own seeds.
    ``family`` is that of uniform configurations: usq, usq h, vq, aq.
    """
    columns = ["group", "label", "family", "config", "bits", "bytes", "value", "low", "high", "blocks", "frontier"]
    better = fresh(facts).set_index("config")
    rows: list[tuple[Any, ...]] = []
    samples = facts.rows("sample")
    edge = frontier(samples.bits.to_numpy(float), samples.value.to_numpy(float), facts.direction)
    rows += [
        ("random", "random", "", r.config, r.bits, r.bytes, r.value, math.nan, math.nan, 0, bool(e))
        for r, e in zip(samples.itertuples(), edge, strict=True)
    ]
    for group, source in (("uniform", "uniform"), ("full precision", "reference")):
        for r in facts.rows(source).drop_duplicates("config").itertuples():
            kind = family(facts.configs[r.config]) if group == "uniform" else ""
            name = f"aq {round(2 * r.bits) / 2:g}" if kind == "aq" else scheme_name(facts.configs[r.config])
            value = (r.value, math.nan, math.nan, 0)
            if r.config in better.index:
                f = better.loc[r.config]
                value = (f.value, f.low, f.high, int(f.blocks))
            rows.append((group, name, kind, r.config, r.bits, r.bytes, *value, False))
    for m in front(facts).itertuples():
        if not math.isnan(m.measured):
            rows.append(
                ("found", "winner" if m.winner else "found", "", m.config, m.bits, m.bytes, m.measured, m.low, m.high, m.blocks, False)
            )
    limit = number((facts.front.get("budget") or {}).get("bits"))
    if not math.isnan(limit):
        rows.append(("budget", "budget", "", "", limit, math.nan, math.nan, math.nan, math.nan, 0, False))
    return _table(rows, columns)


def front(facts: Facts) -> pd.DataFrame:
    """config, winner, bits, bytes, bops, latency_ms, predicted, measured, low, high, blocks of every member, smallest first."""
    rows, blocks = [], _count((facts.front.get("comparison") or {}).get("blocks"))
    for member in facts.front.get("members") or []:
        body = member.get("config")
        config = QuantConfig.from_dict(body, "a member of the front").digest if isinstance(body, dict) else ""
        measured = (member.get("measured") or {}).get(facts.objective) or {}
        predicted = number((member.get("predicted") or {}).get(facts.objective))
        cost = [number(member.get(k)) for k in ("bits_per_weight", "bytes", "bops", "latency_ms")]
        values = [number(measured.get(k)) for k in ("value", "low", "high")]
        rows.append((config, bool(config) and config == facts.front.get("winner"), *cost, predicted, *values, blocks))
    columns = ["config", "winner", "bits", "bytes", "bops", "latency_ms", "predicted", "measured", "low", "high", "blocks"]
    return _table(rows, columns).sort_values("bits", kind="stable", ignore_index=True)


def layers(facts: Facts) -> pd.DataFrame:
    """One row a layer, most harmful first: its place and size, the effect that ranks it, the real swaps, and what the winner gives it,
    and mean |SHAP| and its signed form (log units) of the surrogate."""
    effects = {str(r.get("name")): r for r in facts.sensitivity.get("layers") or []}
    real = {str(r.get("layer")): r for r in facts.validation.get("rows") or []}
    winner, rows = facts.winner(), []
    for name in facts.layers or dict.fromkeys([*effects, *real]):
        node, effect, swap = facts.layers.get(name, {}), effects.get(name, {}), real.get(name, {})
        operator, block = (str(node.get(k) or effect.get(k) or "") for k in ("operator", "block"))
        size = float(np.prod(node["shape"])) if "shape" in node else math.nan
        chosen = winner[name] if winner else None
        rows.append((
            name, operator, block, size, number(node.get("macs")), *(number(effect.get(k)) for k in ("effect", "low", "high")),
            *(number(swap.get(k)) for k in ("real", "low", "high")), _count(swap.get("n")),
            str(chosen.weight) if chosen else "", winner.mean_act(name) if winner else math.nan,
            *(number(effect.get(k)) for k in ("shap", "shap_signed")),
        ))  # fmt: skip
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
    ]
    return _table(rows, columns).sort_values("effect", ascending=False, na_position="last", kind="stable", ignore_index=True)


def layer_schemes(facts: Facts) -> pd.DataFrame:
    """layer, scheme, error, damage, effect, shap: of every layer with every weight scheme or activation width (a8) that was fitted:
    relative squared error of its output (of its weight, where inputs are unknown) and of the denoiser's output with that layer alone,
    predicted effect of going there from the swap's first scheme, and mean SHAP value, in the objective's units, of configurations that
    give it that."""
    effects = {str(r.get("name")): r for r in facts.sensitivity.get("layers") or []}
    keys = dict.fromkeys(facts.features)
    for name, row in effects.items():
        keys |= dict.fromkeys((name, str(s)) for part in ("schemes", "shap_schemes") for s in row.get(part) or {})
    rows = []
    for name, scheme in keys:
        row, known = effects.get(name, {}), facts.features.get((name, scheme), {})
        parts = [number((row.get(k) or {}).get(scheme)) for k in ("schemes", "shap_schemes")]
        rows.append((name, scheme, number(known.get("error")), number(known.get("damage")), *parts))
    return _table(rows, ["layer", "scheme", "error", "damage", "effect", "shap"])


def operators(facts: Facts) -> pd.DataFrame:
    """name, effect, low, high, layers: the mean effect of a layer of each operator type, most harmful first."""
    return _effects(facts, "operators").sort_values("effect", ascending=False, na_position="last", kind="stable", ignore_index=True)


def blocks(facts: Facts) -> pd.DataFrame:
    """name, effect, low, high, layers: the mean effect of a layer of each block, in execution order."""
    order: dict[str, int] = {}
    for node in facts.layers.values():
        order.setdefault(str(node.get("block")), len(order))
    table = _effects(facts, "blocks")
    place = table.name.map(lambda name: order.get(name, len(order)))
    return table.assign(place=place).sort_values("place", kind="stable", ignore_index=True).drop(columns="place")


def _effects(facts: Facts, key: str) -> pd.DataFrame:
    rows = []
    for r in facts.sensitivity.get(key) or []:
        members = r.get("layers")
        count = len(members) if isinstance(members, list) else number(members)
        rows.append((str(r.get("name")), *(number(r.get(k)) for k in ("effect", "low", "high")), count))
    return _table(rows, EFFECT_COLUMNS)


def chosen_schemes(facts: Facts) -> pd.DataFrame:
    """operator, scheme, layers, weights, share: what the winner gives to each operator type; ``share`` of its layers."""
    winner, columns = facts.winner(), ["operator", "scheme", "layers", "weights", "share"]
    if winner is None or not facts.layers:
        return _table([], columns)
    rows = [(str(n["operator"]), str(winner[k].weight), 1, float(np.prod(n["shape"]))) for k, n in facts.layers.items()]
    table = _table(rows, columns[:-1]).groupby(["operator", "scheme"], as_index=False, sort=False).sum()
    table["share"] = table.layers / table.groupby("operator").layers.transform("sum")
    rank = {s: (Scheme.parse(s).code_bits(9), s) for s in set(table.scheme)}
    table["rank"] = table.scheme.map(rank)
    place = {operator: i for i, operator in enumerate(dict.fromkeys(str(n["operator"]) for n in facts.layers.values()))}
    table["place"] = table.operator.map(place)
    return table.sort_values(["place", "rank"], ignore_index=True)[columns]


def surrogate(facts: Facts) -> pd.DataFrame:
    """model, within_budget_srcc, srcc, kendall, ndcg10, r2, noise_ceiling: out-of-fold scores of the surrogate, then its baselines."""
    keys = ["within_budget_srcc", "srcc", "kendall", "ndcg10", "r2", "noise_ceiling"]
    own: Mapping[str, Any] = facts.sensitivity.get("surrogate") or {}
    models = {"surrogate": own, **(own.get("baselines") or {})} if own else {}
    return _table([(str(name), *(number(scores.get(k)) for k in keys)) for name, scores in models.items()], ["model", *keys])


def surrogate_scatter(facts: Facts) -> pd.DataFrame:
    """config, bits, predicted, measured: out-of-fold predictions beside the measured objective."""
    rows = [
        (str(r.get("config", "")), *(number(r.get(k)) for k in ("bits", "predicted", "measured")))
        for r in facts.sensitivity.get("scatter") or []
    ]
    return _table(rows, ["config", "bits", "predicted", "measured"]).dropna(subset=["predicted", "measured"]).reset_index(drop=True)


def swaps(facts: Facts) -> pd.DataFrame:
    """layer, operator, predicted, real, low, high, n: predicted effects beside the mean of n real swaps and its interval."""
    rows = [
        (str(r.get("layer")), str(facts.layers.get(str(r.get("layer")), {}).get("operator", "")),
         *(number(r.get(k)) for k in ("predicted", "real", "low", "high")), _count(r.get("n")))
        for r in facts.validation.get("rows") or []
    ]  # fmt: skip
    return _table(rows, ["layer", "operator", "predicted", "real", "low", "high", "n"])


def comparison(facts: Facts) -> pd.DataFrame:
    """which, scheme, config, bits, bytes, value, low, high, blocks: found and uniform on the same fresh seeds, then found minus uniform."""
    columns = ["which", "scheme", "config", "bits", "bytes", "value", "low", "high", "blocks"]
    stored = facts.front.get("comparison") or {}
    if not stored:
        return _table([], columns)
    better, blocks = fresh(facts).set_index("config"), _count(stored.get("blocks"))
    rows: list[tuple[Any, ...]] = []
    for which, key in (("found", "winner"), ("uniform", "uniform")):
        side = stored.get(key) or {}
        config = str(side.get("config", ""))
        values = [number(v) for v in next((v for v in side.values() if isinstance(v, list)), [])]
        known = better.loc[config] if config in better.index else None
        mean = float(np.mean(values)) if values else math.nan if known is None else float(known.value)
        ends = (math.nan, math.nan) if known is None else (float(known.low), float(known.high))
        scheme = str(side.get("scheme") or "mixed")
        rows.append((which, scheme, config, number(side.get("bits")), number(side.get("bytes")), mean, *ends, blocks))
    change = stored.get("difference") or {}
    sizes = [rows[0][i] - rows[1][i] for i in (3, 4)]
    rows.append(("difference", "found minus uniform", "", *sizes, *(number(change.get(k)) for k in ("value", "low", "high")), blocks))
    return _table(rows, columns)
