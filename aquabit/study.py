"""Study: one SQLite file that holds all that a report needs. Each measurement is one committed
transaction."""

from __future__ import annotations

import fcntl
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from aquabit import _notebook, checksums
from aquabit.jsonio import parse_json, parse_object
from aquabit.scheme import UNIT_GAIN_FITS, AquabitError, Measurement, Protocol, QuantConfig, Scheme

APPLICATION_ID = 0x61714269  # "aqBi"
VERSION = 2  # of the file's tables; 1 had no checksums
SHOWN = 400  # points of a notebook's chart: the last ones
TABLES = """
CREATE TABLE facts(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE configs(digest TEXT PRIMARY KEY, value TEXT NOT NULL, bits REAL, bytes INTEGER, bops REAL);
CREATE TABLE protocols(digest TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE measurements(config TEXT NOT NULL, protocol TEXT NOT NULL, kind TEXT NOT NULL,
  status TEXT NOT NULL, reason TEXT NOT NULL, metrics TEXT NOT NULL, seconds REAL NOT NULL,
  environment TEXT NOT NULL, created REAL NOT NULL, UNIQUE(config, protocol));
CREATE TABLE features(layer TEXT NOT NULL, scheme TEXT NOT NULL, value TEXT NOT NULL, UNIQUE(layer, scheme));
CREATE TABLE flips(layer TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL,
  config_before TEXT NOT NULL, config_after TEXT NOT NULL, protocol TEXT NOT NULL,
  UNIQUE(config_before, config_after, protocol));
CREATE TABLE thumbnails(config TEXT NOT NULL, protocol TEXT NOT NULL, png BLOB NOT NULL,
  UNIQUE(config, protocol));
"""
# tables of rows that are joined
MERGED = ("configs", "protocols", "measurements", "features", "flips", "thumbnails", "outputs")
OUTPUTS = (
    "CREATE TABLE IF NOT EXISTS outputs(config TEXT NOT NULL, inputs TEXT NOT NULL, value TEXT NOT NULL,"
    " UNIQUE(config, inputs))"
)


