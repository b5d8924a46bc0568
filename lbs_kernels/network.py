"""A packed file in numpy: no torch is imported.

    network = lbs_kernels.network.load("net.lbs.safetensors")
    logits = network(images)                                     # numpy arrays

The reader is the one of the C library (docs/c.md): networks that were packed whole, one program from the images to the
result. `lbs.load` runs all others. The bits are the same.
"""

from __future__ import annotations

import numbers
import os
from typing import Any

import numpy as np

from lbs_kernels.device import processors
from lbs_kernels.errors import CheckpointError, FormatError, ShapeError
from lbs_kernels.extension import require_cpu

MOST_THREADS = 2**31 - 1  # what an int of C holds


class Network:
    """A packed network; calls from several threads run at once.

    input_shape: of one image, (C, H, W), or (C,) where the network takes rows. input_dtype: float32, normalised as the
    network was trained, or uint8, the bytes of pictures. output_shape: of what one image becomes, float32.
    """

    def __init__(self, path: str | bytes | os.PathLike[str], budget: float = 1.0) -> None:
        """See `load`."""
        if not isinstance(budget, numbers.Real):
            raise CheckpointError(
                f"budget is {budget!r}; give a positive number of times what a file may cost, math.inf for any"
            )
        self._native: Any = require_cpu().Network(os.fsencode(path), float(budget))
        self.input_shape: tuple[int, ...] = tuple(self._native.input_shape)
        self.input_dtype = np.dtype(np.uint8 if self._native.takes_bytes else np.float32)
        self.output_shape: tuple[int, ...] = tuple(self._native.output_shape)

    def __call__(self, images: np.ndarray, threads: int | None = None) -> np.ndarray:
        """What the network computes.

        Args:
            images: [N, *input_shape] of input_dtype. Channels may lie first or last in memory
                (`pictures.transpose(0, 3, 1, 2)`); both are read without a copy.
            threads: at most so many; None: as many as this process has processors.

        Returns:
            float32 [N, *output_shape].

        Raises:
            ShapeError: another shape or dtype. FormatError: no thread, or more than an int of C holds.
        """
        count = processors() if threads is None else threads
        if not isinstance(count, numbers.Integral) or not 1 <= count <= MOST_THREADS:
            raise FormatError(
                f"threads is {threads!r}; a call needs a thread, takes at most {MOST_THREADS}, and None for as many as "
                "this process has processors"
            )
        if images.dtype != self.input_dtype or images.shape[1:] != self.input_shape or images.ndim == 0:
            wanted = ", ".join(map(str, self.input_shape))
            raise ShapeError(
                f"images are {images.dtype} {list(images.shape)}; the network was packed for {self.input_dtype} "
                f"[N, {wanted}]"
            )
        last = images.ndim == 4 and not images.flags.c_contiguous and images.transpose(0, 2, 3, 1).flags.c_contiguous
        last = last and images.flags.aligned
        ready = images if last else np.require(images, requirements=["C", "A"])
        output = np.empty((len(images), *self.output_shape), np.float32)
        self._native.run(ready.ctypes.data, output.ctypes.data, len(images), int(count), last)
        return output


def load(path: str | bytes | os.PathLike[str], budget: float = 1.0) -> Network:
    """Read a packed file and lay its weights out for this processor.

    Args:
        budget: how many times what a file may cost by itself one image may (SECURITY.md); `math.inf` allows anything.

    Raises:
        CheckpointError: missing, truncated, damaged, foreign or newer, or more work for one image than the budget has.
        BackendError: the network has several programs or parts in float, or there is no native module.
    """
    return Network(path, budget)
