"""The claims once more, on harder models: python benchmarks/fashion.py PART ... [--folder DIR] [--models ...]

rivals       what other methods choose from the same fitted weights within the bytes of uniform usq2h and
             usq3h, beside the program and the search of benchmarks/picture.py, whose folder this needs
effects      the ranking by damages beside real swaps (usq4h to usq2h) of every layer in good contexts
correction   PTQD's corrections of noise
steps        activation bits by step at equal BOPs
finetune     uniform usq2h, layer-wise and tuned
seconds      one measurement of 128 images, 10 steps, on one thread, packed and with decoded weights
table        benchmarks/results/fashion.json and fashion.md, where what is not measured anew keeps its rows

The same functions as on the digits (rivals.py, effects.py, correction.py, step_bits.py), with fewer images.
It continues where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from aquabit.kernels.backends.decode import decode_levels
from benchmarks.common import (
    RESULTS,
    about,
    difference,
    machine,
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
from benchmarks.picture import MODELS, session_of

BUDGETS = ("usq2h", "usq3h")  # whose bytes are the limit
RIVALS = ("modelopt, fisher", "aimet", "greedy", "sdnq", "uniform aq")
METRICS = ("psnr", "fid")
FRESH = range(511, 516)  # blocks of seeds that nothing else uses
IMAGES = 64  # a block
CONTEXTS, CONTEXT_IMAGES, FIRST_CONTEXT = 2, 32, 521
TUNING_STEPS = 250
TIMED, TIMED_IMAGES = ("usq4", "usq3", "usq2"), 128
BITS, SWAP = 3.0, "usq4h:usq2h"  # of the effects
Rows = list[dict[str, Any]]


def kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """A value of a JSON file, made where it is missing."""
    found = read(path)
    if key not in found:
        found = read(path) | {key: make()}
        write(path, found)
    return found[key]


def rivals(folder: Path, model: str) -> Rows:
    """What each method chooses, on the fresh seeds."""
    from aquabit.scheme import QuantConfig
    from benchmarks import rivals as others
    from benchmarks.rivals_searches import exact, falling

    path, ours = folder / f"rivals-{model}.json", read(folder / f"picture-{model}.json")
    with session_of(folder, model) as session:
        chooser, space = others.Rivals(session, folder, model), session.space

        def choose(name: str, bits: float) -> Any:
            if name == "modelopt, fisher":
                table = falling(chooser.gradients(others.LOSSES[name]), chooser.costs)
                return chooser.config(exact(table, chooser.costs, bits))
            return chooser.of(name, bits)

        configs: dict[str, Any] = {"full precision": space.full_precision()}
        for budget in BUDGETS:
            bits = session.costs(space.uniform(budget)).bits_per_weight
            configs[f"uniform {budget}: {budget}"] = space.uniform(budget)
            for name in ("program", "search"):
                configs[f"{name}: {budget}"] = QuantConfig.from_dict(ours[budget][name])
            for name in RIVALS:

                def chosen(name: str = name, bits: float = bits) -> Any:
                    found = choose(name, bits)
                    return None if found is None else found.to_dict()

                found = kept(path, f"{name}: {budget}", chosen)
                if found is not None:
                    configs[f"{name}: {budget}"] = QuantConfig.from_dict(found)
                print(f"{model}: {name} at {bits:.2f} bits", flush=True)
        protocols = [replace(session.protocol.block(b), images=IMAGES) for b in FRESH]
        found = measured_blocks(session, configs, protocols, METRICS)
        return [{"name": n, "bits": session.costs(c).bits_per_weight, **found[n]} for n, c in configs.items()]


def effects(folder: Path, model: str) -> dict[str, Any]:
    """SRCC of the differences of damages with what swaps really worsened, in dB of PSNR; the truth's
    reliability between halves of its contexts."""
    from aquabit.sensitivity.damages import damages_of, good_contexts
    from aquabit.sensitivity.effects.context_effects import swapped
    from aquabit.sensitivity.surrogate.scores import srcc
    from benchmarks.common import values_of
    from benchmarks.effects import gain, swapped_players

    worse: list[list[float]] = []
    with session_of(folder, model) as session:
        space, costs, damages = session.space, session.costs, damages_of(session)
        assert damages is not None
        players = swapped_players(space)
        for k in range(CONTEXTS):
            protocol = replace(session.protocol.block(FIRST_CONTEXT + k), images=CONTEXT_IMAGES)
            context = good_contexts(damages, costs, BITS, 1, np.random.default_rng([FIRST_CONTEXT, k]))
            configs = swapped(context, players).configs()
            session.measure([space.full_precision()], "reference", say, [protocol], "full precision")
            session.measure(configs, "flip", say, [protocol], f"{model}, context {k + 1}")
            known = values_of(session.study, ("psnr",), failed=False)
            values = [known[c.digest, protocol.digest]["psnr"] for c in configs]
            worse.append([b - a for b, a in zip(values[::2], values[1::2], strict=True)])
    column, rows = {s: j for j, s in enumerate(space.schemes)}, [p.column for p in players]
    before, after = (
        damages.weights[rows, [column[getattr(p, e)] for p in players]] for e in ("before", "after")
    )
    real, halves = np.mean(worse, 0), [np.mean(rows, 0) for rows in (worse[:1], worse[1:])]
    known_of = session.study.features()
    alone = {
        what: np.array(
            [known_of[p.layer, str(p.after)][what] - known_of[p.layer, str(p.before)][what] for p in players]
        )
        for what in ("error", "output")
    }
    worst = sorted(zip((p.layer for p in players), real.tolist(), strict=True), key=lambda r: -r[1])
    return {
        "layers": len(players),
        "halves": srcc(*halves),
        "damages": srcc(after - before, real),
        **{what: srcc(value, real) for what, value in alone.items()},
        "gain": {what: gain(after - before, value, real) for what, value in alone.items()},
        "worst": worst[:5],
        "median": float(np.median(real)),
    }


def compared(values: Mapping[str, Mapping[str, Sequence[float]]], base: str) -> Rows:
    """Rows name, metrics on each block, beside the row that each is compared with."""
    return [{"name": n, "beside": base, **v} for n, v in values.items()]


def correction(folder: Path, model: str) -> Rows:
    """usq3 and usq2h at 8 and 6 bits of activations, DDIM with and without noise of its own."""
    space = {"schemes": ["usq2h", "usq3", "usq3h"], "levels": [], "activations": [8, 6]}
    rows: Rows = []
    with open_study(folder / f"correction-{model}.db", model, folder / "bank", space, 1) as session:
        for eta in (0.0, 1.0):
            protocols = [replace(session.protocol.block(b), images=IMAGES, eta=eta) for b in FRESH]
            for scheme, act in (("usq3", 6), ("usq2h", 8)):
                base = session.space.uniform(scheme, act)
                configs = {"full precision": session.space.full_precision()}
                configs |= {k or "none": replace(base, correction=k) for k in (None, "cnc+bc")}
                found = measured_blocks(session, configs, protocols, METRICS)
                about_ = {"eta": eta, "weights": scheme, "act": act}
                rows += [{**about_, **row} for row in compared(found, "none")]
                print(model, about_, "done", flush=True)
    return rows


def steps(folder: Path, model: str) -> Rows:
    """The controls of benchmarks/step_bits.py at 5 bits of activations on average, a4 and a6."""
    from benchmarks import step_bits

    space = {"schemes": [step_bits.WEIGHTS], "levels": [], "activations": [8, 6, 4]}
    with open_study(folder / f"steps-{model}.db", model, folder / "bank", space, 1) as session:
        configs = {"full precision": session.space.full_precision()}
        configs |= step_bits.patterns(session, 5.0, 4, 6)
        protocols = [replace(session.protocol.block(b), images=IMAGES) for b in FRESH]
        return compared(measured_blocks(session, configs, protocols, METRICS), "uniform")


def finetune(folder: Path, model: str) -> Rows:
    """Uniform usq2h as it is fitted layer by layer, and tuned."""
    from aquabit.pipelines import replay_recorder
    from aquabit.quant.finetuning.finetune import FineTuning, code_bits
    from aquabit.quant.finetuning.finetune import finetune as tune
    from aquabit.scheme import QuantConfig

    with session_of(folder, model) as session:
        start = session.space.uniform("usq2h")

        def make() -> dict[str, Any]:
            quantized = session.here.quantized
            settings = replace(FineTuning(), steps=TUNING_STEPS).resolved(code_bits(quantized, start))
            tuned = tune(quantized, start, replay_recorder(session.here.pipe), settings, say)
            facts = {k: getattr(tuned, k) for k in ("before", "after", "changed", "seconds")}
            return {"config": tuned.config.to_dict(), "settings": asdict(settings), **facts}

        tuned = kept(folder / f"tuned-{model}.json", "tuned", make)
        configs = {"full precision": session.space.full_precision(), "layer-wise": start}
        configs["tuned"] = QuantConfig.from_dict(tuned["config"])
        protocols = [replace(session.protocol.block(b), images=IMAGES) for b in FRESH]
        rows = compared(measured_blocks(session, configs, protocols, METRICS), "layer-wise")
        return [{**row, "seconds": tuned["seconds"]} for row in rows]


def seconds(folder: Path, model: str) -> dict[str, Any]:
    """Seconds of a measurement once its weights are fitted and full precision's images are there: the median
    of configurations."""
    space = {"schemes": list(TIMED), "levels": [], "activations": [8]}
    found: dict[str, Any] = {"processor": f"{machine()['cpu']} ({next(iter(decode_levels()), 'reference')})"}
    with open_study(folder / f"seconds-{model}.db", model, folder / "bank", space, 1) as session:
        protocol = replace(session.protocol, images=TIMED_IMAGES)
        session.here.measure(session.space.uniform(TIMED[0], 8), protocol)
        for way in ("packed", "decoded"):
            took = []
            for scheme in TIMED:
                config = session.space.uniform(scheme, 8)
                session.here.measure(config, replace(protocol, images=8), packed=way == "packed")
                begin = time.perf_counter()
                session.here.measure(config, protocol, packed=way == "packed")
                took.append(time.perf_counter() - begin)
            found[way] = sorted(took)[len(took) // 2]
    print(model, found, flush=True)
    return found


PARTS: dict[str, Callable[[Path, str], Any]] = {
    "rivals": rivals,
    "effects": effects,
    "correction": correction,
    "steps": steps,
    "finetune": finetune,
    "seconds": seconds,
}


def beside(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    """PSNR, FID and what they are above those of ``base``, paired over blocks: four cells."""
    psnr = "" if row["name"] == "full precision" else spans(mean(row["psnr"]), 1)
    own = f"{psnr} | {spans(mean(row['fid']), 1)}"
    if base is None or base is row or not psnr:
        return f"{own} | |"
    over = {m: difference(row[m], base[m]) for m in METRICS}
    return f"{own} | {spans(over['psnr'], 1, '+')} | {spans(over['fid'], 1, '+')}"


def rival_table(found: Mapping[str, Rows]) -> list[str]:
    lines = ["| model | within the bytes of | choice | bits | PSNR | FID | PSNR over ours | FID over ours |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model, rows in found.items():
        ours = {r["name"].split(": ")[1]: r for r in rows if r["name"].startswith("search: ")}
        for row in rows:
            name, _, budget = row["name"].partition(": ")
            cells = beside(row, ours.get(budget))
            lines.append(f"| `{model}` | {budget} | {name} | {row['bits']:.2f} | {cells} |")
    return lines


def effect_table(found: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| model | layers | halves of the truth | damages | error of the weights | error of the outputs |"
        " damages over error of the outputs, 95 % | median, worst swap [dB] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, row in found.items():
        scores = " | ".join(f"{row[k]:.2f}" for k in ("halves", "damages", "error", "output"))
        low, high = row["gain"]["output"]
        name, worst = row["worst"][0]
        lines.append(
            f"| `{model}` | {row['layers']} | {scores} | {low:+.2f} to {high:+.2f} |"
            f" {row['median']:.2f}, {worst:.1f} (`{name}`) |"
        )
    return lines


def pair_table(found: Mapping[str, Rows], keys: Mapping[str, str]) -> list[str]:
    """One row a configuration; ``keys``: a heading and the key of what stands before its name."""
    heads = " | ".join(["model", *keys, "configuration", "PSNR", "FID"])
    lines = [f"| {heads} | PSNR over the first | FID over the first |", "|---" * (len(keys) + 6) + "|"]
    for model, rows in found.items():
        for row in rows:
            same = [r for r in rows if all(r[k] == row[k] for k in keys.values())]
            base = next(r for r in same if r["name"] == row["beside"])
            about_ = "".join(f" {row[k]} |" for k in keys.values())
            lines.append(f"| `{model}` |{about_} {row['name']} | {beside(row, base)} |")
    return lines


def sections(found: dict[str, Any]) -> dict[str, list[str]]:
    """Part -> its heading, what is to be said, and its table."""
    took = [f"{m} {rows[-1]['seconds']:.0f} s" for m, rows in found["finetune"].items()]
    return {
        "rivals": [
            "## What methods choose from the same fitted weights",
            "Activations at 8 bits, the default space. The methods are those of [rivals.md](rivals.md):"
            " `program` solves over our damages of single layers, `search` is what `aquabit search` ends"
            " with,"
            " `modelopt, fisher` are NVIDIA ModelOpt's scores (of the output with noise) solved exactly,"
            " `aimet`, `greedy` and `sdnq` the orders and the threshold of those tools, `uniform aq` the"
            " additive level of least predicted damage for all layers.",
            *rival_table(found["rivals"]),
        ],
        "effects": [
            "## Which layers hurt",
            f"SRCC over layers with what {SWAP.replace(':', ' to ')} really worsens, in dB of PSNR, in"
            f" {CONTEXTS} good configurations of {BITS:g} bits, {CONTEXT_IMAGES} images each. Halves: one"
            " context beside the other. The ranking by damages of single layers, and two that need no"
            " images.",
            *effect_table(found["effects"]),
        ],
        "correction": [
            "## Correction of noise",
            "",
            *pair_table(found["correction"], {"eta": "eta", "weights": "weights", "activations": "act"}),
        ],
        "steps": [
            "## Bits of activations by step",
            "`usq4h`, at equal BOPs: 5 bits on average, of 4 and 6.",
            *pair_table(found["steps"], {}),
        ],
        "finetune": [
            "## Fine-tuning",
            f"Uniform `usq2h`, a8, {TUNING_STEPS} steps ({', '.join(took)} on one thread, shared cores).",
            *pair_table(found["finetune"], {}),
        ],
        "seconds": [
            "## Seconds of a measurement",
            f"One configuration (everything at {', '.join(f'`{s}`' for s in TIMED)}, a8; the median),"
            f" {TIMED_IMAGES} images, 10 steps, one thread; weights fitted and full precision's images made"
            " before.",
            "| model | processor | packed | decoded |",
            "|---|---|---|---|",
            *(
                f"| `{m}` | {row['processor']} | {row['packed']:.1f} s | {row['decoded']:.1f} s |"
                for m, row in found.get("seconds", {}).items()
            ),
        ],
    }


def text(found: dict[str, Any]) -> str:
    lines = [
        "# The claims once more, on harder models",
        "",
        f"`{found['command']}` on {about(found['machine'])}. 10 steps; five blocks of {IMAGES}"
        " images of fresh seeds; differences are paired; 95 % intervals. PSNR [dB] is to full precision, of"
        " the same seeds. FID is of so few images in the features of the bundled classifier: it compares"
        " within a table alone.",
    ]
    for part, (heading, said, *table) in sections(found).items():
        if found.get(part):
            lines += ["", heading, "", *([said, ""] if said else []), *table]
    return "\n".join(lines) + "\n"


def main() -> None:
    made = parser(__doc__, [*PARTS, "all", "table"], folder="picture", models=None)
    made.set_defaults(models=list(MODELS))
    given = parsed(made)
    for part in PARTS if "all" in given.parts else given.parts:
        for model in given.models:
            if part in PARTS:
                write(given.folder / f"fashion-{part}-{model}.json", PARTS[part](given.folder, model))
    if {"table", "all"} & set(given.parts):
        old = read(RESULTS / "fashion.json")
        found: dict[str, dict[str, Any]] = {}
        for part in PARTS:
            files = {m: given.folder / f"fashion-{part}-{m}.json" for m in given.models}
            new = {m: read(file) for m, file in files.items() if file.exists()}
            rows = old.get(part, {}) | new
            found[part] = {m: rows[m] for m in MODELS if m in rows}
        ran = " ".join(part for part in PARTS if found[part])
        models = " ".join(m for m in MODELS if any(m in rows for rows in found.values()))
        command = f"python benchmarks/fashion.py {ran} table --models {models}"
        write_results("fashion", command, found, text)


if __name__ == "__main__":
    main()
