"""Step-aware activation bits and static ranges, measured: python benchmarks/step_bits.py PART ... [--folder
DIR] [--models ...] [--quick]

controls   at equal BOPs, a mean of 5 (a4 and a6) and of 7 activation bits (a6 and a8): a mix of layers in all
           steps, low bits first, high
           bits first, PTQD's SNR rule with its threshold scaled to that mean, three random patterns; and the
           rule as it is published
ranges     dynamic, static and per-step ranges with the same bits in all steps, at a8, a6 and a4
search     digits-unet: the same search under a BOPs budget with and without groups of steps, as many
           measurements each; winners on fresh seeds

Weights are output-aware 4-bit (usq4h) except in the search. FID and PSNR to full precision on blocks of fresh
seeds, differences paired. Tables go to benchmarks/results/step_bits.json and step_bits.md. Everything
continues where it stopped; --quick tries it on a few images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, measured_blocks, open_study, parsed, parser, run_parts, spans
from benchmarks.correction import compared, measured

WEIGHTS = "usq4h"
MEANS = {5.0: (4, 6), 7.0: (6, 8)}
RANDOM = 3
SPACE = {"schemes": ["usq2h", "usq3h", "usq4h"], "levels": [], "activations": [8, 6, 4]}  # of the search
STARTS = (0, 5)
FINALISTS = 4  # of a search, judged on more images
BUDGET = 5.0  # activation bits of uniform usq4h that the search's BOPs stand for


@dataclass(frozen=True)
class Size:
    """How much is measured: blocks of fresh seeds, images in each, and the search's samples, candidates a
    round and repetitions."""

    blocks: tuple[int, ...] = (41, 42, 43, 44, 45)  # the others are 11 to 36
    images: int = 256
    samples: int = 60
    rounds: int = 2
    per_round: int = 8
    seeds: tuple[int, ...] = (0, 1)


QUICK = Size((41, 42), 32, 24, 1, 4, (0,))


def session_of(folder: Path, model: str) -> Any:
    """A study of usq4h at all widths; the blocks of fresh seeds are measured in it."""
    space = {"schemes": [WEIGHTS], "levels": [], "activations": [8, 6, 4]}
    return open_study(folder / f"steps-{model}.db", model, space=space)


def blocks_of(session: Any, size: Size) -> list[Any]:
    return [replace(session.protocol.block(b), images=size.images) for b in size.blocks]


def per_bit(session: Any) -> dict[str, float]:
    """Each layer's BOPs per activation bit."""
    from aquabit.scheme import Scheme

    costs, space = session.costs, session.space
    column = space.schemes.index(Scheme.parse(WEIGHTS))
    return {name: float(costs.macs[i] * costs.weight_bits[i, column]) for i, name in enumerate(space.layers)}


def noise_ratios(session: Any, acts: Sequence[int]) -> tuple[dict[int, list[float]], list[float]]:
    """SNR of every step at some widths, and alpha_t^2 / sigma_t^2."""
    from aquabit.scheme import Calibration
    from benchmarks.research.step_bits_rule import signal_ratios

    here, protocol = session.here, session.protocol
    snr = {
        a: here.noise(session.space.uniform(WEIGHTS, a), Calibration.of(protocol)).estimate.snr[:, 0].tolist()
        for a in acts
    }
    here.pipe.scheduler.set_timesteps(protocol.steps)
    return snr, signal_ratios(here.pipe.scheduler)


def patterns(session: Any, mean: float, low: int, high: int) -> dict[str, Any]:
    """The controls of one mean."""
    from benchmarks.research.step_bits_rule import (
        Mix,
        by_snr,
        high_then_low,
        low_then_high,
        random_bits,
        uniform,
    )

    steps = session.protocol.steps
    mix = Mix(session.space.uniform(WEIGHTS, 8), low, high, mean, per_bit(session))
    snr, ratios = noise_ratios(session, [low])
    found = {
        "uniform": uniform(mix),
        "low then high": low_then_high(mix, steps),
        "high then low": high_then_low(mix, steps),
        "SNR rule, scaled": by_snr(mix, snr[low], ratios),
    }
    return {**found, **{f"random {s + 1}": random_bits(replace(mix, seed=s), steps) for s in range(RANDOM)}}


