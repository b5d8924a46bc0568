"""What a step should take on a GPU, by counts of its tiles: for choices and budgets where nothing was measured.

    seconds = step + max(bytes / device memory, rounds of tiles * clocks of a tile / clock)   their sum in Triton's GEMM

A tile takes what its slowest part takes where the parts overlap, and their sum where they wait for one another:

    products    N / 2 clocks of a 64 x N x 32 product of bytes, or of a 64 x N x 256 product of single bits
    refill      operands from the second-level cache, `refill` bytes a clock and multiprocessor
    issue       instructions of the loop, one a clock for each of four schedulers
    copies      of 16 bytes, by threads that do nothing else
    expansion   of nibbles by threads that multiply, which the others' epilogue leaves to be issued
    epilogue    instructions for every output

Triton ends every product before the next, so that its issue and its products add up, and its epilogue stands behind
its loop (docs/triton.md). The kernels in CUDA overlap both, and two tiles at a time. With the sum for Triton's GEMM,
whose loads wait as its products do, the model comes near what was read from all of its compiled kernels: 1.9 and 4.6 ms
for ResNet-18 and -50 at batch 128, 8/8 bits and float32 streams, where that reading says 2.1 (1.5 to 2.9) and 4.9 (3.5
to 6.6). Where each number comes from stands beside it; none is a time of a kernel, and what is computed from them is
called modelled wherever it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lbs_kernels.gpu.configs.cuda import CHUNK_BYTES, GROUP_ROWS, CudaConfig, OneBitConfig, S8Config
from lbs_kernels.gpu.configs.depthwise_project import OP as DEPTHWISE_PROJECT
from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig, project_steps, project_tiles
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig, column_positions, column_rows
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig, reduction_steps
from lbs_kernels.gpu.configs.stem_pool import StemPoolConfig, stem_pool_steps, stem_pool_tiles
from lbs_kernels.gpu.layout import NIBBLE_BITS, PITCH, byte_pitch
from lbs_kernels.program.planes import MAX_BITS, WORD, words
from lbs_kernels.program.problem import Problem

STEP_BYTES = 32  # of K in one product of bytes
STEP_BITS = 256  # of K in one product of single bits
LANES = 128  # of a multiprocessor: instructions of threads that it issues in a clock


@dataclass(frozen=True)
class Machine:
    """A GPU. clock: Hz of the tensor cores at work. bandwidth: bytes per second of device memory, read and written.

    refill: bytes a clock that the second-level cache gives one multiprocessor. step: seconds of a launch in a graph
    and of filling and draining the machine.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    refill: float
    step: float


# clock: at 64 clocks for a 64 x 128 x 256 product of bits, what was measured as `b1` in
# benchmarks/results/nvidia-h200/roofs.json; bandwidth: `copy` there. refill: a published lead. step: makes the 24 steps
# of ResNet-18 and the 58 of ResNet-50 at batch 1 the 122 and 256 us that their compiled kernels let expect.
H200 = Machine("nvidia-h200", 132, 15.36e15 / 2 / (132 * 32768), 4.17e12, 34.0, 3.4e-6)

# Seconds of a fork of streams and its join in a graph: a guess, some half of a step; none was timed.
FORK = 1.5e-6

