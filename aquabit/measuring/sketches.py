"""Gradient sketches: what every scheme of every layer does to images, to first order, from a few backward
passes through the sampler.

To first order a layer's weight error dW moves each image by y = sum over steps J_step dW x_step. For random
signs v over the pixels, one backward pass through all steps gives the gradient of <v, image> at every call of
every layer, and its inner product with dW x, summed over steps, is <v, y>: numbers that add up as changes do,
and whose squares have the expectation |y|^2. Images are kept apart: their gradients are products of a layer's
own inputs and output gradients, so that a pass over n images gives n numbers for each (layer, scheme), and
nothing of the size of the model is held. The rounding of activations is a gate of the same kind: W (round(x)
- x) at a layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from aquabit.quant.layers import QuantConv2d, QuantLinear

HELD = 1 << 30  # bytes of per-sample gradients that a pass keeps; of other layers dW is read in every step
Layer = QuantLinear | QuantConv2d
Images = Callable[[], Tensor]  # [n, ...], made so that gradients pass
Changes = Callable[
    [str], tuple[tuple[str, ...], Tensor]
]  # what changes a layer's weight, and dW [n, weights]
# what rounding a layer's input, and its output where that is rounded too, adds to its output in a step
Gates = Callable[[str, Tensor, int], Mapping[str, Tensor]]
Numbers = dict[str, dict[str, list[float]]]


@dataclass
class _Pass:
    """What one backward pass has found so far: layer -> name -> [images], or [1] where a layer's input does
    not tell images apart. Nothing is read from the device before the pass ends."""

    images: int
    numbers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # (layer, parts) -> per-sample gradients [parts, weights], summed over steps: dW is then read once a pass
    held: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def add(self, layer: str, found: Mapping[str, Tensor]) -> None:
        """A layer answers for all its calls in all steps."""
        own = self.numbers.setdefault(layer, {})
        for name, value in found.items():
            own[name] = own[name] + value if name in own else value

    def hold(self, layer: str, gradient: Tensor, limit: int) -> bool:
        """Add a call's gradients to those that are held; False where they would take more than ``limit``
        bytes."""
        key = layer, len(gradient)
        if key in self.held:
            self.held[key] += gradient
            return True
        if sum(t.nbytes for t in self.held.values()) + gradient.nbytes > limit:
            return False
        self.held[key] = gradient
        return True

    def told(self, flips: Tensor) -> dict[tuple[str, str], list[float]]:
        """(layer, name) -> [images], with the signs that all images share."""
        keys = [(layer, name) for layer, row in self.numbers.items() for name in row]
        if not keys:
            return {}
        every = torch.stack([_spread(self.numbers[layer][name], flips) for layer, name in keys])
        return dict(zip(keys, every.tolist(), strict=True))


class Sketches:
    """First-order changes of images, sketched: called, {layer: {name: [passes x images]}}, the images of a
    pass together.

    The mean of their squares is the mean square of the images' change. All images have the same signs, so
    that means over the images of a pass sketch what they have in common. ``step`` says which step of the
    sampler runs. A layer whose gradient is not finite is left out, and named in ``bad``. The denoiser must
    run in full precision; with ``recompute`` its activations are made again in the backward pass, step by
    step, and not held. Deterministic for ``seed``. Raises RuntimeError where no gradient passes, and where
    the model changes a layer's input in place.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Mapping[str, Layer],
        changes: Changes,
        gates: Gates,
        step: Callable[[], int] = lambda: 0,
        recompute: bool = False,
        limit: int = HELD,
    ):
        self.denoiser, self.layers, self.step, self.recompute = denoiser, layers, step, recompute
        self.changes, self.gates, self.limit = changes, gates, limit
        self.bad: dict[str, int] = {}  # layer -> a step in which its gradient was not finite
        self._current, self._bad = _Pass(0), dict[str, Tensor]()

    def __call__(self, images: Images, passes: int, seed: int = 0) -> Numbers:
        found: Numbers = {}
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad(), self._listening():
            made = images()
            if not made.requires_grad:
                raise RuntimeError("the pipeline's images have no gradient")
            count, unit = len(made), made[0].numel() ** 0.5
            for i in range(passes):
                self._current, self._bad = _Pass(count), {}
                # each image's signs are the shared ones or their opposite: of a layer whose input does not
                # tell images apart the square then has the sum of the images' squares as its expectation
                flips = torch.randint(0, 2, (count,), generator=generator).to(made.device) * 2.0 - 1.0
                signs = torch.randint(0, 2, made.shape[1:], generator=generator).to(made.device) * 2.0 - 1.0
                each = flips.reshape(-1, *[1] * (made.ndim - 1)) * signs
                made.backward(each.to(made.dtype), retain_graph=i + 1 < passes)
                for (layer, _), gradient in self._current.held.items():
                    self._current.add(layer, self._products(layer, gradient))
                for (layer, name), values in self._current.told(flips).items():
                    found.setdefault(layer, {}).setdefault(name, []).extend(v / unit for v in values)
                self._name_bad()
        for layer in self.bad:
            found.pop(layer, None)
        return found

    def _name_bad(self) -> None:
        """Read, once a pass, in which step a layer's gradient was first seen not to be finite."""
        steps = torch.stack(list(self._bad.values())).tolist() if self._bad else []
        for layer, step in zip(self._bad, steps, strict=True):
            if step >= 0:
                self.bad.setdefault(layer, int(step))

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """While it lasts every layer's call leaves what its output gradient says, when that comes."""

        def listen(name: str) -> Callable[..., Tensor]:
            def called(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if not output.requires_grad:  # nothing before it asks for gradients
                    output = output.requires_grad_(True) if output.is_leaf else output
                tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
                    output, args[0].detach(), self, name, self.step()
                )
                return tapped

            return called

        handles = [layer.register_forward_hook(listen(name)) for name, layer in self.layers.items()]
        plain = self.denoiser.forward

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)

        if self.recompute:
            self.denoiser.forward = recomputed
        try:
            yield
        finally:
            if self.recompute:
                del self.denoiser.forward
            for handle in handles:
                handle.remove()

    def hear(self, name: str, x: Tensor, slope: Tensor, step: int) -> None:
        """<slope, change of a layer's output> of each image, by what makes the change."""
        layer, count = self.layers[name], self._current.images
        bad = torch.where(slope.isfinite().all(), -1, step)
        self._bad[name] = torch.maximum(self._bad[name], bad) if name in self._bad else bad
        parts = count if len(x) % count == 0 and len(slope) % count == 0 else 1
        gradient = per_sample(layer, x.float(), slope.float(), parts).flatten(1)
        held = self._current.hold(name, gradient, self.limit)
        found = {} if held else self._products(name, gradient)
        for gate, change in self.gates(name, x, step).items():
            found[gate] = _parted(slope.float() * change.float(), parts).flatten(1).sum(1)
        self._current.add(name, found)

    def _products(self, layer: str, gradient: Tensor) -> dict[str, Tensor]:
        """<gradient, dW> of each sample, by what makes dW."""
        names, changes = self.changes(layer)
        return dict(zip(names, (gradient @ changes.t()).t(), strict=True)) if names else {}


