"""Direct calls are what the whole way gives, and are left to it where something else has a say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from aquabit.kernels import codebook_conv2d, codebook_linear, straight_through, time_requests
from aquabit.kernels import direct as own
from aquabit.kernels.arranged import Arranged
from aquabit.kernels.direct import SHAPES, Direct, is_plain
from aquabit.kernels.dispatch import (
    conv2d_request,
    forget,
    format_held,
    held,
    linear_request,
    observed,
    remember,
    using,
)
from aquabit.kernels.extension import native
from aquabit.kernels.geometry import Geometry
from aquabit.kernels.request import Request
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")


def arranged(scheme: str, shape: tuple[int, ...], seed: int = 0) -> Arranged:
    weight = held(coded(scheme, shape, seed).weight)
    assert isinstance(weight, Arranged)
    return weight


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that a backend was looked up for."""
    asked: list[Request] = []
    choose = own.backend_for
    monkeypatch.setattr(own, "backend_for", lambda request: asked.append(request) or choose(request))
    with using({}):
        yield asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [6, 8, 12, 16])
@pytest.mark.parametrize("scheme", ["usq3", "usq4", "usq4g64", "vq3", "vq4c", "aq2x6g8"])
def test_linear_is_the_whole_way_to_the_bit(
    scheme: str, act: int, dtype: torch.dtype, prepared: list[Request]
) -> None:
    weight, bias = arranged(scheme, (37, 200)), inputs(37, seed=1).to(dtype)
    for given in (bias, None):
        call = Direct(weight, given, lambda x: linear_request(x, format_held(weight), "fast", act))
        for shape in ((200,), (1, 200), (2, 2, 200), (3, 11, 200)):
            x = inputs(*shape).to(dtype)
            y = call(x)
            expected = codebook_linear(x, weight, given, act=act)
            assert y is not None or dtype == torch.bfloat16, "values rounded to 16 bits between steps"
            assert y is not None or not scheme.startswith("usq4") or act == 12
            assert y is None or (y.dtype == dtype and torch.equal(y, expected))
            turned = x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2]
            assert y is None or torch.equal(call(turned), expected)


@pytest.mark.parametrize("act", [8, 16])
@pytest.mark.parametrize("scheme", ["usq4", "vq3", "aq4x4k"])
def test_convolution_is_the_whole_way_to_the_bit(scheme: str, act: int, prepared: list[Request]) -> None:
    weight, bias, geometry = arranged(scheme, (12, 8, 3, 3)), inputs(12), Geometry((2, 1), (1, 0))
    for split in (None, 3):
        form = format_held(weight)
        call = Direct(weight, bias, lambda x: conv2d_request(x, form, geometry, "fast", act, split))  # noqa: B023
        for size in ((1, 8, 7, 9), (3, 8, 16, 5)):
            x = inputs(*size)
            whole = codebook_conv2d(x, weight, bias, (2, 1), (1, 0), act=act, split=split)
            assert torch.equal(call(x), whole)
            for turned in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
                y, whole = (
                    call(turned),
                    codebook_conv2d(turned, weight, bias, (2, 1), (1, 0), act=act, split=split),
                )
                assert torch.equal(y, whole) and y.stride() == whole.stride()
            narrow, added = x.bfloat16(), bias.bfloat16()
            whole = codebook_conv2d(narrow, weight, added, (2, 1), (1, 0), act=act, split=split)
            y = call(narrow)
            if y is None:
                assert scheme == "aq4x4k", "tables are of float32"
            else:
                assert y.dtype == torch.bfloat16 and torch.equal(y, whole)


def test_outputs_are_rounded_as_by_fake_quantize(prepared: list[Request]) -> None:
    weight, x = arranged("usq4", (37, 64)), inputs(5, 64)
    for bits in (6, 8):
        call = Direct(weight, None, lambda x: linear_request(x, format_held(weight), "fast", 8), bits)
        expected = straight_through(codebook_linear(x, weight, act=8), bits)
        assert torch.equal(call(x), expected)
        assert call(x.bfloat16()) is None


