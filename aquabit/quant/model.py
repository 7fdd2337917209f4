"""QuantizedDenoiser: a denoiser whose layers switch between configurations in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from aquabit.kernels.reference import Accuracy
from aquabit.quant.attention import patch_attention_
from aquabit.quant.bank import Bank, weight_hash
from aquabit.quant.layers import QuantConv2d, QuantLinear, quant_layer
from aquabit.scheme import FP, AquabitError, QuantConfig, Scheme

DECODED_LIMIT = 1 << 28  # bytes of decoded weights that a denoiser keeps


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """The 16-bit type a full-precision tensor is saved in: its own, else float16, or bfloat16 where float16 would overflow."""
    if tensor.dtype in (torch.float16, torch.bfloat16) or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float16 if not tensor.numel() or float(tensor.abs().max()) <= 65504 else torch.bfloat16


def rounded(tensor: Tensor) -> Tensor:
    """What is left of a tensor after it was saved at 16 bits, in its own dtype."""
    return tensor.to(storage_dtype(tensor)).to(tensor.dtype)


def fingerprint(denoiser: nn.Module) -> str:
    """Hash of a denoiser's class, configuration and all its tensors: equal for equal models wherever they were loaded from."""
    config = {k: v for k, v in dict(getattr(denoiser, "config", {})).items() if not k.startswith("_")}
    body = hashlib.sha256(f"{type(denoiser).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(denoiser.state_dict().items()):
        stored = tensor.detach().to(storage_dtype(tensor))
        body.update(f"{name} {weight_hash(stored)}".encode())
    return body.hexdigest()[:16]


class QuantizedDenoiser:
    """Wraps a denoiser in place: every layer of ``graph`` becomes a QuantLinear or QuantConv2d under its own name.

    ``apply`` switches the layers that differ from the last configuration to decoded weights from the bank (dense mode);
    ``pack`` switches to coded ones. Other tensors are rounded to their 16-bit storage, so that dense and packed agree.
    Raises AquabitError for layers that the model does not have.
    """

    def __init__(self, denoiser: nn.Module, graph: nx.DiGraph, bank: Bank | None = None):
        self.denoiser, self.bank = denoiser, bank
        self.layers: dict[str, QuantLinear | QuantConv2d] = {}
        self._full: dict[str, Tensor] = {}
        self._stored: dict[str, torch.dtype] = {}
        self._keys: dict[str, str] = {}
        self._recent: dict[tuple[str, Scheme], Tensor] = {}
        self._recent_bytes = 0
        self._attention = {n: a["attention"] for n, a in graph.nodes(data=True) if a.get("attention")}
        bad = [n for n, p in denoiser.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise AquabitError(f"{bad[0]} holds NaN or Inf ({len(bad)} such tensors); the model file is damaged or overflowed its dtype")
        with torch.no_grad():
            for tensor in denoiser.state_dict().values():  # buffers that are not saved are made anew on loading, unrounded
                tensor.copy_(rounded(tensor))
        for name, node in graph.nodes(data=True):
            if node["kind"] != "merge":
                self._replace(name, node.get("split"))
        patch_attention_(denoiser)
        denoiser.requires_grad_(False)

    def _replace(self, name: str, split: int | None) -> None:
        try:
            module = self.denoiser.get_submodule(name)
        except AttributeError as error:
            raise AquabitError(f"the model has no layer {name!r}; the graph belongs to another model") from error
        layer = quant_layer(module, split)
        owner, _, leaf = name.rpartition(".")
        setattr(self.denoiser.get_submodule(owner), leaf, layer)
        self.layers[name], self._full[name] = layer, layer.weight
        both = [storage_dtype(t) for t in (layer.weight, layer.bias) if t is not None]
        self._stored[name] = torch.bfloat16 if torch.bfloat16 in both else torch.float16

    def key(self, name: str) -> str:
        """The bank's key of a layer's full-precision weight."""
        if name not in self._keys:
            self._keys[name] = weight_hash(self._full[name])
        return self._keys[name]

    def fit(self, name: str, schemes: Iterable[Scheme]) -> dict[str, float]:
        """Fit schemes to one layer in the bank; scheme text -> relative squared error."""
        assert self.bank is not None
        return {str(s): self.bank.fit(self._full[name], self.key(name), s)[1] for s in schemes if s != FP}

    def _coded(self, name: str, scheme: Scheme) -> Any:
        assert self.bank is not None
        full = self._full[name]
        return self.bank.fit(full, self.key(name), scheme)[0].to(full.device)

    def _decoded(self, name: str, scheme: Scheme) -> Tensor:
        """A decoded weight; the last ones used, up to DECODED_LIMIT bytes, are kept (decoding is 3 % of a small measurement)."""
        found = self._recent.pop((name, scheme), None)
        if found is None:
            found = self._coded(name, scheme).dequantize().to(self._full[name].dtype)
            self._recent_bytes += found.nbytes
        self._recent[name, scheme] = found  # the newest last
        while self._recent_bytes > DECODED_LIMIT and len(self._recent) > 1:
            self._recent_bytes -= self._recent.pop(next(iter(self._recent))).nbytes
        return found

    def _check(self, config: QuantConfig) -> None:
        unknown = [n for n in config.layers if n not in self.layers]
        if unknown:
            raise AquabitError(f"unknown layer {unknown[0]!r} in the configuration; the model's layers are listed by `aquabit inspect`")
        shared = [n for n, choice in config.layers.items() if choice.codebook is not None]
        later = {"step groups": config.steps, "a noise correction": config.correction, "shared codebooks": shared}
        asked = [what for what, value in later.items() if value]
        if asked:
            raise AquabitError(f"the configuration asks for {asked[0]}, which this version cannot run; remove it from the configuration")

    def _set_activations(self, name: str, act: int) -> None:
        layer = self.layers[name]
        layer.act = act
        layer.act_output = act if name in self._attention else 16

    def apply(self, config: QuantConfig) -> None:
        """Dense mode: decoded weights and fake-quantized activations."""
        self._check(config)
        for name, layer in self.layers.items():
            choice = config[name]
            self._set_activations(name, choice.act)
            if layer.scheme != choice.weight or layer.coded is not None:
                full = self._full[name]
                layer.set_dense_(full if choice.weight == FP else self._decoded(name, choice.weight), choice.weight)

    def pack(self, config: QuantConfig, accuracy: Accuracy = "fast") -> None:
        """Packed mode: coded weights on the kernels; layers at ``fp`` keep their weight at 16 bits. Full weights are dropped."""
        self._check(config)
        for name, layer in self.layers.items():
            choice = config[name]
            self._set_activations(name, choice.act)
            layer.accuracy = accuracy
            if choice.weight != FP:
                layer.set_packed_(self._coded(name, choice.weight), choice.weight)
            layer.shrink_(self._stored[name])
        self._full.clear()
        self._recent.clear()