SUMMED = "SELECT 1 FROM sqlite_master WHERE name = 'sums'"


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """SQLite's failures as one sentence that names the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "disk I/O" in str(error):
            raise AquabitError(
                f"{path} could not be written ({error}); free some space and run the same command: nothing"
                " measured is lost"
            ) from error
        if "locked" in str(error):
            raise AquabitError(
                f"{path} is being written by another process; wait for it or stop it"
            ) from error
        raise AquabitError(f"{path} cannot be used as a study: {error}") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # a name or a text of bytes that are none
        raise AquabitError(
            f"{path} is not a readable study ({error}); it may be truncated: restore a copy or start a"
            " new one"
        ) from error


def _differing(stored: Protocol, given: Protocol) -> str:
    """What of a protocol is another, in words."""
    now = given.to_dict()
    pairs = {k: (v, now.get(k)) for k, v in {**dict.fromkeys(now), **stored.to_dict()}.items()}
    told = [
        f"{k} {v} instead of {w}"
        for k, (v, w) in pairs.items()
        if k not in ("objective", "inputs") and v != w
    ]
    if stored.inputs is not None and given.inputs is not None:
        old, new = dict(stored.inputs.pictures), dict(given.inputs.pictures)
        names = [n for n in (*old, *(set(new) - set(old))) if old.get(n) != new.get(n)]
        told += [f"the picture {names[0]} is another"] if names else []
        told += (
            ["pictures in another order"]
            if not names and stored.inputs.identity != given.inputs.identity
            else []
        )
    elif stored.inputs is not given.inputs:
        told.append("--inputs of some pictures" if given.inputs is None else "no --inputs")
    return ", ".join(told)


def _moved(space: Any, other: Any = None) -> Any:
    """A space with the folder of its pictures as another has it, or with none."""
    inputs = ((space or {}).get("calibration") or {}).get("inputs")
    if not inputs:
        return space
    folder = "" if other is None else other["calibration"]["inputs"]["folder"]
    return {**space, "calibration": {**space["calibration"], "inputs": {**inputs, "folder": folder}}}


class Study:
    """Open (or create) a study file; reading needs no lock, writing takes ``with study.writing():``.

    Raises AquabitError for a file that is no study, is truncated, was written by a newer version, or does not
    exist when ``create`` is false.
    """

    def __init__(self, path: str | Path, create: bool = True):
        self.path = Path(path)
        if not self.path.exists() and not create:
            raise AquabitError(
                f"there is no study at {self.path}; `aquabit measure MODEL --study {self.path}` makes one"
            )
        if not self.path.parent.is_dir():
            raise AquabitError(f"the folder {self.path.parent} of the study does not exist")
        if self.path.is_dir():
            raise AquabitError(f"{self.path} is a folder; name the file of a study")
        self._nesting = 0
        self._after: int | None = None  # see ``hide_after``
        self._asked: dict[tuple[str, str], int] = {}
        with _clear_errors(self.path):
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=10)
            self._open(create)

    def _open(self, create: bool) -> None:
        if self._db.execute("PRAGMA schema_version").fetchone()[0] == 0:
            if not create:  # an empty file is a database without tables: reading makes no study of it
                raise AquabitError(
                    f"{self.path} is empty, and no study: it may be truncated; restore a copy, or start one"
                    f" by `aquabit measure MODEL --study {self.path}`"
                )
            self._db.execute("BEGIN IMMEDIATE")
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # nobody was faster
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
                for statement in TABLES.split(";")[:-1]:
                    self._db.execute(statement)
                self._db.execute(checksums.TABLE)
            self._db.execute("COMMIT")
        if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise AquabitError(f"{self.path} is a database, but not a study of aquabit")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise AquabitError(
                f"{self.path} has format {version}, this version reads up to {VERSION}; update aquabit"
            )
        self._db.execute("BEGIN")  # one state of the file, while others write
        try:
            problem = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0].splitlines()[0]
            summed = bool(self._db.execute(SUMMED).fetchone())
            if problem == "ok" and summed and (changed := checksums.changed(self._db)):
                problem = f"{changed} is not what was written"
            elif problem == "ok" and version > 1 and not summed:
                problem = "it lacks its checksums"
        finally:
            self._db.execute("COMMIT")
        if problem != "ok":
            raise AquabitError(f"{self.path} is damaged ({problem}); restore a copy or start a new one")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the study's writer lock; a second writer is refused by its process number. Nested use is
        fine."""
        if self._nesting:
            self._nesting += 1
            try:
                yield
            finally:
                self._nesting -= 1
            return
        lock = self.path.with_name(self.path.name + ".lock")
        with open(lock, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise AquabitError(
                    f"{self.path} is being written by {owner}; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            self._nesting = 1
            try:
                yield
            finally:
                self._nesting = 0

    def writer(self) -> str | None:
        """Who writes the study now, as "process 12 on host"; None where nobody does."""
        try:
            with open(self.path.with_name(self.path.name + ".lock")) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return file.read().strip() or "another process"
        except OSError:
            pass
        return None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _clear_errors(self.path), self.writing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with _clear_errors(self.path):
            return self._db.execute(query, values).fetchall()

    def __contains__(self, name: str) -> bool:
        return bool(self._rows("SELECT 1 FROM facts WHERE name = ?", (name,)))

    def get(self, name: str, default: Any = None) -> Any:
        """A stored fact (JSON value): model, fingerprint, graph, space, protocol, sensitivity, front,
        validation, ..."""
        rows = self._rows("SELECT value FROM facts WHERE name = ?", (name,))
        return parse_json(rows[0][0], f"{self.path}, {name}") if rows else default

    def need(self, name: str, hint: str) -> Any:
        """A stored fact that must be there; ``hint`` says which command makes it."""
        value = self.get(name)
        if value is None:
            raise AquabitError(f"{self.path} holds no {name} yet; {hint}")
        return value

    def set(self, **facts: Any) -> None:
        """Store JSON values in one transaction; undefined numbers must already be None."""
        with self._transaction() as db:
            rows = [(name, json.dumps(value, allow_nan=False)) for name, value in facts.items()]
            _insert(db, "facts", rows, replace=True)

    def begin(
        self,
        model: str,
        fingerprint: str,
        graph: Any,
        space: Any,
        protocol: Protocol,
        fits: int = UNIT_GAIN_FITS,
    ) -> None:
        """Bind an empty study to a model, space and protocol, and to how schemes without H are fitted; one
        that is bound must agree with all four."""
        known = self.get("fingerprint")
        if known is None:
            facts = {"model": model, "fingerprint": fingerprint, "graph": graph, "space": space, "fits": fits}
            self.set(protocol=protocol.to_dict(), **facts)
            self.add_protocol(protocol)
            return
        self.check(model, fingerprint, space, protocol, fits)
        stored = self.protocol
        if stored.objective != protocol.objective or stored.inputs != protocol.inputs:
            self.set(protocol=protocol.to_dict())
        if stored.inputs != protocol.inputs:  # the same pictures lie elsewhere now
            self.set(**{name: _moved(self.get(name), space) for name in ("space", "offered") if name in self})

    @property
    def fits(self) -> int:
        """How schemes without H are fitted in it (UNIT_GAIN_FITS); 1 where it was begun before that was
        said."""
        found: int = self.get("fits", 1)
        return found

    def check(
        self, model: str, fingerprint: str, space: Any, protocol: Protocol, fits: int = UNIT_GAIN_FITS
    ) -> None:
        """Raise AquabitError where a study that is bound is not one of this model, space and protocol
        (objectives may differ), or its space has schemes that are fitted otherwise now."""
        known = self.get("fingerprint")
        if known != fingerprint:
            raise AquabitError(
                f"{self.path} is a study of {self.get('model')} ({known}), not of {model} ({fingerprint});"
                " use another file"
            )
        stored = Protocol.from_dict(self.get("protocol"))
        if stored.digest != protocol.digest:
            what = _differing(stored, protocol)
            raise AquabitError(
                f"{self.path} was measured under another protocol ({what}); use the same options or another"
                " file"
            )
        old, new = (str(given.get("correction") or "none") for given in (self.get("space"), space))
        if old != new:  # what both measure is not to be mixed
            raise AquabitError(
                f"{self.path} was begun with --correction {old}, not {new}; use that or another file"
            )
        if _moved(space) not in map(_moved, (self.get("space"), self.get("offered"))):
            raise AquabitError(
                f"{self.path} was begun with another search space; use the same --space or another file"
            )
        offered = {Scheme.parse(text) for row in space.get("choices", {}).values() for text in row}
        changed = sorted(str(s) for s in offered if s.unit_gain)
        if self.fits != fits and changed:
            raise AquabitError(
                f"{self.path} was begun with other fits of {', '.join(changed)} than this version makes: it"
                " can be read, explained and reported, but measure into another file"
            )

    @property
    def protocol(self) -> Protocol:
        return Protocol.from_dict(self.need("protocol", "run `aquabit measure` first"))

    def add_protocol(self, protocol: Protocol) -> None:
        with self._transaction() as db:
            _insert(db, "protocols", [(protocol.digest, json.dumps(protocol.to_dict()))])

    def protocols(self) -> dict[str, Protocol]:
        rows = self._rows("SELECT digest, value FROM protocols")
        named = [(d, v, f"{self.path}, protocol {d}") for d, v in rows]
        return {d: Protocol.from_dict(parse_json(v, where), where) for d, v, where in named}

    def record(
        self,
        config: QuantConfig,
        measurement: Measurement,
        kind: str,
        cost: Mapping[str, float],
        thumbnail: bytes | None = None,
    ) -> None:
        """One measurement with its configuration, as one transaction; measured again, the first one stays.

        ``kind`` says why it was made: reference, uniform, sample, flip, candidate, selection, fresh, or
        correction (the counterpart of a winner, without or with correction). ``cost`` has bits, bytes and
        bops.
        """
        m = measurement
        metrics, environment = json.dumps(dict(m.metrics)), json.dumps(dict(m.environment))
        said = (kind, m.status, m.reason, metrics, m.seconds, environment, time.time())
        body = json.dumps(config.to_dict(), allow_nan=False)
        with self._transaction() as db:
            _insert(db, "configs", [(config.digest, body, cost["bits"], cost["bytes"], cost["bops"])])
            _insert(db, "measurements", [(m.config, m.protocol, *said)])
            if thumbnail is not None:
                _insert(db, "thumbnails", [(m.config, m.protocol, thumbnail)])

    def known(self, protocol: Protocol) -> frozenset[str]:
        """Digests of the configurations that were measured (or failed) under a protocol."""
        return frozenset(
            r[0] for r in self._rows("SELECT config FROM measurements WHERE protocol = ?", (protocol.digest,))
        )

    def last_row(self) -> int:
        """A number that later measurements lie above (``hide_after``)."""
        return int(self._rows("SELECT coalesce(max(rowid), 0) FROM measurements")[0][0])

    def hide_after(self, row: int | None) -> None:
        """Measurements above ``row`` are in ``measurements`` once they are asked for (``show``), in that
        order, however they came to be recorded; None: all are, in the order of recording. They stay
        ``known``."""
        self._after, self._asked = row, {}

    def show(self, configs: Iterable[str], protocol: str) -> None:
        """Configurations (digests) that were asked for under a protocol (digest)."""
        if self._after is not None:
            for config in configs:
                self._asked.setdefault((config, protocol), len(self._asked))

    def _shown(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Of rows that begin with config, protocol and rowid what is not hidden."""
        after = self._after
        if after is None:
            return rows
        later = [r for r in rows if r[2] > after and (r[0], r[1]) in self._asked]
        return [r for r in rows if r[2] <= after] + sorted(later, key=lambda r: self._asked[r[0], r[1]])

    def measurements(
        self, protocol: Protocol | None = None, kind: str | None = None, failed: bool = False
    ) -> pd.DataFrame:
        """One row a measurement in the order of recording (see also ``hide_after``): config, protocol, kind,
        status, reason, seconds, created, bits, bytes, bops, correction and tuned (None without), one column a
        metric. Failed ones only where ``failed``."""
        query = (
            "SELECT m.config, m.protocol, m.rowid, m.kind, m.status, m.reason, m.seconds, m.created, c.bits,"
            " c.bytes, c.bops, json_extract(c.value, '$.correction'), json_extract(c.value, '$.tuned'),"
            " m.metrics FROM measurements m JOIN configs c ON c.digest = m.config"
            " WHERE (? OR m.status = 'ok') ORDER BY m.rowid"
        )
        names = ["config", "protocol", "kind", "status", "reason", "seconds", "created"]
        names += ["bits", "bytes", "bops", "correction", "tuned"]
        shown = self._shown(self._rows(query, (failed,)))
        rows = [(*r[:2], *r[3:-1], self._metrics(r[0], r[-1])) for r in shown]
        table = pd.DataFrame([{**dict(zip(names, r[:-1], strict=True)), **r[-1]} for r in rows])
        if table.empty:
            return pd.DataFrame(columns=names)
        if protocol is not None:
            table = table[table.protocol == protocol.digest]
        if kind is not None:
            table = table[table.kind == kind]
        return table.reset_index(drop=True)

    def configs(self) -> dict[str, QuantConfig]:
        """Every configuration by its digest."""
        rows = self._rows("SELECT digest, value FROM configs")
        named = [(d, v, f"{self.path}, configuration {d}") for d, v in rows]
        return {d: QuantConfig.from_dict(parse_json(v, where), where) for d, v, where in named}

    def _metrics(self, config: str, text: Any) -> dict[str, float | None]:
        """What a measurement found; raises AquabitError for what are no numbers."""
        found = parse_object(text, f"{self.path}, measurement of {config}")
        for name, value in found.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise AquabitError(
                    f"{self.path}, measurement of {config}: {name} is {value!r:.60}, which is no number"
                )
        return found

    def add_features(self, values: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
        """Facts per (layer, scheme): "error" (relative squared weight error), "damage" and "sketch" (see
        ``Evaluator.fit``)."""
        rows = [(*key, json.dumps(dict(value), allow_nan=False)) for key, value in values.items()]
        with self._transaction() as db:
            _insert(db, "features", rows, replace=True)

    def features(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(layer, scheme or activation as a6) -> facts, as ``sensitivity.features.Encoder`` takes them."""
        rows = self._rows("SELECT layer, scheme, value FROM features")
        return {(a, b): parse_object(v, f"{self.path}, {a} at {b}") for a, b, v in rows}

    def errors(self) -> dict[tuple[str, str], float]:
        """(layer, scheme) -> relative squared output error where H is known, else weight error, as
        ``Encoder`` takes it."""
        return {k: v.get("output", v["error"]) for k, v in self.features().items() if "error" in v}

    def add_outputs(self, inputs: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Output errors of configurations (by digest) on the stored inputs of a digest
        (``measuring.output_errors``), in one transaction; the configurations need not be measured."""
        with self._transaction() as db:
            db.execute(OUTPUTS)  # older files lack it
            rows = [(config, inputs, json.dumps(dict(v), allow_nan=False)) for config, v in values.items()]
            _insert(db, "outputs", rows)

    def outputs(self, inputs: str) -> dict[str, dict[str, Any]]:
        """digest -> output errors of every configuration that has some on these inputs."""
        if not self._rows("SELECT 1 FROM sqlite_master WHERE name = 'outputs'"):
            return {}
        return {
            c: parse_object(v, f"{self.path}, output errors of {c}")
            for c, v in self._rows("SELECT config, value FROM outputs WHERE inputs = ?", (inputs,))
        }

    def notes(self) -> list[str]:
        """What is to be said of the fits: (unused codewords, a diagonal H), each with its layer and
        scheme."""
        return [
            f"{layer} at {scheme}: {note}"
            for (layer, scheme), v in self.features().items()
            for note in v.get("notes", ())
        ]

    def probes(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(layer, scheme or a6) -> damage and sketch, as ``sensitivity.features.Encoder`` takes them."""
        return {k: v for k, v in self.features().items() if "damage" in v}

    def add_swap(
        self, layer: str, before: str, after: str, config_before: str, config_after: str, protocol: Protocol
    ) -> None:
        """Two measured configurations that differ in one layer."""
        with self._transaction() as db:
            _insert(db, "flips", [(layer, before, after, config_before, config_after, protocol.digest)])

    def swaps(self, objective: str) -> pd.DataFrame:
        """One row a real swap whose both ends were measured: layer, before, after, config_before,
        config_after, protocol, value_before, value_after of the objective."""
        columns = ["layer", "before", "after", "config_before", "config_after", "protocol"]
        rows = self._rows(f"SELECT {', '.join(columns)} FROM flips ORDER BY rowid")
        table = self.measurements()
        if not rows or table.empty:
            return pd.DataFrame(columns=[*columns, "value_before", "value_after"])
        value = table.set_index(["config", "protocol"])[objective].to_dict()
        out = pd.DataFrame(rows, columns=columns)
        for end in ("before", "after"):
            keys = zip(out[f"config_{end}"], out.protocol, strict=True)
            out[f"value_{end}"] = [value.get(key) for key in keys]
        return out.dropna(subset=["value_before", "value_after"]).reset_index(drop=True)

    def thumbnails(self) -> dict[tuple[str, str], bytes]:
        """(config, protocol) -> PNG of the first images."""
        return {(c, p): png for c, p, png in self._rows("SELECT config, protocol, png FROM thumbnails")}

    def _repr_html_(self) -> str:
        measured = self.measurements(failed=True)
        kinds = [
            (kind, len(part), int((part.status != "ok").sum()))
            for kind, part in measured.groupby("kind", sort=False)
        ]
        holds = [name for name in ("sensitivity", "front", "noise") if self.get(name)]
        caption = (
            f"{self.path.name}: {self.get('model') or 'no model yet'}; holds"
            f" {', '.join(holds) or 'no results yet'}"
        )
        counts = _notebook.table(("kind", "measurements", "of them failed"), kinds, caption)
        objective = str((self.get("protocol") or {}).get("objective") or "")
        if objective not in measured:
            return counts
        own = measured[(measured.status == "ok") & measured.kind.isin(("sample", "uniform", "candidate"))]
        own = own.dropna(subset=[objective]).iloc[-SHOWN:]
        rows = [
            (r, float(b), float(v), math.nan, math.nan)
            for r, b, v in zip(own.config, own.bits, own[objective], strict=True)
        ]
        return counts + _notebook.points(rows, "bits per weight", f"{objective}, measured")


def _insert(
    db: sqlite3.Connection, table: str, rows: Sequence[tuple[Any, ...]], replace: bool = False
) -> None:
    """Rows of one table; of what is there already the first stays, or the new one with ``replace``."""
    if not db.execute(SUMMED).fetchone():  # a file of an older version, which reads it no longer from now on
        checksums.start(db)
        db.execute(f"PRAGMA user_version = {VERSION}")
    for row in rows:
        verb, places = "REPLACE" if replace else "IGNORE", ", ".join("?" * len(row))
        done = db.execute(f"INSERT OR {verb} INTO {table} VALUES ({places})", row)
        if done.rowcount:
            checksums.add(db, table, int(done.lastrowid or 0))


def comparable(table: pd.DataFrame, correction: str | None) -> pd.Series:
    """Boolean: which ``Study.measurements`` are corrected so (None: not at all), and not fine-tuned."""
    return (table.correction.fillna("") == (correction or "")) & table.tuned.isna()


class Merged(NamedTuple):
    """Measurements that were new, that several sources have, and those of them whose numbers differ (made
    on other hardware, say)."""

    new: int
    repeated: int
    differing: int


def merge(sources: Sequence[Study], out: Study | str | Path) -> Merged:
    """Copy everything that was measured in ``sources`` into ``out`` (a study, or where one is or is to be),
    in one transaction; of what several hold, the first stays (of features the one that says more).

    Rows of the sources take turns, so that shards given in order come out in the order of a run in one piece.
    Raises AquabitError, before anything is written, where a source is empty, or of another model, space or
    protocol than the first one or ``out``.
    """
    if not isinstance(out, Study) and Path(out).exists():
        out = Study(out)
    facts = [
        {k: s.need(k, "it is empty: measure into it first") for k in ("model", "fingerprint", "space")}
        | {"fits": s.fits}
        for s in sources
    ]
    bound = [s for s in (*([out] if isinstance(out, Study) else []), *sources) if "fingerprint" in s]
    for source, own in zip(sources, facts, strict=True):
        try:
            bound[0].check(**own, protocol=source.protocol)
        except AquabitError as error:
            raise AquabitError(f"{source.path} cannot be joined: {error}") from error
    out = out if isinstance(out, Study) else Study(out)  # made when nothing is wrong
    before = _numbers(out)
    measured = [_numbers(s) for s in (*([out] if before else []), *sources)]
    with out.writing():
        out.begin(**facts[0], graph=sources[0].need("graph", "it is damaged"), protocol=bound[0].protocol)
        for name in ("quality", "family_notes", "damages", "untold", "calibrated_fits"):
            said = [source.get(name) for source in sources if name in source]
            if said and name not in out:
                out.set(**{name: said[0]})
        # which swaps were drawn at random
        plans = [plan for source in (out, *sources) for plan in source.get("validation_plan") or []]
        if plans:
            out.set(validation_plan=[plan for i, plan in enumerate(plans) if plan not in plans[:i]])
        with out._transaction() as db:
            db.execute(OUTPUTS)  # older files lack it
            for table in MERGED:
                rows = [s._rows(f"SELECT * FROM {table} ORDER BY rowid") for s in sources if _has(s, table)]
                listed = [row for row in chain.from_iterable(zip_longest(*rows)) if row is not None]
                if table == "features":
                    _insert(db, table, _best(out, listed), replace=True)
                else:
                    _insert(db, table, listed)
    every = {key for numbers in measured for key in numbers}
    several = [key for key in every if sum(key in numbers for numbers in measured) > 1]
    differing = [key for key in several if len({numbers[key] for numbers in measured if key in numbers}) > 1]
    return Merged(len(every) - len(before), len(several), len(differing))


def _best(out: Study, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Of features (layer, scheme, value) those that say more than what ``out`` has: a probed damage more than
    one from gradients, and that more than none."""

    def said(row: tuple[Any, ...]) -> int:
        value = parse_object(row[2], f"{out.path}, {row[0]} at {row[1]}")
        return 0 if "damage" not in value else 1 if "gradient" in value else 2

    there = {row[:2]: said(row) for row in out._rows("SELECT layer, scheme, value FROM features")}
    best: dict[Any, tuple[Any, ...]] = {}
    for row in rows:
        if said(row) > there.get(row[:2], -1):
            best[row[:2]], there[row[:2]] = row, said(row)
    return list(best.values())


def _numbers(study: Study) -> dict[tuple[str, str], tuple[str, str]]:
    """(config, protocol) -> status and metrics."""
    return {
        (c, p): (s, m)
        for c, p, s, m in study._rows("SELECT config, protocol, status, metrics FROM measurements")
    }


def _has(study: Study, table: str) -> bool:
    return bool(study._rows("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)))
