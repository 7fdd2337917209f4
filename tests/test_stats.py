"""Intervals carry their level, hold the truth as often as they say, and survive storage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from aquabit.errors import AquabitError
from aquabit.jsonio import defined
from aquabit.stats import (
    LEVEL,
    OLD_LEVEL,
    Interval,
    around_replicates,
    between_percentiles,
    mean_interval,
    paired_difference,
)

NUMBERS = st.one_of(st.floats(-1e9, 1e9), st.just(math.nan))


@given(st.builds(Interval, NUMBERS, NUMBERS, NUMBERS, st.sampled_from([0.9, 0.95, 0.99])))
def test_a_stored_interval_comes_back(found: Interval) -> None:
    again = Interval.from_dict(defined(found.to_dict()), OLD_LEVEL)
    assert np.array_equal([*again], [*found], equal_nan=True) and again.level == found.level


def test_what_was_stored_without_a_level_has_the_one_of_its_time() -> None:
    old = Interval.from_dict({"value": 1, "low": 0.5, "high": None}, OLD_LEVEL)
    assert (old.value, old.low, old.percent) == (1.0, 0.5, "90 %") and math.isnan(old.high) and not old.known
    assert Interval.from_dict(None).percent == "95 %" and not Interval.from_dict(None).holds_zero
    assert Interval(0.1, -0.1, 0.3).holds_zero and not Interval(0.2, 0.1, 0.3).holds_zero
    assert Interval(0.0, 0.0, 0.0, 0.995).percent == "99.5 %"


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_means_have_students_interval(level: float) -> None:
    values = [1.0, 2.5, 2.0, 4.0]
    truth = reference.ttest_1samp(values, 0).confidence_interval(level)
    found = mean_interval(values, level)
    assert [*found] == pytest.approx([np.mean(values), truth.low, truth.high]) and found.level == level
    assert found.half == pytest.approx((truth.high - truth.low) / 2)
    alone = mean_interval([3.0])
    assert alone.value == 3 and not alone.known and alone.level == LEVEL
    with pytest.raises(AquabitError, match="at least one value"):
        mean_interval([])


def test_paired_differences_are_of_blocks() -> None:
    a, b = [3.0, 5.0, 9.0], [1.0, 4.0, 5.0]
    assert paired_difference(a, b) == mean_interval([2.0, 1.0, 4.0])
    with pytest.raises(AquabitError, match="got 3 and 2"):
        paired_difference(a, b[:2])


def test_intervals_hold_the_truth_as_often_as_their_level_says() -> None:
    rng = np.random.default_rng(0)
    held = [mean_interval(rng.normal(7, 2, 5)) for _ in range(2000)]
    assert np.mean([i.low <= 7 <= i.high for i in held]) == pytest.approx(LEVEL, abs=0.015)
    draws = rng.normal(size=(4001, 3))
    low, high = between_percentiles(draws)
    assert ((draws >= low) & (draws <= high)).mean(0) == pytest.approx([LEVEL] * 3, abs=1e-3)
    assert between_percentiles(draws, 0.5)[0] == pytest.approx(np.quantile(draws, 0.25, axis=0))
    none = between_percentiles(np.empty((0, 2)))
    assert np.isnan(none).all() and np.shape(none) == (2, 2)


def test_replicates_give_an_interval_of_their_own_errors() -> None:
    estimate, replicates = np.array([1.0, -2.0]), np.array([[2.0, -2.0], [0.0, -2.0], [2.0, -5.0]])
    low, high = around_replicates(estimate, replicates, factor=2.0)
    half = 2 * reference.t.ppf(0.975, 3) * np.array([1.0, math.sqrt(3)])
    assert high - estimate == pytest.approx(half) and estimate - low == pytest.approx(half)
    assert np.isnan(around_replicates(estimate, replicates[:1])).all()
