"""Folders for bitsandbytes: diffusers loads them with it, and what it decodes is ours to the bit.

Without a GPU diffusers refuses bitsandbytes before it reads anything: that check alone is left out here; what
loads, decodes and multiplies is the code of diffusers and bitsandbytes, which runs on a CPU, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from aquabit.exports.bitsandbytes import check, skipped_by, stored, write
from aquabit.exports.model_folder import WEIGHTS
from aquabit.quant.weights import quantize_weight
from tests.exports.small_models import Case, case, output, refused, small_dit, small_unet

LIBRARY = "bitsandbytes is not installed (126 MB): its own code is the check"
EACH = ("nf4g64", "nf4g64d", "nf4g128", "nf4g128d")


def linear(i: int, name: str, shape: tuple[int, ...]) -> str:
    """A scheme for a Linear layer, so that all occur; one stays dense."""
    return "fp" if len(shape) == 4 or i == 4 else EACH[i % len(EACH)]


@pytest.fixture(params=[small_dit, small_unet], ids=["dit", "unet"])
def made(request: pytest.FixtureRequest) -> Case:
    return case(request.param(), linear, again=request.param())


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason=LIBRARY)
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer as Quantizer

    monkeypatch.setattr(Quantizer, "validate_environment", lambda self, *a, **k: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


def loaded(folder: Path, kind: Any) -> Any:
    return kind.from_pretrained(folder, torch_dtype=torch.float32)


def decoded(net: nn.Module, name: str) -> torch.Tensor:
    import bitsandbytes as bnb

    weight = net.get_submodule(name).weight
    found: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return found


def in_float32_(net: nn.Module) -> None:
    """Without its way on CPUs of bfloat16, which rounds, and stops at outputs that are not 32, 64, ..."""
    import bitsandbytes as bnb

    for module in net.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@pytest.mark.usefixtures("without_gpu")
def test_what_it_decodes_is_our_weight(made: Case, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    check(made.exported)
    write(made.exported, tmp_path / "out")
    net = loaded(tmp_path / "out", type(made.reference))
    assert {str(c.weight) for c in made.exported.config.layers.values()} >= {"nf4g64", "nf4g64d"}
    for name, weight in made.decoded.items():
        found = decoded(net, name)
        assert found.dtype == torch.float32 and torch.equal(found, weight), made.exported.config[name]
    quantized = {n for n, m in net.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantized == set(made.decoded)
    in_float32_(net)
    torch.testing.assert_close(output(net), output(made.reference), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("without_gpu")
def test_it_saves_what_was_written(made: Case, tmp_path: Path) -> None:
    write(made.exported, tmp_path / "out")
    loaded(tmp_path / "out", type(made.reference)).save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / d / WEIGHTS) for d in ("out", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "quant_state" in name:
            mine, theirs = (json.loads(bytes(t.tolist())) for t in (tensor, after[name]))
            assert mine == theirs
        elif tensor.is_floating_point() and ".weight." not in name:
            assert torch.equal(tensor.float(), after[name].float())
        else:
            assert torch.equal(tensor, after[name])


@pytest.mark.parametrize("scheme", ["nf4g64", "nf4g64d", "nf4g4096d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_at_16_bits_it_is_ours_rounded_once(scheme: str, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason=LIBRARY)
    coded = quantize_weight(torch.randn(20, 4096, generator=torch.Generator().manual_seed(3)), scheme)
    parts = {f"a.{k}": t for k, t in stored(coded, dtype).items()}
    data = parts.pop("a.weight")
    weight = bnb.nn.Params4bit.from_prequantized(data, parts, device="cpu")
    found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert found.dtype == dtype and torch.equal(found, coded.dequantize().to(dtype))


@pytest.mark.parametrize(
    ("layer", "scheme", "why"),
    [
        ("conv_in", "nf4g64", "must be a multiple of 64"),
        ("up_blocks.1.resnets.0.conv1", "nf4g64", "bitsandbytes leaves a Conv2d dense"),
        ("time_embedding.linear_1", "int4g64", "bitsandbytes has nf4 of the schemes here"),
        ("time_embedding.linear_1", "int8", "by a factor of 1 / 127 that is rounded"),
        ("time_embedding.linear_1", "nf4g64", ""),
    ],
)
def test_what_it_cannot_hold_is_refused(layer: str, scheme: str, why: str) -> None:
    said = refused(check, small_unet(), layer, scheme)
    if why and "multiple" not in why:
        assert said.startswith(f"layer {layer!r} cannot be {scheme}: ") and why in said
    elif not why:
        assert said == ""


def test_int8_is_not_decoded_exactly() -> None:
    """Why it is refused: of the weights that a scale of 16 bits and a code make, some are rounded."""
    bnb = pytest.importorskip("bitsandbytes", reason=LIBRARY)
    coded = quantize_weight(torch.randn(64, 256, generator=torch.Generator().manual_seed(3)), "int8")
    codes = (coded.codes[:, 0].t().int() - 128).to(torch.int8)
    assert isinstance(coded.scale, torch.Tensor)
    found = bnb.functional.int8_vectorwise_dequant(codes, 127 * coded.scale.float().reshape(-1))
    wrong = (found != coded.dequantize()).float().mean()
    assert 0.001 < wrong < 0.1
    torch.testing.assert_close(found, coded.dequantize(), rtol=3e-7, atol=0)


def test_a_dense_layer_hides_others_by_its_name() -> None:
    assert skipped_by("blocks.0.proj_out", ["proj_out"]) == "proj_out"
    assert skipped_by("blocks.0.ff.proj", ["blocks.0.ff"]) == "blocks.0.ff"
    assert skipped_by("blocks.1.proj", ["blocks.0.proj", "proj_out", "block"]) is None
    net = small_dit()
    said = refused(check, net, "transformer_blocks.0.attn1.to_q", "nf4g64")
    assert said == ""
    net._keep_in_fp32_modules = ["to_q"]
    said = refused(check, net, "transformer_blocks.0.attn1.to_q", "nf4g64")
    assert "diffusers leaves it dense because 'to_q' stays so" in said


@pytest.mark.usefixtures("without_gpu")
def test_diffusers_skips_as_we_say(made: Case, tmp_path: Path) -> None:
    """The rule of ``skipped_by`` is that of diffusers."""
    import bitsandbytes as bnb
    from accelerate import init_empty_weights
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    skipped = ["to_q", "time_embedding", "net.2", "transformer_blocks.1.ff", "proj_out_1"]
    asked = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    names = {n for n, m in made.reference.named_modules() if isinstance(m, nn.Linear)}
    with init_empty_weights():
        net = replace_with_bnb_linear(
            made.reference, modules_to_not_convert=skipped, quantization_config=asked
        )
    dense = {n for n in names if not isinstance(net.get_submodule(n), bnb.nn.Linear4bit)}
    assert dense == {n for n in names if skipped_by(n, skipped) is not None}
    assert 0 < len(dense) < len(names)
