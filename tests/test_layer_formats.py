"""Additive formats per layer: each property of what is picked, checked by formulas of this file's own."""

from __future__ import annotations

import json
from math import ceil, log, prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquabit.graph import codebook_names, layers
from aquabit.layer_formats import (
    FORMATS,
    LEVEL_TOLERANCE_BITS,
    LEVELS,
    LOSS,
    MOST_OVERHEAD,
    expected_loss,
    layer_formats,
    stored_bits,
)
from aquabit.measuring.session import uniform_references
from aquabit.pipelines import bundled_models, load, trace
from aquabit.scheme import FP, AquabitError, Scheme
from aquabit.space import TINY, SearchSpace, make_space, read_space
from tests.conftest import tiny_pipeline

SHAPES = st.one_of(
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
    st.tuples(st.integers(1, 200), st.integers(1, 200), st.just(3), st.just(3)),
    st.tuples(st.integers(1, 200), st.integers(1, 200), st.just(1), st.just(1)),
    st.tuples(st.integers(1, 200), st.integers(1, 16), st.just(2), st.just(2)),
)
SHARERS = st.integers(1, 24)
GRAPH = trace(tiny_pipeline("dit"))


def parts(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int, int, float]:
    """(M, K, g, code bits) of an additive format for a weight."""
    area = prod(shape[2:])
    size = scheme.group or (area if area > 1 else 8)
    return scheme.codebooks, 2**scheme.bits, size, scheme.codebooks * scheme.bits / size


def stored(scheme: Scheme, shape: tuple[int, ...], sharers: int) -> float:
    """Bits a weight: codes, a float16 scale a row, and float16 codebooks, by halves of bytes."""
    count, words, size, _ = parts(scheme, shape)
    codes = ceil(shape[0] * ceil(prod(shape[1:]) / size) * count * scheme.bits / 8)
    tables = 2 * count * words * size / (sharers if str(scheme).endswith("s") else 1)
    return 8 * (codes + 2 * shape[0] + tables) / prod(shape)


def criterion(scheme: Scheme, shape: tuple[int, ...], sharers: int) -> float:
    return stored(scheme, shape, sharers) - parts(scheme, shape)[3] + log(LOSS[str(scheme).rstrip("s")], 4)


def operations(scheme: Scheme, shape: tuple[int, ...]) -> float:
    """M K / out + M / (2 g): tables of products are made once for all taps of a kernel, except where a
    group is a kernel slice."""
    count, words, size, _ = parts(scheme, shape)
    taps = prod(shape[2:]) if scheme.group else 1
    return count * words / (taps * shape[0]) + count / (2 * size)


# ---- what is picked


