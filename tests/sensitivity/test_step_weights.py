"""Step weights: that their predictions are right where the truth is known, in any unit, and which cells
they are fitted to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from aquabit.scheme import AquabitError
from aquabit.sensitivity.damages import Damages
from aquabit.sensitivity.step_weights import chosen_cells, fit_step_weights
from tests.worlds import model

TRUE = np.array([8.0, 0.0, 1.0, 0.2, 0.1, 0.5, 0.0, 3.0, 12.0, 6.0]) * 1e-3


def errors(count: int, seed: int) -> np.ndarray:
    """[count, steps] of cells of very different sizes, which grow or fall over the steps, as layers'
    errors do."""
    rng = np.random.default_rng(seed)
    size, slope, bend = (
        rng.lognormal(0, 1.5, (count, 1)),
        rng.normal(0, 1.2, (count, 1)),
        rng.normal(0, 0.7, (count, 1)),
    )
    t = np.linspace(-1, 1, len(TRUE))
    return np.asarray(size * np.exp(slope * t + bend * t**2 + 0.05 * rng.normal(size=(count, len(TRUE)))))


@pytest.mark.parametrize("seed", range(4))
def test_predictions_of_other_cells_are_right(seed: int) -> None:
    some, others = errors(60, seed), errors(400, seed + 100)
    rng = np.random.default_rng(seed)
    found = fit_step_weights(some, some @ TRUE * np.exp(0.1 * rng.normal(size=60)))
    assert found.shape == TRUE.shape and (found >= 0).all() and np.isfinite(found).all()
    truth, predicted, equal = others @ TRUE, others @ found, others.sum(1)
    assert spearmanr(predicted, truth)[0] > 0.995 > spearmanr(equal, truth)[0]
    assert np.std(np.log(predicted / truth)) < 0.4 * np.std(np.log(equal / truth))
    assert abs(np.median(np.log(predicted / truth))) < 0.06, "in the unit of the damages"


def test_few_cells_are_enough_to_beat_equal_weights() -> None:
    some, others = errors(15, 7), errors(400, 8)
    found = fit_step_weights(some, some @ TRUE * np.exp(0.1 * np.random.default_rng(0).normal(size=15)))
    truth = others @ TRUE
    assert spearmanr(others @ found, truth)[0] > spearmanr(others.sum(1), truth)[0]


def test_the_unit_of_damages_and_of_errors_does_not_matter() -> None:
    some, others = errors(40, 1), errors(100, 2)
    damages = some @ TRUE * np.exp(0.1 * np.random.default_rng(3).normal(size=40))
    one = fit_step_weights(some, damages)
    assert (fit_step_weights(some, damages) == one).all(), "deterministic"
    for unit in (7.0, 1e-6):
        np.testing.assert_allclose(
            others @ fit_step_weights(some, unit * damages), unit * (others @ one), rtol=0.02
        )
    np.testing.assert_allclose(
        1e-4 * others @ fit_step_weights(1e-4 * some, damages), others @ one, rtol=0.02
    )


def test_what_has_no_error_at_a_step_is_no_reason_to_fail() -> None:
    some = errors(30, 5)
    damages = some @ TRUE
    some[:, 1] = 0.0
    some[3, 4] = 1e6  # as OutputErrors says of what is not finite
    found = fit_step_weights(some, damages)
    assert np.isfinite(found).all() and found[1] == 0 and found[4] * 1e6 <= 2 * damages.max()


@pytest.mark.parametrize(
    "damages", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, -1.0, 2.0], [1.0, float("nan"), 2.0], []]
)
def test_too_few_damages_and_those_that_are_not_positive_are_refused(damages: list[float]) -> None:
    with pytest.raises(AquabitError, match=rf"at least 3 damages above 0, got .* of {len(damages)}$"):
        fit_step_weights(np.ones((len(damages), 4)), np.array(damages))


# ---- cells


def damages_of(layers: int, seed: int = 0) -> Damages:
    space, _ = model(
        layers, seed, schemes=["usq2", "usq3", "usq4", "usq8"], pinned={"l1": "usq4"}, excluded=["l2"]
    )
    rng = np.random.default_rng(seed)
    weights = np.where(space.allowed(), rng.lognormal(-8, 2, space.allowed().shape), np.inf)
    weights[:, 0] = np.where(space.allowed()[:, 0], 0.0, np.inf)
    acts = np.full((layers, len(space.act_choices)), 1e-9)
    return Damages(space, weights, acts)


def test_cells_are_spread_over_the_range_of_damages() -> None:
    known = damages_of(60)
    cells = chosen_cells(known, 40)
    values = [known.weights[c] for c in cells]
    finite = np.sort(known.weights[np.isfinite(known.weights) & (known.weights > 1e-9)])[::-1]
    assert len(set(cells)) == 40 == len(cells) and all(type(i) is int and type(j) is int for i, j in cells)
    assert values[0] == finite[0] and values[-1] == finite[-1] and values == sorted(values, reverse=True)
    ranks = np.searchsorted(-finite, -np.array(values))
    assert np.ptp(np.diff(ranks)) <= 1, "evenly over the ranks"
    assert chosen_cells(known, 40) == cells and len({i for i, _ in cells}) > 25


def test_cells_that_activations_drown_and_those_that_a_layer_may_not_take_are_left_out() -> None:
    known = damages_of(8)
    known.acts[4] = [1e3] * known.acts.shape[1]
    known.weights[5, 1] = 0.0
    cells = chosen_cells(known)
    assert len(cells) == int((np.isfinite(known.weights) & (known.weights > 1e-9)).sum()) - 4, "all there are"
    assert not {i for i, _ in cells} & {2, 4} and (5, 1) not in cells
    assert [j for i, j in cells if i == 1] == [known.space.schemes.index(known.space.choices["l1"][0])]


@pytest.mark.filterwarnings("error")
def test_a_fit_that_runs_away_is_held() -> None:
    """Damages that no weights explain send the search far out; it stays where numbers are finite."""
    rng = np.random.default_rng(243)
    count, steps = int(rng.integers(3, 60)), int(rng.integers(1, 11))
    size = rng.normal(size=(count, 1)) * rng.uniform(0, 8)
    found = np.exp(size + rng.normal(size=(count, steps)) * rng.uniform(0, 3) - 20)
    weights = fit_step_weights(found, np.exp(rng.normal(size=count) * rng.uniform(0, 8) - 25))
    assert np.isfinite(weights).all() and weights.max() > 0
