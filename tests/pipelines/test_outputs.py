"""Images from whatever form a pipeline returns them in."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from aquabit.pipelines.outputs import images_of
from aquabit.scheme import AquabitError

IMAGES = torch.linspace(0, 1, 2 * 3 * 6 * 5).view(2, 3, 6, 5)
BYTES = (IMAGES * 255).round().to(torch.uint8)
ARRAY = IMAGES.permute(0, 2, 3, 1).numpy()
PICTURES = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in BYTES]


class Output(BaseOutput):
    frames: Any = None


@pytest.mark.parametrize(
    "output",
    [
        SimpleNamespace(images=IMAGES),
        SimpleNamespace(image=ARRAY),
        SimpleNamespace(images=None, frames=list(IMAGES)),
        namedtuple("Made", "images nsfw")(list(ARRAY), [False] * 2),
        (ARRAY, None),
        {"images": PICTURES},
        SimpleNamespace(images=BYTES.permute(0, 2, 3, 1).numpy()),
        PICTURES,
        IMAGES,
    ],
)
def test_images(output: Any) -> None:
    made = images_of(output, 2, "X")
    assert made.shape == IMAGES.shape and torch.allclose(made, IMAGES, atol=1 / 255)


@pytest.mark.parametrize(
    "frames", [IMAGES.expand(2, 2, 3, 6, 5), np.stack([ARRAY, ARRAY]), [PICTURES, PICTURES], [IMAGES, IMAGES]]
)
def test_frames_are_images_in_order(frames: Any) -> None:
    made = images_of(Output(frames=frames), 2, "X")
    assert torch.allclose(made, torch.cat([IMAGES, IMAGES]), atol=1 / 255)


def test_grey_pictures_and_several_images_a_sample() -> None:
    assert images_of([PICTURES[0].convert("L")], 1, "X").shape == (1, 1, 6, 5)
    assert len(images_of(SimpleNamespace(images=IMAGES), 1, "X")) == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (SimpleNamespace(sequences=IMAGES), "SimpleNamespace, which holds no images: none of images, frames"),
        (SimpleNamespace(images=torch.zeros(2, 77, 16)), r"\[2, 77, 16\] numbers for 2 samples"),
        (SimpleNamespace(images=torch.zeros(2, 16, 8, 8)), "1 to 4 channels"),
        (SimpleNamespace(images=torch.zeros(3, 3, 8, 8)), "as many of each sample"),
        (SimpleNamespace(frames=torch.zeros(1, 4, 3, 8, 8)), "for 2 samples"),
        (SimpleNamespace(images=[IMAGES[0], IMAGES[0, :, 1:]]), "different sizes"),
        (SimpleNamespace(images=[object()]), "returns a object where images are expected"),
    ],
)
def test_what_is_no_image_is_refused(output: Any, message: str) -> None:
    with pytest.raises(AquabitError, match=message):
        images_of(output, 2, "X")
