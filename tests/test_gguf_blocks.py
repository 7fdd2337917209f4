"""Blocks of GGUF's formats, decoded by the gguf package: they are our weights to the bit."""

from __future__ import annotations

import pytest
import torch

from aquabit import AquabitError, quantize_weight
from aquabit.exports.gguf_blocks import FIELDS, to_blocks

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("shape", [(5, 512), (3, 256, 1, 3), (2, 256, 1, 1)], ids=str)
@pytest.mark.parametrize("name", FIELDS)
def test_the_package_decodes_our_weight(name: str, shape: tuple[int, ...], aware: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    weight.flatten(1)[0, 10] = 4.0
    h = 1 + torch.arange(weight[0].numel()) % 7 if aware else None
    coded = quantize_weight(weight, f"{name}h" if aware else name, None if h is None else h.float())
    blocks = to_blocks(coded, name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    decoded = torch.tensor(gguf.quants.dequantize(blocks.numpy(), kind))
    assert torch.equal(decoded.reshape(shape), coded.dequantize())
    assert blocks.numel() == coded.nbytes
    assert blocks.shape[1] == gguf.quant_shape_to_byte_shape((weight[0].numel(),), kind)[0]


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(AquabitError, match="nf4g64 is no format of GGUF; they are q4_0"):
        to_blocks(quantize_weight(torch.ones(2, 64), "nf4g64"), "nf4g64")
    with pytest.raises(AquabitError, match="has 4 bits of signed levels in the order inputs; q8_0 has 8"):
        to_blocks(quantize_weight(torch.ones(2, 64), "q4_0"), "q8_0")
