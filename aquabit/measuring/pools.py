"""Pools: the same tasks in this process, or in fresh worker processes that are gone when the parent is
gone."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import typing
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Any

from aquabit.runtime import out_of_memory
from aquabit.scheme import AquabitError, Calibration, Measurement, Protocol, QuantConfig, StepGroups

Task = dict[str, Any]
LOWER = (
    "use fewer --workers, a smaller --micro-batch, or --dtype bfloat16 (`aquabit inspect MODEL --memory` says"
    " what a model takes)"
)
DIED = f"a worker process died twice on the same task, most likely out of memory; {LOWER}"
OUT_OF_MEMORY = "a worker ran out of memory ({}); " + LOWER
TRIES = 2  # a task whose worker died (out of memory, say) is given to another once


class Pool(typing.Protocol):
    """What runs tasks: this process, processes of this machine, or a cluster."""

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """(task, result) pairs, see ``answer``, in any order; what is not read of them is not owed."""

    def close(self) -> None:
        """Stop the workers at once; what they have not answered is lost and will be measured again."""


def answer(evaluator: Any, task: Task) -> Any:
    """What a task asks of an evaluator: portions of layers for "chunks", facts for "fit", (Measurement,
    PNG) for "measure", a list of output errors for "outputs", slopes for "slopes". Raises AquabitError
    where memory does not suffice."""
    try:
        return _answer(evaluator, task)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise AquabitError(
            OUT_OF_MEMORY.format(str(error).splitlines()[0] if str(error) else type(error).__name__)
        ) from error


def _answer(evaluator: Any, task: Task) -> Any:
    if task["task"] == "measure":
        return evaluator.measure(
            QuantConfig.from_dict(task["config"]), Protocol.from_dict(task["protocol"]), task["packed"]
        )
    if task["task"] == "outputs":
        protocol = Protocol.from_dict(task["protocol"])
        return [
            evaluator.output_errors(QuantConfig.from_dict(c), protocol, task["part"]) for c in task["configs"]
        ]
    if task["task"] == "slopes":
        protocol = Protocol.from_dict(task["protocol"])
        return evaluator.slopes(
            QuantConfig.from_dict(task["config"]), protocol, task["part"], task["weights"], task["choices"]
        )
    calibration = None if task["calibration"] is None else Calibration(**task["calibration"])
    if task["task"] == "chunks":
        return evaluator.chunks(task["layers"], task["acts"], calibration)
    groups = task["step_groups"] and StepGroups(**task["step_groups"])
    return evaluator.fit(
        task["schemes"],
        task["probes"],
        task["acts"],
        Protocol.from_dict(task["protocol"]),
        calibration,
        groups,
    )


class InlinePool:
    """Runs tasks here, one after the other."""

    def __init__(self, evaluator: Any):
        self.evaluator = evaluator

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            yield task, answer(self.evaluator, task)

    def close(self) -> None:
        """Nothing to stop."""


class WorkerFault(RuntimeError):
    """A worker failed in a way that is our fault; carries its traceback."""


def decoded(answer: dict[str, Any]) -> Any:
    """What a worker's answer says; raises AquabitError or WorkerFault where that is an error."""
    if "error" in answer:
        raise AquabitError(answer["error"])
    if "fault" in answer:
        raise WorkerFault(f"{answer['fault']}\n{answer['traceback']}")
    if "measurement" in answer:
        return Measurement(**answer["measurement"]), answer["png"] and base64.b64decode(answer["png"])
    return answer.get("result")


class _Worker:
    def __init__(self, begin: Task):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "aquabit.measuring.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask(begin)

    def ask(self, task: Task) -> Any:
        """The answer to one task; raises EOFError where the worker died."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError) as error:
            raise EOFError from error
        if not line:
            raise EOFError
        return decoded(json.loads(line))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class WorkerPool:
    """``count`` worker processes; ``begin`` is the first task each gets (model, graph, bank, device)."""

    def __init__(self, count: int, begin: Task):
        self.count, self.begin = count, begin
        self._workers: list[_Worker | None] = [None] * count

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """In order of completion. A task that kills two workers raises AquabitError."""
        waiting: SimpleQueue[tuple[Task, int]] = SimpleQueue()
        finished: SimpleQueue[tuple[Task, Any]] = SimpleQueue()
        pending = 0
        for task in tasks:
            waiting.put((task, 1))
            pending += 1
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._serve, args=(i, waiting, finished, stop), daemon=True)
            for i in range(min(self.count, pending))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(pending):
                task, result = finished.get()
                if isinstance(result, BaseException):
                    raise result
                yield task, result
        finally:
            stop.set()

    def _serve(
        self,
        index: int,
        waiting: SimpleQueue[tuple[Task, int]],
        finished: SimpleQueue[tuple[Task, Any]],
        stop: threading.Event,
    ) -> None:
        while not stop.is_set():
            try:
                task, attempt = waiting.get_nowait()
            except Exception:  # queue.Empty: no task is left
                return
            try:
                worker = self._workers[index] = self._workers[index] or _Worker(self.begin)
                finished.put((task, worker.ask(task)))
            except EOFError:
                self._workers[index] = None
                if attempt < TRIES:
                    waiting.put((task, attempt + 1))
                else:
                    finished.put((task, AquabitError(DIED)))
            except BaseException as error:
                finished.put((task, error))

    def close(self) -> None:
        for worker in self._workers:
            if worker:
                worker.stop()
