"""Ways in: variants, files of weights with the pipeline that they belong to, GGUF; and what is said where
something is amiss."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquabit.packing import quantize
from aquabit.pipelines import (
    Adapter,
    denoiser_of,
    free_text_encoders,
    load,
    restore_text_encoders,
    single_files,
    trace,
)
from aquabit.pipelines.reference import Reference
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Protocol
from aquabit.space import make_space
from tests.command_line import fails, run
from tests.pipelines.test_convert import CHANNELS, LAYERS, UNET, VQ, Original
from tests.tiny_pipelines import PROMPTS, clip, clip_tokenizer, ddim, tiny

PROTOCOL = Protocol(images=2, steps=2, micro_batch=2, conditions=PROMPTS[:2])
OF_CLASSES = Protocol(images=2, steps=2, micro_batch=2)


def images(pipe: Any, protocol: Protocol = PROTOCOL) -> Tensor:
    return Adapter(pipe).images(protocol, range(2))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "pipe"
    tiny("sd3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "pipe"
    tiny("dit").save_pretrained(folder)
    return folder


def tensors(folder: Path, part: str = "transformer") -> dict[str, Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def other(folder: Path) -> dict[str, Tensor]:
    """Weights that differ from the folder's own."""
    return {k: v * 1.25 if v.ndim > 1 else v for k, v in tensors(folder).items()}


# ---- references


@pytest.mark.parametrize(
    "reference",
    [
        Reference("digits-dit"),
        Reference("org/name", "fp16"),
        Reference("/a b/x.safetensors", base="/c?d/e&f"),
        Reference("what?.gguf", base="org/name"),
        Reference("digits-dit", loras=("/a b/l.safetensors:0.5", "m.safetensors")),
    ],
)
def test_a_reference_is_one_text_both_ways(reference: Reference) -> None:
    assert Reference.parse(reference.text) == reference


def test_a_question_mark_in_a_name_is_no_option() -> None:
    assert Reference.parse("/models/what?") == Reference("/models/what?")
    assert Reference.parse("/models/a?b=c") == Reference("/models/a?b=c")
    assert Reference.parse("org/name?variant=fp16").with_("fp16").variant == "fp16"
    with pytest.raises(AquabitError, match="variant is 'fp16' in"):
        Reference.parse("org/name?variant=fp16").with_("bf16")


def test_folders_of_this_machine_are_not_told() -> None:
    assert Reference("/home/me/x.gguf", base="/home/me/flux").public == "x.gguf?base=flux"
    assert Reference("org/name", "fp16").public == "org/name?variant=fp16"


# ---- variants