# Read from the disassembly, batch 128 (docs/triton.md, docs/cuda.md).
LARGE_TILE = (
    64 * 128
)  # of Triton's: two blocks of it have room on a multiprocessor, of larger ones one (docs/triton.md)
GEMM_ISSUE = 48.0  # instructions of a thread per 64 x N x 32 product, activations of 8 bits
PLANES_ISSUE = (32.0, 5.4)  # and of planes: to begin with, and for each plane
COPY_ISSUE = 13.0  # for a copy of 16 bytes
NIBBLE_ISSUE = 15.1 - 7.2  # of a thread per 64 x N x 32 product, of nibbles beside bytes
BYTES_EPILOGUE, PLANES_EPILOGUE = 783 / 64, 1309 / 64  # for an output
# A lead, published for this GPU: some 200 clocks to another block's shared memory, which two barriers of a cluster, the
# sums and what is waited for between them take about once each.
EXCHANGE_CLOCKS = 800.0
COLUMNS_ISSUE = {1: 14.1, 2: 18.2}  # for an output by strips of columns, its epilogue included, by the step
DEPTHWISE_ISSUE = 1424 / 32 / 9  # for an output and tap
# Of a depthwise window with the layer behind it: for an output of the window and for a step, by the window's step; of
# the rest for a program and for an output.
PROJECT_ISSUE = {1: (12.2, 165.0), 2: (15.4, 106.0)}
PROJECT_EPILOGUE = (450.0, 16.5)
# A lead: what loads from device memory take, which the other program of a multiprocessor may hide.
LOAD_CLOCKS = 700.0
# Of a stem with its maximum, tiles of 64 x 64 in 4 warps: a step of 256 bytes of K, and an output of the maximum.
STEM_ISSUE, STEM_EPILOGUE = 180.0, 750 / 32
FIRST_LEVEL = 64.0  # bytes a clock of asynchronous copies that the first-level cache serves: half of what loads get


def executed(problem: Problem, config: Any) -> int:
    """Products of one weight and one activation that `config` computes for `problem`, those of padding included."""
    if isinstance(config, StemPoolConfig):
        steps = stem_pool_tiles(problem, config) * stem_pool_steps(config)
        return steps * config.block_m * config.block_o * problem.window.taps * byte_pitch(problem.in_channels)
    if isinstance(config, ProjectConfig):
        pixels = project_tiles(problem, config) * config.block_m * config.columns * column_rows(problem)
        return pixels * project_steps(problem, config) * config.block_c * (12 + config.filters)
    if isinstance(config, DepthwiseConfig) and config.columns:
        return _column_outputs(problem, config) * 12  # three sums of four
    pixels, filters = _padded(problem, config)
    taps = problem.window.taps
    if isinstance(config, GemmConfig):
        steps = reduction_steps(problem, config.block_words, config.block_taps)
        return pixels * filters * steps * WORD * config.step_words
    if isinstance(config, S8Config):
        return pixels * filters * _up(taps * byte_pitch(problem.in_channels), STEP_BYTES)
    if isinstance(config, OneBitConfig):
        return pixels * filters * _up(taps * words(problem.in_channels) * WORD, STEP_BITS)
    if isinstance(config, DepthwiseConfig):
        return pixels * filters * _up(taps, 4)  # dp4a takes four taps
    if isinstance(config, GroupedConfig):
        return pixels * filters * problem.reduction
    return 0 if isinstance(config, ElementwiseConfig) else problem.macs


def seconds(problem: Problem, config: Any, machine: Machine = H200, moved: float | None = None) -> float:
    """Modelled seconds of one step.

    Args:
        moved: bytes of device memory it reads and writes; by default those of activations, weights and as many bits of
            codes written as are read.
    """
    moved = bytes_moved(problem, config) if moved is None else moved
    parts = _clocks(problem, config, machine) / machine.clock, moved / machine.bandwidth
    return machine.step + (sum(parts) if isinstance(config, GemmConfig | StemPoolConfig) else max(parts))


def bytes_moved(problem: Problem, config: Any) -> float:
    """Activations read, weights read and codes written, each once, in the form that the kernel keeps them in."""
    as_bytes = isinstance(config, S8Config)
    w_bits, a_bits = (MAX_BITS, MAX_BITS) if as_bytes else (problem.w_bits, problem.a_bits)
    if problem.nibbles:
        a_bits = NIBBLE_BITS
    pixels = problem.batch * problem.height * problem.width
    weights = weight_count(problem) * w_bits
    return (a_bits * (pixels * problem.in_channels + problem.rows * problem.out_channels) + weights) / 8


