"""What the command line shows of models, machines and runs: tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

from aquabit.activation_bits import act_text
from aquabit.cli.progress import console, plain
from aquabit.progress import span

GAP, INDENT = 2, 4  # columns between those of a table, and before what stands under a name


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not isfinite(value) else f"{value:.{digits}f}"


def rounded(value: float | None) -> str:
    """Three significant digits, all digits before the point."""
    if value is None or not isfinite(value):
        return "-"
    size = floor(log10(abs(value))) if value else 0
    return f"{value:.2e}" if size < -4 else f"{value:.{max(0, 2 - size)}f}"


def ends(row: Mapping[str, Any], low: str = "low", high: str = "high") -> str:
    """An interval of a row; a dash where an end is unknown."""
    known = [rounded(row.get(k)) for k in (low, high)]
    return "-" if "-" in known else " to ".join(known)


def named_lines(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table as lines: names (first column) are never cut. Where names and numbers do not fit ``width``
    together, each name has a line of its own above its numbers. A title may have several lines."""
    cells = [[title.split("\n") for title in head], *([[cell] for cell in row] for row in rows)]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(head))]
    beside = sum(widths) + GAP * (len(head) - 1) <= width
    lines = []
    for row in cells:
        name, parts = row[0], row[1:]
        deep = max(map(len, parts), default=1)
        blocks = [[""] * (deep - len(part)) + part for part in parts]
        numbers = [
            (" " * GAP).join(text.rjust(size) for text, size in zip(line, widths[1:], strict=True))
            for line in zip(*blocks, strict=True)
        ]
        if beside:
            names = [""] * (deep - len(name)) + name
            lines += [
                f"{text.ljust(widths[0])}{' ' * GAP}{line}" for text, line in zip(names, numbers, strict=True)
            ]
        else:
            lines += [*name, *(" " * INDENT + line for line in numbers)]
    return lines


