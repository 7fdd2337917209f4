"""Formats of other programs: what each stores, beside the programs' own ways of fitting it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import aquabit.pipelines
from aquabit import AquabitError, Scheme, quantize_weight
from aquabit.kernels.arranged import arrange
from aquabit.kernels.backends.decode_tiles import rows_of
from aquabit.kernels.codebook import CodebookWeight, from_tensors
from aquabit.kernels.coded_scale import CodedScale
from aquabit.kernels.dispatch import codebook_conv2d, codebook_linear, observed
from aquabit.kernels.fixed_levels import NF4, dynamic
from aquabit.kernels.request import Accuracy

gguf = pytest.importorskip("gguf")
DIGITS = Path(aquabit.pipelines.__file__).parent / "bundled/digits-unet/denoiser"


def rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return scale * (x / scale).round().clamp(low, high)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    return table[(x[..., None] - table).abs().argmin(-1)]


def integers(bits: int, group: int | None) -> Callable[[Tensor], Tensor]:
    """The largest weight becomes the largest integer, as torchao and SDNQ have it."""

    def fit(w: Tensor) -> Tensor:
        x, most = w.reshape(-1, group or w.shape[1]), (1 << (bits - 1)) - 1
        return rounded(x, (x.abs().amax(1, keepdim=True) / most).half().float(), -most - 1, most)

    return fit


def nf4(nested: bool) -> Callable[[Tensor], Tensor]:
    """QLoRA: the largest of 64 weights becomes 1; of these scales, less their mean, 256 share a scale."""

    def fit(w: Tensor) -> Tensor:
        x = w.reshape(-1, 64)
        scale = x.abs().amax(1, keepdim=True)
        if nested:
            mean = scale.mean()
            blocks = (scale - mean).reshape(-1).split(256)
            scale = torch.cat([nearest(b / b.abs().max(), dynamic()) * b.abs().max() for b in blocks])[
                :, None
            ]
            scale = scale + mean
        return nearest(x / scale, torch.tensor(NF4)) * scale

    return fit


def float8(dim: int | None) -> Callable[[Tensor], Tensor]:
    def fit(w: Tensor) -> Tensor:
        scale = (w.abs().max() if dim is None else w.abs().amax(dim, keepdim=True)) / 448
        return (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return fit


FP4 = torch.tensor([s * v for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def microscaled(w: Tensor) -> Tensor:
    """OCP Microscaling 1.0, section 6.3: the exponent of the largest weight, less that of 4."""
    x = w.reshape(-1, 32)
    scale = torch.exp2(x.abs().amax(1, keepdim=True).log2().floor() - 2)
    return nearest(x / scale, FP4) * scale


def microscaled8(w: Tensor) -> Tensor:
    """The same with e4m3, whose largest exponent is 8; what lies above 448 becomes that."""
    x = w.reshape(-1, 32)
    scale = torch.exp2(x.abs().amax(1, keepdim=True).log2().floor() - 8)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def nvidia(w: Tensor) -> Tensor:
    x, whole = w.reshape(-1, 16), w.abs().max() / (6 * 448)
    scale = (x.abs().amax(1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    return nearest(x / scale, FP4) * scale


def ggml(name: str) -> Callable[[Tensor], Tensor]:
    """As gguf's own quantizer does."""

    def fit(w: Tensor) -> Tensor:
        kind = gguf.GGMLQuantizationType[name.upper()]
        return torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind))

    return fit


def iq4_nl(w: Tensor) -> Tensor:
    """The largest weight becomes the largest level."""
    x, table = w.reshape(-1, 32), torch.tensor(gguf.quants.IQ4_NL.kvalues).float()
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = (extreme / -127).half().float()
    return nearest(x / scale, table) * scale


