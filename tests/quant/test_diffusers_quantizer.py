"""diffusers loads, quantizes and saves packed models: round trips of bits, shards, dtypes, fresh
quantization, and when it learns of us."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aquabit
from aquabit import AquabitConfig, packing
from aquabit.graph import codebook_names, example_inputs, layers, trace
from aquabit.pipelines import ClassConditionalPipeline, load
from aquabit.quant.artifact import Contents, config_of, contents_of, finish_, load_packed_denoiser
from aquabit.quant.bank import Bank
from aquabit.quant.correction.corrector import statistics_of
from aquabit.quant.diffusers_quantizer import attach_
from aquabit.quant.layers import QuantConv2d, QuantLinear
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.quant.weights import quantize_weight, quantize_weights
from aquabit.scheme import AquabitError, Calibration, LayerChoice, QuantConfig, Scheme, StepGroups
from tests.conftest import SCHEDULER, tiny_pipeline
from tests.families import TINY

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN = ("usq4", "vq3", "usq3g8", "vq3c", "aq2x3g4", "usq8", "fp")  # that need no images
SHARED = "aq2x3g4s"


def tiny_model(family: str) -> Any:
    torch.manual_seed(0)
    kind, config = TINY[family]
    net = getattr(diffusers, kind)(**config).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def call(net: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output for inputs that are the same for all models of one architecture."""
    generator = torch.Generator().manual_seed(1)

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return {k: drawn(v) for k, v in value.items()} if isinstance(value, dict) else value
        if not value.is_floating_point():
            return torch.ones(value.shape, dtype=value.dtype)
        return torch.randn(value.shape, generator=generator).to(dtype)

    with torch.inference_mode():
        return net(**{k: drawn(v) for k, v in example_inputs(net).items()}).sample.float()


def packed_model(family: str, act: int = 8) -> Any:
    """A model with every kind of scheme that needs no images, shared codebooks among them, packed in
    memory."""
    net, full = tiny_model(family), tiny_model(family)
    graph, own = trace(net), fingerprint(net)
    model = QuantizedDenoiser(net, graph, fingerprint=own)
    choices = {
        name: LayerChoice(Scheme.parse(PLAIN[i % len(PLAIN)]), act) for i, name in enumerate(model.layers)
    }
    partners = codebook_names(graph)
    shared = next(iter(partners.values()))
    members = [n for n, name in partners.items() if name == shared]
    choices |= {n: LayerChoice(Scheme.parse(SHARED), act, shared) for n in members}
    together = dict(
        zip(members, quantize_weights([full.get_submodule(n).weight for n in members], SHARED), strict=True)
    )
    for name, layer in model.layers.items():
        scheme = choices[name].weight
        if scheme.kind != "fp":
            layer.set_packed_(
                together.get(name) or quantize_weight(full.get_submodule(name).weight, scheme), scheme
            )
        layer.shrink_()
    config = QuantConfig(own, choices)
    finish_(net, graph, model.layers, config, {})
    attach_(net, Contents(config, model.layers))
    return net


def equal(a: dict[str, Tensor], b: dict[str, Tensor], own: bool = False) -> bool:
    """The same names, types and bits; with ``own``, of all tensors that belong to quantized layers."""
    kept = [k for k in a if not own or ".weight." in k or k.startswith("codebooks/")]
    return (
        a.keys() == b.keys()
        and len(kept) > 5
        and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in kept)
    )


