"""This year's families, of images and of videos, on tiny pipelines of their real classes."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging

import aquabit
from aquabit.measuring.evaluator import Evaluator
from aquabit.pipelines import denoiser_of, family, family_notes, image_size, replay_recorder, trace
from aquabit.quant.bank import Bank
from aquabit.quant.finetuning.finetune import FineTuning
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Calibration, Protocol, StepGroups
from aquabit.space import make_space
from tests.tiny_pipelines import PROMPTS, randomised, tiny
from tests.tiny_recent import RECENT, VIDEO, wan
from tests.whole import images, works_whole

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()
FRAMES = 9


def protocol_for(name: str, **more: Any) -> Protocol:
    given: dict[str, Any] = {
        "images": 2,
        "steps": 2,
        "micro_batch": 2,
        "guidance": 3.0,
        "resolution": None if name == "hidream" else 32,
        "conditions": PROMPTS,
        "frames": FRAMES if name in VIDEO else None,
    }
    return Protocol(**{**given, **more})


@pytest.mark.parametrize("name", RECENT)
def test_it_works_whole(name: str, tmp_path: Path) -> None:
    """Full precision, quantized, packed, saved and loaded again: the same images, and every layer named."""
    protocol, pipe = protocol_for(name), randomised(RECENT[name])
    found = works_whole(pipe, protocol, tmp_path, saved=name != "hidream")  # too large without its size
    assert found.images.shape == (2 * (protocol.frames or 1), 3, 32, 32) and found.same < 1e-5
    assert found.psnr > 15 and "other" not in found.operators
    assert family(pipe) is not None and not family_notes(pipe)
    assert image_size(pipe, protocol.resolution) == (32, 32)
    rows = found.images.flatten(1)
    assert float((rows[0] - rows[-1]).abs().mean()) > 1e-3  # prompts and seeds count


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "wan", "cogview4", "prx"])
def test_guidance_acts_whatever_it_is_called(name: str) -> None:
    pipe = randomised(RECENT[name])
    made = [images(pipe, protocol_for(name, guidance=g)) for g in (1.0, 3.0, 7.0)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert float((made[a] - made[b]).abs().max()) > 1e-3
    with pytest.raises(
        AquabitError, match=r"guidance is 0\.5, .*changes nothing|does not make these images: guidance"
    ):
        images(pipe, protocol_for(name, guidance=0.5))


def test_frames_are_images_of_their_sample() -> None:
    pipe, protocol = randomised(wan), protocol_for("wan")
    made = images(pipe, protocol)
    alone = images(pipe, replace(protocol, micro_batch=1))
    assert len(made) == 2 * FRAMES and torch.allclose(made, alone, atol=2e-4)
    assert len(images(pipe, replace(protocol, frames=5))) == 2 * 5
    with pytest.raises(AquabitError, match="frames is 9, but ZImagePipeline takes no number of frames"):
        images(randomised(RECENT["z-image"]), protocol_for("z-image", frames=9))


def config_of(pipe: Any, **more: Any) -> Any:
    space = make_space(trace(pipe), fingerprint(denoiser_of(pipe)), schemes=["usq4"])
    calibration = Calibration(
        images=4, steps=2, guidance=3.0, resolution=32, conditions=PROMPTS, **more.pop("calibration", {})
    )
    return replace(space.uniform("usq4", 8), calibration=calibration, **more)


def test_lists_of_tensors_are_corrected_and_tuned(tmp_path: Path) -> None:
    """Z-Image gives and takes a list of one tensor a sample."""
    pipe, bank, protocol = randomised(RECENT["z-image"]), str(tmp_path), protocol_for("z-image")
    config = config_of(pipe)
    plain = images(aquabit.quantize(pipe, config, bank=bank).pipe, protocol)
    corrected = aquabit.quantize(pipe, config, bank=bank, correct=True)
    assert corrected.statistics is not None and corrected.statistics.branches == 2
    assert not torch.equal(images(corrected.pipe, protocol), plain)
    settings = FineTuning(steps=2, images=4, batch=2)
    tuned = aquabit.quantize(pipe, config, bank=bank, finetune=settings)
    assert tuned.config.tuned is not None and torch.isfinite(images(tuned.pipe, protocol)).all()


def test_step_groups_of_videos_follow_steps(tmp_path: Path) -> None:
    pipe = randomised(wan)
    config = config_of(pipe, calibration={"frames": FRAMES})
    config = config.with_layer(next(iter(config.layers)), "usq4", (6, 8), steps=StepGroups(2, (0, 1)))
    assert torch.isfinite(
        images(aquabit.quantize(pipe, config, bank=str(tmp_path)).pipe, protocol_for("wan"))
    ).all()


def test_guidance_one_is_off_in_every_family() -> None:
    """Z-Image counts it from 0: a call of its denoiser then holds one row a sample."""
    pipe, rows = randomised(RECENT["z-image"]), list[int]()
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    images(pipe, protocol_for("z-image", guidance=1.0))
    assert rows == [2, 2]


def test_fine_tuning_knows_the_branches_of_guidance(tmp_path: Path) -> None:
    """Z-Image puts the conditional half first and turns the sign; Stable Diffusion the other way round;
    Qwen-Image makes a call of each."""
    for pipe, first in ((randomised(RECENT["z-image"]), True), (tiny("sd"), False)):
        side = 32 if first else None
        calibration = Calibration(images=2, steps=2, guidance=3.0, conditions=PROMPTS, resolution=side)
        assert replay_recorder(pipe)(calibration, 1).conditional_first is first
    settings = FineTuning(steps=2, images=4, batch=2, guidance=3.0)
    pipe = randomised(RECENT["qwen-image"])
    with pytest.raises(AquabitError, match="does not combine the two halves"):
        aquabit.quantize(pipe, config_of(pipe), bank=str(tmp_path), finetune=settings)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", [n for n in RECENT if n not in ("prx", "hidream")])
def test_the_images_are_those_of_the_pipelines_own_call(name: str, guidance: float) -> None:
    """Embeddings that are made once, and guidance under its name, come to what the pipeline makes itself."""
    pipe, protocol = randomised(RECENT[name]), protocol_for(name, guidance=guidance)
    takes = inspect.signature(type(pipe).__call__).parameters
    more = {"use_resolution_binning": False, "clean_caption": False, "intermediate_timesteps": None}
    scale = {"true_cfg_scale": guidance} if name == "qwen-image" else {"guidance_scale": guidance}
    if name == "qwen-image":
        scale["negative_prompt"] = [""] * 2  # type: ignore[assignment]
    if name == "z-image":
        scale["guidance_scale"] -= 1.0
    with torch.inference_mode():
        made = pipe(
            prompt=list(PROMPTS[:2]),
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            num_inference_steps=2,
            height=32,
            width=32,
            output_type="pt",
            **({"num_frames": FRAMES} if name in VIDEO else {}),
            **{k: v for k, v in more.items() if k in takes},
            **scale,
        )
    own = made.frames.flatten(0, 1) if name in VIDEO else made.images
    assert torch.allclose(images(pipe, protocol), own, atol=2e-4)


def test_videos_are_measured_frame_by_frame(tmp_path: Path) -> None:
    pipe, protocol = randomised(wan), protocol_for("wan", objective="psnr")
    graph, own = trace(pipe), fingerprint(denoiser_of(pipe))
    evaluator = Evaluator(pipe, graph, Bank(str(tmp_path)), own)
    space = make_space(graph, own, schemes=["usq4", "usq2"])
    better, worse = (evaluator.measure(space.uniform(s, 8), protocol) for s in ("usq4", "usq2"))
    assert better.measurement.metrics["psnr"] > worse.measurement.metrics["psnr"] > 5
    assert len(evaluator.full_precision(protocol)) == 2 * FRAMES
    probed = evaluator.probe(next(iter(space.choices)), ["usq2"], [8], protocol, space.uniform("usq4", 8), 8)
    assert probed["usq2"]["damage"] > 0
