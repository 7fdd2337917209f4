"""StudyStatus: how far a study is, or the shards of one, while they are measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aquabit.study import Study

PLANNED = ("reference", "uniform", "sample")  # the kinds of measurements that ``measure`` makes
RECENT = 50  # measurements that a rate is of


def start_plan(study: Study, samples: int, design: str, shard: str | None, missing: int) -> None:
    """Note what ``measure`` is about to do: ``missing`` measurements on top of what is known."""
    known = len(_planned(study))
    asked = {"samples": samples, "design": design, "shard": shard, "missing": missing}
    study.set(plan={**asked, "known": known, "started": time.time()})


def _planned(study: Study) -> list[float]:
    """When each measurement of the study's protocol that ``measure`` makes was recorded, in order."""
    if "protocol" not in study:
        return []
    table = study.measurements(study.protocol, failed=True)
    return sorted(float(t) for t in table.created[table.kind.isin(PLANNED)])


@dataclass(frozen=True)
class StudyStatus:
    """How far ``measure`` is with a study. ``rate`` is in measurements an hour over the last RECENT,
    ``remaining`` the seconds that what is missing takes at that rate (an estimate), ``idle`` the seconds
    since the last measurement; None where they are not known.
    """

    path: str
    shard: str | None
    measurements: int
    failed: int
    missing: int | None  # None: written by a version without plans
    rate: float | None
    remaining: float | None
    idle: float | None
    writer: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def study_status(study: Study) -> StudyStatus:
    """How far a study is."""
    created, plan = _planned(study), study.get("plan")
    table = study.measurements(failed=True)
    missing = None if plan is None else max(0, plan["missing"] - (len(created) - plan["known"]))
    recent = created if plan is None else created[plan["known"] :]
    span = np.ptp(recent[-RECENT:]) if len(recent) > 1 else 0.0
    rate = float(3600 * (len(recent[-RECENT:]) - 1) / span) if span else None
    remaining = 0.0 if missing == 0 else 3600 * missing / rate if missing is not None and rate else None
    idle = max(0.0, time.time() - created[-1]) if created else None
    return StudyStatus(
        str(study.path),
        plan and plan["shard"],
        len(table),
        int((table.status == "failed").sum()),
        missing,
        rate,
        remaining,
        idle,
        study.writer(),
    )


def merge_status(shards: Sequence[StudyStatus]) -> StudyStatus:
    """Several shards as one: counts and rates add up, and the slowest ends last."""
    known = [s.missing for s in shards if s.missing is not None]
    rates = [s.rate for s in shards if s.rate and s.missing]
    left = [s.remaining for s in shards if s.remaining is not None]
    idle = [s.idle for s in shards if s.idle is not None]
    return StudyStatus(
        f"{len(shards)} studies",
        None,
        sum(s.measurements for s in shards),
        sum(s.failed for s in shards),
        sum(known) if len(known) == len(shards) else None,
        sum(rates) if rates else None,
        max(left) if len(left) == len(shards) else None,
        min(idle) if idle else None,
        None,
    )


def measurement_counts(study: Study) -> dict[str, Any]:
    """How many measurements a study holds, how many of them failed, and how many there are of each kind."""
    table = study.measurements(failed=True)
    return {
        "measurements": len(table),
        "failed": int((table.status == "failed").sum()) if len(table) else 0,
        "kinds": {str(k): int(v) for k, v in table.kind.value_counts().items()} if len(table) else {},
    }
