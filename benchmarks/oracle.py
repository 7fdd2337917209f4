"""How far the search is from the best that can be found: python benchmarks/oracle.py [--folder DIR] [--models
...] [--bits ...] [--draws N]

At each budget some two thousand evaluations of output errors (80 denoiser calls each), in three different
ways, then a race on images:
 draws      configurations drawn near the front of the damages (Gibbs, damage 1.02 to 1.4 times the
            program's), filled up to the budget
 refined    the program in context from the program's answer and from the best draw, with four times the
            inputs of the search and more radii
 swaps      single exchanges between two layers from the best of these, those with the least predicted loss
            first
The race: the best of each by output errors, the program's answer and every winner of benchmarks/searches.py,
judged by ``search.judge`` on up to 1,024 images of seeds of its own. benchmarks/searches.py measures the best
on the seeds that it reports. It takes an hour, and continues where it stopped; the folder is that of
benchmarks/searches.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import parsed, parser, read, say, write
from benchmarks.searches import session_of

BITS = (1.6, 2.0, 3.0)  # those of them that benchmarks/searches.py has too
DRAWS, KEPT = 150, 6  # configurations drawn; how many of each way race on images
EXCESS = (0.02, 0.4)
ROUNDS, RADII = 5, (1, 2, 4, 8, 16, 32)
EXCHANGES = 100
SEED = 77  # of draws, stored inputs and images: no search uses it
RACE = (4, 8, 16, 32)  # blocks of 32 images


def draws(search: Any, context: Any, count: int) -> list[Any]:
    """Near the front, inside the budget, no single change left that lowers the damage and fits."""
    from aquabit.search.options import Options
    from aquabit.sensitivity.damages import gibbs

    budget, costs, damages = search.options.budget, search.costs, search.damages
    options, rng = Options.of(costs, budget), np.random.default_rng(SEED)
    scores, rows, found = damages.scores(search.activations)[:, :, 0], np.arange(len(damages.weights)), []
    while len(found) < count:
        excess = float(np.exp(rng.uniform(*np.log(EXCESS))))
        for choice in gibbs(damages, costs, budget.bits - 0.1, [excess])[0].draw(10, rng):
            mended = options.repair(choice, scores)
            if mended is None:
                continue
            while True:  # fill up
                change = options.changes(mended)
                gain = scores[rows, mended][:, None] - np.where(options.columns.allowed, scores, np.inf)
                fits = (options.used(mended)[:, None, None] + change <= options.caps[:, None, None]).all(
                    0
                ) & (gain > 0)
                if not fits.any():
                    break
                layer, column = np.unravel_index(
                    int(np.where(fits, gain / np.maximum(change[0], 1.0), -1).argmax()), fits.shape
                )
                mended[layer] = column
            found.append(options.columns.split(mended))
    return found[:count]


def exchanges(search: Any, context: Any, start: Any) -> list[Any]:
    """Configurations two layers away from ``start`` that keep the budget, those of least predicted loss in
    its context first."""
    from aquabit.search.options import Options

    options, seen = Options.of(search.costs, search.options.budget), context.look(start)
    change, choice = seen.change[:, :, 0], options.columns.join(start)[0]
    cells = np.argwhere(np.isfinite(change) & (np.arange(change.shape[1]) != choice[:, None]))
    cost = options.changes(choice)[0][cells[:, 0], cells[:, 1]]
    value = change[cells[:, 0], cells[:, 1]]
    total = np.where(cells[:, 0][:, None] != cells[:, 0], value[:, None] + value, np.inf)
    total = np.where(options.used(choice)[0] + cost[:, None] + cost <= options.caps[0], total, np.inf)
    first, second = np.unravel_index(
        np.argsort(np.triu(total, 1) + np.tril(np.full(total.shape, np.inf)), axis=None), total.shape
    )
    found = []
    for a, b in list(zip(first, second, strict=True))[: 3 * EXCHANGES]:
        moved = choice.copy()
        moved[cells[a][0]], moved[cells[b][0]] = cells[a][1], cells[b][1]
        if np.isfinite(total[a, b]) and bool(options.keeps(moved)):
            found.append(options.columns.split(moved))
    return found[:EXCHANGES]


def oracle(folder: Path, model: str, bits: float, count: int) -> dict[str, Any]:
    from aquabit.choices import Choices
    from aquabit.scheme import Budget, QuantConfig
    from aquabit.search import context_model as wide
    from aquabit.search.judging import judge, pieces
    from aquabit.search.proposals import program_answers
    from aquabit.search.refine import refine
    from aquabit.search.search import Search
    from aquabit.search.search_options import SearchOptions

    with session_of(folder / f"oracle-{model}.db", model, folder) as session:
        search = Search(session, SearchOptions(Budget(bits=bits), seed=SEED, front=0), say)
        program = program_answers(search)[search.options.budget]
        start = program.choices
        context = wide.ContextModel(session, search.damages, search.activations, SEED, say)
        drawn = draws(search, context, count)
        value = np.array(context.judge(Choices.concat([start, *drawn])))
        order = np.argsort(value[1:])
        found: dict[str, list[Any]] = {"draws": [drawn[i] for i in order[:KEPT]], "program": [start]}
        looked, wide.LOOKED = wide.LOOKED, 4 * wide.LOOKED
        steps = [
            refine(
                s,
                context.look,
                context.judge,
                session.costs,
                search.options.budget,
                rounds=ROUNDS,
                radii=RADII,
            )
            for s in (start, found["draws"][0])
        ]
        found["refined"] = [s.choices for row in steps for s in row[1:]]
        best = min(
            [(value[0], start), *((s.value, s.choices) for row in steps for s in row)], key=lambda r: r[0]
        )[1]
        swapped = exchanges(search, context, best)
        wide.LOOKED = looked
        after = np.array(context.judge(Choices.concat(swapped)))
        found["swaps"] = [swapped[i] for i in np.argsort(after)[:KEPT]]
        racers = {c.config.digest: (name, c.config) for name, row in found.items() for c in row}
        for key, run in read(folder / f"searches-{model}.json").items():
            if key.split()[0] == f"{bits:g}":
                config = QuantConfig.from_dict(run["config"])
                racers.setdefault(config.digest, ("search", config))
        configs = list(racers.values())

        def measure(indices: Any, blocks: int) -> np.ndarray:
            protocols = pieces(session.protocol, blocks, SEED)
            session.measure([session.space.full_precision()], "reference", say, protocols, "full precision")
            session.measure([configs[i][1] for i in indices], "selection", say, protocols, "race")
            tables = [search.values("psnr", p) for p in protocols]
            return np.array([[t[configs[i][1].digest] for t in tables] for i in indices])

        judged = judge(range(len(configs)), measure, RACE)
        name, config = configs[judged.winner]
        rows = [
            {"from": configs[i][0], "psnr": -judged.mean[i], "images": 32 * judged.blocks[i]}
            for i in sorted(judged.mean, key=judged.mean.__getitem__)
        ]
        return {
            "best": config.to_dict(),
            "from": name,
            "bits": session.costs(config).bits_per_weight,
            "evaluations": context.spent,
            "race": rows,
        }


def main() -> None:
    arguments = parser(__doc__, folder="searches")
    arguments.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    arguments.add_argument("--draws", type=int, default=DRAWS)
    given = parsed(arguments)
    for model in given.models:
        path = given.folder / f"oracle-{model}.json"
        done: dict[str, Any] = read(path)
        for bits in given.bits:
            if f"{bits:g}" not in done:
                done[f"{bits:g}"] = oracle(given.folder, model, bits, given.draws)
                write(path, done)


if __name__ == "__main__":
    main()
