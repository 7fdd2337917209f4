"""Facts of samplers' steps, against numerical derivatives of diffusers' own steps and against samples that
a perfect denoiser sees."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from aquabit.quant.correction.corrector import matched_direction
from aquabit.quant.correction.samplers import SAMPLERS, StepFacts, prediction_type, refuses, step_facts
from aquabit.scheme import AquabitError

STEPS = 7
ADDS_VARIANCE_NOISE = ("DDIMScheduler", "DPMSolverMultistepScheduler")


@dataclass(frozen=True)
class Case:
    """A scheduler, its settings, eta, and how many steps."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    steps: int = STEPS

    def made(self) -> Any:
        scheduler = getattr(diffusers, self.name)(**self.settings)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in self.settings.items() if k != "clip_sample"]
        return "-".join(
            [self.name.removesuffix("Scheduler"), *parts, *([f"eta={self.eta}"] if self.eta else [])]
        )


def _cases() -> list[Case]:
    plain, cases = {"clip_sample": False}, []
    for prediction in ("epsilon", "v_prediction", "sample"):
        own = {"prediction_type": prediction}
        cases += [Case("DDIMScheduler", plain | own, eta) for eta in (0.0, 0.5, 1.0)]
        cases += [Case("DDPMScheduler", plain | own), Case("EulerDiscreteScheduler", own)]
        cases += [
            Case("DPMSolverMultistepScheduler", own | {"algorithm_type": a, "solver_order": 1})
            for a in ("dpmsolver++", "sde-dpmsolver++")
        ]
    cases += [
        Case("EulerAncestralDiscreteScheduler", {"prediction_type": p}) for p in ("epsilon", "v_prediction")
    ]
    cases += [
        Case("DDPMScheduler", plain | {"variance_type": v})
        for v in ("fixed_small", "fixed_small_log", "fixed_large")
    ]
    for spacing in ("linspace", "leading", "trailing"):
        kept = {"timestep_spacing": spacing, "steps_offset": 1}
        cases += [
            Case("DDIMScheduler", plain | kept | {"set_alpha_to_one": False}, 1.0),
            Case("DDPMScheduler", plain | kept),
        ]
        cases += [Case("EulerDiscreteScheduler", kept), Case("EulerAncestralDiscreteScheduler", kept)]
    cases += [Case("DDPMScheduler", plain, steps=1000), Case("DDPMScheduler", plain, steps=13)]
    cases += [
        Case(
            "DDIMScheduler",
            plain | {"beta_schedule": "scaled_linear", "num_train_timesteps": 500},
            1.0,
            steps=13,
        )
    ]
    zero = plain | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for prediction in ("v_prediction", "sample"):
        cases += [Case("DDIMScheduler", zero | {"prediction_type": prediction}, eta) for eta in (0.0, 1.0)]
        cases += [Case("DDPMScheduler", zero | {"prediction_type": prediction})]
    cases += [
        Case(
            "EulerDiscreteScheduler",
            {
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
            },
        )
    ]
    for way in ("use_karras_sigmas", "use_exponential_sigmas"):
        cases += [
            Case("EulerDiscreteScheduler", {way: True}),
            Case("EulerDiscreteScheduler", {way: True, "final_sigmas_type": "sigma_min"}),
        ]
        cases += [
            Case(
                "DPMSolverMultistepScheduler",
                {way: True, "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
            )
        ]
    cases += [
        Case(
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min", "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        )
    ]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 1}
    cases += [
        Case("DPMSolverMultistepScheduler", flow | {"algorithm_type": a})
        for a in ("dpmsolver++", "sde-dpmsolver++")
    ]
    cases += [
        Case("FlowMatchEulerDiscreteScheduler", {"shift": s, "stochastic_sampling": n})
        for s in (1.0, 3.0)
        for n in (False, True)
    ]
    return cases


CASES = _cases()


