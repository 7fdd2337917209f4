"""Reading and writing AQLM's stored layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aquabit.kernels import CodebookWeight
from aquabit.quant.schemes.aqlm import from_aqlm, to_aqlm
from aquabit.quant.weights import quantize_weight
from aquabit.scheme import AquabitError

NAMES = ("codes", "codebooks", "scales")
FORMATS = st.tuples(
    st.integers(1, 4),
    st.integers(1, 16),
    st.sampled_from([1, 2, 3, 8, 9, 16]),
    st.integers(1, 17),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)  # M, bits, g, out, groups of inputs, seed


def stored(
    count: int = 2, bits: int = 5, group: int = 8, out: int = 6, groups: int = 3, seed: int = 0
) -> tuple[dict[str, Tensor], np.ndarray]:
    """A layer as the aqlm package lays it out, and the unsigned codes behind it; every float16 bit pattern
    but NaN may occur."""
    rng = np.random.default_rng(seed)
    unsigned = rng.integers(0, 1 << bits, (out, groups, count))
    wrapped = np.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned).astype(
        np.int8 if bits <= 8 else np.int16
    )
    tables = rng.integers(0, 1 << 16, (count, 1 << bits, 1, group)).astype(np.uint16).view(np.float16)
    tables = np.where(np.isfinite(tables), tables, np.float16(-0.0))
    scales = rng.lognormal(size=(out, 1, 1, 1)).astype(np.float16)
    return {
        "codes": torch.from_numpy(wrapped),
        "codebooks": torch.from_numpy(tables),
        "scales": torch.from_numpy(scales),
    }, unsigned


def identical(a: Tensor, b: Tensor) -> bool:
    """Shape, type and every bit, so that zeros of different sign differ."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )


@given(FORMATS)
def test_stored_layers_come_back_bit_for_bit(made: tuple[int, ...]) -> None:
    tensors, unsigned = stored(*made)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    _, bits, group, out, groups, _ = made
    weight = from_aqlm(tensors, bits, groups * group)
    assert weight.shape == (out, groups * group) and weight.bits == bits
    np.testing.assert_array_equal(weight.codes.numpy(), unsigned.transpose(1, 2, 0))
    again = to_aqlm(weight)
    assert set(again) == set(NAMES)
    assert all(
        identical(again[name], before[name]) and identical(tensors[name], before[name]) for name in NAMES
    )


@given(FORMATS)
def test_weights_come_back_bit_for_bit(made: tuple[int, ...]) -> None:
    count, bits, group, out, groups, seed = made
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (groups, count, out), generator=generator)
    tables = torch.randn(1, count, 1 << bits, group, generator=generator)
    weight = CodebookWeight.from_codes(
        codes, tables, torch.randn(out, generator=generator), None, (out, groups * group), bits
    )
    written = to_aqlm(weight)
    assert written["codes"].dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert all(tensor.is_contiguous() for tensor in written.values())
    again = from_aqlm(written, bits, groups * group)
    assert (again.shape, again.bits, again.order, again.offset) == (
        weight.shape,
        weight.bits,
        weight.order,
        None,
    )
    assert again.tensors().keys() == weight.tensors().keys()
    assert all(identical(again.tensors()[name], tensor) for name, tensor in weight.tensors().items())


@given(FORMATS)
def test_decoding_follows_aqlm(made: tuple[int, ...]) -> None:
    tensors, _ = stored(*made)
    count, bits, group, out, groups, _ = made
    codes = tensors["codes"].numpy().astype(np.int64) % 2**bits
    tables, scales = (
        tensors["codebooks"].numpy().astype(np.float32),
        tensors["scales"].numpy().astype(np.float32),
    )
    total = np.zeros((out, groups, 1, group), dtype=np.float32)
    for m in range(count):
        total += tables[m, codes[:, :, m]]
    expected = (total * scales).swapaxes(1, 2).reshape(out, groups * group)
    np.testing.assert_array_equal(from_aqlm(tensors, bits, groups * group).dequantize().numpy(), expected)


