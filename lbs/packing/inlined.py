"""What stays in float, as torch's own layers and operations, so that a file can hold it.

Layers whose weights are computed by parametrizations get those they have in evaluation mode. Modules and functions of
the user's own are traced through, so that what they consist of remains; where that cannot be done, or does not compute
the same to the last bit, they stay as they are, and only a file refuses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lbs.packing.float_modules import kind_of
from lbs.packing.graph_json import unsaved
from lbs.quant.deployed import undeploy
from lbs.traced import Recorded

PART = "part"  # the name of what is traced through, in its own small graph


def settled(module: nn.Module) -> nn.Module:
    """A copy that computes in evaluation mode what its node in the graph stands for: with weights of its own, without
    hooks, which are nodes themselves, and changing nothing in place.
    """
    kept = copy.deepcopy(module)
    undeploy(kept)
    for part in list(kept.modules()):
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        if isinstance(getattr(part, "inplace", None), bool):
            part.inplace = False  # type: ignore[assignment]
        if parametrize.is_parametrized(part):
            _make_permanent(part)
    return kept


def _make_permanent(module: nn.Module) -> None:
    kind = type(module)  # shared with the original, whose properties would go as well
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    with torch.no_grad():
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def traced_through(part: Callable[[Any], Any], example: Tensor) -> fx.GraphModule | None:
    """A module or function of one tensor as torch's own operations, its modules and tensors named `part.`...

    None where it cannot be traced, a file could not hold the outcome, or that computes something else of the example.
    """
    applied = _Applied(part).eval()
    try:
        with torch.no_grad():
            if isinstance(part, nn.TransformerEncoder):  # its own code asks tensors what they are
                applied.part = nn.Sequential(*part.layers, *filter(None, [part.norm]))
            traced = Recorded(applied, _Tracer().trace(applied))
            if _plain(traced) and _equal(fx.Interpreter(traced).run(example.clone()), part(example.clone())):
                return traced
    except Exception:  # noqa: BLE001  whatever code of the user's makes of a proxy, or of random numbers
        return None
    return None


def _plain(traced: fx.GraphModule) -> bool:
    """Whether a file can hold it: one value comes out, and it names nothing but parts of the module."""
    *nodes, output = traced.graph.nodes
    named = [str(node.target) for node in nodes if node.op in ("call_module", "get_attr")]
    inside = all(name.partition(".")[0] == PART for name in named)
    return inside and isinstance(output.args[0], fx.Node) and not unsaved(traced)


class _Applied(nn.Module):
    def __init__(self, part: Callable[[Any], Any]) -> None:
        super().__init__()
        self.part = part

    def forward(self, input: Any) -> Any:
        return self.part(input)


class _Tracer(fx.Tracer):
    """Keeps whole what a file has a form for."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None


def _equal(one: Any, other: Any) -> bool:
    (values, shape), (others, other_shape) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return shape == other_shape and all(
        type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
        for a, b in zip(values, others, strict=True)
    )
