"""A worker process: reads one task a line, answers with one line, and is gone when its parent is gone."""

from __future__ import annotations

import os
import sys
import threading
from queue import SimpleQueue


def main() -> None:
    """Run as ``python -m aquabit.measuring.worker``; the first task describes the model."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    lines: SimpleQueue[str] = SimpleQueue()
    # before anything large is imported, which takes seconds: the parent may be gone by then
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    from aquabit.measuring import pipe
    from aquabit.measuring.responder import Responder

    respond = Responder()
    while True:
        answers.write(pipe.text(respond(pipe.value(lines.get()))) + "\n")


def _read(lines: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the parent closed the pipe, or died


if __name__ == "__main__":
    main()
