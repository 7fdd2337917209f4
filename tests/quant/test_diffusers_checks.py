"""What diffusers' own tests ask of every quantization method, of ours: the table is in
docs/diffusers-and-exports.md."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.models import model_loading_utils
from diffusers.quantizers import PipelineQuantizationConfig
from torch import Tensor, nn

from aquabit import AquabitConfig
from aquabit.graph import example_inputs, fixed_layers, layers
from aquabit.quant.artifact import contents_of
from aquabit.quant.kernel_tuning import layers_of
from aquabit.quant.layers import resident_bytes
from aquabit.quant.unpacking import dense_graph
from aquabit.scheme import AquabitError
from tests.pipelines.test_families import protocol_for
from tests.pipelines.test_recent import protocol_for as recent_protocol
from tests.quant.test_diffusers_quantizer import call, packed_model, tiny_model
from tests.tiny_pipelines import TINY_PIPELINES, randomised
from tests.tiny_recent import RECENT
from tests.tiny_variants import VARIANTS
from tests.whole import images

CPU = torch.device("cpu")
CODED = ("codes", "tables", "scale", "offset", "stored_codebooks", "stored_scale", "stored_offset")
FP32 = 1e-5  # of the largest output: other memory, other order of sums


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed PixArt with every kind of scheme, at a16: what is rounded may flip where sums differ."""
    folder = tmp_path_factory.mktemp("packed")
    packed_model("pixart", act=16).save_pretrained(folder)
    return folder


@pytest.fixture
def net(saved: Path) -> Any:
    return loaded(saved)


def loaded(folder: Path, **given: Any) -> Any:
    return diffusers.PixArtTransformer2DModel.from_pretrained(folder, **given)


def coded_tensors(net: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in net.state_dict().items() if n.rpartition(".")[2] in CODED}


def near(a: Tensor, b: Tensor, tolerance: float = FP32) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# ---- size


def test_the_memory_footprint_is_what_is_held(net: Any) -> None:
    held = resident_bytes(layers_of(net).values())  # before kernels made anything of it
    names = {f"{n}.{part}" for n in layers_of(net) for part in ("compute", "weight", "bias", *CODED)}
    others = sum(t.nbytes for n, t in net.state_dict().items() if n not in names)
    left = sum(t.nbytes for n, t in net.named_buffers() if n not in net.state_dict())
    assert net.get_memory_footprint() == held + others + left
    assert held < 0.6 * sum(4 * prod(layer.shape) for layer in layers_of(net).values())


# ---- casts


