"""The command line: one short function per verb; what they show is in _terminal."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from aquabit.cli.options import (
    BankOption,
    Bits,
    CorrectionOption,
    Device,
    Dtype,
    EstimatorOption,
    Eta,
    FeaturesOption,
    Guidance,
    Images,
    Json,
    MetricOption,
    MicroBatch,
    ModelArgument,
    Objective,
    Preset,
    Prompts,
    Reference,
    Resolution,
    Samples,
    SchedulerOption,
    Seed,
    SpaceFile,
    StepGroupsOption,
    Steps,
    StudyArgument,
    SwapOption,
    Workers,
)
from aquabit.cli.progress import bars, console, emit, errors, plain, shielded
from aquabit.cli.tables import (
    show_calls,
    show_export,
    show_failures,
    show_families,
    show_front,
    show_noise,
    show_notes,
    show_peaks,
    show_placement,
    show_plan,
    show_sensitivity,
    show_statuses,
    show_timings,
    show_tuned,
)
from aquabit.scheme import AquabitError, Protocol, QuantConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Where does quantization hurt a diffusion model, which bits should each layer get, and what does the"
        " result look like?\n\nStart with `aquabit run digits-unet --out demo`."
    ),
)


def _quiet() -> None:
    """Libraries' own warnings and bars are not ours to show."""
    import logging
    import warnings

    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def _protocol(context: typer.Context, preset: str | None, **given: Any) -> Protocol:
    """A protocol of options; those that were not given are the preset's, where it has them."""
    if preset is None:
        return Protocol(**given)
    from aquabit.pipelines import preset_named

    return Protocol(
        **{**given, **{k: v for k, v in preset_named(preset).protocol.items() if not _given(context, k)}}
    )


def _given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _workers(workers: int | None, device: str) -> int:
    return workers or ((os.cpu_count() or 1) if device == "cpu" else 1)


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise AquabitError(f"prompts file {path} cannot be read as UTF-8 text: {error}") from error
    kept = tuple(line for line in lines if line)
    if not kept:
        raise AquabitError(f"prompts file {path} is empty; it needs one prompt a line")
    return kept


def _quality(reference: Path | None, features: list[str] | None, metrics: list[str] | None) -> Any:
    """What images are measured with beside the model's own; None where nothing is given, which continues a
    study's own."""
    from aquabit.quality import QualityOptions

    return (
        QualityOptions(str(reference) if reference else None, tuple(features or ()), tuple(metrics or ()))
        or None
    )


def _space(
    path: Path | None, correction: str | None, step_groups: str | None, steps: int
) -> dict[str, Any] | None:
    """The options of the search space; None where there are none, which continues a study's own."""
    from aquabit.space import read_space

    options = read_space(path) if path else {}
    if correction is not None:
        options["correction"] = correction
    if step_groups is None:
        return options or None
    starts = [part.strip() for part in step_groups.split(",")]
    if not all(part.isdigit() for part in starts):
        raise AquabitError(
            f"step groups {step_groups!r} must be the first steps of the groups, from 0 and separated by"
            " commas, as in 0,5"
        )
    return {**options, "step_groups": {"total": steps, "starts": [int(part) for part in starts]}}


