"""The table kernel against float64 products of independently decoded weights: every format, level and
accuracy, odd shapes, hostile inputs."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d, linear

from aquabit.kernels.arranged import Arranged, arrange
from aquabit.kernels.backends import lut
from aquabit.kernels.backends.lut import lut_conv2d, lut_linear, lut_refuses
from aquabit.kernels.codebook import CodebookWeight
from aquabit.kernels.geometry import Geometry
from aquabit.scheme import AquabitError
from tests.coded_weights import FORMATS, coded, group_of
from tests.kernels.thread_count import threads

native = pytest.mark.skipif(not hasattr(lut._native, "LutWeight"), reason="the C++ extension was not built")
pytestmark = [native, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")]
LEVELS = range(len(lut._native.lut_levels())) if hasattr(lut._native, "lut_levels") else range(1)
PADDED = Geometry(padding=(1, 1))
BOUNDS = {True: 1e-6, False: 1e-3}  # exact, fast
SOME = ("usq1", "usq3", "usq4g64", "usq8", "vq2", "vq5", "aq1x8g8", "aq3x4g8", "aq2x6k", "aq4x4k")


def made(name: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Arranged, Tensor]:
    """A weight for the kernel, and decoded to float64."""
    weight, _, decoded = coded(name, shape, seed)
    return arrange(weight), decoded


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(y: Tensor, expected: Tensor, typical: Tensor) -> float:
    """norm(y - y64) / norm(y64), or over the norm that independent weights and inputs of this size have
    where y64 happens to be small."""
    assert y.shape == expected.shape
    size = max(float(expected.norm()), float(typical.sum().sqrt()))
    return float((y.double() - expected).norm()) / size if size else float(y.double().norm())


def linear_error(x: Tensor, decoded: Tensor, y: Tensor, bias: Tensor | None = None) -> float:
    wide = x.double()
    return error(
        y, linear(wide, decoded, None if bias is None else bias.double()), linear(wide**2, decoded**2)
    )


def conv_error(x: Tensor, decoded: Tensor, y: Tensor, bias: Tensor | None = None, *how: Any) -> float:
    wide = x.double()
    return error(
        y,
        conv2d(wide, decoded, None if bias is None else bias.double(), *how),
        conv2d(wide**2, decoded**2, None, *how),
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_linear_of_every_format_at_every_level(name: str, exact: bool) -> None:
    group = group_of(name)
    for out, inputs in ((67, ceil(83 / group) * group), (9, 40 * group), (1, group)):
        weight, decoded = made(name, (out, inputs))
        for tokens in (1, 2, 3, 5, 33):
            x, bias = noise(tokens, inputs, seed=tokens), noise(out, seed=2)
            for level in LEVELS:
                y = lut_linear(x, weight, bias, exact, level)
                assert linear_error(x, decoded, y, bias) <= BOUNDS[exact], (out, inputs, tokens, level)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_convolution_of_every_format_at_every_level(name: str, kernel: tuple[int, int], exact: bool) -> None:
    group = group_of(name, kernel)
    for out, channels, height, width in (
        (19, ceil(5 / group) * group, 9, 7),
        (3, 24 if 24 % group == 0 else 5, 5, 5),
    ):
        weight, decoded = made(name, (out, channels, *kernel))
        if lut_refuses(weight):
            continue
        x, bias = noise(2, channels, height, width), noise(out, seed=2)
        for level in LEVELS:
            y = lut_conv2d(x, weight, bias, Geometry(padding=(2, 2)), exact, level)
            assert conv_error(x, decoded, y, bias, 1, 2) <= BOUNDS[exact], (out, channels, level)


@settings(max_examples=150)
@given(
    name=st.sampled_from(FORMATS),
    out=st.integers(1, 90),
    groups=st.integers(1, 150),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 99),
    exact=st.booleans(),
    level=st.sampled_from(LEVELS),
    scaled=st.booleans(),
    biased=st.booleans(),
)
def test_linear_of_any_shape(
    name: str,
    out: int,
    groups: int,
    tokens: int,
    seed: int,
    exact: bool,
    level: int,
    scaled: bool,
    biased: bool,
) -> None:
    inputs = groups * group_of(name)
    weight, _, decoded = coded(name, (out, inputs), seed, scaled)
    x, bias = noise(tokens, inputs, seed=seed), noise(out, seed=seed + 1) if biased else None
    y = lut_linear(x, arrange(weight), bias, exact, level)
    assert linear_error(x, decoded, y, bias) <= BOUNDS[exact]


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=250)
@given(
    name=st.sampled_from(FORMATS),
    kernel=st.sampled_from([(3, 3), (1, 1), (2, 3), (5, 5)]),
    out=st.integers(1, 12),
    channels=st.integers(1, 12),
    spare=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    stride=PAIR,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=PAIR,
    groups=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    exact=st.booleans(),
    level=st.sampled_from(LEVELS),
)
def test_convolution_of_any_shape(
    name: str,
    kernel: tuple[int, int],
    out: int,
    channels: int,
    spare: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    batch: int,
    seed: int,
    exact: bool,
    level: int,
) -> None:
    inputs = ceil(channels / group_of(name, kernel)) * group_of(name, kernel)
    weight, decoded = made(name, (out * groups, inputs, *kernel), seed)
    height, width = (max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) + spare[i] for i in (0, 1))
    x, bias = noise(batch, inputs * groups, height, width, seed=seed), noise(out * groups, seed=seed + 1)
    geometry = Geometry(stride, padding, dilation, groups)
    if lut_refuses(weight):
        with pytest.raises(AquabitError, match="groups of scales"):
            lut_conv2d(x, weight, bias, geometry)
        return
    y = lut_conv2d(x, weight, bias, geometry, exact, level)
    assert conv_error(x, decoded, y, bias, stride, padding, dilation, groups) <= BOUNDS[exact]


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_last_fused_code_does_not_reach_into_the_next_group_of_scales(bits: int, n: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (83, 1, 11), generator=generator)
    scale, offset = (torch.randn(11, n, generator=generator).half() for _ in range(2))
    weight = arrange(CodebookWeight.from_codes(codes, None, scale, offset, (11, 83), bits))
    size = ceil(83 / n)
    wide = [t.double().repeat_interleave(size, 1)[:, :83] for t in (scale, offset)]
    decoded = codes[:, 0].T * wide[0] + wide[1]
    for tokens in (1, 5):
        x = noise(tokens, 83)
        assert linear_error(x, decoded, lut_linear(x, weight, exact=True)) <= 1e-6
        assert linear_error(x, decoded, lut_linear(x, weight)) <= 1e-3


@pytest.mark.parametrize("exact", [True, False])
def test_one_scale_a_row_with_offsets_of_groups(exact: bool) -> None:
    codes = torch.randint(16, (84, 1, 11), generator=torch.Generator().manual_seed(0))
    row, groups = noise(11, seed=3).half(), noise(11, 3, seed=4).half()
    wide = groups.double().repeat_interleave(28, 1)
    x, integers = noise(5, 84), codes[:, 0].T.double()
    offsets = arrange(CodebookWeight.from_codes(codes, None, row, groups, (11, 84), 4))
    assert (
        linear_error(x, integers * row.double()[:, None] + wide, lut_linear(x, offsets, exact=exact))
        <= BOUNDS[exact]
    )
    scales = arrange(CodebookWeight.from_codes(codes, None, groups, row, (11, 84), 4))
    assert (
        linear_error(x, integers * wide + row.double()[:, None], lut_linear(x, scales, exact=exact))
        <= BOUNDS[exact]
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_inputs_of_any_layout_in_memory(name: str, exact: bool) -> None:
    weight, decoded = made(name, (13, 64))
    whole = noise(40, 130)
    for x in (
        whole[::2, 1:129:2],
        noise(64, 7).T,
        noise(64).expand(6, 64),
        noise(2, 3, 64).transpose(0, 1),
        noise(64),
        noise(2, 1, 4, 64),
    ):
        assert torch.equal(
            lut_linear(x, weight, exact=exact), lut_linear(x.contiguous(), weight, exact=exact)
        )
        assert linear_error(x, decoded, lut_linear(x, weight, exact=exact)) <= BOUNDS[exact]
    weight, decoded = made(name, (13, 64, 3, 3) if name == "usq4g64" else (13, 16, 3, 3))
    shape = (2, weight.shape[1], 6, 5)
    for x in (
        noise(*shape).to(memory_format=torch.channels_last),
        noise(2, shape[1], 12, 10)[:, :, ::2, 1::2],
        noise(1, shape[1], 6, 5).expand(shape),
        noise(2, shape[1], 1, 1).expand(shape),
        noise(6, 5, 2, shape[1]).permute(2, 3, 0, 1),
    ):
        y = lut_conv2d(x, weight, geometry=PADDED, exact=exact)
        assert torch.equal(y, lut_conv2d(x.contiguous(), weight, geometry=PADDED, exact=exact))


@pytest.mark.parametrize("name", SOME)
def test_bfloat16_is_computed_in_float32_and_rounded_once(name: str) -> None:
    weight, decoded = made(name, (13, 64))
    for x in (noise(1, 64).bfloat16(), noise(9, 64).bfloat16()):
        bias = noise(13, seed=2).bfloat16()
        y = lut_linear(x, weight, bias)
        assert y.dtype == torch.bfloat16 and linear_error(x, decoded, y, bias) <= 2**-9 + 1e-3
        assert torch.equal(y, lut_linear(x.float(), weight, bias.float()).bfloat16())
    weight, decoded = made(name, (13, 64, 1, 1))
    x = noise(2, 64, 3, 3).bfloat16()
    y = lut_conv2d(x, weight)
    assert y.dtype == torch.bfloat16 and conv_error(x, decoded, y) <= 2**-9 + 1e-3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_single_input_that_is_not_zero(name: str, level: int) -> None:
    """16-bit inputs of such a group are the largest there are."""
    inputs = 4 * group_of(name)
    weight, decoded = made(name, (11, inputs))
    x = torch.eye(inputs) * noise(inputs, 1)
    y = lut_linear(x, weight, level=level)
    worst = max(
        error(y[i], x[i].double() @ decoded.T, x[i].double() ** 2 @ (decoded**2).T) for i in range(inputs)
    )
    assert worst <= 2e-3  # of one row alone; a column of codewords may be small


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_constant_inputs_and_zeros(name: str, exact: bool) -> None:
    weight, decoded = made(name, (17, 64))
    for tokens in (1, 6):
        x = torch.full((tokens, 64), 3.7)
        assert linear_error(x, decoded, lut_linear(x, weight, exact=exact)) <= BOUNDS[exact]
        bias = noise(17, seed=2)
        assert torch.equal(lut_linear(torch.zeros(tokens, 64), weight, exact=exact), torch.zeros(tokens, 17))
        assert torch.equal(
            lut_linear(torch.zeros(tokens, 64), weight, bias, exact=exact), bias.expand(tokens, 17)
        )
    weight, decoded = made(name, (17, 64, 3, 3))
    x = torch.full((1, 64, 5, 5), -0.3)
    assert conv_error(x, decoded, lut_conv2d(x, weight, geometry=PADDED, exact=exact), None, 1, 1) <= (
        2e-6 if exact else 1e-3
    )  # equal addends round alike
    assert torch.equal(lut_conv2d(torch.zeros(1, 64, 5, 5), weight, exact=exact), torch.zeros(1, 17, 3, 3))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_rows_of_zeros_and_weights_of_zeros(tokens: int, exact: bool) -> None:
    weight, _, decoded = coded("aq2x6g8", (17, 64))
    assert weight.scale is not None
    weight.scale[::3] = 0
    decoded[::3] = 0
    x = noise(tokens, 64)
    y = lut_linear(x, arrange(weight), exact=exact)
    assert (y[:, ::3] == 0).all() and linear_error(x, decoded, y) <= BOUNDS[exact]
    nothing = CodebookWeight.from_codes(
        torch.zeros(8, 2, 17, dtype=torch.int64), torch.zeros(1, 2, 64, 8), torch.ones(17), None, (17, 64), 6
    )
    assert torch.equal(lut_linear(x, arrange(nothing), exact=exact), torch.zeros(tokens, 17))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_tokens_of_extreme_scales_each_for_itself(name: str, exact: bool, level: int) -> None:
    weight, decoded = made(name, (17, 64))
    scales = [1e-30, 1.0, 1e30, 1e-22, 1e19, 0.0, 1e-3, 1e25]
    x = noise(8, 64) * torch.tensor(scales)[:, None]
    y = lut_linear(x, weight, exact=exact, level=level)
    for i in range(8):
        assert linear_error(x[i : i + 1], decoded, y[i : i + 1]) <= BOUNDS[exact], scales[i]
        assert (
            linear_error(x[i : i + 1], decoded, lut_linear(x[i : i + 1], weight, exact=exact, level=level))
            <= BOUNDS[exact]
        ), scales[i]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", SOME)
def test_images_of_extreme_scales(name: str, scale: float) -> None:
    weight, decoded = made(name, (7, 64, 3, 3))
    x = noise(1, 64, 6, 6) * scale
    for exact in (True, False):
        assert conv_error(x, decoded, lut_conv2d(x, weight, exact=exact)) <= BOUNDS[exact]


@pytest.mark.parametrize("name", ["usq2", "aq2x6g8", "aq4x4g8", "aq2x6k"])
def test_a_bright_spot_does_not_take_the_precision_of_the_rest(name: str) -> None:
    """One unit serves a tile whose taps share tables: where it is too coarse for the tile, its rows are
    done with float tables."""
    weight, decoded = made(name, (130, 16, 3, 3))
    x = noise(1, 16, 24, 24)
    x[:, :, 3, 5] *= 60
    y = lut_conv2d(x, weight, geometry=PADDED)
    far = (slice(None), slice(None), slice(8, None))  # rows that the spot does not reach, of the same tile
    expected = conv2d(x.double(), decoded, padding=1)
    assert conv_error(x, decoded, y, None, 1, 1) <= 1e-3
    assert float((y.double() - expected)[far].norm() / expected[far].norm()) <= 6e-3
    with threads(2):
        assert torch.equal(y, lut_conv2d(x, weight, geometry=PADDED))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_tokens_with_nan_or_infinity_leave_the_others_alone(name: str, exact: bool, level: int) -> None:
    weight, _ = made(name, (17, 64))
    clean = noise(40, 64)
    x = clean.clone()
    x[3, 5], x[7, 63], x[39, 0] = float("nan"), float("inf"), float("-inf")
    bad = torch.tensor([3, 7, 39])
    good = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
    y = lut_linear(x, weight, exact=exact, level=level)
    assert not y[bad].isfinite().any()
    assert torch.equal(y[good], lut_linear(clean, weight, exact=exact, level=level)[good])
    assert not lut_linear(x[3], weight, exact=exact, level=level).isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_a_pixel_that_is_not_finite_is_not_forgotten(name: str, exact: bool, value: float) -> None:
    weight, _ = made(name, (7, 64, 3, 3))
    x = noise(1, 64, 6, 6)
    x[0, 4, 2, 3] = value
    y = lut_conv2d(x, weight, geometry=PADDED, exact=exact)
    assert not y[0, :, 1:4, 2:5].isfinite().any()


def test_nothing_in_nothing_out() -> None:
    weight, _ = made("usq4", (6, 10))
    for shape in ((0, 10), (3, 0, 10)):
        assert lut_linear(torch.empty(shape), weight).shape == (*shape[:-1], 6)
    image, _ = made("usq4", (6, 10, 3, 3))
    assert lut_conv2d(torch.empty(0, 10, 5, 4), image).shape == (0, 6, 3, 2)
    assert lut_conv2d(torch.empty(0, 10, 5, 4, dtype=torch.bfloat16), image).dtype == torch.bfloat16


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_the_number_of_threads_does_not_change_a_bit(name: str, exact: bool) -> None:
    weight, _ = made(name, (131, 192))
    image, _ = made(name, (70, 64, 3, 3))
    found = []
    for count in (1, 2):
        with threads(count):
            x = noise(1, 64, 19, 18)
            tokens = [lut_linear(noise(t, 192), weight, exact=exact) for t in (1, 7, 65)]
            found.append(
                [*tokens, *(lut_conv2d(x, image, None, Geometry((s, s), (1, 1)), exact) for s in (1, 2))]
            )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_many_rows_for_one_token_in_two_threads() -> None:
    weight, decoded = made("usq8", (1100, 128))
    x = noise(1, 128)
    one = lut_linear(x, weight)
    with threads(2):
        assert torch.equal(lut_linear(x, weight), one)
    assert linear_error(x, decoded, one) <= 1e-6


def arguments(weight: Arranged, x: Tensor, bias: Tensor | None = None) -> list[Any]:
    return [x, bias, weight.number, weight.shape[0], False, 0]


def image_arguments(weight: Arranged, x: Tensor, bias: Tensor | None = None, groups: int = 1) -> list[Any]:
    return [x, bias, weight.number, list(weight.shape), Geometry(groups=groups).numbers, False, 0]


@pytest.mark.parametrize("name", ["usq4", "aq2x6g8"])
def test_the_operators_are_what_torch_expects(name: str) -> None:
    weight, _ = made(name, (6, 16))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for x, bias in ((noise(3, 16), None), (noise(2, 3, 16).bfloat16(), noise(6))):
        torch.library.opcheck(
            torch.ops.aquabit.lut_linear.default, tuple(arguments(weight, x, bias)), test_utils=checks
        )
    image, _ = made(name, (6, 16, 3, 3))
    torch.library.opcheck(
        torch.ops.aquabit.lut_conv2d.default,
        tuple(image_arguments(image, noise(2, 16, 5, 4))),
        test_utils=checks,
    )


def test_compiled_as_one_graph() -> None:
    weight, _ = made("aq2x6g8", (6, 16))
    image, _ = made("usq4", (6, 5, 3, 3))

    def both(x: Tensor, y: Tensor) -> Tensor:
        return lut_linear(x, weight).sum() + lut_conv2d(y, image, geometry=PADDED).relu().sum()

    x, y = noise(3, 16), noise(1, 5, 4, 4)
    expected = both(x, y)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x, y), expected)


def test_fake_tensors_have_the_shape_and_the_type() -> None:
    weight, _ = made("aq2x6g8", (6, 16))
    image, _ = made("usq4", (6, 5, 3, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = lut_linear(torch.empty(2, 3, 16, dtype=torch.bfloat16), weight)
        assert y.shape == (2, 3, 6) and y.dtype == torch.bfloat16
        y = lut_conv2d(torch.empty(2, 10, 9, 8), image, None, Geometry((2, 1), (1, 0), groups=2))
        assert y.shape == (2, 6, 5, 6) and y.dtype == torch.float32
    meta = arguments(weight, noise(4, 16).to("meta"))
    assert torch.ops.aquabit.lut_linear(*meta).shape == (4, 6)


def test_arguments_that_do_not_fit_are_named() -> None:
    weight, _ = made("usq4", (6, 10))
    image, _ = made("usq4", (6, 10, 3, 3))
    x, pixels = noise(2, 10), noise(1, 10, 5, 5)
    for message, call in (
        ("not torch.float64 on cpu", lambda: lut_linear(x.double(), weight)),
        ("not torch.float16 on cpu", lambda: lut_conv2d(pixels.half(), image)),
        ("not torch.float32 on meta", lambda: lut_linear(x.to("meta"), weight)),
        ("runs on a CPU, not on meta", lambda: lut_linear(x, weight.to("meta"))),
        (r"\[2, 9\] has 9 channels, the weight \[6, 10\] takes 10", lambda: lut_linear(x[:, :9], weight)),
        ("has 9 channels", lambda: lut_conv2d(pixels[:, :9], image)),
        ("takes 20", lambda: lut_conv2d(pixels, image, geometry=Geometry(groups=2))),
        (
            r"\[10, 5, 5\] and a weight \[6, 10, 3, 3\] do not go together",
            lambda: lut_conv2d(pixels[0], image),
        ),
        ("do not go together", lambda: lut_conv2d(pixels, weight)),
        ("do not go together", lambda: lut_linear(x, image)),
        ("0 channels", lambda: lut_linear(torch.tensor(1.0), weight)),
        (r"bias is \[5\]; a weight \[6, 10\] needs \[6\]", lambda: lut_linear(x, weight, torch.zeros(5))),
        (r"bias is \[6, 1\]", lambda: lut_conv2d(pixels, image, torch.zeros(6, 1))),
        ("bias is on meta", lambda: lut_linear(x, weight, torch.zeros(6, device="meta"))),
        (r"stride=\(0, 1\)", lambda: lut_conv2d(pixels, image, geometry=Geometry((0, 1)))),
        (r"padding=\(0, -1\)", lambda: lut_conv2d(pixels, image, geometry=Geometry(padding=(0, -1)))),
        (r"dilation=\(0, 1\)", lambda: lut_conv2d(pixels, image, geometry=Geometry(dilation=(0, 1)))),
        ("groups=4", lambda: lut_conv2d(noise(1, 40, 5, 5), image, geometry=Geometry(groups=4))),
        ("groups=0", lambda: lut_conv2d(pixels[:, :0], image, geometry=Geometry(groups=0))),
        ("an image of 2 x 5", lambda: lut_conv2d(pixels[:, :, :2], image)),
        ("level 99", lambda: lut_linear(x, weight, level=99)),
        ("level -1", lambda: lut_conv2d(pixels, image, level=-1)),
    ):
        with pytest.raises(AquabitError, match=message):
            call()


def test_what_is_refused() -> None:
    assert lut_refuses(made("vq3c", (6, 10))[0]) == "needs codebooks that all rows share"
    assert "not on meta" in str(lut_refuses(made("vq3", (6, 10))[0].to("meta")))
    assert "groups of at most 64 inputs" in str(lut_refuses(made("aq1x4g65", (6, 65))[0]))
    assert "64 taps" in str(lut_refuses(made("vq3", (2, 3, 9, 8))[0]))
    assert "same at every tap" in str(lut_refuses(made("usq3g64", (2, 50, 3, 3))[0]))
    assert all(lut_refuses(made(name, (6, 64))[0]) is None for name in FORMATS)


def test_operators_called_directly_refuse_what_would_be_read_out_of_bounds() -> None:
    weight, _ = made("aq2x6g8", (6, 16))
    image, _ = made("usq4", (6, 8, 3, 3))
    x, pixels = noise(3, 16), noise(2, 16, 5, 5)
    linear, convolution = torch.ops.aquabit.lut_linear, torch.ops.aquabit.lut_conv2d
    right, wide = arguments(weight, x, noise(6)), image_arguments(image, pixels, noise(6), groups=2)
    assert linear(*right).shape == (3, 6) and convolution(*wide).shape == (2, 6, 3, 3)
    for i, wrong, message in (
        (0, x[:, :-1], "x is"),
        (0, torch.tensor(1.0), "x is"),
        (1, noise(5), "bias is"),
        (1, noise(6, 1), "bias is"),
        (2, image.number, "8 inputs"),
        (2, 1 << 40, "freed"),
        (5, 99, "level 99"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(*right[:i], wrong, *right[i + 1 :])
    for i, wrong, message in (
        (0, pixels[:, :-1], "do not go together"),
        (0, pixels[0], "x is"),
        (1, noise(5), "bias is"),
        (2, weight.number, "4 dimensions"),
        (4, [1, 1, 0, 0, 1, 1], "7 numbers"),
        (4, [0, 1, 0, 0, 1, 1, 2], "stride"),
        (4, [1, 1, 0, -1, 1, 1, 2], "padding"),
        (4, [1, 1, 0, 0, 1, 0, 2], "dilation"),
        (4, [1, 1, 0, 0, 1, 1, 1], "do not go together"),
        (6, -1, "level -1"),
    ):
        with pytest.raises(ValueError, match=message):
            convolution(*wide[:i], wrong, *wide[i + 1 :])
