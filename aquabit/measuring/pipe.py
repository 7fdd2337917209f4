"""The pipe of a worker process: every task and answer as one line of JSON, and back. The only place where
measuring makes JSON of what crosses; ``value`` gives back what ``text`` took, whole numbers and tuples
included."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from aquabit.inputs import Inputs
from aquabit.measuring import tasks
from aquabit.measuring.evaluator import Measured
from aquabit.quality import QualityOptions
from aquabit.scheme import Calibration, LayerChoice, Measurement, Protocol, QuantConfig, Scheme, StepGroups

MARK = "$"  # a JSON object {"$Name": ...} is a value of the class of that name
CLASSES: dict[str, Any] = {
    c.__name__: c
    for c in (
        *(tasks.Begin, tasks.Measure, tasks.MeasureOutputErrors, tasks.MeasureSlopes),
        *(tasks.MeasureSketches, tasks.Portions, tasks.Fit, tasks.Probe, tasks.Answer, Measured),
        *(QuantConfig, LayerChoice, StepGroups, Calibration, Protocol, Measurement, QualityOptions, Inputs),
    )
}


def text(value: Any) -> str:
    """A task or an answer as one line of JSON."""
    return json.dumps(_plain(value))


def value(line: str) -> Any:
    """The task or the answer that ``text`` wrote."""
    return json.loads(line, object_hook=_marked)


def _plain(value: Any) -> Any:
    if isinstance(value, Scheme):
        return {MARK + "Scheme": str(value)}
    if isinstance(value, bytes):
        return {MARK + "bytes": base64.b64encode(value).decode()}
    if is_dataclass(value):
        names = [f.name for f in fields(value)]
    elif isinstance(value, Measured):
        names = list(value._fields)
    elif isinstance(value, tuple):
        return {MARK + "tuple": [_plain(v) for v in value]}
    elif isinstance(value, list):
        return [_plain(v) for v in value]
    elif isinstance(value, Mapping):
        if any(k.startswith(MARK) for k in value):  # a name of the model's that looks like a mark
            return {MARK + "dict": [[k, _plain(v)] for k, v in value.items()]}
        return {k: _plain(v) for k, v in value.items()}
    else:
        return value
    return {MARK + type(value).__name__: {name: _plain(getattr(value, name)) for name in names}}


def _marked(found: dict[str, Any]) -> Any:
    mark = next(iter(found), "")
    if not mark.startswith(MARK):
        return found
    name, inner = mark.removeprefix(MARK), found[mark]
    if name == "Scheme":
        return Scheme.parse(inner)
    if name == "bytes":
        return base64.b64decode(inner)
    if name == "dict":
        return dict(inner)
    return tuple(inner) if name == "tuple" else CLASSES[name](**inner)
