"""What anybody sees: a uniform configuration and a found one of the same bytes: python benchmarks/picture.py
PART ... [--folder DIR] [--models ...] [--uniform usq2h]

search     what the program over damages and the search choose within the bytes of each --uniform scheme
fresh      full precision, the uniform ones and the found ones on five blocks of 128 fresh seeds
table      benchmarks/results/picture.json and picture.md, where models that are not given keep their rows;
           docs/grid.png, of the first model and scheme, of seeds that nothing else uses

Activations at 8 bits, 10 steps, the default space. It continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.graph import layers
from aquabit.scheme_kinds import FP
from benchmarks.common import (
    RESULTS,
    about,
    difference,
    machine,
    mean,
    open_study,
    parsed,
    parser,
    read,
    say,
    spans,
    values_of,
    write,
    write_results,
)

ROOT = Path(__file__).parents[1]
MODELS = ("fashion-dit", "fashion-unet", "emoji-dit")
FRESH = range(501, 506)  # blocks of seeds that nothing else uses
SHOWN = 19_000  # the first seed of the picture; evaluate.py uses those before
METRICS = ("psnr", "fid")
ENDS = ("conv_in", "conv_out", "patch_embed", "proj_out", "time_embed", "class_embed")
SPACE = {"activations": [8]}


def session_of(folder: Path, model: str) -> Any:
    return open_study(folder / f"picture-{model}.db", model, folder / "bank", SPACE, workers=1)


def search(folder: Path, model: str, uniform: Sequence[str]) -> None:
    from aquabit.scheme import Budget
    from aquabit.search.proposals import propose
    from aquabit.search.search import Search
    from aquabit.search.search_options import SearchOptions
    from aquabit.search.winner import choose_winner

    path = folder / f"picture-{model}.json"
    done: dict[str, Any] = read(path)
    with session_of(folder, model) as session:
        session.references(say)
        for name in uniform:
            if name in done:
                continue
            budget = Budget(bytes=int(session.costs(session.space.uniform(name)).bytes))
            found = Search(session, SearchOptions(budget, front=0), say)
            propose(found)
            program = next(c.config for c in found.candidates.values() if c.source == "program")
            winner, _ = choose_winner(found)
            done[name] = {"program": program.to_dict(), "search": winner.to_dict()}
            write(path, done)


def ends_kept(session: Any, scheme: str) -> Any:
    """The uniform configuration whose first and last layers and embeddings stay in full precision, as skip
    lists of other tools have it."""
    config = session.space.uniform(scheme)
    kept = {k for k, node in layers(session.model.graph).items() if node["operator"] in ENDS}
    changed = {k: replace(c, weight=FP) if k in kept else c for k, c in config.layers.items()}
    return replace(config, layers=changed)


def configurations(folder: Path, model: str, session: Any) -> dict[str, Any]:
    """Name -> configuration: "full precision", "uniform usq2h", "ends kept, usq2h", "program usq2h", "search
    usq2h"."""
    from aquabit.scheme import QuantConfig

    found = {"full precision": session.space.full_precision()}
    for name, row in read(folder / f"picture-{model}.json").items():
        found[f"uniform {name}"] = session.space.uniform(name)
        found[f"ends kept, {name}"] = ends_kept(session, name)
        found |= {f"{how} {name}": QuantConfig.from_dict(config) for how, config in row.items()}
    return found


def fresh(folder: Path, model: str) -> list[dict[str, Any]]:
    """Rows of the table, measured where they are not yet."""
    with session_of(folder, model) as session:
        configs = configurations(folder, model, session)
        protocols = [session.protocol.block(b) for b in FRESH]
        session.measure([configs["full precision"]], "reference", say, protocols, "full precision")
        session.measure({c.digest: c for c in configs.values()}.values(), "fresh", say, protocols, "fresh")
        known, rows = values_of(session.study, METRICS), []
        for name, config in configs.items():
            cost = session.costs(config)
            values = {m: [known[config.digest, p.digest][m] for p in protocols] for m in METRICS}
            rows.append(
                {
                    "model": model,
                    "name": name,
                    "bytes": cost.bytes,
                    "bits": cost.bits_per_weight,
                    "machine": about(machine()),
                    **values,
                }
            )
    return rows


