"""A recorded graph is run once: shapes are noted, and operations in place become operations that are not."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbs_kernels.errors import GraphError

# a += b, and what makes a new tensor of the same values
AUGMENTED = {
    getattr(operator, f"i{name}"): getattr(operator, f"__{name}__")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
}
_TORCHS_OWN = (
    "torch",
    "torch._C._nn",
    "torch.nn.functional",
    "torch.functional",
    "_operator",
    "builtins",
    "math",
    None,
)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in eval mode, uncompiled and without gradients; each gets its own mode back."""
    before = [(m, m.training, m._compiled_call_impl) for m in model.modules()]
    model.eval()
    for module, _, compiled in before:
        if compiled is not None:
            module._compiled_call_impl = None
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield model
    finally:
        for module, training, compiled in before:
            module.training = training
            if compiled is not None:
                module._compiled_call_impl = compiled


def run(model: nn.Module, example: Tensor) -> Any:
    """What a model makes of a copy of the example, in the mode it is in.

    Raises:
        GraphError: it cannot take the example.
    """
    try:
        return model(example.clone())
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} failed on an example of shape {tuple(example.shape)}, {example.dtype} on "
            f"{example.device}: {error}; give an example batch such as the model is trained on, of its dtype and device"
        ) from error


class Recorded(fx.GraphModule):
    """A recorded graph. It is interpreted and never becomes Python code, in which no name may be a keyword."""

    def recompile(self) -> Any:
        """Nothing."""


class Evaluation(fx.Interpreter):
    """Runs a recorded graph: hooks are operations of it, so modules are run without theirs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # torch.fx would add its own to the message

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return with_affine(result, self.env[n.all_input_nodes[0]]) if n.meta.get("affine") else result


def with_affine(made: Any, source: Any) -> Any:
    """A view of a layer's output, by which a norm still finds what that was computed from (`lbs.quant.deployed`)."""
    if isinstance(made, fx.Proxy):
        made.node.meta["affine"] = True
    elif (affine := getattr(source, "lbs_affine", None)) is not None:
        made.lbs_affine = affine
    return made


def settle(module: fx.GraphModule, example: Tensor) -> Any:
    """Run a recorded graph once, note shapes, and take in-place operations and dead ones out; its outputs."""
    _by_position(module)
    try:
        outputs = _Shapes(module).run(example.clone())
    except Exception as error:
        raise GraphError(f"the torch.fx trace fails on an example that the model takes: {error}") from error
    changed = _without_inplace(module.graph)
    for node in reversed(module.graph.nodes):
        for key in ("memory", "view"):
            node.meta.pop(key, None)
        if (given := node.meta.pop("given", None)) is not None:
            node.replace_all_uses_with(given)
        if _is_dead(node):
            module.graph.erase_node(node)
    module.recompile()
    return Evaluation(module).run(example.clone()) if changed else outputs


class _Shapes(Evaluation):
    """Notes every output shape, the numbers made of shapes, and who shares memory with whom and changes it."""

    def run_node(self, n: fx.Node) -> Any:
        sources = {node: tensors_of(self.env[node]) for node in n.all_input_nodes}
        versions = {node: [_version(t) for t in tensors] for node, tensors in sources.items()}
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
            n.meta["dtype"] = result.dtype
            n.meta["view"] = (tuple(result.shape), result.stride(), result.storage_offset())
        elif isinstance(result, int | torch.Size):
            n.meta["number"] = result
        if n.op == "call_function" and getattr(n.target, "__module__", None) not in _TORCHS_OWN:
            # A function that torch.fx leaves alone and that does nothing in evaluation, such as stochastic depth.
            n.meta["given"] = next((node for node in n.all_input_nodes if self.env[node] is result), None)
        own = {t.untyped_storage()._cdata for t in tensors_of(result)}
        n.meta["memory"] = n
        for node, tensors in sources.items():
            if own & {t.untyped_storage()._cdata for t in tensors}:
                n.meta["memory"] = node.meta["memory"]
            if versions[node] != [_version(t) for t in tensors]:
                n.meta.setdefault("changes", []).append(node)
        return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _without_inplace(graph: fx.Graph) -> bool:
    """Who reads a changed tensor reads the result of what changed it, by whatever name it goes; whether any does."""
    changed = False
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target in AUGMENTED:
            node.target = AUGMENTED[node.target]
        for source in node.meta.pop("changes", ()):
            memory, changed = source.meta["memory"], True
            if memory.op == "get_attr":
                raise GraphError(_inplace_message(node, source, "that belongs to the model"))
            if node.meta["memory"] is not memory:
                raise GraphError(_inplace_message(node, source, "that is not what it returns"))
            for other in list(order)[: order[node]]:
                later = [user for user in other.users if order[user] > order[node]]
                if other.meta["memory"] is not memory or not later:
                    continue
                if other.meta.get("view") != source.meta.get("view"):
                    raise GraphError(
                        _inplace_message(node, source, f"{_label(later[0])} reads a view of it afterwards")
                    )
                for user in later:
                    user.replace_input_with(other, node)
            _make_plain(node, source)
    return changed


def _inplace_message(node: fx.Node, source: fx.Node, why: str) -> str:
    return f"{_label(node)} changes {_label(source)} in place, and {why}; use the form that is not in place"


def _make_plain(node: fx.Node, source: fx.Node) -> None:
    """Call the form that is not in place; modules stay, and whoever keeps one sets its `inplace`."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        return
    kinds = {other.meta["dtype"] for other in node.all_input_nodes if "dtype" in other.meta}
    if sum(kind.is_floating_point for kind in kinds) > 1:  # in place the result keeps the type of the first
        raise GraphError(_inplace_message(node, source, "its operands have different types"))
    if "out" in node.kwargs:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    elif node.op == "call_method" and hasattr(Tensor, name.removesuffix("_")):
        node.target = name.removesuffix("_")
    elif node.op == "call_function" and name.endswith("_") and (homes := _homes(name.removesuffix("_"))):
        node.target = homes[0]
    elif node.op == "call_function" and "inplace" in (names := _signature(node.target)):
        place = names.index("inplace")
        if len(node.args) > place:
            node.update_arg(place, False)
        else:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    elif node.target not in AUGMENTED.values():
        raise GraphError(_inplace_message(node, source, f"{name} has no other form"))


def _homes(name: str) -> list[Any]:
    return [getattr(home, name) for home in (torch, nn.functional) if hasattr(home, name)]


def _signature(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in
        return []


def _is_dead(node: fx.Node) -> bool:
    """Functions and methods whose results nobody reads, and assertions about sizes: every image has the traced one."""
    if node.users or node.op not in ("call_function", "call_method"):
        return False
    condition = node.args[0] if node.args else None
    return node.target is not torch._assert or not (isinstance(condition, fx.Node) and "shape" in condition.meta)


def _by_position(module: fx.GraphModule) -> None:
    """Modules called as layer(input=x) read what is called layer(x)."""
    for node in module.graph.nodes:
        if node.op == "call_module" and not node.args and list(node.kwargs) == ["input"]:
            node.args, node.kwargs = (node.kwargs["input"],), {}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of what a model returns, in order: of tuples, lists, dictionaries and data classes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, list | tuple) else []


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name
