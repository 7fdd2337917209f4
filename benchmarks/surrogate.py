"""The surrogate, its rivals and its search, measured: python benchmarks/surrogate.py PART ... [--folder DIR]
[--models ...] [--seeds ...] [--count N]

measure    random configurations of the default space, for three seeds; everything below learns from these
swaps      300 configurations of the design "swaps" a seed: real swaps that share contexts
outputs    output errors of all of them, and of every layer's swap in 8 contexts
curve      within-budget SRCC on the other seeds' configurations after 50 to 300 measurements: the trees, with
           and without output errors, and others
ceiling    the first configurations of one seed on other images too: how well any prediction could rank them
effects    predicted effects of layers, with and without contexts that were run, and direct swaps of as many
           measurements, beside the real ones
           of benchmarks/results/truth.json
restore    takes such measurements from benchmarks/results/measurements.csv instead, where they are the same
           configurations and protocol
export     writes that file

It takes hours, and continues where it stopped.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, about, open_study, parsed, parser, read, say, values_of, write_results
from benchmarks.truth import SPACE

SEEDS = (0, 1, 2)
COUNT = 500  # measurements a seed
SWAPS, MIXED = 300, 0.66
CEILING, CEILING_BLOCK = 100, 90
SIZES = (50, 100, 200, 300, 500)
IN_CONTEXT = 8
SWAP = "usq4:usq2"  # that of benchmarks/truth.py
OUTPUTS_PER_MEASUREMENT = 15.0  # configurations whose output errors take as long as one measurement
METRICS = ("fid", "sfid", "kid", "is", "accuracy", "mse", "psnr", "ssim", "feature_distance")
FILE = RESULTS / "measurements.csv"


def session_of(folder: Path, model: str) -> Any:
    return open_study(folder / f"surrogate-{model}.db", model, space=SPACE)


def measure(session: Any, seeds: list[int], count: int) -> None:
    session.references(say)
    for seed in seeds:
        session.measure(session.space.sample(count, seed), "sample", say, what=f"seed {seed}")


def swap_design(space: Any, seed: int) -> list[Any]:
    from aquabit.sensitivity.designs import Design

    return Design("swaps").draw(space, SWAPS, seed)


def swaps(session: Any, seeds: list[int]) -> None:
    for seed in seeds:
        session.measure(swap_design(session.space, seed), "sample", say, what=f"swaps, seed {seed}")


def export(session: Any, model: str, count: int) -> None:
    """Replace a model's rows: which draw of which seed, what it is, and its metrics."""
    kept: list[dict[str, Any]] = []
    if FILE.exists():
        with FILE.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["model"] != model]
    found = session.study.measurements(session.protocol).set_index("config")
    for seed in SEEDS:
        for i, config in enumerate(session.space.sample(count, seed)):
            if config.digest in found.index:
                row = found.loc[config.digest]
                values = {m: f"{row[m]:.7g}" for m in METRICS}
                kept.append(
                    {
                        "model": model,
                        "seed": seed,
                        "draw": i,
                        "config": config.digest,
                        "protocol": row.protocol,
                        "seconds": f"{row.seconds:.2f}",
                        **values,
                    }
                )
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "seed", "draw", "config", "protocol", "seconds", *METRICS])
        writer.writeheader()
        writer.writerows(kept)


def again(session: Any) -> list[Any]:
    """The configurations that are measured twice."""
    return session.space.sample(CEILING, SEEDS[-1])


def ceiling(session: Any, model: str) -> list[dict[str, Any]]:
    """What a perfect prediction would score: the root of the within-budget SRCC between two sets of
    images."""
    from aquabit.choices import Choices
    from aquabit.sensitivity.surrogate.scores import noise_ceiling

    protocols = [session.protocol, session.protocol.block(CEILING_BLOCK)]
    session.measure(again(session), "sample", say, protocols[1:], "other images")
    configs = again(session)
    value = values_of(session.study, ["fid"], failed=False)
    first, second = (np.array([value[c.digest, p.digest]["fid"] for c in configs]) for p in protocols)
    rows = Choices.of(session.space, configs)
    found = noise_ceiling(first, second, session.costs.totals(rows)["bits"], rows.mean_bits.mean(1))
    return [{"model": model, "configurations": len(configs), "ceiling": round(float(found or 0.0), 4)}]


