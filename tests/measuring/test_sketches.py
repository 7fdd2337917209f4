"""Gradient sketches against what small changes really do to images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aquabit.measuring.sketches import Sketches, per_sample
from aquabit.quant.layers import QuantConv2d, QuantLinear, replace_layer_

SMALL = 1e-3
NAMES = ("first", "grouped", "mixed", "time", "shared", "last")
STEPS = 3
Layers = dict[str, QuantLinear | QuantConv2d]


class Net(nn.Module):
    """Convolutions, one of them grouped, a Linear that is called twice, one that is fed by the time alone,
    and one that is called once for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding="same")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.mixed = nn.Linear(8, 8)
        self.time = nn.Linear(1, 8)
        self.shared = nn.Linear(3, 8)
        self.last = nn.Conv2d(8, 2, 1, padding="valid")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.grouped(torch.tanh(self.first(x)))
        h = h + self.time(t.expand(len(x))[:, None])[:, :, None, None]
        h = h + self.shared(torch.ones(1, 3))[:, :, None, None]
        for _ in range(2):
            h = h + torch.tanh(self.mixed(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.last(torch.tanh(h))


class Sampler:
    """Images [n, 2, 6, 6] after a few steps of a network; ``step`` is the one that runs."""

    def __init__(self, images: int = 4, guided: bool = False) -> None:
        torch.manual_seed(0)
        self.net, self.step, self.guided = Net(), 0, guided
        self.layers: Layers = {n: replace_layer_(self.net, n, None) for n in NAMES}
        self.net.requires_grad_(False)
        self.noise = torch.randn(images, 2, 6, 6)

    def __call__(self) -> Tensor:
        x = self.noise
        for self.step in range(STEPS):
            t = torch.tensor(float(self.step))
            if self.guided:
                low, high = self.net(torch.cat([0.5 * x, x]), t).chunk(2)
                x = x - 0.3 * (low + 2.0 * (high - low))
            else:
                x = x - 0.3 * self.net(x, t)
        return x


def reader(changes: dict[str, dict[str, Tensor]]) -> Callable[[str], tuple[tuple[str, ...], Tensor]]:
    def read(layer: str) -> tuple[tuple[str, ...], Tensor]:
        row = changes.get(layer, {})
        return tuple(row), torch.stack([v.flatten() for v in row.values()]) if row else torch.empty(0)

    return read


def squares(
    sampler: Sampler, changes: dict[str, dict[str, Tensor]], **options: bool
) -> dict[str, dict[str, float]]:
    """Mean squares of sketches, over many passes."""
    sketches = Sketches(sampler.net, sampler.layers, reader(changes), lambda *_: {}, **options)
    found = sketches(sampler, 400)
    return {layer: {n: float(np.square(v).mean()) for n, v in row.items()} for layer, row in found.items()}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_squares_are_those_of_small_changes(guided: bool, recompute: bool) -> None:
    sampler = Sampler(guided=guided)
    plain, shapes = sampler(), {n: layer.shape for n, layer in sampler.layers.items()}
    changes = {n: {"a": SMALL * torch.randn(s), "b": SMALL * torch.ones(s)} for n, s in shapes.items()}
    found = squares(sampler, changes, recompute=recompute)
    for name, layer in sampler.layers.items():
        full = layer.weight
        for way, change in changes[name].items():
            layer.weight = full + change
            assert found[name][way] == pytest.approx(float((sampler() - plain).square().mean()), rel=0.2), (
                name,
                way,
            )
            layer.weight = full
    assert "forward" not in sampler.net.__dict__


def test_gates_are_small_changes_of_a_layers_output_in_each_step() -> None:
    sampler, shift = Sampler(), SMALL * torch.randn(STEPS, 8)

    def gates(name: str, x: Tensor, step: int) -> dict[str, Tensor]:
        return {"shift": shift[step].expand(*x.shape[:-1], 8)} if name == "mixed" else {}

    sketches = Sketches(sampler.net, sampler.layers, reader({}), gates, lambda: sampler.step)
    said = float(np.square(sketches(sampler, 400)["mixed"]["shift"]).mean())
    plain, bias = sampler(), sampler.layers["mixed"].bias
    sampler.layers["mixed"].register_forward_pre_hook(
        lambda layer, _: setattr(layer, "bias", bias + shift[sampler.step])
    )
    assert said == pytest.approx(float((sampler() - plain).square().mean()), rel=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_sample_add_up_to_the_gradient(name: str) -> None:
    sampler = Sampler()
    layer, seen = sampler.layers[name], []
    layer.weight = layer.weight.clone().requires_grad_(True)
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out)))
    loss = sampler().square().sum()
    weight_slope, *slopes = torch.autograd.grad(loss, [layer.weight, *(out for _, out in seen)])
    parts = 1 if name == "shared" else 4
    own = [per_sample(layer, x, slope, parts) for (x, _), slope in zip(seen, slopes, strict=True)]
    assert own[0].shape == (parts, *layer.shape)
    assert torch.allclose(torch.stack(own).sum((0, 1)), weight_slope, atol=1e-3)


def test_rows_of_guidance_belong_to_their_image() -> None:
    layer = QuantLinear(torch.randn(3, 5), None)
    x, slope = torch.randn(4, 2, 5), torch.randn(4, 2, 3)  # two branches of two images
    found = per_sample(layer, x, slope, 2)
    for image in range(2):
        rows = [image, image + 2]
        assert torch.allclose(found[image], torch.einsum("bto,bti->oi", slope[rows], x[rows]), atol=1e-5)


def test_images_share_signs() -> None:
    sampler = Sampler()
    change = {"last": {"a": torch.ones(sampler.layers["last"].shape)}}
    sketches = Sketches(sampler.net, sampler.layers, reader(change), lambda *_: {})
    rows = np.array(sketches(sampler, 60)["last"]["a"]).reshape(60, 4)
    one = np.array(sketches(sampler, 60)["last"]["a"]).reshape(60, 4)
    assert (rows == one).all(), "deterministic"
    sampler.noise = sampler.noise[:1].expand(4, -1, -1, -1)  # the same image four times
    rows = np.array(sketches(sampler, 60)["last"]["a"]).reshape(60, 4)
    assert np.allclose(rows, rows[:, :1], atol=1e-5)


class Changing(nn.Module):
    """Adds to a layer's input after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1.0
        y = self.layer(h)
        h += y.detach()
        return y + h


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    net = Changing()
    layers = {"layer": replace_layer_(net, "layer", None)}
    net.requires_grad_(False)
    sketches = Sketches(net, layers, reader({}), lambda *_: {})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sketches(lambda: net(torch.randn(2, 8)), 1)
    with pytest.raises(RuntimeError, match="no gradient"):
        sketches(lambda: net(torch.randn(2, 8)).detach(), 1)


def test_gradients_that_are_kept_and_those_that_are_not_say_the_same() -> None:
    sampler = Sampler()
    change = {
        n: {"a": torch.ones(layer.shape), "b": torch.randn(layer.shape)}
        for n, layer in sampler.layers.items()
    }
    found = []
    for limit in (1 << 30, 0, 4 * 4 * 200):  # all of them, none, some
        sketches = Sketches(sampler.net, sampler.layers, reader(change), lambda *_: {}, limit=limit)
        found.append(sketches(sampler, 3))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for layer, row in found[0].items():
            for name, values in row.items():
                assert np.allclose(values, other[layer][name], rtol=1e-4, atol=1e-6), (layer, name)
