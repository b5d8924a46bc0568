"""K1 on Hopper: implicit GEMM on s8 tensor cores, from bytes to planes, bytes or streams (csrc/s8).

Activations are x = q - 128, as the GPU keeps codes of 8 bits. With u what a weight counts as (`weight_units`):

    acc = sum_k u (x + 128 - zero) = sum_k u x + (128 - zero) sum_k u            unsigned activations
    acc = sum_k u (2 x + 1)        = 2 sum_k u x + sum_k u                       signed ones

Nibbles are multiplied as the codes they are, of n + 1 levels:

    acc = sum_k u (q - zero)       = sum_k u q - zero sum_k u                    unsigned
    acc = sum_k u (2 q - n)        = 2 sum_k u q - n sum_k u                     signed

Padding is a pixel of the code `zero`, so that the second sum runs over all of K, a constant of the filter. Bytes w
are multiplied: u itself, but on the odd grid at 8 bits u = 2 w + 1, and then sum_k u x = 2 sum_k w x + sum_k x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.configs.cuda import S8Config, s8_why_not
from lbs_kernels.gpu.cuda.layout import S8Layout
from lbs_kernels.gpu.cuda.task import bind_task, check_taps, emit_why_not
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.layout import from_logical, kept
from lbs_kernels.gpu.weights import centre_bytes
from lbs_kernels.program.planes import MAX_BITS, check_accumulator, unpack_weights, weight_units
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, TensorSpec, WeightGrid


@dataclass(frozen=True)
class S8Weights:
    """Weights of one step; laid out on the device once for every width of tile that is asked for."""

    bytes: Tensor  # int8 [O, T, C], on the processor
    sums: bool  # of activations are needed
    offset: Tensor  # int32 [O]
    border: Tensor  # [1, 1, 1, pitch] on the device, as the activations lie: a pixel of what padding holds
    nibbles: bool = False  # the activations
    made: dict[int, tuple[S8Layout, dict[str, Tensor]]] = field(default_factory=dict)

    def laid_out(self, block_o: int) -> tuple[S8Layout, dict[str, Tensor]]:
        """(layout, the operands of `bind_task`)."""
        if block_o not in self.made:
            filters, taps, channels = self.bytes.shape
            layout = S8Layout(filters, block_o, taps, channels, self.sums, self.nibbles)
            made = {"w": layout.forward(self.bytes), "offset": layout.per_filter(self.offset), "border": self.border}
            self.made[block_o] = layout, {name: one.to(self.border.device) for name, one in made.items()}
        return self.made[block_o]


def step_why_not(step: ConvStep | LinearStep, source: TensorSpec) -> str | None:
    """Why the kernels cannot serve a step that reads `source`, beyond what its Problem says, or None."""
    if source.nibbles and (step.w_bits, step.w_grid) == (MAX_BITS, "odd"):
        return f"{source.name} is kept as nibbles; weights of 8 bits without a zero multiply bytes"
    return emit_why_not(step)


def writes_why_not(step: ConvStep | LinearStep, config: S8Config, program: Program) -> str | None:
    """Why the kernel of `config` cannot write what a step writes, or None."""
    for spec in (program.tensors[consumer.tensor] for consumer in step.emit.consumers):
        if not config.writes(kept(spec)):
            return f"{spec.name} is kept as {kept(spec)}; {config} writes bytes and streams"
    return None


def prepare_weights(
    planes: Tensor,
    kernel: tuple[int, int],
    groups: int,
    source: TensorSpec,
    device: torch.device | str,
    grid: WeightGrid = "odd",
) -> S8Weights:
    """Weights for the activations of `source`, as bytes, and what they add to every accumulator.

    Args:
        planes: int32 [w_bits, O, T, CW], T = kernel taps.
        kernel: (rows, columns).
        groups: of the convolution; 1.
        source: channels, bits, zero and sign of the activations.
        device: where the kernels run.
        grid: of the weights.

    Raises:
        FormatError: the accumulator could overflow, or the planes do not fit the channels.
        BackendError: bits or groups that are not served.
    """
    check_taps(planes, kernel)
    w_bits, _, taps, _ = planes.shape
    sums = (w_bits, grid) == (MAX_BITS, "odd")
    if kept(source) == "planes" or groups != 1 or (source.nibbles and sums):
        raise BackendError(
            f"s8 kernels cannot read {source.name}: {source.bits} bits as {kept(source)}, {groups} groups, weights of "
            f"{w_bits} bits on the grid {grid}; they take bytes and nibbles, one group, and beside nibbles no weights "
            "of 8 bits on the grid odd"
        )
    check_accumulator(taps * source.channels, w_bits, source.bits, source.name)
    scale, shift = weight_units(w_bits, grid)
    codes = unpack_weights(planes.cpu(), source.channels)
    units = scale * codes.to(torch.int16) + shift
    if source.nibbles:
        constant = 1 - (1 << source.bits) if source.signed else -source.zero
    else:
        constant = 1 if source.signed else 128 - source.zero
    # int64 here, int32 on the device: only the sum with the products has to fit, the rest wraps around.
    offset = (constant * units.long().sum(dim=(1, 2))).to(torch.int32)
    code = torch.full((1, 1, 1, source.channels), source.zero, dtype=torch.uint8)
    w = centre_bytes(codes, w_bits, grid).view(torch.int8)
    return S8Weights(w, sums, offset, from_logical(code, source).to(device), source.nibbles)


def bind(
    step: ConvStep | LinearStep,
    problem: Problem,
    config: S8Config,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: S8Weights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step (`bind_task`).

    Raises:
        BackendError: a problem, configuration or epilogue that is not served, or a native module that is missing.
    """
    reason = s8_why_not(problem) or step_why_not(step, program.tensors[step.input]) or config.why_not(problem)
    reason = reason or writes_why_not(step, config, program)
    if reason is not None:
        raise BackendError(f"s8 kernels cannot serve {problem}: {reason}")
    layout, operands = weights.laid_out(config.block_o)
    return bind_task(step, problem, config, program, arrays, layout, operands, buffers)
