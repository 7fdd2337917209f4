"""AQUABIT_INSTRUCTIONS: kernels use no better instructions than it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from aquabit.kernels.extension import INSTRUCTIONS, native

ASK = """
import json
from aquabit.kernels.extension import native
print(json.dumps({n: getattr(native, n)() for n in dir(native) if n.endswith("_levels")}))
"""


def _run(most: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "AQUABIT_INSTRUCTIONS": most}
    return subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(native is None, reason="the C++ extension was not built")
@pytest.mark.parametrize("most", ["", *INSTRUCTIONS])
def test_no_kernel_uses_better_instructions_than_are_named(most: str) -> None:
    every, found = json.loads(_run("").stdout), json.loads(_run(most).stdout)
    allowed = INSTRUCTIONS[INSTRUCTIONS.index(most) if most else 0 :]
    assert len(found) >= 6
    for kernel, levels in found.items():
        assert levels == [level for level in every[kernel] if level in allowed] and levels[-1] == "baseline"


def test_unknown_instructions_are_refused_by_name() -> None:
    done = _run("avx10")
    assert done.returncode and "AQUABIT_INSTRUCTIONS='avx10' is unknown" in done.stderr
    assert all(level in done.stderr for level in INSTRUCTIONS)
