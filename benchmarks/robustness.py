"""Mutated inputs over everything that reads, in processes that may crash: python benchmarks/robustness.py
[--cases 1000] [--first 0] [--targets NAME ...]

Each target of ``tests/fuzzing.py`` gets ``--cases`` inputs (times its ``share``), which follow from its name
and a number. A process that dies is named with the case that it was at, and the next begins after it; more
than MEMORY is refused by the system, which counts as an internal error unless it is said.
Writes benchmarks/results/robustness.json and robustness.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, parser, read, write_results

MEMORY = 6 << 30  # bytes of address space of a process
KINDS = ("accepted", "refused", "internal error", "wrong number", "hangs", "crash")
SHOWN = 12  # of each kind of fault


def child(name: str, first: int, cases: int) -> None:
    """One line for each case that is about to run, and one for what came of it."""
    from tests.fuzzing import limit_memory, outcome, targets

    target = targets()[name]
    limit_memory(MEMORY)
    said = os.fdopen(os.dup(1), "w")
    quiet, before = os.open(os.devnull, os.O_WRONLY), 0
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for number in range(first, first + cases):
        print(number, file=said, flush=True)
        found = outcome(target, number)
        print(json.dumps([number, found.kind, found.said]), file=said, flush=True)
        if number == first + cases // 10 or number == first + cases - 1:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"memory {now - before}", file=said, flush=True)
            before = now


def run(name: str, first: int, cases: int) -> dict[str, Any]:
    """How often each outcome came, and the first faults of each kind."""
    counts: Counter[str] = Counter()
    faults: list[tuple[str, int, str]] = []
    began, end = time.perf_counter(), first + cases
    while first < end:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, __file__, "--child", name, str(first), str(end - first)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        lines = done.stdout.splitlines()
        grown = [int(line.split()[1]) for line in lines if line.startswith("memory")][1:] or [0]
        for line in lines:
            if line.startswith("["):
                number, kind, said = json.loads(line)
                counts[kind] += 1
                if kind not in ("accepted", "refused"):
                    faults.append((kind, number, said))
                first = number + 1
        if first < end:
            if not lines:
                sys.exit(done.stderr or f"{name}: the process said nothing (exit code {done.returncode})")
            counts["crash"] += 1
            faults.append(("crash", first, f"exit code {done.returncode}"))
            first += 1
    shown = [f for kind in KINDS for f in [f for f in faults if f[0] == kind][:SHOWN]]
    seconds = time.perf_counter() - began
    return {"target": name, "seconds": seconds, **counts, "grown_kib": sum(grown), "faults": shown}


def markdown(found: dict[str, Any]) -> str:
    rows = found["rows"]
    total = {kind: sum(r.get(kind, 0) for r in rows) for kind in KINDS}
    lines = [
        "# Robustness",
        "",
        f"{sum(total.values()):,} mutated inputs; made by `{found['command']}`. Refused: one plain sentence.",
        "A wrong number: something was accepted and then said another number than it should. Growth: of",
        "a process' peak memory, from a tenth of the cases to the last, inputs included: the longest texts,",
        "repeated 500 times and again, have some hundred MB. A damaged fit is made again, damaged timings",
        "are measured again (accepted: what was read was what was written).",
        "",
        "| what reads | " + " | ".join(KINDS) + " | growth, MB |",
        "|---|" + "---|" * (len(KINDS) + 1),
        *(
            f"| {r['target']} | {' | '.join(str(r.get(k, 0)) for k in KINDS)} |"
            f" {r.get('grown_kib', 0) / 1000:.1f} |"
            for r in rows
        ),
        "| **all** | " + " | ".join(str(total[k]) for k in KINDS) + " | |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", type=int, default=1000)
    arguments.add_argument("--first", type=int, default=0)
    arguments.add_argument("--targets", nargs="+")
    arguments.add_argument("--results", type=Path, default=RESULTS)
    arguments.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(given.child[0], int(given.child[1]), int(given.child[2]))
        return
    from tests.fuzzing import targets

    stored = read(given.results / "robustness.json").get("rows", []) if given.targets else []
    rows = [row for row in stored if row["target"] not in given.targets]  # of others, found before
    for name in given.targets or targets():
        rows.append(run(name, given.first, round(given.cases * targets()[name].share)))
        print({k: v for k, v in rows[-1].items() if k != "faults"}, flush=True)
        for fault in rows[-1]["faults"]:
            print("   ", *fault, flush=True)
    rows.sort(key=lambda row: list(targets()).index(row["target"]))
    write_results(
        "robustness",
        f"python benchmarks/robustness.py --cases {given.cases}",
        {"rows": rows},
        markdown,
        given.results,
    )


if __name__ == "__main__":
    main()
