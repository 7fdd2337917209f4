"""Measuring on a Ray cluster: the numbers of a local run, also when workers are killed; other versions, other models, dead addresses."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from aquabit.scheme import AquabitError, Protocol
from aquabit.sensitivity import cluster
from aquabit.sensitivity.measure import measure, open_model, pool_for
from aquabit.study import Study
from tests.conftest import tiny_pipeline

pytest.importorskip("ray")
PROTOCOL = Protocol(images=4, steps=1, micro_batch=4)
SPACE = {"schemes": ["usq2", "usq4", "usq8"]}
COLUMNS = ["config", "protocol", "kind", "status", "reason", "bits", "bytes", "bops", "fid", "sfid", "kid", "is", "accuracy", "mse", "psnr"]


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes with a CPU slot each."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    yield made
    made.shutdown()


def table(study: Study):
    return study.measurements(failed=True)[COLUMNS].sort_values(["protocol", "config"]).reset_index(drop=True)


def busy_workers(nodes) -> list[int]:
    """Processes of the cluster's workers that are at a task."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes.list_all_nodes()}
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and b"Seat.ask" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_killed_three_times_a_cluster_gives_the_numbers_of_a_local_run(nodes, tmp_path, dit) -> None:
    measure(dit, Study(tmp_path / "here.db"), 6, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if len(killed) < 3 and what == "measuring" and done in (1, 2, 4):
            for _ in range(200):  # until one is at a task
                if busy := busy_workers(nodes):
                    os.kill(busy[0], signal.SIGKILL)
                    killed.append(busy[0])
                    return
                time.sleep(0.01)

    there = Study(tmp_path / "there.db")
    count = measure(
        dit, there, 6, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank2"), ray=nodes.address, progress=kill
    )  # fmt: skip
    assert len(set(killed)) == 3
    assert count == len(there.measurements(failed=True)) == len(there.known(PROTOCOL)) == 11
    assert table(there).equals(table(Study(tmp_path / "here.db")))
    assert there.features() == Study(tmp_path / "here.db").features()
