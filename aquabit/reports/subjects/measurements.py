"""What was run: how many measurements of which kind, why some failed, the run card."""

from __future__ import annotations

import math
from importlib import metadata

import pandas as pd

from aquabit.activation_bits import act_text
from aquabit.progress import span
from aquabit.reports import words
from aquabit.reports.facts import Facts


def counts(facts: Facts) -> pd.DataFrame:
    """kind, measured, failed, seconds: how many measurements there are."""
    rows = [
        (kind, int((part.status == "ok").sum()), int((part.status != "ok").sum()), float(part.seconds.sum()))
        for kind, part in facts.measured.groupby("kind", sort=False)
    ]
    return pd.DataFrame(rows, columns=["kind", "measured", "failed", "seconds"])


def failures(facts: Facts) -> pd.DataFrame:
    """kind, reason, times, example: why measurements failed, most frequent first."""
    failed = facts.measured[facts.measured.status != "ok"]
    rows = [
        (kind, reason, len(part), part.config.iloc[0])
        for (kind, reason), part in failed.groupby(["kind", "reason"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["kind", "reason", "times", "example"]).sort_values(
        "times", ascending=False, kind="stable", ignore_index=True
    )


def run_card(facts: Facts) -> list[tuple[str, str]]:
    """What was run, as (name, value) pairs."""
    nodes, table = facts.layers.values(), facts.measured
    card = [
        ("model", facts.model or "unknown"),
        ("fingerprint", facts.fingerprint or "unknown"),
        ("study", facts.source),
    ]
    if nodes:
        weights = sum(math.prod(n["shape"]) for n in nodes)
        macs = words.short(sum(n.get("macs", 0) for n in nodes))
        text = f"{len(nodes)} with {weights:,} weights, {macs} multiply-adds a denoiser call"
        card.append(("layers", text))
    if facts.space:
        schemes = list(dict.fromkeys(s for row in facts.space.get("choices", {}).values() for s in row))
        acts = ", ".join(act_text(a) for a in facts.space.get("activations", []))
        card.append(("search space", f"{', '.join(schemes)}; activations {acts}"))
    card += _protocol(facts)
    if facts.correction:
        card.append(("noise correction", f"{facts.correction}, of every quantized configuration"))
    card.append(
        ("objective", f"{facts.metric} ({'lower' if facts.direction == 'min' else 'higher'} is better)")
    )
    if facts.swap:
        card.append(("effect", f"the swap {' to '.join(facts.swap.split(':'))}, in {facts.contexts}"))
    ok = table[table.status == "ok"]
    kinds = counts(facts)
    listed = ", ".join(
        f"{r.measured} {r.kind}" + (f" ({r.failed} more failed)" if r.failed else "")
        for r in kinds.itertuples()
    )
    card.append(("measurements", f"{len(ok)}: {listed}" if len(table) else "none"))
    spent = f"{span(float(table.seconds.sum()))} of measuring, " if len(ok) else "none"
    each = f"{words.figures(ok.seconds.median())} s a configuration" if len(ok) else ""
    card.append(("time", spent + each))
    if facts.spent:
        parts = ", ".join(f"{part} {span(seconds)}" for part, seconds in facts.spent.items())
        card.append(("the run took", f"{span(sum(facts.spent.values()))}: {parts}"))
    card += [("remark", note) for note in facts.remarks]
    if facts.notes:
        card.append(("fits", f"{len(facts.notes)} with a remark, the first: {facts.notes[0]}"))
    return [*card, *_environment(facts)]


def _protocol(facts: Facts) -> list[tuple[str, str]]:
    p = facts.protocol
    if p is None:
        return [("protocol", "none yet")]
    card = [
        (
            "protocol",
            f"{p.digest}: {p.images} images, {p.steps} steps, scheduler {p.scheduler}, eta {p.eta:g},"
            f" guidance {p.guidance:g}, {p.dtype}, micro-batch {p.micro_batch}, reference {p.reference}"
            + (f", {p.resolution} pixels" if p.resolution else "")
            + (f", {p.frames} frames" if p.frames else "")
            + (f", strength {p.strength:g}" if p.strength else ""),
        )
    ]
    if p.conditions:
        some = ", ".join(map(str, p.conditions[:3]))
        card.append(("conditions", f"{len(p.conditions)}: {some}{', ...' if len(p.conditions) > 3 else ''}"))
    if p.inputs is not None:
        names = [name for name, _ in p.inputs.pictures]
        beside = "".join(f" with {role}" for role in p.inputs.roles)
        some = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        card.append(("pictures", f"{len(names)}{beside} of {p.inputs.folder}: {some}"))
    used = set(facts.rows("fresh").protocol)
    seeds = sorted(q.seed for d, q in facts.protocols.items() if d in used)
    fresh = (
        f"; {len(seeds)} blocks of fresh seeds from"
        f" {', '.join(f'{s:,}' for s in seeds[:5])}{', ...' if len(seeds) > 5 else ''}"
        if seeds
        else ""
    )
    return [*card, ("seeds", f"{p.seed:,} to {p.seed + p.images - 1:,}{fresh}")]


def _environment(facts: Facts) -> list[tuple[str, str]]:
    values: dict[str, list[str]] = {}
    for environment in facts.environments:
        for key, value in environment.items():
            if str(value) not in values.setdefault(str(key), []):
                values[str(key)].append(str(value))
    try:
        version = metadata.version("aquabit")
    except metadata.PackageNotFoundError:
        version = "from source"
    listed = ", ".join(f"{k} {' / '.join(v)}" for k, v in values.items())
    return [("environment", listed or "not recorded"), ("report by", f"aquabit {version}")]
