"""A worker process: reads one JSON task a line, answers with one JSON line, and is gone when its parent is
gone."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import traceback
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any


def main() -> None:
    """Run as ``python -m aquabit.measuring.worker``; the first line describes the model."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    tasks: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    respond = Responder()
    while True:
        answers.write(json.dumps(respond(tasks.get())) + "\n")


class Responder:
    """Answers each task with a plain dict, the first one, which describes the model, included; what goes
    wrong is an answer too."""

    evaluator: Any = None

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        from aquabit.scheme import AquabitError

        try:
            if task["task"] == "begin":
                self.evaluator = _begin(task)
                return {}
            return _answer(self.evaluator, task)
        except AquabitError as error:
            return {"error": str(error)}
        except Exception as error:  # the parent reports it as a fault of ours, with this traceback
            return {"fault": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _read(tasks: SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)  # the parent closed the pipe, or died


def _begin(task: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    from aquabit.graph import from_json
    from aquabit.measuring.evaluator import Evaluator
    from aquabit.quality import QualityOptions
    from aquabit.quant.bank import Bank

    graph, quality = from_json(task["graph"]), QualityOptions.from_dict(task.get("quality"))
    return Evaluator(
        task["model"], graph, Bank(task["bank"]), task["fingerprint"], task["device"], task["dtype"], quality
    )


def _answer(evaluator: Any, task: dict[str, Any]) -> dict[str, Any]:
    from aquabit.measuring.pools import answer

    result = answer(evaluator, task)
    if task["task"] != "measure":
        return {"result": result}
    measurement, png = result
    return {"measurement": asdict(measurement), "png": png and base64.b64encode(png).decode()}


if __name__ == "__main__":
    main()
