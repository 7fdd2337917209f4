"""Pictures of images: several as one PNG."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def thumbnail(images: Tensor, columns: int = 8, least: int = 32, most: int = 128) -> bytes:
    """A PNG grid of images [n, c, h, w] in [0, 1], each enlarged (or shrunk) to a side of ``least`` to
    ``most`` pixels."""
    n, c, h, w = images.shape
    side = max(h, w)
    factor = -(-least // side) if side < least else 1
    pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w, rows = h * factor, w * factor, -(-n // columns)
    sheet = torch.full((c, rows * (h + 2) + 2, columns * (w + 2) + 2), 128, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        y, x = 2 + (i // columns) * (h + 2), 2 + (i % columns) * (w + 2)
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
