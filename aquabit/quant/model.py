"""QuantizedDenoiser: a denoiser whose layers switch between configurations in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import isfinite
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from aquabit.file_memory import CopiesInFiles, in_file, is_large
from aquabit.graph import codebook_names, fixed_layers, module_config, tied_places
from aquabit.kernels import Accuracy
from aquabit.kernels.codebook import CodebookWeight
from aquabit.parts import parts_of, prefixed
from aquabit.quant.attention import patch_attention_
from aquabit.quant.bank import Bank, FullWeights, weight_hash, weights_folder
from aquabit.quant.calibration.calibrator import Calibrator, Record
from aquabit.quant.calibration.fitting import FitRequest, Fitter
from aquabit.quant.calibration.full_precision import FullPrecision
from aquabit.quant.calibration.ranges import RangeTables, Sample
from aquabit.quant.correction.sampling import Watcher
from aquabit.quant.feed_forward import patch_feed_forwards_
from aquabit.quant.finetuning.store import load_tuned
from aquabit.quant.layer_facts import layer_facts
from aquabit.quant.layers import QuantConv2d, QuantLinear, Setting, check_layer, replace_layer_
from aquabit.quant.step_switch import settings_of, share_out_, switches
from aquabit.runtime import give_back
from aquabit.scheme import (
    FP,
    AquabitError,
    Calibration,
    LayerChoice,
    Progress,
    QuantConfig,
    Scheme,
    act_parts,
    no_progress,
)

DECODED_LIMIT = 1 << 28  # bytes of decoded weights that a denoiser keeps


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """The 16-bit type a full-precision tensor is saved in: its own, else float16, or bfloat16 where
    float16 would overflow."""
    if tensor.dtype in (torch.float16, torch.bfloat16) or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float16 if not tensor.numel() or largest(tensor) <= 65504 else torch.bfloat16


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor, NaN where there is one; nothing of its size is made."""
    low, high = torch.aminmax(tensor.detach())
    return float(torch.maximum(-low, high))


def rounded(tensor: Tensor) -> Tensor:
    """What is left of a tensor after it was saved at 16 bits, in its own dtype."""
    return tensor.to(storage_dtype(tensor)).to(tensor.dtype)


def round_(tensor: Tensor) -> None:
    """Leave of a parameter or buffer what is ``rounded``; a large one that changes comes to lie in a file:
    writing into one that is mapped from a model's files would draw its pages into memory."""
    found = rounded(tensor)
    if not torch.equal(found, tensor):
        if is_large(tensor):
            tensor.data = in_file(found, weights_folder())
        else:
            tensor.copy_(found)
    if is_large(tensor):
        del found
        give_back()


def check_fingerprint(config: QuantConfig, denoiser: nn.Module) -> str:
    """The denoiser's fingerprint; raises AquabitError where the configuration is of another model."""
    own = fingerprint(denoiser)
    if config.fingerprint != own:
        raise AquabitError(
            f"the configuration is for model {config.fingerprint} ({config.model}), this is model {own}"
        )
    return own


def fingerprint(denoiser: nn.Module) -> str:
    """Hash of a denoiser's class, configuration and all its tensors: equal for equal models wherever they
    were loaded from, and for one whose layers are ours, in full precision: what these have besides is
    empty."""
    tensors = denoiser.state_dict().items()
    return fingerprint_of(denoiser, {name: stored_hash(tensor) for name, tensor in tensors if tensor.numel()})


def stored_hash(tensor: Tensor) -> str:
    """Hash of a tensor as it is saved at 16 bits."""
    found = weight_hash(tensor.detach().to(storage_dtype(tensor)))
    if is_large(tensor):
        give_back()
    return found


def fingerprint_of(denoiser: nn.Module, hashes: Mapping[str, str]) -> str:
    """The fingerprint of a model of this class and configuration whose tensors have these
    ``stored_hash``es."""
    body = hashlib.sha256()
    for part, module in parts_of(denoiser).items():
        config = {k: v for k, v in module_config(module).items() if k != "quantization_config"}
        text = f"{type(module).__name__} {json.dumps(config, sort_keys=True, default=str)}"
        body.update(prefixed(part, text).encode())
    for name, value in sorted(hashes.items()):
        body.update(f"{name} {value}".encode())
    return body.hexdigest()[:16]