def test_the_files_of_a_variant_are_loaded(tmp_path: Path) -> None:
    pipe = tiny("sd")
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16")
    assert (tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    for found in (load(tmp_path / "pipe", variant="fp16"), load(f"{tmp_path / 'pipe'}?variant=fp16")):
        assert torch.equal(images(found), images(pipe))
        free_text_encoders(found)
        restore_text_encoders(found)  # they come again from the same files
        assert torch.equal(images(found), images(pipe))
    with pytest.raises(AquabitError, match="cannot be loaded"):
        load(tmp_path / "pipe")
    with pytest.raises(AquabitError, match="fp99"):
        load(tmp_path / "pipe", variant="fp99")


# ---- files of weights


def test_a_denoiser_in_a_file_takes_the_place_of_the_pipelines_own(sd3: Path, tmp_path: Path) -> None:
    save_file(other(sd3), tmp_path / "mine.safetensors")
    pipe = load(tmp_path / "mine.safetensors", base=sd3)
    assert not torch.equal(images(pipe), images(load(sd3)))
    wanted = load(sd3)
    wanted.transformer.load_state_dict(other(sd3))
    assert torch.equal(images(pipe), images(wanted))
    assert fingerprint(denoiser_of(pipe)) == fingerprint(wanted.transformer)


def test_a_class_without_a_loader_of_files_takes_diffusers_own_names(dit: Path, tmp_path: Path) -> None:
    assert not hasattr(d.DiTTransformer2DModel, "from_single_file")
    save_file(other(dit), tmp_path / "mine.safetensors")
    wanted = load(dit)
    wanted.transformer.load_state_dict(other(dit))
    found = load(tmp_path / "mine.safetensors", base=dit)
    assert torch.equal(images(found, OF_CLASSES), images(wanted, OF_CLASSES))
    assert load(tmp_path / "mine.safetensors", dtype="float16", base=dit).transformer.dtype == torch.float16


KEY = "transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), rf"lacks '{KEY}', which is a tensor of DiTTransformer2DModel"),
        (
            lambda t: t.update(more=torch.ones(1)),
            r"has 'more', which is not a tensor of DiTTransformer2DModel",
        ),
        (lambda t: t.update({KEY: torch.ones(3, 5)}), rf"'{KEY}' is \[3, 5\], .* has \[16, 16\]"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    dit: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    changed = tensors(dit)
    change(changed)
    save_file(changed, tmp_path / "mine.safetensors")
    with pytest.raises(AquabitError, match=message):
        load(tmp_path / "mine.safetensors", base=dit)


def test_a_denoiser_that_lacks_tensors_is_no_matter_of_meta_tensors(sd3: Path, tmp_path: Path) -> None:
    changed = tensors(sd3)
    del changed["proj_out.weight"]
    save_file(changed, tmp_path / "mine.safetensors")
    with pytest.raises(AquabitError, match=r"mine\.safetensors.*proj_out\.weight") as error:
        load(tmp_path / "mine.safetensors", base=sd3)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """A whole checkpoint in the original layout, a folder with configs and everything else, and what the
    layout computes."""
    folder, state = tmp_path_factory.mktemp("sd"), Original()
    draw = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 3, 8, 8, generator=draw), torch.randn(1, 4, 16, generator=draw)
    found = {"x": x, "context": context, "noise": state.unet(x, torch.tensor([700]), context)}
    state.encode(torch.randn(1, 3, 16, 16, generator=draw))
    for name, out in (("encoder.conv_out", 6), ("quant_conv", 6)):  # of a KL stage: means and variances
        size = 3 if name.startswith("enc") else 1
        state.pop(f"{VQ}{name}.weight"), state.pop(f"{VQ}{name}.bias")
        state.get_(f"{VQ}{name}.weight", out, CHANNELS[-1] if size == 3 else 6, size, size)
        state.get_(f"{VQ}{name}.bias", out)
    state.decode(x)
    del state[f"{VQ}quantize.embedding.weight"]
    text = clip()
    names = {k: k if k.startswith("text_model.") else f"text_model.{k}" for k in text.state_dict()}
    state.update({f"cond_stage_model.transformer.{names[k]}": v for k, v in text.state_dict().items()})
    unet = d.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=CHANNELS,
        layers_per_block=LAYERS,
        cross_attention_dim=16,
        attention_head_dim=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = d.AutoencoderKL(
        block_out_channels=CHANNELS,
        latent_channels=3,
        layers_per_block=LAYERS,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    parts = (vae, text, clip_tokenizer(), unet, ddim(), None, None)
    d.StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder / "base")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "whole.safetensors")
    return folder / "whole.safetensors", folder / "base", found


def test_a_whole_checkpoint_becomes_the_pipeline_of_its_base(
    original: tuple[Path, Path, dict[str, Tensor]],
) -> None:
    file, base, wanted = original
    pipe = load(file, base=base)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    with torch.no_grad():
        noise = pipe.unet(wanted["x"], 700, encoder_hidden_states=wanted["context"]).sample
    assert torch.allclose(noise, wanted["noise"], atol=1e-4) and noise.std() > 0.1
    kept = load_file(file)
    own = pipe.vae.decoder.conv_in.weight
    assert torch.equal(own, kept[f"{VQ}decoder.conv_in.weight"]), "the file's own first stage, not the base's"
    assert images(pipe).shape == (2, 3, 16, 16)
    assert any(k.startswith(UNET) for k in kept)


# ---- GGUF


