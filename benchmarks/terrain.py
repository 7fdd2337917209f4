"""What bits do to a model that somebody else trained: python benchmarks/terrain.py PART ... [--folder DIR]

kinds      weights rounded to nearest (range of each output channel) at 8, 6, 4 and 3 bits, in all layers and
           in one kind of layer at a time; activations in full precision
search     what the program over damages and the search choose within the bytes of a uniform configuration of
           4 and of 3 bits (usq), activations at 8 bits
program    the program alone, over damages of plain usq, activations in full precision; its answer also with
           output-aware fits
fresh      uniform ones and what was found, on blocks of fresh seeds
table      benchmarks/results/terrain.json and terrain.md

The model is examples/terrain (which says what to install). Its quality is the PSNR to its own full-precision
height fields as grey levels. It takes an hour on two cores, and continues where it stopped.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "terrain"))
import terrain

import aquabit
from aquabit.graph import layers
from aquabit.quality import paired
from aquabit.scheme import Budget, Protocol, QuantConfig, Scheme
from benchmarks.common import (
    RESULTS,
    about,
    difference,
    machine,
    mean,
    parser,
    read,
    say,
    spans,
    values_of,
    write,
    write_results,
)

BITS = (8, 6, 4, 3)
IMAGES = 16  # of a block
FRESH = range(401, 406)  # blocks of seeds that nothing else uses
SCHEMES = ["usq2h", "usq3h", "usq4h", "usq6h", "usq8h"]
PLAIN = [s.removesuffix("h") for s in SCHEMES]
BUDGETS = ("usq4", "usq3")  # whose bytes a search may spend
PROTOCOL = Protocol(images=IMAGES, steps=1, micro_batch=8, objective="psnr")


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Each output channel rounded to 2^bits levels between its smallest and largest weight."""
    rows = weight.flatten(1)
    low, high = rows.min(1, keepdim=True).values, rows.max(1, keepdim=True).values
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return (((rows - low) / step).round() * step + low).view_as(weight)


def rounded(model: aquabit.Model, names: Collection[str], bits: int) -> nn.Module:
    """A copy of the network with some layers' weights rounded to nearest."""
    network = copy.deepcopy(model.denoiser)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name in names:
            weight: Any = modules[name].weight
            weight.copy_(nearest(weight, bits))
    return network


def images(model: aquabit.Model, network: nn.Module, block: int) -> Tensor:
    seeds = range(PROTOCOL.block(block).seed, PROTOCOL.block(block).seed + IMAGES)
    assert model.conditions
    every = [model.conditions[i % len(model.conditions)] for i in range(IMAGES)]
    with torch.no_grad():
        parts = [
            terrain.sample(network, list(seeds[i : i + 8]), every[i : i + 8]) for i in range(0, IMAGES, 8)
        ]
    return torch.cat(parts)


def kinds(folder: Path) -> None:
    """Case -> PSNR on each block."""
    model, path = terrain.terrain_model(), folder / "kinds.json"
    of_kind: dict[str, list[str]] = {"all layers": []}
    for name, node in layers(aquabit.trace(model)).items():
        of_kind["all layers"].append(name)
        of_kind.setdefault(node["operator"], []).append(name)
    found = read(path)
    full = {block: images(model, model.denoiser, block) for block in FRESH}
    for kind, names in of_kind.items():
        for bits in BITS if kind == "all layers" else (3,):
            key = f"{kind}, {bits} bits"
            if key not in found:
                network = rounded(model, names, bits)
                values = [
                    paired.psnr_from_mse(paired.mse(images(model, network, b), full[b])).mean() for b in FRESH
                ]
                found[key] = {"layers": len(names), "psnr": [float(v) for v in values]}
                write(path, found)
                print(key, f"{values[0]:.2f} dB", flush=True)


def session_of(folder: Path, act: int) -> Any:
    from aquabit.measuring.session import open_session
    from aquabit.measuring.settings import MeasureOptions
    from aquabit.measuring.where import Where
    from aquabit.study import Study

    schemes = [*SCHEMES, *BUDGETS] if act == 8 else PLAIN
    options = MeasureOptions(PROTOCOL, {"schemes": schemes, "activations": [act]})
    where = Where(workers=1, bank=str(folder / "bank"))
    study = Study(folder / ("terrain.db" if act == 8 else f"terrain-a{act}.db"))
    return open_session(terrain.terrain_model(), study, options, where, progress=say)


def budget_of(session: Any, name: str) -> Budget:
    return Budget(bytes=int(session.costs(session.space.uniform(name)).bytes))


def solved(folder: Path, act: int = 16) -> None:
    """What the program chooses, activations at ``act``."""
    from aquabit.search.integer_program import solve
    from aquabit.sensitivity.damages import damages_of

    path = folder / f"found-a{act}.json"
    with session_of(folder, act) as session:
        damages = damages_of(session)
        assert damages is not None
        scores = damages.scores((act,))
        found = {n: solve(scores, session.costs, budget_of(session, n)).choices.config for n in BUDGETS}
    write(
        path,
        {
            name: {"program": config.to_dict(), "program, output-aware": aware(config).to_dict()}
            for name, config in found.items()
        },
    )


