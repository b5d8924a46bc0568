"""What a CUDA graph does, on the CPU: operations are kept with the very tensors they read and wrote, and run again.

Python's part of a call is not run again. So a number that Python had put in, or a tensor it had made anew, is what it
was when the call was recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lbs.train import recorded
from lbs_kernels.times.graph import Recorded

FROM_THE_HOST = (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)


class _Operations(TorchDispatchMode):
    """Keeps all operations but views, whose results go on showing the memory they show."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FROM_THE_HOST:
            raise RuntimeError(f"{func} takes a number from Python's memory, which a GPU cannot while it records")
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.kept.append((func, args, kwargs or {}, result))
        return result


def record(call: Callable[[], Tensor], *_: Any, **__: Any) -> Recorded:
    """In place of `lbs_kernels.times.graph.record`: nothing has happened when it returns, and `replay` does it."""
    with _Undone(), _Operations() as mode:
        result = call()

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs, old in mode.kept:
            new = func(*args, **kwargs)
            for target, value in zip(_pytree.tree_leaves(old), _pytree.tree_leaves(new), strict=True):
                if isinstance(target, Tensor) and target is not value and target.data_ptr() != value.data_ptr():
                    target.detach().copy_(value)

    return Recorded(replay, result)


class _Undone(TorchDispatchMode):
    """Puts back, on leaving, all that operations have read, for some write it without saying so; random state too."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Any:
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.before:
                count = tensor.untyped_storage().nbytes() // tensor.itemsize
                whole = tensor.detach().as_strided((count,), (1,), 0)
                self.before[tensor.untyped_storage().data_ptr()] = whole, whole.clone()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        for whole, value in self.before.values():
            whole.copy_(value)


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Recorded steps are those of this file, on a CPU that has streams."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    generator = SimpleNamespace(clone_state=lambda: "before", graphsafe_set_state=lambda state: None)
    patch.setattr(torch.cuda, "default_generators", {None: generator})
    patch.setattr(recorded, "record", record)
    patch.setattr(torch.cuda, "Stream", lambda device: stream)
    patch.setattr(torch.cuda, "current_stream", lambda device: stream)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
