"""Products by tiles (AMX): the same results, to the bit, as without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquabit.activation_bits import Rounding
from aquabit.kernels.arranged import Arranged, arrange
from aquabit.kernels.backends.decode import decode_conv2d, decode_levels, decode_linear
from aquabit.kernels.geometry import Geometry
from tests.coded_weights import coded

pytestmark = pytest.mark.skipif("amx" not in decode_levels(), reason="the processor has no tiles")
ROUNDINGS: tuple[Rounding, ...] = (8, 6, "i8")


def _case(scheme: str, shape: tuple[int, ...], *inputs: int) -> tuple[Tensor, Arranged, Tensor]:
    weight, _, _ = coded(scheme, shape)
    found = arrange(weight)
    assert isinstance(found, Arranged)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*inputs, generator=generator)
    x[0] += 60  # zero points that lie far from the others'
    return x, found, torch.randn(shape[0], generator=generator)


@pytest.mark.parametrize("act", ROUNDINGS)
@pytest.mark.parametrize(
    ("scheme", "tokens", "cin", "out"),
    [
        (scheme, *size)
        for scheme in ("usq2", "usq4", "usq8", "usq4g64", "int4g64", "q4_0")
        for size in ((9, 64, 5), (33, 192, 70), (40, 1152, 33), (300, 256, 64))
    ]
    + [(scheme, 40, cin, 33) for scheme in ("usq2", "usq4", "usq8") for cin in (180, 177, 50)],
)
def test_tokens(scheme: str, tokens: int, cin: int, out: int, act: Rounding) -> None:
    x, weight, bias = _case(scheme, (out, cin), tokens, cin)
    for _ in range(2):
        x[0] -= 30  # nearer the others' at the second time
        tiles, without = (decode_linear(x, weight, bias, act, level=n) for n in ("amx", "avx512vnni"))
        assert torch.equal(tiles, without)


@pytest.mark.parametrize("act", ROUNDINGS)
@pytest.mark.parametrize("split", [None, 64, 50])
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((40, 128, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
        ((33, 128, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 1)),
        ((70, 128, 1, 1), Geometry((1, 1), (0, 0), (1, 1), 1)),
        ((40, 64, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 2)),
    ],
)
def test_images(act: Rounding, split: int | None, shape: tuple[int, ...], geometry: Geometry) -> None:
    x, weight, bias = _case("usq4", shape, 2, shape[1] * geometry.groups, 13, 11)
    tiles, without = (
        decode_conv2d(x, weight, bias, geometry, act, split, level=n) for n in ("amx", "avx512vnni")
    )
    assert torch.equal(tiles, without)
