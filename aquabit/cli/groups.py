"""Groups of options that belong together, and the values that they become."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from aquabit.budget import OTHERS
from aquabit.cli import options
from aquabit.files import check_apart, check_writable
from aquabit.inputs import read_inputs
from aquabit.measuring.where import Where
from aquabit.scheme import SCHEDULERS, AquabitError, Budget, Calibration, Protocol, QuantConfig

if TYPE_CHECKING:  # torch is loaded when a verb runs, not for --help
    from aquabit.measuring.settings import MeasureOptions
    from aquabit.quant.finetuning.settings import FineTuning
    from aquabit.search.search_options import SearchOptions
    from aquabit.sensitivity.plan import SampleOptions
    from aquabit.study import Study


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with each parameter that is a group (a dataclass of options) replaced by the options in it."""
    signature = inspect.signature(verb, eval_str=True)
    annotations = {name: p.annotation for name, p in signature.parameters.items()}
    groups = {k: a for k, a in annotations.items() if isinstance(a, type) and is_dataclass(a)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
            )
            for f in fields(groups[name])
        ]

    @wraps(verb)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        verb(**given)

    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def given(context: typer.Context, option: str) -> bool:
    """Whether the user gave an option."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def check_idle(context: typer.Context, idle: bool, why: str, *names: str) -> None:
    """Raise AquabitError for an option (by its parameter's name) that was given where it would be ``idle``:
    it changes nothing, and ``why`` says so."""
    for parameter in context.command.params if idle else ():
        if parameter.name in names and given(context, parameter.name):
            raise AquabitError(f"{parameter.opts[0]} changes nothing {why}; leave it out")


NO_INPUT = ("out", "json_", "bank", "sources")  # fits may lie anywhere; ``merge`` may join into a source


def check_outputs(given: dict[str, Any], folder: bool | None) -> None:
    """Raise AquabitError where a verb would write over, or into, what it reads, and where it could not write
    (``folder``: whether its --out is one, None where it finds out itself). In a folder that it reads a new
    file may come to be, and an image take the place of one."""
    values = {k: v for k, v in given.items() if not is_dataclass(v)}
    for group in (v for v in given.values() if is_dataclass(v)):
        values |= {f.name: getattr(group, f.name) for f in fields(group)}
    read = [
        path
        for name, value in values.items()
        for path in (value if isinstance(value, list) else [value])
        if name not in NO_INPUT and isinstance(path, Path)
    ]
    for model in filter(None, (values.get("model"), values.get("folder"))):
        if isinstance(model, str):
            from aquabit.pipelines import sources_of

            read += map(Path, sources_of(model))
    written = {k: Path(v) for k in ("out", "json_") if (v := values.get(k)) and v != "-"}
    for name, target in written.items():
        whole = bool(folder) and name == "out"
        for source in read if whole or not _is_new_or_image(target) else ():
            check_apart(target, source, inside=False)
        if name != "out" or folder is not None:
            check_writable(target, folder=whole)
    if len(written) == 2 and written["out"].absolute() == written["json_"].absolute():
        raise AquabitError(f"--out and --json both are {written['out']}; one would overwrite the other")


def _is_new_or_image(path: Path) -> bool:
    if not path.exists():
        return True
    try:
        with open(path, "rb") as file:
            return file.read(8) == b"\x89PNG\r\n\x1a\n"
    except OSError:  # writing says why
        return False


def read_prompts(path: Path | None) -> tuple[str, ...] | None:
    """The prompts of a file, one a line; raises AquabitError where it holds none."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise AquabitError(f"prompts file {path} cannot be read as UTF-8 text: {error}") from error
    kept = tuple(line for line in lines if line)
    if not kept:
        raise AquabitError(f"prompts file {path} is empty; it needs one prompt a line")
    return kept


FILES = ("prompts", "inputs")  # options that name what is read


def read_given(prompts: Path | None, inputs: Path | None) -> dict[str, Any]:
    """What images are made of: "inputs", the pictures of a folder, and "conditions", the prompts of a file,
    else the texts beside the pictures."""
    pictures, conditions = None if inputs is None else read_inputs(inputs), read_prompts(prompts)
    if conditions is None and pictures is not None:
        conditions = pictures.texts()
    return {"inputs": pictures, "conditions": conditions}


@dataclass(frozen=True)
class Source:
    """Where MODEL comes from, besides its name."""

    variant: options.Variant = None
    base: options.Base = None
    lora: options.Lora = None
    component: options.Component = None

    def of(self, model: str) -> str:
        """The reference of a model."""
        from aquabit.pipelines.reference import Reference

        return Reference.parse(model).with_(self.variant, self.base, self.lora or (), self.component).text


@dataclass(frozen=True)
class Machine:
    """Where a verb works."""

    workers: options.Workers = None
    device: options.Device = "cpu"
    bank: options.Bank = None

    def where(self, dtype: str = "float32", ray: str | None = None) -> Where:
        """All cores of a CPU where nothing else is said; a cluster has workers of its own."""
        cores = (os.cpu_count() or 1) if self.device == "cpu" and ray is None else 1
        bank = str(self.bank) if self.bank else None
        return Where(self.workers or cores, self.device, dtype, bank, ray)


OF_PROTOCOL = (  # fields of a protocol that have options of their own
    "images",
    "steps",
    "seed",
    "scheduler",
    "eta",
    "guidance",
    "resolution",
    "frames",
    "strength",
    "micro_batch",
    "objective",
    "dtype",
)


@dataclass(frozen=True)
class Measuring:
    """How images are made and measured, and what is searched."""

    images: options.Images = Protocol.images
    steps: options.Steps = Protocol.steps
    scheduler: options.Scheduler = Protocol.scheduler
    eta: options.Eta = Protocol.eta
    seed: options.Seed = Protocol.seed
    dtype: options.Dtype = Protocol.dtype
    prompts: options.Prompts = None
    guidance: options.Guidance = Protocol.guidance
    space: options.SpaceFile = None
    target: options.Target = None
    objective: options.Objective = Protocol.objective
    reference: options.Reference = None
    features: options.Features = None
    preset: options.Preset = None
    metric: options.Metric = None
    correction: options.Correction = None
    step_groups: options.StepGroups = None
    micro_batch: options.MicroBatch = Protocol.micro_batch
    resolution: options.Resolution = Protocol.resolution
    frames: options.Frames = Protocol.frames
    inputs: options.Inputs = None
    strength: options.Strength = Protocol.strength
    damages: options.Damages = None

    def options(self, context: typer.Context) -> MeasureOptions:
        """As values; what continues a study's own where nothing is given is None."""
        from aquabit.measuring.settings import MeasureOptions
        from aquabit.quality import QualityOptions

        quality = QualityOptions(
            str(self.reference) if self.reference else None,
            tuple(self.features or ()),
            tuple(self.metric or ()),
        )
        return MeasureOptions(self.protocol(context), self.space_options(), quality or None, self.damages)

    def bits(self, context: typer.Context, bits: float) -> float:
        """Bits per weight: the preset's where none are given."""
        if self.preset is None or given(context, "bits"):
            return bits
        from aquabit.pipelines import preset_named

        return preset_named(self.preset).weights

    def protocol(self, context: typer.Context) -> Protocol:
        """How images are made: options that were not given are the preset's, where it has them."""
        values = {name: getattr(self, name) for name in OF_PROTOCOL}
        values |= read_given(self.prompts, self.inputs)
        if self.preset is not None:
            from aquabit.pipelines import preset_named

            stated = preset_named(self.preset).protocol
            values |= {k: v for k, v in stated.items() if not given(context, k)}
        return Protocol(**values)

    def space_options(self) -> dict[str, Any] | None:
        """Options of the search space."""
        from aquabit.space import read_space

        asked = read_space(self.space) if self.space else {}
        if self.correction is not None:
            asked["correction"] = self.correction
        if self.step_groups is not None:
            asked["step_groups"] = {"total": self.steps, "starts": _first_steps(self.step_groups)}
        if self.target is not None:
            asked["target"] = self.target
        return asked or None


def _first_steps(text: str) -> list[int]:
    starts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in starts):
        raise AquabitError(
            f"step groups {text!r} must be the first steps of the groups, from 0 and separated by commas, as"
            " in 0,5"
        )
    return [int(part) for part in starts]


