"""Models of the user's own, and their files for other programs: what these decode is ours to the bit, and the
network computes with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import aquabit
from aquabit import packing, workflows
from aquabit.exports.model_folder import MODEL_WEIGHTS
from aquabit.exports.readers import read_others
from aquabit.graph import layers
from aquabit.pipelines import network_of, trace
from aquabit.quant.model import fingerprint
from aquabit.scheme import LayerChoice, QuantConfig, Scheme
from tests.command_line import fails, run
from tests.exports import test_bitsandbytes, test_comfy, test_sdnq, test_torchao_files
from tests.pipelines.test_own_model import Net, heun

SCHEMES = {  # given to the layers in turn
    "sdnq": ("int4", "usq5g32", "int8", "fp8", "nvfp4", "usq3"),
    "torchao": ("int4g32", "fp8c", "int8", "nvfp4"),
    "bitsandbytes": ("nf4g64", "nf4g64d"),
    "comfy": ("int8", "nvfp4", "fp8", "mxfp8"),
    "gguf": ("q4_0", "q5_1", "q8_0"),
}
CONVOLUTIONS = ("sdnq", "gguf")  # targets that hold them


class Own(Net):
    """With a layer that has two names, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__(64)
        self.again = self.level
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return super().forward(x + self.shift, sigma, label)


def model() -> aquabit.Model:
    torch.manual_seed(0)
    return aquabit.Model(Own(), heun, conditions=range(4), layers={"qk*": "self_attn.qkv"})


def config_of(own: aquabit.Model, to: str) -> QuantConfig:
    chosen, turn = dict[str, LayerChoice](), 0
    for name, node in layers(trace(own)).items():
        for step in range(len(SCHEMES[to])):
            scheme, shape = Scheme.parse(SCHEMES[to][(turn + step) % len(SCHEMES[to])]), tuple(node["shape"])
            held = node["kind"] == "linear" or (to in CONVOLUTIONS and scheme.kind not in ("nvfp4",))
            if held and name != "level" and scheme.refuses(shape) is None and shape[0] > 1:
                chosen[name], turn = LayerChoice(scheme), turn + step + 1
                break
    return QuantConfig(fingerprint(network_of(own)), chosen)


def by_sdnq(out: Path) -> nn.Module:
    test_sdnq.sdnq_library()
    from sdnq import load_sdnq_model

    net: nn.Module = load_sdnq_model(str(out), model_cls=Own)
    return net


def by_torchao(out: Path) -> nn.Module:
    pytest.importorskip("torchao", reason=test_torchao_files.LIBRARY)
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(out / MODEL_WEIGHTS, "pt") as file:
        state, left = unflatten_tensor_state_dict(load_file(out / MODEL_WEIGHTS), file.metadata())
    net = Own()
    net.load_state_dict({**state, **left}, assign=True)
    return net


def by_bitsandbytes(out: Path) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason=test_bitsandbytes.LIBRARY)
    net, state = Own(), load_file(out / MODEL_WEIGHTS)
    for name, old in list(net.named_modules()):
        parts = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.weight.")}
        if parts:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4")
            coded, new.bias = state.pop(f"{name}.weight"), old.bias
            new.weight = bnb.nn.Params4bit.from_prequantized(coded, parts, device="cpu", module=new)
            net.set_submodule(name, new)
    left = net.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all("weight" in key for key in left.missing_keys)
    test_bitsandbytes.in_float32_(net)
    return net


def decoded(net: nn.Module, name: str, to: str) -> Tensor:
    """A layer's weight by the program, in float32."""
    if to == "sdnq":
        return test_sdnq.decoded(net, name)
    if to == "bitsandbytes":
        return test_bitsandbytes.decoded(net, name)
    found: Any = net.get_submodule(name).weight
    return found.dequantize()


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "sdnq": by_sdnq,
    "torchao": by_torchao,
    "bitsandbytes": by_bitsandbytes,
}


def weights_of(own: aquabit.Model, config: QuantConfig, bank: str) -> Iterator[tuple[str, Tensor]]:
    """What is packed of each layer, decoded."""
    packed = packing.quantize(own, config, bank=bank).model
    for name in config.layers:
        yield name, packed.layers[name].packed.dequantize()


