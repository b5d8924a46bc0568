"""Problem: one frozen key for dispatch, tuning tables, test ids and benchmark rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One operation at one size. `op` is a folder name below lbs_kernels; images are [N, height, width, channels]."""

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


def _pair(sizes: tuple[int, int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]}x{sizes[1]}"


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels of one dimension of a convolution or pooling window (floor)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
