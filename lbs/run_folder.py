"""RunFolder: where a run keeps its files, each written so that a kill or a full disk never damages what was there.

config.json          what was asked for, one section per phase      metrics.jsonl   one row per log line and epoch
environment.json     versions and machine of the last command       results.json    one section per command
checkpoints/         where each phase can go on                     plan.json       bits and kept filters
float.safetensors    searched.safetensors    model.safetensors      weights after each phase
*.lbs.safetensors    the packed network      report.html, *.svg     the report
lock                 who writes here, while somebody does

Every file that is read again carries a hash of what it holds, which is compared then: each section of config.json, each
row of metrics.jsonl, the other files as a whole. It tells damage and edits, not who made a file. Earlier releases gave
some files none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lbs_kernels import device, files
from lbs_kernels.errors import CheckpointError


def writes() -> bool:
    """Whether this process writes files: of several that train together only rank 0 does."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: see `files.replace`. Nothing where `writes` is false.

    Raises:
        CheckpointError: the disk is full or not writable; the file that was there before is untouched.
    """
    if not writes():
        return
    try:
        files.replace(path, content)
    except OSError as error:
        raise _not_written(path, f"({len(content)} bytes)", error) from error


def check_place(path: Path) -> None:
    """Raises CheckpointError where `write_bytes` could not write: a folder, or a place without leave."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _not_written(path, "(the result)", error) from error


