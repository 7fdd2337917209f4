"""Inputs: pictures that images are made from, as image-to-image, inpainting, edit and image-to-video
pipelines take them; a folder of files that belong together by their names."""

from __future__ import annotations

import hashlib
import mimetypes
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from aquabit.errors import AquabitError

Picture: TypeAlias = Any  # PIL's Image, which is imported where it is used: it is seldom needed
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))
ROLES = ("mask", "control", "reference", "last")  # cat.mask.png belongs to cat.png
ALIKE = ("mask", "control")  # those that lie over their picture, pixel by pixel
PIXELS = 1 << 27  # of a picture: more is a mistake, or an attack
KEPT = 64  # pictures that a process holds once they are read and resized


@dataclass(frozen=True)
class Inputs:
    """Pictures of a ``folder``, in order: their file names, each with a digest of its pixels and of what
    belongs to it. ``roles`` are what each of them has beside it (ROLES). Image i is made from picture
    i mod n. The folder is where they are looked for, and no part of what they are."""

    folder: str
    pictures: tuple[tuple[str, str], ...]
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", tuple((str(a), str(b)) for a, b in self.pictures))
        object.__setattr__(self, "roles", tuple(self.roles))
        if not self.pictures or not set(self.roles) <= set(ROLES):
            raise AquabitError(f"inputs {self.to_dict()!r:.80} name no pictures, or roles that are unknown")

    @property
    def identity(self) -> dict[str, Any]:
        """What they are, wherever they lie: what digests are made of."""
        return {"pictures": [list(pair) for pair in self.pictures], "roles": list(self.roles)}

    def to_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, **self.identity}

    @property
    def public(self) -> Inputs:
        """Without folders of this machine, which tell nobody."""
        return replace(self, folder=Path(self.folder).name)

    def turned(self, places: Iterable[int]) -> Inputs:
        """Those at some places, counted on from the beginning after the last one."""
        return replace(self, pictures=tuple(self.pictures[i % len(self.pictures)] for i in places))

    def texts(self) -> tuple[str, ...] | None:
        """The texts beside the pictures (cat.txt), in their order; None where there are none. Raises
        AquabitError where some lack one, and for what is no text."""
        files = [Path(self.folder) / f"{Path(name).stem}.txt" for name, _ in self.pictures]
        there = [file.is_file() for file in files]
        if not any(there):
            return None
        if not all(there):
            raise AquabitError(
                f"{self.folder} has {files[there.index(True)].name} and no {files[there.index(False)].name};"
                " give every picture a text, or all of them by --prompts"
            )
        return tuple(map(_text, files))

    def load(self, index: int, size: tuple[int, int]) -> dict[str, Picture]:
        """Picture ``index`` mod n under "", and each of its roles, as PIL images [height, width of ``size``]:
        cut in the centre to that shape, and resized (Lanczos). Raises AquabitError where it is gone, or has
        changed since it was read first."""
        name, digest = self.pictures[index % len(self.pictures)]
        return dict(_loaded(self.folder, name, self.roles, digest, size))


def read_inputs(folder: str | Path) -> Inputs:
    """The pictures of a folder, in the order of their names, numbers in them by value. Subfolders are left
    alone.

    ``cat.mask.png`` (of ROLES) and ``cat.txt`` belong to ``cat.png``; what one picture has, all have. Raises
    AquabitError for a folder that is none or holds no picture, a file that is no picture or too large, one
    that belongs to none, two pictures of one name, and a mask of another size than its picture.
    """
    place = Path(folder)
    names = _listed(place)
    pictures = {n: n.rpartition(".")[0] for n in names if Path(n).suffix.lower() in SUFFIXES}
    whole = {stem for stem in pictures.values() if stem.rpartition(".")[2] not in ROLES}
    parts: dict[str, set[str]] = {}
    for name, stem in pictures.items():
        base, _, role = stem.rpartition(".")
        if role in ROLES:
            if base not in whole:
                raise AquabitError(f"{place / name} is the {role} of a picture {base}, which is not there")
            parts.setdefault(base, set()).add(role)
    own = [name for name, stem in pictures.items() if stem in whole]
    if not own:
        raise AquabitError(f"the inputs {place} hold no pictures ({', '.join(sorted(SUFFIXES))})")
    _check_apart(place, list(pictures.items()))
    for name in names:
        if name.lower().endswith(".txt") and name[:-4] not in whole:
            raise AquabitError(f"{place / name} is the text of a picture {name[:-4]}, which is not there")
    every = set().union(*parts.values())
    for name in own:
        if lacks := every - parts.get(pictures[name], set()):
            role = min(lacks)
            other = next(n for n, p in parts.items() if role in p)
            raise AquabitError(f"{place} has a {role} of {other} and none of {name}; give all pictures one")
    roles = tuple(role for role in ROLES if role in every)
    found = tuple((name, _digest(_files(place, name, roles))) for name in own)
    return Inputs(os.path.abspath(place), found, roles)