def restore(session: Any, model: str, count: int) -> None:
    """Record stored measurements whose configuration and protocol are still the same; what is not is
    named."""
    from aquabit.scheme import Measurement

    draws = {seed: session.space.sample(count, seed) for seed in SEEDS}
    other = 0
    with FILE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] != model or int(row["draw"]) >= count:
                continue
            config = draws[int(row["seed"])][int(row["draw"])]
            if (config.digest, session.protocol.digest) != (row["config"], row["protocol"]):
                other += 1
                continue
            metrics = {m: float(row[m]) for m in METRICS}
            found = Measurement(
                config.digest, row["protocol"], metrics, float(row["seconds"]), {"restored": FILE.name}
            )
            session.study.record(config, found, "sample", session.costs.totals_of(config))
    if other:
        print(
            f"{model}: {other} stored measurements are of other configurations or another protocol; measure"
            " anew"
        )


def random_contexts(space: Any, cost: Any) -> Any:
    """The contexts that effects are predicted in: random ones near 3 bits, as those of
    benchmarks/truth.py."""
    from aquabit.sensitivity.effects.context_effects import DRAWN
    from aquabit.sensitivity.effects.predicted import draw_contexts

    return draw_contexts(space, cost, 3.0, DRAWN, np.random.default_rng([0, 0]))


def outputs(session: Any, model: str, count: int) -> None:
    from aquabit.scheme import parse_swap
    from aquabit.sensitivity.effects.context_effects import swapped
    from aquabit.sensitivity.effects.predicted import find_players

    space = session.space
    configs = [c for seed in SEEDS for c in (*space.sample(count, seed), *swap_design(space, seed))]
    known, drawn = session.study.known(session.protocol), random_contexts(space, session.costs)
    ends = swapped(drawn[:IN_CONTEXT], find_players(space, parse_swap(SWAP))).configs()
    session.outputs([*(c for c in configs if c.digest in known), *ends], say)


class Data:
    """What a study holds of one model, by seed and draw."""

    def __init__(self, folder: Path, model: str, count: int):
        from aquabit.choices import Choices
        from aquabit.cost import CostModel
        from aquabit.graph import from_json
        from aquabit.measuring.output_errors import output_features, stored
        from aquabit.sensitivity.features import Encoder
        from aquabit.space import SearchSpace
        from aquabit.study import Study

        self.study = Study(folder / f"surrogate-{model}.db", create=False)
        self.graph, self.space = (
            from_json(self.study.get("graph")),
            SearchSpace.from_dict(self.study.get("space")),
        )
        self.encoder, self.cost = (
            Encoder(self.space, self.graph, self.study.errors(), self.study.probes()),
            CostModel(self.graph, self.space),
        )
        table = self.study.measurements(self.study.protocol).set_index("config")
        random = [
            (seed, c) for seed in SEEDS for c in self.space.sample(count, seed) if c.digest in table.index
        ]
        swapped = [
            (seed, c) for seed in SEEDS for c in swap_design(self.space, seed) if c.digest in table.index
        ]
        drawn = [*random, *swapped]
        self.seed, self.configs = np.array([s for s, _ in drawn]), [c for _, c in drawn]
        self.random = np.arange(len(drawn)) < len(random)
        self.choices = Choices.of(self.space, self.configs)
        self.y = table.fid.loc[[c.digest for c in self.configs]].to_numpy(float)
        self.bits, self.mean_act = (self.cost.totals(self.choices)["bits"], self.choices.mean_bits.mean(1))
        self.outputs = self.study.outputs(stored(self.study.protocol)[0].digest)
        self.output_features = output_features([self.outputs[c.digest] for c in self.configs])

    def rows(self, seed: int, random: int, swaps: int = 0) -> np.ndarray:
        """The first random draws of a seed, and the first configurations of its design of swaps; fewer
        where fewer were measured."""
        own = self.seed == seed
        return np.concatenate(
            [np.flatnonzero(own & self.random)[:random], np.flatnonzero(own & ~self.random)[:swaps]]
        )

    def fitted(self, rows: np.ndarray) -> Any:
        """A FittedSurrogate of these rows alone; its out-of-fold parts are empty."""
        from aquabit.sensitivity.surrogate.estimators import estimator_of
        from aquabit.sensitivity.surrogate.fit import FittedSurrogate

        model = estimator_of("gbdt", self.encoder, 0).fit(self.encoder(self.choices[rows]), self.y[rows])
        digests = tuple(self.configs[i].digest for i in rows)
        return FittedSurrogate(
            model,
            self.encoder,
            self.cost,
            digests,
            self.choices[rows],
            self.y[rows],
            self.bits[rows],
            np.zeros(len(rows)),
            {},
            "fid",
            "min",
            self.study.protocol.digest,
        )


