"""What the calibration of the EfficientNet metrics distorts, and what it says of ranks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.effnet_calibration import COUNT, DISTORTIONS, exceptions, patches, ranks, shuffle


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_distortion_is_further_from_its_images_at_every_level(name: str, channels: int) -> None:
    function, levels, _ = DISTORTIONS[name]
    images = patches(32, 32)[:24, :channels]
    made = [function(images, v) for v in levels]
    errors = [float((m - images).square().mean()) for m in made]
    assert errors == sorted(errors) and 1e-6 < errors[0] < 0.75 * errors[-1]
    assert all(m.shape == images.shape and m.min() >= 0 and m.max() <= 1 for m in made)
    assert all(torch.equal(function(images, v), m) for v, m in zip(levels, made, strict=True))


def test_shuffled_images_have_their_pixels() -> None:
    images = patches(32, 32)[:4]
    made = shuffle(images, 8)
    assert torch.equal(made.flatten(2).sort(2).values, images.flatten(2).sort(2).values)
    same = (made == images).all(1).unfold(1, 8, 8).unfold(2, 8, 8).all(-1).all(-1)
    assert same.flatten(1).sum(1).tolist() == [8] * 4


def test_patches_of_one_size_do_not_overlap_and_are_the_same_each_time() -> None:
    found = patches(32, 32)
    assert len(found) == 520 >= 2 * COUNT and torch.equal(found, patches(32, 32))
    assert len({p.numpy().tobytes() for p in found}) == 520


def test_what_does_not_rise_is_named() -> None:
    assert ranks([0, 1, 2, 3, 4], True) == pytest.approx(1) == ranks([4, 3, 2, 1, 0], False)
    assert ranks([0, 2, 1, 3, 4], True) == pytest.approx(0.9) and ranks([1, 1, 1], True) == 0
    row = {"distortion": "blur", "rank": {"effnet_fd": 1.0, "effnet_kd": 0.9, "effnet_distance": 1.0}}
    assert "all 3 rows" in exceptions(
        {"distortions": {"A": [{**row, "rank": dict.fromkeys(row["rank"], 1)}]}}
    )
    assert "2 of 3 rows; not: effnet_kd with blur (A)." in exceptions({"distortions": {"A": [row]}})
