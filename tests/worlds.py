"""Made-up models, spaces and studies that tests share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
import pytest

from aquabit.choices import Choices
from aquabit.cost import CostModel, Latency
from aquabit.graph import to_json
from aquabit.scheme import Act, Budget, LayerChoice, Measurement, Protocol, QuantConfig, Scheme, no_progress
from aquabit.search.options import Predict, activation_choices
from aquabit.search.proposer import ROWS, Candidate
from aquabit.search.search_options import SearchOptions
from aquabit.search.surrogate_search import Experiment, find_candidates
from aquabit.sensitivity.damages import Damages
from aquabit.sensitivity.designs import DEFAULT, Design
from aquabit.sensitivity.features import SKETCH, Encoder
from aquabit.space import SearchSpace, make_space
from aquabit.study import Study

PROTOCOL = Protocol()


COST = {"bits": 3.0, "bytes": 100, "bops": 1e9}


def config(i: int) -> QuantConfig:
    return QuantConfig("f", {f"layer{i}": LayerChoice(Scheme.parse("usq4"), 8)})


def filled(path, indices, protocol: Protocol = PROTOCOL) -> Study:
    study = Study(path)
    study.begin("model", "f", {}, {}, protocol)
    for i in indices:
        study.record(
            config(i),
            Measurement(config(i).digest, protocol.digest, {"fid": float(i)}, 1.0),
            "sample",
            COST,
            b"png",
        )
    return study


MANY = [
    "usq2",
    "usq3",
    "usq4",
    "usq8",
    "vq2",
    "vq3",
    "vq4",
    "vq2c",
    "vq3c",
    "vq4c",
    "usq2h",
    "usq3h",
    "usq4h",
]


def model(count: int, seed: int = 0, **options: Any) -> tuple[SearchSpace, CostModel]:
    """A space of ``count`` layers of odd sizes, Linear and Conv2d in turn, and its costs; many kinds of
    schemes where none are named."""
    options = (
        options if "schemes" in options else {"schemes": MANY, "levels": (1.5, 2.0, 3.0, 4.0), **options}
    )
    rng, graph = np.random.default_rng(seed), nx.DiGraph(other_elements=101)
    for i in range(count):
        shape = (int(rng.integers(5, 40)), int(rng.integers(7, 60)), *((3, 3) if i % 2 else ()))
        macs = int(np.prod(shape)) * int(rng.integers(1, 9))
        graph.add_node(
            f"l{i}", kind="layer", depth=i, operator=f"o{i % 3}", block=f"b{i % 2}", shape=shape, macs=macs
        )
    space = make_space(graph, "print", "toy", **options)
    return space, timed(CostModel(graph, space), seed)


def timed(cost: CostModel, seed: int) -> CostModel:
    """Random milliseconds of the choices that layers may take; they know neither bits nor bytes."""
    activations = tuple({16: 0, **dict.fromkeys(cost.space.activations)})
    layers = np.random.default_rng(seed).lognormal(
        0, 1, (len(cost.shapes), len(cost.space.schemes), len(activations))
    )
    allowed = cost.space.allowed()[:, :, None] & np.ones(len(activations), bool)
    return cost.timed(Latency(np.where(allowed, layers, np.nan), activations, 0.5))


def every(space: SearchSpace, activations: tuple[Act, ...]) -> Choices:
    """All configurations of a small space."""
    column, off = {s: i for i, s in enumerate(space.schemes)}, len(activations)
    pairs = [
        [(column[s], off if str(row[0]) == "fp" else a) for s in row for a in range(off)]
        for row in space.choices.values()
    ]
    table = np.array(list(itertools.product(*pairs)))
    return Choices.picked(space, table[..., 0], table[..., 1], (*activations, 16))


def total(scores: np.ndarray, activations: tuple[Act, ...], rows: Choices) -> np.ndarray:
    place = rows.act_index((*activations, 16)) % len(activations)  # 16 of excluded layers: any
    return np.asarray(scores[np.arange(rows.weights.shape[1]), rows.weights, place].sum(1))


def middle(cost: CostModel, share: float, *names: str) -> Budget:
    """Limits at a share of the way from the smallest to the largest possible cost."""
    limits = cost.limits(None if {"bops", "latency_ms"} & set(names) else 8)
    values = {n: limits[n][0] + share * (limits[n][1] - limits[n][0]) for n in names}
    return Budget(**{n: int(v) if n == "bytes" else v for n, v in values.items()})  # type: ignore[arg-type]


def interacting(space: SearchSpace, seed: int = 0) -> Predict:
    """log of summed layer errors with strong products of distant layers: no additive score tells its
    optimum."""
    rng = np.random.default_rng(seed)
    layers = len(space.choices)
    error = np.array(
        [
            [2.0 ** -space.code_bits(k, s) * rng.uniform(0.7, 1.3) for s in space.schemes]
            for k in space.choices
        ]
    )
    alone, pair = rng.lognormal(0, 1, layers), rng.lognormal(1, 1, layers)

    def predict(rows: Choices) -> np.ndarray:
        e = error[np.arange(layers), rows.weights] * np.where(rows.acts == 6, 1.2, 1.0)
        return np.asarray(np.log(0.05 + e @ alone + 4 * (e * np.roll(e, layers // 2, axis=1)) @ pair))

    return predict


class Lab:
    """A fake study: measures a known function, and fits a quadratic model of layer errors to what it
    measured."""

    def __init__(self, space: SearchSpace, count: int, failing: int = 0):
        self.space, self.truth, self.failing = space, interacting(space, 1), failing
        self.values: dict[str, tuple[QuantConfig, float]] = {}
        self.batches: list[list[QuantConfig]] = []
        self.measure(list({c.digest: c for c in space.sample(count, seed=3)}.values()))
        self.batches.clear()

    def measure(self, configs: list[QuantConfig]) -> None:
        assert len({c.digest for c in configs}) == len(configs) and not {c.digest for c in configs} & set(
            self.values
        )
        self.batches.append(configs)
        for config, value in zip(configs, self.truth(Choices.of(self.space, configs)), strict=True):
            bad = self.failing and len(self.values) % self.failing == 0
            self.values[config.digest] = (config, float("nan") if bad else float(value))

    def predict_factory(self) -> Predict:
        from sklearn.kernel_ridge import KernelRidge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        bits = np.array(
            [[self.space.code_bits(k, s) for s in self.space.schemes] for k in self.space.choices]
        )

        def features(rows: Choices) -> np.ndarray:
            error = 2.0 ** -bits[np.arange(len(bits)), rows.weights]
            return np.concatenate([error, rows.weights / 10, rows.acts / 8], 1)

        good = [(c, v) for c, v in self.values.values() if np.isfinite(v)]
        fitted = make_pipeline(StandardScaler(), KernelRidge(kernel="poly", degree=2, alpha=0.01))
        fitted.fit(features(Choices.of(self.space, [c for c, _ in good])), [v for _, v in good])
        return lambda rows: np.asarray(fitted.predict(features(rows)))

    def search(self, cost: CostModel, budget: Budget, rows: int = ROWS, **options: Any) -> list[Candidate]:
        progress, judge = options.pop("progress", no_progress), options.pop("judge", None)
        experiment = Experiment(self.predict_factory, self.measure, lambda: list(self.values.values()), judge)
        asked = SearchOptions(budget, **{"method": "surrogate", **options})
        return find_candidates(cost, asked, experiment, rows=rows, progress=progress)

    def best(self, cost: CostModel, budget: Budget) -> float:
        """The least value that was measured within the budget, at the activations that it leaves open."""
        allowed = [*activation_choices(self.space, budget), 16]
        known = [(Choices.of(self.space, [c]), v) for c, v in self.values.values() if np.isfinite(v)]
        inside = [
            v
            for row, v in known
            if np.isin(row.acts, allowed).all() and cost.within(cost.totals(row), budget)[0]
        ]
        return min(inside)


OPERATORS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "ff.up", "ff.down")


PLANTED = (7, 22, 41)  # layers made far more sensitive than the others


SCHEMES = ("usq2", "usq3", "usq4", "usq8", "vq2", "vq3", "vq4", "vq2c", "vq3c", "vq4c")


class World:
    """A made-up model of 60 layers whose objective is a known, non-additive function of weight errors and
    activation bits. ``probed``: what schemes and activations do alone is known, and a study has mse and
    psnr."""

    def __init__(self, count: int = 300, seed: int = 0, noise: float = 0.02, probed: bool = False):
        rng = np.random.default_rng(seed)
        self.graph = nx.DiGraph(
            family="dit", model_class="Made", config={}, weights=60 * 192 * 192, other_elements=100
        )
        for i in range(60):
            self.graph.add_node(
                f"b{i // 6}.{OPERATORS[i % 6]}",
                kind="linear",
                operator=OPERATORS[i % 6],
                block=f"b{i // 6}",
                depth=i,
                shape=(192, 192),
                bias=True,
                groups=1,
                tokens=16,
                macs=16 * 192 * 192,
                step_invariant=False,
                split=None,
                attention=None,
            )
        self.space = make_space(self.graph, "f" * 16, "made", schemes=SCHEMES)
        self.errors = {
            (n, str(s)): float(
                min(0.9, 2.5 * 4.0**-s.bits * (0.7 if s.kind == "vq" else 1.0) * rng.lognormal(0, 0.1))
            )
            for n in self.space.layers
            for s in self.space.choices[n]
        }
        self.cost = CostModel(self.graph, self.space)
        self.weight_of = rng.lognormal(0, 0.5, 60) * 0.1
        self.weight_of[list(PLANTED)] = (1.5, 1.2, 0.9)
        self.probes = self._probes() if probed else {}
        self.encoder = Encoder(self.space, self.graph, self.errors, self.probes or None)
        self.choices = self.draw(count, rng)
        self.y = self.truth(self.choices) * np.exp(noise * rng.normal(size=count))
        self.bits = self.cost.totals(self.choices)["bits"]

    def _probes(self) -> dict[tuple[str, str], dict]:
        alone = {k: self.weight_of[self.space.layers.index(k[0])] * v for k, v in self.errors.items()}
        alone |= {
            (n, a): 0.03 * w * (a == "a6")
            for n, w in zip(self.space.layers, self.weight_of, strict=True)
            for a in ("a6", "a8")
        }
        return {k: {"damage": 1e-3 * float(v), "sketch": [0.0] * SKETCH} for k, v in alone.items()}

    @property
    def damages(self) -> Damages:
        return Damages.of(self.space, self.probes)

    def draw(self, count: int, rng: np.random.Generator) -> Choices:
        """Bits of each configuration tilted to a mean of its own; a8, or a6 with a probability of its own
        in half of them."""
        bits = np.array([s.bits for s in self.space.schemes[1:]], float)
        odds = np.exp(rng.uniform(-1.5, 0.5, count)[:, None] * bits)
        odds /= odds.sum(1, keepdims=True)
        weights = 1 + np.stack([rng.choice(len(bits), 60, p=p) for p in odds])
        share = rng.uniform(size=(count, 1)) * (rng.random((count, 1)) < 0.5)
        return Choices(self.space, weights, np.where(rng.random(weights.shape) < share, 6, 8))

    def truth(self, rows: Choices) -> np.ndarray:
        total = self.total(rows)
        return 20 + 200 * total / (total + 1.5)

    def total(self, rows: Choices) -> np.ndarray:
        damage = self.weight_of * (self.encoder.error[np.arange(60), rows.weights] + 0.03 * (rows.acts == 6))
        block = damage.reshape(len(damage), 10, 6).sum(2)
        return block.sum(1) + 3 * (block[:, :-1] * block[:, 1:]).sum(1) + 1.5 * np.sqrt(block.max(1))

    def study(self, path, count: int | None = None, objective: str = "fid", kind: str = "sample") -> Study:
        study, protocol = Study(path), Protocol(objective=objective)
        with study.writing():
            study.begin("made", self.space.fingerprint, to_json(self.graph), self.space.to_dict(), protocol)
            study.add_features(
                {**self.probes, **{k: {"error": v, **self.probes.get(k, {})} for k, v in self.errors.items()}}
            )
            for config, y in list(zip(self.choices.configs(), self.y, strict=True))[:count]:
                self.record(
                    study,
                    config,
                    {"fid": float(y), "is": float(100 / y), **self.distance(config)},
                    kind,
                    protocol,
                )
        return study

    def distance(self, config) -> dict[str, float]:
        if not self.probes:
            return {}
        mse = 1e-3 * float(self.total(Choices.of(self.space, [config]))[0])
        return {"mse": mse, "psnr": -10 * float(np.log10(mse))}

    def record(self, study: Study, config, metrics: dict[str, float], kind: str, protocol: Protocol) -> None:
        cost = self.cost(config)
        measured = Measurement(config.digest, protocol.digest, metrics, 1.0)
        study.record(
            config, measured, kind, {"bits": cost.bits_per_weight, "bytes": cost.bytes, "bops": cost.bops}
        )


def near_study(path, count: int = 160, seed: int = 0) -> tuple[World, Study]:
    """A study of the default design."""
    near = World(count, seed, probed=True)
    near.choices = Choices.of(
        near.space, Design.parse(DEFAULT).draw(near.space, count, seed, near.damages, near.cost)
    )
    near.y = near.truth(near.choices) * np.exp(0.02 * np.random.default_rng(seed).normal(size=count))
    return near, near.study(path)


def assert_near(found: Mapping[Any, Mapping[str, Any]], expected: Mapping[Any, Mapping[str, Any]]) -> None:
    """The same features, numbers from gradients up to rounding: the last digits of a backward pass depend on
    where a process keeps its weights."""
    assert found.keys() == expected.keys()
    for cell, row in found.items():
        assert row.keys() == expected[cell].keys(), cell
        for name, value in row.items():
            other = expected[cell][name]
            if name == "sketch":
                size = max(map(abs, other))
                assert value == pytest.approx(other, rel=1e-3, abs=1e-3 * size), (cell, name)
            elif name == "damage" and "gradient" in row:
                assert value == pytest.approx(other, rel=1e-3), (cell, name)
            else:
                assert value == other, (cell, name)
