"""What binding a step to a kernel gives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Launch = Callable[[list[Tensor]], None]  # takes the region's inputs and enqueues one step
