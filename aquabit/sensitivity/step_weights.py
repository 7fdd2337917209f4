"""How much an error of the denoiser's output at each step moves the image: one weight a step, fitted to
probes.

Output errors on stored inputs are cheap and smooth, but know nothing of the sampler behind them. Probes know
what single (layer, scheme) do to images; with weights that make the errors of a few of them add up to their
damages, output errors speak the probes' unit.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from aquabit.scheme import AquabitError
from aquabit.sensitivity.damages import Damages

# (layer, scheme) that weights are fitted to: SCIENCE section 8 has .983 with 30 and .9825 with 60 of all
# damages
CELLS = 60
MIN_CELLS = 3  # cells below which nothing is fitted
STARTS = 5  # of the fit, which has local optima
TINY = 1e-12  # relative error that counts as none
REACH = 50.0  # logarithm by which a weight may lie beside the common level: further, exp would overflow


def chosen_cells(damages: Damages, count: int = CELLS) -> list[tuple[int, int]]:
    """(layer, scheme) indices to fit weights to: evenly spread over the ranks of those whose damage
    exceeds what the layer's activations do, one a layer before a second one."""
    acts = damages.acts.max(1, initial=0.0)
    known = np.argwhere(np.isfinite(damages.weights)).tolist()
    cells = [(i, j) for i, j in known if damages.weights[i, j] > max(acts[i], TINY)]
    cells.sort(key=lambda c: (-damages.weights[c], c))
    if len(cells) <= count:
        return cells
    return [cells[k] for k in np.unique(np.linspace(0, len(cells) - 1, count).round().astype(int))]


def fit_step_weights(errors: np.ndarray, damages: np.ndarray) -> np.ndarray:
    """Weights [steps], none negative, that bring errors [n, steps] @ weights near damages [n] in ratio: least
    squares of logarithms.

    Errors of neighbouring steps are nearly proportional, so weights are not unique, and need not be.
    Deterministic. Raises AquabitError for fewer than three cells and for damages that are not positive.
    """
    errors, damages = np.asarray(errors, float), np.asarray(damages, float)
    if len(damages) < MIN_CELLS or not (damages > 0).all():
        raise AquabitError(
            f"step weights need at least {MIN_CELLS} damages above 0, got {damages[:3].tolist()} of"
            f" {len(damages)}"
        )
    errors = np.maximum(errors, TINY)
    target = np.log(damages)

    def loss(u: np.ndarray) -> tuple[float, np.ndarray]:
        weights = np.exp(u)
        predicted = errors @ weights
        off = np.log(predicted) - target
        return float(off @ off), (2 * off / predicted) @ errors * weights

    level = float(np.median(target - np.log(errors.sum(1))))
    steps = errors.shape[1]
    noise = [np.random.default_rng(s).normal(size=steps) * (s > 0) for s in range(STARTS)]
    starts = [np.full(steps, level) + own for own in noise]
    bounds = [(level - REACH, level + REACH)] * steps
    fits = [minimize(loss, u, jac=True, method="L-BFGS-B", bounds=bounds) for u in starts]
    found = min(fits, key=lambda f: float(f.fun))
    weights = np.exp(found.x)
    # what no error of that step could make matter
    weights[weights * errors.max(0) < 1e-6 * float((errors @ weights).max())] = 0.0
    return np.asarray(weights)
