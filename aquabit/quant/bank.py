"""Bank: a cache on disk of (layer weight, scheme, context of its fit) -> CodebookWeight; a scheme is fitted to a layer once."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquabit.kernels.codebook import CodebookWeight, from_tensors
from aquabit.scheme import AquabitError, Scheme

FORMAT = 2  # raised when the same key would be fitted otherwise: older fits are made again
TUNED = "tuned-"  # before the names of files that hold fine-tuned weights
DEFAULT_LIMIT = 20 * 2**30  # bytes


def default_folder() -> Path:
    """``$AQUABIT_BANK``, or ``~/.cache/aquabit/bank``."""
    return Path(os.environ.get("AQUABIT_BANK") or Path.home() / ".cache" / "aquabit" / "bank")


def weight_hash(weight: Tensor) -> str:
    """Hash of a weight's values and shape."""
    data = weight.detach().cpu().contiguous()
    body = hashlib.sha256(f"{data.dtype} {list(data.shape)}".encode())
    body.update(data.reshape(-1).view(dtype=_bytes_of(data)).numpy().data)
    return body.hexdigest()[:24]


def _bytes_of(data: Tensor) -> Any:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]


@dataclass(frozen=True)
class Fit:
    """A coded weight with its relative squared weight error, its relative output error under the H it was fitted with (None without), and
    what is to be said of the fit (unused codewords, a diagonal H)."""

    coded: CodebookWeight
    error: float
    output: float | None = None
    notes: tuple[str, ...] = ()


class Bank:
    """Safetensors files named by weight hash, scheme and context, written atomically (a killed writer leaves at most a temporary file).

    Several processes may share a folder. ``limit`` bytes are kept: ``trim`` evicts what was used longest ago, never what this process
    used. Files are memory-mapped on reading.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = DEFAULT_LIMIT):
        self.folder, self.limit = Path(folder) if folder else default_folder(), limit
        self._used: set[Path] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AquabitError(f"the bank folder {self.folder} cannot be made: {error.strerror}") from error

    def path(self, key: str, scheme: Scheme, context: str = "") -> Path:
        return self.folder / ("-".join(filter(None, (key, str(scheme), context))) + ".safetensors")

    def get(self, key: str, scheme: Scheme, context: str = "") -> Fit | None:
        """A stored fit; None where it is missing or unreadable. ``context`` is what else than weight and scheme it depends on."""
        path = self.path(key, scheme, context)
        try:
            with safe_open(path, "pt") as file:
                spec = json.loads(file.metadata()["aquabit"])
                if spec["format"] != FORMAT:
                    return None
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            coded = from_tensors(tensors, tuple(spec["shape"]), spec["bits"], spec["order"])
            fit = Fit(coded, float(spec["error"]), spec.get("output"), tuple(spec.get("notes", ())))
            os.utime(path)
        except (FileNotFoundError, SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # missing, or damaged: it is fitted again
        self._used.add(path)
        return fit

    def put(self, key: str, scheme: Scheme, context: str, fit: Fit) -> None:
        """Store a fit."""
        coded = fit.coded
        spec = {"format": FORMAT, "shape": coded.shape, "bits": coded.bits, "order": coded.order}
        facts = {"error": fit.error, "output": fit.output, "notes": fit.notes}
        self.write(self.path(key, scheme, context), coded.tensors(), {"aquabit": json.dumps({**spec, **facts})})

    def write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """A safetensors file in the bank, whole or not at all; raises AquabitError where it cannot be written."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as failure:
            temporary.unlink(missing_ok=True)
            raise AquabitError(
                f"the bank {self.folder} could not be written ({failure}); free some space or choose another with --bank"
            ) from failure
        self._used.add(path)

    def write_text(self, path: Path, text: str) -> None:
        """A text file in the bank, whole or not at all; raises AquabitError where it cannot be written."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as failure:
            temporary.unlink(missing_ok=True)
            raise AquabitError(f"the bank {self.folder} could not be written ({failure}); free some space or choose another") from failure

    def trim(self) -> int:
        """Evict down to the limit, least recently used first, never fine-tuned weights, which cannot be fitted again; the number of files
        removed."""
        files = sorted((p.stat().st_mtime, p) for p in self.folder.glob("*.safetensors"))
        excess = sum(p.stat().st_size for _, p in files) - self.limit
        removed = 0
        for _, path in files:
            if excess <= 0:
                break
            if path not in self._used and not path.name.startswith(TUNED):
                excess -= path.stat().st_size
                path.unlink(missing_ok=True)
                removed += 1
        return removed
