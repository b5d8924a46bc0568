"""Launch configuration of a depthwise window with the 1 x 1 layer behind it (gpu/depthwise_project.py). No Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from lbs_kernels.gpu.configs.direct import BLOCKS, column_positions, column_rows, power_at_least
from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.program.planes import WORD
from lbs_kernels.program.problem import Problem

OP = "depthwise_project"
POSITIONS = 8  # strips of a warp: the rows of a tensor-core fragment that it has
FRAGMENT = 16  # filters
# Of a thread, with more of which Triton 3.7 spills, by the window's step and the channels of a step of the tile:
# outputs of the window and sums of the filters; and both together, less where sums go to a workspace.
MOST = {(1, WORD): (64, 96), (1, 2 * WORD): (64, 48), (2, WORD): (32, 80), (2, 2 * WORD): (32, 32)}
ROOM, SHARED_ROOM = 128, 120


@dataclass(frozen=True)
class ProjectConfig:
    """One way to launch the kernel. A tile is 8 strips a warp, of `columns` as `DepthwiseConfig` has them, by all
    filters, in blocks of `block_o` and, where there is one, `rest`. A step of it has `block_c` channels, and `split`
    programs share the steps.
    """

    block_c: int
    block_o: int
    rest: int
    warps: int
    columns: int
    split: int = 1

    def __str__(self) -> str:
        rest = f"r{self.rest}_" if self.rest else ""
        return f"project_c{self.block_c}_o{self.block_o}_{rest}w{self.warps}_x{self.columns}_p{self.split}"

    @classmethod
    def parse(cls, text: str) -> ProjectConfig:
        """The configuration that prints as `text`. Raises FormatError."""
        pattern = r"project_c(\d+)_o(\d+)_(?:r(\d+)_)?w(\d+)_x(\d+)_p(\d+)"
        found = match_text(pattern, text, "depthwise layer with a 1 x 1 layer behind it", cls(32, 64, 32, 4, 2))
        return cls(*(int(number or 0) for number in found.groups()))

    @property
    def block_m(self) -> int:
        """Strips of a tile."""
        return POSITIONS * self.warps

    @property
    def filters(self) -> int:
        """Of a tile, those of padding included."""
        return self.block_o + self.rest

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None: powers of two, whole fragments, all filters, and room in registers."""
        sizes = (self.block_c, self.block_o, self.rest or 1, self.warps, self.columns)
        if any(size < 1 or size & (size - 1) for size in sizes):
            return f"{self}: blocks, warps and columns are powers of two"
        if self.block_c not in (WORD, 2 * WORD) or self.warps not in (4, 8):
            return f"{self}: a step has {WORD} or {2 * WORD} channels; use 4 or 8 warps"
        if min(self.block_o, self.rest or self.block_o) < FRAGMENT or (self.rest and self.block_o % WORD):
            return f"{self}: blocks of filters have at least {FRAGMENT}, and do not share words of {WORD}"
        if self.filters < problem.out_channels:
            return f"{self}: a tile has all of {problem.out_channels} filters"
        if not 1 <= self.split <= project_steps(problem, self):
            return f"{self}: at most one part for each of {project_steps(problem, self)} steps"
        strip = self.columns * column_rows(problem)
        outputs, sums = strip * self.block_c // 4, strip * self.filters // 4
        most, room = MOST[problem.stride[0], self.block_c], ROOM if self.split == 1 else SHARED_ROOM
        if strip < 2 or outputs > most[0] or sums > most[1] or outputs + sums > room:
            return (
                f"{self}: {strip} pixels of a strip are {outputs} outputs of the window and {sums} sums for each "
                f"thread; use 2 pixels or more, at most {most[0]} and {most[1]}, {room} together"
            )
        return None


def project_tiles(problem: Problem, config: ProjectConfig) -> int:
    """Tiles of one launch."""
    return -(-column_positions(problem, config.columns) // config.block_m)


def project_steps(problem: Problem, config: ProjectConfig) -> int:
    """Of one tile."""
    return -(-problem.in_channels // config.block_c)


def project_candidates(problem: Problem) -> Iterator[ProjectConfig]:
    """Valid configurations worth timing: parts of no fewer than one step, where tiles alone leave room for them."""
    for block_c, warps, columns in product((WORD, 2 * WORD), (4, 8), (8, 4, 2, 1)):
        whole = ProjectConfig(block_c, *_blocks(problem.out_channels), warps, columns)
        steps = project_steps(problem, whole)
        for parts in dict.fromkeys(-(-steps // each) for each in (steps, 4, 2, 1)):
            config = replace(whole, split=parts)
            crowded = parts > 1 and parts * project_tiles(problem, whole) > BLOCKS
            if not crowded and config.why_not(problem) is None:
                yield config


def _blocks(filters: int) -> tuple[int, int]:
    """(block_o, rest) that hold all filters with the least padding."""
    one, block = power_at_least(filters, FRAGMENT, 1 << 12), FRAGMENT
    while 2 * block <= filters:
        block *= 2
    rest = power_at_least(filters - block, FRAGMENT, block)
    return (block, rest) if block >= WORD and block + rest < one else (one, 0)
