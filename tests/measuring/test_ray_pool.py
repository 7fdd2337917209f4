"""Measuring on a Ray cluster: the numbers of a local run, also when workers are killed; other versions,
other models, dead addresses."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from aquabit.graph import to_json
from aquabit.measuring.model import open_model
from aquabit.measuring.pools import pool_for
from aquabit.measuring.pools import ray as cluster
from aquabit.measuring.tasks import Answer, Begin, Fit, Measure
from aquabit.measuring.where import Where
from aquabit.quant.bank import Bank
from aquabit.scheme import AquabitError, Protocol
from aquabit.space import make_space
from aquabit.study import Study
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline
from tests.tiny_pipelines import PROMPTS, randomised
from tests.tiny_recent import wan
from tests.worlds import assert_near

pytest.importorskip("ray")
PROTOCOL = Protocol(images=4, steps=1, micro_batch=4)
SPACE = {"schemes": ["usq2", "usq4", "usq8"]}
COLUMNS = [
    "config",
    "protocol",
    "kind",
    "status",
    "reason",
    "bits",
    "bytes",
    "bops",
    "fid",
    "sfid",
    "kid",
    "is",
    "accuracy",
    "mse",
    "psnr",
]


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster of two nodes with a CPU slot each."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_worker_niceness="0"
    )
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    yield made
    made.shutdown()


def table(study: Study):
    return study.measurements(failed=True)[COLUMNS].sort_values(["protocol", "config"]).reset_index(drop=True)


def workers(nodes, title: bytes) -> list[int]:
    """Processes of the cluster's workers of a title: Seat, or Seat.ask while they are at a task."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes.list_all_nodes()}
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and title in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_killed_three_times_a_cluster_gives_the_numbers_of_a_local_run(nodes, tmp_path, dit) -> None:
    measure(dit, Study(tmp_path / "here.db"), 6, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"))
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "measuring" and done == 5:
            nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
        if len(killed) < 3 and what == "measuring" and done in (1, 2, 4):
            found: list[int] = []
            for _ in range(100):  # until one is at a task
                found = found or workers(nodes, b"Seat.ask")
                time.sleep(0.001)
            killed.append((found or workers(nodes, b"Seat"))[0])
            os.kill(killed[-1], signal.SIGKILL)

    there = Study(tmp_path / "there.db")
    count = measure(
        dit,
        there,
        6,
        protocol=PROTOCOL,
        space=SPACE,
        bank=str(tmp_path / "bank2"),
        ray=nodes.address,
        progress=kill,
    )
    assert len(set(killed)) == 3
    assert count == len(there.measurements(failed=True)) == len(there.known(there.protocol)) == 11
    assert table(there).equals(table(Study(tmp_path / "here.db")))
    assert_near(there.features(), Study(tmp_path / "here.db").features())


def test_workers_that_are_not_like_the_driver_are_refused_by_name(nodes, tmp_path, dit, monkeypatch) -> None:
    dit.save_pretrained(tmp_path / "pipe")
    model = open_model(str(tmp_path / "pipe"))

    def first(model) -> object:
        with pool_for(model, Bank(tmp_path / "bank"), Where(ray=nodes.address)) as pool:
            return next(pool.run([Fit({})]))[1]

    assert first(model) == {}
    with pytest.raises(AquabitError, match="give all machines the same files"):
        first(replace(model, fingerprint="0" * 16))
    monkeypatch.setattr(cluster, "versions", lambda: {**dict.fromkeys(cluster.SAME, "1"), "torch": "99.0"})
    with pytest.raises(
        AquabitError, match=rf"worker on {socket.gethostname()} has aquabit .* torch [0-9.]+ instead of 99\.0"
    ):
        first(model)


def test_videos_are_measured_on_a_cluster_as_here(nodes, tmp_path) -> None:
    randomised(wan).save_pretrained(tmp_path / "pipe")
    model = open_model(str(tmp_path / "pipe"))
    space = make_space(model.graph, model.fingerprint, schemes=["usq4"])
    protocol = Protocol(
        images=2,
        steps=2,
        micro_batch=2,
        resolution=32,
        frames=5,
        conditions=PROMPTS,
        objective="temporal_psnr",
    )
    found = []
    for where in (Where(), Where(ray=nodes.address)):
        with pool_for(model, Bank(tmp_path / "bank"), where) as pool:
            (_, (measured, _)) = next(pool.run([Measure(space.uniform("usq4", 8), protocol)]))
            found.append(measured.metrics)
    assert found[0] == found[1] and "temporal_psnr" in found[0]


def test_a_model_that_a_machine_lacks_is_sent(tmp_path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "pipe")
    model = open_model(str(tmp_path / "pipe"))
    begin = Begin(
        str(tmp_path / "elsewhere"), to_json(model.graph), str(tmp_path / "bank"), model.fingerprint
    )
    seat = cluster.Seat()
    assert seat.begin(begin, True, cluster.versions()) == Answer(False)
    monkey = [(name, piece) for name, piece in cluster._pieces(tmp_path / "pipe")]
    for name, piece in monkey:
        seat.receive(name, piece[:100])
        seat.receive(name, piece[100:])
    assert seat.begin(begin, True, cluster.versions()) == Answer(True)


def test_addresses_where_nothing_answers(tmp_path, dit) -> None:
    model, bank = open_model(dit), Bank(tmp_path / "bank")

    def said(address: str, device: str = "cpu", workers: int = 1) -> str:
        with (
            pytest.raises(AquabitError) as caught,
            pool_for(model, bank, Where(workers, device, ray=address)),
        ):
            pass
        return str(caught.value)

    with socket.socket() as silent:  # a port that accepts and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "ANSWER_SECONDS", 5)
            assert "no Ray cluster answers at" in said(f"127.0.0.1:{port}")
        assert time.monotonic() - started < 60
    assert "no Ray cluster answers at '127.0.0.1:1'" in said("127.0.0.1:1")
    assert "must be auto, local, host:port" in said("nonsense")
    assert "give one of them" in said("auto", workers=2)
    assert "give --device cuda" in said("auto", device="cuda:1")


def test_a_model_of_ones_own_is_made_again_by_every_worker(nodes, tmp_path, monkeypatch) -> None:
    """Wherever its module lies."""
    root = Path(__file__).parents[2]
    (tmp_path / "on_ray.py").write_text(
        f"import sys\nsys.path.append({str(root)!r})\n"
        "from tests.pipelines.test_own_model import own as made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for where in ({}, {"ray": nodes.address}):
        study = Study(tmp_path / f"{len(where)}.db")
        space = {"schemes": ["usq2", "usq8"], "activations": [8]}
        measure(
            "on_ray:made",
            study,
            1,
            protocol=PROTOCOL,
            space=space,
            bank=str(tmp_path / study.path.stem),
            **where,
        )
        found.append(study.measurements().set_index("config").psnr.to_dict())
    assert found[0] == found[1] and len(found[0]) > 2
