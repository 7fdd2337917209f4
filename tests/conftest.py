"""Shared fixtures: tiny pipelines of the bundled models' classes, with random weights."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports triton, as diffusers does: its own library is then made for the interpreter, or
# never.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from hypothesis import settings

from aquabit.pipelines import ClassConditionalPipeline

settings.register_profile("aquabit", deadline=None, max_examples=30)
settings.load_profile("aquabit")
torch.set_num_threads(1)

SCHEDULER = {"num_train_timesteps": 1000, "clip_sample": False, "timestep_spacing": "leading"}


def tiny_pipeline(kind: str, seed: int = 0) -> ClassConditionalPipeline:
    """A pipeline of 8 x 8 images that takes milliseconds; ``kind`` is dit or unet."""
    torch.manual_seed(seed)
    if kind == "dit":
        net = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            out_channels=1,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_elementwise_affine=False,
            norm_num_groups=4,
        )
    else:
        net = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=11,
            attention_head_dim=8,
        )
    pipe = ClassConditionalPipeline(net.eval(), DDIMScheduler(**SCHEDULER), real_images="digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session", autouse=True)
def own_timings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor write this machine's kernel timings."""
    os.environ["AQUABIT_TIMINGS"] = str(tmp_path_factory.mktemp("timings"))


@pytest.fixture(params=["dit", "unet"])
def pipe(request: pytest.FixtureRequest) -> ClassConditionalPipeline:
    return tiny_pipeline(request.param)


@pytest.fixture
def dit() -> ClassConditionalPipeline:
    return tiny_pipeline("dit")


@pytest.fixture
def unet() -> ClassConditionalPipeline:
    return tiny_pipeline("unet")
