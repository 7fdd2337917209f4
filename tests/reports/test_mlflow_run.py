"""A study as a run of MLflow: with MLflow itself where it is installed, else with a client that notes what it
is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from aquabit.reports import mlflow_run, report
from aquabit.scheme import AquabitError
from aquabit.study import Study
from tests.command_line import fails
from tests.pages import EVIL, Synthetic


class Noting:
    """What of ``MlflowClient`` is used."""

    def __init__(self, tracking_uri: str):
        if tracking_uri == "http://nowhere":
            raise OSError("connection refused\nand a long page of HTML")
        self.told: dict[str, Any] = {"params": {}, "metrics": {}, "ended": False}
        Noting.last = self

    last: Noting

    def search_experiments(self, max_results: int) -> list[Any]:
        return []

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        self.told["experiment"] = name
        return "7"

    def create_run(self, experiment: str, run_name: str) -> Any:
        assert experiment == "7"
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_param(self, run: str, key: str, value: str) -> None:
        self.told["params"][key] = value

    def log_metric(self, run: str, key: str, value: float) -> None:
        self.told["metrics"][key] = value

    def log_artifacts(self, run: str, folder: str, to: str) -> None:
        self.told["files"] = {p.name for p in Path(folder).iterdir()}

    def set_terminated(self, run: str, status: str = "FINISHED") -> None:
        self.told["ended"] = status


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> type[Noting]:
    module = ModuleType("mlflow")
    module.MlflowClient = Noting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return Noting


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Synthetic(tmp_path_factory.mktemp("mlflow") / "S.db", names=EVIL, model="m").whole().study


def test_a_run_has_what_the_study_has(study: Study, noting: type[Noting], tmp_path: Path) -> None:
    report(study, tmp_path / "out")
    assert mlflow_run.log_run(study, tmp_path / "out", "sqlite:///x.db") == "r1"
    told, best = noting.last.told, mlflow_run.read(study).front
    assert best is not None
    member = best.best_member
    assert told["ended"] == "FINISHED" and told["experiment"] == "aquabit" and "index.html" in told["files"]
    assert told["metrics"]["bits_per_weight"] == member.bits_per_weight
    for metric, interval in member.measured.items():
        assert told["metrics"][metric] == interval.value
        assert told["metrics"][f"{metric}_low"] == interval.low
    assert told["params"]["model"] == "m" and told["params"]["protocol.steps"] == str(study.protocol.steps)


def test_what_cannot_be_logged_is_said(
    study: Study, noting: type[Noting], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AquabitError, match=r"'http://nowhere' cannot be used: connection refused$"):
        mlflow_run.log_run(study, tmp_path, "http://nowhere")
    monkeypatch.setattr(Noting, "log_param", lambda *_: 1 / 0)
    with pytest.raises(AquabitError, match="did not take the run: division by zero"):
        mlflow_run.log_run(study, tmp_path, "x")
    assert noting.last.told["ended"] == "FAILED"

    def refuse(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(Noting, "log_param", refuse)
    monkeypatch.setattr(Noting, "set_terminated", refuse)
    with pytest.raises(AquabitError, match=r"did not take the run: OSError$"):
        mlflow_run.log_run(study, tmp_path, "x")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said = fails(tmp_path, "report", str(study.path), "--out", "page", "--mlflow", "x")
    assert "aquabit[mlflow]" in said and not (tmp_path / "page").exists()
    two = fails(tmp_path, "report", str(study.path), str(study.path), "--out", "page", "--mlflow", "x")
    assert "one study" in two


def test_mlflow_itself_takes_it(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'aquabit[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    report(study, tmp_path / "out")
    run = mlflow.MlflowClient(tracking_uri=uri).get_run(mlflow_run.log_run(study, tmp_path / "out", uri))
    again = mlflow_run.log_run(study, tmp_path / "out", uri)
    assert run.info.run_id != again and run.data.metrics["bits_per_weight"] > 0
    assert run.info.status == "FINISHED"
