"""Model: what is measured, loaded, checked and traced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from aquabit.graph import graph_notes
from aquabit.pipelines import Model as OwnModel
from aquabit.pipelines import (
    Pipeline,
    adapter_of,
    check_sampler,
    check_scheduler,
    check_steps,
    component_names,
    denoiser_of,
    encoder_names,
    image_size,
    load,
    model_notes,
    network_of,
    scheduled,
    scheduler_named,
    scheduler_of,
    trace,
)
from aquabit.quality import Source
from aquabit.quant.correction.corrector import check_correction
from aquabit.quant.model import fingerprint
from aquabit.scheme import Protocol, StepGroups


@dataclass(frozen=True)
class Model:
    """A traced model, ready to be measured."""

    reference: str
    fingerprint: str
    graph: nx.DiGraph
    source: str | Pipeline  # what workers load
    scheduler: Any  # the pipeline's own
    own: Source | None  # its feature extractor and real images; None where it names none
    prompts: bool  # it makes images from text
    videos: bool  # a sample is a video, whose frames are images
    usual_size: tuple[int, int] | None  # of a pipeline's images, in pixels
    # what is to be said of a pipeline of no known family, and of weights that stay dense
    notes: tuple[str, ...] = ()
    made: OwnModel | None = None  # a model of the user's own, as it was opened
    strength: float | None = None  # that its pipeline takes where none is asked for
    components: tuple[str, ...] = ()  # of a pipeline, what is quantized
    encoders: tuple[str, ...] = ()  # of these, what runs before the sampler's steps

    @property
    def images(self) -> bool:
        """Whether it makes images, and no other numbers."""
        return self.made is None or self.made.images

    def size(self, resolution: int | None) -> tuple[int, int] | None:
        """Height and width of its images in pixels; None where that is not known."""
        if self.made is not None:
            return self.made.size(resolution)
        return self.usual_size if resolution is None else (resolution, resolution)


def open_model(model: str | Pipeline) -> Model:
    """Load, check and trace a model; raises AquabitError for one that cannot be measured."""
    pipe = load(model)
    own_class = denoiser_of(pipe) if isinstance(pipe, OwnModel) else pipe
    name = str(model) if isinstance(model, str) else type(own_class).__name__
    adapter = adapter_of(pipe)
    own, prompts = adapter.reference(), adapter.kind == "prompt"
    graph = trace(pipe)
    own_print = fingerprint(network_of(pipe))
    made = pipe if isinstance(pipe, OwnModel) else None
    size = None if made is not None else image_size(pipe)
    notes = (*model_notes(pipe, graph), *graph_notes(graph))
    components = tuple(component_names(pipe)) if made is None else ()
    return Model(
        reference=name,
        fingerprint=own_print,
        graph=graph,
        source=model,
        scheduler=scheduler_of(pipe),
        own=own,
        prompts=prompts,
        videos=adapter.makes_videos,
        usual_size=size,
        notes=notes,
        made=made,
        components=components,
        encoders=tuple(encoder_names(pipe)),
        strength=getattr(adapter, "usual_strength", None),
    )


def settled(model: Model, protocol: Protocol) -> Protocol:
    """A protocol as a model's sampler can follow it; raises AquabitError where it cannot, and where a sample
    function of the user's does not make the same images again (``check_sampler``)."""
    if model.made is None:
        check_scheduler(protocol.scheduler)
        usual = None if protocol.inputs is None else model.strength
        return replace(protocol, strength=protocol.strength or usual)
    found = model.made.settled(protocol)
    check_sampler(model.made, found)
    return found


def first_step(model: Model, protocol: Protocol) -> int:
    """The first of a protocol's steps that runs: not 0 where sampling begins with a picture."""
    if protocol.strength is None:
        return 0
    pipe = load(model.source)
    with scheduled(pipe, scheduler_of(pipe), protocol.scheduler):
        return adapter_of(pipe).first_step(protocol)


def check_correctable(
    model: Model, protocol: Protocol, correction: str | None, steps: StepGroups | None = None
) -> None:
    """Raise AquabitError where the sampler of a protocol cannot be corrected so, and where what is quantized
    cannot change between ``steps``, before anything is fitted or measured."""
    check_steps(model.components, model.encoders, correction, steps)
    check_correction(scheduler_named(model.scheduler, protocol.scheduler), correction, protocol.eta)
