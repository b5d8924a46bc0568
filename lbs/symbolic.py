"""A torch.fx graph that computes what a model computes of one image tensor, and the comparison that says so.

Beside what torch.fx records by itself

- other arguments of `forward` have their defaults, as constants;
- hooks that change values are operations of the graph, so modules are run by their `forward`, without hooks;
- a torch layer whose forward is patched on the instance is traced through;
- operations in place become operations that are not, and who reads the changed tensor reads their result.

What the graph still misses (Python that asks what a tensor is, random numbers) is found by running both on an example.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbs_kernels.errors import GraphError

# Of the largest magnitude. Model and graph run the same operations in the same order, so outputs are equal where torch
# picks the same kernels; where it does not, rounding u = 2^-24 grows like sqrt(K) in a sum and with the number of
# layers: 2^-24 * sqrt(4608) * 100 layers = 4e-4.
TOLERANCE = 1e-3

LEAVES = (
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten),
)
_PLAIN = {
    getattr(operator, f"i{name}"): getattr(operator, f"__{name}__")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
}


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


def check_example(model: nn.Module, example: object) -> None:
    """Refuse what is no batch, and a forward that needs more than one.

    Raises:
        GraphError: names the type, or the arguments.
    """
    name = type(model).__name__
    if not isinstance(example, Tensor):
        raise GraphError(
            f"the example for {name} is a {type(example).__name__}; give one batch as a tensor [N, C, H, W]"
        )
    needed = [
        p.name for p in _arguments(model) if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    extra = [p.name for p in _arguments(model)[1:] if p.name in needed]
    if extra:
        raise GraphError(
            f"forward of {name} needs {', '.join(needed)}; networks of one image tensor are served: give "
            f"{', '.join(extra)} defaults, or wrap the model in a module whose forward(x) passes them"
        )


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


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


def symbolic(model: nn.Module, example: Tensor, strict: bool = True) -> fx.GraphModule:
    """The graph of a model in eval mode; node.meta holds "shape", or "number" where it is made of shapes.

    Arguments:
        strict: refuse a graph that computes something else than the model on the example.

    Raises:
        GraphError: control flow that depends on values (file and line are named), an example that does not fit, a
            tensor that is changed in place while another view of it is read later, or other outputs than the model's.
    """
    check_example(model, example)
    with evaluating(model):
        expected = run(model, example)
        # Hooks that only look are not shown proxies: the graph has hooks where the outputs need them.
        last = bool(_hooked_modules(model))
        for hooks in sorted({False, last}):
            try:
                module = record(model, hooks)
                found = settle(module, example)
            except GraphError:
                if hooks is last:
                    raise
                continue
            if _same(expected, found) and (hooks is last or not _is_meta(expected)):
                return module
        if strict:
            raise GraphError(_difference(model, module, example, expected, found))
    return module


def record(model: nn.Module, hooks: bool) -> fx.GraphModule:
    """The graph as it is recorded in the present mode; `meta["hooks"]` says whether hooks are part of it."""
    try:
        module = fx.GraphModule(model, _Tracer(hooks).trace(model))
    except Exception as error:
        raise GraphError(_trace_message(model, error)) from error
    module.meta["hooks"] = hooks
    return module


def settle(module: fx.GraphModule, example: Tensor) -> Any:
    """Run a recorded graph once, note shapes, and take in-place operations and dead ones out; its outputs."""
    _by_position(module)
    try:
        outputs = _Shapes(module).run(example.clone())
    except Exception as error:
        raise GraphError(f"the torch.fx trace fails on an example that the model takes: {error}") from error
    _without_inplace(module.graph)
    for node in reversed(module.graph.nodes):
        for key in ("memory", "view"):
            node.meta.pop(key, None)
        if _is_dead(node):
            module.graph.erase_node(node)
    module.recompile()
    return outputs


class _Proxy(fx.Proxy):
    """A proxy of which `a += b` changes the tensor, as torch does, and not the name only."""


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in _PLAIN:
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))


class _Tracer(fx.Tracer):
    """Keeps the layers of a network whole, also those that subclass torch's."""

    def __init__(self, hooks: bool) -> None:
        super().__init__()
        self.hooks = hooks

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The images alone; what else `forward` takes has its default, and hooks of the model are run."""
        name = next((p.name for p in _arguments(self.root)), "x")
        images = self.create_proxy("placeholder", name, (), {})

        def call(root: nn.Module, x: Any) -> Any:
            return root(x)

        return call, [self.root, images]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.root or is_patched(m):
            return False
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if not self.hooks:
            return super().call_module(m, m.forward, args, kwargs)
        if not self.is_leaf_module(m, name):
            return super().call_module(m, m._call_impl, args, kwargs)
        if not _hooked(m):
            return super().call_module(m, forward, args, kwargs)
        m.forward = lambda *a, **k: self.create_proxy("call_module", name, a, k)
        try:
            return m._call_impl(*args, **kwargs)
        finally:
            del m.forward


class Evaluation(fx.Interpreter):
    """Runs a graph of this file: hooks are operations of it, so modules are run without theirs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # torch.fx would add its own to the message

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)


