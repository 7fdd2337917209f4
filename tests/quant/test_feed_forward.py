"""Feed-forward blocks give what diffusers' do, and their parts are called where somebody watches them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from aquabit.kernels import fake_quantize
from aquabit.kernels.dispatch import using
from aquabit.kernels.extension import native
from aquabit.quant.feed_forward import patch_feed_forwards_
from aquabit.quant.layers import replace_layer_
from aquabit.scheme import Scheme
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
KINDS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")
every_kind = pytest.mark.parametrize("kind", KINDS)


def block(kind: str = "geglu", act: int = 8, scheme: str = "usq4", inner: int = 75, **more: Any) -> Any:
    torch.manual_seed(0)
    made = FeedForward(24, activation_fn=kind, inner_dim=inner, **more).requires_grad_(False)
    for name in ("net.0.proj", "net.2"):
        layer = replace_layer_(made, name, None)
        weight = coded(scheme, tuple(layer.weight.shape), seed=len(name)).weight
        layer.set_packed_(weight, Scheme.parse(scheme))
        layer.act = act
    return made.eval()


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def choices() -> Iterator[None]:
    with using({}):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions between layers that torch computed."""
    made: list[str] = []
    for owner, name in ((nn.functional, "gelu"), (nn.functional, "silu"), (torch, "sigmoid")):
        real = getattr(owner, name)
        told = lambda *a, _name=name, _real=real, **k: made.append(_name) or _real(*a, **k)  # noqa: E731
        monkeypatch.setattr(owner, name, told)
    return made


def gap(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def expected(made: Any, x: Tensor, act: int) -> Tensor:
    """By diffusers' own parts in float64, inputs rounded."""
    first, last = deepcopy(made.net[0]), made.net[2]
    both = []
    for layer in (first.proj, last):
        both.append(nn.Linear(*reversed(layer.shape), dtype=torch.float64).requires_grad_(False))
        both[-1].weight.copy_(layer.coded.dequantize())
        both[-1].bias.copy_(layer.bias)
    first.proj = nn.Sequential(nn.Identity(), both[0])
    hidden = first(fake_quantize(x.float(), act).double())
    y: Tensor = both[1](fake_quantize(hidden.float(), act).double())
    return y


@every_kind
@pytest.mark.parametrize("act", [6, 8, 16])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_a_block_is_that_of_diffusers(kind: str, act: int, tokens: int, calls: list[str]) -> None:
    made, x = block(kind, act), inputs(2, tokens)
    truth, before = expected(made, x, act), made(x)
    del calls[:]
    patch_feed_forwards_(made)
    y = made(x)
    assert not calls
    # a value halfway between two points of its grid may go to the other one
    assert gap(y, truth) < (2e-3 if act < 16 else 1e-3)
    assert gap(y, before) < (2e-3 if act < 16 else 1e-5)
    assert made(x[:, :0]).shape == (2, 0, 24)


@every_kind
def test_bfloat16_and_other_layouts(kind: str, calls: list[str]) -> None:
    made, x = block(kind), inputs(2, 9)
    plain = made(x)
    narrow = deepcopy(made).bfloat16()
    own = narrow(x.bfloat16())
    del calls[:]
    patch_feed_forwards_(made)
    patch_feed_forwards_(narrow)
    turned = x.mT.contiguous().mT
    assert torch.equal(made(turned), made(x))
    y = narrow(x.bfloat16())
    assert not calls and y.dtype == torch.bfloat16
    assert gap(y, plain) < 1.2 * gap(own, plain) + 2e-3


@pytest.mark.parametrize("values", [(float("nan"),), (float("inf"),), (-float("inf"), 1e30), (1e30, -1e30)])
@every_kind
def test_numbers_that_are_none_and_far_ones_go_the_whole_way(kind: str, values: tuple[float, ...]) -> None:
    made, x = block(kind), inputs(5)
    x[2, : len(values)] = torch.tensor(values)
    plain = made(x)
    patch_feed_forwards_(made)
    y = made(x)
    assert torch.equal(y.isnan(), plain.isnan()) and torch.equal(y.isinf(), plain.isinf())
    kept = torch.tensor([0, 1, 3, 4])
    assert gap(y[kept], plain[kept]) < 2e-3


def watched(part: nn.Module, seen: list[str]) -> None:
    part.register_forward_hook(lambda *_: seen.append("after"))
    part.register_forward_pre_hook(lambda *_: seen.append("before"))


@pytest.mark.parametrize("name", ["net.0", "net.1", "net.2", "net.0.activation"])
def test_hooks_see_what_they_are_on(name: str) -> None:
    made, x, seen = block("swiglu"), inputs(5), list[str]()
    plain = made(x)
    patch_feed_forwards_(made)
    made(x)
    watched(made.get_submodule(name), seen)
    assert torch.equal(made(x), plain)
    assert seen == ["before", "after"]


def test_hooks_on_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x, seen = block(), inputs(5), list[str]()
    patch_feed_forwards_(made)
    made(x)
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    made(x)
    handle.remove()
    assert seen == ["QuantLinear", "GEGLU", "Dropout", "QuantLinear", "FeedForward"]


def test_a_forward_of_its_own_runs() -> None:
    made, x = block(), inputs(5)
    patch_feed_forwards_(made)
    made(x)
    made.net[1].forward = lambda hidden: 0 * hidden
    zero = made(x)
    assert gap(zero, made.net[2](torch.zeros(5, 75))) == 0
    other = block()
    other.forward = lambda hidden: hidden
    patch_feed_forwards_(other)
    assert other(x) is x


def test_dropout_drops_in_training_alone() -> None:
    made, x = block(dropout=0.5, final_dropout=True), inputs(5)
    patch_feed_forwards_(made)
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))


def test_gradients_dense_weights_and_static_ranges() -> None:
    for dense in (True, False):
        made, x = block(act=16), inputs(5)
        if dense:
            for layer in (made.net[0].proj, made.net[2]):
                layer.set_dense_(layer.coded.dequantize(), layer.scheme)
        given = x.clone().requires_grad_()
        made(given).square().sum().backward()
        own = x.clone().requires_grad_()
        patch_feed_forwards_(made)
        made(own).square().sum().backward()
        assert gap(own.grad, given.grad) < 1e-5
    made = block()
    made.net[2].ranges = ((-1.0, 1.0),)
    plain = made(x)
    patch_feed_forwards_(made)
    assert torch.equal(made(x), plain)


def test_copies_and_pickles_are_patched_too(calls: list[str]) -> None:
    made, x = block(), inputs(5)
    patch_feed_forwards_(made)
    patch_feed_forwards_(made)
    y = made(x)
    assert isinstance(made, FeedForward) and type(made).__name__ == "FeedForward"
    for copied in (deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied.net[2] is not made.net[2] and torch.equal(copied(x), y)
    assert not calls
