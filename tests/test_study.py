from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from aquabit.scheme import AquabitError, Measurement, Protocol
from aquabit.study import Study, merge
from tests.worlds import COST, PROTOCOL, config, filled


def test_measurements_round_trip_and_stay_unique(tmp_path) -> None:
    study = filled(tmp_path / "s.db", [1, 2, 2])
    study.record(
        config(1), Measurement(config(1).digest, PROTOCOL.digest, {"fid": 99.0}, 1.0), "candidate", COST
    )
    failed = Measurement(
        config(3).digest, PROTOCOL.digest, {}, 1.0, status="failed", reason="2 of 8 images are not finite"
    )
    study.record(config(3), failed, "sample", COST)
    table = Study(tmp_path / "s.db").measurements()
    assert table.fid.tolist() == [1.0, 2.0] and table.bits.tolist() == [3.0, 3.0]
    everything = study.measurements(failed=True)
    assert everything.status.tolist() == ["ok", "ok", "failed"] and everything.reason.iloc[2].startswith(
        "2 of 8"
    )
    assert study.configs()[config(2).digest] == config(2)
    assert study.known(PROTOCOL) == {config(i).digest for i in (1, 2, 3)} and not study.known(
        PROTOCOL.block(1)
    )
    assert study.thumbnails()[config(1).digest, PROTOCOL.digest] == b"png"


def test_a_study_belongs_to_one_model_protocol_and_space(tmp_path) -> None:
    study = filled(tmp_path / "s.db", [1])
    with pytest.raises(AquabitError, match="is a study of model"):
        study.begin("other", "g", {}, {}, PROTOCOL)
    with pytest.raises(AquabitError, match="steps 10 instead of 20"):
        study.begin("model", "f", {}, {}, Protocol(steps=20))
    with pytest.raises(AquabitError, match="another search space"):
        study.begin("model", "f", {}, {"x": 1}, PROTOCOL)
    study.begin("renamed", "f", {}, {}, Protocol(objective="psnr"))
    assert study.protocol.objective == "psnr"


def test_fits_of_one_study_are_of_one_kind(tmp_path) -> None:
    """A study of before data-free fits had gain 1 is read and joined, and not measured further."""
    plain, calibrated = ({"choices": {"a": [text, "usq8", "usq4h"]}} for text in ("vq3", "usq3h"))
    old, new, other = (Study(tmp_path / f"{name}.db") for name in ("old", "new", "other"))
    for study in (old, new):
        study.begin("model", "f", {}, plain, PROTOCOL)
    with old._transaction() as db:
        db.execute("DELETE FROM facts WHERE name = 'fits'")
    assert (old.fits, new.fits) == (1, 2)
    new.begin("model", "f", {}, plain, PROTOCOL)
    with pytest.raises(AquabitError, match=r"other fits of vq3 than this version makes.*another file"):
        old.begin("model", "f", {}, plain, PROTOCOL)
    with pytest.raises(AquabitError, match=r"cannot be joined.*other fits of vq3"):
        merge([new], old)
    assert merge([old], other).new == 0 and other.fits == 1
    old.set(space=calibrated)
    old.begin("model", "f", {}, calibrated, PROTOCOL)  # nothing in it is fitted otherwise


def test_flips_pair_up(tmp_path) -> None:
    study = filled(tmp_path / "s.db", [1, 2])
    study.add_swap("layer1", "usq4", "usq2", config(1).digest, config(2).digest, PROTOCOL)
    study.add_swap("layer1", "usq4", "usq2", config(1).digest, "not measured", PROTOCOL)
    table = study.swaps("fid")
    assert (table.value_before.tolist(), table.value_after.tolist()) == ([1.0], [2.0])


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.9])
def test_truncated_files_are_named(tmp_path, keep: float) -> None:
    path = tmp_path / "s.db"
    filled(path, range(200)).close()
    data = path.read_bytes()
    path.write_bytes(
        data[: int(len(data) * keep)]
        if keep
        else b"this is no database, but it is long enough to have a header" * 3
    )
    with pytest.raises(AquabitError, match=r"s\.db") as caught:
        Study(path).measurements()
    assert "\n" not in str(caught.value)


