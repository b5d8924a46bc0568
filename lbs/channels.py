"""Which channels are cut together: the filters of a convolution, followed along their dimension to who reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from lbs.lines import over_images
from lbs.symbolic import ACTIVATIONS, record
from lbs.traced import settle
from lbs_kernels.errors import GraphError, first_line
from lbs_kernels.program.window import is_depthwise

NORMS = (nn.BatchNorm2d,)
_POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout),
    *(torch.relu, nn.functional.relu, nn.functional.relu6, "relu"),
)
_POOLS = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.functional.adaptive_avg_pool2d, nn.functional.max_pool2d, nn.functional.avg_pool2d),
)
_RESIZED = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, nn.functional.interpolate)
_FLATTENED = (nn.Flatten, torch.flatten, "flatten")
_MEANS = (torch.mean, "mean")


@dataclass(frozen=True)
class ChannelGroup:
    """The filters of one convolution and everything that must lose the same channels with them."""

    producer: str
    norms: tuple[str, ...]
    consumers: tuple[str, ...]
    prunable: bool
    reason: str = ""  # why not
    through: tuple[str, ...] = ()  # depthwise convolutions in between, whose filters go along


def called_module(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module a node calls, or None."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def repeated(names: Iterable[str]) -> frozenset[str]:
    """Names that occur more than once."""
    return frozenset(name for name, calls in Counter(names).items() if calls > 1)


def groups_of(module: fx.GraphModule) -> dict[str, ChannelGroup]:
    """The groups of a graph by the name of their convolution."""
    calls = [node for node in module.graph.nodes if isinstance(called_module(module, node), nn.Conv2d)]
    return {str(node.target): _group(module, node) for node in calls}


def groups_in_training(
    groups: dict[str, ChannelGroup], module: fx.GraphModule, model: nn.Module, example: Tensor
) -> dict[str, ChannelGroup]:
    """Groups of the evaluated graph `module`, and of whatever else reads their channels while the model is trained.

    Where training cannot be traced and has layers that evaluation does not call, all filters are kept.
    """
    try:
        trained = _training_graph(module, model, example)
    except GraphError as error:
        idle = sorted(_with_parameters(model) - _touched(module))
        if not idle:
            return groups
        reason = f"{idle[0]} may read its channels in training, which cannot be traced ({first_line(error)})"
        return {name: replace(group, prunable=False, reason=group.reason or reason) for name, group in groups.items()}
    if str(trained.graph) == str(module.graph):
        return groups
    others = groups_of(trained)
    return {name: _union(group, others.get(name, group)) for name, group in groups.items()}


def _training_graph(module: fx.GraphModule, model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of training mode, with the shapes that its modules give in evaluation."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.inference_mode(False), torch.no_grad():
            model.train()
            trained = record(model, module.meta["hooks"])
            model.eval()
            settle(trained, example)
            over_images(trained)
    finally:
        for part, training in modes:
            part.training = training
    return trained


def _union(one: ChannelGroup, other: ChannelGroup) -> ChannelGroup:
    norms, consumers, through = (
        tuple(dict.fromkeys((*getattr(one, part), *getattr(other, part)))) for part in ("norms", "consumers", "through")
    )
    prunable = one.prunable and other.prunable
    reason = one.reason or (f"in training {other.reason}" if other.reason else "")
    return ChannelGroup(one.producer, norms, consumers, prunable, reason, through)


def _with_parameters(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if any(p is not None for p in module._parameters.values())}


def _touched(module: fx.GraphModule) -> set[str]:
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    return called | {str(n.target).rpartition(".")[0] for n in module.graph.nodes if n.op == "get_attr"}


def _group(module: fx.GraphModule, producer: fx.Node) -> ChannelGroup:
    """Follow a convolution's channels, dimension 1, to everything that reads them."""
    channels = producer.meta["shape"][1]
    norms: list[str] = []
    consumers: list[str] = []
    through: list[str] = []
    reasons: list[str] = []
    seen: set[fx.Node] = set()
    stack = [(producer, user) for user in producer.users]
    while stack:
        source, node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        shape, target, name = source.meta["shape"], called_module(module, node), str(node.target)
        if isinstance(target, nn.Linear):
            if len(shape) != 2:
                reasons.append(f"{name} reads the last of {len(shape)} dimensions, which is not its channels")
            elif shape[1] != channels:
                reasons.append(f"its channels are flattened with pixels before {name}")
            consumers.append(name)
            continue
        if isinstance(target, NORMS) and len(shape) == 4:
            norms.append(name)
        elif isinstance(target, nn.Conv2d) and len(shape) == 4:
            if is_depthwise(target.groups, target.in_channels, target.out_channels):
                through.append(name)
            else:
                if target.groups != 1:
                    reasons.append(f"its channels feed the grouped convolution {name}")
                consumers.append(name)
                continue
        elif not _keeps_channels(node, target, shape):
            reasons.append(f"its channels reach {node.name} ({_what(node)})")
            continue
        stack.extend((node, user) for user in node.users)
    layer = called_module(module, producer)
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        reasons.append("it is a grouped convolution")
    if len(producer.meta["shape"]) != 4:
        reasons.append("it is given images without a batch")
    if not consumers:
        reasons.append("no convolution reads its channels")
    twice = repeated(str(n.target) for n in module.graph.nodes if n.op == "call_module")
    for name in sorted({str(producer.target), *norms, *through, *consumers} & twice):
        reasons.append(f"{name} is called more than once")
    order = {str(node.target): index for index, node in enumerate(module.graph.nodes)}
    ordered = [tuple(sorted(set(names), key=order.__getitem__)) for names in (norms, consumers, through)]
    reason = "; ".join(dict.fromkeys(reasons))
    return ChannelGroup(str(producer.target), ordered[0], ordered[1], not reasons, reason, ordered[2])


def _keeps_channels(node: fx.Node, target: nn.Module | None, shape: tuple[int, ...]) -> bool:
    """Whether channels are dimension 1 behind a node as they are in front of it; flattened pixels may join them."""
    result = node.meta.get("shape", ())
    kind = type(target) if target is not None else node.target  # a module may be called "relu", and be none
    if kind in _FLATTENED:
        return result[:1] == shape[:1] and (len(result) == 2 or result[1] == shape[1])
    if kind in _MEANS:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return len(shape) == 4 and isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
    if isinstance(target, nn.PReLU):
        return target.num_parameters == 1
    return kind in (*_POINTWISE, *ACTIVATIONS) or (kind in (*_POOLS, *_RESIZED) and len(shape) == 4)


def _what(node: fx.Node) -> str:
    return "the model's output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))
