"""LoRAs of whole pipelines: fused on request, with text encoders, also when these come again; beside a packed
denoiser and taken off again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import aquabit
from aquabit.cli.app import app
from aquabit.pipelines import Adapter, component_names, denoiser_of, load
from aquabit.pipelines.lora import fuse_loras_
from aquabit.pipelines.reference import Reference, file_and_scale
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Protocol
from aquabit.space import make_space
from tests.tiny_pipelines import tiny

PROTOCOL = Protocol(images=2, steps=2, micro_batch=2, conditions=("a cat",))


def state_for(pipe: Any, *more: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 on every query of the denoiser, and on ``more`` modules (component first)."""
    name, rng = component_names(pipe)[0], torch.Generator().manual_seed(0)
    queries = [n for n, _ in denoiser_of(pipe).named_modules() if n.endswith("to_q")]
    found = {}
    for path in (*(f"{name}.{n}" for n in queries), *more):
        component, _, layer = path.partition(".")
        weight = getattr(pipe, component).get_submodule(layer).weight
        down = torch.randn(2, *weight.shape[1:], generator=rng)
        up = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=rng)
        found |= {f"{path}.lora_A.weight": down * 0.3, f"{path}.lora_B.weight": up * 0.3}
    return found


def images(pipe: Any) -> Tensor:
    return Adapter(pipe).images(PROTOCOL, range(2))


def by_hand(pipe: Any, state: dict[str, Tensor], scale: float) -> Any:
    pipe = copy.deepcopy(pipe)
    for name, down in state.items():
        if name.endswith(".lora_A.weight"):
            component, _, layer = name.removesuffix(".lora_A.weight").partition(".")
            weight = getattr(pipe, component).get_submodule(layer).weight
            up = state[name.replace("lora_A", "lora_B")].flatten(1)
            weight.data += scale * (up @ down.flatten(1)).reshape(weight.shape)
    return pipe


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart-sigma"])
def test_a_fused_lora_is_in_the_weights(name: str) -> None:
    pipe = tiny(name)
    encoder = pipe.text_encoder
    layer = next(n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear))
    more = () if name == "pixart-sigma" else (f"text_encoder.{layer}",)
    state, before = state_for(pipe, *more), fingerprint(denoiser_of(pipe))
    expected = by_hand(pipe, state, 0.5)
    fuse_loras_(pipe, [(state, 0.5)])
    for component in (component_names(pipe)[0], "text_encoder"):
        rows = zip(
            getattr(pipe, component).named_parameters(),
            getattr(expected, component).parameters(),
            strict=True,
        )
        for (path, parameter), other in rows:
            torch.testing.assert_close(parameter, other, msg=path)
    assert fingerprint(denoiser_of(pipe)) == fingerprint(denoiser_of(expected)) != before


def test_the_model_s_name_carries_its_loras(tmp_path: Path) -> None:
    pipe, file = tiny("sd"), tmp_path / "l.safetensors"
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    encoder = encoder if has(pipe, encoder) else encoder.replace(".text_model", "", 1)
    state = state_for(pipe, encoder)
    pipe.save_pretrained(tmp_path / "model")
    save_file(state, file)
    reference = Reference(str(tmp_path / "model")).with_(loras=[f"{file}:0.5", str(file)])
    assert list(map(file_and_scale, reference.loras)) == [(str(file), 0.5), (str(file), 1.0)]
    assert reference.public == "model?lora=l.safetensors:0.5&lora=l.safetensors"
    name = reference.text
    loaded, expected = load(name), by_hand(load(str(tmp_path / "model")), state, 1.5)
    aquabit.pipelines.free_text_encoders(loaded)
    torch.testing.assert_close(images(loaded), images(expected), rtol=0, atol=1e-4)
    assert loaded.text_encoder is None
    aquabit.pipelines.restore_text_encoders(loaded)
    again = dict(loaded.text_encoder.named_parameters())
    for path, parameter in expected.text_encoder.named_parameters():
        torch.testing.assert_close(again[path], parameter)


def has(pipe: Any, path: str) -> bool:
    component, _, layer = path.partition(".")
    return layer in dict(getattr(pipe, component).named_modules())


