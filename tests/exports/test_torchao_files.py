"""Folders for torchao: diffusers loads them with it, and what it decodes is ours to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from aquabit.exports.exported import check_activations
from aquabit.exports.model_folder import WEIGHTS
from aquabit.exports.torchao_files import check, config, stored, write
from aquabit.kernels.fake_quant import fake_quantize
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError, LayerChoice, QuantConfig, Scheme, StepGroups
from aquabit.targets import TARGETS
from tests.exports.small_models import Case, case, output, refused, small_dit, small_unet

LIBRARY = "torchao is not installed (the extra `targets`); its own code is the check"
EACH = (*(f"int{b}" for b in range(2, 9)), *("int4g32", "int3g16", "int8g64", "fp8", "fp8c", "nvfp4"))


def linear(i: int, name: str, shape: tuple[int, ...]) -> str:
    """A scheme for a Linear layer, so that all occur; one stays dense."""
    return "fp" if len(shape) == 4 or i == 4 else EACH[i % len(EACH)]


@pytest.fixture(params=[small_dit, small_unet], ids=["dit", "unet"])
def made(request: pytest.FixtureRequest) -> Case:
    return case(request.param(), linear, again=request.param())


def loaded(folder: Path, kind: Any) -> Any:
    pytest.importorskip("torchao", reason=LIBRARY)
    return kind.from_pretrained(folder, torch_dtype=torch.float32)


def test_what_it_decodes_is_our_weight(made: Case, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=LIBRARY)
    from torchao.utils import TorchAOBaseTensor

    check(made.exported)
    write(made.exported, tmp_path / "out")
    net = loaded(tmp_path / "out", type(made.reference))
    for name, weight in made.decoded.items():
        found = net.get_submodule(name).weight.dequantize()
        assert found.dtype == torch.float32 and torch.equal(found, weight), made.exported.config[name]
    quantized = {
        name
        for name, module in net.named_modules()
        if isinstance(getattr(module, "weight", None), TorchAOBaseTensor)
    }
    assert quantized == set(made.decoded)
    torch.testing.assert_close(output(net), output(made.reference), rtol=0, atol=1e-5)


def test_it_saves_what_was_written(made: Case, tmp_path: Path) -> None:
    write(made.exported, tmp_path / "out")
    loaded(tmp_path / "out", type(made.reference)).save_pretrained(tmp_path / "again")
    with (
        safe_open(tmp_path / "out" / WEIGHTS, "pt") as mine,
        safe_open(tmp_path / "again" / WEIGHTS, "pt") as theirs,
    ):
        before, after = mine.metadata(), theirs.metadata()
        assert before.keys() == after.keys()
        for name in json.loads(before["tensor_names"]):
            ours, saved = json.loads(before[name]), json.loads(after[name])
            assert ours["_type"] == saved["_type"] and ours.get("_data") == saved.get("_data")
        assert set(mine.keys()) == set(theirs.keys())
        for key in mine.keys():  # noqa: SIM118
            if "._weight_" in key:
                assert torch.equal(mine.get_tensor(key).float(), theirs.get_tensor(key).float()), key


def rounding(i: int, name: str, shape: tuple[int, ...]) -> str:
    return "fp" if len(shape) == 4 else ("int8", "fp8c")[i % 2]


@pytest.fixture
def rounded() -> Case:
    """Layers at int8 with their inputs at i8, and at fp8c with theirs at f8."""
    made = case(small_dit(), rounding, again=small_dit())
    config = made.exported.config
    acts = {"int8": "i8", "fp8c": "f8"}
    chosen = {n: replace(c, act=acts[str(c.weight)]) for n, c in config.layers.items()}
    assert {c.act for c in chosen.values()} == {"i8", "f8"}
    return replace(made, exported=replace(made.exported, config=replace(config, layers=chosen)))


def test_inputs_are_rounded_as_the_configuration_says(rounded: Case, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=LIBRARY)
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor as quantized

    check_activations(rounded.exported.config, TARGETS["torchao"].beside)
    check(rounded.exported)
    said = write(rounded.exported, tmp_path / "out")
    assert any("/ 127.5, not / 127" in text for text in said)
    assert not any("quantized here" in text for text in said), "they are not lost"
    net = loaded(tmp_path / "out", type(rounded.reference))
    for name, choice in rounded.exported.config.layers.items():
        weight = net.get_submodule(name).weight
        assert torch.equal(weight.dequantize(), rounded.decoded[name])
        x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(0))
        inputs = quantized(x, weight.act_quant_kwargs).dequantize()
        if choice.act == "f8":
            assert torch.equal(inputs, fake_quantize(x, "f8"))
            continue
        scale = x.abs().amax(1, keepdim=True) / 127.5
        assert torch.equal(inputs, torch.round(x * (1 / scale)).clamp(-128, 127) * scale)
        exact = inputs.double() @ rounded.decoded[name].double().t()
        found = torch.nn.functional.linear(x, weight).double()
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("scheme", "act", "why"),
    [
        ("int4g32", "i8", "symmetric int8 inputs by int8 weights with a scale for each output"),
        ("fp8", "f8", "float8 inputs, a scale for each token, by fp8c weights"),
        ("fp", "i8", "symmetric int8 inputs by int8 weights"),
        ("int8", ("i8", 16), "no program changes how inputs are rounded while sampling"),
        ("int8", 8, ""),
        ("int8", "i8", ""),
    ],
)
def test_inputs_that_it_does_not_round_so_are_refused(scheme: str, act: Any, why: str) -> None:
    layers = {"a": LayerChoice(Scheme.parse(scheme), act)}
    config = QuantConfig("f", layers, steps=StepGroups(4, (0, 2)))
    if not why:
        return check_activations(config, TARGETS["torchao"].beside)
    with pytest.raises(AquabitError, match=why) as caught:
        check_activations(config, TARGETS["torchao"].beside)
    assert f"layer 'a' cannot be {scheme} at" in str(caught.value)


@pytest.mark.parametrize("scheme", EACH)
def test_its_configuration_reads_what_is_said_of_a_layer(scheme: str) -> None:
    pytest.importorskip("torchao", reason=LIBRARY)
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    parsed = Scheme.parse(scheme)
    net = torch.nn.Sequential(torch.nn.Linear(128, 32))
    quantize_(net, config_from_dict(config(parsed)))
    weight = net[0].weight
    kind = {"int": "IntxUnpackedToInt8Tensor", "fp8": "Float8Tensor", "nvfp4": "NVFP4Tensor"}[parsed.kind]
    assert type(weight).__name__ == ("Int8Tensor" if str(parsed).startswith("int8") else kind)
    own = stored(quantize_weight(torch.randn(32, 128), parsed), parsed)
    theirs = weight.block_size if parsed.kind == "nvfp4" else list(weight.block_size)
    assert own.kind == type(weight).__name__ and own.attributes["block_size"] == theirs
    for part, tensor in own.parts.items():
        made = getattr(weight, part)
        if parsed.kind == "nvfp4" and part == "scale":
            made = None  # torchao's lie in tiles there, and say so
        assert made is None or (made.dtype, made.shape) == (tensor.dtype, tensor.shape), part


@pytest.mark.parametrize(
    ("build", "layer", "scheme", "why"),
    [
        (small_unet, "conv_in", "int8", "loaded into Linear layers alone, and it is a Conv2d"),
        (small_dit, "proj_out_1", "mxfp4", "runs mxfp4 with rounded inputs alone"),
        (small_dit, "proj_out_1", "usq4g32", "hold int2 to int8, fp8 and nvfp4"),
        (small_dit, "proj_out_1", "int4g32", ""),
    ],
)
def test_what_it_cannot_hold_is_refused(build: Any, layer: str, scheme: str, why: str) -> None:
    said = refused(check, build(), layer, scheme)
    assert why in said and bool(said) == bool(why)
