"""What a search finds inside the formats of other programs: python benchmarks/targets.py PART ...
[--folder DIR] [--models ...] [--targets ...] [--blocks N]

search     what the program over damages chooses of a target's formats within the bytes of its usual recipes,
           within 85 % of them, and at their quality (bytes lowered until the predicted damage is the
           recipe's)
fresh      recipes and what was found on --blocks blocks (five by default) of 128 fresh seeds
own        on the same seeds, each recipe as the target's own quantizer rounds it, where that is installed
table      benchmarks/results/targets.json and targets.md

A recipe is one format for all layers that the target quantizes, fitted to the weights alone, as these
programs do it; with h the same output-aware. It continues where it stopped.

The quantizers (benchmarks/own_rounding.py) come with: pip install 'aquabit[targets]' bitsandbytes, and for
ModelOpt nvidia-modelopt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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
from benchmarks.own_rounding import installed, own_rounding

RECIPES: Mapping[str, Sequence[str]] = {  # a target's usual formats, those of 4 bits first
    "gguf": ("q4_0", "q8_0"),
    "sdnq": ("usq4g32", "int8"),
    "bitsandbytes": ("nf4g64",),
    "torchao": ("int4g32", "int8"),
    "modelopt": ("int4g32",),
}
MODELS = ("digits-unet", "digits-dit", "fashion-unet", "fashion-dit", "emoji-dit")
METRICS = ("psnr", "fid")
FRESH = range(531, 536)  # blocks of seeds that nothing else uses
IMAGES = 128
OWN = "'s own rounding"
FILES = {"fresh": "rows", "own": "own"}  # part -> how its files are called
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


def own(folder: Path, model: str, target: str, blocks: int) -> list[dict[str, Any]]:
    """Recipes as the target's own quantizer rounds them: the same layers, with what it decodes to in them;
    none where it is not installed."""
    from aquabit.scheme import QuantConfig, Scheme

    by = installed(target)
    if by is None:
        say(f"{target}'s own quantizer is not installed", 1, 1)
        return []
    stored, rows = read(folder / f"targets-{target}-{model}.json"), []
    if not stored:
        raise SystemExit(f"{model}, {target}: there are no recipes in {folder}; run the part search before")
    with session_of(folder, model, target) as session:
        here, about_ = session.here, {"model": model, "target": target}
        protocols = [replace(session.protocol.block(b), images=IMAGES) for b in FRESH[:blocks]]
        for recipe in RECIPES[target]:
            config, scheme = QuantConfig.from_dict(stored[recipe]), Scheme.parse(recipe)
            names = [name for name, choice in config.layers.items() if choice.weight == scheme]
            weights = {n: own_rounding(target, scheme, here.quantized.full(n)) for n in names}
            values: dict[str, list[float]] = {metric: [] for metric in METRICS}
            for protocol in protocols:
                full = here.full_precision(protocol)
                here.quantized.apply(config)
                for name, weight in weights.items():
                    here.quantized.layers[name].set_dense_(weight, scheme)
                made = [here.adapter.images(protocol, b) for b in here.adapter.batches(protocol)]
                here.quantized.apply(session.space.full_precision())
                quality = here.meter.quality(None)
                quality.update(torch.cat(made), full, here.adapter.conditions(protocol))
                found = quality.compute()
                for metric in METRICS:
                    values[metric].append(found[metric])
            cost = session.costs(config)
            size = {"bytes": cost.bytes, "bits": cost.bits_per_weight}
            rows.append({**about_, "name": f"{recipe}, {target}{OWN}", "by": by, **size, **values})
            say(rows[-1]["name"], 1, 1)
    return rows


def rounded_by(rows: Sequence[Mapping[str, Any]]) -> str:
    """The quantizers of the rows that others rounded."""
    return ", ".join(dict.fromkeys(r["by"] for r in rows if "by" in r)) or "none was installed"


def blocks_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many blocks each model was measured on."""
    counts = {r["model"]: len(r["fid"]) for r in rows}
    return ", ".join(f"{model} {count}" for model, count in counts.items())


def recipe_of(name: str) -> str:
    """The recipe that a row is compared with."""
    if name.endswith(OWN):
        return name.partition(",")[0]
    return name.removeprefix("found, ").split("'")[0].split()[-1].removesuffix("h")


