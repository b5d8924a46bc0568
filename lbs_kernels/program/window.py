"""Window: where a convolution or a pool looks, the same five numbers everywhere."""

from __future__ import annotations

from dataclasses import astuple, dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation as (rows, columns), and groups. The default is that of a linear layer.

    >>> Window((3, 3), stride=(2, 2), padding=(1, 1)).output(224, 224)
    (112, 112)
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """T: pixels that one output reads."""
        return self.kernel[0] * self.kernel[1]

    def fields(self) -> tuple[Pair, Pair, Pair, Pair, int]:
        """The five in order, as steps, problems and plans hold them."""
        return astuple(self)

    def output(self, height: int, width: int) -> Pair:
        """Output pixels (rows, columns) of an image; below one where it does not fit."""
        return self._along(0, height), self._along(1, width)

    def _along(self, side: int, size: int) -> int:
        reach = self.dilation[side] * (self.kernel[side] - 1) + 1
        return (size + 2 * self.padding[side] - reach) // self.stride[side] + 1


def is_depthwise(groups: int, in_channels: int, filters: int) -> bool:
    """Whether every input channel has one filter of its own, which lives and dies with it."""
    return 1 < groups == in_channels == filters
