"""Every family on a tiny pipeline of its real class: the whole flow, what prompts become, and what is
refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from torch import Tensor
from typer.testing import CliRunner

import aquabit
from aquabit.cli.app import app
from aquabit.cost import CostModel
from aquabit.graph import meta_denoiser
from aquabit.graph import trace as trace_denoiser
from aquabit.pipelines import FAMILIES as FAMILY_VALUES
from aquabit.pipelines import (
    PRESETS,
    Adapter,
    family_notes,
    free_text_encoders,
    image_size,
    load,
    preset_named,
    trace,
)
from aquabit.scheme import AquabitError, Protocol, direction
from aquabit.space import make_space
from aquabit.study import Study
from tests.families import FAMILIES
from tests.tiny_pipelines import PROMPTED, PROMPTS, TINY_PIPELINES, UNGUIDED, flux, tiny

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()


def protocol_for(name: str, **more: Any) -> Protocol:
    given: dict[str, Any] = {
        "images": 4,
        "steps": 2,
        "micro_batch": 4,
        "objective": "psnr",
        "guidance": 1.0 if name in UNGUIDED else 3.0,
        "conditions": PROMPTS if name in PROMPTED else None,
        "resolution": 16 if name in ("flux", "auraflow") else None,
    }
    return Protocol(**{**given, **more})


def images(pipe: Any, protocol: Protocol) -> Tensor:
    adapter = Adapter(pipe)
    return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])


SAMPLES = 24  # some are uniform, and measured as such; a surrogate wants 20 in all
SPACE = {"schemes": ["usq4", "usq2"], "activations": [8]}


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_the_whole_flow(name: str, tmp_path: Path) -> None:
    """inspect, measure, explain, find, quantize, generate, reload: from a folder, as users have it."""
    folder, bank, protocol = str(tmp_path / "model"), str(tmp_path / "bank"), protocol_for(name)
    tiny(name).save_pretrained(folder)
    graph = trace(load(folder))
    study = Study(tmp_path / "S.db")
    # of few layers many draws are the same, and small ones weigh more
    samples, bits = (SAMPLES, 4.2) if name != "generic" else (2 * SAMPLES, 5.0)
    aquabit.measure(folder, study, samples, protocol=protocol, space=SPACE, bank=bank, sample_seed=1)
    table = study.measurements(study.protocol)
    assert (table.kind == "sample").sum() > SAMPLES // 2 and table.psnr.notna().all()
    assert len(set(table.psnr.round(6))) > 3  # configurations differ
    result = aquabit.explain(study, bits=bits)
    assert {layer["name"] for layer in result.to_dict()["layers"]} <= {
        n for n, a in graph.nodes(data=True) if a["kind"] != "merge"
    }
    front = aquabit.find(study, bits=bits, rounds=1, bank=bank)
    packed = aquabit.quantize(folder, front.best, bank=bank)
    packed.save(tmp_path / "packed")
    again = load(tmp_path / "packed")
    made = images(again, protocol)
    assert image_size(again, protocol.resolution) == tuple(made.shape[-2:])
    assert made.shape == images(packed.pipe, protocol).shape and torch.allclose(
        made, images(packed.pipe, protocol), atol=1e-4
    )
    generated = aquabit.generate(
        str(tmp_path / "packed"), 2, steps=2, conditions=protocol.conditions, resolution=protocol.resolution
    )
    assert torch.isfinite(generated).all() and generated.shape[0] == 2


@pytest.mark.parametrize(
    ("name", "layers", "weights", "macs"),
    [
        ("sd-1.5", 282, 859.1, 338.6),
        ("sdxl", 794, 2565.9, 2988.7),
        ("pixart-alpha", 291, 610.7, 2155.2),
        ("pixart-sigma", 287, 610.2, 2155.2),
        ("dit-xl-2", 255, 717.0, 114.4),
        ("hunyuan", 472, 1514.3, 5139.5),
        ("sd3-medium", 341, 2027.2, 3005.9),
        ("flux-dev", 504, 11898.3, 29756.1),
        ("ldm-4", 283, 400.6, 100.6),
    ],
)
def test_real_sizes_and_costs(name: str, layers: int, weights: float, macs: float) -> None:
    """Layers, millions of weights and 10^9 multiply-adds at the published size; uniform 4 bits cost a
    little more than 4."""
    graph = trace_denoiser(meta_denoiser(*FAMILIES[name][:2]))
    nodes = [a for _, a in graph.nodes(data=True) if a["kind"] != "merge"]
    assert (
        len(nodes),
        round(graph.graph["weights"] / 1e6, 1),
        round(sum(a["macs"] for a in nodes) / 1e9, 1),
    ) == (layers, weights, macs)
    space = make_space(graph, "0" * 16, schemes=["usq4"])
    assert [k for k, row in space.choices.items() if len(row) == 1 and str(row[0]) == "fp"] == [
        n for n in space.choices if ".pooler." in n
    ]
    cost = CostModel(graph, space)(space.uniform("usq4", 8))
    assert 4.0 < cost.bits_per_weight < 4.3
    assert cost.bytes >= graph.graph["weights"] * cost.bits_per_weight / 8


def own_images(name: str, protocol: Protocol, prompts: list[str]) -> Tensor:
    """Images by the pipeline's own call, with prompts: what the adapter must come to with embeddings."""
    pipe = tiny(name)
    generators = [torch.Generator().manual_seed(protocol.seed + i) for i in range(len(prompts))]
    side = {"height": 16, "width": 16}
    more = {"use_resolution_binning": False} if "pixart" in name or name == "hunyuan" else {}
    more |= {"clean_caption": False} if "pixart" in name else {}
    with torch.inference_mode():
        made = pipe(
            prompt=prompts,
            generator=generators,
            num_inference_steps=protocol.steps,
            guidance_scale=protocol.guidance,
            output_type="pt",
            **side,
            **more,
        )
    return made.images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", PROMPTED)
