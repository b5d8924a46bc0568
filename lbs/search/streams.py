"""Residual streams of 8 bits: which values of a network they are, and the quantizers that hang on its modules.

A sum of two branches ends in the step of one of them; the other one is stored until then. A quantizer behind the module
that returns that value makes codes of it, for the sum and for all others that read it, in training as in the packed
network. What somebody needs floats of stays one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lbs.channels import NORMS, called_module
from lbs.convolutions import TransposedConv2d
from lbs.graph import ModelGraph, ModelRecord, ResidualStream
from lbs.quant.quantizers import ActivationQuantizer, StreamQuantizer
from lbs.symbolic import ACTIVATIONS, ValueHook
from lbs_kernels.errors import PlanError

NAME = "stream_quantizer"  # of the module that hangs on another
FLOAT = 32
WIDTHS = (8, FLOAT)
_SUMS = (operator.add, torch.add, "add")
_NOTHING = (nn.Identity, nn.Dropout)


def check_streams(bits: int) -> None:
    """Raises PlanError for a width of residual streams that does not exist."""
    if bits not in WIDTHS:
        raise PlanError(f"streams={bits!r}; residual streams have 8 bits (codes), or 32 (floats)")


def residual_streams(graph: ModelGraph, layers: Collection[str]) -> tuple[ResidualStream, ...]:
    """The values of a float network that its sums store, in the order in which they are computed.

    Arguments:
        layers: those that will be quantized.
    """
    return tuple(_Search(graph, layers).found())


@dataclass(frozen=True)
class _Sum:
    """`main` is what the sum becomes part of, `other` is stored for it."""

    main: fx.Node
    other: fx.Node
    copies: bool  # `main` ends in no step of its own, so that its floats are read


class _Search:
    """The graph of a float network, and who reads what in it."""

    def __init__(self, graph: ModelGraph, layers: Collection[str]) -> None:
        self.module, self.repeated = graph.module, graph.repeated
        self.layers = set(layers)
        nodes = list(self.module.graph.nodes)
        self.order = {node: index for index, node in enumerate(nodes)}
        self.calls = Counter(name for node in nodes for name in node.meta.get("returned_by", ()))
        self.sums = {node: self._sum(node) for node in nodes if self._is_sum(node)}

    def found(self) -> Iterator[ResidualStream]:
        """Every stream, with why it stays in floats."""
        stored = {one.other for one in self.sums.values()}
        for node in sorted(stored, key=self.order.__getitem__):
            names = self._modules(node)
            read, reason = self._layers_behind(node)
            if reason is None and self._ends_in(node, TransposedConv2d):
                reason = "a transposed convolution makes it piece by piece"
            if reason is None and not names:
                reason = "no module returns it that is called once"
            yield ResidualStream(names[0] if names else node.name, tuple(read), reason or "")

    def _modules(self, node: fx.Node) -> list[str]:
        """Modules that give out a node to all its readers and are called once, the innermost first."""
        names = [name for name in node.meta.get("returned_by", ()) if name and self.calls[name] == 1]
        users = list(node.users)
        return names + (self._modules(users[0]) if len(users) == 1 and self._is_alias(users[0]) else [])

    def _layers_behind(self, node: fx.Node) -> tuple[list[str], str | None]:
        """Layers that read a node as it is or its maxima, or who needs floats of it."""
        if len(node.meta.get("shape", ())) != 4 or node.op == "placeholder":
            return [], "it is no image that the network has computed"
        read: list[str] = []
        for reader in self._readers(node):
            if self._is_layer(reader):
                read.append(str(reader.target))
            elif reader in self.sums and self.sums[reader].other is node and self.sums[reader].main is not node:
                continue
            elif reader in self.sums and not self.sums[reader].copies:
                continue  # it becomes part of another step
            elif self._is_maximum(reader) and all(self._is_layer(behind) for behind in self._readers(reader)):
                read += [str(behind.target) for behind in self._readers(reader)]
            else:
                return [], f"{reader.target if reader.op == 'call_module' else reader.name} reads its floats"
        return [name for name in read if name not in self.repeated], None

    def _sum(self, node: fx.Node) -> _Sum:
        """Which operand stays, as packing decides: the later one that can take the sum up does."""
        first, second = (self._origin(value) for value in node.args[:2])
        able = [one for one in (first, second) if self._readers(one) == [node] and self._ends_in(one, nn.Module)]
        if not able or first is second:
            return _Sum(first, second, copies=True)
        main = max(able, key=self.order.__getitem__)
        return _Sum(main, second if main is first else first, copies=False)

    def _is_sum(self, node: fx.Node) -> bool:
        values = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        shapes = {tuple(value.meta.get("shape", ())) for value in (*values, node)}
        return node.target in _SUMS and len(values) == 2 and len(shapes) == 1 and shapes != {()} and not node.kwargs

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) in self.layers

    def _is_maximum(self, node: fx.Node) -> bool:
        return node.target is F.max_pool2d or isinstance(called_module(self.module, node), nn.MaxPool2d)

    def _is_alias(self, node: fx.Node) -> bool:
        return isinstance(called_module(self.module, node), _NOTHING)

    def _origin(self, node: Any) -> fx.Node:
        """The node whose values one that does nothing shows."""
        while self._is_alias(node):
            node = node.args[0]
        return node

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a node, those that do nothing looked through."""
        return [reader for user in node.users for reader in (self._readers(user) if self._is_alias(user) else [user])]

    def _ends_in(self, node: fx.Node, kind: type[nn.Module]) -> bool:
        """Whether a layer (of `kind`) computes a node, norms and an activation behind it."""
        while isinstance(called_module(self.module, node), (*NORMS, *ACTIVATIONS, *_NOTHING)):
            node = node.args[0]  # type: ignore[assignment]
            if len(node.users) != 1:
                return False
        return self._is_layer(node) and isinstance(called_module(self.module, node), kind)


class Encoded(ValueHook):
    """A hook that gives out what the codes of a module's result stand for."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        result: Tensor = getattr(module, NAME)(output)
        return result


def hang_quantizers(model: nn.Module, record: ModelRecord) -> None:
    """Quantize the streams of a record, in place; layers are what they will be."""
    for stream in record.streams:
        if not stream.reason:
            module = model.get_submodule(stream.name)
            like = next(model.parameters())
            module.add_module(NAME, StreamQuantizer().to(like.device).train(module.training))
            module.register_forward_hook(Encoded())


def share_quantizers(model: nn.Module, record: ModelRecord) -> None:
    """Give layers of fixed 8-bit activations that read a stream its quantizer, in place: one range, one tensor."""
    for stream in record.streams:
        for name in stream.readers if not stream.reason else ():
            layer: Any = model.get_submodule(name)
            own = layer.quantizer
            if type(own) is ActivationQuantizer and own.bits == WIDTHS[0] and not own.signed:
                layer.quantizer = getattr(model.get_submodule(stream.name), NAME)


def take_quantizers_off(model: nn.Module) -> None:
    """Make streams floats again, in place."""
    for module in model.modules():
        if hasattr(module, NAME):
            delattr(module, NAME)
            for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Encoded)]:
                del module._forward_hooks[key]
