"""The container: the gguf package reads what is written and the other way round; a damaged file is one
sentence."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aquabit.exports.gguf_file import KINDS, Written, is_gguf, read_file, write_file
from aquabit.scheme import AquabitError

gguf = pytest.importorskip("gguf")


def test_the_types_are_the_packages() -> None:
    known = {k.name: (int(k), *sizes) for k, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {name: known[name] for name in KINDS if name in known} == {
        name: tuple(kind) for name, kind in KINDS.items() if name in known
    }
    assert {*known} - {*KINDS} == {"Q8_1", "Q8_K"}, "of inner products, never of files"


SHAPES = st.lists(st.integers(1, 5), max_size=5).map(tuple)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(
    st.dictionaries(NAMES, SHAPES, max_size=6), st.dictionaries(NAMES, st.integers(0, 2**32 - 1), max_size=4)
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]], numbers: dict[str, int]
) -> None:
    path = tmp_path_factory.mktemp("f") / "net.gguf"
    values: dict[str, Any] = {
        "general.architecture": "ä",
        "shape": (1, 2, 3),
        **{f"n{k}": v for k, v in numbers.items()},
    }
    made = {name: torch.rand(shape) for name, shape in shapes.items()}
    write_file(path, values, [Written(n, "F32", tuple(t.shape), lambda t=t: t) for n, t in made.items()])
    found = read_file(path)
    assert found.values == values
    assert {n: one.shape for n, one in found.tensors.items()} == shapes
    for name, tensor in made.items():
        assert np.array_equal(found.bytes_of(name).view(np.float32), tensor.flatten().numpy())


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    path, tensor = tmp_path / "net.gguf", torch.rand(3, 5)
    values: dict[str, Any] = {"general.architecture": "flux", "a": (1, -2), "b": 7}
    byte = torch.arange(34 * 2, dtype=torch.uint8)
    write_file(
        path,
        values,
        [Written("x", "F32", (3, 5), lambda: tensor), Written("y", "Q8_0", (2, 32), lambda: byte)],
    )
    reader = gguf.GGUFReader(path)
    assert reader.fields["a"].contents() == [1, -2] and reader.fields["b"].contents() == 7
    one, other = reader.tensors
    assert np.array_equal(one.data, tensor.numpy()) and one.shape.tolist() == [5, 3]
    assert np.array_equal(other.data.flatten(), byte.numpy()) and other.shape.tolist() == [32, 2]


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "net.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "bc"])
    writer.add_array("many", list(range(5000)))
    writer.add_bool("yes", True)
    writer.add_float32("f", 0.5)
    writer.add_custom_alignment(64)
    data = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    for kind in (
        gguf.GGMLQuantizationType.Q8_0,
        gguf.GGMLQuantizationType.F16,
        gguf.GGMLQuantizationType.BF16,
    ):
        writer.add_tensor(kind.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_file(path)
    assert found.values["yes"] is True and found.values["f"] == 0.5 and found.values["many"] is None
    assert found.values["general.architecture"] == "llama"
    for kind, one in found.tensors.items():
        assert one.kind == kind and one.shape == (4, 256)
        wanted = gguf.quants.quantize(data, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(found.bytes_of(kind), wanted.flatten().view(np.uint8))


def small() -> bytes:
    """A file of two tensors without the bytes that fill the last place."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.gguf"
        values: dict[str, Any] = {"general.architecture": "x", "shape": (4, 4), "n": 3}
        plain = Written("w", "F16", (4, 4), lambda: torch.zeros(4, 4).half())
        write_file(
            path, values, [plain, Written("q", "Q4_0", (2, 32), lambda: torch.zeros(36, dtype=torch.uint8))]
        )
        data = path.read_bytes()
    return data[: len(data) - (64 - 36)]


def test_a_file_that_is_cut_off_is_one_sentence(tmp_path: Path) -> None:
    data, path = small(), tmp_path / "net.gguf"
    path.write_bytes(data)
    read_file(path)
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(AquabitError, match=r"net.gguf cannot be read as GGUF: (it |tensor '.' ends at)"):
            read_file(path)


def test_changed_bytes_are_read_or_one_sentence(tmp_path: Path) -> None:
    data, path, random = small(), tmp_path / "net.gguf", Random(0)
    read, refused = 0, list[str]()
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(random.randint(1, 3)):
            changed[random.randrange(len(data))] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        path.write_bytes(changed)
        try:
            found = read_file(path)
        except AquabitError as error:
            refused.append(str(error))
            continue
        read += 1
        assert all(len(found.bytes_of(name)) == one.nbytes for name, one in found.tensors.items())
    assert 200 < read < 1900
    assert [said for said in refused if "\n" in said or len(said) > 900] == []


def header(version: int = 3, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, place: int = 0) -> bytes:
    said = text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return said + struct.pack("<IQ", kind, place)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04" + bytes(40), "it does not begin with GGUF: it is no GGUF file"),
        (header(1), "its version is 1; known are 2, 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50331648; known"),
        (header(tensors=2**60), "it ends at byte 24, and 8 more were to come at 24"),
        (header(values=2**60), "it ends at byte 24"),
        (header(values=1) + struct.pack("<Q", 2**63), r"a key has 9,223,372,036,854,775,808 bytes; at most"),
        (
            header(values=1) + text("k") + struct.pack("<I", 99),
            "the value of 'k' has type 99, which is unknown",
        ),
        (header(values=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "the array 'k' has elements of type 9"),
        (
            header(values=1) + text("k") + struct.pack("<IIQ", 9, 5, 2**50),
            "and 4,503,599,627,370,496 more were",
        ),
        (
            header(values=1) + text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xff",
            "the value of 'k' is no text in UTF-8",
        ),
        (header(values=2) + (text("k") + struct.pack("<II", 4, 1)) * 2, "key 'k' is there twice"),
        (
            header(values=1) + text("general.alignment") + struct.pack("<II", 4, 0),
            "its alignment is 0; it must be a multiple of 8",
        ),
        (header(tensors=1) + tensor("w", (1,) * 9, 0), "tensor 'w' has 9 dimensions; at most 8"),
        (header(tensors=1) + tensor("w", (4,), 4), "tensor 'w' has type 4, which is unknown"),
        (header(tensors=1) + tensor("w", (2, 33), 2), "'w' has rows of 33 weights; Q4_0 has blocks of 32"),
        (header(tensors=1) + tensor("w", (2, 2), 0, 5), "tensor 'w' begins at byte 5, no multiple of 32"),
        (header(tensors=1) + tensor("w", (2**40, 2**20), 0), "tensor 'w' ends at byte .* it is cut off"),
        (header(tensors=2) + tensor("w", (1,), 0) * 2, "tensor 'w' is there twice"),
        (
            header(tensors=2) + tensor("w", (16,), 0) + tensor("v", (2,), 0, 32) + bytes(96),
            "tensor 'v' begins at byte .*, within 'w', which ends at",
        ),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "net.gguf"
    path.write_bytes(data)
    with pytest.raises(AquabitError, match=said):
        read_file(path)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(AquabitError, match="could not be read: No such file"):
        read_file(tmp_path / "none.gguf")
    assert not is_gguf(tmp_path / "none.gguf") and not is_gguf(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "net.gguf"
    path.write_text("before")

    def broken() -> torch.Tensor:
        raise AquabitError("no")

    with pytest.raises(AquabitError, match="no"):
        write_file(path, {}, [Written("w", "F32", (1,), broken)])
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["net.gguf"]
