"""Tracing published model sizes on the meta device: python benchmarks/graph.py. Writes
benchmarks/results/graph.json and graph.md."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from aquabit.graph import layers, meta_denoiser, trace
from benchmarks.flow import RESULTS, machine
from tests.families import FAMILIES

REPEATS = 3


def main() -> None:
    rows = []
    for name, (model_class, config, _) in FAMILIES.items():
        seconds = []
        for _ in range(REPEATS):
            denoiser = meta_denoiser(model_class, config)
            started = time.perf_counter()
            graph = trace(denoiser)
            seconds.append(time.perf_counter() - started)
        nodes = layers(graph).values()
        rows.append(
            {
                "model": name,
                "layers": len(nodes),
                "weights": graph.graph["weights"],
                "macs": sum(n["macs"] for n in nodes),
                "other": sum(n["operator"] == "other" for n in nodes),
                "seconds": statistics.median(seconds),
                "target_s": 5.0,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    found = {"machine": machine(), "command": "python benchmarks/graph.py", "rows": rows}
    (RESULTS / "graph.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        f"# Tracing graphs\n\n{found['machine']['cpu']}, torch {found['machine']['torch']}; median of"
        f" {REPEATS}. Made by `{found['command']}`.\n"
    ]
    lines.append(
        "| model | layers | weights | GMACs (one sample, one call) | of type other | trace, s | target, s"
        " |\n|---|---|---|---|---|---|---|"
    )
    lines += [
        f"| {r['model']} | {r['layers']} | {r['weights'] / 1e6:,.1f} M | {r['macs'] / 1e9:,.1f} |"
        f" {r['other']} | {r['seconds']:.2f} | {r['target_s']:.0f} |"
        for r in rows
    ]
    (RESULTS / "graph.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
