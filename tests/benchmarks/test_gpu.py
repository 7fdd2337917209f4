"""benchmarks/gpu.py without a GPU: its steps at a tiny size, what is kept of those that fail, the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_tables
from benchmarks.common import read
from benchmarks.gpu_models import VARIANTS
from benchmarks.gpu_steps import LOST, Kept, run_steps
from benchmarks.gpu_tests import outcomes


def kept(folder: Path, device: str = "a CPU") -> Kept:
    return Kept(folder, device, "tiny", "the command", gpu_tables.markdown)


@pytest.mark.parametrize("part", ["kernels", "dit"])
def test_the_tiny_form_runs(part: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if part == "kernels" and torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here")
    run_steps(part, gpu.steps_of(part, "cpu", "tiny"), kept(tmp_path))
    rows = read(tmp_path / "gpu.json")["parts"][part]
    assert len(rows) >= 4 and not [r["fault"] for r in rows.values() if "fault" in r]
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"\n| {name} |" in page for name in rows) and "Failed" not in page
    if part == "kernels":
        assert all(0 < r["error"] < 2**-7 for r in rows.values())
    else:
        calls = {name: row["calls"][-1] for name, row in rows.items()}
        assert list(calls) == list(VARIANTS)
        assert calls["usq4 a16"]["difference"] < 0.01 < 0.5 > calls["usq4 a8"]["difference"]
        assert calls["usq4 a16"]["expected"] > rows["usq4 a16"]["resident"] > 0


def test_every_part_has_steps_and_a_table() -> None:
    assert set(gpu.PARTS) == set(gpu_tables.TITLES) == set(gpu_tables.TABLES)
    assert all(gpu.steps_of(part, "cpu", "tiny") for part in gpu.PARTS)
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 600


def row(sizes: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"us": {"triton": 1.0, "dense": 2.0}, "faster_than": {"dense": 2.0}, "error": 0.0}


def test_a_step_that_fails_loses_nothing_and_is_tried_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def good() -> dict[str, Any]:
        asked.append("good")
        return row()

    def bad() -> dict[str, Any]:
        asked.append("bad")
        raise RuntimeError("out of registers\nand more")

    steps = {"first": good, "second": bad, "third": good}
    run_steps("kernels", steps, kept(tmp_path))
    rows = read(tmp_path / "gpu.json")["parts"]["kernels"]
    assert rows["second"]["fault"] == "RuntimeError: out of registers" and rows["third"]["us"]["dense"] == 2.0
    assert "Failed: second (RuntimeError: out of registers)" in (tmp_path / "gpu.md").read_text()
    run_steps("kernels", steps, kept(tmp_path))
    assert asked == ["good", "bad", "good", "bad"]
    run_steps("kernels", steps, kept(tmp_path), failed_too=False)
    assert len(asked) == 4
    run_steps("kernels", {"second": good}, kept(tmp_path))
    assert "Failed" not in (tmp_path / "gpu.md").read_text()
    assert kept(tmp_path, "another GPU").whole["parts"] == {}


def test_a_lost_device_ends_the_process(tmp_path: Path) -> None:
    def lost() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit) as ended:
        run_steps("kernels", {"first": lost, "second": row}, kept(tmp_path))
    assert ended.value.code == LOST
    run_steps("kernels", {"first": lost, "second": row}, kept(tmp_path), failed_too=False)
    assert set(read(tmp_path / "gpu.json")["parts"]["kernels"]) == {"first", "second"}


def test_outcomes_of_tests_are_read_from_what_was_broken_off() -> None:
    alone = "a/test_b.py::test_c[x y] PASSED [ 1%]\na/test_b.py::test_d FAILED [ 2%]\na/test_b.py::t"
    assert outcomes(alone) == {
        "passed": 1, "failed": 1, "error": 0, "skipped": 0, "failures": ["test_b.py::test_d"]
    }  # fmt: skip
    shared = "[gw0] [ 5%] PASSED tests/a/test_b.py::test_c \n[gw1] [ 6%] SKIPPED tests/a/test_b.py::test_e \n"
    found = outcomes(shared + "FAILED tests/a/test_b.py::test_d - AssertionError\n")
    assert (found["passed"], found["skipped"], found["failures"]) == (1, 1, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    made = subprocess.run([sys.executable, gpu.__file__, "all"], capture_output=True, text=True)
    assert made.returncode == 1 and "needs a CUDA device" in made.stderr and "Traceback" not in made.stderr
