"""What stays in float, as torch's own layers and operations, so that a file can hold it.

Layers whose weights are computed by parametrizations get those they have in evaluation mode. Modules and functions of
the user's own are traced through, or recorded as they run, so that what they consist of remains; where that cannot be
done, or does not compute the same to the last bit, they stay as they are, and only a file refuses them.
"""

from __future__ import annotations

import copy
import keyword
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lbs.packing.float_modules import kind_of
from lbs.packing.graph_json import unsaved
from lbs.packing.recorded import BATCHES, CONSTANTS, PART, NotRecordable, recorded
from lbs.quant.deployed import undeploy
from lbs.quant.quantizers import StreamQuantizer
from lbs.traced import Evaluation, Recorded

# torch.fx writes names that are no identifiers between double quotes, where these characters would not stand for
# themselves.
_HEX = {code: f"_{code:x}_" for code in (0, 10, 13, 34, 92, *range(0xD800, 0xE000))}


@dataclass(frozen=True)
class Operations:
    """What a call consists of: a small graph, and the nodes of the large one that its placeholders stand for."""

    graph: fx.GraphModule
    sources: list[fx.Node]


def settled(module: nn.Module) -> nn.Module:
    """A copy that computes in evaluation mode what its node in the graph stands for: with weights of its own, without
    hooks, which are nodes themselves, and changing nothing in place.
    """
    if isinstance(module, StreamQuantizer):
        return _Stream(module)
    kept = copy.deepcopy(module)
    undeploy(kept)
    for part in list(kept.modules()):
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        if isinstance(getattr(part, "inplace", None), bool):
            part.inplace = False  # type: ignore[assignment]
        if parametrize.is_parametrized(part):
            _make_permanent(part)
    return kept


class _Stream(nn.Module):
    """A quantizer of a stream in torch's operations of floats."""

    def __init__(self, quantizer: StreamQuantizer) -> None:
        super().__init__()
        self.scale, self.zero, self.step = quantizer.scale(), quantizer.zero, quantizer.value_step()

    def forward(self, x: Tensor) -> Tensor:
        return (((x * self.scale).round() + self.zero).clamp(0, 255) - self.zero) * self.step


def _make_permanent(module: nn.Module) -> None:
    kind = type(module)  # shared with the original, whose properties would go as well
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    with torch.no_grad():
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def operations(module: fx.GraphModule, node: fx.Node, part: Callable[..., Any]) -> Operations | None:
    """The operations of a call that reads tensors of floats: all of them as they come, or weights as they are."""
    sources = [source for source in node.all_input_nodes if reads_images(source)]
    for placed in dict.fromkeys((tuple(node.all_input_nodes), tuple(sources))):
        if not placed or not all("shape" in one.meta and one.meta["dtype"].is_floating_point for one in placed):
            continue
        fixed = {one: value_of(module, one) for one in node.all_input_nodes if one not in placed}
        holder = part if isinstance(part, nn.Module) else nn.Module()
        found = _traced_through(_call(node, part, placed, fixed), holder, _examples(placed, holder))
        if found is not None:
            return Operations(found, list(placed))
    return None


def _call(
    node: fx.Node, part: Callable[..., Any], placed: tuple[fx.Node, ...], fixed: dict[fx.Node, Any]
) -> Callable[..., Any]:
    """The call as a function of what the nodes `placed` give."""
    if node.args == placed and not node.kwargs:
        return part

    def call(*values: Any) -> Any:
        given = {**fixed, **dict(zip(placed, values, strict=True))}
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        return part(*args, **kwargs)

    return call


