"""The outer graph as JSON: nodes, and the constructor arguments of float modules. Only what is listed here is known.

A file may come from anywhere, so nothing in it is looked up by an arbitrary name: functions, methods and module classes
come from the tables below, and every name that torch.fx writes into Python code must be an identifier.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from lbs.packing.region import PackedRegion
from lbs_kernels.errors import CheckpointError

_OPERATORS = "add iadd sub mul imul truediv neg getitem"
_TORCH = """
    add sub mul div neg exp sqrt cat stack flatten reshape permute mean sum amax relu sigmoid tanh softmax log_softmax
    clamp chunk split squeeze unsqueeze transpose matmul maximum minimum
"""
_FUNCTIONAL = """
    relu relu6 hardtanh leaky_relu elu gelu silu hardswish hardsigmoid sigmoid tanh softmax log_softmax softplus dropout
    max_pool2d avg_pool2d adaptive_avg_pool2d interpolate pad normalize
"""
_METHOD_NAMES = """
    add sub mul div neg mean sum amax relu sigmoid tanh softmax clamp flatten view reshape permute transpose contiguous
    squeeze unsqueeze chunk split size exp sqrt
"""
_METHODS = frozenset(_METHOD_NAMES.split())
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{label}.{name}": getattr(home, name)
    for label, home, names in (
        ("operator", operator, _OPERATORS),
        ("torch", torch, _TORCH),
        ("torch.nn.functional", nn.functional, _FUNCTIONAL),
    )
    for name in names.split()
}
_FUNCTION_NAMES = {function: name for name, function in reversed(_FUNCTIONS.items())}
# Class -> the attributes that are also its constructor's arguments.
_MODULES: dict[type[nn.Module], str] = {
    nn.Conv2d: "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode",
    nn.Linear: "in_features out_features bias",
    nn.BatchNorm2d: "num_features eps momentum affine track_running_stats",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.LayerNorm: "normalized_shape eps elementwise_affine",
    nn.ReLU: "inplace",
    nn.ReLU6: "inplace",
    nn.Hardtanh: "min_val max_val inplace",
    nn.LeakyReLU: "negative_slope inplace",
    nn.ELU: "alpha inplace",
    nn.GELU: "approximate",
    nn.SiLU: "inplace",
    nn.Hardswish: "inplace",
    nn.Hardsigmoid: "inplace",
    nn.Sigmoid: "",
    nn.Tanh: "",
    nn.Softmax: "dim",
    nn.LogSoftmax: "dim",
    nn.Identity: "",
    nn.Dropout: "p inplace",
    nn.Flatten: "start_dim end_dim",
    nn.MaxPool2d: "kernel_size stride padding dilation return_indices ceil_mode",
    nn.AvgPool2d: "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    nn.AdaptiveAvgPool2d: "output_size",
    nn.Upsample: "size scale_factor mode align_corners",
    nn.PixelShuffle: "upscale_factor",
}
_CLASSES = {kind.__name__: kind for kind in _MODULES}
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")


def graph_to_json(graph: fx.GraphModule) -> dict[str, Any]:
    """Nodes and float modules as JSON values.

    Raises:
        CheckpointError: a node or module outside the tables; it is named, with the way out.
    """
    nodes, modules = [], {}
    for node in graph.graph.nodes:
        op, args, target = node.op, node.args, str(node.target)
        if node.target is getattr and node.args[1:] == ("shape",):
            op, args, target = "call_method", node.args[:1], "size"
        elif op == "call_function":
            target = _FUNCTION_NAMES.get(node.target, "")
        if not target or (op == "call_method" and target not in _METHODS):
            raise _unsaved(node.name, f"calls {getattr(node.target, '__name__', node.target)}")
        if node.op == "call_module" and not isinstance(graph.get_submodule(target), PackedRegion):
            modules[target] = _module_to_json(target, graph.get_submodule(target))
        body = {"name": node.name, "op": op, "target": target, "args": _encode(args, node.name)}
        if node.kwargs:
            body["kwargs"] = _encode(dict(node.kwargs), node.name)
        nodes.append(body)
    return {"nodes": nodes, "modules": modules}


def _unsaved(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name} {what}, which has no form without pickle, so the model cannot be saved; replace that part by torch's "
        "own layers, or keep the model in memory"
    )


def _module_to_json(path: str, module: nn.Module) -> dict[str, Any]:
    if type(module) not in _MODULES:
        raise _unsaved(path, f"is a {type(module).__name__}")
    arguments = {name: getattr(module, name) for name in _MODULES[type(module)].split()}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return {"class": type(module).__name__, "arguments": _encode(arguments, path)}


def _encode(value: Any, owner: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size | tuple):
        return {"tuple": [_encode(item, owner) for item in value]}
    if isinstance(value, list):
        return {"list": [_encode(item, owner) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, owner) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(item, owner) for item in (value.start, value.stop, value.step)]}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise _unsaved(owner, f"has an argument {value!r}")


def graph_from_json(body: Any, regions: list[PackedRegion], tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """The GraphModule of `graph_to_json`'s value.

    Args:
        tensors: parameters and buffers of the float modules, by path. Modules take them as they are; their own are
            never allocated.

    Raises:
        CheckpointError: something unknown, missing or of another shape.
    """
    root: dict[str, Any] = {f"region{index}": region for index, region in enumerate(regions)}
    try:
        for path, entry in body["modules"].items():
            root[_path(path)] = _module_from_json(path, entry, tensors)
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


def _module_from_json(path: str, entry: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    kind = _CLASSES.get(entry["class"])
    if kind is None:
        raise CheckpointError(f"{path} is a {entry['class']!r}, which this release does not know: upgrade lbs")
    arguments = _decode(entry["arguments"], {})
    if set(arguments) != set(_MODULES[kind].split()):
        raise CheckpointError(f"{path}: a {kind.__name__} takes {_MODULES[kind]}; the file gives {list(arguments)}")
    with torch.device("meta"):
        module = kind(**arguments)
    prefix = f"{path}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    module.load_state_dict(own, strict=True, assign=True)
    return module.eval()


def _add_node(
    graph: fx.Graph,
    made: dict[str, fx.Node],
    entry: dict[str, Any],
    root: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    op, target, name = entry["op"], entry["target"], _identifier(entry["name"])
    if op not in _OPS:
        raise CheckpointError(f"node {name} has op {op!r}; known are {', '.join(_OPS)}")
    if op == "call_function":
        if target not in _FUNCTIONS:
            raise CheckpointError(f"node {name} calls {target!r}, which this release does not know: upgrade lbs")
        target = _FUNCTIONS[target]
    elif op == "call_method" and target not in _METHODS:
        raise CheckpointError(f"node {name} calls the method {target!r}, which this release does not know: upgrade lbs")
    elif op == "call_module" and target not in root:
        raise CheckpointError(f"node {name} calls module {target!r}, which the file does not have")
    elif op == "get_attr":
        root.setdefault(_path(target), tensors[target])
    elif op in ("placeholder", "output"):
        _identifier(target)
    kwargs = _decode(entry.get("kwargs", {"dict": {}}), made)
    for key in kwargs:
        _identifier(key)
    made[entry["name"]] = graph.create_node(op, target, _decode(entry["args"], made), kwargs, name=name)


def _decode(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise CheckpointError("the file's graph holds a bare list; it is damaged")
        return value
    ((kind, body),) = value.items()
    if kind == "node":
        return made[body]
    if kind == "dict":
        return {key: _decode(item, made) for key, item in body.items()}
    items = [_decode(item, made) for item in body]
    if kind == "slice":
        return slice(*items)
    return {"tuple": tuple, "list": list}[kind](items)


def _identifier(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise CheckpointError(f"the file's graph holds the name {name!r}, which is no identifier; it is damaged")
    return name


def _path(path: str) -> str:
    """Dotted module path; parts are identifiers or numbers."""
    for part in path.split("."):
        if not part.isdecimal():
            _identifier(part)
    return path
