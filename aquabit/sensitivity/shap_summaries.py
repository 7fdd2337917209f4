"""SHAP values as a report shows them: in the objective's units, by operator type for single
configurations, by scheme for single layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from aquabit.graph import layers as graph_layers
from aquabit.sensitivity.surrogate.fit import FittedSurrogate

SHOWN = 120  # configurations: evenly spread over the measured values


def shap_in_units(fitted: FittedSurrogate, values: np.ndarray, base: float) -> np.ndarray:
    """SHAP values [n, layers] of ``shap_by_layer`` in the objective's units, positive = worse: each row sums
    to what the prediction is worse than that of ``base``.

    A logarithm's change is shared out by the logarithmic mean, as index decompositions do (LMDI, Ang 2004,
    eq. 3): all values of a row are multiplied by one positive number, (f(base + sum) - f(base)) / sum.
    """
    units = fitted.surrogate.target_.to_units
    total = values.sum(1)
    step = np.where(np.abs(total) < 1e-6, 1e-6, total)  # where nothing changes: the slope
    factor = fitted.sign * (units(base + step) - units(np.array(base))) / step
    return np.asarray(values * factor[:, None])


def shap_by_operator(fitted: FittedSurrogate, values: np.ndarray, base: float) -> dict[str, Any]:
    """The value that studies keep as "swarm": "operators", "configs" (digests, at most SHOWN), and for each
    configuration and operator type "shap" (sum over its layers, in units) and "bits" (mean code bits of its
    weights)."""
    nodes, space = graph_layers(fitted.graph), fitted.space
    operators = list(dict.fromkeys(str(nodes[name]["operator"]) for name in space.layers))
    belongs = np.array([[nodes[name]["operator"] == o for o in operators] for name in space.layers], float)
    order = np.argsort(fitted.y, kind="stable")
    rows = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))]
    size = belongs * np.array([float(np.prod(nodes[name]["shape"])) for name in space.layers])[:, None]
    code_bits = fitted.encoder.bits[np.arange(len(space.layers)), fitted.choices.weights[rows]]
    shap = shap_in_units(fitted, values, base)[rows] @ belongs
    bits = code_bits @ (size / size.sum(0))
    return {
        "operators": operators,
        "configs": [fitted.configs[i] for i in rows],
        "shap": _short(shap),
        "bits": _short(bits),
    }


def shap_by_scheme(fitted: FittedSurrogate, values: np.ndarray, base: float) -> list[dict[str, float]]:
    """Per layer: {scheme: mean SHAP value, in units, of the configurations that give it that scheme};
    schemes never drawn are left out."""
    units, names = shap_in_units(fitted, values, base), [str(s) for s in fitted.space.schemes]
    out = []
    for i in range(units.shape[1]):
        drawn = fitted.choices.weights[:, i]
        out.append({names[j]: float(units[drawn == j, i].mean()) for j in np.unique(drawn)})
    return out


def _short(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{v:.5g}") for v in row] for row in values]
