"""Bank: a cache on disk of (layer weight, scheme, context of its fit) -> CodebookWeight; a scheme is
fitted to a layer once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquabit.files import write_text, writing
from aquabit.kernels.codebook import CodebookWeight, from_tensors
from aquabit.scheme import AquabitError, Scheme

FORMAT = 2  # raised when the same key would be fitted otherwise: older fits are made again
TUNED = "tuned-"  # before the names of files that hold fine-tuned weights
DEFAULT_LIMIT = 20 * 2**30  # bytes
SCAN = 16  # the folder is looked through when this part of the limit was written
BEFORE_DIGESTS = {"format", "shape", "bits", "order", "error", "output", "notes"}  # what files of then say
ORPHANED = 86400  # seconds after which a temporary file has no writer any more


def default_limit() -> int:
    """``$AQUABIT_BANK_LIMIT`` in GiB, or DEFAULT_LIMIT; bytes."""
    given = os.environ.get("AQUABIT_BANK_LIMIT")
    if not given:
        return DEFAULT_LIMIT
    try:
        found = float(given)
    except ValueError:
        found = -1.0
    if not 0 < found < 1 << 30:
        raise AquabitError(f"AQUABIT_BANK_LIMIT is {given!r}; it must be a number of GiB above 0, as 20")
    return int(found * 2**30)


def default_folder() -> Path:
    """``$AQUABIT_BANK``, or ``~/.cache/aquabit/bank``."""
    return Path(os.environ.get("AQUABIT_BANK") or Path.home() / ".cache" / "aquabit" / "bank")


def weights_folder() -> Path:
    """Where large weights lie while a process uses them (``file_memory``): the default bank, which is on a
    disk as temporary folders often are not; a temporary folder where it cannot be written."""
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def weight_hash(weight: Tensor) -> str:
    """Hash of a weight's values and shape."""
    data = weight.detach().cpu().contiguous()
    body = hashlib.sha256(f"{data.dtype} {list(data.shape)}".encode())
    body.update(data.reshape(-1).view(dtype=_bytes_of(data)).numpy().data)
    return body.hexdigest()[:24]


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which none lies in the memory of another, as a file stores them: those that do are copied.
    Layers of equal weights have one fit, and tensors of a user's model may be views of others."""
    found, end = dict(tensors), 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        begin = tensors[name].data_ptr()
        if begin < end:
            found[name] = tensors[name].clone()
        end = max(end, begin + tensors[name].nbytes)
    return found


