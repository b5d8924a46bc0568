"""CapturedModel: a packed network as CUDA graphs, one for each batch size."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lbs_kernels.errors import BackendError, ShapeError
from lbs_kernels.times import graph as cuda_graph
from lbs_kernels.times.graph import Recorded, Turns

if TYPE_CHECKING:
    from lbs.packing.model import PackedModel


class CapturedModel:
    """What `PackedModel.capture` returns: `captured(x)` copies x into the graph's input, replays, returns the output.

    The output is the graph's own memory and changes with the next call of the same batch size; `clone=True` returns
    copies. Calls from several threads and streams follow one another. It keeps the weights it was recorded with,
    whatever is loaded into the packed model later; inputs are checked as the packed model checks them, so that one
    stays where it is.
    """

    def __init__(self, packed: PackedModel, examples: Sequence[Tensor], clone: bool = False) -> None:
        """See `PackedModel.capture`."""
        _check_device(packed.device)
        if not examples:
            raise ShapeError("no example was given; a graph is recorded for one batch size, give a batch of it")
        self.clone = clone
        self._check = packed.check_input
        self._lock = threading.Lock()
        self._turns = Turns(packed.device)
        self._graphs: dict[int, tuple[Tensor, Recorded]] = {}
        for example in examples:
            self._add(packed, example)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that can be replayed."""
        return tuple(sorted(self._graphs))

    def __call__(self, x: Tensor) -> Any:
        """The packed model's output for a batch of one of the recorded sizes.

        Raises:
            ShapeError: another batch size than those recorded, or no batch the model was packed for.
        """
        self._check(x)
        if len(x) not in self._graphs:
            sizes = ", ".join(str(size) for size in self.batches)
            raise ShapeError(
                f"batch {len(x)} was not recorded, {sizes} were; pad the batch to one of them, call the packed model "
                "itself, or capture an example of this size too"
            )
        static, graph = self._graphs[len(x)]
        with self._lock, torch.no_grad():
            self._turns.begin()
            static.copy_(x, non_blocking=True)
            graph.replay()
            result = pytree.tree_map(_copy, graph.result) if self.clone else graph.result
            self._turns.end()
        return result

    def _add(self, packed: PackedModel, example: Tensor) -> None:
        packed.check_input(example)
        if len(example) == 0:
            raise ShapeError("the example is an empty batch; there is nothing to record, give at least one image")
        static = example.detach().clone()  # channels first or last, as the example has them
        with torch.no_grad():
            self._graphs[len(static)] = static, cuda_graph.record(lambda: packed(static), packed.device)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise BackendError(
            f"the model lies on {device}; a CUDA graph records work of a GPU. Load it there, lbs.load(path, "
            'device="cuda"), or call the model itself: on the processor a region already is one native call'
        )
