"""Pipelines that take pictures: the whole flow on tiny ones, which picture makes which image, what is
refused, and steps that a picture leaves out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from torch import Tensor

import aquabit
from aquabit.cost import CostModel
from aquabit.inputs import read_inputs
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.settings import MeasureOptions
from aquabit.pipelines import Adapter, Model, adapter_of, denoiser_of, image_size, load, trace
from aquabit.quant.bank import Bank
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.quant.model import fingerprint
from aquabit.reports import report
from aquabit.scheme import AquabitError, Calibration, Protocol, StepGroups
from aquabit.search.judging import pieces
from aquabit.sensitivity.plan import Planner, SampleOptions
from aquabit.space import make_space
from aquabit.study import Study
from tests.tiny_inputs import WITH_PICTURES, from_pictures, pictures
from tests.tiny_pipelines import PROMPTS, randomised, tiny
from tests.tiny_recent import RECENT
from tests.whole import images, works_whole

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()

FLOWS = (
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "FluxImg2ImgPipeline",
    "LTXImageToVideoPipeline",
)
SD = "StableDiffusionImg2ImgPipeline"


@pytest.mark.parametrize("name", FLOWS)
def test_the_whole_flow(name: str, tmp_path: Path) -> None:
    """inspect, measure, explain, find, quantize, generate and the page: from a folder, as users have it."""
    folder, bank, pipe = str(tmp_path / "model"), str(tmp_path / "bank"), randomised(WITH_PICTURES[name])
    pipe.save_pretrained(folder)
    protocol = from_pictures(name, pipe, tmp_path, steps=3, objective="psnr")
    graph, study = trace(load(folder)), Study(tmp_path / "S.db")
    space = {"schemes": ["usq4h", "usq2"], "activations": [8]}
    aquabit.measure(folder, study, 24, protocol=protocol, space=space, bank=bank, sample_seed=1)
    table = study.measurements(study.protocol)
    assert table.psnr.notna().all() and len(set(table.psnr.round(6))) > 3  # configurations differ
    named = {
        layer["name"]
        for layer in aquabit.explain(study, bits=4.2, estimator="average_bits").to_dict()["layers"]
    }
    assert named <= set(graph.nodes)
    best = aquabit.find(study, bits=4.2, rounds=0, bank=bank).best
    assert best.calibration is not None and best.calibration.inputs == protocol.inputs
    packed = aquabit.quantize(folder, best, bank=bank)
    packed.save(tmp_path / "packed")
    assert packed.config.calibration is not None and packed.config.calibration.inputs is not None
    assert packed.config.calibration.inputs.folder == "pictures"  # a place of this machine tells nobody
    made = aquabit.generate(str(tmp_path / "packed"), 2, inputs=tmp_path / "pictures", deterministic=True)
    again = images(load(tmp_path / "packed"), replace(study.protocol, images=2))
    # batches of other sizes take other kernels, whose roundings fall otherwise
    assert made.shape == again.shape and float((made - again).abs().mean()) < 0.02
    page = report(study, tmp_path / "page").read_text()
    assert "cat0.png, cat1.png" in page


def made(pipe: Any, protocol: Protocol) -> Tensor:
    return images(pipe, protocol)


def test_the_images_are_those_of_the_pipelines_own_call(tmp_path: Path) -> None:
    for name in (SD, "StableDiffusionInpaintPipeline", "FluxImg2ImgPipeline"):
        pipe = randomised(WITH_PICTURES[name])
        protocol = from_pictures(name, pipe, tmp_path / name, strength=0.5)
        assert protocol.inputs is not None
        given = [protocol.inputs.load(i, (32, 32)) for i in range(2)]
        more = {"mask_image": [g["mask"] for g in given]} if "mask" in given[0] else {}
        size = {} if name == SD else {"height": 32, "width": 32}
        with torch.inference_mode():
            own = pipe(
                prompt=list(PROMPTS[:2]),
                image=[g[""] for g in given],
                strength=0.5,
                generator=[torch.Generator().manual_seed(i) for i in range(2)],
                num_inference_steps=4,
                guidance_scale=3.0,
                output_type="pt",
                **more,
                **size,
            ).images
        assert torch.allclose(made(pipe, protocol), own, atol=2e-4)


def test_image_i_is_of_picture_i_and_of_no_other(tmp_path: Path) -> None:
    pipe = randomised(WITH_PICTURES[SD])
    protocol = from_pictures(SD, pipe, tmp_path, images=5, micro_batch=3, strength=0.5)
    found = made(pipe, protocol)
    assert protocol.inputs is not None and found.shape == (5, 3, 32, 32)
    for i in range(5):
        one = replace(
            protocol, images=1, seed=i, inputs=protocol.inputs.turned([i]), conditions=(PROMPTS[i % 2],)
        )
        assert torch.allclose(made(pipe, one)[0], found[i], atol=2e-4)
    other = replace(protocol, inputs=protocol.inputs.turned((1, 0)))
    assert float((made(pipe, other) - found).abs().mean()) > 1e-3


def test_a_pipeline_of_no_known_family_makes_one_image_a_call(tmp_path: Path) -> None:
    name = "StableDiffusionInstructPix2PixPipeline"
    pipe = randomised(WITH_PICTURES[name])
    protocol, adapter = from_pictures(name, pipe, tmp_path), Adapter(pipe)
    assert adapter.alone(protocol) and adapter.calls(protocol) == 8
    assert torch.equal(made(pipe, protocol), made(pipe, replace(protocol, micro_batch=1)))


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    masked = read_inputs(pictures(tmp_path / "masked", 2, masks=True))
    plain = read_inputs(pictures(tmp_path / "plain", 2))
    base = Protocol(images=2, steps=4, micro_batch=2, conditions=PROMPTS, resolution=32)
    sd, inpaint = (randomised(WITH_PICTURES[n]) for n in (SD, "StableDiffusionInpaintPipeline"))
    for pipe, change, said in [
        (tiny("sd"), {"inputs": plain}, "takes no pictures; leave them out"),
        (tiny("sd"), {"strength": 0.5}, "strength is 0.5, but StableDiffusionPipeline takes none"),
        (sd, {}, r"makes no images without image; give --inputs DIR, a folder with cat\.png for"),
        (sd, {"inputs": masked}, "has a mask beside each picture, but StableDiffusionImg2ImgPipeline takes"),
        (inpaint, {"inputs": plain}, r"makes no images without mask_image; .* cat\.mask\.png"),
        (
            sd,
            {"inputs": plain, "strength": 0.2},
            "strength 0.2 of 4 steps leaves none to run; give at least 5",
        ),
    ]:
        with pytest.raises(AquabitError, match=said):
            made(pipe, replace(base, **change))
    for wrong in (0.0, 1.5):
        with pytest.raises(AquabitError, match=r"strength is .*; it must be at least 0\.001 and at most 1"):
            replace(base, strength=wrong)
    own = Model(torch.nn.Linear(1, 1), lambda net, seeds: net(torch.zeros(len(seeds), 3, 4, 1)))
    for name, value in (("inputs", plain), ("strength", 0.5)):
        with pytest.raises(AquabitError, match=f"{name} are for pipelines of diffusers that take pictures"):
            adapter_of(own).check_taken(Protocol(**{name: value}))


def test_pictures_that_leave_no_trace_are_said(tmp_path: Path) -> None:
    """Chroma's sampler begins with noise alone where so much strength leaves no step out."""
    pipe = randomised(WITH_PICTURES["ChromaImg2ImgPipeline"])
    protocol = from_pictures("ChromaImg2ImgPipeline", pipe, tmp_path, strength=0.9)
    with pytest.raises(AquabitError, match=r"no picture changes what this .* makes; lower --strength"):
        made(pipe, protocol)