def super_blocks(bits: int, group: int, scale_bits: int) -> Callable[[Tensor], Tensor]:
    """Ranges of sub-blocks, 0 among them, rounded to whole parts of the largest of 256 weights."""

    def fit(w: Tensor) -> Tensor:
        x, steps, parts = w.reshape(-1, 256 // group, group), (1 << bits) - 1, (1 << scale_bits) - 1
        low = x.amin(2, keepdim=True).clamp_max(0)
        scale = (x.amax(2, keepdim=True) - low) / steps
        scale, low = (
            rounded(t, (t.abs().amax(1, keepdim=True) / parts).half().float(), -parts, parts)
            for t in (scale, low)
        )
        return low + scale * ((x - low) / scale.clamp_min(1e-9)).round().clamp(0, steps)

    return fit


def signed_super_blocks(bits: int, scale_bits: int) -> Callable[[Tensor], Tensor]:
    def fit(w: Tensor) -> Tensor:
        x, most = w.reshape(-1, 16, 16), 1 << (bits - 1)
        scale = x.abs().amax(2, keepdim=True) / (most - 1)
        parts = (1 << (scale_bits - 1)) - 1
        scale = rounded(scale, (scale.amax(1, keepdim=True) / parts).half().float(), -parts, parts)
        return rounded(x, scale.clamp_min(1e-9), -most, most - 1)

    return fit


class Row(NamedTuple):
    """A scheme, the bits of a weight of 128 x 512 by the program's own count, and how the program fits it."""

    text: str
    bits: float
    reference: Callable[[Tensor], Tensor]


COUNT = 128 * 512
ROWS = [
    Row("int8", 8 + 16 / 512, integers(8, None)),
    Row("int4g32", 4.5, integers(4, 32)),
    Row("int4g64", 4.25, integers(4, 64)),
    Row("nf4g64", 4.5, nf4(False)),
    Row("nf4g64d", 4 + 8 / 64 + 32 / (64 * 256) + 32 / COUNT, nf4(True)),
    Row("fp8", 8 + 32 / COUNT, float8(None)),
    Row("fp8c", 8 + 32 / 512, float8(1)),
    Row("mxfp4", 4.25, microscaled),
    Row("mxfp8", 8.25, microscaled8),
    Row("nvfp4", 4.5 + 32 / COUNT, nvidia),
    Row("q4_0", 4.5, ggml("q4_0")),
    Row("q4_1", 5.0, ggml("q4_1")),
    Row("q5_0", 5.5, ggml("q5_0")),
    Row("q5_1", 6.0, ggml("q5_1")),
    Row("q8_0", 8.5, ggml("q8_0")),
    Row("iq4_nl", 4.5, iq4_nl),
    Row("q2_K", 2.625, super_blocks(2, 16, 4)),
    Row("q3_K", 3.4375, signed_super_blocks(3, 6)),
    Row("q4_K", 4.5, super_blocks(4, 32, 6)),
    Row("q5_K", 5.5, super_blocks(5, 32, 6)),
    Row("q6_K", 6.5625, signed_super_blocks(6, 8)),
]
EVERY = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.text)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def layer_of_digits(columns: int) -> Tensor:
    """A layer's weights as rows that every format can hold."""
    stored = load_file(DIGITS / "diffusion_pytorch_model.safetensors")
    weight = next(t for n, t in stored.items() if n.endswith("conv1.weight") and t.numel() % 256 == 0)
    return weight.float().reshape(-1)[: 32 * columns].reshape(32, columns)


def error(weight: Tensor, decoded: Tensor) -> float:
    return float((decoded.reshape(weight.shape) - weight).double().square().sum() / weight.square().sum())


def output_error(weight: Tensor, coded: CodebookWeight, hessian: Tensor) -> float:
    off = (coded.dequantize() - weight).double()
    return float(((off @ hessian.double()) * off).sum())


@EVERY
def test_bits_are_those_of_the_program(row: Row) -> None:
    assert math.isclose(8 * sum(Scheme.parse(row.text).stored_bytes((128, 512))), row.bits * COUNT)


