"""A packed layer's shortest way: it gives what the layer is now, and steps aside where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from aquabit.kernels import fake_quantize
from aquabit.kernels.dispatch import observed, using
from aquabit.kernels.extension import native
from aquabit.quant import layers
from aquabit.quant.layers import QuantConv2d, QuantLinear, Setting, Tied, quant_layer
from aquabit.quant.lora import LowRank
from aquabit.scheme import AquabitError, Scheme
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
Layer = QuantLinear | QuantConv2d


def packed(kind: str = "linear", scheme: str = "usq4", act: int = 8, seed: int = 0) -> Layer:
    plain = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(8, 24, 3, stride=2, padding=1)
    layer = quant_layer(plain)
    weight = coded(scheme, tuple(plain.weight.shape), seed).weight
    layer.set_packed_(weight, Scheme.parse(scheme))
    layer.act = act
    return layer


def inputs(kind: str = "linear", many: int = 3, seed: int = 0) -> Tensor:
    shape = (many, 32) if kind == "linear" else (many, 8, 7, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(layer: Any, x: Tensor) -> Tensor:
    """Rounding and a float64 product, of what the layer holds now."""
    weight, bias = layer.coded.dequantize().double(), None if layer.bias is None else layer.bias.double()
    if isinstance(layer, QuantLinear):
        y = functional.linear(fake_quantize(x, layer.act).double(), weight, bias)
        return fake_quantize(y.float(), layer.act_output).double()
    rounded = fake_quantize(x, layer.act, "sample", layer.split).double()
    return functional.conv2d(rounded, weight, bias, layer.stride, layer.padding)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that took the whole way."""
    taken: list[str] = []
    for name in ("codebook_linear", "codebook_conv2d"):
        real = getattr(layers, name)
        told = lambda *a, _name=name, _real=real, **k: taken.append(_name) or _real(*a, **k)  # noqa: E731
        monkeypatch.setattr(layers, name, told)
    with using({}):
        yield taken


