"""Responder: what a worker answers, whatever it is asked through."""

from __future__ import annotations

import traceback
from typing import Any

from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.tasks import Answer, Begin, Task, run
from aquabit.scheme import AquabitError


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
