"""VerifyReport: what `verify` compared, and what differed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison of a tensor.

    wrong: elements that differ without excuse. near: codes that differ by one where the value before rounding lies
    within the tolerance of a rounding boundary. largest: the largest difference (code units, or floats). tolerance: the
    widest one allowed at any element (code units before rounding, or floats).
    """

    layer: str
    what: str
    elements: int
    wrong: int
    near: int
    largest: float
    tolerance: float

    def __str__(self) -> str:
        verdict = f"{self.wrong} of {self.elements} DIFFER" if self.wrong else f"{self.elements} equal"
        near = f", {self.near} on a rounding boundary" if self.near else ""
        return f"{self.layer}: {self.what}: {verdict}{near} (largest {self.largest:.3g}, allowed {self.tolerance:.3g})"


@dataclass(frozen=True)
class VerifyReport:
    """Checks in execution order, and how the packed model compares with the model evaluated in float32, as deployed:
    `agreeing` counts images of the same class, `identical` those whose outputs are equal bit for bit. None: no logits.
    """

    checks: tuple[Check, ...]
    images: int
    agreeing: int | None
    identical: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs but codes on a rounding boundary."""
        return not any(check.wrong for check in self.checks)

    @property
    def first_difference(self) -> str | None:
        """The first comparison that failed; None if none did."""
        return next((str(check) for check in self.checks if check.wrong), None)

    @property
    def first_layer(self) -> str | None:
        """The layer or step that wrote the first tensor that differs."""
        return next((check.layer for check in self.checks if check.wrong), None)

    @property
    def near_boundary(self) -> int:
        """Codes that differ by one on a rounding boundary."""
        return sum(check.near for check in self.checks)

    @property
    def codes(self) -> int:
        """Activation codes compared."""
        return sum(check.elements for check in self.checks if check.what.startswith("codes"))

    def rows(self) -> list[dict[str, Any]]:
        """One row per check, for tables and JSON."""
        names = ("layer", "what", "elements", "wrong", "near", "largest", "tolerance")
        return [{name: getattr(check, name) for name in names} for check in self.checks]

    def __str__(self) -> str:
        top = "" if self.agreeing is None else f"; same class on {self.agreeing} of {self.images} images"
        top += "" if self.identical is None else f", outputs bit for bit on {self.identical}"
        counts = f"{self.codes} codes, {self.near_boundary} on a rounding boundary"
        if self.ok:
            return f"packed equals model in {len(self.checks)} comparisons ({counts}{top})"
        bad = [str(check) for check in self.checks if check.wrong]
        title = f"packed DIFFERS from model in {len(bad)} of {len(self.checks)} comparisons{top}:"
        return "\n  ".join([title, *bad[:8]])


def merged(parts: Iterable[tuple[Check, ...]]) -> tuple[Check, ...]:
    """The checks of several batches as one list: counts added, extremes kept."""
    return tuple(functools.reduce(_sum, same) for same in zip(*parts, strict=True))


def _sum(one: Check, other: Check) -> Check:
    # Weights do not depend on the batch.
    if one.what == "weight codes":
        return one
    return replace(
        one,
        elements=one.elements + other.elements,
        wrong=one.wrong + other.wrong,
        near=one.near + other.near,
        largest=max(one.largest, other.largest),
        tolerance=max(one.tolerance, other.tolerance),
    )
