"""Functions that the kernel applies to what it reads, with every set of instructions, to float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aquabit.kernels import functions
from aquabit.kernels.backends.decode import decode_levels
from aquabit.kernels.dispatch import held
from aquabit.kernels.extension import native
from aquabit.kernels.functions import Function
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif(not decode_levels(), reason="the C++ extension was not built")
FUNCTIONS = {
    name: getattr(functions, name) for name in ("GELU", "GELU_TANH", "SILU", "QUICK_GELU", "GEGLU", "SWIGLU")
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
every_level = pytest.mark.parametrize("level", decode_levels())
OUTPUTS = 18


def made(weight: Any, x: Tensor, level: str, act: int, function: Function, threads: int = 1) -> Tensor | None:
    """x [tokens, in or 2 in] through the extension; None where it refuses."""
    y = torch.empty(len(x), OUTPUTS, dtype=x.dtype)
    few, narrow = len(x) <= 4, x.dtype == torch.bfloat16
    done = native.DecodeWeight(weight).linear(
        x.data_ptr(),
        y.data_ptr(),
        0,
        len(x),
        act,
        few,
        threads,
        decode_levels().index(level),
        narrow,
        function.code,
    )
    return y if done[0] else None


@every_level
@every_function
@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("tokens", [1, 4])
def test_values_are_those_of_float64(function: Function, level: str, inputs: int, tokens: int) -> None:
    own = coded("usq8", (OUTPUTS, inputs))
    rng = torch.Generator().manual_seed(inputs)
    x = 4 * torch.randn(tokens, inputs * (2 if function.gated else 1), generator=rng)
    x.flatten()[: len(FAR)] = torch.tensor(FAR)[: x.numel()]
    for given in (x, x.bfloat16()):
        y = made(held(own.weight), given, level, 16, function)
        assert y is not None
        read = function(given.double())
        error = (y.double() - read @ own.decoded.T).abs()
        most = read.abs() @ own.decoded.T.abs() + given.double().abs().amax() * own.decoded.abs().amax()
        assert bool((error <= most * (1e-6 if given is x else 4e-3)).all())


FAR = (0.0, -0.0, 1e-30, -1e-30, 40.0, -40.0, 300.0, -300.0, 6.0, -6.0)


@every_level
@every_function
def test_many_tokens_on_any_threads(function: Function, level: str) -> None:
    own = coded("usq4", (OUTPUTS, 70))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 70 * (2 if function.gated else 1), generator=rng)
    one, two = (made(held(own.weight), x, level, 8, function, threads) for threads in (1, 2))
    assert one is not None and two is not None and torch.equal(one, two)
    exact = function(x.double()) @ own.decoded.T
    assert float((one.double() - exact).norm() / exact.norm()) < 1e-2


def test_a_function_that_is_none_is_refused() -> None:
    weight, x = held(coded("usq4", (OUTPUTS, 70)).weight), torch.zeros(8, 140)
    for code in (-1, 5, 7, 8, 13, 16, 17):
        with pytest.raises(ValueError, match=f"{code} is no function"):
            made(weight, x, decode_levels()[0], 8, Function(code, torch.relu))