def aware(config: QuantConfig) -> QuantConfig:
    """The same bits, fitted output-aware."""
    layers = {k: replace(c, weight=Scheme.parse(f"{c.weight}h")) for k, c in config.layers.items()}
    return replace(config, layers=layers)


def search(folder: Path) -> None:
    from aquabit.search.proposals import propose
    from aquabit.search.search import Search
    from aquabit.search.search_options import SearchOptions
    from aquabit.search.winner import choose_winner

    path = folder / "found-a8.json"
    done: dict[str, Any] = read(path)
    with session_of(folder, 8) as session:
        session.references(say)
        for name in BUDGETS:
            if "search" in done.get(name, {}):
                continue
            found = Search(session, SearchOptions(budget_of(session, name), front=0), say)
            propose(found)
            program = next(c.config for c in found.candidates.values() if c.source == "program")
            done[name] = {"program": program.to_dict()}
            write(path, done)
            winner, _ = choose_winner(found)
            done[name]["search"] = winner.to_dict()
            write(path, done)


def fresh(folder: Path) -> None:
    """Rows of the table: name, activation bits, bytes, bits per weight, PSNR on each block."""
    rows: list[dict[str, Any]] = []
    for act in (16, 8):
        if not (folder / f"found-a{act}.json").exists():
            continue
        with session_of(folder, act) as session:
            protocols, space = [session.protocol.block(b) for b in FRESH], session.space
            uniform = (*BUDGETS, *SCHEMES) if act == 8 else (*BUDGETS, "usq4h", "usq6", "usq8")
            configs = {f"uniform {s}": space.uniform(s, act) for s in uniform}
            for name, found in read(folder / f"found-a{act}.json").items():
                at = f"at the bytes of {name}"
                configs |= {f"{how} {at}": QuantConfig.from_dict(c) for how, c in found.items()}
            session.measure([space.full_precision()], "reference", say, protocols, "full precision")
            session.measure(
                {c.digest: c for c in configs.values()}.values(), "fresh", say, protocols, "fresh"
            )
            known = values_of(session.study, ("psnr",))
            for name, config in configs.items():
                cost = session.costs(config)
                psnr = [known[config.digest, p.digest]["psnr"] for p in protocols]
                sizes = {"bytes": cost.bytes, "bits": cost.bits_per_weight}
                rows.append({"name": name, "act": act, **sizes, "psnr": psnr})
    write(folder / "fresh.json", rows)


def text(found: dict[str, Any]) -> str:
    lines = [
        "# A model that somebody else trained",
        "",
        f"`{found['command']}` on {about(found['machine'])}. Adaptive-Diffusion-Terrain"
        " ([examples/terrain](../../examples/terrain/terrain.py)): 255 layers, 10.4 million weights, one"
        f" step. PSNR [dB] to its full-precision height fields, {len(FRESH)} blocks of {IMAGES} fresh seeds;"
        " 95 % intervals.",
        "",
    ]
    if found["fresh"]:
        lines += ["| | bytes | bits a weight | PSNR |", "|---|---|---|---|"]
    for row in found["fresh"]:
        lines.append(
            f"| {row['name']}, a{row['act']} | {row['bytes']:,.0f} | {row['bits']:.2f} |"
            f" {spans(mean(row['psnr']), 1)} |"
        )
    where = found.get("kinds_on", about(found["machine"]))
    lines += ["", "Rounded to nearest in the range of each channel, activations in full precision"]
    lines[-1] += f" (on {where}):"
    lines += [""]
    lines += ["| what is rounded | layers | PSNR |", "|---|---|---|"]
    for name, row in found["kinds"].items():
        lines.append(f"| {name} | {row['layers']} | {spans(mean(row['psnr']), 1)} |")
    four = found["kinds"]["all layers, 4 bits"]["psnr"]
    for row in found["fresh"]:
        if row["name"].endswith(" at the bytes of usq4"):
            above, how = spans(difference(row["psnr"], four), 1, "+"), row["name"].split(" at ")[0]
            lines += ["", f"The {how}, a{row['act']}, above rounding to nearest at 4 bits: {above} dB."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parts = {"kinds": kinds, "search": search, "program": solved, "fresh": fresh}
    made = parser(__doc__, [*parts, "table", "all"])
    made.add_argument("--folder", type=Path, default=Path("bench-terrain"))
    given = made.parse_args()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for part in parts if "all" in given.parts else given.parts:
        if part in parts:
            parts[part](folder)
    if {"table", "all"} & set(given.parts):
        old = read(RESULTS / "terrain.json")
        kept = {"kinds": old.get("kinds"), "kinds_on": old.get("kinds_on") or about(old["machine"])}
        made_here = {"kinds": read(folder / "kinds.json"), "kinds_on": about(machine())}
        found = {**(made_here if made_here["kinds"] else kept), "fresh": read(folder / "fresh.json")}
        ran = "all" if found["fresh"] else "kinds table"
        write_results("terrain", f"python benchmarks/terrain.py {ran}", found, text)


if __name__ == "__main__":
    main()
