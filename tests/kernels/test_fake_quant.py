"""The fused activation fake-quantizer equals its reference to the bit, on every shape and value."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aquabit.kernels.extension import native
from aquabit.kernels.fake_quant import (
    fake_quantize,
    fake_quantize_reference,
    native_available,
    straight_through,
)
from aquabit.scheme import AquabitError, act_code

needs_native = pytest.mark.skipif(not native_available(), reason="the C++ extension was not built")
shapes = st.one_of(
    st.tuples(st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
)
ordinary = st.floats(-100, 100, width=32)
anything = st.floats(width=32, allow_nan=True, allow_infinity=True)
unhurried = settings(
    deadline=None, max_examples=60
)  # a machine that is busy with other work must not fail a test
bits_of = st.sampled_from([2, 3, 6, 8, 15, "i8", "f8"])


def tensors(elements: Any) -> Any:
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements)).map(
        torch.from_numpy
    )


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(torch.equal(a.isnan(), b.isnan()))
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


# float8 e4m3fn by its definition: a sign, an exponent of 4 bits less 7, a mantissa of 3; the last code is NaN
E4M3 = np.array(
    [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1]
)


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest number, of two equally near ones that of the even code."""
    distance = np.abs(np.abs(x)[..., None] - E4M3)
    first = distance.argmin(-1)  # of a tie the smaller one
    after = np.minimum(first + 1, len(E4M3) - 1)
    tie = np.take_along_axis(distance, after[..., None], -1)[..., 0] == distance.min(-1)
    return np.sign(x) * E4M3[np.where(tie & (first % 2 == 1), after, first)]


def rows_in_float64(row: np.ndarray, bits: int | str, zero_in_range: bool) -> np.ndarray:
    """The definition, one row at a time, independent of both implementations."""
    row = row.astype(np.float64)
    if bits == "i8":
        scale = np.abs(row).max() / 127
        return np.clip(np.rint(row / scale), -127, 127) * scale
    if bits == "f8":
        scale = np.abs(row).max() / 448
        return nearest_e4m3(row / scale) * scale
    low, high = (min(row.min(), 0), max(row.max(), 0)) if zero_in_range else (row.min(), row.max())
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(row / scale) + zero, 0, 2**bits - 1) - zero) * scale


@pytest.mark.skipif(
    os.environ.get("AQUABIT_REQUIRE_NATIVE") != "1", reason="only where the extension must have been built"
)
def test_the_extension_was_built() -> None:
    assert native_available()


@pytest.mark.parametrize("bits", [2, 6, 8, "i8", "f8"])
@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_reference])
def test_definition_in_float64(function: Any, per: str, bits: int | str) -> None:
    x = torch.randn(37, 53, generator=torch.Generator().manual_seed(8)) * 3 + 1
    expected = np.stack([rows_in_float64(row, bits, per == "sample") for row in x.numpy()])
    error = np.abs(function(x, bits, per).numpy() - expected)
    most = x.abs().amax(1).numpy()[:, None]
    # of float8 the largest step, between 256 and 448
    step = {"i8": most / 127, "f8": most * 32 / 448}.get(bits)  # type: ignore[call-overload]
    if step is None:
        step = (x.amax(1) - x.amin(1)).numpy()[:, None] / (2**bits - 1)  # type: ignore[operator]
    ties = (
        error > 1e-5 * np.abs(expected).max()
    )  # float32 and float64 may round a tie to different sides, by one step
    assert ties.mean() < 2e-3 and (error <= 1.5 * step).all()


@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_reference])
def test_float8_is_the_nearest_number_ties_to_even(function: Any) -> None:
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    near = [np.nextafter(middles.astype(np.float32), np.float32(to)) for to in (0, 500)]
    half = np.concatenate([E4M3, middles, *near]).astype(np.float32)
    x = torch.from_numpy(np.concatenate([half, -half, [448]]).astype(np.float32))  # at a scale of 1
    assert np.array_equal(function(x, "f8").numpy(), nearest_e4m3(x.double().numpy()).astype(np.float32))
    assert torch.equal(function(x, "f8"), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("act", ["i8", "f8"])
@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_reference])
class TestSymmetric:
    @given(tensors(ordinary))
    @unhurried
    def test_signs_and_powers_of_two_commute_with_rounding(
        self, function: Any, act: Any, x: torch.Tensor
    ) -> None:
        y = function(x, act)
        assert torch.equal(function(-x, act), -y) and torch.equal(function(8 * x, act), 8 * y)
        assert (y.abs() <= x.abs().amax(-1, keepdim=True) * (1 + 2e-7)).all() and (y[x == 0] == 0).all()

    def test_rows_without_a_grid(self, function: Any, act: Any) -> None:
        x = torch.randn(4, 9)
        x[0], x[1, 3], x[2] = 0, torch.nan, 1e-39
        y = function(x, act)
        assert torch.equal(y[[0, 2]], x[[0, 2]]) and y[1].isnan().all() and y[3].isfinite().all()
        assert function(torch.tensor([[-3.4e38, 3.4e38, 1e38]]), act).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, function: Any, act: Any, dtype: torch.dtype) -> None:
        x = torch.randn(5, 33).to(dtype)
        y = function(x, act)
        assert y.dtype == dtype and torch.allclose(y.float(), function(x.float(), act), rtol=1e-2)


