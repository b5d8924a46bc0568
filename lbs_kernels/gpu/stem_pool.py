"""A folded stem and the maximum that alone reads it as one step: the map between them goes to no memory.

    conv 7 x 7, stride 2 (folded: 4 x 4, stride 1) -> clamp -> stream or codes -> maximum 3 x 3, stride 2, padding 1

What lies between the sums of a filter and the maximum rises or falls with them, everywhere: one fused multiply-add by
finite numbers, a clamp, the rounding to a stream or the encoding into codes. So the maximum is taken of the sums (where
they fall, the minimum), and the same numbers come out.

The fold takes the padding in as well: the image that is written has room for every window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from lbs_kernels.gpu.configs.stem_pool import OP, PAD, STEP, TAPS, WINDOW
from lbs_kernels.gpu.layout import BYTE_BITS, read_by, written_by
from lbs_kernels.gpu.stem import FoldedStep
from lbs_kernels.program.steps import ConvStep, Emit, PoolStep, Program, Step


@dataclass(frozen=True)
class PooledStem(ConvStep):
    """A folded stem whose `emit` is that of the maximum behind it.

    takes: the name of the step that it takes in. before: what its sums go through in front of the maximum, a clamp and
    the rounding to the stream type; None where `emit` does all of it.
    """

    op: ClassVar[str] = OP
    takes: str = ""
    before: Emit | None = None


def pool_stems(program: Program, blob: Tensor | None = None) -> Program:
    """The program with a stem and its maximum as one step where they are a pair; it may be the same.

    Args:
        blob: its arrays, whose multipliers and biases must be finite; None takes them to be, for what is counted.
    """
    for place, step in enumerate(program.steps):
        if not isinstance(step, ConvStep) or isinstance(step, PooledStem):
            continue
        pool, emit = _maximum(program, step), None
        if pool is not None:
            emit = _emitted(program, step, pool)
        if pool is None or emit is None or not _folded(program, step) or not _finite(program, step, blob):
            continue
        return _replaced(program, place, pool, *emit)
    return program


def _replaced(program: Program, place: int, pool: PoolStep, emit: Emit, before: Emit | None) -> Program:
    """The stem at `place` with `pool` in it, its padding in the image."""
    step = program.steps[place]
    assert isinstance(step, ConvStep)
    pad = step.padding
    own = {field.name: getattr(step, field.name) for field in fields(ConvStep)}
    one = PooledStem(**{**own, "emit": emit, "padding": (0, 0)}, takes=pool.name, before=before)
    steps: list[Step] = []
    for other in program.steps:
        if isinstance(other, FoldedStep) and other.emit.consumers[0].tensor == step.input:
            steps.append(replace(other, shift=(other.shift[0] + 2 * pad[0], other.shift[1] + 2 * pad[1])))
        elif other is step:
            steps.append(one)
        elif other is not pool:
            steps.append(other)
    tensors = list(program.tensors)
    source = tensors[step.input]
    tensors[step.input] = replace(source, height=source.height + 2 * pad[0], width=source.width + 2 * pad[1])
    return replace(program, steps=tuple(steps), tensors=tuple(tensors))


def _maximum(program: Program, step: ConvStep) -> PoolStep | None:
    """The maximum that reads what `step` writes, where nothing else does and it writes nothing else."""
    written = written_by(step)
    if len(written) != 1 or written[0] in program.outputs:
        return None
    readers = [other for other in program.steps if written[0] in read_by(other)]
    if len(readers) != 1 or not isinstance(readers[0], PoolStep) or readers[0].input != written[0]:
        return None
    pool, sides = readers[0], ((TAPS, TAPS), (STEP, STEP), (PAD, PAD))
    return pool if pool.kind == "max" and (pool.kernel, pool.stride, pool.padding) == sides else None


def _folded(program: Program, step: ConvStep) -> bool:
    """Whether it is a stem of 7 x 7 or 8 x 8 pixels that was folded."""
    by_fold = any(
        isinstance(other, FoldedStep) and other.emit.consumers[0].tensor == step.input for other in program.steps
    )
    return by_fold and step.kernel == WINDOW and program.tensors[step.input].bits == BYTE_BITS


def _emitted(program: Program, step: ConvStep, pool: PoolStep) -> tuple[Emit, Emit | None] | None:
    """(emit, before) of the step that both become; None where something between them is no such function."""
    own, behind = step.emit, pool.emit
    if (own.residual, own.gate, own.activation) != (None,) * 3:
        return None
    if own.stream is None:  # a maximum of codes hands them on
        (written,), (consumer,) = own.consumers, behind.consumers
        if written.pre_scale is not None:
            return None
        return replace(own, consumers=(replace(written, tensor=consumer.tensor),)), None
    bare = (behind.residual, behind.gate, behind.activation, behind.low, behind.high) == (None,) * 5
    if bare and (behind.stream is not None or program.stream_dtype == "float32"):
        return replace(behind, low=own.low, high=own.high), None
    return behind, Emit(low=own.low, high=own.high)


def _finite(program: Program, step: ConvStep, blob: Tensor | None) -> bool:
    """Whether no sum becomes a NaN."""
    if blob is None:
        return True
    return all(bool(torch.isfinite(program.array(blob, key)).all()) for key in (step.multiplier, step.bias))
