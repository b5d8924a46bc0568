"""Networks that ship with the package: packed, with their plan and the record of how they were made.

>>> import lbs.zoo
>>> lbs.zoo.entry("cifar100-resnet20").model
'cifar_resnet20'
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbs.plan import Plan
from lbs_kernels.errors import CheckpointError, LbsError

_FOLDER = Path(__file__).with_name("data")


@dataclass(frozen=True)
class ZooEntry:
    """One shipped network: <name>.lbs.safetensors, <name>.plan.json and <name>.record.json in the package."""

    name: str
    model: str  # name in lbs.models of the float network it was searched from
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def path(self) -> Path:
        """The packed file. Raises CheckpointError where this installation lacks it."""
        return self._file(".lbs.safetensors")

    def plan(self) -> Plan:
        """Bits and kept filters."""
        return Plan.load(self._file(".plan.json"))

    def record(self) -> dict[str, Any]:
        """Accuracy, cost and schedule as they were measured when the file was made."""
        return dict(json.loads(self._file(".record.json").read_text()))

    def _file(self, suffix: str) -> Path:
        path = _FOLDER / f"{self.name}{suffix}"
        if not path.is_file():
            raise CheckpointError(f"{path} is not there; install lbs with its package data: pip install -e .")
        return path


ENTRIES: dict[str, ZooEntry] = {
    "cifar100-resnet20": ZooEntry(
        "cifar100-resnet20",
        "cifar_resnet20",
        100,
        (3, 32, 32),
        (0.5070, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2761),
    ),
}


def entry(name: str) -> ZooEntry:
    """The shipped network called `name`. Raises LbsError for an unknown name."""
    if name not in ENTRIES:
        raise LbsError(f"the zoo has no network {name!r}; it has {', '.join(ENTRIES)}")
    return ENTRIES[name]
