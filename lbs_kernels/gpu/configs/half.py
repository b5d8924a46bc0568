"""The configuration of the half-precision fallback: there is nothing to choose, torch and cuDNN do. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from lbs_kernels.errors import FormatError
from lbs_kernels.program.problem import Problem

NAME = "torch"


@dataclass(frozen=True)
class HalfConfig:
    """The one way to run a layer in half precision."""

    def __str__(self) -> str:
        return NAME

    @classmethod
    def parse(cls, text: str) -> HalfConfig:
        """The inverse of `str`. Raises FormatError for other text."""
        if text != NAME:
            raise FormatError(f"{text!r} is no configuration of the half-precision fallback; there is {NAME!r} only")
        return cls()

    def why_not(self, problem: Problem) -> str | None:
        """Activations that are nibbles are not decoded here."""
        return "activations are nibbles, which csrc/s8 alone reads" if problem.nibbles else None


def half_candidates(problem: Problem) -> list[HalfConfig]:
    """The fallback."""
    return [HalfConfig()]
