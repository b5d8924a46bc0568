"""What became of many mutants, files or programs: verdicts counted, time and memory kept, what may not be named.

Time is the processor's, of this process: a machine that does other things, or stops the process, makes nothing late.
"""

from __future__ import annotations

import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SECONDS_PER_MB = 1.0  # that a mutant may take, for each megabyte begun
KINDS = ("crash", "hang", "foreign", "disagreement")  # foreign: an exception of no family; the last, of the two readers


class Disagreement(AssertionError):
    """Python and C++ judge a program otherwise, or compute other numbers."""


@dataclass
class Outcome:
    """Counts of verdicts and of failures by kind; the worst time per megabyte begun, and of which mutant."""

    done: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds_per_mb: float = 0.0
    slowest: str = ""
    peak_bytes: int = 0
    failures: list[str] = field(default_factory=list)

    def judge(self, name: str, size: int, judged: Callable[[], str]) -> bool:
        """Count the verdict on a mutant of `size` bytes; False where it ends as none may, which is kept in words."""
        megabytes = -(-max(size, 1) // 1_000_000)
        begun, kind, words = time.process_time(), "", ""
        try:
            with limited(20 * SECONDS_PER_MB * megabytes):
                self.verdicts[judged()] += 1
        except TimeoutError as error:
            kind, words = "hang", str(error)
        except Disagreement as error:
            kind, words = "disagreement", str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001  the mutant is kept, the others are judged
            kind, words = "foreign", f"{type(error).__name__}: {error}"
        seconds = (time.process_time() - begun) / megabytes
        if seconds > SECONDS_PER_MB and not kind:
            kind, words = "hang", f"{seconds:.2f} s per megabyte"
        if seconds > self.seconds_per_mb:
            self.seconds_per_mb, self.slowest = seconds, name[:120]
        self.done += 1
        self.peak_bytes = max(self.peak_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if kind:
            self.fail(kind, f"{name}: {words}")
        return not kind

    def fail(self, kind: str, words: str) -> None:
        """Count a failure, of one of `KINDS`."""
        self.failed[kind] += 1
        self.failures.append(f"{kind}: {words[:4000]}")

    def add(self, other: Outcome) -> None:
        """Take in what became of others."""
        self.done += other.done
        self.verdicts.update(other.verdicts)
        self.failed.update(other.failed)
        if other.seconds_per_mb > self.seconds_per_mb:
            self.seconds_per_mb, self.slowest = other.seconds_per_mb, other.slowest
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.failures += other.failures

    def to_json(self) -> dict[str, Any]:
        """All of it; `of_json` reads it."""
        return dict(vars(self))

    @classmethod
    def of_json(cls, body: dict[str, Any]) -> Outcome:
        """What `to_json` wrote."""
        counters = {name: Counter(body[name]) for name in ("verdicts", "failed")}
        return cls(**{**body, **counters})

    def __str__(self) -> str:
        verdicts = ", ".join(f"{count} {what}" for what, count in sorted(self.verdicts.items()))
        failed = ", ".join(f"{self.failed[kind]} {kind}" for kind in KINDS)
        worst = f"worst {self.seconds_per_mb:.2f} s per MB ({self.slowest})"
        return f"{verdicts}; {failed}; {worst}; peak memory {self.peak_bytes / 1e6:.0f} MB"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where this process computes for longer."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s of the processor")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