CASTS: dict[str, Callable[[Any], Any]] = {
    "to(dtype)": lambda net: net.to(torch.float16),
    "to(dtype=)": lambda net: net.to(dtype=torch.bfloat16),
    "half()": lambda net: net.half(),
    "float()": lambda net: net.float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_refused(net: Any, cast: str) -> None:
    before = coded_tensors(net)
    with pytest.raises(ValueError, match=r"quantized model"):
        CASTS[cast](net)
    assert all(torch.equal(before[n], t) for n, t in coded_tensors(net).items())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_of_parts_leave_codes_and_tables_as_they_are(net: Any, cast: str) -> None:
    before, dtypes = coded_tensors(net), {n: t.dtype for n, t in coded_tensors(net).items()}
    assert {torch.uint8, torch.float16, torch.float32} == set(dtypes.values())
    for block in net.transformer_blocks:
        getattr(block, cast)()
    after = coded_tensors(net)
    assert {n: t.dtype for n, t in after.items()} == dtypes
    assert all(torch.equal(before[n], t) for n, t in after.items())


def test_layerwise_casting_leaves_packed_layers_alone(net: Any) -> None:
    expected, before = call(net), coded_tensors(net)
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert near(call(net), expected, 1e-6)
    assert all(torch.equal(before[n], t) for n, t in coded_tensors(net).items())
    whole: Any = {"skip_modules_pattern": None, "skip_modules_classes": None}
    with pytest.raises(ValueError, match="Casting a quantized model"):
        apply_layerwise_casting(net, torch.float8_e4m3fn, torch.float32, **whole)


# ---- where tensors lie


@pytest.mark.parametrize("where", ["cpu", {"": "cpu"}, "auto", "balanced", "sequential"])
def test_device_maps(net: Any, saved: Path, where: Any) -> None:
    assert torch.equal(call(loaded(saved, device_map=where)), call(net))


def test_a_device_map_is_made_by_the_size_of_the_codes(
    saved: Path, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, int] = {}

    def planned(model: Any, **_: Any) -> dict[str, str]:
        counted.update(accelerate.utils.compute_module_sizes(model))
        return {"": "cpu"}

    monkeypatch.setattr(model_loading_utils, "infer_auto_device_map", planned)
    assert torch.equal(call(loaded(saved, device_map="auto")), call(net))
    layer = layers_of(net)["transformer_blocks.0.attn1.to_k"]
    stored = sum(layer.scheme.stored_bytes(layer.shape))
    assert counted["transformer_blocks.0.attn1.to_k.weight"] == stored > 0


def test_layers_on_disk_are_refused_in_a_device_map(saved: Path, tmp_path: Path) -> None:
    parts = {n.split(".")[0] for n in loaded(saved).state_dict()}
    where = dict.fromkeys(parts, "cpu") | {"transformer_blocks": "disk"}
    with pytest.raises(AquabitError, match="puts layers on disk"):
        loaded(saved, device_map=where, offload_folder=tmp_path)


KINDS: dict[str, dict[str, Any]] = {"block_level": {"num_blocks_per_group": 1}, "leaf_level": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_group_offloading_takes_codes_along(net: Any, tmp_path: Path, kind: str) -> None:
    expected, before = call(net), coded_tensors(net)
    net.enable_group_offload(onload_device=CPU, offload_type=kind, **KINDS[kind])
    managed = {id(t) for t in net.parameters()}
    held = [t for layer in layers_of(net).values() if layer.packed for t in layer.packed.tensors().values()]
    assert held and all(id(t) in managed for t in held), "diffusers moves what are parameters"
    for _ in range(2):
        assert near(call(net), expected)
    assert all(torch.equal(before[n], t) for n, t in coded_tensors(net).items())
    net.save_pretrained(tmp_path / "again")
    assert torch.equal(call(loaded(tmp_path / "again")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_on_disk(net: Any, tmp_path: Path, kind: str) -> None:
    tiny_model("pixart").save_pretrained(tmp_path / "dense")
    mixed = {"*attn1*": "vq3c", "*attn2*": "usq4", "*ff*": "aq2x3g4", "*": "usq3g8"}
    made = loaded(tmp_path / "dense", quantization_config=AquabitConfig(mixed))
    expected, before = call(made), coded_tensors(made)
    off: dict[str, Any] = {"offload_type": kind, "offload_to_disk_path": str(tmp_path / "off"), **KINDS[kind]}
    made.enable_group_offload(onload_device=CPU, **off)
    for _ in range(3):
        assert near(call(made), expected)
    written = sum(file.stat().st_size for file in (tmp_path / "off").iterdir())
    assert written > sum(t.nbytes for t in before.values())
    for action in (lambda: made.save_pretrained(tmp_path / "again"), made.dequantize):
        with pytest.raises(AquabitError, match="are offloaded; load it without"):
            action()
    off["offload_to_disk_path"] = str(tmp_path / "shared")
    net.enable_group_offload(onload_device=CPU, **off)
    with pytest.raises(AquabitError, match="which several layers share, were lost in offloading to disk"):
        call(net)


@pytest.mark.parametrize("buffers", [False, True])
def test_sequential_offloading_takes_codes_along(saved: Path, buffers: bool) -> None:
    net = loaded(saved)
    expected = call(net)
    accelerate.cpu_offload(net, CPU, offload_buffers=buffers)
    coded = [layer for layer in layers_of(net).values() if layer.scheme.kind != "fp"]
    for _ in range(2):
        assert all(layer.codes.is_meta and layer.packed.held_codes.is_meta for layer in coded)
        assert torch.equal(call(net), expected)
    with pytest.raises(AquabitError, match="are offloaded; load it without"):
        net.dequantize()
    accelerate.hooks.remove_hook_from_submodules(net)
    assert torch.equal(call(net), expected) and not any(layer.codes.is_meta for layer in coded)


def test_pipelines_say_that_offloading_needs_an_accelerator(tmp_path: Path) -> None:
    pipe = randomised(TINY_PIPELINES["pixart-alpha"])
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = loaded(tmp_path, quantization_config=AquabitConfig("usq4"))
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            offload()
    accelerate.cpu_offload_with_hook(pipe.transformer, CPU)[1].offload()  # as enable_model_cpu_offload does
    assert all(layer.packed is not None for layer in layers_of(pipe.transformer).values())


# ---- copies, state dicts, decoding


def test_state_dicts_and_copies_hold_the_codes() -> None:
    net = packed_model("dit")  # at a8: softmax outputs are rounded, too
    expected, file = call(net), io.BytesIO()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(call(copied), expected)
    torch.save(net.state_dict(), file)
    with torch.no_grad():
        for layer in layers_of(net).values():
            for tensor in () if layer.packed is None else layer.packed.tensors().values():
                tensor.zero_()
    assert not torch.equal(call(net), expected)
    file.seek(0)
    net.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(call(net), expected)


def test_a_model_is_decoded_again(net: Any, tmp_path: Path) -> None:
    expected, held = call(net), layers_of(net)
    assert held
    plain = net.dequantize()
    assert plain is net and not layers_of(net) and not net.is_quantized and not hasattr(net, "hf_quantizer")
    assert near(call(net), expected, 2e-3), "the fast kernels round"
    assert all(isinstance(net.get_submodule(n), nn.Linear | nn.Conv2d) for n in held)
    net.save_pretrained(tmp_path)
    dense = loaded(tmp_path)
    again = dense.state_dict()
    assert contents_of(dense) is None and all(torch.equal(t, again[n]) for n, t in net.state_dict().items())
    assert near(call(net.half(), torch.float16), expected, 2e-2)


# ---- training and adapters


def test_adapters_are_refused_with_what_to_do(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = randomised(TINY_PIPELINES["sd3"])
    net: Any = pipe.transformer
    net.save_pretrained(tmp_path)
    packed = type(net).from_pretrained(tmp_path, quantization_config=AquabitConfig("usq4"))
    state = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 16),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(16, 2),
    }
    pipe.transformer = packed
    for put in (
        lambda: packed.add_adapter(LoraConfig(target_modules=["to_q"])),
        lambda: pipe.load_lora_weights(dict(state)),
    ):
        with pytest.raises(AquabitError, match=r"aquabit\.add_lora\(pipe, FILE, scale\)"):
            put()
    with pytest.raises(RuntimeError, match="can require gradients"):
        packed.requires_grad_(True)
    packed.dequantize().load_lora_adapter(dict(state))
    assert packed.peft_config, "decoded, it takes adapters again"


def test_packed_projections_are_not_fused(tmp_path: Path) -> None:
    net: Any = randomised(TINY_PIPELINES["sd"]).unet
    net.save_pretrained(tmp_path)
    packed = type(net).from_pretrained(tmp_path, quantization_config=AquabitConfig("usq4"))
    with pytest.raises(AquabitError, match="fuse those of the dense model"):
        packed.fuse_qkv_projections()
    copy.deepcopy(packed).dequantize().fuse_qkv_projections()


# ---- compiling


@pytest.mark.parametrize("repeated", [False, True])
def test_compiled_models_compute_the_same(net: Any, repeated: bool) -> None:
    torch._dynamo.reset()
    expected = call(net)
    if repeated:
        net._repeated_blocks = ["BasicTransformerBlock"]
        net.compile_repeated_blocks(backend="aot_eager")
        made = net
    else:
        made = torch.compile(net, backend="aot_eager")
    inputs: Any = call_inputs(net)
    with torch.inference_mode():
        assert near(made(**inputs).sample, net(**inputs).sample)
    assert near(call(net), expected)


def call_inputs(net: Any) -> Any:
    def drawn(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: drawn(v) for k, v in value.items()}
        return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    return {k: drawn(v) for k, v in example_inputs(net).items()}


# ---- what is asked for


def test_modules_that_are_not_to_be_converted(tmp_path: Path) -> None:
    net = tiny_model("pixart")
    net.save_pretrained(tmp_path)
    left = ["proj_out", "attn1", "transformer_blocks.1"]
    asked = AquabitConfig({"*": "usq4"}, modules_to_not_convert=left)
    assert AquabitConfig.from_dict(asked.to_dict()).to_dict() == asked.to_dict()
    made = loaded(tmp_path, quantization_config=asked)
    packed = {n for n, layer in layers_of(made).items() if layer.packed is not None}
    assert packed == {
        n
        for n in layers_of(made)
        if "attn1" not in n.split(".") and not n.startswith(("proj_out", "transformer_blocks.1."))
    }
    assert 0 < len(packed) < len(layers_of(made))
    with pytest.raises(AquabitError, match="'proj_in' matches none"):
        loaded(tmp_path, quantization_config=AquabitConfig("usq4", modules_to_not_convert="proj_in"))


def test_what_diffusers_cannot_ask_for_is_refused(tmp_path: Path) -> None:
    """By the name of the method, for text encoders, which are transformers' models, and from one file."""
    with pytest.raises(ValueError, match="quant_backend=aquabit was not found"):
        PipelineQuantizationConfig(quant_backend="aquabit", quant_kwargs={"weights": "usq4"})
    pipe = randomised(TINY_PIPELINES["flux"])
    pipe.save_pretrained(tmp_path)
    encoder = PipelineQuantizationConfig(quant_mapping={"text_encoder": AquabitConfig("usq4")})
    with pytest.raises(ValueError, match="Unknown quantization type, got aquabit"):
        type(pipe).from_pretrained(tmp_path, quantization_config=encoder)
    part: Any = tmp_path / "transformer"
    file = part / "diffusion_pytorch_model.safetensors"
    with pytest.raises(AquabitError, match=r"a single file cannot be quantized while diffusers loads it"):
        type(pipe.transformer).from_single_file(
            str(file), config=str(part), quantization_config=AquabitConfig("usq4")
        )


def test_modules_that_stay_in_float32_do(tmp_path: Path) -> None:
    net: Any = randomised(RECENT["wan"]).transformer
    net.save_pretrained(tmp_path)
    half: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    dense = type(net).from_pretrained(tmp_path, **half)
    packed = type(net).from_pretrained(tmp_path, quantization_config=AquabitConfig("usq8"), **half)
    wanted = {n: p.dtype for n, p in dense.named_parameters()}
    assert {torch.float32, torch.bfloat16} == set(wanted.values()) and packed.dtype == dense.dtype
    for name, layer in layers_of(packed).items():
        assert layer.compute.dtype == layer.weight.dtype == wanted[f"{name}.weight"], name
    there = dict(packed.named_parameters())
    assert all(there[n].dtype == dtype for n, dtype in wanted.items() if n in there)
    plain = {n: p.dtype for n, p in packed.dequantize().named_parameters()}
    assert plain == wanted, "decoded, too"


# ---- every denoiser class


CLASSES = {  # of denoisers: a tiny pipeline that has one
    **dict.fromkeys(("sd", "pixart-alpha", "hunyuan", "sd3", "flux", "dit", "ddpm", "auraflow", "generic")),
    **dict.fromkeys(name for name in RECENT if name not in ("flux2-klein", "sana-sprint")),
    **dict.fromkeys(("TextToVideoSDPipeline", "AnimateDiffPipeline", "AmusedPipeline", "LattePipeline")),
    **dict.fromkeys(("LuminaPipeline", "Cosmos2TextToImagePipeline", "OvisImagePipeline", "UnCLIPPipeline")),
    **dict.fromkeys(("SkyReelsV2Pipeline", "MochiPipeline")),
}
FAMILIES = {**TINY_PIPELINES, **RECENT, **VARIANTS}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_denoiser_is_quantized_as_it_is_loaded(name: str, tmp_path: Path) -> None:
    pipe = randomised(FAMILIES[name])
    part = next(name for name in ("transformer", "unet", "prior") if name in pipe.components)
    net: Any = getattr(pipe, part)
    net.save_pretrained(tmp_path / "dense")
    made = type(net).from_pretrained(tmp_path / "dense", quantization_config=AquabitConfig("usq8"))
    graph, why = dense_graph(type(net).from_config(net.config))
    fixed = fixed_layers(graph)
    assert {n for n, layer in layers_of(made).items() if layer.packed is not None} == set(
        layers(graph)
    ) - set(fixed)
    made.save_pretrained(tmp_path / "packed")
    again = type(net).from_pretrained(tmp_path / "packed")
    there = again.state_dict()
    assert all(torch.equal(t, there[n]) for n, t in made.state_dict().items())
    if name not in VARIANTS:
        protocol, made_images = recent_protocol(name) if name in RECENT else protocol_for(name), []
        for module in (net, made, again):
            setattr(pipe, part, module)
            made_images.append(images(pipe, protocol))
        full, packed, back = made_images
        assert torch.equal(packed, back) and 0 < float((packed - full).square().mean()) < 1e-3
    if why:
        with pytest.raises(AquabitError, match="activation bits need a model that can be followed, and no"):
            type(net).from_pretrained(tmp_path / "dense", quantization_config=AquabitConfig("usq8", act=8))


def test_layers_inside_torchs_own_attention_go_by_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.a = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)
            self.b.weight = self.a.weight

    graph, why = dense_graph(Own())
    assert "no example inputs are known for Own" in why and ";" not in why
    assert set(layers(graph)) == {"attention.out_proj", "a"} and graph.graph["tied"] == {"b": "a"}
    assert set(fixed_layers(graph)) == {"attention.out_proj"}
