"""Pictures of images, and of videos: several as one PNG."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

COLUMNS = 8


def spaced(images: Tensor, frames: int, most: int = COLUMNS) -> Tensor:
    """Of each video of ``frames`` images in a row at most so many, evenly spaced, its first and last among
    them; images themselves where ``frames`` is 1."""
    kept = torch.linspace(0, frames - 1, min(most, frames)).round().long()
    return images.unflatten(0, (-1, frames))[:, kept].flatten(0, 1)


def thumbnail(
    images: Tensor, frames: int = 1, columns: int = COLUMNS, least: int = 32, most: int = 128
) -> bytes:
    """A PNG grid of images [n, c, h, w] in [0, 1], each enlarged (or shrunk) to a side of ``least`` to
    ``most`` pixels; each video of ``frames`` images (above 1) begins a row."""
    n, c, h, w = images.shape
    side = max(h, w)
    factor = -(-least // side) if side < least else 1
    pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    row = frames if frames > 1 else n  # images after which another row begins
    h, w, each = h * factor, w * factor, -(-row // columns)
    rows = each * -(-n // row)
    sheet = torch.full((c, rows * (h + 2) + 2, columns * (w + 2) + 2), 128, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        down, right = i // row * each + i % row // columns, i % row % columns
        y, x = 2 + down * (h + 2), 2 + right * (w + 2)
        sheet[:, y : y + h, x : x + w] = image
    array: Any = sheet[0].numpy() if c == 1 else sheet[:3].permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    if side > most:
        picture = picture.resize(
            (picture.width * most // side, picture.height * most // side), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