def images(folder: Path, model: str, scheme: str) -> dict[str, torch.Tensor]:
    """Title -> images [10, h, w, 1 or 3] of the same seeds, the classes in turn."""
    from aquabit import packing
    from aquabit.pipelines import Adapter, load
    from aquabit.scheme import Protocol

    protocol, made = Protocol(images=10, micro_batch=10, seed=SHOWN), {}
    with session_of(folder, model) as session:
        configs = configurations(folder, model, session)
    for title, name in {
        "full precision": "full precision",
        f"uniform {scheme}": f"uniform {scheme}",
        "found": f"search {scheme}",
    }.items():
        pipe = load(model)
        if name != "full precision":
            pipe = packing.quantize(pipe, configs[name], bank=str(folder / "bank"), accuracy="exact").pipe
        made[title] = Adapter(pipe).images(protocol, range(10)).movedim(1, -1)
    return made


def draw(shown: dict[str, torch.Tensor], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows of images, each with its bits, PSNR and FID beside it."""
    from matplotlib.figure import Figure

    from aquabit.reports import style

    with style.use():
        figure = Figure(figsize=(style.DOUBLE, 1.9))
        axes = figure.subplots(len(shown))
        figure.subplots_adjust(left=0.175, right=1, top=1, bottom=0, hspace=0.04)
        for axis, (title, pictures), row in zip(axes, shown.items(), rows, strict=True):
            axis.imshow(torch.cat(list(pictures), 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            psnr = "" if title == "full precision" else f"\nPSNR {mean(row['psnr'])[0]:.1f} dB"
            bits = "16 bits" if title == "full precision" else f"{row['bits']:.2f} bits"
            axis.text(
                -0.012,
                0.5,
                f"{title}\n{bits}, FID {mean(row['fid'])[0]:.1f}{psnr}",
                transform=axis.transAxes,
                ha="right",
                va="center",
            )
        figure.savefig(path, dpi=170, metadata={"Software": None})


def text(found: dict[str, Any]) -> str:
    places = dict.fromkeys((row["model"], row["machine"]) for row in found["rows"])
    machines = ", ".join(f"{place} (`{model}`)" for model, place in places)
    lines = [
        "# A uniform configuration and a found one of the same bytes",
        "",
        f"`{found['command']}` on {machines}. Activations at 8 bits; five blocks of 128 fresh"
        " seeds, 10 steps; 95 % intervals. FID is of 128 images in the features of the bundled classifier: it"
        ' compares with no other number. PSNR is to full precision, of the same seeds. "Ends kept": the first'
        " and last layers and the embeddings stay in full precision, as skip lists have it.",
        "",
        "| model | configuration | bytes | bits a weight | PSNR [dB] | FID | over uniform [dB] | FID below |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        name = row["name"]
        beside = next(
            (
                r
                for r in found["rows"]
                if (r["model"], r["name"]) == (row["model"], f"uniform {name.split()[-1]}")
            ),
            row,
        )
        same = name == "full precision" or beside is row
        gains = (
            ["", ""]
            if same
            else [
                spans(difference(row["psnr"], beside["psnr"]), 1, "+"),
                spans(difference(beside["fid"], row["fid"]), 1, "+"),
            ]
        )
        psnr = "" if name == "full precision" else spans(mean(row["psnr"]), 1)
        lines.append(
            f"| `{row['model']}` | {name} | {row['bytes']:,.0f} | {row['bits']:.2f} | {psnr} |"
            f" {spans(mean(row['fid']), 1)} | {gains[0]} | {gains[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    made = parser(__doc__, ["search", "fresh", "table", "all"], folder="picture", models=None)
    made.set_defaults(models=list(MODELS))
    made.add_argument("--uniform", nargs="+", default=["usq2h"])
    given = parsed(made)
    parts = {"search", "fresh", "table"} if "all" in given.parts else set(given.parts)
    for model in given.models:
        if "search" in parts:
            search(given.folder, model, given.uniform)
        if {"fresh", "table"} & parts:
            write(given.folder / f"rows-{model}.json", fresh(given.folder, model))
    if "table" in parts:
        rows = [r for m in given.models for r in read(given.folder / f"rows-{m}.json")]
        rows += [r for r in read(RESULTS / "picture.json")["rows"] if r["model"] not in given.models]
        rows.sort(key=lambda r: MODELS.index(r["model"]))
        command = f"python benchmarks/picture.py all --models {' '.join(MODELS)}"
        write_results("picture", f"{command} --uniform {' '.join(given.uniform)}", {"rows": rows}, text)
        model, scheme = given.models[0], given.uniform[0]
        named = {r["name"]: r for r in rows if r["model"] == model}
        chosen = [named[n] for n in ("full precision", f"uniform {scheme}", f"search {scheme}")]
        draw(images(given.folder, model, scheme), chosen, ROOT / "docs" / "grid.png")


if __name__ == "__main__":
    main()
