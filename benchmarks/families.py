"""Every pipeline family on a tiny pipeline of its real class: seconds of the whole flow, layers, and the
lines that a family takes.

Run as ``python -m benchmarks.families [NAME ...]``; it writes benchmarks/results/families.{json,md}, and
keeps rows of families not named.
"""

from __future__ import annotations

import ast
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import aquabit
from aquabit.graph import layers
from aquabit.pipelines import family, trace
from aquabit.scheme import Protocol
from aquabit.study import Study
from benchmarks.common import RESULTS, read, write_results
from tests.tiny_pipelines import PROMPTED, PROMPTS, TINY_PIPELINES, UNGUIDED, tiny

VALUES = Path(aquabit.__file__).parent / "pipelines" / "family.py"


def lines_of(name: str) -> int:
    """Lines of the entry of FAMILIES with this name: all the code there is of a family alone."""
    for node in ast.walk(ast.parse(VALUES.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Family":
            first = node.args[0]
            if isinstance(first, ast.Constant) and first.value == name:
                return (node.end_lineno or node.lineno) - node.lineno + 1
    return 0


def flow(name: str, folder: Path) -> dict[str, Any]:
    """Seconds of each part of the flow, measured from a saved pipeline to images of the packed one that
    was loaded again."""
    pipe = tiny(name)
    known, model, bank = family(pipe), str(folder / "model"), str(folder / "bank")
    pipe.save_pretrained(model)
    protocol = Protocol(
        images=4,
        steps=2,
        micro_batch=4,
        objective="psnr",
        guidance=1.0 if name in UNGUIDED else 3.0,
        conditions=PROMPTS if name in PROMPTED else None,
        resolution=16 if name in ("flux", "generic") else None,
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
    front = aquabit.find(study, bits=4.2, rounds=1, per_round=1, screen=1, bank=bank)
    part("search")
    aquabit.quantize(model, front.best, bank=bank).save(folder / "packed")
    part("quantize")
    aquabit.generate(
        str(folder / "packed"), 2, steps=2, conditions=protocol.conditions, resolution=protocol.resolution
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


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    known = {r["family"]: r for r in read(RESULTS / "families.json", {"rows": []})["rows"]}
    for name in names or TINY_PIPELINES:
        with tempfile.TemporaryDirectory() as folder:
            known[name] = flow(name, Path(folder))
        print(known[name], flush=True)
        rows = [known[n] for n in TINY_PIPELINES if n in known]
        write_results("families", "python -m benchmarks.families", {"rows": rows}, markdown)


def markdown(found: dict[str, Any]) -> str:
    table = [
        "| family | pipeline | lines of its own | layers (tiny) | whole flow, s | of that CPU, s |",
        "|---|---|---|---|---|---|",
    ]
    table += [
        f"| {r['family']} | {r['pipeline']} | {r['lines']} | {r['layers']} | {r['seconds']} |"
        f" {r['cpu_seconds']} |"
        for r in found["rows"]
    ]
    text = (
        "# Families\n\nTiny random-weight pipelines of the real classes, from a folder to images of the"
        " packed pipeline that was loaded again.\n"
    )
    text += (
        "One thread; the CPU seconds say what the flow takes, the others include waiting for what else the"
        " machine ran.\n\n"
    )
    return text + "\n".join(table) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
