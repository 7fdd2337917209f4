"""Gradient sketches against what small changes really do to the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from aquabit.measuring.output_errors import OutputErrors
from aquabit.measuring.sketches import Sketches, per_sample
from aquabit.quant.finetuning.replay import Recorded, Recording
from aquabit.quant.layers import QuantConv2d, QuantLinear, replace_layer_

SMALL = 1e-3
NAMES = ("first", "grouped", "mixed", "time", "shared", "last")


def squares(sketches: Sketches, layer: str, name: str) -> list[float]:
    """Mean squares of what a sketch says, step by step."""
    return [float(np.square(sketches(place)[layer][name]).mean()) for place in range(2)]


class Net(nn.Module):
    """Convolutions, one of them grouped and strided, a Linear that is called twice, one that is fed by the
    time alone, and one that is called once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding="same")
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.mixed = nn.Linear(8, 8)
        self.time = nn.Linear(1, 8)
        self.shared = nn.Linear(3, 8)
        self.last = nn.Conv2d(8, 2, 2, padding="valid")

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.grouped(torch.tanh(self.first(x)))
        h = h + self.time(t.expand(len(x))[:, None])[:, :, None, None]
        h = h + self.shared(torch.ones(1, 3))[:, :, None, None]
        for _ in range(2):
            h = h + torch.tanh(self.mixed(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.last(torch.tanh(h))


def made() -> tuple[dict[str, QuantLinear | QuantConv2d], OutputErrors]:
    torch.manual_seed(0)
    net = Net()
    layers = {n: replace_layer_(net, n, None) for n in NAMES}
    net.requires_grad_(False)
    calls = []
    for run in range(2):
        for step in range(2):
            x, t = torch.randn(2, 2, 8, 8), torch.tensor(float(step))
            calls.append(Recorded(((x, t), {}), net(x, t), run, step))
    return layers, OutputErrors(Recording(calls), net)


@pytest.mark.parametrize("batch", [4, 3, 1])
def test_squares_are_those_of_small_changes(batch: int) -> None:
    layers, errors = made()
    changes = {
        n: {"a": SMALL * torch.randn(layer.shape), "b": SMALL * torch.ones(layer.shape)}
        for n, layer in layers.items()
    }
    sketches = Sketches(errors, layers, lambda n: changes[n], lambda *_: {}, 400, batch)
    for name, layer in layers.items():
        full = layer.weight
        for way, change in changes[name].items():
            said = squares(sketches, name, way)
            layer.weight = full + change
            assert said == pytest.approx(errors()["error"], rel=0.15), (name, way)
            layer.weight = full


def test_gates_are_small_changes_of_a_layers_output() -> None:
    layers, errors = made()
    shift = SMALL * torch.randn(8)

    def gates(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"shift": shift.expand(*x.shape[:-1], 8)} if name == "mixed" else {}

    sketches = Sketches(errors, layers, lambda n: {}, gates, passes=400)
    said = squares(sketches, "mixed", "shift")
    layers["mixed"].bias = layers["mixed"].bias + shift  # type: ignore[operator]
    assert said == pytest.approx(errors()["error"], rel=0.15)


@pytest.mark.parametrize("name", ["first", "grouped", "mixed", "time", "last"])
def test_gradients_by_sample_add_up_to_the_gradient(name: str) -> None:
    layers, errors = made()
    layer, seen = layers[name], []
    layer.weight = layer.weight.clone().requires_grad_(True)
    handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out)))
    loss = errors.outputs_of(errors.samples[0]).square().sum()
    handle.remove()
    outs = [out for _, out in seen]
    weight_slope, *slopes = torch.autograd.grad(loss, [layer.weight, *outs])
    own = [per_sample(layer, x, slope, 4) for (x, _), slope in zip(seen, slopes, strict=True)]
    assert own[0].shape == (4, *layer.shape)
    assert torch.allclose(torch.stack(own).sum((0, 1)), weight_slope, atol=1e-4)


def test_the_same_again() -> None:
    def found() -> dict[str, dict[str, list[float]]]:
        layers, errors = made()
        return Sketches(errors, layers, lambda n: {"a": torch.ones(layers[n].shape)}, lambda *_: {}, 2)(1)

    assert found() == found()


def test_samples_share_signs() -> None:
    layers, errors = made()
    layers["last"].bias = None
    change = {"a": torch.ones(layers["last"].shape)}
    found = Sketches(errors, layers, lambda n: change if n == "last" else {}, lambda *_: {}, 50)(0)
    rows = np.array(found["last"]["a"]).reshape(50, 4)  # all samples' outputs change much alike
    assert np.corrcoef(rows.T).min() > 0.5


class Changing(nn.Module):
    """Adds to a layer's input after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = x + t
        y = self.layer(h)
        h += y.detach()
        return y + h


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    torch.manual_seed(0)
    net = Changing()
    layers = {"layer": replace_layer_(net, "layer", None)}
    net.requires_grad_(False)
    calls = [((torch.randn(2, 8), torch.tensor(0.0)), {}) for _ in range(2)]
    errors = OutputErrors(Recording([Recorded(c, net(*c[0]), i, 0) for i, c in enumerate(calls)]), net)
    with pytest.raises(RuntimeError, match="'layer' is changed in place"):
        Sketches(errors, layers, lambda n: {}, lambda *_: {}, 1)(0)
