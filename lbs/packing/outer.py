"""The graph around the regions: one call per region, float modules in between."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from graphlib import TopologicalSorter
from itertools import islice
from typing import Any

from torch import fx

from lbs.graph import ModelGraph
from lbs.packing.graph_json import why_unsaved
from lbs.packing.inlined import (
    Operations,
    attribute,
    operations,
    reads_images,
    settled,
    unused,
    value_of,
    writable,
)
from lbs.packing.lower import Lowered, label_of
from lbs.packing.recorded import PART
from lbs.packing.region import PackedRegion
from lbs_kernels.errors import GraphError


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
    for node in reversed(result.nodes):  # weights that have become constants
        if node.op == "get_attr" and not node.users:
            result.erase_node(node)
    result.lint()
    return fx.GraphModule(modules, result, class_name="PackedGraph")


def _float_node(
    module: fx.GraphModule, node: fx.Node, result: fx.Graph, made: dict[fx.Node, fx.Node], modules: dict[str, Any]
) -> fx.Node:
    """What a node becomes: a copy of it, or the operations it consists of."""
    target = str(node.target)
    part: Callable[..., Any] | None = node.target if node.op == "call_function" else None  # type: ignore[assignment]
    place = writable(module, target) if node.op in ("call_module", "get_attr") else ""
    if node.op == "get_attr":
        modules[place] = copy.deepcopy(attribute(module, target))
    elif node.op == "call_module":
        part = modules[place] = settled(module.get_submodule(target))
    if part is not None and why_unsaved(node, part):
        if node.op == "call_function" and not reads_images(node):
            return _constant(module, node, result, modules)
        small = operations(module, node, part)
        if small is not None:
            modules.pop(place, None)
            return _inlined(small, place, unused(module, f"{node.name}_constants"), made, result, modules)
    copied = result.node_copy(node, lambda read: made[read])
    if node.op in ("get_attr", "call_module"):
        copied.target = place
    return copied


def _constant(module: fx.GraphModule, node: fx.Node, result: fx.Graph, modules: dict[str, Any]) -> fx.Node:
    """What a function makes of weights alone, as a tensor."""
    place = unused(module, node.name)
    modules[place] = value_of(module, node).detach().clone()
    return result.get_attr(place)


def _inlined(
    small: Operations,
    path: str,
    constants: str,
    made: dict[fx.Node, fx.Node],
    result: fx.Graph,
    modules: dict[str, Any],
) -> fx.Node:
    """Copy a small graph into the large one; its modules and tensors lie at `path`, its constants at `constants`."""
    *nodes, output = small.graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    copies = {node: made[source] for node, source in zip(inputs, small.sources, strict=True)}
    for node in nodes[len(inputs) :]:
        copies[node] = result.node_copy(node, lambda read: copies[read])
        if node.op in ("call_module", "get_attr"):
            root, _, inner = writable(small.graph, str(node.target)).partition(".")
            place = ".".join(filter(None, [path if root == PART else constants, inner]))
            copies[node].target = place
            modules[place] = attribute(small.graph, str(node.target))
    return copies[output.args[0]]


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