@app.command()
@shielded
def run(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything; run again, it continues.")],
    bits: Bits = 3.0,
    samples: Samples = 120,
    flips: Annotated[int, typer.Option("--flips", min=1, help="Real swaps that check the explanation.")] = 40,
    images: Images = 128,
    steps: Steps = 10,
    scheduler: SchedulerOption = "default",
    eta: Eta = 0.0,
    seed: Seed = 0,
    workers: Workers = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    prompts: Prompts = None,
    guidance: Guidance = 1.0,
    space: SpaceFile = None,
    objective: Objective = "fid",
    bank: BankOption = None,
    reference: Reference = None,
    features: FeaturesOption = None,
    preset: Preset = None,
    metric: MetricOption = None,
    correction: CorrectionOption = None,
    step_groups: StepGroupsOption = None,
    micro_batch: MicroBatch = 64,
    resolution: Resolution = None,
    swap: SwapOption = None,
    json_: Json = None,
) -> None:
    """The whole flow: measure, explain, check, search, pack, report."""
    _quiet()
    from aquabit import workflows as flow
    from aquabit.pipelines import preset_named
    from aquabit.study import Study

    protocol = _protocol(
        context,
        preset,
        images=images,
        steps=steps,
        seed=seed,
        scheduler=scheduler,
        eta=eta,
        guidance=guidance,
        resolution=resolution,
        conditions=_prompts(prompts),
        micro_batch=micro_batch,
        objective=objective,
        dtype=dtype,
    )
    if preset and not _given(context, "bits"):
        bits = preset_named(preset).weights
    with bars() as progress:
        front = flow.run(
            model,
            out,
            bits,
            samples,
            flips,
            protocol=protocol,
            space=_space(space, correction, step_groups, steps),
            workers=_workers(workers, device),
            device=device,
            dtype=dtype,
            bank=str(bank) if bank else None,
            quality=_quality(reference, features, metric),
            sample_seed=seed,
            swap=swap,
            progress=progress,
        )
    if not emit(front.to_list(), json_):
        show_sensitivity(Study(out / "study.db").get("sensitivity"), 10)
        show_front(front)
        show_notes(Study(out / "study.db"))
        console.print(
            f"report: {out / 'report' / 'index.html'}   images: {out / 'samples.png'}   packed model:"
            f" {out / 'packed'}"
        )


@app.command()
@shielded
def models(json_: Json = None) -> None:
    """Bundled models, supported families, and presets of the papers' settings."""
    from aquabit.pipelines import BUNDLED, FAMILIES, PRESETS, bundled_models
    from aquabit.scheme import read_json

    rows = []
    for name in bundled_models():
        file = next((BUNDLED / name / "denoiser").glob("*.safetensors"))
        rows.append(
            {
                "name": name,
                "denoiser": read_json(BUNDLED / name / "model_index.json")["denoiser"][1],
                "bytes": file.stat().st_size,
            }
        )
    families = [f.to_dict() for f in FAMILIES]
    presets = [p.to_dict() for p in PRESETS]
    if not emit({"bundled": rows, "families": families, "presets": presets}, json_):
        for row in rows:
            console.print(
                f"{row['name']:14} {row['denoiser']}, {row['bytes'] / 1e6:.1f} MB, trained on scikit-learn's"
                " digits"
            )
        show_families(families, presets)


@app.command()
@shielded
def inspect(
    model: ModelArgument,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Peak memory of measuring, quantizing and running packed instead."),
    ] = False,
    micro_batch: MicroBatch = 64,
    guidance: Guidance = 1.0,
    json_: Json = None,
) -> None:
    """Layers, operator types, sizes and multiply-adds; or peak memory."""
    _quiet()
    from aquabit.graph import layers, to_json
    from aquabit.pipelines import denoiser_of, family_notes, load, trace

    pipe = load(model)
    graph = trace(pipe)
    if memory:
        from aquabit.memory import NOT_COUNTED, elements, peaks

        found = peaks(
            graph,
            micro_batch,
            guidance != 1.0,
            others=elements(pipe.components.values()) - elements([denoiser_of(pipe)]),
        )
        if not emit(
            {"micro_batch": micro_batch, "not_counted": NOT_COUNTED, "peaks": [p.to_dict() for p in found]},
            json_,
        ):
            show_peaks(found, micro_batch, NOT_COUNTED)
        return
    if emit(to_json(graph), json_):
        return
    for note in family_notes(pipe):
        console.print(f"[yellow]{plain(note)}[/]", highlight=False)
    from rich.table import Table

    table = Table("layer", "operator", "block", "shape", "MACs", box=None)
    for name, node in layers(graph).items():
        table.add_row(
            plain(name),
            node["operator"],
            plain(node["block"]),
            "x".join(map(str, node["shape"])),
            f"{node['macs'] / 1e6:.2f} M",
        )
    console.print(table)
    nodes = layers(graph).values()
    console.print(
        f"{len(nodes)} layers, {graph.graph['weights'] / 1e6:.2f} M weights,"
        f" {sum(n['macs'] for n in nodes) / 1e6:.1f} M multiply-adds an image and denoiser call"
    )


