"""Real effects of single-layer swaps: python benchmarks/truth.py PART ... [--folder DIR] [--models ...]
[--quick]

swap       every layer from usq4 to usq2 in 16 random contexts within 0.25 bit of 3 bits a weight, a8
schemes    in the first 4 contexts: every layer from usq4 to other schemes (SCHEMES) and its activations from
           a8 to a6
fresh      as swap, in 4 other contexts: what was chosen while looking at the former is judged on these
pairs      in the first 4 contexts: 24 pairs of layers from usq4 to usq2 together, half of them drawn, half
           among the strongest layers
table      benchmarks/results/truth.json and truth.md of what was measured

Common random numbers: both ends of a swap are made from the same seeds. Every context has a block of fresh
seeds of its own, so a mean over contexts is one over seeds too. No training measurement uses these seeds or
contexts. It takes hours, and continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.scheme import Scheme
from benchmarks.common import (
    RESULTS,
    about,
    mean,
    open_study,
    parsed,
    parser,
    plain,
    read,
    replaced,
    say,
    values_of,
    write_results,
)

BITS, CONTEXTS, FEW, OTHERS = 3.0, 16, 4, 4
SEED = 20_261_128
FIRST_BLOCK = 51  # the other benchmarks use blocks up to 45
BEFORE, AFTER = "usq4", "usq2"
SCHEMES = ("usq3", "vq2c", "usq2h", "aq2")  # aq2: the layer's additive format of 2 bits
PAIRS, STRONGEST = 24, 10
METRICS = ("fid", "sfid", "psnr")
SPACE = {  # the default when the truth was measured; contexts are draws from it
    "schemes": [
        "usq2",
        "usq3",
        "usq4",
        "usq8",
        "vq2",
        "vq3",
        "vq4",
        "vq2c",
        "vq3c",
        "vq4c",
        "usq2h",
        "usq3h",
        "usq4h",
    ],
    "levels": [1.5, 2.0, 3.0, 4.0],
}


class Truth:
    """One model's contexts, and the configurations that its swaps compare."""

    def __init__(self, session: Any, contexts: int = CONTEXTS, others: bool = False):
        from aquabit.sensitivity.effects.predicted import draw_contexts

        self.session, self.space = session, session.space
        count, draw, block = (OTHERS, 2, FIRST_BLOCK + CONTEXTS) if others else (CONTEXTS, 0, FIRST_BLOCK)
        drawn = draw_contexts(session.space, session.costs, BITS, count, np.random.default_rng([SEED, draw]))
        self.contexts = drawn[:contexts].configs()
        self.protocols = [session.protocol.block(block + i) for i in range(len(self.contexts))]
        self.layers = session.space.free_layers()

    def swapped(self, context: int, *changes: tuple[str, str]) -> Any:
        """A context with layers at given schemes ("usq4"; "aq2"; "a6" is usq4 with its activations at 6
        bits)."""
        config = self.contexts[context]
        for layer, what in changes:
            act, weight = (6, Scheme.parse(BEFORE)) if what == "a6" else (8, self.scheme(layer, what))
            config = config.with_layer(
                layer, weight, act, self.space.codebook(layer) if weight.shared else None
            )
        return config

    def scheme(self, layer: str, what: str) -> Any:
        if what != "aq2":
            return Scheme.parse(what)
        return min(self.additive(layer), key=lambda s: abs(self.space.code_bits(layer, s) - 2))

    def additive(self, layer: str) -> list[Any]:
        return [s for s in self.space.choices[layer] if s.kind == "aq"]

    def taking(self, what: str) -> list[str]:
        """The layers that may take a scheme: small ones have no additive format."""
        return [k for k in self.layers if what != "aq2" or self.additive(k)]

    def measure(self, context: int, configs: Sequence[Any], what: str) -> None:
        protocol = self.protocols[context]
        self.session.measure([self.space.full_precision()], "reference", say, [protocol], "full precision")
        self.session.measure(configs, "flip", say, [protocol], f"{what}, context {context + 1}")

    def values(self, context: int, configs: Sequence[Any]) -> list[dict[str, float] | None]:
        """The metrics of configurations where they were measured (infinite where that failed)."""
        return [self.table.get((c.digest, self.protocols[context].digest)) for c in configs]

    def read(self) -> None:
        self.table = values_of(self.session.study, METRICS)


