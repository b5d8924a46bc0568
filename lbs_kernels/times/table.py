"""Measured times per device, as JSON.

    {"version": 2, "device": ..., "rows": {problem: {implementation: seconds}},
     "roofs": {implementation: multiply-adds per second}, "calls": {packed network: {implementation: seconds}}}

An implementation is a back end or a family of kernels, with its configuration where it has one: "reference",
"cpu:t2" (two threads), "cpu/winograd:t2" (of a convolution, by which algorithm), "triton:elementwise_m32_c32_w4",
"cuda:...", "fp16:torch". Problems are keyed by `key`: their batch is a bucket, their device without an index. Roofs are
what a matrix product of bytes reaches (`lbs_kernels.tune.roof`); calls are of whole networks, by the name their owner
gives them. Older files have neither.

Tables shipped with the package lie in lbs_kernels/tuning/; those measured here lie in the user's cache folder
(`LBS_TUNING_DIR`, else `$XDG_CACHE_HOME/lbs/tuning`, else `~/.cache/lbs/tuning`) and win over the shipped ones.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lbs_kernels import files
from lbs_kernels.device import cpu_name
from lbs_kernels.errors import FormatError
from lbs_kernels.program.problem import Problem

TABLE_VERSION = 2
SHIPPED = Path(__file__).parents[1] / "tuning"
MAX_BUCKET = 20  # 2^20 images or rows
NEIGHBOURS = 2  # a configuration is trusted up to a factor of 4 beside the batch it was measured at
_AGAIN = "measure again: lbs_kernels.tune.tuner.tune, in a shell lbs tune"


@dataclass
class TuningTable:
    """Seconds by problem (its `key`) and implementation, measured on one device.

    Medians on a GPU. On a processor the 20th percentile of what was measured, which others at work disturb least.
    roofs: multiply-adds per second by implementation. calls: seconds of whole networks, as `rows`.
    """

    device: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    roofs: dict[str, float] = field(default_factory=dict)
    calls: dict[str, dict[str, float]] = field(default_factory=dict)

    def merged(self, newer: TuningTable) -> TuningTable:
        """This table with the rows of `newer` on top; implementations of one problem are merged one by one.

        Raises:
            FormatError: tables of different devices.
        """
        if newer.device != self.device:
            raise FormatError(f"tables of {self.device} and {newer.device} do not merge; times belong to one device")
        rows, calls = _together(self.rows, newer.rows), _together(self.calls, newer.calls)
        return TuningTable(self.device, rows, {**self.roofs, **newer.roofs}, calls)


def _together(older: dict[str, dict[str, float]], newer: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    rows = {key: dict(times) for key, times in older.items()}
    for key, times in newer.items():
        rows.setdefault(key, {}).update(times)
    return rows


def bucket(batch: int) -> int:
    """The power of two nearest to `batch` by ratio: what tables are measured at. The one place of the rule.

    >>> [bucket(n) for n in (1, 2, 3, 5, 6, 100, 256)]
    [1, 2, 4, 4, 8, 128, 256]
    """
    return 1 << max(0, round(math.log2(max(1, batch))))


def key(problem: Problem, batch: int | None = None) -> str:
    """The printed problem at a bucket (its own unless given), on a device without an index."""
    return str(replace(problem, batch=bucket(problem.batch if batch is None else batch), device=kind(problem.device)))


def kind(device: str) -> str:
    """The type of a device string: "cuda" of "cuda:1"."""
    return device.split(":")[0]


def family(implementation: str) -> str:
    """The back end or family of kernels of a row: "triton" of "triton:m64_o64"."""
    return implementation.partition(":")[0]


def native(threads: int, algorithm: str = "") -> str:
    """The native kernels as an implementation: "cpu:t2", "cpu/winograd:t2" where a step names its algorithm."""
    return f"cpu/{algorithm}:t{threads}" if algorithm else f"cpu:t{threads}"


def is_native(implementation: str, threads: int) -> bool:
    """Whether it is the native kernels with so many threads, by whatever algorithm."""
    return threads_of(implementation) == threads


def threads_of(implementation: str) -> int | None:
    """The threads of the native kernels by any algorithm; None of other implementations."""
    back_end, _, configuration = implementation.partition(":")
    native = back_end.partition("/")[0] == "cpu" and re.fullmatch(r"t\d+", configuration)
    return int(configuration[1:]) if native else None


def slug(name: str) -> str:
    """A device name as a file name: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def device_slug(device: str) -> str:
    """The machine behind a device string: the processor's or the GPU's name as a file name ("nvidia-h200").

    Where the device is not there ("cuda" without a GPU), the string itself: it has no times.
    """
    if kind(device) == "cpu":
        return slug(cpu_name())
    if kind(device) == "cuda" and torch.cuda.is_available():
        return slug(torch.cuda.get_device_name(device))
    return slug(device)


