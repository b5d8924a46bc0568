"""Launch configuration of the implicit GEMM of bitconv2d and bitlinear, and when it is legal. Needs no Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from lbs_kernels.device import GPUS
from lbs_kernels.errors import FormatError
from lbs_kernels.gpu.configs.direct import BLOCKS, power_at_least
from lbs_kernels.gpu.configs.text import match_text
from lbs_kernels.gpu.weights import FIELD_BITS
from lbs_kernels.program.planes import MAX_BITS, WORD, words
from lbs_kernels.program.problem import Problem

# Per thread, of its 255 registers: twice as many spill with Triton 3.7 on sm_80 or sm_90 at some bits.
ACCUMULATORS = 64
OPERANDS = 192  # bytes of activations and weights that one step moves, in flight between load and multiplication
SHARED_BYTES = GPUS["sm_80"].shared_bytes - 3 * 1024  # sm_90 has more, sm_86 and sm_89 have 99 KiB
STEP_WORDS = 4  # 128 channels, or as many of several taps: more does not shorten the loop by much
IDLE = 0.34  # of the taps of a step, at most: four of a 3 x 3 window leave a third of them idle


SPILLING = ("3.8", "3.9")  # releases of Triton, by their first two numbers; 3.5 to 3.7 spill nothing


def spills(version: str) -> str | None:
    """What a release of Triton spills of these kernels that others keep in registers, None where nothing is known.

    >>> spills("3.7.1") is None, spills("3.8.0")
    (True, 'spills about 1 KB for a thread in stems and layers of 64 channels')
    """
    if ".".join(version.split(".")[:2]) not in SPILLING:
        return None
    return "spills about 1 KB for a thread in stems and layers of 64 channels"


@dataclass(frozen=True)
class GemmConfig:
    """One way to launch the kernel. A tile is `block_m` output pixels by `block_o` filters."""

    block_m: int
    block_o: int
    block_words: int  # 32-channel words per step of the reduction, of one tap
    warps: int
    stages: int
    weights_first: bool  # acc^T = W X^T: weights are operand A of the tensor core, else activations are
    weights: str = "bytes"  # as they are multiplied, or "fields": a quarter or half of the size, unpacked in registers
    split_k: int = 1  # programs that share the reduction of one tile
    block_taps: int = 1  # window positions per step

    @property
    def step_words(self) -> int:
        """Words that one step reduces over."""
        return self.block_words * self.block_taps

    def __str__(self) -> str:
        order = "wx" if self.weights_first else "xw"
        taps = f"x{self.block_taps}" if self.block_taps > 1 else ""
        return (
            f"gemm_m{self.block_m}_o{self.block_o}_k{WORD * self.block_words}{taps}_w{self.warps}_s{self.stages}_"
            f"{order}_{self.weights}_p{self.split_k}"
        )

    @classmethod
    def parse(cls, text: str) -> GemmConfig:
        """The configuration that prints as `text`.

        Raises:
            FormatError: no configuration prints like that.

        >>> GemmConfig.parse("gemm_m128_o64_k64_w4_s3_xw_fields_p1").weights
        'fields'
        """
        pattern = r"gemm_m(\d+)_o(\d+)_k(\d+)(?:x(\d+))?_w(\d+)_s(\d+)_(wx|xw)_(bytes|fields)_p(\d+)"
        found = match_text(pattern, text, "GEMM", cls(128, 64, 4, 4, 3, False, "fields"))
        if int(found[3]) % WORD:
            raise FormatError(f"{text!r}: steps of {found[3]} channels; they are multiples of {WORD}")
        m, o, k, taps, warps, stages = (int(found[i] or 1) for i in range(1, 7))
        return cls(m, o, k // WORD, warps, stages, found[7] == "wx", found[8], int(found[9]), taps)

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run `problem`, or None. The one place where the rule is stated.

        - one group;
        - blocks are powers of two, pixels and filters at least 16 (a tensor-core fragment);
        - a tile of filters holds whole words of 32 channels, or all filters there are: planes are written word by word;
        - several taps in a step are a power of two, fewer than twice the window, and find all channels in one block;
        - accumulator and unpacked operands fit the registers, and both operands of every stage fit shared memory;
        - 4 or 8 warps (a Hopper warp group has 4), with at least one 16 x 8 fragment each;
        - fields: see `_fields_why_not`; no more parts than the reduction has steps.
        """
        if problem.groups > 1:
            return f"{self}: {problem.groups} groups leave a tensor core too little; take the direct kernels"
        sizes = (self.block_m, self.block_o, self.block_words, self.block_taps, self.warps)
        if any(size < 1 or size & (size - 1) for size in sizes):
            return f"{self}: blocks and warps are powers of two"
        if self.block_m < 16 or self.block_o < 16:
            return f"{self}: a tensor-core fragment has 16 rows, use blocks of at least 16"
        if self.block_o % WORD and self.block_o < problem.out_channels:
            return f"{self}: {problem.out_channels} filters in blocks of {self.block_o} would share words of {WORD}"
        taps = problem.kernel[0] * problem.kernel[1]
        if self.block_taps > 1 and (self.block_taps >= 2 * taps or self.block_words < words(problem.in_channels)):
            return (
                f"{self}: {self.block_taps} of {taps} taps with {problem.in_channels} channels in a step; take fewer "
                "taps, or words for all channels"
            )
        if self.warps not in (4, 8) or not 1 <= self.stages <= 5:
            return f"{self}: use 4 or 8 warps and 1 to 5 stages"
        tile = self.block_m * self.block_o
        if tile < 16 * 8 * self.warps:
            return f"{self}: {self.warps} warps for a tile of {self.block_m} x {self.block_o}, some would idle"
        if tile > ACCUMULATORS * 32 * self.warps:
            return f"{self}: {tile // (32 * self.warps)} accumulators per thread; at most {ACCUMULATORS} do not spill"
        operands = self.step_words * (self.block_m + self.block_o) // self.warps
        if operands > OPERANDS:
            return f"{self}: {operands} operands per thread and step; at most {OPERANDS} do not spill"
        shared = self.stages * WORD * self.step_words * (self.block_m + self.block_o)
        if shared > SHARED_BYTES:
            return f"{self}: operands take {shared} bytes of shared memory; at most {SHARED_BYTES}"
        if self.weights not in ("bytes", "fields"):
            return f"{self}: weights are bytes or fields"
        steps = reduction_steps(problem, self.block_words, self.block_taps)
        if not 1 <= self.split_k <= steps:
            return f"{self}: {self.split_k} parts of a reduction of {steps} steps"
        return self._fields_why_not(problem) if self.weights == "fields" else None

    def _fields_why_not(self, problem: Problem) -> str | None:
        """They hold at most 4 bits, have no 0 for what lies beyond the channels, and scale the sum by a power of 2."""
        if problem.w_bits > FIELD_BITS:
            return f"{self}: {problem.w_bits}-bit weights; fields hold at most {FIELD_BITS} bits, take bytes"
        if problem.a_bits == MAX_BITS and problem.in_channels % (WORD * self.block_words):
            return (
                f"{self}: {problem.in_channels} channels of bytes, whose rest holds anything, in blocks of "
                f"{WORD * self.block_words}; fields have no 0 for it, take bytes"
            )
        # A field is at most 128 in magnitude, on either grid.
        largest = problem.reduction * 128 * ((1 << problem.a_bits) - 1)
        if largest >= 1 << 31:
            return f"{self}: sums of up to {largest} while weights are fields, beyond 32 bits; take bytes"
        return None


