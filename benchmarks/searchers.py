"""Searchers at equal numbers of measurements: python benchmarks/searchers.py PART ... [--folder DIR]
[--models ...] [--seeds ...]

search     every searcher spends COUNT measurements of FID (128 images) on targets of bits per weight; ours
           starts from random ones that
           benchmarks/surrogate.py measured, which count; with a screen, output errors count too, a fifteenth
           of a measurement each
fresh      the best configuration that each found for each target, beside full precision, on five blocks of
           fresh seeds
table      benchmarks/results/searchers.json and searchers.md

What was measured once is not measured again, so searchers that ask the same share it: each still counts all
that it asks. The study (--folder) is that of benchmarks/surrogate.py, copied. It takes hours, and continues
where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from benchmarks.research.searchers import Problem, find_searcher
from benchmarks.surrogate import OUTPUTS_PER_MEASUREMENT, SEEDS

COUNT, START = 200, 120  # measurements of each searcher; how many of ours are random
TARGETS = (1.75, 2.0, 2.5, 3.0, 3.5)  # bits per weight
JUDGED = (2.5, 3.0)
NAMES = ("uniform", "random", "greedy", "additive", "swaps", "surrogate", "surrogate, screened")
OURS = NAMES[-2:]
FRESH = range(91, 96)  # blocks of seeds; other benchmarks use blocks up to 90
CORNER = (20.0, 4.0)  # FID and bits per weight: hypervolume is what a front dominates below it


def session_of(folder: Path, model: str) -> Any:
    return open_study(folder / f"searchers-{model}.db", model, base=folder / f"surrogate-{model}.db")


class Comparison:
    """One model's searchers: what each asked in order, and its winners."""

    def __init__(self, session: Any, folder: Path, model: str):
        from aquabit.scheme import Budget
        from aquabit.sensitivity.features import Encoder

        self.session, self.model, self.path = session, model, folder / f"searchers-{model}.json"
        self.study, self.space, self.costs = session.study, session.space, session.costs
        self.targets = [Budget(bits=bits) for bits in TARGETS]
        self.encoder = Encoder(self.space, session.model.graph, self.study.errors(), self.study.probes())
        self.done: dict[str, Any] = read(self.path)

    def measure(self, configs: list[Any]) -> list[float]:
        self.session.measure(configs, "candidate", say, what="search")
        table = self.study.measurements(self.session.protocol, failed=True).set_index("config").fid
        return [float(table.loc[c.digest]) for c in configs]

    def fit(self, configs: list[Any], values: np.ndarray) -> Any:
        from aquabit.sensitivity.surrogate.estimators import estimator_of

        model = estimator_of("gbdt", self.encoder, 0).fit(self.encoder.encode(configs), values)
        return lambda rows: model.predict(self.encoder(rows))

    def screen(self, known: Sequence[tuple[Any, float]], proposed: list[Any]) -> np.ndarray:
        from aquabit.measuring.output_errors import output_features
        from aquabit.sensitivity.surrogate.estimators import Surrogate
        from aquabit.sensitivity.surrogate.output_error_surrogate import MEMBERS, TREES

        configs = [c for c, _ in known]
        outputs = self.session.outputs([*configs, *proposed], say)

        def features(some: list[Any]) -> np.ndarray:
            return np.concatenate(
                [self.encoder.encode(some), output_features([outputs[c.digest] for c in some])], 1
            )

        model = Surrogate(**TREES, members=MEMBERS).fit(features(configs), np.array([v for _, v in known]))
        return model.predict(features(proposed))

    def search(self, name: str, seed: int) -> None:
        """One searcher; ``done`` has what it found, (layer choices, FID) in order."""
        key = f"{name} {seed}"
        if key in self.done:
            return
        options: dict[str, Any] = {}
        count = COUNT
        if name in OURS:
            draws = self.space.sample(START, seed)
            options = {"fit": self.fit, "start": list(zip(draws, self.measure(draws), strict=True))}
            count -= START
            if name == OURS[1]:
                options |= {"screen": self.screen, "screen_cost": 1 / OUTPUTS_PER_MEASUREMENT}
        problem = Problem(self.space, self.costs, self.targets, self.measure, count, seed, **options)
        found = find_searcher(name.split(",")[0])(problem)
        every = [*options.get("start", ()), *found]
        self.done[key] = {
            "measurements": len(every),
            "winners": [self.winner(every, t) for t in self.targets],
        }
        write(self.path, self.done)

    def winner(self, found: Sequence[tuple[Any, float]], target: Any) -> dict[str, Any] | None:
        """The best measured configuration within a target."""
        inside = [
            (v, self.costs(c).bits_per_weight, c)
            for c, v in found
            if np.isfinite(v) and self._keeps(c, target)
        ]
        if not inside:
            return None
        value, bits, config = min(inside, key=lambda row: row[:2])
        return {"value": value, "bits": bits, "config": config.to_dict()}

    def _keeps(self, config: Any, target: Any) -> bool:
        """Within the target and with its activations at a8, as budgets of bits fix them."""
        from aquabit.choices import Choices

        acts = {config[k].act for k in self.space.free_layers()}
        return acts == {8} and bool(
            self.costs.within(self.costs.totals(Choices.of(self.space, [config])), target)[0]
        )

    def fresh(self) -> None:
        from aquabit.scheme import QuantConfig

        protocols = [self.session.protocol.block(b) for b in FRESH]
        self.session.measure([self.space.full_precision()], "reference", say, protocols, "full precision")
        winners = [
            QuantConfig.from_dict(w["config"]) for run in self.done.values() for w in run["winners"] if w
        ]
        self.session.measure(
            {c.digest: c for c in winners}.values(), "fresh", say, protocols, "winners on fresh seeds"
        )

    def rows(self) -> list[dict[str, Any]]:
        from aquabit.scheme import QuantConfig

        known = values_of(self.study, ["fid"])
        protocols = [self.session.protocol.block(b).digest for b in FRESH]

        def blocks(config: Any) -> list[float]:
            return [known[config.digest, p]["fid"] for p in protocols]

        full, rows = blocks(self.space.full_precision()), []
        for key, run in self.done.items():
            name, seed = key.rsplit(" ", 1)
            for bits, winner in zip(TARGETS, run["winners"], strict=True):
                row = {
                    "model": self.model,
                    "searcher": name,
                    "seed": int(seed),
                    "measurements": run["measurements"],
                    "target": bits,
                }
                if winner:
                    row |= {
                        "bits": winner["bits"],
                        "searched": winner["value"],
                        "fid": blocks(QuantConfig.from_dict(winner["config"])),
                        "full": full,
                    }
                rows.append(row)
        return rows


