"""Throughput of `measure` on a local Ray cluster, two workers against one: python benchmarks/cluster.py
[--pairs 5] [--configs 16] [--images 128]

A cluster of two nodes with one CPU slot each; in each pair one run measures the same configurations with one
worker, the other with two, in turns that alternate. Schemes are fitted and workers are started before the
clock runs. Target: at least 1.8 times one worker's throughput. Needs two idle cores. Tables go to
benchmarks/results/cluster.json and cluster.md.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import RESULTS, parser, write_results

TARGET = 1.8


def seconds(pool: Any, tasks: list[Any], workers: int) -> float:
    """Of all tasks on so many of the pool's two workers."""
    aside = [pool._idle.pop() for _ in range(2 - workers)]
    pool.slots = lambda: workers
    began = time.perf_counter()
    done = list(pool.run(tasks))
    took = time.perf_counter() - began
    assert len(done) == len(tasks) and len(pool._idle) == workers
    pool._idle += aside
    return took


def measured(
    model: str, pairs: int, configs: int, images: int, steps: int, folder: Path
) -> list[dict[str, float]]:
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_worker_niceness="0"
    )
    from ray.cluster_utils import Cluster

    from aquabit.graph import to_json
    from aquabit.measuring.model import open_model
    from aquabit.measuring.pools import RayPool
    from aquabit.measuring.tasks import Begin, Measure
    from aquabit.quant.bank import Bank
    from aquabit.scheme import Protocol
    from aquabit.space import make_space

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    opened, bank = open_model(model), Bank(folder / "bank")
    space = make_space(opened.graph, opened.fingerprint, model, schemes=["usq2", "usq3", "usq4"])
    protocol = Protocol(images=images, steps=steps, micro_batch=min(64, images))
    begin = Begin(model, to_json(opened.graph), str(bank.folder), opened.fingerprint)
    tasks = [Measure(c, protocol) for c in space.sample(configs, 1)]
    pool = RayPool(cluster.address, begin)
    try:
        while len(pool._idle) < 2:
            list(pool.run(tasks))  # everything is fitted, and both workers have the full-precision images
        return [
            {str(n): seconds(pool, tasks, n) for n in ((1, 2) if i % 2 == 0 else (2, 1))}
            for i in range(pairs)
        ]
    finally:
        pool.close()
        cluster.shutdown()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="digits-unet")
    arguments.add_argument("--pairs", type=int, default=5)
    arguments.add_argument("--configs", type=int, default=16)
    arguments.add_argument("--images", type=int, default=128)
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(given.model, given.pairs, given.configs, given.images, given.steps, Path(folder))
    ratio = statistics.median(r["1"] / r["2"] for r in rows)
    one, two = (statistics.median(given.configs / r[n] for r in rows) for n in ("1", "2"))
    text = (
        f"# `measure` on a local Ray cluster, {given.model}, {given.images} images, {given.steps} steps,"
        f" {given.pairs} pairs of {given.configs} configurations\n\n| workers | configurations a second"
        f" |\n|---|---|\n| 1 | {one:.3f} |\n| 2 | {two:.3f} |\n\nMedian of paired ratios: {ratio:.2f} (target"
        f" {TARGET}: {'kept' if ratio >= TARGET else 'MISSED'}).\n"
    )
    command = f"python {' '.join(sys.argv)}"
    write_results("cluster", command, {"ratio": ratio, "rows": rows}, lambda _: text, given.results)
    print(text)


if __name__ == "__main__":
    main()
