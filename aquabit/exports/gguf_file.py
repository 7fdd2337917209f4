"""The container of GGUF files (version 3, ggml's docs/gguf.md): written tensor by tensor, and read as
untrusted input.

A file is a header, named values, the description of every tensor, and their bytes, each at a multiple of the
alignment. Shapes here are those of torch; the file has them reversed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aquabit.errors import AquabitError
from aquabit.files import writing

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SHAPE = "comfy.gguf.orig_shape."  # before a name: the shape, where blocks need another (ComfyUI-GGUF)
READ_VERSIONS = (2, 3)  # the first had other widths


class Kind(NamedTuple):
    """A type of tensors: its number in files, and how many bytes a block of how many weights has."""

    number: int
    weights: int
    bytes: int


KINDS: dict[str, Kind] = {  # ggml.h and ggml-common.h
    "F32": Kind(0, 1, 4),
    "F16": Kind(1, 1, 2),
    "Q4_0": Kind(2, 32, 18),
    "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22),
    "Q5_1": Kind(7, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q2_K": Kind(10, 256, 84),
    "Q3_K": Kind(11, 256, 110),
    "Q4_K": Kind(12, 256, 144),
    "Q5_K": Kind(13, 256, 176),
    "Q6_K": Kind(14, 256, 210),
    "IQ2_XXS": Kind(16, 256, 66),
    "IQ2_XS": Kind(17, 256, 74),
    "IQ3_XXS": Kind(18, 256, 98),
    "IQ1_S": Kind(19, 256, 50),
    "IQ4_NL": Kind(20, 32, 18),
    "IQ3_S": Kind(21, 256, 110),
    "IQ2_S": Kind(22, 256, 82),
    "IQ4_XS": Kind(23, 256, 136),
    "I8": Kind(24, 1, 1),
    "I16": Kind(25, 1, 2),
    "I32": Kind(26, 1, 4),
    "I64": Kind(27, 1, 8),
    "F64": Kind(28, 1, 8),
    "IQ1_M": Kind(29, 256, 56),
    "BF16": Kind(30, 1, 2),
    "TQ1_0": Kind(34, 256, 54),
    "TQ2_0": Kind(35, 256, 66),
    "MXFP4": Kind(39, 32, 17),
}
NUMBERS = {kind.number: name for name, kind in KINDS.items()}
PLAIN = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}

# what named values are: the number of their type, and how struct writes one
UINT32, INT32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SIZES = {number: struct.calcsize(f"<{code}") for number, code in SCALARS.items()}

Value = str | int | tuple[int, ...]  # strings, 32-bit whole numbers and arrays of them are what is written


@dataclass(frozen=True)
class Written:
    """A tensor to write: ``make`` gives its bytes, or its values for a plain type, when their turn comes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return byte_count(self.kind, self.shape)


