"""Which pipeline classes of diffusers work, on tiny pipelines of the real classes.

Run as ``python -m benchmarks.families [CLASS ...]``: every class of text to image, text to video, image to
image, inpainting, edits, image to video and the like of which a tiny random pipeline is made here goes
through the whole of it (images in full precision, quantized to uniform usq4 at a8, packed, saved and loaded
again, the same images), or what refuses it is said.
``python -m benchmarks.families flow [NAME ...]`` takes the seconds of a family's whole flow, from a folder to
images of the packed pipeline that was loaded again. Both write benchmarks/results/families.{json,md}, and
keep rows that are not named.
"""

from __future__ import annotations

import ast
import inspect
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging

import aquabit
from aquabit.graph import layers
from aquabit.pipelines import family, trace
from aquabit.scheme import AquabitError, Protocol
from aquabit.study import Study
from benchmarks.common import RESULTS, read, write_results
from tests.tiny_inputs import WITH_PICTURES, from_pictures
from tests.tiny_pipelines import PROMPTED, PROMPTS, TINY_PIPELINES, UNGUIDED, randomised, tiny
from tests.tiny_recent import RECENT, VIDEO
from tests.tiny_variants import IN_MEMORY, VARIANTS, VIDEOS
from tests.whole import works_whole

VALUES = Path(aquabit.__file__).parent / "pipelines" / "family.py"
COMMAND = "python -m benchmarks.families"