def over_row(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], of: str) -> str:
    """How much better a row is than its recipe, in the rounding that ``of`` names."""
    name = recipe_of(row["name"]) + of
    for base in rows:
        if all(base[k] == row[k] for k in ("model", "target")) and base["name"] == name != row["name"]:
            return spans(difference(row["psnr"], base["psnr"]), 1, "+")
    return ""


def rank(row: Mapping[str, Any]) -> tuple[int, ...]:
    """Where a row stands in the table: by target, model and recipe, the two roundings of one first."""
    recipes, name = RECIPES[row["target"]], row["name"]
    recipe = recipe_of(name)
    place = recipes.index(recipe) if recipe in recipes else -1
    first = (recipe, f"{recipe}, {row['target']}{OWN}")
    order = first.index(name) if name in first else len(first)
    return list(RECIPES).index(row["target"]), MODELS.index(row["model"]), place, order


def left_out(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence that names the targets that were not run on some of the models; empty where all were."""
    done = {(r["target"], r["model"]) for r in rows}
    missing = [
        f"{target} on {' and '.join(f'`{m}`' for m in models)}"
        for target in RECIPES
        if (models := [m for m in MODELS if (target, m) not in done])
    ]
    return f" Not run: {', '.join(missing)}." if missing else ""


def text(found: dict[str, Any]) -> str:
    lines = [
        "# Inside the formats of other programs",
        "",
        f"`{found['command']}` on {about(found['machine'])}. Activations as they are; blocks of {IMAGES}"
        f" fresh seeds ({blocks_of(found['rows'])}), 10 steps; 95 % intervals; differences are paired."
        " A recipe is one format for all"
        " layers that the target quantizes (layers whose rows its blocks do not divide take the largest that"
        " fits),"
        " fitted to the weights alone as these programs do it, with h output-aware, in our rounding; and as"
        f" the target's own quantizer rounds it ({rounded_by(found['rows'])}), bytes counted as ours. Found:"
        " the program over damages, of the target's formats alone; without a row at 85 % nothing so small can"
        " be had. FID is of 128 images in the features of"
        f" the bundled classifier.{left_out(found['rows'])}",
        "",
        "| target | model | configuration | bytes | bits | PSNR [dB] | FID | PSNR over the recipe |"
        " over the target's own rounding |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        name = row["name"]
        over = (over_row(row, found["rows"], of) for of in ("", f", {row['target']}{OWN}"))
        psnr = "" if name == "full precision" else spans(mean(row["psnr"]), 1)
        lines.append(
            f"| {row['target']} | `{row['model']}` | {name} | {row['bytes']:,.0f} | {row['bits']:.2f} |"
            f" {psnr} | {spans(mean(row['fid']), 1)} | {' | '.join(over)} |"
        )
    return "\n".join(lines) + "\n"


def origin(row: Mapping[str, Any]) -> tuple[str, str, bool]:
    """What a row was measured with."""
    return row["target"], row["model"], "by" in row


def main() -> None:
    made = parser(__doc__, ["search", "fresh", "own", "table", "all"], folder="targets", models=MODELS)
    made.set_defaults(models=list(MODELS))
    made.add_argument("--targets", nargs="+", default=list(RECIPES), choices=RECIPES)
    made.add_argument("--blocks", type=int, choices=range(2, len(FRESH) + 1), default=len(FRESH))
    given = parsed(made)
    parts = {"search", "fresh", "own", "table"} if "all" in given.parts else set(given.parts)
    for target in given.targets:
        for model in given.models:
            if "search" in parts:
                search(given.folder, model, target)
            for part, measure in (("fresh", fresh), ("own", own)):
                if part in parts:
                    path = given.folder / f"targets-{FILES[part]}-{target}-{model}.json"
                    write(path, measure(given.folder, model, target, given.blocks))
    if "table" in parts:
        new = [
            row
            for target in given.targets
            for model in given.models
            for part in FILES.values()
            for row in read(given.folder / f"targets-{part}-{target}-{model}.json", [])
        ]
        done = set(map(origin, new))
        old = read(RESULTS / "targets.json", {"rows": []})["rows"]
        rows = sorted(new + [r for r in old if origin(r) not in done], key=rank)
        each = {k: " ".join(dict.fromkeys(r[k] for r in rows)) for k in ("model", "target")}
        command = f"python benchmarks/targets.py all --models {each['model']} --targets {each['target']}"
        write_results("targets", command, {"rows": rows}, text)


if __name__ == "__main__":
    main()
