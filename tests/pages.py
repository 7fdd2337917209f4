"""Studies with all that a report shows, made up, and what a page says and loads."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from PIL import Image

from aquabit.cost import CostModel
from aquabit.graph import to_json
from aquabit.scheme import Measurement, Protocol, QuantConfig
from aquabit.space import SearchSpace, make_space
from aquabit.study import Study

EVIL = ["<img src=x onerror=alert(1)>", r"$\alpha$_%&"]


PROTOCOL = Protocol()


OPERATORS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.out",
    "cross_attn.k",
    "ff.up",
    "ff.down",
    "adaln",
)


def make_graph(count: int, names: list[str]) -> nx.DiGraph:
    """A chain of ``count`` layers in blocks of eight; ``names`` replace the first ones."""
    graph = nx.DiGraph(
        family="dit", model_class="Synthetic", config={}, weights=count * 192 * 192, other_elements=5000
    )
    for depth in range(count):
        block, operator = f"transformer_blocks.{depth // 8}", OPERATORS[depth % 8]
        name = names[depth] if depth < len(names) else f"{block}.{operator}.to_out_{depth}.proj"
        graph.add_node(
            name,
            kind="linear",
            operator=operator,
            block=block,
            depth=depth,
            shape=(192, 192),
            bias=True,
            groups=1,
            tokens=64,
            macs=64 * 192 * 192,
            step_invariant=False,
            split=None,
            attention=None,
        )
        if depth:
            graph.add_edge(list(graph)[-2], name)
    return graph


def png(rng: np.random.Generator) -> bytes:
    pixels = (rng.random((2 * 32, 8 * 32)) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Synthetic:
    """A study whose FID is a sum of per-layer damages with noise."""

    def __init__(
        self,
        path: Path,
        layers: int = 24,
        samples: int = 40,
        names: list[str] | None = None,
        model: str = "synthetic-dit",
        videos: bool = False,
    ):
        self.videos = videos
        self.rng = np.random.default_rng(0)
        graph = make_graph(layers, names or [])
        self.space: SearchSpace = make_space(graph, "f" * 16, model)
        self.cost = CostModel(graph, self.space)
        self.damage = np.exp(self.rng.normal(-2.5, 1.8, layers))
        self.study, self.model = Study(path), model
        self.study._db.execute(
            "PRAGMA synchronous = OFF"
        )  # hundreds of transactions that need not survive a power cut
        self.study.begin(model, "f" * 16, to_json(graph), self.space.to_dict(), PROTOCOL)
        self.configs = self.space.sample(samples)
        self.uniform = {s: self.space.uniform(s) for s in ("usq2", "usq3", "usq4", "usq8")}
        self.found = [self.greedy(bits) for bits in (2.4, 2.8, 3.15, 3.6)]
        self.winner = self.found[2]

    def greedy(self, bits: float) -> QuantConfig:
        config, order = self.space.uniform("usq2"), np.argsort(-self.damage)
        for layer in [self.space.layers[i] for i in order]:
            changed = config.with_layer(layer, "vq4")
            config = changed if self.cost(changed).bits_per_weight <= bits else config
        return config

    def lost(self, config: QuantConfig) -> float:
        return float(
            sum(
                d * 4.0 ** (3 - config[n].weight.code_bits())
                for n, d in zip(self.space.layers, self.damage, strict=True)
            )
        )

    def fid(self, config: QuantConfig, noise: float = 0.02) -> float:
        return float((1.5 + self.lost(config)) * np.exp(self.rng.normal(0, noise)))

    def psnr(self, config: QuantConfig) -> float:
        return float(40 - 10 * np.log10(self.lost(config)))

    def record(
        self, config: QuantConfig, kind: str, protocol: Protocol = PROTOCOL, picture: bool = False
    ) -> float:
        cost, value = self.cost(config), self.fid(config)
        metrics = {"fid": value, "psnr": 100.0 if kind == "reference" else self.psnr(config), "is": 8.0}
        if self.videos:
            metrics["temporal_psnr"] = metrics["psnr"] - 3
        m = Measurement(config.digest, protocol.digest, metrics, 0.8, {"torch": "2.13.0", "python": "3.11"})
        totals = {"bits": cost.bits_per_weight, "bytes": cost.bytes, "bops": cost.bops}
        self.study.record(config, m, kind, totals, png(self.rng) if picture else None)
        return value

    def measure(self) -> Synthetic:
        self.record(self.space.full_precision(), "reference", picture=True)
        for config in self.uniform.values():
            self.record(config, "uniform", picture=True)
        self.values = [self.record(config, "sample") for config in self.configs]
        bad = self.space.sample(2, seed=99)
        for config in bad:
            m = Measurement(
                config.digest, PROTOCOL.digest, {}, 0.5, {}, "failed", "images 3 to 9 are not finite <b>"
            )
            self.study.record(config, m, "sample", {"bits": 3.0, "bytes": 1, "bops": 1.0})
        return self

    def explain(self) -> Synthetic:
        effect = self.damage * 10
        nodes = [
            {
                "name": n,
                "operator": self.space.operators[n],
                "block": f"transformer_blocks.{i // 8}",
                "effect": e,
                "low": 0.7 * e,
                "high": 1.4 * e,
                "schemes": {"usq4": 0.0, "usq2": e},
            }
            for i, (n, e) in enumerate(zip(self.space.layers, effect.tolist(), strict=True))
        ]
        self.study.set(
            sensitivity={
                "objective": "fid",
                "direction": "min",
                "protocol": PROTOCOL.digest,
                "measurements": len(self.configs),
                "bits": 3.0,
                "swap": "usq4:usq2",
                "surrogate": {
                    "within_budget_srcc": 0.83,
                    "srcc": 0.96,
                    "kendall": 0.85,
                    "ndcg10": 0.97,
                    "r2": 0.9,
                    "noise_ceiling": None,
                    "baselines": {
                        "average bits": {"within_budget_srcc": 0.02, "srcc": 0.93},
                        "ridge one-hot": {"within_budget_srcc": 0.61, "srcc": None},
                    },
                },
                "interactions": [
                    {
                        "a": self.space.layers[i],
                        "b": self.space.layers[0],
                        "interaction": 9.0 / (i + 1),
                        "low": 0.5,
                        "high": 12.0,
                    }
                    for i in range(min(12, len(nodes)))
                ],
                "scores": [
                    {
                        "level": "operator",
                        "name": n["operator"],
                        "scheme": "usq2",
                        "layers": 1,
                        "change": 0.5,
                        "score": -0.7,
                        "low": -1.0,
                        "high": 0.1,
                    }
                    for n in nodes[:3]
                ],
                "swarm": self.swarm(),
                "curve": [
                    {"measurements": n, "within_budget_srcc": 0.7 + n / 400, "low": 0.6, "high": 0.9}
                    for n in (20, 40)
                ],
                "layers": nodes,
                "operators": self.groups(nodes, "operator"),
                "blocks": self.groups(nodes, "block"),
                "scatter": [
                    {
                        "config": c.digest,
                        "measured": v,
                        "bits": self.cost(c).bits_per_weight,
                        "predicted": v * float(np.exp(self.rng.normal(0, 0.12))),
                    }
                    for c, v in zip(self.configs, self.values, strict=True)
                ],
            }
        )
        return self

    def swarm(self) -> dict[str, Any]:
        operators = list(dict.fromkeys(self.space.operators.values()))
        some = self.configs[:120]  # as many as `explain` keeps
        size = (len(some), len(operators))
        values = {"shap": self.rng.normal(size=size).tolist(), "bits": self.rng.uniform(2, 8, size).tolist()}
        return {"operators": operators, "configs": [c.digest for c in some], **values}

    @staticmethod
    def groups(nodes: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        table = (
            pd.DataFrame(nodes)
            .groupby(key)
            .agg(
                effect=("effect", "mean"),
                low=("low", "mean"),
                high=("high", "mean"),
                layers=("name", "count"),
            )
        )
        return [
            {"name": r.Index, "effect": r.effect, "low": r.low, "high": r.high, "layers": r.layers}
            for r in table.itertuples()
        ]

    def validate(self) -> Synthetic:
        rows = []
        for i in range(0, len(self.damage), max(1, len(self.damage) // 20)):
            real = float(self.damage[i] * 10 * np.exp(self.rng.normal(0, 0.3)))
            rows.append(
                {
                    "layer": self.space.layers[i],
                    "predicted": self.damage[i] * 10,
                    "real": real,
                    "low": 0.6 * real,
                    "high": 1.4 * real,
                    "n": 2,
                }
            )
        truth = {"srcc": 0.71, "sign_agreement": 0.95, "flips": 2 * len(rows), "rows": rows}
        self.study.set(
            sensitivity={**(self.study.get("sensitivity") or {}), "validation": truth, "ranking": "combined"}
        )
        return self

    def search(self) -> Synthetic:
        blocks = [PROTOCOL.block(i) for i in range(1, 6)]
        self.record(self.winner, "candidate", picture=True)
        fresh: dict[str, list[float]] = {}
        for protocol in blocks:
            self.study.add_protocol(protocol)
            for config in [*self.found, self.uniform["usq3"]]:
                fresh.setdefault(config.digest, []).append(self.record(config, "fresh", protocol))
        members = []
        for config in self.found:
            cost, v = self.cost(config), np.array(fresh[config.digest])
            members.append(
                {
                    "bits_per_weight": cost.bits_per_weight,
                    "bytes": cost.bytes,
                    "bops": cost.bops,
                    "operations": {"multiply_adds": 1e7, "lut_adds": 2e6},
                    "latency_ms": 5.0 + cost.bits_per_weight,
                    "predicted": {"fid": v.mean() * 0.9},
                    "measured": {"fid": {"value": v.mean(), "low": v.mean() - 0.5, "high": v.mean() + 0.5}},
                    "config": config.to_dict(),
                }
            )
        sides = {}
        for name, config in (("winner", self.winner), ("uniform", self.uniform["usq3"])):
            cost = self.cost(config)
            sides[name] = {
                "config": config.digest,
                "bytes": cost.bytes,
                "bits": cost.bits_per_weight,
                "fid blocks": fresh[config.digest],
            }
        sides["uniform"]["scheme"] = "usq3"
        gap = float(np.mean(sides["winner"]["fid blocks"]) - np.mean(sides["uniform"]["fid blocks"]))
        difference = {"value": gap, "low": gap - 0.4, "high": gap + 0.4}
        comparison = {**sides, "difference": difference, "metric": "fid", "blocks": 5}
        self.study.set(
            front={
                "budget": {"bits": 3.17},
                "winner": self.winner.digest,
                "members": members,
                "comparison": comparison,
            }
        )
        return self

    def judged(self) -> Synthetic:
        """What studies hold since searches judge by PSNR and effects speak of good configurations; the
        objective cannot tell."""
        found = self.study.get("front")
        sides = {
            k: {**found["comparison"][k], "psnr": self.psnr(c)}
            for k, c in (("winner", self.winner), ("uniform", self.uniform["usq3"]))
        }
        gap = sides["winner"]["psnr"] - sides["uniform"]["psnr"]
        for member, config in zip(found["members"], self.found, strict=True):
            value = self.psnr(config)
            member["measured"]["psnr"] = {"value": value, "low": value - 0.2, "high": value + 0.2}
            member["predicted"] = {"psnr": value + 1}
            if self.videos:
                member["measured"]["temporal_psnr"] = {"value": value - 3, "low": None, "high": None}
        rows = [
            {
                "uniform": s,
                "bytes": self.cost(c).bytes,
                "metric": "psnr",
                "value": self.psnr(c),
                "found_bytes": next(
                    (m["bytes"] for m in found["members"] if m["measured"]["psnr"]["value"] >= self.psnr(c)),
                    None,
                ),
            }
            for s, c in self.uniform.items()
        ]
        rival = {k: v for k, v in sides["uniform"].items() if k != "scheme"} | {"name": "rival.json"}
        found["comparison"] |= {
            **sides,
            "difference": {"value": -0.1, "low": -0.5, "high": 0.3, "images_needed": 10241},
            "psnr_difference": {"value": gap, "low": gap - 0.3, "high": gap + 0.3},
            "same_quality": rows,
            "against": [rival],
            "judged": {
                "metric": "psnr",
                "finalists": 9,
                "images": 512,
                "next_best": {"value": 0.2, "low": 0.1, "high": 0.3},
            },
        }
        found["proof"] = {
            "optimum": 1.5,
            "optimum_bound": 1.4,
            "optimum_gap": 0.1,
            "predicted": 1.5,
            "bound": None,
            "gap": None,
            "nodes": 0,
        }
        told = self.study.get("sensitivity")
        told["surrogate"]["among_good"] = {
            "srcc": None,
            "count": 14,
            "noise_ceiling": None,
            "baselines": {"ridge one-hot": None},
        }
        for row in told["layers"]:
            row |= {
                "psnr_effect": row["effect"] / 8,
                "psnr_low": row["effect"] / 9,
                "psnr_high": row["effect"] / 7,
            }
        half = {"srcc": 0.71, "sign_agreement": 0.95, "layers": 4, "flips": 8}
        told["validation"] |= {"random": half, "top": {**half, "srcc": 0.44}}
        for i, row in enumerate(told["validation"]["rows"]):
            row["checks"] = "top" if i % 2 else "random"
        self.study.set(front=found, sensitivity=told)
        return self

    def whole(self) -> Synthetic:
        return self.measure().explain().validate().search()


class Loads(HTMLParser):
    """What a page loads by itself, what it links to, its visible text, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            self.handlers += [key] if key.startswith("on") else []
            self.ids += [value or ""] if key == "id" else []
            if key in ("href", "xlink:href"):
                (self.links if tag == "a" else self.loads).append(value or "")
            elif key in ("src", "srcset", "data", "poster", "action", "background"):
                self.loads.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: Path) -> Loads:
    reader = Loads()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader
