"""A folder of real images: its pictures at one size, batch by batch, and what is said of those that cannot
be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from aquabit.inputs import SUFFIXES, centre_box
from aquabit.scheme import AquabitError, Progress, no_progress

UNREADABLE = 0.05  # the largest share of images that may be unreadable
_NAMED = 5  # of them are named
_BATCH = 64


class ImageFolder:
    """Every image under a folder, subfolders too, in the order of their names.

    ``listing`` is a digest of names, sizes and times of change: what was computed from the folder holds as
    long as it does. Raises AquabitError for a folder that is none, or that holds no image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise AquabitError(f"the reference {self.folder} is no folder; give one that holds images")
        self.paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.paths:
            raise AquabitError(f"the reference {self.folder} holds no images ({', '.join(sorted(SUFFIXES))})")
        stats = [(p.relative_to(self.folder).as_posix(), p.stat()) for p in self.paths]
        self.listing = hashlib.sha256(
            "".join(f"{n}:{s.st_size}:{s.st_mtime_ns};" for n, s in stats).encode()
        ).hexdigest()[:16]
        self.unreadable: list[str] = []
        self.digest = ""  # of the pixels; after ``batches``

    def batches(
        self, size: tuple[int, int], channels: int, progress: Progress = no_progress
    ) -> Iterator[Tensor]:
        """uint8 images [n, channels, height, width]: centre-cropped to the shape of ``size`` and resized
        to it (Lanczos), as data sets are prepared for training. Raises AquabitError at the end where more
        than 5 % are unreadable."""
        hashed = hashlib.sha256(str((*size, channels)).encode())
        batch = list[Tensor]()
        self.unreadable = list[str]()
        for done, path in enumerate(self.paths, 1):
            try:
                picture = read_picture(path, size, channels)
            except (
                OSError,
                UnidentifiedImageError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
            ):  # damaged PNGs are SyntaxErrors
                self.unreadable.append(path.relative_to(self.folder).as_posix())
                continue
            hashed.update(picture.numpy().tobytes())
            batch.append(picture)
            if len(batch) == _BATCH:
                yield torch.stack(batch)
                batch = []
                progress("statistics of the reference", done, len(self.paths))
        if len(self.unreadable) > UNREADABLE * len(self.paths):
            raise AquabitError(
                f"{unreadable_note(self.unreadable, len(self.paths), self.folder)}, more than 5 %; remove or"
                " replace them"
            )
        if batch:
            yield torch.stack(batch)
        self.digest = hashed.hexdigest()[:16]
        progress("statistics of the reference", len(self.paths), len(self.paths))


def unreadable_note(names: list[str], total: int, folder: Path | str) -> str:
    """One sentence that counts and names them."""
    more = ", ..." if len(names) > _NAMED else ""
    return (
        f"{len(names)} of {total} images of the reference {folder} are unreadable"
        f" ({', '.join(names[:_NAMED])}{more})"
    )


def read_picture(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """One image as uint8 [channels, height, width], cropped and resized; raises what PIL raises for a
    damaged one."""
    with Image.open(path) as image:
        picture = image.convert("L" if channels == 1 else "RGB")
    if picture.size != size[::-1]:
        picture = picture.crop(centre_box(picture.width, picture.height, size)).resize(
            size[::-1], Image.Resampling.LANCZOS
        )
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
