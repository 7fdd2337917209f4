"""A denoiser while diffusers loads it: packed tensors are kept from it and become codes, dense ones are
quantized file by file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from aquabit.graph import described_inputs, places_of, repeated_names, trace
from aquabit.graph import layers as layer_nodes
from aquabit.quant.artifact import Contents, finish_, is_own, place_layers_, stored_statistics, tie_
from aquabit.quant.correction.statistics import Statistics
from aquabit.quant.finetuning.store import stored_weight
from aquabit.quant.layer_facts import graph_from, layer_facts
from aquabit.quant.model import fingerprint_of, storage_dtype, stored_hash
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import FP, AquabitError, QuantConfig


def dense_graph(model: Any) -> tuple[nx.DiGraph, str]:
    """The layers of a model on the meta device: traced, or, where it cannot be followed, by name, and why.

    By name, every Linear and Conv2d is a layer, and what reads a layer's output is not known: no roles in
    attention, no concatenated skips. Those inside torch's own attention are never called.
    """
    try:
        return trace(model), ""
    except AquabitError as error:
        why = str(error).split(";")[0]
    places = places_of(model)
    modules = dict(model.named_modules())
    inside = [n for n in places if isinstance(modules[n.rpartition(".")[0]], nn.MultiheadAttention)]
    tied = {place: name for name, row in places.items() for place, _ in row[1:]}
    return graph_from({"names": list(places), "uncalled": inside}, tied, model), why


class Unpacking:
    """Loading of one packed model; ``model`` is on the meta device.

    Tensors that the layers use as they are stored (biases, weights in full precision) keep their 16 bits; the
    rest takes ``dtype``, which is diffusers' doing. ``fp32`` names modules that stay in float32.
    """

    def __init__(
        self,
        model: Any,
        config: QuantConfig,
        facts: Mapping[str, Any],
        dtype: torch.dtype,
        fp32: Iterable[str] = (),
        graph: nx.DiGraph | None = None,
    ):
        self.model, self.config, self.facts = model, config, facts
        tie_(model, facts.get("tied", {}))
        self.expected, self.repeated = set(model.state_dict()), repeated_names(model)
        self.graph = self._graph() if graph is None else graph
        self.tied = dict[str, str](self.graph.graph.get("tied", {}))
        names = layer_nodes(self.graph)
        dtypes = {n: torch.float32 if set(fp32) & set(n.split(".")) else dtype for n in names}
        self.coded = {f"{n}.weight" for n in names if config[n].weight != FP}
        self.layers = place_layers_(model, self.graph, config, dtypes)
        # stored once, by the first of its places
        self.elsewhere = self.repeated | {f"{place}.weight" for place in self.tied}
        self.own = (
            self.expected & {f"{n}.{part}" for n in self.layers for part in ("weight", "bias")} - self.coded
        )
        self.stored_as_codes = self.coded
        self.tensors: dict[str, Tensor] = {}

    def _graph(self) -> nx.DiGraph:
        if "layers" in self.facts:
            return graph_from(self.facts["layers"], self.facts.get("tied", {}), self.model)
        return trace(self.model, described_inputs(self.facts["inputs"]) if "inputs" in self.facts else None)

    def count_(self, counted: bool) -> None:
        """Let the empty weights of coded layers take, on the meta device, the bytes that their codes will."""
        for key in self.coded:
            layer = self.layers[key.removesuffix(".weight")]
            size = sum(self.config[key.removesuffix(".weight")].weight.stored_bytes(layer.shape))
            layer.weight = (
                torch.empty(size, dtype=torch.uint8, device="meta")
                if counted
                else torch.empty(0, dtype=layer.compute.dtype)
            )

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Nothing may be missing; raises AquabitError."""
        left = sorted((set(keys) & self.expected) - self.stored_as_codes - self.elsewhere)
        if left:
            raise AquabitError(
                f"the weights of {type(self.model).__name__} lack {left[0]!r} ({len(left)} such tensors)"
            )
        return []

    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One file's tensors, without those that are ours."""
        self.tensors |= {k: v for k, v in state.items() if is_own(k, self.config)}
        rest = {k: v for k, v in state.items() if k not in self.tensors}
        unexpected = [k for k in rest if k not in self.expected - self.coded]
        if unexpected:
            raise AquabitError(
                f"the weights hold {unexpected[0]!r}, which {type(self.model).__name__} with this"
                " configuration has not"
            )
        return rest

    def set_(self, name: str, tensor: Tensor, device: Any) -> None:
        """A layer's own tensor, as it was stored."""
        layer, _, part = name.rpartition(".")
        setattr(self.layers[layer], part, tensor.to(device))

    def finish_(self) -> Contents:
        """Every file was read."""
        for name, layer in self.layers.items():
            scheme, device = self.config[name].weight, layer.weight.device
            if scheme != FP:
                shape, choice = tuple(layer.shape), self.config[name]
                layer.set_packed_(stored_weight(name, choice, shape, self.tensors, "the artifact"), scheme)
                if device.type != "cpu":
                    layer.to(device)
        ranges = finish_(self.model, self.graph, self.layers, self.config, self.tensors)
        statistics = stored_statistics(self.config, self.facts.get("noise"), self.tensors)
        return self._contents(ranges, statistics)

    def _contents(self, ranges: Mapping[str, Tensor], statistics: Statistics | None = None) -> Contents:
        facts = (self.facts.get("inputs"), self.tied, self.repeated, self.facts.get("layers"))
        return Contents(self.config, self.layers, ranges, statistics, *facts)


