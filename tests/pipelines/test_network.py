"""What of a pipeline is quantized: several denoisers together, and the components that are asked for."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aquabit
from aquabit import graph as graphs
from aquabit.exports import export_config
from aquabit.graph import codebook_names, from_json, layers, to_json
from aquabit.measuring.model import open_model
from aquabit.parts import Parts
from aquabit.pipelines import Adapter, load, network_of, own_copy, recorder, replay_recorder, trace
from aquabit.pipelines.reference import Reference
from aquabit.quant.artifact import config_of
from aquabit.quant.calibration.recording import part_of
from aquabit.quant.correction.sampling import first_place
from aquabit.quant.finetuning.settings import FineTuning
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Calibration, LayerChoice, QuantConfig, Scheme, StepGroups
from tests.pipelines.test_own_model import own
from tests.tiny_pipelines import flux, randomised, sd, sdxl
from tests.tiny_recent import wan
from tests.whole import images

PROMPTS = ("a cat", "a dog")
WAN = {"resolution": 32, "frames": 5}


@cache
def _made(name: str) -> Any:
    maker = {"wan": lambda: wan(second=True), "sd": sd, "sdxl": sdxl, "flux": flux}[name]
    pipe = randomised(maker)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chosen(name: str, component: str | None = None) -> Any:
    return load(copy.copy(_made(name)), component=component)


def config_for(pipe: Any, scheme: str = "usq4h", act: int = 8, **more: Any) -> QuantConfig:
    graph = trace(pipe)
    calibration = Calibration(images=4, steps=3, conditions=PROMPTS, **more)
    names = [n for n in layers(graph) if n not in graphs.fixed_layers(graph)]
    return QuantConfig(
        fingerprint(network_of(pipe)),
        {name: LayerChoice(Scheme.parse(scheme), act) for name in names},
        calibration=calibration,
    )


def pictures(pipe: Any, config: QuantConfig) -> Tensor:
    assert config.calibration is not None
    return images(pipe, replace(config.calibration.protocol(2), images=2))


# ---- several denoisers


def test_a_graph_of_several_holds_each_once() -> None:
    pipe = chosen("wan")
    whole = trace(pipe)
    assert isinstance(network_of(pipe), Parts) and network_of(pipe) is network_of(pipe)
    parts = {name.partition(".")[0] for name in layers(whole)}
    assert parts == {"transformer", "transformer_2"}
    depths = [node["depth"] for node in layers(whole).values()]
    assert depths == sorted(set(depths)) and whole.graph["parts"] == ["transformer", "transformer_2"]
    dense = {name.partition(".")[0] for name in whole.graph["dense"]}
    assert dense == parts and whole.graph["weights"] == 2 * 11712
    assert all(name.split(".")[0] == block.split(".")[0] for name, block in _blocks(whole))
    shared = codebook_names(whole)
    assert shared and all(value.startswith(name.partition(".")[0]) for name, value in shared.items())
    again = from_json(to_json(whole))
    assert again.graph == whole.graph and dict(again.nodes(data=True)) == dict(whole.nodes(data=True))


def _blocks(graph: Any) -> list[tuple[str, str]]:
    return [(name, node["block"]) for name, node in layers(graph).items()]


def test_no_step_is_computed_to_trace_the_second() -> None:
    pipe, ran = chosen("wan"), list[tuple[str, str]]()
    handles = [
        part.blocks[0].register_forward_hook(
            lambda _, args, __, name=name: ran.append((name, args[0].device.type))
        )
        for name, part in network_of(pipe).named_children()
    ]
    trace(pipe)
    for handle in handles:
        handle.remove()
    assert {name for name, _ in ran} == {"transformer", "transformer_2"}
    assert {device for _, device in ran} == {"meta"}


def test_calls_of_all_parts_are_recorded_and_made_again() -> None:
    pipe = chosen("wan")
    asked = Calibration(images=2, steps=4, conditions=PROMPTS, **WAN)
    calls = recorder(pipe)(asked)
    assert {part_of(call) for call in calls} == {"transformer", "transformer_2"}
    for recorded in replay_recorder(pipe)(asked, 1).calls:
        args, kwargs = recorded.call
        with torch.no_grad():
            assert torch.allclose(network_of(pipe)(*args, **kwargs)[0], recorded.output, atol=1e-5)


@pytest.mark.parametrize("scheme", ["usq4h", "vq3"])
def test_several_denoisers_are_one_artifact(scheme: str, tmp_path: Path) -> None:
    pipe = chosen("wan")
    config = config_for(pipe, scheme, **WAN)
    full = pictures(pipe, config)
    packed = aquabit.quantize(pipe, config, bank=str(tmp_path / "bank"))
    made = pictures(packed.pipe, config)
    assert 1e-4 < float((made - full).abs().mean()) < 0.2
    size = packed.save(tmp_path / "packed")
    assert size < sum(p.numel() for p in network_of(pipe).parameters()) * 2
    again = load(str(tmp_path / "packed"))
    found = config_of(network_of(again))
    assert found is not None and found.layers == config.layers and found.calibration == config.calibration
    assert torch.equal(pictures(again, config), made)
    assert torch.equal(pictures(pipe, config), full), "the pipeline that was given has changed"


def test_bits_per_step_follow_the_sampler_in_every_part(tmp_path: Path) -> None:
    pipe = chosen("wan")
    config = config_for(pipe, "usq4", **WAN)
    groups, made = StepGroups(3, (0, 1)), list[Tensor]()
    for act in ((8, 8), (8, 4), (4, 8)):
        stepped = config
        for name in config.layers:
            stepped = stepped.with_layer(name, "usq4", act, steps=groups)
        packed = aquabit.quantize(pipe, stepped, bank=str(tmp_path / "bank"))
        made.append(pictures(packed.pipe, config))
        packed.save(tmp_path / f"packed{act}")
        assert torch.equal(pictures(load(str(tmp_path / f"packed{act}")), config), made[-1])
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


def test_a_correction_of_several_is_refused_before_anything_is_fitted(tmp_path: Path) -> None:
    pipe = chosen("wan")
    with pytest.raises(
        AquabitError, match=r"cnc\+bc follows one denoiser, and transformer and transformer_2"
    ):
        aquabit.quantize(pipe, config_for(pipe, **WAN), bank=str(tmp_path / "bank"), correct=True)
    assert not (tmp_path / "bank").exists() or not list((tmp_path / "bank").glob("*.safetensors"))
    one = chosen("wan", "transformer_2")
    assert not isinstance(network_of(one), Parts) and "blocks.0.attn1.to_q" in layers(trace(one))


def test_a_copy_has_hooks_of_its_own() -> None:
    pipe, seen = chosen("wan"), list[Any]()
    network = network_of(pipe)
    handle = network.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    other = own_copy(pipe)
    assert network_of(other) is not network and network_of(other).transformer is other.transformer
    config = config_for(pipe, **WAN)
    seen.clear()
    pictures(other, config)
    assert {id(module) for module, _ in seen} == {id(network_of(other))}
    assert {name for _, name in seen} == {"transformer", "transformer_2"}
    handle.remove()
    seen.clear()
    pictures(pipe, config)
    assert not seen


def test_fine_tuning_of_several(tmp_path: Path) -> None:
    pipe = chosen("wan")
    config = config_for(pipe, "usq4", **WAN)
    tuned = aquabit.quantize(
        pipe, config, bank=str(tmp_path), finetune=FineTuning(steps=3, images=4, batch=2)
    )
    assert tuned.config.tuned is not None and torch.isfinite(pictures(tuned.pipe, config)).all()


# ---- components


@pytest.mark.parametrize(
    ("name", "component"),
    [("sd", "text_encoder"), ("sdxl", "text_encoder,text_encoder_2"), ("sd", "unet,text_encoder")],
)
def test_components_are_quantized_saved_and_loaded(name: str, component: str, tmp_path: Path) -> None:
    pipe, names = chosen(name, component), component.split(",")
    config = config_for(pipe)
    full = pictures(_made(name), config)
    packed = aquabit.quantize(pipe, config, bank=str(tmp_path / "bank"))
    made = pictures(packed.pipe, config)
    assert 1e-6 < float((made - full).abs().mean()) < 0.2
    packed.save(tmp_path / "packed")
    again = load(str(tmp_path / "packed"))
    assert torch.equal(pictures(again, config), made)
    found = config_of(network_of(again))
    assert found is not None and found.layers == config.layers
    assert torch.equal(pictures(_made(name), config), full)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # and no random weights
        type(pipe).from_pretrained(tmp_path / "packed")
    half = load(str(tmp_path / "packed"), dtype="bfloat16")
    assert float((pictures(half, config) - made).abs().mean()) < 0.1
    plain = [n for n, part in again.components.items() if isinstance(part, torch.nn.Module)]
    for other in set(plain) - set(names):
        assert not hasattr(getattr(again, other), "hf_quantizer")


def test_operators_of_text_encoders_have_names() -> None:
    for name, component in (("sd", "text_encoder"), ("flux", "text_encoder_2")):
        found = {node["operator"] for node in layers(trace(chosen(name, component))).values()}
        assert {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "ff.up", "ff.down"} <= found
        assert "other" not in found


def test_prompts_are_encoded_anew_by_a_quantized_encoder(tmp_path: Path) -> None:
    """What was encoded in full precision is not used again."""
    pipe = own_copy(chosen("sd", "text_encoder"))
    config = config_for(pipe)
    full = pictures(pipe, config)
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(pictures(pipe, config), full)


def test_what_changes_between_steps_is_refused_for_encoders(tmp_path: Path) -> None:
    pipe = chosen("sd", "text_encoder")
    config = config_for(pipe)
    with pytest.raises(AquabitError, match="needs the sampler's steps, and text_encoder runs before them"):
        aquabit.quantize(pipe, config, bank=str(tmp_path), correct="cnc")
    name = next(iter(config.layers))
    stepped = config.with_layer(name, "usq4", (8, 6), steps=StepGroups(3, (0, 1)))
    with pytest.raises(AquabitError, match="text_encoder runs before them"):
        aquabit.quantize(pipe, stepped, bank=str(tmp_path))


def test_a_choice_is_part_of_the_reference(tmp_path: Path) -> None:
    _made("sd").save_pretrained(tmp_path / "sd")
    text = Reference.parse(str(tmp_path / "sd")).with_(component="text_encoder, unet").text
    assert text.endswith("?component=text_encoder,unet")
    assert Reference.parse(text).components == ("text_encoder", "unet")
    model = open_model(text)
    assert model.components == ("text_encoder", "unet") and model.encoders == ("text_encoder",)
    assert model.graph.graph["parts"] == ["text_encoder", "unet"]
    with pytest.raises(AquabitError, match=r"component is 'text_encoder,unet' in .* and 'vae' besides"):
        load(text, component="vae")


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (
            "text_encoder_9",
            "component 'text_encoder_9' is no network of this StableDiffusionPipeline; it has",
        ),
        ("unet,unet", "component 'unet' is named twice"),
        ("scheduler", "component 'scheduler' is no network"),
    ],
)
def test_components_that_are_not_there(component: str, said: str) -> None:
    with pytest.raises(AquabitError, match=said):
        chosen("sd", component)
    assert not isinstance(network_of(_made("sd")), Parts)


def test_a_model_of_ones_own_has_no_components() -> None:
    with pytest.raises(AquabitError, match="component text_encoder is one of a pipeline"):
        load(own(), component="text_encoder")


def test_a_plan_times_what_runs_in_every_step() -> None:
    """Whatever is quantized: the denoiser's call, and that of one of several."""
    for name, component, wanted in (("sd", "text_encoder", ["unet"]), ("wan", None, ["transformer"])):
        pipe, ran = chosen(name, component), list[str]()
        asked = Calibration(images=2, steps=4, conditions=PROMPTS, **(WAN if name == "wan" else {}))
        call = Adapter(pipe).step_call(asked.protocol(2))
        handles = [
            part.register_forward_hook(lambda *_, part=part_name, ran=ran: ran.append(part))
            for part_name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
        ]
        call()
        for handle in handles:
            handle.remove()
        assert ran == wanted


def test_the_first_step_is_told_by_the_call_of_a_part() -> None:
    network, pipe = network_of(chosen("sd", "text_encoder,unet")), _made("sd")
    pipe.scheduler.set_timesteps(4)
    times = pipe.scheduler.timesteps
    for place, time in enumerate(times):
        assert first_place(pipe.scheduler, network, ("unet", torch.zeros(1, 4, 8, 8), time), {}) == place


def test_an_export_is_of_one_network() -> None:
    pipe = chosen("sd", "unet,text_encoder")
    with pytest.raises(AquabitError, match="torchao configures one network, and unet, text_encoder are"):
        export_config(config_for(pipe), trace(pipe), "torchao")
    alone = chosen("sd", "text_encoder")
    assert "encoder.layers.0.mlp.fc1" in export_config(config_for(alone), trace(alone), "torchao").to_json()


def test_the_adapter_knows_its_network() -> None:
    assert Adapter(chosen("sd", "text_encoder")).network is _made("sd").text_encoder
    assert Adapter(chosen("sd")).network is _made("sd").unet