class _Shapes(Evaluation):
    """Notes every output shape, the numbers made of shapes, and who shares memory with whom and changes it."""

    def run_node(self, n: fx.Node) -> Any:
        sources = {node: tensors_of(self.env[node]) for node in n.all_input_nodes}
        versions = {node: [_version(t) for t in tensors] for node, tensors in sources.items()}
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
            n.meta["view"] = (tuple(result.shape), result.stride(), result.storage_offset())
        elif isinstance(result, int | torch.Size):
            n.meta["number"] = result
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


def _without_inplace(graph: fx.Graph) -> None:
    """Who reads a changed tensor reads the result of what changed it, by whatever name it goes."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target in _PLAIN:
            node.target = _PLAIN[node.target]
        for source in node.meta.pop("changes", ()):
            memory = source.meta["memory"]
            if memory.op == "get_attr":
                raise GraphError(_inplace_message(node, source, "it belongs to the model"))
            if node.meta["memory"] is not memory:
                raise GraphError(_inplace_message(node, source, "returns something else"))
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


def _inplace_message(node: fx.Node, source: fx.Node, why: str) -> str:
    return f"{_label(node)} changes {_label(source)} in place, and {why}; use the form that is not in place"


def _make_plain(node: fx.Node, source: fx.Node) -> None:
    """Call the form that is not in place; modules stay, and whoever keeps one sets its `inplace`."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        return
    if "out" in node.kwargs:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    elif node.op == "call_method" and hasattr(Tensor, name.rstrip("_")):
        node.target = name.rstrip("_")
    elif node.op == "call_function" and name.endswith("_") and hasattr(torch, name.rstrip("_")):
        node.target = getattr(torch, name.rstrip("_"))
    elif node.op == "call_function" and "inplace" in (names := _signature(node.target)):
        place = names.index("inplace")
        if len(node.args) > place:
            node.update_arg(place, False)
        else:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    elif node.target not in _PLAIN.values():
        raise GraphError(_inplace_message(node, source, f"{name} has no other form"))


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


def is_patched(module: nn.Module) -> bool:
    """Whether the instance has a forward that its class does not know."""
    return "forward" in vars(module) or "_conv_forward" in vars(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _hooked_modules(model: nn.Module) -> list[str]:
    return [name or "the model" for name, module in model.named_modules() if _hooked(module)]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of what a model returns, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, list | tuple) else []


def _is_meta(outputs: Any) -> bool:
    return any(tensor.is_meta for tensor in tensors_of(outputs))


def _same(expected: Any, found: Any) -> bool:
    ours, theirs = tensors_of(found), tensors_of(expected)
    return len(ours) == len(theirs) and all(
        one.shape == other.shape and _distance(one, other)[0] == 0 for one, other in zip(ours, theirs, strict=True)
    )


def _distance(one: Tensor, other: Tensor) -> tuple[int, float]:
    """(elements beyond the tolerance, the largest difference); of meta tensors none."""
    if one.is_meta or other.is_meta:
        return 0, 0.0
    limit = TOLERANCE * finite_peak(other)
    error = (one.double() - other.double()).abs()
    error = torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(error), error)
    return int((~(error <= limit)).sum()), float(error.max()) if error.numel() else 0.0


def finite_peak(values: Tensor) -> float:
    """The largest finite magnitude."""
    return float(values.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if values.numel() else 0.0


def _difference(model: nn.Module, module: fx.GraphModule, example: Tensor, expected: Any, found: Any) -> str:
    name = type(model).__name__
    again = run(model, example)
    if not _same(expected, again):
        return (
            f"{name} returns other values when it is run again on the same images in evaluation mode; take out what is "
            "random, such as F.dropout(x) without training=self.training"
        )
    pairs = [(a, b) for a, b in zip(tensors_of(found), tensors_of(expected), strict=False) if a.shape == b.shape]
    sizes = [(_distance(a, b)[1], finite_peak(b)) for a, b in pairs]
    told = " and ".join(f"by {error:.3g} at a magnitude of {peak:.3g}" for error, peak in sizes) or "in number or shape"
    where = _first_difference(model, module, example)
    hooks = _hooked_modules(model)
    also = f"; hooks of {', '.join(hooks)} may change values" if hooks else ""
    return (
        f"{name} computes something else than its torch.fx trace: on the example the outputs differ {told}, first at "
        f"{where}{also}. Look there for Python that a trace does not see (isinstance or shape tests of tensors, state "
        "kept on the module) and write it with torch operations"
    )


def _first_difference(model: nn.Module, module: fx.GraphModule, example: Tensor) -> str:
    """The first layer, in order of the graph, whose output differs between model and graph."""
    names = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    seen: dict[str, list[Any]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda layer, args, output: seen[name].append(output)

    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    handles = [layer.register_forward_hook(keep(name), prepend=True) for name, layer in layers.items()]
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    walk = Evaluation(module)
    walk.garbage_collect_values = False
    walk.run(example.clone())
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls = seen[str(node.target)]
            if not calls or not _same(calls.pop(0), walk.env[node]):
                return str(node.target)
    return "the output"


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _trace_message(model: nn.Module, error: Exception) -> str:
    """Name the user's own line: the last frame outside torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in f.filename.split("/")]
    frames = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "unknown place"
    return (
        f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}) at {where}; "
        "move control flow that depends on tensor values out of forward. Without a trace bits can still be searched "
        "and fine-tuned with prepare(..., SearchConfig(pruning=False, trace=False)), but filters cannot be removed "
        "and the model cannot be packed"
    )
