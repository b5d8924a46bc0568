"""What a model is made of: a torch.fx trace with shapes, quantizable layers, and the record that a model carries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from lbs import cost
from lbs.channels import NORMS, ChannelGroup, called_module, groups_of, repeated
from lbs.convolutions import TransposedConv2d
from lbs.lines import over_images
from lbs.plan import LayerPlan, Plan
from lbs.symbolic import check_example, symbolic
from lbs.traced import evaluating, run
from lbs_kernels.errors import GraphError


@dataclass(frozen=True)
class ResidualStream:
    """A value that a sum reads later on: the module that returns it (or its node), the layers that read it as it is,
    and why it is kept in floats; "": in codes of 8 bits.
    """

    name: str
    readers: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class ModelRecord:
    """What packing and costing need to know of a model besides its modules. Kept on it as `lbs_record`."""

    input_shape: tuple[int, ...]  # without the batch
    plan: Plan
    groups: tuple[ChannelGroup, ...]
    unconverted: tuple[tuple[str, str], ...] = ()  # (layer, reason)
    folding: frozenset[str] = frozenset()  # as in ModelGraph
    in_float: tuple[LayerPlan, ...] = ()  # of the unconverted, those that are called and have a formula
    streams: tuple[ResidualStream, ...] = ()  # where streams of 8 bits were asked for

    @property
    def float_bops(self) -> int:
        """Bit operations of the layers left in float, 32 x 32 bits each; the plan counts the others."""
        return sum(cost.bops(cost.full_precision(layer.problem())) for layer in self.in_float)


@dataclass(frozen=True)
class ModelGraph:
    """A traced model: node.meta["shape"] and node.meta["dtype"] tell each node's output."""

    module: fx.GraphModule
    layers: dict[str, LayerPlan]
    groups: dict[str, ChannelGroup]
    repeated: frozenset[str] = frozenset()  # layers that are called more than once
    uneven: frozenset[str] = frozenset()  # of those, layers whose calls cost differently
    folding: frozenset[str] = frozenset()  # norms that become part of the convolution they follow


def trace(model: nn.Module, example: Tensor, strict: bool = True) -> ModelGraph:
    """Trace a model symbolically and run it once, in eval mode and without gradients; lines are images (lbs/lines.py).

    Arguments:
        example: one input batch [N, C, H, W]. strict: refuse a trace that computes something else on it than the model.

    Raises:
        GraphError: as `lbs.symbolic.symbolic` does.
    """
    module = symbolic(model, example, strict)
    over_images(module)
    calls = []
    for node in layer_nodes(module):
        source = node.args[0]
        shape = source.meta["shape"] if isinstance(source, fx.Node) else node.meta["shape"]
        calls.append(geometry(str(node.target), module.get_submodule(str(node.target)), shape))
    layers, uneven = _summed(calls)
    names = repeated(entry.name for entry in calls)
    return ModelGraph(module, layers, groups_of(module), names, uneven, _folding(module))


def _folding(module: fx.GraphModule) -> frozenset[str]:
    """Norms that are the only reader of a convolution, or of another such norm, in every call."""
    calls = [node for node in module.graph.nodes if isinstance(called_module(module, node), NORMS)]
    others = {str(node.target) for node in calls if not _reads_alone(module, node)}
    return frozenset(str(node.target) for node in calls) - others


def _reads_alone(module: fx.GraphModule, node: fx.Node) -> bool:
    source, target = node, called_module(module, node)
    while isinstance(target, nn.Identity | nn.Dropout) or source is node:
        before = source.args[0] if source.args else None
        if not isinstance(before, fx.Node) or len(before.users) != 1:
            return False
        source, target = before, called_module(module, before)
    return isinstance(target, (nn.Conv2d, *NORMS))


def _summed(calls: Iterable[LayerPlan]) -> tuple[dict[str, LayerPlan], frozenset[str]]:
    """One entry per layer, its calls counted in `positions`; and the layers whose calls differ in size."""
    found: dict[str, LayerPlan] = {}
    uneven = set()
    for entry in calls:
        before = found.setdefault(entry.name, entry)
        if before is entry:
            continue
        if (before.height, before.width) != (entry.height, entry.width):
            uneven.add(entry.name)
        found[entry.name] = replace(before, positions=before.positions + entry.positions)
    return found, frozenset(uneven)


def layer_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that call a convolution or linear layer, in execution order."""
    return [n for n in module.graph.nodes if isinstance(called_module(module, n), nn.Conv2d | nn.Linear)]


def observe_layers(model: nn.Module, example: Tensor) -> tuple[dict[str, LayerPlan], frozenset[str]]:
    """Geometry of the layers that one forward pass calls, in that order, without a trace; and the uneven ones.

    Raises:
        GraphError: an example that does not fit.
    """
    check_example(model, example)
    calls: list[LayerPlan] = []

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            calls.append(geometry(name, layer, tuple((args[0] if args else kwargs["input"]).shape)))

        return hook

    handles = [
        m.register_forward_pre_hook(note(n), with_kwargs=True)
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    try:
        with evaluating(model):
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return _summed(calls)


def geometry(name: str, layer: nn.Module, shape: tuple[int, ...]) -> LayerPlan:
    """LayerPlan of a layer whose input has `shape`, at 8 / 8 bits until a plan says otherwise."""
    if isinstance(layer, nn.Linear):
        positions = 1
        for size in shape[1:-1]:
            positions *= int(size)
        return LayerPlan(name, "linear", 8, 8, layer.in_features, layer.out_features, positions=positions)
    if not isinstance(layer, nn.Conv2d):
        raise GraphError(f"{name} is a {type(layer).__name__}; only Conv2d and Linear layers have a geometry")
    padding = layer.padding if not isinstance(layer.padding, str) else (0, 0)
    return LayerPlan(
        name,
        "conv_transpose2d" if isinstance(layer, TransposedConv2d) else "conv2d",
        8,
        8,
        layer.in_channels,
        layer.out_channels,
        _pair(layer.kernel_size),
        _pair(layer.stride),
        _pair(padding),
        _pair(layer.dilation),
        layer.groups,
        int(shape[2]),
        int(shape[3]),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


def template_plan(layers: dict[str, LayerPlan], groups: dict[str, ChannelGroup], name: str) -> Plan:
    """Plan at 8 / 8 bits, nothing pruned; `source` names layers whose filters could go."""
    sources = {c: g.producer for g in groups.values() if g.prunable for c in (*g.through, *g.consumers)}
    return Plan(tuple(replace(layer, source=sources.get(layer.name)) for layer in layers.values()), name)


def record_of(model: nn.Module) -> ModelRecord:
    """The record a model was given by `lbs.prepare` or `lbs.uniform`.

    Raises:
        GraphError: the model has none.
    """
    record = getattr(model, "lbs_record", None)
    if not isinstance(record, ModelRecord):
        raise GraphError(
            f"{type(model).__name__} carries no record of its shapes; make it with lbs.prepare or lbs.uniform, "
            "or give example= a batch"
        )
    return record