def published(session: Any) -> dict[str, Any]:
    """PTQD's rule as it stands, over a4, a6 and a8, and the mix of layers that costs the same."""
    from benchmarks.research.step_bits_rule import Mix, merged, snr_bits, stepped, uniform

    snr, ratios = noise_ratios(session, (4, 6, 8))
    bits, costs = merged(snr_bits(snr, ratios)), per_bit(session)
    mean, base = sum(bits) / len(bits), session.space.uniform(WEIGHTS, 8)
    low, high = (4, 6) if mean < 6 else (6, 8)
    print(
        "SNR",
        {a: [round(v, 1) for v in row] for a, row in snr.items()},
        "alpha^2 / sigma^2",
        [round(r, 2) for r in ratios],
        bits,
        flush=True,
    )
    rule = stepped(base, dict.fromkeys(costs, bits))
    return {"uniform": uniform(Mix(base, low, high, mean, costs)), "SNR rule, as published": rule}


def bits_text(config: Any, steps: int) -> str:
    """The bits of the layers in each step, as 4 4 6; a range where layers differ."""
    texts = []
    for t in range(steps):
        row = {
            c.act[config.steps.of(t)] if isinstance(c.act, tuple) else c.act for c in config.layers.values()
        }
        texts.append("/".join(map(str, sorted(row))))
    return " ".join(texts) if config.layers and len(set(texts)) > 1 else (texts[0] if config.layers else "")


def compared_rows(session: Any, configs: Mapping[str, Any], size: Size, **about: Any) -> list[dict[str, Any]]:
    """One row a configuration, full precision first, with the differences to the first of ``configs``."""
    every = {"full precision": session.space.full_precision(), **configs}
    found = compared(measured(session, every, blocks_of(session, size)), next(iter(configs)))
    for row in found:
        config = every[row["name"]]
        row |= {
            "bops": session.costs(config).bops,
            "bytes": session.costs(config).bytes,
            "bits": bits_text(config, session.protocol.steps),
        }
    print(*(f"{r['name']} {r['fid'][0]:.2f} {r['psnr'][0]:.1f};" for r in found), about, flush=True)
    return [{**about, **row} for row in found]


def controls(folder: Path, models: Sequence[str], size: Size) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        with session_of(folder, model) as session:
            for mean, (low, high) in MEANS.items():
                configs = patterns(session, mean, low, high)
                bops = [session.costs(c).bops for c in configs.values()]
                assert max(bops) <= 1.005 * min(bops), "controls cost the same within 0.5 %"
                rows += compared_rows(session, configs, size, model=model, mean=f"a{low}, a{high}: {mean:g}")
            rows += compared_rows(session, published(session), size, model=model, mean="of the rule")
    return rows


def ranges(folder: Path, models: Sequence[str], size: Size) -> list[dict[str, Any]]:
    from aquabit.scheme import RANGES

    rows = []
    for model in models:
        with session_of(folder, model) as session:
            for act in (8, 6, 4):
                base = session.space.uniform(WEIGHTS, act)
                rows += compared_rows(
                    session,
                    {kind: replace(base, ranges=kind) for kind in RANGES},
                    size,
                    model=model,
                    act=f"a{act}",
                )
    return rows


def searched(session: Any, budget: Any, size: Size, seed: int) -> Any:
    """The winner of a search: candidates until there are as many as ``size`` says (interrupted, it goes
    on), then the best few of them judged on seeds of their own."""
    import numpy as np

    from aquabit.search.judging import judge, pieces
    from aquabit.search.search_options import SearchOptions
    from aquabit.search.surrogate_search import Experiment, find_candidates
    from aquabit.sensitivity.surrogate.fit import fit_from_study

    study, metric, wanted = session.study, session.protocol.objective, size.rounds * size.per_round

    def measured_so_far() -> list[tuple[Any, float]]:
        rows = study.measurements(session.protocol, failed=True)
        rows, known = rows[rows.kind.isin(("sample", "uniform", "candidate"))], study.configs()
        return [(known[c], float(v)) for c, v in zip(rows.config, rows[metric], strict=True)]

    def predict() -> Any:
        fitted = fit_from_study(study)
        return fitted.badness

    while (done := int((study.measurements(session.protocol).kind == "candidate").sum())) < wanted:
        count = min(size.per_round - done % size.per_round, wanted - done)
        experiment = Experiment(predict, lambda c: session.measure(c, "candidate"), measured_so_far)
        options = SearchOptions(budget, "surrogate", 1, count, seed=seed + done)
        if not find_candidates(session.costs, options, experiment):
            break
    limits = budget.limits()
    inside = [
        (v, c)
        for c, v in measured_so_far()
        if np.isfinite(v) and all(session.costs.totals_of(c)[k] <= limits[k] for k in limits)
    ]
    best = [c for _, c in sorted(inside, key=lambda row: row[0])[:FINALISTS]]

    def values(indices: Sequence[int], blocks: int) -> np.ndarray:
        protocols = pieces(session.protocol, blocks, seed)
        found = measured_blocks(session, {c.digest: c for c in best}, protocols, [metric])
        return np.array([found[best[i].digest][metric] for i in indices])

    return best[judge(range(len(best)), values).winner]


