"""Run by test_session: measures a pipeline in forked children that are killed at random instants, then lets
one finish.

usage: python -m tests.measuring.killed PIPELINE FOLDER KILLS. A fork of a fresh process that has imported
everything starts in no time.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from aquabit.scheme import Protocol
from aquabit.study import Study
from aquabit.workflows import measure


def child(pipeline: str, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        protocol = Protocol(images=4, steps=2, micro_batch=4)
        measure(
            pipeline,
            Study(folder / "study.db"),
            36,
            protocol=protocol,
            space=SPACE,
            bank=str(folder / "bank"),
        )
        os._exit(0)
    return pid


SPACE = {"schemes": ["usq2", "usq4", "usq8", "vq2"]}


def main() -> None:
    pipeline, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    started = time.perf_counter()
    (folder / "whole").mkdir()
    assert os.waitpid(child(pipeline, folder / "whole"), 0)[1] == 0
    whole = time.perf_counter() - started
    (folder / "killed").mkdir()
    rng, died = random.Random(0), 0
    for _ in range(kills):
        pid = child(pipeline, folder / "killed")
        time.sleep(rng.uniform(0.02, 0.2) * whole)
        os.kill(pid, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        Study(folder / "killed" / "study.db").close() if (folder / "killed" / "study.db").exists() else None
    assert os.waitpid(child(pipeline, folder / "killed"), 0)[1] == 0
    print(f"{died} of {kills} children died measuring")


if __name__ == "__main__":
    main()
