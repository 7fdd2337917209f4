"""Noise statistics under guidance, of other samplers than the one that runs, and in files that are
damaged."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquabit.quant.correction.corrector import Corrector, check_correction
from aquabit.quant.correction.guidance import guidance_weights
from aquabit.quant.correction.noise import NoiseEstimate, Uncorrectable
from aquabit.quant.correction.noise_measuring import measure_noise
from aquabit.quant.correction.sampling import following
from aquabit.quant.correction.statistics import Statistics
from aquabit.scheme import AquabitError
from tests.chains import NOISY, OPEN, STILL, Given, Sampler, known, sampled

DDIM, NOISY_DDIM = STILL[0], NOISY[1]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- weights and branches


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 3.5, 7.5])
def test_the_weights_of_guidance_are_solved_for(g: float) -> None:
    cond, uncond = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    combined = uncond + g * (cond - uncond)
    for order, expected in (((uncond, cond), (1 - g, g)), ((cond, uncond), (g, 1 - g))):
        found, error = guidance_weights(order, combined)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        assert error < 1e-9


def test_three_branches_and_branches_that_are_equal() -> None:
    a, b, c = (normal(2, 3, 4, 4, seed=i) for i in range(3))
    found, error = guidance_weights((a, b, c), 0.2 * a - 1.5 * b + 2.3 * c)
    np.testing.assert_allclose(found, (0.2, -1.5, 2.3), atol=1e-9)
    assert error < 1e-9 and guidance_weights((a,), a) == ((1.0,), 0.0)
    found, _ = guidance_weights((a, b, b), 0.4 * a + 0.6 * b)
    np.testing.assert_allclose(found, (0.4, 0.3, 0.3), atol=1e-9)
    found, error = guidance_weights((a, a), a)
    assert sum(found) == pytest.approx(1) and error < 1e-9


def test_a_combination_that_is_no_weighted_sum_has_an_error() -> None:
    a, b = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    assert guidance_weights((a, b), normal(2, 3, 4, 4, seed=2))[1] > 0.3
    assert np.isnan(guidance_weights((a, b), a * float("nan"))[1])


@pytest.mark.parametrize("slope", [True, False])
def test_the_variance_after_guidance_is_that_of_correlated_residuals(slope: bool) -> None:
    """w^T Sigma w with the covariance of the branches, by simulation; branches taken as independent would
    be far off."""
    g, k, sigma, rho = 4.0, np.array([0.2, -0.1]), np.array([0.3, 0.2]), 0.8
    cross = rho * sigma.prod()
    covariance = np.broadcast_to(
        np.array([[sigma[0] ** 2, cross], [cross, sigma[1] ** 2]])[:, :, None], (2, 2, 2)
    )
    statistics = known(
        DDIM.made(3),
        k=k,
        variance=np.diagonal(covariance[:, :, 0])[:, None],
        covariance=covariance,
        weights=(1 - g, g),
    )
    rng = np.random.default_rng(0)
    r = rng.multivariate_normal(np.zeros(2), covariance[:, :, 0], size=200_000)
    guided = (r / (1 + k) if slope else r) @ np.array([1 - g, g])
    np.testing.assert_allclose(statistics.combined(1, slope), guided.var(), rtol=0.01)
    assert guided.var() < 0.6 * ((np.array([1 - g, g]) * sigma) ** 2).sum()


def branches(k: np.ndarray, bias: np.ndarray) -> tuple[Any, Any]:
    """Full-precision conditional and unconditional outputs for a sample, and what quantization makes of
    each."""

    def full(x: Tensor, b: int) -> Tensor:
        return torch.tanh(x * (0.5 + 0.4 * b)) + 0.3 * b

    def quantized(x: Tensor, b: int) -> Tensor:
        return (1 + k[b]) * full(x, b) + torch.from_numpy(bias[b]).view(1, -1, 1, 1)

    return full, quantized


def together(branch: Any) -> Given:
    """Both branches in one batch."""
    return Given(lambda x, t: torch.cat([branch(part, b) for b, part in enumerate(x.chunk(2))]))


def one_by_one(branch: Any) -> Given:
    """A pipeline calls once per branch."""
    count = iter(range(10**6))
    return Given(lambda x, t: branch(x, next(count) % 2))


def sampled_in_calls(denoiser: Given, scheduler: Any, x: Tensor, steps: int, guidance: float) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        uncond, cond = denoiser(x, t), denoiser(x, t)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.parametrize("calls", [1, 2])
def test_each_branch_is_corrected_by_its_own(calls: int) -> None:
    """k and bias of both branches known: the images are full precision's, before any rounding of a common
    correction."""
    k, bias, g = np.array([0.3, -0.2]), np.array([[0.2, -0.1], [-0.3, 0.4]]), 2.5
    full, quantized = branches(k, bias)
    statistics = known(DDIM.made(5), k=k, bias=bias, weights=(1 - g, g), calls=calls)
    x = normal(3, 2, 4, 4)

    def images(branch: Any, watchers: list[Corrector]) -> Tensor:
        denoiser, scheduler = together(branch) if calls == 1 else one_by_one(branch), DDIM.made(5)
        with following(denoiser, scheduler, watchers):
            if calls == 1:
                return sampled(denoiser, scheduler, x, 5, guidance=g)
            return sampled_in_calls(denoiser, scheduler, x, 5, g)

    wanted, plain = images(full, []), images(quantized, [])
    torch.testing.assert_close(
        images(quantized, [Corrector(statistics, "cnc+bc")]), wanted, rtol=1e-6, atol=1e-6
    )
    assert float((plain - wanted).abs().max()) > 0.1


def test_without_cnc_the_bias_is_that_of_the_whole_error() -> None:
    statistics = known(DDIM.made(2), k=0.5, bias=0.1, mean_eps=2.0)
    for correction, expected in (("bc", 3 - 1.1), ("cnc+bc", (3 - 0.1) / 1.5), ("cnc", 3 / 1.5)):
        corrector = Corrector(statistics, correction)
        corrector.begin(DDIM.made(2))
        torch.testing.assert_close(
            corrector.output(0, 0, torch.full((1, 2, 3, 3), 3.0)), torch.full((1, 2, 3, 3), expected)
        )


@pytest.mark.parametrize(
    "shape", [(3, 4, 5, 5), (3, 6, 4), (3, 4, 2, 3, 3)], ids=["images", "tokens", "video"]
)
def test_channels_of_every_layout(shape: tuple[int, ...]) -> None:
    shift = np.arange(4) / 8
    corrector = Corrector(known(DDIM.made(2), bias=shift, channels=4), "cnc+bc")
    corrector.begin(DDIM.made(2))
    across = (1, 1, 4) if len(shape) == 3 else (1, 4, *[1] * (len(shape) - 2))
    x = normal(*shape)
    torch.testing.assert_close(corrector.output(0, 0, x), x - torch.from_numpy(shift).view(across))


def test_variances_that_the_denoiser_learned_are_left_alone() -> None:
    corrector = Corrector(known(DDIM.made(2), k=0.5, bias=1.0), "cnc+bc")
    corrector.begin(DDIM.made(2))
    x = normal(2, 4, 3, 3)
    found = corrector.output(0, 0, x)
    assert torch.equal(found[:, 2:], x[:, 2:])
    torch.testing.assert_close(found[:, :2], (x[:, :2] - 1) / 1.5)


def rescaled(denoiser: Given, scheduler: Any, x: Tensor, steps: int, g: float) -> Tensor:
    """Guidance whose result is scaled to the conditional branch's deviation (guidance_rescale)."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        uncond, cond = denoiser(torch.cat([x, x]), t).chunk(2)
        combined = uncond + g * (cond - uncond)
        combined = combined * (cond.std((1, 2, 3), keepdim=True) / combined.std((1, 2, 3), keepdim=True))
        x = scheduler.step(
            combined, t, x, **({"eta": 1.0} if type(scheduler).__name__ == "DDIMScheduler" else {})
        ).prev_sample
    return x


