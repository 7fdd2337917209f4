"""Rows of configurations: to configurations and back, taken, joined, compared; activations that change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquabit.choices import Choices, by_group, in_order
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme, StepGroups, act_bits, act_code
from aquabit.space import SearchSpace

USQ2, USQ4, VQ3 = (Scheme.parse(s) for s in ("usq2", "usq4", "vq3"))
PLAIN = SearchSpace("f" * 16, {"a": (USQ2, USQ4), "out": (Scheme(),), "b": (USQ4, VQ3, USQ2), "pin": (VQ3,)})
STEPS = replace(PLAIN, activations=(4, 8, 6), steps=StepGroups(10, (0, 2, 5)))
KINDS = replace(PLAIN, activations=(8, "i8", "f8"))
BOTH = replace(STEPS, activations=("i8", 6, "f8"))
spaces, seeds = st.sampled_from([PLAIN, STEPS, KINDS, BOTH]), st.integers(0, 10**6)


def drawn(space: SearchSpace, count: int, seed: int) -> tuple[list[QuantConfig], Choices]:
    configs = space.sample(count, seed)
    return configs, Choices.of(space, configs)


@given(spaces, seeds, st.integers(0, 6))
def test_rows_are_their_configurations(space: SearchSpace, seed: int, count: int) -> None:
    configs, rows = drawn(space, count, seed)
    assert len(rows) == count and rows.weights.shape == rows.acts.shape == (count, 4)
    assert [c.digest for c in rows.configs()] == [c.digest for c in configs]
    assert Choices.of(space, rows.configs()) == rows
    assert [row.config.digest for row in rows] == [c.digest for c in configs]
    means = [[c.mean_act(k) for k in space.layers] for c in configs]
    assert np.allclose(rows.mean_bits, np.reshape(means, rows.acts.shape))
    groups = 3 if space.steps else 1
    parts = [[by_group(c[k].act, groups) for k in space.layers] for c in configs]
    bits = [[[act_bits(a) for a in part] for part in row] for row in parts]
    codes = [[[act_code(a) for a in part] for part in row] for row in parts]
    assert np.array_equal(rows.group_bits, np.reshape(bits, (count, 4, groups)))
    assert np.array_equal(rows.group_codes, np.reshape(codes, (count, 4, groups)))


@given(spaces, seeds, st.data())
def test_taking_and_joining_go_by_rows(space: SearchSpace, seed: int, data: st.DataObject) -> None:
    _, rows = drawn(space, 6, seed)
    cut = data.draw(st.integers(0, 6))
    assert Choices.concat([rows[:cut], rows[cut:]]) == rows == Choices.concat(list(rows))
    order = np.array(data.draw(st.permutations(range(6))))
    assert rows[order][np.argsort(order)] == rows
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    assert rows[mask] == rows[np.flatnonzero(mask)]
    assert rows[-1] == rows[5:] and rows[2].config == rows.configs()[2]
    assert Choices.concat([rows, rows]) == rows.under([(), ()])


@given(spaces, seeds)
def test_rows_differ_where_their_configurations_do(space: SearchSpace, seed: int) -> None:
    (first, *others), rows = drawn(space, 5, seed)
    count = [sum(first[k] != other[k] for k in space.layers) for other in others]
    assert rows[1:].apart(rows[0]).tolist() == count and (rows.apart(rows) == 0).all()
    assert np.array_equal(rows[1:].differs(rows[:4]).sum(1), rows[1:].apart(rows[:4]))
    assert (rows[0] == rows[1]) == (count[0] == 0)
    lower = replace(rows, acts=np.where(rows.acts == 8, 6, rows.acts))
    assert (lower == rows) == (not (rows.acts == 8).any()), "activations count as well"


def test_equal_rows_of_two_spaces_are_not_equal() -> None:
    rows = Choices.at(PLAIN, np.array([[1, 0, 2, 3]]), 8)
    assert rows == Choices.at(replace(PLAIN), rows.weights, 8)
    assert rows != Choices.at(replace(PLAIN, activations=(8,)), rows.weights, 8)


@given(spaces, seeds)
def test_variants_change_their_layers_alone(space: SearchSpace, seed: int) -> None:
    _, rows = drawn(space, 3, seed)
    column = {s: j for j, s in enumerate(space.schemes)}
    both = rows.under([((0, column[USQ2]),), ((0, column[USQ4]), (2, column[VQ3])), ()])
    for k, config in enumerate(both.configs()):
        before, variant = rows.configs()[k % 3], k // 3
        wanted = [{"a": USQ2}, {"a": USQ4, "b": VQ3}, {}][variant]
        for name in space.layers:
            expected = replace(before[name], weight=wanted.get(name, before[name].weight))
            assert config[name] == expected


@given(spaces, seeds)
def test_activations_by_their_place(space: SearchSpace, seed: int) -> None:
    levels = (*space.act_choices, 16)
    index = np.random.default_rng(seed).integers(len(levels), size=(4, 4))
    rows = Choices.picked(space, np.zeros((4, 4), int), index, levels)
    assert np.array_equal(rows.act_index(levels), index)
    assert [[c[k].act for k in space.layers] for c in rows.configs()] == [
        [levels[j] for j in i] for i in index
    ]
    assert (rows.act_index((16, *levels)) == np.where(index == len(levels) - 1, 0, index + 1)).all(), (
        "the first"
    )


def test_one_activation_for_all_leaves_excluded_layers_off() -> None:
    rows = Choices.at(STEPS, np.array([[1, 0, 2, 3], [2, 0, 3, 3]]), (8, 6, 6))
    assert all(c["out"] == LayerChoice() and c["pin"].act == (8, 6, 6) for c in rows.configs())


def test_plain_bits_come_before_patterns() -> None:
    patterns = [(4, 8), (8, 4), (6, 8)]
    assert in_order([*patterns, 16, 4, 8, 4, (6, 8)]) == (4, 8, 16, (8, 4), (4, 8), (6, 8))
    assert in_order(["f8", (4, 8), "i8", 16, 8]) == (8, 16, "i8", "f8", (4, 8))


def test_a_space_offers_what_it_names_high_to_low_and_patterns_between_bits() -> None:
    assert KINDS.act_choices == (8, "i8", "f8") and KINDS.closest_act == 8
    halves = replace(BOTH, activations=("f8", 16, 6, "i8"), steps=StepGroups(10, (0, 5)))
    assert halves.act_choices[:4] == (16, "i8", "f8", 6) and halves.closest_act == 16
    pairs = {(16, "i8"), (16, "f8"), ("i8", 6), ("f8", 6)}
    assert {*halves.act_choices[4:]} == {p for a, b in pairs for p in ((a, b), (b, a))}
    assert STEPS.act_choices[:3] == (8, 6, 4) and len(STEPS.act_choices) == 3 + 2 * 2 * 2


def test_random_configurations_take_every_kind_of_the_fewest_bits() -> None:
    def taken(*activations) -> set:
        space = replace(PLAIN, activations=activations)
        return {c["a"].act for c in space.sample(60, 3)}

    assert taken(8, "i8", "f8") == {8, "i8", "f8"} and taken("i8") == {"i8"}
    assert taken(16, "i8", 6) == {16, 6} and taken(8, 6) == {8, 6} and taken("f8", "i8") == {"i8", "f8"}


def test_what_is_no_row_of_the_space_is_refused() -> None:
    with pytest.raises(AquabitError, match=r"must both be \[rows, 4 layers\]"):
        Choices(PLAIN, np.zeros((2, 3), int), np.zeros((2, 3), int))
    with pytest.raises(AquabitError, match="activation choices"):
        Choices(PLAIN, np.zeros((2, 4), int), np.zeros((1, 4), int))
    with pytest.raises(AquabitError, match="other groups of steps"):
        Choices.of(PLAIN, [STEPS.uniform("usq4", (8, 6, 6))])
    with pytest.raises(AquabitError, match="usq8 is in no layer's choices"):
        Choices.of(PLAIN, [PLAIN.config({"a": LayerChoice(Scheme.parse("usq8"), 8)})])
    with pytest.raises(ValueError):
        _ = drawn(PLAIN, 2, 0)[1].config
    with pytest.raises(IndexError):
        _ = drawn(PLAIN, 2, 0)[1][2]