@pytest.mark.parametrize("to", LOADERS)
def test_a_folder_is_loaded_by_the_program_that_it_is_for(to: str, tmp_path: Path) -> None:
    own, bank, out = model(), str(tmp_path / "bank"), tmp_path / "out"
    config = config_of(own, to)
    said = " ".join(workflows.export_files(own, config, to, out, bank=bank))
    assert "no package builds Own again" in said and set(json.loads((out / "config.json").read_text())) == {
        "quantization_config"
    }
    net, dense = LOADERS[to](out), model().denoiser
    assert {"qkv", "out"} <= set(config.layers) and ("first" in config.layers) == (to == "sdnq")
    with torch.no_grad():
        for tensor in dense.state_dict().values():
            tensor.copy_(tensor.half())
        for name, weight in weights_of(own, config, bank):
            assert torch.equal(decoded(net, name, to), weight), (name, config[name])
            dense.get_submodule(name).weight.copy_(weight)
        x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
        found = net.float().eval()(x, torch.tensor(0.7), labels)
        torch.testing.assert_close(found, dense.eval()(x, torch.tensor(0.7), labels), rtol=0, atol=1e-5)
    assert read_others(out, trace(own), config.fingerprint) == config


def test_a_gguf_file_holds_its_tensors_by_their_names(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    own, bank, out = model(), str(tmp_path / "bank"), tmp_path / "own.gguf"
    config = config_of(own, "gguf")
    said = " ".join(workflows.export_files(own, config, "gguf", out, bank=bank))
    assert "architecture aquabit: no other names of Own are known, so its own are written" in said
    file = gguf.GGUFReader(out)
    assert file.fields["general.architecture"].contents() == "aquabit"
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert tensors.keys() == own.denoiser.state_dict().keys() and {"qkv", "out", "last"} & set(config.layers)
    for name, weight in weights_of(own, config, bank):
        one = tensors[f"{name}.weight"]
        found = torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)).reshape(weight.shape)
        assert torch.equal(found, weight), (name, config[name])
    assert read_others(out, trace(own), config.fingerprint) == config


def test_a_file_for_comfy_holds_its_tensors_by_their_names(tmp_path: Path) -> None:
    own, bank, out = model(), str(tmp_path / "bank"), tmp_path / "own.safetensors"
    config = config_of(own, "comfy")
    said = " ".join(workflows.export_files(own, config, "comfy", out, bank=bank))
    assert "its own names: ComfyUI knows no such model" in said
    file, about = load_file(out), test_comfy.header(out)["layers"]
    assert own.denoiser.state_dict().keys() <= file.keys() and about.keys() == config.layers.keys()
    for name, weight in weights_of(own, config, bank):
        assert torch.equal(test_comfy.decoded(file, name, about[name]["format"]), weight), config[name]
    assert read_others(out, trace(own), config.fingerprint) == config


@pytest.mark.parametrize("to", ["torchao", "quanto", "modelopt"])
def test_a_recipe_names_its_modules(to: str, tmp_path: Path) -> None:
    own, name = model(), "tests.exports.test_own_models:model"
    (tmp_path / "config.json").write_text(config_of(own, "torchao").to_json())
    assert "running your code" in run(
        tmp_path, "export", name, "config.json", "--to", to, "--out", "recipe.json"
    )
    found = json.loads((tmp_path / "recipe.json").read_text())
    modules = dict(own.denoiser.named_modules())
    named = {key.removesuffix(".weight_quantizer") for key in _names(found["config"]) if key != "*"}
    assert {"qkv", "out"} <= named <= set(modules)


def _names(config: Any) -> list[str]:
    """The layers that a library's configuration names."""
    if "quant_cfg" in config:
        return [entry["quantizer_name"] for entry in config["quant_cfg"]]
    return list(config["_data"]["fqn_to_config"] if "_data" in config else config)


def test_the_command_line_writes_them(tmp_path: Path) -> None:
    name = "tests.exports.test_own_models:model"
    (tmp_path / "config.json").write_text(config_of(model(), "sdnq").to_json())
    done = run(tmp_path, "export", name, "config.json", "--to", "sdnq", "--out", "out")
    assert "load_sdnq_model" in done and (tmp_path / "out" / MODEL_WEIGHTS).is_file()
    wrong = fails(
        tmp_path, "export", name, "config.json", "--to", "bitsandbytes", "--out", "other", code=True
    )
    assert "search with --target bitsandbytes" in wrong and not (tmp_path / "other").exists()
