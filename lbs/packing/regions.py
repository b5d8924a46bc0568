"""Which nodes run inside packed regions: as many as can be expressed, in as few regions as the order allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from lbs.packing.patterns import Op, gate_shape

NO_NEIGHBOUR = "it touches no packed layer"


@dataclass(frozen=True)
class Partition:
    """Regions in execution order, each with its nodes in graph order; `free` nodes are needed by nobody any more."""

    regions: tuple[tuple[fx.Node, ...], ...]
    free: frozenset[fx.Node]


def operands(node: fx.Node, op: Op) -> list[fx.Node]:
    """The tensors a packed node reads, of a product the gate last; sizes passed to a reshape are none."""
    values = node.args[:2] if op.kind in ("add", "gate", "scale") else node.args[:1]
    keyed = [node.kwargs[key] for key in ("input", "other", "tensors") if key in node.kwargs]
    several = [value if isinstance(value, list | tuple) else [value] for value in (*values, *keyed)]
    found = [value for values in several for value in values if isinstance(value, fx.Node)]
    if op.kind == "scale":
        return [value for value in found if value.op != "get_attr"]
    return sorted(found, key=lambda value: -math.prod(gate_shape(value))) if op.kind == "gate" else found


def partition(graph: fx.Graph, ops: dict[fx.Node, Op], reasons: dict[fx.Node, str]) -> Partition:
    """Split the packable nodes into regions; nodes without a packed layer beside them go back to float.

    The depth of a node counts how often the data crossed from float nodes into packed ones; nodes of equal depth form a
    region. A path from one region into another raises the depth, so regions never wait for each other in a circle.

    Args:
        ops: packable nodes; entries are removed where a node touches no packed layer.
        reasons: receives why they were removed.
    """
    while True:
        free = _needless(graph, ops)
        packed = {node: op for node, op in ops.items() if op.kind != "shape" and node not in free}
        depth = _depths(graph, packed, free)
        lonely = [node for node in packed if not _near_layer(node, packed, depth)]
        if not lonely:
            break
        for node in lonely:
            reasons[node] = NO_NEIGHBOUR
            del ops[node]
    regions: dict[int, list[fx.Node]] = {}
    for node in packed:
        regions.setdefault(depth[node], []).append(node)
    return Partition(tuple(tuple(regions[key]) for key in sorted(regions)), free)


def _needless(graph: fx.Graph, ops: Mapping[fx.Node, Op]) -> frozenset[fx.Node]:
    """Packable nodes whose results nobody reads, and sizes that only packed steps read which know theirs."""
    free: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in ops:
            continue
        readers = [user for user in node.users if user not in free]
        if ops[node].kind == "shape":
            readers = [
                user
                for user in readers
                if not (user in ops and ops[user].kind in ("alias", "mean_pool", "select", "resize"))
            ]
        if not readers:
            free.add(node)
    return frozenset(free)


def _depths(graph: fx.Graph, packed: Mapping[fx.Node, Op], free: Iterable[fx.Node]) -> dict[fx.Node, int]:
    depth: dict[fx.Node, int] = {}
    skipped = set(free)
    for node in graph.nodes:
        if node in skipped:
            continue
        if node in packed:
            depth[node] = max(depth[m] + (m not in packed) for m in operands(node, packed[node]))
        else:
            depth[node] = max((depth[m] for m in node.all_input_nodes), default=-1)
    return depth


def _near_layer(node: fx.Node, packed: Mapping[fx.Node, Op], depth: Mapping[fx.Node, int]) -> bool:
    """Whether a path inside the node's region, up or down, meets a packed layer."""

    def reaches(up: bool) -> bool:
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            here = stack.pop()
            if here in seen or here not in packed or depth[here] != depth[node]:
                continue
            if packed[here].kind == "layer":
                return True
            seen.add(here)
            stack.extend(operands(here, packed[here]) if up else here.users)
        return False

    return reaches(up=True) or reaches(up=False)
