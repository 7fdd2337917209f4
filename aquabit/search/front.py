"""Front: the Pareto set that a search ends with, its JSON, and the statistics it is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aquabit import _notebook
from aquabit.cost import CostModel
from aquabit.scheme import AquabitError, Budget, QuantConfig, Scheme
from aquabit.search.options import activation_choices, fixed_act
from aquabit.search.proof import Proof
from aquabit.space import SearchSpace


class Interval(NamedTuple):
    """A mean with its confidence interval; bounds are NaN where one block alone gives none."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean over seed blocks with Student's t interval (n - 1 degrees of freedom)."""
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x):
        raise AquabitError(f"an interval needs at least one value in a list, got shape {list(x.shape)}")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    a_blocks: Sequence[float], b_blocks: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Mean of a - b over the same seed blocks, with its t interval; raises AquabitError where the blocks
    do not pair up."""
    if len(a_blocks) != len(b_blocks):
        raise AquabitError(
            f"a paired difference needs the same blocks on both sides, got {len(a_blocks)} and"
            f" {len(b_blocks)}"
        )
    return interval([float(a) - float(b) for a, b in zip(a_blocks, b_blocks, strict=True)], confidence)


def pareto(values: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Boolean [n]: the non-dominated rows of ``values`` [n] or [n, k] (larger = worse) and ``costs`` [n] or
    [n, m].

    Of equal rows the first stays; rows with a NaN never do.
    """
    table = np.concatenate([np.asarray(v, float).reshape(len(v), -1) for v in (values, costs)], 1)
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
    cost_model: CostModel,
    space: SearchSpace,
    kind: str = "usq",
    at_least_bytes: int = 0,
    act: int | None = None,
) -> QuantConfig | None:
    """The smallest uniform configuration of a kind that is no smaller than ``at_least_bytes``; None where
    even the largest is smaller.

    ``act`` defaults to the activation bits that budgets in bits fix. A scheme counts when every free layer
    may take it; of two of one size the output-aware one is taken, which is the harder to beat.
    """
    act = fixed_act(activation_choices(space)) if act is None else act
    assert act is not None  # budgets in bits fix them
    free = [space.choices[k] for k in space.free_layers()]
    schemes: list[Scheme] = [s for s in space.schemes if s.kind == kind and all(s in row for row in free)]
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
    operations: Mapping[str, float] | float | None = (
        None  # {"multiply_adds", "lut_adds"} of one image; older files have one number
    )
    latency_ms: float | None = None  # measured, of the packed denoiser
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # metric -> {"value", "low", "high"}

    @staticmethod
    def of(
        cost_model: CostModel,
        config: QuantConfig,
        predicted: Mapping[str, float],
        measured: Mapping[str, Interval],
        latency_ms: float | None = None,
    ) -> FrontMember:
        cost = cost_model(config)
        values = {metric: dict(found._asdict()) for metric, found in measured.items()}
        operations = {"multiply_adds": cost.multiply_adds, "lut_adds": cost.lut_adds}
        sizes = (cost.bits_per_weight, cost.bytes, cost.bops, operations, latency_ms)
        return FrontMember(config, *sizes, predicted=dict(predicted), measured=values)

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``front.json``; undefined numbers are None."""
        plain: dict[str, Any] = {
            k: getattr(self, k) for k in ("bits_per_weight", "bytes", "bops", "operations", "latency_ms")
        }
        measured = {
            metric: {k: found[k] for k in ("value", "low", "high")} for metric, found in self.measured.items()
        }
        return {
            **_defined({**plain, "predicted": dict(self.predicted), "measured": measured}),
            "config": self.config.to_dict(),
        }


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
        values = np.array([sign * _number(m.measured.get(metric, {}).get("value")) for m in self.members])
        keep = pareto(values, np.array([m.bits_per_weight for m in self.members]))
        kept = [m for m, k in zip(self.members, keep, strict=True) if k or m.config.digest == self.winner]
        return replace(self, members=kept)

    def to_list(self) -> list[dict[str, Any]]:
        """The value of ``front.json``."""
        return [m.to_dict() for m in self.members]

    def to_dict(self) -> dict[str, Any]:
        """What a study keeps: the members, and beside them budget, winner, comparison and proof."""
        budget = None if self.budget is None else asdict(self.budget)
        proof = None if self.proof is None else _defined(self.proof.to_dict())
        comparison = _defined(dict(self.comparison))
        return {
            "members": self.to_list(),
            "budget": budget,
            "winner": self.winner,
            "comparison": comparison,
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
        """Validate untrusted JSON; raises AquabitError with the place and the value that is wrong."""
        from pydantic import ValidationError

        try:
            rows: list[Any] = _members_model()(value).root
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"]) or "the top level"
            raise AquabitError(
                f"{source} is not a front: {place}: {first['msg']} (got {first.get('input')!r:.60})"
            ) from error
        members = []
        for i, row in enumerate(rows):
            body = row.model_dump()
            config = QuantConfig.from_dict(body.pop("config"), f"{source}, entry {i}, config")
            body["predicted"] = {k: _number(v) for k, v in body["predicted"].items()}
            body["measured"] = {
                m: {k: _number(v) for k, v in found.items()} for m, found in body["measured"].items()
            }
            members.append(FrontMember(config, **body))
        return Front(members, budget, winner, comparison or {})

    @staticmethod
    def from_dict(value: Any, source: str = "the stored front") -> Front:
        """The inverse of ``to_dict``; older studies have no proof."""
        if not isinstance(value, dict) or set(value) - {"proof"} != {
            "members",
            "budget",
            "winner",
            "comparison",
        }:
            raise AquabitError(
                f"{source} must be an object with members, budget, winner and comparison, got {value!r:.60}"
            )
        budget = None if value["budget"] is None else Budget(**value["budget"])
        front = Front.from_list(value["members"], source, budget, value["winner"], value["comparison"])
        return replace(front, proof=None if value.get("proof") is None else Proof.from_dict(value["proof"]))

    def _repr_html_(self) -> str:
        metrics = list(dict.fromkeys(k for m in self.members for k in [*m.predicted, *m.measured]))
        head = "".join(f"<th>{escape(k)} predicted</th><th>{escape(k)} measured</th>" for k in metrics)
        rows = []
        for m in self.members:
            cells = [f"{m.bits_per_weight:.3f}", f"{m.bytes:,}", f"{m.bops:.4g}", _shown(m.latency_ms)]
            for k in metrics:
                cells += [_shown(m.predicted.get(k)), _shown_interval(m.measured.get(k, {}))]
            mark = ' style="font-weight: bold"' if m.config.digest == self.winner else ""
            rows.append(f"<tr{mark}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        budget = (
            f"<caption>budget: {escape(str(self.budget))}; the winner is bold</caption>"
            if self.budget
            else ""
        )
        columns = "<th>bits per weight</th><th>bytes</th><th>BOPs</th><th>ms a call</th>"
        return f"{self._figures(metrics)}<table>{budget}<tr>{columns}{head}</tr>{''.join(rows)}</table>"

    def _figures(self, metrics: Sequence[str]) -> str:
        """Measured quality against bits, of the first metric: the objective."""
        if not metrics:
            return ""
        found = [(m.config.digest, m.bits_per_weight, m.measured.get(metrics[0], {})) for m in self.members]
        rows = [
            (name, bits, _number(v.get("value")), _number(v.get("low")), _number(v.get("high")))
            for name, bits, v in found
        ]
        return _notebook.points(rows, "bits per weight", f"{metrics[0]}, measured")


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _shown(value: float | None) -> str:
    return "" if value is None or not isfinite(value) else f"{value:.4g}"


def _shown_interval(found: Mapping[str, float]) -> str:
    low, high = _shown(found.get("low")), _shown(found.get("high"))
    return _shown(found.get("value")) + (f" ({low} to {high})" if low and high else "")


def _defined(value: Any) -> Any:
    """Plain JSON values: numpy scalars unwrapped, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(k): _defined(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_defined(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value


def _members_model() -> Any:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Field,
        RootModel,
    )  # pydantic costs 0.1 s to import: only where a file is read

    class Part(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    class Measured(Part):
        value: float | None
        low: float | None
        high: float | None

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