def held_out_score(
    data: Data, train: np.ndarray, test: np.ndarray, of_train: np.ndarray, of_test: np.ndarray
) -> list[float]:
    """Within-budget SRCC of predictions in units on rows of other seeds, cubics fitted on the training
    rows; and its 90 % bootstrap interval."""
    from aquabit.sensitivity.surrogate.scores import budget_terms, srcc

    terms = budget_terms(data.bits, data.mean_act)

    def left(known: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.asarray(values - terms[test] @ np.linalg.lstsq(terms[train], known, rcond=1e-9)[0])

    truth, predicted = left(data.y[train], data.y[test]), left(of_train, of_test)
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(test), size=len(test)) for _ in range(200)]
    low, high = np.percentile([srcc(truth[d], predicted[d]) for d in draws], [5, 95])
    return [round(float(v), 4) for v in (srcc(truth, predicted), low, high)]


def curve(data: Data, model: str) -> list[dict[str, Any]]:
    from aquabit.sensitivity.surrogate.estimators import Surrogate, estimator_of
    from aquabit.sensitivity.surrogate.output_error_surrogate import MEMBERS, TREES

    rows = []
    for seed in SEEDS:
        test = np.flatnonzero((data.seed != seed) & data.random)
        for n, share in [*((n, 0.0) for n in SIZES), (300, MIXED), (500, 1 - 300 / 500)]:
            train = data.rows(seed, n - int(n * share), int(n * share))
            if len(train) < n:
                continue
            for name in ("gbdt", "gbdt + output errors", "sum_of_damages", "ridge_one_hot", "graph_network"):
                plain = name != "gbdt + output errors"
                estimator = (
                    estimator_of(name, data.encoder, 0) if plain else Surrogate(**TREES, members=MEMBERS)
                )
                features = estimator.features(data.encoder, data.choices)
                features = features if plain else np.concatenate([features, data.output_features], 1)
                estimator.fit(features[train], data.y[train])
                units = estimator.to_units(estimator.predict(features))
                score = held_out_score(data, train, test, units[train], units[test])
                design = f", swaps:{share:.2g}" if share else ""
                rows.append(
                    {
                        "model": model,
                        "seed": seed,
                        "measurements": n,
                        "estimator": name + design,
                        "score": score,
                    }
                )
            print(rows[-5:], flush=True)
    return rows