@EVERY
@pytest.mark.parametrize("which", ["gaussian", "digits"])
def test_errors_are_at_most_those_of_the_program(row: Row, which: str) -> None:
    weight = gaussian(32, 512) if which == "gaussian" else layer_of_digits(512)
    theirs, ours = (
        error(weight, row.reference(weight)),
        error(weight, quantize_weight(weight, row.text).dequantize()),
    )
    assert ours <= theirs * (1 + 1e-6), f"{row.text}: {ours:.3g}, the program has {theirs:.3g}"


@EVERY
def test_with_h_outputs_err_less(row: Row) -> None:
    weight, inputs = gaussian(16, 256), gaussian(1024, 256) @ (torch.eye(256) + 0.1 * gaussian(256, 256))
    hessian = inputs.T @ inputs / len(inputs)
    plain, aware = quantize_weight(weight, row.text), quantize_weight(weight, f"{row.text}h", hessian)
    assert output_error(weight, aware, hessian) < 0.7 * output_error(weight, plain, hessian)


@EVERY
def test_a_diagonal_h_weighs_inputs(row: Row) -> None:
    weight, diagonal = gaussian(16, 256), torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4
    plain = quantize_weight(weight, row.text)
    aware = quantize_weight(weight, f"{row.text}h", diagonal)
    lost = [output_error(weight, coded, diagonal.diag()) for coded in (aware, plain)]
    assert (
        lost[0] < lost[1] if row.text not in ("fp8", "mxfp8") else lost[0] <= lost[1] * 1.02
    )  # a single scale, or one that is a power of two as levels are, has little to give


@EVERY
def test_stored_tensors_give_the_weight_back(row: Row) -> None:
    coded, scheme = quantize_weight(gaussian(8, 256), row.text), Scheme.parse(row.text)
    layout = scheme.layout(coded.shape)
    tensors = {name: t.clone() for name, t in coded.tensors().items()}
    again = from_tensors(tensors, coded.shape, coded.bits, coded.order, layout)
    assert torch.equal(again.dequantize(), coded.dequantize()) and again.nbytes == coded.nbytes
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == sum(
        scheme.stored_bytes(coded.shape)
    )


@EVERY
def test_kernels_run_what_is_stored(row: Row) -> None:
    """The arranged form is the weight to the bit, and no request of a CPU falls to the reference."""
    used = list[str]()
    for shape in ((24, 256), (8, 256, 1, 3)):
        coded = quantize_weight(gaussian(*shape), row.text)
        arranged = arrange(coded)
        assert torch.equal(arranged.restore().dequantize(), coded.dequantize())
        assert torch.equal(arranged.dequantize(), coded.dequantize())
        x = gaussian(9, 256) if len(shape) == 2 else gaussian(2, 256, 5, 6)
        run = codebook_linear if len(shape) == 2 else codebook_conv2d
        dense = torch.nn.functional.linear if len(shape) == 2 else torch.nn.functional.conv2d
        expected = dense(x.double(), coded.dequantize().double())
        with observed(lambda weight, request, backend: used.append(backend)):
            accuracies: list[tuple[Accuracy, float]] = [("exact", 1e-5), ("fast", 1e-3)]
            for accuracy, most in accuracies:
                y = run(x, coded, accuracy=accuracy)
                assert float((y - expected).norm() / expected.norm()) < most
    assert "reference" not in used and len(used) == 4


@EVERY
def test_rows_are_decoded_alone(row: Row) -> None:
    coded = quantize_weight(gaussian(9, 512), row.text)
    assert torch.equal(rows_of(coded)(2, 7), coded.dequantize()[2:7])


@EVERY
def test_rows_of_zeros_and_tiny_weights_are_held(row: Row) -> None:
    weight = gaussian(4, 256)
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e-6, weight[2].abs() + 3
    found = quantize_weight(weight, row.text).dequantize()
    assert bool(found.isfinite().all()) and float(found[0].abs().max()) <= float(weight.abs().max()) / 64
    assert error(weight[2:], found[2:]) < 0.2


