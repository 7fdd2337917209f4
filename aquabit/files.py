"""Files that are written whole or not at all; the one place that writes over what a user named."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aquabit.errors import AquabitError


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
        temporary = folder / f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.part"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        own = os.stat(temporary).st_mode if mode is None else mode  # of a new file: less what the umask takes
    except OSError as error:
        raise AquabitError(f"{path} could not be written: {error.strerror or error}") from error
    except ValueError as error:
        raise AquabitError(f"{str(path)!r} is no name of a file ({error})") from error
    try:
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