def _listed(place: Path) -> list[str]:
    """The names of the files of a folder that count, in order."""
    try:
        if not place.is_dir():
            raise AquabitError(f"the inputs {place} are no folder; give one that holds pictures")
        names = [p.name for p in place.iterdir() if not p.name.startswith(".") and not p.is_dir()]
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise AquabitError(f"the inputs {place} cannot be read: {said}") from error
    for name in names:
        kind = mimetypes.guess_type(name)[0] or ""
        if kind.startswith(("image/", "video/")) and Path(name).suffix.lower() not in SUFFIXES:
            raise AquabitError(
                f"{place / name} is of a kind that is not read; give {', '.join(sorted(SUFFIXES))}"
            )
    return sorted(names, key=_order)


def _order(name: str) -> list[tuple[int, int, str]]:
    """Names as people sort them: 2.png before 10.png."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(1, 0, p) if not p.isdecimal() else (0, int(p), p) for p in parts]


def _check_apart(place: Path, pictures: list[tuple[str, str]]) -> None:
    """Raise AquabitError for two files of one name, as cat.png and cat.jpg."""
    seen: dict[str, str] = {}
    for name, stem in pictures:
        if stem in seen:
            raise AquabitError(f"{place} has both {seen[stem]} and {name}; remove one of them")
        seen[stem] = name


def _files(place: Path, name: str, roles: Iterable[str]) -> dict[str, Path]:
    """A picture's file under "", and that of each role."""
    files = {"": place / name}
    for role in roles:
        stem = f"{Path(name).stem}.{role}"
        beside = sorted(p for p in place.glob(f"{_escaped(stem)}.*") if p.suffix.lower() in SUFFIXES)
        if not beside:
            raise AquabitError(f"the {role} of {place / name} is not there; put it back or give --inputs DIR")
        files[role] = beside[0]
    return files


def _escaped(stem: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", stem)


def _text(file: Path) -> str:
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise AquabitError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise AquabitError(f"{file} is empty; it needs the prompt of its picture")
    return text


def _picture(file: Path, grey: bool = False) -> Picture:
    """A file's picture as RGB (or grey), upright. Raises AquabitError for one that cannot be read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is our own
            opened = Image.open(file)
        with opened:
            if opened.width * opened.height > PIXELS:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height}")
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith(("I", "F")):
                raise AquabitError(f"{file} has {upright.mode} pixels; give it 8 bits a channel")
            return upright.convert("L" if grey else "RGB")
    except Image.DecompressionBombError as error:
        raise AquabitError(f"{file} is too large; a picture may have {PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise AquabitError(f"{file} is no picture that can be read") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # damaged PNGs are SyntaxErrors
        said = getattr(error, "strerror", None) or error
        raise AquabitError(f"{file} cannot be read as a picture: {said}") from error


def _opened(files: dict[str, Path]) -> dict[str, Picture]:
    """Files as pictures; raises AquabitError where one does not lie over the first."""
    found = {role: _picture(file, grey=role == "mask") for role, file in files.items()}
    for role in ALIKE:
        if role in found and found[role].size != found[""].size:
            sizes = [" x ".join(map(str, found[r].size)) for r in (role, "")]
            raise AquabitError(
                f"{files[role]} has {sizes[0]} pixels and its picture {files[''].name} {sizes[1]}; a {role}"
                " must have its picture's size"
            )
    return found


def _digest(files: dict[str, Path]) -> str:
    """Of the pixels of pictures, whatever form their files have."""
    return _digest_of(_opened(files))


def _digest_of(pictures: dict[str, Picture]) -> str:
    hashed = hashlib.sha256()
    for role, picture in pictures.items():
        hashed.update(f"{role}:{picture.mode}:{picture.size};".encode())
        hashed.update(picture.tobytes())
    return hashed.hexdigest()[:16]


@lru_cache(KEPT)
def _loaded(
    folder: str, name: str, roles: tuple[str, ...], digest: str, size: tuple[int, int]
) -> tuple[tuple[str, Picture], ...]:
    """See ``Inputs.load``."""
    from PIL import Image

    place = Path(folder)
    if not (place / name).is_file():
        raise AquabitError(f"{place / name} is not there; put it back, or say where it is by --inputs DIR")
    pictures = _opened(_files(place, name, roles))
    if _digest_of(pictures) != digest:
        raise AquabitError(
            f"{place / name}, or what belongs to it, has changed since it was read first; put back what it"
            " was, or begin anew"
        )
    shaped = []
    for role, picture in pictures.items():
        if picture.size != size[::-1]:
            box = centre_box(picture.width, picture.height, size)
            picture = picture.crop(box).resize(size[::-1], Image.Resampling.LANCZOS)
        shaped.append((role, picture))
    return tuple(shaped)


def centre_box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box in the centre, as PIL has boxes, with the shape of ``size`` (height, width)."""
    scale = min(height / size[0], width / size[1])
    high, wide = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