def test_the_command_line_fuses(tmp_path: Path) -> None:
    pipe = tiny("dit")
    pipe.save_pretrained(tmp_path / "model")
    save_file(state_for(pipe), tmp_path / "l.safetensors")
    lora = ("--lora", f"{tmp_path / 'l.safetensors'}:0.5")
    expected = by_hand(pipe, state_for(pipe), 0.5)
    space = make_space(aquabit.trace(expected), fingerprint(expected.transformer), schemes=["usq4"])
    (tmp_path / "c.json").write_text(json.dumps(space.uniform("usq4", 16).to_dict()))
    model, out = str(tmp_path / "model"), str(tmp_path / "packed")
    quantize = ("quantize", model, str(tmp_path / "c.json"), "--out", out, "--bank", str(tmp_path / "bank"))
    runner = CliRunner()
    assert runner.invoke(app, ["inspect", model, *lora]).exit_code == 0
    refused = runner.invoke(app, [*quantize])
    assert refused.exit_code == 2 and "is for model" in refused.output
    done = runner.invoke(app, [*quantize, *lora])
    assert done.exit_code == 0, done.output
    for wrong, said in (("none.safetensors", "is not there"), (f"{lora[1][:-3]}nan", "scale")):
        refused = runner.invoke(app, ["inspect", model, "--lora", wrong])
        assert refused.exit_code == 2 and said in refused.output


def test_a_lora_beside_a_packed_model_and_off_again(tmp_path: Path) -> None:
    pipe = tiny("sd")
    state = state_for(pipe, "unet.down_blocks.0.resnets.0.conv1")
    own = fingerprint(pipe.unet)
    config = make_space(aquabit.trace(pipe), own).uniform("usq8", 16)
    packed = aquabit.quantize(pipe, config, bank=str(tmp_path / "bank"))
    packed.save(tmp_path / "packed")
    before = images(packed.pipe)
    packed.add_lora(state, 0.5)
    beside = images(packed.pipe)
    fused = images(by_hand(pipe, state, 0.5))
    far, near = ((found - fused).square().mean() for found in (before, beside))
    assert near < 0.02 * far
    with pytest.raises(AquabitError, match="take it off by remove_lora"):
        packed.save(tmp_path / "again")
    packed.remove_lora()
    assert torch.equal(images(packed.pipe), before)
    loaded = load(str(tmp_path / "packed"))
    aquabit.add_lora(loaded, state, 0.5)
    torch.testing.assert_close(images(loaded), beside, rtol=0, atol=1e-2)
    aquabit.remove_lora(loaded)
    torch.testing.assert_close(images(loaded), before, rtol=0, atol=1e-2)


def test_what_cannot_be_beside_is_refused(tmp_path: Path) -> None:
    pipe = tiny("dit")
    own = fingerprint(pipe.transformer)
    with pytest.raises(AquabitError, match="a Linear, beside which no LoRA can be put"):
        aquabit.add_lora(pipe, state_for(pipe))
    config = make_space(aquabit.trace(pipe), own).uniform("usq8", 16)
    packed = aquabit.quantize(pipe, config, bank=str(tmp_path))
    with pytest.raises(AquabitError, match="is packed: a LoRA cannot be fused with it"):
        fuse_loras_(packed.pipe, [(state_for(pipe), 1.0)])


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}_to_q"
ENCODER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
OTHERS = {  # names of other trainers, and the layer's scale
    "kohya": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha", 0.5),
    "kohya, encoder": (f"{ENCODER}.lora_down.weight", f"{ENCODER}.lora_up.weight", f"{ENCODER}.alpha", 0.5),
    "processors": (
        f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
        f"unet.{ATTENTION}.processor.to_q_lora.up.weight",
        None,
        1.0,
    ),
    "no component": (f"{ATTENTION}.to_q.lora_A.weight", f"{ATTENTION}.to_q.lora_B.weight", None, 1.0),
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_files_of_other_trainers(names: tuple[str, str, str | None, float]) -> None:
    pipe, down, up = tiny("sd"), torch.randn(2, 16), torch.randn(16, 2)
    encoder = next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    part, layer = ("text_encoder", encoder) if "te_" in names[0] else ("unet", f"{ATTENTION}.to_q")
    weight = getattr(pipe, part).get_submodule(layer).weight
    expected = weight + 0.8 * names[3] * up @ down
    state = {names[0]: down, names[1]: up} | ({names[2]: torch.tensor(1.0)} if names[2] else {})
    fuse_loras_(pipe, [(state, 0.8)])
    torch.testing.assert_close(getattr(pipe, part).get_submodule(layer).weight, expected)
