"""The command line: one short function per verb. Options are in ``options``, what is shown in ``tables``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aquabit.budget import BITS, OTHERS
from aquabit.cli import findings, groups, options, tables
from aquabit.cli.progress import bars, console, emit, plain, quiet, shielded, tell
from aquabit.files import check_writable, write_bytes, write_text
from aquabit.scheme import AquabitError, QuantConfig

if TYPE_CHECKING:  # torch is loaded when a verb runs, not for --help
    from aquabit.measuring.settings import MeasureOptions
    from aquabit.measuring.where import Where
    from aquabit.sensitivity.plan import SampleOptions
    from aquabit.workflows import FlowOptions

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


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """A verb of the program: groups of options spread out, errors as one sentence, libraries quiet."""

    @wraps(function)
    def call(**given: Any) -> None:
        quiet()
        folders = {"run": True, "quantize": True, "convert": True, "report": True, "export": None}
        groups.check_outputs(given, folders.get(function.__name__, False))
        function(**given)

    return app.command()(shielded(groups.grouped(call)))


@verb
def run(
    context: typer.Context,
    model: options.Model,
    source: groups.Source,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything; run again, it continues.")],
    measuring: groups.Measuring,
    machine: groups.Machine,
    bits: options.Bits = BITS,
    samples: options.Samples = 120,
    flips: Annotated[int, typer.Option("--flips", min=0, help="Real swaps that check the explanation.")] = 40,
    swap: options.Swap = None,
    front: options.Front = OTHERS,
    within: options.Within = None,
    fits: options.Fits = None,
    plan: options.PlanOnly = False,
    mlflow: options.MLflow = None,
    json_: options.Json = None,
) -> None:
    """The whole flow: measure, explain, check, search, pack, report."""
    from aquabit import workflows
    from aquabit.reports import mlflow_run
    from aquabit.sensitivity.plan import SampleOptions
    from aquabit.study import Study
    from aquabit.within import parse_time

    model, bits = source.of(model), measuring.bits(context, bits)
    named = {"samples": "samples", "swaps": "flips", "images": "images", "steps": "steps", "fits": "fits"}
    kept = tuple(name for name, option in named.items() if groups.given(context, option))
    seconds = None if within is None else parse_time(within)
    flow = workflows.FlowOptions(bits, flips, swap, seconds, kept, fits, front)
    sample = SampleOptions(samples, measuring.seed)
    asked, where = measuring.options(context), machine.where(measuring.dtype)
    if plan:
        _plan_run(model, out, flow, sample, asked, where, json_)
        return
    if mlflow is not None:
        mlflow_run.client(mlflow)  # said before anything is measured
    with bars() as progress:
        found = workflows.run_flow(
            model, out, flow, sample, asked, where, progress, told=partial(tell, json_)
        )
    if mlflow is not None:
        mlflow_run.log_run(Study(out / "study.db"), out / "report", mlflow)
    if not emit(found.to_list(), json_):
        study = Study(out / "study.db")
        if "sensitivity" in study:
            findings.show_sensitivity(study.get("sensitivity"), 10)
        findings.show_front(found)
        findings.show_notes(study)
        pictures = f"images: {out / 'samples.png'}   " if (out / "samples.png").exists() else ""
        console.print(f"report: {out / 'report' / 'index.html'}   {pictures}packed model: {out / 'packed'}")


def _plan_run(
    model: str,
    out: Path,
    flow: FlowOptions,
    sample: SampleOptions,
    asked: MeasureOptions,
    where: Where,
    json_: str | None,
) -> None:
    """Say what ``run`` would take."""
    from aquabit.sensitivity.plan import Planner
    from aquabit.study import Study
    from aquabit.workflows import check_fits, settled_within

    study = Study(out / "study.db") if (out / "study.db").exists() else None
    with bars() as progress:
        planner = Planner(model, study, asked, where, progress, flow.front)
    planner.check(flow.bits, flow.swap)
    if flow.within is not None:
        fitted = settled_within(lambda: planner, study, flow, sample, asked)
        if not emit(fitted.to_dict(), json_):
            console.print(plain(fitted.text), highlight=False, soft_wrap=True)
            tables.show_parts(fitted.parts)
        return
    check_fits(study, flow.fits)
    made = planner.run(sample, flow.swaps, fits=flow.fits or "all")
    if not emit(made.to_dict(), json_):
        tables.show_plan(made.measuring)
        tables.show_parts(made.parts)
        tables.show_operations(made.calls, made.to_dict()["operations"])


@verb
def models(json_: options.Json = None) -> None:
    """Bundled models, supported families, and presets of the papers' settings."""
    from aquabit.pipelines import FAMILIES, PRESETS, bundled_facts

    bundled = bundled_facts()
    families = [f.to_dict() for f in FAMILIES]
    presets = [p.to_dict() for p in PRESETS]
    if not emit({"bundled": bundled, "families": families, "presets": presets}, json_):
        tables.show_bundled(bundled)
        tables.show_families(families, presets)


