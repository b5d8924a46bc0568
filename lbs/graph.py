"""What a model is made of: a torch.fx trace with shapes, quantizable layers, and channels that can be cut together."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbs.plan import LayerPlan, Plan
from lbs_kernels.errors import GraphError
from lbs_kernels.program.window import is_depthwise

NORMS = (nn.BatchNorm2d,)
POINTWISE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_LEAVES = (nn.Conv2d, nn.Linear, *NORMS, *POINTWISE, *POOLS, nn.Flatten)
_POINTWISE_CALLS: tuple[Any, ...] = (torch.relu, nn.functional.relu, nn.functional.relu6, "relu", "relu_")
_POOL_CALLS: tuple[Any, ...] = (nn.functional.adaptive_avg_pool2d, nn.functional.max_pool2d, nn.functional.avg_pool2d)


@dataclass(frozen=True)
class ChannelGroup:
    """The filters of one convolution and everything that must lose the same channels with them."""

    producer: str
    norms: tuple[str, ...]
    consumers: tuple[str, ...]
    prunable: bool
    reason: str = ""  # why not
    through: tuple[str, ...] = ()  # depthwise convolutions in between, whose filters go along


@dataclass(frozen=True)
class ModelRecord:
    """What packing and costing need to know of a model besides its modules. Kept on it as `lbs_record`."""

    input_shape: tuple[int, ...]  # without the batch
    plan: Plan
    groups: tuple[ChannelGroup, ...]
    unconverted: tuple[tuple[str, str], ...] = ()  # (layer, reason)
    folding: frozenset[str] = frozenset()  # as in ModelGraph


@dataclass(frozen=True)
class ModelGraph:
    """A traced model: node.meta["shape"] and node.meta["dtype"] tell each node's output."""

    module: fx.GraphModule
    layers: dict[str, LayerPlan]
    groups: dict[str, ChannelGroup]
    repeated: frozenset[str] = frozenset()  # layers that are called more than once
    uneven: frozenset[str] = frozenset()  # of those, layers whose calls cost differently
    folding: frozenset[str] = frozenset()  # norms that become part of the convolution they follow


class _Tracer(fx.Tracer):
    """Keeps the layers of a network whole, also those that subclass torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs the graph once and notes every output shape and dtype, and the numbers made of shapes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # torch.fx would add its own to the message

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
        elif isinstance(result, int | torch.Size):
            n.meta["number"] = result
        return result


def trace(model: nn.Module, example: Tensor) -> ModelGraph:
    """Trace a model symbolically and run it once, in eval mode and without gradients.

    Arguments:
        example: one input batch [N, C, H, W].

    Raises:
        GraphError: control flow that depends on values (file and line are named), or an example that does not fit.
    """
    _check_example(model, example)
    tracer = _Tracer()
    with _evaluating(model):  # also while tracing: `if self.training` takes the branch of inference
        try:
            module = fx.GraphModule(model, tracer.trace(model))
        except Exception as error:
            raise GraphError(_trace_message(model, error)) from error
        _by_position(module)
        try:
            _Shapes(module).run(example)
        except Exception as error:
            raise GraphError(_example_message(model, example, error)) from error
    calls = []
    for node in layer_nodes(module):
        source = node.args[0]
        shape = source.meta["shape"] if isinstance(source, fx.Node) else node.meta["shape"]
        calls.append(geometry(str(node.target), module.get_submodule(str(node.target)), shape))
    groups = {str(n.target): _group(module, n) for n in layer_nodes(module) if _is_conv(module, n)}
    layers, uneven = _summed(calls)
    return ModelGraph(module, layers, groups, _repeated(entry.name for entry in calls), uneven, _folding(module))


def _by_position(module: fx.GraphModule) -> None:
    """Modules called as layer(input=x) read what is called layer(x)."""
    for node in module.graph.nodes:
        if node.op == "call_module" and not node.args and list(node.kwargs) == ["input"]:
            node.args, node.kwargs = (node.kwargs["input"],), {}
    module.recompile()


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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients, each one's mode restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _repeated(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name, calls in Counter(names).items() if calls > 1)


def _check_example(model: nn.Module, example: object) -> None:
    if not isinstance(example, Tensor):
        raise GraphError(
            f"the example for {type(model).__name__} is a {type(example).__name__}; give one batch as a tensor "
            "[N, C, H, W]"
        )


def _example_message(model: nn.Module, example: Tensor, error: Exception) -> str:
    return (
        f"{type(model).__name__} failed on an example of shape {tuple(example.shape)}, {example.dtype} on "
        f"{example.device}: {error}; give an example batch such as the model is trained on, of its dtype and device"
    )


def _trace_message(model: nn.Module, error: Exception) -> str:
    """Name the user's own line: the last frame outside torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in f.filename.split("/")]
    frames = [f for f in frames if not f.filename.endswith("lbs/graph.py") and not f.filename.startswith("<")]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "unknown place"
    return (
        f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}) at {where}; "
        "move control flow that depends on tensor values out of forward. Without a trace bits can still be searched "
        "and fine-tuned with prepare(..., SearchConfig(pruning=False, trace=False)), but filters cannot be removed "
        "and the model cannot be packed"
    )