class _Tap(torch.autograd.Function):
    """A layer's output as it is; its gradient is heard, beside the input that the layer had."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, sketches: Sketches, name: str, step: int) -> Tensor:
        ctx.save_for_backward(x)  # made again where activations are; refused where it was changed
        ctx.facts = sketches, name, step
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        sketches, name, step = ctx.facts
        (x,) = ctx.saved_tensors
        sketches.hear(name, x, slopes[0], step)
        return slopes[0], None, None, None, None


def _spread(value: Tensor, flips: Tensor) -> Tensor:
    """[images] of what a pass found, with the signs that all images share; one number for all of them becomes
    as many of the same sum of squares."""
    return value * flips if len(value) == len(flips) else value.expand(len(flips)) / len(flips) ** 0.5


def per_sample(layer: Layer, x: Tensor, slope: Tensor, parts: int) -> Tensor:
    """Gradients [parts, *weight] of a layer's weight from its input and the gradient of its output, for each
    of ``parts`` equal parts of the batch; where guidance doubles a batch, its halves follow each other."""
    if isinstance(layer, QuantLinear):
        inputs, outputs = _parted(x, parts), _parted(slope, parts)
        return torch.bmm(outputs.flatten(1, -2).transpose(1, 2), inputs.flatten(1, -2))
    out, groups, kernel = layer.shape[0], layer.groups, layer.kernel_size
    padded = functional.pad(x, _pads(layer)) if isinstance(layer.padding, str) else x
    padding = 0 if isinstance(layer.padding, str) else layer.padding
    columns = functional.unfold(padded, kernel, layer.dilation, padding, layer.stride)
    n, places = len(x), columns.shape[-1]
    inputs = columns.reshape(n, groups, -1, places)
    outputs = slope.reshape(n, groups, out // groups, places)
    found = outputs @ inputs.transpose(2, 3)  # [n, groups, out / groups, cin / groups * kh * kw]
    return _parted(found, parts).sum(1).reshape(parts, *layer.shape)


def _parted(x: Tensor, parts: int) -> Tensor:
    """[rows, ...] as [parts, rows / parts, ...]: row i belongs to part i modulo ``parts``, as guidance stacks
    the branches of all images."""
    return x.reshape(-1, parts, *x.shape[1:]).transpose(0, 1)


def _pads(layer: QuantConv2d) -> list[int]:
    """What ``padding="same"`` adds, as ``functional.pad`` takes it."""
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        total = [0, 0]
    (top, left) = (t // 2 for t in total)
    return [left, total[1] - left, top, total[0] - top]
