"""RunFolder: where a run keeps its files, each written so that a kill or a full disk never damages what was there.

config.json          what was asked for, one section per phase      metrics.jsonl   one row per log line and epoch
environment.json     versions and machine of the last command       results.json    one section per command
checkpoints/         where each phase can go on                     plan.json       bits and kept filters
float.safetensors    searched.safetensors    model.safetensors      weights after each phase
*.lbs.safetensors    the packed network      report.html, *.png     the report
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lbs_kernels import device
from lbs_kernels.errors import CheckpointError


def writes() -> bool:
    """Whether this process writes files: of several that train together only rank 0 does."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush to the disk, rename. Nothing where `writes` is false.

    Raises:
        CheckpointError: the disk is full or not writable; the file that was there before is untouched.
    """
    if not writes():
        return
    scratch = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise _not_written(path, f"({len(content)} bytes)", error) from error
    finally:
        with contextlib.suppress(OSError):  # after a success it is gone already
            scratch.unlink(missing_ok=True)


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
        body = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; is this a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; restore it, or start the run in a new folder") from error
    if not isinstance(body, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(body).__name__}, no object; restore it, or start the run in a new folder"
        )
    return body


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


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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
        write_json(self.file("environment.json"), environment())

    def results(self) -> dict[str, Any]:
        """All sections of results.json; empty before the first."""
        path = self.file("results.json")
        return dict(read_json(path)) if path.exists() else {}

    def add_result(self, section: str, body: dict[str, Any], stale: Collection[str] = ()) -> None:
        """Replace one section of results.json and drop those that told of what this one replaces.

        Values that are not finite become null.
        """
        kept = {name: found for name, found in self.results().items() if name not in stale}
        write_json(self.file("results.json"), {**kept, section: _finite(body)})

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line to metrics.jsonl. Values that are not finite become null. Raises CheckpointError on a full disk."""
        if not writes():
            return
        path = self.file("metrics.jsonl")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(_line(row))
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
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is no text: {error}; restore it, or delete it to go without") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{line} is no object")
                rows.append(row)
            except ValueError as error:
                if number == len(lines):
                    break
                raise CheckpointError(f"{path}, line {number} is not JSON: {error}; delete that line") from error
        return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
