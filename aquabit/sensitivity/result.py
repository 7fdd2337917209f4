"""Sensitivity: what a swap in each layer does to the objective, with intervals and SHAP values, by layer,
operator type and block."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from aquabit import _notebook
from aquabit.jsonio import defined, record
from aquabit.scheme import AquabitError
from aquabit.stats import LEVEL, OLD_LEVEL, Interval, percent
from aquabit.study import Study

INTERACTIONS = ["a", "b", "interaction", "low", "high"]
SCORES = ["level", "name", "scheme", "layers", "change", "score", "low", "high"]
CURVE = ["measurements", "within_budget_srcc", "low", "high"]
EFFECTS = ["name", "layers", "effect", "low", "high", "total", "shap"]
LAYERS = ["name", "operator", "block", "swap", "effect", "low", "high", "predicted", "real", "n"]
LAYERS += ["shap", "shap_signed", "schemes", "shap_schemes"]
TABLES = {
    "layers": LAYERS,
    "operators": EFFECTS,
    "blocks": EFFECTS,
    "interactions": INTERACTIONS,
    "scores": SCORES,
    "curve": CURVE,
}
NUMBERS = {"effect", "low", "high", "predicted", "real", "total", "shap", "interaction", "change", "score"}
TEXTS = {"a", "b", "level", "name", "scheme", "operator", "block", "swap", "schemes", "shap_schemes"}
# what older studies lack
LATER = ("validation", "scatter", "ranking", "interactions", "scores", "curve", "swarm", "level")


@dataclass(frozen=True)
class _Plain:
    """The fields of a ``Sensitivity`` that are no tables, as JSON has them."""

    objective: str
    direction: Literal["min", "max"]
    protocol: str
    measurements: int
    bits: float | None
    swap: str
    surrogate: dict[str, Any]
    validation: dict[str, Any] | None = None
    scatter: list[dict[str, Any]] = field(default_factory=list)
    ranking: str = "predicted"
    swarm: dict[str, Any] = field(default_factory=dict)
    level: float = LEVEL


@dataclass(frozen=True)
class Sensitivity:
    """Effects of one swap a layer on the objective, in its units, positive = worse; tables sorted by effect,
    largest first.

    ``ranking`` says what effects come from: "predicted" by the surrogate, or "combined" with real swaps
    (``combine_effects.combine``). Their intervals, and those of interactions and scores, have the ``level``.
    ``layers``: name, operator, block, swap, effect, low, high (the interval), predicted (the surrogate's
    effect), real (mean of n real swaps, NaN without), n, shap (mean |SHAP|, log units), shap_signed
    (mean SHAP above the layer's median weight error less that below), schemes ({scheme: predicted effect of
    going there from the swap's first}), shap_schemes ({scheme: mean SHAP in units where it is given}); and,
    where PSNR was measured and is not the objective, psnr_effect, psnr_low, psnr_high: the decibels that the
    swap loses, with the same kind of interval. ``operators`` and ``blocks``: name,
    layers (their number), effect (mean of a layer), low, high, total (sum over layers), shap (sum).
    ``interactions`` of the strongest layers and ``scores`` of schemes by operator type and block: see
    ``sensitivity.interactions``. ``validation`` compares real swaps with predictions, whatever the ranking.
    ``curve``: see ``learning_curve``; ``swarm``: SHAP values of single configurations by operator type
    (``shap_summaries.shap_by_operator``).
    """

    objective: str
    direction: str
    protocol: str
    measurements: int
    bits: float
    swap: str
    layers: pd.DataFrame
    operators: pd.DataFrame
    blocks: pd.DataFrame
    surrogate: Mapping[str, Any]
    validation: Mapping[str, Any] | None = None
    scatter: list[dict[str, Any]] = field(default_factory=list)
    ranking: str = "predicted"
    interactions: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=INTERACTIONS))
    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=SCORES))
    curve: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CURVE))
    swarm: Mapping[str, Any] = field(default_factory=dict)
    level: float = LEVEL

    @property
    def of_good_ones(self) -> bool:
        """Whether effects may speak of good configurations: these have a score of their own since they do."""
        return "among_good" in self.surrogate

    @property
    def within_budget(self) -> Interval:
        """The surrogate's out-of-fold within-budget SRCC; the learning curve has intervals of its level."""
        low, high = self.surrogate.get("within_budget_interval") or (None, None)
        stored = {"value": self.surrogate.get("within_budget_srcc"), "low": low, "high": high}
        level = self.surrogate.get("within_budget_level")
        return Interval.from_dict({**stored, "level": level}, OLD_LEVEL)

    @property
    def swap_level(self) -> float:
        """Of the intervals of real swaps (rows of ``validation``)."""
        return float((self.validation or {}).get("level") or OLD_LEVEL)

    def to_dict(self) -> dict[str, Any]:
        """The value of ``sensitivity.json``: undefined numbers are None."""
        value = {
            "objective": self.objective,
            "direction": self.direction,
            "protocol": self.protocol,
            "measurements": self.measurements,
            "bits": self.bits,
            "swap": self.swap,
            "surrogate": dict(self.surrogate),
            "layers": self.layers.to_dict("records"),
            "operators": self.operators.to_dict("records"),
            "blocks": self.blocks.to_dict("records"),
            "validation": self.validation and dict(self.validation),
            "scatter": self.scatter,
            "ranking": self.ranking,
            "interactions": self.interactions.to_dict("records"),
            "scores": self.scores.to_dict("records"),
            "curve": self.curve.to_dict("records"),
            "swarm": dict(self.swarm),
            "level": self.level,
        }
        return dict(defined(value))

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Sensitivity:
        """The inverse of ``to_dict``; what older studies lack has its default. Raises AquabitError where a
        part is missing."""
        if not isinstance(value, Mapping):
            raise AquabitError(f"the sensitivity table is {value!r:.60}; run `aquabit explain` again")
        names = Sensitivity.__dataclass_fields__
        missing = [k for k in names if k not in value and k not in LATER]
        if missing:
            raise AquabitError(
                f"this is no sensitivity table: it has no {missing[0]!r}; run `aquabit explain` again"
            )
        try:
            tables = {k: _table(value[k], columns) for k, columns in TABLES.items() if k in value}
        except (TypeError, ValueError, OverflowError) as error:
            raise AquabitError(
                f"the sensitivity table is damaged ({error}); run `aquabit explain` again"
            ) from error
        plain = {k: v for k, v in value.items() if k in _Plain.__dataclass_fields__}
        read = record(_Plain, plain, "the sensitivity table")
        found = Sensitivity(**{k: getattr(read, k) for k in plain}, **tables)
        return found if "level" in value or found.of_good_ones else replace(found, level=OLD_LEVEL)

    def _repr_html_(self) -> str:
        score = self.surrogate.get("within_budget_srcc")
        quality = "unknown" if score is None else f"{score:.2f}"
        title = (
            f"{self.objective}, {self.swap} at {self.bits:g} bits: {self.measurements} measurements,"
            f" within-budget SRCC {quality}"
        )
        top = self.layers.head(20)
        numbers = (top[name].astype(float) for name in ("effect", "low", "high"))
        rows = list(zip(top.name, *numbers, strict=True))
        listed = [(*row[:1], operator, *row[1:]) for row, operator in zip(rows, top.operator, strict=True)]
        text = (
            f"worsening of {self.objective} by {self.swap}, {self.ranking} ({percent(self.level)} intervals)"
        )
        figure = _notebook.intervals(rows, text)
        ends = (f"{end} ({percent(self.level)})" for end in ("low", "high"))
        table = _notebook.table(("layer", "operator", "effect", *ends), listed)
        return f"<p>{html.escape(title)}</p>{figure}{table}"


def save(study: Study, sensitivity: Sensitivity) -> None:
    """Store the sensitivity in the study."""
    with study.writing():
        study.set(sensitivity=sensitivity.to_dict())


def _table(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Stored rows as a table (of ``columns`` where there are none); undefined numbers are NaN."""
    table = pd.DataFrame(rows, columns=None if rows else columns)
    for name in table.columns.difference(TEXTS):
        if table[name].dtype == object or name in NUMBERS:
            table[name] = table[name].astype(float)
    return table