def effects(data: Data, model: str) -> list[dict[str, Any]]:
    """SRCC with the real effects (those of the 16 contexts, and "fresh" of the others), sign agreement
    where 90 % intervals of the real effects exclude 0, and how many predicted 90 % intervals hold the real
    effect."""
    from aquabit.scheme import parse_swap
    from aquabit.sensitivity.effects.combine_effects import combine, real_means
    from aquabit.sensitivity.effects.context_effects import refine
    from aquabit.sensitivity.effects.predicted import bootstrap, find_players, predict_effects
    from aquabit.sensitivity.effects.swaps import training_swaps
    from aquabit.sensitivity.surrogate.scores import srcc

    players, rows = find_players(data.space, parse_swap(SWAP)), list[dict[str, Any]]()
    stored = [
        r
        for r in json.loads((RESULTS / "truth.json").read_text())["rows"]
        if r["model"] == model and r.get("swap") == SWAP
    ]
    truth, fresh = ({r["layer"]: r for r in stored if r["kind"] == kind} for kind in ("swap", "fresh"))
    real = np.array([truth[p.layer]["effect"] for p in players], float)
    others = np.array([fresh[p.layer]["effect"] for p in players], float) if fresh else None
    change = np.array([np.subtract(truth[p.layer]["after"], truth[p.layer]["before"]) for p in players])

    def judged(how: str, seed: int, n: float, effect: np.ndarray, low: Any = None, high: Any = None) -> None:
        row: dict[str, Any] = {"model": model, "seed": seed, "measurements": n, "how": how}
        for name, values in (("", real), ("fresh_", others)):
            if values is None:
                continue
            sure = (values[:, 1] > 0) | (values[:, 2] < 0)
            inside = (
                None
                if low is None
                else round(float(((low <= values[:, 0]) & (high >= values[:, 0])).mean()), 4)
            )
            signs = round(float((np.sign(effect) == np.sign(values[:, 0]))[sure].mean()), 4)
            row |= {
                f"{name}srcc": round(srcc(effect, values[:, 0]), 4),
                f"{name}signs": signs,
                f"{name}covered": inside,
            }
        rows.append(row)
        print(row, flush=True)

    for seed in SEEDS:
        contexts = random_contexts(data.space, data.cost)  # as outputs has seen them
        for n, share in ((100, 0.0), (200, 0.0), (300, 0.0), (100, MIXED), (200, MIXED), (300, MIXED)):
            swapped = int(n * share)
            used = data.rows(seed, n - swapped, swapped)
            if len(used) < n:
                continue
            design = f"swaps:{share:g}" if share else "random"
            fitted = data.fitted(used)
            found, extra = predict_effects(fitted, players, contexts, bootstrap(fitted, 20, seed), seed), 0.0
            refined = refine(data.study, fitted, found, contexts, 20, seed)
            for step in ("trees", "blend, {} contexts run"):
                if step != "trees":
                    if refined is None:
                        continue
                    found, extra = refined[0], (n + 2 * len(players) * refined[2]) / OUTPUTS_PER_MEASUREMENT
                    step = step.format(refined[2])
                ours = combine(
                    players,
                    found.effect(data.space.columns),
                    found.replicates,
                    training_swaps(fitted, players, 3.0),
                )
                judged(f"{design}, {step}", seed, round(n + extra), ours.effect, ours.low, ours.high)
        used = data.rows(seed, 0, SWAPS)
        if len(used) == SWAPS:
            direct, count = real_means(players, training_swaps(data.fitted(used), players, 3.0))
            if count.min():
                judged("direct swaps of the design", seed, SWAPS, direct)
        for n in (1, 2, 3, 4):
            picked = np.random.default_rng([seed, 3]).permutation(change.shape[1])[:n]
            rest = np.delete(np.arange(change.shape[1]), picked)
            found = srcc(change[:, picked].mean(1), change[:, rest].mean(1))
            rows.append(
                {
                    "model": model,
                    "seed": seed,
                    "measurements": 2 * n * len(players),
                    "how": "direct swaps of two measurements, beside the other contexts",
                    "srcc": round(found, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def write(part: str, rows: list[dict[str, Any]]) -> None:
    """Replace what the result files say of a part and these models."""
    found, models = read(RESULTS / "surrogate.json"), {r["model"] for r in rows}
    found[part] = [r for r in found.get(part, []) if r["model"] not in models] + rows
    command = "python benchmarks/surrogate.py measure swaps outputs ceiling curve effects"
    write_results("surrogate", command, found, table)


def table(found: dict[str, Any]) -> str:
    lines = [
        "# The surrogate and its rivals",
        "",
        f"{about(found['machine'])}. Made by `{found['command']}`.",
        "",
    ]
    keys = [(r["model"], r["measurements"], r["estimator"]) for r in found.get("curve", [])]
    if keys:
        lines += [
            "## Within-budget SRCC on configurations of other seeds (objective FID)",
            "",
            (
                "Trained on the first measurements of one seed, scored on all of the two others; three seeds"
                " each. swaps: a share of the training measurements are of that design, 3 bits alone."
            ),
            "",
            "| model | measurements | estimator | seeds | mean | lowest 90 % bound |",
            "|---|---|---|---|---|---|",
        ]
        for key in dict.fromkeys(keys):
            own = [
                r["score"] for r in found["curve"] if (r["model"], r["measurements"], r["estimator"]) == key
            ]
            each = ", ".join(f"{s[0]:.3f}" for s in own)
            lines.append(
                f"| {key[0]} | {key[1]} | {key[2]} | {each} | {np.mean([s[0] for s in own]):.3f} |"
                f" {min(s[1] for s in own):.3f} |"
            )
    for row in found.get("ceiling", []):
        lines += [
            "",
            (
                f"Noise ceiling of {row['model']}: {row['ceiling']:.3f} (root of the within-budget SRCC of"
                f" {row['configurations']} configurations between two sets of 128 images)."
            ),
        ]
    keys = [(r["model"], r["how"], r["measurements"]) for r in found.get("effects", [])]
    if keys:
        lines += [
            "",
            "## Effects of layers from usq4 to usq2 near 3 bits, beside real swaps",
            "",
            (
                "Signs: agreement where the real effect's 90 % interval excludes 0. Covered: real effects"
                " inside the predicted 90 % intervals. Fresh: the same beside 4 contexts that nothing was"
                " chosen on. Measurements include output errors at a fifteenth each. Direct swaps of two"
                " measurements are scored beside the contexts that they did not use; those of the design"
                " share contexts, so that a swap costs little more than one."
            ),
            "",
            (
                "| model | how | measurements | SRCC, seeds | mean | signs | covered | fresh SRCC | signs |"
                " covered |"
            ),
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key in dict.fromkeys(keys):
            own_rows = [r for r in found["effects"] if (r["model"], r["how"], r["measurements"]) == key]
            each = ", ".join(f"{r['srcc']:.2f}" for r in own_rows)
            columns = [f"{a}{b}" for a in ("", "fresh_") for b in ("srcc", "signs", "covered")]
            means = [[r[k] for r in own_rows if r.get(k) is not None] for k in columns]
            shown = [f"{np.mean(v):.2f}" if v else "" for v in means]
            lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {each} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parts = ["measure", "restore", "swaps", "export", "outputs", "ceiling", "curve", "effects"]
    arguments = parser(__doc__, parts, "truth")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments.add_argument("--count", type=int, default=COUNT)
    given = parsed(arguments)
    for part in [p for p in given.parts if p in ("curve", "effects")]:
        rows = [
            r
            for m in given.models
            for r in {"curve": curve, "effects": effects}[part](Data(given.folder, m, given.count), m)
        ]
        write(part, rows)
    if all(p in ("curve", "effects") for p in given.parts):
        return
    for model in given.models:
        with session_of(given.folder, model) as session:
            for part in given.parts:
                if part in ("measure", "swaps"):
                    (
                        measure(session, given.seeds, given.count)
                        if part == "measure"
                        else swaps(session, given.seeds)
                    )
                elif part == "ceiling":
                    write(part, ceiling(session, model))
                elif part not in ("curve", "effects"):
                    {"export": export, "restore": restore, "outputs": outputs}[part](
                        session, model, given.count
                    )


if __name__ == "__main__":
    main()