def saved(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


# ---- round trips


@pytest.mark.parametrize("family", ["unet", "pixart", "dit", "digits-unet"])
def test_from_pretrained_and_save_pretrained_keep_every_bit(family: str, tmp_path: Path) -> None:
    net = packed_model(family)
    expected = call(net)
    net.save_pretrained(tmp_path / "whole")
    stored = saved(tmp_path / "whole")
    described = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "aquabit" and len(described["groups"]) <= len(PLAIN) + 1
    kinds = {str(layer.scheme) for layer in net.hf_quantizer.contents.layers.values()}
    assert {"usq4", "vq3c", "aq2x3g4s", "fp"} <= kinds

    again = type(net).from_pretrained(tmp_path / "whole", use_safetensors=True)
    assert torch.equal(call(again), expected)
    assert config_of(again) == config_of(net) and not any(
        p.device.type == "meta" for p in [*again.parameters(), *again.buffers()]
    )
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    again.save_pretrained(tmp_path / "again")
    assert equal(stored, saved(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == described

    sixteen = type(net).from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    assert sixteen.dtype == torch.bfloat16
    moved = (call(sixteen, torch.bfloat16) - expected).square().mean() / expected.square().mean()
    assert 0 < moved < 0.05
    size = sum(t.nbytes for t in stored.values()) // 4
    sixteen.save_pretrained(tmp_path / "shards", max_shard_size=size)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert equal(stored, saved(tmp_path / "shards"), own=True), "codes, codebooks and scales survive bfloat16"
    biases = [
        k
        for k in stored
        if k.endswith(".bias") and k.removesuffix(".bias") in net.hf_quantizer.contents.layers
    ]
    assert biases and all(torch.equal(stored[k], saved(tmp_path / "shards")[k]) for k in biases)
    joined = type(net).from_pretrained(tmp_path / "shards")
    joined.save_pretrained(tmp_path / "joined")
    assert equal(stored, saved(tmp_path / "joined"), own=True)


def test_a_pipeline_directory_loads_in_diffusers_and_here(tmp_path: Path) -> None:
    pipe = DDIMPipeline(tiny_model("digits-unet"), DDIMScheduler(**SCHEDULER))
    config = QuantConfig(
        fingerprint(pipe.unet),
        {"conv_in": LayerChoice(Scheme.parse("usq4"), 8), "conv_out": LayerChoice(Scheme.parse("vq3"))},
    )

    def images(made: Any) -> Tensor:
        labels = {"class_labels": torch.zeros(1, dtype=torch.long)}
        with torch.inference_mode():
            return made.unet(torch.ones(1, 1, 8, 8), 5, **labels).sample

    packed = packing.quantize(pipe, config, bank=str(tmp_path / "bank"))
    bytes_ = packed.save(tmp_path / "small", max_shard_size=400_000)
    assert len(list((tmp_path / "small" / "unet").glob("*.safetensors"))) > 2
    assert (
        packed.save(tmp_path / "packed")
        == bytes_
        == sum(t.nbytes for t in saved(tmp_path / "packed" / "unet").values())
    )
    packed.save(tmp_path / "small"), packed.pipe.save_pretrained(tmp_path / "theirs")
    assert equal(saved(tmp_path / "small" / "unet"), saved(tmp_path / "packed" / "unet")), (
        "no shard is left of the one before"
    )
    for loaded in (
        DiffusionPipeline.from_pretrained(tmp_path / "packed"),
        DiffusionPipeline.from_pretrained(tmp_path / "theirs", use_safetensors=True),
        load(str(tmp_path / "small")),
    ):
        assert (
            isinstance(loaded.unet.conv_in, QuantConv2d)
            and loaded.unet.conv_in.act == 8
            and loaded.unet.conv_in.packed is not None
        )
        assert torch.equal(images(loaded), images(packed.pipe))
        assert loaded.to("cpu") is loaded
        with pytest.raises(ValueError, match="Casting a quantized model"):
            loaded.to(torch.float16)
    copied = copy.deepcopy(loaded.unet)
    contents = contents_of(copied)
    assert contents is not None and contents.layers["conv_in"] is copied.conv_in is not loaded.unet.conv_in


# ---- quantizing while loading


def test_a_dense_model_is_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    net, own = tiny_model("unet"), fingerprint(tiny_model("unet"))
    net.save_pretrained(tmp_path / "dense")
    net.half().save_pretrained(tmp_path / "half", max_shard_size=100_000)
    wanted = AquabitConfig({"conv_out": "fp", "*.attn*.to_?": "vq3", "*": "usq4"}, act=8)
    made = type(net).from_pretrained(tmp_path / "dense", quantization_config=wanted)
    config = config_of(made)
    assert config is not None and config.fingerprint == own
    assert (
        str(config["conv_out"].weight) == "fp"
        and str(config["conv_in"].weight) == "usq4"
        and config["conv_in"].act == 8
    )
    assert sum(str(c.weight) == "vq3" for c in config.layers.values()) >= 6

    dense = tiny_model("unet")
    reference = QuantizedDenoiser(dense, trace(dense), Bank(tmp_path / "bank"), own)
    reference.pack(config)
    attach_(dense, Contents(config, reference.layers))
    dense.save_pretrained(tmp_path / "reference"), made.save_pretrained(tmp_path / "made")
    assert equal(saved(tmp_path / "reference"), saved(tmp_path / "made")), "as aquabit.quantize packs it"
    assert torch.equal(call(type(net).from_pretrained(tmp_path / "made")), call(made))

    shards = type(net).from_pretrained(tmp_path / "half", quantization_config=AquabitConfig(config))
    shards.save_pretrained(tmp_path / "shards")
    assert equal(saved(tmp_path / "made"), saved(tmp_path / "shards")), (
        "the same weights, at 16 bits and in shards"
    )
    sixteen = type(net).from_pretrained(
        tmp_path / "dense", quantization_config=AquabitConfig("usq3"), torch_dtype=torch.bfloat16
    )
    assert call(sixteen, torch.bfloat16).isfinite().all()
    with pytest.raises(AquabitError, match="is for model 0123456789abcdef"):
        type(net).from_pretrained(
            tmp_path / "dense",
            quantization_config=AquabitConfig(replace(config, fingerprint="0123456789abcdef")),
        )


def test_pipelines_quantize_a_component(dit: ClassConditionalPipeline, tmp_path: Path) -> None:
    dit.save_pretrained(tmp_path)
    made = ClassConditionalPipeline.from_pretrained(
        tmp_path,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"denoiser": AquabitConfig("usq4")}),
    )
    held = [layer for layer in made.denoiser.modules() if isinstance(layer, QuantLinear | QuantConv2d)]
    assert len(held) == len(layers(trace(dit.denoiser))) and all(layer.packed is not None for layer in held)
    assert torch.isfinite(packing.generate(made, 2, steps=2)).all()
    made.save_pretrained(tmp_path / "again")
    assert config_of(load(str(tmp_path / "again")).denoiser) == config_of(made.denoiser)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda: AquabitConfig("usq99"), "scheme 'usq99' is out of range"),
        (
            lambda: AquabitConfig("usq3h"),
            "scheme usq3h needs H, which is measured on images; use aquabit.quantize, or name usq3",
        ),
        (lambda: AquabitConfig("usq3", act=7), "act is not a configuration: layers.any.act"),
        (
            lambda: AquabitConfig({"*": "usq3", "proj_out_2": "fp"}),
            "'proj_out_2' matches none of the model's",
        ),
        (lambda: AquabitConfig({"nowhere": "usq3"}), "'nowhere' matches none of the model's"),
        (
            lambda: AquabitConfig(QuantConfig("f", {}), act=8),
            "activation bits are 8, but the configuration names each layer's",
        ),
        (
            lambda: AquabitConfig(QuantConfig("f", {}, correction="cnc")),
            "noise correction, which needs images",
        ),
        (lambda: {"quant_method": "aquabit", "bits": 4}, "quantization_config has 'bits'"),
        (
            lambda: {"quant_method": "aquabit", "groups": []},
            "has schema None, this version of aquabit reads 2",
        ),
    ],
)
def test_what_cannot_be_quantized_is_said(
    dit: ClassConditionalPipeline, tmp_path: Path, asked: Any, said: str
) -> None:
    dit.denoiser.save_pretrained(tmp_path)
    with pytest.raises(AquabitError) as caught:
        type(dit.denoiser).from_pretrained(tmp_path, quantization_config=asked())
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- damage


