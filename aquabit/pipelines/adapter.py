"""Adapter: where a pipeline's denoiser is, and how it makes images from seeds and conditions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import Any, TypeAlias

import diffusers
import networkx as nx
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from aquabit.graph import known_class, layers, outline
from aquabit.graph import trace as trace_denoiser
from aquabit.parts import Parts, parts_of
from aquabit.pipelines.effects import check_effects, first_step, runs_without
from aquabit.pipelines.family import EVERYWHERE, KINDS, family, family_notes, scheduler_of
from aquabit.pipelines.finite import finite_images
from aquabit.pipelines.image_maker import ImageMaker, first_inputs
from aquabit.pipelines.network import (
    component_names,
    copy_network_,
    denoiser_names,
    denoiser_of,
    encoder_names,
    network_of,
)
from aquabit.pipelines.outputs import images_of
from aquabit.pipelines.own_model import CallSteps, Model, OwnAdapter, unnamed
from aquabit.pipelines.picture_arguments import (
    check_roles,
    made_up,
    missing_pictures,
    picture_arguments,
    pictures_for,
)
from aquabit.pipelines.prompts import embeddings
from aquabit.pipelines.running import as_measured
from aquabit.pipelines.sizes import frames_argument, image_batch, image_size
from aquabit.quality import Source, real_images
from aquabit.quant.calibration.ranges import Sample
from aquabit.quant.calibration.recording import Call, record_calls
from aquabit.quant.correction.noise_measuring import measure_noise
from aquabit.quant.correction.sampling import Watcher, following, refollow_, unfollowed
from aquabit.quant.correction.statistics import Statistics
from aquabit.quant.finetuning.replay import Recording, recording
from aquabit.quant.model import QuantizedDenoiser
from aquabit.scheme import SCHEDULERS, AquabitError, Calibration, Progress, Protocol, QuantConfig, no_progress

# of a video from a picture that is made to be traced: its encoder would take minutes for all of them
FEW_FRAMES = 9
GUIDANCE = ("guidance_scale", "true_cfg_scale")  # where a pipeline of no known family takes guidance
Pipeline: TypeAlias = DiffusionPipeline | Model  # what makes images
CALIBRATION_BATCH, CALIBRATION_CALLS = 16, 64  # images of a denoiser call that is kept, and how many are kept


def adapter_of(pipe: Pipeline) -> ImageMaker:
    """What makes images with a pipeline or a model of the user's own."""
    return OwnAdapter(pipe) if isinstance(pipe, Model) else Adapter(pipe)


def trace(model: Pipeline | nn.Module) -> nx.DiGraph:
    """The layer graph of a pipeline's denoiser, or of a bare denoiser.

    Inputs are made from the config where the denoiser's class is known, else they are those of the pipeline's
    own first call.
    """
    if isinstance(model, Model):
        return model.trace()
    with unfollowed(network_of(model)):  # this is no sampling
        return _traced(model)


def _traced(model: DiffusionPipeline | nn.Module) -> nx.DiGraph:
    network = network_of(model)
    parts = parts_of(network)
    if isinstance(model, nn.Module) or all(known_class(type(part)) for part in parts.values()):
        return trace_denoiser(network)
    given = {
        name: {**dict(zip(inspect.signature(parts[name].forward).parameters, args, strict=False)), **kwargs}
        for name, (args, kwargs) in _calls_it(Adapter(model)).items()
        if not known_class(type(parts[name]))
    }
    return trace_denoiser(network, given if isinstance(network, Parts) else given[""])


def _calls_it(adapter: Adapter) -> dict[str, Call]:
    """Inputs of a pipeline's first calls of what is quantized, of made-up pictures where it needs some;
    raises AquabitError for whatever its own code raises."""
    pipe, asked = adapter.pipe, adapter.shortest()
    if picture_arguments(pipe) and adapter.stops_at(asked) is not None:
        frames = FEW_FRAMES if "num_frames" in adapter.parameters else None
        asked = replace(asked, inputs=made_up(pipe, ()), frames=frames)
        if missing_pictures(pipe, asked) and adapter.stops_at(asked) is not None:
            asked = replace(asked, inputs=made_up(pipe))
    try:
        return adapter.first_calls(asked)
    except AquabitError:
        raise
    except Exception as error:
        raise AquabitError(
            f"{type(pipe).__name__} does not come to its denoiser, which is to be traced there"
            f" ({type(error).__name__}: {' '.join(str(error).split()):.200})"
        ) from error


