"""Model: what is measured, loaded, checked and traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
from diffusers import DiffusionPipeline

from aquabit.graph import graph_notes
from aquabit.measuring.evaluator import own_source
from aquabit.pipelines import (
    Adapter,
    denoiser_of,
    family_notes,
    image_size,
    load,
    scheduler_named,
    scheduler_of,
    trace,
)
from aquabit.quality import Source
from aquabit.quant.correction.corrector import check_correction
from aquabit.quant.model import fingerprint
from aquabit.scheme import Protocol


@dataclass(frozen=True)
class Model:
    """A traced model, ready to be measured."""

    reference: str
    fingerprint: str
    graph: nx.DiGraph
    source: str | DiffusionPipeline  # what workers load
    scheduler: Any  # the pipeline's own
    own: Source | None  # its feature extractor and real images; None where it names none
    prompts: bool  # it makes images from text
    size: tuple[int, int] | None  # of its images, in pixels
    # what is to be said of a pipeline of no known family, and of weights that stay dense
    notes: tuple[str, ...] = ()


def open_model(model: str | DiffusionPipeline) -> Model:
    """Load, check and trace a model; raises AquabitError for one that cannot be measured."""
    pipe = load(model)
    name = str(model) if isinstance(model, str) else type(pipe).__name__
    adapter = Adapter(pipe)
    own, prompts = own_source(adapter), adapter.kind == "prompt"
    own_print, size = fingerprint(denoiser_of(pipe)), image_size(pipe)
    graph = trace(pipe)
    notes = (*family_notes(pipe), *graph_notes(graph))
    return Model(name, own_print, graph, model, scheduler_of(pipe), own, prompts, size, notes)


def check_correctable(model: Model, protocol: Protocol, correction: str | None) -> None:
    """Raise AquabitError where the sampler of a protocol cannot be corrected so, before anything is fitted
    or measured."""
    check_correction(scheduler_named(model.scheduler, protocol.scheduler), correction, protocol.eta)