def search(folder: Path, models: Sequence[str], size: Size) -> list[dict[str, Any]]:
    """Winners of searches that differ in whether activation bits may change in the middle of sampling, by
    seed of samples and search."""
    from aquabit.scheme import Budget

    rows, model = [], "digits-unet"
    for seed in size.seeds if model in models else ():
        winners: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for name, groups in (
            ("without groups", None),
            ("with groups", {"total": 10, "starts": list(STARTS)}),
        ):
            path = folder / f"steps-search-{name.split()[0]}-{size.samples}-{seed}.db"
            options = {**SPACE, **({"step_groups": groups} if groups else {})}
            with open_study(path, model, space=options) as session:
                session.references()
                session.measure(session.space.sample(size.samples, seed), "sample")
                base = session.costs(session.space.uniform(WEIGHTS, 8)).bops
                winners[name] = searched(session, Budget(bops=base * BUDGET / 8), size, seed)
                table = session.study.measurements(session.protocol)
                counts[name] = int(table.kind.isin(("sample", "candidate")).sum())
                print(name, seed, counts[name], "measurements", flush=True)
        with session_of(folder, model) as session:
            configs = {"uniform usq4h, a4 and a6": patterns(session, BUDGET, 4, 6)["uniform"], **winners}
            found = compared_rows(session, configs, size, model=model, seed=seed)
            apart = compared(measured(session, winners, blocks_of(session, size)), "without groups")
            against = {r["name"]: r["differences"] for r in apart}
            changing = {
                n: sum(isinstance(c.act, tuple) for c in w.layers.values()) for n, w in winners.items()
            }
            for row in found:
                name = row["name"]
                row |= {
                    "measurements": counts.get(name),
                    "changing": changing.get(name),
                    "to_without": against.get(name) or None,
                }
            rows += found
    return rows


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], first: str) -> list[str]:
    """Markdown rows: the keys, BOPs, each metric with its interval, and the paired difference to
    ``first``."""
    head = [
        *keys,
        "configuration",
        "bits by step",
        "GBOPs",
        "FID",
        "PSNR, dB",
        f"difference to {first}: FID",
        "PSNR",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        psnr = "" if r["name"] == "full precision" else spans(r["psnr"], 1)
        apart = [spans(r["differences"][m]) if r["differences"] else "" for m in ("fid", "psnr")]
        cells = [
            *(str(r[k]) for k in keys),
            r["name"],
            r["bits"],
            f"{r['bops'] / 1e9:.3f}",
            spans(r["fid"]),
            psnr,
            *apart,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(found: Mapping[str, Any]) -> str:
    m = found["machine"]
    lines = [
        f"# Step-aware activation bits and static ranges\n\n{m['cpu']}, {m['cores']} cores, torch"
        f" {m['torch']}. Made by `{found['command']}`.\n"
    ]
    lines.append(
        "Means over blocks of fresh seeds with 95 % intervals (Student's t), 10 steps of DDIM; differences"
        " are paired, negative FID and positive PSNR are better. BOPs are those of a denoiser call, averaged"
        " over the steps.\n"
    )
    if "controls" in found:
        lines.append(f"## Bits by step at equal BOPs, `{WEIGHTS}`\n")
        lines += table(found["controls"], ("model", "mean"), "uniform")
    if "ranges" in found:
        lines.append(f"\n## Ranges of activations, `{WEIGHTS}`, the same bits in all steps\n")
        lines += table(found["ranges"], ("model", "act"), "dynamic")
    if "search" in found:
        lines.append(
            "\n## The same search with and without groups of steps, under the BOPs of usq4h at 5 activation"
            " bits\n"
        )
        lines += table(found["search"], ("model", "seed"), "uniform")
        for r in found["search"]:
            if r.get("to_without"):
                lines.append(
                    f"\nSeed {r['seed']}: with groups less without: FID {spans(r['to_without']['fid'])},"
                    f" PSNR {spans(r['to_without']['psnr'])}; {r['changing']} layers of the winner change"
                    f" their bits; {r['measurements']} measurements each search."
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    known = {"controls": controls, "ranges": ranges, "search": search}
    arguments = parser(__doc__, [*known, "all"], "step-bits-runs")
    arguments.add_argument("--quick", action="store_true", help="a few images; the tables go to --folder")
    given = parsed(arguments)
    size = QUICK if given.quick else Size()
    parts = {name: partial(part, given.folder, given.models, size) for name, part in known.items()}
    run_parts("step_bits", parts, given.parts, markdown, given.folder if given.quick else RESULTS)


if __name__ == "__main__":
    main()