def gguf_file(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GGUF file whose matrices are Q8_0; what it decodes to."""
    gguf = pytest.importorskip("gguf")
    writer, decoded = gguf.GGUFWriter(path, "sd3"), {}
    for name, value in weights.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            coded = gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(name, coded, raw_dtype=kind)
            decoded[name] = torch.from_numpy(gguf.quants.dequantize(coded, kind))
        else:
            writer.add_tensor(name, value.numpy())
            decoded[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def test_gguf_is_taken_as_what_it_decodes_to(sd3: Path, tmp_path: Path) -> None:
    decoded = gguf_file(tmp_path / "mine.gguf", other(sd3))
    assert any(not torch.equal(v, other(sd3)[k]) for k, v in decoded.items()), "some are quantized"
    pipe, wanted = load(tmp_path / "mine.gguf", base=sd3), load(sd3)
    dense = {type(module) for module in wanted.transformer.modules()}
    assert {type(module) for module in pipe.transformer.modules()} == dense
    for name, value in pipe.transformer.state_dict().items():
        assert torch.allclose(value, decoded[name], rtol=1e-3, atol=1e-4), (
            name
        )  # diffusers decodes in float16
    how = d.GGUFQuantizationConfig(compute_dtype=torch.float32)
    wanted.transformer = d.SD3Transformer2DModel.from_single_file(
        str(tmp_path / "mine.gguf"), config=str(sd3), subfolder="transformer", quantization_config=how
    )
    assert torch.allclose(images(pipe), images(wanted), atol=1e-5), "as diffusers runs it"
    config = make_space(trace(pipe), fingerprint(pipe.transformer), schemes=["usq4"]).uniform("usq4")
    size = quantize(pipe, config).save(tmp_path / "packed")
    assert size > 0 and images(load(tmp_path / "packed")).shape == (2, 3, 16, 16)


def test_without_the_package_that_reads_gguf_it_is_said(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(single_files, "is_gguf_available", lambda: False)
    with pytest.raises(AquabitError, match=r"pip install 'aquabit\[gguf\]'"):
        load(tmp_path / "mine.gguf", base=sd3)


def test_a_damaged_file_is_one_sentence(sd3: Path, tmp_path: Path) -> None:
    for name in ("mine.gguf", "mine.safetensors"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(AquabitError) as error:
            load(tmp_path / name, base=sd3)
        assert name in str(error.value) and "\n" not in str(error.value)


# ---- what does not go together


def test_what_does_not_go_together_is_said(sd3: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file({"a": torch.ones(1)}, file)
    (tmp_path / "old.ckpt").write_bytes(b"")
    for given, more, message in (
        (file, {}, "give the pipeline that they belong to by --base"),
        (file, {"base": sd3, "variant": "fp16"}, "variant 'fp16' names files of a folder"),
        (sd3, {"base": sd3}, "base is the pipeline of a file of weights, and there is no file"),
        (tmp_path / "old.ckpt", {"base": sd3}, "a .ckpt holds code"),
        (tmp_path / "none.gguf", {}, "there is no file"),
        (file, {"base": tmp_path}, "is not a diffusers pipeline"),
        (tiny("dit"), {"variant": "fp16"}, "this model is loaded already"),
    ):
        with pytest.raises(AquabitError, match=re.escape(message)):
            load(given, **more)


def test_every_verb_that_takes_a_model_takes_them(sd3: Path, tmp_path: Path) -> None:
    save_file(other(sd3), tmp_path / "mine.safetensors")
    given = (str(tmp_path / "mine.safetensors"), "--base", str(sd3))
    assert "SD3Transformer2DModel" in run(tmp_path, "inspect", *given, "--json", "-")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    (tmp_path / "space.json").write_text('{"schemes": ["usq4", "usq8"], "activations": [8]}')
    few = [
        "--samples",
        "0",
        "--images",
        "2",
        "--steps",
        "1",
        "--micro-batch",
        "2",
        "--workers",
        "1",
        "--prompts",
        "prompts.txt",
    ]
    run(tmp_path, "measure", *given, "--study", "s.db", "--space", "space.json", *few)
    run(tmp_path, "search", "s.db", "--bits", "8", "--out", "config.json", "--rounds", "0")
    run(tmp_path, "quantize", *given, "config.json", "--out", "packed")
    text = (tmp_path / "packed" / "transformer" / "config.json").read_text()
    assert "mine.safetensors?base=" in text and str(tmp_path) not in text
    assert "old.ckpt" in fails(tmp_path, "inspect", "old.ckpt", "--base", str(sd3))