@settings(max_examples=300, deadline=None)
@given(
    shape=SHAPES,
    sharers=SHARERS,
    levels=st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 4.0]), min_size=1, max_size=5, unique=True),
)
def test_formats_are_worth_their_codebooks_and_the_best_of_their_level(
    shape: tuple[int, ...], sharers: int, levels: list[float]
) -> None:
    levels = sorted(levels)
    found = layer_formats("ff.up", shape, levels, sharers)
    bits = [parts(s, shape)[3] for s in found]
    assert bits == sorted(bits) and len(set(found)) == len(found) <= len(levels)
    for scheme in found:
        assert scheme.kind == "aq" and stored_bits(scheme, shape, sharers) == pytest.approx(
            stored(scheme, shape, sharers)
        )
        assert stored(scheme, shape, sharers) <= MOST_OVERHEAD * parts(scheme, shape)[3] * (1 + 1e-12)
        assert not scheme.shared or sharers > 1
        assert parts(scheme, shape)[2] <= prod(shape[1:])
    row = FORMATS["* 1x1" if prod(shape[2:]) == 1 else "*"]
    for level in levels:
        near = [
            s
            for s in map(Scheme.parse, row)
            if abs(parts(s, shape)[3] - level) <= LEVEL_TOLERANCE_BITS
            and parts(s, shape)[2] <= prod(shape[1:])
            and (sharers > 1 or not s.shared)
            and stored(s, shape, sharers) <= MOST_OVERHEAD * parts(s, shape)[3]
        ]
        if not near:
            assert not any(abs(b - level) <= LEVEL_TOLERANCE_BITS for b in bits)
            continue
        best = min(criterion(s, shape, sharers) for s in near)
        assert any(
            abs(parts(s, shape)[3] - level) <= LEVEL_TOLERANCE_BITS
            and criterion(s, shape, sharers) <= best + 1e-9
            for s in found
        )


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, sharers=SHARERS, limit=st.floats(0.02, 1.5))
def test_the_limit_of_operations_is_kept_and_costs_nothing_else(
    shape: tuple[int, ...], sharers: int, limit: float
) -> None:
    found = layer_formats("ff.up", shape, LEVELS, sharers, operations=limit)
    assert all(operations(s, shape) <= limit * (1 + 1e-12) for s in found)
    for scheme in found:
        assert scheme.operations(shape) == pytest.approx(operations(scheme, shape))
    free = layer_formats("ff.up", shape, LEVELS, sharers)
    if all(operations(s, shape) <= limit for s in free):
        assert found == free
    assert layer_formats("ff.up", shape, LEVELS, sharers, operations=1e9) == free


def test_a_limit_of_operations_turns_to_smaller_tables() -> None:
    free, bound = layer_formats("ff.up", (2048, 2048)), layer_formats("ff.up", (2048, 2048), operations=0.2)
    assert (
        max(operations(s, (2048, 2048)) for s in free)
        > 0.2
        >= max(operations(s, (2048, 2048)) for s in bound)
    )
    assert bound and layer_formats("ff.up", (2048, 2048), operations=1e-3) == ()


def test_codebooks_weigh_on_small_layers() -> None:
    """Larger tables as layers grow; sharing where layers are small and partners many; nothing where no
    table pays."""

    def tables(shape: tuple[int, ...], sharers: int = 1) -> list[int]:
        return [2 * prod(parts(s, shape)[:3]) for s in layer_formats("q", shape, (2.0,), sharers)]

    assert tables((8, 8)) == []
    small, large = tables((64, 64), 1), tables((4096, 4096), 1)
    assert small and large and small[0] < large[0]
    assert [s.shared for s in layer_formats("q", (96, 96), (2.0,), 8)] == [True]
    many, few = (criterion(layer_formats("q", (96, 96), (2.0,), n)[0], (96, 96), n) for n in (12, 1))
    assert many < few
    huge = layer_formats("q", (8192, 8192), (2.0,))[0]
    assert stored(huge, (8192, 8192), 1) < 2.2


def test_losses_are_told_of_formats_that_were_measured() -> None:
    for text, loss in LOSS.items():
        assert expected_loss(Scheme.parse(text)) == loss == expected_loss(Scheme.parse(f"{text}s")) > 1
        assert str(Scheme.parse(text)) == text
    assert expected_loss(Scheme.parse("aq2x5g4")) == expected_loss(Scheme.parse("usq4")) == 2.4
    assert {s.removesuffix("s") for row in FORMATS.values() for s in row} == set(LOSS)
    for level in LEVELS:
        assert any(
            abs(parts(Scheme.parse(f), (64, 64))[3] - level) <= LEVEL_TOLERANCE_BITS for f in FORMATS["* 1x1"]
        )
        assert any(
            abs(parts(Scheme.parse(f), (64, 64, 3, 3))[3] - level) <= LEVEL_TOLERANCE_BITS
            for f in FORMATS["*"]
            if f.rstrip("s").endswith("k")
        )


# ---- tables