def user_folder() -> Path:
    """Where tables measured on this machine are kept."""
    if "LBS_TUNING_DIR" in os.environ:
        return Path(os.environ["LBS_TUNING_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lbs" / "tuning"


def user_path(device: str) -> Path:
    """The file of this machine's own measurements of a device (its slug)."""
    return user_folder() / f"{device}.json"


def read(path: Path) -> TuningTable:
    """The table in one file.

    Raises:
        FormatError: not a table, another version, or times that are not positive numbers.
        FileNotFoundError: no such file.
    """
    content = files.read_regular(path)
    try:
        body = json.loads(content)
        version, device = body["version"], body["device"]
        roofs = {str(name): float(rate) for name, rate in body.get("roofs", {}).items()}
        rows, calls = _times(body["rows"]), _times(body.get("calls", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a tuning table ({error!r}); delete it and {_AGAIN}") from error
    if version != TABLE_VERSION:
        raise FormatError(f"{path} has version {version}; this library reads {TABLE_VERSION}, delete it and {_AGAIN}")
    for row, measured in (*rows.items(), *calls.items()):
        for implementation, time in measured.items():
            if not (math.isfinite(time) and time > 0):
                raise FormatError(f"{path}: {row} on {implementation} took {time} s; times are positive, {_AGAIN}")
    for implementation, rate in roofs.items():
        if not (math.isfinite(rate) and rate > 0):
            raise FormatError(f"{path}: the roof of {implementation} is {rate}; rates are positive, {_AGAIN}")
    return TuningTable(str(device), rows, roofs, calls)


def _times(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {str(row): {str(name): float(time) for name, time in measured.items()} for row, measured in rows.items()}


def add(newer: TuningTable) -> Path:
    """Put rows into this machine's table of their device; the path. What other processes put there meanwhile stays.

    Raises:
        FormatError: the table that is there cannot be read.
    """
    path = user_path(newer.device)
    with locked(path):
        write(path, read(path).merged(newer) if path.exists() else newer)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process that asks for it changes `path`: whoever reads, merges and writes loses nothing.

    The lock is a file beside it, which stays; the system lets go of it when its process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, table: TuningTable) -> None:
    """Write the table whole or not at all."""
    write_json(path, {"version": TABLE_VERSION, **asdict(table)})
    forget()


def write_json(path: Path, body: Any) -> None:
    """Write a file whole or not at all: see `files.replace`."""
    files.replace(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())


def forget() -> None:
    """Read the tables again when they are next asked for."""
    load.cache_clear()
    _grids.cache_clear()


@functools.cache
def load(device: str) -> TuningTable:
    """The shipped table of a device (its slug) with this machine's own measurements on top; may be empty."""
    table = TuningTable(device)
    for path in (SHIPPED / f"{device}.json", user_path(device)):
        if path.exists():
            table = table.merged(read(path))
    return table


def times(problem: Problem) -> dict[str, float]:
    """Seconds of each measured implementation of `problem`, on the device it names.

    Taken at the nearest measured bucket of its batch, at most a factor of 4 away; empty where there is none.
    """
    rows = load(device_slug(problem.device)).rows
    if not rows:
        return {}
    own = bucket(problem.batch).bit_length() - 1
    for exponent in sorted(range(MAX_BUCKET + 1), key=lambda e: (abs(e - own), e)):
        if abs(exponent - own) > NEIGHBOURS:
            break
        found = rows.get(key(problem, 1 << exponent))
        if found:
            return found
    return {}


def roof(device: str, threads: int) -> float | None:
    """Multiply-adds per second that a matrix product of bytes reaches on a processor (its slug); None if unmeasured."""
    return load(device).roofs.get(native(threads))


def calls(device: str) -> dict[str, dict[str, float]]:
    """Seconds of whole networks, of a device ("cpu"), as they were added."""
    return load(device_slug(device)).calls


_KEY = re.compile(
    r"(?P<op>[a-z0-9]+)_n(?P<batch>\d+)_(?P<inputs>\d+)x(?P<size>\d+x\d+)_to(?P<outputs>\d+)_(?P<rest>.*)"
)
_Grid = dict[tuple[int, int], dict[str, float]]  # (in_channels, out_channels) -> times


def estimate(problem: Problem, threads: int | None = None) -> float | None:
    """Seconds of a layer by linear interpolation in its channels between measured problems that differ in nothing else.

    Between four neighbours (in_channels, out_channels) of the grid `lbs tune` measured; at the nearest measured
    bucket of the batch, in proportion to it. Below the grid its smallest size counts.

    Args:
        problem: a convolution or linear layer.
        threads: of the native CPU kernels, whose fastest algorithm counts; None takes the fastest row.

    Returns:
        None where a neighbour was not measured: other bits, another geometry, or channels beyond the grid.
    """
    grids = _grids(device_slug(problem.device))
    own = bucket(problem.batch)
    factors = sorted(range(-NEIGHBOURS, NEIGHBOURS + 1), key=lambda e: (abs(e), e))
    for batch in (int(own * 2.0**e) for e in factors if own * 2.0**e >= 1):
        grid = grids.get(_place(key(problem, batch))[0])
        seconds = None if grid is None else _interpolate(grid, problem, threads)
        if seconds is not None:
            return seconds * problem.batch / batch
    return None


@functools.cache
def _grids(device: str) -> dict[str, _Grid]:
    """The rows of a device's table by everything but their channels."""
    found: dict[str, _Grid] = {}
    for row, measured in load(device).rows.items():
        place, channels = _place(row)
        found.setdefault(place, {})[channels] = measured
    return found


def _place(row: str) -> tuple[str, tuple[int, int]]:
    """A key without its channels, and those. A depthwise layer has as many groups as channels, which go along."""
    match = _KEY.fullmatch(row)
    if match is None:
        return row, (0, 0)
    inputs, outputs, rest = int(match["inputs"]), int(match["outputs"]), match["rest"]
    if inputs == outputs:
        rest = rest.replace(f"_g{inputs}_", "_depthwise_")
    return f"{match['op']}_n{match['batch']}_{match['size']}_{rest}", (inputs, outputs)


def _interpolate(grid: _Grid, problem: Problem, threads: int | None) -> float | None:
    """Between the corners of the smallest rectangle around the problem that are all measured.

    Layers that differ in nothing but channels share a grid, which then has holes: 64 -> 384 and 384 -> 64 of a
    bottleneck were measured at sizes of their own.
    """
    known: dict[int, dict[int, float]] = {}  # by outputs and inputs
    for (c, o), measured in grid.items():
        own = [t for i, t in measured.items() if threads is None or is_native(i, threads)]
        if own:
            known.setdefault(o, {})[c] = min(own)
    if "_depthwise_" in _place(key(problem))[0]:
        along = _neighbours({o for o, row in known.items() if o in row}, problem.out_channels)
        return sum(share * known[o][o] for o, share in along) if along else None
    best: tuple[float, float] | None = None
    for outputs in _brackets(known.keys(), problem.out_channels):
        sides = [o for o, _ in outputs]
        inputs = _neighbours(set.intersection(*(set(known[o]) for o in sides)), problem.in_channels)
        if not inputs:
            continue
        extent = math.log(max(sides) / min(*sides, problem.out_channels))
        extent += math.log(inputs[-1][0] / min(inputs[0][0], problem.in_channels))
        if best is None or extent < best[0]:
            best = extent, sum(o_share * c_share * known[o][c] for o, o_share in outputs for c, c_share in inputs)
    return None if best is None else best[1]


def _brackets(sizes: Iterable[int], size: int) -> Iterator[list[tuple[int, float]]]:
    """Every pair of measured sizes around `size`, with their shares of it, as `_neighbours`."""
    low = [s for s in sizes if s <= size]
    high = [s for s in sizes if s >= size]
    for pair in ({s, t} for t in high for s in (low or [t])):
        yield _neighbours(pair, size)


def _neighbours(sizes: set[int], size: int) -> list[tuple[int, float]]:
    """The measured sizes around `size` with their shares of it; none above the largest."""
    above = [s for s in sizes if s >= size]
    if not above:
        return []
    high, low = min(above), max((s for s in sizes if s <= size), default=min(above))
    if low == high:
        return [(high, 1.0)]
    share = (size - low) / (high - low)
    return [(low, 1 - share), (high, share)]