@dataclass(frozen=True)
class Sample:
    """Which configurations are measured."""

    samples: options.Samples = 120
    design: Annotated[
        str,
        typer.Option(
            "--design",
            help=(
                "near (good configurations), random (independent draws, ruined ones included), balanced"
                " (nearly orthogonal, evenly over bits), swaps (of one layer in shared contexts),"
                " disagreement (batches on which refitted surrogates disagree); near:0.75 is a quarter"
                " random."
            ),
        ),
    ] = "near:0.75"
    shard: Annotated[
        str | None, typer.Option("--shard", help="i/n: every n-th configuration, for batch schedulers.")
    ] = None

    def options(self, seed: int) -> SampleOptions:
        from aquabit.sensitivity.plan import SampleOptions

        return SampleOptions(self.samples, seed, self.design, self.shard)


@dataclass(frozen=True)
class Limits:
    """Of a search; several hold at once."""

    bits: Annotated[
        float | None, typer.Option("--bits", help="Bits per weight, everything counted (default 3.0).")
    ] = None
    bytes_: Annotated[int | None, typer.Option("--bytes", help="Bytes of the saved denoiser.")] = None
    bops: Annotated[
        float | None, typer.Option("--bops", help="Bit operations of one image in one denoiser call.")
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency", help="Milliseconds per denoiser call with one image, packed, on this machine."
        ),
    ] = None

    def budget(self) -> Budget:
        return Budget.of(self.bits, self.bytes_, self.bops, self.latency)


