"""QuantLinear and QuantConv2d: layers whose weight is dense (decoded) or packed, and whose activations are fake-quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from aquabit.kernels import codebook_conv2d, codebook_linear, fake_quantize
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.reference import Accuracy
from aquabit.scheme import FP, Scheme


class _QuantLayer(nn.Module):
    """State that both kinds share.

    ``act`` are the bits of the layer's input (16 = off), ``act_output`` those of its output (Q, K and V), ``split`` the channel where a
    concatenated skip begins: then the input has two ranges. In dense mode ``weight`` is a tensor of the original shape; in packed mode
    the coded tensors are buffers and ``weight`` is an empty tensor that carries dtype and device only.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, split: int | None = None):
        super().__init__()
        self.shape, self.split, self.scheme = tuple(weight.shape), split, FP
        self.act, self.act_output = 16, 16
        self.accuracy: Accuracy = "fast"
        self.coded: CodebookWeight | None = None
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def set_dense_(self, weight: Tensor, scheme: Scheme) -> None:
        self.coded, self.weight, self.scheme = None, weight, scheme

    def set_packed_(self, coded: CodebookWeight, scheme: Scheme) -> None:
        """Run from the coded tensors; the dense weight is dropped."""
        self.weight = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        self.coded, self.scheme = coded, scheme

    def shrink_(self, dtype: torch.dtype = torch.float16) -> None:
        """Keep the bias, and a weight that is not coded, at 16 bits; both are widened as they are used."""
        self.bias = None if self.bias is None else self.bias.to(dtype)
        self.weight = self.weight.to(dtype)

    def bias_for(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def resident_bytes(self) -> int:
        """Bytes that the layer's weight and bias hold in memory."""
        own = self.weight.untyped_storage().nbytes() + (0 if self.bias is None else self.bias.untyped_storage().nbytes())
        return own if self.coded is None else own + sum(t.untyped_storage().nbytes() for t in self.coded.tensors().values())

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.scheme}, a{self.act}, {'dense' if self.coded is None else 'packed'}"

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.coded is not None:  # codes keep their dtype: only the device moves
            self.coded = self.coded.to(fn(torch.empty(0, device=self.coded.packed.device)).device)
        return self


class QuantLinear(_QuantLayer):
    """x [..., in] -> [..., out]; activations per token (the last dimension)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, split: int | None = None):
        super().__init__(weight, bias, split)
        self.out_features, self.in_features = weight.shape

    @staticmethod
    def of(layer: nn.Linear, split: int | None = None) -> QuantLinear:
        return QuantLinear(layer.weight, layer.bias, split)

    def quantized_input(self, x: Tensor, bits: int) -> Tensor:
        """x [..., in] as the layer reads it at ``bits`` (16: x itself)."""
        return fake_quantize(x, bits, "token")

    def forward(self, x: Tensor, *_: object) -> Tensor:
        x = self.quantized_input(x, self.act)
        if self.coded is None:
            y = functional.linear(x, self.weight.to(x.dtype), self.bias_for(x))
        else:
            y = codebook_linear(x, self.coded, self.bias_for(x), self.accuracy)
        return fake_quantize(y, self.act_output, "token")


class QuantConv2d(_QuantLayer):
    """x [n, cin, h, w] -> [n, cout, h', w']; activations per sample with zero in the range, so that padding is exact."""

    def __init__(self, weight: Tensor, bias: Tensor | None, split: int | None, like: nn.Conv2d):
        super().__init__(weight, bias, split)
        self.out_channels, self.in_channels = like.out_channels, like.in_channels
        self.stride, self.padding, self.dilation, self.groups = pair(like.stride), _padding(like.padding), pair(like.dilation), like.groups
        self.kernel_size = like.kernel_size

    @staticmethod
    def of(layer: nn.Conv2d, split: int | None = None) -> QuantConv2d:
        return QuantConv2d(layer.weight, layer.bias, split, layer)

    def quantized_input(self, x: Tensor, bits: int) -> Tensor:
        """x [n, cin, h, w] as the layer reads it at ``bits`` (16: x itself)."""
        return fake_quantize(x, bits, "sample", self.split)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        x = self.quantized_input(x, self.act)
        if self.coded is None:
            return functional.conv2d(x, self.weight.to(x.dtype), self.bias_for(x), self.stride, self.padding, self.dilation, self.groups)
        return codebook_conv2d(x, self.coded, self.bias_for(x), self.stride, self.padding, self.dilation, self.groups, self.accuracy)


def _padding(values: str | tuple[int, ...]) -> str | tuple[int, int]:
    return values if isinstance(values, str) else pair(values)


def pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def quant_layer(module: nn.Module, split: int | None) -> QuantLinear | QuantConv2d:
    """The quantizable counterpart of a Linear or Conv2d; it shares the weight's storage."""
    return QuantConv2d.of(module, split) if isinstance(module, nn.Conv2d) else QuantLinear.of(module, split)  # type: ignore[arg-type]