def session_of(folder: Path, model: str) -> Any:
    return open_study(folder / f"truth-{model}.db", model, space=SPACE)


def swap(truth: Truth) -> None:
    for c in range(len(truth.contexts)):
        truth.measure(
            c, [truth.swapped(c, (k, end)) for k in truth.layers for end in (BEFORE, AFTER)], "4 to 2 bits"
        )


def schemes(truth: Truth) -> None:
    for c in range(min(FEW, len(truth.contexts))):
        truth.measure(
            c,
            [truth.swapped(c, (k, end)) for end in (BEFORE, *SCHEMES, "a6") for k in truth.taking(end)],
            "other schemes",
        )


def picked_pairs(truth: Truth) -> list[tuple[str, str]]:
    """Half of them drawn from all pairs, half from those of the layers with the largest effects."""
    found = ends_of(truth, AFTER)
    effect = {
        k: float(np.mean([after["fid"] - before["fid"] for before, after in ends.values()]))
        for k, ends in found.items()
    }
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
        four = [
            truth.swapped(c, (a, i), (b, j))
            for a, b in chosen
            for i in (BEFORE, AFTER)
            for j in (BEFORE, AFTER)
        ]
        truth.measure(c, four, "pairs")


def ends_of(
    truth: Truth, after: str, before: str = BEFORE
) -> dict[str, dict[int, tuple[dict[str, float], dict[str, float]]]]:
    """layer -> context -> metrics (before, after), where both were measured."""
    found: dict[str, dict[int, tuple[dict[str, float], dict[str, float]]]] = {}
    for layer in truth.taking(after):
        for c in range(len(truth.contexts)):
            first, second = truth.values(
                c, [truth.swapped(c, (layer, before)), truth.swapped(c, (layer, after))]
            )
            if first is not None and second is not None:
                found.setdefault(layer, {})[c] = first, second
    return found


def swap_rows(truth: Truth, model: str, kind: str, afters: Sequence[str]) -> list[dict[str, Any]]:
    """One row a swap of a layer: effects on FID (positive = worse) with 90 % intervals, and what was
    measured."""
    truth.read()
    rows = []
    for after in afters:
        for layer, found in ends_of(truth, after).items():
            if not set(range(min(FEW, len(truth.contexts)))) <= set(
                found
            ):  # contexts that have such a scheme by chance
                continue
            values = [(a["fid"] - b["fid"]) for b, a in found.values()]
            rows.append(
                {
                    "model": model,
                    "kind": kind,
                    "layer": layer,
                    "swap": f"{BEFORE}:{after}",
                    "n": len(values),
                    "effect": mean(values, 0.9),
                    "psnr": mean([a["psnr"] - b["psnr"] for b, a in found.values()], 0.9),
                    "contexts": list(found),
                    "before": [b["fid"] for b, _ in found.values()],
                    "after": [a["fid"] for _, a in found.values()],
                }
            )
    return rows


def rows_of(truth: Truth, others: Truth, model: str) -> list[dict[str, Any]]:
    """One row a swap of a layer ("fresh": in the other contexts), and one a pair."""
    rows = swap_rows(truth, model, "swap", (AFTER, *SCHEMES, "a6")) + swap_rows(
        others, model, "fresh", (AFTER,)
    )
    for a, b in picked_pairs(truth):
        values, kept = [], []
        for c in range(FEW):
            corners = truth.values(
                c, [truth.swapped(c, (a, i), (b, j)) for i in (BEFORE, AFTER) for j in (BEFORE, AFTER)]
            )
            if None not in corners:
                values.append([v["fid"] for v in corners if v is not None])
                kept.append(c)
        if values:
            both = [v[3] - v[1] - v[2] + v[0] for v in values]
            rows.append(
                {
                    "model": model,
                    "kind": "pair",
                    "layers": [a, b],
                    "swap": f"{BEFORE}:{AFTER}",
                    "n": len(both),
                    "contexts": kept,
                    "interaction": mean(both, 0.9),
                    "corners": values,
                }
            )
    return rows


def reliability(rows: Sequence[dict[str, Any]]) -> float | None:
    """SRCC of the effects between even and odd contexts, stepped up to all of them (Spearman and Brown)."""
    from aquabit.sensitivity.surrogate.scores import srcc

    change = [np.subtract(r["after"], r["before"]) for r in rows]
    if not change or min(map(len, change)) < 4:
        return None
    half = srcc(np.array([c[::2].mean() for c in change]), np.array([c[1::2].mean() for c in change]))
    return 2 * half / (1 + half)