@verb
def inspect(
    context: typer.Context,
    model: options.Model,
    source: groups.Source,
    memory: options.MemoryPeaks = False,
    micro_batch: options.MicroBatch = 64,
    guidance: options.Guidance = 1.0,
    target: options.Target = None,
    json_: options.Json = None,
) -> None:
    """Layers, operator types, sizes and multiply-adds, and what a target cannot hold; or peak memory."""
    from aquabit.graph import graph_notes, layers, to_json
    from aquabit.memory import NOT_COUNTED, elements, peaks
    from aquabit.pipelines import Model, load, model_notes, network_of, trace
    from aquabit.targets import target_named

    groups.check_idle(context, not memory, "without --memory", "micro_batch", "guidance")
    groups.check_idle(context, memory, "beside --memory", "target")
    goal = target_named(target)
    model = source.of(model)
    pipe = load(model)
    graph = trace(pipe)
    if memory:
        if isinstance(pipe, Model):
            raise AquabitError(f"memory is estimated for models of diffusers; {model} is one of your own")
        others = elements(pipe.components.values()) - elements([network_of(pipe)])
        found = peaks(graph, micro_batch, guidance != 1.0, others=others)
        told = [p.to_dict() for p in found]
        if not emit({"micro_batch": micro_batch, "not_counted": NOT_COUNTED, "peaks": told}, json_):
            tables.show_peaks(found, micro_batch, NOT_COUNTED)
        return
    about = None if goal is None else goal.on(layers(graph), str(graph.graph["model_class"]))
    if not emit({**to_json(graph), **({} if about is None else {"target": about.to_dict()})}, json_):
        for note in (*model_notes(pipe, graph), *graph_notes(graph), *(about.notes if about else ())):
            console.print(f"[yellow]{plain(note)}[/]", highlight=False)
        tables.show_graph(graph)


@verb
def convert(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="Folder of the pipeline.")],
) -> None:
    """Make a diffusers pipeline of the original class-conditional LDM checkpoint (LDM-4 on ImageNet)."""
    from aquabit.pipelines import convert_ldm4

    pipe = convert_ldm4(checkpoint, out)
    console.print(
        f"{out}: {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} M weights in the denoiser,"
        f" {pipe.config.classes} classes"
    )