def test_the_first_pattern_of_a_table_counts() -> None:
    table = {"ff.* 1x1": ["aq2x8g8"], "res.conv? 3x3": ["aq2x8k"], "*": ["aq1x8g4"]}
    shapes: dict[str, tuple[int, ...]] = {
        "ff.up": (512, 512),
        "res.conv1": (256, 256, 3, 3),
        "self_attn.q": (512, 512),
        "res.conv": (256, 256, 3, 3),
    }
    found = {k: [str(s) for s in layer_formats(k, shape, (2.0,), table=table)] for k, shape in shapes.items()}
    assert found == {
        "ff.up": ["aq2x8g8"],
        "res.conv1": ["aq2x8k"],
        "self_attn.q": ["aq1x8g4"],
        "res.conv": ["aq1x8g4"],
    }
    assert (
        layer_formats("ff.up", (512, 512), (2.0,), table={})
        == ()
        == layer_formats("ff.up", (512, 512), (2.0,), table={"x*": ["aq2x8g8"]})
    )
    alone, both = (layer_formats("ff.up", (512, 512), (2.0,), n, {"*": ["aq2x8g8s"]}) for n in (1, 2))
    assert alone == () and both == (Scheme.parse("aq2x8g8s"),), "codebooks are shared with partners only"
    assert layer_formats("ff.up", (512, 512), (9.0,)) == () == layer_formats("ff.up", (512, 512), ())


@pytest.mark.parametrize("wrong", ["usq4", "vq3", "fp", "usq3h"])
def test_tables_hold_additive_schemes_only(wrong: str) -> None:
    with pytest.raises(AquabitError, match=rf"holds {wrong} for 'ff.up'.*as in aq2x8g8") as error:
        layer_formats("ff.up", (512, 512), table={"*": ["aq2x8g8", wrong]})
    assert "\n" not in str(error.value)
    assert layer_formats("other", (512, 512), (2.0,), table={"ff.up*": [wrong], "*": ["aq2x8g8"]}) == (
        Scheme.parse("aq2x8g8"),
    )
    with pytest.raises(AquabitError, match="unknown scheme 'aq2'"):
        layer_formats("ff.up", (512, 512), table={"*": ["aq2"]})


def test_groups_longer_than_a_row_are_left_out() -> None:
    table = {"*": ["aq3x8g8", "aq6x8g16"]}
    found = {
        row: [str(s) for s in layer_formats("q", (20_000, row), (3.0,), table=table)]
        for row in (7, 8, 15, 16)
    }
    assert found == {7: [], 8: ["aq3x8g8"], 15: ["aq3x8g8"], 16: ["aq3x8g8"]}
    assert layer_formats("q", (20_000, 15), (3.0,), table={"*": ["aq6x8g16"]}) == ()
    assert layer_formats("q", (20_000, 16), (3.0,), table={"*": ["aq6x8g16"]}) == (Scheme.parse("aq6x8g16"),)


# ---- spaces


@pytest.mark.parametrize("name", bundled_models())
def test_default_spaces_of_bundled_models_have_formats_at_every_level(name: str) -> None:
    graph = trace(load(name))
    space, nodes, partners = make_space(graph, "f", name), layers(graph), codebook_names(graph)
    weight = {k: prod(nodes[k]["shape"]) for k in space.choices}
    sharers = {
        k: sum(p == partners.get(k) for p in partners.values()) if k in partners else 1 for k in space.choices
    }
    for level in LEVELS:
        held = {
            k
            for k, row in space.choices.items()
            if any(s.kind == "aq" and abs(space.code_bits(k, s) - level) <= LEVEL_TOLERANCE_BITS for s in row)
        }
        assert sum(weight[k] for k in held) >= 0.95 * sum(weight.values()), level
    total = sum(weight.values())
    for layer, row in space.choices.items():
        additive = [s for s in row if s.kind == "aq"]
        tiny = weight[layer] < TINY * total
        given = layer_formats(nodes[layer]["operator"], tuple(nodes[layer]["shape"]), LEVELS, sharers[layer])
        assert tuple(additive) == (() if tiny else given)
        assert row[0] == FP and len(row) <= 9 and (Scheme.parse("usq8") in row) == tiny, (
            "eight to fit, 8 bits where bytes hardly count"
        )
        for scheme in additive:
            assert stored(
                scheme, tuple(nodes[layer]["shape"]), sharers[layer]
            ) <= MOST_OVERHEAD * space.code_bits(layer, scheme)
            assert not scheme.shared or space.codebook(layer) == partners[layer]
    assert any(s.shared for s in space.schemes)
    bits = [
        np.mean([space.code_bits(k, c.weight) for k, c in config.layers.items()])
        for config in space.sample(60)
    ]
    assert min(bits) < 2.4 and max(bits) > 3.8


