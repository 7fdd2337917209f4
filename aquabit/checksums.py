"""Checksums of a study's rows: a row that disk, copy or hand has changed is noticed when the file is opened.

The table ``sums`` has one line a row, of (table, name of the row): of a row that may be replaced the values
that make it unique, of all others its place in the order of recording. They tell of accidents, not of
somebody who writes a row and its sum.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

TABLE = "CREATE TABLE sums(tab TEXT NOT NULL, name NOT NULL, sum BLOB NOT NULL, UNIQUE(tab, name))"
NAMED = {"facts": 1, "features": 2}  # tables whose rows are replaced: columns that name a row
ORDERED = ("configs", "protocols", "measurements", "flips", "thumbnails", "outputs")


def add(db: sqlite3.Connection, table: str, row: int) -> None:
    """Note the row of this rowid, which has just been written; of what it replaced nothing stays."""
    values = db.execute(f"SELECT * FROM {table} WHERE rowid = ?", (row,)).fetchone()
    if table in NAMED:
        name: str | int = _name(table, values)
    else:
        query = "SELECT coalesce(max(name), -1) + 1 FROM sums WHERE tab = ?"
        name = db.execute(query, (table,)).fetchone()[0]
    db.execute("REPLACE INTO sums VALUES (?, ?, ?)", (table, name, _sum(table, name, values)))


def start(db: sqlite3.Connection) -> None:
    """Note all rows of a file that has no sums yet."""
    db.execute(TABLE)
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for table in (t for t in (*NAMED, *ORDERED) if t in there):
        for (row,) in db.execute(f"SELECT rowid FROM {table} ORDER BY rowid").fetchall():
            add(db, table, row)


def changed(db: sqlite3.Connection) -> str | None:
    """The first row that is not what was written, that is lost or new, in words; None where all are as
    written."""
    sums = {(table, name): value for table, name, value in db.execute("SELECT tab, name, sum FROM sums")}
    for table in (*NAMED, *ORDERED):
        if (
            table == "outputs"
            and not db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        ):
            continue
        for place, values in enumerate(db.execute(f"SELECT * FROM {table} ORDER BY rowid")):
            name = _name(table, values) if table in NAMED else place
            if sums.pop((table, name), None) != _sum(table, name, values):
                return f"{name if table in NAMED else f'row {place + 1}'} of {table}"
    return None if not sums else f"a row of {next(iter(sums))[0]} that is gone"


def _name(table: str, values: Sequence[Any]) -> str:
    named = values[: NAMED[table]]
    return str(named[0]) if len(named) == 1 else json.dumps([str(v) for v in named])


def _sum(table: str, name: str | int, values: Sequence[Any]) -> bytes:
    """blake2b of the values with their types and lengths, the table's name and the row's."""
    found = blake2b(digest_size=16)
    for value in (table, name, *values):
        kind = type(value).__name__
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        found.update(struct.pack("<8sQ", kind.encode()[:8], len(data)))
        found.update(data)
    return found.digest()
