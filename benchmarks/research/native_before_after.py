"""Two source trees' kernels on the same weights and inputs:

python benchmarks/research/native_before_after.py BEFORE AFTER [--seconds S] [--threads N] [--only TEXT]

Each tree is a folder with ``aquabit`` in it, the extension built. A case is a format and a shape of
benchmarks/kernels.py, besides small ones that show what a call costs. A process of each tree holds the case;
they take turns, one call each, in an order that changes from round to round. Printed are the medians, the
median of the rounds' ratios after / before with its quartiles, and whether results are equal to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

FORMATS = ("usq2", "usq4", "usq4g64", "vq3c", "aq2x8g8", "aq1x8k")
LINEAR = ((1152, 1152, 1), (1152, 1152, 256), (4608, 1152, 1), (4608, 1152, 256), (1152, 4608, 256))
SMALL_LINEAR = ((64, 64, 1), (64, 64, 8))
CONV = ((192, 32), (384, 16))
SMALL_CONV = ((16, 4),)
REPEATS = 1e-3  # seconds that a turn takes at least: short calls are repeated


class Case(NamedTuple):
    """``size``: tokens, or the side of an image."""

    scheme: str
    shape: tuple[int, ...]
    size: int
    act: int
    backend: str

    def __str__(self) -> str:
        return f"{self.scheme} {'x'.join(map(str, self.shape))}@{self.size} a{self.act} {self.backend}"


def cases() -> Iterator[Case]:
    for scheme in FORMATS:
        for act in (16, 8):
            for backend in ("lut", "decode"):
                if scheme == "vq3c" and backend == "lut":
                    continue
                if backend == "lut" and act == 8 and scheme != "usq4":
                    continue  # activations are rounded before the call: the same kernel
                for out, inputs, tokens in () if scheme == "aq1x8k" else (*SMALL_LINEAR, *LINEAR):
                    yield Case(scheme, (out, inputs), tokens, act, backend)
                for channels, side in (*SMALL_CONV, *CONV):
                    if scheme == "usq4g64" and (backend == "lut" and channels % 64):
                        continue
                    yield Case(scheme, (channels, channels, 3, 3), side, act, backend)
    for shape in ((1, 64), (256, 192), (256, 1152), (2, 192, 32, 32)):
        yield Case("fake_quantize", shape, 0, 8, "token" if len(shape) == 2 else "sample")
    for codebooks, codewords, beam in ((1, 256, 1), (2, 64, 8), (2, 256, 8)):
        yield Case("feedback_search", (codebooks, codewords, 8), beam, 16, "native")


def call_of(case: Case) -> Callable[[], Any]:
    """What runs the case in this process's tree; gives a tensor."""
    import torch

    from aquabit.kernels import codebook_conv2d, codebook_linear, fake_quantize
    from aquabit.kernels.additive_search import feedback_search
    from aquabit.kernels.dispatch import held
    from aquabit.kernels.time_requests import random_weight
    from aquabit.quant.kernel_tuning import format_for
    from aquabit.scheme import Scheme

    generator, shape = torch.Generator().manual_seed(0), case.shape

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    if case.scheme == "fake_quantize":
        x = noise(*shape)
        return lambda: fake_quantize(x, case.act, case.backend)  # type: ignore[arg-type]
    if case.scheme == "feedback_search":
        m, k, g = shape
        rows, tables, metric = noise(1, 96, 8 * g), noise(1, m, k, g), torch.eye(g).expand(1, 8, g, g)
        return lambda: feedback_search(rows, metric, tables, torch.ones(1, 96), case.size).codes
    weight = held(random_weight(format_for(Scheme.parse(case.scheme), shape)))
    bias = noise(shape[0])
    if len(shape) == 2:
        x = noise(case.size, shape[1])
        return lambda: codebook_linear(x, weight, bias, "fast", case.backend, act=case.act)
    x = noise(1, shape[1], case.size, case.size)
    return lambda: codebook_conv2d(x, weight, bias, padding=1, backend=case.backend, act=case.act)


def work(threads: int) -> None:
    """In a process of one tree: a case a line; then, a line a turn, the number of calls; "next" ends the
    case."""
    import torch

    import aquabit

    assert str(Path(aquabit.__file__).parents[1]) == os.environ["PYTHONPATH"], aquabit.__file__
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    for line in sys.stdin:
        case = Case(*eval(line))
        call = call_of(case)
        with torch.inference_mode():
            print(hashlib.sha256(call().numpy().tobytes()).hexdigest()[:16], flush=True)
            for turn in sys.stdin:
                if turn.strip() == "next":
                    break
                count, started = int(turn), clock()
                for _ in range(count):
                    call()
                print((clock() - started) / count, flush=True)


class Tree:
    """A process that runs one tree's kernels."""

    def __init__(self, folder: Path, threads: int):
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--work", "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> str:
        self.tell(line)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"the tree of {self.process.args} ended at {line}")
        return answer

    def tell(self, line: str) -> None:
        into: IO[str] | None = self.process.stdin
        assert into is not None
        into.write(line + "\n")
        into.flush()


def compare(case: Case, trees: tuple[Tree, Tree], seconds: float) -> tuple[list[float], float]:
    """Prints a row; returns the ratios, and 1 where results differ."""
    digests = [tree.ask(repr(tuple(case))) for tree in trees]
    once = statistics.median(float(trees[0].ask("1")) for _ in range(3))
    count = max(1, round(REPEATS / once))
    times: tuple[list[float], list[float]] = ([], [])
    begun, order = time.perf_counter(), random.Random(0)
    while len(times[0]) < 9 or time.perf_counter() - begun < seconds:
        for i in order.sample((0, 1), 2):
            times[i].append(float(trees[i].ask(str(count))))
    for tree in trees:
        tree.tell("next")
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    before, after = (1e6 * statistics.median(t) for t in times)
    equal = digests[0] == digests[1]
    print(
        f"{case!s:48} {before:10.1f} {after:10.1f} us  {middle:.3f} [{low:.3f}, {high:.3f}]"
        f"  {len(ratios)} rounds  {'equal' if equal else 'DIFFERENT'}",
        flush=True,
    )
    return ratios, float(not equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs="*", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases that hold this text")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        return work(asked.threads)
    if len(asked.trees) != 2:
        parser.error("give two trees")
    trees = (Tree(asked.trees[0], asked.threads), Tree(asked.trees[1], asked.threads))
    medians: dict[str, list[float]] = {}
    different = 0.0
    for case in cases():
        if asked.only in str(case):
            ratios, wrong = compare(case, trees, asked.seconds)
            medians.setdefault(case.scheme, []).append(statistics.median(ratios))
            different += wrong
    for scheme, found in medians.items():
        print(
            f"{scheme:10} {len(found)} cases: median {statistics.median(found):.3f}, worst {max(found):.3f}"
        )
    print(f"{different:.0f} cases with other results")
    return None


if __name__ == "__main__":
    main()