def weight_count(problem: Problem) -> int:
    """Weights of a layer; of a depthwise window and the 1 x 1 layer behind it, those of both."""
    if problem.op == DEPTHWISE_PROJECT:
        return problem.in_channels * (problem.window.taps + problem.out_channels)
    return problem.out_channels * problem.reduction


def resident(problem: Problem, config: Any, machine: Machine = H200) -> float | None:
    """Blocks of a step over those that find room on the machine at once; None for a kernel that is no GEMM."""
    pixels, filters = _padded(problem, config)
    if isinstance(config, CudaConfig):
        places = machine.multiprocessors * (2 if config.tile in config.clusters else 1)
        blocks = config.count(problem) * config.split
        return blocks / places if config.tile in config.clusters else min(blocks / places, 1.0)
    if isinstance(config, GemmConfig):
        tile = config.block_m * config.block_o
        return pixels * filters // tile * config.split_k / (machine.multiprocessors * (2 if tile <= LARGE_TILE else 1))
    return None


def _padded(problem: Problem, config: Any) -> tuple[int, int]:
    """Pixels and filters of whole tiles."""
    filters = getattr(config, "block_o", getattr(config, "block_c", 1))
    return _up(problem.rows, getattr(config, "block_m", 1)), _up(problem.out_channels, filters)


