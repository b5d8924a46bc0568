"""The outer graph as JSON: nodes, and the constructor arguments of float modules. Only what is listed is known.

A file may come from anywhere, so nothing in it is looked up by an arbitrary name: functions, methods and module classes
come from lbs/packing/vocabulary.py, and every name that torch.fx writes into Python code stays what it is there.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from lbs.packing.float_modules import module_from_json, module_to_json
from lbs.packing.region import PackedRegion
from lbs.packing.values import NoForm, decode, encode
from lbs.packing.vocabulary import ATTRIBUTES, FUNCTION_NAMES, FUNCTIONS, METHODS
from lbs_kernels.errors import CheckpointError, printable

_OPS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")
_GETATTR = "builtins.getattr"


def unsaved(graph: fx.GraphModule) -> dict[str, str]:
    """Parts that no file can hold, and why: a module's path or a node's name -> reason."""
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        reason = why_unsaved(node, _called(graph, node))
        if reason:
            found.setdefault(str(node.target) if node.op == "call_module" else node.name, reason)
    return found


def why_unsaved(node: fx.Node, called: Any) -> str:
    """Why no file can hold a node and what it calls; "" where one can."""
    try:
        _node_to_json(node, called)
    except NoForm as reason:
        return str(reason)
    return ""


def _called(graph: fx.GraphModule, node: fx.Node) -> Any:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def graph_to_json(graph: fx.GraphModule) -> dict[str, Any]:
    """Nodes and float modules as JSON values.

    Raises:
        CheckpointError: nodes or modules outside the tables; all of them are named, with the way out.
    """
    left = unsaved(graph)
    if left:
        listed = "; ".join(f"{name} {reason}" for name, reason in left.items())
        raise CheckpointError(
            f"the model cannot be saved, a file has no form without pickle for: {listed}. Replace these parts by "
            "torch's own layers and functions, or keep the model in memory"
        )
    pairs = [_node_to_json(node, _called(graph, node)) for node in graph.graph.nodes]
    modules = {body["target"]: module for body, module in pairs if module is not None}
    return {"nodes": [body for body, _ in pairs], "modules": modules}


def _node_to_json(node: fx.Node, called: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A node, and the module it calls where that is a float one. Raises NoForm."""
    op, args, target, module = node.op, node.args, str(node.target), None
    if op == "call_function":
        op, target, args = _function(node)
    elif op == "call_method" and target not in METHODS:
        raise NoForm(f"calls the method {target}")
    if op == "call_module" and not isinstance(called, PackedRegion):
        module = module_to_json(called)
    body = {"name": node.name, "op": op, "target": target, "args": encode(args)}
    if node.kwargs:
        body["kwargs"] = encode(dict(node.kwargs))
    if "part" in node.meta:
        body["part"] = node.meta["part"]
    return body, module


def _function(node: fx.Node) -> tuple[str, str, tuple[Any, ...]]:
    """(op, target, args) of a function call."""
    if node.target is getattr and node.args[1:] == ("shape",):
        return "call_method", "size", node.args[:1]
    if node.target is getattr and node.args[1:2] and node.args[1] in ATTRIBUTES:
        return "call_function", _GETATTR, node.args
    name = FUNCTION_NAMES.get(node.target)  # type: ignore[arg-type]
    if name is None:
        raise NoForm(f"calls {getattr(node.target, '__name__', node.target)}")
    return "call_function", name, node.args


def graph_from_json(body: Any, regions: list[PackedRegion], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The GraphModule of `graph_to_json`'s value.

    Args:
        tensors: parameters and buffers of the float modules, by path. Modules take them as they are; their own are
            never allocated.

    Raises:
        CheckpointError: something unknown, missing or of another shape.
    """
    root: dict[str, Any] = {f"region{index}": region for index, region in enumerate(regions)}
    regions_named = frozenset(root)
    try:
        for path, entry in body["modules"].items():
            prefix = f"{_path(path)}."
            if path.partition(".")[0] in regions_named:
                raise CheckpointError(f"its float module {path} has the name of a packed part; it is damaged")
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            root[path] = module_from_json(path, entry, own).eval()
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}
        for entry in body["nodes"]:
            _add_node(graph, made, entry, root, tensors)
        graph.lint()
        for op in ("placeholder", "output"):
            if sum(node.op == op for node in graph.nodes) != 1:
                raise CheckpointError(f"its graph has {op} nodes, of which there is one; it is damaged, write it again")
        return fx.GraphModule(root, graph, class_name="PackedGraph")
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch.fx makes of a graph nobody has written
        raise CheckpointError(f"its graph is damaged ({type(error).__name__}: {error}); write it again") from error


def _add_node(
    graph: fx.Graph,
    made: dict[str, fx.Node],
    entry: dict[str, Any],
    root: dict[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    op, target, name = entry["op"], entry["target"], _identifier(entry["name"])
    if name in made:
        raise CheckpointError(f"its graph has two nodes {name}; it is damaged")
    if op not in _OPS:
        raise CheckpointError(f"node {name} has op {op!r}; known are {', '.join(_OPS)}")
    args, kwargs = decode(entry["args"], made), decode(entry.get("kwargs", {"dict": {}}), made)
    if op == "call_function":
        target = _known_function(name, target, args, kwargs)
    elif op == "call_method" and target not in METHODS:
        raise CheckpointError(f"node {name} calls the method {target!r}, which this release does not know: upgrade lbs")
    elif op == "call_module" and target not in root:
        raise CheckpointError(f"node {name} calls module {target!r}, which the file does not have")
    elif op == "get_attr":
        root.setdefault(_path(target), _attribute(target, root, tensors))
    elif op in ("placeholder", "output"):
        _identifier(target)
    for key in kwargs:
        _identifier(key)
    made[entry["name"]] = graph.create_node(op, target, args, kwargs, name=name)
    if "part" in entry:
        made[entry["name"]].meta["part"] = printable(str(entry["part"]))


def _known_function(name: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if target == _GETATTR:
        if len(args) != 2 or not isinstance(args[0], fx.Node) or args[1] not in ATTRIBUTES or kwargs:
            raise CheckpointError(f"node {name} reads {args[1:]!r} of a tensor; known are {', '.join(ATTRIBUTES)}")
        return getattr
    if target not in FUNCTIONS:
        raise CheckpointError(f"node {name} calls {target!r}, which this release does not know: upgrade lbs")
    return FUNCTIONS[target]


def _attribute(path: str, root: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor by its path; that of a module which is called as well is the module's own."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        owner = root.get(".".join(parts[:count]))
        if owner is not None:
            *places, leaf = parts[count:]
            found: Tensor = getattr(owner.get_submodule(".".join(places)), leaf)
            return found
    return tensors[path]


def _identifier(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise CheckpointError(f"the file's graph holds the name {name!r}, which is no identifier; it is damaged")
    return name


def _is_path(path: str) -> bool:
    """Whether torch.fx writes the parts of a dotted path into code as they are: each is an identifier and no keyword,
    or stands between double quotes, where all but these characters stand for themselves.
    """
    return all(part and not keyword.iskeyword(part) for part in path.split(".")) and not any(
        letter in '"\\\n\r\0' or "\ud800" <= letter <= "\udfff" for letter in path
    )


def _path(path: str) -> str:
    if not isinstance(path, str) or not _is_path(path):
        raise CheckpointError(f"the file's graph holds the path {path!r}, which names no module; it is damaged")
    return path
