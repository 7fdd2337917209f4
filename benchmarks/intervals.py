"""How many true effects lie in their 95 % intervals: python benchmarks/intervals.py [--draws N] [--study S.db
--truth T.json] [--quick]

Made-up models of 60 layers whose truth is known, at 60, 120 and 300 measurements with 2 and 10 % noise:
"saturating" (neighbouring blocks multiply, and the objective levels off) and "exponential" (nothing levels
off, so that effects grow with the context). Each without real swaps, where intervals come from refits and do
not know the surrogate's bias, and with swaps of 10 and of 30 random layers in 2 contexts each, as noisy as
measurements are. With --study also real effects: those of a study beside the truth, JSON as {layer: {"mean":
..., "error": ...}}, the mean over contexts and its standard error. A table goes to
benchmarks/results/intervals.json and intervals.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import parser, write_results

LAYERS, SCHEMES, SWAP, BITS = (
    60,
    ("usq2", "usq3", "usq4", "usq8", "vq2", "vq3", "vq4", "vq2c", "vq3c", "vq4c"),
    "usq4:usq2",
    3.0,
)
OPERATORS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "ff.up", "ff.down")
TOP = 10  # of the largest effects coverage is said apart
SWAPPED, SWAP_CONTEXTS = (0, 10, 30), 2  # layers with real swaps, and contexts of each


def coverage(
    layers: pd.DataFrame, truth: Mapping[str, tuple[float, float]], level: float = 0.95
) -> dict[str, float]:
    """How intervals (name, effect, low, high) hold the true effects {name: (mean, standard error of that
    mean)}.

    ``inside`` is the share of means inside, too small where the truth itself is uncertain; ``inside_allowed``
    widens each interval by the truth's own error, and is too large where the errors of both are large; the
    coverage lies between. ``top`` is ``inside`` of the TOP predicted effects, ``width`` the median half width
    over the median size of a true effect.
    """
    table = layers[layers.name.isin(truth)]
    mean, error = np.array([truth[n] for n in table.name]).T
    low, high, effect = (table[name].to_numpy(float) for name in ("low", "high", "effect"))
    inside, more = (low <= mean) & (mean <= high), stats.norm.ppf((1 + level) / 2) * error
    # either side of an interval, and the truth's own error, add up as those of independent normal errors do
    allowed = (effect - np.hypot(effect - low, more) <= mean) & (
        mean <= effect + np.hypot(high - effect, more)
    )
    top = np.argsort(-np.abs(effect), kind="stable")[:TOP]
    return {
        "layers": len(table),
        "inside": float(inside.mean()),
        "inside_allowed": float(allowed.mean()),
        "top": float(inside[top].mean()),
        "width": float(np.median(high - low) / 2 / np.median(np.abs(mean))),
    }


class Made:
    """A made-up model: a graph, a space, weight errors, and a true objective of configurations."""

    def __init__(self, kind: str, seed: int):
        from aquabit.cost import CostModel
        from aquabit.sensitivity.features import Encoder
        from aquabit.space import make_space

        rng, self.kind = np.random.default_rng(seed), kind
        self.graph = nx.DiGraph(
            family="dit", model_class="Made", config={}, weights=LAYERS * 192 * 192, other_elements=100
        )
        for i in range(LAYERS):
            self.graph.add_node(
                f"b{i // 6}.{OPERATORS[i % 6]}",
                kind="linear",
                operator=OPERATORS[i % 6],
                block=f"b{i // 6}",
                depth=i,
                shape=(192, 192),
                bias=True,
                groups=1,
                tokens=16,
                macs=16 * 192 * 192,
                step_invariant=False,
                split=None,
                attention=None,
            )
        self.space = make_space(self.graph, "f" * 16, "made", schemes=SCHEMES)
        errors = {
            (n, str(s)): float(
                min(0.9, 2.5 * 4.0**-s.bits * (0.7 if s.kind == "vq" else 1.0) * rng.lognormal(0, 0.1))
            )
            for n, row in self.space.choices.items()
            for s in row
        }
        self.encoder, self.cost = Encoder(self.space, self.graph, errors), CostModel(self.graph, self.space)
        self.importance = rng.lognormal(0, 0.5, LAYERS) * 0.1
        self.importance[rng.choice(LAYERS, 3, replace=False)] = (1.5, 1.2, 0.9)

    def truth(self, rows: Any) -> np.ndarray:
        error = self.encoder.error[np.arange(LAYERS), rows.weights]
        damage = self.importance * (error + 0.03 * (rows.acts == 6))
        if self.kind == "exponential":
            total = damage.sum(1) + 2 * np.sqrt((damage[:, :-1] * damage[:, 1:]).sum(1)) + 0.5 * damage.max(1)
            return np.asarray(5 * np.exp(1.2 * np.minimum(total, 4)))
        block = damage.reshape(len(damage), 10, 6).sum(2)
        total = block.sum(1) + 3 * (block[:, :-1] * block[:, 1:]).sum(1) + 1.5 * np.sqrt(block.max(1))
        return np.asarray(20 + 200 * total / (total + 1.5))

    def fitted(self, count: int, noise: float, seed: int, design: str = "random") -> Any:
        """A surrogate of ``count`` noisy measurements."""
        from aquabit.choices import Choices
        from aquabit.sensitivity.designs import Design
        from aquabit.sensitivity.surrogate.estimators import Surrogate
        from aquabit.sensitivity.surrogate.fit import FittedSurrogate

        rows = Choices.of(self.space, Design.parse(design).draw(self.space, count, seed))
        y = self.truth(rows) * np.exp(noise * np.random.default_rng([seed, 8]).normal(size=count))
        model, bits = (Surrogate(seed=seed).fit(self.encoder(rows), y), self.cost.totals(rows)["bits"])
        return FittedSurrogate(model, self.encoder, self.cost, (), rows, y, bits, y, {}, "made", "min", "")

    def changes(self, players: Sequence[Any], contexts: Any, noise: float = 0.0, seed: int = 0) -> np.ndarray:
        """What the swap of each player does in each context, [players, contexts], both ends measured with
        ``noise``."""
        column = {s: j for j, s in enumerate(self.space.schemes)}
        out = []
        for p in players:
            ends, rng = [], np.random.default_rng([seed, 10, p.column])
            for scheme in (p.before, p.after):
                swapped = contexts.under([[(p.column, column[scheme])]])
                ends.append(self.truth(swapped) * np.exp(noise * rng.normal(size=len(swapped))))
            out.append(ends[1] - ends[0])
        return np.array(out)


def made_rows(draws: int, quick: bool) -> list[dict[str, Any]]:
    """One row a kind, number of measurements, noise and number of swapped layers: means of ``coverage``
    over draws of the model, its measurements and swaps."""
    rows = []
    for kind in ("saturating", "exponential"):
        for count in (60,) if quick else (60, 120, 300):
            for noise in (0.02,) if quick else (0.02, 0.1):
                found = [made_coverage(kind, count, noise, seed) for seed in range(draws)]
                for k, swapped in enumerate(SWAPPED):
                    means = pd.DataFrame([f[k] for f in found]).mean().to_dict()
                    rows.append(
                        {"truth": kind, "measurements": count, "noise": noise, "swapped": swapped, **means}
                    )
                    print(rows[-1], flush=True)
    return rows


def made_coverage(kind: str, count: int, noise: float, seed: int) -> list[dict[str, float]]:
    """``coverage`` for one made-up model and its measurements, of each of SWAPPED."""
    from aquabit.scheme import parse_swap
    from aquabit.sensitivity.effects.combine_effects import combine
    from aquabit.sensitivity.effects.predicted import bootstrap, draw_contexts, find_players, mean_predictions

    model = Made(kind, seed)
    fitted, players = model.fitted(count, noise, seed), find_players(model.space, parse_swap(SWAP))
    column = {s: j for j, s in enumerate(model.space.schemes)}

    def contexts(number: int, stream: int) -> Any:
        return draw_contexts(model.space, model.cost, BITS, number, np.random.default_rng([seed, stream]))

    ends = [((p.column, column[s]),) for p in players for s in (p.before, p.after)]
    predicted = mean_predictions(fitted, bootstrap(fitted, 20, seed), contexts(64, 0), ends, seed)
    effects = predicted[:, 1::2] - predicted[:, ::2]
    change = model.changes(players, contexts(200, 9))
    truth = {
        p.layer: (float(c.mean()), float(c.std() / np.sqrt(len(c))))
        for p, c in zip(players, change, strict=True)
    }
    order, out = np.random.default_rng([seed, 11]).permutation(len(players)), []
    for number in SWAPPED:
        rows = []
        for i in order[:number]:
            player = players[i]
            for value in model.changes([player], contexts(SWAP_CONTEXTS, 100 + i), noise, seed)[0]:
                rows.append((player.layer, str(player.before), str(player.after), float(value)))
        swaps = pd.DataFrame(rows, columns=["layer", "before", "after", "real"])
        ours = combine(players, effects[0], effects[1:], swaps, seed=seed)
        table = pd.DataFrame(
            {"name": [p.layer for p in players], "effect": ours.effect, "low": ours.low, "high": ours.high}
        )
        out.append(coverage(table, truth))
    return out


def real_row(study: Path, truth: Path) -> dict[str, Any]:
    """Coverage of a study's effects, combined with the real swaps that it holds; the truth must be of
    other contexts."""
    from aquabit.sensitivity.explaining import explain
    from aquabit.study import Study

    known = {k: (float(v["mean"]), float(v["error"])) for k, v in json.loads(truth.read_text()).items()}
    result = explain(Study(study, create=False), BITS)
    swapped = int((result.layers.n > 0).sum())
    return {
        "truth": truth.stem,
        "measurements": result.measurements,
        "noise": None,
        "swapped": swapped,
        **coverage(result.layers, known),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--draws", type=int, default=4)
    arguments.add_argument("--study", type=Path)
    arguments.add_argument("--truth", type=Path)
    arguments.add_argument(
        "--quick", action="store_true", help="one number of measurements and one noise, nothing written"
    )
    given = arguments.parse_args()
    rows = made_rows(given.draws, given.quick)
    if given.study and given.truth:
        rows.append(real_row(given.study, given.truth))
    if given.quick:
        return
    command = " ".join(["python benchmarks/intervals.py", *sys.argv[1:]])
    lines = [
        (
            "| truth | measurements | noise | swapped layers | inside | allowing for the truth's error | of"
            " the 10 largest | half width / size |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        noise = "-" if r["noise"] is None else f"{r['noise']:.0%}"
        lines.append(
            f"| {r['truth']} | {r['measurements']} | {noise} | {r['swapped']} | {r['inside']:.2f} |"
            f" {r['inside_allowed']:.2f} | {r['top']:.2f} | {r['width']:.2f} |"
        )
    text = f"`{command}`\n\n" + "\n".join(lines) + "\n"
    write_results("intervals", command, {"rows": rows}, lambda _: text)


if __name__ == "__main__":
    main()
