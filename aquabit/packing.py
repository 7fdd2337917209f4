"""Packed models: a pipeline whose denoiser runs from codes, fine-tuned and corrected where that is asked
for; and images from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from aquabit.files import check_apart, follow_umask, write_text, writing_folder
from aquabit.graph import LayerGraph, layers, repeated_names
from aquabit.inputs import Inputs, read_inputs
from aquabit.jsonio import read_json
from aquabit.kernels import Accuracy
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.dispatch import using
from aquabit.memory import check_images, check_quantizing
from aquabit.parts import parts_of
from aquabit.pipelines import Model as OwnModel
from aquabit.pipelines import (
    Pipeline,
    adapter_of,
    add_lora,
    branched,
    calibration_samples,
    check_steps,
    component_names,
    encoder_names,
    free_text_encoders,
    image_batch,
    image_size,
    load,
    network_of,
    noise_statistics,
    own_copy,
    recorder,
    remove_lora,
    replay_recorder,
    restore_text_encoders,
    sampler,
    scheduled,
    scheduler_named,
    scheduler_of,
    set_scheduler,
    sources_of,
    trace,
)
from aquabit.pipelines.image_maker import ImageMaker
from aquabit.pipelines.lora import Source
from aquabit.pipelines.reference import Reference
from aquabit.quant.artifact import WEIGHT_FILES, Contents, config_of, was_packed
from aquabit.quant.bank import Bank
from aquabit.quant.bare_artifact import save_bare_denoiser
from aquabit.quant.correction.corrector import DEFAULT_CORRECTION, check_correction, corrected_, statistics_of
from aquabit.quant.correction.sampling import follow_, unfollowed, watchers_of
from aquabit.quant.correction.statistics import Statistics
from aquabit.quant.diffusers_quantizer import attach_
from aquabit.quant.finetuning.finetune import FineTuning, Tuned, check_tunable
from aquabit.quant.finetuning.finetune import finetune as tune
from aquabit.quant.kernel_tuning import MEMORY, Placement, layers_of, place_
from aquabit.quant.model import QuantizedDenoiser, check_fingerprint
from aquabit.quant.packed_encoder import save_packed
from aquabit.runtime import reuse_memory, single_thread
from aquabit.scheme import (
    AquabitError,
    Calibration,
    Progress,
    Protocol,
    QuantConfig,
    no_progress,
    parse_correction,
)

AnyModel: TypeAlias = str | Pipeline

MICRO_BATCH = 64  # images of a call, where their pixels allow it


class SamplingOptions(TypedDict, total=False):
    """The fields of ``Sampling`` as keywords of ``generate``."""

    eta: float | None
    guidance: float | None
    resolution: int | None
    scheduler: str | None
    frames: int | None
    inputs: str | Path | Inputs | None
    strength: float | None
    deterministic: bool


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, ``resolution`` in pixels, ``frames`` of each video, from pictures (``inputs``:
    a folder for ``aquabit.read_inputs``) with a ``strength``; None: as the artifact's configuration was
    measured, else as ``Calibration`` has it. ``deterministic``: the same bits whatever timings and threads
    there are."""

    eta: float | None = None
    guidance: float | None = None
    resolution: int | None = None
    scheduler: str | None = None
    frames: int | None = None
    inputs: str | Path | Inputs | None = None
    strength: float | None = None
    deterministic: bool = False


