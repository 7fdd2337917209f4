"""What an answer costs, and what the cheaper one is worth: python benchmarks/cost.py PART ... [--folder DIR]
[--models ...] [--bits ...]

damages    a study with probes of every (layer, scheme), and one with gradients, from the same fits
fresh      the integer program's answers over both, at each budget, on five blocks of fresh seeds
table      benchmarks/results/cost.json and cost.md
fits       CPU seconds a million weights of each kind of scheme on random layers, one thread, beside what
           their matrix products take; into the same files
memory     what a calibrated fit of a wide layer takes at its peak, in copies of its H; into the same files
wanted     what `run --fits wanted` leaves of the additive formats, and what the integer program loses by it
packed     processor seconds of a measurement from decoded and from packed weights, in turns, one thread, and
           how near the images are
layers     processor seconds of all schemes of a model's layers with H, each on its own and with what they
           share made once, in turns (of every --every-th layer)

The first three take an hour on two cores, most of it fits and probes, and continue where they stopped; `fits`
and `memory` take some minutes, and so do `wanted` and `packed`, where little is fitted, and `layers`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import (
    RESULTS,
    about,
    block_values,
    difference,
    machine,
    measured_blocks,
    open_study,
    parsed,
    parser,
    read,
    say,
    section_of,
    sections_of,
    spans,
    write,
    write_results,
)
from benchmarks.cost_layers import layers, layers_table

BITS = (1.6, 2.0, 2.5, 3.0, 3.5)
FRESH = range(201, 206)  # blocks of seeds that nothing else uses
SOURCES = ("probes", "gradients")
SPACE = {"activations": [8]}
FITTED = ("usq4", "usq4h", "usq4g64h", "vq4", "vq4h", "vq4ch", "aq2x6g8", "aq4x4g8")
HELD, WIDE = ("usq4h", "vq4h", "aq2x6k"), 11520  # of the part memory
MEASURED, MEASURED_IMAGES, ROUNDS = ["usq2", "usq4"], 32, 5  # of the part packed
LAYERS = ((1152, 1152), (4608, 1152))  # DiT-XL/2's attention and first feed-forward layers


def session_of(folder: Path, model: str, source: str, name: str = "") -> Any:
    from aquabit.measuring.session import open_session
    from aquabit.measuring.settings import MeasureOptions
    from aquabit.measuring.where import Where
    from aquabit.study import Study

    study = Study(folder / f"{name or source}-{model}.db")
    options = MeasureOptions(space=None if "space" in study else SPACE, damages=source)
    return open_session(model, study, options, Where(workers=1, bank=str(folder / "bank")), progress=say)


def damages(folder: Path, model: str) -> None:
    """Both studies, and the seconds that each took; a third one before them makes the fits."""
    spent: dict[str, float] = read(folder / f"seconds-{model}.json", {})
    for source, name in (("gradients", "fits"), *zip(SOURCES, SOURCES, strict=True)):
        began = time.perf_counter()
        with session_of(folder, model, source, name):
            pass
        spent.setdefault(name, time.perf_counter() - began)
        write(folder / f"seconds-{model}.json", spent)


def answers(folder: Path, model: str, bits: Sequence[float]) -> dict[str, Any]:
    """ "probes 2.0" -> the program's answer over the damages of a source."""
    from aquabit.scheme import Budget
    from aquabit.search.proposals import program_answers
    from aquabit.search.search import Search
    from aquabit.search.search_options import SearchOptions

    found = {}
    for source in SOURCES:
        with session_of(folder, model, source) as session:
            for each in bits:
                search = Search(session, SearchOptions(Budget(bits=each), front=0), say)
                (solved,) = program_answers(search).values()
                found[f"{source} {each:g}"] = solved.choices.config
    return found


def fresh(folder: Path, model: str, bits: Sequence[float]) -> None:
    configs = answers_kept(folder, model, bits)
    with session_of(folder, model, "probes") as session:
        blocks = [session.protocol.block(b) for b in FRESH]
        measured_blocks(session, configs, blocks, ["psnr"])


