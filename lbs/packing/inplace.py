"""In-place operations of a traced model, replaced by those that make a new tensor.

A packed network runs its regions in an order of its own, so what changes a value in place would change it before or
after others have read it. Behind `a = f_(x)` whoever reads x reads what f made of it; said so, f needs no place:

    y = f_(x); g(x)         becomes         y = f(x); g(y)

Where that does not tell all, because x is also known under another name (a view of it, or what it is a view of) that is
read afterwards, or because f_ has no such form, the model is refused.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lbs.graph import called_module
from lbs_kernels.errors import GraphError

_NAMES = "add sub mul truediv floordiv mod pow matmul"
_OPERATORS: dict[Any, Any] = {getattr(operator, f"i{name}"): getattr(operator, name) for name in _NAMES.split()}
_VIEWS = """
    view view_as reshape reshape_as flatten unflatten transpose permute t swapaxes swapdims movedim moveaxis squeeze
    unsqueeze expand expand_as broadcast_to detach contiguous narrow select chunk split tensor_split unbind diagonal
    unfold ravel to float double half bfloat16 type_as
"""
_VIEW_METHODS = frozenset(_VIEWS.split())
_VIEW_CALLS = frozenset(
    {operator.getitem, getattr, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
    | {getattr(torch, name) for name in _VIEW_METHODS if hasattr(torch, name)}
)
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_SAME_VALUES = frozenset({"requires_grad_", "detach_"})  # they change what a tensor is, not what it holds


def without_inplace(module: fx.GraphModule) -> None:
    """Rewrite the graph; modules stay, also where they are made to compute in place.

    Raises:
        GraphError: a value is read under another name after it was changed, or what changes it has no other form.
    """
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    shown = _shown(module)
    for node in list(module.graph.nodes):
        if not _changes(module, node):
            continue
        source = node.all_input_nodes[0]
        others = [name for name in shown[source] if order[name] < order[node] and name is not source]
        later = [user for name in others for user in name.users if order[user] > order[node]]
        if later or not _replaced(module, node, source):
            why = f"{_label(later[0])} reads a view of it afterwards" if later else "has no other form"
            raise GraphError(
                f"{_label(node)} changes {_label(source)} in place, and {why}; use the form that is not in place"
            )
        for user in [user for user in source.users if order[user] > order[node]]:
            user.replace_input_with(source, node)
    module.recompile()


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _shown(module: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """For every node, those that may show the same memory."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        found[node] = [node]
        if node.all_input_nodes and (_is_view(module, node) or _changes(module, node)):
            found[node] = found[node.all_input_nodes[0]]
            found[node].append(node)
    return found


def _is_view(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(called_module(module, node), _VIEW_MODULES)
    return node.target in (_VIEW_METHODS if node.op == "call_method" else _VIEW_CALLS)


def _changes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node changes its first operand in place."""
    if node.op == "call_module":
        return bool(getattr(called_module(module, node), "inplace", False)) and bool(node.all_input_nodes)
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__") and name not in _SAME_VALUES
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name = getattr(node.target, "__name__", "")
    if node.target in _OPERATORS:
        return "shape" in node.args[0].meta  # of numbers it is the sum itself
    return (name.endswith("_") and not name.endswith("__")) or bool(_inplace_argument(node))


def _inplace_argument(node: fx.Node) -> Any:
    """The argument `inplace` of a call, wherever it stands."""
    place = _inplace_place(node)
    return node.kwargs.get("inplace", node.args[place] if place is not None and len(node.args) > place else False)


def _inplace_place(node: fx.Node) -> int | None:
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return names.index("inplace") if "inplace" in names else None


def _replaced(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Give a node the form that makes a new tensor of the same values; whether there is one."""
    if node.op == "call_module":
        return True
    others = [other for other in node.all_input_nodes if other is not source and "dtype" in other.meta]
    if any(other.meta["dtype"] != source.meta.get("dtype") for other in others):
        return False  # in place the result keeps the type of the first
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
        return True
    if node.op == "call_function" and _inplace_argument(node):
        place = _inplace_place(node)
        node.args = tuple(False if index == place else value for index, value in enumerate(node.args))
        node.kwargs = {name: False if name == "inplace" else value for name, value in node.kwargs.items()}
        return True
    home: Any = torch.Tensor
    name = str(node.target)
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        home = next((home for home in (F, torch) if getattr(home, name, None) is node.target), None)
    twin = getattr(home, name.removesuffix("_"), None)
    if twin is None:
        return False
    node.target = name.removesuffix("_") if node.op == "call_method" else twin
    return True
