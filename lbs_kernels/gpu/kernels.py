"""Which GPU kernel runs a step: the table of kernels, and the choice by measured times.

A kernel is known by the TYPE of its configurations; one row of `KERNELS` says where it lives. Adding a kernel is adding
one row. What a row promises is in docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, LbsError
from lbs_kernels.gpu.configs.cuda import OneBitConfig, S8Config, on_hopper, onebit_why_not, s8_why_not
from lbs_kernels.gpu.configs.defaults import DEFAULTS
from lbs_kernels.gpu.configs.depthwise_project import OP as DEPTHWISE_PROJECT
from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig, project_candidates
from lbs_kernels.gpu.configs.direct import (
    DepthwiseConfig,
    GroupedConfig,
    depthwise_candidates,
    grouped_candidates,
)
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig, elementwise_candidates
from lbs_kernels.gpu.configs.gemm import GemmConfig, gemm_candidates, triton_why_not
from lbs_kernels.gpu.configs.half import HalfConfig, half_candidates
from lbs_kernels.gpu.configs.stem_pool import OP as STEM_POOL
from lbs_kernels.gpu.configs.stem_pool import StemPoolConfig, stem_pool_candidates
from lbs_kernels.gpu.forms import as_kept, every_form
from lbs_kernels.gpu.modelled import with_pooled_stem, with_projected
from lbs_kernels.gpu.stem import fold_stem
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program
from lbs_kernels.times import table


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel.

    Attributes:
        family: the prefix of its rows in tuning tables.
        ops: the operations it serves.
        config: type of its configurations; `str(config)` and `config.parse(text)` are inverse.
        candidates: configurations worth timing for a problem.
        implementation: operation -> module with `bind(...)`, perhaps `prepare_weights(...)` and `step_why_not(...)`.
            Called where something is bound, so that the table needs no Triton.
        why_none: why no configuration serves a problem, or None; of one, `config.why_not(problem)` says it.
        exact: equal to the reference in every bit.
    """

    family: str
    ops: tuple[str, ...]
    config: Any
    candidates: Callable[[Problem], Iterable[Any]]
    implementation: Callable[[str], ModuleType]
    why_none: Callable[[Problem], str | None] = lambda problem: None
    exact: bool = True

    def why_not(self, problem: Problem) -> str | None:
        """Why this kernel cannot serve `problem` here, or None."""
        if problem.op not in self.ops:
            return f"there is no such kernel for {problem.op}"
        if self.family == "cuda" and extension.cuda is None:
            return extension.cuda_reason
        return self.why_none(problem)


def _weighted(op: str) -> ModuleType:
    from lbs_kernels.gpu.triton import weighted

    return weighted


def _elementwise(op: str) -> ModuleType:
    from lbs_kernels.gpu.triton import pool, quantpack, resize, select

    return {"pool": pool, "quantpack": quantpack, "resize": resize, "select": select}[op]


def _stem_pool(op: str) -> ModuleType:
    from lbs_kernels.gpu.triton import stem_pool

    return stem_pool


def _depthwise_project(op: str) -> ModuleType:
    from lbs_kernels.gpu.triton import depthwise_project

    return depthwise_project


def _onebit(op: str) -> ModuleType:
    from lbs_kernels.gpu.cuda import onebit

    return onebit


def _s8(op: str) -> ModuleType:
    from lbs_kernels.gpu.cuda import s8

    return s8


def _half(op: str) -> ModuleType:
    from lbs_kernels.gpu import half

    return half


