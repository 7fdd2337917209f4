"""Files and folders that are written whole or not at all; the one place that writes over what a user
named."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aquabit.errors import AquabitError

PART = ".part"  # how names of what is being written end
OLD = ".old"  # in what is being written: what it takes the place of, until it does
YOUNG = 60  # seconds in which what is being written may not be locked yet


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends, and vanishes where it fails.

    Whoever reads meanwhile finds the whole old file or the whole new one. A link is followed, not replaced; a
    file keeps its mode, a new one has that of the umask; a device or a pipe is written to as it is. Raises
    AquabitError where it cannot be written, and passes on what the block raises.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file")
        special = mode is not None and not stat.S_ISREG(mode)
        folder = Path(tempfile.gettempdir()) if special else target.parent
        temporary = _part(folder, target.name)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        own = os.stat(temporary).st_mode if mode is None else mode  # of a new file: less what the umask takes
    except OSError as error:
        raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error
    except ValueError as error:
        raise AquabitError(f"{str(path)!r} is no name of a file ({error})") from error
    try:
        with _held(temporary):
            yield temporary
            if special:
                with open(temporary, "rb") as source, open(target, "wb") as device:
                    shutil.copyfileobj(source, device)
            else:
                os.chmod(temporary, stat.S_IMODE(own))  # safetensors makes files that only their owner reads
                temporary.replace(target)
    except OSError as error:
        raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(
    path: str | Path, instead_of: Iterable[str] = (), ours: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """A folder to write to, whose files are in ``path`` when the block ends, and vanish where it fails.

    A path that is not there yet comes to be at once. Where there is a folder, its files stay, but those that
    are written anew, which are replaced, and those that match a pattern of ``instead_of``, which are removed;
    only where the folder is one of ours (``ours`` of it is true), and all or none of them. Raises
    AquabitError where it cannot be written or others' files would be lost, and passes on what the block
    raises.
    """
    target = Path(os.path.realpath(path))
    may_replace = target.is_dir() and ours(target)
    try:
        there = target.exists()
        place = target if there else target.parent  # inside it: it may be a file system of its own
        place.mkdir(parents=True, exist_ok=True)
        clear(place, target.name)
        temporary = _part(place, target.name)
        temporary.mkdir()
    except OSError as error:
        raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error
    with _held(temporary):
        try:
            yield temporary
            _into(temporary, target, instead_of, may_replace)
        except OSError as error:
            raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _into(temporary: Path, target: Path, instead_of: Iterable[str], may_replace: bool) -> None:
    """Move what was written to where it belongs; where a file cannot be moved, all are back as they were."""
    if not target.exists():
        with suppress(OSError):  # another process was faster
            temporary.rename(target)
            return
    fresh = {target / f.relative_to(temporary): f for f in temporary.rglob("*") if not f.is_dir()}
    for own in fresh:  # before anything is touched
        if own.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{own} is a folder")
        if own.parent.resolve() != own.parent:
            raise AquabitError(
                f"{own.parent} leads to {own.parent.resolve()}, where files would be overwritten; choose"
                " another folder"
            )
    old = {f for pattern in instead_of for f in target.glob(pattern) if not f.is_dir()}
    old |= {own for own in fresh if own.exists() or own.is_symlink()}
    if old and not may_replace:
        raise AquabitError(
            f"{target} holds {min(old).relative_to(target)}, which was not written here before and would be"
            " lost; choose another folder"
        )
    moves = [(own, temporary / OLD / own.relative_to(target)) for own in sorted(old)]
    moves += [(file, own) for own, file in sorted(fresh.items(), reverse=True)]
    done = []
    try:
        for source, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            source.rename(place)
            done.append((source, place))
    except BaseException:
        for source, place in reversed(done):
            place.rename(source)
        raise


def check_apart(out: str | Path, source: str | Path, *, inside: bool = True) -> None:
    """Raise AquabitError where ``out`` is the place that ``source`` is read from, or lies in it; where
    ``inside``, also where ``source`` lies in ``out``. Links are followed; a source that is not there is
    nowhere."""
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if not origin.exists():
        return
    # a mount, or a file system without case, has two names for one place
    same = target == origin or (target.exists() and target.samefile(origin))
    if same or origin in target.parents or (inside and target in origin.parents):
        where = "is" if same else "lies in" if origin in target.parents else "holds"
        raise AquabitError(
            f"the output {out} {where} {'what' if same else 'the place that'} it is made from ({source}),"
            " which would be overwritten; choose another place"
        )


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Raise AquabitError where a file, or a ``folder`` with those above it, could not be written: before work
    is done whose result would be lost."""
    why = None
    try:
        target = Path(os.path.realpath(path))
        mode = _mode(target)
    except OSError as error:
        raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error
    except ValueError as error:
        raise AquabitError(f"{str(path)!r} is no name of a file ({error})") from error
    special = mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    place = target if special or (folder and mode is not None) else target.parent
    while folder and not place.exists():
        place = place.parent
    if not folder and mode is not None and stat.S_ISDIR(mode):
        why = "it is a folder; name a file"
    elif not special and place.exists() and not place.is_dir():
        why = f"{place} is a file; name another folder"
    elif not place.exists():
        why = f"there is no folder {place}; make it first"
    elif not os.access(place, os.W_OK):
        why = f"{place} may not be written to"
    if why is not None:
        raise AquabitError(f"{path} could not be written: {why}")


def _part(folder: Path, name: str) -> Path:
    """Where what is to be ``name`` is written meanwhile."""
    return folder / f".{name[:100]}.{os.getpid()}-{secrets.token_hex(4)}{PART}"


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock what is being written, for ``clear`` to see; where the file system has no locks, it stays."""
    held = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def clear(folder: Path, name: str | None = None) -> None:
    """Remove what processes that were killed began to write in a folder (as ``name``): whoever still writes
    holds a lock."""
    own = ".*" if name is None else re.escape(name[:100])
    pattern = re.compile(rf"\.{own}\.\d+-[0-9a-f]{{8}}{re.escape(PART)}", re.DOTALL)
    for path in [p for p in folder.iterdir() if pattern.fullmatch(p.name)]:
        with suppress(OSError):  # it is held, gone, or has no locks
            held = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > YOUNG:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(held)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, as ``writing`` does."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, as ``writing`` does."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def follow_umask(folder: Path, written: Iterable[Path]) -> None:
    """Let files that were ``written`` into a folder be read by whom the umask allows: some libraries make
    them private."""
    fresh = folder / f".{os.getpid()}-{secrets.token_hex(4)}.part"
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    allowed = stat.S_IMODE(os.stat(fresh).st_mode)
    fresh.unlink()
    for path in written:
        os.chmod(path, stat.S_IMODE(path.stat().st_mode) | allowed)


def _mode(path: Path) -> int | None:
    """Type and permissions of what is there, or None."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
