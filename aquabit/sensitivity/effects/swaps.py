"""Predicted effects beside real swaps; the two are compared and never mixed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from aquabit.jsonio import defined
from aquabit.scheme import AquabitError, QuantConfig, act_code
from aquabit.sensitivity.damages import context_act
from aquabit.sensitivity.effects.predicted import Player
from aquabit.sensitivity.shared_contexts import group_numbers
from aquabit.sensitivity.surrogate.fit import FittedSurrogate
from aquabit.sensitivity.surrogate.scores import srcc
from aquabit.stats import LEVEL, mean_interval

NEAR = 0.5  # bits per weight from the budget within which a training measurement tells something of it


def validation_scores(
    layers: pd.DataFrame, swaps: pd.DataFrame, direction: str = "min", top: Collection[tuple[str, str]] = ()
) -> dict[str, Any]:
    """How the predicted effects of ``Sensitivity.layers`` agree with real swaps (the table of
    ``Study.flips``).

    ``top`` are the (layer, swap) that were swapped because the ranking put them first (``top_layers``); the
    others were drawn at random. ``srcc`` and ``sign_agreement`` compare, over the random (layer, swap) alone,
    the predicted effect with the mean real one, since layers that were chosen by what is predicted of them
    agree by another measure; ``random`` and ``top`` have srcc, sign_agreement, layers and flips of each half.
    ``flips`` counts all real swaps compared, ``contexts_per_layer`` is their median number; ``rows`` has
    layer, swap, predicted, real, low, high (t interval over contexts at ``level``, None below two), n and
    checks ("top" or "random"). Swaps whose schemes have no prediction are left out.
    """
    schemes = {r["name"]: {**r["schemes"], r["swap"].split(":")[0]: 0.0} for r in layers.to_dict("records")}
    rows: list[dict[str, Any]] = []
    for (layer, before, after), group in swaps.groupby(["layer", "before", "after"], sort=False):
        known = schemes.get(str(layer), {})
        if before not in known or after not in known:
            continue
        real = _worsening(group, direction)
        mean = mean_interval(real)
        rows.append(
            {
                "layer": layer,
                "swap": f"{before}:{after}",
                "predicted": known[after] - known[before],
                "real": mean.value,
                "low": mean.low,
                "high": mean.high,
                "n": len(real),
                "checks": "top" if (str(layer), f"{before}:{after}") in top else "random",
            }
        )
    halves = {half: _agreement([r for r in rows if r["checks"] == half]) for half in ("random", "top")}
    return {
        "srcc": halves["random"]["srcc"],
        "sign_agreement": halves["random"]["sign_agreement"],
        "flips": int(sum(r["n"] for r in rows)),
        "contexts_per_layer": float(np.median([r["n"] for r in rows])) if rows else None,
        **halves,
        "level": LEVEL,
        "rows": defined(rows),
    }


def top_layers(plans: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(layer, swap) that a study's fact "validation_plan" chose because the ranking put them first."""
    return {(layer, swap) for plan in plans for layer, swap in plan["top"]}


def _agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """SRCC (None below three) and share of equal signs (None without any) of predicted and real effects."""
    predicted, truth = np.array([r["predicted"] for r in rows]), np.array([r["real"] for r in rows])
    return {
        "srcc": srcc(predicted, truth) if len(rows) > 2 else None,
        "sign_agreement": float((np.sign(predicted) == np.sign(truth)).mean()) if rows else None,
        "layers": len(rows),
        "flips": int(sum(r["n"] for r in rows)),
    }


def predict_swaps(
    fitted: FittedSurrogate, swaps: pd.DataFrame, configs: Mapping[str, QuantConfig]
) -> pd.DataFrame:
    """Each real swap beside the surrogate's prediction in that swap's own context: the table with
    ``predicted`` and ``real`` (positive = worse) added; ``.attrs["srcc_flips"]`` is their SRCC (None below
    three).

    Raises AquabitError where the surrogate was trained on one of the ends, since that would not be a test.
    """
    ends = [*swaps.config_before, *swaps.config_after]
    seen = set(fitted.configs).intersection(ends)
    if seen:
        raise AquabitError(
            f"{len(seen)} ends of swaps were training configurations, such as {sorted(seen)[0]}; leave them"
            " out of one side"
        )
    out = swaps.copy()
    if len(swaps):
        values = fitted.predict([configs[c] for c in ends])
        out["predicted"] = fitted.sign * (values[len(swaps) :] - values[: len(swaps)])
        out["real"] = _worsening(swaps, fitted.direction)
    out.attrs["srcc_flips"] = srcc(out.predicted.to_numpy(), out.real.to_numpy()) if len(swaps) > 2 else None
    return out


def training_swaps(fitted: FittedSurrogate, players: Sequence[Player], bits: float) -> pd.DataFrame:
    """Named swaps among the training measurements, as the design "swaps" makes them: layer, before, after,
    and what each worsened (real).

    Both ends lie within NEAR real bits per weight of ``bits`` and have their activations at those of the
    contexts.
    """
    named = {p.columns: p for p in players}
    column, act = fitted.space.columns, context_act(fitted.space)
    near = (np.abs(fitted.bits - bits) <= NEAR) & np.isin(fitted.choices.acts, (act_code(act), 16)).all(1)
    groups, rows = group_numbers(fitted.choices), list[tuple[str, str, str, float]]()
    for group in np.flatnonzero(np.bincount(groups, near) > 1):
        for i, j in combinations(np.flatnonzero((groups == group) & near), 2):
            changed = np.flatnonzero(fitted.choices.weights[i] != fitted.choices.weights[j])
            player = named.get(tuple(changed.tolist()))
            if player is None or (fitted.choices.acts[i] != fitted.choices.acts[j]).any():
                continue
            ends = {int(fitted.choices.weights[k, player.column]): float(fitted.y[k]) for k in (i, j)}
            before, after = (ends.get(column[s]) for s in (player.before, player.after))
            if before is not None and after is not None:
                worse = fitted.sign * (after - before)
                rows.append((player.layer, str(player.before), str(player.after), worse))
    return pd.DataFrame(rows, columns=["layer", "before", "after", "real"])


def _worsening(swaps: pd.DataFrame, direction: str) -> np.ndarray:
    change = (swaps.value_after - swaps.value_before).to_numpy(float)
    return np.asarray(change if direction == "min" else -change)
