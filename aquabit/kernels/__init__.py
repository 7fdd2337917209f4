"""CodebookWeight and the kernels that run it; fused activation fake-quantization and attention."""

from aquabit.kernels import compiled as compiled  # for its operators
from aquabit.kernels.attention import rounded_attention, rounded_attention_reference
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.dispatch import codebook_conv2d, codebook_linear, select
from aquabit.kernels.fake_quant import (
    fake_quantize,
    fake_quantize_reference,
    fake_quantize_static,
    native_available,
    straight_through,
)
from aquabit.kernels.request import Accuracy, Request

__all__ = [
    "Accuracy",
    "CodebookWeight",
    "Request",
    "codebook_conv2d",
    "codebook_linear",
    "fake_quantize",
    "fake_quantize_reference",
    "fake_quantize_static",
    "native_available",
    "rounded_attention",
    "rounded_attention_reference",
    "select",
    "straight_through",
]