@app.command()
@shielded
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The original checkpoint: .ckpt (read as tensors alone) or .safetensors."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pipeline.")],
) -> None:
    """Make a diffusers pipeline of the original class-conditional LDM checkpoint (LDM-4 on ImageNet)."""
    _quiet()
    from aquabit.pipelines import convert_ldm4

    pipe = convert_ldm4(checkpoint, out)
    console.print(
        f"{out}: {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} M weights in the denoiser,"
        f" {pipe.config.classes} classes"
    )


@app.command()
@shielded
def measure(
    context: typer.Context,
    model: ModelArgument,
    study: Annotated[Path, typer.Option("--study", metavar="S.db", help="Study file, created or continued.")],
    samples: Samples = 120,
    images: Images = 128,
    steps: Steps = 10,
    scheduler: SchedulerOption = "default",
    eta: Eta = 0.0,
    seed: Seed = 0,
    workers: Workers = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    prompts: Prompts = None,
    guidance: Guidance = 1.0,
    space: SpaceFile = None,
    objective: Objective = "fid",
    bank: BankOption = None,
    reference: Reference = None,
    features: FeaturesOption = None,
    preset: Preset = None,
    metric: MetricOption = None,
    correction: CorrectionOption = None,
    step_groups: StepGroupsOption = None,
    micro_batch: MicroBatch = 64,
    resolution: Resolution = None,
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
    ] = "near:0.75",
    contexts: Annotated[
        int,
        typer.Option(
            "--contexts",
            min=0,
            help=(
                "Good configurations in which every layer's swap is run on stored inputs, a fifteenth of a"
                " measurement each: truer effects."
            ),
        ),
    ] = 0,
    bits: Annotated[float, typer.Option("--bits", help="Bits per weight of these contexts.")] = 3.0,
    shard: Annotated[
        str | None, typer.Option("--shard", help="i/n: every n-th configuration, for batch schedulers.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Measure on a Ray cluster: auto, local, host:port; a worker for each GPU, or CPU slot.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help=(
                "Say what there is to measure and fit, and time and disk it takes (an estimate); measure"
                " nothing."
            ),
        ),
    ] = False,
    json_: Json = None,
) -> None:
    """Measure configurations into a study; run again, it continues."""
    _quiet()
    from aquabit import workflows as flow
    from aquabit.study import Study
    from aquabit.workflows import measure as measure_model

    protocol = _protocol(
        context,
        preset,
        images=images,
        steps=steps,
        seed=seed,
        scheduler=scheduler,
        eta=eta,
        guidance=guidance,
        resolution=resolution,
        conditions=_prompts(prompts),
        micro_batch=micro_batch,
        objective=objective,
        dtype=dtype,
    )
    processes = (workers or 1) if ray is not None else _workers(workers, device)
    options: dict[str, Any] = {
        "protocol": protocol,
        "space": _space(space, correction, step_groups, steps),
        "workers": processes,
        "device": device,
        "dtype": dtype,
        "bank": str(bank) if bank else None,
        "quality": _quality(reference, features, metric),
        "sample_seed": seed,
        "design": design,
        "shard": shard,
    }
    if plan:
        from aquabit.sensitivity.plan import plan as plan_model

        made = plan_model(model, Study(study) if study.exists() else None, samples, **options)
        if not emit(made.to_dict(), json_):
            show_plan(made)
        return
    with bars() as progress:
        opened = Study(study)
        count = measure_model(model, opened, samples, ray=ray, progress=progress, **options)
        if contexts:
            flow.see_in_context(
                opened,
                contexts,
                bits,
                pipe=model,
                workers=processes,
                device=device,
                bank=str(bank) if bank else None,
                ray=ray,
                progress=progress,
            )
    if not emit({"new": count, **_counts(opened)}, json_):
        console.print(f"{count} new measurements; {study} holds {_counts(opened)['measurements']}")
        show_failures(opened)
        show_notes(opened)


def _counts(study: Any) -> dict[str, Any]:
    table = study.measurements(failed=True)
    return {
        "measurements": len(table),
        "failed": int((table.status == "failed").sum()) if len(table) else 0,
        "kinds": {str(k): int(v) for k, v in table.kind.value_counts().items()} if len(table) else {},
    }


