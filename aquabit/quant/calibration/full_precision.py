"""A denoiser in full precision, whose layers' inputs calibration looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aquabit.quant.calibration.recording import Call, mapped
from aquabit.quant.layers import QuantConv2d, QuantLinear
from aquabit.scheme import AquabitError

Layer = QuantLinear | QuantConv2d


@dataclass(frozen=True)
class FullPrecision:
    """What calibration knows of a quantized denoiser: its layers by name, and ``set_``, which puts them all
    into full precision."""

    denoiser: nn.Module
    layers: Mapping[str, Layer]
    set_: Callable[[], None]

    def replay(self, calls: Sequence[Call]) -> Iterator[int]:
        """Run recorded calls; yields the index of each before it runs. Leaves the denoiser in full precision.
        Raises AquabitError where it is packed."""
        if any(layer.packed is not None for layer in self.layers.values()):
            raise AquabitError("the model is packed; calibration needs its full-precision weights")
        self.set_()
        device = next(iter(self.layers.values())).weight.device
        for i, (args, kwargs) in enumerate(calls):
            yield i
            with torch.inference_mode():
                self.denoiser(*mapped(args, lambda t: t.to(device)), **mapped(kwargs, lambda t: t.to(device)))


@contextmanager
def watching(layers: Mapping[str, Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts ``see`` gets the name and the input of each of ``layers`` that runs."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            stack.callback(handle.remove)
        yield
