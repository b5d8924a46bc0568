"""Which GPU kernel runs a step: the table of kernels, and the choice by measured times.

A kernel is known by the TYPE of its configurations; one row of `KERNELS` says where it lives. Adding a kernel is adding
one row. What a row promises is in docs/gpu.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, LbsError
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.configs.onebit import OneBitConfig
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table

Launch = Callable[[list[Tensor]], None]  # what `bind` returns: takes the region's inputs and enqueues one step


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel.

    family: the prefix of its rows in tuning tables. ops: the operations it serves. config: type of its configurations;
    `str(config)` and `config.parse(text)` are inverse. implementation: lbs_kernels.<op>.<implementation> has
    `supports(problem)`, `bind(...)` and perhaps `step_reason(...)` and `prepare_weights(...)`. tuning: module with
    `candidates(problem)` and `invalid_reason(config, problem)`; `{op}` stands for the operation. exact: equal to the
    reference in every bit.
    """

    family: str
    ops: tuple[str, ...]
    config: Any
    implementation: str
    tuning: str
    exact: bool = True

    def module(self, op: str) -> ModuleType:
        """The implementation for an operation."""
        return importlib.import_module(f"lbs_kernels.{op}.{self.implementation}")

    def tuner(self, op: str) -> ModuleType:
        """The module that knows the configurations."""
        return importlib.import_module(self.tuning.format(op=op))

    def reason(self, problem: Problem) -> str | None:
        """Why this kernel cannot serve `problem` here, or None."""
        if problem.op not in self.ops:
            return f"there is no such kernel for {problem.op}"
        if self.family == "cuda" and extension.cuda is None:
            return extension.cuda_reason
        reason: str | None = self.module(problem.op).supports(problem)
        return reason

    def invalid_reason(self, config: Any, problem: Problem) -> str | None:
        """Why `config` cannot run `problem`, or None."""
        reason: str | None = self.tuner(problem.op).invalid_reason(config, problem)
        return reason


GEMMS, ELEMENTWISE = ("bitconv2d", "bitlinear"), ("quantpack", "pool")
KERNELS: list[Kernel] = [
    Kernel("triton", GEMMS, GemmConfig, "triton_impl", "lbs_kernels.{op}.tuning"),
    Kernel("triton", ("bitconv2d",), DepthwiseConfig, "triton_impl", "lbs_kernels.{op}.tuning"),
    Kernel("triton", ("bitconv2d",), GroupedConfig, "triton_impl", "lbs_kernels.{op}.tuning"),
    Kernel("cuda", GEMMS, OneBitConfig, "cuda_impl", "lbs_kernels.gpu.configs.onebit"),
    Kernel("triton", ELEMENTWISE, ElementwiseConfig, "triton_impl", "lbs_kernels.{op}.tuning"),
    Kernel("fp16", GEMMS, HalfConfig, "half_impl", "lbs_kernels.gpu.configs.half", exact=False),
]
FALLBACKS = ("fp16",)  # families that are taken only where the user allows them


@dataclass(frozen=True)
class Choice:
    """A kernel with its configuration. seconds: as measured, None by the default rule."""

    kernel: Kernel
    config: Any
    seconds: float | None = None

    @property
    def name(self) -> str:
        """As in tuning tables: "triton:elementwise_m32_c32_w4"."""
        return f"{self.kernel.family}:{self.config}"


def check_fallback(fallback: str | None) -> None:
    """Raises BackendError for a fallback that does not exist."""
    if fallback is not None and fallback not in FALLBACKS:
        raise BackendError(f"fallback {fallback!r} does not exist; choose None or one of {', '.join(FALLBACKS)}")


def exact_families() -> tuple[str, ...]:
    """The families whose kernels equal the reference."""
    return tuple(dict.fromkeys(kernel.family for kernel in KERNELS if kernel.exact))


def kernel_of(config: Any) -> Kernel:
    """The row of a configuration. Raises BackendError for one of an unknown type."""
    for kernel in KERNELS:
        if type(config) is kernel.config:
            return kernel
    known = ", ".join(kernel.config.__name__ for kernel in KERNELS)
    raise BackendError(f"{config} is a {type(config).__name__}; GPU kernels take {known}")


def parse(name: str) -> Choice | None:
    """The kernel and configuration of a row of a tuning table; None where no kernel knows it (any more)."""
    family, _, text = name.partition(":")
    for kernel in KERNELS:
        if kernel.family == family:
            try:
                config = kernel.config.parse(text)
            except (LbsError, ValueError):
                continue
            return Choice(kernel, config)
    return None


def refusal(choice: Choice, problem: Problem) -> str | None:
    """Why a choice cannot run `problem`, or None."""
    return choice.kernel.reason(problem) or choice.kernel.invalid_reason(choice.config, problem)


def candidates(problem: Problem, allowed: tuple[str, ...] | None = None) -> list[Choice]:
    """Every valid configuration of every kernel that can serve `problem`, the default first; of all families unless
    `allowed` names some.
    """
    found = [default(problem)] if allowed is None or "triton" in allowed else []
    modules = dict.fromkeys((kernel.family, kernel.tuning) for kernel in KERNELS if problem.op in kernel.ops)
    for family, tuning in modules:
        if allowed is not None and family not in allowed:
            continue
        for config in importlib.import_module(tuning.format(op=problem.op)).candidates(problem):
            choice = Choice(kernel_of(config), config)
            if choice not in found and refusal(choice, problem) is None:
                found.append(choice)
    return found


def default(problem: Problem) -> Choice:
    """The choice where nothing was measured: the rule of thumb of the operation's tuning.py."""
    config = importlib.import_module(f"lbs_kernels.{problem.op}.tuning").default(problem)
    return Choice(kernel_of(config), config)


def choose(
    problem: Problem,
    allowed: tuple[str, ...] | None = None,
    reason: Callable[[Choice], str | None] = lambda choice: None,
) -> Choice:
    """The fastest measured kernel that can run `problem`, else the default.

    Args:
        allowed: families to choose from; all exact ones unless given.
        reason: why the caller cannot take a choice, or None.

    Raises:
        BackendError: not even the default can serve.
    """
    allowed = exact_families() if allowed is None else allowed
    measured = table.times(problem)
    for name in sorted(measured, key=lambda name: measured[name]):
        found = parse(name)
        if found is None or found.kernel.family not in allowed:
            continue
        if refusal(found, problem) is None and reason(found) is None:
            return Choice(found.kernel, found.config, measured[name])
    found = default(problem)
    refused = refusal(found, problem) or reason(found)
    if refused is not None:
        raise BackendError(f"{found.kernel.family} cannot serve {problem}: {refused}")
    return found


def reasons(problem: Problem) -> dict[str, str | None]:
    """For each family why none of its kernels serves `problem`, or None where one does."""
    found: dict[str, str | None] = {}
    for kernel in KERNELS:
        reason = kernel.reason(problem)
        if found.get(kernel.family, "") is not None:
            found[kernel.family] = reason
    return found
