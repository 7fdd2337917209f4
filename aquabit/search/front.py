"""Front: the Pareto set that a search ends with, its JSON, and what makes one front better than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from math import isfinite
from typing import Any

import numpy as np

from aquabit import _notebook
from aquabit.cost import CostModel
from aquabit.jsonio import clear_errors, defined, record
from aquabit.scheme import FP, AquabitError, Budget, QuantConfig
from aquabit.scheme_kinds import UNIFORM
from aquabit.search.options import activation_choices
from aquabit.search.proof import Proof
from aquabit.space import SearchSpace
from aquabit.stats import LEVEL, OLD_LEVEL, Interval


def pareto(values: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Boolean [n]: the non-dominated rows of ``values`` [n] or [n, k] (larger = worse) and ``costs`` [n] or
    [n, m].

    Of equal rows the first stays; rows with a NaN never do.
    """
    table = np.column_stack([np.asarray(v, float) for v in (values, costs)])
    keep = ~np.isnan(table).any(1)
    for i in np.flatnonzero(keep):
        no_worse, better = (table <= table[i]).all(1), (table < table[i]).any(1)
        equal_before = no_worse & ~better & (np.arange(len(table)) < i)
        keep[i] = not ((no_worse & better) | equal_before).any()
    return np.asarray(keep)


def hypervolume(values: Sequence[float], costs: Sequence[float], reference: tuple[float, float]) -> float:
    """The area that (value, cost) pairs dominate below ``reference`` (value, cost): larger = a better
    front. NaN counts for nothing."""
    value, cost = np.asarray(values, float), np.asarray(costs, float)
    kept = np.flatnonzero((value < reference[0]) & (cost < reference[1]))
    kept = kept[np.lexsort((value[kept], cost[kept]))]
    best = np.minimum.accumulate(value[kept])
    widths = np.diff(np.append(cost[kept], reference[1]))
    return float(((reference[0] - best) * widths).sum())


def smallest_uniform(
    cost_model: CostModel, space: SearchSpace, at_least_bytes: int = 0
) -> QuantConfig | None:
    """The smallest uniform configuration of USQ, or where no layer may take it of any scheme, that is no
    smaller than ``at_least_bytes``, activations as budgets in bits fix them; None where even the largest is
    smaller.

    A scheme counts when every free layer may take it; of two of one size the output-aware one is taken, which
    is the harder to beat.
    """
    (act,) = activation_choices(space)
    common = [s for s in space.common_schemes() if s != FP]
    schemes = [s for s in common if s.record is UNIFORM] or common
    sized = [(cost_model(space.uniform(s, act)).bytes, not s.output_aware, i) for i, s in enumerate(schemes)]
    large = [row for row in sized if row[0] >= at_least_bytes]
    return space.uniform(schemes[min(large)[2]], act) if large else None


