"""What the command line shows: errors, progress bars, JSON and tables."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aquabit.scheme import AquabitError, Progress

console, errors = Console(), Console(stderr=True)
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]


def shielded(verb: Callable[..., None]) -> Callable[..., None]:
    """Bad input: one sentence and exit code 2. Ctrl-C: a study that continues. Anything else is our fault: exit code 1."""

    @wraps(verb)
    def call(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except AquabitError as error:
            if debug:
                raise
            errors.print(f"[bold red]error:[/] {plain(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _interrupted()
        except OSError as error:
            if debug:
                raise
            errors.print(f"[bold red]error:[/] {plain(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:  # what was left half done on Ctrl-C may fail in its own way (torch's mode stack does)
                if isinstance(cause, KeyboardInterrupt):
                    _interrupted()
                cause = cause.__context__
            if debug:
                raise
            errors.print(
                f"[bold red]internal error:[/] {type(error).__name__}: {plain(str(error))}\nPlease report it; --debug shows where.",
                highlight=False,
            )
            raise typer.Exit(1) from None

    call.__annotations__ = {**verb.__annotations__, "debug": Debug}
    signature = inspect.signature(verb, eval_str=True)
    extra = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    return call


def _interrupted() -> None:
    errors.print("interrupted; nothing measured is lost: run the same command to continue")
    os._exit(130)


def plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars with the time that is left; none when the output is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=errors, disable=not errors.is_terminal) as drawn:
        known: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if total <= 0:
                return
            name = what.split(": ")[0]  # what comes after it changes from step to step
            if name not in known or drawn.tasks[known[name]].completed > done:
                known[name] = drawn.add_task(what, total=total)
            drawn.update(known[name], completed=done, total=total, description=plain(what))

        yield progress


def emit(value: Any, target: str | None) -> bool:
    """Write JSON where a machine would read it; whether anything was written to standard output."""
    if target is None:
        return False
    if target == "-":
        sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
        return True
    from aquabit.flow import write_json

    write_json(Path(target), value)
    return False


def show_failures(study: Any) -> None:
    table = study.measurements(failed=True)
    for reason, count in table[table.status == "failed"].reason.value_counts().head(5).items():
        console.print(f"[yellow]{count} failed:[/] {plain(str(reason))}")


def show_notes(study: Any) -> None:
    """What is to be said of the pipeline, of how quality is measured, and of fits (a diagonal H, codewords that nothing uses):
    by kind, with one layer."""
    for note in [*(study.get("family_notes") or []), *(study.get("quality") or {}).get("notes", [])]:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False)
    notes = study.notes()
    kinds: dict[str, list[str]] = {}
    for note in notes:
        kinds.setdefault(note.split(": ")[-1], []).append(note.split(": ")[0])
    for text, places in list(kinds.items())[:5]:
        console.print(f"[yellow]{len(places)} fits:[/] {plain(text)}, for example {plain(places[0])}", highlight=False)


def show_families(families: Sequence[Mapping[str, Any]], presets: Sequence[Mapping[str, Any]]) -> None:
    """Tables of pipeline families and of presets; any other diffusers pipeline is used through a generic adapter."""
    from rich.table import Table

    table = Table("family", "pipeline", "images from", "pixels", "for example", box=None)
    for row in families:
        table.add_row(row["name"], ", ".join(row["pipelines"]), row["conditions"], str(row["resolution"] or "-"), plain(row["example"]))
    console.print(table)
    console.print("any other diffusers pipeline: generic adapter and operator types\n", highlight=False)
    table = Table("preset", "family", "weights", "acts", "settings", "reported (full precision)", "source", box=None)
    for row in presets:
        settings = ", ".join(f"{k} {v}" for k, v in row["protocol"].items())
        before = row["full_precision"]
        numbers = ", ".join(f"{k} {v:g} ({before[k]:g})" if k in before else f"{k} {v:g}" for k, v in row["reported"].items())
        table.add_row(row["name"], row["family"], f"{row['weights']:g}", str(row["activations"]), settings, numbers, plain(row["source"]))
    console.print(table)
    console.print("what a source does not state keeps its default: give it yourself", highlight=False)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_sensitivity(result: Any, top: int) -> None:
    from rich.table import Table

    scores = Table("surrogate (out-of-fold)", "within-budget SRCC", "SRCC", "Kendall", "NDCG@10", "R2", box=None)
    own = result["surrogate"].get("estimator", "gbdt")
    for caution in result["surrogate"].get("cautions", []):
        console.print(f"[yellow]{plain(caution)}[/]", highlight=False)
    rows = {
        "gradient-boosted trees" if own == "gbdt" else own: result["surrogate"],
        **{f"baseline: {k}": v for k, v in result["surrogate"]["baselines"].items()},
    }
    for name, row in rows.items():
        scores.add_row(name, *(number(row.get(k)) for k in ("within_budget_srcc", "srcc", "kendall", "ndcg10", "r2")))
    console.print(f"{result['measurements']} measurements, objective {result['objective']} ({result['direction']})")
    console.print(scores)
    combined = result["ranking"] == "combined"
    parts = ["predicted", "real", "swaps"] if combined else []
    table = Table("layer", "operator", f"effect of {result['swap']}", "90 % interval", *parts, box=None)
    for row in sorted(result["layers"], key=lambda r: -(r["effect"] or 0))[:top]:
        both = [number(row["predicted"]), number(row["real"]), str(row["n"])] if combined else []
        ends = f"{number(row['low'])} to {number(row['high'])}"
        table.add_row(plain(row["name"]), row["operator"], number(row["effect"]), ends, *both)
    source = "predictions and real swaps combined, each by its precision" if combined else "predictions of the surrogate"
    console.print(f"ranking: {source}")
    console.print(table)
    _show_interactions(result["interactions"][:5])
    check = result.get("validation")
    if check:
        agreement = f"SRCC {number(check['srcc'])}, sign agreement {number(check['sign_agreement'], 2)}"
        console.print(f"checked against {check['flips']} real swaps: {agreement}")
    else:
        console.print("not checked against real swaps yet: `aquabit validate` measures some")


def _show_interactions(rows: list[Any]) -> None:
    from rich.table import Table

    table = Table("swapped together", "", "predicted beyond their sum", "90 % interval", box=None)
    for row in rows:
        table.add_row(plain(row["a"]), plain(row["b"]), number(row["interaction"]), f"{number(row['low'])} to {number(row['high'])}")
    if rows:
        console.print(table)


def show_front(front: Any) -> None:
    from rich.table import Table

    metrics = list(front.best_member.predicted)
    table = Table(
        "",
        "bits/weight",
        "bytes",
        "ms a call",
        *(h for m in metrics for h in (f"{m} predicted", f"{m} measured, fresh seeds (90 %)")),
        box=None,
    )
    for member in front.members:
        cells = []
        for m in metrics:
            found = member.measured[m]
            cells += [number(member.predicted[m], 2), f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"]
        table.add_row(
            "*" if member.config.digest == front.winner else "",
            f"{member.bits_per_weight:.3f}",
            f"{member.bytes:,}",
            number(member.latency_ms),
            *cells,
        )
    console.print(table)
    c = front.comparison
    if c:
        winner, uniform, d = c["winner"], c["uniform"], c["difference"]
        sides = f"winner (*): {winner['bytes']:,} bytes, {c['metric']} {winner['value']:.2f}; "
        sides += f"uniform {uniform['scheme']}: {uniform['bytes']:,} bytes, {c['metric']} {uniform['value']:.2f}; "
        change = f"difference {d['value']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}, 95 %, {c['blocks']} blocks of fresh seeds)"
        console.print(sides + change, highlight=False)
    if front.proof is not None:
        console.print(proof_line(front.proof), highlight=False)


def proof_line(proof: Any) -> str:
    """What a search proved, in one line."""
    line = f"additive program: optimum {proof.optimum:.6g}, bound {proof.optimum_bound:.6g}, gap {proof.optimum_gap:.2g} of its span; "
    line += f"surrogate: best prediction {proof.predicted:.4g}"
    if proof.bound is None:
        return line + ", no bound is known"
    return line + f", none within the budget is below {proof.bound:.4g} (gap {proof.gap:.3g}, {proof.nodes} nodes)"


def show_noise(statistics: Any, correction: str | None) -> None:
    """What the noise of quantization is like at the first, the middle and the last step."""
    table = statistics.table()
    kept = sorted({0, int(table.step.max()) // 2, int(table.step.max())})
    console.print(f"noise of quantization, corrected by {correction} (95 % intervals over {statistics.about.images} images):")
    for row in table[table.step.isin(kept)].itertuples():
        branch = f", branch {row.branch + 1}" if statistics.branches > 1 else ""
        console.print(
            f"  step {row.step + 1}{branch}: k {row.k:.4f} ({row.k_low:.4f} to {row.k_high:.4f}), R2 {row.r2:.2f}, "
            f"||eps|| / ||Delta|| {row.snr:.3g}, bias {row.bias:.3g}, residual variance {row.variance:.3g}",
            highlight=False,
        )


def show_placement(placement: Any) -> None:
    """Which kernels run how many layers, and what their weights hold in memory."""
    kernels = ", ".join(f"{name} {count}" for name, count in placement.backends.items())
    share = f"{placement.resident / 1e6:.2f} MB resident of {placement.dense / 1e6:.2f} MB dense"
    copies = f", {len(placement.copies)} dense copies among them" if placement.copies else ""
    console.print(f"layers by kernel: {kernels}; weights: {share}{copies}", highlight=False)


def _machine(rows: Any) -> None:
    console.print(", ".join(f"{k} {v}" for k, v in rows[0].machine.items() if v), highlight=False, soft_wrap=True)


def show_timings(rows: Any) -> None:
    """Milliseconds per format and shape, and how many times as long dense layers take as the best kernel."""
    from rich.table import Table

    _machine(rows)
    console.print(f"median milliseconds; coded layers at a{rows[0].act}; dense layers over the best kernel")
    names = list(dict.fromkeys(name for r in rows for name in r.milliseconds))
    table = Table("shape", "format", *names, "fp32", "bf16", "fp32/best", "bf16/best", box=None, padding=(0, 1, 0, 0))
    for r in rows:
        times = [f"{'*' if n == r.best else ''}{number(r.milliseconds.get(n), 2)}" for n in names]
        dense = [number(r.dense[d], 2) for d in ("float32", "bfloat16")]
        table.add_row(r.shape, r.format, *times, *dense, *(f"{r.ratio[d]:.2f}" for d in ("float32", "bfloat16")))
    console.print(table)


def show_calls(rows: Any) -> None:
    """Whole denoiser calls: milliseconds, ratio to dense float32 and bfloat16, resident weights, layers by kernel."""
    from rich.table import Table

    _machine(rows)
    table = Table("denoiser", "ms a call", "fp32/this", "bf16/this", "weights MB", "layers by kernel", box=None, padding=(0, 1, 0, 0))
    dense = {r.name: r.milliseconds for r in rows}
    for r in rows:
        ratios = [f"{dense[f'dense {d}'] / r.milliseconds:.2f}" for d in ("float32", "bfloat16")]
        kernels = ", ".join(f"{name} {count}" for name, count in r.backends.items())
        table.add_row(r.name, number(r.milliseconds, 2), *ratios, f"{r.resident / 1e6:.2f}", kernels)
    console.print(table)


def show_tuned(tuned: Any) -> None:
    """How a fine-tuning went: loss before and after, share of codes changed, what is to be said of it."""
    console.print(
        f"fine-tuned in {tuned.seconds:.0f} s: difference from the teacher {tuned.before:.3g} -> {tuned.after:.3g} on held-out samples, "
        f"{tuned.changed:.1%} of codes changed",
        highlight=False,
        soft_wrap=True,
    )
    for note in tuned.notes:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False, soft_wrap=True)


def show_export(found: Any, path: Path) -> None:
    """What became of how many layers, and what is lost."""
    console.print(f"{path}: " + ", ".join(f"{n} layers {status}" for status, n in found.counts.items()), highlight=False, soft_wrap=True)
    for lost, count in found.losses().items():
        console.print(f"  {count:4} layers: {plain(lost)}", highlight=False, soft_wrap=True)
    for sentence in found.whole:
        console.print(f"  all: {plain(sentence)}", highlight=False, soft_wrap=True)


def show_standings(rows: list[Any]) -> None:
    """How far studies are (``standing.Standing``), one line each."""
    for r in rows:
        parts = [f"{r.measurements} measurements, {r.failed} failed"]
        parts += [] if r.missing is None else [f"{r.missing} missing"]
        parts += [f"{r.rate:.0f} an hour"] if r.rate and r.missing else []
        parts += [f"{_span(r.remaining)} left (estimate)"] if r.remaining else []
        parts += [] if r.idle is None else [f"last {_span(r.idle)} ago"]
        parts += [f"written by {r.writer}"] if r.writer else []
        console.print(plain(f"{r.path}{f' ({r.shard})' if r.shard else ''}: {', '.join(parts)}"), highlight=False, soft_wrap=True)


def show_plan(plan: Any) -> None:
    """What measuring would take (``plan.Plan``)."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"measurements: {plan.measurements} to make, {plan.known} there already")
    say(f"bank: {plan.fits} fits missing, {plan.bank_bytes / 1e6:.1f} MB; {max(0, plan.bank_free) / 1e9:.1f} GB are left of its limit")
    said = f"{_span(plan.measuring_seconds)} of measuring and {_span(plan.probing_seconds)} for {plan.probes} probes"
    say(f"estimated time: {said} with {plan.workers} worker{'s' * (plan.workers > 1)}, besides the fits' own")
    say(f"(an estimate: from one full-precision denoiser call of {plan.call_seconds:.3g} s; nothing was measured)")


def show_peaks(peaks: list[Any], micro_batch: int, not_counted: str) -> None:
    """Peak memory (``memory.Peak``): a line a task and dtype, largest parts first."""
    for p in peaks:
        parts = sorted(((size, name) for name, size in p.parts.items() if size >= 1e6), reverse=True)
        said = ", ".join(f"{name} {size / 1e9:.2f}" for size, name in parts)
        console.print(f"{p.task:11} {p.dtype:9} {p.total / 1e9:7.2f} GB: {said}", highlight=False, soft_wrap=True)
    console.print(f"a process each, with a micro-batch of {micro_batch}; not counted: {not_counted}", highlight=False, soft_wrap=True)


def _span(seconds: float) -> str:
    """As 40 s, 12 min, 3.5 h or 2.1 d."""
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
