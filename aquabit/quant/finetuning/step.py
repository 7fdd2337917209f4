"""PV-Tuning's step over all layers: codebooks, scales and a dense proxy of the codes by Adam, then codes of
few groups searched anew.

Per step (PV-Tuning, algorithm 1, as its authors' code has it): the gradient of the decoded weight moves a
dense proxy (no first moment) and, summed up, codebooks and scales; the groups whose proxy is farthest from
what they now decode to are searched, nearest to the proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from aquabit.quant.finetuning.settings import FineTuning
from aquabit.quant.finetuning.weight import EPSILON, Parameter, TrainedWeight


class Proxy:
    """The dense proxy [O, n, g] of a layer's codes with its Adam state; ``mass`` [O, n, 1] (or one for
    all) corrects the second moment."""

    def __init__(self, weight: TrainedWeight, settings: FineTuning):
        self.value = weight.decoded.clone()
        self.second = torch.zeros_like(self.value)
        self.first = torch.zeros_like(self.value) if settings.code_betas[0] else None
        shape = (*self.value.shape[:2], 1) if settings.semi_groups else (1, 1, 1)
        self.mass = self.value.new_zeros(shape)
        self.first_mass = self.value.new_zeros(shape)

    def step_(
        self, gradient: Tensor, rate: float, unit: float, betas: tuple[float, float], decay: float
    ) -> None:
        """One step of AdamW; without beta1 the gradient itself is the first moment."""
        self.mass.mul_(betas[1]).add_(1 - betas[1])
        self.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        size = (self.second / self.mass).sqrt_().add_(EPSILON)
        if decay:
            self.value.mul_(1 - rate * decay)
        if self.first is None:
            self.value.addcdiv_(gradient, size, value=-rate * unit)
            return
        self.first_mass.mul_(betas[0]).add_(1 - betas[0])
        self.first.lerp_(gradient, 1 - betas[0])
        self.value.addcdiv_(self.first, size.mul_(self.first_mass), value=-rate * unit)

    def forget_(self, chosen: Tensor, decoded: Tensor) -> None:
        """Groups ``chosen`` [k] of O * n lose their moments, and their difference from what they decode to
        [k, g]."""
        size = self.value.shape[2]
        self.value.view(-1, size)[chosen] = decoded
        for moment in (self.second, self.first):
            if moment is not None:
                moment.view(-1, size)[chosen] = 0
        for mass in (self.mass, self.first_mass):
            mass.view(-1)[chosen] = 0

    def state(self) -> dict[str, Tensor]:
        named = {
            "proxy": self.value,
            "second": self.second,
            "first": self.first,
            "mass": self.mass,
            "first_mass": self.first_mass,
        }
        return {k: v for k, v in named.items() if v is not None}

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class Optimizer:
    """Trains coded weights by name; layers that share codebooks share one Parameter. ``flipped`` counts
    the groups of the last step whose codes changed."""

    def __init__(self, weights: Mapping[str, TrainedWeight], settings: FineTuning):
        self.weights, self.settings = dict(weights), settings
        self.proxies = {name: Proxy(weight, settings) for name, weight in weights.items()}
        self.parameters = list({id(p): p for w in weights.values() for p in w.parameters}.values())
        self._tables = {id(w.tables) for w in weights.values()}
        self.flipped = 0

    @property
    def groups(self) -> int:
        return sum(w.groups for w in self.weights.values())

    @property
    def changed(self) -> float:
        """The share of groups whose codes are not those of the start."""
        return sum(w.changed for w in self.weights.values()) / max(1, self.groups)

    @torch.no_grad()
    def step_(self, gradients: Mapping[str, Tensor], step: int, continues: bool = True) -> None:
        """One step with the gradients of dense weights; ``continues`` is False at a discontinuity between
        the batch before and this one."""
        s, factor = self.settings, self.settings.rate_at(step)
        assert s.code_rate is not None, "resolved settings"
        if s.semi_discontinuity and not continues:
            for parameter in self.parameters:
                parameter.forget_()
        for name, weight in self.weights.items():
            if name in gradients:
                gradient = weight.grouped(gradients[name])
                weight.add_gradients_(gradient)
                self.proxies[name].step_(
                    gradient, factor * s.code_rate, weight.unit, s.code_betas, s.weight_decay
                )
        for parameter in self.parameters:
            rate = s.codebook_rate if id(parameter) in self._tables else s.scale_rate
            parameter.step_(factor * rate, s.betas, s.weight_decay)
        self.flipped = 0
        for name, weight in self.weights.items():
            weight.decode_()
            self._move_codes_(weight, self.proxies[name])

    def _move_codes_(self, weight: TrainedWeight, proxy: Proxy) -> None:
        """Search the groups that are farthest from their proxy, and let the proxy come nearer to what is
        decoded."""
        s = self.settings
        weight.copy_padding_(proxy.value)
        if s.method == "straight_through":
            chosen = torch.arange(weight.groups, device=proxy.value.device)
        else:
            away = (proxy.value - weight.decoded).square_().view(-1, weight.size)
            distance = away @ away.new_ones(weight.size)  # twice as fast as sum(1)
            chosen = distance.topk(ceil(s.tau * weight.groups)).indices
        index, decoded = weight.nearest(
            chosen, proxy.value.view(-1, weight.size)[chosen], s.beam if s.method == "pv" else 1
        )
        old = weight.decoded.view(-1, weight.size)[chosen]
        moves = (index != weight.index.view(-1, index.shape[1])[chosen]).any(1)
        if s.trust_ratio is not None and s.method == "pv":
            moves &= within_trust((decoded - old).square().sum(1) * moves, weight.decoded, s.trust_ratio)
        chosen, decoded = chosen[moves], decoded[moves]
        weight.set_codes_(chosen, index[moves], decoded)
        self.flipped += len(chosen)
        if s.method == "straight_through":
            return
        if s.delta_decay:
            proxy.value.lerp_(weight.decoded, s.delta_decay)
        if s.semi_groups:
            proxy.forget_(chosen, decoded)

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, by name."""
        tensors = {
            f"parameter {i} {k}": v for i, p in enumerate(self.parameters) for k, v in p.state().items()
        }
        for name, weight in self.weights.items():
            tensors |= {f"{name} index": weight.index} | {
                f"{name} {k}": v for k, v in self.proxies[name].state().items()
            }
        return tensors

    def restore_(self, tensors: Mapping[str, Tensor]) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.restore_({k: tensors[f"parameter {i} {k}"] for k in parameter.state()})
        for name, weight in self.weights.items():
            weight.index.copy_(tensors[f"{name} index"])
            self.proxies[name].restore_({k: tensors[f"{name} {k}"] for k in self.proxies[name].state()})
            weight.decode_()


def within_trust(squares: Tensor, weight: Tensor, ratio: float) -> Tensor:
    """Which changes, in order and of squared size ``squares`` [k], keep what they add up to within
    ``ratio`` of a weight's norm."""
    return squares.cumsum(0) <= ratio**2 * weight.square().sum()


def shared_parameters(tables: Mapping[str, Tensor | None]) -> dict[str, Parameter | None]:
    """A Parameter for each layer's codebooks, one for all layers that hold the same tensor."""
    made: dict[int, Parameter] = {}
    return {n: None if t is None else made.setdefault(id(t), Parameter(t)) for n, t in tables.items()}
