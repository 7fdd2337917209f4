"""Tracing published model sizes on the meta device: python benchmarks/graph.py. Writes
benchmarks/results/graph.json and graph.md."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aquabit.graph import layers, meta_denoiser, trace
from benchmarks.common import about, write_results
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
    write_results("graph", "python benchmarks/graph.py", {"rows": rows}, markdown)


def markdown(found: dict[str, Any]) -> str:
    lines = [
        f"# Tracing graphs\n\n{about(found['machine'])}; median of {REPEATS}. Made by"
        f" `{found['command']}`.\n",
        "| model | layers | weights | GMACs (one sample, one call) | of type other | trace, s | target, s"
        " |\n|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['layers']} | {r['weights'] / 1e6:,.1f} M | {r['macs'] / 1e9:,.1f} |"
        f" {r['other']} | {r['seconds']:.2f} | {r['target_s']:.0f} |"
        for r in found["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
