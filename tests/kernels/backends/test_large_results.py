"""Results that are more than caches hold are written past them: every one is there, however they lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from aquabit.kernels.arranged import Arranged, arrange
from aquabit.kernels.backends.decode import decode_levels, decode_linear
from aquabit.kernels.backends.lut import lut_linear
from aquabit.kernels.extension import native
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension was not built")
PAST = 1 << 21  # results; kPast of native/memory.h
TOKENS = 2115


def _case(name: str, out: int) -> tuple[Tensor, Arranged, Tensor, Tensor]:
    assert TOKENS * out >= PAST
    weight, _, decoded = coded(name, (out, 16))
    x = torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(out, generator=torch.Generator().manual_seed(2))
    arranged = arrange(weight)
    assert isinstance(arranged, Arranged)
    return x, arranged, bias, linear(x.double(), decoded, bias.double())


@pytest.mark.parametrize("out", [1024, 1000, 1001])  # whole lines of 64 bytes, half ones, and no whole ones
@pytest.mark.parametrize("level", decode_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_decoding(level: str, out: int, dtype: torch.dtype) -> None:
    x, weight, bias, expected = _case("usq4", out)
    y = decode_linear(x.to(dtype), weight, bias, level=level)
    bound = 2e-3 if dtype == torch.float32 else 2e-2
    assert y.dtype == dtype and (y - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("out", [1024, 1000, 1001])
@pytest.mark.parametrize("level", range(len(native.lut_levels())) if native else [])
def test_by_tables(level: int, out: int) -> None:
    x, weight, bias, expected = _case("aq2x6g8", out)
    y = lut_linear(x, weight, bias, exact=True, level=level)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
