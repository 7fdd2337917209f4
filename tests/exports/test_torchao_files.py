"""Folders for torchao: diffusers loads them with it, and what it decodes is ours to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from aquabit.exports.model_folder import WEIGHTS
from aquabit.exports.torchao_files import check, config, stored, write
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import Scheme
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
        (small_unet, "conv_in", "int8", "weights of Linear layers, and it is a Conv2d"),
        (small_dit, "proj_out_1", "mxfp4", "runs mxfp4 with rounded inputs alone"),
        (small_dit, "proj_out_1", "usq4g32", "hold int2 to int8, fp8 and nvfp4"),
        (small_dit, "proj_out_1", "int4g32", ""),
    ],
)
def test_what_it_cannot_hold_is_refused(build: Any, layer: str, scheme: str, why: str) -> None:
    said = refused(check, build(), layer, scheme)
    assert why in said and bool(said) == bool(why)