def excess(row: dict[str, Any]) -> list[float]:
    """max(0, FID - FID of full precision) of each block; a searcher that found nothing there has infinity."""
    return (
        [max(0.0, a - b) for a, b in zip(row["fid"], row["full"], strict=True)]
        if "fid" in row
        else [float("inf")]
    )


def volumes(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Hypervolume of one searcher's front on each block of fresh seeds."""
    from aquabit.search.front import hypervolume

    own = [r for r in rows if "fid" in r]
    return [
        hypervolume([r["fid"][b] for r in own], [r["bits"] for r in own], CORNER) for b in range(len(FRESH))
    ]


def table(found: dict[str, Any]) -> str:
    rows = found["rows"]
    lines = [
        "# Searchers at equal numbers of measurements",
        "",
        f"{about(found['machine'])}. Made by `{found['command']}`.",
        "",
        (
            f"Objective FID, 128 images, {COUNT} measurements each; targets"
            f" {', '.join(f'{t:g}' for t in TARGETS)} bits per weight. Winners by each searcher's own"
            f" measurements, judged on {len(FRESH)} blocks of fresh seeds. Excess: mean of max(0, FID - FID"
            " of full precision). Hypervolume: area of (FID, bits) that the front dominates below FID"
            f" {CORNER[0]:g} and {CORNER[1]:g} bits, larger is better; difference to ours (screened) with a"
            " 95 % interval over seeds and blocks."
        ),
        "",
        "| model | searcher | seeds | hypervolume | to ours | "
        + " | ".join(f"excess at {b:g} bits" for b in JUDGED)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(JUDGED),
    ]
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        seeds = sorted({r["seed"] for r in own})
        area = {
            n: (
                np.array(
                    [volumes([r for r in own if r["searcher"] == n and r["seed"] == s]) for s in seeds]
                ).ravel()
            )
            for n in NAMES
            if all(any(r["searcher"] == n and r["seed"] == s for r in own) for s in seeds)
        }
        for name, values in area.items():
            gap = (
                ""
                if name == OURS[1] or OURS[1] not in area
                else spans(difference(list(values), list(area[OURS[1]])), sign="+")
            )
            shown = [
                float(
                    np.mean([v for r in own if r["searcher"] == name and r["target"] == b for v in excess(r)])
                )
                for b in JUDGED
            ]
            lines.append(
                f"| {model} | {name} | {len(seeds)} | {values.mean():.2f} | {gap} | "
                + " | ".join(f"{v:.3f}" for v in shown)
                + " |"
            )
    lines += [
        "",
        "## FID on fresh seeds, mean over blocks and seeds of the search",
        "",
        "| model | searcher | " + " | ".join(f"{t:g} bits" for t in TARGETS) + " |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    for model, name in dict.fromkeys((r["model"], r["searcher"]) for r in rows):
        own = [r for r in rows if (r["model"], r["searcher"]) == (model, name)]
        cells = [[v for r in own if r["target"] == t and "fid" in r for v in r["fid"]] for t in TARGETS]
        lines.append(
            f"| {model} | {name} | " + " | ".join(f"{np.mean(c):.2f}" if c else "none" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["search", "fresh", "table"], "truth")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    given = parsed(arguments)
    rows: list[dict[str, Any]] = []
    for model in given.models:
        with session_of(given.folder, model) as session:
            compared = Comparison(session, given.folder, model)
            for part in given.parts:
                if part == "search":
                    for seed in given.seeds:
                        for name in NAMES:
                            compared.search(name, seed)
                elif part == "fresh":
                    compared.fresh()
                else:
                    rows += compared.rows()
    if "table" in given.parts:
        write_results("searchers", "python benchmarks/searchers.py search fresh table", {"rows": rows}, table)


if __name__ == "__main__":
    main()