def nearest(space: SearchSpace, layer: str, kind: str, bits: float) -> float:
    return min(abs(space.code_bits(layer, s) - bits) for s in space.choices[layer] if s.kind == kind)


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.2, 2.7, 3.0, 8.0])
@pytest.mark.parametrize("name", ["tiny", "digits-unet"])
def test_a_level_is_each_layers_nearest_additive_format(name: str, bits: float) -> None:
    graph = trace(tiny_pipeline("unet") if name == "tiny" else load(name))
    space = make_space(graph, "f", pinned={"conv_in": "usq8"}, excluded=["conv_out", "time_embedding.*"])
    assert name == "tiny" or any(s.kind == "aq" and s.group is None for s in space.schemes), "kernel slices"
    config, fallen, shared = space.level("aq", bits, act=6), 0, 0
    space.check(config)
    for layer, row in space.choices.items():
        choice = config[layer]
        if any(s.kind == "aq" for s in row):
            assert choice.weight.kind == "aq" and abs(
                space.code_bits(layer, choice.weight) - bits
            ) == nearest(space, layer, "aq", bits)
            shared += choice.weight.shared
        elif len(row) > 1:
            fallen += 1
            aware = min((s for s in row if s.output_aware), key=lambda s: abs(s.bits - bits))
            assert choice.weight == aware and aware.kind == "usq"
        else:
            assert choice.weight == row[0]
        assert choice.codebook == (space.codebook(layer) if choice.weight.shared else None)
        assert choice.act == (16 if layer == "conv_out" or layer.startswith("time_embedding") else 6)
    assert shared and (fallen or name != "tiny"), "the test must see both"


def test_references_hold_each_level_of_the_family() -> None:
    graph = trace(tiny_pipeline("unet"))
    space = make_space(graph, "f")
    references = uniform_references(space)
    assert len({c.digest for c in references}) == len(references)
    found = {
        round(2 * space.code_bits(k, c.weight)) / 2
        for config in references
        for k, c in config.layers.items()
        if c.weight.kind == "aq"
    }
    assert found == {
        round(2 * space.code_bits(k, s)) / 2
        for k, row in space.choices.items()
        for s in row
        if s.kind == "aq"
    }
    for config in references:
        space.check(config, extra_schemes=True)
    plain = make_space(graph, "f", schemes=["usq2", "vq3"])
    assert [{str(c.weight) for c in config.layers.values()} for config in uniform_references(plain)] == [
        {f"usq{b}"} for b in (2, 3, 4, 8)
    ]


def additive(space: SearchSpace) -> set[str]:
    return {str(s) for s in space.schemes if s.kind == "aq"}