def close(y: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((y.double() - other).norm() / other.norm()) < tolerance


# ---- what the layer is now


def replaced(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value(layer))


def other_state(layer: Any) -> None:
    kind = "linear" if isinstance(layer, QuantLinear) else "conv"
    layer.load_state_dict(packed(kind, seed=7).state_dict())


CHANGES: dict[str, Callable[[Any], object]] = {
    "act": replaced("act", lambda _: 6),
    "act off": replaced("act", lambda _: 16),
    "setting": lambda layer: layer.set_activations_(Setting(6)),
    "bias replaced": replaced("bias", lambda layer: 2 * layer.bias),
    "bias gone": replaced("bias", lambda _: None),
    "bias in its place": lambda layer: layer._buffers.update(bias=2 * layer.bias),
    "bias changed": lambda layer: layer.bias.mul_(2),
    "bias with other data": lambda layer: setattr(layer.bias, "data", 2 * layer.bias),
    "bias at 16 bits": lambda layer: layer.shrink_(),
    "codes changed": lambda layer: layer.codes.copy_(layer.codes.flip(0)),
    "codes with other data": lambda layer: setattr(layer.codes, "data", layer.codes.flip(0)),
    "other weight": lambda layer: layer.set_packed_(coded("usq4", layer.shape, 7).weight, layer.scheme),
    "other scheme": lambda layer: layer.set_packed_(
        coded("usq2", layer.shape, 7).weight, Scheme.parse("usq2")
    ),
    "state loaded": other_state,
    "shared memory": lambda layer: layer.share_memory(),
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_in_the_next_call(change: str, kind: str, whole: list[str]) -> None:
    layer, x = packed(kind), inputs(kind)
    with torch.no_grad():
        before = layer(x)
        assert close(before, expected(layer, x)) and not whole
        CHANGES[change](layer)
        y = layer(x)
        assert close(y, expected(layer, x), 1e-3 if layer.act == 16 else 1e-5) and not whole
        assert torch.equal(y, before) == (change == "shared memory")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_parameters_put_in_their_place_count(kind: str, whole: list[str]) -> None:
    """As accelerate does it: not through the module."""
    layer, other, x = packed(kind), packed(kind, seed=7), inputs(kind)
    with torch.no_grad():
        layer(x)
        for name in layer._packed.tensors():
            layer._parameters[name] = other._parameters[name]
        layer._buffers["bias"] = other._buffers["bias"]
        assert close(layer(x), expected(other, x)) and len(whole) == 1, "found by the whole way"
        assert close(layer(x), expected(other, x)) and len(whole) == 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_offloaded_layer_runs_from_what_is_put_in_its_place(kind: str, whole: list[str]) -> None:
    layer, x = packed(kind), inputs(kind)
    with torch.no_grad():
        y = layer(x)
        model = accelerate.cpu_offload(nn.Sequential(layer), torch.device("cpu"), offload_buffers=True)
        for _ in range(3):
            assert torch.equal(model(x), y)
    assert layer._parameters["codes"].is_meta


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_inputs_of_other_sizes_types_and_threads(kind: str, whole: list[str]) -> None:
    layer, before = packed(kind), torch.get_num_threads()
    with torch.inference_mode():
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for many in (1, 3, 17):
                    x = inputs(kind, many)
                    assert close(layer(x), expected(layer, x))
        finally:
            torch.set_num_threads(before)
        assert not whole
        x = inputs(kind).bfloat16()
        assert layer(x).dtype == torch.bfloat16 and close(layer(x).float(), expected(layer, x.float()), 5e-3)
        assert not whole


def test_bfloat16_layers_read_and_write_it(whole: list[str]) -> None:
    layer = packed().bfloat16()
    with torch.no_grad():
        for many in (1, 4, 5, 40):
            x = inputs(many=many).bfloat16()
            wide = expected(layer, x.float())
            assert torch.equal(layer(x), wide.bfloat16()) or close(layer(x).float(), wide, 3e-3)
        assert not whole
        layer.act_output = 8
        y = layer(x)
        layer.act_output = 16
        assert whole and torch.equal(y, fake_quantize(layer(x), 8))


@pytest.mark.parametrize("act", [8, 16])
def test_outputs_are_rounded(act: int, whole: list[str]) -> None:
    layer, x = packed(act=act), inputs(many=30)
    with torch.no_grad():
        layer(x)
        for bits in (6, 8, 16):
            layer.act_output = bits
            step = 2.0 / (2**bits - 1)  # a value between two points may go either way
            y = layer(x)
            gap = (y.double() - expected(layer, x)).abs().amax(1) / (y.amax(1) - y.amin(1))
            assert float(gap.max()) < step + 2e-3 and (bits == 16 or len(y[0].unique()) <= 2**bits)
    assert not whole


def test_copies_have_calls_of_their_own(whole: list[str]) -> None:
    layer, x = packed(), inputs()
    with torch.no_grad():
        y = layer(x)
        copied = deepcopy(layer)
        assert copied._direct is None and torch.equal(copied(x), y)
        copied.codes.copy_(copied.codes.flip(0))
        assert torch.equal(layer(x), y) and close(copied(x), expected(copied, x))
        layer.codes.zero_()
        assert close(copied(x), expected(copied, x)) and not torch.equal(copied(x), y)
    assert not whole


# ---- what takes the whole way


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_pass(kind: str, whole: list[str]) -> None:
    layer, x = packed(kind, act=16), inputs(kind)
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert len(whole) == 1 and x.grad is not None
    weight = layer.coded.dequantize()
    other = x.detach().clone().requires_grad_()
    if kind == "linear":
        functional.linear(other, weight).sum().backward()
    else:
        functional.conv2d(other, weight, None, layer.stride, layer.padding).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_mapped_calls(whole: list[str]) -> None:
    layer, x = packed(), inputs(many=6)
    with torch.no_grad():
        y = layer(x)
        mapped = vmap(layer)(x.reshape(2, 3, 32))
        assert whole and close(mapped.reshape(6, 24), y)
        bias = torch.ones(24)
        assert close(functional_call(layer, {"bias": bias}, x), y.double() - layer.bias + bias)
        assert torch.equal(layer(x), y)


def test_meta_inputs_have_shapes(whole: list[str]) -> None:
    for kind in ("linear", "conv"):
        layer, x = packed(kind), inputs(kind)
        with torch.no_grad():
            shape = layer(x).shape
            layer.to("meta")
            assert layer(x.to("meta")).shape == shape and layer(x.to("meta")).is_meta


def test_compiled_layers_are_one_graph(whole: list[str]) -> None:
    model, x = nn.Sequential(packed(), nn.ReLU()), inputs()
    with torch.no_grad():
        y = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert close(compiled(x), y)
        model[0].act = 6
        assert close(compiled(x), model(x)) and not torch.equal(model(x), y)


def test_hooks_and_modes_see_the_layer(whole: list[str]) -> None:
    layer, x, seen = packed(), inputs(), []
    with torch.no_grad():
        y = layer(x)
        handle = layer.register_forward_hook(lambda module, args, out: 2 * out)
        pre = layer.register_forward_pre_hook(lambda module, args: (-args[0],))
        assert close(layer(x), 2 * expected(layer, -x))
        handle.remove(), pre.remove()
        with observed(lambda weight, request, backend: seen.append(backend)):
            assert close(layer(x), y)
        assert seen == ["decode"] and not whole
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), y)


def test_what_stands_beside_the_weight_is_added(whole: list[str]) -> None:
    layer, x = packed(act=16), inputs()
    tied = Tied(layer, torch.ones(24))
    with torch.no_grad():
        y = layer(x)
        layer.branches.append(LowRank(torch.ones(2, 32), torch.ones(24, 2), 1.0))
        assert close(layer(x), y.double() + 2 * x.sum(1, keepdim=True)) and len(whole) == 1
        layer.branches.clear()
        assert torch.equal(layer(x), y) and len(whole) == 1
        assert close(tied(x), y.double() - layer.bias + 1) and len(whole) == 2
        layer.ranges = ((-1.0, 1.0),)
        layer.act = 8
        layer(x)
        layer.ranges, layer.act = None, 16
        layer.keep_dense_(torch.float32)
        assert close(layer(x), y) and len(whole) == 4
        layer.keep_dense_(None)
        assert torch.equal(layer(x), y) and len(whole) == 4


def test_bad_settings_still_raise(whole: list[str]) -> None:
    layer, x = packed(), inputs()
    with torch.no_grad():
        layer(x)
        with pytest.raises(AquabitError, match="16 channels"):
            layer(x[:, :16])
        layer.bias = torch.ones(3)
        with pytest.raises(AquabitError, match="bias is"):
            layer(x)
        layer.bias, layer.act = None, 1
        with pytest.raises(AquabitError, match="act=1"):
            layer(x)
        layer.act, layer.accuracy = 8, "best"
        with pytest.raises(AquabitError, match="'best' is unknown"):
            layer(x)
        image = packed("conv")
        image(inputs("conv"))
        with pytest.raises(AquabitError, match="smaller than a kernel"):
            image(inputs("conv")[:, :, :0])
