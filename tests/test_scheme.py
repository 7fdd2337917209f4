from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquabit.jsonio import read_json
from aquabit.scheme import (
    ROUNDINGS,
    AquabitError,
    Budget,
    Calibration,
    LayerChoice,
    Protocol,
    QuantConfig,
    Rounding,
    Scheme,
    direction,
    parse_swap,
)

SCHEMES = st.one_of(
    st.just("fp"),
    st.builds(
        "usq{}{}{}".format, st.integers(1, 8), st.sampled_from(["", "g8", "g64"]), st.sampled_from(["", "h"])
    ),
    st.builds("vq{}{}{}".format, st.integers(1, 8), st.sampled_from(["", "c"]), st.sampled_from(["", "h"])),
    st.builds(
        "aq{}x{}{}".format, st.integers(1, 8), st.integers(1, 16), st.sampled_from(["g4", "g8", "g9", "k"])
    ),
)


@given(SCHEMES)
def test_text_round_trip(text: str) -> None:
    assert str(Scheme.parse(text)) == text
    assert Scheme.parse(str(Scheme.parse(text))) == Scheme.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "usq",
        "usq0",
        "usq9",
        "usq4g0",
        "usq04",
        "vq4g8",
        "aq2x8",
        "aq0x8g8",
        "aq2x17k",
        "int9",
        "q4_2",
        "nf4g32",
        "usq4 ",
        "aq2x8g8h",
    ],
)
def test_unknown_schemes_are_named(text: str) -> None:
    with pytest.raises(AquabitError, match="scheme") as caught:
        Scheme.parse(text)
    assert repr(text) in str(caught.value)


def test_code_bits() -> None:
    assert Scheme.parse("aq2x8g8").code_bits() == 2
    assert Scheme.parse("aq2x8k").code_bits(9) == pytest.approx(16 / 9)
    assert Scheme.parse("usq3h").code_bits(9) == 3


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.tuples(SCHEMES, st.sampled_from(ROUNDINGS)), max_size=6
    )
)
def test_config_round_trip_and_digest(layers: dict[str, tuple[str, Rounding]]) -> None:
    config = QuantConfig("f", {k: LayerChoice(Scheme.parse(s), a) for k, (s, a) in layers.items()}, "m")
    again = QuantConfig.from_dict(json.loads(config.to_json()))
    assert again == config and again.digest == config.digest
    assert QuantConfig("f", dict(reversed(config.layers.items())), "other name").digest == config.digest
    changed = [config.with_layer("zzzzzzzzz", "usq5", act) for act in ROUNDINGS]
    assert len({config.digest, *(other.digest for other in changed)}) == 1 + len(ROUNDINGS)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"layers": {"a": {"weight": "usq4", "act": 7}}}, "layers.a.act"),
        ({"layers": {"a": {"weight": "usq4", "act": "i4"}}}, "layers.a.act"),
        ({"layers": {"a": {"weight": "usq4", "act": "8"}}}, "layers.a.act"),
        ({"layers": {"a": {"weight": "usq4", "act": ["i8", "f4"]}}}, "layers.a.act"),
        ({"layers": {"a": {"weight": "usq99", "act": 8}}}, "usq99"),
        ({"schema": 2}, "schema"),
        ({"surprise": 1}, "surprise"),
        ({"fingerprint": None}, "fingerprint"),
    ],
)
def test_bad_configurations_name_the_place(change: dict[str, object], place: str) -> None:
    good = QuantConfig("f", {}).to_dict()
    with pytest.raises(AquabitError, match=place):
        QuantConfig.from_dict({**good, **change})


def test_truncated_json(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(QuantConfig("f", {"a": LayerChoice(Scheme.parse("usq4"), 8)}).to_json()[:-20])
    with pytest.raises(AquabitError, match="truncated"):
        QuantConfig.load(path)
    with pytest.raises(AquabitError, match="cannot read"):
        read_json(tmp_path / "nothing.json")


def test_protocol_digest_ignores_only_the_objective() -> None:
    base = Protocol()
    assert Protocol(objective="psnr").digest == base.digest
    assert (
        len(
            {
                base.digest,
                Protocol(images=127).digest,
                Protocol(seed=1).digest,
                Protocol(eta=1.0).digest,
                base.block(1).digest,
            }
        )
        == 5
    )
    assert Protocol.from_dict(json.loads(json.dumps(base.to_dict()))) == base
    with pytest.raises(AquabitError, match="images is 0"):
        Protocol(images=0)


@pytest.mark.parametrize(
    ("images", "micro_batch", "evened"),
    [(128, 64, 64), (8, 64, 8), (100, 64, 50), (65, 64, 33), (6, 4, 3), (7, 3, 3), (5, 1, 1)],
)
def test_evened_micro_batches_are_as_few_and_hardly_padded(
    images: int, micro_batch: int, evened: int
) -> None:
    given = Protocol(images=images, micro_batch=micro_batch)
    found = given.evened()
    assert found == replace(given, micro_batch=evened)
    assert -(-images // evened) == -(-images // micro_batch) and found.evened() == found
    assert Calibration(images=images).protocol(micro_batch).micro_batch == evened


def test_budget_and_swap_and_direction() -> None:
    with pytest.raises(AquabitError, match="at least one"):
        Budget()
    with pytest.raises(AquabitError, match="bits is -1"):
        Budget(bits=-1)
    assert [str(s) for s in parse_swap("usq4:vq2c")] == ["usq4", "vq2c"]
    for bad in ("usq4", "usq4:usq4", "usq4:usq2:usq3"):
        with pytest.raises(AquabitError, match="swap"):
            parse_swap(bad)
    assert (direction("fid"), direction("psnr")) == ("min", "max")
    with pytest.raises(AquabitError, match="beauty"):
        direction("beauty")


@pytest.mark.parametrize("text", ["aq2x8g" + "8" * 400, "usq" + "4" * 60_000, "usq4g" + "1" * 5000])
def test_numbers_that_are_none_of_a_scheme(text: str) -> None:
    with pytest.raises(AquabitError, match="unknown scheme"):
        Scheme.parse(text)