def test_levels_and_formats_are_options_of_a_space() -> None:
    assert additive(make_space(GRAPH, "f")) and make_space(GRAPH, "f").calibration is not None
    assert not additive(make_space(GRAPH, "f", schemes=["usq2"])), "given schemes are all there is"
    assert not additive(make_space(GRAPH, "f", levels=[])) and not additive(
        make_space(GRAPH, "f", formats={})
    )
    both = make_space(GRAPH, "f", schemes=["usq2"], levels=[2.0])
    assert {str(s) for s in both.schemes} == {"fp", "usq2", *additive(both)} and additive(both)
    assert all(
        abs(both.code_bits(k, s) - 2) <= LEVEL_TOLERANCE_BITS
        for k, row in both.choices.items()
        for s in row
        if s.kind == "aq"
    )
    own = make_space(GRAPH, "f", levels=[2.0, 3.0], formats={"ff.* *": ["aq3x4g4s"], "adaln *": ["aq2x4g4s"]})
    assert additive(own) == {"aq3x4g4s", "aq2x4g4s"}
    for layer, row in own.choices.items():
        kinds, operator = [str(s) for s in row if s.kind == "aq"], layers(GRAPH)[layer]["operator"]
        expected = {"ff": ["aq3x4g4s"], "adaln": ["aq2x4g4s"]}.get(operator.split(".")[0], [])
        assert kinds == (expected if layer in codebook_names(GRAPH) else []), layer
    only = make_space(GRAPH, "f", schemes=["usq4", "aq2x4g4s"])
    assert {k for k, row in only.choices.items() if len(row) == 2} == codebook_names(GRAPH).keys(), (
        "left out where there is no partner"
    )
    with pytest.raises(AquabitError, match=r"no scheme is left for layer 'pos_embed\.proj'.*usq4"):
        make_space(GRAPH, "f", schemes=["aq2x4g4s"])
    with pytest.raises(AquabitError, match="list of schemes is empty"):
        make_space(GRAPH, "f", schemes=[])
    with pytest.raises(AquabitError, match="holds usq4"):
        make_space(GRAPH, "f", formats={"*": ["usq4"]})
    plain = make_space(GRAPH, "f", schemes=["usq2", "vq3"])
    assert plain.calibration is None and plain.codebooks is None and "calibration" not in plain.to_dict()


def test_space_files_take_levels_and_formats(tmp_path) -> None:
    path = tmp_path / "space.json"
    value = {
        "schemes": ["usq2"],
        "levels": [2, 3.0],
        "formats": {"ff.* *": ["aq3x4g4s"], "*": []},
        "activations": [8, 6],
    }
    path.write_text(json.dumps(value))
    assert read_space(path) == value
    space = make_space(GRAPH, "f", **read_space(path))
    assert additive(space) == {"aq3x4g4s"}
    path.write_text('{"formats": {}}')
    assert not additive(make_space(GRAPH, "f", **read_space(path))), "a table that is empty is a table"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"levels": 2}, "levels"),
        ({"levels": ["2"]}, "level '2'"),
        ({"levels": [0]}, "level 0"),
        ({"levels": [-1]}, "level -1"),
        ({"levels": [17]}, "level 17"),
        ({"levels": [float("nan")]}, "level nan"),
        ({"levels": [True]}, "level True"),
        ({"levels": [None]}, "level None"),
        ({"formats": ["aq2x8g8"]}, "formats"),
        ({"formats": {"*": "aq2x8g8"}}, "formats must map"),
        ({"formats": {"*": [8]}}, "scheme 8"),
        ({"formats": {"*": ["aq2"]}}, "'aq2'"),
        ({"formats": {"*": ["usq4"]}}, "usq4"),
        ({"activations": [5]}, "5"),
        ({"activations": ["8"]}, "'8'"),
        ({"activations": [8.0]}, "8.0"),
        ({"excluded": [5]}, "pattern 5"),
        ({"excluded": "conv_in"}, "excluded"),
        ({"pinned": {"conv_in": 5}}, "scheme 5"),
        ({"pinned": ["conv_in"]}, "pinned"),
        ({"schemes": [], "levels": []}, "empty"),
        ({"activations": []}, "list of activations is empty"),
        ({"calibration": {}}, "calibration"),
    ],
)
def test_bad_space_files_give_one_sentence(tmp_path, value: dict[str, Any], said: str) -> None:
    path = tmp_path / "space.json"
    path.write_text(json.dumps(value))
    with pytest.raises(AquabitError, match=said) as error:
        make_space(GRAPH, "f", **read_space(path))
    assert "\n" not in str(error.value)