CONV, WEIGHTED = ("bitconv2d",), ("bitconv2d", "bitlinear")
ELEMENTWISE = ("quantpack", "pool", "resize", "select")
KERNELS: list[Kernel] = [
    Kernel("triton", WEIGHTED, GemmConfig, gemm_candidates, _weighted, triton_why_not),
    Kernel("triton", CONV, DepthwiseConfig, depthwise_candidates, _weighted, triton_why_not),
    Kernel("triton", CONV, GroupedConfig, grouped_candidates, _weighted, triton_why_not),
    Kernel("triton", (STEM_POOL,), StemPoolConfig, stem_pool_candidates, _stem_pool),
    Kernel("triton", (DEPTHWISE_PROJECT,), ProjectConfig, project_candidates, _depthwise_project),
    Kernel("cuda", WEIGHTED, S8Config, S8Config.candidates, _s8, s8_why_not),
    Kernel("cuda", WEIGHTED, OneBitConfig, OneBitConfig.candidates, _onebit, onebit_why_not),
    Kernel("triton", ELEMENTWISE, ElementwiseConfig, elementwise_candidates, _elementwise),
    Kernel("fp16", WEIGHTED, HalfConfig, half_candidates, _half, exact=False),
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

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None."""
        reason: str | None = self.kernel.why_not(problem) or self.config.why_not(problem)
        return reason


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


def candidates(problem: Problem) -> list[Choice]:
    """Every valid configuration of every kernel that can serve `problem`, the default first."""
    found = [default(problem)]
    for kernel in KERNELS:
        if kernel.why_not(problem) is None:
            choices = (Choice(kernel, config) for config in kernel.candidates(problem))
            found += [choice for choice in choices if choice != found[0] and choice.why_not(problem) is None]
    return found


def default(
    problem: Problem,
    allowed: tuple[str, ...] | None = None,
    why_not: Callable[[Choice], str | None] = lambda choice: None,
) -> Choice:
    """The choice where nothing was measured: the first of the operation's defaults that serves, else the last of them.

    allowed, why_not: as `choose` takes them; the last default may be refused by them.
    """
    *preferred, last = (Choice(kernel_of(config), config) for config in DEFAULTS[problem.op](problem))
    for choice in preferred:
        welcome = allowed is None or choice.kernel.family in allowed
        if welcome and choice.why_not(problem) is None and why_not(choice) is None:
            return choice
    return last


def choose(
    problem: Problem,
    allowed: tuple[str, ...] | None = None,
    why_not: Callable[[Choice], str | None] = lambda choice: None,
) -> Choice:
    """The fastest measured kernel that can run `problem`, else the default.

    Args:
        allowed: families to choose from; all exact ones unless given.
        why_not: why the caller cannot take a choice, or None.

    Raises:
        BackendError: not even the default can serve.
    """
    allowed = exact_families() if allowed is None else allowed
    measured = table.times(problem)
    for name in sorted(measured, key=lambda name: measured[name]):
        found = parse(name)
        if found is None or found.kernel.family not in allowed:
            continue
        if found.why_not(problem) is None and why_not(found) is None:
            return Choice(found.kernel, found.config, measured[name])
    found = default(problem, allowed, why_not)
    refused = found.why_not(problem) or why_not(found)
    if refused is not None:
        raise BackendError(f"{found.kernel.family} cannot serve {problem}: {refused}")
    return found


def program_on(
    program: Program, blob: Tensor, device: str, families: tuple[str, ...] | None = None
) -> tuple[Program, Tensor]:
    """The program as the GPU there runs it, and its blob: its stem folded (`stem.py`), one with the maximum behind
    it (`stem_pool.py`), with codes as bytes or nibbles where the s8 kernels may serve (`forms.py`), depthwise layers
    one with those behind them (`depthwise_project.py`).
    """
    if not device.startswith("cuda"):
        return program, blob
    program, blob = fold_stem(program, blob)
    hopper, triton = on_hopper(device), families is None or "triton" in families
    cuda = (families is None or "cuda" in families) and _keeps(device)

    def measured(problem: Problem) -> float | None:
        return choose(problem, families).seconds

    if triton:
        program = with_pooled_stem(program, blob, cuda, measured)
    if cuda:
        program = as_kept(program, measured)
    if triton and hopper:
        program = with_projected(program, cuda, measured)
    return program, blob


def forms_on(problem: Problem, device: str) -> list[Problem]:
    """The problem in every form in which the GPU there may keep its activations: what is measured, so that
    `program_on` can choose by times.
    """
    return every_form(problem) if _keeps(device) else [problem]


def _keeps(device: str) -> bool:
    """Whether codes below 8 bits may be kept otherwise than as planes."""
    return extension.cuda is not None and on_hopper(device)


def why_not_by_family(problem: Problem) -> dict[str, str | None]:
    """For each family why none of its kernels serves `problem`, or None where one does."""
    found: dict[str, str | None] = {}
    for kernel in KERNELS:
        reason = kernel.why_not(problem)
        if found.get(kernel.family, "") is not None:
            found[kernel.family] = reason
    return found