def command(rows: Sequence[dict[str, Any]]) -> str:
    """What made these rows: parts that were not run are not named."""
    others = any(r["kind"] == "swap" and not r["swap"].endswith(f":{AFTER}") for r in rows)
    fresh = any(r["kind"] == "fresh" for r in rows)
    parts = [
        "swap",
        *(["fresh"] if fresh else []),
        *(["schemes"] if others else []),
        *(["pairs"] if any(r["kind"] == "pair" for r in rows) else []),
        "table",
    ]
    return f"python benchmarks/truth.py {' '.join(parts)}"


def table(found: dict[str, Any]) -> str:
    rows = found["rows"]
    lines = [
        "# Real effects of single-layer swaps",
        "",
        f"{about(found['machine'])}. Made by `{found['command']}`.",
        "",
        (
            f"Change of FID (positive = worse) when one layer goes from {BEFORE} to another scheme in random"
            f" contexts within 0.25 bit of {BITS:g} bits a weight, a8, with 90 % intervals over contexts."
            " Both ends are made from the same seeds. Reliability: SRCC of effects between even and odd"
            " contexts, stepped up to all (Spearman and Brown)."
        ),
        "",
        (
            "| model | swap | layers | contexts | reliability | median effect | largest | interval excludes"
            " 0: worse, better |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model and r["kind"] in ("swap", "fresh")]
        for kind, name in dict.fromkeys((r["kind"], r["swap"]) for r in own):
            part = [r for r in own if (r["kind"], r["swap"]) == (kind, name)]
            trust, effects = reliability(part), [r["effect"][0] for r in part]
            worse, better = (
                sum((r["effect"][1] or 0) > 0 for r in part),
                sum((r["effect"][2] or 0) < 0 for r in part),
            )
            lines.append(
                f"| {model} | {name}{', other contexts' if kind == 'fresh' else ''} | {len(part)} |"
                f" {min(r['n'] for r in part)} | {'' if trust is None else f'{trust:.2f}'} |"
                f" {np.median(effects):.3g} | {max(effects):.3g} | {worse}, {better} |"
            )
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model and r["kind"] == "swap" and r["swap"].endswith(AFTER)]
        if not own:
            continue
        lines += [
            "",
            f"## {model}, {BEFORE} to {AFTER}",
            "",
            "| layer | effect | 90 % | PSNR, dB |",
            "|---|---|---|---|",
        ]
        for r in sorted(own, key=lambda r: -r["effect"][0]):
            e, p = r["effect"], r["psnr"]
            lines.append(f"| {r['layer']} | {e[0]:.3g} | {e[1]:.3g} to {e[2]:.3g} | {p[0]:.2f} |")
        own = [r for r in rows if r["model"] == model and r["kind"] == "pair"]
        if own:
            lines += [
                "",
                f"## {model}, pairs",
                "",
                "What two swaps do beyond the sum of each alone.",
                "",
                "| layers | interaction | 90 % |",
                "|---|---|---|",
            ]
            for r in own:
                e = r["interaction"]
                lines.append(f"| {', '.join(r['layers'])} | {e[0]:.3g} | {e[1]:.3g} to {e[2]:.3g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__, ["swap", "fresh", "schemes", "pairs", "table"], "truth")
    arguments.add_argument("--quick", action="store_true", help="two contexts")
    given = parsed(arguments)
    rows: list[dict[str, Any]] = []
    for model in given.models:
        with session_of(given.folder, model) as session:
            truth, others = (Truth(session, 2 if given.quick else CONTEXTS, which) for which in (False, True))
            for part in given.parts:
                if part == "table":
                    rows += rows_of(truth, others, model)
                else:
                    {"swap": swap, "fresh": swap, "schemes": schemes, "pairs": pairs}[part](
                        others if part == "fresh" else truth
                    )
    if "table" in given.parts:
        rows = replaced(read(RESULTS / "truth.json").get("rows", []), plain(rows, 6), given.models)
        write_results("truth", command(rows), {"seed": SEED, "rows": rows}, table)


if __name__ == "__main__":
    main()