@pytest.mark.parametrize(
    ("text", "shape", "said"),
    [
        ("int4g64", (8, 96), "its 96 inputs must be a multiple of 64"),
        ("int4g64", (8, 32, 3, 3), "its 32 inputs must be a multiple of 64"),
        ("nf4g64", (8, 100), "its 100 inputs must be a multiple of 64"),
        ("mxfp4", (8, 40), "its 40 inputs must be a multiple of 32"),
        ("nvfp4", (8, 40), "its 40 inputs must be a multiple of 16"),
        ("q4_0", (8, 33), "its rows of 33 weights must be a multiple of 32"),
        ("q4_K", (8, 32, 3, 3), "its rows of 288 weights must be a multiple of 256"),
    ],
)
def test_shapes_that_a_format_cannot_hold(text: str, shape: tuple[int, ...], said: str) -> None:
    message = f"{text} cannot hold a weight {list(shape)}: {said}"
    with pytest.raises(AquabitError, match=re.escape(message)):
        quantize_weight(torch.ones(shape), text)
    with pytest.raises(AquabitError, match=re.escape(message)):
        Scheme.parse(text).stored_bytes(shape)


def test_blocks_of_a_convolution_lie_as_the_weight_does() -> None:
    """GGUF knows no kernels: a row is (cin, kh, kw)."""
    weight = gaussian(4, 32, 3, 3)
    flat = quantize_weight(weight.flatten(1), "q4_0").dequantize()
    assert torch.equal(quantize_weight(weight, "q4_0").dequantize().flatten(1), flat)


def test_groups_of_others_are_channels_at_a_tap() -> None:
    """SDNQ: a scale for each run of channels and each tap."""
    weight = gaussian(4, 64, 3, 3)
    alone = quantize_weight(weight[:, :, 1, 2].contiguous(), "int4g32").dequantize()
    assert torch.equal(quantize_weight(weight, "int4g32").dequantize()[:, :, 1, 2], alone)


@pytest.mark.parametrize("text", ["q4_K", "nvfp4", "nf4g64d", "fp8"])
def test_damaged_scales_are_refused(text: str) -> None:
    coded = quantize_weight(gaussian(8, 256), text)
    layout, tensors = Scheme.parse(text).layout(coded.shape), dict(coded.tensors())
    short = {name: t[:-1] for name, t in tensors.items() if name.startswith("scale")}
    for name, value in short.items():
        with pytest.raises(AquabitError):
            from_tensors(tensors | {name: value}, coded.shape, coded.bits, coded.order, layout)
    over = next(n for n in ("scale_over", "scale") if n in tensors)
    infinite = torch.full_like(tensors[over], math.inf)
    with pytest.raises(AquabitError, match="are not finite; it is damaged"):
        from_tensors(tensors | {over: infinite}, coded.shape, coded.bits, coded.order, layout)


def test_codes_that_are_no_numbers_are_refused() -> None:
    coded = quantize_weight(gaussian(8, 256), "fp8")
    tensors = coded.tensors() | {"codes": torch.full_like(coded.packed, 0xFF)}
    with pytest.raises(AquabitError, match="are no numbers of e4m3"):
        from_tensors(tensors, coded.shape, 8, "inputs", Scheme.parse("fp8").layout(coded.shape))
    nan = quantize_weight(gaussian(8, 256), "nvfp4").tensors()
    nan["scale"] = torch.full_like(nan["scale"], 0x7F)
    with pytest.raises(AquabitError, match="are not finite"):
        from_tensors(nan, (8, 256), 4, "inputs", Scheme.parse("nvfp4").layout((8, 256)))


def test_scales_of_k_formats_have_few_bits() -> None:
    coded = quantize_weight(gaussian(8, 512), "q4_K")
    assert isinstance(coded.scale, CodedScale) and isinstance(coded.offset, CodedScale)
    assert int(coded.scale.integers.max()) == 63 and coded.scale.over is not None
    assert coded.scale.over.dtype == torch.float16 and len(coded.scale.over) == 16
    assert prod(coded.scale.shape) * 6 // 8 == coded.scale.codes.numel()
