"""Launch configurations of the GEMMs in CUDA, and when they are legal. Needs no GPU, no native module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, TypeVar

import torch

from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.gpu.layout import NIBBLE_BITS, Kept, byte_pitch
from lbs_kernels.program.planes import MAX_BITS
from lbs_kernels.program.problem import Problem

MAX_CONSUMERS = 8  # of a step
GROUP_ROWS = 64  # pixels of one multiplication of 128 threads
CHUNK_BYTES = 128  # of a row in a stage
SPLITS = (1, 2, 4, 8)  # thread blocks of a cluster
MANY_BLOCKS = 296  # two for every multiprocessor of the largest GPU that has them
BITS = (2, 4)  # of the one-bit kernels: codes are multiplied in pairs of planes
Config = TypeVar("Config", bound="CudaConfig")


@dataclass(frozen=True)
class CudaConfig:
    """One way to launch a kernel. A tile is `block_m` output pixels by `block_o` filters."""

    machine: str  # "wgmma" (compute capability 9.0) or "mma" (8.x and 9.0)
    block_m: int
    block_o: int
    stages: int  # chunks of K in shared memory: 512 bits of every plane, or 128 channels
    thresholds: int = 2  # where one code tensor of at most so many bits is all that is written: integers, no floats
    split: int = 1  # thread blocks of a cluster that share the reduction of a tile; 1 but for tiles of `clusters`

    clusters: ClassVar[tuple[tuple[str, int, int, int], ...]] = ()  # tiles, of `tiles`
    kind: ClassVar[str]  # prefix of the text, and of the functions of the native module
    tiles: ClassVar[tuple[tuple[str, int, int, int], ...]]  # (machine, pixels, filters, stages), as they are built

    def __str__(self) -> str:
        split = f"_k{self.split}" if self.split > 1 else ""
        return f"{self.kind}_{self.machine}_m{self.block_m}_o{self.block_o}_s{self.stages}_t{self.thresholds}{split}"

    @classmethod
    def parse(cls: type[Config], text: str) -> Config:
        """The configuration that prints as `text`. Raises FormatError.

        >>> OneBitConfig.parse("onebit_wgmma_m128_o128_s6_t2").block_o
        128
        """
        pattern = rf"{cls.kind}_(wgmma|mma)_m(\d+)_o(\d+)_s(\d+)_t(\d+)(?:_k(\d+))?"
        found = match_text(pattern, text, f"{cls.kind} kernels", cls(*cls.tiles[0]))
        block_m, block_o, stages, thresholds, split = (int(found[index] or 1) for index in range(2, 7))
        return cls(found[1], block_m, block_o, stages, thresholds, split)

    @property
    def row(self) -> tuple[str, int, int, int]:
        """How the native modules name the kernel: machine, groups of 64 pixels, filters, stages."""
        return self.machine, self.block_m // GROUP_ROWS, self.block_o, self.stages

    @property
    def tile(self) -> tuple[str, int, int, int]:
        """The row of `tiles`."""
        return self.machine, self.block_m, self.block_o, self.stages

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None: the tile is built, and the device has its instruction."""
        if self.tile not in self.tiles:
            tiles = ", ".join(f"{machine} {m} x {o}, {stages} stages" for machine, m, o, stages in self.tiles)
            return f"{self}: no such kernel is built; there are {tiles}"
        if self.machine not in machines(problem.device):
            return f"{self}: {problem.device} has no {self.machine}; it runs {', '.join(machines(problem.device))}"
        if not 0 <= self.thresholds <= 4:
            return f"{self}: thresholds serve codes of at most 4 bits"
        possible = self.splits(problem, self.tile)
        if self.split not in possible:
            return f"{self}: the reduction is shared by {self.split} blocks; {possible} are possible"
        return None

    @classmethod
    def splits(cls, problem: Problem, tile: tuple[str, int, int, int]) -> tuple[int, ...]:
        """In how many thread blocks the reduction of a tile may be shared."""
        return (1,)

    @classmethod
    def candidates(cls: type[Config], problem: Problem) -> Iterator[Config]:
        """Valid configurations worth timing, every tile first: no tile twice as large as the problem."""
        rows = problem.rows
        for thresholds, config in product((2, 4, 0), cls.with_splits(problem)):
            block_m, block_o = config.block_m, config.block_o
            wasteful = (block_m > 64 and block_m >= 2 * rows) or (block_o > 64 and block_o >= 2 * problem.out_channels)
            config = replace(config, thresholds=thresholds)
            if not wasteful and config.why_not(problem) is None:
                yield config

    @classmethod
    def with_splits(cls: type[Config], problem: Problem) -> list[Config]:
        """One of every tile and every number of blocks that share its reduction, but more than any GPU has at once."""
        every = (cls(*tile, split=split) for tile in cls.tiles for split in cls.splits(problem, tile))
        return [config for config in every if config.split == 1 or config.split * config.count(problem) <= MANY_BLOCKS]

    def count(self, problem: Problem) -> int:
        """Tiles of the problem's output."""
        return -(-problem.rows // self.block_m) * -(-problem.out_channels // self.block_o)


@dataclass(frozen=True)
class OneBitConfig(CudaConfig):
    """Of the one-bit kernels: rows of LBS_ONEBIT_TILES in csrc/onebit/tiles.h."""

    kind = "onebit"
    tiles = (
        ("wgmma", 128, 128, 6),
        ("wgmma", 64, 128, 4),
        ("wgmma", 128, 64, 8),
        ("wgmma", 64, 64, 4),
        ("mma", 128, 64, 3),
        ("mma", 64, 64, 3),
    )


@dataclass(frozen=True)
class S8Config(CudaConfig):
    """Of the s8 kernels: rows of LBS_S8_TILES in csrc/s8/tiles.h."""

    kind = "s8"
    tiles = (
        ("wgmma", 128, 128, 6),
        ("wgmma", 64, 128, 8),
        ("wgmma", 128, 96, 7),
        ("wgmma", 128, 64, 8),
        ("wgmma", 128, 48, 9),
        ("wgmma", 64, 64, 12),
        ("wgmma", 64, 64, 5),
    )
    clusters = (("wgmma", 64, 64, 5),)

    @classmethod
    def splits(cls, problem: Problem, tile: tuple[str, int, int, int]) -> tuple[int, ...]:
        """Each block has a chunk of 128 channels of the reduction at least."""
        chunks = -(-problem.window.taps * byte_pitch(problem.in_channels) // CHUNK_BYTES)
        return tuple(split for split in SPLITS if split <= chunks) if tile in cls.clusters else (1,)

    def writes(self, kept: Kept) -> bool:
        """Whether it writes codes that are kept so: for other forms than bytes a thread must have eight neighbouring
        channels, a byte of each plane or a word of nibbles.
        """
        return kept == "bytes" or self.block_o % 32 == 0


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


def on_hopper(device: str) -> bool:
    """Whether the GPU there has compute capability 9.0; False where there is none to ask."""
    return torch.cuda.is_available() and "wgmma" in machines(device)


def onebit_form_why_not(problem: Problem) -> str | None:
    """Why no one-bit kernel serves the bits and groups of `problem` on any GPU, or None."""
    if problem.nibbles:
        return "activations are nibbles; the one-bit kernels take planes"
    if problem.w_bits not in BITS or problem.a_bits not in BITS:
        return f"w{problem.w_bits}a{problem.a_bits}; the one-bit kernels take codes of 2 or 4 bits"
    if problem.groups != 1:
        return f"{problem.groups} groups; the one-bit kernels take one"
    return None


def onebit_why_not(problem: Problem) -> str | None:
    """Why no one-bit kernel serves `problem`, or None. The rest of a step is asked of `step_why_not` in gpu/cuda."""
    if (reason := onebit_form_why_not(problem)) is not None:
        return reason
    if not machines(problem.device):
        return "one-bit tensor cores that multiply by AND are those of compute capability 8.x and 9.0"
    return None


def s8_form_why_not(problem: Problem) -> str | None:
    """Why no s8 kernel serves the bits and groups of `problem` on any GPU, or None."""
    if problem.nibbles and problem.a_bits > NIBBLE_BITS:
        return f"activations of {problem.a_bits} bits are no nibbles"
    if not problem.nibbles and problem.a_bits != MAX_BITS:
        return f"activations of {problem.a_bits} bits are planes; the s8 kernels take bytes, of 8 bits, and nibbles"
    if problem.groups != 1:
        return f"{problem.groups} groups; the s8 kernels take one"
    return None


def s8_why_not(problem: Problem) -> str | None:
    """Why no s8 kernel serves `problem`, or None. The rest of a step is asked of `step_why_not` in gpu/cuda."""
    if (reason := s8_form_why_not(problem)) is not None:
        return reason
    if "wgmma" not in machines(problem.device):
        return "tensor cores that multiply bytes asynchronously are those of compute capability 9.0"
    return None