def test_outputs_are_corrected_before_guidance_is_rescaled() -> None:
    k, bias, g = np.array([0.3, -0.2]), np.array([[0.2, -0.1], [-0.3, 0.4]]), 4.0
    full, quantized = branches(k, bias)
    images = []
    for branch, correction in ((full, None), (quantized, "cnc+bc")):
        scheduler, denoiser = NOISY_DDIM.made(4), together(branch)
        statistics = known(scheduler, k=k, bias=bias, weights=(1 - g, g))
        torch.manual_seed(0)
        with following(denoiser, scheduler, [Corrector(statistics, correction)]):
            images.append(rescaled(denoiser, scheduler, normal(2, 2, 4, 4), 4, g))
    torch.testing.assert_close(images[1], images[0], rtol=1e-6, atol=1e-6)
    with (
        following(denoiser, scheduler, [Corrector(replace_variance(statistics), "cnc+vsc")]),
        pytest.raises(AquabitError, match=r"guidance_rescale.*use cnc\+bc"),
    ):
        rescaled(denoiser, scheduler, normal(2, 2, 4, 4), 4, g)


def replace_variance(statistics: Statistics) -> Statistics:
    return replace(
        statistics, estimate=replace(statistics.estimate, covariance=statistics.estimate.covariance + 1e-4)
    )


