"""The images that bundled models are trained on, each set with a held-out part that no training sees."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from aquabit.scheme import AquabitError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_FASHION_HELP = "Fashion-MNIST by `apt-get install dataset-fashion-mnist`"
EMOJI_FOLDER = Path("node_modules/emoji-datasource-google")  # where npm puts it, in the current folder
EMOJI_PICTURES = Path("img/google/64")
EMOJI_DIGEST = "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"
# of the pictures of EMOJI_CATEGORIES, one after the other
EMOJI_PICTURES_DIGEST = "a993f96c6b7dc393f3821228b0cab41148000262ff060b639ade5358c1378029"
_EMOJI_HELP = "the emoji by `npm install emoji-datasource-google@16.0.0`"
_EMOJI_ORIGIN = "npm's emoji-datasource-google 16.0.0"
EMOJI_CATEGORIES = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects"),
    *("People & Body", "Smileys & Emotion", "Symbols", "Travel & Places"),
)  # all but the patches of skin tones
ADULTS = {"1F468", "1F469", "1F9D1"}  # man, woman, person
# joiner, variant, the signs of gender, facing right
NOT_THE_SUBJECT = {"200D", "FE0F", "2640", "2642", "27A1"}
NOT_MIRRORED = {"Flags", "Symbols"}
HELD_OUT_EMOJI = 32  # subjects of each category


class Data(NamedTuple):
    """Images uint8 [n, c, h, w] of levels 0..``top``, labels int64 [n]. Training images of one number in
    ``subjects``, int64 [n], are variants of one picture; without it each is a picture of its own. ``edge`` is
    the level of what is around a picture."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor
    top: int
    subjects: torch.Tensor | None = None
    edge: int = 0

    def drawn(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Places of so many training images, int64 [count]: every subject as often as another."""
        if self.subjects is None:
            return torch.randint(0, len(self.images), (count,), generator=generator)
        share = 1 / self.subjects.bincount()[self.subjects]
        return torch.multinomial(share, count, replacement=True, generator=generator)

    def epoch(self, generator: torch.Generator) -> torch.Tensor:
        """Places of the training images in random order, int64; of each subject one variant."""
        order = torch.randperm(len(self.images), generator=generator)
        if self.subjects is None:
            return order
        first = np.unique(self.subjects[order].numpy(), return_index=True)[1]
        return order[np.sort(first)]

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Levels as float32 in [-1, 1], what denoisers and classifiers see."""
        return images.float() / (self.top / 2) - 1


def digits(_: Path | None = None) -> Data:
    """Stratified halves of scikit-learn's 8 x 8 digits: 898 to train on, 899 held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = data.images.astype(np.uint8)[:, None]
    x, xh, y, yh = train_test_split(images, data.target, test_size=0.5, stratify=data.target, random_state=0)
    x, xh, y, yh = (torch.from_numpy(v) for v in (x, xh, y, yh))
    return Data(x, y.long(), xh, yh.long(), top=16)


def fashion(folder: Path | None = None) -> Data:
    """Fashion-MNIST, padded by black from 28 x 28 to 32 x 32: 60,000 images to train on, 10,000 held out.

    Raises AquabitError where the files are not there or are others.
    """
    folder = folder or FASHION_FOLDER
    found = [_idx(folder / name, digest) for name, digest in FASHION_FILES.items()]
    x, y, xh, yh = (torch.from_numpy(v) for v in found)
    x, xh = (torch.nn.functional.pad(v[:, None], (2, 2, 2, 2)) for v in (x, xh))
    return Data(x, y.long(), xh, yh.long(), top=255)


def _idx(path: Path, digest: str) -> np.ndarray:
    """The array of an IDX file of bytes whose compressed file has that SHA-256."""
    data = gzip.decompress(_checked(path, digest, _FASHION_HELP, "Debian's dataset-fashion-mnist, 55506a9"))
    shape = np.frombuffer(data, ">u4", data[3], 4)  # after two zeros, the type and the number of axes
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()


class Emoji(NamedTuple):
    """Pictures [n, 3, 32, 32] of one base emoji, the one without a skin tone first; ``subject`` is the same
    where emoji differ in gender or direction only."""

    category: str
    subject: str
    pictures: torch.Tensor


def emoji(folder: Path | None = None) -> Data:
    """Google's emoji of Emoji 16.0 over white, 32 x 32 in colour; labels are places in EMOJI_CATEGORIES.

    Held out are all emoji of 32 subjects of each category, of which the first ones without a skin tone are
    the held-out images: as many of each category. Training has the others in all skin tones, mirrored too
    but for flags and symbols. Raises AquabitError where the files are not there or are others.
    """
    found = _read_emoji(folder or EMOJI_FOLDER)
    of_category = {
        c: list(dict.fromkeys(e.subject for e in found if e.category == c)) for c in EMOJI_CATEGORIES
    }
    rng = np.random.default_rng(0)
    held_out = {s for of in of_category.values() for s in rng.permutation(of)[:HELD_OUT_EMOJI]}
    numbers = {s: i for i, s in enumerate(dict.fromkeys(e.subject for e in found))}
    first = {e.subject: e for e in reversed(found) if e.subject in held_out}.values()
    shown = [
        (pictures, EMOJI_CATEGORIES.index(e.category), numbers[e.subject])
        for e in found
        if e.subject not in held_out
        for pictures in (e.pictures, *(() if e.category in NOT_MIRRORED else (e.pictures.flip(3),)))
    ]
    each = torch.tensor([len(pictures) for pictures, *_ in shown])
    labels, subjects = (torch.tensor(v).repeat_interleave(each) for v in list(zip(*shown, strict=True))[1:])
    return Data(
        torch.cat([pictures for pictures, *_ in shown]),
        labels,
        torch.stack([e.pictures[0] for e in first]),
        torch.tensor([EMOJI_CATEGORIES.index(e.category) for e in first]),
        top=255,
        subjects=subjects,
        edge=255,
    )


def _read_emoji(folder: Path) -> list[Emoji]:
    """All base emoji of the package, in its order; equal pictures are of one subject."""
    listed = _checked(folder / "emoji.json", EMOJI_DIGEST, _EMOJI_HELP, _EMOJI_ORIGIN)
    entries = [e for e in json.loads(listed) if e["category"] in EMOJI_CATEGORIES]
    found, same, digest = list[Emoji](), dict[bytes, str](), hashlib.sha256()
    for entry in entries:
        files = []
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            files.append(_read(folder / EMOJI_PICTURES / variant["image"], _EMOJI_HELP))
            digest.update(files[-1])
        pictures = torch.stack([_over_white(file) for file in files])
        subject = same.setdefault(pictures[0].numpy().tobytes(), _subject(entry["unified"]))
        found.append(Emoji(entry["category"], subject, pictures))
    if digest.hexdigest() != EMOJI_PICTURES_DIGEST:
        raise AquabitError(
            f"the pictures of {folder / EMOJI_PICTURES} have SHA-256 {digest.hexdigest()}; those that the"
            f" models are trained on have {EMOJI_PICTURES_DIGEST} ({_EMOJI_ORIGIN})"
        )
    return found


def _subject(code_points: str) -> str:
    """What an emoji shows, whatever its gender and direction, from code points such as 1F3C3-200D-2640."""
    kept = [p for p in code_points.split("-") if p not in NOT_THE_SUBJECT]
    return "-".join("1F9D1" if p in ADULTS else p for p in kept) or code_points


def _over_white(file: bytes) -> torch.Tensor:
    """A PNG of 64 x 64 over white, uint8 [3, 32, 32]: each pixel the mean of 2 x 2."""
    with Image.open(io.BytesIO(file)) as picture:
        levels = np.asarray(picture.convert("RGBA"), np.float32)
    opaque = levels[..., 3:] / 255
    colour = levels[..., :3] * opaque + 255 * (1 - opaque)
    halved = colour.reshape(32, 2, 32, 2, 3).mean((1, 3))
    return torch.from_numpy(halved.round().astype(np.uint8)).permute(2, 0, 1).contiguous()


def _read(path: Path, install: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AquabitError(
            f"cannot read {path} ({error.strerror}); install {install}, or give the folder of its files with"
            " --data"
        ) from error


def _checked(path: Path, digest: str, install: str, origin: str) -> bytes:
    """The bytes of a file that has that SHA-256; ``install`` says how to get it, ``origin`` which one it
    is."""
    data = _read(path, install)
    given = hashlib.sha256(data).hexdigest()
    if given != digest:
        raise AquabitError(
            f"{path} has SHA-256 {given}; the file that the models are trained on has {digest} ({origin})"
        )
    return data


class DataSet(NamedTuple):
    """``read`` takes the folder of the files (None: where they are installed); images are [n, *shape]."""

    read: Callable[[Path | None], Data]
    classes: int
    shape: tuple[int, int, int]


DATA: Mapping[str, DataSet] = {
    "digits": DataSet(digits, 10, (1, 8, 8)),
    "fashion": DataSet(fashion, 10, (1, 32, 32)),
    "emoji": DataSet(emoji, len(EMOJI_CATEGORIES), (3, 32, 32)),
}
