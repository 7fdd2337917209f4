"""A worker process: reads one task a line, answers with one line, and is gone when its parent is gone."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from queue import SimpleQueue
from typing import Any

from aquabit.measuring import pipe
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.tasks import Answer, Begin, Task, run
from aquabit.scheme import AquabitError


def main() -> None:
    """Run as ``python -m aquabit.measuring.worker``; the first task describes the model."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    respond = Responder()
    while True:
        answers.write(pipe.text(respond(tasks.get())) + "\n")


class Responder:
    """Answers each task, the first one, which describes the model, included; what goes wrong is an answer
    too."""

    evaluator: Evaluator

    def __call__(self, task: Begin | Task[Any]) -> Answer:
        try:
            if isinstance(task, Begin):
                self.evaluator = task.evaluator()
                return Answer()
            return Answer(run(task, self.evaluator))
        except AquabitError as error:
            return Answer(error=str(error))
        except Exception as error:  # the parent reports it as a fault of ours, with this traceback
            return Answer(fault=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _read(tasks: SimpleQueue[Any]) -> None:
    for line in sys.stdin:
        tasks.put(pipe.value(line))
    os._exit(0)  # the parent closed the pipe, or died


if __name__ == "__main__":
    main()