class Packed:
    """A pipeline whose denoiser runs from codes. ``pipe`` makes images; ``save`` writes the artifact."""

    def __init__(
        self,
        pipe: Pipeline,
        model: QuantizedDenoiser,
        config: QuantConfig,
        statistics: Statistics | None = None,
    ):
        self._pipe, self._model, self.config, self.statistics = pipe, model, config, statistics

    @property
    def is_own(self) -> bool:
        """Whether it is a model of the user's own, which no folder alone brings back."""
        return isinstance(self._pipe, OwnModel)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of what is packed."""
        return ("denoiser",) if isinstance(self._pipe, OwnModel) else tuple(component_names(self._pipe))

    @property
    def pipe(self) -> Any:
        self._model.arrange()  # what is only saved never is: its codes stay in the bank's files
        return self._pipe

    @property
    def model(self) -> QuantizedDenoiser:
        self._model.arrange()
        return self._model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, **kwargs)

    def add_lora(self, source: Source, scale: float = 1.0) -> None:
        """Put a LoRA beside the packed layers, at 16 bits (``aquabit.add_lora``)."""
        add_lora(self.pipe, source, scale)

    def remove_lora(self) -> None:
        """Take every LoRA off again: the model is what it was before."""
        remove_lora(self.pipe)

    def save(self, folder: str | Path, max_shard_size: int | str = "10GB") -> int:
        """Write a diffusers pipeline directory, weights in files of at most ``max_shard_size`` (bytes, or
        as "5GB"); the bytes of the denoiser's tensors. Of a model of the user's own: its tensors and the
        configuration, for ``load(folder, into=model)``.

        It may take the place of another packed model. Raises AquabitError, and leaves what is there as it is,
        where the folder is, holds or lies in the place that the pipeline was loaded from, where files of
        others would be overwritten, and where it cannot be written.
        """
        if isinstance(self._pipe, OwnModel):
            return save_bare_denoiser(self._model.denoiser, Path(folder), max_shard_size)
        names = component_names(self._pipe)
        if branched(self._pipe):
            raise AquabitError(
                "a LoRA is beside this model and would not be saved; take it off by remove_lora() first"
            )
        for source in sorted(sources_of(self._pipe), key=len):  # the whole before its parts
            check_apart(folder, source)
        restore_text_encoders(self._pipe)
        try:
            replaced = [f"{name}/{old}" for name in names for old in WEIGHT_FILES]
            with writing_folder(folder, replaced, was_packed) as made:
                for component, value in self._pipe.components.items():
                    if component not in names and hasattr(value, "save_pretrained"):
                        value.save_pretrained(made / component)
                self._pipe.save_config(made)
                size = sum(
                    save_packed(getattr(self._pipe, name), made / name, max_shard_size) for name in names
                )
                for file in (made / "model_index.json", *made.glob("*/config.json")):
                    _forget_local_path(file)
                follow_umask(made, made.glob("*/*.safetensors"))
        except SafetensorError as error:
            raise AquabitError(f"{folder} could not be written ({error})") from error
        return size


def _forget_local_path(file: Path) -> None:
    """Where a model was loaded from stays in what diffusers saves; a folder of this machine tells nobody."""
    value = read_json(file) if file.exists() else {}
    if Path(str(value.pop("_name_or_path", ""))).is_absolute():
        write_text(file, json.dumps(value, indent=2) + "\n")


def quantize(
    pipe: AnyModel,
    config: QuantConfig,
    *,
    correct: bool | str = False,
    finetune: FineTuning | bool = False,
    bank: str | None = None,
    device: str = "cpu",
    accuracy: Accuracy = "fast",
    progress: Progress = no_progress,
    told: Callable[[Tuned], None] | None = None,
) -> Packed:
    """A copy of the pipeline with its denoiser packed; what the bank lacks is fitted, calibrated schemes on
    images that the pipeline makes.

    ``finetune``: the coded weights are tuned against the full-precision model first, with these settings
    (True: the defaults), with torch's threads; ``told`` hears how that went, and the result's ``config``
    names the tuned tensors. ``correct`` (True: what the configuration names, else cnc+bc; or a text as
    "cnc+bc+vsc") corrects the noise of quantization, whose statistics are measured as ``config.calibration``
    samples; the pipeline then keeps that sampler. Raises AquabitError for a configuration of another model.
    """
    source, model = _copied(pipe, config, bank, device)
    if correct:
        asked = correct if isinstance(correct, str) else config.correction or DEFAULT_CORRECTION
        config = replace(config, correction=asked)
    _check_sampler(source, config)  # before anything is fitted
    if finetune:
        settings = finetune if isinstance(finetune, FineTuning) else FineTuning()
        check_tunable(model, config)  # before anything is fitted
        if isinstance(source, OwnModel) and settings.guidance is not None:
            raise AquabitError(
                f"fine-tuning with guidance {settings.guidance:g} combines two halves of a denoiser call, and"
                f" how {source.name} makes them is not known; fine-tune without guidance"
            )
        with single_thread(device):
            model.prepare(config, progress)
        tuned = tune(model, config, replay_recorder(source), settings, progress)
        config = tuned.config
        if told is not None:
            told(tuned)
    with single_thread(device):
        statistics = _statistics(source, model, config, progress) if config.correction else None
        model.code(config, accuracy, progress)
    follow_(model.denoiser, scheduler_of(source), model.watchers(config))
    if statistics is not None:
        corrected_(model.denoiser, scheduler_of(source), statistics, config.correction)
    ranges = model.ranges(config) or {}
    # a folder of this machine tells nobody
    config = replace(config, model=Reference.parse(config.model).public)
    if config.calibration is not None and config.calibration.inputs is not None:
        public = config.calibration.inputs.public
        config = replace(config, calibration=replace(config.calibration, inputs=public))
    again = repeated_names(model.denoiser)
    facts = (model.inputs, model.tied, again, model.about)
    contents = Contents(config, model.layers, ranges, statistics, *facts)
    for name, part in parts_of(model.denoiser).items():
        attach_(part, contents.of_part(name) if name else contents)
    return Packed(source, model, config, statistics)


class Coded(NamedTuple):
    """A dense denoiser, its graph, and the codes of its layers."""

    network: nn.Module
    graph: LayerGraph
    weights: dict[str, CodebookWeight]


def coded(
    pipe: AnyModel,
    config: QuantConfig,
    *,
    check: Callable[[nn.Module, LayerGraph], None],
    bank: str | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Coded:
    """The weights that ``quantize`` packs, beside the dense denoiser that they are of; ``check`` is asked
    before anything is fitted. Raises AquabitError for a configuration of another model."""
    source = load(pipe, device)
    if isinstance(pipe, str) and not isinstance(source, OwnModel):
        free_text_encoders(source)
    network, graph = network_of(source), trace(source)
    check_fingerprint(config, network)
    check(network, graph)
    own, model = _copied(source, config, bank, device)
    _check_sampler(own, config)
    with single_thread(device), model.bank_in_use():
        model.check(config)
        model.prepare(config, progress)
        return Coded(network, graph, model.coded_weights(config))


def _copied(
    pipe: AnyModel, config: QuantConfig, bank: str | None, device: str
) -> tuple[Any, QuantizedDenoiser]:
    """A pipeline that may be changed, and its denoiser ready to be quantized. Raises AquabitError where the
    configuration is of another model."""
    source = load(pipe, device)
    own = check_fingerprint(config, network_of(source))
    graph = trace(source)
    config.check_shapes(layers(graph))
    if device == "cpu":
        check_quantizing(graph, config, calibration_samples(source, config.calibration or Calibration()))
    if not isinstance(pipe, str):  # what is followed is not the caller's
        source = own_copy(source, *(["scheduler"] if scheduler_of(source) is not None else []))
    else:
        free_text_encoders(source)
    network = network_of(source).eval()
    return source, QuantizedDenoiser(network, graph, Bank(bank), own, recorder(source), sampler(source))


def _check_sampler(pipe: Pipeline, config: QuantConfig) -> None:
    """Raise AquabitError where a configuration changes from step to step, or is corrected, and the pipeline's
    sampler does not allow that, and where images are asked for that the pipeline does not make."""
    calibration, own = config.calibration or Calibration(), scheduler_of(pipe)
    if own is None and (config.correction or config.total_steps is not None):
        raise AquabitError(
            f"the configuration follows the steps of a scheduler (correction {config.correction}, groups or"
            f" ranges per step), and {type(pipe).__name__} has none; leave them out"
        )
    if not isinstance(pipe, OwnModel):
        changes = (config.correction, config.total_steps)
        check_steps(component_names(pipe), encoder_names(pipe), *changes)
    if config.correction:
        check_correction(scheduler_named(own, calibration.scheduler), config.correction, calibration.eta)
    if config.calibration is not None:
        with scheduled(pipe, own, calibration.scheduler):
            adapter_of(pipe).check_taken(calibration.protocol(1))


def _statistics(
    source: Pipeline, model: QuantizedDenoiser, config: QuantConfig, progress: Progress
) -> Statistics:
    """The noise that a configuration adds, sampled as its calibration says; the pipeline keeps that
    sampler."""
    calibration = config.calibration or Calibration()
    set_scheduler(source, calibration.scheduler)
    return noise_statistics(
        source, model, config, replace(calibration, scheduler="default"), progress=progress
    )


def generate(
    pipe: AnyModel,
    images: int = 16,
    seed: int = 0,
    steps: int | None = None,
    conditions: Sequence[Any] | None = None,
    device: str = "cpu",
    memory: str = "packed",
    progress: Progress = no_progress,
    told: Callable[[Placement], None] | None = None,
    correction: str | None = None,
    offload: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> Tensor:
    """Images [n, c, h, w] in [0, 1] from a pipeline or packed artifact, image i from seed + i; of videos
    every frame is one, those of a video after each other.

    ``steps``, ``eta``, ``guidance``, ``resolution`` (pixels), ``frames``, ``scheduler``, ``inputs`` (a folder
    of pictures), ``strength`` and ``conditions`` (else the texts beside the pictures) default to what the
    artifact's configuration was measured with (else 10, 0, 1 and the model's own), ``correction`` to the
    artifact's own; "none" switches it off. ``offload``: what is loaded waits on the CPU and is on the GPU
    only while it runs.

    A packed one runs on the kernels that are fastest on this machine, timed first where that is missing;
    images then depend, within a few grey values, on timings, threads and their number. ``deterministic``: one
    thread and kernels in a fixed order, so that each image is the same bit for bit on processors of one kind.
    ``memory``: "packed" keeps no dense weight, "auto" up to a quarter of them, where they save most time.
    ``told`` hears which kernels run and what is resident.
    """
    if memory not in MEMORY:
        raise AquabitError(f"memory {memory!r} is unknown; it must be {' or '.join(MEMORY)}")
    if sampling.get("deterministic") and memory != "packed":
        raise AquabitError(
            f"memory {memory!r} chooses by timings, and deterministic images know none; leave one out"
        )
    if device == "cpu":
        reuse_memory()
    adapter = adapter_of(load(pipe, device, offload=offload))
    if isinstance(pipe, str):
        free_text_encoders(adapter.pipe)
    config = config_of(adapter.network)
    usual = (None if config is None else config.calibration) or Calibration()
    if config is not None and config.total_steps is not None:
        usual = replace(usual, steps=config.total_steps)
    how = Sampling(**sampling)
    asked = {"steps": steps, **{f.name: getattr(how, f.name) for f in fields(how)}}
    same = asked.pop("deterministic")
    if isinstance(how.inputs, str | Path):
        asked["inputs"] = read_inputs(how.inputs)
    if isinstance(asked["inputs"], Inputs) and not conditions:
        conditions = asked["inputs"].texts()
    given: dict[str, Any] = {k: getattr(usual, k) if v is None else v for k, v in asked.items()}
    batch = image_batch(adapter.pipe, replace(usual, **given), MICRO_BATCH)
    protocol = Protocol(
        images=images,
        seed=seed,
        conditions=tuple(conditions) if conditions else usual.conditions,
        micro_batch=batch if same else min(images, batch),
        **given,
    )
    size, own = image_size(adapter.pipe), protocol.resolution
    check_images(images * (protocol.frames or 1), size if own is None else (own, own))
    layers = layers_of(adapter.network)
    packed = any(layer.packed is not None for layer in layers.values())
    if memory != "packed" and not packed:
        raise AquabitError(f"memory {memory!r} is for packed layers, and this model has none; leave it out")
    sampler_now = scheduler_of(adapter.pipe)
    with scheduled(adapter.pipe, sampler_now, protocol.scheduler), _switched_correction(adapter, correction):
        if same:
            with single_thread(device), using({}):
                return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])
        if packed:
            # this samples, and follows the scheduler; the timed calls do not
            call = adapter.first_call(protocol)
            with unfollowed(adapter.network):
                placed = place_(layers, call, memory, progress)
            if told is not None:
                told(placed)
        return torch.cat([adapter.images(protocol, b) for b in adapter.batches(protocol)])


@contextmanager
def _switched_correction(adapter: ImageMaker, correction: str | None) -> Iterator[None]:
    """Correct otherwise than the artifact says (None: as it says) for a while; raises AquabitError where
    it holds no statistics."""
    statistics, before = statistics_of(adapter.network), watchers_of(adapter.network)
    if statistics is None and parse_correction(correction):
        raise AquabitError(
            f"correction {correction!r} needs noise statistics, which this model lacks; run `aquabit quantize"
            " --correct`"
        )
    if statistics is None or correction is None:
        yield
        return
    corrected_(adapter.network, scheduler_of(adapter.pipe), statistics, correction)
    try:
        yield
    finally:
        follow_(adapter.network, scheduler_of(adapter.pipe), before)