# ---- measuring


def measured(pairs: tuple[Any, Any], sample: Any, sampler: Sampler = DDIM, steps: int = 3) -> Statistics:
    """Statistics of ``pairs`` (full precision, quantized), which a switch exchanges."""
    now = {"give": pairs[1]}
    denoiser, scheduler = Given(lambda x, t: now["give"](x, t)), sampler.made(steps)

    @contextmanager
    def full() -> Any:
        now["give"] = pairs[0]
        yield denoiser
        now["give"] = pairs[1]

    runs = [
        ((lambda seed=seed: sample(denoiser, scheduler, normal(2, 2, 6, 6, seed=seed))), 2)
        for seed in range(4)
    ]
    found = measure_noise(denoiser, scheduler, runs, full, "model", "config")
    assert not denoiser._forward_hooks and not denoiser._forward_pre_hooks and "step" not in vars(scheduler)
    return found


@pytest.mark.parametrize("calls", [1, 2])
def test_what_was_put_in_is_measured(calls: int) -> None:
    k, bias, g = np.array([0.3, -0.2]), np.array([[0.2, -0.1], [-0.3, 0.4]]), 2.5
    if calls == 1:
        pairs = tuple(
            (lambda x, t, b=b: torch.cat([b(p, i) for i, p in enumerate(x.chunk(2))]))
            for b in branches(k, bias)
        )
        found = measured(pairs, lambda d, s, x: sampled(d, s, x, 3, guidance=g))
    else:
        order = [iter(range(10**6)) for _ in range(2)]
        pairs = tuple(
            (lambda x, t, b=b, o=o: b(x, next(o) % 2)) for b, o in zip(branches(k, bias), order, strict=True)
        )
        found = measured(pairs, lambda d, s, x: sampled_in_calls(d, s, x, 3, g))
    np.testing.assert_allclose(found.estimate.k, np.tile(k, (3, 1)), atol=1e-9)
    np.testing.assert_allclose(found.estimate.bias, np.tile(bias, (3, 1, 1)), atol=1e-9)
    np.testing.assert_allclose(found.about.weights, np.tile([1 - g, g], (3, 1)), atol=1e-9)
    assert found.about.calls == calls and found.about.images == 8 and found.branches == 2
    np.testing.assert_allclose(found.estimate.variance, 0, atol=1e-12)
    assert found.digest == replace(found, about=replace(found.about)).digest
    assert len(found.table()) == 6


