"""The images that bundled models are trained on, each set with a held-out part that no training sees."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aquabit.scheme import AquabitError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


class Data(NamedTuple):
    """Images uint8 [n, 1, h, w] of grey levels 0..``top``, labels int64 [n]."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor
    top: int

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Grey levels as float32 in [-1, 1], what denoisers and classifiers see."""
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
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise AquabitError(
            f"cannot read {path} ({error.strerror}); install Fashion-MNIST by `apt-get install"
            " dataset-fashion-mnist`, or give the folder of its files with --data"
        ) from error
    given = hashlib.sha256(packed).hexdigest()
    if given != digest:
        raise AquabitError(
            f"{path} has SHA-256 {given}; the file that the models are trained on has {digest} (Debian's"
            " dataset-fashion-mnist, 55506a9)"
        )
    data = gzip.decompress(packed)
    shape = np.frombuffer(data, ">u4", data[3], 4)  # after two zeros, the type and the number of axes
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()


DATA: Mapping[str, Callable[[Path | None], Data]] = {"digits": digits, "fashion": fashion}
