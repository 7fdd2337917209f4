"""The search beside the program over damages: python benchmarks/searches.py PART ... [--folder DIR] [--models
...] [--seeds ...] [--bits ...]

search     three seeds of the search at each budget, weights and a8 of the default space: what it spent, what
           it chose
fresh      its winners, the program's answers, uniform families and (after benchmarks/oracle.py) the oracle's
           best on five blocks of fresh seeds
table      benchmarks/results/searches.json and searches.md

The study of a model (fits, probes) is made once in --folder; each seed of the search works on a copy, with
stored inputs and judging images of its own. It takes an hour on two cores, and continues where it stopped.
``ours-MODEL.json`` is what benchmarks/rivals.py compares with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    about,
    difference,
    open_study,
    parsed,
    parser,
    read,
    say,
    spans,
    values_of,
    write,
    write_results,
)

BITS = (1.6, 2.0, 2.5, 3.0, 3.5)
SEEDS = (0, 1, 2)
FRESH = range(101, 106)  # blocks of seeds: benchmarks/rivals.py judges on the same
SPACE = {"activations": [8]}  # budgets in bits fix a8: nothing else need be fitted
METRICS = ("psnr", "fid")


def study_path(folder: Path, model: str) -> Path:
    return folder / f"base-{model}.db"


def session_of(path: Path, model: str, folder: Path) -> Any:
    """On a copy of the model's study, which is made where there is none."""
    return open_study(path, model, folder / "bank", SPACE, workers=1, base=study_path(folder, model))


def prepare(folder: Path, model: str) -> None:
    """Fits, probes, references."""
    with session_of(study_path(folder, model), model, folder) as session:
        session.references(say)


def search(folder: Path, model: str, seeds: Sequence[int], bits: Sequence[float]) -> None:
    from aquabit.scheme import Budget
    from aquabit.search.proposals import propose
    from aquabit.search.search import Search
    from aquabit.search.search_options import SearchOptions
    from aquabit.search.winner import choose_winner

    path = folder / f"searches-{model}.json"
    done: dict[str, Any] = read(path)
    for budget in bits:
        for seed in seeds:
            key = f"{budget:g} {seed}"
            if key in done:
                continue
            with session_of(folder / f"search-{model}-{seed}.db", model, folder) as session:
                before = len(session.study.measurements(failed=True))
                found = Search(session, SearchOptions(Budget(bits=budget), seed=seed, front=0), say)
                propose(found)
                winner, judgement = choose_winner(found)
                table = session.study.measurements(failed=True)
                size = {
                    p: session.study.protocols()[p].images / session.protocol.images
                    for p in set(table.protocol)
                }
                images = float(sum(size[p] for p in table.protocol[before:]))
                sources = [c.source for c in found.candidates.values() if c.config.digest == winner.digest]
                program = next(c.config for c in found.candidates.values() if c.source == "program")
                done[key] = {
                    "config": winner.to_dict(),
                    "program": program.to_dict(),
                    "bits": session.costs(winner).bits_per_weight,
                    "source": (sources or ["known"])[0],
                    "output_errors": found.spent,
                    "images": images,
                    "refined": sum(c.source == "refined" for c in found.candidates.values()),
                    "images_judged": max(judgement.blocks.values()) * session.protocol.images // 4,
                }
            write(path, done)
    ours: dict[str, list[dict[str, Any]]] = {}
    for key, run in done.items():
        ours.setdefault(key.split()[1], []).append({"target": float(key.split()[0]), "config": run["config"]})
    write(folder / f"ours-{model}.json", ours)


def compared(folder: Path, model: str, session: Any) -> dict[str, list[Any]]:
    """name -> configurations: "ours 2.0 0", "program 2.0", "uniform usq3h", "oracle 2.0"."""
    from aquabit.measuring.session import uniform_references
    from aquabit.scheme import QuantConfig

    done = read(folder / f"searches-{model}.json")
    found: dict[str, Any] = {}
    for key, run in done.items():
        found[f"ours {key}"] = QuantConfig.from_dict(run["config"])
        found.setdefault(f"program {key.split()[0]}", QuantConfig.from_dict(run["program"]))
    for config in uniform_references(session.space):
        schemes = {str(c.weight) for c in config.layers.values()}
        bits = session.costs(config).bits_per_weight
        found[f"uniform {next(iter(schemes)) if len(schemes) == 1 else f'additive, {bits:.2f} bits'}"] = (
            config
        )
    for bits, row in read(folder / f"oracle-{model}.json").items():
        if row.get("best"):
            found[f"oracle {bits}"] = QuantConfig.from_dict(row["best"])
    return found


def fresh(folder: Path, model: str) -> None:
    with session_of(folder / f"fresh-{model}.db", model, folder) as session:
        protocols = [session.protocol.block(b) for b in FRESH]
        session.measure([session.space.full_precision()], "reference", say, protocols, "full precision")
        configs = compared(folder, model, session)
        session.measure(
            {c.digest: c for c in configs.values()}.values(), "fresh", say, protocols, "fresh seeds"
        )


