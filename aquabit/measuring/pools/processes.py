"""ProcessPool: tasks in fresh worker processes, which are gone when the parent is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from aquabit.measuring import pipe
from aquabit.measuring.tasks import LOWER, Begin, Result, Task
from aquabit.scheme import AquabitError

DIED = f"a worker process died twice on the same task, most likely out of memory; {LOWER}"
TRIES = 2  # a task whose worker died (out of memory, say) is given to another once


class _Worker:
    def __init__(self, begin: Begin):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: modules do not come from the folder that the user stands in (--metric adds it, and says so)
        command = [sys.executable, "-P", "-m", "aquabit.measuring.worker"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            process_group=0,  # Ctrl-C is for the parent, with whom this process ends
        )
        self.ask(begin)

    def ask(self, task: Begin | Task[Any]) -> Any:
        """The answer to one task; raises EOFError where the worker died."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(pipe.text(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError) as error:
            raise EOFError from error
        if not line.endswith("\n"):  # it died, perhaps while it answered
            raise EOFError
        return pipe.value(line).value()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class ProcessPool:
    """``count`` worker processes; ``begin`` is the first task each gets."""

    def __init__(self, count: int, begin: Begin):
        self.count, self.begin = count, begin
        self._workers: list[_Worker | None] = [None] * count

    @property
    def workers(self) -> int:
        return self.count

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        """In order of completion. A task that kills two workers raises AquabitError."""
        waiting: SimpleQueue[tuple[int, Task[Any], int]] = SimpleQueue()
        finished: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for place, task in enumerate(tasks):
            waiting.put((place, task, 1))
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._serve, args=(i, waiting, finished, stop), daemon=True)
            for i in range(min(self.count, len(tasks)))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in tasks:
                place, result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                yield place, result
        finally:
            stop.set()

    def _serve(
        self,
        index: int,
        waiting: SimpleQueue[tuple[int, Task[Any], int]],
        finished: SimpleQueue[tuple[int, Any]],
        stop: threading.Event,
    ) -> None:
        while not stop.is_set():
            try:
                place, task, attempt = waiting.get_nowait()
            except Empty:
                return
            try:
                worker = self._workers[index] = self._workers[index] or _Worker(self.begin)
                finished.put((place, worker.ask(task)))
            except EOFError:
                self._workers[index] = None
                if attempt < TRIES:
                    waiting.put((place, task, attempt + 1))
                else:
                    finished.put((place, AquabitError(DIED)))
            except BaseException as error:
                finished.put((place, error))

    def close(self) -> None:
        for worker in self._workers:
            if worker:
                worker.stop()