def model_notes(pipe: Pipeline, graph: nx.DiGraph) -> list[str]:
    """What is to be said of operator types and adapters that are not known, and of what a pipeline makes that
    is not measured; nothing where there is no such thing."""
    return unnamed(graph) if isinstance(pipe, Model) else [*family_notes(pipe), *_unheard(pipe, graph)]


def _unheard(pipe: DiffusionPipeline, graph: nx.DiGraph) -> list[str]:
    names = [name for name, node in layers(graph).items() if node["operator"].startswith("audio.")]
    if not names:
        return []
    return [
        f"{type(pipe).__name__} makes sound too, and only its images are measured: of {len(names)} layers of"
        f" the sound, as {names[0]!r}, what they do to images is all that is known, so a search gives them"
        ' few bits; where sound counts keep them precise by --space, as {"pinned": {"*audio_*": "usq8"}}'
    ]


def own_copy(pipe: Pipeline, *parts: str) -> Any:
    """A pipeline that shares everything with ``pipe`` but what is quantized and these components, which are
    copied; it shows no progress bar."""
    if isinstance(pipe, Model):
        return pipe.copied()
    own = copy.copy(pipe)
    copy_network_(own)
    own.__dict__.update({part: copy.deepcopy(getattr(pipe, part)) for part in parts})
    own.set_progress_bar_config(disable=True)
    return own


def check_scheduler(name: str) -> None:
    if name != "default" and name not in SCHEDULERS:
        raise AquabitError(f"scheduler {name!r} is unknown; known: default, {', '.join(SCHEDULERS)}")


def scheduler_named(own: Any, name: str) -> Any:
    """The sampler of that name with the settings of a pipeline's own ("default": that one itself)."""
    if isinstance(own, CallSteps):
        own.check(name)
        return own
    check_scheduler(name)
    return own if name == "default" else getattr(diffusers, SCHEDULERS[name]).from_config(own.config)


def set_scheduler(pipe: Pipeline, name: str) -> None:
    """Replace the sampler by name ("default" keeps the pipeline's own)."""
    own = scheduler_of(pipe)
    if own is None and name != "default":
        raise AquabitError(f"scheduler is {name}, but {type(pipe).__name__} has no scheduler; leave it out")
    found = scheduler_named(own, name)
    if found is own:
        return
    pipe.scheduler = found
    refollow_(network_of(pipe), pipe.scheduler)


def use_scheduler(pipe: Pipeline, scheduler: Any, name: str = "default") -> None:
    """A pipeline samples with ``scheduler``, or with the sampler of that name made of it; nothing where it
    has none."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    set_scheduler(pipe, name)


@contextmanager
def scheduled(pipe: Pipeline, scheduler: Any, name: str) -> Iterator[None]:
    """For a while a pipeline samples with the sampler of that name, made of ``scheduler``."""
    now = scheduler_of(pipe)
    try:
        use_scheduler(pipe, scheduler, name)
        yield
    finally:
        use_scheduler(pipe, now)


def calibration_samples(pipe: Pipeline, calibration: Calibration) -> int:
    """Samples of the denoiser's own size that one of its calls takes as much memory as, while ``recorder``'s
    images are made."""
    batch = min(image_batch(pipe, calibration, CALIBRATION_BATCH), calibration.images)
    branches = 2 if calibration.guidance != 1.0 else 1
    asked, own = image_size(pipe, calibration.resolution), image_size(pipe)
    larger = 1.0 if asked is None or own is None else prod(asked) / prod(own)
    return ceil(batch * branches * larger)


def recorder(pipe: Pipeline) -> Callable[[Calibration], list[Call]]:
    """What records the denoiser's calls while the pipeline makes calibration images, stratified over steps
    and conditions."""
    runs = _runs(pipe)

    def record(calibration: Calibration) -> list[Call]:
        batch = image_batch(pipe, calibration, CALIBRATION_BATCH)
        with runs(calibration, batch) as made:
            return record_calls(network_of(pipe), made, CALIBRATION_CALLS)

    return record


def _runs(pipe: Pipeline) -> Callable[[Calibration, int], AbstractContextManager[list[Callable[[], object]]]]:
    """What gives the runs that make a calibration's images in batches of so many, with the pipeline's
    scheduler of now."""
    scheduler = scheduler_of(pipe)

    @contextmanager
    def runs(calibration: Calibration, batch: int) -> Iterator[list[Callable[[], object]]]:
        protocol, adapter = calibration.protocol(batch), adapter_of(pipe)
        with scheduled(pipe, scheduler, calibration.scheduler):
            if isinstance(adapter, Adapter) and encoder_names(pipe) == component_names(pipe):
                yield [partial(adapter.encode, protocol, part) for part in adapter.batches(protocol)]
            else:
                yield [partial(finite_images, adapter, protocol, part) for part in adapter.batches(protocol)]

    return runs


def replay_recorder(pipe: Pipeline) -> Callable[[Calibration, int], Recording]:
    """What records every denoiser call and its output while the pipeline makes images, in batches of so
    many (for fine-tuning)."""
    runs = _runs(pipe)

    def record(calibration: Calibration, batch: int) -> Recording:
        with runs(calibration, batch) as made:
            return recording(network_of(pipe), made, scheduler_of(pipe))

    return record


def sampler(pipe: Pipeline) -> Sample:
    """What makes calibration images with the pipeline's denoiser as it is, while watchers follow."""
    scheduler = scheduler_of(pipe)

    def sample(calibration: Calibration, watchers: Sequence[Watcher]) -> None:
        protocol, adapter = calibration.protocol(CALIBRATION_BATCH), adapter_of(pipe)
        with (
            scheduled(pipe, scheduler, calibration.scheduler),
            following(adapter.network, scheduler_of(pipe), watchers),
        ):
            for batch in adapter.batches(protocol):
                adapter.images(protocol, batch)

    return sample