def rows(folder: Path, model: str) -> list[dict[str, Any]]:
    with session_of(folder / f"fresh-{model}.db", model, folder) as session:
        value = values_of(session.study, METRICS)
        blocks = [session.protocol.block(b).digest for b in FRESH]
        done = read(folder / f"searches-{model}.json")
        out = []
        for name, config in {
            **compared(folder, model, session),
            "full precision": session.space.full_precision(),
        }.items():
            if all((config.digest, b) in value for b in blocks):
                cost = session.costs(config)
                row: dict[str, Any] = {
                    "model": model,
                    "name": name,
                    "bits": cost.bits_per_weight,
                    "bytes": cost.bytes,
                }
                row |= {m: [value[config.digest, b][m] for b in blocks] for m in METRICS}
                run = done.get(name.removeprefix("ours "), {}) if name.startswith("ours ") else {}
                out.append(
                    row | {k: run[k] for k in ("source", "output_errors", "images", "refined") if k in run}
                )
        return out


def table(results: Mapping[str, Any]) -> str:
    """Ours beside the program and the oracle, paired over blocks and seeds (95 %)."""
    found = results["rows"]
    lines = [
        "# The search beside the program over damages",
        "",
        (f"{about(results['machine'])}. Made by `{results['command']}` (and `benchmarks/oracle.py`)."),
        "",
        (
            "Weights of the default space, a8; five blocks of 128 fresh seeds; PSNR in dB to full precision,"
            " mean over blocks and seeds of the search; differences are paired (same blocks), 95 % intervals"
            " over blocks of the mean over seeds. Spent: measurements' worth after the damages (output errors"
            " at a fifteenth, images)."
        ),
        "",
        (
            "| model | bits | ours: bits, PSNR, FID | spent | program: bits, PSNR, FID | ours - program, dB |"
            " ours - oracle, dB | FID, ours - program |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(r["model"] for r in found):
        own = {r["name"]: r for r in found if r["model"] == model}
        for bits in dict.fromkeys(n.split()[1] for n in own if n.startswith("ours ")):
            ours = [r for n, r in own.items() if n.startswith(f"ours {bits} ")]
            program, oracle = own[f"program {bits}"], own.get(f"oracle {bits}")
            mean = {m: np.mean([r[m] for r in ours], 0) for m in METRICS}
            gap = {m: difference(list(mean[m]), program[m]) for m in METRICS}
            top = "" if oracle is None else spans(difference(list(mean["psnr"]), oracle["psnr"]), sign="+")
            spent = np.mean([r["output_errors"] + r["images"] for r in ours])
            lines.append(
                f"| {model} | {bits} | {np.mean([r['bits'] for r in ours]):.3f}, {mean['psnr'].mean():.2f},"
                f" {mean['fid'].mean():.2f} | {spent:.0f} | {program['bits']:.3f},"
                f" {np.mean(program['psnr']):.2f}, {np.mean(program['fid']):.2f} |"
                f" {spans(gap['psnr'], sign='+')} | {top} | {spans(gap['fid'], sign='+')} |"
            )
    lines += [
        "",
        "## Uniform families and full precision",
        "",
        "| model | configuration | bits | bytes | PSNR | FID |",
        "|---|---|---|---|---|---|",
    ]
    for r in found:
        if r["name"].startswith(("uniform", "full")):
            lines.append(
                f"| {r['model']} | {r['name']} | {r['bits']:.3f} | {r['bytes']:,} | {np.mean(r['psnr']):.2f}"
                f" | {np.mean(r['fid']):.2f} |"
            )
    lines += [
        "",
        "## Bytes at a uniform configuration's PSNR",
        "",
        "Interpolated between budgets, in log bytes; share of the uniform configuration's bytes.",
        "",
        "| model | uniform | PSNR | ours | program |",
        "|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(r["model"] for r in found):
        own = [r for r in found if r["model"] == model]
        for uniform in (r for r in own if r["name"].startswith("uniform usq")):
            shares = []
            for kind in ("ours", "program"):
                points: dict[str, list[tuple[float, float]]] = {}
                for r in own:
                    if r["name"].startswith(f"{kind} "):
                        points.setdefault(r["name"].split()[1], []).append(
                            (float(np.mean(r["psnr"])), r["bytes"])
                        )
                curve = np.array(sorted(tuple(np.mean(v, 0)) for v in points.values()))
                goal = float(np.mean(uniform["psnr"]))
                if goal > curve[-1, 0]:
                    shares.append("outside 1.6 to 3.5 bits")
                    continue
                # below the curve, its end: the smallest measured budget has this PSNR already
                size = float(np.exp(np.interp(goal, curve[:, 0], np.log(curve[:, 1]))))
                most = "at most " if goal < curve[0, 0] else ""
                shares.append(f"{most}{size:,.0f} ({100 * size / uniform['bytes']:.1f} %)")
            lines.append(
                f"| {model} | {uniform['name']}, {uniform['bytes']:,} bytes |"
                f" {np.mean(uniform['psnr']):.2f} | " + " | ".join(shares) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["search", "fresh", "table"], "searches")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    given = parsed(arguments)
    for model in given.models:
        for part in given.parts:
            if part == "search":
                prepare(given.folder, model)
                search(given.folder, model, given.seeds, given.bits)
            elif part == "fresh":
                fresh(given.folder, model)
    if "table" in given.parts:
        found = [r for m in given.models for r in rows(given.folder, m)]
        command = "python benchmarks/searches.py search fresh table"
        write_results("searches", command, {"rows": found}, table)


if __name__ == "__main__":
    main()
