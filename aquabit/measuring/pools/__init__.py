"""Pools: the same tasks in this process, in fresh processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from aquabit.graph import to_json
from aquabit.measuring.evaluator import Evaluator
from aquabit.measuring.model import Model
from aquabit.measuring.pools.inline import InlinePool
from aquabit.measuring.pools.processes import ProcessPool
from aquabit.measuring.pools.ray import RayPool
from aquabit.measuring.tasks import Begin, Result, Task
from aquabit.measuring.where import Where
from aquabit.pipelines import Model as OwnModel
from aquabit.pipelines import load
from aquabit.pipelines.reference import Reference
from aquabit.quality import QualityOptions
from aquabit.quant.bank import Bank
from aquabit.scheme import AquabitError
from aquabit.user_code import folder_of

__all__ = ["InlinePool", "Pool", "ProcessPool", "RayPool", "pool_for"]


class Pool(Protocol):
    """What runs tasks."""

    @property
    def workers(self) -> int:
        """How many tasks run at a time."""

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        """(place in ``tasks``, result) pairs in any order; what is not read of them is not owed. Raises
        AquabitError where a task cannot be done."""

    def close(self) -> None:
        """Stop the workers at once; what they have not answered is lost and will be measured again."""


@contextmanager
def pool_for(model: Model, bank: Bank, where: Where, quality: QualityOptions | None = None) -> Iterator[Pool]:
    """The pool that ``where`` asks for; a model in memory reaches other processes through a temporary
    folder."""
    if where.inline:
        yield InlinePool(local_evaluator(model, bank, where, quality))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = model.source
        if isinstance(source, OwnModel):
            raise AquabitError(
                f"{source.name} is a function of this process, which others cannot reach; give the model as"
                " 'module:function', a function that returns it and that they can import, or use workers=1"
            )
        if isinstance(source, str) and where.ray is not None and Reference.parse(source).composed:
            source = load(source)  # files that other machines lack
        if not isinstance(source, str):
            source.save_pretrained(folder)
            source = folder
        graph, kept = to_json(model.graph), str(bank.folder)
        code = "" if model.made is None else folder_of(source)
        begin = Begin(source, graph, kept, model.fingerprint, where.device, where.dtype, quality, code)
        pool: Pool = ProcessPool(where.workers, begin) if where.ray is None else RayPool(where.ray, begin)
        try:
            yield pool
        finally:
            pool.close()


def local_evaluator(
    model: Model, bank: Bank, where: Where, quality: QualityOptions | None = None
) -> Evaluator:
    """An evaluator of a model in this process; a function of the user's has made it already."""
    source = model.made or model.source
    return Evaluator(source, model.graph, bank, model.fingerprint, where.device, where.dtype, quality)