def noise_statistics(
    pipe: Pipeline,
    model: QuantizedDenoiser,
    config: QuantConfig,
    calibration: Calibration,
    watchers: Sequence[Watcher] = (),
    progress: Progress = no_progress,
) -> Statistics:
    """Statistics of the noise that ``config`` adds while the pipeline makes calibration images with the
    quantized denoiser.

    ``model`` wraps the pipeline's denoiser, in dense mode; it is left as ``config`` says.
    """
    plain = replace(config, correction=None)
    batch = image_batch(pipe, calibration, CALIBRATION_BATCH)
    protocol, adapter = calibration.protocol(batch), adapter_of(pipe)
    with scheduled(pipe, scheduler_of(pipe), calibration.scheduler):
        runs = [
            (lambda batch=batch: adapter.images(protocol, batch), len(batch))
            for batch in adapter.batches(protocol)
        ]
        model.apply(plain)
        full = partial(model.in_full_precision, plain)
        owner = (config.fingerprint, plain.digest)
        switches = model.watchers(plain)  # of activations that change between steps
        return measure_noise(
            adapter.network, scheduler_of(pipe), runs, full, *owner, [*switches, *watchers], progress
        )


@contextmanager
def _outlined(network: nn.Module) -> Iterator[None]:
    """For a while a network answers every call with zeros of the sizes that it returns for the first."""
    before, answers = vars(network).get("forward"), list[Any]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            replaced = vars(network).pop("forward")
            if before is not None:
                vars(network)["forward"] = before
            answers.append(outline(network, args, kwargs))
            vars(network)["forward"] = replaced
        return answers[0]

    vars(network)["forward"] = forward
    try:
        yield
    finally:
        del vars(network)["forward"]
        if before is not None:
            vars(network)["forward"] = before


