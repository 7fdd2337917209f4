"""From a model and a configuration to a GGUF file and back, by the command line: what a file holds is what
``aquabit quantize`` packs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aquabit import packing, workflows
from aquabit.cli.app import app
from aquabit.cli.groups import Searching
from aquabit.exports.gguf_blocks import FIELDS
from aquabit.exports.gguf_file import read_file
from aquabit.exports.gguf_reader import read, read_weights
from aquabit.graph import layers, to_json
from aquabit.pipelines import load, network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import FP, AquabitError, Budget, Calibration, LayerChoice, Protocol, QuantConfig, Scheme
from aquabit.space import make_space
from aquabit.study import Study
from tests.tiny_pipelines import randomised, sd3

gguf = pytest.importorskip("gguf")


def mixed(pipe: Any, aware: str = "", fp: str = "") -> QuantConfig:
    """Every layer at the next format of GGUF that it can hold, but for those of the kind ``fp``."""
    choices, turn = {}, 0
    for name, node in layers(trace(pipe)).items():
        for step in range(len(FIELDS)):
            scheme = Scheme.parse([*FIELDS][(turn + step) % len(FIELDS)] + aware)
            if node["kind"] != fp and not scheme.record.refuses(scheme, node["shape"]):
                choices[name], turn = LayerChoice(scheme, 16), turn + step + 1
                break
    sampled = Calibration(images=2, steps=2, conditions=("a cat",)) if aware else None
    return QuantConfig(fingerprint(network_of(pipe)), choices, calibration=sampled)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits-unet", "digits-dit"])
def test_every_layer_of_a_bundled_model(model: str, tmp_path: Path) -> None:
    pipe, bank, path = load(model), str(tmp_path / "bank"), tmp_path / "net.gguf"
    config, graph = mixed(pipe), trace(pipe)
    assert len({c.weight for c in config.layers.values()}) > 6
    workflows.export_files(pipe, config, "gguf", path, bank=bank)
    packed = packing.quantize(pipe, config, bank=bank).model
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in config.layers:
        tensor = tensors[f"{name}.weight"]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        wanted = packed.layers[name].packed.dequantize()
        assert torch.equal(values.reshape(wanted.shape), wanted), name
    assert read(path, graph, config.fingerprint) == config
    found = dict(read_weights(path, graph))
    assert all(torch.equal(found[n], packed.layers[n].packed.dequantize()) for n in config.layers)
    dense = [n for n in layers(graph) if n not in config.layers]
    state = network_of(pipe).state_dict()
    assert all(torch.equal(found[n], state[f"{n}.weight"].half().float()) for n in dense)


def test_the_command_line(tmp_path: Path) -> None:
    pipe = randomised(sd3)
    pipe.save_pretrained(tmp_path / "pipe")
    source, out = str(tmp_path / "pipe"), tmp_path / "net.gguf"
    pipe = load(source)
    config = mixed(pipe, "h", fp="conv")
    (tmp_path / "config.json").write_text(config.to_json())
    assert config.layers

    def export(*more: str) -> Any:
        words = [source, str(tmp_path / "config.json"), "--to", "gguf", "--out", str(out)]
        return CliRunner().invoke(app, ["export", *words, "--bank", str(tmp_path / "bank"), *more])

    done = export()
    assert done.exit_code == 0, done.output
    text = done.output.replace("\n", "")
    assert (
        f"{out.stat().st_size:,} bytes" in text
        and "architecture sd3, with the names that ComfyUI-GGUF" in text
    )
    assert "--tensor-type-rules" in text
    file = read_file(out)
    assert file.values["general.architecture"] == "sd3" and file.values["aquabit.config"] == config.digest
    again = export("--json", "-")
    assert again.exit_code == 0 and json.loads(again.stdout)["to"] == "gguf", again.output
    assert json.loads(again.stdout)["said"][1].startswith("architecture sd3")
    out.write_text("somebody's")
    refused = export()
    assert refused.exit_code == 2 and "is there already and is none of aquabit's for gguf" in refused.output
    assert out.read_text() == "somebody's"


def test_a_file_in_the_place_of_the_model_is_refused(tmp_path: Path) -> None:
    pipe = randomised(sd3)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = load(str(tmp_path / "pipe"))
    config = QuantConfig(fingerprint(network_of(pipe)), {})
    with pytest.raises(AquabitError, match="lies in the place that it is made from"):
        workflows.export_files(pipe, config, "gguf", tmp_path / "pipe" / "net.gguf")


def test_what_the_target_cannot_hold_is_said_before_anything_is_fitted(tmp_path: Path) -> None:
    pipe = randomised(sd3)
    config = mixed(pipe, fp="conv")
    name = next(iter(config.layers))
    wrong = QuantConfig(config.fingerprint, {**config.layers, name: LayerChoice(Scheme.parse("usq4"), 16)})
    bank = tmp_path / "bank"
    with pytest.raises(AquabitError, match=f"layer '{name}' is usq4, which a GGUF file cannot hold"):
        workflows.export_files(pipe, wrong, "gguf", tmp_path / "net.gguf", bank=str(bank))
    assert not bank.exists()


def test_a_search_takes_a_file_as_a_rival(tmp_path: Path) -> None:
    pipe, path = randomised(sd3), tmp_path / "net.gguf"
    config, graph = mixed(pipe, fp="conv"), trace(pipe)
    workflows.export_files(pipe, config, "gguf", path, bank=str(tmp_path / "bank"))
    left = next(iter(config.layers))
    space = make_space(graph, config.fingerprint, "toy", schemes=["usq2h", "usq4h"], excluded=[left])
    study = Study(tmp_path / "s.db")
    study.begin("toy", config.fingerprint, to_json(graph), space.to_dict(), Protocol())
    asked = Searching(against=[path]).options(Budget(bits=4), study)
    ((name, rival),) = asked.against
    assert name == "net.gguf" and rival.fingerprint == config.fingerprint
    assert rival[left].weight == FP
    assert all(rival[n] == choice for n, choice in config.layers.items() if n != left)
    space.check(rival, extra_schemes=True)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(AquabitError, match=r"net.gguf cannot be read as GGUF: it ends at byte 400"):
        Searching(against=[path]).options(Budget(bits=4), study)
