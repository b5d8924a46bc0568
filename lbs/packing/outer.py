"""The graph around the regions: one call per region, float modules in between."""

from __future__ import annotations

import copy
import keyword
import operator
from collections.abc import Callable
from graphlib import TopologicalSorter
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from lbs.graph import ModelGraph
from lbs.packing.graph_json import why_unsaved
from lbs.packing.inlined import PART, settled, traced_through
from lbs.packing.lower import Lowered, label_of
from lbs.packing.region import PackedRegion
from lbs_kernels.errors import GraphError

# torch.fx writes names that are no identifiers between double quotes, where these characters would not stand for
# themselves.
_HEX = {code: f"_{code:x}_" for code in (0, 10, 13, 34, 92, *range(0xD800, 0xE000))}


def outer_graph(graph: ModelGraph, lowered: Lowered) -> fx.GraphModule:
    """A GraphModule that computes what the traced model does, regions as modules `region0`, `region1`, ...

    Float modules are copied; the model given stays as it is. Those of the user's own are traced through where that is
    possible, see lbs/packing/inlined.py. `meta["part"]` of a float node is its name in `Lowered.kept_float`.

    Raises:
        GraphError: a float module has a name that packed parts have.
    """
    source = graph.module.graph
    modules: dict[str, Any] = {f"region{i}": PackedRegion(r.program, r.blob) for i, r in enumerate(lowered.regions)}
    regions = set(modules)
    result = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for unit in _order(source, lowered):
        if isinstance(unit, int):
            _call_region(result, lowered, unit, made)
            continue
        if unit.op in ("call_module", "get_attr") and str(unit.target).partition(".")[0] in regions:
            raise GraphError(f"{unit.target} stays in float and has a name that packed parts have; rename it")
        before = len(result.nodes)
        made[unit] = _float_node(graph.module, unit, result, made, modules)
        if "layout" not in unit.meta:
            for node in islice(reversed(result.nodes), len(result.nodes) - before):
                node.meta["part"] = label_of(unit)
        made[unit].type = None  # an annotation of the model, perhaps a string, which torch.fx cannot pickle
    result.lint()
    return fx.GraphModule(modules, result, class_name="PackedGraph")


def _float_node(
    module: fx.GraphModule, node: fx.Node, result: fx.Graph, made: dict[fx.Node, fx.Node], modules: dict[str, Any]
) -> fx.Node:
    """What a node becomes: a copy of it, or the operations it consists of."""
    target = str(node.target)
    part: Callable[..., Any] | None = node.target if node.op == "call_function" else None  # type: ignore[assignment]
    place = writable(module, target) if node.op in ("call_module", "get_attr") else target.translate(_HEX)
    if node.op == "get_attr":
        modules[place] = copy.deepcopy(_attribute(module, target))
    elif node.op == "call_module":
        part = modules[place] = settled(module.get_submodule(target))
    if part is not None and why_unsaved(node, part):
        traced = _inside(node, part)
        if traced is not None:
            modules.pop(place, None)
            return _inlined(traced, place, made[node.all_input_nodes[0]], result, modules)
    copied = result.node_copy(node, lambda read: made[read])
    if node.op in ("get_attr", "call_module"):
        copied.target = place
    return copied


def _inside(node: fx.Node, part: Callable[..., Any]) -> fx.GraphModule | None:
    """The operations of a call that reads one tensor, whose other arguments are constants."""
    source, *others = node.all_input_nodes or [node]
    dtype = source.meta.get("dtype", torch.int64)
    if source is node or others or not dtype.is_floating_point:
        return None

    def call(value: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: value)
        return part(*args, **kwargs)

    generator = torch.Generator().manual_seed(0)
    example = torch.randn(source.meta["shape"], dtype=dtype, generator=generator, device="cpu")
    if not isinstance(part, nn.Module) or node.args != (source,) or node.kwargs:
        return traced_through(call, example)
    weight = next(part.parameters(), example)
    return traced_through(part, example.to(weight.device))


def _inlined(traced: fx.GraphModule, path: str, source: fx.Node, result: fx.Graph, modules: dict[str, Any]) -> fx.Node:
    """Copy a small graph into the large one; its modules and tensors lie at `path`."""
    *nodes, output = traced.graph.nodes
    made: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder":
            made[node] = source
            continue
        made[node] = result.node_copy(node, lambda read: made[read])
        if node.op in ("call_module", "get_attr"):
            place = path + writable(traced, str(node.target)).removeprefix(PART)
            made[node].target = place
            modules[place] = _attribute(traced, str(node.target))
    return made[output.args[0]]


def writable(module: Any, path: str) -> str:
    """A path below a module as torch.fx can write it into Python code: parts that are keywords get a line behind them."""
    parts = []
    for part in path.split("."):
        name = part.translate(_HEX)
        name += "_" * keyword.iskeyword(name)
        while name != part and hasattr(module, name):
            name += "_"
        parts.append(name)
        module = getattr(module, part)
    return ".".join(parts)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _order(source: fx.Graph, lowered: Lowered) -> list[fx.Node | int]:
    """Float nodes and region numbers, each behind everything it reads."""
    owner: dict[fx.Node, fx.Node | int] = {}
    for index, region in enumerate(lowered.regions):
        owner.update(dict.fromkeys(region.nodes, index))
    sorter: TopologicalSorter[fx.Node | int] = TopologicalSorter()
    for node in source.nodes:
        if node in lowered.free:
            continue
        unit = owner.get(node, node)
        if isinstance(unit, int):
            sorter.add(unit, *(owner.get(read, read) for read in lowered.regions[unit].inputs))
        else:
            sorter.add(unit, *(owner.get(read, read) for read in node.all_input_nodes))
    return list(sorter.static_order())


def _call_region(result: fx.Graph, lowered: Lowered, index: int, made: dict[fx.Node, fx.Node]) -> None:
    region = lowered.regions[index]
    call = result.call_module(f"region{index}", tuple(made[node] for node in region.inputs))
    items: dict[int, fx.Node] = {}
    for node, place in region.outputs:
        if place not in items:
            items[place] = result.call_function(operator.getitem, (call, place))
        made[node] = items[place]