def _clocks(problem: Problem, config: Any, machine: Machine) -> float:
    """Clocks of the multiprocessor that works longest."""
    if isinstance(config, CudaConfig):
        return _cuda_clocks(problem, config, machine)
    if isinstance(config, StemPoolConfig):
        return _stem_pool_clocks(problem, config, machine)
    if isinstance(config, ProjectConfig):
        return _project_clocks(problem, config, machine)
    pixels, filters = _padded(problem, config)
    if isinstance(config, GemmConfig):
        tile = config.block_m * config.block_o
        steps = -(-reduction_steps(problem, config.block_words, config.block_taps) // config.split_k)
        products = max(1, config.block_m // GROUP_ROWS) * config.step_words
        base, plane = PLANES_ISSUE
        issue = GEMM_ISSUE if problem.a_bits == MAX_BITS else base + plane * problem.a_bits
        operands = WORD * config.step_words * (config.block_m * problem.a_bits + config.block_o * problem.w_bits) / 8
        loop = steps * max(products * (config.block_o / 2 + issue), operands / machine.refill)
        shared = 8 * tile / machine.refill if config.split_k > 1 else 0.0  # sums to the workspace and back
        tiles = pixels * filters // tile * config.split_k
        return -(-tiles // machine.multiprocessors) * (loop + shared + tile * _epilogue(problem) / LANES)
    if isinstance(config, DepthwiseConfig) and config.columns:
        issued = _column_outputs(problem, config) * COLUMNS_ISSUE[problem.stride[0]]
        return issued / LANES / machine.multiprocessors
    per_output = _epilogue(problem)
    if isinstance(config, DepthwiseConfig | GroupedConfig):
        per_output += DEPTHWISE_ISSUE * problem.reduction
    return pixels * filters * per_output / LANES / machine.multiprocessors


def _column_outputs(problem: Problem, config: DepthwiseConfig) -> int:
    """Outputs of whole strips and blocks of channels."""
    pixels = column_positions(problem, config.columns) * config.columns * column_rows(problem)
    return pixels * _up(problem.out_channels, config.block_c)


def _stem_pool_clocks(problem: Problem, config: StemPoolConfig, machine: Machine) -> float:
    reduction = problem.window.taps * byte_pitch(problem.in_channels)
    products = max(1, config.block_m // GROUP_ROWS) * reduction // STEP_BYTES * config.block_o / 2
    tile = config.block_m * config.block_o
    cache = machine.refill if config.piece == PITCH else FIRST_LEVEL
    step = max(products + STEM_ISSUE * tile / 4096, config.block_m * reduction / cache)
    rounds = -(-stem_pool_tiles(problem, config) // machine.multiprocessors)
    return rounds * (stem_pool_steps(config) * step + config.rows * tile * STEM_EPILOGUE / LANES)


def _project_clocks(problem: Problem, config: ProjectConfig, machine: Machine) -> float:
    """Two programs have room on a multiprocessor: what one waits for its loads, the other works."""
    strip = config.columns * column_rows(problem)
    programs = project_tiles(problem, config) * config.split
    beside = 2 if programs > machine.multiprocessors and config.warps == 4 else 1
    threads = 32 * config.warps / LANES
    output, fixed = PROJECT_ISSUE[problem.stride[0]]
    issue = (output * strip * config.block_c / 4 + fixed) * threads
    pixels = config.block_m * strip
    products = max(1, pixels // GROUP_ROWS) * config.block_c // STEP_BYTES * config.filters / 2
    operands = config.block_c * config.filters / machine.refill
    own = max(issue + products, operands)
    step = max(beside * own, own + LOAD_CLOCKS)
    fixed, output = PROJECT_EPILOGUE
    epilogue = (fixed + output * strip * config.filters / 4) * threads
    shared = 8 * pixels * config.filters / machine.refill if config.split > 1 else 0.0
    steps = -(-project_steps(problem, config) // config.split)
    rounds = -(-programs // (machine.multiprocessors * beside))
    return rounds * (steps * step + beside * (epilogue + shared))


def _cuda_clocks(problem: Problem, config: CudaConfig, machine: Machine) -> float:
    pixels, filters = _padded(problem, config)
    tile, taps = config.block_m * config.block_o, problem.window.taps
    groups = config.block_m // GROUP_ROWS
    if isinstance(config, S8Config):
        operand = CHUNK_BYTES // 2 if problem.nibbles else CHUNK_BYTES  # bytes of a chunk of a pixel
        reduction = taps * byte_pitch(problem.in_channels)
        chunks = reduction / CHUNK_BYTES
        steps = groups * -(-reduction // STEP_BYTES)
        products, expansion = steps * config.block_o / 2, steps * NIBBLE_ISSUE if problem.nibbles else 0.0
        # Copies are of 16 channels, of nibbles of 32 where pixels have pairs of them.
        copied = 32 if problem.nibbles and reduction // taps % 32 == 0 else 16
        copies = config.block_m * CHUNK_BYTES / copied * COPY_ISSUE / LANES
    else:
        # A chunk holds 512 bits of two planes; copies are of as many words of a pixel as divide its own.
        operand, expansion = CHUNK_BYTES, 0.0
        pairs = (problem.w_bits // 2) * (problem.a_bits // 2)
        row_words = words(problem.in_channels)
        wide = next(size for size in (4, 2, 1) if row_words % size == 0)
        chunks = pairs * taps * row_words * WORD / 512
        steps = -(-taps * row_words * WORD // STEP_BITS)
        products = groups * pairs * 4 * steps * config.block_o / 2
        copies = config.block_m * 32 / wide * COPY_ISSUE / LANES
    refill = (config.block_m * operand + config.block_o * CHUNK_BYTES) / machine.refill
    epilogue = tile * _epilogue(problem, isinstance(config, S8Config)) / LANES
    if config.tile in config.clusters:
        # Blocks share the chunks of a tile and then its outputs; whoever writes has read the sums of all others.
        rounds = -(-(pixels * filters // tile * config.split) // machine.multiprocessors)
        own = -(-chunks // config.split)
        exchange = EXCHANGE_CLOCKS + 2 * 4 * tile / machine.refill
        loop = max(products / chunks, refill, copies) * own + expansion / config.split
        return rounds * (loop + exchange + epilogue / config.split)
    rounds = -(-(pixels * filters // tile) // machine.multiprocessors)
    # A tile is written under the products of the next, the last one under nothing.
    return rounds * max(products, chunks * max(refill, copies), epilogue + expansion) + epilogue


def _epilogue(problem: Problem, as_bytes: bool = False) -> float:
    """Instructions for an output."""
    return BYTES_EPILOGUE if as_bytes or problem.a_bits in (0, MAX_BITS) else PLANES_EPILOGUE


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
