"""NVIDIA ModelOpt's own solver on given scores and bytes; run by benchmarks/rivals.py with the Python of the
peer's own environment.

Reads JSON: "layers" (name -> schemes, scores, bytes without shared codebooks), "shared" (scheme, its layers,
bytes of the codebooks once) and "limits" (name -> bytes); writes name -> layer -> scheme. The solver is
``AutoQuantizeGradientSearcher.run_search_with_stats``: PuLP's CBC on one-hot variables, with its retries
under lower bounds, and candidates whose scores do not rise with size, as it makes them. It knows no shared
codebooks: each user is charged an equal part, and the limit is lowered by what an answer costs above it until
one is within. It imports modelopt (where it is asked to solve), nothing of aquabit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TRIES = (
    40  # each lowers the limit by one byte at least; two or three suffice where codebooks are shared at all
)

Solver = Callable[
    [Mapping[str, Mapping[str, Any]], float], Mapping[str, int]
]  # (candidates, limit) -> layer -> place in its row


def candidates(layers: Mapping[str, Any], shared: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """layer -> formats, scores and costs as ModelOpt keeps them: by rising cost, a score never above that
    of a smaller format."""
    part = {(k, t["scheme"]): t["bytes"] / len(t["layers"]) for t in shared for k in t["layers"]}
    found = {}
    for name, row in layers.items():
        priced = [
            (size + part.get((name, s), 0.0), s, score)
            for s, score, size in zip(row["schemes"], row["scores"], row["bytes"], strict=True)
        ]
        priced.sort(key=lambda r: r[0])
        scores, least = [], float("inf")
        for _, _, score in priced:
            least = min(least, score)
            scores.append(least)
        found[name] = {
            "formats": [s for _, s, _ in priced],
            "scores": scores,
            "costs": [c for c, _, _ in priced],
        }
    return found


def true_bytes(
    chosen: Mapping[str, str], layers: Mapping[str, Any], shared: Sequence[Mapping[str, Any]]
) -> int:
    """What a choice costs, each set of shared codebooks once."""
    own = sum(row["bytes"][row["schemes"].index(chosen[k])] for k, row in layers.items())
    return int(own + sum(t["bytes"] for t in shared if any(chosen[k] == t["scheme"] for k in t["layers"])))


def within(given: Mapping[str, Any], limit: float, solver: Solver) -> dict[str, str] | None:
    """The solver's answer for the largest limit tried whose true bytes are within ``limit``; None where
    there is none."""
    table, asked = candidates(given["layers"], given["shared"]), float(limit)
    for _ in range(TRIES):
        places = solver(table, asked)
        chosen = {k: str(table[k]["formats"][places[k]]) for k in table}
        over = true_bytes(chosen, given["layers"], given["shared"]) - limit
        if over <= 0:
            return chosen
        asked -= max(over, 1.0)
    return None


def its_solver(table: Mapping[str, Mapping[str, Any]], limit: float) -> dict[str, int]:
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

    searcher = AutoQuantizeGradientSearcher()
    searcher.candidate_stats, searcher.cost_model, searcher.config = (
        dict(table),
        "weight",
        {"cost_model": "weight"},
    )
    found, _ = searcher.run_search_with_stats(limit)
    return {k: table[k]["formats"].index(row["format"]) for k, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--given", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    given = json.loads(arguments.given.read_text())
    found = {name: within(given, limit, its_solver) for name, limit in given["limits"].items()}
    arguments.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