class Adapter:
    """Makes images [n, c, h, w] float32 in [0, 1]: image i from its own seed, so that it depends on no other
    image.

    What pipelines differ in is told by their ``Family``; one of no known family is used as its call's
    arguments say. Watermarks and safety checkers, which change images, are off. Prompts are encoded once.
    """

    makes_images = True

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.family = pipe, family(pipe)
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.frames = frames_argument(pipe)
        self.makes_videos = self.frames is not None
        self.kind = (
            self.family.kind if self.family else next((k for k in KINDS if k in self.parameters), None)
        )
        if self.kind is None and picture_arguments(pipe):
            self.kind = "batch_size"  # of the pictures alone
        if self.kind is None or "generator" not in self.parameters:
            raise AquabitError(
                f"{type(pipe).__name__} takes neither class_labels, prompt nor batch_size with a generator;"
                " it cannot be measured"
            )

    @property
    def network(self) -> nn.Module:
        return network_of(self.pipe)

    def conditions(self, protocol: Protocol) -> list[Any]:
        """One condition an image, repeated in order: the protocol's, else every class in turn."""
        given: Sequence[Any] | None = protocol.conditions
        if given is None and self.kind == "prompt":
            raise AquabitError(
                f"{type(self.pipe).__name__} makes images from text; give --prompts FILE with one prompt a"
                " line"
            )
        if given is None:
            given = range(self._classes() or 1)
        if self.kind == "class_labels":
            given = [self._label(c) for c in given]
        return [given[i % len(given)] for i in range(protocol.images)]

    def _classes(self) -> int:
        """The number of classes; 0 where it is not known."""
        return int(
            getattr(self.pipe.config, "classes", None)
            or getattr(getattr(denoiser_of(self.pipe), "config", None), "num_embeds_ada_norm", None)
            or 0
        )

    def _label(self, condition: Any) -> int:
        text, classes = str(condition).strip(), self._classes()
        if not text.isdigit():
            raise AquabitError(
                f"condition {text!r} is no class label; {type(self.pipe).__name__} takes whole numbers from 0"
            )
        if classes and int(text) >= classes:
            raise AquabitError(
                f"class label {text} is out of range; {type(self.pipe).__name__} has classes 0 to"
                f" {classes - 1}"
            )
        return int(text)

    def check_taken(self, protocol: Protocol) -> None:
        """Raise AquabitError where the pipeline or its sampler takes no such thing as the protocol asks for;
        nothing is run."""
        name, sampler = type(self.pipe).__name__, scheduler_of(self.pipe)
        step = {} if sampler is None else inspect.signature(sampler.step).parameters
        if protocol.eta and not ("eta" in self.parameters and "eta" in step):
            raise AquabitError(
                f"eta is {protocol.eta:g}, but {name} with {type(sampler).__name__} has no eta; use"
                " --scheduler ddim or eta 0"
            )
        if protocol.guidance != 1.0 and self.guidance is None:
            raise AquabitError(f"guidance is {protocol.guidance:g}, but this {name} has no guidance; use 1")
        if "num_inference_steps" not in self.parameters:
            raise AquabitError(
                f"{name} takes no number of steps (num_inference_steps), so none can be asked for"
            )
        if protocol.conditions is not None and self.kind == "batch_size":
            raise AquabitError(f"{name} is unconditional; it takes no prompts or classes")
        if protocol.conditions is not None and self.kind == "class_labels":
            for condition in dict.fromkeys(protocol.conditions):
                self._label(condition)
        check_roles(self.pipe, protocol)
        self._check_strength(protocol)
        own, asked = image_size(self.pipe), protocol.resolution
        # images have their picture's size
        sized = "height" in self.parameters or picture_arguments(self.pipe)
        if asked is not None and (asked, asked) != own and not sized:
            side = "its own number of" if own is None else " x ".join(map(str, dict.fromkeys(own)))
            raise AquabitError(f"resolution is {asked}, but {name} makes images of {side} pixels only")
        if protocol.frames is not None and self.frames is None:
            raise AquabitError(f"frames is {protocol.frames}, but {name} takes no number of frames")

    def _check_strength(self, protocol: Protocol) -> None:
        name, strength = type(self.pipe).__name__, protocol.strength
        if strength is not None and "strength" not in self.parameters:
            raise AquabitError(f"strength is {strength:g}, but {name} takes none; leave it out")
        share = self.usual_strength if strength is None else strength
        if share is not None and int(protocol.steps * share + 1e-9) < 1:
            raise AquabitError(
                f"strength {share:g} of {protocol.steps} steps leaves none to run; give at least"
                f" {ceil(1 / share)} steps, or more strength"
            )

    @property
    def usual_strength(self) -> float | None:
        """The strength that the pipeline takes where none is asked for; None where it has none."""
        own = self.parameters.get("strength")
        return float(own.default) if own is not None and isinstance(own.default, int | float) else None

    def stops_at(self, protocol: Protocol) -> str | None:
        """Why the pipeline does not come to its denoiser with the pictures that a protocol has; None where it
        does."""
        return runs_without(self.pipe, self._run, protocol)

    def _check_pictures(self, protocol: Protocol) -> None:
        """Raise AquabitError where the pipeline needs pictures that the protocol does not have."""
        missing = missing_pictures(self.pipe, protocol)
        said = self.stops_at(protocol) if missing else None
        if said is not None:
            files = " and ".join(f"cat{'.' * bool(role)}{role}.png" for role in missing)
            raise AquabitError(
                f"{type(self.pipe).__name__} makes no images without {', '.join(missing.values())}; give"
                f" --inputs DIR, a folder with {files} for every picture ({said})"
            )

    def check(self, protocol: Protocol) -> None:
        """Raise AquabitError where the pipeline or its sampler would ignore what the protocol asks for."""
        self.check_taken(protocol)
        self._check_pictures(protocol)
        own, asked = image_size(self.pipe), protocol.resolution
        asked = None if (asked, asked) == own else asked  # what would be made anyhow
        strength = None if protocol.strength == self.usual_strength else protocol.strength
        check_effects(self.pipe, self._run, replace(protocol, resolution=asked, strength=strength))

    def shortest(self) -> Protocol:
        """One image of no prompt, as the pipeline makes it where nothing else is asked for."""
        conditions = ("",) if self.kind == "prompt" else None
        return Protocol(images=1, steps=self.usual_steps, micro_batch=1, conditions=conditions)

    @property
    def usual_steps(self) -> int:
        """The number of steps that the pipeline makes where none is asked for."""
        own = self.parameters.get("num_inference_steps")
        return own.default if own is not None and isinstance(own.default, int) else 10

    @property
    def guidance(self) -> str | None:
        """The argument that takes guidance, or "guider", the component that has it; None where there is
        neither."""
        if hasattr(getattr(self.pipe, "guider", None), "guidance_scale"):
            return "guider"
        known = (self.family.guidance,) if self.family else GUIDANCE
        if not getattr(getattr(denoiser_of(self.pipe), "config", None), "guidance_embeds", False):
            known = known[::-1]  # where both are there, the other one is of distilled denoisers
        return next((name for name in known if name in self.parameters), None)

    def alone(self, protocol: Protocol) -> bool:
        """Whether a call of the pipeline makes one sample, whatever the micro-batch: with pictures it does
        unless its family is known to take one a sample."""
        if self.family is not None and self.family.alone:
            return True
        return protocol.inputs is not None and not (self.family is not None and self.family.together)

    def first_step(self, protocol: Protocol) -> int:
        """The first of the protocol's steps that runs: not 0 where sampling begins with a picture."""
        return first_step(self.pipe, self._run, protocol) if "strength" in self.parameters else 0

    def calls(self, protocol: Protocol) -> int:
        """Steps of the sampler that all of a protocol's images take, each of a micro-batch."""
        batches = protocol.images if self.alone(protocol) else len(self.batches(protocol))
        return batches * (protocol.steps - self.first_step(protocol))

    def batches(self, protocol: Protocol) -> list[range]:
        return [
            range(i, min(i + protocol.micro_batch, protocol.images))
            for i in range(0, protocol.images, protocol.micro_batch)
        ]

    def images(self, protocol: Protocol, indices: range, gradients: bool = False) -> Tensor:
        """The images of some indices as one micro-batch, padded to its full size so that arithmetic does not
        depend on the count; with ``gradients`` as they come, and gradients pass from them to the denoiser.

        Raises AquabitError for what the pipeline refuses, and where memory ends.
        """
        self.check(protocol)
        refollow_(self.network, scheduler_of(self.pipe))  # it may have been replaced
        if self.alone(protocol):
            one = replace(protocol, micro_batch=1)
            images = torch.cat([self._run(one, range(i, i + 1), gradients) for i in indices])
        else:
            images = self._run(protocol, indices, gradients)
        side = protocol.resolution
        if side is not None and tuple(images.shape[-2:]) != (side, side):
            made = " x ".join(map(str, images.shape[-2:]))
            raise AquabitError(
                f"resolution is {side}, but {type(self.pipe).__name__} makes images of {made} pixels of that;"
                " use a multiple of 64"
            )
        return images if gradients else images.float().cpu()

    def _run(self, protocol: Protocol, indices: range, gradients: bool = False) -> Tensor:
        """The images of some indices as the pipeline gives them, of what was padded the first ones."""
        padded = [*indices, *[indices[-1]] * (protocol.micro_batch - len(indices))]
        name, call = type(self.pipe).__name__, type(self.pipe).__call__
        with as_measured(self.pipe, protocol, indices.start):
            arguments = self._arguments(protocol, padded, gradients)
            if gradients:
                with torch.enable_grad():  # below what switches it off
                    output = getattr(call, "__wrapped__", call)(self.pipe, **arguments)
            else:
                with torch.inference_mode():
                    output = call(self.pipe, **arguments)
        images = images_of(output, len(padded), name)
        return images[: len(indices) * (len(images) // len(padded))]

    def _arguments(
        self, protocol: Protocol, indices: Sequence[int], gradients: bool = False
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call for some images."""
        conditions = self.conditions(protocol)
        here = [conditions[i] for i in indices]
        given: dict[str, Any] = {
            "generator": [torch.Generator("cpu").manual_seed(protocol.seed + i) for i in indices],
            "num_inference_steps": protocol.steps,
            str(self.guidance): protocol.guidance - 1.0 + (self.family.off if self.family else 1.0),
            "eta": protocol.eta,
            "output_type": "pt",
            "height": protocol.resolution,
            "width": protocol.resolution,
            str(self.frames): protocol.frames,
            "strength": protocol.strength,
            "max_area": None if protocol.resolution is None else protocol.resolution**2,  # of FLUX.1 Kontext
        }
        always = {**EVERYWHERE, **(self.family.options if self.family else {})}
        if self.guidance == "true_cfg_scale":  # it acts beside a negative prompt
            given["negative_prompt"] = [""] * len(here) if protocol.guidance != 1.0 else None
        given = {k: v for k, v in given.items() if v is not None} | always
        given = {k: v for k, v in given.items() if k in self.parameters}
        if alone := self.alone(protocol):
            given["generator"] = given["generator"][0]
        given |= pictures_for(self.pipe, protocol, indices, alone)
        if "batch_size" in self.parameters:
            given["batch_size"] = len(here)
        if self.kind == "batch_size":
            return given
        if self.family is None or not self.family.encodings:
            return given | {str(self.kind): here}
        every, guided = [str(c) for c in conditions], protocol.guidance > 1.0 and not self.family.embedded
        if "negative_prompt" in self.parameters:
            given["negative_prompt"] = (
                None  # of some pipelines it is text by default, which they refuse beside embeddings
            )
        prompts = [str(c) for c in here]
        return given | embeddings(self.pipe, self.family.encodings, prompts, every, guided, gradients)

    def encode(self, protocol: Protocol, indices: range) -> None:
        """What runs before the denoiser for some images; they are not made."""
        first_inputs(denoiser_of(self.pipe), partial(self._run, protocol, indices))

    def first_inputs(self, protocol: Protocol) -> Call:
        """Inputs of the first denoiser call of ``protocol``'s first micro-batch; no image is finished."""
        return next(iter(self.first_calls(protocol).values()))

    def first_calls(
        self, protocol: Protocol, parts: Mapping[str, nn.Module] | None = None
    ) -> dict[str, Call]:
        """Inputs of the first call of each of ``parts`` (default: those of the network, ``parts_of``) in
        ``protocol``'s first micro-batch. Other denoisers that are called before that only say what sizes they
        return."""
        self.check(protocol)
        one = replace(protocol, micro_batch=1) if self.alone(protocol) else protocol
        run, found = partial(self._run, one, self.batches(one)[0]), dict[str, Call]()
        for name, part in (parts_of(self.network) if parts is None else parts).items():
            with ExitStack() as stack:
                for other in (getattr(self.pipe, d) for d in denoiser_names(self.pipe)):
                    if other is not part:
                        stack.enter_context(_outlined(other))
                call = first_inputs(part, run)
            if call is None:
                what = name or ", ".join(component_names(self.pipe))
                raise AquabitError(
                    f"{type(self.pipe).__name__} makes its images of {protocol.steps} steps without a call of"
                    f" its {what}"
                )
            found[name] = call
        return found

    def first_call(self, protocol: Protocol) -> Callable[[], object]:
        """The first call of each part of the network in ``protocol``'s first micro-batch, to be made
        again."""
        return self._again(protocol, parts_of(self.network))

    def step_call(self, protocol: Protocol) -> Callable[[], object]:
        """The first denoiser call of ``protocol``'s first micro-batch, whatever is quantized, to be made
        again."""
        return self._again(protocol, {denoiser_names(self.pipe)[0]: denoiser_of(self.pipe)})

    def _again(self, protocol: Protocol, parts: Mapping[str, nn.Module]) -> Callable[[], object]:
        calls = self.first_calls(protocol, parts)

        def call() -> object:
            with torch.inference_mode():
                return [parts[name](*args, **kwargs) for name, (args, kwargs) in calls.items()]

        return call

    def labels(self, protocol: Protocol, indices: range) -> list[int] | None:
        """Class labels of some images; None where the conditions are no classes."""
        conditions = self.conditions(protocol)
        return [int(conditions[i]) for i in indices] if self.kind == "class_labels" else None

    def reference(self) -> Source | None:
        """Feature extractor and statistics of the real images that belong to the pipeline; None where it
        names no such set."""
        name = getattr(self.pipe.config, "real_images", "")
        return real_images(name).source() if name else None