class QuantizedDenoiser:
    """Wraps a denoiser in place: every layer of ``graph`` becomes a QuantLinear or QuantConv2d under its own
    name.

    ``apply`` switches the layers that differ from the last configuration to decoded weights from the bank
    (dense mode); ``pack`` switches to coded ones. Weights that the bank lacks are fitted, which for
    calibrated schemes takes ``record``, the denoiser calls of a full-precision run, and static ranges take
    ``sample``, which makes images in it. Other tensors are rounded to their 16-bit storage, so that dense and
    packed agree. Raises AquabitError for layers that the model does not have.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        graph: nx.DiGraph,
        bank: Bank | None = None,
        fingerprint: str = "",
        record: Record | None = None,
        sample: Sample | None = None,
    ):
        self.denoiser = denoiser
        self.uncalled = frozenset[str](graph.graph.get("uncalled", ()))
        self.fixed = fixed_layers(graph)
        self.tied = dict[str, str](graph.graph.get("tied", {}))
        # of an example call, described, where the class does not tell them
        self.inputs = graph.graph.get("inputs")
        self.about = None if self.inputs is None else layer_facts(graph)
        self.partners = codebook_names(graph)
        self.layers: dict[str, QuantLinear | QuantConv2d] = {}
        self.weights = FullWeights()
        self.full_precision = FullPrecision(denoiser, self.layers, lambda: self.apply(QuantConfig("", {})))
        self.calibrator = Calibrator(self.full_precision, record)
        self._fitter = (
            None if bank is None else Fitter(bank, self.weights, self.calibrator, fingerprint, self.partners)
        )
        self._stored: dict[str, torch.dtype] = {}
        self._current: dict[str, tuple[Any, ...]] = {}  # what each layer's weight was last set to
        self._tuned: tuple[str, dict[str, CodebookWeight]] | None = None  # the last ones
        self._recent: dict[tuple[Any, ...], Tensor] = {}
        self._recent_bytes = 0
        self.attention = {n: a["attention"] for n, a in graph.nodes(data=True) if a.get("attention")}
        self._range_tables = (
            None
            if bank is None
            else RangeTables(self.full_precision, bank, fingerprint, self.attention, sample)
        )
        bad = [n for n, p in denoiser.named_parameters() if p.numel() and not isfinite(largest(p))]
        if bad:
            raise AquabitError(
                f"{bad[0]} holds NaN or Inf ({len(bad)} such tensors); the model file is damaged or"
                " overflowed its dtype"
            )
        with torch.no_grad():
            # buffers that are not saved are made anew on loading, unrounded
            for tensor in denoiser.state_dict(keep_vars=True).values():
                round_(tensor)
        places = tied_places(graph)
        for name, node in graph.nodes(data=True):
            if node["kind"] != "merge":
                self._replace(name, node, places.get(name, ()))
        patch_attention_(denoiser)
        patch_feed_forwards_(denoiser)
        denoiser.requires_grad_(False)

    def _replace(self, name: str, node: Mapping[str, Any], tied: Sequence[str]) -> None:
        check_layer(self.denoiser, name, node)
        layer = replace_layer_(self.denoiser, name, node.get("split"), tied)
        self.layers[name], self.weights[name] = layer, layer.weight
        both = [storage_dtype(t) for t in (layer.weight, layer.bias) if t is not None]
        self._stored[name] = torch.bfloat16 if torch.bfloat16 in both else torch.float16

    def full(self, name: str) -> Tensor:
        """A layer's full-precision weight."""
        return self.weights[name]

    @property
    def fitter(self) -> Fitter:
        if self._fitter is None:
            raise AquabitError("this model was opened without a bank; it can run in full precision only")
        return self._fitter

    @staticmethod
    def _request(name: str, config: QuantConfig) -> FitRequest:
        return FitRequest(name, config[name].weight)

    def _identity(self, name: str, config: QuantConfig) -> tuple[Any, ...]:
        """What a layer's weight depends on."""
        scheme = config[name].weight
        if config.tuned and scheme != FP:
            return name, scheme, config.tuned
        if not scheme.calibrated:
            return name, scheme
        return self._request(name, config), config.calibration or Calibration()

    def coded(self, name: str, config: QuantConfig) -> CodebookWeight:
        """A layer's coded weight: fine-tuned where the configuration is, else from the bank, fitted first
        where it is missing there."""
        if config.tuned:
            return self._fine_tuned(config)[name]
        return self.fitter.coded(self._request(name, config), config.calibration)

    def _fine_tuned(self, config: QuantConfig) -> dict[str, CodebookWeight]:
        """The weights that a configuration was tuned to, from the bank; the last ones are kept."""
        if self._tuned is None or self._tuned[0] != config.digest:
            shapes = {n: tuple(layer.shape) for n, layer in self.layers.items()}
            self._tuned = config.digest, load_tuned(self.fitter.bank, config, shapes)
        return self._tuned[1]

    def decoded(self, name: str, scheme: str | Scheme, like: QuantConfig) -> Tensor:
        """A layer's weight as a scheme decodes it, fitted for the activation bits and the calibration that
        it has in ``like``."""
        scheme = Scheme.parse(scheme)
        if scheme == FP:
            return self.weights[name]
        choice = LayerChoice(scheme, like[name].act, self.partners.get(name) if scheme.shared else None)
        return self._decoded(
            name,
            QuantConfig(like.fingerprint, {name: choice}, steps=like.steps, calibration=like.calibration),
        )

    @contextmanager
    def gradients(self) -> Iterator[Callable[[str], Tensor]]:
        """While it lasts the dense weights that are applied ask for gradients; what it gives returns that
        of a layer, in float32 (zeros where nothing reached it)."""
        for layer in self.layers.values():
            layer.weight = layer.weight.detach().requires_grad_(True)

        def gradient(name: str) -> Tensor:
            weight = self.layers[name].weight
            return (
                torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad.float()
            )

        try:
            yield gradient
        finally:
            for layer in self.layers.values():
                layer.weight = layer.weight.detach()

    def set_dense_(self, name: str, weight: Tensor, scheme: Scheme) -> None:
        """Give a layer a dense weight from elsewhere, until the next ``apply``."""
        self.layers[name].set_dense_(weight, scheme)
        self._current.pop(name, None)

    def _decoded(self, name: str, config: QuantConfig) -> Tensor:
        """A decoded weight; the last ones used, up to DECODED_LIMIT bytes, are kept (decoding is 3 % of a
        small measurement)."""
        key = self._identity(name, config)
        found = self._recent.pop(key, None)
        if found is None:
            full = self.weights[name]
            found = self.coded(name, config).to(full.device).dequantize().to(full.dtype)
            self._recent_bytes += found.nbytes
        self._recent[key] = found  # the newest last
        while self._recent_bytes > DECODED_LIMIT and len(self._recent) > 1:
            self._recent_bytes -= self._recent.pop(next(iter(self._recent))).nbytes
        return found

    def prepare(self, config: QuantConfig, progress: Progress = no_progress) -> None:
        """Fit what the bank lacks for a configuration, together: calibration runs once for many layers."""
        self.ranges(config)  # measured in full precision, so before anything is set
        if config.tuned:
            self._fine_tuned(config)  # nothing of it is fitted
            return
        wanted = [
            n
            for n, c in config.layers.items()
            if c.weight != FP and self._identity(n, config) not in self._recent
        ]
        requests = [self._request(n, config) for n in wanted]
        absent = [request for request in requests if self.fitter.found(request, config.calibration) is None]
        if absent:
            self.fitter.fit(absent, config.calibration, progress)

    def check(self, config: QuantConfig) -> None:
        """Raise AquabitError where a configuration names layers that are not there, or schemes that they
        cannot have."""
        unknown = [n for n in config.layers if n not in self.layers]
        if unknown:
            raise AquabitError(
                f"unknown layer {unknown[0]!r} in the configuration; the model's layers are listed by"
                " `aquabit inspect`"
            )
        for name, choice in config.layers.items():
            if name in self.fixed and choice.weight != FP:
                raise AquabitError(
                    f"layer {name!r} cannot be {choice.weight}: {self.fixed[name]}; it must be fp"
                )
            shared, own = choice.weight.shared, self.partners.get(name)
            if choice.codebook != (own if shared else None) or (shared and own is None):
                known = f"its codebooks are {own!r}" if own else "it has no partner to share codebooks with"
                known = known if shared else f"{choice.weight} shares none"
                raise AquabitError(
                    f"layer {name!r} at {choice.weight} names codebooks {choice.codebook!r}; {known}"
                )

    def ranges(self, config: QuantConfig) -> dict[str, Tensor] | None:
        """The static ranges of a configuration's layers, measured where the bank lacks them; None where
        ranges are dynamic."""
        if config.ranges == "dynamic":
            return None
        if self._range_tables is None:
            raise AquabitError("static ranges are kept in a bank, and this model was opened without one")
        return self._range_tables.of(config)

    def _settings(self, config: QuantConfig) -> dict[str, list[Setting]]:
        return settings_of(config, self.layers, self.attention, self.ranges(config))

    def _activate(self, config: QuantConfig) -> None:
        """Activations as they are in the first step; ``watchers`` switch them while sampling."""
        share_out_(config, self.layers, self._settings(config))

    def watchers(self, config: QuantConfig) -> list[Watcher]:
        """What has to follow the sampler while a configuration runs that was applied or packed; none where
        nothing depends on the step."""
        return switches(config, self.layers, self._settings(config)) if config.total_steps is not None else []

    def bank_in_use(self) -> AbstractContextManager[None]:
        """While it lasts, no fit that a configuration needs is evicted between finding and using it."""
        return nullcontext() if self._fitter is None else self._fitter.bank.using()

    def apply(self, config: QuantConfig) -> None:
        """Dense mode: decoded weights and fake-quantized activations."""
        self.check(config)
        with self.bank_in_use():
            self._apply(config)

    def _apply(self, config: QuantConfig) -> None:
        if config.layers:
            self.prepare(config)
        self._activate(config)
        for name, layer in self.layers.items():
            choice, wanted = config[name], self._identity(name, config)
            if self._current.get(name) != wanted or layer.packed is not None:
                full = self.weights[name]
                layer.set_dense_(full if choice.weight == FP else self._decoded(name, config), choice.weight)
                self._current[name] = wanted
        if not self._is_applied(
            config
            # a file of the bank was unreadable: fitting anew left the layers before in full precision
        ):
            self._apply(config)

    @contextmanager
    def in_full_precision(self, config: QuantConfig) -> Iterator[nn.Module]:
        """The denoiser in full precision for a while, then as ``config`` says, in dense mode."""
        try:
            self.apply(QuantConfig(config.fingerprint, {}))
            yield self.denoiser
        finally:
            self.apply(config)

    def _is_applied(self, config: QuantConfig) -> bool:
        """Whether every layer is as ``apply`` leaves it."""
        acts = {n: act_parts(config[n].act)[0] for n in self.layers}
        return all(
            layer.act == acts[n] and self._current[n] == self._identity(n, config)
            for n, layer in self.layers.items()
        )

    def apply_packed(self, config: QuantConfig, accuracy: Accuracy = "fast") -> None:
        """Packed mode for a while: as ``pack``, but full weights stay, so that ``apply`` leads back to
        dense mode."""
        self.check(config)
        with self.bank_in_use():
            self.prepare(config)
            for name, weight in self.coded_weights(config).items():
                self.layers[name].set_packed_(weight, config[name].weight)
                self._current.pop(name, None)
        self._activate(config)
        for name, layer in self.layers.items():
            layer.accuracy = accuracy
            if config[name].weight == FP:
                layer.set_dense_(self.weights[name], FP)
                self._current[name] = self._identity(name, config)

    def coded_weights(self, config: QuantConfig) -> dict[str, CodebookWeight]:
        """The coded weights of a configuration, on the model's device; layers that share codebooks get the
        same tensor."""
        tables: dict[tuple[str | None, str], Tensor | None] = {}
        coded: dict[str, CodebookWeight] = {}
        for name, choice in config.layers.items():
            if choice.weight == FP:
                continue
            weight = self.coded(name, config).to(self.weights[name].device)
            if choice.weight.shared:
                weight = replace(
                    weight,
                    codebooks=tables.setdefault((choice.codebook, str(choice.weight)), weight.codebooks),
                )
            coded[name] = weight
        return coded

    def pack(
        self, config: QuantConfig, accuracy: Accuracy = "fast", progress: Progress = no_progress
    ) -> None:
        """Packed mode: coded weights on the kernels; layers at ``fp`` keep their weight at 16 bits. Full
        weights are dropped.

        Layers that share codebooks hold the same tensor.
        """
        self.code(config, accuracy, progress)
        self.arrange()

    def arrange(self) -> None:
        """Lay coded weights out as kernels read them: in memory, which those of the bank's files are not."""
        for layer in self.layers.values():
            layer.arrange_()

    def code(
        self, config: QuantConfig, accuracy: Accuracy = "fast", progress: Progress = no_progress
    ) -> None:
        """``pack`` without ``arrange``: what can be saved, but not run yet."""
        self.check(config)
        self._recent.clear()
        with self.bank_in_use():
            self.prepare(config, progress)
            coded = self.coded_weights(config)
        self._activate(config)
        for name, layer in self.layers.items():
            layer.accuracy = accuracy
            if name in coded:
                layer.set_coded_(coded.pop(name), config[name].weight)
            if name not in self.uncalled:  # a weight that the model reads itself stays as it is used
                with CopiesInFiles(weights_folder()):
                    layer.shrink_(self._stored[name])
            del self.weights[name]  # dense and coded weights are not there together