def exact_output(
    scheduler: Any, alpha: float, sigma: float, x0: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """What a perfect denoiser gives for x = alpha x0 + sigma eps."""
    kind = prediction_type(scheduler)
    if kind in ("flow", "flow_prediction"):
        return eps - x0
    if kind == "v_prediction":  # of x / sqrt(alpha^2 + sigma^2), which keeps the variance
        scale = sqrt(alpha**2 + sigma**2)
        return (alpha * eps - sigma * x0) / scale
    return x0 if kind == "sample" else eps


def advanced(
    case: Case, index: int, output: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | float
) -> torch.Tensor:
    """The next sample that the scheduler's own step ``index`` makes, with ``noise`` as what it draws."""
    scheduler = case.made()
    t = scheduler.timesteps[index]
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = index
        scheduler.is_scale_input_called = True
    drawn = torch.as_tensor(noise, dtype=sample.dtype).expand(sample.shape)
    module = __import__(
        f"diffusers.schedulers.{type(scheduler).__module__.rpartition('.')[2]}", fromlist=["randn_tensor"]
    )
    real = getattr(module, "randn_tensor", None)
    if real is not None:
        module.randn_tensor = lambda *args, **kwargs: drawn.to(kwargs.get("dtype"))
    try:
        kwargs = {"eta": case.eta} if case.name == "DDIMScheduler" else {}
        return scheduler.step(output, t, sample, **kwargs).prev_sample.double()
    finally:
        if real is not None:
            module.randn_tensor = real


def facts_of(case: Case, index: int) -> StepFacts:
    scheduler = case.made()
    if hasattr(scheduler, "_step_index") and index:
        scheduler._step_index = index
    return step_facts(scheduler, scheduler.timesteps[index], case.eta)


def indices(case: Case) -> list[int]:
    last = len(case.made().timesteps) - 1
    return sorted({0, 1, last // 2, last - 1, last})


def level(case: Case, index: int) -> tuple[float, float]:
    """alpha and sigma before a step, by what the scheduler itself adds to clean samples."""
    scheduler = case.made()
    t = scheduler.timesteps[index : index + 1]
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = index  # duplicate timesteps are told apart by it
    mix = scheduler.scale_noise if case.name.startswith("Flow") else None
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    if mix is not None:
        return float(mix(one, t, none)), float(mix(none, t, one))
    return float(scheduler.add_noise(one, none, t)), float(scheduler.add_noise(none, one, t))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coefficient_and_noise_are_those_of_the_step(case: Case) -> None:
    zero = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for index in indices(case):
        facts = facts_of(case, index)
        base = advanced(case, index, zero, zero, 0.0)
        slope = advanced(case, index, zero + 1, zero, 0.0) - base
        noise = advanced(case, index, zero, zero, 1.0) - base
        np.testing.assert_allclose(
            slope, facts.coefficient, rtol=2e-5, atol=2e-6, err_msg=f"C of step {index}"
        )
        np.testing.assert_allclose(noise, facts.noise, rtol=2e-5, atol=2e-6, err_msg=f"s of step {index}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_levels_of_noise_and_the_step_of_a_perfect_denoiser(case: Case) -> None:
    """alpha, sigma from ``add_noise``; the next ones from where x0 and eps, known, end; eps from the exact
    output."""
    x0, eps = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    x0, eps = (v.view(1, 2, 1, 1) for v in (x0, eps))
    for index in indices(case):
        facts = facts_of(case, index)
        np.testing.assert_allclose((facts.alpha, facts.sigma), level(case, index), rtol=1e-5, atol=1e-6)
        sample = facts.alpha * x0 + facts.sigma * eps
        output = exact_output(case.made(), facts.alpha, facts.sigma, x0, eps)
        after = advanced(case, index, output, sample, 0.0).flatten()
        large = case.settings.get("variance_type") == "fixed_large"  # more noise than the step takes away
        np.testing.assert_allclose(after[0], facts.alpha_next, rtol=1e-4, atol=5e-6)
        if not large:
            np.testing.assert_allclose(
                sqrt(float(after[1]) ** 2 + float(facts.noise) ** 2), facts.sigma_next, rtol=1e-4, atol=2e-5
            )
        kind = prediction_type(case.made())
        np.testing.assert_allclose(facts.eps(output, sample, kind), eps, rtol=1e-4, atol=1e-5)
        slope = facts.eps(output + 1, sample, kind) - facts.eps(output, sample, kind)
        np.testing.assert_allclose(slope, facts.gain, rtol=1e-5, atol=1e-7)


def test_every_sampler_is_among_the_cases() -> None:
    assert {case.name for case in CASES} == set(SAMPLERS)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_variances_that_ddpm_denoisers_predict(kind: str) -> None:
    case = Case("DDPMScheduler", {"clip_sample": False, "variance_type": kind})
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(predicted)
    for index in (0, 3, STEPS - 1):
        scheduler = case.made()
        output = torch.cat([zero, predicted], 1)
        facts = step_facts(scheduler, scheduler.timesteps[index], 0.0, output)
        expected = advanced(case, index, output, zero, 1.0)
        found = facts.noise if isinstance(facts.noise, torch.Tensor) else torch.full_like(zero, facts.noise)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
        assert index == STEPS - 1 or found.std() > 0
    with pytest.raises(AquabitError, match="needs a denoiser that predicts its variance"):
        step_facts(case.made(), case.made().timesteps[0], 0.0, torch.zeros(1, 3, 2, 2))


def test_a_variance_type_that_gives_no_number_is_refused() -> None:
    """diffusers takes the root of a logarithm there."""
    scheduler = Case("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large_log"}).made()
    with pytest.raises(AquabitError, match="fixed_large_log"):
        step_facts(scheduler, scheduler.timesteps[0])


def test_what_is_not_known_is_refused() -> None:
    heun = diffusers.HeunDiscreteScheduler()
    heun.set_timesteps(4)
    with pytest.raises(
        AquabitError, match=r"not defined for HeunDiscreteScheduler; known samplers: DDIMScheduler"
    ):
        step_facts(heun, heun.timesteps[0])
    assert "HeunDiscreteScheduler" in str(refuses(heun, ("cnc",))) and refuses(heun, ()) is None
    euler = diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(4)
    euler.register_to_config(prediction_type="original_sample")
    with pytest.raises(AquabitError, match="predicts 'original_sample'"):
        step_facts(euler, euler.timesteps[0])
    old = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min")
    old.set_timesteps(4)
    with pytest.raises(AquabitError, match="not for 'sde-dpmsolver'"):
        step_facts(old, old.timesteps[0])


def test_epsilon_says_nothing_where_there_is_no_signal() -> None:
    """Zero terminal SNR: x0 = (x - eps) / 0."""
    scheduler = Case(
        "DDIMScheduler",
        {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ).made()
    with pytest.raises(AquabitError, match="zero signal"):
        step_facts(scheduler, scheduler.timesteps[0])


SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}


@pytest.mark.parametrize(
    ("name", "settings", "corrections", "said"),
    [
        ("EulerDiscreteScheduler", {}, ("cnc", "bc"), None),
        ("EulerDiscreteScheduler", {}, ("cnc", "match"), None),
        ("EulerDiscreteScheduler", {}, ("vsc",), "adds none"),
        ("EulerAncestralDiscreteScheduler", {}, ("cnc", "bc", "vsc"), None),
        ("EulerAncestralDiscreteScheduler", {}, ("match",), "match is defined for DDIM at eta 0 and Euler"),
        ("DDPMScheduler", {"clip_sample": False}, ("vsc",), None),
        ("DDPMScheduler", {}, ("vsc",), "clip_sample=True"),
        ("DDPMScheduler", {}, ("cnc", "bc"), None),
        ("DDPMScheduler", {"clip_sample": False, "thresholding": True}, ("vsc",), "thresholding=True"),
        ("DDIMScheduler", {}, ("match",), "clip_sample=True"),
        ("DDIMScheduler", {}, ("qdrift",), "clip_sample=True"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, ("vsc",), "thresholding=True"),
        ("DDIMScheduler", {"clip_sample": False}, ("qdrift",), None),
        ("DPMSolverMultistepScheduler", SDE, ("vsc",), None),
        ("DPMSolverMultistepScheduler", SDE | {"thresholding": True}, ("vsc",), "thresholding=True"),
        ("DPMSolverMultistepScheduler", SDE | {"solver_order": 2}, ("vsc",), "order 2"),
        ("DPMSolverMultistepScheduler", {}, ("vsc",), "dpmsolver\\+\\+ adds none"),
        ("DPMSolverMultistepScheduler", {}, ("cnc", "bc"), None),
        ("FlowMatchEulerDiscreteScheduler", {}, ("vsc",), "unless stochastic_sampling"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, ("vsc",), None),
        ("FlowMatchEulerDiscreteScheduler", {}, ("cnc", "bc"), None),
    ],
)
def test_what_is_refused(
    name: str, settings: dict[str, Any], corrections: tuple[str, ...], said: str | None
) -> None:
    reason = refuses(getattr(diffusers, name)(**settings), corrections)
    if said is None:
        assert reason is None
    else:
        assert reason is not None and re.search(said, reason), reason


# ---- the matched sampler


def matched_cases() -> list[tuple[StepFacts, float]]:
    found = []
    for name, settings in (
        ("DDIMScheduler", {"clip_sample": False}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ):
        case = Case(name, settings, steps=20)
        found += [(facts_of(case, i), v) for i in range(20) for v in (0.0, 1e-8, 1e-5, 1e-3, 0.02, 0.3)]
    return found


def test_the_matched_direction_solves_its_equation() -> None:
    """s^2 = C(s)^2 v, C(s) = sqrt(sigma_next^2 - s^2) - alpha_next sigma / alpha; the smaller s; s = 0
    where there is none."""
    solved = 0
    for facts, v in matched_cases():
        t = float(matched_direction(facts, np.array([v]))[0])
        reach = facts.alpha_next * facts.sigma / facts.alpha
        grid = np.linspace(0, facts.sigma_next, 20001)
        left = facts.sigma_next**2 - grid**2 - (grid - reach) ** 2 * v
        if t == facts.sigma_next:
            assert v == 0 or (left[:-1] < 0).all() or (facts.sigma_next - reach) ** 2 * v < 1e-8
            continue
        solved += 1
        assert 0 <= t < facts.sigma_next
        scale = max(facts.sigma_next, reach * v) ** 2
        assert abs(facts.sigma_next**2 - t**2 - (t - reach) ** 2 * v) <= 1e-12 * max(scale, 1)
        assert not (left[grid > t + facts.sigma_next * 1e-4][:-1] > 1e-12).any() or v == 0  # no larger root
    assert solved > 60


def test_the_last_matched_step_takes_nothing() -> None:
    for facts, v in matched_cases():
        if facts.sigma_next == 0:
            assert matched_direction(facts, np.array([v])) == 0


def test_more_residual_needs_more_of_the_direction_while_there_is_a_root() -> None:
    for facts, _ in matched_cases()[::6]:
        values = matched_direction(facts, np.linspace(0, 0.5, 400))
        rooted = (
            values[: int(np.argmax(values[1:] == facts.sigma_next)) + 1]
            if (values[1:] == facts.sigma_next).any()
            else values
        )
        assert (np.diff(rooted) <= 1e-12).all()


def test_nothing_is_matched_where_there_is_no_signal() -> None:
    case = Case(
        "DDIMScheduler",
        {
            "clip_sample": False,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
    )
    facts = facts_of(case, 0)
    assert facts.alpha == 0
    np.testing.assert_array_equal(matched_direction(facts, np.array([0.0, 0.1])), facts.sigma_next)
