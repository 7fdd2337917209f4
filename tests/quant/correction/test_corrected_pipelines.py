"""Corrections end to end on tiny pipelines: measured, saved with the artifact, loaded, switched off; and
as evaluators use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ImagePipelineOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquabit import packing
from aquabit.measuring.evaluator import Evaluator
from aquabit.pipelines import Adapter, denoiser_of, load, noise_statistics, trace
from aquabit.quant.bank import Bank
from aquabit.quant.correction.corrector import corrected_, statistics_of
from aquabit.quant.correction.sampling import watchers_of
from aquabit.quant.correction.statistics import Statistics
from aquabit.quant.model import QuantizedDenoiser, fingerprint
from aquabit.scheme import AquabitError, Calibration, Protocol, QuantConfig
from aquabit.space import make_space
from tests.conftest import SCHEDULER, tiny_pipeline
from tests.families import TINY

WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
CALIBRATION = Calibration(images=16, steps=5, guidance=2.0)
PROTOCOL = Protocol(images=6, steps=5, micro_batch=6, guidance=2.0, seed=3)


def lively(pipe: DiffusionPipeline, seed: int = 0) -> DiffusionPipeline:
    """Random weights such that outputs depend on what goes in; new networks end in zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in denoiser_of(pipe).parameters():
        torch.nn.init.normal_(
            p, std=0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1, generator=generator
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit_pipeline(scheduler: Any) -> DiTPipeline:
    """diffusers' own: learned variances, latents, every image stepped twice under guidance; the class
    after the last is 1000."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return lively(DiTPipeline(net.eval(), vae.eval(), scheduler))


def uniform(
    pipe: DiffusionPipeline, scheme: str = "usq3", act: int = 8, calibration: Calibration = CALIBRATION
) -> QuantConfig:
    found = make_space(trace(pipe), fingerprint(denoiser_of(pipe))).uniform(scheme, act)
    return replace(found, calibration=calibration)


def images(pipe: DiffusionPipeline, protocol: Protocol = PROTOCOL) -> Tensor:
    torch.manual_seed(0)  # DiTPipeline gives the sampler no generator
    adapter = Adapter(pipe)
    return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


@pytest.mark.parametrize(("kind", "eta", "correction"), [("dit", 0.0, "cnc+bc"), ("unet", 1.0, "cnc+bc+vsc")])
def test_an_artifact_carries_its_correction(tmp_path: Path, kind: str, eta: float, correction: str) -> None:
    """Guidance as in Stable Diffusion: two branches in one batch."""
    pipe, protocol = lively(tiny_pipeline(kind)), replace(PROTOCOL, eta=eta)
    pipe.scheduler = DDIMScheduler(**SCHEDULER, beta_end=0.004)  # so that few pixels are clipped
    if kind == "unet":
        pipe.denoiser.conv_out.weight.data.mul_(2)
    config = uniform(pipe, "usq3" if kind == "dit" else "usq2", calibration=replace(CALIBRATION, eta=eta))
    full, before = images(pipe, protocol), set(vars(pipe.scheduler))
    packed = packing.quantize(pipe, config, correct=correction, bank=str(tmp_path / "bank"))
    assert set(vars(pipe.scheduler)) == before and not watchers_of(pipe.denoiser)
    assert torch.equal(images(pipe, protocol), full)  # the given pipeline still samples as it did
    found = packed.statistics
    assert found is not None and found.branches == 2 and found.about.images == 16 and found.about.calls == 1
    assert found.about.weights[2] == pytest.approx((2.0, -1.0))
    assert packed.config.correction == correction
    packed.save(tmp_path / "packed")
    loaded = load(str(tmp_path / "packed"))
    own = statistics_of(loaded.denoiser)
    assert own is not None and own.digest == found.digest
    corrected = images(loaded, protocol)
    assert distance(corrected, images(packed.pipe, protocol)) < 1e-6
    plain = packing.quantize(pipe, config, bank=str(tmp_path / "bank"))
    assert plain.statistics is None and statistics_of(plain.pipe.denoiser) is None
    uncorrected = images(plain.pipe, protocol)

    given = {"images": 6, "seed": 3, "conditions": tuple(range(6))}
    generated = packing.generate(
        str(tmp_path / "packed"), **given
    )  # steps, eta and guidance are the calibration's
    moved = distance(corrected, uncorrected)
    if (
        kind == "dit"
        # a random U-Net's noise has hardly a slope or bias, and vsc takes noise away: single images move
    ):
        assert distance(corrected, full) < 0.8 * distance(uncorrected, full)
    assert (
        distance(generated, corrected) < moved / 20
    )  # other kernels: single activations round to the next of 256 levels
    without = packing.generate(loaded, correction="none", **given)
    assert distance(without, uncorrected) < moved / 20
    assert torch.equal(
        packing.generate(loaded, **given), packing.generate(loaded, correction=correction, **given)
    )  # none did not stay
    with pytest.raises(AquabitError, match="of 5 steps, the sampler makes 7"):
        packing.generate(loaded, steps=7, **given)
    assert packing.generate(loaded, steps=7, correction="none", **given).isfinite().all()
    with pytest.raises(AquabitError, match="of guidance 2"):
        packing.generate(loaded, guidance=3.0, **given)
    plain.save(tmp_path / "packed")  # over the other one
    assert not [k for k in load_file(tmp_path / "packed" / WEIGHTS) if k.startswith("noise/")]


def test_artifacts_whose_statistics_are_missing_damaged_or_anothers(tmp_path: Path) -> None:
    pipe = lively(tiny_pipeline("dit"))
    small = replace(CALIBRATION, images=2, steps=2)
    config, bank = uniform(pipe, calibration=small), str(tmp_path / "bank")
    packing.quantize(pipe, config, correct=True, bank=bank).save(tmp_path / "a")
    packing.quantize(pipe, uniform(pipe, "usq4", calibration=small), correct=True, bank=bank).save(
        tmp_path / "b"
    )
    file, recipe = tmp_path / "a" / WEIGHTS, tmp_path / "a" / "denoiser" / "config.json"
    whole, text = load_file(file), recipe.read_text()
    other = json.loads((tmp_path / "b" / "denoiser" / "config.json").read_text())["quantization_config"][
        "noise"
    ]
    value = json.loads(text)
    value["quantization_config"]["noise"] = other
    recipe.write_text(json.dumps(value))
    with pytest.raises(AquabitError, match=r"of configuration .* measure them for this one"):
        load(str(tmp_path / "a"))
    del value["quantization_config"]["noise"]
    recipe.write_text(json.dumps(value))
    with pytest.raises(
        AquabitError, match="holds no noise statistics; run `aquabit quantize --correct` again"
    ):
        load(str(tmp_path / "a"))
    recipe.write_text(text)
    save_file({k: v for k, v in whole.items() if k != "noise/k"}, file)
    with pytest.raises(AquabitError, match="no usable noise statistics"):
        load(str(tmp_path / "a"))
    plain = packing.quantize(pipe, config, bank=bank)
    with pytest.raises(AquabitError, match="needs noise statistics, which this model lacks"):
        packing.generate(plain.pipe, 2, correction="cnc")


def test_what_the_sampler_refuses_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = lively(tiny_pipeline("dit"))
    monkeypatch.setattr(packing, "noise_statistics", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(AquabitError, match="DDIM with eta 0 adds none"):
        packing.quantize(pipe, uniform(pipe), correct="cnc+bc+vsc", bank=str(tmp_path / "bank"))
    with pytest.raises(AquabitError, match="correction 'cnc\\+bcc' is unknown"):
        packing.quantize(pipe, uniform(pipe), correct="cnc+bcc", bank=str(tmp_path / "bank"))


def measured(
    pipe: DiffusionPipeline, folder: Path, calibration: Calibration, scheme: str = "usq3"
) -> tuple[QuantizedDenoiser, Statistics]:
    """A pipeline whose denoiser is quantized in place, in dense mode, and its statistics."""
    config = uniform(pipe, scheme, calibration=calibration)
    model = QuantizedDenoiser(denoiser_of(pipe), trace(pipe), Bank(folder), config.fingerprint)
    return model, noise_statistics(pipe, model, config, calibration)


@pytest.mark.parametrize(
    ("scheduler", "correction"),
    [
        (lambda: DDIMScheduler(**SCHEDULER), "cnc+bc"),
        (lambda: DDPMScheduler(num_train_timesteps=1000, clip_sample=False), "cnc+bc+vsc"),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_dit_pipelines_of_diffusers(tmp_path: Path, scheduler: Any, correction: str, guidance: float) -> None:
    """Learned variances beside the noise; under guidance both halves of a batch are one image in two
    branches."""
    pipe = tiny_dit_pipeline(scheduler())
    calibration = replace(CALIBRATION, guidance=guidance, conditions=(1, 2, 3, 4, 5))
    protocol = replace(PROTOCOL, guidance=guidance, conditions=(1, 2, 3))
    full = images(pipe, protocol)
    _, found = measured(pipe, tmp_path, calibration)
    plain = images(pipe, protocol)
    expected = (1.0,) if guidance == 1 else (guidance, 1 - guidance)
    assert found.branches == len(expected) and found.about.images == 16 and found.estimate.bias.shape[2] == 4
    for row in found.about.weights:
        assert row == pytest.approx(expected, abs=2e-3)
    corrected_(pipe.transformer, pipe.scheduler, found, correction)
    assert distance(images(pipe, protocol), full) < distance(plain, full)
    assert distance(images(pipe, protocol), images(pipe, protocol)) == 0
    with pytest.raises(AquabitError, match="guidance"):
        images(pipe, replace(protocol, guidance=5.0))


class TokenPipeline(DiffusionPipeline):
    """Flux as far as its transformer goes: tokens [n, t, c], flow matching."""

    def __init__(self, transformer: Any, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 4,
        output_type: str = "np",
    ) -> Any:
        x = randn_tensor((batch_size, 16, 4), generator, torch.device("cpu"), torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        places = torch.cat(
            [
                torch.zeros(16, 1),
                *(
                    v.reshape(16, 1)
                    for v in torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
                ),
            ],
            1,
        )
        for t in self.scheduler.timesteps:
            velocity = self.transformer(
                hidden_states=x,
                timestep=t.expand(batch_size) / 1000,
                guidance=torch.ones(batch_size),
                pooled_projections=torch.zeros(batch_size, 12),
                encoder_hidden_states=torch.zeros(batch_size, 3, 24),
                txt_ids=torch.zeros(3, 3),
                img_ids=places,
                return_dict=False,
            )[0]
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
        return ImagePipelineOutput(
            images=(x / 4 + 0.5).clamp(0, 1).reshape(batch_size, 4, 4, 4).permute(0, 2, 3, 1).numpy()
        )


def test_tokens_of_a_flow_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = lively(
        TokenPipeline(FluxTransformer2DModel(**TINY["flux"][1]).eval(), FlowMatchEulerDiscreteScheduler())
    )
    protocol, calibration = replace(PROTOCOL, guidance=1.0), replace(CALIBRATION, guidance=1.0)
    full = images(pipe, protocol)
    _, found = measured(pipe, tmp_path, calibration, "usq2")
    plain = images(pipe, protocol)
    assert found.estimate.bias.shape == (5, 1, 4)
    corrected_(pipe.transformer, pipe.scheduler, found, "cnc+bc")
    assert 0 < distance(images(pipe, protocol), full) < distance(plain, full)
    corrected_(pipe.transformer, pipe.scheduler, found, "vsc")
    with pytest.raises(AquabitError, match="unless stochastic_sampling"):
        images(pipe, protocol)


# ---- evaluators


def evaluator(folder: Path, pipe: DiffusionPipeline | None = None) -> Evaluator:
    pipe = pipe or lively(tiny_pipeline("dit"))
    return Evaluator(pipe, trace(pipe), Bank(folder), fingerprint(denoiser_of(pipe)))


def test_measurements_with_and_without_correction(tmp_path: Path) -> None:
    """Two digests, two measurements; statistics are kept in the bank, and measured again where they are
    damaged."""
    one, config = evaluator(tmp_path), uniform(lively(tiny_pipeline("dit")))
    corrected = replace(config, correction="cnc+bc")
    plain, first = one.measure(config, PROTOCOL)[0], one.measure(corrected, PROTOCOL)[0]
    assert (
        plain.config == config.digest != corrected.digest == first.config
        and plain.status == first.status == "ok"
    )
    assert first.metrics != plain.metrics and first.metrics["psnr"] > plain.metrics["psnr"]
    (path,) = tmp_path.glob("noise-*.safetensors")
    kept = path.read_bytes()
    again = one.measure(corrected, PROTOCOL)[0]
    assert again.metrics == first.metrics and one.measure(config, PROTOCOL)[0].metrics == plain.metrics
    assert path.read_bytes() == kept
    for damaged in (kept[:-9], b"", b"x" * len(kept)):
        path.write_bytes(damaged)
        assert one.measure(corrected, PROTOCOL)[0].metrics == first.metrics
        assert path.read_bytes() == kept
    path.unlink()
    assert evaluator(tmp_path).measure(corrected, PROTOCOL)[0].metrics == first.metrics
    other = one.measure(replace(config, correction="bc"), PROTOCOL)[0]
    assert (
        other.metrics != first.metrics and len(list(tmp_path.glob("noise-*"))) == 1
    )  # one measurement serves all corrections
    one.measure(corrected, replace(PROTOCOL, guidance=1.0))
    assert len(list(tmp_path.glob("noise-*"))) == 2  # another sampler, other statistics


def test_a_correction_that_the_sampler_refuses_measures_nothing(tmp_path: Path) -> None:
    config = replace(uniform(lively(tiny_pipeline("dit"))), correction="cnc+vsc")
    with pytest.raises(AquabitError, match="DDIM with eta 0 adds none"):
        evaluator(tmp_path).measure(config, PROTOCOL)
    assert not list(tmp_path.glob("noise-*"))
    assert evaluator(tmp_path).measure(config, replace(PROTOCOL, eta=1.0))[0].status == "ok"


def test_what_cannot_be_corrected_is_a_failed_measurement(tmp_path: Path) -> None:
    """As images that are not finite are: the study goes on."""
    one, config = evaluator(tmp_path), replace(uniform(lively(tiny_pipeline("dit"))), correction="cnc+bc")
    full = one.full_precision(PROTOCOL)
    layer = one.quantized.layers["proj_out_2"]
    handle = layer.register_forward_hook(
        lambda module, args, out: out * float("nan") if module.act < 16 else out
    )
    found = one.measure(config, PROTOCOL)[0]
    handle.remove()
    assert found.status == "failed" and "NaN or infinity" in found.reason
    handle = layer.register_forward_hook(lambda module, args, out: -out if module.act < 16 else out)
    found = one.measure(replace(config, layers={**config.layers}), PROTOCOL)[0]
    handle.remove()
    assert found.status == "failed" and "cnc would divide by" in found.reason
    assert torch.equal(one.full_precision(PROTOCOL), full)


def test_another_configurations_statistics_are_not_taken(tmp_path: Path) -> None:
    one, config = evaluator(tmp_path), uniform(lively(tiny_pipeline("dit")))
    for scheme in ("usq3", "usq4"):
        one.measure(replace(uniform(lively(tiny_pipeline("dit")), scheme), correction="cnc+bc"), PROTOCOL)
    assert len(list(tmp_path.glob("noise-*"))) == 2
    found = one.noise(replace(config, correction="cnc"), Calibration.of(PROTOCOL))
    found.check(config.fingerprint, config.digest)
