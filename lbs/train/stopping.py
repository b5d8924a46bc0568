"""SIGTERM and Ctrl-C during training: noted, so that it ends after the step it is at, and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Training ended because it was asked to; the message says where it goes on. `number`: of the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Request:
    """Whether a stop was asked for: the number of the signal, or 0."""

    number: int = 0

    @property
    def name(self) -> str:
        """Of the signal; another process may have got it."""
        return signal.Signals(self.number).name if self.number else "a signal to another process"


@contextmanager
def noted() -> Iterator[Request]:
    """Inside, the first SIGTERM or SIGINT is noted; a second does at once what it does elsewhere.

    One that came too late to be looked at is raised again behind the block. An ignored signal stays ignored, as under
    `nohup`. In a thread that gets no signals nothing changes.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
    if request.number:  # whoever looked at it has raised
        signal.raise_signal(request.number)
