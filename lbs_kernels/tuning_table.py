"""Measured times per device, as JSON: `{"version": 1, "device": ..., "rows": {problem: {back end: seconds}}}`.

Tables shipped with the package lie in lbs_kernels/tuning/; those measured here lie in the user's cache folder
(`LBS_TUNING_DIR`, else `$XDG_CACHE_HOME/lbs/tuning`, else `~/.cache/lbs/tuning`) and win over the shipped ones.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lbs_kernels.device import cpu_name
from lbs_kernels.errors import FormatError
from lbs_kernels.problem import Problem

TABLE_VERSION = 1
SHIPPED = Path(__file__).with_name("tuning")


@dataclass
class TuningTable:
    """Median seconds by problem (its printed form) and back end, measured on one device."""

    device: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def merged(self, newer: TuningTable) -> TuningTable:
        """This table with the rows of `newer` on top; back ends of one problem are merged one by one.

        Raises:
            FormatError: tables of different devices.
        """
        if newer.device != self.device:
            raise FormatError(f"tables of {self.device} and {newer.device} do not merge; times belong to one device")
        rows = {key: dict(times) for key, times in self.rows.items()}
        for key, times in newer.rows.items():
            rows.setdefault(key, {}).update(times)
        return TuningTable(self.device, rows)


def slug(name: str) -> str:
    """A device name as a file name: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def device_slug(device: str) -> str:
    """The machine behind a device string: the processor's or the GPU's name as a file name ("nvidia-h200").

    Where the device is not there ("cuda" without a GPU), the string itself: it has no times.
    """
    kind = device.split(":")[0]
    if kind == "cpu":
        return slug(cpu_name())
    if kind == "cuda" and torch.cuda.is_available():
        return slug(torch.cuda.get_device_name(device))
    return slug(device)


def user_folder() -> Path:
    """Where tables measured on this machine are kept."""
    if "LBS_TUNING_DIR" in os.environ:
        return Path(os.environ["LBS_TUNING_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lbs" / "tuning"


def read(path: Path) -> TuningTable:
    """The table in one file.

    Raises:
        FormatError: not a table, a newer version, or times that are not positive numbers.
        FileNotFoundError: no such file.
    """
    text = path.read_text()
    try:
        body = json.loads(text)
        version, device, rows = body["version"], body["device"], body["rows"]
        table = TuningTable(str(device), {str(k): {str(b): float(t) for b, t in v.items()} for k, v in rows.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a tuning table ({error!r}); delete it and measure again") from error
    if version != TABLE_VERSION:
        raise FormatError(f"{path} has version {version}; this library reads {TABLE_VERSION}, measure again")
    for key, times in table.rows.items():
        for backend, seconds in times.items():
            if not (math.isfinite(seconds) and seconds > 0):
                raise FormatError(f"{path}: {key} on {backend} took {seconds} s; times are positive, measure again")
    return table


def write(path: Path, table: TuningTable) -> None:
    """Write the table whole or not at all: to a temporary name beside `path`, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"version": TABLE_VERSION, "device": table.device, "rows": table.rows}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(body, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    load.cache_clear()


@functools.cache
def load(device: str) -> TuningTable:
    """The shipped table of a device (its slug) with this machine's own measurements on top; may be empty."""
    table = TuningTable(device)
    for folder in (SHIPPED, user_folder()):
        path = folder / f"{device}.json"
        if path.exists():
            table = table.merged(read(path))
    return table


def times(problem: Problem) -> dict[str, float]:
    """Median seconds of each measured back end for `problem`, on the device the problem names."""
    return load(device_slug(problem.device)).rows.get(str(problem), {})
