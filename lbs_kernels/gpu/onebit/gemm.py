"""K2: implicit GEMM on the one-bit tensor cores, from bit-planes to planes, bytes or streams (csrc/onebit).

    acc = 2 sum_{p,r} 2^(p+r) popc(W_p & X_r) - n_w sum_k qx                   unsigned activations
    acc = 2 (the same) - n_x sum_k (2 qw - n_w)                                signed ones

The kernels are those of `lbs_kernels._cuda`. Tests run the same source on a model of the GPU (tests/native/onebit);
docs/gpu.md says what has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.extension import require_cuda
from lbs_kernels.gpu.configs.onebit import OneBitConfig, onebit_why_not
from lbs_kernels.gpu.launch import Launch
from lbs_kernels.gpu.layout import pixel_elements
from lbs_kernels.gpu.onebit.layout import OneBitLayout
from lbs_kernels.program.epilogue import thresholds
from lbs_kernels.program.planes import check_accumulator, unpack_weights, weight_units
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Consumer, ConvStep, Emit, LinearStep, Program, TensorSpec, WeightGrid, build_blob

MAX_CONSUMERS = 8


@dataclass(frozen=True)
class OneBitWeights:
    """Weights of one step on the device; laid out once for every width of tile that is asked for."""

    planes: Tensor  # int32 [w_bits, O, T, CW], on the processor
    offset: Tensor  # int32 [O]
    device: torch.device
    grid: WeightGrid = "odd"
    made: dict[int, tuple[OneBitLayout, Tensor, Tensor]] = field(default_factory=dict)

    def laid_out(self, block_o: int) -> tuple[OneBitLayout, Tensor, Tensor]:
        """(layout, weights int32 of layout.shape, offset int32 [slots]) on the device."""
        if block_o not in self.made:
            w_bits, filters, taps, words = self.planes.shape
            layout = OneBitLayout(w_bits, filters, taps, words, block_o)
            offset = layout.per_filter(self.offset).to(self.device)
            self.made[block_o] = layout, layout.forward(self.planes).to(self.device), offset
        return self.made[block_o]


def step_why_not(step: ConvStep | LinearStep, source: TensorSpec) -> str | None:
    """Why the kernels cannot serve a step that reads `source`, beyond what its Problem says, or None."""
    if len(step.emit.consumers) > MAX_CONSUMERS:
        return f"{len(step.emit.consumers)} consumers; the one-bit kernels write at most {MAX_CONSUMERS}"
    if (step.emit.activation, step.emit.gate) != (None, None):
        return "it has an activation or a gate; the one-bit kernels have clamps and residuals"
    if step.emit.residual_step is not None or any(consumer.step is not None for consumer in step.emit.consumers):
        return "it has codes that stand for values; the one-bit kernels have residuals of floats"
    if source.zero and isinstance(step, ConvStep) and step.padding != (0, 0):
        return f"{source.name} pads with code {source.zero}; the one-bit kernels pad with 0"
    return None


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
    w_bits, filters, taps, _ = planes.shape
    if taps != kernel[0] * kernel[1]:
        raise FormatError(f"planes have {taps} taps; a window of {kernel[0]} x {kernel[1]} has {kernel[0] * kernel[1]}")
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
    return OneBitWeights(planes.cpu().contiguous(), (-centre * sums).to(torch.int32), torch.device(device), grid)


def bind(
    step: ConvStep | LinearStep,
    problem: Problem,
    config: OneBitConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: OneBitWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed.

    Args:
        step, problem, config: what to run and how.
        program: the step's program.
        arrays: the program's arrays on the device, by key.
        weights: of `prepare_weights`.
        buffers: tensors on the device in their GPU form (`gpu/layout.py`), by index.

    Raises:
        BackendError: a problem, configuration or epilogue that is not served, or a native module that is missing.
    """
    source, emit = program.tensors[step.input], step.emit
    _refuse(problem, onebit_why_not(problem) or step_why_not(step, source) or config.why_not(problem))
    layout, w, offset = weights.laid_out(config.block_o)
    kept: list[Tensor] = [w, offset, buffers[step.input]]  # the kernel has addresses only; the launch holds the memory

    def slots(key: str | None) -> int:
        return 0 if key is None else _kept(layout.per_filter(arrays[key]), kept)

    def target(consumer: Consumer) -> dict[str, Any]:
        return {
            "codes": _kept(buffers[consumer.tensor], kept),
            "pre_scale": slots(consumer.pre_scale),
            "pre_bias": slots(consumer.pre_bias),
            "scale": consumer.scale,
            "bits": consumer.bits,
            "pitch": pixel_elements(program.tensors[consumer.tensor]),
            "zero": consumer.zero,
            "signed": consumer.signed,
            "relu": consumer.relu,
        }

    task = _operands(problem, source, step.w_grid, buffers[step.input], w, offset)
    task.update(multiplier=slots(step.multiplier), bias=slots(step.bias), low=emit.low, high=emit.high)
    task.update(stream_type=program.stream_dtype, consumers=[target(consumer) for consumer in emit.consumers])
    if emit.residual is not None:
        task.update(residual=_kept(buffers[emit.residual], kept))
    if emit.stream is not None:
        task.update(stream=_kept(buffers[emit.stream], kept))
    if compares(emit, config):
        tables = threshold_tables(layout, arrays[step.multiplier], arrays[step.bias], emit, program, arrays)
        task.update(thresholds=_kept(tables[0], kept), flips=_kept(tables[1], kept))
    return launch_of(task, config, weights.device, kept)


