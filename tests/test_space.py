from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from aquabit.choices import Choices
from aquabit.cost import CostModel
from aquabit.graph import layers
from aquabit.maximum_entropy import level_odds
from aquabit.measuring.session import target_notes
from aquabit.pipelines import trace
from aquabit.scheme import AquabitError, Calibration, QuantConfig, Scheme
from aquabit.sensitivity.features import SKETCH, Encoder
from aquabit.space import BITS_RANGE, SearchSpace, make_space, read_space
from tests.conftest import tiny_pipeline

GRAPH = trace(tiny_pipeline("unet"))
SPACE = make_space(GRAPH, "f" * 16, "tiny")


@given(st.lists(st.integers(1, 16), min_size=2, max_size=6, unique=True), st.floats(0, 1))
def test_maximum_entropy_has_the_mean(levels: list[int], share: float) -> None:
    mean = min(levels) + share * (max(levels) - min(levels))
    p = level_odds(tuple(levels), mean)
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    assert p @ np.array(levels) == pytest.approx(mean, abs=2e-3)


def test_maximum_entropy_is_geometric() -> None:
    p = level_odds(
        (2, 3, 4), 2.5
    )  # p ~ exp(rate * level): neighbouring ratios agree, as no other distribution has more entropy
    assert p[1] / p[0] == pytest.approx(p[2] / p[1], rel=1e-6)


def test_samples_cover_the_range_evenly_and_are_reproducible() -> None:
    drawn = SPACE.sample(300, seed=3)
    assert [c.digest for c in drawn] == [c.digest for c in SPACE.sample(300, seed=3)]
    assert [c.digest for c in SPACE.sample(7, seed=3)] == [c.digest for c in drawn[:7]]
    assert drawn[0].digest != SPACE.sample(1, seed=4)[0].digest
    means = np.array(
        [
            np.mean([round(2 * SPACE.code_bits(k, c.weight)) / 2 for k, c in config.layers.items()])
            for config in drawn
        ]
    )
    low, high = BITS_RANGE
    assert kstest(np.clip((means - low) / (high - low), 0, 1), "uniform").statistic < 0.12
    lows = [np.mean([c.act == 6 for c in config.layers.values()]) for config in drawn]
    assert 0.35 < np.mean(np.array(lows) == 0) < 0.65 and max(lows) > 0.9


def test_json_round_trip() -> None:
    again = SearchSpace.from_dict(json.loads(json.dumps(SPACE.to_dict())))
    assert again.to_dict() == SPACE.to_dict()
    assert [c.digest for c in again.sample(5)] == [c.digest for c in SPACE.sample(5)]


def test_pinned_and_excluded_layers() -> None:
    space = make_space(
        GRAPH, "f", schemes=["usq2", "usq4"], pinned={"conv_in": "usq8"}, excluded=["time_embedding.*"]
    )
    for config in (*space.sample(10), space.uniform("usq2")):
        assert config["conv_in"].weight == Scheme.parse("usq8")
        assert (
            str(config["time_embedding.linear_1"].weight) == "fp"
            and config["time_embedding.linear_1"].act == 16
        )
    assert "conv_in" not in space.free_layers()
    with pytest.raises(AquabitError, match="nonsense"):
        make_space(GRAPH, "f", excluded=["nonsense*"])
    for target in (None, "gguf"):
        with pytest.raises(AquabitError, match=r"every layer is excluded \(\*\), and none is left"):
            make_space(GRAPH, "f", excluded=["*"], target=target)


def test_schemes_are_left_out_where_a_layer_cannot_be_stored_so() -> None:
    scheme, shapes = Scheme.parse("nf4g64"), {k: tuple(a["shape"]) for k, a in layers(GRAPH).items()}
    space = make_space(GRAPH, "f", schemes=["nf4g64", "usq4"])
    held = {k: scheme.refuses(shape) is None for k, shape in shapes.items()}
    assert {k: scheme in row for k, row in space.choices.items()} == held and len({*held.values()}) == 2
    CostModel(GRAPH, space)
    left = next(k for k in held if not held[k])
    (said,) = target_notes(space, GRAPH)
    refused = sum(not one for one in held.values())
    assert said == f"nf4g64 is left out for {refused} of {len(held)} layers, as {left}: " + str(
        scheme.refuses(shapes[left])
    )
    with pytest.raises(AquabitError, match=rf"no scheme is left for layer '{left}'"):
        make_space(GRAPH, "f", schemes=["nf4g64"])
    with pytest.raises(AquabitError, match=rf"layer '{left}' is pinned to nf4g64, which cannot hold it: its"):
        make_space(GRAPH, "f", schemes=["usq4"], pinned={left: "nf4g64"})


def test_a_configuration_that_no_layer_can_hold_is_named() -> None:
    config = make_space(GRAPH, "f", schemes=["usq4"]).uniform("usq4").with_layer("conv_in", "int4g7")
    with pytest.raises(AquabitError, match="layer 'conv_in' cannot be int4g7: its 1 inputs must be"):
        config.check_shapes(layers(GRAPH))


