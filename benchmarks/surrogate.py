"""The surrogate, its rivals and its search, measured: python benchmarks/surrogate.py PART ... [--folder DIR] [--models ...] [--seeds ...] [--count N]

measure    random configurations of the default space, for three seeds; everything below learns from these
restore    takes such measurements from benchmarks/results/measurements.csv instead, where they are the same configurations and protocol
export     writes that file

It takes hours, and continues where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.flow import MODELS, RESULTS
from benchmarks.truth import say

SEEDS = (0, 1, 2)
COUNT = 500  # measurements a seed
METRICS = ("fid", "sfid", "kid", "is", "accuracy", "mse", "psnr", "ssim", "feature_distance")
FILE = RESULTS / "measurements.csv"


def session_of(folder: Path, model: str) -> Any:
    from aquabit.sensitivity.measure import open_session
    from aquabit.study import Study

    return open_session(model, Study(folder / f"surrogate-{model}.db"), workers=2, bank=str(folder / "bank"), progress=say)


def measure(session: Any, seeds: list[int], count: int) -> None:
    session.references(say)
    for seed in seeds:
        session.measure(session.space.sample(count, seed), "sample", say, what=f"seed {seed}")


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
                kept.append({"model": model, "seed": seed, "draw": i, "config": config.digest, "protocol": row.protocol,
                             "seconds": f"{row.seconds:.2f}", **values})  # fmt: skip
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "seed", "draw", "config", "protocol", "seconds", *METRICS])
        writer.writeheader()
        writer.writerows(kept)


def restore(session: Any, model: str, count: int) -> None:
    """Record stored measurements whose configuration and protocol are still the same; what is not is named."""
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
            found = Measurement(config.digest, row["protocol"], metrics, float(row["seconds"]), {"restored": FILE.name})
            session.study.record(config, found, "sample", session.costs.totals_of(config))
    if other:
        print(f"{model}: {other} stored measurements are of other configurations or another protocol; measure anew")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["measure", "restore", "export"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path("truth"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--count", type=int, default=COUNT)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        with session_of(given.folder, model) as session:
            for part in given.parts:
                if part == "measure":
                    measure(session, given.seeds, given.count)
                else:
                    {"export": export, "restore": restore}[part](session, model, given.count)


if __name__ == "__main__":
    main()
