"""What the command line shows of a study's findings: the ranking of layers, and the front of a search."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, log, nan
from typing import Any

from aquabit.cli.progress import console, plain
from aquabit.cli.tables import INDENT, ends, number, rounded, show_named
from aquabit.scheme_kinds import uniform_name

UNIFORMS = 3  # uniform configurations, those nearest to the winner in size, that a front is compared with


def show_failures(study: Any) -> None:
    table = study.measurements(failed=True)
    for reason, count in table[table.status == "failed"].reason.value_counts().head(5).items():
        console.print(f"[yellow]{count} failed:[/] {plain(str(reason))}")


def show_notes(study: Any) -> None:
    """What is to be said of the pipeline, of how quality is measured, and of fits (a diagonal H, codewords
    that nothing uses): by kind, with one layer."""
    for note in [*(study.get("family_notes") or []), *(study.get("quality") or {}).get("notes", [])]:
        console.print(f"[yellow]note:[/] {plain(note)}", highlight=False)
    notes = study.notes()
    kinds: dict[str, list[str]] = {}
    for note in notes:
        kinds.setdefault(note.split(": ")[-1], []).append(note.split(": ")[0])
    for text, places in list(kinds.items())[:5]:
        console.print(
            f"[yellow]{len(places)} fits:[/] {plain(text)}, for example {plain(places[0])}", highlight=False
        )


def show_sensitivity(stored: Mapping[str, Any], top: int) -> None:
    """Scores of the surrogate, the ranking of layers, pairs of layers, and how predictions agree with real
    swaps, of a sensitivity as a study keeps it. What older studies do not hold is left out."""
    from aquabit.sensitivity.result import Sensitivity

    result = Sensitivity.from_dict(stored)
    for caution in result.surrogate.get("cautions", []):
        console.print(f"[yellow]{plain(caution)}[/]", highlight=False)
    console.print(f"{result.measurements} measurements, objective {result.objective} ({result.direction})")
    _show_scores(result.surrogate)
    console.print(f"ranking: {_ranking(result)}", highlight=False)
    _show_layers(result, top)
    _show_interactions(result)
    _show_validation(result.validation)


def _show_scores(scores: Mapping[str, Any]) -> None:
    good, names = scores.get("among_good"), list(scores["baselines"])
    among = [] if good is None else [_among(good.get("srcc"), good["count"])]
    among += (
        []
        if good is None
        else [_among(good["baselines"][k], good["count"]) if k in good["baselines"] else "-" for k in names]
    )
    head = [
        "surrogate, out of fold",
        "within-\nbudget\nSRCC",
        *([f"among the\n{good['count']} good\nones"] if good else []),
    ]
    own = scores.get("estimator", "gbdt")
    rows: dict[str, Any] = {"gradient-boosted trees" if own == "gbdt" else own: scores}
    rows |= {f"baseline: {k}": scores["baselines"][k] for k in names}
    table = []
    for i, (name, row) in enumerate(rows.items()):
        first, *rest = (number(row.get(k)) for k in ("within_budget_srcc", "srcc", "kendall", "ndcg10", "r2"))
        table.append([name, first, *among[i : i + 1], *rest])
    show_named([*head, "SRCC", "Kendall", "NDCG\n@10", "R2"], table)
    if good:
        console.print(
            "good ones have at most 1.25 times the least error at their size; noise ceilings:"
            f" {number(scores.get('noise_ceiling'), 2)}, among good ones"
            f" {number(good.get('noise_ceiling'), 2)}",
            highlight=False,
        )


def _among(value: float | None, count: int) -> str:
    return f"too few ({count})" if value is None else number(value)


def _ranking(result: Any) -> str:
    source = "predictions of the surrogate"
    if result.ranking == "combined":
        source = "predictions and real swaps combined"
        source += " by a hierarchical model fitted to this study's swaps" if result.of_good_ones else ""
    contexts = "good configurations" if result.of_good_ones else "random configurations"
    return source if result.bits is None else f"{source}; effects in {contexts} near {result.bits:g} bits"


def _show_layers(result: Any, top: int) -> None:
    from aquabit.stats import percent

    table = result.layers.sort_values("effect", key=lambda effect: -effect.fillna(0.0), kind="stable")
    layers = table.head(top).to_dict("records")
    psnr, combined = "psnr_effect" in result.layers, result.ranking == "combined"
    between = f"{percent(result.level)} interval"
    head = [f"{result.swap} in layer (operator)", f"{result.objective}\nworse by", between]
    head += ["PSNR\nloses, dB", between] if psnr else []
    head += ["pre-\ndicted", "real", "swaps"] if combined else []
    rows = []
    for r in layers:
        row = [f"{r['name']} ({r['operator']})", rounded(r["effect"]), ends(r)]
        row += [rounded(r.get("psnr_effect")), ends(r, "psnr_low", "psnr_high")] if psnr else []
        row += [rounded(r["predicted"]), rounded(r["real"]), str(r["n"])] if combined else []
        rows.append(row)
    show_named(head, rows)


def _show_interactions(result: Any) -> None:
    from aquabit.stats import percent

    if result.interactions.empty:
        return
    console.print("swapped together, what is predicted beyond the sum of each alone:", highlight=False)
    for r in result.interactions.head(5).to_dict("records"):
        found = f"{rounded(r['interaction'])} ({ends(r)}, {percent(result.level)} interval)"
        both = f"{r['a']}\n  with {r['b']}\n{' ' * INDENT}{found}"
        console.print(plain(both), highlight=False, soft_wrap=True)


def _show_validation(check: Mapping[str, Any] | None) -> None:
    """Two lines: layers drawn at random, which give the honest score, and those that were swapped because
    the ranking puts them first."""
    if not check:
        console.print("not checked against real swaps yet: `aquabit validate` measures some")
        return

    def agreement(part: Mapping[str, Any]) -> str:
        return f"SRCC {number(part['srcc'])}, sign agreement {number(part['sign_agreement'], 2)}"

    if "random" not in check:  # of studies whose layers were all drawn at random
        console.print(f"checked against {check['flips']} real swaps: {agreement(check)}", highlight=False)
        return
    console.print(f"checked against {check['flips']} real swaps:", highlight=False)
    for half, what in (
        ("random", "layers drawn at random, the honest score"),
        ("top", "layers that the ranking puts first"),
    ):
        part = check[half]
        console.print(
            f"  {what}: {agreement(part)} ({part['layers']} layers, {part['flips']} swaps)", highlight=False
        )


def show_front(front: Any) -> None:
    """The front as a table, then what speaks for the winner, and how near the search came to its optimum."""
    from rich.table import Column, Table

    from aquabit.stats import Interval

    metrics = _front_metrics(front)
    timed = any(m.latency_ms is not None for m in front.members)
    titles = ["", "bits a\nweight", "bytes", *(["ms\na call"] if timed else [])]
    titles += [
        f"{shown_metric(m)}\n{what}"
        for m in metrics
        for what in ("predicted", f"measured\n± {front.best_member.measured[m].percent}")
    ]
    table = Table(
        *(Column(t, justify="right", overflow="fold") for t in titles), box=None, padding=(0, 1, 0, 0)
    )
    for member in front.members:
        row = [
            "*" if member.config.digest == front.winner else "",
            f"{member.bits_per_weight:.3f}",
            f"{member.bytes:,}",
        ]
        row += [number(member.latency_ms, 2)] if timed else []
        for m in metrics:
            found = member.measured.get(m, Interval(nan, nan, nan))
            half = f" ± {found.half:.2f}" if found.known else ""  # Student's interval is symmetric
            row += [number(member.predicted.get(m), 2), number(found.value, 2) + half]
        table.add_row(*row)
    console.print(table)
    for line in front_sentences(front):
        console.print(plain(line), highlight=False)
    if front.proof is not None:
        console.print(proof_line(front.proof), highlight=False)


def _front_metrics(front: Any) -> list[str]:
    """PSNR, the objective, and of videos temporal PSNR, those that were measured."""
    best = front.best_member
    objective = (
        front.comparison.get("metric")
        or next((m for m in best.predicted if m != "psnr"), None)
        or next(iter(best.measured), "psnr")
    )
    return [m for m in dict.fromkeys(("psnr", objective, "temporal_psnr")) if m in best.measured]


def shown_metric(name: str) -> str:
    """A metric as people write it: abbreviations in capitals."""
    if name == "temporal_psnr":
        return "temporal PSNR"
    return name.upper() if name in ("fid", "sfid", "kid", "is", "mse", "psnr", "ssim", "lpips") else name


def front_sentences(front: Any) -> list[str]:
    """What a search found, as sentences: the winner beside uniform in PSNR, then in the objective, how
    much smaller the front is at uniform quality, how finalists were told apart, and what the winner was
    held against."""
    c = front.comparison
    lines = _beside_uniform(c) if "uniform" in c else []
    nearest = sorted(
        c.get("same_quality") or [], key=lambda row: abs(log(row["bytes"] / front.best_member.bytes))
    )[:UNIFORMS]
    lines += [_smaller(row) for row in nearest]
    judged = c.get("judged")
    if judged and judged["finalists"] > 1:
        said = (
            f"{judged['finalists']} finalists were told apart by {shown_metric(judged['metric'])} on up to"
            f" {judged['images']} images"
        )
        gap = judged["next_best"]
        lines.append(said + (f"; the next best is worse by {_with_ends(gap)}" if gap else ""))
    return lines + [_held_against(row, c, front) for row in c.get("against") or []]


def _beside_uniform(c: Mapping[str, Any]) -> list[str]:
    from aquabit.stats import Interval

    winner, uniform, metric, d = c["winner"], c["uniform"], shown_metric(c["metric"]), c["difference"]
    name = uniform_name(uniform["scheme"])
    sizes = f"winner (*): {winner['bytes']:,} bytes; uniform {name}: {uniform['bytes']:,} bytes"
    lines, psnr = [f"{sizes} ({c['blocks']} blocks of fresh seeds)"], c.get("psnr_difference")
    if psnr and c["metric"] != "psnr":
        sides = f"PSNR {number(winner['psnr'], 2)} and {number(uniform['psnr'], 2)} dB"
        lines.append(f"{sides}: difference {_with_ends(psnr, '+')}")
    lines.append(
        f"{metric} {number(winner.get('value'), 2)} and {number(uniform.get('value'), 2)}: difference"
        f" {_with_ends(d, '+')}"
    )
    if psnr and Interval.from_dict(d).holds_zero:
        images, needed = c.get("images"), d.get("images_needed")
        seen = f"{c['blocks']} x {images} images" if images else f"these {c['blocks']} blocks"
        would = f" (about {needed:,} images would)" if needed else ""
        fidelity = (c.get("judged") or {}).get("metric", "psnr")
        rest = "; fidelity decides" if c["metric"] != fidelity else ""
        lines.append(f"{metric} of {seen} cannot tell them apart{would}{rest}")
    return lines


def _with_ends(d: Mapping[str, Any], sign: str = "") -> str:
    from aquabit.stats import Interval

    found = Interval.from_dict(d)
    value, low, high = found
    if not isfinite(value):
        return "unknown"
    if not found.known:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f}, {found.percent})"


def _smaller(row: Mapping[str, Any]) -> str:
    """Of one uniform configuration: the size from which on the front is as good."""
    unit = " dB" if row["metric"] == "psnr" else f" {shown_metric(row['metric'])}"
    name = uniform_name(row["uniform"])
    every = f"{name} for all layers" if any(c.isdigit() for c in name) else f"uniform {name}"
    said = f"{every} has {number(row['value'], 1 if unit == ' dB' else 3)}{unit} at {row['bytes']:,} bytes; "
    if row["found_bytes"] is None:
        return said + "no member of the front has that"
    share = f"{100 * row['found_bytes'] / row['bytes']:.0f} %"
    return f"{said}the front has that from {row['found_bytes']:,} bytes on ({share})"


def _held_against(row: Mapping[str, Any], c: Mapping[str, Any], front: Any) -> str:
    """One configuration that was given with ``--against``, beside the winner."""
    said = f"against {row['name']}: {row['bytes']:,} bytes, PSNR {number(row['psnr'], 2)} dB"
    ours = front.best_member.measured["psnr"].value if "psnr" in front.best_member.measured else nan
    if row["psnr"] is not None and isfinite(ours - row["psnr"]):
        said += f" (the winner {ours - row['psnr']:+.2f})"
    if c.get("metric", "psnr") != "psnr":
        said += f", {shown_metric(c['metric'])} {_with_ends(row)}"
    return said


def proof_line(proof: Any) -> str:
    """What a search proved, in one line: of the additive program, and of the surrogate where it searched
    one."""
    line = (
        f"additive program: optimum {proof.optimum:.6g}, bound {proof.optimum_bound:.6g}, gap"
        f" {proof.optimum_gap:.2g} of its span"
    )
    if proof.bound is None and proof.predicted == proof.optimum:
        return line
    line += f"; surrogate: best prediction {proof.predicted:.4g}"
    if proof.bound is None:
        return line + ", no bound is known"
    return (
        line
        + f", none within the budget is below {proof.bound:.4g} (gap {proof.gap:.3g}, {proof.nodes} nodes)"
    )
