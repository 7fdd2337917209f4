"""Timings: measured seconds per request and backend, one small JSON file a machine."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aquabit.errors import AquabitError
from aquabit.files import write_text
from aquabit.jsonio import parse_json

LONGEST = 1e6  # seconds of a call
FORMAT = 1  # raised when a key means something else than before
Table = Mapping[str, Mapping[str, float]]  # request's key -> backend -> seconds


def default_folder() -> Path:
    """``$AQUABIT_TIMINGS``, or ``~/.cache/aquabit/timings``."""
    return Path(os.environ.get("AQUABIT_TIMINGS") or Path.home() / ".cache" / "aquabit" / "timings")


def machine(threads: int) -> dict[str, str]:
    """What times depend on besides the request: processor, its instructions, threads, torch, our
    extension, and the GPU if there is one."""
    return {
        "cpu": _cpu(),
        "level": torch.backends.cpu.get_cpu_capability(),
        "instructions": os.environ.get("AQUABIT_INSTRUCTIONS", ""),
        "threads": str(threads),
        "torch": torch.__version__,
        "extension": _extension(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    named = {k.strip(): v.strip() for k, v in facts.items()}
    found = [
        named[k] for k in ("model name", "cpu family", "model", "CPU implementer", "CPU part") if k in named
    ]
    return " ".join(found) or platform.processor() or platform.machine()


@cache
def _extension() -> str:
    """A digest of the extension's file: built anew, it is timed anew."""
    spec = importlib.util.find_spec("aquabit.kernels._native")
    file = spec.origin if spec else None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "none"


class Timings:
    """The table of this machine with ``threads`` threads, read from ``folder`` (default:
    ``default_folder()``).

    What is known stays: an entry that is measured twice keeps its first times, in the file too, so that one
    machine chooses one way. A file that cannot be read counts as empty, with one warning, and is written
    anew.
    """

    def __init__(self, threads: int, folder: str | Path | None = None):
        self.machine = machine(threads)
        text = json.dumps([FORMAT, self.machine], sort_keys=True)
        self.path = (
            Path(folder) if folder else default_folder()
        ) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.entries: dict[str, dict[str, float]] = self._read()

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            value = parse_json(self.path.read_bytes(), str(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            return self._damaged(str(error))
        entries = value.get("entries") if isinstance(value, dict) else None
        if not isinstance(entries, dict) or not all(_is_entry(k, v) for k, v in entries.items()):
            return self._damaged("it holds no table of positive seconds")
        return entries

    def _damaged(self, why: str) -> dict[str, dict[str, float]]:
        warnings.warn(
            f"kernel timings {self.path} cannot be used ({why}); they are measured anew",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}

    def add(self, found: Table) -> None:
        """Keep new entries, in memory and in the file; a file that cannot be written is said once and left
        out."""
        for key, row in found.items():
            if not _is_entry(key, dict(row)):
                raise AquabitError(
                    f"timings of {key!r} are {dict(row)}; they must be positive seconds by backend"
                )
        self.entries = _merged(self.entries, found)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that the file is damaged was said when it was opened
                    known = self._read()
                self.entries = _merged(known, self.entries)
                body = {"machine": self.machine, "entries": self.entries}
                write_text(self.path, json.dumps(body, indent=0, sort_keys=True, allow_nan=False) + "\n")
        except (OSError, AquabitError) as error:
            message = f"kernel timings are not kept, and serve this process only: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [k for k in dict.fromkeys(keys) if k not in self.entries]


def _is_entry(key: Any, row: Any) -> bool:
    numbers = row.values() if isinstance(row, dict) else ()
    good = all(isinstance(v, float | int) and not isinstance(v, bool) and 0 < v < LONGEST for v in numbers)
    return isinstance(key, str) and isinstance(row, dict) and bool(row) and good


def _merged(*tables: Table) -> dict[str, dict[str, float]]:
    """All entries; of two times of one backend the first counts."""
    out: dict[str, dict[str, float]] = {}
    for table in tables:
        for key, row in table.items():
            out[key] = {**row, **out.get(key, {})}
    return out
