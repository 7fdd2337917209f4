"""JSON files: written whole or not at all, without undefined numbers; read with an error that says what is
wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from aquabit.errors import AquabitError
from aquabit.files import write_text

Record = TypeVar("Record")


def defined(value: Any) -> Any:
    """A plain JSON value: numpy's numbers and arrays as Python's, what is not finite (NaN, infinity) as
    None."""
    if isinstance(value, Mapping):
        return {str(k): defined(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # numpy's, which is not imported for the sake of a configuration file
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [defined(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises AquabitError where it cannot be read or is no JSON."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise AquabitError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_json(data, str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """As ``read_json``, of a JSON object."""
    return _object(read_json(path), str(path))


def parse_json(text: str | bytes | None, source: str) -> Any:
    """The value of JSON from a file or a database. Raises AquabitError, naming ``source``, for anything else:
    no text, other bytes than UTF-8, thousands of brackets or digits."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # some editors begin with a byte order mark
        if not isinstance(text, str):
            raise ValueError(f"it is {type(text).__name__}, not text")
        return json.loads(text)
    except RecursionError as error:
        raise AquabitError(f"{source} is not valid JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise AquabitError(f"{source} is not valid JSON ({error}); it may be truncated") from error


def parse_object(text: str | bytes | None, source: str) -> dict[str, Any]:
    """As ``parse_json``, of a JSON object."""
    return _object(parse_json(text, source), source)


def _object(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise AquabitError(f"{source} is {value!r:.60}; it must be a JSON object")
    return value


def record(cls: type[Record], value: Any, source: str) -> Record:
    """A dataclass of ours from the JSON value of its fields, those that are absent at their defaults. Raises
    AquabitError, naming ``source``, for unknown fields, values of other types, and what the class refuses."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        some = ", ".join(sorted(known))
        raise AquabitError(f"{source} is a {type(value).__name__}; an object with some of {some} is needed")
    if unknown := sorted(set(map(str, value)) - known):
        some = ", ".join(sorted(known))
        raise AquabitError(f"{source} names {unknown[0]!r:.60}, which is none of its fields; known: {some}")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AquabitError(f"{source} is no JSON value ({error})") from error
    with clear_errors(source):
        found: Record = _reader(cls).validate_json(text, strict=True)  # type: ignore[arg-type]
    return found


@cache
def _reader(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """pydantic's refusal as an AquabitError that says ``what`` is wrong, the place, and the value there."""
    from pydantic import ValidationError  # 0.1 s to import: only where a file is read

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise AquabitError(f"{what}: {place}: {first['msg']} (got {first.get('input')!r:.60})") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value; whoever reads meanwhile finds the whole old file or the whole new one. Raises
    AquabitError where it cannot be written, and ValueError for undefined numbers (see ``defined``)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def digest(value: Any) -> str:
    """Sixteen hex digits of SHA-256 over the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