def byte_count(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; its last dimension is a whole number of blocks."""
    return prod(shape) // KINDS[kind].weights * KINDS[kind].bytes


def write_file(path: str | Path, values: Mapping[str, Value], tensors: Iterable[Written]) -> None:
    """Write a file, whole or not at all; one tensor is in memory at a time."""
    listed = list(tensors)
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(listed), len(values)))
        for key, value in values.items():
            file.write(_text(key) + _packed(value))
        place = 0
        for one in listed:
            file.write(_text(one.name) + struct.pack("<I", len(one.shape)))
            file.write(struct.pack(f"<{len(one.shape)}Q", *reversed(one.shape)))
            file.write(struct.pack("<IQ", KINDS[one.kind].number, place))
            place += _aligned(one.nbytes)
        _pad(file)
        for one in listed:
            data = one.make().detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            assert data.nbytes == one.nbytes, one.name
            file.write(data.data)
            _pad(file)


def _aligned(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO) -> None:
    place = file.tell()
    file.write(bytes(_aligned(place) - place))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(value: Value) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, tuple):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    return struct.pack("<II", UINT32, value)


class Stored(NamedTuple):
    """A tensor in a file: its type, shape, and where its bytes begin."""

    kind: str
    shape: tuple[int, ...]
    place: int

    @property
    def nbytes(self) -> int:
        return byte_count(self.kind, self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds: named values (arrays of numbers as tuples, others not kept), and tensors."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def bytes_of(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8, from the file."""
        one = self.tensors[name]
        if one.nbytes == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", one.place, (one.nbytes,))


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_file(path: str | Path) -> GGUFFile:
    """What a GGUF file says it holds. Raises AquabitError, naming the file and the place, where it is no
    GGUF file, is cut off, or says what cannot be."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            return _Reader(Path(path), file, size).read()
    except OSError as error:
        raise AquabitError(f"{path} could not be read: {error.strerror or error}") from error


MOST_DIMENSIONS = 8  # more than any program writes
LONGEST = 1 << 16  # bytes of a name; ggml's are below 64, or 128 where it is built so
LONGEST_QUOTED = 160  # characters of a name
MOST_KEPT = 1 << 12  # numbers of an array that are kept; longer ones (vocabularies) are passed over


def _short(name: str) -> str:
    """A name that a file says, as it is quoted."""
    return repr(name if len(name) <= LONGEST_QUOTED else name[:LONGEST_QUOTED] + "...")


class _Reader:
    """Reads a file from its beginning; nothing is believed before it is known to lie in the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size

    def read(self) -> GGUFFile:
        if self._take(4) != MAGIC:
            raise self._wrong(f"it does not begin with {MAGIC.decode()}: it is no GGUF file")
        version = self._number("I")
        if version not in READ_VERSIONS:
            raise self._wrong(
                f"its version is {version}; known are {', '.join(map(str, READ_VERSIONS))} (and only"
                " little-endian files)"
            )
        tensors, values = self._number("Q"), self._number("Q")
        named: dict[str, Any] = {}
        for _ in range(values):
            key = self._string("a key")
            self._add(named, key, self._value(self._number("I"), key), "key")
        alignment = named.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment % 8 or alignment > 1 << 20:
            raise self._wrong(f"its alignment is {alignment!r:.40}; it must be a multiple of 8 bytes")
        found: dict[str, Stored] = {}
        for _ in range(tensors):
            name = self._string("the name of a tensor")
            self._add(found, name, self._tensor(name, alignment), "tensor")
        begin = _aligned(self.file.tell(), alignment)
        placed = {name: one._replace(place=begin + one.place) for name, one in found.items()}
        for name, one in placed.items():
            if one.place + one.nbytes > self.size:
                raise self._wrong(
                    f"tensor {_short(name)} ends at byte {one.place + one.nbytes:,}, and the file has"
                    f" {self.size:,}: it is cut off"
                )
        self._check_apart(placed)
        return GGUFFile(self.path, named, placed)

    def _check_apart(self, placed: Mapping[str, Stored]) -> None:
        """Raise AquabitError for tensors that lie in each other's bytes, as ggml writes and reads none."""
        rows = sorted((one.place, one.place + one.nbytes, name) for name, one in placed.items() if one.nbytes)
        for (_, end, before), (begin, _, name) in pairwise(rows):
            if begin < end:
                raise self._wrong(
                    f"tensor {_short(name)} begins at byte {begin:,}, within {_short(before)}, which ends at"
                    f" {end:,}"
                )

    def _tensor(self, name: str, alignment: int) -> Stored:
        dimensions = self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise self._wrong(
                f"tensor {_short(name)} has {dimensions:,} dimensions; at most {MOST_DIMENSIONS}"
            )
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        number, place = self._number("I"), self._number("Q")
        if number not in NUMBERS:
            raise self._wrong(f"tensor {_short(name)} has type {number}, which is unknown")
        kind = NUMBERS[number]
        row = shape[-1] if shape else 1
        if row % KINDS[kind].weights:
            raise self._wrong(
                f"tensor {_short(name)} has rows of {row} weights; {kind} has blocks of {KINDS[kind].weights}"
            )
        if place % alignment:
            raise self._wrong(f"tensor {_short(name)} begins at byte {place:,}, no multiple of {alignment}")
        return Stored(kind, shape, place)

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string(f"the value of {_short(key)}", 1 << 24)
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise self._wrong(f"the value of {_short(key)} has type {kind}, which is unknown")
        inner, count = self._number("I"), self._number("Q")
        if inner == STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        if inner not in SCALARS:
            raise self._wrong(
                f"the array {_short(key)} has elements of type {inner}; numbers and texts are known"
            )
        if count > MOST_KEPT:
            self._skip(count * SIZES[inner])
            return None
        return struct.unpack(f"<{count}{SCALARS[inner]}", self._take(count * SIZES[inner]))

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self, what: str, longest: int = LONGEST) -> str:
        length = self._number("Q")
        if length > longest:
            raise self._wrong(f"{what} has {length:,} bytes; at most {longest:,}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._wrong(f"{what} is no text in UTF-8") from None

    def _skip(self, count: int) -> None:
        self._check(count)
        self.file.seek(count, os.SEEK_CUR)

    def _take(self, count: int) -> bytes:
        self._check(count)
        return self.file.read(count)

    def _check(self, count: int) -> None:
        place = self.file.tell()
        if place + count > self.size:
            raise self._wrong(f"it ends at byte {self.size:,}, and {count:,} more were to come at {place:,}")

    def _add(self, found: dict[str, Any], name: str, value: Any, what: str) -> None:
        if name in found:
            raise self._wrong(f"{what} {_short(name)} is there twice")
        found[name] = value

    def _wrong(self, why: str) -> AquabitError:
        return AquabitError(f"{self.path} cannot be read as GGUF: {why}")
