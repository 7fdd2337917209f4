"""What the parts of benchmarks/gpu.py share: steps whose results are kept as they come, the clock and the
peak of a device."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import read, write_results

Step = Callable[[], dict[str, Any]]
Steps = Mapping[str, Step]
Text = Callable[[dict[str, Any]], str]
CALLS = 10
LOST = 3  # exit code: the device's context is gone; whoever started the part starts it again


class Kept:
    """gpu.json and gpu.md, written after every step; what another device or size left there is dropped."""

    def __init__(self, folder: Path, device: str, size: str, command: str, text: Text):
        self.folder, self.command, self.text = folder, command, text
        found = read(folder / "gpu.json")
        alike = (found.get("device"), found.get("size")) == (device, size)
        self.whole: dict[str, Any] = found if alike else {"device": device, "size": size, "parts": {}}

    def rows(self, part: str) -> dict[str, Any]:
        rows: dict[str, Any] = self.whole["parts"].setdefault(part, {})
        return rows

    def write(self, part: str, name: str, row: dict[str, Any]) -> None:
        self.rows(part)[name] = row
        self.save()

    def save(self) -> None:
        write_results("gpu", self.command, self.whole, self.text, self.folder)


def run_steps(part: str, steps: Steps, kept: Kept, failed_too: bool = True) -> None:
    """Run the steps of a part that have no result yet (``failed_too``: those that failed as well); one that
    fails leaves its error. Ends the process where the device can do no more."""
    for name, step in steps.items():
        known = kept.rows(part).get(name)
        if known is not None and not ("fault" in known and failed_too):
            continue
        began, lost = time.perf_counter(), False
        try:
            row = step()
        except Exception as error:  # kept, and the next step is tried
            first = (str(error).strip().splitlines() or [""])[0]
            row, lost = {"fault": f"{type(error).__name__}: {first:.300}"}, "CUDA error" in str(error)
        kept.write(part, name, row | {"seconds": time.perf_counter() - began})
        print(f"{part}: {name}: {row}", file=sys.stderr, flush=True)
        if lost:
            sys.exit(LOST)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds and the device's peak of what is done inside."""

    seconds = 0.0
    bytes = 0


@contextmanager
def timed(device: str) -> Iterator[Clock]:
    clock = Clock()
    synchronize(device)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    yield clock
    synchronize(device)
    clock.seconds = time.perf_counter() - began
    clock.bytes = 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median of calls, after one that is not counted: CALLS, or as many as two seconds take, at least
    three."""
    call()
    synchronize(device)
    times = list[float]()
    while len(times) < CALLS and (len(times) < 3 or sum(times) < 2000):
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


def psnr(a: Tensor, b: Tensor) -> float:
    error = float((a.double() - b.double()).square().mean())
    return 200.0 if error == 0 else -10 * torch.tensor(error).log10().item()
