"""The `torch.library` namespace `lbs_kernels`, and the one way to define an op in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
