"""Problem: one frozen key for dispatch, tuning tables, test ids and benchmark rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lbs_kernels.program.steps import ConvStep, LinearStep, PoolStep, Program, Step


@dataclass(frozen=True)
class Problem:
    """One operation at one size. `op` is the name of its steps; images are [N, height, width, channels]."""

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

    @property
    def out_height(self) -> int:
        return output_size(self.height, self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    @property
    def out_width(self) -> int:
        return output_size(self.width, self.kernel[1], self.stride[1], self.padding[1], self.dilation[1])

    @property
    def reduction(self) -> int:
        """K: products summed for one output."""
        return self.kernel[0] * self.kernel[1] * (self.in_channels // self.groups)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the logical shapes, no padding counted."""
        return self.batch * self.out_height * self.out_width * self.out_channels * self.reduction

    def __str__(self) -> str:
        size = f"n{self.batch}_{self.in_channels}x{self.height}x{self.width}_to{self.out_channels}"
        window = f"k{self.kernel[0]}x{self.kernel[1]}_s{_pair(self.stride)}_p{_pair(self.padding)}"
        extra = (f"_d{_pair(self.dilation)}" if self.dilation != (1, 1) else "") + (
            f"_g{self.groups}" if self.groups > 1 else ""
        )
        return f"{self.op}_{size}_{window}{extra}_w{self.w_bits}a{self.a_bits}_{self.device}"


def problem_of(step: Step, program: Program, batch: int, device: str) -> Problem:
    """The key of one step at one batch size.

    A mean is a window of the whole image. The bits of a quantizing step are those of the first codes it writes.
    """
    source = program.tensors[step.input]
    height, width, channels = source.height, source.width, source.channels
    if isinstance(step, ConvStep | LinearStep):
        filters = program.arrays[step.planes].shape[1]
        problem = Problem(step.op, batch, height, width, channels, filters, w_bits=step.w_bits, device=device)
        problem = replace(problem, a_bits=source.bits)
        if isinstance(step, LinearStep):
            return problem
        return replace(
            problem,
            kernel=step.kernel,
            stride=step.stride,
            padding=step.padding,
            dilation=step.dilation,
            groups=step.groups,
        )
    problem = Problem(step.op, batch, height, width, channels, channels, w_bits=0, a_bits=source.bits, device=device)
    if not isinstance(step, PoolStep):
        return replace(problem, a_bits=step.emit.consumers[0].bits if step.emit.consumers else 0)
    if step.kind == "mean":
        return replace(problem, kernel=(height, width), padding=step.padding)
    return replace(problem, kernel=step.kernel, stride=step.stride, padding=step.padding)


def _pair(sizes: tuple[int, int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]}x{sizes[1]}"


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels of one dimension of a convolution or pooling window (floor)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
