"""Problem: one frozen key for dispatch, tuning tables, test ids and benchmark rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lbs_kernels.program.steps import (
    ConvStep,
    LinearStep,
    PoolStep,
    Program,
    ResizeStep,
    SelectStep,
    Step,
    WeightGrid,
)
from lbs_kernels.program.transposed import phases
from lbs_kernels.program.window import Window, is_depthwise

TRANSPOSED = "conv_transpose2d"  # no step: its problem is what is counted, not what runs


@dataclass(frozen=True)
class Problem:
    """One operation at one size. `op` is the name of its steps; images are [N, height, width, channels].

    Kernel, stride, padding and dilation of a transposed convolution are its own, and its size is that of its input.
    grid: of weights that are not on the usual one of their width, for their times; what chooses kernels leaves it out.
    nibbles: the activations are kept two in a byte.
    """

    op: str
    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    w_bits: int = 8
    a_bits: int = 8
    device: str = "cpu"
    grid: WeightGrid | None = None
    nibbles: bool = False

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.padding, self.dilation, self.groups)

    @property
    def out_height(self) -> int:
        return self.window.output(self.height, self.width)[0]

    @property
    def out_width(self) -> int:
        return self.window.output(self.height, self.width)[1]

    @property
    def rows(self) -> int:
        """M: output pixels of the whole batch."""
        height, width = self.window.output(self.height, self.width)
        return self.batch * height * width

    @property
    def depthwise(self) -> bool:
        """One filter for each channel."""
        return is_depthwise(self.groups, self.in_channels, self.out_channels)

    @property
    def reduction(self) -> int:
        """K: products summed for one output; of a transposed convolution, for one that sees most taps."""
        taps = self.window.taps
        if self.op == TRANSPOSED:
            taps = max(rows.count * columns.count for rows, columns in phases(self.kernel, self.stride, self.dilation))
        return taps * (self.in_channels // self.groups)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the logical shapes, no padding counted."""
        return self.rows * self.out_channels * self.reduction

    def __str__(self) -> str:
        size = f"n{self.batch}_{self.in_channels}x{self.height}x{self.width}_to{self.out_channels}"
        window = f"k{self.kernel[0]}x{self.kernel[1]}_s{_pair(self.stride)}_p{_pair(self.padding)}"
        extra = (f"_d{_pair(self.dilation)}" if self.dilation != (1, 1) else "") + (
            f"_g{self.groups}" if self.groups > 1 else ""
        )
        grid = "" if self.grid is None else f"_{self.grid}"
        form = "_nibbles" if self.nibbles else ""
        return f"{self.op}_{size}_{window}{extra}_w{self.w_bits}a{self.a_bits}{grid}{form}_{self.device}"


def problem_of(step: Step, program: Program, batch: int, device: str) -> Problem:
    """The key of one step at one batch size.

    A mean is a window of the whole image. The bits of a quantizing step are those of the first codes it writes. A
    selection has the size and the channels of what it writes, and so has interpolation.
    """
    source = program.tensors[step.input]
    height, width, channels = source.height, source.width, source.channels
    if isinstance(step, ConvStep | LinearStep):
        filters = program.arrays[step.planes].shape[1]
        window = step.window if isinstance(step, ConvStep) else Window()
        sizes = (batch, height, width, channels, filters)
        bits = (step.w_bits, source.bits)
        return Problem(step.op, *sizes, *window.fields(), *bits, device, nibbles=source.nibbles)
    if isinstance(step, SelectStep):
        height, width = step.size if step.moves else (height * step.repeat[0], width * step.repeat[1])
        channels = len(step.channels) or sum(program.tensors[index].channels for index in step.inputs)
        channels //= step.block[0] * step.block[1]
    if isinstance(step, ResizeStep):
        height, width = step.size
    problem = Problem(step.op, batch, height, width, channels, channels, w_bits=0, a_bits=source.bits, device=device)
    if isinstance(step, SelectStep | ResizeStep):
        return problem
    if not isinstance(step, PoolStep):
        return replace(problem, a_bits=step.emit.consumers[0].bits if step.emit.consumers else 0)
    if step.kind == "mean":
        return replace(problem, kernel=(height, width), padding=step.padding)
    return replace(problem, **vars(step.window))


def _pair(sizes: tuple[int, int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]}x{sizes[1]}"
