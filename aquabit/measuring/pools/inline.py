"""InlinePool: tasks in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.tasks import Result, Task, run


class InlinePool:
    """Runs tasks here; nothing is copied and nothing is written as JSON."""

    workers = 1

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        for place, task in enumerate(tasks):
            yield place, run(task, self.evaluator)

    def close(self) -> None:
        """Nothing to stop."""
