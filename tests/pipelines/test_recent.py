"""This year's families, of images and of videos, on tiny pipelines of their real classes."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from PIL import Image
from typer.testing import CliRunner

import aquabit
from aquabit.cli.app import app
from aquabit.graph import layers
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import pool_for
from aquabit.measuring.settings import protocol_for as protocol_of
from aquabit.measuring.tasks import Measure
from aquabit.measuring.where import Where
from aquabit.memory import activation_bytes, peaks
from aquabit.pipelines import (
    FAMILIES,
    denoiser_of,
    family,
    family_notes,
    image_size,
    model_notes,
    replay_recorder,
    trace,
)
from aquabit.pipelines.sizes import frames_argument
from aquabit.quality import QualityMeter, QualityOptions
from aquabit.quant.bank import Bank
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.quant.finetuning.finetune import FineTuning
from aquabit.quant.model import fingerprint
from aquabit.scheme import AquabitError, Calibration, Protocol, StepGroups
from aquabit.space import make_space
from tests.tiny_pipelines import PROMPTS, TINY_PIPELINES, randomised, tiny
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
    if name == "hidream":
        assert {p.task for p in peaks(trace(pipe), 1)} == {"measure", "quantize", "run packed"}
        return
    said = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "model"), "--memory", "--micro-batch", "2", "--json", "-"]
    )
    told = {p["task"]: p for p in json.loads(said.stdout)["peaks"] if p["dtype"] == "float32"}
    assert min(p["bytes"] for p in told.values()) > 0.5e9  # libraries at the least
    assert told["measure"]["parts"]["activations"] > 0
    prompts, packed = tmp_path / "prompts.txt", str(tmp_path / "packed")
    prompts.write_text("\n".join(PROMPTS))
    options = ["--images", "2", "--steps", "2", "--prompts", str(prompts), "--guidance", "3"]
    options += ["--resolution", "32", *(["--frames", str(FRAMES)] if name in VIDEO else [])]
    made = CliRunner().invoke(app, ["generate", packed, "--out", str(tmp_path / "grid.png"), *options])
    assert made.exit_code == 0, made.output
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 + 34 * 8, 2 + 34 * (4 if name in VIDEO else 1))  # two rows a video of 9 frames


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


def test_sound_is_denoised_beside_and_nothing_follows_its_scheduler() -> None:
    """LTX-2 steps a copy of its scheduler for the sound: a step of it is no step of the video."""
    pipe, seen = randomised(RECENT["ltx2"]), list[Any]()

    class Seen(Watcher):
        def begin(self, scheduler: Any) -> None:
            seen.append("begin")

        def advance(self, step: int, run: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((step, tuple(args[0].shape[-2:])))
            return run(*args, **kwargs)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("what follows a scheduler is copied with it")

    with following(pipe.transformer, pipe.scheduler, [Seen()]):
        followed = images(pipe, protocol_for("ltx2"))
    shape = seen[1][1]
    assert seen == ["begin", (0, shape), (1, shape)]
    assert torch.equal(images(pipe, protocol_for("ltx2")), followed)
    graph = trace(pipe)
    assert "LTX2Pipeline makes sound too, and only its images are measured" in model_notes(pipe, graph)[0]
    space = make_space(graph, "0" * 16, schemes=["usq2", "usq8"], pinned={"*audio_*": "usq8"})
    sound = [n for n, node in layers(graph).items() if node["operator"].startswith("audio.")]
    assert len(sound) > 10 and all(len(space.choices[n]) == 1 for n in sound)


@pytest.mark.parametrize("name", ["wan", "ltx2"])
def test_step_groups_of_videos_follow_steps(name: str, tmp_path: Path) -> None:
    pipe = randomised(RECENT[name])
    config = config_of(pipe, calibration={"frames": FRAMES})
    config = config.with_layer(next(iter(config.layers)), "usq4", (6, 8), steps=StepGroups(2, (0, 1)))
    assert torch.isfinite(
        images(aquabit.quantize(pipe, config, bank=str(tmp_path)).pipe, protocol_for(name))
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
    more |= {"stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": guidance}
    more |= {"audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
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
    for found, scheme in ((better, "usq4"), (worse, "usq2")):
        made = torch.cat([i for _, i in evaluator.batches(space.uniform(scheme, 8), protocol)])
        both = (x.unflatten(0, (2, FRAMES)).double() for x in (made, evaluator.full_precision(protocol)))
        change = next(both).diff(dim=1) - next(both).diff(dim=1)
        expected = -10 * change.square().flatten(1).mean(1).log10().mean()
        assert found.measurement.metrics["temporal_psnr"] == pytest.approx(float(expected), rel=1e-5)
    assert len(evaluator.full_precision(protocol)) == 2 * FRAMES
    probed = evaluator.probe(next(iter(space.choices)), ["usq2"], [8], protocol, space.uniform("usq4", 8), 8)
    assert probed["usq2"]["damage"] > 0


def test_temporal_consistency_crosses_processes(tmp_path: Path) -> None:
    randomised(wan).save_pretrained(tmp_path / "model")
    model, bank = open_model(str(tmp_path / "model")), Bank(tmp_path / "bank")
    space = make_space(model.graph, model.fingerprint, schemes=["usq4"])
    protocol = protocol_for("wan", objective="temporal_psnr", frames=5)
    tasks = [Measure(c, protocol) for c in (space.full_precision(), space.uniform("usq4", 8))]
    found = []
    for workers in (1, 2):
        with pool_for(model, bank, Where(workers=workers)) as pool:
            found.append([m.metrics for _, (m, _) in sorted(pool.run(tasks), key=lambda row: row[0])])
    assert found[0] == found[1] and found[0][0]["temporal_psnr"] == 100 > found[0][1]["temporal_psnr"] > 5


def test_temporal_consistency_is_an_objective_of_videos_alone(tmp_path: Path) -> None:
    """Refused before anything is made where there are no videos, and where they came out as one frame."""
    pipe, bank, protocol = randomised(wan), str(tmp_path), protocol_for("wan", objective="temporal_psnr")
    meter = QualityMeter(QualityOptions(), None, tmp_path)
    assert protocol_of(open_model(pipe), protocol, meter).direction() == "max"
    said = "objective 'temporal_psnr' of .* needs a pipeline of videos, and more than one frame"
    one = replace(protocol, frames=1)
    for model, asked in ((pipe, one), ("digits-unet", replace(protocol, conditions=None, frames=None))):
        with pytest.raises(AquabitError, match=said):
            protocol_of(open_model(model), asked, meter)
    evaluator = Evaluator(pipe, trace(pipe), Bank(bank), fingerprint(denoiser_of(pipe)))
    full = make_space(evaluator.graph, evaluator.fingerprint).full_precision()
    with pytest.raises(AquabitError, match=r"WanPipeline made 1 frame a sample; ask for more by --frames"):
        evaluator.measure(full, one)
    assert "temporal_psnr" not in evaluator.measure(full, replace(one, objective="psnr")).measurement.metrics


def test_every_family_has_a_tiny_pipeline_that_goes_through_the_whole() -> None:
    """Those of before are in ``test_families``, that of upscalers in ``test_from_pictures``."""
    made = {family(make()).name for make in (*RECENT.values(), *TINY_PIPELINES.values()) if family(make())}  # type: ignore[union-attr]
    assert {f.name for f in FAMILIES} - made == {"amused", "krea2", "pixels-class", "sd-upscale"}


def test_families_say_which_make_videos() -> None:
    said = {name for f in FAMILIES if f.videos for name in f.pipelines}
    known = {name for f in FAMILIES for name in f.pipelines}
    for name, make in RECENT.items():
        pipe = type(make())
        assert (
            (frames_argument(object.__new__(pipe)) is not None) == (pipe.__name__ in said) == (name in VIDEO)
        )
    assert said < known
    shown = CliRunner().invoke(app, ["models"]).output
    assert "videos from prompts; for example Wan-AI" in " ".join(shown.split())


def test_memory_of_several_denoisers_is_that_of_the_largest() -> None:
    """Each with the inputs of its own first call."""
    both = trace(randomised(lambda: wan(second=True)))
    assert activation_bytes(both) == activation_bytes(trace(randomised(wan))) > 0
