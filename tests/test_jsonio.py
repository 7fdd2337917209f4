"""JSON files: whole or not at all, undefined numbers as null, errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquabit.errors import AquabitError
from aquabit.jsonio import defined, read_json, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_what_is_defined_can_be_written_and_is_so_again(value: object) -> None:
    clean = defined(value)
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean == defined(clean)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_numpy_becomes_plain_and_undefined_becomes_null() -> None:
    value = {"a": np.float32("nan"), 3: (np.int64(4), np.bool_(True)), "m": np.array([[1.0, np.inf], [2, 3]])}
    found = defined(value)
    assert found == {"a": None, "3": [4, True], "m": [[1.0, None], [2.0, 3.0]]}
    assert type(found["3"][0]) is int and type(found["3"][1]) is bool and type(found["m"][1][0]) is float


def test_a_file_comes_back_and_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"names": ["é", "<"], "n": 1})
    assert read_json(path) == {"names": ["é", "<"], "n": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"n": float("nan")})
    assert read_json(path)["n"] == 1 and [p.name for p in tmp_path.iterdir()] == ["value.json"]
    with pytest.raises(AquabitError, match="could not be written"):
        write_json(tmp_path / "none" / "value.json", 1)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    for text in (b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(text)
        with pytest.raises(AquabitError, match=r"cut\.json is not valid JSON .* truncated"):
            read_json(path)
    with pytest.raises(AquabitError, match="cannot read"):
        read_json(tmp_path / "absent.json")