@verb
def measure(
    context: typer.Context,
    model: options.Model,
    source: groups.Source,
    study: Annotated[Path, typer.Option("--study", metavar="S.db", help="Study file, created or continued.")],
    sample: groups.Sample,
    measuring: groups.Measuring,
    machine: groups.Machine,
    contexts: options.Contexts = 0,
    bits: Annotated[float, typer.Option("--bits", help="Bits per weight of these contexts.")] = BITS,
    ray: options.RayAddress = None,
    plan: options.PlanOnly = False,
    json_: options.Json = None,
) -> None:
    """Measure configurations into a study; run again, it continues."""
    from aquabit import workflows
    from aquabit.study import Study
    from aquabit.study_status import measurement_counts

    groups.check_idle(context, not contexts, "without --contexts", "bits")
    model, bits = source.of(model), measuring.bits(context, bits)
    drawn, asked = sample.options(measuring.seed), measuring.options(context)
    where = machine.where(measuring.dtype, ray)
    if contexts:
        workflows.check_contexts(contexts)
    if plan:
        from aquabit.sensitivity.plan import Planner

        with bars() as progress:
            planner = Planner(model, Study(study) if study.exists() else None, asked, where, progress)
        if contexts:
            planner.check(bits)
        made = planner.measuring(drawn, contexts=contexts)
        if not emit(made.to_dict(), json_):
            tables.show_plan(made)
        return
    with bars() as progress:
        opened = Study(study)
        count = workflows.measure_model(model, opened, drawn, asked, where, progress=progress)
        if contexts:
            workflows.run_contexts(opened, contexts, bits, where, pipe=model, progress=progress)
    counts = measurement_counts(opened)
    if not emit({"new": count, **counts}, json_):
        console.print(f"{count} new measurements; {study} holds {counts['measurements']}")
        findings.show_failures(opened)
        findings.show_notes(opened)


@verb
def status(
    studies: Annotated[list[Path], typer.Argument(metavar="S.db", help="A study, or the shards of one.")],
    json_: options.Json = None,
) -> None:
    """What a study holds and how far it is; several: the shards of one."""
    from aquabit.study import Study
    from aquabit.study_status import measurement_counts, merge_status, study_status

    opened = [Study(s, create=False) for s in studies]
    rows = [study_status(s) for s in opened]
    if len(opened) > 1:
        every = [*rows, merge_status(rows)]
        if not emit({"studies": [r.to_dict() for r in rows], "together": every[-1].to_dict()}, json_):
            tables.show_statuses(every)
        return
    study = opened[0]
    facts = {
        "model": study.get("model"),
        "fingerprint": study.get("fingerprint"),
        "protocol": study.get("protocol"),
        **measurement_counts(study),
        "correction": (study.get("space") or {}).get("correction"),
        "explained": "sensitivity" in study,
        "searched": "front" in study,
    }
    if not emit({**rows[0].to_dict(), **facts}, json_):
        for key, value in facts.items():
            console.print(f"{key:14} {plain(str(value))}", highlight=False)
        tables.show_statuses(rows)


@verb
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="A.db B.db", help="Studies of one model, space and protocol.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The study to write.")],
) -> None:
    """Join the studies of several shards."""
    from aquabit.study import Study
    from aquabit.study import merge as merge_studies

    joined = merge_studies([Study(s, create=False) for s in sources], out)
    console.print(
        f"{joined.new} measurements joined into {out}; {joined.repeated} were in several studies, and count"
        " once"
    )
    if joined.differing:
        console.print(
            f"{joined.differing} of these differ in their numbers, as on other hardware or versions: the"
            " first study's stay"
        )


@verb
def explain(
    context: typer.Context,
    study: options.StudyFile,
    top: Annotated[int, typer.Option("--top", min=1, help="Layers to list.")] = 20,
    bits: options.Bits = BITS,
    swap: options.Swap = None,
    estimator: options.Estimator = "gbdt",
    json_: options.Json = None,
) -> None:
    """How good the surrogate is, then which layers hurt most, with intervals."""
    from aquabit.study import Study
    from aquabit.workflows import explained

    groups.check_idle(context, json_ == "-", "beside --json -, which lists every layer", "top")
    with bars() as progress:
        result = explained(Study(study, create=False), bits, swap, progress, estimator).to_dict()
    if not emit(result, json_):
        findings.show_sensitivity(result, top)


@verb
def validate(
    study: options.StudyFile,
    machine: groups.Machine,
    flips: Annotated[
        int, typer.Option("--flips", min=1, help="(layer, context) swaps, two measurements each.")
    ] = 40,
    swap: options.Swap = None,
    bits: options.Bits = BITS,
    seed: Annotated[int, typer.Option("--seed", help="Which layers and contexts.")] = 0,
    model: options.OwnModel = None,
    json_: options.Json = None,
) -> None:
    """Measure real layer swaps and set them beside the predicted effects."""
    from aquabit import workflows
    from aquabit.study import Study

    with bars() as progress:
        opened, flow = Study(study, create=False), workflows.FlowOptions(bits, flips, swap)
        where = machine.where()
        result = workflows.validate_study(opened, flow, where, pipe=model, seed=seed, progress=progress)
    if not emit(result.to_dict(), json_):
        findings.show_sensitivity(result.to_dict(), 10)