@pytest.mark.parametrize(
    "damage", ["request", "groups", "group", "field", "missing", "unexpected", "shape", "size"]
)
def test_damaged_models_give_one_sentence(tmp_path: Path, damage: str) -> None:
    net = packed_model("dit")
    net.save_pretrained(tmp_path / "packed")
    path, file = tmp_path / "packed" / "config.json", tmp_path / "packed" / WEIGHTS
    value, tensors = json.loads(path.read_text()), load_file(file)
    recipe = value["quantization_config"]
    code = next(k for k in tensors if k.endswith(".codes"))
    if damage == "request":
        value["quantization_config"], said = (
            {"quant_method": "aquabit", "weights": "usq4"},
            "this one is a request to quantize",
        )
    elif damage == "groups":
        recipe["groups"], said = "all", "needs a list of groups of layers, not all"
    elif damage == "group":
        recipe["groups"][0]["layers"], said = 3, "a group without a list of layers"
    elif damage == "field":
        recipe["groups"][0]["act"], said = 5, "quantization_config is not a configuration"
    elif damage == "missing":
        gone = next(k for k in tensors if k.endswith(".bias"))
        del tensors[gone]
        said = f"lack {gone!r} (1 such tensors)"
    elif damage == "unexpected":
        tensors["extra.weight"], said = torch.zeros(3), "hold 'extra.weight'"
    elif damage == "shape":
        tensors[code], said = (
            tensors[code][:-1].clone(),
            f"the tensors of layer {code.removesuffix('.weight.codes')!r} do not fit",
        )
    else:
        scale = next(k for k in tensors if k.endswith(".offset"))
        del tensors[scale]
        said = f"the offset of layer {scale.removesuffix('.weight.offset')!r} are none"
    path.write_text(json.dumps(value))
    save_file(tensors, file)
    for loads in (
        lambda: type(net).from_pretrained(tmp_path / "packed"),
        lambda: load_packed_denoiser(tmp_path / "packed"),
    ):
        with pytest.raises(AquabitError) as caught:
            loads()
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="safetensors only"):
        packed_model("dit").save_pretrained(tmp_path, safe_serialization=False)