@app.command()
@shielded
def status(
    studies: Annotated[list[Path], typer.Argument(metavar="S.db", help="A study, or the shards of one.")],
    json_: Json = None,
) -> None:
    """What a study holds and how far it is; several: the shards of one."""
    from aquabit.study import Study
    from aquabit.study_status import merge_status, study_status

    opened = [Study(s, create=False) for s in studies]
    rows = [study_status(s) for s in opened]
    if len(opened) > 1:
        every = [*rows, merge_status(rows)]
        if not emit({"studies": [r.to_dict() for r in rows], "together": every[-1].to_dict()}, json_):
            show_statuses(every)
        return
    study = opened[0]
    facts = {
        "model": study.get("model"),
        "fingerprint": study.get("fingerprint"),
        "protocol": study.get("protocol"),
        **_counts(study),
        "correction": (study.get("space") or {}).get("correction"),
        "explained": "sensitivity" in study,
        "searched": "front" in study,
    }
    if not emit({**rows[0].to_dict(), **facts}, json_):
        for key, value in facts.items():
            console.print(f"{key:14} {plain(str(value))}", highlight=False)
        show_statuses(rows)


@app.command()
@shielded
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="A.db B.db", help="Studies of one model, space and protocol.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The study to write.")],
) -> None:
    """Join the studies of several shards."""
    from aquabit.study import Study
    from aquabit.study import merge as merge_studies

    joined = merge_studies([Study(s, create=False) for s in sources], Study(out))
    console.print(
        f"{joined.new} measurements joined into {out}; {joined.repeated} were in several studies, and count"
        " once"
    )
    if joined.differing:
        console.print(
            f"{joined.differing} of these differ in their numbers, as on other hardware or versions: the"
            " first study's stay"
        )


@app.command()
@shielded
def explain(
    study: StudyArgument,
    top: Annotated[int, typer.Option("--top", min=1, help="Layers to list.")] = 20,
    bits: Bits = 3.0,
    swap: SwapOption = None,
    estimator: EstimatorOption = "gbdt",
    json_: Json = None,
) -> None:
    """How good the surrogate is, then which layers hurt most, with intervals."""
    _quiet()
    from aquabit.study import Study
    from aquabit.workflows import explained

    with bars() as progress:
        result = explained(Study(study, create=False), bits, swap, progress, estimator).to_dict()
    if not emit(result, json_):
        show_sensitivity(result, top)


@app.command()
@shielded
def validate(
    study: StudyArgument,
    flips: Annotated[
        int, typer.Option("--flips", min=1, help="(layer, context) swaps, two measurements each.")
    ] = 40,
    swap: SwapOption = None,
    bits: Bits = 3.0,
    workers: Workers = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Which layers and contexts.")] = 0,
    bank: BankOption = None,
    json_: Json = None,
) -> None:
    """Measure real layer swaps and set them beside the predicted effects."""
    _quiet()
    from aquabit import workflows as flow
    from aquabit.study import Study

    with bars() as progress:
        opened = Study(study, create=False)
        options: dict[str, Any] = {
            "workers": _workers(workers, device),
            "device": device,
            "bank": str(bank) if bank else None,
        }
        result = flow.validate(opened, flips, swap, bits, seed=seed, progress=progress, **options).to_dict()
    if not emit(result, json_):
        show_sensitivity(result, 10)


def _tell(json_: str | None, text: str) -> None:
    """Say something on standard error, but not where a machine reads."""
    if json_ != "-":
        errors.print(plain(text), highlight=False, soft_wrap=True)