@verb
def search(
    study: options.StudyFile,
    limits: groups.Limits,
    searching: groups.Searching,
    machine: groups.Machine,
    target: options.Target = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the winner here, as config.json.")] = None,
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
    model: options.OwnModel = None,
    json_: options.Json = None,
) -> None:
    """Find the best configuration under a hard budget; several budgets hold at once. Works before anything
    was measured."""
    from aquabit import workflows
    from aquabit.study import Study

    opened = Study(study, create=False)
    asked, where = searching.options(limits.budget(), opened), machine.where()
    with bars() as progress:
        front = workflows.search(
            opened,
            asked,
            where,
            correction=correction,
            target=target,
            pipe=model,
            progress=progress,
            told=partial(tell, json_),
        )
    if out:
        write_text(out, front.best.to_json())
    if not emit(front.to_list(), json_):
        findings.show_front(front)


@verb
def quantize(
    model: options.Model,
    source: groups.Source,
    config: options.ConfigFile,
    out: Annotated[Path, typer.Option("--out", help="Folder of the packed pipeline.")],
    tuning: groups.Tuning,
    sampled: groups.Sampled,
    correct: options.Correct = False,
    correction: Annotated[
        str | None,
        typer.Option("--correction", help="cnc, bc, vsc, match, joined by +; or qdrift. Default: cnc+bc."),
    ] = None,
    device: options.Device = "cpu",
    bank: options.Bank = None,
) -> None:
    """Pack a model: a diffusers pipeline directory whose denoiser is stored as codes."""
    from aquabit import packing

    model = source.of(model)
    told: list[Any] = []
    with bars() as progress:
        packed = packing.quantize(
            model,
            sampled.applied(QuantConfig.load(config)),
            correct=correction or correct,
            finetune=tuning.settings(),
            bank=str(bank) if bank else None,
            device=device,
            progress=progress,
            told=told.append,
        )
    for tuned in told:
        tables.show_tuned(tuned)
    console.print(f"{out}: {packed.save(out):,} bytes of tensors in the {' and '.join(packed.components)}")
    if packed.statistics is not None:
        tables.show_noise(packed.statistics, packed.config.correction)


@verb
def export(
    context: typer.Context,
    model: options.Model,
    source: groups.Source,
    config: options.ConfigFile,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help=(
                "gguf, sdnq, bitsandbytes, torchao or comfy: files with weights; torchao (a name in .json),"
                " quanto or modelopt: a configuration."
            ),
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help=(
                "JSON file: the library's configuration, and what it cannot express; or the files with"
                " weights that the program reads; of several components one each, as DIR/NAME or"
                " STEM-NAME.gguf."
            ),
        ),
    ],
    device: options.Device = "cpu",
    bank: options.Bank = None,
    json_: options.Json = None,
) -> None:
    """A configuration for another library, or files with weights for another program, with what is lost on
    the way."""
    from aquabit.exports import check_known, export_config, with_weights
    from aquabit.exports.exported import Exported, check_layers, check_replaceable, each_network, place_of
    from aquabit.exports.statement import is_recipe
    from aquabit.pipelines import load, network_of, trace
    from aquabit.quant.model import check_fingerprint

    check_known(to)
    reference, chosen = source.of(model), QuantConfig.load(config)
    if with_weights(to, out):
        from aquabit.workflows import export_files

        folder = str(bank) if bank else None
        with bars() as progress:
            said = export_files(reference, chosen, to, out, bank=folder, device=device, progress=progress)
        if not emit({"to": to, "said": said}, json_):
            tables.show_files(said, out)
        return
    groups.check_idle(context, True, f"with --to {to}, which fits the weights itself", "device", "bank")
    check_writable(out)
    pipe = load(reference)
    network, graph = network_of(pipe), trace(pipe)
    check_fingerprint(chosen, network)
    check_layers(chosen, graph)
    each = each_network(Exported(network, chosen, graph))
    for part in each:
        check_replaceable(place_of(out, part, folder=False), to, is_recipe)
    found = {part: export_config(one.config, one.graph, to) for part, one in each.items()}
    for part, recipe in found.items():
        write_text(place_of(out, part, folder=False), recipe.to_json())
    statements = {part: recipe.to_dict()["statement"] for part, recipe in found.items()}
    if not emit(statements.get("", statements), json_):
        for part, recipe in found.items():
            tables.show_export(recipe, place_of(out, part, folder=False))


