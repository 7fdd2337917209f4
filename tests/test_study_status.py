"""Shards: three of them joined are the run in one piece; how far they are; what cannot be joined."""

from __future__ import annotations

import json
import time

import pytest

from aquabit import checksums
from aquabit.measuring.session import open_session
from aquabit.measuring.where import Where
from aquabit.scheme import AquabitError, Protocol
from aquabit.study import Study, merge
from aquabit.study_status import merge_status, start_plan, study_status
from aquabit.workflows import measure
from tests.conftest import tiny_pipeline
from tests.worlds import config, filled

PROTOCOL = Protocol(images=4, steps=1, micro_batch=4)
SPACE = {"schemes": ["usq2", "usq4", "usq8"]}
VALUES = "SELECT config, protocol, kind, status, reason, metrics FROM measurements ORDER BY rowid"
ROWS = {
    "measurements": VALUES,
    "outputs": "SELECT config, inputs, value FROM outputs ORDER BY config",
    **{
        t: f"SELECT * FROM {t} ORDER BY rowid"
        for t in ("configs", "protocols", "features", "flips", "thumbnails")
    },
}


def test_three_shards_joined_are_the_run_in_one_piece_bit_for_bit(tmp_path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "pipe")

    def made(name: str, shard: str | None) -> Study:
        study, pipe = Study(tmp_path / name), str(tmp_path / "pipe")
        measure(pipe, study, 7, protocol=PROTOCOL, space=SPACE, bank=str(tmp_path / "bank"), shard=shard)
        with open_session(pipe, study, where=Where(bank=str(tmp_path / "bank"))) as session:
            done = set(study.measurements().config)
            session.outputs([c for key, c in study.configs().items() if key in done])
        return study

    whole, parts = made("all.db", None), [made(f"{i}.db", f"{i}/3") for i in (1, 2, 3)]
    samples = [set(p.measurements(kind="sample").config) for p in parts]
    assert sorted(map(len, samples)) == [2, 2, 3] and len(set.union(*samples)) == 7
    assert [study_status(p).shard for p in parts] == ["1/3", "2/3", "3/3"] and merge_status(
        [study_status(p) for p in parts]
    ).missing == 0
    out = Study(tmp_path / "out.db")
    joined = merge(parts, out)
    assert joined == (12, 5, 0) and merge(parts, out).new == 0
    for table, query in ROWS.items():
        assert out._rows(query) == whole._rows(query) != [] or table == "flips", table
    assert (
        out.get("space") == whole.get("space")
        and out.get("graph") == whole.get("graph")
        and out.protocol == whole.protocol
    )


def test_what_is_measured_twice_counts_once_and_other_numbers_are_said(tmp_path) -> None:
    a, b = filled(tmp_path / "a.db", [1, 2]), filled(tmp_path / "b.db", [2, 3])
    out = Study(tmp_path / "c.db")
    assert merge([a, b], out) == (3, 1, 0) and len(out.measurements()) == 3
    b._db.execute(
        "UPDATE measurements SET metrics = ? WHERE config = ?", (json.dumps({"fid": 9.0}), config(2).digest)
    )
    assert merge([b], out) == (0, 2, 1), "the other number of 2 is said"
    assert out.measurements().set_index("config").fid[config(2).digest] == 2.0, "and the first one stays"


def test_what_does_not_belong_together_is_named_before_anything_is_written(tmp_path) -> None:
    a, out = filled(tmp_path / "a.db", [1]), Study(tmp_path / "out.db")
    others = {
        "other.db": ("g", {}, Protocol(), "is a study of model"),
        "steps.db": ("f", {}, Protocol(steps=20), "another protocol"),
        "space.db": ("f", {"x": 1}, Protocol(), "another search space"),
    }
    for name, (fingerprint, space, protocol, said) in others.items():
        other = Study(tmp_path / name)
        other.begin("model", fingerprint, {}, space, protocol)
        with pytest.raises(AquabitError, match=rf"{name} cannot be joined: .*a\.db.*{said}"):
            merge([a, other], out)
    with pytest.raises(AquabitError, match=r"empty\.db holds no model yet; it is empty"):
        merge([a, Study(tmp_path / "empty.db")], out)
    assert not len(out.measurements()) and "fingerprint" not in out


def test_standing_counts_what_is_missing_and_estimates_the_rest(tmp_path) -> None:
    study = filled(tmp_path / "s.db", [1])
    assert (study_status(study).missing, study_status(study).remaining) == (None, None)
    start_plan(study, 10, "random", "2/4", 8)
    filled(tmp_path / "s.db", [1, 2, 3, 4])
    now = time.time()
    for i, when in enumerate((now - 999, now - 60, now - 40, now - 20), 1):
        study._db.execute("UPDATE measurements SET created = ? WHERE config = ?", (when, config(i).digest))
    study._db.execute("DROP TABLE sums")
    checksums.start(study._db)  # what was changed here is as it should be
    found = study_status(study)
    assert (found.shard, found.measurements, found.failed, found.missing) == ("2/4", 4, 0, 5)
    assert (
        found.rate == pytest.approx(180)
        and found.remaining == pytest.approx(100)
        and 19 < (found.idle or 0) < 40
    )
    assert found.writer is None
    with study.writing():
        assert "process" in (study_status(Study(tmp_path / "s.db")).writer or "")
    both = merge_status([found, found])
    assert both.missing == 10 and both.rate == pytest.approx(360) and both.remaining == pytest.approx(100)


def test_what_was_drawn_at_random_for_a_check_is_known_after_joining(tmp_path) -> None:
    a, b = filled(tmp_path / "a.db", [1]), filled(tmp_path / "b.db", [2])
    plans = [{"swap": "usq4h:usq2h", "random": [["x", 0]]}, {"swap": "usq4h:usq2h", "random": [["y", 0]]}]
    a.set(validation_plan=plans[:1])
    b.set(validation_plan=plans)
    out = Study(tmp_path / "out.db")
    merge([a, b], out)
    merge([a, b], out)
    assert out.get("validation_plan") == plans