@dataclass(frozen=True)
class Searching:
    """How a search proposes."""

    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help=(
                "A configuration that the winner must not lose to: config.json, ModelOpt's quant_cfg, a GGUF"
                " file of the model or one of ComfyUI, a folder of SDNQ, bitsandbytes or torchao; may be"
                " repeated."
            ),
        ),
    ] = None
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=0,
            help=(
                "Rounds of refinement in context (default 3; 0: the program's answer); of fitting and"
                " proposing where a surrogate proposes (default 2)."
            ),
        ),
    ] = None
    per_round: Annotated[
        int | None,
        typer.Option(
            "--per-round", min=1, help="New candidates a round, where a surrogate proposes (default 8)."
        ),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help=(
                "program (the integer program over damages, refined in context); surrogate or evolve"
                " (NSGA-II; needs pymoo) also propose from a surrogate of the study's measurements."
            ),
        ),
    ] = "program"
    screen: Annotated[
        int | None,
        typer.Option(
            "--screen",
            min=1,
            help=(
                "Where a surrogate proposes: configurations for each that is measured; output errors on"
                " stored inputs choose among them (1: none of this; default 4)."
            ),
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed")] = 0
    front: options.Front = OTHERS

    def options(self, budget: Budget, study: Study) -> SearchOptions:
        """As a value; configurations are read for the study's space."""
        from aquabit.exports.readers import reader_of
        from aquabit.graph import from_json
        from aquabit.search.given_configs import read_given, within_space
        from aquabit.search.search_options import SearchOptions
        from aquabit.space import SearchSpace

        def read_rival(path: Path) -> QuantConfig:
            read = reader_of(path)
            if read is None:
                return read_given(path, space)
            graph = from_json(study.need("graph", "it is damaged"), f"the graph of {study.path}")
            return within_space(read(graph, space.fingerprint), space)

        space = SearchSpace.from_dict(study.need("space", "run `aquabit measure MODEL --study` first"))
        rivals = [(path.name, read_rival(path)) for path in self.against or ()]
        how = (self.method, self.rounds, self.per_round, self.screen, self.seed)
        return SearchOptions(budget, *how, rivals, self.front)


@dataclass(frozen=True)
class Tuning:
    """Whether and how a packed model is fine-tuned."""

    finetune: Annotated[
        bool,
        typer.Option(
            "--finetune", help="Tune the codes, codebooks and scales against the full-precision model first."
        ),
    ] = False
    finetune_steps: Annotated[
        int | None, typer.Option("--finetune-steps", min=1, help="Steps of the tuning; implies --finetune.")
    ] = None
    finetune_settings: Annotated[
        Path | None,
        typer.Option(
            "--finetune-settings", metavar="FILE.json", help="Settings of the tuning; implies --finetune."
        ),
    ] = None

    def settings(self) -> FineTuning | bool:
        """False where it is not asked for."""
        if not self.finetune and self.finetune_steps is None and self.finetune_settings is None:
            return False
        from aquabit.quant.finetuning.settings import FineTuning

        settings = FineTuning.load(self.finetune_settings) if self.finetune_settings else FineTuning()
        return replace(settings, steps=self.finetune_steps) if self.finetune_steps else settings


SamplerName = Annotated[
    str | None,
    typer.Option("--scheduler", help=f"{', '.join(('default', *SCHEDULERS))}; default: as measured."),
]


@dataclass(frozen=True)
class Sampled:
    """How images are made where a configuration does not say it, or another way is wanted."""

    prompts: options.Prompts = None
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Classifier-free guidance of the images that packing needs."),
    ] = None
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Their denoising steps.")] = None
    eta: Annotated[float | None, typer.Option("--eta", help="Their DDIM noise.")] = None
    resolution: options.Resolution = None
    frames: options.Frames = None
    inputs: options.Inputs = None
    strength: options.Strength = None
    scheduler: SamplerName = None

    def applied(self, config: QuantConfig) -> QuantConfig:
        """A configuration that says so; what is not given stays as it says. Raises AquabitError for other
        steps than those that it has groups of."""
        if self.steps is not None and config.steps is not None and self.steps != config.steps.total:
            raise AquabitError(
                f"--steps is {self.steps}, and the configuration is set for groups of {config.steps.total}"
                " steps; leave it out"
            )
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FILES}
        named |= read_given(self.prompts, self.inputs)
        asked = {k: v for k, v in named.items() if v is not None}
        return (
            replace(config, calibration=replace(config.calibration or Calibration(), **asked))
            if asked
            else config
        )


@dataclass(frozen=True)
class Making:
    """Which images a packed model makes."""

    images: Annotated[int, typer.Option("--images", min=1)] = 16
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first image.")] = 0
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Denoising steps; default: those the artifact was measured with, else 10."
        ),
    ] = None
    eta: Annotated[
        float | None, typer.Option("--eta", help="DDIM's noise; default: as measured, else 0.")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Classifier-free guidance; default: as measured, else 1 (off)."),
    ] = None
    prompts: options.Prompts = None
    resolution: options.Resolution = None
    scheduler: SamplerName = None
    frames: options.Frames = None
    inputs: options.Inputs = None
    strength: options.Strength = None
    correction: Annotated[
        str | None,
        typer.Option(
            "--correction",
            help="none, or some of cnc, bc, vsc, match joined by +, or qdrift; default: the artifact's own.",
        ),
    ] = None
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help=(
                "The same bits whatever timings, threads and number of images there are, on processors of one"
                " kind: one thread, kernels in a fixed order."
            ),
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Of ``packing.generate``."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FILES}
        return asked | read_given(self.prompts, self.inputs)
