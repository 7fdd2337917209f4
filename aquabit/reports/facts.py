"""What a study holds, read once; whatever it lacks is empty (``lacks`` says which command makes it)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import pandas as pd

from aquabit.jsonio import parse_json
from aquabit.scheme import AquabitError, Protocol, QuantConfig, Scheme
from aquabit.search.first_answer import FirstAnswer
from aquabit.search.front import Front, FrontMember
from aquabit.sensitivity.result import Sensitivity
from aquabit.stats import percent
from aquabit.study import Study

METRIC_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "is": "IS",
    "mse": "MSE",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "temporal_psnr": "temporal PSNR",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "feature_distance": "feature distance",
    "cmmd": "CMMD",
    "fd_dinov2": "FD-DINOv2",
    "kd_dinov2": "KD-DINOv2",
    "effnet_fd": "EffNet FD",
    "effnet_kd": "EffNet KD",
    "effnet_distance": "EffNet distance",
}

DECIBELS = ("PSNR", "temporal PSNR")  # to full precision, which has none itself
OWN = ("sample", "uniform", "candidate")  # kinds of measurements that are made on the study's own seeds


@dataclass(frozen=True)
class Facts:
    """One study as a report sees it. ``measured`` has failed measurements too; ``layers`` are the graph's,
    in execution order."""

    source: str
    model: str
    fingerprint: str
    protocol: Protocol | None
    protocols: Mapping[str, Protocol]
    objective: str
    direction: str  # "min" or "max": which values of the objective are better
    graph: nx.DiGraph | None
    layers: Mapping[str, Mapping[str, Any]]
    # (layer, scheme or a6) -> output (else weight) error and damage
    features: Mapping[tuple[str, str], Mapping[str, Any]]
    space: Mapping[str, Any]
    sensitivity: Sensitivity | None
    front: Front | None
    noise: Mapping[str, Any]  # of the winner; empty in studies that were searched before it was measured
    measured: pd.DataFrame
    configs: Mapping[str, QuantConfig]
    environments: list[Mapping[str, Any]]
    thumbnails: Mapping[tuple[str, str], bytes]
    notes: list[str]  # what is to be said of fits
    first: FirstAnswer | None = None  # from gradients alone, before anything was measured
    running: str = ""  # what comes next in a run that goes on
    remarks: Sequence[str] = ()  # on the model, on where damages come from and how true they are
    spent: Mapping[str, float] = field(default_factory=dict)  # part of a run -> seconds

    @property
    def metric(self) -> str:
        """The objective as people write it."""
        return METRIC_NAMES.get(self.objective, self.objective)

    @property
    def swap(self) -> str:
        """The named swap all effects speak of, as text; empty where it is not stored."""
        return self.sensitivity.swap if self.sensitivity else ""

    @property
    def effects(self) -> str:
        """What the ranking's effects are: predicted, or combined with real swaps."""
        return self.sensitivity.ranking if self.sensitivity else "predicted"

    @property
    def correction(self) -> str:
        """What the study corrects every configuration by; empty where it corrects none."""
        return str(self.space.get("correction") or "")

    @property
    def effect_level(self) -> str:
        """The level of the intervals of effects, as text; empty without effects."""
        return percent(self.sensitivity.level) if self.sensitivity else ""

    @property
    def swap_level(self) -> str:
        """The level of the intervals of real swaps, as text; empty without any."""
        return percent(self.sensitivity.swap_level) if self.sensitivity and self.validation else ""

    @property
    def scores(self) -> Mapping[str, Any]:
        """Of the surrogate, by name; empty where there is none."""
        return self.sensitivity.surrogate if self.sensitivity else {}

    @property
    def validation(self) -> Mapping[str, Any]:
        """How predicted effects agree with real swaps (``validation_scores``); empty without any."""
        return (self.sensitivity.validation if self.sensitivity else None) or {}

    @property
    def members(self) -> Sequence[FrontMember]:
        """The found configurations, smallest first."""
        return self.front.members if self.front else ()

    @property
    def comparison(self) -> Mapping[str, Any]:
        """The winner beside uniform and other configurations, as the search left it; empty without."""
        return self.front.comparison if self.front else {}

    @property
    def contexts(self) -> str:
        """What effects are means over: good configurations near the budget, or random ones in studies
        without probes and older ones."""
        found = self.sensitivity
        probed = any(math.isfinite(row["damage"]) for row in self.features.values())
        near = f" near {found.bits:g} bits" if found and math.isfinite(number(found.bits)) else ""
        return f"{'good' if probed and found and found.of_good_ones else 'random'} configurations{near}"

    def rows(self, kind: str, metric: str | None = None) -> pd.DataFrame:
        """The successful measurements of a kind, with ``metric`` (default: the objective) as ``value``; those
        without it left out, and of the kinds that are made on the study's own seeds those of other protocols
        too, since numbers of different protocols never mix.
        """
        table, metric = self.measured, metric or self.objective
        value = table[metric] if metric in table else pd.Series(index=table.index, dtype=float)
        table = table.assign(value=pd.to_numeric(value, errors="coerce"))
        wanted = (table.kind == kind) & (table.status == "ok") & table.value.notna()
        if kind in OWN and self.protocol is not None:
            wanted &= table.protocol == self.protocol.digest
        return table[wanted].reset_index(drop=True)

    @property
    def foreign(self) -> int:
        """Measurements of random and uniform configurations under another protocol than the study's."""
        if self.protocol:
            return int(
                (self.measured.kind.isin(OWN) & (self.measured.protocol != self.protocol.digest)).sum()
            )
        return 0

    def is_winner(self, member: FrontMember) -> bool:
        return self.front is not None and member.config.digest == self.front.winner

    def winner(self) -> QuantConfig | None:
        """The configuration that the search chose."""
        return self.front.best if self.front and self.front.winner else None


