"""Folders for SDNQ: diffusers loads them with it, and what it decodes is ours to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aquabit.exports import sdnq as writer
from aquabit.exports.bit_places import PLACES, pack, unpack
from aquabit.exports.model_folder import NOTE, WEIGHTS
from aquabit.exports.sdnq import check, write
from aquabit.scheme import AquabitError
from tests.exports.small_models import Case, case, output, refused, small_dit, small_unet

LIBRARY = "sdnq is not installed (the extra `targets`); its own code is the check"
# every bit width, groups of several sizes and none, floats, tables
EACH = (
    *(f"int{b}" for b in range(2, 9)),
    *(f"usq{b}g32" for b in range(2, 9)),
    *("int4g32", "int3g16", "int6g64", "usq4", "usq8", "fp8", "fp8c", "nvfp4", "mxfp4", "vq3", "vq4c"),
)
MODELS = {"dit": small_dit, "unet": small_unet}


def every(i: int, name: str, shape: tuple[int, ...]) -> str:
    """A scheme for a layer, so that all occur."""
    for k in range(len(EACH)):
        scheme = EACH[(i + k) % len(EACH)]
        if not isinstance(writer.form(writer.Scheme.parse(scheme), shape), str):
            return scheme
    return "fp"


def sdnq_library() -> Any:
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # before it is imported: it would compile
    return pytest.importorskip("sdnq", reason=LIBRARY)


@pytest.fixture(params=list(MODELS))
def made(request: pytest.FixtureRequest) -> Case:
    build = MODELS[request.param]
    return case(build(), every, again=build())


def loaded(folder: Path, kind: type) -> Any:
    sdnq_library()
    return kind.from_pretrained(folder)  # type: ignore[attr-defined]


def decoded(net: Any, name: str) -> torch.Tensor:
    from sdnq.utils import get_sdnq_params

    module = net.get_submodule(name)
    found: torch.Tensor = module.sdnq_dequantizer(**get_sdnq_params(module))
    return found


def test_what_it_decodes_is_our_weight(made: Case, tmp_path: Path) -> None:
    sdnq_library()
    check(made.exported)
    write(made.exported, tmp_path / "out")
    net = loaded(tmp_path / "out", type(made.reference))
    assert len(made.decoded) > 15
    for name, weight in made.decoded.items():
        for _ in range(2):  # and again: nothing is multiplied in place
            assert torch.equal(decoded(net, name), weight), (name, made.exported.config[name])
    quantized = {n for n, m in net.named_modules() if hasattr(m, "sdnq_dequantizer")}
    assert quantized == set(made.decoded)
    torch.testing.assert_close(output(net), output(made.reference), rtol=0, atol=1e-5)


def test_what_diffusers_rounds_is_said(made: Case, tmp_path: Path) -> None:
    """Scales of 16 bits stay at float16; at bfloat16 diffusers rounds them before SDNQ has them."""
    sdnq_library()
    write(made.exported, tmp_path / "out")
    from sdnq.utils import get_sdnq_params

    for dtype, stays in ((torch.float16, True), (torch.bfloat16, False)):
        net = type(made.reference).from_pretrained(tmp_path / "out", torch_dtype=dtype)
        same = []
        for name, weight in made.decoded.items():
            module = net.get_submodule(name)
            found = module.sdnq_dequantizer(**get_sdnq_params(module), dtype=torch.float32)
            if made.exported.config[name].weight.kind in ("int", "usq"):
                same.append(torch.equal(found, weight))
        assert all(same) if stays else not any(same)


def test_its_own_loader_decodes_our_weight(made: Case, tmp_path: Path) -> None:
    """Which takes the types of tensors as they are in the file."""
    library = sdnq_library()
    write(made.exported, tmp_path / "out")
    net = library.load_sdnq_model(str(tmp_path / "out"), model_cls=type(made.reference))
    for name, weight in made.decoded.items():
        found = decoded(net, name)
        assert torch.equal(found.float(), weight), (name, made.exported.config[name])


def test_it_saves_and_loads_again(made: Case, tmp_path: Path) -> None:
    sdnq_library()
    write(made.exported, tmp_path / "out")
    net = loaded(tmp_path / "out", type(made.reference))
    net.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / d / WEIGHTS) for d in ("out", "again"))
    assert before.keys() == after.keys()
    again = loaded(tmp_path / "again", type(made.reference))
    for name, weight in made.decoded.items():
        assert torch.equal(decoded(again, name), weight)


@pytest.mark.parametrize("bits", PLACES)
def test_codes_lie_where_it_packs_them(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (240,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    sdnq_library()
    from sdnq.packed_int import pack_int

    theirs = pack_int(codes, f"uint{bits}")
    assert torch.equal(pack(codes, bits), theirs)


def test_files_hold_the_codes(made: Case, tmp_path: Path) -> None:
    said = write(made.exported, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    described, tensors = config["quantization_config"], load_file(tmp_path / "out" / WEIGHTS)
    assert described["quant_method"] == "sdnq" and config["_class_name"] == type(made.reference).__name__
    held = 0
    for name in made.decoded:
        own = [t for k, t in tensors.items() if k.startswith(f"{name}.") and not k.endswith("bias")]
        held += sum(t.numel() * t.element_size() for t in own)
        assert f"{name}.weight" not in described["modules_to_not_convert"]
    ours = sum(weight.nbytes for weight in made.exported.weights.values())
    assert said == [
        f"the weights of {len(made.decoded)} layers take {held:,} bytes; the configuration counts {ours:,}",
        writer.ROUNDED,
    ]
    assert json.loads((tmp_path / "out" / NOTE).read_text())["said"] == said


def test_nobodys_folder_is_written_over(made: Case, tmp_path: Path) -> None:
    write(made.exported, tmp_path / "out")
    write(made.exported, tmp_path / "out")  # its own it may
    (tmp_path / "out" / NOTE).unlink()
    with pytest.raises(AquabitError, match=r"holds config\.json, which was not written here before"):
        write(made.exported, tmp_path / "out")


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    found = case(small_dit(), lambda *_: "int4", act=8, again=small_dit())
    said = write(found.exported, tmp_path / "out")
    assert len(said) == 3 and said[2].startswith(f"activations of {len(found.decoded)} layers are quantized")


@pytest.mark.parametrize(
    ("build", "layer", "scheme", "why"),
    [
        (small_dit, "transformer_blocks.0.attn1.to_q", "nf4g64", "SDNQ has no format for nf4g64"),
        (small_dit, "transformer_blocks.0.attn1.to_q", "usq1", "SDNQ has no format for usq1"),
        (small_dit, "transformer_blocks.0.attn1.to_q", "usq4g48", "48 does not divide 128"),
        (small_unet, "conv_out", "usq4g128", "128 does not divide 64"),
        (small_unet, "conv_in", "vq3c", "a table for each output and tap"),
        (small_unet, "conv_norm_out", "int4", "not in this model"),
    ],
)
def test_what_it_cannot_hold_is_refused(build: Callable[[], Any], layer: str, scheme: str, why: str) -> None:
    if layer == "conv_norm_out":
        from aquabit.exports.exported import check_layers

        def checked(exported: Any) -> None:
            check_layers(exported.config, exported.graph)

        assert why in refused(checked, build(), layer, scheme)
        return
    said = refused(check, build(), layer, scheme)
    assert said.startswith(f"layer {layer!r} cannot be {scheme}: ") and why in said
    assert said.endswith("leave it at fp, or search with --target sdnq")


def test_groups_as_wide_as_a_row() -> None:
    form, parse = writer.form, writer.Scheme.parse
    assert form(parse("mxfp4"), (8, 32)) == writer.Form("float4_e2m1fn", -1, "float8_e8m0fnu")
    assert form(parse("int4g32"), (8, 32)) == form(parse("int4"), (8, 32)) == writer.Form("int4", -1)
    assert (
        form(parse("usq4g64"), (8, 32)) == form(parse("usq4g64"), (8, 32, 1, 1)) == writer.Form("uint4", -1)
    )
    assert form(parse("usq4g32"), (8, 32, 3, 3)) == writer.Form("uint4", -1)
    assert isinstance(form(parse("usq4g64"), (8, 32, 3, 3)), str)


def test_codes_that_share_bytes_must_fill_them() -> None:
    net = small_unet()
    net.conv_out = torch.nn.Conv2d(64, 1, 3, padding=1)  # 576 codes
    assert refused(check, net, "conv_out", "int3") == ""
    assert isinstance(writer.form(writer.Scheme.parse("int3"), (3, 5)), str)
    assert not isinstance(writer.form(writer.Scheme.parse("int8"), (3, 5)), str)


def test_a_changed_model_is_refused() -> None:
    net = small_unet()
    net.conv_out = torch.nn.Conv2d(64, 2, 3, padding=1)
    assert "was changed after it was built (conv_out.weight)" in refused(check, net, "conv_in", "int4")