class Steps(Watcher):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def before(self, step: int) -> None:
        self.seen.append(step)


@pytest.mark.parametrize("name", [SD, "StableDiffusion3Img2ImgPipeline"])
def test_steps_that_a_picture_leaves_out(name: str, tmp_path: Path) -> None:
    """They are told by the scheduler, or by the denoiser's first call where it knows nothing (DDIM)."""
    pipe = randomised(WITH_PICTURES[name])
    protocol = from_pictures(name, pipe, tmp_path, steps=10, strength=0.7, guidance=1.0)
    adapter, steps = Adapter(pipe), Steps()
    with following(denoiser_of(pipe), pipe.scheduler, [steps]):
        images(pipe, protocol)
    assert steps.seen == list(range(3, 10))
    assert adapter.first_step(protocol) == 3 and adapter.calls(protocol) == 7


def test_step_groups_count_what_runs(tmp_path: Path) -> None:
    pipe, bank = randomised(WITH_PICTURES[SD]), str(tmp_path / "bank")
    protocol = from_pictures(SD, pipe, tmp_path, steps=10, strength=0.6, guidance=1.0, objective="psnr")
    groups = StepGroups(10, (0, 5), first=4)
    assert groups.shares == (1 / 6, 5 / 6) and groups.of(4) == 0 and groups.of(5) == 1
    with pytest.raises(
        AquabitError, match=r"the first group of steps, 1 to 3, never runs: .* with step 5 of 10"
    ):
        StepGroups(10, (0, 3), first=4)
    study = Study(tmp_path / "S.db")
    space = {"schemes": ["usq4"], "activations": [8, 6], "step_groups": {"total": 10, "starts": [0, 5]}}
    options = MeasureOptions(protocol, space)
    planned = Planner(pipe, None, options, aquabit.workflows.Where(bank=bank))
    assert planned.space.steps == groups and planned.protocol.strength == 0.6
    assert planned._runs(planned.protocol) == (6, 6)
    made = planned.measuring(SampleOptions(4))
    assert made.backward_passes % 6 == 0
    own = denoiser_of(pipe)
    config = make_space(trace(pipe), fingerprint(own), **space).uniform("usq4", 8)
    layer = next(iter(config.layers))
    config = replace(
        config.with_layer(layer, "usq4", (6, 8), steps=groups), calibration=Calibration.of(protocol)
    )
    assert config.mean_act(layer) == pytest.approx(6 / 6 + 8 * 5 / 6)
    assert aquabit.QuantConfig.from_dict(json.loads(config.to_json())) == config
    cost = CostModel(trace(pipe), planned.space)
    assert cost(config).bops < cost(config.with_layer(layer, "usq4", 8)).bops
    packed = aquabit.quantize(pipe, config, bank=bank)
    seen: list[int] = []
    quantized = dict(packed.pipe.unet.named_modules())[layer]
    quantized.register_forward_pre_hook(lambda module, _: seen.append(module.act))
    images(packed.pipe, protocol)
    assert seen == [6, 8, 8, 8, 8, 8]
    assert study.get("space") is None


