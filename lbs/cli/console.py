"""What a command tells: plain lines or one JSON document on stdout, progress as a bar or as lines."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from typing import Any

from lbs.reporting.units import bops
from lbs.run_folder import writes
from lbs_kernels.errors import printable

_PLAIN_SECONDS = 15.0


class Console:
    """Lines for people, or with --json one document at the end; then lines and progress go to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stream = sys.stderr if as_json else sys.stdout

    def say(self, line: str = "") -> None:
        """One line for people; of several processes only the first speaks."""
        if writes():
            print(printable(line), file=self.stream, flush=True)

    def finish(self, body: dict[str, Any]) -> None:
        """The JSON document, if one was asked for."""
        if self.as_json and writes():
            print(json.dumps(body, indent=1, default=str))

    def progress(self) -> BarProgress | LineProgress:
        """A bar on a terminal, plain lines elsewhere and where tqdm is not installed."""
        on_terminal = sys.stderr.isatty() and writes() and importlib.util.find_spec("tqdm") is not None
        return BarProgress() if on_terminal else LineProgress(self)


def console(args: argparse.Namespace) -> Console:
    """The console of a command line."""
    return Console(args.json)


class LineProgress:
    """One line per epoch, and one every 15 s in between."""

    def __init__(self, target: Console) -> None:
        self.target = target
        self.phase, self.total, self.done = "", 0, 0
        self.last = 0.0

    def begin(self, phase: str, total: int, done: int) -> None:
        """A phase of `total` steps starts, `done` of them behind it."""
        self.phase, self.total, self.done, self.last = phase, total, done, time.monotonic()

    def advance(self, steps: int) -> None:
        """Steps were done."""
        self.done += steps

    def note(self, row: dict[str, Any]) -> None:
        """A metrics row was written."""
        if row["kind"] == "epoch" or time.monotonic() - self.last > _PLAIN_SECONDS:
            self.last = time.monotonic()
            self.target.say(f"{self.phase} {self.done}/{self.total}: {describe(row)}")

    def end(self) -> None:
        """The phase is over."""


class BarProgress:
    """A tqdm bar on stderr."""

    def __init__(self) -> None:
        self.bar: Any = None

    def begin(self, phase: str, total: int, done: int) -> None:
        """A phase of `total` steps starts, `done` of them behind it."""
        from tqdm import tqdm

        self.bar = tqdm(desc=phase, total=total, initial=done, unit=" steps", dynamic_ncols=True)

    def advance(self, steps: int) -> None:
        """Steps were done."""
        self.bar.update(steps)

    def note(self, row: dict[str, Any]) -> None:
        """A metrics row was written."""
        self.bar.set_postfix_str(describe(row))

    def end(self) -> None:
        """The phase is over."""
        self.bar.close()


def describe(row: dict[str, Any]) -> str:
    """A metrics row in a few words."""
    parts = [f"epoch {row['epoch']}", f"loss {row['loss']:.3f}"] if row.get("loss") is not None else []
    for key, label in (("train_accuracy", "train"), ("test_accuracy", "test")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.2%}")
    if row.get("bops"):
        parts.append(f"{bops(row['bops'])} BOPs{' (met, held)' if row.get('frozen') else ''}")
    return ", ".join(parts)
