"""A depthwise window and the 1 x 1 layer that alone reads it as one step: the codes between them go to no memory.

    conv 3 x 3, as many groups as channels -> codes -> conv 1 x 1

What an inverted residual ends with. Its wide codes would be written and read for nothing. The first half of the block
stays a step of its own: nine windows of other threads read what is expanded, which would have to lie in shared memory
(docs/triton.md says what that would bring).

A pair is one step where, and only where

- the window is 3 x 3, steps by one or two each way and is padded by at most one, over unsigned bytes,
- nothing else reads its codes, which are unsigned, and it has no stream, residual, gate, norm or activation,
- the layer behind has a 1 x 1 window that steps by one, and no activation or gate,
- weights of either that have 8 bits have a zero: sums of bytes are not taken,
- the sums of the second fit for any byte, as codes below 8 bits between the two are bytes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from lbs_kernels.gpu.configs.depthwise_project import OP
from lbs_kernels.gpu.layout import BYTE_BITS, read_by, written_by
from lbs_kernels.program.planes import accumulator_fits
from lbs_kernels.program.steps import ConvStep, Program, Step, TensorSpec
from lbs_kernels.program.window import Window, is_depthwise

SIDE = 3  # of the depthwise window


@dataclass(frozen=True)
class ProjectedDepthwise(ConvStep):
    """A 1 x 1 layer whose window and input are those of the depthwise layer in front of it, under whose name it runs.

    takes: the name of the 1 x 1 layer. depthwise: the step in front of it.
    """

    op: ClassVar[str] = OP
    takes: str = ""
    depthwise: ConvStep | None = None

    @property
    def first(self) -> ConvStep:
        """The depthwise step."""
        assert self.depthwise is not None
        return self.depthwise

    def between(self, program: Program) -> TensorSpec:
        """The codes between the two, as they are multiplied: bytes, whatever they were kept as."""
        kept = program.tensors[self.first.emit.consumers[0].tensor]
        return TensorSpec(**{**vars(kept), "bits": BYTE_BITS})


def pairs(program: Program) -> Iterator[tuple[ConvStep, ConvStep]]:
    """Depthwise steps with the 1 x 1 layer that can be one step with them."""
    for step in program.steps:
        if isinstance(step, ConvStep) and _window(program, step) and _alone(step):
            layer = _layer(program, step)
            if layer is not None:
                yield step, layer


def projected(program: Program, first: ConvStep, layer: ConvStep) -> Program:
    """The program with these two of its steps as one, in the place of the second."""
    own = {field.name: getattr(layer, field.name) for field in fields(ConvStep)} | vars(first.window)
    own |= {"name": first.name, "input": first.input, "groups": 1}
    one = ProjectedDepthwise(**own, takes=layer.name, depthwise=first)
    steps = tuple(one if step is layer else step for step in program.steps if step is not first)
    return replace(program, steps=steps)


def _window(program: Program, step: ConvStep) -> bool:
    """Whether it is a depthwise window of bytes that goes by columns."""
    source, filters = program.tensors[step.input], program.arrays[step.planes].shape[1]
    plain = step.stride in ((1, 1), (2, 2)) and step.dilation == (1, 1) and max(step.padding) <= 1
    depthwise = step.groups > 1 and is_depthwise(step.groups, source.channels, filters)
    return depthwise and plain and step.kernel == (SIDE, SIDE) and _bytes(source) and _has_zero(step)


def _bytes(source: TensorSpec) -> bool:
    return source.form == "codes" and source.bits == BYTE_BITS and not source.signed


def _has_zero(step: ConvStep) -> bool:
    return step.w_bits < BYTE_BITS or step.w_grid == "zero"


def _alone(step: ConvStep) -> bool:
    """Whether it writes codes and nothing else happens to them."""
    emit = step.emit
    bare = (emit.stream, emit.residual, emit.gate, emit.activation) == (None,) * 4
    return bare and len(emit.consumers) == 1 and not emit.consumers[0].signed and emit.consumers[0].pre_scale is None


def _layer(program: Program, step: ConvStep) -> ConvStep | None:
    """The 1 x 1 layer that alone reads what `step` writes, where it can be multiplied at once."""
    (between,) = written_by(step)
    readers: list[Step] = [other for other in program.steps if between in read_by(other)]
    if between in program.outputs or len(readers) != 1:
        return None
    (layer,) = readers
    if not isinstance(layer, ConvStep) or layer.op != ConvStep.op or layer.window != Window():
        return None
    emit, channels = layer.emit, program.tensors[between].channels
    plain = (emit.gate, emit.activation) == (None, None) and emit.residual != between
    fits = accumulator_fits(channels, layer.w_bits, BYTE_BITS)
    return layer if plain and fits and _has_zero(layer) else None