def test_noise_is_corrected_in_the_steps_that_run(tmp_path: Path) -> None:
    pipe = randomised(WITH_PICTURES[SD])
    protocol = from_pictures(SD, pipe, tmp_path, steps=4, strength=0.75)
    space = make_space(trace(pipe), fingerprint(denoiser_of(pipe)), schemes=["usq2"])
    calibration = replace(Calibration.of(protocol), images=4)
    config = replace(space.uniform("usq2", 8), calibration=calibration)
    plain = images(aquabit.quantize(pipe, config, bank=str(tmp_path)).pipe, protocol)
    corrected = aquabit.quantize(pipe, config, bank=str(tmp_path), correct="cnc+bc")
    assert corrected.statistics is not None and len(corrected.statistics.about.timesteps) == 3
    assert not torch.equal(images(corrected.pipe, protocol), plain)
    with pytest.raises(AquabitError, match="begin with step 2, sampling is at step 1; use the strength"):
        images(corrected.pipe, replace(protocol, strength=1.0))


def test_judging_goes_on_in_pictures_as_in_prompts(tmp_path: Path) -> None:
    inputs = read_inputs(pictures(tmp_path, 3))
    blocks = pieces(Protocol(images=16, conditions=("a", "b", "c"), inputs=inputs), 3)
    shown = [
        [(name, c) for (name, _), c in zip(b.inputs.pictures, b.conditions, strict=True)] for b in blocks
    ]  # type: ignore[union-attr,arg-type]
    assert all(
        pair in [("cat0.png", "a"), ("cat1.png", "b"), ("cat2.png", "c")] for row in shown for pair in row
    )
    assert len({pair for row in shown for pair in row}) == 3


def test_a_study_refuses_pictures_that_changed(tmp_path: Path) -> None:
    pipe, bank = randomised(WITH_PICTURES["StableDiffusion3Img2ImgPipeline"]), str(tmp_path / "bank")
    protocol = from_pictures("StableDiffusion3Img2ImgPipeline", pipe, tmp_path, steps=3, objective="psnr")
    study, space = Study(tmp_path / "S.db"), {"schemes": ["usq4"], "activations": [8]}
    aquabit.measure(pipe, study, 0, protocol=protocol, space=space, bank=bank, damages="probes")
    assert study.protocol.strength == 0.6  # the pipeline's own is said
    pictures(tmp_path / "pictures", 2, side=28)
    now = replace(protocol, inputs=read_inputs(tmp_path / "pictures"))
    with pytest.raises(AquabitError, match=r"another protocol \(.*the picture cat0\.png is another\)"):
        aquabit.measure(pipe, study, 0, protocol=now, space=space, bank=bank)


def test_workers_make_the_same_images(tmp_path: Path) -> None:
    folder, bank = str(tmp_path / "model"), str(tmp_path / "bank")
    pipe = randomised(WITH_PICTURES["StableDiffusion3Img2ImgPipeline"])
    pipe.save_pretrained(folder)
    protocol = from_pictures("StableDiffusion3Img2ImgPipeline", pipe, tmp_path, steps=3, objective="psnr")
    found = []
    for workers in (1, 2):
        study = Study(tmp_path / f"{workers}.db")
        more = {"workers": workers, "bank": f"{bank}{workers}", "damages": "probes"}
        space = {"schemes": ["usq4"], "activations": [8]}
        aquabit.measure(folder, study, 0, protocol=protocol, space=space, **more)
        found.append(study.measurements(study.protocol).sort_values("config").psnr.tolist())
    assert found[0] == pytest.approx(found[1], nan_ok=True)


def test_videos_from_pictures_are_whole(tmp_path: Path) -> None:
    name = "CogVideoXImageToVideoPipeline"
    pipe = randomised(WITH_PICTURES[name])
    found = works_whole(pipe, from_pictures(name, pipe, tmp_path), tmp_path)
    assert len(found.images) == 18 and found.same < 1e-5
    evaluator = Evaluator(pipe, trace(pipe), Bank(str(tmp_path / "bank")), fingerprint(denoiser_of(pipe)))
    assert image_size(evaluator.pipe) is not None


def test_pictures_that_are_not_needed_are_taken(tmp_path: Path) -> None:
    """FLUX.2 makes images of text, and of text and a picture."""
    pipe = randomised(RECENT["flux2-klein"])
    protocol = from_pictures("Flux2KleinPipeline (image)", pipe, tmp_path, steps=2)
    plain = replace(protocol, inputs=None)
    assert not torch.equal(images(pipe, protocol), images(pipe, plain))