def answers_kept(folder: Path, model: str, bits: Sequence[float]) -> dict[str, Any]:
    from aquabit.scheme import QuantConfig

    path = folder / f"answers-{model}.json"
    kept = read(path)
    if any(f"{s} {b:g}" not in kept for s in SOURCES for b in bits):
        kept = {name: config.to_dict() for name, config in answers(folder, model, bits).items()}
        write(path, kept)
    return {name: QuantConfig.from_dict(value) for name, value in kept.items()}


def row(folder: Path, model: str, bits: Sequence[float]) -> dict[str, Any]:
    from aquabit.measuring import gradient_damages as g
    from aquabit.measuring.evaluator import PROBE_IMAGES
    from aquabit.study import Study

    known = {s: Study(folder / f"{s}-{model}.db", create=False).features() for s in SOURCES}
    cells = [c for c, v in known["gradients"].items() if "gradient" in v and known["probes"][c]["damage"] > 0]
    own, true = (np.array([known[s][c]["damage"] for c in cells]) for s in ("gradients", "probes"))
    rounded = np.array([c[1] in ("a6", "a8") for c in cells])
    facts = (known["gradients"][c] for c in cells)
    errors = np.array([v.get("output", v.get("error", 0.0)) for v in facts])  # what fits say, for nothing
    found: dict[str, Any] = {
        "model": model,
        "seconds": read(folder / f"seconds-{model}.json"),
        "cells": len(cells),
        "probed": sum("damage" in v and "gradient" not in v for v in known["gradients"].values()),
        "srcc": spearmanr(own, true).statistic,
        "srcc_weights": spearmanr(own[~rounded], true[~rounded]).statistic,
        "srcc_errors": spearmanr(errors[~rounded], true[~rounded]).statistic,
        "budgets": [],
    }
    configs = answers_kept(folder, model, bits)
    with session_of(folder, model, "probes") as session:
        blocks = [session.protocol.block(b) for b in FRESH]
        psnr = {n: v["psnr"] for n, v in block_values(session, configs, blocks, ["psnr"]).items()}
        few = min(PROBE_IMAGES, session.protocol.micro_batch)
        found["passes"] = session.protocol.steps * (g.IMAGES // few) * g.PASSES
    for each in bits:
        probes, gradients = (psnr[f"{s} {each:g}"] for s in SOURCES)
        gap = difference(gradients, probes)
        found["budgets"].append({"bits": each, "probes": probes, "gradients": gradients, "gap": gap})
    return found


def wanted(folder: Path, model: str, bits: Sequence[float]) -> list[dict[str, Any]]:
    """The formats that are worth a fit by the damages of uniform formats alone, beside all of them: the
    program's least damage over both around each budget, by the damages of all."""
    from aquabit.cost import CostModel
    from aquabit.graph import from_json
    from aquabit.scheme import AquabitError, Budget
    from aquabit.search.integer_program import solve
    from aquabit.search.options import activation_choices
    from aquabit.search.worth_fitting import REACH, worth_fitting
    from aquabit.sensitivity.damages import Damages
    from aquabit.space import SearchSpace

    with session_of(folder, model, "gradients") as session:
        space, features = session.space, session.study.features()
        graph = from_json(session.study.get("graph"))

    def least(of: SearchSpace, budget: Budget) -> float | None:
        scores = Damages.of(of, features).scores(activation_choices(of, budget))
        try:
            return solve(scores, CostModel(graph, of), budget).score
        except AquabitError:  # out of reach of what is left
            return None

    def lost(of: SearchSpace, budget: Budget) -> float | None:
        few, every = least(of, budget), least(space, budget)
        return None if few is None or every is None else 10 * float(np.log10(few / every))

    def weights(of: SearchSpace) -> int:
        shapes = dict(zip(of.choices, CostModel(graph, of).shapes, strict=True))
        return sum(int(np.prod(shapes[k])) for k, row in of.choices.items() for s in row if s.additive)

    uniform = {k: v for k, v in features.items() if not k[1].startswith("aq")}
    rows = []
    for each in bits:
        narrow = worth_fitting(space, CostModel(graph, space), uniform, each)
        counts = [sum(s.additive for row in of.choices.values() for s in row) for of in (space, narrow)]
        plain = nearest(space, each, weights, weights(narrow))
        budgets = [Budget(each + shift) for shift in (-REACH, 0.0, REACH)]
        rows.append(
            {
                "model": model,
                "bits": each,
                "offered": counts[0],
                "wanted": counts[1],
                "weights": weights(narrow) / weights(space),
                "lost": [lost(narrow, b) for b in budgets],
                "nearest": [lost(plain, b) for b in budgets],
            }
        )
    return rows


def memory() -> list[dict[str, Any]]:
    """Peak resident memory of fits of 64 rows, beyond what was there before, over the bytes of H."""
    import threading

    from aquabit.quant.weights import quantize_weight

    torch.set_num_threads(1)
    weight, h = torch.randn(64, WIDE // 9, 3, 3), torch.full((WIDE, WIDE), 0.5)
    h.diagonal().fill_(1.01)
    rows = []
    for scheme in HELD:
        before, peak, ended = resident(), [0], threading.Event()

        def watch(peak: list[int] = peak, ended: threading.Event = ended) -> None:
            while not ended.wait(0.01):
                peak[0] = max(peak[0], resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        quantize_weight(weight, scheme, h)
        ended.set()
        watcher.join()
        rows.append({"scheme": scheme, "width": WIDE, "copies": 1 + (peak[0] - before) / h.nbytes})
        say("memory", len(rows), len(HELD))
    return rows


def resident() -> int:
    """Bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## Memory of calibrated fits",
        "",
        f"{about(found['machine'])}. Made by `python benchmarks/cost.py memory`.",
        "",
        f"Copies of H at the peak of a fit of 64 rows of {found['rows'][0]['width']:,} inputs, its own among"
        " them.",
        "",
        "| scheme | copies of H |",
        "|---|---|",
    ]
    return lines + [f"| {r['scheme']} | {r['copies']:.1f} |" for r in found["rows"]]


def nearest(space: Any, bits: float, weights: Callable[[Any], int], most: int) -> Any:
    """The dumbest rival of formats that are worth a fit: those of code bits nearest to the budget, as long as
    no more weights are fitted than ``most``."""
    from dataclasses import replace

    from aquabit.space import without_additive

    far = {(k, s): abs(space.code_bits(k, s) - bits) for k, row in space.choices.items() for s in row}
    found = without_additive(space)
    for distance in sorted({d for (_, s), d in far.items() if s.additive}):
        choices = {
            k: tuple(s for s in row if not s.additive or far[k, s] <= distance)
            for k, row in space.choices.items()
        }
        wider = replace(space, choices=choices)
        if weights(wider) > most:
            break
        found = wider
    return found


def spelled(values: Sequence[float | None]) -> str:
    return ", ".join("out of reach" if d is None else f"{d:.2f}" for d in values)


def wanted_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## Fits on demand",
        "",
        f"{about(found['machine'])}. Made by `python benchmarks/cost.py wanted`.",
        "",
        "Additive formats that `run --fits wanted` fits, of those that the space offers, the share of their",
        "weights, and by how many dB the program's least sum of damages (of gradients: predicted) is",
        "worse than with all formats, a quarter of a bit below the budget, at it, and above. Beside",
        "it what at most as many weights lose where the formats of code bits nearest to the",
        "budget are fitted, without damages.",
        "",
        "| model | bits | (layer, additive format) | of | share of weights | lost below, at, above, dB |"
        " nearest code bits lose, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['model']} | {r['bits']:g} | {r['wanted']} | {r['offered']} | {r['weights']:.2f} |"
        f" {spelled(r['lost'])} | {spelled(r['nearest'])} |"
        for r in found["rows"]
    ]


def product_rate() -> float:
    """Float32 operations a second of one thread in a product of 2048 x 2048 matrices, the median of five."""
    import torch

    square, seconds = torch.randn(2048, 2048), []
    for _ in range(5):
        began = time.process_time()
        square @ square
        seconds.append(time.process_time() - began)
    return float(2 * 2048**3 / np.median(seconds))


def product_operations(weight: Any, scheme: Any, hessian: Any) -> int:
    """Operations of the matrix products in a fit."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from aquabit.quant.weights import quantize_weights

    def added(_: Any, a: Any, b: Any, **others: Any) -> int:
        return int(2 * a[0] * a[1] * a[2] * b[2])

    in_place = {torch.ops.aten.baddbmm_: added}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        quantize_weights([weight], scheme, [hessian])
    return int(counter.get_total_flops())


def fits(schemes: Sequence[str]) -> None:
    """Seconds a million weights, and those of the products alone at the rate of a large one. Each row is
    kept as soon as it is there."""
    import torch

    from aquabit.quant.weights import quantize_weights
    from aquabit.scheme import Scheme
    from benchmarks.additive import synthetic

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for shape in LAYERS:
        weight, hessian = synthetic(shape, quick=True)
        millions = weight.numel() / 1e6
        for text in schemes:
            scheme = Scheme.parse(text)
            h = hessian if scheme.calibrated else None
            operations = product_operations(weight, scheme, h)
            began = time.process_time()
            quantize_weights([weight], scheme, [h])
            seconds, rate = time.process_time() - began, product_rate()
            rows.append(
                {
                    "layer": list(shape),
                    "scheme": text,
                    "seconds": seconds / millions,
                    "products": operations / rate / millions,
                    "gigaflops": rate / 1e9,
                }
            )
            say(f"{text} on {shape[0]} x {shape[1]}", len(rows), len(rows))
            keep("fits", rows)


def fits_table(found: Mapping[str, Any]) -> list[str]:
    rows = found["rows"]
    rate = np.median([r["gigaflops"] for r in rows])
    lines = [
        "",
        "## Fits",
        "",
        f"{about(found['machine'])}. Made by `python benchmarks/cost.py fits`.",
        "",
        "CPU seconds a million weights, one thread, on layers of random weights and falling spectra of",
        "inputs; of these, what the matrix products take at the rate of a product of 2048 x 2048 matrices in",
        f"the same minute (median {rate:.0f} billion float32 operations a second).",
        "",
        "| layer | scheme | s a million weights | its products |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {r['layer'][0]} x {r['layer'][1]} | {r['scheme']} | {r['seconds']:.2f} | {r['products']:.2f} |"
        for r in rows
    ]


def packed(folder: Path, model: str) -> list[dict[str, Any]]:
    """Seconds of the processor that decoded and packed measurements of a few images take, in turns; the
    PSNR of each to full precision, and that of one to the other."""
    from aquabit.measuring.session import uniform_references

    space = {"schemes": MEASURED, "activations": [8]}
    path, rows = folder / f"packed-{model}.db", list[dict[str, Any]]()
    with open_study(path, model, folder / "bank", space, workers=1, images=MEASURED_IMAGES) as session:
        evaluator, protocol = session.here, session.protocol
        for config in uniform_references(session.space):
            scheme = str(next(iter(config.layers.values())).weight)
            if scheme not in MEASURED:
                continue
            seconds: dict[bool, list[float]] = {False: [], True: []}
            psnr = dict[bool, float]()
            for round_ in range(ROUNDS + 1):
                for way, kept in seconds.items():
                    begun = time.process_time()
                    measurement, _ = evaluator.measure(config, protocol, way)
                    if round_:  # the first fits, decodes and makes the images of full precision
                        kept.append(time.process_time() - begun)
                    psnr[way] = measurement.metrics["psnr"]
            images = [evaluator.generate(config, protocol, way) for way in (False, True)]
            apart = float(-10 * torch.log10((images[0] - images[1]).square().mean((1, 2, 3))).mean())
            ratio = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
            rows.append(
                {
                    "model": model,
                    "scheme": scheme,
                    "images": protocol.images,
                    "decoded": float(np.median(seconds[False])),
                    "packed": float(np.median(seconds[True])),
                    "ratio": [float(np.quantile(ratio, q)) for q in (0.5, 0.25, 0.75)],
                    "psnr": [psnr[False], psnr[True]],
                    "apart": apart,
                }
            )
            say(f"{model}, {scheme}", len(rows), len(MEASURED))
    return rows


def packed_table(found: Mapping[str, Any], of: str) -> list[str]:
    lines = [
        "",
        f"## A measurement from packed weights{of}",
        "",
        f"{about(found['machine'])}. Made by `python benchmarks/cost.py packed`: processor seconds of a"
        f" measurement, one thread, medians of {ROUNDS} rounds in turns, with quartiles of the ratio; placing"
        " or packing the weights, and metrics, are in both. PSNR [dB] to full precision, and of one to the"
        " other.",
        "",
        "| model | scheme, a8 | images | decoded, s | packed, s | ratio | PSNR decoded | packed | apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['model']} | {r['scheme']} | {r['images']} | {r['decoded']:.2f} | {r['packed']:.2f} |"
        f" {spans(r['ratio'])} | {r['psnr'][0]:.2f} | {r['psnr'][1]:.2f} | {r['apart']:.1f} |"
        for r in found["rows"]
    ]


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "# What an answer costs",
        "",
        f"{about(results['machine'])}. Made by `{results['command']}`; the default space at a8.",
        "",
        "## Damages: a few backward passes through the sampler instead of a probe of each",
        "",
        "SRCC of the damages that come from gradients with those of probes, of (layer, scheme) and (layer,",
        "activation bits). Backward passes: through one denoiser call of 8 images. Seconds: of probes, and",
        "of gradients, one process, after the fits; loading and tracing are in both. Output errors under H:",
        "what the fits know of the same weights, without a gradient.",
        "",
        "| model | (layer, scheme) | backward passes of 8 | probed | SRCC | of weights alone |"
        " output errors under H | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        spent = " and ".join(f"{r['seconds'][s]:.0f}" for s in SOURCES)
        lines.append(
            f"| {r['model']} | {r['cells']} | {r['passes']} | {r['probed']} | {r['srcc']:.4f} |"
            f" {r['srcc_weights']:.4f} | {r['srcc_errors']:.4f} | {spent} |"
        )
    lines += [
        "",
        "The integer program over both, PSNR in dB to full precision on five blocks of 128 fresh seeds, and",
        "paired differences (95 %).",
        "",
        "| model | bits | probes | gradients | gradients - probes, dB |",
        "|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        lines += [
            f"| {r['model']} | {b['bits']:g} | {np.mean(b['probes']):.2f} | {np.mean(b['gradients']):.2f} |"
            f" {spans(b['gap'], sign='+')} |"
            for b in r["budgets"]
        ]
    if "fits" in results:
        lines += fits_table(results["fits"])
    if "memory" in results:
        lines += memory_table(results["memory"])
    if "wanted" in results:
        lines += wanted_table(results["wanted"])
    for name, of in sections_of("packed", results).items():
        lines += packed_table(results[name], of)
    if "layers" in results:
        lines += layers_table(results["layers"])
    return "\n".join([*lines, ""])


def keep(part: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write them beside what the other parts found, on whatever machine that was."""
    whole = read(RESULTS / "cost.json") | {part: {"machine": machine(), "rows": rows}}
    write(RESULTS / "cost.json", whole)
    (RESULTS / "cost.md").write_text(table(whole))


def main() -> None:
    parts = ("damages", "fresh", "table", "fits", "memory", "wanted", "packed", "layers")
    made = parser(__doc__, parts, "cost-study")
    made.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    made.add_argument("--schemes", nargs="+", default=list(FITTED), help="of the part fits")
    made.add_argument("--every", type=int, default=1, help="of the part layers")
    given = parsed(made)
    for model in given.models:
        if "damages" in given.parts:
            damages(given.folder, model)
        if "fresh" in given.parts:
            fresh(given.folder, model, given.bits)
    if "table" in given.parts:
        rows = [row(given.folder, model, given.bits) for model in given.models]
        found = read(RESULTS / "cost.json") | {"rows": rows}
        write_results("cost", "python benchmarks/cost.py damages fresh table", found, table)
    if "fits" in given.parts:
        fits(given.schemes)
    if "memory" in given.parts:
        keep("memory", memory())
    if "wanted" in given.parts:
        keep("wanted", [r for model in given.models for r in wanted(given.folder, model, given.bits)])
    if "packed" in given.parts:
        torch.set_num_threads(1)
        keep(section_of("packed"), [r for model in given.models for r in packed(given.folder, model)])
    if "layers" in given.parts:
        torch.set_num_threads(1)
        keep("layers", [r for model in given.models for r in layers(given.folder, model, given.every)])


if __name__ == "__main__":
    main()