def _examples(sources: Iterable[fx.Node], holder: nn.Module) -> Callable[[int], list[Tensor]]:
    """Random values of nodes for a batch size, where the weights of a module lie."""
    device = next(holder.parameters(), torch.empty(0, device="cpu")).device

    def inputs(batch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": "cpu"}
        return [torch.randn(_shape(one, batch), dtype=one.meta["dtype"], **options).to(device) for one in sources]

    return inputs


def _shape(node: fx.Node, batch: int) -> tuple[int, ...]:
    """The shape of a node for another batch; the first size of what reads the images is a multiple of theirs."""
    shape: tuple[int, ...] = node.meta["shape"]
    traced = _images(node.graph).meta["shape"][0] if reads_images(node) else 0
    return (shape[0] // traced * batch, *shape[1:]) if shape and traced and shape[0] % traced == 0 else shape


def _images(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "placeholder")


def reads_images(node: fx.Node) -> bool:
    """Whether a node gives, or is made of, the images and not of weights alone."""
    stack, seen = [node], {node}
    while stack:
        here = stack.pop()
        if here.op == "placeholder":
            return True
        stack.extend(one for one in here.all_input_nodes if one not in seen)
        seen.update(here.all_input_nodes)
    return False


def value_of(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node gives that reads no images."""
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda read: value_of(module, read))
    with torch.no_grad():
        return getattr(Evaluation(module), node.op)(node.target, args, kwargs)


def _traced_through(
    call: Callable[..., Any], part: nn.Module, inputs: Callable[[int], list[Tensor]]
) -> fx.GraphModule | None:
    """A call of a module or function as torch's own operations, its modules and tensors named `part.`...

    None where it can be neither traced nor recorded, a file could not hold the outcome, or that computes something else
    of the examples.

    Args:
        part, inputs: as in `lbs.packing.recorded.recorded`.
    """
    for way in (_symbolic, recorded):
        try:
            with torch.no_grad():
                traced = way(call, part, inputs)
                pairs = [(fx.Interpreter(traced).run(*inputs(n)), call(*inputs(n))) for n in BATCHES]
                if _plain(traced) and all(_equal(one, other) for one, other in pairs):
                    return traced
        except Exception:  # noqa: BLE001  whatever code of the user's makes of a proxy, or of random numbers
            continue
    return None


def _symbolic(call: Callable[..., Any], part: nn.Module, inputs: Callable[[int], list[Tensor]]) -> fx.GraphModule:
    if len(inputs(1)) != 1:
        raise NotRecordable("it is traced of one tensor")
    applied = _Applied(call, part).eval()
    if isinstance(part, nn.TransformerEncoder):  # its own code asks tensors what they are
        applied = _Applied(layers := nn.Sequential(*part.layers, *filter(None, [part.norm])), layers).eval()
    return Recorded(applied, _Tracer().trace(applied))


def _plain(traced: fx.GraphModule) -> bool:
    """Whether a file can hold it: one value comes out, and it names nothing but parts of the module, and constants."""
    *nodes, output = traced.graph.nodes
    named = [str(node.target) for node in nodes if node.op in ("call_module", "get_attr")]
    inside = all(name.partition(".")[0] in (PART, CONSTANTS) for name in named)
    return inside and isinstance(output.args[0], fx.Node) and not unsaved(traced)


class _Applied(nn.Module):
    def __init__(self, call: Callable[..., Any], part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.calls = (call,)  # in a tuple: a module is no second part

    def forward(self, input: Any) -> Any:
        return self.calls[0](input)


class _Tracer(fx.Tracer):
    """Keeps whole what a file has a form for."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None


def _equal(one: Any, other: Any) -> bool:
    (values, shape), (others, other_shape) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return shape == other_shape and all(
        type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
        for a, b in zip(values, others, strict=True)
    )


def attribute(module: Any, path: str) -> Any:
    """What lies at a path below a module."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def unused(module: nn.Module, name: str) -> str:
    """A name that the module has not."""
    while hasattr(module, name):
        name += "_"
    return name


def writable(module: Any, path: str) -> str:
    """A path below a module as torch.fx can write it into Python code, keywords with a line behind them."""
    parts = []
    for part in path.split("."):
        name = part.translate(_HEX)
        name += "_" * keyword.iskeyword(name)
        parts.append(part if name == part else unused(module, name))
        module = getattr(module, part)
    return ".".join(parts)
