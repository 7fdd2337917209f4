"""What a search finds inside the formats of other programs: python benchmarks/targets.py PART ...
[--folder DIR] [--models ...] [--targets ...] [--blocks N]

search     what the program over damages chooses of a target's formats within the bytes of its usual recipes,
           within 85 % of them, and at their quality (bytes lowered until the predicted damage is the
           recipe's)
fresh      recipes and what was found on --blocks blocks (five by default) of 128 fresh seeds
table      benchmarks/results/targets.json and targets.md

A recipe is one format for all layers that the target quantizes, fitted to the weights alone, as these
programs do it; with h the same output-aware. It continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    RESULTS,
    about,
    difference,
    mean,
    measured_blocks,
    open_study,
    parsed,
    parser,
    read,
    say,
    spans,
    write,
    write_results,
)

RECIPES: Mapping[str, Sequence[str]] = {  # a target's usual formats, those of 4 bits first
    "gguf": ("q4_0", "q8_0"),
    "sdnq": ("usq4g32", "int8"),
    "bitsandbytes": ("nf4g64",),
    "torchao": ("int4g32", "int8"),
    "modelopt": ("int4g32",),
}
MODELS = ("digits-unet", "digits-dit", "fashion-unet", "fashion-dit")
METRICS = ("psnr", "fid")
FRESH = range(531, 536)  # blocks of seeds that nothing else uses
IMAGES = 128
STEPS = 12  # halvings of the bytes that reach a recipe's quality
SMALLER = 0.85  # of a recipe's bytes


def session_of(folder: Path, model: str, target: str) -> Any:
    path = folder / f"targets-{target}-{model}.db"
    return open_study(path, model, folder / "bank", {"target": target}, workers=1)


def uniform(session: Any, scheme: str) -> Any:
    """The scheme in every layer that the target quantizes and that it fits, else the layer's largest."""
    from aquabit.graph import layers
    from aquabit.scheme import Scheme
    from aquabit.targets import TARGETS

    space, graph, wanted = session.space, session.model.graph, Scheme.parse(scheme)
    goal, nodes = TARGETS[space.target], layers(session.model.graph)
    chosen = {}
    for name, row in space.choices.items():
        fits = goal.refusal(wanted, name, nodes[name], str(graph.graph["model_class"])) is None
        top = max(row, key=lambda s, name=name: space.code_bits(name, s))
        chosen[name] = space.choice(name, wanted if fits and len(row) > 1 else top, 16)
    return space.config(chosen)


def solved(session: Any, size: float) -> tuple[Any, float]:
    """The program's configuration of at most so many bytes, and its predicted damage."""
    from aquabit.scheme import Budget
    from aquabit.search.integer_program import solve
    from aquabit.sensitivity.damages import damages_of

    damages = damages_of(session)
    assert damages is not None
    found = solve(damages.scores((16,)), session.costs, Budget(bytes=int(size)))
    return found.choices.config, float(damages.total(found.choices)[0])


def search(folder: Path, model: str, target: str) -> None:
    """name -> configuration, in a file beside the study."""
    from aquabit.choices import Choices
    from aquabit.sensitivity.damages import damages_of

    path, found = folder / f"targets-{target}-{model}.json", dict[str, Any]()
    with session_of(folder, model, target) as session:
        session.references(say)
        for recipe in RECIPES[target]:
            aware = f"{recipe}h"
            found |= {recipe: uniform(session, recipe), aware: uniform(session, aware)}
            size = session.costs(found[recipe]).bytes
            found[f"found, {recipe}'s bytes"], _ = solved(session, size)
            if SMALLER * size > session.costs.limits(16)["bytes"][0]:
                found[f"found, {SMALLER:.0%} of {recipe}'s bytes"], _ = solved(session, SMALLER * size)
            damages = damages_of(session)
            assert damages is not None
            space = session.space
            if all(c.weight in space.choices[k] for k, c in found[aware].layers.items()):
                goal = float(damages.total(Choices.of(space, [found[aware]]))[0])
                low, high = session.costs.limits(16)["bytes"][0], size
                for _ in range(STEPS):
                    middle = (low + high) / 2
                    _, damage = solved(session, max(middle, low + 1))
                    low, high = (low, middle) if damage <= goal else (middle, high)
                found[f"found, {aware}'s predicted damage"], _ = solved(session, high)
    write(path, {k: c.to_dict() for k, c in found.items()})