@pytest.mark.parametrize("act", [6, 8, "i8", "f8"])
def test_the_gradient_is_passed_through(act: Any) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = straight_through(x, act)
    assert torch.equal(y, fake_quantize(x, act))
    (gradient,) = torch.autograd.grad((y * torch.arange(8.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(8.0).expand(3, 8))


@needs_native
@unhurried
@given(tensors(ordinary), bits_of)
def test_equals_reference(x: torch.Tensor, bits: Any) -> None:
    assert equal(fake_quantize(x, bits), fake_quantize_reference(x, bits))
    assert equal(fake_quantize(x, bits, "sample"), fake_quantize_reference(x, bits, "sample"))


@needs_native
@unhurried
@given(tensors(anything), bits_of)
def test_equals_reference_on_any_float(x: torch.Tensor, bits: Any) -> None:
    assert equal(fake_quantize(x, bits), fake_quantize_reference(x, bits))
    assert equal(fake_quantize(x, bits, "sample"), fake_quantize_reference(x, bits, "sample"))


@needs_native
@unhurried
@given(
    st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(1, 5), st.integers(1, 5)), st.data(), bits_of
)
def test_split_is_two_ranges(shape: tuple[int, ...], data: Any, bits: Any) -> None:
    x = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=ordinary)))
    split = data.draw(st.integers(1, shape[1] - 1))
    y = fake_quantize(x, bits, "sample", split)
    assert equal(y, fake_quantize_reference(x, bits, "sample", split))
    assert equal(y[:, :split], fake_quantize(x[:, :split], bits, "sample"))
    assert equal(y[:, split:], fake_quantize(x[:, split:], bits, "sample"))