@given(FORMATS)
def test_the_package_agrees(made: tuple[int, ...]) -> None:
    utils = pytest.importorskip("aqlm.utils")
    tensors, unsigned = stored(*made)
    _, bits, group, _, groups, _ = made
    assert identical(utils.pack_int_data(torch.from_numpy(unsigned.copy()), bits), tensors["codes"])
    theirs = utils._dequantize_weight(
        utils.unpack_int_data(tensors["codes"], bits), tensors["codebooks"].float(), tensors["scales"].float()
    )
    torch.testing.assert_close(from_aqlm(tensors, bits, groups * group).dequantize(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_floats_only_where_nothing_is_lost(dtype: torch.dtype) -> None:
    tensors, _ = stored()
    coarse = {"codes": tensors["codes"]} | {
        name: (tensors[name].clamp(-4, 4) * 4).round() / 4 for name in NAMES[1:]
    }
    wide = coarse | {name: coarse[name].to(dtype) for name in NAMES[1:]}
    assert all(identical(to_aqlm(from_aqlm(wide, 5, 24))[name], coarse[name]) for name in NAMES)
    for lost in (1e-30, 1e30) if dtype == torch.bfloat16 else (1 / 3, 1e-30, 1e6):
        values = wide["codebooks"].clone()
        values[0, 3, 0, 2] = lost
        with pytest.raises(
            AquabitError, match=r"1 of 512 values of codebooks are .* that float16 does not hold exactly"
        ):
            from_aqlm(wide | {"codebooks": values}, 5, 24)


@pytest.mark.parametrize(
    ("changes", "nbits", "in_features", "message"),
    [
        ({"scales": None}, 5, 24, "scales missing among"),
        ({}, 0, 24, "codes of 0 bits are not supported; 1 to 16 are"),
        ({}, 17, 24, "codes of 17 bits are not supported"),
        ({}, 4, 24, r"codebooks are \[2, 32, 1, 8\]; codes of 4 bits need \[M, 16, 1, g\]"),
        ({"codebooks": torch.zeros(2, 32, 8)}, 5, 24, r"codebooks are \[2, 32, 8\]"),
        ({"codebooks": torch.zeros(2, 32, 4, 8)}, 5, 24, "out_group_size is 4"),
        ({"codebooks": torch.zeros(2, 32, 1, 0)}, 5, 24, "groups of 0 inputs do not divide"),
        (
            {"codebooks": torch.zeros(3, 32, 1, 8)},
            5,
            24,
            r"codes are \[6, 3, 2\]; 24 inputs need \[out, 3, 3\]",
        ),
        (
            {"codebooks": torch.zeros(2, 32, 1, 8, dtype=torch.int32)},
            5,
            24,
            "codebooks are torch.int32; they need to be floats",
        ),
        ({}, 5, 23, "in_features is 23, which groups of 8 inputs do not divide"),
        ({}, 5, 32, r"codes are \[6, 3, 2\]; 32 inputs need \[out, 4, 2\]"),
        ({"codes": torch.zeros(3, 6, 2, dtype=torch.int8)}, 5, 24, r"codes are \[3, 6, 2\]"),
        ({"codes": torch.zeros(18, 2, dtype=torch.int8)}, 5, 24, r"codes are \[18, 2\]"),
        (
            {"codes": torch.zeros(6, 3, 2, dtype=torch.int16)},
            5,
            24,
            "codes are torch.int16; AQLM stores 5 bits as torch.int8",
        ),
        ({"codes": torch.zeros(6, 3, 2, dtype=torch.uint8)}, 5, 24, "codes are torch.uint8"),
        (
            {"codes": torch.full((6, 3, 2), 16, dtype=torch.int8)},
            5,
            24,
            "codes range from 16 to 16; 5 bits are stored as -16 to 15",
        ),
        ({"codes": torch.full((6, 3, 2), -17, dtype=torch.int8)}, 5, 24, "codes range from -17 to -17"),
        ({"scales": torch.ones(6)}, 5, 24, r"scales are \[6\]; one per output is needed, \[6, 1, 1, 1\]"),
        ({"scales": torch.ones(6, 3, 1, 1)}, 5, 24, r"scales are \[6, 3, 1, 1\]; one per output"),
        ({"scales": torch.ones(5, 1, 1, 1)}, 5, 24, r"scales are \[5, 1, 1, 1\]"),
    ],
)
def test_what_cannot_be_read_is_refused(
    changes: dict[str, Tensor | None], nbits: int, in_features: int, message: str
) -> None:
    tensors = {name: tensor for name, tensor in (stored()[0] | changes).items() if tensor is not None}
    with pytest.raises(AquabitError, match=message) as caught:
        from_aqlm(tensors, nbits, in_features)
    assert "\n" not in str(caught.value)


def coded(scale: Tensor | None, offset: Tensor | None = None, inputs: int = 24) -> CodebookWeight:
    return CodebookWeight.from_codes(
        torch.zeros(3, 2, 6), torch.zeros(1, 2, 32, 8), scale, offset, (6, inputs), 5
    )


def test_what_cannot_be_written_is_refused() -> None:
    weight = coded(torch.ones(6))
    assert to_aqlm(weight)["scales"].shape == (6, 1, 1, 1)
    convolution = CodebookWeight.from_codes(
        torch.zeros(2, 1, 6), torch.zeros(1, 1, 4, 9), torch.ones(6), None, (6, 2, 3, 3), 2, "kernel"
    )
    per_channel = CodebookWeight.from_codes(
        torch.zeros(3, 1, 6), torch.zeros(6, 1, 4, 8), torch.ones(6), None, (6, 24), 2
    )
    for refused, message in (
        (convolution, r"it is \[6, 2, 3, 3\] in groups of order 'kernel', and AQLM holds linear layers"),
        (quantize_weight(torch.randn(4, 8), "usq4"), "it is uniform, without codebooks"),
        (per_channel, "it has codebooks for each of 6 channels"),
        (coded(torch.ones(6), torch.zeros(6)), r"it has an offset \[6\]"),
        (coded(None), r"its scale is None, and AQLM needs one per output, \[6\]"),
        (coded(torch.ones(6, 3)), r"its scale is \[6, 3\]"),
        (coded(torch.ones(6), inputs=20), "groups of 8 do not divide its 20 inputs"),
    ):
        with pytest.raises(AquabitError, match=f"^AQLM cannot hold this weight: {message}"):
            to_aqlm(refused)
