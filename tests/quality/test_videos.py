"""Temporal consistency of videos: frames of one video belong together."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aquabit.pipelines.pictures import spaced, thumbnail
from aquabit.quality import Quality, paired
from aquabit.scheme import AquabitError

VIDEOS, FRAMES = 3, 5


def videos(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape or (VIDEOS * FRAMES, 3, 8, 6), generator=torch.Generator().manual_seed(seed))


def picture_of(png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture).astype(float)


def metrics(made: Tensor, full: Tensor, frames: int, batch: int = VIDEOS, **more: Any) -> dict[str, float]:
    quality = Quality([], **more)
    for i in range(0, len(made), batch * frames):
        quality.update(made[i : i + batch * frames], full[i : i + batch * frames], None, frames)
    return quality.compute()


def test_it_is_the_mean_square_of_differences_of_differences() -> None:
    made, full = videos(0), videos(1)
    rows = [x.double().numpy().reshape(VIDEOS, FRAMES, -1) for x in (made, full)]
    expected = ((np.diff(rows[0], axis=1) - np.diff(rows[1], axis=1)) ** 2).mean((1, 2))
    assert paired.temporal_mse(made, full, FRAMES) == pytest.approx(expected, rel=1e-6)
    found = metrics(made, full, FRAMES)["temporal_psnr"]
    assert found == pytest.approx(float((-10 * np.log10(expected)).mean()), rel=1e-6)


def test_what_stands_still_costs_nothing_and_what_flickers_twice() -> None:
    full = 0.5 + 0.1 * torch.arange(FRAMES * VIDEOS).remainder(FRAMES)[:, None, None, None].expand(
        -1, 3, 8, 6
    )
    shifted = metrics((full - 0.25).clamp(0, 1), full, FRAMES)
    assert shifted["temporal_psnr"] == pytest.approx(100, abs=1) and shifted["psnr"] < 15
    noise = 0.02 * torch.randn(full.shape, generator=torch.Generator().manual_seed(0))
    noisy = metrics((full * 0.8 + noise).clamp(0, 1), full * 0.8, FRAMES)
    assert noisy["psnr"] - noisy["temporal_psnr"] == pytest.approx(10 * np.log10(2), abs=0.2)
    frozen = full[::FRAMES].repeat_interleave(FRAMES, 0)  # flickers least of all, and moves no more
    assert metrics(frozen, full, FRAMES)["temporal_psnr"] == pytest.approx(20, abs=0.1)


def test_frames_stay_in_their_video_whatever_the_batch() -> None:
    made, full = videos(0), videos(1)
    found = metrics(made, full, FRAMES)
    assert metrics(made, full, FRAMES, batch=1) == pytest.approx(found)
    order = torch.arange(VIDEOS * FRAMES).reshape(VIDEOS, FRAMES)
    within = metrics(made[order.flip(0).flatten()], full[order.flip(0).flatten()], FRAMES)
    assert within == pytest.approx(found)
    mixed = order.T.flatten()  # frame by frame of all videos
    across = metrics(made[mixed], full[mixed], FRAMES)
    assert across["psnr"] == pytest.approx(found["psnr"])
    assert abs(across["temporal_psnr"] - found["temporal_psnr"]) > 0.01


def test_images_have_none_and_bad_input_is_said() -> None:
    made, full = videos(0), videos(1)
    assert "temporal_psnr" not in metrics(made, full, 1)
    assert list(metrics(made, full, FRAMES)) == ["mse", "psnr", "ssim", "temporal_psnr"]
    with pytest.raises(AquabitError, match="'temporal_psnr' needs videos of two frames and more"):
        metrics(made, full, 1, metrics=["temporal_psnr"])
    with pytest.raises(AquabitError, match="15 images in videos of 4 frames have no differences"):
        paired.temporal_mse(made, full, 4)
    quality = Quality([])
    quality.update(made, full, None, FRAMES)
    with pytest.raises(AquabitError, match="all videos have as many frames"):
        quality.update(made, full, None, 3)


def test_a_picture_has_a_row_for_each_video() -> None:
    made = videos(2, 3 * 11, 3, 32, 32)
    kept = spaced(made, 11).unflatten(0, (3, 8))
    assert torch.equal(kept[:, 0], made[::11]) and torch.equal(kept[:, -1], made[10::11])
    assert torch.equal(spaced(made, 1), made) and len(spaced(made, 11, 3)) == 9
    whole = picture_of(thumbnail(made, 11))  # 8 frames, and 3 below
    assert whole.shape[:2] == (2 + 34 * 6, 2 + 34 * 8)
    for video in range(3):
        cell = whole[2 + 68 * video : 34 + 68 * video, 2:34]
        assert np.abs(cell / 255 - made[11 * video].permute(1, 2, 0).numpy()).max() < 0.003
    assert picture_of(thumbnail(made)).shape[:2] == (2 + 34 * 5, 2 + 34 * 8)