@app.command()
@shielded
def search(
    study: StudyArgument,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Bits per weight, everything counted (default 3.0).")
    ] = None,
    bytes_: Annotated[int | None, typer.Option("--bytes", help="Bytes of the saved denoiser.")] = None,
    bops: Annotated[
        float | None, typer.Option("--bops", help="Bit operations of one image in one denoiser call.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency", help="Milliseconds per denoiser call with one image, packed, on this machine."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the winner here, as config.json.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help=(
                "A configuration that the winner must not lose to: config.json, or ModelOpt's quant_cfg; may"
                " be repeated."
            ),
        ),
    ] = None,
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
    ] = None,
    per_round: Annotated[
        int, typer.Option("--per-round", min=1, help="New candidates a round, where a surrogate proposes.")
    ] = 8,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help=(
                "program (the integer program over damages, refined in context); surrogate or evolve"
                " (NSGA-II; needs pymoo) also propose from a surrogate of the study's measurements."
            ),
        ),
    ] = "program",
    screen: Annotated[
        int,
        typer.Option(
            "--screen",
            min=1,
            help=(
                "Where a surrogate proposes: configurations for each that is measured; output errors on"
                " stored inputs choose among them (1: none of this)."
            ),
        ),
    ] = 4,
    correction: Annotated[
        str | None,
        typer.Option(
            "--correction",
            help=(
                "Measure and choose candidates after this correction of their noise, as cnc+bc; default: as"
                " the study was measured."
            ),
        ),
    ] = None,
    workers: Workers = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    bank: BankOption = None,
    json_: Json = None,
) -> None:
    """Find the best configuration under a hard budget; several budgets hold at once. Works before anything
    was measured."""
    _quiet()
    from aquabit import workflows as flow
    from aquabit.scheme import Budget
    from aquabit.search import SearchOptions
    from aquabit.search.given_configs import read_given
    from aquabit.space import SearchSpace
    from aquabit.study import Study

    opened = Study(study, create=False)
    known = SearchSpace.from_dict(opened.need("space", "run `aquabit measure MODEL --study` first"))
    given = [(path.name, read_given(path, known)) for path in against or ()]
    limit = bits if any((bits, bytes_, bops, latency)) else 3.0
    options = SearchOptions(
        Budget(limit, bytes_, bops, latency), method, rounds, per_round, screen, seed, given
    )
    with bars() as progress:
        front = flow.search(
            opened,
            options,
            correction=correction,
            progress=progress,
            told=partial(_tell, json_),
            workers=_workers(workers, device),
            device=device,
            bank=str(bank) if bank else None,
        )
    if out:
        out.write_text(front.best.to_json())
    if not emit(front.to_list(), json_):
        show_front(front)


@app.command()
@shielded
def quantize(
    model: ModelArgument,
    config: Annotated[
        Path,
        typer.Argument(metavar="config.json", help="A configuration, as `aquabit search --out` writes it."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the packed pipeline.")],
    correct: Annotated[
        bool,
        typer.Option(
            "--correct",
            help="Correct the noise of quantization (PTQD), as the configuration or --correction says.",
        ),
    ] = False,
    correction: Annotated[
        str | None,
        typer.Option("--correction", help="cnc, bc, vsc, match, joined by +; or qdrift. Default: cnc+bc."),
    ] = None,
    finetune: Annotated[
        bool,
        typer.Option(
            "--finetune", help="Tune the codes, codebooks and scales against the full-precision model first."
        ),
    ] = False,
    finetune_steps: Annotated[
        int | None, typer.Option("--finetune-steps", min=1, help="Steps of the tuning; implies --finetune.")
    ] = None,
    finetune_settings: Annotated[
        Path | None,
        typer.Option(
            "--finetune-settings", metavar="FILE.json", help="Settings of the tuning; implies --finetune."
        ),
    ] = None,
    device: Device = "cpu",
    bank: BankOption = None,
) -> None:
    """Pack a model: a diffusers pipeline directory whose denoiser is stored as codes."""
    _quiet()
    from aquabit import packing

    tuning = _tuning(finetune, finetune_steps, finetune_settings)
    told: list[Any] = []
    with bars() as progress:
        packed = packing.quantize(
            model,
            QuantConfig.load(config),
            correct=correction or correct,
            finetune=tuning,
            bank=str(bank) if bank else None,
            device=device,
            progress=progress,
            told=told.append,
        )
    for tuned in told:
        show_tuned(tuned)
    console.print(f"{out}: {packed.save(out):,} bytes of tensors in the denoiser")
    if packed.statistics is not None:
        show_noise(packed.statistics, packed.config.correction)


def _tuning(asked: bool, steps: int | None, path: Path | None) -> Any:
    """Settings of fine-tuning, or False where it is not asked for."""
    if not asked and steps is None and path is None:
        return False
    from dataclasses import replace

    from aquabit.quant.finetuning.settings import FineTuning

    settings = FineTuning() if path is None else FineTuning.load(path)
    return settings if steps is None else replace(settings, steps=steps)


@app.command()
@shielded
def export(
    model: ModelArgument,
    config: Annotated[
        Path,
        typer.Argument(metavar="config.json", help="A configuration, as `aquabit search --out` writes it."),
    ],
    to: Annotated[str, typer.Option("--to", help="torchao, quanto or modelopt.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="JSON file: the library's configuration, and what it cannot express."),
    ],
    json_: Json = None,
) -> None:
    """A configuration for another library, with what is lost on the way."""
    _quiet()
    from aquabit.exports import export_config
    from aquabit.pipelines import load, trace

    found = export_config(QuantConfig.load(config), trace(load(model)), to)
    try:
        out.write_text(found.to_json())
    except OSError as error:
        raise AquabitError(f"{out} cannot be written: {error.strerror or error}") from error
    if not emit(found.to_dict()["statement"], json_):
        show_export(found, out)


@app.command()
@shielded
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A packed artifact (or any pipeline).")],
    out: Annotated[Path, typer.Option("--out", help="PNG grid.")],
    images: Annotated[int, typer.Option("--images", min=1)] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first image.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Denoising steps; default: those the artifact was calibrated for, else 10."
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", help="DDIM's noise; default: as calibrated, else 0.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Classifier-free guidance; default: as calibrated, else 1 (off)."),
    ] = None,
    prompts: Prompts = None,
    device: Device = "cpu",
    correction: Annotated[
        str | None,
        typer.Option(
            "--correction",
            help="none, or some of cnc, bc, vsc, match joined by +, or qdrift; default: the artifact's own.",
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            help="packed: no dense weights; auto: up to a quarter of them, where that saves most time.",
        ),
    ] = "packed",
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Components wait on the CPU and are on the GPU only while they run."),
    ] = False,
    resolution: Resolution = None,
) -> None:
    """Make images from a packed artifact."""
    _quiet()
    from aquabit import packing
    from aquabit.measuring.evaluator import thumbnail

    placed: list[Any] = []
    with bars() as progress:
        made = packing.generate(
            folder,
            images,
            seed,
            steps,
            _prompts(prompts),
            device,
            memory,
            progress,
            placed.append,
            correction,
            eta,
            guidance,
            offload,
            resolution,
        )
    try:
        out.write_bytes(thumbnail(made))
    except OSError as error:
        raise AquabitError(f"{out} cannot be written: {error.strerror or error}") from error
    console.print(f"{out}: {images} images, seeds {seed} to {seed + images - 1}")
    for placement in placed:
        show_placement(placement)


