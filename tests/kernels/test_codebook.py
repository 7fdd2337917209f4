"""A CodebookWeight that exists is consistent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from aquabit.errors import AquabitError
from aquabit.kernels import codebook_conv2d
from aquabit.kernels.codebook import CodebookWeight, from_tensors
from aquabit.quant.weights import quantize_weight
from tests.coded_weights import coded

LINEAR, ADDITIVE = coded("usq4", (6, 32)).weight, coded("aq2x4g8", (6, 32)).weight
SLICES = coded("aq1x4k", (6, 8, 3, 3)).weight
HALF = torch.ones(6, dtype=torch.float16)


@pytest.mark.parametrize(
    ("weight", "change", "said"),
    [
        (LINEAR, {"shape": (6,)}, r"shape is \(6,\)"),
        (LINEAR, {"shape": (6, 0)}, "each at least 1"),
        (LINEAR, {"shape": (6, 32.0)}, "shape is"),
        (LINEAR, {"shape": (1 << 30, 1 << 30)}, "shape is"),
        (LINEAR, {"shape": [6, 32]}, "shape is"),
        (LINEAR, {"bits": 0}, "0 bits"),
        (LINEAR, {"bits": True}, "True bits"),
        (LINEAR, {"bits": 17}, "1 to 16"),
        (LINEAR, {"order": "kernel"}, "kernel for a convolution"),
        (SLICES, {"order": None}, "order of codes is None"),
        (SLICES, {"offset": HALF}, "no offset"),
        (SLICES, {"scale": HALF[:, None].repeat(1, 2)}, "no offset"),
        (SLICES, {"shape": (6, 8, 2, 2)}, "cover 4 weights each"),
        (LINEAR, {"packed": None}, "codes are None"),
        (LINEAR, {"packed": LINEAR.packed[:-1]}, r"needs uint8 \[96\]"),
        (LINEAR, {"packed": LINEAR.packed.short()}, "int16"),
        (LINEAR, {"scale": HALF.float()}, "float32"),
        (LINEAR, {"scale": HALF.to("meta")}, "on meta"),
        (LINEAR, {"scale": HALF[:5]}, r"scale is \[5\]"),
        (LINEAR, {"scale": HALF.reshape(6, 1, 1)}, r"scale is \[6, 1, 1\]"),
        (LINEAR, {"scale": HALF[:, None].repeat(1, 33)}, r"scale is \[6, 33\]"),
        (LINEAR, {"offset": torch.ones(6, 0, dtype=torch.float16)}, r"offset is \[6, 0\]"),
        (ADDITIVE, {"codebooks": ADDITIVE.codebooks[0]}, "codebooks are"),
        (ADDITIVE, {"codebooks": ADDITIVE.codebooks[:, :, :8].contiguous()}, "codebooks are"),
        (ADDITIVE, {"codebooks": ADDITIVE.codebooks[:, :0]}, "codebooks are"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    weight: CodebookWeight, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(AquabitError, match=said):
        replace(weight, **change)


def test_what_was_stored_must_be_finite() -> None:
    for value in (float("nan"), float("inf")):
        broken = LINEAR.scale.clone()
        broken[3] = value
        with pytest.raises(AquabitError, match="1 of 6 numbers of scale are not finite"):
            from_tensors(LINEAR.tensors() | {"scale": broken}, LINEAR.shape, LINEAR.bits)
    assert torch.equal(from_tensors(LINEAR.tensors(), LINEAR.shape, 4).dequantize(), LINEAR.dequantize())


def test_scales_of_kernel_slices_may_be_a_column() -> None:
    column = replace(SLICES, scale=SLICES.scale[:, None].contiguous())
    assert torch.equal(column.dequantize(), SLICES.dequantize())


def test_a_depthwise_convolution_may_have_thousands_of_groups() -> None:
    channels = 5000
    weight = quantize_weight(torch.randn(channels, 1, 3, 3), "usq4")
    x = torch.randn(1, channels, 4, 4)
    y = codebook_conv2d(x, weight, None, 1, 1, 1, channels, accuracy="exact")
    expected = torch.nn.functional.conv2d(x, weight.dequantize(), None, 1, 1, 1, channels)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