def show_named(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for line in named_lines(head, rows, console.width):
        console.print(plain(line.rstrip()), highlight=False, soft_wrap=True)


def show_bundled(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        size = f"{row['bytes'] / 1e6:.1f} MB"
        console.print(f"{row['name']:14} {row['denoiser']}, {size}, trained on {row['trained_on']}")


def show_graph(graph: Any) -> None:
    """Layers in execution order, and their sums."""
    from rich.table import Table

    from aquabit.graph import dense_macs, fixed_layers, layers

    fixed = fixed_layers(graph)
    table = Table("layer", "operator", "block", "shape", "MACs", box=None)
    for name, node in layers(graph).items():
        shape = "x".join(map(str, node["shape"])) + (" (fp)" if name in fixed else "")
        row = (plain(name), node["operator"], plain(node["block"]), shape, f"{node['macs'] / 1e6:.2f} M")
        table.add_row(*row)
    for name, row in graph.graph.get("dense", {}).items():
        shape = "x".join(map(str, row["shape"])) + " (fp)"
        table.add_row(plain(name), "dense", plain(row["kind"]), shape, f"{row['macs'] / 1e6:.2f} M")
    console.print(table)
    nodes = layers(graph).values()
    one = "call" if graph.graph["family"] == "text" else "denoiser call"
    console.print(
        f"{len(nodes)} layers, {graph.graph['weights'] / 1e6:.2f} M weights,"
        f" {(sum(n['macs'] for n in nodes) + dense_macs(graph)) / 1e6:.1f} M multiply-adds an image and"
        f" {'call of each network' if 'parts' in graph.graph else one}"
    )


def show_families(families: Sequence[Mapping[str, Any]], presets: Sequence[Mapping[str, Any]]) -> None:
    """Pipeline families and presets, each under its whole name; any other diffusers pipeline is used
    through a generic adapter."""
    for row in families:
        pixels = f" of {row['resolution']} pixels" if row["resolution"] else ""
        made = f"{row['makes']}{pixels} from {row['conditions']}; for example {row['example']}"
        first, *others = row["pipelines"]
        _entry(f"{row['name']} ({first})", f"{made}; also {', '.join(others)}" if others else made)
    console.print("any other diffusers pipeline: generic adapter and operator types\n", highlight=False)
    console.print(
        "presets: mean weight bits, activation bits, settings; what the source reports (of full precision);"
        " source"
    )
    for row in presets:
        settings = ", ".join(f"{k} {v}" for k, v in row["protocol"].items())
        before = row["full_precision"]
        numbers = ", ".join(
            f"{k} {v:g} ({before[k]:g})" if k in before else f"{k} {v:g}" for k, v in row["reported"].items()
        )
        what = [f"{row['weights']:g} bits, a{row['activations']}, {settings}", numbers, row["source"]]
        _entry(f"{row['name']} ({row['family']})", "; ".join(text for text in what if text))
    console.print("what a source does not state keeps its default: give it yourself", highlight=False)


def _entry(name: str, text: str) -> None:
    """A whole name on a line of its own, and under it what is said of it."""
    from textwrap import fill

    console.print(plain(name), highlight=False, soft_wrap=True)
    margin = " " * INDENT
    console.print(
        plain(
            fill(text, console.width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
        ),
        highlight=False,
        soft_wrap=True,
    )


def show_noise(statistics: Any, correction: str | None) -> None:
    """What the noise of quantization is like at the first, the middle and the last step."""
    table = statistics.table()
    kept = sorted({0, int(table.step.max()) // 2, int(table.step.max())})
    console.print(
        f"noise of quantization, corrected by {correction} (95 % intervals over {statistics.about.images}"
        " images):"
    )
    for row in table[table.step.isin(kept)].itertuples():
        branch = f", branch {row.branch + 1}" if statistics.branches > 1 else ""
        console.print(
            f"  step {row.step + 1}{branch}: k {row.k:.4f} ({row.k_low:.4f} to {row.k_high:.4f}), R2"
            f" {row.r2:.2f}, ||eps|| / ||Delta|| {row.snr:.3g}, bias {row.bias:.3g}, residual variance"
            f" {row.variance:.3g}",
            highlight=False,
        )


def show_placement(placement: Any) -> None:
    """Which kernels run how many layers, and what their weights hold in memory."""
    kernels = ", ".join(f"{name} {count}" for name, count in placement.backends.items())
    share = f"{placement.resident / 1e6:.2f} MB resident of {placement.dense / 1e6:.2f} MB dense"
    copies = f", {len(placement.copies)} dense copies among them" if placement.copies else ""
    console.print(f"layers by kernel: {kernels}; weights: {share}{copies}", highlight=False)
    if placement.slower:
        wanted = "--memory auto keeps some" if not placement.copies else "there is no room for more"
        console.print(
            f"{placement.slower} layers would be faster with a dense copy; {wanted}", highlight=False
        )


def _machine(rows: Any) -> None:
    console.print(
        ", ".join(f"{k} {v}" for k, v in rows[0].machine.items() if v), highlight=False, soft_wrap=True
    )


def show_timings(rows: Any) -> None:
    """Milliseconds per format and shape, and how many times as long dense layers take as the best kernel."""
    from rich.table import Table

    _machine(rows)
    console.print(
        f"median milliseconds; coded layers at {act_text(rows[0].act)}; dense layers over the best kernel"
    )
    names = list(dict.fromkeys(name for r in rows for name in r.milliseconds))
    table = Table(
        "shape", "format", *names, "fp32", "bf16", "fp32/best", "bf16/best", box=None, padding=(0, 1, 0, 0)
    )
    for r in rows:
        times = [f"{'*' if n == r.best else ''}{number(r.milliseconds.get(n), 2)}" for n in names]
        dense = [number(r.dense[d], 2) for d in ("float32", "bfloat16")]
        table.add_row(
            r.shape, r.format, *times, *dense, *(f"{r.ratio[d]:.2f}" for d in ("float32", "bfloat16"))
        )
    console.print(table)


def show_calls(rows: Any) -> None:
    """Whole denoiser calls: milliseconds, ratio to dense float32 and bfloat16, resident weights, layers by
    kernel."""
    from rich.table import Table

    _machine(rows)
    table = Table(
        "denoiser",
        "ms a call",
        "fp32/this",
        "bf16/this",
        "weights MB",
        "layers by kernel",
        box=None,
        padding=(0, 1, 0, 0),
    )
    dense = {r.name: r.milliseconds for r in rows}
    for r in rows:
        ratios = [f"{dense[f'dense {d}'] / r.milliseconds:.2f}" for d in ("float32", "bfloat16")]
        kernels = ", ".join(f"{name} {count}" for name, count in r.backends.items())
        table.add_row(r.name, number(r.milliseconds, 2), *ratios, f"{r.resident / 1e6:.2f}", kernels)
    console.print(table)


def show_tuned(tuned: Any) -> None:
    """How a fine-tuning went: loss before and after, share of codes changed, what is to be said of it."""
    console.print(
        f"fine-tuned in {tuned.seconds:.0f} s: difference from the teacher {tuned.before:.3g} ->"
        f" {tuned.after:.3g} on held-out samples, {tuned.changed:.1%} of codes changed",
        highlight=False,
        soft_wrap=True,
    )
    for note in tuned.notes:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False, soft_wrap=True)


def show_export(found: Any, path: Path) -> None:
    """What became of how many layers, and what is lost."""
    console.print(
        f"{path}: " + ", ".join(f"{n} layers {status}" for status, n in found.counts.items()),
        highlight=False,
        soft_wrap=True,
    )
    for lost, count in found.losses().items():
        console.print(f"  {count:4} layers: {plain(lost)}", highlight=False, soft_wrap=True)
    for sentence in found.whole:
        console.print(f"  all: {plain(sentence)}", highlight=False, soft_wrap=True)


def _size(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def show_files(said: list[str], path: Path) -> None:
    """What was written for another program, and what is to be said of it."""
    size = [f"{path}: {_size(path):,} bytes"] if path.exists() else []  # several files have other names
    for sentence in (*size, *said):
        console.print(plain(sentence), highlight=False, soft_wrap=True)


def show_statuses(rows: list[Any]) -> None:
    """How far studies are (``standing.StudyStatus``), one line each."""
    for r in rows:
        parts = [f"{r.measurements} measurements, {r.failed} failed"]
        parts += [] if r.missing is None else [f"{r.missing} missing"]
        parts += [f"{r.rate:.0f} an hour"] if r.rate and r.missing else []
        parts += [f"{span(r.remaining)} left (estimate)"] if r.remaining else []
        parts += [] if r.idle is None else [f"last {span(r.idle)} ago"]
        parts += [f"written by {r.writer}"] if r.writer else []
        console.print(
            plain(f"{r.path}{f' ({r.shard})' if r.shard else ''}: {', '.join(parts)}"),
            highlight=False,
            soft_wrap=True,
        )


def show_plan(plan: Any) -> None:
    """What measuring would take (``plan.Plan``)."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"measurements: {plan.measurements} to make, {plan.known} there already")
    say(
        f"bank: {plan.fits} fits missing, {plan.bank_bytes / 1e6:.1f} MB; {max(0, plan.bank_free) / 1e9:.1f}"
        " GB are left of its limit"
    )
    if plan.memory_bytes is not None:
        say(f"memory: {plan.memory_bytes / 1e9:.1f} GB in each process at its peak")
    of_gradients = f" and {plan.backward_passes} backward passes" if plan.backward_passes else ""
    said = (
        f"{span(plan.fitting_seconds)} of fits, {span(plan.probing_seconds)} for {plan.probes} probes"
        f"{of_gradients}, {span(plan.measuring_seconds)} of measuring"
    )
    said += f", {span(plan.contexts_seconds)} of contexts" if plan.contexts_seconds else ""
    say(f"estimated time: {said} with {plan.workers} worker{'s' * (plan.workers > 1)}")
    say(
        f"(an estimate: from one full-precision denoiser call of {plan.call_seconds:.3g} s and fits of a few"
        " rows of each scheme, timed here; nothing was measured)"
    )


def show_parts(parts: Mapping[str, float]) -> None:
    """Seconds of the parts of a run, planned."""
    for name, seconds in parts.items():
        console.print(f"{name:22} {span(seconds):>10}", highlight=False)
    console.print(f"{'in all, estimated':22} {span(sum(parts.values())):>10}", highlight=False)


def show_operations(calls: Mapping[str, int], operations: int) -> None:
    """What a run computes, whatever the machine; 0 operations: the graph does not tell."""
    said = ", ".join(f"{name} {count:,}" for name, count in calls.items())
    told = f": {operations / 1e15:,.1f} PFLOP of its layers" if operations else ""
    console.print(
        f"{sum(calls.values()):,} calls of the denoiser with one sample ({said}){told}",
        highlight=False,
        soft_wrap=True,
    )


def show_peaks(peaks: list[Any], micro_batch: int, not_counted: str) -> None:
    """Peak memory (``memory.Peak``): a line a task and dtype, largest parts first."""
    for p in peaks:
        parts = sorted(((size, name) for name, size in p.parts.items() if size >= 1e6), reverse=True)
        said = ", ".join(f"{name} {size / 1e9:.2f}" for size, name in parts)
        console.print(
            f"{p.task:11} {p.dtype:9} {p.total / 1e9:7.2f} GB: {said}", highlight=False, soft_wrap=True
        )
    console.print(
        f"a process each, with a micro-batch of {micro_batch}; not counted: {not_counted}",
        highlight=False,
        soft_wrap=True,
    )