def lines_of(name: str) -> int:
    """Lines of the entry of FAMILIES with this name: all the code there is of a family alone."""
    for node in ast.walk(ast.parse(VALUES.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Family":
            first = node.args[0]
            if isinstance(first, ast.Constant) and first.value == name:
                return (node.end_lineno or node.lineno) - node.lineno + 1
    return 0


# ---- classes


def makers() -> dict[str, Callable[[], Any]]:
    """Every tiny pipeline, by what it is called in the table."""
    return {**TINY_PIPELINES, **RECENT, **VARIANTS, **WITH_PICTURES}


def protocol_of(name: str, pipe: Any, folder: Path) -> Protocol:
    """Two samples of a tiny pipeline, guided where it takes guidance, at its small size, from pictures where
    it is one of those that take them."""
    if name in WITH_PICTURES:
        return from_pictures(name, pipe, folder)
    takes = inspect.signature(type(pipe).__call__).parameters
    own = name in ("hidream", *TINY_PIPELINES) and name not in ("flux", "auraflow")
    return Protocol(
        images=2,
        steps=4 if name == "PNDMPipeline" else 2,
        micro_batch=2,
        guidance=3.0 if "guidance_scale" in takes else 1.0,
        resolution=None if own or "height" not in takes else 16 if name in TINY_PIPELINES else 32,
        conditions=PROMPTS if "prompt" in takes else None,
        frames=9 if name in (*VIDEO, *VIDEOS) else None,
    )


def tried(name: str, make: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """Whether a class works whole; else what is said, and whether as one sentence."""
    pipe = randomised(make)
    entry, started = family(pipe), time.process_time()
    row = {
        "name": name,
        "pipeline": type(pipe).__name__,
        "entry": entry.name if entry else "",
        "lines": lines_of(entry.name) if entry else 0,
    }
    try:
        found = works_whole(
            pipe, protocol_of(name, pipe, folder), folder, name not in (*IN_MEMORY, "hidream")
        )
        if found.same > 1e-5:
            raise AssertionError(f"the packed pipeline makes other images once loaded, by {found.same:.2g}")
    except AquabitError as refusal:
        said = {"outcome": "refused", "said": str(refusal).replace(str(folder), "")}
    except Exception as fault:  # a fault of ours or of the class: the table shows it
        said = {"outcome": "fails", "said": f"{type(fault).__name__}: {fault}"}
    else:
        said = {"outcome": "works", "layers": found.layers, "psnr": round(found.psnr, 1)}
    return {**row, **said, "cpu_seconds": round(time.process_time() - started, 1)}


def not_tried(rows: list[dict[str, Any]]) -> list[str]:
    """Classes of diffusers that make images or videos of text alone and of which no tiny pipeline is made."""
    made, found = {r["pipeline"] for r in rows}, list[str]()
    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline") or name.startswith(("Auto", "Flax", "Onnx")) or name in made:
            continue
        cls: Any = getattr(diffusers, name)
        call = inspect.signature(cls.__call__).parameters if isinstance(cls, type) else {}
        needed = [
            k for k, p in call.items() if p.default is p.empty and k not in ("self", "kwargs", "prompt")
        ]
        others = (
            "audio",
            "Audio",
            "Img2Img",
            "Inpaint",
            "ControlNet",
            "Edit",
            "Music",
            "LM",
            "Gemma",
            "LLaDA",
        )
        if "prompt" in call and not needed and "output_type" in call and not any(o in name for o in others):
            found.append(name)
    return found


# ---- the whole flow


def flow(name: str, folder: Path) -> dict[str, Any]:
    """Seconds of each part of the flow, measured from a saved pipeline to images of the packed one that
    was loaded again."""
    pipe = randomised(RECENT[name]) if name in RECENT else tiny(name)
    known, model, bank = family(pipe), str(folder / "model"), str(folder / "bank")
    pipe.save_pretrained(model)
    protocol = Protocol(
        images=4,
        steps=2,
        micro_batch=4,
        objective="psnr",
        guidance=1.0 if name in UNGUIDED else 3.0,
        conditions=PROMPTS if name in PROMPTED or name in RECENT else None,
        resolution=32 if name in RECENT else 16 if name in ("flux", "auraflow") else None,
        frames=9 if name in VIDEO else None,
    )
    seconds: dict[str, float] = {}
    started, cpu = time.perf_counter(), time.process_time()

    def part(what: str) -> None:
        nonlocal started
        seconds[what] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    graph = trace(aquabit.load(model))
    part("inspect")
    study = Study(folder / "S.db")
    aquabit.measure(
        model,
        study,
        24,
        protocol=protocol,
        space={"schemes": ["usq4", "usq2"], "activations": [8]},
        bank=bank,
        sample_seed=1,
    )
    part("measure")
    aquabit.explain(study, bits=4.2)
    part("explain")
    front = aquabit.find(study, bits=4.2, rounds=1, bank=bank)
    part("search")
    aquabit.quantize(model, front.best, bank=bank).save(folder / "packed")
    part("quantize")
    aquabit.generate(
        str(folder / "packed"),
        2,
        steps=2,
        conditions=protocol.conditions,
        resolution=protocol.resolution,
        frames=protocol.frames,
    )
    part("reload and generate")
    entry = known.name if known else "none: generic"
    return {
        "family": name,
        "pipeline": type(pipe).__name__,
        "entry": entry,
        "lines": lines_of(entry),
        "layers": len(layers(graph)),
        "seconds": round(sum(seconds.values()), 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "parts": seconds,
    }


# ---- what is written


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kept = read(RESULTS / "families.json", {})
    flows = {r["family"]: r for r in kept.get("rows", [])}
    classes = {r["name"]: r for r in kept.get("classes", [])}
    whole, every = names[:1] == ["flow"], makers()
    names = (names[1:] or list(TINY_PIPELINES)) if whole else (names or list(every))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if whole:
                flows[name] = row = flow(name, Path(folder))
            else:
                classes[name] = row = tried(name, every[name], Path(folder))
        print(row, flush=True)
        found = {
            "rows": [flows[n] for n in every if n in flows],
            "classes": [classes[n] for n in every if n in classes],
        }
        found["not_tried"] = not_tried(found["classes"])
        write_results("families", COMMAND, found, markdown)


def markdown(found: dict[str, Any]) -> str:
    classes = found.get("classes", [])
    works = [r for r in classes if r["outcome"] == "works"]
    text = (
        "# Families\n\nTiny random-weight pipelines of the real classes of diffusers. *Works*: images in full"
        " precision, quantized to uniform usq4 at a8, packed, saved, loaded again, and the same images;"
        " guided where the class takes guidance. PSNR is that of random weights: it shows that something was"
        " quantized, and nothing broken.\n\n"
        f"{len(works)} of {len(classes)} work, {len({r['pipeline'] for r in works})} classes.\n\n"
    )
    table = [
        "| class | family | lines of its own | outcome | layers (tiny) | PSNR, dB |",
        "|---|---|---|---|---|---|",
    ]
    for r in classes:
        own = f"{r['entry']} | {r['lines']}" if r["entry"] else "generic | 0"
        said = "works" if r["outcome"] == "works" else f"{r['outcome']}: {_cell(r['said'])}"
        table.append(f"| {r['pipeline']} | {own} | {said} | {r.get('layers', '')} | {r.get('psnr', '')} |")
    text += "\n".join(table) + "\n\n"
    if found.get("not_tried"):
        text += "No tiny pipeline is made here of: " + ", ".join(found["not_tried"]) + ".\n\n"
    table = [
        "| family | pipeline | lines of its own | layers (tiny) | whole flow, s | of that CPU, s |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {r['family']} | {r['pipeline']} | {r['lines']} | {r['layers']} | {r['seconds']} |"
        f" {r['cpu_seconds']} |"
        for r in found["rows"]
    ]
    text += (
        "## The whole flow\n\nFrom a folder to images of the packed pipeline that was loaded again. One"
        " thread; the CPU seconds say what the flow takes, the others include waiting for what else the"
        " machine ran.\n\n"
    )
    return text + "\n".join(table) + "\n"


def _cell(said: str) -> str:
    return " ".join(said.replace("|", "/").split())


if __name__ == "__main__":
    main(sys.argv[1:])
