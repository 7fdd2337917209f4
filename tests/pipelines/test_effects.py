"""Options that would change nothing are refused; those that change something are not, whatever they are
called. What is asked of a pipeline leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers as d
import pytest
import torch
from diffusers.utils import logging

from aquabit.pipelines import Adapter
from aquabit.quant.correction.sampling import Watcher, following
from aquabit.scheme import AquabitError, Protocol
from tests.tiny_pipelines import PROMPTS, flux, randomised, tiny
from tests.tiny_recent import RECENT, sana
from tests.whole import images

pytestmark = pytest.mark.filterwarnings("ignore")
logging.set_verbosity_error()
PROTOCOL = Protocol(images=2, steps=2, micro_batch=2, guidance=3.0, conditions=PROMPTS)


def shapes_of(module: torch.nn.Module) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape)),
        with_kwargs=True,
    )
    return seen


def test_a_resolution_is_that_of_the_denoiser_not_of_a_list() -> None:
    pipe = randomised(sana)
    seen = shapes_of(pipe.transformer)
    for side in (32, 64):
        assert images(pipe, replace(PROTOCOL, resolution=side)).shape[-1] == side
        assert seen[-1][-1] == side // 2  # pixels a latent


def test_sizes_that_change_nothing_are_refused() -> None:
    pipe = randomised(RECENT["hidream"])  # it scales every size to its own
    with pytest.raises(AquabitError, match=r"resolution is 64, but the denoiser .* the same size"):
        images(pipe, replace(PROTOCOL, resolution=64))

    class Resizes(type(tiny("sd"))):  # type: ignore[misc]  # made small, then enlarged
        def __call__(
            self,
            height: Any = None,
            width: Any = None,
            generator: Any = None,
            num_inference_steps: int = 2,
            guidance_scale: float = 1.0,
            prompt_embeds: Any = None,
            negative_prompt_embeds: Any = None,
        ) -> Any:
            made = (
                super()
                .__call__(
                    None,
                    16,
                    16,
                    num_inference_steps,
                    guidance_scale=guidance_scale,
                    generator=generator,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    output_type="pt",
                )
                .images
            )
            return SimpleNamespace(images=torch.nn.functional.interpolate(made, (height, width)))

    small = tiny("sd")
    small.__class__ = Resizes
    with pytest.raises(AquabitError, match="resolution is 32, but the denoiser of this Resizes"):
        Adapter(small).images(replace(PROTOCOL, resolution=32), range(2))


def test_sizes_that_are_rounded_are_refused() -> None:
    pipe = randomised(RECENT["chroma"])
    with pytest.raises(
        AquabitError, match="resolution is 35, but ChromaPipeline makes images of 32 x 32 pixels"
    ):
        images(pipe, replace(PROTOCOL, resolution=35))


def test_guidance_that_changes_nothing_is_refused() -> None:
    with pytest.raises(AquabitError, match="guidance is 3, but it changes nothing of what this FluxPipeline"):
        images(randomised(lambda: flux(guidance_embeds=False)), replace(PROTOCOL, resolution=16))
    with pytest.raises(AquabitError, match=r"guidance is 0\.5, but it changes nothing"):
        images(tiny("sd"), replace(PROTOCOL, guidance=0.5))


def test_nobody_hears_of_what_is_asked() -> None:
    """Neither hooks nor watchers of the sampler see the calls of a check, and images stay what they are."""

    class Count(Watcher):
        begun = 0

        def begin(self, scheduler: Any) -> None:
            self.begun += 1

    pipe, protocol = randomised(RECENT["qwen-image"]), replace(PROTOCOL, resolution=32)
    expected = images(randomised(RECENT["qwen-image"]), protocol)
    seen, count = shapes_of(pipe.transformer), Count()
    with following(pipe.transformer, pipe.scheduler, [count]):
        made = images(pipe, protocol)
    assert torch.equal(made, expected) and len(seen) == 4 and count.begun == 1  # two branches, two steps
    assert "step" not in vars(pipe.scheduler)


class Bare(d.DiffusionPipeline):
    """No scheduler, a denoiser without a config, lists of pictures: the least that can be measured."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet
        self.register_to_config(kind="bare")

    @torch.no_grad()
    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int = 4) -> Any:
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
        for _ in range(num_inference_steps):
            x = x - self.unet(x.flatten(1)).view_as(x) / num_inference_steps
        return (list(x.sigmoid()),)