def test_no_noise_has_statistics_too() -> None:
    found = measured(
        (lambda x, t: torch.tanh(x), lambda x, t: torch.tanh(x)), lambda d, s, x: sampled(d, s, x, 3)
    )
    assert np.isinf(found.estimate.snr).all() and not found.estimate.k.any() and len(found.digest) == 16


def test_outputs_that_are_changed_in_place_were_recorded_before() -> None:
    def sample(denoiser: Given, scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            output = denoiser(x, t)
            x = scheduler.step(output.clone(), t, x).prev_sample
            output.mul_(5)
        return x

    found = measured((lambda x, t: torch.tanh(x), lambda x, t: 1.25 * torch.tanh(x)), sample)
    np.testing.assert_allclose(found.estimate.k, 0.25, atol=1e-9)


def test_guidance_in_some_steps_only_is_refused() -> None:
    def sample(denoiser: Given, scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(3)
        for i, t in enumerate(scheduler.timesteps):
            output = denoiser(torch.cat([x, x]) if i else x, t)
            x = scheduler.step(output[: len(x)], t, x).prev_sample
        return x

    with pytest.raises(AquabitError, match="does not act in every step"):
        measured((lambda x, t: torch.tanh(x), lambda x, t: 1.25 * torch.tanh(x)), sample)


def test_outputs_that_are_not_finite_are_no_statistics() -> None:
    for guidance in (None, 3.0):
        with pytest.raises(Uncorrectable, match="NaN or infinity"):
            measured(
                (lambda x, t: x, lambda x, t: x * float("nan")),
                lambda d, s, x, g=guidance: sampled(d, s, x, 3, guidance=g),
            )


def test_steps_that_change_between_batches_are_refused() -> None:
    steps = iter((3, 3, 4, 4))
    with pytest.raises(AquabitError, match="change from batch to batch"):
        measured((lambda x, t: x, lambda x, t: x), lambda d, s, x: sampled(d, s, x, next(steps)))


@pytest.mark.parametrize("sampler", [*NOISY, *STILL], ids=str)
def test_every_sampler_can_be_measured(sampler: Sampler) -> None:
    found = measured(
        (lambda x, t: torch.tanh(x), lambda x, t: 1.25 * torch.tanh(x) + 0.5),
        lambda d, s, x: sampled(d, s, x, 3, sampler.eta),
        sampler,
    )
    np.testing.assert_allclose(found.estimate.k, 0.25, atol=1e-5)
    np.testing.assert_allclose(found.estimate.bias, 0.5, atol=1e-5)
    found.check_sampler(sampler.made(3))


# ---- statistics of something else


def run_with(
    statistics: Statistics,
    scheduler: Any,
    correction: str = "cnc+bc",
    guidance: float | None = None,
    steps: int = 5,
    eta: float = 0.0,
) -> Tensor:
    denoiser = Given(
        lambda x, t: torch.cat(
            [torch.tanh(p) * (1 + b) for b, p in enumerate(x.chunk(1 if guidance is None else 2))]
        )
    )
    with following(denoiser, scheduler, [Corrector(statistics, correction)]):
        return sampled(denoiser, scheduler, normal(4, 2, 4, 4).float(), steps, eta, guidance=guidance)


def test_statistics_of_another_model_or_configuration() -> None:
    statistics = known(DDIM.made(5))
    statistics.check("model", "config")
    with pytest.raises(AquabitError, match="of model model, this is model other"):
        statistics.check("other")
    with pytest.raises(AquabitError, match="of configuration config, this is configuration other"):
        statistics.check("model", "other")


def test_statistics_of_another_sampler() -> None:
    statistics = known(DDIM.made(5), bias=0.1)
    run_with(statistics, DDIM.made(5))
    with pytest.raises(
        AquabitError, match="of DDIMScheduler, the pipeline samples with EulerDiscreteScheduler"
    ):
        run_with(statistics, diffusers.EulerDiscreteScheduler())
    with pytest.raises(AquabitError, match="of 5 steps, the sampler makes 6"):
        run_with(statistics, DDIM.made(6), steps=6)
    for other in ({"beta_end": 0.03}, {"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}):
        with pytest.raises(AquabitError, match="other settings or timesteps"):
            run_with(statistics, diffusers.DDIMScheduler(**OPEN | other))
    assert (
        run_with(statistics, DDIM.made(6), correction="none", steps=6).isfinite().all()
    )  # nothing is corrected: nothing to refuse
    heun = known_of_heun()
    with pytest.raises(AquabitError, match="not defined for HeunDiscreteScheduler; known samplers"):
        run_with(heun, diffusers.HeunDiscreteScheduler(), steps=3)


def known_of_heun() -> Statistics:
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(3)
    return known(scheduler)


def test_statistics_of_another_guidance() -> None:
    g = 3.0
    statistics = known(DDIM.made(5), bias=0.1, weights=(1 - g, g))
    run_with(statistics, DDIM.made(5), guidance=g)
    with pytest.raises(AquabitError, match="of guidance 3, sampling uses 5; measure them for that"):
        run_with(statistics, DDIM.made(5), guidance=5.0)
    with pytest.raises(
        AquabitError, match=r"of guidance 3 with 2 outputs a step, sampling combines another number"
    ):
        run_with(statistics, DDIM.made(5))
    plain = known(DDIM.made(5), bias=0.1)
    with pytest.raises(AquabitError, match="of guidance 1 with 1 outputs a step"):
        run_with(plain, DDIM.made(5), guidance=g)


def test_a_denoiser_that_runs_more_often() -> None:
    scheduler, denoiser = DDIM.made(3), Given(lambda x, t: x)
    with following(denoiser, scheduler, [Corrector(known(scheduler), "cnc")]):
        scheduler.set_timesteps(3)
        t = scheduler.timesteps[0]
        denoiser(normal(1, 2, 3, 3), t)
        with pytest.raises(AquabitError, match="ran more often in step 1"):
            denoiser(normal(1, 2, 3, 3), t)


def test_sampling_from_an_image_that_is_partly_noise() -> None:
    """Timesteps are left out there: a step takes its own statistics, and those of later steps serve no
    earlier one."""
    scheduler, denoiser = DDIM.made(5), Given(lambda x, t: x)
    statistics = known(scheduler)
    statistics.estimate.k[:] = np.arange(5)[:, None] / 10
    x = normal(1, 2, 3, 3)
    with following(denoiser, scheduler, [Corrector(statistics, "cnc")]):
        scheduler.set_timesteps(5)
        for step in (2, 3, 4):
            t = scheduler.timesteps[step]
            output = denoiser(x, t)
            assert torch.allclose(output, x / (1 + step / 10), rtol=1e-5)
            scheduler.step(output, t, x)
    rows = {f.name: getattr(statistics.estimate, f.name)[2:] for f in fields(statistics.estimate)}
    about = replace(
        statistics.about, timesteps=statistics.about.timesteps[2:], weights=statistics.about.weights[2:]
    )
    late = Statistics(about, *[NoiseEstimate(**rows)] * 3).checked()
    with following(denoiser, scheduler, [Corrector(late, "cnc")]):
        scheduler.set_timesteps(5)
        assert torch.allclose(denoiser(x, scheduler.timesteps[2]), x / 1.2, rtol=1e-5)
        scheduler.set_timesteps(5)
        with pytest.raises(AquabitError, match="begin with step 3, sampling is at step 2; use the strength"):
            denoiser(x, scheduler.timesteps[1])


@pytest.mark.parametrize(
    ("correction", "eta", "said"),
    [("vsc", 0.0, "eta 0 adds none"), ("cnc+bc+match", 0.5, "eta is 0.5"), ("qdrift", 1.0, "eta is 1")],
)
def test_what_eta_does_not_allow(correction: str, eta: float, said: str) -> None:
    """With eta 0 the released code's variance correction never acts; it is refused here, before measuring
    and while sampling."""
    with pytest.raises(AquabitError, match=said):
        check_correction(DDIM.made(5), correction, eta)
    with pytest.raises(AquabitError, match=said):
        run_with(known(DDIM.made(5), variance=0.01), DDIM.made(5), correction, eta=eta)
    check_correction(diffusers.DDPMScheduler(**OPEN), "cnc+vsc", 0.0)
    with pytest.raises(AquabitError, match="clip_sample=True"):
        check_correction(diffusers.DDPMScheduler(), "cnc+vsc", 0.0)


@pytest.mark.parametrize("k", [-0.95, -1.0, -3.0])
def test_slopes_that_cnc_would_divide_by(k: float) -> None:
    slopes = np.zeros((5, 1))
    slopes[3] = k
    statistics = known(DDIM.made(5), k=slopes)
    with pytest.raises(Uncorrectable, match=rf"k is {k:.3g} in step 4"):
        Corrector(statistics, "cnc+bc")
    Corrector(statistics, "bc")


# ---- files


def written(folder: Path) -> Path:
    known(NOISY_DDIM.made(3), k=0.1, bias=0.2, variance=0.3, weights=(-1.0, 2.0)).save(
        folder / "s.safetensors"
    )
    return folder / "s.safetensors"


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    statistics = known(NOISY_DDIM.made(3), k=0.1, bias=0.2, variance=0.3, weights=(-1.0, 2.0))
    found = Statistics.load(written(tmp_path))
    assert found.about == statistics.about and found.digest == statistics.digest
    for part in ("estimate", "low", "high"):
        for f in fields(NoiseEstimate):
            np.testing.assert_array_equal(
                getattr(getattr(found, part), f.name), getattr(getattr(statistics, part), f.name)
            )


def rewritten(path: Path, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    change(tensors, about)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"about": json.dumps(about)})


def _nan(name: str) -> Any:
    return lambda tensors, about: tensors[name].flatten()[:1].fill_(float("nan"))


DAMAGE = {
    **{
        f"{head}{name}": _nan(f"{head}{name}")
        for head in ("", "low.", "high.")
        for name in ("k", "bias", "mean_delta", "var_eps", "snr")
    },
    "var_delta": _nan("var_delta"),
    "cov_eps_delta": _nan("cov_eps_delta"),
    "missing": lambda tensors, about: tensors.pop("covariance"),
    "shape": lambda tensors, about: tensors.update(mean_delta=tensors["mean_delta"][:, :, :1]),
    "fewer steps": lambda tensors, about: about.update(timesteps=about["timesteps"][:-1]),
    "fewer weights": lambda tensors, about: about.update(weights=about["weights"][:-1]),
    "other branches": lambda tensors, about: about.update(weights=[[1.0]] * 3),
    "weights of NaN": lambda tensors, about: about.update(weights=[[float("nan"), 1.0]] * 3),
    "no calls": lambda tensors, about: about.update(calls=0),
    "too many calls": lambda tensors, about: about.update(calls=3),
    "infinite calls": lambda tensors, about: about.update(calls=float("inf")),
    "no fingerprint": lambda tensors, about: about.pop("fingerprint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path)
    rewritten(path, DAMAGE[damage])
    with pytest.raises(AquabitError, match=r"s.safetensors holds no usable noise statistics"):
        Statistics.load(path)


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:100], whole[:-8]):
        path.write_bytes(content)
        with pytest.raises(AquabitError, match="no usable noise statistics"):
            Statistics.load(path)
    save_file({"k": torch.zeros(2)}, path)
    with pytest.raises(AquabitError, match="no usable noise statistics"):
        Statistics.load(path)
    with pytest.raises(AquabitError, match="no usable noise statistics"):
        Statistics.load(tmp_path / "absent.safetensors")
    with pytest.raises(AquabitError, match="could not be written"):
        known(DDIM.made(3)).save(tmp_path / "absent" / "s.safetensors")