def triton_why_not(problem: Problem) -> str | None:
    """Why no kernel in Triton that multiplies serves `problem`, or None."""
    if not 1 <= problem.w_bits <= MAX_BITS or not 1 <= problem.a_bits <= MAX_BITS:
        return f"w{problem.w_bits}a{problem.a_bits}; codes have 1 to {MAX_BITS} bits"
    return "activations are nibbles, which csrc/s8 alone reads" if problem.nibbles else None


def reduction_steps(problem: Problem, block_words: int, block_taps: int = 1) -> int:
    """Steps of one tile's reduction: word blocks times groups of taps."""
    taps = problem.kernel[0] * problem.kernel[1]
    return -(-words(problem.in_channels) // block_words) * -(-taps // block_taps)


def slow_operand(config: GemmConfig, problem: Problem) -> bool:
    """Whether the compiler would move an unpacked operand through shared memory byte by byte.

    It does where one thread would unpack a whole row of operand A: 64 one-byte stores and loads for each step, twice
    the whole loop. And where there are fewer words of fields than threads to unpack them into operand B: 8 stores and
    more instructions around them. Read from the disassembly with Triton 3.7 for sm_90.
    """
    threads = 32 * config.warps
    fields = config.step_words * (2 if problem.w_bits <= 2 else 4)  # words of one filter, if they are fields
    if config.weights_first:
        row, rows = fields, config.block_o
        computed = config.weights == "fields"
    else:
        row, rows = config.step_words, config.block_m
        computed = problem.a_bits < MAX_BITS
        if config.weights == "fields" and fields * config.block_o < threads:
            return True
    return computed and min(4, max(1, row * rows // threads)) >= row


def gemm_candidates(problem: Problem) -> Iterator[GemmConfig]:
    """Valid configurations worth timing: no tile twice as large as the problem, no word block beyond its channels."""
    if problem.groups > 1:
        return
    rows = problem.rows
    sizes = product((16, 32, 64, 128, 256), (16, 32, 64, 128), (1, 2, 4), (1, 2, 4))
    for block_m, block_o, block_words, block_taps in sizes:
        wasteful = (
            (block_m > 16 and block_m >= 2 * rows)
            or (block_o > 16 and block_o >= 2 * problem.out_channels)
            or (block_words > 1 and block_words >= 2 * words(problem.in_channels))
            or block_words * block_taps > STEP_WORDS
            or _idle_taps(problem, block_taps) > IDLE
        )
        if wasteful:
            continue
        parts = [part for part in (1, 2, 4, 8, 16) if part == 1 or _tiles(problem, block_m, block_o) * part <= BLOCKS]
        choices = product((4, 8), (2, 3, 4), (True, False), ("bytes", "fields"), parts)
        for warps, stages, weights_first, weights, split_k in choices:
            config = GemmConfig(
                block_m, block_o, block_words, warps, stages, weights_first, weights, split_k, block_taps
            )
            if config.why_not(problem) is None and not slow_operand(config, problem):
                yield config


def _idle_taps(problem: Problem, block_taps: int) -> float:
    """Positions of the last step behind the window, as a share of it."""
    taps = problem.kernel[0] * problem.kernel[1]
    return -taps % block_taps / taps


def _tiles(problem: Problem, block_m: int, block_o: int) -> int:
    rows = problem.rows
    return -(-rows // block_m) * -(-problem.out_channels // block_o)


def _short(problem: Problem) -> GemmConfig | None:
    """The tile of a 1 x 1 window over at most 32 channels of bytes, or 64 of planes, into many pixels of more filters.

    64 sums a thread in 4 warps: what a thread does once is shared by as many outputs as fit, and 96 or 144 filters are
    cut by 32. For 16 to 96 channels, ReLU6 and codes alone, on sm_90 an output takes 17 instructions at 8 bits where
    tiles of 128 x 128 take 22, and 27 at 4 bits for 62, with 11 barriers for 43 (Triton 3.7.1). There are so few steps
    that operands may move byte by byte.
    """
    count = words(problem.in_channels)
    if problem.kernel != (1, 1) or count > (1 if problem.a_bits == MAX_BITS else 2) or problem.out_channels <= WORD:
        return None
    config = GemmConfig(256, WORD, power_at_least(count, 1, 2), warps=4, stages=2, weights_first=False)
    many = _tiles(problem, config.block_m, config.block_o) >= BLOCKS
    return config if many and config.why_not(problem) is None else None


def gemm_default(problem: Problem) -> GemmConfig:
    """The configuration where nothing was measured: a rule read from the disassembly, not a result.

    - The tile is as large as the problem allows, up to 128 x 128, and halved along the pixels and then the filters
      while it leaves multiprocessors idle. Tiles of 64 x 128 and more get 8 warps.
    - A step takes 128 channels. Where there are fewer, it takes several taps, for the same bookkeeping.
    - What is still idle, at few rows, shares the reduction, with at least two steps for each.
    - Activations are operand A: a quad of threads then holds 8 neighbouring channels, which the epilogue packs with two
      shuffles. Where one thread would unpack a whole row of them (`slow_operand`), or only the filters fill the 64 rows
      of a Hopper instruction, weights are.
    - Weights are fields where they can be.
    - Of a reduction that is one short step, the epilogue is all there is (`_short`).
    """
    short = _short(problem)
    if short is not None:
        return short
    rows = problem.rows
    block_o = power_at_least(problem.out_channels, 16, 128)
    block_m = power_at_least(rows, 16, 128)
    while block_m > 32 and _tiles(problem, block_m, block_o) < BLOCKS:
        block_m //= 2
    while block_o > 64 and _tiles(problem, block_m, block_o) < BLOCKS:
        block_o //= 2
    while block_m * block_o < 16 * 8 * 4:
        block_m *= 2
    warps = 8 if block_m * block_o >= 64 * 128 else 4
    block_words = power_at_least(words(problem.in_channels), 1, STEP_WORDS)
    while block_words > 1 and block_words * (block_m + block_o) > OPERANDS * warps:
        block_words //= 2
    block_taps = STEP_WORDS // block_words if words(problem.in_channels) <= block_words else 1
    while _idle_taps(problem, block_taps) > IDLE or block_words * block_taps * (block_m + block_o) > OPERANDS * warps:
        block_taps //= 2
    steps = reduction_steps(problem, block_words, block_taps)
    split_k = 1
    while 4 * split_k <= steps and 2 * split_k * _tiles(problem, block_m, block_o) <= BLOCKS:
        split_k *= 2
    orders = (True, False) if block_m < 64 <= block_o else (False, True)
    choices = [
        GemmConfig(block_m, block_o, block_words, warps, 3, weights_first, weights, split_k, block_taps)
        for weights, weights_first in product(("fields", "bytes"), orders)
    ]
    valid = [config for config in choices if config.why_not(problem) is None]
    return next((config for config in valid if not slow_operand(config, problem)), valid[0])
