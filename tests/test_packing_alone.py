"""Packing and generating load nothing of what decides on bits: a process that only runs a packed model needs
neither xgboost nor the packages that measure, explain and search."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"xgboost", "shap", "sklearn", "matplotlib", "ray"}
OURS = {"measuring", "sensitivity", "search", "reports", "workflows", "cli"}
PRINT = "import sys; print(*sys.modules)"
FLOW = """
import torch
from diffusers import DDIMScheduler, UNet2DModel

import aquabit
from aquabit.graph import layers
from aquabit.pipelines import ClassConditionalPipeline
from aquabit.quant.model import fingerprint
from aquabit.scheme import Calibration, LayerChoice, QuantConfig, Scheme

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
    norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11, attention_head_dim=8,
)
pipe = ClassConditionalPipeline(unet, DDIMScheduler())
choices = {name: LayerChoice(Scheme.parse("usq3h"), 8) for name in layers(aquabit.trace(pipe))}
calibration = Calibration(images=2, steps=2)
config = QuantConfig(fingerprint(unet), choices, calibration=calibration)
aquabit.quantize(pipe, config, bank="bank").save("packed")
images = aquabit.generate(aquabit.load("packed"), images=2, steps=2)
assert images.shape[0] == 2
"""


def unwanted(code: str, folder: Path) -> set[str]:
    """What a fresh process loads of HEAVY and OURS while it runs ``code`` in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{PRINT}"], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    loaded = [name.split(".") for name in done.stdout.split()]
    ours = {parts[1] for parts in loaded if parts[0] == "aquabit" and len(parts) > 1}
    return {parts[0] for parts in loaded} & HEAVY | ours & OURS


@pytest.mark.parametrize("code", [FLOW, "import aquabit.exports"], ids=["flow", "exports"])
def test_packing_and_generating_load_nothing_that_chooses_bits(code: str, tmp_path: Path) -> None:
    assert unwanted(code, tmp_path) == set()


def test_what_is_loaded_is_seen(tmp_path: Path) -> None:
    code = "import aquabit.sensitivity.surrogate.estimators"
    assert unwanted(code, tmp_path) >= {"xgboost", "sklearn", "sensitivity"}
