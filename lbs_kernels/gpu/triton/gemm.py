"""The implicit GEMM seen from Python: operands and workspace of one step, and its launch.

The kernel is in gpu/triton/gemm_kernel.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.layout import BYTE_BITS, from_logical, pixel_elements
from lbs_kernels.gpu.triton.common import LAUNCH_OPTIONS
from lbs_kernels.gpu.triton.emit import EmitMeta, EmitTarget
from lbs_kernels.gpu.triton.gemm_kernel import (
    GemmMeta,
    GemmOperands,
    GemmShape,
    SplitTarget,
    gemm_kernel,
)
from lbs_kernels.gpu.weights import WeightTiles, byte_units, field_shift
from lbs_kernels.program.planes import check_accumulator, unpack_weights, words
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import TensorSpec, WeightGrid


@dataclass(frozen=True)
class GemmWeights:
    """Weights of one step: planes on the device, and what the configurations asked for made of them."""

    planes: Tensor  # int32 [w_bits, O, T, CW], on the device
    codes: Tensor  # uint8 [O, T, C], on the CPU
    offset: Tensor  # int32 [O], on the device: what is added to every accumulator
    padding: Tensor  # a pixel of the code that padding holds and one of code 0, in their GPU form, on the device
    kernel: tuple[int, int]
    source: TensorSpec  # of the activations
    grid: WeightGrid = "odd"
    _tiles: dict[WeightTiles, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def bits(self) -> int:
        return self.planes.shape[0]

    def tiles(self, config: GemmConfig) -> Tensor:
        """The operand of one configuration: int32 fields, or int8 bytes; made on first use and kept."""
        fields = config.weights == "fields"
        blocks = (config.block_o, config.block_words, config.block_taps)
        layout = WeightTiles(self.bits, self.source.bits, fields, *blocks, self.grid)
        if layout not in self._tiles:
            tiles = layout.tiles(self.codes)
            self._tiles[layout] = (tiles if fields else tiles.view(torch.int8)).to(self.planes.device)
        return self._tiles[layout]


def prepare_weights(
    planes: Tensor,
    kernel: tuple[int, int],
    groups: int,
    source: TensorSpec,
    device: torch.device,
    grid: WeightGrid = "odd",
) -> GemmWeights:
    """Weights for the activations of `source`; sums over k are taken once, here.

    Args:
        planes: int32 [w_bits, O, T, CW], T = kernel taps, CW over the channels of one group.
        kernel: (rows, columns).
        groups: of the convolution.
        source: channels, bits, zero and sign of the activations.
        device: where the kernels run.
        grid: of the weights.

    Raises:
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
    """
    w_bits, _, taps, _ = planes.shape
    channels = source.channels // groups
    check_accumulator(taps * channels, w_bits, source.bits, source.name)
    codes = unpack_weights(planes.cpu(), channels)
    w_scale, w_shift = _weight_scale(w_bits, grid)
    _, x_shift = _activation_scale(source)
    scale, shift = byte_units(w_bits, grid)
    w = scale * codes.long() + shift
    # int64 here, int32 on the device: only the sum with the dot product has to fit, the rest wraps around.
    offset = w_scale * x_shift * w.sum(dim=(1, 2)) + w_shift * x_shift * taps * channels
    code = torch.full((1, 1, 1, source.channels), source.zero, dtype=torch.uint8)
    pixel = from_logical(code, source)
    padding = torch.cat([pixel, torch.zeros_like(pixel)]).to(device)
    return GemmWeights(
        planes.contiguous().to(device), codes, offset.to(torch.int32).to(device), padding, kernel, source, grid
    )


def _weight_scale(bits: int, grid: str) -> tuple[int, int]:
    """(scale, shift): what a code counts as is scale * w + shift, w being the byte that is multiplied."""
    return (2, 1) if bits == BYTE_BITS and grid == "odd" else (1, 0)


def _activation_scale(source: TensorSpec) -> tuple[int, int]:
    """(scale, shift): what a code means is scale * x + shift, x being the number that is multiplied."""
    scale, shift = (2, 1 - (1 << source.bits)) if source.signed else (1, -source.zero)
    return scale, shift + scale * 128 if source.bits == BYTE_BITS else shift


def operand_scales(weights: GemmWeights) -> tuple[int, int]:
    """(dot_scale, sum_scale) of gpu/triton/gemm_kernel.py."""
    w_scale, w_shift = _weight_scale(weights.bits, weights.grid)
    x_scale, _ = _activation_scale(weights.source)
    return w_scale * x_scale, w_shift * x_scale


def gemm_shape(problem: Problem, source: TensorSpec) -> GemmShape:
    """The sizes the kernel reads, of a convolution, or of a matrix product as one of 1 x 1 pixels."""
    return GemmShape(
        problem.rows,
        problem.out_channels,
        problem.in_channels,
        pixel_elements(source),
        problem.height,
        problem.width,
        problem.out_height,
        problem.out_width,
        *problem.stride,
        *problem.padding,
        *problem.dilation,
        problem.groups,
    )


def launch_options(warps: int, stages: int) -> dict[str, int | bool]:
    """Options of a launch, and of an ahead-of-time compilation of the same kernel."""
    return {**LAUNCH_OPTIONS, "num_warps": warps, "num_stages": stages}


def gemm_meta(weights: GemmWeights, shape: GemmShape, config: GemmConfig) -> GemmMeta:
    """The facts of the operands for one configuration."""
    dot_scale, sum_scale = operand_scales(weights)
    count = words(shape.channels)
    return GemmMeta(
        weights.kernel,
        weights.bits,
        weights.grid == "odd",
        weights.source.bits,
        dot_shift=field_shift(weights.bits, weights.grid) if config.weights == "fields" else 0,
        dot_scale=dot_scale,
        sum_scale=sum_scale,
        padded=shape.pad_h > 0 or shape.pad_w > 0,
        tail=shape.channels % (32 * config.block_words) != 0,
        run=min(config.block_words, count & -count),
    )


def tile_count(rows: int, filters: int, config: GemmConfig) -> int:
    """Tiles that cover the output."""
    return -(-rows // config.block_m) * -(-filters // config.block_o)


def gemm_grid(shape: GemmShape, config: GemmConfig) -> tuple[int, int]:
    """Programs of one launch: tiles, and parts of the reduction."""
    return tile_count(shape.rows, shape.filters, config), config.split_k


def split_target(shape: GemmShape, config: GemmConfig, device: torch.device) -> SplitTarget | None:
    """Workspace of one launch; every launch leaves it as zero as it found it."""
    if config.split_k == 1:
        return None
    return workspace(tile_count(shape.rows, shape.filters, config), config.block_m * config.block_o, device)


def workspace(tiles: int, sums: int, device: torch.device) -> SplitTarget:
    """Of programs that share tiles of so many sums."""
    partial = torch.zeros((tiles, sums), dtype=torch.int32, device=device)
    return SplitTarget(partial, torch.zeros(tiles, dtype=torch.int32, device=device))


def bind_gemm(
    x: Tensor,
    weights: GemmWeights,
    multiplier: Tensor,
    bias: Tensor,
    target: EmitTarget,
    emit_meta: EmitMeta,
    shape: GemmShape,
    config: GemmConfig,
) -> Launch:
    """A launch of `gemm_kernel` on activations x in their GPU form, everything fixed."""
    operands = GemmOperands(x, weights.padding, weights.tiles(config), weights.offset, multiplier, bias)
    run = functools.partial(
        gemm_kernel[gemm_grid(shape, config)], operands, split_target(shape, config, x.device), target, shape,
        META=gemm_meta(weights, shape, config), EMIT=emit_meta, CONFIG=config,
        **launch_options(config.warps, config.stages), launch_pdl=overlaps(),
    )  # fmt: skip
    return lambda inputs: run()
