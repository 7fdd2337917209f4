"""SHAP values in the objective's units, and the learning curve, on a made-up model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aquabit.sensitivity.effects.predicted import shap_by_layer
from aquabit.sensitivity.shap_summaries import SHOWN, shap_by_operator, shap_by_scheme, shap_in_units
from aquabit.sensitivity.surrogate.fit import fit_from_study
from aquabit.sensitivity.surrogate.learning_curve import learning_curve
from tests.worlds import OPERATORS, PLANTED, World


@pytest.mark.parametrize("objective", ["fid", "is"])
def test_shap_in_units_adds_up_to_what_the_prediction_is_worse(objective: str, tmp_path: Path) -> None:
    fitted = fit_from_study(World().study(tmp_path / "s.db"), objective, baselines=())
    values, base = shap_by_layer(fitted)
    units = shap_in_units(fitted, values, base)
    predicted, average = (fitted.values(fitted.choices), fitted.surrogate.target_.to_units(np.array(base)))
    assert units.sum(1) == pytest.approx(fitted.sign * (predicted - average), rel=1e-3, abs=1e-3)
    assert (np.sign(units) == np.sign(values)).all(), "positive = worse, whatever the direction"

    found = shap_by_operator(fitted, values, base)
    rows = [fitted.configs.index(c) for c in found["configs"]]
    assert len(rows) == min(SHOWN, len(fitted.y)) and np.array(found["shap"]).sum(1) == pytest.approx(
        units[rows].sum(1), rel=1e-3, abs=1e-3
    )
    assert set(np.argsort(-np.abs(units).mean(0))[: len(PLANTED)]) == set(PLANTED)
    assert found["operators"] == list(OPERATORS), "layer i of the made-up model has operator i mod 6"
    for row, shap, bits in zip(rows, found["shap"], found["bits"], strict=True):
        for o in range(len(OPERATORS)):
            own = range(o, 60, len(OPERATORS))
            assert shap[o] == pytest.approx(sum(units[row, i] for i in own), rel=1e-3, abs=1e-3)
            schemes = [fitted.space.schemes[fitted.choices.weights[row, i]] for i in own]
            assert bits[o] == pytest.approx(np.mean([s.bits for s in schemes]), rel=1e-3)
    assert min(fitted.y) in fitted.y[rows] and max(fitted.y) in fitted.y[rows], (
        "the best and the worst are shown"
    )

    by_scheme = shap_by_scheme(fitted, values, base)
    names = [str(s) for s in fitted.space.schemes]
    for i in (0, 3):
        counts = {s: int((fitted.choices.weights[:, i] == names.index(s)).sum()) for s in by_scheme[i]}
        assert sum(counts.values()) == len(fitted.y)
        assert sum(by_scheme[i][s] * n for s, n in counts.items()) == pytest.approx(
            units[:, i].sum(), abs=1e-6
        )

    for i in PLANTED:
        assert by_scheme[i]["usq2"] > by_scheme[i]["usq4"] > by_scheme[i]["usq8"]

    if objective == "fid":
        curve = learning_curve(fitted)
        assert list(curve.measurements) == [38, 75, 150, 300]
        assert (
            curve.within_budget_srcc.iloc[-1]
            == fitted.scores["within_budget_srcc"]
            > curve.within_budget_srcc.iloc[0] + 0.05
        )
        assert ((curve.low <= curve.within_budget_srcc) & (curve.within_budget_srcc <= curve.high)).all()
