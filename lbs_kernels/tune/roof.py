"""The roof that steps are measured by: multiply-adds a second of torch's matrix product of bytes on this processor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lbs_kernels.device import default_threads
from lbs_kernels.times import stopwatch, table
from lbs_kernels.times.table import TuningTable

SIZE = 1024  # rows, columns and products of each sum


def int8_product() -> Callable[[], Tensor]:
    """The product that is timed: `SIZE`^3 multiply-adds on torch's threads."""
    a = torch.randint(-128, 127, (SIZE, SIZE), dtype=torch.int8)
    return lambda: torch._int_mm(a, a)


def measure_roof(again: bool = False) -> float:
    """This machine's roof with torch's threads, kept in its table; read from there unless it is to be measured again.

    Raises:
        FormatError: the table that is there cannot be read.
    """
    threads, slug = default_threads(), table.device_slug("cpu")
    known = None if again else table.roof(slug, threads)
    if known is not None:
        return known
    name = table.native(threads)
    times = stopwatch.interleave({name: int8_product()}, rounds=10, warmup=0.05)
    found = SIZE**3 / times[name].p20  # others at work lower it: what is reached, not what is usual
    table.add(TuningTable(slug, roofs={name: found}))
    return found