@verb
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A packed artifact (or any pipeline).")],
    out: Annotated[Path, typer.Option("--out", help="PNG grid.")],
    making: groups.Making,
    device: options.Device = "cpu",
    memory: options.PackedMemory = "packed",
    offload: options.Offload = False,
    model: options.OwnModel = None,
) -> None:
    """Make images from a packed artifact."""
    from aquabit import packing
    from aquabit.pipelines import load
    from aquabit.pipelines.pictures import thumbnail

    placed: list[Any] = []
    source = folder if model is None else load(folder, into=load(model, device))
    if not getattr(source, "images", True):
        raise AquabitError(f"{model} makes no images but other numbers; use aquabit.generate in Python")
    with bars() as progress:
        made = packing.generate(
            source,
            device=device,
            memory=memory,
            offload=offload,
            progress=progress,
            told=placed.append,
            **making.arguments(),
        )
    write_bytes(out, thumbnail(made, len(made) // making.images))
    last = making.seed + making.images - 1
    console.print(f"{out}: {making.images} images, seeds {making.seed} to {last}")
    for placement in placed:
        tables.show_placement(placement)


@verb
def report(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="S.db [OTHER.db]", help="A study; a second one is shown beside it."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for index.html, figures and tables.")],
    mlflow: options.MLflow = None,
) -> None:
    """One page, its figures for print, and its tables; of two studies a page that compares them."""
    if len(studies) > 2:
        raise AquabitError(f"{len(studies)} studies were given; a report shows one, or two side by side")
    if mlflow is not None and len(studies) > 1:
        raise AquabitError("--mlflow logs one study; two were given")
    from aquabit.reports import mlflow_run, side_by_side
    from aquabit.reports import report as write_report
    from aquabit.study import Study

    if mlflow is not None:
        mlflow_run.client(mlflow)
    with bars() as progress:
        opened = [Study(s, create=False) for s in studies]
        if len(opened) == 2:
            page = side_by_side(opened[0], opened[1], out, progress)
        else:
            page = write_report(opened[0], out, progress=progress)
    if mlflow is not None:
        mlflow_run.log_run(opened[0], out, mlflow)
    console.print(f"{page}")


@verb
def bench(
    context: typer.Context,
    folder: options.BenchFolder = None,
    formats: options.Formats = None,
    shapes: options.Shapes = None,
    act: Annotated[
        str, typer.Option("--act", help="Activations of the coded layers: 8, 6, ... bits, i8, f8; 16 is off.")
    ] = "8",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads; default: torch's.")
    ] = None,
    dtype: options.Dtype = "float32",
    json_: options.Json = None,
) -> None:
    """This machine's kernels against dense float32 and bfloat16: medians of interleaved runs."""
    packed = f"beside {folder}, a packed model with formats, shapes and activations of its own"
    groups.check_idle(context, folder is not None, packed, "formats", "shapes", "act")
    groups.check_idle(context, folder is None, "without DIR, a packed model", "dtype")
    from aquabit.activation_bits import parse_rounding
    from aquabit.quant.bench import bench_artifact, bench_formats, torch_threads

    with torch_threads(threads), bars() as progress:
        rows: Any = (
            bench_artifact(folder, dtype, progress)
            if folder
            else bench_formats(formats, shapes, parse_rounding(act), progress)
        )
    if not emit({"rows": [r.to_dict() for r in rows]}, json_):
        tables.show_calls(rows) if folder else tables.show_timings(rows)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
