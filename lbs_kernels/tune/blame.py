"""Which kernel broke a device, kept in a file: what is measured there next leaves it out."""

from __future__ import annotations

import json
from pathlib import Path

from lbs_kernels.errors import FormatError
from lbs_kernels.times.table import locked, write_json


class Blame:
    """Told of every contender before it runs (`tuner.measure_gpu(attempt=...)`); whether to run it.

    A kernel that breaks a CUDA context ends its process, because nothing can run in it any more. The one that was
    named last is to blame.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            FormatError: the file is there and is no list of names.
        """
        self.path = path
        self.running: str | None = None
        self.broken = _names(path)

    def __call__(self, name: str) -> bool:
        """Whether to run `name`."""
        if name in self.broken:
            return False
        self.running = name
        return True

    def keep(self) -> str | None:
        """Write down what ran last as broken, for every later run; its name, or None if nothing ran."""
        if self.running is not None:
            with locked(self.path):  # another process may have named another one meanwhile
                self.broken |= {self.running, *_names(self.path)}
                write_json(self.path, sorted(self.broken))
        return self.running


def _names(path: Path) -> set[str]:
    """Those a file holds; none where it is not there. Raises FormatError."""
    if not path.exists():
        return set()
    try:
        names = json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path} cannot be read ({error}); delete it to try every kernel again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{path} is no list of names; delete it to try every kernel again")
    return set(names)
