"""aquabit: where quantization hurts a diffusion model, which bits each layer should get, and the result,
packed and run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aquabit.diffusers_hook import register_with_diffusers

__version__ = "0.1.0"

_HOMES = {
    "AquabitError": "scheme",
    "Budget": "scheme",
    "Protocol": "scheme",
    "QuantConfig": "scheme",
    "Scheme": "scheme",
    "SearchSpace": "space",
    "Study": "study",
    "load": "pipelines",
    "trace": "pipelines",
    "add_lora": "pipelines",
    "remove_lora": "pipelines",
    "measure": "workflows",
    "explain": "sensitivity.explaining",
    "Sensitivity": "sensitivity.result",
    "validate": "workflows",
    "find": "workflows",
    "Front": "search.front",
    "quantize": "packing",
    "generate": "packing",
    "run": "workflows",
    "report": "reports",
    "quantize_weight": "quant.weights",
    "QualityOptions": "quality",
    "CodebookWeight": "kernels",
    "FineTuning": "quant.finetuning.settings",
    "AquabitConfig": "quant.diffusers_quantizer",
    "Model": "pipelines.own_model",
    "Inputs": "inputs",
    "read_inputs": "inputs",
}

if TYPE_CHECKING:
    from aquabit.inputs import Inputs as Inputs
    from aquabit.inputs import read_inputs as read_inputs
    from aquabit.kernels import CodebookWeight as CodebookWeight
    from aquabit.packing import generate as generate
    from aquabit.packing import quantize as quantize
    from aquabit.pipelines import add_lora as add_lora
    from aquabit.pipelines import load as load
    from aquabit.pipelines import remove_lora as remove_lora
    from aquabit.pipelines import trace as trace
    from aquabit.pipelines.own_model import Model as Model
    from aquabit.quality import QualityOptions as QualityOptions
    from aquabit.quant.diffusers_quantizer import AquabitConfig as AquabitConfig
    from aquabit.quant.finetuning.settings import FineTuning as FineTuning
    from aquabit.quant.weights import quantize_weight as quantize_weight
    from aquabit.reports import report as report
    from aquabit.scheme import AquabitError as AquabitError
    from aquabit.scheme import Budget as Budget
    from aquabit.scheme import Protocol as Protocol
    from aquabit.scheme import QuantConfig as QuantConfig
    from aquabit.scheme import Scheme as Scheme
    from aquabit.search.front import Front as Front
    from aquabit.sensitivity.explaining import explain as explain
    from aquabit.sensitivity.result import Sensitivity as Sensitivity
    from aquabit.space import SearchSpace as SearchSpace
    from aquabit.study import Study as Study
    from aquabit.workflows import find as find
    from aquabit.workflows import measure as measure
    from aquabit.workflows import run as run
    from aquabit.workflows import validate as validate

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `aquabit --help` is quick."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"aquabit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in (
        "kernels",
        "quant",
        "sensitivity",
        "search",
        "reports",
        "pipelines",
        "quality",
        "graph",
        "space",
        "cost",
        "scheme",
        "study",
        "workflows",
    ):
        return importlib.import_module(f"aquabit.{name}")
    raise AttributeError(f"module 'aquabit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_with_diffusers()
