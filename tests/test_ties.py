from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquabit.choices import Choices
from aquabit.pipelines import trace
from aquabit.scheme import AquabitError, Scheme
from aquabit.space import SearchSpace, make_space, read_space
from aquabit.tied_groups import Groups
from aquabit.ties import find_ties
from tests.conftest import tiny_pipeline

QKV = ["*.to_q", "*.to_k", "*.to_v"]
NAMES = [
    "conv",
    *(f"blocks.{i}.attn{j}.{k}" for i in (0, 1) for j in (1, 2) for k in ("to_q", "to_k", "to_v")),
]
GRAPH = trace(tiny_pipeline("unet"))


def tied_space(**options: Any) -> SearchSpace:
    return make_space(GRAPH, "f" * 16, "tiny", **{"tied": [QKV], **options})


def test_layers_whose_stars_agree_form_groups() -> None:
    found = find_ties([QKV], NAMES)
    assert found[0] == ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v")
    assert len(found) == 4 and sorted(sum(found, ())) == sorted(NAMES[1:])
    both = find_ties([["blocks.*.attn1.to_[kv]", "blocks.*.attn2.to_v"]], NAMES)
    assert both == tuple(
        (f"blocks.{i}.attn1.to_k", f"blocks.{i}.attn1.to_v", f"blocks.{i}.attn2.to_v") for i in (0, 1)
    )
    assert find_ties([QKV, ["*.to_q", "*.to_k", "*.to_v"]], NAMES) == found, "said twice is said once"


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ([["*.to_q", "*.to_x"]], r"tied pattern '\*.to_x' matches no layer"),
        ([["conv", "blocks.0.attn1.to_q", "*.to_nothing"]], "matches no layer"),
        ([["blocks.0.*", "blocks.1.*.to_q"], ["*.to_k", "conv*"]], "ties nothing"),
        ([["*.to_q", "*.to_k"], ["*.to_k", "*.to_v"]], "is tied to 'blocks.0.attn1.to_q' by one list and to"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(lists: list[list[str]], said: str) -> None:
    with pytest.raises(AquabitError, match=said):
        find_ties(lists, NAMES)


def test_lists_of_a_target_may_find_nothing() -> None:
    assert find_ties([["*.to_q", "*.to_x"], ["*.a", "*.b"]], NAMES, strict=False) == ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 99))
def test_groups_add_up_what_is_tied(marks: list[int], seed: int) -> None:
    layers = [f"l{i}" for i in range(len(marks))]
    sets = [tuple(k for k, m in zip(layers, marks, strict=True) if m == mark) for mark in (1, 2, 3)]
    groups = Groups.of(layers, tuple(own for own in sets if len(own) > 1))
    values = np.random.default_rng(seed).normal(size=(len(layers), 2))
    sums = groups.sums(values)
    assert sums.sum() == pytest.approx(values.sum()) and (np.diff(groups.first) > 0).all()
    for own in (own for own in sets if len(own) > 1):
        rows = [layers.index(k) for k in own]
        assert len(set(groups.index[rows])) == 1
        assert sums[groups.index[rows[0]]] == pytest.approx(values[rows].sum(0))
    assert groups.alone == (len(sums) == len(layers))


def test_tied_layers_choose_of_what_all_may_take() -> None:
    space = tied_space(schemes=["usq2", "usq4", "fp"])
    group = space.tied[0]
    assert len(space.tied) > 1 and all(len(g) == 3 for g in space.tied)
    assert {space.choices[k] for k in group} == {tuple(map(Scheme.parse, ("usq2", "usq4", "fp")))}
    pinned = tied_space(schemes=["usq2", "usq4"], pinned={group[1]: "usq4"})
    assert all(pinned.choices[k] == (Scheme.parse("usq4"),) for k in group)
    out = tied_space(schemes=["usq2", "fp"], excluded=[group[2]])
    assert all(map(str, out.choices[k]) and out.choices[k] == (Scheme(),) for k in group)
    assert all(c[k].act == 16 for c in out.sample(20) for k in group)
    with pytest.raises(
        AquabitError, match=rf"no scheme in common \({group[0]}: usq2, usq4; {group[1]}: usq8"
    ):
        tied_space(schemes=["usq2", "usq4"], pinned={group[1]: "usq8"})


def test_a_space_keeps_its_ties_and_older_ones_stay_readable() -> None:
    space = tied_space()
    value = json.loads(json.dumps(space.to_dict()))
    assert SearchSpace.from_dict(value) == space and SearchSpace.from_dict(value).to_dict() == value
    assert "tied" not in make_space(GRAPH, "f").to_dict()
    assert SearchSpace.from_dict({k: v for k, v in value.items() if k != "tied"}).tied == ()
    for wrong in ([["conv_in"]], [["conv_in", "nothing"]], [list(space.tied[0]), list(space.tied[0])]):
        with pytest.raises(AquabitError, match="must be two or more of the space"):
            SearchSpace.from_dict({**value, "tied": wrong})


def test_a_configuration_that_breaks_a_tie_is_refused_by_its_layers() -> None:
    space = tied_space(schemes=["usq2", "usq4"])
    config, (first, second, _) = space.uniform("usq4"), space.tied[0]
    space.check(config)
    for broken in (config.with_layer(second, "usq2"), config.with_layer(second, "usq4", 6)):
        for extra in (False, True):
            with pytest.raises(AquabitError, match=f"tied layers must have the same.*{first} usq4 at a8"):
                space.check(broken, extra_schemes=extra)
        assert space.broken_tie(broken) == space.tied[0]
    swapped = space.swapped(config, second, Scheme.parse("usq2"))
    assert space.broken_tie(swapped) is None and str(swapped[first].weight) == "usq2"
    rows = Choices.of(space, [config, swapped, config.with_layer(second, "usq2")])
    assert rows.apart(rows[0]).tolist() == [0, 1, 1], "tied layers count as one"


def test_space_files_name_ties(tmp_path) -> None:
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"tied": [QKV]}))
    assert read_space(path) == {"tied": [QKV]}
    for wrong in ([["*.to_q"]], ["*.to_q"], [[1, 2]]):
        path.write_text(json.dumps({"tied": wrong}))
        with pytest.raises(AquabitError, match="lists of two or more patterns"):
            read_space(path)
    path.write_text(json.dumps({"tied": {"a": "b"}}))
    with pytest.raises(AquabitError, match="must be a list"):
        read_space(path)