@dataclass(frozen=True)
class FrontMember:
    """One configuration with its exact cost, and what was predicted and what was measured (on fresh seeds)
    for it."""

    config: QuantConfig
    bits_per_weight: float
    bytes: int
    bops: float
    # {"multiply_adds", "lut_adds"} of one image; older files have one number
    operations: Mapping[str, float] | float | None = None
    latency_ms: float | None = None  # measured, of the packed denoiser
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Interval] = field(default_factory=dict)

    @staticmethod
    def of(
        cost_model: CostModel,
        config: QuantConfig,
        predicted: Mapping[str, float],
        measured: Mapping[str, Interval],
        latency_ms: float | None = None,
    ) -> FrontMember:
        cost = cost_model(config)
        operations = {"multiply_adds": cost.multiply_adds, "lut_adds": cost.lut_adds}
        sizes = (cost.bits_per_weight, cost.bytes, cost.bops, operations, latency_ms)
        return FrontMember(config, *sizes, predicted=dict(predicted), measured=dict(measured))

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``front.json``; undefined numbers are None."""
        plain: dict[str, Any] = {
            k: getattr(self, k) for k in ("bits_per_weight", "bytes", "bops", "operations", "latency_ms")
        }
        measured = {metric: found.to_dict() for metric, found in self.measured.items()}
        values = defined({**plain, "predicted": dict(self.predicted), "measured": measured})
        return {**values, "config": self.config.to_dict()}


@dataclass(frozen=True)
class Front:
    """Re-measured configurations by bits. ``winner`` is the digest of the one for the budget (``best``);
    ``comparison`` is about the uniform baseline, ``proof`` says how near to its optimum the last surrogate
    was searched."""

    members: Sequence[FrontMember]
    budget: Budget | None = None
    winner: str | None = None
    comparison: Mapping[str, Any] = field(default_factory=dict)
    proof: Proof | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "members", tuple(sorted(self.members, key=lambda m: (m.bits_per_weight, m.config.digest)))
        )
        if self.winner is not None and self.winner not in {m.config.digest for m in self.members}:
            raise AquabitError(
                f"the winner {self.winner} is not among the front's {len(self.members)} members"
            )

    @property
    def best(self) -> QuantConfig:
        """The winner for the budget; raises AquabitError where the front was read from a file that names
        none."""
        return self.best_member.config

    @property
    def best_member(self) -> FrontMember:
        if self.winner is None:
            raise AquabitError(
                "this front names no winner (front.json holds only members); the winner is in config.json"
                " beside it"
            )
        return next(m for m in self.members if m.config.digest == self.winner)

    def pruned(self, metric: str, lower_is_better: bool = True) -> Front:
        """Only members that are non-dominated in (bits, measured ``metric``), and the winner, which the
        fresh seeds must not unseat."""
        sign = 1.0 if lower_is_better else -1.0
        values = np.array(
            [sign * m.measured[metric].value if metric in m.measured else np.nan for m in self.members]
        )
        keep = pareto(values, np.array([m.bits_per_weight for m in self.members]))
        kept = [m for m, k in zip(self.members, keep, strict=True) if k or m.config.digest == self.winner]
        return replace(self, members=kept)

    def to_list(self) -> list[dict[str, Any]]:
        """The value of ``front.json``."""
        return [m.to_dict() for m in self.members]

    def to_dict(self) -> dict[str, Any]:
        """What a study keeps: the members, and beside them budget, winner, comparison and proof."""
        budget = None if self.budget is None else asdict(self.budget)
        proof = None if self.proof is None else defined(self.proof.to_dict())
        return {
            "members": self.to_list(),
            "budget": budget,
            "winner": self.winner,
            "comparison": defined(self.comparison),
            "proof": proof,
        }

    @staticmethod
    def from_list(
        value: Any,
        source: str = "front.json",
        budget: Budget | None = None,
        winner: str | None = None,
        comparison: Mapping[str, Any] | None = None,
    ) -> Front:
        """Validate untrusted JSON; raises AquabitError with the place and the value that is wrong. Intervals
        that were stored without a level have LEVEL where the search compared sizes at equal quality
        (``comparison``), and OLD_LEVEL in searches before that."""
        with clear_errors(f"{source} is not a front"):
            rows: list[Any] = _members_model()(value).root
        level = LEVEL if "same_quality" in (comparison or {}) else OLD_LEVEL
        members = []
        for i, row in enumerate(rows):
            body = row.model_dump()
            config = QuantConfig.from_dict(body.pop("config"), f"{source}, entry {i}, config")
            body["predicted"] = {k: _number(v) for k, v in body["predicted"].items()}
            body["measured"] = {m: Interval.from_dict(v, level) for m, v in body["measured"].items()}
            members.append(FrontMember(config, **body))
        return Front(members, budget, winner, comparison or {})

    @staticmethod
    def from_dict(value: Any, source: str = "the stored front") -> Front:
        """The inverse of ``to_dict``; older studies have no proof."""
        parts = {"members", "budget", "winner", "comparison"}
        if not isinstance(value, dict) or set(value) - {"proof"} != parts:
            raise AquabitError(
                f"{source} must be an object with members, budget, winner and comparison, got {value!r:.60}"
            )
        winner, comparison = value["winner"], value["comparison"]
        if not isinstance(winner, str | None) or not isinstance(comparison, dict | None):
            raise AquabitError(
                f"{source}: winner is {winner!r:.60} and comparison {comparison!r:.60}; they must be a digest"
                " and an object"
            )
        budget = None if value["budget"] is None else record(Budget, value["budget"], f"{source}, budget")
        front = Front.from_list(value["members"], source, budget, winner, comparison)
        return replace(front, proof=None if value.get("proof") is None else Proof.from_dict(value["proof"]))

    def _repr_html_(self) -> str:
        metrics = list(dict.fromkeys(k for m in self.members for k in [*m.predicted, *m.measured]))
        head = "".join(f"<th>{escape(k)} predicted</th><th>{escape(k)} measured</th>" for k in metrics)
        rows = []
        for m in self.members:
            cells = [f"{m.bits_per_weight:.3f}", f"{m.bytes:,}", f"{m.bops:.4g}", _shown(m.latency_ms)]
            for k in metrics:
                cells += [_shown(m.predicted.get(k)), _shown_interval(m.measured.get(k))]
            mark = ' style="font-weight: bold"' if m.config.digest == self.winner else ""
            rows.append(f"<tr{mark}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        named = f"budget: {escape(str(self.budget))}; the winner is bold"
        budget = f"<caption>{named}</caption>" if self.budget else ""
        columns = "<th>bits per weight</th><th>bytes</th><th>BOPs</th><th>ms a call</th>"
        return f"{self._figures(metrics)}<table>{budget}<tr>{columns}{head}</tr>{''.join(rows)}</table>"

    def _figures(self, metrics: Sequence[str]) -> str:
        """Measured quality against bits, of the first metric: the objective."""
        if not metrics:
            return ""
        found = [(m, m.measured[metrics[0]]) for m in self.members if metrics[0] in m.measured]
        rows = [(m.config.digest, m.bits_per_weight, v.value, v.low, v.high) for m, v in found]
        levels = " and ".join(sorted({v.percent for _, v in found if v.known}))
        text = f"{metrics[0]}, measured" + (f" ({levels} intervals)" if levels else "")
        return _notebook.points(rows, "bits per weight", text)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _shown(value: float | None) -> str:
    return "" if value is None or not isfinite(value) else f"{value:.4g}"


def _shown_interval(found: Interval | None) -> str:
    if found is None:
        return ""
    ends = f" ({_shown(found.low)} to {_shown(found.high)}, {found.percent})"
    return _shown(found.value) + (ends if found.known else "")


def _members_model() -> Any:
    # pydantic costs 0.1 s to import: only where a file is read
    from pydantic import BaseModel, ConfigDict, Field, RootModel

    class Part(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    class Measured(Part):
        value: float | None
        low: float | None
        high: float | None
        level: float | None = Field(None, gt=0, lt=1)

    class Operations(Part):
        multiply_adds: float = Field(ge=0)
        lut_adds: float = Field(ge=0)

    class Member(Part):
        bits_per_weight: float = Field(gt=0)
        bytes: int = Field(gt=0)
        bops: float = Field(ge=0)
        operations: Operations | float | None
        latency_ms: float | None
        predicted: dict[str, float | None]
        measured: dict[str, Measured]
        config: dict[str, Any]

    return RootModel[list[Member]]