@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_reference])
class TestLaws:
    @given(tensors(ordinary), st.sampled_from([2, 6, 8]))
    @unhurried
    def test_levels_range_and_error(self, function: Any, x: torch.Tensor, bits: int) -> None:
        for row, out in zip(x.view(-1, x.shape[-1]), function(x, bits).view(-1, x.shape[-1]), strict=True):
            assert len(out.unique()) <= 2**bits
            step = ((row.max() - row.min()) / (2**bits - 1)).item()
            assert (
                (out - row).abs().max() <= step * 1.001 + row.abs().max() * 2e-6
            )  # the zero point rounds too: a whole step at the ends

    @given(tensors(ordinary), st.sampled_from([6, 8]))
    @unhurried
    def test_a_sample_does_not_depend_on_the_others(self, function: Any, x: torch.Tensor, bits: int) -> None:
        together = function(x, bits, "sample")
        assert equal(together, torch.cat([function(one, bits, "sample") for one in x.split(1)]))

    def test_constant_token_is_unchanged(self, function: Any) -> None:
        for value in (0.0, 3.7, -1e-30, 3e38):
            x = torch.full((3, 5), value)
            assert torch.equal(function(x, 8), x)

    def test_sample_range_holds_zero(self, function: Any) -> None:
        assert torch.equal(function(torch.zeros(2, 3, 4, 4), 8, "sample"), torch.zeros(2, 3, 4, 4))
        torch.testing.assert_close(function(torch.full((2, 3), 5.0), 8, "sample"), torch.full((2, 3), 5.0))
        x = torch.rand(4, 3, 5, 5) + 10
        x[:, 0, 0, 0] = 0
        assert (function(x, 6, "sample")[:, 0, 0, 0] == 0).all()

    def test_one_bad_value_makes_its_row_nan_and_no_other(self, function: Any) -> None:
        for bad in (torch.nan, torch.inf, -torch.inf):
            for length in (1, 7, 16, 100):
                x = torch.randn(3, length)
                x[1, length // 2] = bad
                y = function(x, 8)
                assert y[1].isnan().all() and y[[0, 2]].isfinite().all()

    def test_finite_extremes_do_not_become_nan(self, function: Any) -> None:
        x = torch.tensor([[-3.4e38, 3.4e38, 0.0, 1e38], [1e-40, 0.0, -1e-42, 1e-45]])
        y = function(x, 8)
        assert not y.isnan().any() and torch.equal(y[1], x[1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, function: Any, dtype: torch.dtype) -> None:
        x = torch.randn(5, 33).to(dtype)
        y = function(x, 8)
        assert y.dtype == dtype
        if dtype != torch.float64:
            assert torch.equal(y, function(x.float(), 8).to(dtype))
        assert function(torch.tensor([[-65504.0, 65504.0, 1.0]], dtype=dtype), 8).isfinite().all()

    def test_non_contiguous(self, function: Any) -> None:
        x = torch.randn(6, 8, 5, 7)
        for view in (
            x.transpose(1, 3),
            x[:, ::2],
            x.to(memory_format=torch.channels_last),
            x.expand(6, 8, 5, 7)[1:2].expand(3, 8, 5, 7),
        ):
            for per in ("token", "sample"):
                y = function(view, 8, per)
                assert y.is_contiguous() and torch.equal(y, function(view.contiguous(), 8, per))

    def test_empty_and_off(self, function: Any) -> None:
        assert function(torch.empty(0, 4), 8).shape == (0, 4)
        assert function(torch.empty(2, 0, 3), 8, "sample").shape == (2, 0, 3)
        assert function(torch.empty(2, 4, 0), 8, "sample", 2).shape == (2, 4, 0)
        x = torch.randn(3, 4)
        assert function(x, 16) is x

    def test_input_is_not_changed(self, function: Any) -> None:
        x = torch.randn(64, 64)
        before = x.clone()
        assert function(x, 6).data_ptr() != x.data_ptr() and torch.equal(x, before)

    @pytest.mark.parametrize(
        ("x", "bits", "per", "split", "said"),
        [
            (torch.zeros(2, 4), 1, "token", None, "act=1 rounds no activations; give 2 to 15 bits, i8, f8"),
            (torch.zeros(2, 4), "i4", "token", None, "act='i4' rounds no activations"),
            (torch.zeros(2, 4), 8, "batch", None, "per='batch'"),
            (torch.zeros(2, 4), 8, "token", 2, "split=2"),
            (torch.zeros(2, 4), 8, "sample", 4, "split=4"),
            (torch.zeros(2, 4), 8, "sample", 0, "split=0"),
            (torch.tensor(1.0), 8, "token", None, "one dimension"),
            (torch.zeros(2, 4, dtype=torch.int32), 8, "token", None, "int32"),
        ],
    )
    def test_bad_input_is_named(
        self, function: Any, x: torch.Tensor, bits: int, per: str, split: int | None, said: str
    ) -> None:
        with pytest.raises(AquabitError, match=said):
            function(x, bits, per, split)


LEVELS = native.fake_quant_levels() if native_available() else []


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_every_instruction_set_equals_the_reference(level: int) -> None:
    for shape, bits in (((5, 1), 8), ((7, 16), 2), ((9, 37), 6), ((3, 2049), 8), ((40, 5), 15)):
        x = torch.randn(shape)
        x[0, -1], x[1, 0], x[2] = torch.nan, torch.inf, 0
        for zero in (False, True):
            y = torch.empty_like(x)
            for act in (bits, "i8", "f8"):
                native.fake_quant_rows(x.data_ptr(), y.data_ptr(), *shape, 0, act_code(act), zero, 1, level)
                assert equal(y, fake_quantize_reference(x, act, "sample" if zero else "token"))


@needs_native
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads: int) -> None:
    one = torch.get_num_threads()
    cases = [
        (torch.randn(1, 3, 200, 301), "sample", None),
        (torch.randn(1, 3, 200, 301), "sample", 1),
        (torch.randn(2048, 97), "token", None),
    ]
    cases.append((torch.randn(1, 70000).index_fill(1, torch.tensor([69999]), torch.nan), "token", None))
    try:
        for x, per, split in cases:
            torch.set_num_threads(threads)
            for act in (8, "i8", "f8"):
                assert equal(fake_quantize(x, act, per, split), fake_quantize_reference(x, act, per, split))
    finally:
        torch.set_num_threads(one)


@needs_native
@pytest.mark.parametrize(("per_sample", "split"), [(False, 0), (True, 0), (True, 2)])
def test_opcheck(per_sample: bool, split: int) -> None:
    for x in (torch.randn(3, 5, 4), torch.randn(3, 4, 5).transpose(1, 2)):
        for act in (8, "i8", "f8"):
            torch.library.opcheck(
                torch.ops.aquabit.fake_quantize.default, (x, act_code(act), per_sample, split)
            )


@needs_native
@pytest.mark.parametrize("act", [8, "i8", "f8"])
def test_traces_without_a_graph_break(act: Any) -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x * 2, act) + 1

    x = torch.randn(4, 9)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert fake_quantize(torch.empty(2, 6, 4, 4), 8, "sample", 3).shape == (2, 6, 4, 4)
    assert fake_quantize(torch.empty(2, 6, device="meta"), 8).device.type == "meta"


def test_parameters_are_accepted_and_no_gradient_is_kept() -> None:
    assert not fake_quantize(torch.randn(4, 8, requires_grad=True), 8).requires_grad


def test_without_the_extension_it_warns_once_and_serves() -> None:
    code = (
        "import sys, warnings; sys.modules['aquabit.kernels._native'] = None\n"
        "import torch; from aquabit.kernels.fake_quant import *\n"
        "from aquabit.kernels import fake_quant as f\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    x = torch.randn(3, 5); y = f.fake_quantize(x, 8); f.fake_quantize(x, 8, 'sample')\n"
        "assert torch.equal(y, f.fake_quantize_reference(x, 8)) and not f.native_available()\n"
        "print(sum('without its C++ extension' in str(w.message) for w in caught))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