def fresh(folder: Path, model: str, target: str, blocks: int) -> list[dict[str, Any]]:
    from aquabit.scheme import QuantConfig

    stored = read(folder / f"targets-{target}-{model}.json")
    with session_of(folder, model, target) as session:
        configs = {"full precision": session.space.full_precision()}
        configs |= {name: QuantConfig.from_dict(c) for name, c in stored.items()}
        protocols = [replace(session.protocol.block(b), images=IMAGES) for b in FRESH[:blocks]]
        values = measured_blocks(session, configs, protocols, METRICS)
        costs = {name: session.costs(c) for name, c in configs.items()}
        about_ = {"model": model, "target": target}
        return [
            {**about_, "name": n, "bytes": costs[n].bytes, "bits": costs[n].bits_per_weight, **values[n]}
            for n in configs
        ]


def blocks_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many blocks each model was measured on."""
    counts = {r["model"]: len(r["fid"]) for r in rows}
    return ", ".join(f"{model} {count}" for model, count in counts.items())


def text(found: dict[str, Any]) -> str:
    lines = [
        "# Inside the formats of other programs",
        "",
        f"`{found['command']}` on {about(found['machine'])}. Activations as they are; blocks of {IMAGES}"
        f" fresh seeds ({blocks_of(found['rows'])}), 10 steps; 95 % intervals; differences are paired."
        " A recipe is one format for all"
        " layers that the target quantizes (layers whose rows its blocks do not divide take the largest that"
        " fits),"
        " fitted to the weights alone as these programs do it, with h output-aware; rounding is ours. Found:"
        " the program over damages, of the target's formats alone; without a row at 85 % nothing so small can"
        " be had. FID is of 128 images in the features of"
        " the bundled classifier.",
        "",
        "| target | model | configuration | bytes | bits | PSNR [dB] | FID | PSNR over the recipe |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        name = row["name"]
        recipe = name.removeprefix("found, ").split("'")[0].split()[-1].removesuffix("h")
        base = next(
            (
                r
                for r in found["rows"]
                if all(r[k] == row[k] for k in ("model", "target")) and r["name"] == recipe
            ),
            row,
        )
        over = "" if base is row else spans(difference(row["psnr"], base["psnr"]), 1, "+")
        psnr = "" if name == "full precision" else spans(mean(row["psnr"]), 1)
        lines.append(
            f"| {row['target']} | `{row['model']}` | {name} | {row['bytes']:,.0f} | {row['bits']:.2f} |"
            f" {psnr} | {spans(mean(row['fid']), 1)} | {over} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    made = parser(__doc__, ["search", "fresh", "table", "all"], folder="targets", models=MODELS)
    made.set_defaults(models=list(MODELS))
    made.add_argument("--targets", nargs="+", default=list(RECIPES), choices=RECIPES)
    made.add_argument("--blocks", type=int, choices=range(2, len(FRESH) + 1), default=len(FRESH))
    given = parsed(made)
    parts = {"search", "fresh", "table"} if "all" in given.parts else set(given.parts)
    for target in given.targets:
        for model in given.models:
            if "search" in parts:
                search(given.folder, model, target)
            if "fresh" in parts:
                write(
                    given.folder / f"targets-rows-{target}-{model}.json",
                    fresh(given.folder, model, target, given.blocks),
                )
    if "table" in parts:
        new = [
            row
            for target in given.targets
            for model in given.models
            for row in read(given.folder / f"targets-rows-{target}-{model}.json", [])
        ]
        done = {(r["target"], r["model"]) for r in new}
        old = read(RESULTS / "targets.json", {"rows": []})["rows"]
        rows = new + [r for r in old if (r["target"], r["model"]) not in done]
        rows.sort(key=lambda r: (list(RECIPES).index(r["target"]), MODELS.index(r["model"])))
        each = {k: " ".join(dict.fromkeys(r[k] for r in rows)) for k in ("model", "target")}
        command = f"python benchmarks/targets.py all --models {each['model']} --targets {each['target']}"
        write_results("targets", command, {"rows": rows}, text)


if __name__ == "__main__":
    main()