class Quantizing(Unpacking):
    """Loading of one dense model whose layers are fitted to ``config`` file by file, in float32, from
    weights as they would be stored."""

    def __init__(
        self,
        model: Any,
        config: QuantConfig,
        dtype: torch.dtype,
        fp32: Iterable[str],
        graph: nx.DiGraph,
        by_name: bool,
    ):
        facts = {"layers": layer_facts(graph)} if by_name else {}  # so that loading needs no trace either
        super().__init__(model, config, facts, dtype, fp32, graph)
        self.stored_as_codes = set()
        self.hashes: dict[str, str] = {}

    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest = {}
        for key, tensor in state.items():
            wide = tensor.float() if tensor.is_floating_point() else tensor
            stored = wide.to(storage_dtype(wide))
            if key in self.expected:
                self.hashes[key] = stored_hash(stored)
            if key not in self.coded:
                rest[key] = stored if key in self.own else stored.to(wide.dtype)
                continue
            name = key.removesuffix(".weight")
            if stored.shape != self.layers[name].shape:
                raise AquabitError(
                    f"{key} is stored as {list(stored.shape)}, the model has {list(self.layers[name].shape)}"
                )
            scheme = self.config[name].weight
            self.layers[name].set_packed_(quantize_weight(stored.float(), scheme), scheme)
            self.tensors[key] = stored[:0]  # its dtype
        return rest

    def finish_(self) -> Contents:
        own = fingerprint_of(self.model, self.hashes)
        if self.config.fingerprint not in ("", own):
            raise AquabitError(
                f"the configuration is for model {self.config.fingerprint} ({self.config.model}), this is"
                f" model {own}"
            )
        self.config = replace(self.config, fingerprint=own)
        for name, layer in self.layers.items():
            kinds = {
                t.dtype
                for t in (self.tensors.get(f"{name}.weight", layer.weight), layer.bias)
                if t is not None
            }
            both = torch.bfloat16 if torch.bfloat16 in kinds else torch.float16
            layer.bias = None if layer.bias is None else layer.bias.to(both)
            if layer.packed is None:
                layer.weight = layer.weight.to(both)
        return self._contents(finish_(self.model, self.graph, self.layers, self.config, {}))