def test_space_file(tmp_path) -> None:
    path = tmp_path / "space.json"
    path.write_text('{"schemes": ["usq4"], "excluded": ["conv_out"]}')
    assert read_space(path) == {"schemes": ["usq4"], "excluded": ["conv_out"]}
    path.write_text('{"activations": [8, "i8", "f8"]}')
    space = make_space(GRAPH, "f", **read_space(path))
    assert space.activations == (8, "i8", "f8")
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    for text, word in (
        ('{"activations": ["i4"]}', "space.json: activations of 'i4' are not supported; known: 16, 8, i8"),
        ('{"activations": ["8"]}', "activations of '8' are not supported"),
        ('{"activations": [true]}', "activations of True are not supported"),
        ('{"activations": [[8]]}', r"activations of \[8\] are not supported"),
        ('{"scheme": []}', "scheme"),
        ('{"schemes": "usq4"}', "list"),
        ("[]", "object"),
        ('{"schemes": ["usq99"]}', "usq99"),
    ):
        path.write_text(text)
        with pytest.raises(AquabitError, match=word):
            read_space(path)


def test_configurations_of_other_models_are_refused() -> None:
    with pytest.raises(AquabitError, match="is for model other"):
        SPACE.check(QuantConfig("other", {}))
    with pytest.raises(AquabitError, match=r"no\.such\.layer"):
        SPACE.check(SPACE.full_precision().with_layer("no.such.layer", "usq4"))
    with pytest.raises(AquabitError, match="may not take usq5"):
        SPACE.check(SPACE.full_precision().with_layer("conv_in", "usq5"))


def test_encoder_aggregates_follow_a_swap() -> None:
    errors = {(k, str(s)): 4.0**-s.bits for k, row in SPACE.choices.items() for s in row}
    encoder = Encoder(SPACE, GRAPH, errors)
    base = SPACE.uniform("usq4h")
    layer = SPACE.layers[5]
    a, b = encoder.encode([base, base.with_layer(layer, "usq2h")])
    changed = {encoder.columns[i] for i in np.flatnonzero(a != b)}
    assert {f"weight:{layer}", "error:model", "bits"} <= changed and not any(
        c.startswith("act") for c in changed
    )
    assert sum(c.startswith("weight:") for c in changed) == 1
    column = encoder.columns.index("error:model")
    assert b[column] == pytest.approx(
        np.log10(((len(SPACE.layers) - 1) * 4.0**-4 + 4.0**-2) / len(SPACE.layers)), rel=1e-5
    )
    with pytest.raises(AquabitError, match="no weight error"):
        Encoder(SPACE, GRAPH, {})


def test_kinds_of_8_bits_cost_alike_and_look_different_to_the_surrogate() -> None:
    space = replace(SPACE, activations=(8, "i8", "f8", 6))
    configs = [space.uniform("usq4h", act) for act in (8, "i8", "f8", 6)]
    costs = CostModel(GRAPH, space)
    totals = costs.totals(Choices.of(space, configs))
    assert len({*totals["bops"][:3]}) == 1 and totals["bops"][3] < totals["bops"][0]
    assert [costs(c).bops for c in configs] == pytest.approx(totals["bops"])
    assert costs.limits()["bops"][0] < costs.limits("i8")["bops"][0] == costs.limits(8)["bops"][0]
    errors = {(k, str(s)): 4.0**-s.bits for k, row in space.choices.items() for s in row}
    encoder = Encoder(space, GRAPH, errors)
    column = encoder.columns.index(f"act:{space.layers[5]}")
    assert encoder.encode(configs)[:, column].tolist() == pytest.approx([0, 0.25, 1.05, 1])
    probes = {(k, a): {"damage": d, "sketch": np.zeros(SKETCH)} for k, a, d in probed(space)}
    encoder = Encoder(space, GRAPH, errors, probes)
    found = encoder.damages(Choices.of(space, configs))[:, 5]
    assert found.tolist() == [1.0, 2.0, 3.0, 4.0], "each kind has the damage that it was probed to do"


def probed(space: SearchSpace):
    damages = {"a8": 1.0, "i8": 2.0, "f8": 3.0, "a6": 4.0}
    for layer, cell in space.cells():
        yield layer, cell, damages.get(cell, 0.0)


def test_cost_limits_are_reached_and_hold() -> None:
    costs = CostModel(GRAPH, SPACE)
    totals = costs.totals(Choices.of(SPACE, SPACE.sample(200)))
    for name, (low, high) in costs.limits().items():
        assert (totals[name] >= low * (1 - 1e-12)).all() and (totals[name] <= high * (1 + 1e-12)).all()
    smallest = min(costs(SPACE.uniform(s)).bytes for s in ("usq2", "vq2"))
    assert costs.limits()["bytes"][0] <= smallest


def test_a_space_is_what_its_file_says() -> None:
    """A study that is opened again compares the two."""
    chosen = Calibration(images=4, steps=2, conditions=("a cat", "two dogs"))
    value = make_space(GRAPH, "f", calibration=chosen).to_dict()
    assert json.loads(json.dumps(value)) == value == SearchSpace.from_dict(value).to_dict()
