"""The surrogate, its rivals and its search, measured: python benchmarks/surrogate.py PART ... [--folder DIR] [--models ...] [--seeds ...] [--count N]

measure    random configurations of the default space, for three seeds; everything below learns from these

It takes hours, and continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.flow import MODELS
from benchmarks.truth import say

SEEDS = (0, 1, 2)
COUNT = 500  # measurements a seed


def session_of(folder: Path, model: str) -> Any:
    from aquabit.sensitivity.measure import open_session
    from aquabit.study import Study

    return open_session(model, Study(folder / f"surrogate-{model}.db"), workers=2, bank=str(folder / "bank"), progress=say)


def measure(session: Any, seeds: list[int], count: int) -> None:
    session.references(say)
    for seed in seeds:
        session.measure(session.space.sample(count, seed), "sample", say, what=f"seed {seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["measure"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path("truth"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--count", type=int, default=COUNT)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        with session_of(given.folder, model) as session:
            measure(session, given.seeds, given.count)


if __name__ == "__main__":
    main()
