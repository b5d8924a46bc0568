"""K2: implicit GEMM on the one-bit tensor cores, from bit-planes to planes, bytes or streams (csrc/onebit).

acc = 2 sum_{p,r} 2^(p+r) popc(W_p & X_r) - n_w sum_k qx                   unsigned activations
acc = 2 (the same) - n_x sum_k (2 qw - n_w)                                signed ones
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.configs.cuda import OneBitConfig, onebit_why_not
from lbs_kernels.gpu.cuda.layout import OneBitLayout
from lbs_kernels.gpu.cuda.task import bind_task, check_taps, emit_why_not
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.program.planes import check_accumulator, unpack_weights, weight_units
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, TensorSpec, WeightGrid


@dataclass(frozen=True)
class OneBitWeights:
    """Weights of one step on the device; laid out once for every width of tile that is asked for."""

    planes: Tensor  # int32 [w_bits, O, T, CW], on the processor
    offset: Tensor  # int32 [O]
    device: torch.device
    made: dict[int, tuple[OneBitLayout, Tensor, Tensor]] = field(default_factory=dict)

    def laid_out(self, block_o: int) -> tuple[OneBitLayout, Tensor, Tensor]:
        """(layout, weights int32 of layout.shape, offset int32 [slots]) on the device."""
        if block_o not in self.made:
            w_bits, filters, taps, words = self.planes.shape
            layout = OneBitLayout(filters, block_o, w_bits, taps, words)
            offset = layout.per_filter(self.offset).to(self.device)
            self.made[block_o] = layout, layout.forward(self.planes).to(self.device), offset
        return self.made[block_o]


def step_why_not(step: ConvStep | LinearStep, source: TensorSpec) -> str | None:
    """Why the kernels cannot serve a step that reads `source`, beyond what its Problem says, or None."""
    if source.zero and isinstance(step, ConvStep) and step.padding != (0, 0):
        return f"{source.name} pads with code {source.zero}; the one-bit kernels pad with 0"
    return emit_why_not(step)


def prepare_weights(
    planes: Tensor,
    kernel: tuple[int, int],
    groups: int,
    source: TensorSpec,
    device: torch.device | str,
    grid: WeightGrid = "odd",
) -> OneBitWeights:
    """Weights for the activations of `source`, and what they add to every accumulator.

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
    w_bits, filters, taps, _ = planes.shape
    problem = Problem(
        "bitconv2d", 1, 1, 1, source.channels, filters, groups=groups, w_bits=w_bits, a_bits=source.bits,
        device=str(device),
    )  # fmt: skip
    reason = onebit_why_not(problem)
    if reason is not None:
        raise BackendError(f"one-bit kernels cannot read {source.name}: {reason}")
    check_accumulator(taps * source.channels, w_bits, source.bits, source.name)
    scale, shift = weight_units(w_bits, grid)
    sums = (scale * unpack_weights(planes.cpu(), source.channels).long() + shift).sum(dim=(1, 2))
    centre = (1 << source.bits) - 1 if source.signed else source.zero
    return OneBitWeights(planes.cpu().contiguous(), (-centre * sums).to(torch.int32), torch.device(device))


def bind(
    step: ConvStep | LinearStep,
    problem: Problem,
    config: OneBitConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: OneBitWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step (`bind_task`).

    Raises:
        BackendError: a problem, configuration or epilogue that is not served, or a native module that is missing.
    """
    source = program.tensors[step.input]
    reason = onebit_why_not(problem) or step_why_not(step, source) or config.why_not(problem)
    if reason is not None:
        raise BackendError(f"one-bit kernels cannot serve {problem}: {reason}")
    layout, w, offset = weights.laid_out(config.block_o)
    return bind_task(step, problem, config, program, arrays, layout, {"w": w, "offset": offset}, buffers)
