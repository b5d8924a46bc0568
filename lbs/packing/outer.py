"""The graph around the regions: one call per region, float modules in between."""

from __future__ import annotations

import copy
import operator
from graphlib import TopologicalSorter
from typing import Any

from torch import fx, nn

from lbs.graph import ModelGraph
from lbs.packing.lower import Lowered
from lbs.packing.region import PackedRegion
from lbs.quant.deployed import undeploy
from lbs_kernels.errors import GraphError


def outer_graph(graph: ModelGraph, lowered: Lowered) -> fx.GraphModule:
    """A GraphModule that computes what the traced model does, regions as modules `region0`, `region1`, ...

    Float modules are copied; the model given stays as it is.

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
        made[unit] = result.node_copy(unit, lambda node: made[node])
        made[unit].type = None  # an annotation of the model, perhaps a string, which torch.fx cannot pickle
        if unit.op in ("call_module", "get_attr"):
            if str(unit.target).partition(".")[0] in regions:
                raise GraphError(f"{unit.target} stays in float and has a name that packed parts have; rename it")
            kept = copy.deepcopy(_attribute(graph.module, str(unit.target)))
            if isinstance(kept, nn.Module):
                _as_in_graph(kept)
            modules[str(unit.target)] = kept
    result.lint()
    return fx.GraphModule(modules, result, class_name="PackedGraph")


def _as_in_graph(module: nn.Module) -> None:
    """A copy that computes what its node stands for: hooks are nodes of their own, and nothing is changed in place."""
    undeploy(module)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    if getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]


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