def test_embeddings_give_the_images_of_prompts(name: str, guidance: float) -> None:
    protocol = protocol_for(name, guidance=guidance)
    made = images(tiny(name), protocol)
    assert torch.allclose(made, own_images(name, protocol, list(PROMPTS)), atol=2e-4)
    assert all(float((made[0] - other).abs().mean()) > 1e-3 for other in made[1:])


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_an_image_depends_on_no_other_and_bfloat16_runs(name: str, tmp_path: Path) -> None:
    pipe, protocol = tiny(name), protocol_for(name)
    together, alone = images(pipe, protocol), images(pipe, replace(protocol, micro_batch=1))
    if name != "ldm":  # which gives its sampler no generators, but needs none here
        assert torch.equal(together, images(pipe, protocol))
    assert torch.allclose(together, alone, atol=2e-4)
    pipe.save_pretrained(tmp_path)
    half = (
        images(load(tmp_path, dtype="bfloat16"), protocol) if name != "ldm" else together
    )  # LDMPipeline makes float32 latents
    assert half.dtype == torch.float32 and torch.isfinite(half).all() and half.shape == together.shape


def count_calls(module: torch.nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_prompts_are_encoded_once_and_encoders_go(tmp_path: Path) -> None:
    protocol = protocol_for("sdxl", images=6, micro_batch=2)
    tiny("sdxl").save_pretrained(tmp_path / "model")
    pipe: Any = load(tmp_path / "model")
    expected = images(pipe, protocol)
    kept: Any = load(tmp_path / "model")
    calls = count_calls(kept.text_encoder)
    assert torch.equal(images(kept, protocol), expected) and torch.equal(
        images(kept, protocol.block(1)), images(pipe, protocol.block(1))
    )
    assert len(calls) == 2 * len(PROMPTS)  # with and without the prompt

    free_text_encoders(kept)
    more = replace(protocol, conditions=("a new one",))
    assert (
        torch.equal(images(kept, more), images(pipe, more))
        and kept.text_encoder is None
        and kept.text_encoder_2 is None
    )
    assert torch.equal(images(kept, protocol), expected)  # nothing to encode
    assert torch.equal(
        images(kept, replace(more, conditions=("another",))),
        images(pipe, replace(more, conditions=("another",))),
    )
    assert kept.text_encoder is None and kept.config["text_encoder"] == ("transformers", "CLIPTextModel")


def test_a_pipeline_in_memory_keeps_its_encoders() -> None:
    pipe = tiny("sd")
    encoder = pipe.text_encoder
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    free_text_encoders(pipe)
    images(pipe, protocol_for("sd"))
    assert pipe.text_encoder is encoder
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_images_are_decoded_one_by_one_and_checkers_are_off() -> None:
    pipe, sizes = tiny("sd"), list[int]()
    whole = pipe.vae._decode
    pipe.vae._decode = lambda z, *a, **k: sizes.append(len(z)) or whole(z, *a, **k)
    pipe.safety_checker = checker = torch.nn.Linear(1, 1)  # would fail if it were called
    images(pipe, protocol_for("sd"))
    assert sizes == [1] * 4 and pipe.safety_checker is checker and "decode" not in pipe.vae.__dict__


def test_what_a_pipeline_would_ignore_is_refused() -> None:
    for pipe, change, message in [
        (tiny("dit"), {"resolution": 32}, "makes images of 16 pixels only"),
        (tiny("ddpm"), {"eta": 0.5}, "has no eta"),
        (tiny("ddpm"), {"guidance": 2.0}, "has no guidance"),
        (tiny("ldm"), {"conditions": ("a",)}, "is unconditional"),
        (tiny("sd"), {"conditions": None}, "give --prompts FILE"),
        (tiny("ldm-class"), {"conditions": ("10",)}, "classes 0 to 9"),
        (
            tiny("sd"),
            {"resolution": 15, "conditions": PROMPTS},
            "does not make these images: .*divisible by 8",
        ),
    ]:
        with pytest.raises(AquabitError, match=message):
            images(pipe, Protocol(**{"images": 2, "steps": 1, "micro_batch": 2, **change}))
    torch.manual_seed(0)
    with pytest.raises(AquabitError, match="has no guidance"):
        images(flux(guidance_embeds=False), protocol_for("flux"))
    images(tiny("dit"), Protocol(images=2, steps=1, micro_batch=2, resolution=16))  # its own


def test_memory_that_ends_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("ddpm")

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to"
            " allocate 9 bytes."
        )

    monkeypatch.setattr(pipe.unet, "forward", full)
    with pytest.raises(
        AquabitError, match="out of memory while DDPMPipeline made 4 images at once; lower --micro-batch"
    ):
        images(pipe, protocol_for("ddpm"))


