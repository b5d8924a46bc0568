"""A step as the task of a CUDA kernel: what csrc/cuda/task_python.h reads, and its launch.

Tests run the same sources on a model of the GPU (tests/native/cuda); docs/gpu.md says what has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.extension import require_cuda
from lbs_kernels.gpu.configs.cuda import MAX_CONSUMERS, CudaConfig
from lbs_kernels.gpu.cuda.layout import FilterBlocks
from lbs_kernels.gpu.launch import Launch, overlaps
from lbs_kernels.gpu.layout import kept as kept_as
from lbs_kernels.gpu.layout import pixel_elements
from lbs_kernels.program.epilogue import thresholds
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Consumer, ConvStep, Emit, LinearStep, Program, build_blob

# What binds a task, by the kind of its configuration.
LAUNCHES: dict[str, Callable[[], Any]] = {
    "onebit": lambda: require_cuda().onebit_launch,
    "s8": lambda: require_cuda().s8_launch,
}


def emit_why_not(step: ConvStep | LinearStep) -> str | None:
    """Why the kernels cannot write what a step writes, or None."""
    if len(step.emit.consumers) > MAX_CONSUMERS:
        return f"{len(step.emit.consumers)} consumers; the CUDA kernels write at most {MAX_CONSUMERS}"
    if (step.emit.activation, step.emit.gate) != (None, None):
        return "it has an activation or a gate; the CUDA kernels have clamps and residuals"
    return None


def check_taps(planes: Tensor, kernel: tuple[int, int]) -> None:
    """Raises FormatError for planes int32 [w_bits, O, T, CW] of another window."""
    taps = planes.shape[2]
    if taps != kernel[0] * kernel[1]:
        raise FormatError(f"planes have {taps} taps; a window of {kernel[0]} x {kernel[1]} has {kernel[0] * kernel[1]}")


def bind_task(
    step: ConvStep | LinearStep,
    problem: Problem,
    config: CudaConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    blocks: FilterBlocks,
    operands: Mapping[str, Tensor],
    buffers: Mapping[int, Tensor],
) -> Launch:
    """One launch of the step, its buffers fixed.

    Args:
        step, problem, config: what to run and how.
        program: the step's program.
        arrays: the program's arrays on the device, by key.
        blocks: how the filters are laid out.
        operands: w, offset int32 [slots] and perhaps border, on the device.
        buffers: tensors on the device in their GPU form (`gpu/layout.py`), by index.

    Raises:
        BackendError: the device cannot run the kernel, or the native module is missing.
    """
    source, emit = program.tensors[step.input], step.emit
    kept: list[Tensor] = []  # the kernel has addresses only; the launch holds the memory

    def slots(key: str | None) -> int:
        return 0 if key is None else _kept(blocks.per_filter(arrays[key]), kept)

    def target(consumer: Consumer) -> dict[str, Any]:
        return {
            "codes": _kept(buffers[consumer.tensor], kept),
            "pre_scale": slots(consumer.pre_scale),
            "pre_bias": slots(consumer.pre_bias),
            "scale": consumer.scale,
            "bits": consumer.bits,
            "kept": kept_as(program.tensors[consumer.tensor]),
            "pitch": pixel_elements(program.tensors[consumer.tensor]),
            "zero": consumer.zero,
            "signed": consumer.signed,
            "relu": consumer.relu,
            "step": consumer.step,
        }

    addresses = ("border", "accumulators", "thresholds", "flips", "residual", "stream")
    task: dict[str, Any] = {
        **dict.fromkeys(addresses, 0),
        "x": _kept(buffers[step.input], kept),
        **{name: _kept(operand, kept) for name, operand in operands.items()},
        "multiplier": slots(step.multiplier),
        "bias": slots(step.bias),
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
        "w_odd": step.w_grid == "odd",
        "a_bits": problem.a_bits,
        "split": config.split,
        "signed": source.signed,
        "stream_type": program.stream_dtype,
        "low": emit.low,
        "high": emit.high,
        "consumers": [target(consumer) for consumer in emit.consumers],
    }
    if emit.residual is not None:
        added = program.tensors[emit.residual]
        task.update(residual=_kept(buffers[emit.residual], kept), residual_step=emit.residual_step)
        task.update(residual_pitch=pixel_elements(added), residual_zero=added.zero)
    if emit.stream is not None:
        task["stream"] = _kept(buffers[emit.stream], kept)
    if compares(emit, config, program):
        tables = threshold_tables(blocks, arrays[step.multiplier], arrays[step.bias], emit, program, arrays)
        task.update(thresholds=_kept(tables[0], kept), flips=_kept(tables[1], kept))
    return launch_of(task, config, operands["w"].device, kept)


def compares(emit: Emit, config: CudaConfig, program: Program) -> bool:
    """Whether codes come from integer thresholds: planes of one consumer of few bits are all that is written."""
    if len(emit.consumers) != 1 or (emit.residual, emit.stream) != (None, None):
        return False
    (consumer,) = emit.consumers
    return consumer.bits <= config.thresholds and kept_as(program.tensors[consumer.tensor]) == "planes"


def threshold_tables(
    blocks: FilterBlocks,
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
    table, flips = blocks.threshold_tables(levels, flip)
    return table.to(multiplier.device), flips.to(multiplier.device)


def _kept(tensor: Tensor, kept: list[Tensor]) -> int:
    kept.append(tensor)
    return tensor.data_ptr()


def launch_of(task: dict[str, Any], config: CudaConfig, device: torch.device, kept: list[Tensor]) -> Launch:
    """The launch of a task on `device`; it holds `kept`, the memory behind the addresses of the task.

    Raises:
        BackendError: a device that is no GPU or cannot run the kernel, or a native module that is missing.
    """
    if device.type != "cuda":
        raise BackendError(f"CUDA kernels run on a GPU, the tensors are on {device}; move them: .to('cuda')")
    index = torch.cuda.current_device() if device.index is None else device.index
    bound, pdl = LAUNCHES[config.kind]()(task, *config.row, index), overlaps(index)

    def launch(inputs: list[Tensor], kept: list[Tensor] = kept) -> None:
        bound.enqueue(torch.cuda.current_stream(index).cuda_stream, pdl)

    return launch
