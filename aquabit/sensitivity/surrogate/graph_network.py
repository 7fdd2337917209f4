"""A graph network in the manner of Qua²SeDiMo (arXiv 2412.14628; SCIENCE section 1), for comparison: GATv2
layers over the graph of layers, trained so that the L1 norm of an embedding ranks configurations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aquabit.choices import Choices
from aquabit.graph import layers as graph_layers
from aquabit.scheme import AquabitError
from aquabit.sensitivity.features import Encoder
from aquabit.sensitivity.surrogate.regressor import Estimator

# nearest layers upstream that a layer attends to, beside itself: bounds the work on deep residual streams
SOURCES = 4
HELD_OUT = 0.15  # of the training configurations, for early stopping
# epochs without a better held-out loss, from the middle on: before, the rate is high and the loss may well
# rise
PATIENCE = 12
SOFTNESS = 0.2  # of soft ranks, in standard deviations of a score
CHUNK = 256  # configurations predicted at once: bounds memory
FACTS = 6  # numbers of a node beside its operator type and scheme


@dataclass(frozen=True)
class Nodes:
    """What the network knows of a model: per layer its operator type, its sources and fixed facts; per
    (layer, scheme) what that does."""

    operator: np.ndarray  # [layers] index of the operator type
    sources: np.ndarray  # [layers, 1 + SOURCES] itself, then the nearest layers upstream, padded with itself
    known: np.ndarray  # [layers, 1 + SOURCES] which of these are no padding
    fixed: np.ndarray  # [layers, 2] depth of its block and log size, standardised
    schemes: np.ndarray  # [layers, schemes, 2] bits and log10 of the weight error, standardised
    block: np.ndarray  # [layers] index of the block
    # [activation choices, 2] how low their bits are, and the change of that over the steps
    activation_reduction: np.ndarray

    @staticmethod
    def of(encoder: Encoder) -> Nodes:
        names, facts = encoder.space.layers, graph_layers(encoder.graph)
        place = {name: i for i, name in enumerate(names)}
        operators, blocks = (
            list(dict.fromkeys(str(facts[n][key]) for n in names)) for key in ("operator", "block")
        )
        block = np.array([blocks.index(str(facts[n]["block"])) for n in names])
        sources = np.tile(np.arange(len(names))[:, None], (1, 1 + SOURCES))
        known = np.zeros(sources.shape, bool)
        known[:, 0] = True
        for i, name in enumerate(names):
            for k, source in enumerate(upstream(encoder.graph, name)):
                sources[i, k + 1], known[i, k + 1] = place[source], True
        error = np.log10(np.where(np.isnan(encoder.error), np.nanmax(encoder.error), encoder.error))
        low, order = encoder.level_reduction()
        fixed = np.stack([block.astype(float), np.log(encoder.size_share)], 1)
        schemes = np.stack([encoder.bits, error], 2)
        return Nodes(
            np.array([operators.index(str(facts[n]["operator"])) for n in names]),
            sources,
            known,
            _standardised(fixed, 0),
            _standardised(schemes, (0, 1)),
            block,
            np.concatenate([low, order], 1),
        )


def upstream(graph: nx.DiGraph, layer: str) -> list[str]:
    """The SOURCES nearest layers before ``layer``, nearest first; merges are seen through."""
    return list(islice(_backwards(graph, layer), SOURCES))


def _backwards(graph: nx.DiGraph, layer: str) -> Iterator[str]:
    seen, waiting = {layer}, deque(graph.predecessors(layer))
    while waiting:
        node = waiting.popleft()
        if node in seen:
            continue
        seen.add(node)
        if graph.nodes[node]["kind"] == "merge":
            waiting.extend(graph.predecessors(node))
        else:
            yield node


def _standardised(values: np.ndarray, axis: Any) -> np.ndarray:
    return np.asarray(
        (values - values.mean(axis, keepdims=True)) / np.maximum(values.std(axis, keepdims=True), 1e-6)
    )


class _Attention(nn.Module):
    """GATv2: score of source j for layer i = a . leaky_relu(W_to h_i + W_from h_j) per head; softmax over
    the sources."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.target, self.source, self.heads = nn.Linear(width, width), nn.Linear(width, width), heads
        self.score = nn.Parameter(torch.randn(heads, width // heads) / (width // heads) ** 0.5)

    def forward(self, h: torch.Tensor, sources: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """[n, layers, width] to the same; ``sources`` and ``known`` [layers, k]."""
        n, count, width = h.shape
        near = self.source(h)[:, sources.flatten()].view(n, count, -1, self.heads, width // self.heads)
        mixed = F.leaky_relu(self.target(h).view(n, count, 1, self.heads, -1) + near, 0.2)
        score = (mixed * self.score).sum(-1).masked_fill(~known[None, :, :, None], -torch.inf)
        return (score.softmax(2)[..., None] * near).sum(2).flatten(2)


class _Network(nn.Module):
    """Node embeddings after every hop, and a prediction from the mean embedding of the last."""

    def __init__(self, nodes: Nodes, width: int, hops: int, heads: int):
        super().__init__()
        schemes = nodes.schemes.shape[1]
        self.operators = nn.Embedding(int(nodes.operator.max()) + 1, width)
        self.schemes = nn.Embedding(schemes, width)
        self.blocks = nn.Embedding(int(nodes.block.max()) + 1, width)
        self.facts, self.mixed = nn.Linear(FACTS, width), nn.Linear(width, width)
        self.hops = nn.ModuleList(_Attention(width, heads) for _ in range(hops))
        self.head = nn.Linear(width, 1)
        for name in ("operator", "block", "sources", "known"):
            self.register_buffer(name, torch.as_tensor(getattr(nodes, name)))
        for name, value in (("fixed", nodes.fixed), ("per_scheme", nodes.schemes)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    def embed(self, weights: torch.Tensor, low: torch.Tensor) -> list[torch.Tensor]:
        """Scheme indices [n, layers] and (activation_reduction, its order) of activations [n, layers, 2]
        to [n, layers, width] for each hop, 0 first."""
        n, count = weights.shape
        fixed: Any = self.fixed
        per_scheme: Any = self.per_scheme
        facts = torch.cat([fixed.expand(n, -1, -1), per_scheme[torch.arange(count), weights], low], 2)
        fixed = self.operators(self.operator) + self.blocks(self.block)
        h = F.relu(fixed + self.schemes(weights) + self.facts(facts))
        h = F.relu(self.mixed(h))
        found = [h]
        for hop in self.hops:
            h = F.relu(h + hop(h, self.sources, self.known))
            found.append(h)
        return found

    def forward(self, weights: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction [n], and the L1 norm of the mean embedding after each hop, [hops + 1, n]."""
        means = [h.mean(1) for h in self.embed(weights, low)]
        return self.head(means[-1])[:, 0], torch.stack([m.abs().sum(1) for m in means])


def soft_spearman(score: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """1 - the correlation between soft ranks of ``score`` [..., n] and ranks of ``z`` [n]; a soft rank
    sums sigmoids of differences."""
    score = (score - score.mean(-1, keepdim=True)) / (score.std(-1, keepdim=True) + 1e-6)
    soft = torch.sigmoid((score[..., :, None] - score[..., None, :]) / SOFTNESS).sum(-1)
    rank = z.argsort().argsort().to(soft)
    soft, rank = soft - soft.mean(-1, keepdim=True), rank - rank.mean()
    return 1 - (soft * rank).sum(-1) / (soft.norm(dim=-1) * rank.norm() + 1e-6)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
            yield
    finally:
        torch.set_num_threads(before)


class GraphNetwork(Estimator):
    """GATv2 layers over the graph of layers; loss = squared error of the standardised target + ``ranking``
    times (1 - soft Spearman) of the L1 norm of the mean embedding, averaged over hops; so the norm of an
    embedding is a score, larger = worse.

    Training stops when the loss on a held-out 15 % of the configurations no longer falls. ``nodes`` is what
    it must know of the model: make one by ``for_model``. Deterministic, one thread.
    """

    def __init__(
        self,
        width: int = 32,
        hops: int = 4,
        heads: int = 4,
        rate: float = 1e-2,
        decay: float = 1e-3,
        ranking: float = 0.5,
        batch: int = 32,
        epochs: int = 80,
        seed: int = 0,
        direction: Literal["min", "max"] = "min",
        log: bool | None = None,
        nodes: Nodes | None = None,
    ):
        self.width, self.hops, self.heads = width, hops, heads
        self.rate, self.decay, self.ranking, self.batch, self.epochs = rate, decay, ranking, batch, epochs
        self.seed, self.direction, self.log, self.nodes = seed, direction, log, nodes

    @classmethod
    def for_model(cls, encoder: Encoder, **parameters: Any) -> Self:
        return cls(**{"nodes": Nodes.of(encoder), **parameters})

    def features(self, encoder: Encoder, choices: Choices) -> np.ndarray:
        """Scheme indices, then places in ``Encoder.levels`` of activation choices: [n, 2 layers]."""
        return np.concatenate([choices.weights, choices.act_index(encoder.levels)], 1)

    def _fit(self, X: np.ndarray, z: np.ndarray) -> None:
        inputs, target = self._inputs(X), torch.as_tensor(z, dtype=torch.float32)
        with _one_thread():
            self.network_ = self._train(inputs, target, 1000 * self.seed)

    def _predict(self, X: np.ndarray) -> np.ndarray:
        weights, low = self._inputs(X)
        if not len(weights):
            return np.zeros(0)
        with _one_thread(), torch.inference_mode():
            chunks = zip(weights.split(CHUNK), low.split(CHUNK), strict=True)
            parts = [self.network_(*chunk)[0] for chunk in chunks]
        return torch.cat(parts).double().numpy()

    def _nodes(self) -> Nodes:
        if self.nodes is None:
            raise AquabitError(
                "a graph network must know the model's graph: make it by GraphNetwork.for_model(encoder)"
            )
        return self.nodes

    def _inputs(self, X: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Scheme indices [n, layers] and (activation_reduction, its order) [n, layers, 2]."""
        nodes = self._nodes()
        weights, levels = np.split(np.asarray(X).astype(int), 2, 1)
        if weights.shape[1] != len(nodes.operator):
            raise AquabitError(
                f"features have {X.shape[1]} columns; {len(nodes.operator)} layers take"
                f" {2 * len(nodes.operator)}"
            )
        low = nodes.activation_reduction[levels]
        return torch.as_tensor(weights), torch.as_tensor(low, dtype=torch.float32)

    def _train(self, inputs: tuple[torch.Tensor, torch.Tensor], z: torch.Tensor, seed: int) -> _Network:
        """One network, as it was at its best held-out loss."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _Network(self._nodes(), self.width, self.hops, self.heads)
            order = torch.randperm(len(z))
            out = max(2, round(HELD_OUT * len(z)))
            held, kept = order[:out], order[out:]
            optimiser = torch.optim.AdamW(net.parameters(), lr=self.rate, weight_decay=self.decay)
            steps = self.epochs * -(-len(kept) // self.batch)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser, self.rate, total_steps=steps, pct_start=0.2
            )
            best, state, waited = float("inf"), dict(net.state_dict()), 0
            for epoch in range(self.epochs):
                for rows in kept[torch.randperm(len(kept))].split(self.batch):
                    optimiser.zero_grad()
                    self._loss(net, inputs, z, rows).backward()
                    optimiser.step()
                    schedule.step()
                with torch.no_grad():
                    loss = float(self._loss(net, inputs, z, held))
                if loss < best:
                    best, state, waited = loss, {k: v.clone() for k, v in net.state_dict().items()}, 0
                elif epoch >= self.epochs // 2 and (waited := waited + 1) > PATIENCE:
                    break
            net.load_state_dict(state)
        return net.eval()

    def _loss(
        self, net: _Network, inputs: tuple[torch.Tensor, torch.Tensor], z: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        predicted, norms = net(inputs[0][rows], inputs[1][rows])
        loss = F.mse_loss(predicted, z[rows])
        return loss + self.ranking * soft_spearman(norms, z[rows]).mean() if len(rows) > 2 else loss
