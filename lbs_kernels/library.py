"""The `torch.library` namespace `lbs_kernels`, and the one way to define an op in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# cudagraph_unsafe: back ends keep buffers between calls, which graphs that torch.compile records by itself would count
# as leaks. Who wants a graph records one (PackedModel.capture, torch.cuda.graph).
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)
# Kept here: an operation lives as long as the Library that defined it.
_library = torch.library.Library("lbs_kernels", "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `lbs_kernels::<schema>` for every device. `fake` computes shapes only, and may be given symbolic ones."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lbs_kernels::{name}", fake, lib=_library)


_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling = getattr(torch.autograd, "_profiler_enabled", lambda: True)


def unwatched(x: Tensor) -> bool:
    """Whether nobody would see an operation on `x`: no graph is traced, no mode or profiler is on.

    Its implementation may then be called as it is, which saves the way through the dispatcher (8 us of a call that
    finds cold caches behind it, Zen 4). False where this torch does not tell.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _dispatch_modes()
        and not _profiling()
    )
