"""Gradient sketches: what every scheme of every layer does to a denoiser's output, to first order, from a few
backward passes.

To first order a layer's weight error dW moves the output of each sample by y = J dW x. For random signs v
over an output, one backward pass gives the gradient of <v, output> at every layer at once, and its inner
product with dW is <v, y>: numbers that add up as changes do, and whose squares have the expectation |y|^2.
Samples of a call are kept apart: their gradients are products of a layer's own inputs and output gradients,
so that a pass over n samples gives n numbers for each (layer, scheme), and nothing of the size of the model
is held. The rounding of activations is a gate of the same kind: W (round(x) - x) at a layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from aquabit.measuring.output_errors import OutputErrors
from aquabit.quant.layers import QuantConv2d, QuantLinear

Layer = QuantLinear | QuantConv2d
Changes = Callable[[str], Mapping[str, Tensor]]  # a layer's weight errors dW by what makes them
Gates = Callable[[str, Tensor], Mapping[str, Tensor]]  # what rounding a layer's input (and output) adds


@dataclass
class _Pass:
    """What one backward pass has found so far: layer -> name -> [samples], or [1] where a layer's input does
    not tell samples apart."""

    samples: int
    numbers: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, layer: str, found: Mapping[str, Tensor]) -> None:
        """A layer that is called more than once answers for all of its calls."""
        own = self.numbers.setdefault(layer, {})
        for name, value in found.items():
            own[name] = own[name] + value if name in own else value


class Sketches:
    """First-order changes of the outputs of one recorded step, sketched: called with its place in
    ``errors.steps``, {layer: {name: [passes x samples]}}, the samples of a pass together.

    The mean of their squares is the mean square of the change relative to that of the full-precision output,
    as ``OutputErrors`` gives for what is really changed. All samples have the same signs, so that means over
    the samples of a pass sketch what they have in common.

    The denoiser must run in full precision. ``passes`` backward passes go through one forward pass of at most
    ``batch`` samples. Deterministic. Raises RuntimeError where no gradient passes, and where the model
    changes a layer's input in place.
    """

    def __init__(
        self,
        errors: OutputErrors,
        layers: Mapping[str, Layer],
        changes: Changes,
        gates: Gates,
        passes: int,
        batch: int = 1 << 16,
    ):
        self.errors, self.layers, self.passes, self.batch = errors, layers, passes, batch
        self.changes, self.gates = changes, gates

    def __call__(self, place: int) -> dict[str, dict[str, list[float]]]:
        samples = self.errors.samples[place]
        parts = [samples[i : i + self.batch] for i in range(0, len(samples), self.batch)]
        made = [self._of(part, place, i, self.errors.scale(samples)) for i, part in enumerate(parts)]
        names = {layer: list(row) for layer, row in made[0][0].items()}
        return {
            layer: {
                name: [v for k in range(self.passes) for part in made for v in part[k][layer][name].tolist()]
                for name in row
            }
            for layer, row in names.items()
        }

    def _of(
        self, samples: Sequence[int], place: int, part: int, scale: float
    ) -> list[dict[str, dict[str, Tensor]]]:
        """For each pass layer -> name -> [samples]. Each sample's signs are the step's, or their opposite: of
        a layer whose input does not tell samples apart, which gives one number for all, the square then has
        the sum of the samples' squares as its expectation."""
        current, found = _Pass(len(samples)), []
        step = self.errors.steps[place]
        seed = torch.Generator().manual_seed(step)
        own = torch.Generator().manual_seed((part + 1) * 1_000_003 + step)
        with torch.enable_grad(), self._listening(lambda: current):
            output = self.errors.outputs_of(samples).float()
            unit = (output[0].numel() * scale) ** 0.5
            for i in range(self.passes):
                current = _Pass(len(samples))
                flips = torch.randint(0, 2, (len(samples),), generator=own).to(output.device) * 2.0 - 1.0
                signs = torch.randint(0, 2, output.shape[1:], generator=seed).to(output.device) * 2.0 - 1.0
                each = flips.reshape(-1, *[1] * (output.ndim - 1))
                output.backward(each * signs, retain_graph=i + 1 < self.passes)
                found.append(
                    {
                        layer: {name: _spread(value, flips) / unit for name, value in row.items()}
                        for layer, row in current.numbers.items()
                    }
                )
        return found

    @contextmanager
    def _listening(self, current: Callable[[], _Pass]) -> Iterator[None]:
        """While it lasts every layer's call leaves what its output gradient says, when that comes."""

        def listen(name: str, layer: Layer) -> Callable[..., None]:
            def called(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0].detach()
                state = x._version
                if not output.requires_grad:  # nothing before it asks for gradients
                    output.requires_grad_(True)

                def heard(slope: Tensor) -> None:
                    if x._version != state:
                        raise RuntimeError(f"the input of layer {name!r} is changed in place")
                    now = current()
                    now.add(name, self._numbers(name, layer, x, slope, now.samples))

                output.register_hook(heard)

            return called

        handles = [layer.register_forward_hook(listen(n, layer)) for n, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _numbers(self, name: str, layer: Layer, x: Tensor, slope: Tensor, samples: int) -> dict[str, Tensor]:
        """<slope, change of the layer's output> of each sample, by what makes the change."""
        parts = samples if len(x) % samples == 0 and len(slope) % samples == 0 else 1
        found: dict[str, Tensor] = {}
        changes = self.changes(name)
        if changes:
            gradient = per_sample(layer, x, slope, parts).flatten(1).float()
            stacked = torch.stack([change.flatten().float() for change in changes.values()])
            found |= dict(zip(changes, (gradient @ stacked.t()).t(), strict=True))
        for gate, change in self.gates(name, x).items():
            found[gate] = (slope.float() * change.float()).reshape(parts, -1).sum(1)
        return found


def _spread(value: Tensor, flips: Tensor) -> Tensor:
    """[samples] of what a pass found, with the signs that all samples share; one number for all of them
    becomes as many of the same sum of squares."""
    return value * flips if len(value) == len(flips) else value.expand(len(flips)) / len(flips) ** 0.5


def per_sample(layer: Layer, x: Tensor, slope: Tensor, parts: int) -> Tensor:
    """Gradients [parts, *weight] of a layer's weight from its input and the gradient of its output, for each
    of ``parts`` equal parts of the batch."""
    if isinstance(layer, QuantLinear):
        inputs, outputs = x.reshape(parts, -1, x.shape[-1]), slope.reshape(parts, -1, slope.shape[-1])
        return torch.bmm(outputs.transpose(1, 2), inputs)
    out, groups, kernel = layer.shape[0], layer.groups, layer.kernel_size
    padded = functional.pad(x, _pads(layer)) if isinstance(layer.padding, str) else x
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    columns = functional.unfold(padded, kernel, layer.dilation, padding, layer.stride)
    n, places = len(x), columns.shape[-1]
    inputs = columns.reshape(n, groups, -1, places)
    outputs = slope.reshape(n, groups, out // groups, places)
    found = outputs @ inputs.transpose(2, 3)  # [n, groups, out / groups, cin / groups * kh * kw]
    return found.reshape(parts, n // parts, *layer.shape).sum(1)


def _pads(layer: QuantConv2d) -> list[int]:
    """What ``padding="same"`` adds, as ``functional.pad`` takes it."""
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        total = [0, 0]
    (top, left) = (t // 2 for t in total)
    return [left, total[1] - left, top, total[0] - top]
