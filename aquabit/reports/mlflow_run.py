"""A study as a run of MLflow: what was asked, the winner's measured values, and the report's files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aquabit.reports.facts import read
from aquabit.scheme import AquabitError
from aquabit.study import Study

EXPERIMENT = "aquabit"
INSTALL = "pip install 'aquabit[mlflow]'"
TEXT_MOST = 500  # characters of a parameter: MLflow refuses more than 6,000


def client(uri: str) -> Any:
    """A client of the tracking server ``uri``, which keeps no state of the process. Raises AquabitError where
    MLflow is missing or the server cannot be reached."""
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise AquabitError(f"--mlflow needs MLflow, which is not installed: {INSTALL}") from error
    try:
        found = MlflowClient(tracking_uri=uri)
        found.search_experiments(max_results=1)
    except Exception as error:  # whatever its store raises: of files, databases, requests
        raise AquabitError(f"MLflow at {uri!r} cannot be used: {_said(error)}") from error
    return found


def _said(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def log_run(study: Study, report: Path, uri: str) -> str:
    """Log a study and the folder of its report as one run of the experiment "aquabit"; its id.

    Parameters: the model, the protocol's fields and the budget. Metrics: the winner's size, what it measured
    on fresh seeds (with _low and _high), the surrogate's within-budget SRCC and its agreement with real
    swaps, as far as they are there. Artifacts: ``report``.
    """
    service, facts = client(uri), read(study)
    name, run = facts.model or study.path.stem, None
    try:
        known = service.get_experiment_by_name(EXPERIMENT)
        experiment = service.create_experiment(EXPERIMENT) if known is None else known.experiment_id
        run = service.create_run(experiment, run_name=f"{name} {study.path.stem}").info.run_id
        for key, value in _parameters(facts).items():
            service.log_param(run, key, str(value)[:TEXT_MOST])
        for key, number in _metrics(facts).items():
            service.log_metric(run, key, number)
        service.log_artifacts(run, str(report), "report")
        service.set_terminated(run)
    except Exception as error:
        with suppress(Exception):  # a server that is gone, whose run stays as it is
            service.set_terminated(run, "FAILED")
        raise AquabitError(f"MLflow at {uri!r} did not take the run: {_said(error)}") from error
    return str(run)


def _parameters(facts: Any) -> dict[str, Any]:
    found = {"model": facts.model, "fingerprint": facts.fingerprint, "objective": facts.objective}
    if facts.protocol is not None:
        found |= {f"protocol.{k}": v for k, v in facts.protocol.to_dict().items() if v is not None}
    if facts.front is not None and facts.front.budget is not None:
        found |= {f"budget.{k}": v for k, v in asdict(facts.front.budget).items() if v is not None}
    return found


def _metrics(facts: Any) -> dict[str, float]:
    found: dict[str, float] = {"measurements": len(facts.measured)}
    if facts.front is not None and facts.front.winner:
        best = facts.front.best_member
        found |= {"bits_per_weight": best.bits_per_weight, "bytes": best.bytes, "bops": best.bops}
        for metric, interval in best.measured.items():
            found |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    if facts.sensitivity is not None:
        checks: Mapping[str, Any] = facts.sensitivity.validation or {}
        found["within_budget_srcc"] = facts.sensitivity.within_budget.value
        found |= {f"swaps_{k}": checks[k] for k in ("srcc", "sign_agreement") if k in checks}
    return {k: float(v) for k, v in found.items() if v is not None and v == v}