def _not_written(path: Path, what: str, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "make room, then do it again, training with resume=True"
    return CheckpointError(
        f"{path} could not be written {what}: {error}; what was saved before is untouched: "
        + (way_out if full else "give a path that can be written")
    )


def write_json(path: Path, body: Any) -> None:
    """Indented JSON, written like `write_bytes`."""
    write_bytes(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, as a dictionary. Raises CheckpointError where it is missing or damaged."""
    try:
        body = json.loads(files.read_regular(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is this a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; restore it, or start the run in a new folder") from error
    if not isinstance(body, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(body).__name__}, no object; restore it, or start the run in a new folder"
        )
    return body


def read_sections(path: Path) -> dict[str, Any]:
    """The objects of a JSON file by name; other values than objects are numbers of versions. Empty where it is missing.

    Raises CheckpointError where it is damaged.
    """
    sections = read_sealed(path) if path.exists() else {}
    for name, body in sections.items():
        if not isinstance(body, dict) and name != "version":
            raise CheckpointError(
                f"{path}: section {name!r} is a {type(body).__name__}, no object; restore it, or start the run in a "
                "new folder"
            )
    return sections


def write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Like `write_json`, with a hash of the body, which `read_sealed` compares."""
    write_json(path, sealed(body))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises CheckpointError where it is missing, damaged or edited."""
    return unsealed(read_json(path), str(path))


def sealed(body: dict[str, Any]) -> dict[str, Any]:
    """`body`, as JSON holds it, with a `hash` of it, which `unsealed` compares."""
    plain = json.loads(json.dumps(body, allow_nan=False))
    return {**plain, "hash": _hash(plain)}


def unsealed(body: dict[str, Any], origin: str) -> dict[str, Any]:
    """`body` without its hash; files of earlier releases have none. Raises CheckpointError where it does not fit."""
    found = {key: value for key, value in body.items() if key != "hash"}
    if "hash" in body and body["hash"] != _hash(found):
        raise CheckpointError(
            f"{origin} was edited by hand (hash {body['hash']}, it holds {_hash(found)}); restore it, or start in a "
            "new run folder"
        )
    return found


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def commit() -> str | None:
    """The git commit of the sources that run, with a `+` where they differ from it; None where they are not in git."""
    here = Path(__file__).resolve()
    questions = (
        ["ls-files", "--error-unmatch", str(here)],  # an installed copy may lie inside somebody else's repository
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", "lbs", "lbs_kernels", "csrc"],
    )
    try:
        answers = [
            subprocess.run(["git", *q], capture_output=True, text=True, cwd=here.parents[1], check=True).stdout.strip()
            for q in questions
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[1] + ("+" if answers[2] else "")


def environment() -> dict[str, Any]:
    """Versions and machine, for the record beside every result."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": device.cpu_name(),
        "isa": device.default_isa(),
        "processors": device.processors(),
        "threads": torch.get_num_threads(),
        "gpu": device.gpu_name(),
        "commit": commit(),
        "command": " ".join(["lbs", *sys.argv[1:]]),
    }


_held: dict[Path, int] = {}  # folders this process writes to -> how often they are held


class RunFolder:
    """Paths and small files of one run.

    named: the functions, as `module:function`, that the user named for this command. No other is called that a file of
    the folder names: it may be a stranger's.
    """

    def __init__(self, path: str | Path, named: Collection[str] = ()) -> None:
        self.path = Path(path)
        self.named = frozenset(named)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, this process alone writes to the folder; of several that train together rank 0 holds it for all.

        The system lets go of the lock of a process that has ended, however it ended.

        Raises:
            CheckpointError: another process writes there now; it is named.
        """
        place = self.path.resolve()
        if not writes() or place in _held:
            yield
            return
        handle = self._lock()
        _held[place] = handle
        try:
            for folder in (self.path, self.file("checkpoints")):
                files.remove_old_scratch(folder)  # not newer ones: some write here without holding the folder
            yield
        finally:
            del _held[place]
            with suppress(OSError):
                os.truncate(handle, 0)
            os.close(handle)

    def _lock(self) -> int:
        """The descriptor of `lock`, locked, with this process named in it."""
        path = self.file("lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _not_written(path, "(the lock of the run)", error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 1 << 10, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise CheckpointError(
                f"{self.path} is written by {holder} now; wait until that has ended, or give a run folder of its own"
            ) from error
        except OSError as error:
            os.close(handle)
            raise _not_written(path, "(the lock of the run)", error) from error
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        os.truncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} of {socket.gethostname()}, since {now}\n".encode(), 0)
        return handle

    def file(self, name: str) -> Path:
        """A file of the folder."""
        return self.path / name

    def checkpoint(self, phase: str) -> Path:
        """Where `phase` can go on."""
        return self.path / "checkpoints" / f"{phase}.safetensors"

    def best(self, phase: str) -> Path:
        """The best weights of `phase` by test accuracy."""
        return self.path / "checkpoints" / f"{phase}-best.safetensors"

    def note_environment(self) -> None:
        """Versions and machine of the command that works here now."""
        write_sealed(self.file("environment.json"), environment())

    def results(self) -> dict[str, Any]:
        """All sections of results.json; empty before the first."""
        return read_sections(self.file("results.json"))

    def add_result(self, section: str, body: dict[str, Any], stale: Collection[str] = ()) -> None:
        """Replace one section of results.json and drop those that told of what this one replaces.

        Values that are not finite become null. Raises CheckpointError where another process writes to the folder.
        """
        with self.held():
            kept = {name: found for name, found in self.results().items() if name not in stale}
            write_sealed(self.file("results.json"), {**kept, section: _finite(body)})

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line to metrics.jsonl. Values that are not finite become null. Raises CheckpointError on a full disk."""
        if not writes():
            return
        path = self.file("metrics.jsonl")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with files.appending(path) as file:
                file.write(_line(row).encode())
        except OSError as error:
            raise _not_written(path, "(one row)", error) from error

    def keep_metrics(self, phase: str, steps: int) -> None:
        """Forget the rows of `phase` beyond the checkpoint it goes on from, so that none comes twice."""
        path = self.file("metrics.jsonl")
        if path.exists():
            kept = [row for row in self.metrics() if row.get("phase") != phase or row["step"] <= steps]
            write_bytes(path, "".join(_line(row) for row in kept).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """All rows; a last line cut short by a kill is left out."""
        path = self.file("metrics.jsonl")
        rows: list[dict[str, Any]] = []
        if not path.exists():
            return rows
        try:
            lines = files.read_regular(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; restore it, or delete it to go without") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{line} is no object")
                if type(row.get("step", 0)) is not int:
                    raise ValueError(f"its step is {row['step']!r}, no whole number")
                rows.append(unsealed(row, f"{path}, line {number}"))
            except ValueError as error:
                if number == len(lines):
                    break
                raise CheckpointError(f"{path}, line {number} is not JSON: {error}; delete that line") from error
        return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(sealed(_finite(row)), separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
