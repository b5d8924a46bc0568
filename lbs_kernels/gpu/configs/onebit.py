"""Launch configuration of the one-bit tensor-core GEMM (CUDA), and when it is legal. Needs no GPU, no native module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.program.problem import Problem

GROUP_ROWS = 64  # pixels of one group of 128 threads
BITS = (2, 4)  # codes are multiplied in pairs of planes

# (machine, pixels, filters, stages): the rows of LBS_ONEBIT_TILES in csrc/onebit/tiles.h.
TILES = (
    ("wgmma", 128, 128, 6),
    ("wgmma", 64, 128, 4),
    ("wgmma", 128, 64, 8),
    ("wgmma", 64, 64, 4),
    ("mma", 128, 64, 3),
    ("mma", 64, 64, 3),
)


@dataclass(frozen=True)
class OneBitConfig:
    """One way to launch the kernel. A tile is `block_m` output pixels by `block_o` filters."""

    machine: str  # "wgmma" (compute capability 9.0) or "mma" (8.x and 9.0)
    block_m: int
    block_o: int
    stages: int  # chunks of 512 bits of K in shared memory
    thresholds: int = 2  # where one code tensor of at most so many bits is all that is written: integers, no floats

    def __str__(self) -> str:
        return f"onebit_{self.machine}_m{self.block_m}_o{self.block_o}_s{self.stages}_t{self.thresholds}"

    @classmethod
    def parse(cls, text: str) -> OneBitConfig:
        """The configuration that prints as `text`. Raises FormatError.

        >>> OneBitConfig.parse("onebit_wgmma_m128_o128_s6_t2").block_o
        128
        """
        pattern = r"onebit_(wgmma|mma)_m(\d+)_o(\d+)_s(\d+)_t(\d+)"
        found = match_text(pattern, text, "one-bit kernels", cls(*TILES[0]))
        block_m, block_o, stages, thresholds = (int(found[index]) for index in range(2, 6))
        return cls(found[1], block_m, block_o, stages, thresholds)

    @property
    def row(self) -> tuple[str, int, int, int]:
        """How the native modules name the kernel: machine, groups of 64 pixels, filters, stages."""
        return self.machine, self.block_m // GROUP_ROWS, self.block_o, self.stages

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None: the tile is built, and the device has its instruction."""
        if (self.machine, self.block_m, self.block_o, self.stages) not in TILES:
            tiles = ", ".join(f"{machine} {m} x {o}, {stages} stages" for machine, m, o, stages in TILES)
            return f"{self}: no such kernel is built; there are {tiles}"
        if self.machine not in machines(problem.device):
            return f"{self}: {problem.device} has no {self.machine}; it runs {', '.join(machines(problem.device))}"
        if not 0 <= self.thresholds <= 4:
            return f"{self}: thresholds serve codes of at most 4 bits"
        return None


@functools.cache
def machines(device: str) -> tuple[str, ...]:
    """The kernels a device runs: none on "cpu"; both on "cuda" where there is none to ask."""
    if device.split(":")[0] != "cuda":
        return ()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) == (9, 0):
            return "wgmma", "mma"
        return ("mma",) if major == 8 else ()
    return "wgmma", "mma"


def onebit_why_not(problem: Problem) -> str | None:
    """Why no kernel serves `problem`, or None. The rest of a step is asked of `step_why_not` in gpu/onebit/gemm.py."""
    if problem.w_bits not in BITS or problem.a_bits not in BITS:
        return f"w{problem.w_bits}a{problem.a_bits}; the one-bit kernels take codes of 2 or 4 bits"
    if problem.groups != 1:
        return f"{problem.groups} groups; the one-bit kernels take one"
    if not machines(problem.device):
        return "one-bit tensor cores that multiply by AND are those of compute capability 8.x and 9.0"
    return None


def onebit_candidates(problem: Problem) -> Iterator[OneBitConfig]:
    """Valid configurations worth timing, every tile first: no tile twice as large as the problem."""
    rows = problem.rows
    for thresholds, (machine, block_m, block_o, stages) in product((2, 4, 0), TILES):
        wasteful = (block_m > 64 and block_m >= 2 * rows) or (block_o > 64 and block_o >= 2 * problem.out_channels)
        config = OneBitConfig(machine, block_m, block_o, stages, thresholds)
        if not wasteful and config.why_not(problem) is None:
            yield config
