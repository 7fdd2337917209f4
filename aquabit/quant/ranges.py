"""Static ranges of activations: one per layer, or one per layer and step, measured while calibration images are made.

They are measured in full precision, as H is: a range then depends on the model, the calibration and the number of bits alone, so that
configurations share it and the bank keeps it. Softmax outputs stay dynamic: they are made inside attention, and a grid over [0, 1] would
round the small probabilities of long sequences to zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aquabit.quant.layers import QuantConv2d, QuantLinear
from aquabit.quant.sampling import Watcher
from aquabit.scheme import Calibration

Layer = QuantLinear | QuantConv2d
Sample = Callable[[Calibration, Sequence[Watcher]], None]  # makes the calibration's images in the model as it is, followed by watchers

TAILS = (0.0, 1e-4, 1e-3, 1e-2)  # shares of values beyond either end of the ranges that are tried: 0 is the smallest and the largest value
KEPT = 1 << 26  # values that one measurement keeps, of all layers and steps (256 MB)
FEWEST, MOST = 256, 4096  # values kept of one tensor


class _Values:
    """Some values of one tensor in one step, over all images, with the smallest and the largest of all."""

    def __init__(self) -> None:
        self.low, self.high, self.parts = 0.0, 0.0, list[Tensor]()

    def add(self, x: Tensor, count: int, first: bool) -> None:
        low, high = (float(end) for end in x.aminmax())
        self.low, self.high = (low, high) if first else (min(self.low, low), max(self.high, high))
        flat = x.detach().reshape(-1).float()
        places = torch.randint(len(flat), (min(count, len(flat)),), generator=torch.Generator().manual_seed(len(self.parts)))
        self.parts.append(flat[places.to(flat.device)].cpu())


class RangeRecorder(Watcher):
    """Keeps values of the layers' inputs, and of the outputs of ``attention`` layers, by step. Use ``watching`` around the sampling."""

    def __init__(self, layers: Mapping[str, Layer], attention: Collection[str], steps: int):
        self.layers, self.attention, self.step = layers, attention, 0
        self.count = max(FEWEST, min(MOST, KEPT // (2 * len(layers) * steps)))
        self.values: dict[tuple[str, int, int], _Values] = defaultdict(_Values)  # by layer, part and step

    def before(self, step: int) -> None:
        self.step = step

    def watching(self) -> ExitStack:
        """Hooks on the layers, until the stack is closed."""
        stack = ExitStack()
        for name, layer in self.layers.items():
            handle = layer.register_forward_hook(partial(self._see, name))
            stack.callback(handle.remove)
        return stack

    def _see(self, name: str, layer: Layer, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        parts = (x,) if layer.split is None else (x[:, : layer.split], x[:, layer.split :])
        for part, tensor in enumerate((*parts, output) if name in self.attention else parts):
            key = (name, part, self.step)
            self.values[key].add(tensor, self.count, key not in self.values)

    def tables(self, bits: int) -> dict[str, Tensor]:
        """Layer -> ranges [1 + steps, parts, 2] for a number of bits: over all steps, then of each."""
        steps = 1 + max(step for *_, step in self.values)
        found = {}
        for name, layer in self.layers.items():
            if (name, 0, 0) not in self.values:
                continue  # it did not run
            parts = 1 + max(part for n, part, _ in self.values if n == name) if name not in self._parts else self._parts[name]
            rows = []
            for which in (range(steps), *([s] for s in range(steps))):
                rows.append([self._range(name, part, which, bits, isinstance(layer, QuantConv2d)) for part in range(parts)])
            found[name] = torch.tensor(rows)
        return found

    def _range(self, name: str, part: int, steps: Iterable[int], bits: int, zero: bool) -> tuple[float, float]:
        kept = [v for s in steps if (v := self.values.get((name, part, s))) is not None]
        return best_range(torch.cat([p for v in kept for p in v.parts]), min(v.low for v in kept), max(v.high for v in kept), bits, zero)