# ---- what needs the sampler


def test_what_follows_the_sampler_is_bound_here_and_missed_with_a_warning_there(tmp_path: Path) -> None:
    pipe = tiny_pipeline("unet")
    nn.init.normal_(pipe.denoiser.conv_out.weight, std=0.1)
    names = list(layers(trace(pipe.denoiser)))
    choices = {n: LayerChoice(Scheme.parse("usq3"), 8) for n in names}
    small = QuantConfig(fingerprint(pipe.denoiser), choices, calibration=Calibration(images=2, steps=2))
    packing.quantize(pipe, small, correct="cnc+bc", bank=str(tmp_path / "bank")).save(tmp_path / "corrected")
    steps = replace(
        small,
        layers={n: LayerChoice(Scheme.parse("usq3"), (4, 8)) for n in names},
        steps=StepGroups(2, (0, 1)),
    )
    packing.quantize(pipe, steps, bank=str(tmp_path / "bank")).save(tmp_path / "steps")

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    # the command line, tested in this process, wants errors only
    diffusers.utils.logging.set_verbosity_warning()
    logging.getLogger("diffusers").addHandler(handler)
    try:
        theirs = ClassConditionalPipeline.from_pretrained(tmp_path / "corrected")
        assert [h for h in heard if "noise correction cnc+bc" in h and "aquabit.load" in h] == heard and len(
            heard
        ) == 1
        ClassConditionalPipeline.from_pretrained(tmp_path / "steps")
        assert len(heard) == 2 and "activation bits per step" in heard[1]
        ours = aquabit.load(str(tmp_path / "corrected"))
        assert len(heard) == 2, "bound, so there is nothing to say"
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    own = statistics_of(ours.denoiser)
    assert statistics_of(theirs.denoiser) is None and own is not None
    theirs.save_pretrained(tmp_path / "again")
    found = statistics_of(aquabit.load(str(tmp_path / "again")).denoiser)
    assert found is not None and found.digest == own.digest, "the statistics are part of the model"
    plain, corrected = (packing.generate(p, 2, steps=2) for p in (theirs, ours))
    assert not torch.equal(plain, corrected)


# ---- when diffusers learns of us

ORDERS = {
    "aquabit first": (
        "import aquabit; assert 'diffusers' not in sys.modules and 'torch' not in sys.modules; import"
        " diffusers"
    ),
    "diffusers first": "import diffusers.quantizers.auto; import aquabit",
    "config first": "from aquabit import AquabitConfig; AquabitConfig('usq4')",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_quantizer_is_registered_in_any_order_of_imports(order: str) -> None:
    code = (
        f"import sys; {ORDERS[order]}; import aquabit, diffusers.quantizers.auto as a;"
        " print(a.AUTO_QUANTIZER_MAPPING['aquabit'].__name__); "
    )
    code += "assert a.AUTO_QUANTIZATION_CONFIG_MAPPING['aquabit'] is aquabit.AquabitConfig"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "AquabitQuantizer", done.stderr
