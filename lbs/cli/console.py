"""What a command tells: plain lines or one JSON document on stdout, progress as a bar or as lines."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lbs.reporting.units import bops
from lbs.run_folder import writes
from lbs_kernels.errors import printable

_PLAIN_SECONDS = 15.0
_SILENT_SECONDS = 2.0  # nobody should wait longer without being told what for
_BAR = 20  # columns of the bar, whatever stands beside it


class Console:
    """Lines for people, or with --json one document at the end; then lines and progress go to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stream = sys.stderr if as_json else sys.stdout
        self.spoke = time.monotonic()
        self.stepping = False  # a bar, or a line that has announced its steps, tells what is waited for

    def say(self, line: str = "") -> None:
        """One line for people; of several processes only the first speaks."""
        self.spoke = time.monotonic()
        if writes():
            print(printable(line), file=self.stream, flush=True)

    def step(self, line: str) -> None:
        """One line on stderr: what is done from here on."""
        self.spoke, self.stepping = time.monotonic(), True
        print(printable(line), file=sys.stderr, flush=True)

    def finish(self, body: dict[str, Any]) -> None:
        """The JSON document, if one was asked for."""
        if self.as_json and writes():
            print(json.dumps(body, indent=1, default=str))

    def progress(self) -> BarProgress | LineProgress:
        """A bar on a terminal, plain lines elsewhere and where tqdm is not installed."""
        on_terminal = sys.stderr.isatty() and writes() and importlib.util.find_spec("tqdm") is not None
        return BarProgress(self) if on_terminal else LineProgress(self)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Inside, a silence of two seconds is broken by a line on stderr that says what is waited for, once."""
        over = threading.Event()

        def watch() -> None:
            told = 0.0
            while not over.wait(_SILENT_SECONDS / 8):
                silent = time.monotonic() - self.spoke > _SILENT_SECONDS
                if silent and not self.stepping and told != self.spoke and writes():
                    told = self.spoke
                    print(f"{what} ...", file=sys.stderr, flush=True)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def console(args: argparse.Namespace) -> Console:
    """The console of a command line, one for all who ask."""
    if not hasattr(args, "console"):
        args.console = Console(args.json)
    found: Console = args.console
    return found


class LineProgress:
    """One line per epoch, and one every 15 s in between."""

    def __init__(self, target: Console) -> None:
        self.target = target
        self.phase, self.total, self.done = "", 0, 0
        self.last = 0.0

    def begin(self, phase: str, total: int, done: int) -> None:
        """A phase of `total` steps starts, `done` of them behind it."""
        self.phase, self.total, self.done, self.last = phase, total, done, time.monotonic()
        self.target.stepping = True
        if done < total:
            self.target.say(f"{phase}: {total - done} steps")

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
        self.target.spoke, self.target.stepping = time.monotonic(), False


class BarProgress:
    """A tqdm bar on stderr."""

    def __init__(self, target: Console) -> None:
        self.target = target
        self.bar: Any = None

    def begin(self, phase: str, total: int, done: int) -> None:
        """A phase of `total` steps starts, `done` of them behind it."""
        from tqdm import tqdm

        form = f"{{desc}}{{percentage:4.0f}}%|{{bar:{_BAR}}}| {{remaining}}{{postfix}}"
        self.bar = tqdm(desc=phase, total=total, initial=done, dynamic_ncols=True, bar_format=form)
        self.target.stepping = True

    def advance(self, steps: int) -> None:
        """Steps were done."""
        self.bar.update(steps)

    def note(self, row: dict[str, Any]) -> None:
        """A metrics row was written."""
        left = shutil.get_terminal_size().columns - len(self.bar.desc) - len("100%|| 00:00:00, ") - _BAR - 1
        self.bar.set_postfix_str(describe(row, left))

    def end(self) -> None:
        """The phase is over."""
        self.bar.close()
        self.target.spoke, self.target.stepping = time.monotonic(), False


def describe(row: dict[str, Any], width: int | None = None) -> str:
    """A metrics row in a few words, of which those that fit into `width` columns are told."""
    parts = [f"epoch {row['epoch']}", f"loss {row['loss']:.3f}"] if row.get("loss") is not None else []
    for key, label in (("test_accuracy", "test"), ("train_accuracy", "train")):
        if row.get(key) is not None:
            parts.append(f"{label} {row[key]:.2%}")
    if row.get("bops"):
        parts.append(f"{bops(row['bops'])} BOPs{' (met, held)' if row.get('frozen') else ''}")
    while width is not None and parts and len(", ".join(parts)) > width:
        parts.pop()
    return ", ".join(parts)
