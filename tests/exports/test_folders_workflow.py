"""From a model and a configuration to the folders of other programs and back: bundled models, the command
line, and what a search is held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aquabit import packing, workflows
from aquabit.budget import Budget
from aquabit.cli.app import app
from aquabit.cli.groups import Searching
from aquabit.exports import (
    bitsandbytes,
    bitsandbytes_reader,
    comfy,
    sdnq,
    sdnq_reader,
    torchao_files,
    with_weights,
)
from aquabit.exports.readers import read_others
from aquabit.exports.stored_folder import described_in
from aquabit.graph import layers, to_json
from aquabit.pipelines import load, network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import Calibration, LayerChoice, Protocol, QuantConfig, Scheme
from aquabit.space import make_space
from aquabit.study import Study
from tests.exports import test_bitsandbytes, test_comfy, test_sdnq, test_torchao_files
from tests.tiny_pipelines import randomised, sd3

CHOSEN = {
    "sdnq": test_sdnq.every,
    "bitsandbytes": test_bitsandbytes.linear,
    "torchao": test_torchao_files.linear,
    "comfy": test_comfy.linear,
}
READ = {"sdnq": sdnq_reader.read_weights, "bitsandbytes": bitsandbytes_reader.read_weights}


def mixed(pipe: Any, to: str, aware: str = "") -> QuantConfig:
    """Every layer at one of the target's schemes that it can hold."""
    choices = {}
    for i, (name, node) in enumerate(layers(trace(pipe)).items()):
        shape = tuple(node["shape"])
        scheme = Scheme.parse(CHOSEN[to](i, name, shape))
        if str(scheme) != "fp" and not scheme.refuses(shape):
            choices[name] = LayerChoice(Scheme.parse(f"{scheme}{aware}"), 16)
    sampled = Calibration(images=2, steps=2, conditions=("a cat",)) if aware else None
    return QuantConfig(fingerprint(network_of(pipe)), choices, calibration=sampled)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits-unet", "digits-dit"])
@pytest.mark.parametrize("to", ["sdnq", "bitsandbytes"])
def test_every_layer_of_a_bundled_model(to: str, model: str, tmp_path: Path) -> None:
    pipe, bank, out = load(model), str(tmp_path / "bank"), tmp_path / "out"
    config, graph = mixed(pipe, to), trace(pipe)
    workflows.export_files(pipe, config, to, out, bank=bank)
    packed = packing.quantize(pipe, config, bank=bank).model
    assert read_others(out, graph, config.fingerprint) == config
    folder = described_in(out)
    assert folder is not None
    found = dict(READ[to](folder, graph))
    state = network_of(pipe).state_dict()
    for name in layers(graph):
        dense = state[f"{name}.weight"].half().float()
        wanted = packed.layers[name].packed.dequantize() if name in config.layers else dense
        assert torch.equal(found[name], wanted), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits-unet", "digits-dit"])
def test_diffusers_loads_a_bundled_model_by_sdnq(model: str, tmp_path: Path) -> None:
    test_sdnq.sdnq_library()
    pipe, bank, out = load(model), str(tmp_path / "bank"), tmp_path / "out"
    config = mixed(pipe, "sdnq")
    workflows.export_files(pipe, config, "sdnq", out, bank=bank)
    packed = packing.quantize(pipe, config, bank=bank).model
    net = type(network_of(pipe)).from_pretrained(out)
    for name in config.layers:
        assert torch.equal(test_sdnq.decoded(net, name), packed.layers[name].packed.dequantize()), name


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A tiny pipeline in a folder, loaded again, and a configuration of it for SDNQ."""
    randomised(sd3).save_pretrained(tmp_path / "pipe")
    return load(str(tmp_path / "pipe"))


def test_the_command_line(saved: Any, tmp_path: Path) -> None:
    source, out, file = str(tmp_path / "pipe"), tmp_path / "out", tmp_path / "config.json"

    def export(to: str, path: Path, *more: str) -> Any:
        words = [source, str(file), "--to", to, "--out", str(path)]
        return CliRunner().invoke(app, ["export", *words, *more])

    config = mixed(saved, "sdnq", "h")
    file.write_text(config.to_json())
    bank = ("--bank", str(tmp_path / "bank"))
    done = export("sdnq", out, *bank)
    assert done.exit_code == 0 and "the configuration counts" in done.output.replace("\n", " "), done.output
    found = read_others(out, trace(saved), config.fingerprint)
    assert found is not None and found.layers.keys() == config.layers.keys()
    for name, node in layers(trace(saved)).items():  # groups as wide as a row are none
        shape = tuple(node["shape"])
        assert found[name].weight.layout(shape) == config[name].weight.layout(shape), name
    assert export("sdnq", out, *bank).exit_code == 0  # again, in its own place
    (out / "aquabit.json").unlink()
    again = export("sdnq", out, *bank)
    assert again.exit_code == 2 and "none of aquabit's for sdnq" in again.output.replace("\n", " ")
    wrong = export("bitsandbytes", tmp_path / "other", *bank)
    assert wrong.exit_code == 2 and "search with --target bitsandbytes" in wrong.output.replace("\n", " ")
    assert not (tmp_path / "other").exists()


def test_torchao_gets_a_recipe_or_weights(saved: Any, tmp_path: Path) -> None:
    source, file, out = str(tmp_path / "pipe"), tmp_path / "config.json", tmp_path / "out"
    file.write_text(mixed(saved, "torchao").to_json())
    assert with_weights("torchao", out) and not with_weights("torchao", "x.json")
    assert with_weights("gguf", "x.json") and not with_weights("quanto", out)
    words = ["export", source, str(file), "--to", "torchao", "--out"]
    recipe = CliRunner().invoke(app, [*words, str(tmp_path / "recipe.json")])
    assert recipe.exit_code == 0, recipe.output
    assert json.loads((tmp_path / "recipe.json").read_text())["to"] == "torchao"
    weights = CliRunner().invoke(app, [*words, str(out), "--bank", str(tmp_path / "bank")])
    assert weights.exit_code == 0 and (out / "config.json").is_file(), weights.output


def test_a_search_is_held_against_a_folder(saved: Any, tmp_path: Path) -> None:
    config, graph = mixed(saved, "sdnq"), trace(saved)
    workflows.export_files(saved, config, "sdnq", tmp_path / "out", bank=str(tmp_path / "bank"))
    excluded = next(iter(config.layers))
    space = make_space(graph, config.fingerprint, schemes=["int4"], excluded=[excluded])
    study = Study(tmp_path / "s.db")
    study.begin("model", config.fingerprint, to_json(graph), space.to_dict(), Protocol())
    ((name, rival),) = Searching(against=[tmp_path / "out"]).options(Budget(bits=4.0), study).against
    assert name == "out" and rival[excluded].weight == Scheme()
    assert rival.layers.keys() == config.layers.keys() - {excluded}


def test_all_of_them_are_writers() -> None:
    from aquabit.exports.files import WRITERS

    for to, module in (("sdnq", sdnq), ("bitsandbytes", bitsandbytes), ("torchao", torchao_files)):
        assert WRITERS[to].write is module.write and WRITERS[to].check is module.check
    assert WRITERS["comfy"].write is comfy.write and WRITERS["comfy"].may_replace is comfy.is_ours