def bare() -> Bare:
    torch.manual_seed(0)
    return Bare(torch.nn.Sequential(torch.nn.Linear(192, 192), torch.nn.SiLU(), torch.nn.Linear(192, 192)))


def test_a_pipeline_without_a_scheduler() -> None:
    pipe, protocol = bare(), Protocol(images=2, steps=2, micro_batch=2)
    adapter = Adapter(pipe)
    assert adapter.images(protocol, range(2)).shape == (2, 3, 8, 8)
    assert len(adapter.first_inputs(protocol)[0]) == 1
    for change, message in (
        ({"eta": 0.5}, "has no eta"),
        ({"guidance": 2.0}, "this Bare has no guidance"),
        ({"frames": 3}, "takes no number of frames"),
    ):
        with pytest.raises(AquabitError, match=message):
            adapter.images(replace(protocol, **change), range(2))


def test_a_number_of_steps_that_nobody_takes() -> None:
    class Once(type(tiny("ddpm"))):  # type: ignore[misc]
        def __call__(self, batch_size: int, generator: Any) -> Any:
            return super().__call__(batch_size, generator, num_inference_steps=1, output_type="pt")

    pipe = tiny("ddpm")
    pipe.__class__ = Once
    with pytest.raises(AquabitError, match="Once takes no number of steps"):
        images(pipe, Protocol(images=2, steps=7, micro_batch=2))


class Checker(torch.nn.Module):
    """As Cosmos has it: it must be there, and it blackens what it does not like."""

    def check_text_safety(self, prompt: str) -> bool:
        return False

    def check_video_safety(self, frames: Any) -> Any:
        return frames * 0


def test_a_required_safety_checker_lets_images_pass() -> None:
    class Requires(type(tiny("sd"))):  # type: ignore[misc]
        def __call__(
            self,
            prompt_embeds: Any = None,
            negative_prompt_embeds: Any = None,
            generator: Any = None,
            num_inference_steps: int = 2,
            guidance_scale: float = 1.0,
        ) -> Any:
            given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
            checker = self.__dict__.pop("safety_checker")
            self.__dict__["safety_checker"] = None
            if checker is None or not checker.to("cpu").check_text_safety("x"):
                raise ValueError("it needs its safety checker")
            made = super().__call__(output_type="pt", **given)
            made.images = checker.check_video_safety(made.images)
            return made

    pipe = tiny("sd")
    plain = images(pipe, PROTOCOL)
    pipe.__class__ = Requires
    pipe.__dict__["safety_checker"] = checker = Checker()
    assert torch.equal(images(pipe, PROTOCOL), plain) and pipe.safety_checker is checker


class Scaled(Bare):
    """Guidance is a component's, or a schedule's that stands in its place."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int,
        generator: Any,
        num_inference_steps: int = 4,
        guidance_scale: float | None = None,
        guidance_schedule: Any = (7.0,),
    ) -> Any:
        if guidance_scale is not None and guidance_schedule is not None:
            raise ValueError("only one of them may be set")
        scale = self.guider.guidance_scale if self.__dict__.get("guider") else guidance_scale
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
        for _ in range(num_inference_steps):
            x = x - scale * self.unet(x.flatten(1)).view_as(x) / num_inference_steps
        return {"images": x.sigmoid()}


@pytest.mark.parametrize("guided_by", ["an argument", "a component"])
def test_guidance_of_a_component_or_beside_a_schedule(guided_by: str) -> None:
    pipe = bare()
    pipe.__class__ = Scaled
    if guided_by == "a component":
        pipe.__dict__["guider"] = guider = d.guiders.ClassifierFreeGuidance(guidance_scale=5.0)
    plain = Protocol(images=2, steps=2, micro_batch=2)
    made = [images(pipe, replace(plain, guidance=g)) for g in (1.0, 3.0, 7.0)]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    if guided_by == "a component":
        assert pipe.guider is guider and guider.guidance_scale == 5.0