def test_other_files_are_no_studies(tmp_path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE x(y)")
    with pytest.raises(AquabitError, match="not a study"):
        Study(path)
    with pytest.raises(AquabitError, match="there is no study"):
        Study(tmp_path / "missing.db", create=False)
    with pytest.raises(AquabitError, match="does not exist"):
        Study(tmp_path / "no" / "folder.db")
    with pytest.raises(AquabitError, match="is a folder; name the file of a study"):
        Study(tmp_path)


def test_reading_makes_no_study_of_an_empty_file(tmp_path) -> None:
    (path := tmp_path / "empty.db").write_bytes(b"")
    with pytest.raises(AquabitError, match=r"empty\.db is empty, and no study"):
        Study(path, create=False)
    assert [p.name for p in tmp_path.iterdir()] == ["empty.db"] and not path.stat().st_size


def test_what_cannot_be_joined_leaves_no_file(tmp_path) -> None:
    one, other = (
        filled(tmp_path / "a.db", [1]),
        filled(tmp_path / "b.db", [2], replace(PROTOCOL, steps=PROTOCOL.steps + 1)),
    )
    with pytest.raises(AquabitError, match=r"b\.db cannot be joined"):
        merge([one, other], tmp_path / "out.db")
    assert not (tmp_path / "out.db").exists()
    assert merge([one], tmp_path / "out.db").new == 1 == len(Study(tmp_path / "out.db").measurements())


def test_a_second_writer_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "s.db"
    filled(path, [1])
    code = (
        "import sys, time; from aquabit.study import Study\nwith Study(sys.argv[1]).writing():\n   "
        " print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(AquabitError, match=f"process {other.pid}"):
            filled(path, [5])
        assert len(Study(path).measurements()) == 1, "readers are not refused"
    finally:
        other.kill()
        other.wait()
    assert len(filled(path, [5]).measurements()) == 2, "a killed writer holds nothing"


def test_a_full_disk_loses_nothing(tmp_path) -> None:
    study = filled(tmp_path / "s.db", range(3))
    study._db.execute(f"PRAGMA max_page_count = {study._db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(AquabitError, match="free some space"):  # noqa: PT012
        for i in range(3, 3000):
            study.record(
                config(i),
                Measurement(config(i).digest, PROTOCOL.digest, {"fid": float(i)}, 1.0),
                "sample",
                COST,
                b"x" * 5000,
            )
    study.close()
    again = Study(tmp_path / "s.db")
    kept = again.measurements().fid.tolist()
    assert kept[:3] == [0.0, 1.0, 2.0] and kept == sorted(kept)
    assert len(filled(tmp_path / "s.db", [5000]).measurements()) == len(kept) + 1


def test_killed_at_random_instants_every_recorded_measurement_is_whole(tmp_path) -> None:
    path = tmp_path / "s.db"
    code = """if True:
        import sys
        sys.path.insert(0, ".")
        from tests.worlds import *
        s = filled(sys.argv[1], [])
        k = len(s.measurements(failed=True))
        for i in range(k, 100000):
            filled(sys.argv[1], []) if i % 50 == 0 else None
            measured = Measurement(config(i).digest, PROTOCOL.digest, {"fid": float(i)}, 1.0)
            s.record(config(i), measured, "sample", COST, b"x" * 3000)
            print("go", flush=True) if i == k else None
    """
    counts = []
    for i in range(5):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(0.05 + 0.07 * i)
        process.kill()
        process.wait()
        table = Study(path).measurements()
        assert table.fid.tolist() == [float(k) for k in range(len(table))]
        counts.append(len(table))
    assert counts == sorted(counts) and counts[-1] >= 5


def test_hidden_rows_come_to_light_in_the_order_of_asking(tmp_path) -> None:
    study = filled(tmp_path / "s.db", [1])
    study.hide_after(study.last_row())
    first, second, never = (config(i).digest for i in (2, 3, 4))
    study.show([first], PROTOCOL.digest)
    study.show([second, first], PROTOCOL.digest)
    filled(tmp_path / "s.db", [1, 3, 4, 2])  # as workers finished
    assert study.measurements().config.tolist() == [config(1).digest, first, second]
    assert never in study.known(PROTOCOL)
    study.hide_after(None)
    assert study.measurements().config.tolist() == [config(1).digest, second, never, first]


CHANGES = (
    "UPDATE measurements SET metrics = replace(metrics, '1.0', '1.5') WHERE rowid = 1",
    "UPDATE measurements SET seconds = 0.125 WHERE rowid = 2",
    "UPDATE measurements SET rowid = 9 WHERE rowid = 1",
    "DELETE FROM measurements WHERE rowid = 3",
    "DELETE FROM measurements WHERE rowid = 1",
    "INSERT INTO measurements SELECT 'x', protocol, kind, status, reason, metrics, seconds, environment,"
    " created FROM measurements LIMIT 1",
    "UPDATE configs SET bits = 2.0 WHERE rowid = 1",
    "UPDATE facts SET value = '\"other\"' WHERE name = 'model'",
    "DELETE FROM facts WHERE name = 'model'",
    "UPDATE features SET value = '{}'",
    "UPDATE thumbnails SET png = x'00' WHERE rowid = 1",
    "UPDATE sums SET sum = x'00' WHERE tab = 'configs'",
    "DELETE FROM sums WHERE tab = 'measurements'",
    "DROP TABLE sums",
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_is_not_what_was_written_is_noticed(tmp_path, change: str) -> None:
    study = filled(tmp_path / "s.db", [1, 2, 3])
    study.add_features({("layer1", "usq4"): {"error": 0.25}})
    study.add_features({("layer1", "usq4"): {"error": 0.5}})  # replaced: not a change
    study.set(model="model")
    study.close()
    Study(tmp_path / "s.db").close()
    with sqlite3.connect(tmp_path / "s.db") as db:
        assert db.execute(change).rowcount
    db.close()
    with pytest.raises(AquabitError, match=r"is damaged .* restore a copy"):
        Study(tmp_path / "s.db")


def test_a_file_without_checksums_gets_them_when_it_is_written(tmp_path) -> None:
    path = tmp_path / "s.db"
    filled(path, [1, 2, 3]).close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE sums")
        db.execute("PRAGMA user_version = 1")
    db.close()
    study = Study(path)  # reading leaves it as it is
    assert not study._rows("SELECT 1 FROM sqlite_master WHERE name = 'sums'")
    study.set(model="model")
    assert study._rows("PRAGMA user_version") == [(2,)] and len(study._rows("SELECT * FROM sums")) > 9
    study.close()
    with sqlite3.connect(path) as db:
        db.execute(CHANGES[0])
    db.close()
    with pytest.raises(AquabitError, match="row 1 of measurements is not what was written"):
        Study(path)


def test_checksums_outlive_a_vacuum(tmp_path) -> None:
    study = filled(tmp_path / "s.db", range(20))
    study._db.execute("VACUUM")
    study.close()
    assert len(Study(tmp_path / "s.db").measurements())


def test_of_features_the_one_that_says_more_is_joined(tmp_path) -> None:
    cells = [("layer1", s) for s in ("usq2", "usq3", "usq4")]
    fits, gradients, probes = {"error": 0.5}, {"error": 0.5, "damage": 2.0, "gradient": True}, {"damage": 3.0}
    first, second = (filled(tmp_path / name, [1]) for name in ("a.db", "b.db"))
    first.add_features(dict(zip(cells, (fits, gradients, probes), strict=True)))
    second.add_features(dict(zip(cells, (gradients, probes, gradients), strict=True)))
    out = Study(tmp_path / "out.db")
    merge([first, second], out)
    assert [out.features()[c]["damage"] for c in cells] == [2.0, 3.0, 3.0]
    merge([first], out)
    assert [out.features()[c]["damage"] for c in cells] == [2.0, 3.0, 3.0]
