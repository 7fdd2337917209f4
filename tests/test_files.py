"""Files are written whole or not at all, over links and devices too."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from aquabit.errors import AquabitError
from aquabit.files import (
    check_apart,
    check_writable,
    clear,
    follow_umask,
    write_bytes,
    write_text,
    writing,
    writing_folder,
)


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    with open(path) as reader:
        write_text(path, "né")
        assert reader.read() == "old"  # whoever reads has the whole old file
    assert path.read_text(encoding="utf-8") == "né" and path.stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "new"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(AquabitError, match="could not be written: No space"), writing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(AquabitError, match="could not be written: it is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(AquabitError, match="No such file"):
        write_text(tmp_path / "missing" / "a", "x")


def test_what_libraries_make_private_can_be_read_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with writing(tmp_path / "tensors") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        (tmp_path / "model").mkdir()
        private = tmp_path / "model" / "weights"
        os.close(os.open(private, os.O_CREAT | os.O_WRONLY, 0o600))
        own = tmp_path / "own"
        os.close(os.open(own, os.O_CREAT | os.O_WRONLY, 0o600))
        follow_umask(tmp_path, [private])
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "tensors", private)] == [0o644, 0o644]
    assert own.stat().st_mode & 0o777 == 0o600, "what others put there stays private"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "own", "tensors"]


def test_names_that_no_file_has_are_named(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises(AquabitError, match="is no name of a file"):
            write_text(str(tmp_path / name), "x")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("real")
    write_text(link, "new")
    assert link.is_symlink() and (tmp_path / "real").read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to("later")
    write_text(dangling, "new")
    assert dangling.is_symlink() and (tmp_path / "later").read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(10)
    assert found == ["through"] and pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_comes_to_be_at_once(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with writing_folder(out) as made:
        (made / "part").mkdir()
        (made / "part" / "a").write_text("new")
        assert not out.exists()
    assert (out / "part" / "a").read_text() == "new" and [p.name for p in out.parent.iterdir()] == ["out"]
    (out / "mine").write_text("kept")
    (out / "part" / "b.old").write_text("of an older one")

    def fail() -> None:
        with writing_folder(out, ["part/*"]) as made:
            (made / "half").write_text("half")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    with writing_folder(out, ["part/*.old"], lambda _: True) as made:
        (made / "part").mkdir()
        (made / "part" / "a").write_text("newer")
    found = {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert found == {"mine": "kept", "part/a": "newer"} and [p.name for p in out.parent.iterdir()] == ["out"]


def test_what_the_killed_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    left, folder, held, young = (
        tmp_path / f".{n}.1-0123abcd.part" for n in ("left", "folder", "held", "young")
    )
    folder.mkdir()
    (folder / "x").touch()
    for path in (left, held, young):
        path.touch()
    for path in (left, held, folder):
        os.utime(path, (0, 0))
    with open(held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [held.name, young.name]
    clear(tmp_path, "other")
    assert held.exists()
    clear(tmp_path, "held")
    assert not held.exists()


def test_a_folder_that_is_there_stays_the_same_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    before = out.stat()
    with writing_folder(out) as made:
        (made / "a").write_text("new")
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert [p.name for p in out.iterdir()] == ["a"]


def test_files_of_others_are_never_replaced_and_old_ones_only_with_all_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "part").mkdir(parents=True)
    for name in ("part/a", "part/b", "z"):
        (out / name).write_text("old")

    def write(ours: bool) -> None:
        with writing_folder(out, ["part/b"], lambda _: ours) as made:
            (made / "part").mkdir()
            for name in ("part/a", "part/new", "z"):
                (made / name).write_text("new")

    def found() -> dict[str, str]:
        return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}

    before = found()
    with pytest.raises(AquabitError, match="out holds part/a, which was not written here before"):
        write(False)
    assert found() == before
    move, moved = Path.rename, []

    def fails_late(self: Path, target: Path) -> Path:
        moved.append(self)
        if len(moved) == 5:
            raise PermissionError(13, "Permission denied")
        return move(self, target)

    monkeypatch.setattr(Path, "rename", fails_late)
    with pytest.raises(AquabitError, match="could not be written: Permission denied"):
        write(True)
    assert found() == before, "what was moved is back"
    monkeypatch.undo()
    write(True)
    assert found() == {"part/a": "new", "part/new": "new", "z": "new"}


def test_a_part_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part").symlink_to(tmp_path / "other")

    def write() -> None:
        with writing_folder(tmp_path / "out") as made:
            (made / "part").mkdir()
            (made / "part" / "a").write_text("new")

    with pytest.raises(AquabitError, match=r"part leads to .*other, where files would be overwritten"):
        write()
    assert not list((tmp_path / "other").iterdir())


def test_an_output_lies_apart_from_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for out, said in (
        (model, "is what"),
        (tmp_path / "link", "is what"),
        (".", "is what"),
        ("part/..", "is what"),
        (tmp_path / "link" / "new", "lies in"),
        ("..", "holds"),
    ):
        with pytest.raises(AquabitError, match=f"the output .* {said} .*would be overwritten"):
            check_apart(out, model)
    check_apart("..", model, inside=False)
    check_apart(tmp_path / "models" / "model2", model)
    check_apart(model, tmp_path / "an id of the hub")


def test_nothing_of_a_folder_is_touched_where_a_part_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "z").mkdir(parents=True)
    (out / "old").write_text("old")

    def write() -> None:
        with writing_folder(out, ["old"], lambda _: True) as made:
            (made / "a").write_text("new")
            (made / "z").write_text("a folder stands there")

    with pytest.raises(AquabitError, match="is a folder"):
        write()
    assert sorted(p.name for p in out.iterdir()) == ["old", "z"]


def test_only_what_is_being_written_is_cleared(tmp_path: Path) -> None:
    names = [
        ".out.bak.part",
        ".out.v2.1-0123abcd.part",
        ".out.1-0123abcd.part",
        f".{'x' * 100}.1-0123abcd.part",
    ]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    clear(tmp_path, "out")
    clear(tmp_path, "x" * 150)
    assert sorted(p.name for p in tmp_path.iterdir()) == names[:2]


def test_where_there_are_no_locks_files_are_written_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    write_text(tmp_path / "a", "a")
    left = tmp_path / ".b.1-0123abcd.part"
    left.touch()
    os.utime(left, (0, 0))
    clear(tmp_path)
    assert left.exists() and (tmp_path / "a").read_text() == "a"


def test_what_could_not_be_written_is_said_before_work_is_done(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("new", "file", "link", "folder/new"):
        check_writable(tmp_path / name)
    for name in ("new", "new/deep/er", "folder", "folder/new"):
        check_writable(tmp_path / name, folder=True)
    check_writable("/dev/null")
    for name, folder, said in (
        ("folder", False, "it is a folder; name a file"),
        ("new/deep", False, "there is no folder .*new; make it first"),
        ("file/new", False, "Not a directory"),
        ("file", True, "file is a file; name another folder"),
        ("file/new", True, "Not a directory"),
        ("x" * 300, False, "File name too long"),
        ("a\0b", False, "is no name of a file"),
    ):
        with pytest.raises(AquabitError, match=said):
            check_writable(tmp_path / name, folder=folder)
    if os.geteuid():
        (tmp_path / "folder").chmod(0o500)
        for name, folder in (("folder/new", False), ("folder/new", True), ("folder", True)):
            with pytest.raises(AquabitError, match="folder may not be written to"):
                check_writable(tmp_path / name, folder=folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]