def compares(emit: Emit, config: OneBitConfig) -> bool:
    """Whether codes come from integer thresholds: one consumer of few bits is all that is written."""
    alone = len(emit.consumers) == 1 and emit.residual is None and emit.stream is None
    return alone and emit.consumers[0].bits <= config.thresholds


def threshold_tables(
    layout: OneBitLayout,
    multiplier: Tensor,
    bias: Tensor,
    emit: Emit,
    program: Program,
    arrays: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The kernel's thresholds of the one consumer of `emit`, on the device of `multiplier`; found on the processor."""
    consumer = emit.consumers[0]
    norms = {key: arrays[key].cpu() for key in (consumer.pre_scale, consumer.pre_bias) if key is not None}
    specs, blob, _ = build_blob(norms)
    levels, flip = thresholds(multiplier.cpu(), bias.cpu(), emit, consumer, replace(program, arrays=specs), blob)
    table, flips = layout.threshold_tables(levels, flip)
    return table.to(multiplier.device), flips.to(multiplier.device)


def _refuse(problem: Problem, reason: str | None) -> None:
    if reason is not None:
        raise BackendError(f"one-bit kernels cannot serve {problem}: {reason}")


def _kept(tensor: Tensor, kept: list[Tensor]) -> int:
    kept.append(tensor)
    return tensor.data_ptr()


def _operands(problem: Problem, source: TensorSpec, grid: str, x: Tensor, w: Tensor, offset: Tensor) -> dict[str, Any]:
    """The fields that csrc/onebit/task_python.h lists, with an epilogue that writes nothing."""
    return {
        "x": x.data_ptr(),
        "w": w.data_ptr(),
        "offset": offset.data_ptr(),
        **dict.fromkeys(("accumulators", "multiplier", "bias", "thresholds", "flips", "residual", "stream"), 0),
        "batch": problem.batch,
        "height": problem.height,
        "width": problem.width,
        "channels": problem.in_channels,
        "filters": problem.out_channels,
        "kernel": problem.kernel,
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
        "w_bits": problem.w_bits,
        "w_odd": grid == "odd",
        "a_bits": problem.a_bits,
        "signed": source.signed,
        "stream_type": "float32",
        "low": None,
        "high": None,
        "consumers": [],
    }


def launch_of(task: dict[str, Any], config: OneBitConfig, device: torch.device, kept: list[Tensor]) -> Launch:
    """The launch of a task on `device`; it holds `kept`, the memory behind the addresses of the task.

    Raises:
        BackendError: a device that is no GPU or cannot run the kernel, or a native module that is missing.
    """
    if device.type != "cuda":
        raise BackendError(f"one-bit kernels run on a GPU, the tensors are on {device}; move them: .to('cuda')")
    index = torch.cuda.current_device() if device.index is None else device.index
    bound = require_cuda().OneBitLaunch(task, *config.row, index)

    def launch(inputs: list[Tensor], kept: list[Tensor] = kept) -> None:
        bound.enqueue(torch.cuda.current_stream(index).cuda_stream)

    return launch
