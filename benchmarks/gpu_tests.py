"""The part ``tests`` of benchmarks/gpu.py: the Triton tests, compiled for the device (tiny: a few of them,
interpreted)."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import Steps

ROOT = Path(__file__).parents[1]
# file: seconds at most, and the tests of the tiny form
FILES = {
    "test_triton_int8.py": (45, "half_precision or far_from_zero"),
    "test_triton_attention.py": (60, "half_precision or equal_scores"),
    "test_triton.py": (70, "rows_are_split"),
}
WORKERS = 12  # processes at most: each compiles for itself, which takes nearly all the time
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
NAME = re.compile(r"\S+::\S+")


def outcomes(text: str) -> dict[str, Any]:
    """Counts and the names of failures in what ``pytest -v`` wrote, which may have been broken off."""
    counts, failures = dict.fromkeys(("passed", "failed", "error", "skipped"), 0), []
    for line in text.splitlines():
        what, name = OUTCOME.search(line), NAME.search(line)
        if what and name and not line.startswith(("FAILED", "ERROR", "SKIPPED")):  # the summary's own lines
            counts[what[1].lower()] += 1
            if what[1] in ("FAILED", "ERROR"):
                failures.append(name[0].rpartition("/")[2])
    return counts | {"failures": failures}


def tested(file: str, only: str | None, seconds: float) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        f"tests/kernels/backends/{file}",
    ]
    workers = min(WORKERS, os.cpu_count() or 1)
    if only is not None:
        command += ["-k", only]
    elif workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            text, _ = process.communicate()
            return outcomes(text) | {"stopped_after": seconds}
    found = outcomes(text)
    if not found["passed"] or process.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {process.returncode}: {' '.join(text.split())[-200:]}")
    return found


def steps(device: str, size: str) -> Steps:
    def of(file: str, seconds: int, few: str) -> Any:
        return lambda: tested(file, few if size == "tiny" else None, seconds)

    return {file: of(file, *how) for file, how in FILES.items()}
