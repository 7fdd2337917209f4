"""Real effects of single-layer swaps: python benchmarks/truth.py PART ... [--folder DIR] [--models ...] [--quick]

swap       every layer from usq4 to usq2 in 16 random contexts within 0.25 bit of 3 bits a weight, a8
schemes    in the first 4 contexts: every layer from usq4 to other schemes (SCHEMES) and its activations from a8 to a6
pairs      in the first 4 contexts: 24 pairs of layers from usq4 to usq2 together, half of them drawn, half among the strongest layers
table      benchmarks/results/truth.json and truth.md of what was measured

Common random numbers: both ends of a swap are made from the same seeds. Every context has a block of fresh seeds of its own, so a mean over
contexts is one over seeds too. No training measurement uses these seeds or contexts. It takes hours, and continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.scheme import Scheme
from benchmarks.flow import MODELS

BITS, CONTEXTS, FEW = 3.0, 16, 4
SEED = 20_261_128
FIRST_BLOCK = 51  # the other benchmarks use blocks up to 45
BEFORE, AFTER = "usq4", "usq2"
SCHEMES = ("usq3", "vq2c", "usq2h", "aq2")  # aq2: the layer's additive format of 2 bits
PAIRS, STRONGEST = 24, 10
METRICS = ("fid", "sfid", "psnr")


class Truth:
    """One model's contexts, and the configurations that its swaps compare."""

    def __init__(self, session: Any, contexts: int = CONTEXTS):
        from aquabit.sensitivity.effects import draw_contexts

        self.session, self.space = session, session.space
        drawn = draw_contexts(session.space, session.costs, BITS, CONTEXTS, np.random.default_rng([SEED, 0]))
        self.contexts = session.space.configs(*drawn)[:contexts]
        self.protocols = [session.protocol.block(FIRST_BLOCK + i) for i in range(contexts)]
        self.layers = session.space.free_layers()

    def swapped(self, context: int, *changes: tuple[str, str]) -> Any:
        """A context with layers at given schemes ("usq4"; "aq2"; "a6" is usq4 with its activations at 6 bits)."""
        config = self.contexts[context]
        for layer, what in changes:
            act, weight = (6, Scheme.parse(BEFORE)) if what == "a6" else (8, self.scheme(layer, what))
            config = config.with_layer(layer, weight, act, self.space.codebook(layer) if weight.shared else None)
        return config

    def scheme(self, layer: str, what: str) -> Any:
        if what != "aq2":
            return Scheme.parse(what)
        own = [s for s in self.space.choices[layer] if s.kind == "aq"]
        return min(own, key=lambda s: abs(self.space.code_bits(layer, s) - 2))

    def measure(self, context: int, configs: Sequence[Any], what: str) -> None:
        protocol = self.protocols[context]
        self.session.measure([self.space.full_precision()], "reference", say, [protocol], "full precision")
        self.session.measure(configs, "flip", say, [protocol], f"{what}, context {context + 1}")

    def values(self, context: int, configs: Sequence[Any]) -> list[dict[str, float] | None]:
        """The metrics of configurations where they were measured (infinite where that failed)."""
        return [self.table.get((c.digest, self.protocols[context].digest)) for c in configs]

    def read(self) -> None:
        found = self.session.study.measurements(failed=True)
        rows = zip(found.config, found.protocol, found[list(METRICS)].to_numpy(float), strict=True)
        self.table = {(c, p): dict(zip(METRICS, v.tolist(), strict=True)) for c, p, v in rows}


def say(what: str, done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        print(f"{what}: {done}/{total}", flush=True)


def session_of(folder: Path, model: str) -> Any:
    from aquabit.sensitivity.measure import open_session
    from aquabit.study import Study

    return open_session(model, Study(folder / f"truth-{model}.db"), workers=2, bank=str(folder / "bank"), progress=say)


def swap(truth: Truth) -> None:
    for c in range(len(truth.contexts)):
        truth.measure(c, [truth.swapped(c, (k, end)) for k in truth.layers for end in (BEFORE, AFTER)], "4 to 2 bits")


def schemes(truth: Truth) -> None:
    for c in range(min(FEW, len(truth.contexts))):
        truth.measure(c, [truth.swapped(c, (k, end)) for k in truth.layers for end in (BEFORE, *SCHEMES, "a6")], "other schemes")


def picked_pairs(truth: Truth) -> list[tuple[str, str]]:
    """Half of them drawn from all pairs, half from those of the layers with the largest effects."""
    effect = {k: float(np.mean([after["fid"] - before["fid"] for before, after in ends])) for k, ends in _ends(truth, AFTER).items()}
    strong = sorted(truth.layers, key=lambda k: -effect.get(k, -np.inf))[:STRONGEST]
    rng, found = np.random.default_rng([SEED, 1]), list[tuple[str, str]]()
    while len(found) < PAIRS:
        a, b = rng.choice(truth.layers if len(found) < PAIRS // 2 else strong, 2, replace=False)
        if (a, b) not in found and (b, a) not in found:
            found.append((str(a), str(b)))
    return found


def pairs(truth: Truth) -> None:
    truth.read()
    chosen = picked_pairs(truth)
    for c in range(min(FEW, len(truth.contexts))):
        four = [truth.swapped(c, (a, i), (b, j)) for a, b in chosen for i in (BEFORE, AFTER) for j in (BEFORE, AFTER)]
        truth.measure(c, four, "pairs")


def _ends(truth: Truth, after: str) -> dict[str, list[tuple[Any, Any]]]:
    """layer -> (before, after) of each context where both were measured."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for layer in truth.layers:
        for c in range(len(truth.contexts)):
            both = truth.values(c, [truth.swapped(c, (layer, BEFORE)), truth.swapped(c, (layer, after))])
            if None not in both:
                found.setdefault(layer, []).append((both[0], both[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["swap", "schemes", "pairs", "table"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path("truth"))
    parser.add_argument("--quick", action="store_true", help="two contexts")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        with session_of(given.folder, model) as session:
            truth = Truth(session, 2 if given.quick else CONTEXTS)
            for part in given.parts:
                if part != "table":
                    {"swap": swap, "schemes": schemes, "pairs": pairs}[part](truth)


if __name__ == "__main__":
    main()