class Sub(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_only_plain_tensors_are_plain() -> None:
    x = inputs(3, 4)
    assert (
        is_plain(x)
        and is_plain(x.bfloat16())
        and is_plain(x[1:])
        and is_plain(x.t())
        and is_plain(x.detach())
    )
    with torch.inference_mode():
        assert is_plain(x) and is_plain(inputs(3, 4))
    other = {
        "meta": x.to("meta"),
        "subclass": x.as_subclass(Sub),
        "parameter": torch.nn.Parameter(x),
        "sparse": x.to_sparse(),
        "negated": torch._neg_view(x),
        "gradient": x.clone().requires_grad_(),
    }
    assert [name for name, value in other.items() if is_plain(value)] == []
    with torch.no_grad():
        assert is_plain(other["gradient"])
    seen = []
    vmap(lambda a: seen.append(is_plain(a)) or a)(x)
    with Mode():
        seen.append(is_plain(x))
    torch.jit.trace(lambda a: seen.append(is_plain(a)) or a + 1, x, check_trace=False)
    assert seen == [False, False, False]


def test_observers_are_told_of_the_same_call(prepared: list[Request]) -> None:
    weight, x = arranged("usq4", (8, 16)), inputs(2, 16)
    told: list[Any] = []
    call = Direct(weight, None, lambda x: linear_request(x, format_held(weight), "fast", 8))
    with observed(lambda *of: told.append(of)):
        y = call(x)
        assert torch.equal(y, codebook_linear(x, weight, act=8))
    assert len(told) == 2 and told[0] == told[1] and told[0][0] is weight
    assert torch.equal(call(x), y) and len(told) == 2
    far, call = (
        inputs(20, 16),
        Direct(weight, None, lambda x: linear_request(x, format_held(weight), "fast", 16)),
    )
    far[:, 0] = 1e31  # no integers stand for it
    with observed(lambda *of: told.append(of)):
        assert call(far) is None and len(told) == 2  # the whole way tells


def test_calls_are_prepared_once_for_a_shape_type_and_number_of_threads(prepared: list[Request]) -> None:
    weight = arranged("usq4", (8, 16))
    call = Direct(weight, None, lambda x: linear_request(x, format_held(weight), "fast", 8))
    before = torch.get_num_threads()
    try:
        for _ in range(3):
            for x in (inputs(2, 16), inputs(9, 16), inputs(2, 16).bfloat16()):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    torch.testing.assert_close(call(x), codebook_linear(x, weight, act=8))
    finally:
        torch.set_num_threads(before)
    assert len(prepared) == 6
    for tokens in range(1, 2 * SHAPES):
        call(inputs(tokens, 16))
    assert len(call._made[2]) <= SHAPES + 1, "inputs of any number of shapes take bounded memory"


def test_times_that_are_measured_later_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("AQUABIT_TIMINGS", str(tmp_path))
    forget()
    weight, x, chosen = arranged("usq4", (8, 16)), inputs(2, 16), []
    choose = own.backend_for
    monkeypatch.setattr(own, "backend_for", lambda r: chosen.append(choose(r).name) or choose(r))
    call = Direct(weight, None, lambda x: linear_request(x, format_held(weight), "fast", 16))
    key = linear_request(x, format_held(weight), "fast", 16).key
    try:
        call(x)
        remember({key: {"lut": 1.0, "decode": 2.0}})
        call(x)
        with using({key: {"reference": 1.0, "lut": 2.0}}):
            assert call(x) is None, "the reference has no call by addresses"
        call(x)
        forget()
        call(x)
    finally:
        forget()
    assert chosen == ["decode", "lut", "reference", "lut", "lut"]


CHANGES: dict[str, Callable[[Arranged, Tensor], object]] = {
    "shared memory": lambda weight, bias: weight.codes.share_memory_(),
    "codes elsewhere": lambda weight, bias: setattr(weight.codes, "data", weight.codes.clone()),
    "other codes": lambda weight, bias: weight.codes.copy_(weight.codes.flip(0)),
    "other codes elsewhere": lambda weight, bias: setattr(weight.codes, "data", weight.codes.flip(0)),
    "other scales": lambda weight, bias: weight.scale.mul_(2),
    "other bias": lambda weight, bias: bias.mul_(2),
    "bias elsewhere": lambda weight, bias: setattr(bias, "data", 2 * bias),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_change_are_read_as_they_are(change: str, prepared: list[Request]) -> None:
    weight, bias, x = arranged("usq4", (8, 16)), inputs(8, seed=2), inputs(2, 16)
    call = Direct(weight, bias, lambda x: linear_request(x, format_held(weight), "fast", 8))
    before = call(x)
    assert before is not None
    CHANGES[change](weight, bias)
    expected = codebook_linear(x, weight, bias, act=8)
    assert torch.equal(call(x), expected)
    assert torch.equal(before, expected) == (change in ("shared memory", "codes elsewhere"))


def test_a_bias_of_another_size_is_not_read(prepared: list[Request]) -> None:
    weight, bias, x = arranged("usq4", (8, 16)), inputs(8), inputs(2, 16)
    call = Direct(weight, bias, lambda x: linear_request(x, format_held(weight), "fast", 8))
    assert call(x) is not None
    bias.data = inputs(3)
    assert call(x) is None


def test_what_kernels_cannot_do_takes_the_whole_way(prepared: list[Request]) -> None:
    weight = arranged("usq4", (8, 16))
    call = Direct(weight, None, lambda x: linear_request(x, format_held(weight), "fast", 16))
    assert call(inputs(0, 16)) is None
    assert call(inputs(2, 16).half()) is None and call(inputs(2, 16).double()) is None
    outliers = inputs(64, 16)
    outliers[:, 0] = 1e31
    assert call(outliers) is None, "no integers stand for such activations"
    exact = Direct(weight, None, lambda x: linear_request(x, format_held(weight), "exact", 16))
    assert exact(inputs(64, 16)) is None and exact(inputs(2, 16)) is not None


def test_kernels_are_timed_as_layers_call_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = coded("usq4", (8, 16)).weight, inputs(2, 16)
    bias, whole = torch.zeros(8), []
    monkeypatch.setattr(time_requests, "codebook_linear", lambda *a, **k: whole.append(a))
    request = linear_request(x, format_held(arranged("usq4", (8, 16))), "fast", 8)
    for backend in ("decode", "lut"):
        y = time_requests._coded(request, x, weight, bias, weight.dequantize(), backend)()
        torch.testing.assert_close(y, codebook_linear(x, weight, bias, "fast", backend, act=8))
    assert not whole
    time_requests._coded(request, x, weight, bias, weight.dequantize(), "reference")()
    assert len(whole) == 1
