"""Tests, kernels and whole models on one GPU, in about ten minutes: python benchmarks/gpu.py all (make gpu
installs what it needs first), or some of the parts

tests    the tests of the Triton kernels, compiled for the device
kernels  a few shapes of each Triton kernel beside what torch has, and their errors
bundled  two bundled models measured on the CPU and on the device: the same images, up to rounding
dit      one call of DiT-XL/2 with random codes, packed beside bfloat16: time, peak memory and what
         `aquabit inspect --memory` expects of it
unet     the same of a U-Net of SDXL's shapes
fits     what measuring and quantizing take on a pipeline of SDXL's shapes: fits, probes, sketches

Random weights say nothing about quality. Writes benchmarks/results/gpu.json and gpu.md, step by step. "all"
gives each part a process and a time of its own, so that one that fails or is stopped loses nothing of the
others; run again, it does only what has no result yet (--again: everything). --device cpu --size tiny tries
the code where there is no GPU, and writes to build/gpu.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
TINY_RESULTS = ROOT / "build" / "gpu"
# part: the function of its steps, seconds at most
PARTS = {
    "tests": ("benchmarks.gpu_tests:steps", 180),
    "kernels": ("benchmarks.gpu_kernels:steps", 110),
    "bundled": ("benchmarks.gpu_models:bundled_steps", 60),
    "dit": ("benchmarks.gpu_models:dit_steps", 80),
    "unet": ("benchmarks.gpu_models:unet_steps", 90),
    "fits": ("benchmarks.gpu_fits:steps", 80),
}


def steps_of(part: str, device: str, size: str) -> Any:
    module, _, name = PARTS[part][0].partition(":")
    return getattr(importlib.import_module(module), name)(device, size)


def run_all(options: list[str]) -> None:
    """Every part in a process of its own, stopped when its time is over; one whose device context is lost
    goes on in a new process with the steps that were not tried."""
    from benchmarks.gpu_steps import LOST

    for part, (_, seconds) in PARTS.items():
        began, command, code = time.monotonic(), [sys.executable, __file__, part, *options], LOST
        while code == LOST and time.monotonic() - began < seconds:
            with subprocess.Popen(command, start_new_session=True) as process:
                try:
                    code = process.wait(max(1.0, seconds - (time.monotonic() - began)))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 9)
                    code = process.wait()
                    print(f"{part} was stopped after {seconds} s", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, part, *options, "--untried"]


def main() -> None:
    # before anything imports triton, as diffusers does
    cpu = "cpu" in [b for a, b in zip(sys.argv, sys.argv[1:], strict=False) if a == "--device"]
    os.environ["TRITON_INTERPRET"] = "1" if cpu else "0"
    import torch

    from benchmarks.common import RESULTS, parser
    from benchmarks.gpu_steps import Kept, run_steps
    from benchmarks.gpu_tables import markdown

    made = parser(__doc__, ["all", *PARTS])
    made.add_argument("--device", default="cuda")
    made.add_argument("--size", default="sdxl", choices=["sdxl", "tiny"])
    made.add_argument("--results", type=Path)
    made.add_argument("--again", action="store_true", help="measure anew what has a result")
    made.add_argument("--untried", action="store_true", help="leave out the steps that failed")
    given = made.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        sys.exit(
            "this needs a CUDA device, and torch sees none; --device cpu --size tiny tries the code without"
        )
    folder = given.results or (TINY_RESULTS if given.size == "tiny" else RESULTS)
    name = "a CPU, interpreted" if given.device == "cpu" else torch.cuda.get_device_name()
    tiny = f" --device {given.device} --size tiny" if given.size == "tiny" else ""
    command = f"python benchmarks/gpu.py all{tiny}"
    kept = Kept(folder, name, given.size, command, markdown)
    if given.again:
        for part in PARTS if "all" in given.parts else given.parts:
            kept.whole["parts"].pop(part, None)
    if "all" in given.parts:
        kept.save()
        run_all(["--device", given.device, "--size", given.size, "--results", str(folder)])
        print((folder / "gpu.md").read_text())
        return
    for part in given.parts:
        run_steps(part, steps_of(part, given.device, given.size), kept, not given.untried)


if __name__ == "__main__":
    main()