def test_unknown_families_are_said_and_known_ones_are_not(tmp_path: Path) -> None:
    assert [n for n in TINY_PIPELINES if family_notes(tiny(n))] == ["generic"]
    said = family_notes(tiny("generic"))
    assert "CogView3PlusPipeline" in said[0] and "CogView3PlusTransformer2DModel" in said[1]
    tiny("generic").save_pretrained(tmp_path / "model")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "model")])
    said_there = " ".join(shown.output.split())
    assert shown.exit_code == 0 and "CogView3PlusPipeline is of no known family" in said_there


@pytest.mark.parametrize("given", [[], ["--images", "8", "--guidance", "1.5"]])
def test_a_preset_fills_what_is_not_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str]
) -> None:
    seen: list[Protocol] = []
    monkeypatch.setattr(
        "aquabit.workflows.measure_model",
        lambda model, study, sample, options, *_, **__: seen.append(options.protocol) or 0,
    )
    result = CliRunner().invoke(
        app, ["measure", "digits-unet", "--study", str(tmp_path / "S.db"), "--preset", "ptqd-ldm4", *given]
    )
    assert result.exit_code == 0, result.output
    wanted = Protocol(images=50_000, steps=20, scheduler="ddim", guidance=3.0, resolution=256)
    assert seen == [replace(wanted, images=8, guidance=1.5) if given else wanted]


def test_presets_are_consistent() -> None:
    names = {f.name for f in FAMILY_VALUES}
    for each in PRESETS:
        assert (
            each.family in names
            and each.source
            and set(each.full_precision) >= set(each.reported) - {"is", "sfid"}
        )
        Protocol(**each.protocol)
        assert all(direction(metric) for metric in each.reported)
    with pytest.raises(AquabitError, match="preset 'x' is unknown; known: qua2sedimo-pixart-alpha"):
        preset_named("x")
    listed = json.loads(CliRunner().invoke(app, ["models", "--json", "-"]).output)
    assert [p["name"] for p in listed["presets"]] == [p.name for p in PRESETS] and len(
        listed["families"]
    ) == len(FAMILY_VALUES)


def test_folders_that_are_no_pipelines(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="is not a diffusers pipeline: it has no"):
        load(tmp_path)
    tiny("sdxl").save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    shutil.rmtree(tmp_path / "model" / "text_encoder_2")
    with pytest.raises(
        AquabitError, match=r"lacks components that its model_index\.json names: text_encoder_2, vae"
    ):
        load(tmp_path / "model")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(AquabitError, match=r"is no file of weights that is read .* `aquabit convert`"):
        load(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "a/b is gated: accept its terms"),
        ("RepositoryNotFoundError", "a/b is not on the hub, or it is private"),
        ("OfflineModeIsEnabled", "the hub cannot be reached and a/b is not in its cache"),
    ],
)
def test_a_hub_that_gives_no_model(monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    kind: Any = type(error, (OSError,), {})  # as huggingface_hub names them

    def refuse(*_: Any, **__: Any) -> None:
        try:
            raise kind("403 Client Error")
        except kind as cause:
            raise OSError("Cannot load model a/b: see the stack trace") from cause

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    with pytest.raises(AquabitError, match=message):
        load("a/b")


def test_devices_that_are_not_there() -> None:
    with pytest.raises(AquabitError, match="device 'gpu' is unknown"):
        load("digits-unet", "gpu")
    with pytest.raises(AquabitError, match="use --device cuda"):
        load("digits-unet", "cpu", offload=True)
    if not torch.cuda.is_available():
        with pytest.raises(AquabitError, match="sees no GPU"):
            load("digits-unet", "cuda")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n\n", "is empty; it needs one prompt a line"), (b"caf\xe9\n", "cannot be read as UTF-8 text")],
)
def test_prompt_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    arguments = [
        "measure",
        "digits-unet",
        "--study",
        str(tmp_path / "S.db"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
