"""Tasks: what an evaluator is asked for, here, in a worker process, or on a machine of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from aquabit.graph import from_json
from aquabit.measuring.evaluator import Evaluator, Measured, Sketched, Slopes
from aquabit.measuring.output_errors import StepErrors
from aquabit.quality import QualityOptions
from aquabit.quant.bank import Bank
from aquabit.runtime import out_of_memory
from aquabit.scheme import Act, AquabitError, Calibration, QuantConfig, Rounding, StepGroups
from aquabit.scheme import Protocol as MeasuringProtocol
from aquabit.user_code import search_in

LOWER = (
    "use fewer --workers, a smaller --micro-batch, or --dtype bfloat16 (`aquabit inspect MODEL --memory` says"
    " what a model takes)"
)
OUT_OF_MEMORY = "a worker ran out of memory ({}); " + LOWER
Result = TypeVar("Result", covariant=True)
Facts = dict[str, dict[str, dict[str, Any]]]  # layer -> scheme or activation choice -> name -> value


class Task(Protocol[Result]):
    """A frozen value that says what is asked for."""

    def run(self, evaluator: Evaluator) -> Result:
        """The answer of an evaluator."""


@dataclass(frozen=True)
class Measure:
    """A measurement and a picture of its first images (``Evaluator.measure``)."""

    config: QuantConfig
    protocol: MeasuringProtocol
    packed: bool | None = None

    def run(self, evaluator: Evaluator) -> Measured:
        return evaluator.measure(self.config, self.protocol, self.packed)


@dataclass(frozen=True)
class MeasureOutputErrors:
    """Output errors of several configurations on a part of stored inputs, in their order
    (``Evaluator.output_errors``)."""

    configs: tuple[QuantConfig, ...]
    protocol: MeasuringProtocol
    part: int

    def run(self, evaluator: Evaluator) -> list[StepErrors]:
        return [evaluator.output_errors(config, self.protocol, self.part) for config in self.configs]


@dataclass(frozen=True)
class MeasureSlopes:
    """What to first order other schemes of ``choices`` (layer -> schemes) do to the output error of a
    configuration, steps weighted (``Evaluator.slopes``)."""

    config: QuantConfig
    protocol: MeasuringProtocol
    part: int
    weights: tuple[float, ...]
    choices: Mapping[str, tuple[str, ...]]

    def run(self, evaluator: Evaluator) -> Slopes:
        return evaluator.slopes(self.config, self.protocol, self.part, self.weights, self.choices)


@dataclass(frozen=True)
class MeasureSketches:
    """What schemes (layer -> schemes) and activation choices do alone to a few images, to first order
    (``Evaluator.sketches``)."""

    choices: Mapping[str, tuple[str, ...]]
    acts: tuple[Act, ...]
    protocol: MeasuringProtocol
    start: int
    passes: int
    like: QuantConfig
    steps: StepGroups | None = None

    def run(self, evaluator: Evaluator) -> Sketched:
        return evaluator.sketches(
            self.choices, self.acts, self.protocol, self.start, self.passes, self.like, self.steps
        )


@dataclass(frozen=True)
class Portions:
    """Layers in portions whose H fit into memory together, each in at most ``parts`` parts
    (``Evaluator.chunks``)."""

    layers: tuple[str, ...]
    calibration: Calibration
    parts: int = 1

    def run(self, evaluator: Evaluator) -> list[list[str]]:
        return evaluator.chunks(self.layers, self.calibration, self.parts)


@dataclass(frozen=True)
class Fit:
    """Schemes (layer -> schemes) into the bank, and their errors; those of ``beside`` without
    (``Evaluator.fit``)."""

    schemes: Mapping[str, tuple[str, ...]]
    calibration: Calibration | None = None
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def run(self, evaluator: Evaluator) -> Facts:
        return evaluator.fit(self.schemes, self.calibration, self.beside)


@dataclass(frozen=True)
class Probe:
    """What fitted schemes and activation choices of a layer do alone (``Evaluator.probe``)."""

    layer: str
    schemes: tuple[str, ...]
    acts: tuple[Act, ...]
    protocol: MeasuringProtocol
    base: QuantConfig
    act: Rounding
    steps: StepGroups | None = None

    def run(self, evaluator: Evaluator) -> Facts:
        given = (self.layer, self.schemes, self.acts, self.protocol, self.base, self.act, self.steps)
        return {self.layer: evaluator.probe(*given)}


@dataclass(frozen=True)
class Begin:
    """The first thing that a worker is told: the model, by what it is loaded from, and all that an evaluator
    of it needs. ``graph`` as ``graph.to_json`` writes it, ``bank`` a folder; ``code`` is the folder of a
    module that the model's function is in."""

    model: str
    graph: Mapping[str, Any]
    bank: str
    fingerprint: str
    device: str = "cpu"
    dtype: str = "float32"
    quality: QualityOptions | None = None
    code: str = ""

    def evaluator(self) -> Evaluator:
        """An evaluator of the model, on one thread."""
        torch.set_num_threads(1)
        if self.code:
            search_in(self.code)
        graph, bank = from_json(self.graph), Bank(self.bank)
        where = (self.device, self.dtype)
        return Evaluator(self.model, graph, bank, self.fingerprint, *where, self.quality)


def run(task: Task[Result], evaluator: Evaluator) -> Result:
    """What a task asks for; raises AquabitError where memory does not suffice."""
    try:
        return task.run(evaluator)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AquabitError(OUT_OF_MEMORY.format(said)) from error


class WorkerFault(RuntimeError):
    """A worker failed in a way that is our fault; carries its traceback."""


@dataclass(frozen=True)
class Answer:
    """What a worker says to a task: its result, or what was wrong with the input (``error``), or what went
    wrong by our fault (``fault``, with its traceback)."""

    result: Any = None
    error: str | None = None
    fault: str | None = None

    def value(self) -> Any:
        """The result; raises AquabitError or WorkerFault where there is none."""
        if self.error is not None:
            raise AquabitError(self.error)
        if self.fault is not None:
            raise WorkerFault(self.fault)
        return self.result
