"""Files of a user's or a stranger's: read only where they are regular, replaced whole, by names that follow no link."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".part"
_ABANDONED = 3600.0  # seconds after which a scratch file is nobody's
_SCRATCH = re.compile(rf"\..+\.[0-9a-f]{{16}}\{_SUFFIX}")


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, opened for reading. A pipe would be waited for, a device may never end: neither is opened.

    Raises:
        OSError: it is missing, may not be read, or is no regular file.
    """
    file = open(path, "rb", opener=_open)  # noqa: SIM115 (the caller closes it)
    try:
        _check_regular(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def _open(path: str, flags: int) -> int:
    """Opening a pipe that nobody writes to returns, so that it can be looked at."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_regular(path: str | Path) -> bytes:
    """All of a regular file. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def _check_regular(mode: int, path: str | Path) -> None:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    kinds |= {stat.S_IFDIR: "a folder"}
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'no file')}; only regular files are read")


def replace(path: Path, content: bytes) -> None:
    """Write to a scratch file beside `path`, flush it to the disk, rename: `path` is whole, old or new.

    The scratch file is new and has a name nobody can foresee, so that neither another process writes the same nor a
    link that lies there is followed. A kill leaves it behind; `scratch_of` finds it.

    Raises:
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_SUFFIX}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def scratch_of(folder: Path) -> list[Path]:
    """Scratch files in a folder: of processes that write there now, or were killed while they wrote."""
    return [path for path in folder.glob(f".*{_SUFFIX}") if _SCRATCH.fullmatch(path.name)]


def remove_old_scratch(folder: Path) -> None:
    """Remove scratch files that nobody has written to for an hour: those of processes that were killed."""
    for path in scratch_of(folder):
        with suppress(FileNotFoundError):  # another process has renamed or removed it
            if time.time() - path.lstat().st_mtime > _ABANDONED:
                path.unlink()


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened to append to and made where it is missing; a link is not followed. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags, 0o666)
    with os.fdopen(handle, "ab") as file:
        _check_regular(os.fstat(handle).st_mode, path)
        yield file