def read(study: Study) -> Facts:
    """Everything a report shows of ``study``."""
    protocol = study.get("protocol")
    found = Protocol.from_dict(protocol) if protocol else None
    told, searched = study.get("sensitivity"), study.get("front")
    sensitivity = Sensitivity.from_dict(told) if told else None
    objective = sensitivity.objective if sensitivity else found.objective if found else "fid"
    environments = study._rows("SELECT DISTINCT environment FROM measurements")
    graph = _graph(study.get("graph"))
    return Facts(
        source=study.path.name,
        model=str(study.get("model") or ""),
        fingerprint=str(study.get("fingerprint") or ""),
        protocol=found,
        protocols=study.protocols(),
        objective=objective,
        direction=sensitivity.direction if sensitivity else found.direction(objective) if found else "min",
        graph=graph,
        layers=_layers(graph),
        features=_features(study),
        space=study.get("space") or {},
        sensitivity=sensitivity,
        front=Front.from_dict(searched) if searched else None,
        noise=study.get("noise") or {},
        measured=study.measurements(failed=True),
        configs=study.configs(),
        environments=[_json_object(row[0]) for row in environments],
        thumbnails=study.thumbnails(),
        notes=study.notes(),
        first=FirstAnswer.from_dict(began) if (began := study.get("first")) else None,
        running=str(study.get("running") or ""),
        remarks=[str(note) for note in study.get("family_notes") or []],
        spent={str(k): number(v) for k, v in (study.get("spent") or {}).items()},
    )


def _graph(value: Any) -> nx.DiGraph | None:
    if not value:
        return None
    from aquabit.graph import from_json  # brings torch: only where a graph is read

    return from_json(value, "the study's graph")


def _layers(graph: nx.DiGraph | None) -> Mapping[str, Mapping[str, Any]]:
    if graph is None:
        return {}
    from aquabit.graph import layers

    return layers(graph)


def _features(study: Study) -> dict[tuple[str, str], dict[str, float]]:
    """Without the sketches, which are most of what is stored."""
    fields = (
        "json_extract(value, '$.output'), json_extract(value, '$.error'), json_extract(value, '$.damage')"
    )
    rows = study._rows(f"SELECT layer, scheme, {fields} FROM features")
    return {(a, b): {"error": number(e if o is None else o), "damage": number(d)} for a, b, o, e, d in rows}


def _json_object(text: str) -> Mapping[str, Any]:
    value = parse_json(text, "a stored value")
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """A finite number as float, anything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def scheme_name(config: QuantConfig) -> str:
    """``usq3`` where every quantized layer has that scheme, ``full precision`` without any, else
    ``mixed``."""
    schemes = {str(choice.weight) for choice in config.layers.values() if choice.weight != Scheme()}
    return "full precision" if not schemes else schemes.pop() if len(schemes) == 1 else "mixed"


def leading(config: QuantConfig) -> Scheme | None:
    """The scheme that names the family of a configuration that treats all layers alike: tiny layers for which
    no additive format is worth its codebooks do not count."""
    schemes = [choice.weight for choice in config.layers.values() if choice.weight != Scheme()]
    return next((s for s in schemes if s.additive), schemes[0] if schemes else None)


def require_metric(facts: Facts) -> None:
    """Raise AquabitError where measurements exist and none has the objective."""
    done = facts.measured[facts.measured.status == "ok"] if len(facts.measured) else facts.measured
    if len(done) and facts.objective not in done:
        raise AquabitError(
            f"the objective {facts.objective!r} of {facts.source} is in none of its measurements; `aquabit"
            " measure` makes them"
        )
