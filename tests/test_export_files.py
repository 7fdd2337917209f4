"""Files with weights for other programs: what writers get, and what is refused before anything is fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aquabit import workflows
from aquabit.exports import RECIPES, WRITERS, check_known
from aquabit.exports.files import Exported, Writer
from aquabit.packing import quantize
from aquabit.pipelines import network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, Calibration, LayerChoice, QuantConfig, Scheme
from aquabit.space import make_space
from aquabit.targets import TARGETS


def uniform(pipe: Any, scheme: str) -> QuantConfig:
    return make_space(trace(pipe), fingerprint(network_of(pipe))).uniform(scheme, 16)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Exported]:
    """What a writer was given: ``check`` first, then ``write``."""
    given: list[Exported] = []

    def write(exported: Exported, out: Path) -> list[str]:
        given.append(exported)
        return [f"{out.name} is made up"]

    monkeypatch.setitem(WRITERS, "mine", Writer(write, given.append))
    monkeypatch.setitem(TARGETS, "mine", TARGETS["aquabit"])
    return given


def test_a_writer_gets_the_dense_network_and_its_codes(
    dit: Any, tmp_path: Path, written: list[Exported]
) -> None:
    before = {k: v.clone() for k, v in network_of(dit).state_dict().items()}
    config = uniform(dit, "int4")
    left = next(iter(config.layers))
    config = replace(config, layers={**config.layers, left: LayerChoice(Scheme.parse("fp"), 16)})
    bank = str(tmp_path / "bank")
    assert workflows.export_files(dit, config, "mine", tmp_path / "f", bank=bank) == ["f is made up"]
    checked, made = written
    assert not checked.weights and set(made.weights) == set(config.layers) - {left}
    now = made.network.state_dict()
    assert set(now) == set(before) and all(torch.equal(now[k], v) for k, v in before.items())
    for name, coded in made.weights.items():
        own = quantize_weight(before[f"{name}.weight"].half().float(), "int4")
        assert torch.equal(coded.dequantize(), own.dequantize()), name
    assert (tmp_path / "bank").exists()


def test_what_is_wrong_is_said_before_anything_is_fitted(
    dit: Any, tmp_path: Path, written: list[Exported]
) -> None:
    good, out, bank = uniform(dit, "int4"), tmp_path / "f", tmp_path / "bank"

    def refused(config: QuantConfig, to: str, said: str) -> None:
        with pytest.raises(AquabitError, match=said):
            workflows.export_files(dit, config, to, out, bank=str(bank))

    refused(good, "nothing", f"'nothing' is unknown; known: {', '.join(RECIPES)}; with weights: .*mine")
    refused(good, "quanto", "quanto gets a configuration, not files")
    refused(QuantConfig("other", good.layers), "mine", "is for model other")
    refused(QuantConfig(good.fingerprint, {"x": LayerChoice(Scheme.parse("int4"), 16)}), "mine", "layer 'x'")
    odd, first = Scheme.parse("int4g7"), next(iter(good.layers))
    refused(good.with_layer(first, odd), "mine", f"layer '{first}' cannot be int4g7: its .* multiple of 7")
    with pytest.raises(AquabitError, match=f"layer '{first}' cannot be int4g7"):
        quantize(dit, good.with_layer(first, odd), bank=str(bank))
    assert not written and not bank.exists()
    refused(replace(good, calibration=Calibration(frames=3)), "mine", "frames is 3, but Class")
    assert not list(bank.iterdir())
    check_known("mine")