def layer_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that call a convolution or linear layer, in execution order."""
    return [n for n in module.graph.nodes if isinstance(called_module(module, n), nn.Conv2d | nn.Linear)]


def called_module(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module a node calls, or None."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def observe_layers(model: nn.Module, example: Tensor) -> tuple[dict[str, LayerPlan], frozenset[str]]:
    """Geometry of the layers that one forward pass calls, in that order, without a trace; and the uneven ones.

    Raises:
        GraphError: an example that does not fit.
    """
    _check_example(model, example)
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
        with _evaluating(model):
            model(example)
    except Exception as error:
        raise GraphError(_example_message(model, example, error)) from error
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
        "conv2d",
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


def _is_conv(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(called_module(module, node), nn.Conv2d)


def _group(module: fx.GraphModule, producer: fx.Node) -> ChannelGroup:
    """Follow a convolution's channels to everything that reads them."""
    norms: list[str] = []
    consumers: list[str] = []
    through: list[str] = []
    reasons: list[str] = []
    seen: set[fx.Node] = set()
    stack = list(producer.users)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        target = called_module(module, node)
        if isinstance(target, NORMS):
            norms.append(str(node.target))
        elif isinstance(target, nn.Conv2d) and is_depthwise(target.groups, target.in_channels, target.out_channels):
            through.append(str(node.target))
        elif isinstance(target, nn.Conv2d):
            if target.groups != 1:
                reasons.append(f"its channels feed the grouped convolution {node.target}")
            consumers.append(str(node.target))
            continue
        elif isinstance(target, nn.Linear):
            if target.in_features != producer.meta["shape"][1]:
                reasons.append(f"its channels are flattened with pixels before {node.target}")
            consumers.append(str(node.target))
            continue
        elif not _keeps_channels(node, target):
            reasons.append(f"its channels reach {node.name} ({_what(node)})")
            continue
        stack.extend(node.users)
    layer = called_module(module, producer)
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        reasons.append("it is a grouped convolution")
    if not consumers:
        reasons.append("no convolution reads its channels")
    twice = _repeated(str(n.target) for n in module.graph.nodes if n.op == "call_module")
    for name in sorted({str(producer.target), *norms, *through, *consumers} & twice):
        reasons.append(f"{name} is called more than once")
    order = {str(node.target): index for index, node in enumerate(module.graph.nodes)}
    ordered = [tuple(sorted(set(names), key=order.__getitem__)) for names in (norms, consumers, through)]
    reason = "; ".join(dict.fromkeys(reasons))
    return ChannelGroup(str(producer.target), ordered[0], ordered[1], not reasons, reason, ordered[2])


def _keeps_channels(node: fx.Node, target: nn.Module | None) -> bool:
    if isinstance(target, (*POINTWISE, *POOLS, nn.Flatten)):
        return True
    return node.target in (*_POINTWISE_CALLS, *_POOL_CALLS, torch.flatten, "flatten")


def _what(node: fx.Node) -> str:
    return "the model's output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))


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