@app.command()
@shielded
def report(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="S.db [OTHER.db]", help="A study; a second one is shown beside it."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for index.html, figures and tables.")],
) -> None:
    """One page, its figures for print, and its tables; of two studies a page that compares them."""
    if len(studies) > 2:
        raise AquabitError(f"{len(studies)} studies were given; a report shows one, or two side by side")
    _quiet()
    from aquabit.reports import report as write_report
    from aquabit.reports import side_by_side
    from aquabit.study import Study

    with bars() as progress:
        opened = [Study(s, create=False) for s in studies]
        page = (
            side_by_side(opened[0], opened[1], out, progress)
            if len(opened) == 2
            else write_report(opened[0], out, progress=progress)
        )
    console.print(f"{page}")


@app.command()
@shielded
def bench(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="A packed artifact: whole denoiser calls instead of single layers."
        ),
    ] = None,
    formats: Annotated[
        str | None, typer.Option("--formats", help="Comma-separated schemes, as usq4,aq2x8g8.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option("--shapes", help="Comma-separated OUTxIN@TOKENS and OUTxINxKHxKW@SIDE.")
    ] = None,
    act: Annotated[
        int, typer.Option("--act", min=2, help="Activation bits of the coded layers; 16 is off.")
    ] = 8,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads; default: torch's.")
    ] = None,
    dtype: Dtype = "float32",
    json_: Json = None,
) -> None:
    """This machine's kernels against dense float32 and bfloat16: medians of interleaved runs."""
    if folder is not None and (formats or shapes):
        raise AquabitError(f"formats and shapes are those of the packed model {folder}; give them without it")
    _quiet()
    from aquabit.quant.bench import bench_artifact, bench_formats, torch_threads

    with torch_threads(threads), bars() as progress:
        rows: Any = (
            bench_artifact(folder, dtype, progress)
            if folder
            else bench_formats(formats, shapes, act, progress)
        )
    if not emit({"rows": [r.to_dict() for r in rows]}, json_):
        show_calls(rows) if folder else show_timings(rows)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