class FullWeights(dict[str, Tensor]):
    """The full-precision weights of a model's layers, by name."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}
        self._firsts: dict[str, tuple[Any, ...]] = {}

    def key(self, layer: str) -> str:
        """What the bank keeps the fits of a layer's weight under."""
        if layer not in self._keys:
            self._keys[layer] = weight_hash(self[layer])
        return self._keys[layer]

    def twins(self, layer: str) -> list[str]:
        """The layers whose weights are equal to a layer's, itself among them."""
        first = self._firsts[layer]
        alike = [name for name, other in self._firsts.items() if other == first]
        # whole weights are read only where some numbers of them are equal
        return [n for n in alike if n == layer or self.key(n) == self.key(layer)]

    def __setitem__(self, layer: str, weight: Tensor) -> None:
        self._firsts[layer] = self._first(weight)
        super().__setitem__(layer, weight)

    def __delitem__(self, layer: str) -> None:
        self.twins(layer)  # while its key can be told
        super().__delitem__(layer)

    @staticmethod
    def _first(weight: Tensor) -> tuple[Any, ...]:
        """The shape and some numbers of a weight."""
        return tuple(weight.shape), tuple(weight.detach().flatten()[:: max(1, weight.numel() // 16)].tolist())


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def content_digest(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors, by name, dtype, shape and bytes, and of what is said of them."""
    body = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        body.update(f"\0{name} {weight_hash(tensors[name])}".encode())
    return body.hexdigest()[:32]


def _bytes_of(data: Tensor) -> Any:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]


@dataclass(frozen=True)
class Fit:
    """A coded weight with its relative squared weight error, its relative output error under the H it was
    fitted with (None without), and what is to be said of the fit (unused codewords, a diagonal H)."""

    coded: CodebookWeight
    error: float
    output: float | None = None
    notes: tuple[str, ...] = ()


class Bank:
    """Safetensors files named by weight hash, scheme and context, written atomically (a killed writer leaves
    at most a temporary file).

    Several processes may share a folder. About ``limit`` bytes are kept: writing evicts what was used longest
    ago, and what is ``using`` is never lost to this process. Files are memory-mapped on reading, so that a
    fit which another process evicts stays whole while it is held (on a local disk; on a network file system
    its reader may lose it, so give each machine a bank of its own, or one that is large enough).
    """

    def __init__(self, folder: str | Path | None = None, limit: int | None = None):
        self.folder = Path(folder) if folder else default_folder()
        self.limit = default_limit() if limit is None else limit
        self._in_use: dict[Path, Fit] | None = None
        self._whole: dict[str, tuple[int, ...]] = {}  # states of files whose digest was found to be right
        self._room = self.limit // SCAN  # bytes to write before the folder is looked through again
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AquabitError(f"the bank folder {self.folder} cannot be made: {error.strerror}") from error

    @contextmanager
    def using(self) -> Iterator[None]:
        """What is got or put inside stays until the end, even where it is more than the limit or others
        evict it. May be nested."""
        if self._in_use is not None:
            yield
            return
        self._in_use = {}
        try:
            yield
        finally:
            self._in_use = None

    def path(self, key: str, scheme: Scheme, context: str = "") -> Path:
        return self.folder / ("-".join(filter(None, (key, str(scheme), context))) + ".safetensors")

    def has(self, key: str, scheme: Scheme, context: str = "") -> bool:
        """Whether a fit is stored (which may turn out to be damaged)."""
        return self.path(key, scheme, context).exists()

    def get(self, key: str, scheme: Scheme, context: str = "") -> Fit | None:
        """A stored fit; None where it is missing or unreadable. ``context`` is what else than weight and
        scheme it depends on."""
        path = self.path(key, scheme, context)
        fit = None if self._in_use is None else self._in_use.get(path)
        if fit is None:
            fit = self._read(path, scheme)
            if fit is not None and self._in_use is not None:
                self._in_use[path] = fit
        return fit

    def _read(self, path: Path, scheme: Scheme) -> Fit | None:
        try:
            with safe_open(path, "pt") as file:
                spec = json.loads(file.metadata()["aquabit"])
                if spec["format"] != FORMAT:
                    return None
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            if not self._is_whole(path, spec, tensors):
                return None
            shape = tuple(spec["shape"])
            coded = from_tensors(tensors, shape, spec["bits"], spec["order"], scheme.layout(shape))
            fit = Fit(coded, float(spec["error"]), spec.get("output"), tuple(spec.get("notes", ())))
            os.utime(path)
            self._whole[path.name] = _state(path)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
            return None  # missing, or damaged: it is fitted again
        return fit

    def _is_whole(self, path: Path, spec: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Whether a file is what was written under this name: its digest covers both. Looked at once for
        each state of the file; files of before there were digests are taken as they are."""
        if "digest" not in spec:
            return set(spec) <= BEFORE_DIGESTS
        if self._whole.get(path.name) == _state(path):
            return True
        said = {k: v for k, v in spec.items() if k != "digest"}
        return said.get("name") == path.name and spec["digest"] == content_digest(said, tensors)

    def put(self, key: str, scheme: Scheme, context: str, fit: Fit) -> None:
        """Store a fit."""
        coded = fit.coded
        spec = {"format": FORMAT, "shape": coded.shape, "bits": coded.bits, "order": coded.order}
        facts = {"error": fit.error, "output": fit.output, "notes": fit.notes}
        path, tensors = self.path(key, scheme, context), coded.tensors()
        if self._in_use is not None:
            self._in_use[path] = fit  # until it is mapped
        said = {**spec, **facts, "name": path.name}
        whole = said | {"digest": content_digest(said, tensors)}
        self.write(path, tensors, {"aquabit": json.dumps(whole)})
        if self._in_use is not None:
            self._in_use[path] = self._read(path, scheme) or fit

    def write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """A safetensors file in the bank, whole or not at all; raises AquabitError where it cannot be
        written."""
        try:
            with writing(path) as temporary:
                save_file(owned(tensors), temporary, metadata)
                size = temporary.stat().st_size
        except (OSError, SafetensorError, AquabitError) as failure:
            raise AquabitError(
                f"the bank {self.folder} could not be written ({failure}); free some space or choose another"
                " with --bank"
            ) from failure
        self._room -= size
        if self._room < 0:
            self.trim(path)

    def write_text(self, path: Path, text: str) -> None:
        """A text file in the bank, whole or not at all; raises AquabitError where it cannot be written."""
        try:
            write_text(path, text)
        except AquabitError as failure:
            raise AquabitError(
                f"the bank {self.folder} could not be written ({failure}); free some space or choose another"
            ) from failure

    def trim(self, keep: Path | None = None) -> int:
        """Evict down to the limit, least recently used first; the number of files removed. What is in use
        here, ``keep``, and fine-tuned weights, which cannot be fitted again, stay."""
        files, removed = [], 0
        for path in self.folder.iterdir():
            with suppress(OSError):  # others evict too
                stat = path.stat()
                if path.name.startswith(".") and time.time() - stat.st_mtime > ORPHANED:
                    path.unlink()  # its writer was killed
                elif path.suffix == ".safetensors":
                    files.append((stat.st_mtime_ns, path, stat.st_size))
        excess = sum(size for _, _, size in files) - self.limit
        for _, path, size in sorted(files):
            if excess <= 0:
                break
            if path != keep and path not in (self._in_use or {}) and not path.name.startswith(TUNED):
                path.unlink(missing_ok=True)
                excess, removed = excess - size, removed + 1
        self._room = self.limit // SCAN
        return removed
