"""Graphs of networks of lines [N, C, L], computed as images [N, C, 1, L] from the first layer to the last.

A layer of lines is one of images between two views, `unsqueeze(-2)` and `squeeze(-2)` (`lbs/search/lines.py`). Here the
second goes down through what computes each element by itself, sums, concatenations, pools and means, and meets the
first of the next layer:

    conv -> squeeze -> relu -> unsqueeze -> conv     becomes     conv -> relu -> conv

What only moves elements stays as it is: from view to view it is a chain that packing finds a map for.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lbs.symbolic import ACTIVATIONS, Whole

POINTWISE = (*ACTIVATIONS, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout, Whole)
_NAMES = (
    "relu relu6 hardtanh leaky_relu gelu silu hardswish hardsigmoid sigmoid tanh elu mish dropout add mul sub clamp"
)
POINTWISE_METHODS = frozenset(_NAMES.split())
POINTWISE_FUNCTIONS = frozenset(
    getattr(home, name, None) for home in (torch, F, operator) for name in POINTWISE_METHODS
) - {None}
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
# A pool of lines: that of images, and by argument what the other dimension has.
_POOLS: dict[Any, tuple[Any, dict[str, int]]] = {
    F.max_pool1d: (F.max_pool2d, {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}),
    F.avg_pool1d: (F.avg_pool2d, {"kernel_size": 1, "stride": 1, "padding": 0}),
    F.adaptive_avg_pool1d: (F.adaptive_avg_pool2d, {"output_size": 1}),
}
_MEANS = (torch.mean, "mean")
_WORDS = "view reshape flatten unflatten squeeze unsqueeze transpose permute contiguous chunk split"
_MOVES = frozenset(_WORDS.split())
_MOVING = (*_MOVES, *(getattr(torch, name) for name in _MOVES if hasattr(torch, name)), operator.getitem)


def widened(value: Any, other: int) -> Any:
    """A size along a line as that of an image, whose other side has `other`; none and words stay."""
    if value is None or isinstance(value, str):
        return value
    return (other, value[0] if isinstance(value, tuple | list) else value)


def over_images(module: fx.GraphModule) -> None:
    """Compute lines as images wherever both are the same, in place; nodes have shapes and get them."""
    lines = _Lines(module)
    for node in list(module.graph.nodes):
        lines.visit(node)
    for node in reversed(module.graph.nodes):
        if not node.users and node in lines.replaced:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()


class _Lines:
    """Nodes in two forms: [N, C, L], and `images` [N, C, 1, L] of it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.images: dict[fx.Node, fx.Node] = {}
        self.moved: set[fx.Node] = set()  # made of images by operations that only move
        self.replaced: set[fx.Node] = set()  # whose readers may be gone

    def visit(self, node: fx.Node) -> None:
        """Give one node its other form, where there is one; all before it were visited."""
        call = node.target if node.op in ("call_function", "call_method") else None
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node
        image = self.images.get(source)
        if _is_view(node, "squeeze", _shape(source)):
            self._view(node, source)
        elif _is_view(node, "unsqueeze", _shape(node)):
            self.replaced.add(node)
            node.meta["layout"] = True
            node.replace_all_uses_with(self.images.setdefault(source, node))
        elif self._follows(node):
            self._compute(node)
        elif image is None:
            if call in _MOVING and source in self.moved:
                self._move(node)
        elif call in ("size", getattr):
            _ask(node, image)
        elif call in _MEANS and _is_along(node):
            self._mean(node, image)
        elif (place := _place_of(node)) is not None and len(_shape(node)) == 2:
            last = slice(place, place + 1 or None)
            pixel = self._before(node, "call_function", operator.getitem, (image, (*[slice(None)] * 3, last)))
            pixel.meta["shape"] = (*_shape(node), 1, 1)
            self._flat(node, pixel)
        elif self._flattens(node):
            self._flat(node, image)
        elif call in _MOVING:
            self._move(node)

    def _follows(self, node: fx.Node) -> bool:
        """Whether the same call computes images, some operand of it being one and all others lines or numbers."""
        if node.op == "call_module":
            known = isinstance(self.module.get_submodule(str(node.target)), POINTWISE)
        elif node.op == "call_method":
            known = node.target in POINTWISE_METHODS or node.target == "expand_as"
        else:
            joins = node.target in _CONCATENATIONS and _argument(node, 1, "dim", 0) in (1, -2)
            known = joins or node.target in POINTWISE_FUNCTIONS or node.target in _POOLS
        lines = [source for source in node.all_input_nodes if len(_shape(source)) == 3]
        others = [source for source in node.all_input_nodes if source not in lines]
        several = any(len(_shape(source)) > 2 or math.prod(_shape(source)) > 1 for source in others)
        ours = any(source in self.images or source in self.moved for source in lines)
        return known and ours and not several and len(_shape(node)) == 3

    def _compute(self, node: fx.Node) -> None:
        """Compute a node on images; who reads it reads a view of that."""
        read = {source: self._image(source) for source in node.all_input_nodes if len(_shape(source)) == 3}
        with self.graph.inserting_before(node):
            image = self.graph.node_copy(node, lambda source: read.get(source, source))
        if node.op == "call_function" and node.target in _POOLS:
            image.target, sides = _POOLS[node.target]
            names = ("input", *sides, *[""] * len(image.args))  # by place; flags behind the sizes stay
            pairs = zip(names, image.args, strict=False)
            image.args = tuple(_widened_if(sides, name, value) for name, value in pairs)
            image.kwargs = {name: _widened_if(sides, name, value) for name, value in image.kwargs.items()}
        elif node.op == "call_function" and node.target in _CONCATENATIONS:
            image.args, image.kwargs = (_argument(image, 0, "tensors"), 1), {}
        batch, channels, places = _shape(node)
        image.meta = {**node.meta, "shape": (batch, channels, 1, places)}
        self._replace(node, self._line(node, image))

    def _mean(self, node: fx.Node, image: fx.Node) -> None:
        kept = bool(_argument(node, 2, "keepdim", False))
        mean = self._before(node, node.op, node.target, (image, (2, 3), kept))
        if kept:
            mean.meta["shape"] = (*_shape(node)[:2], 1, 1)
        self._replace(node, self._line(node, mean) if kept else mean)

    def _flattens(self, node: fx.Node) -> bool:
        """Whether a node lays channels and places in one dimension, in whatever words; for every size of a batch."""
        source = node.args[0]
        batch, channels, places = _shape(source)  # type: ignore[arg-type]
        if node.op == "call_module":
            known = isinstance(self.module.get_submodule(str(node.target)), nn.Flatten)
        else:
            anything = node.target in ("squeeze", torch.squeeze) and len(node.args) + len(node.kwargs) == 1
            known = node.target in _MOVING and not anything
        return known and _shape(node) == (batch, channels * places)

    def _flat(self, node: fx.Node, image: fx.Node) -> None:
        self._replace(node, self._before(node, "call_method", "flatten", (image, 1)))

    def _image(self, source: fx.Node) -> fx.Node:
        """A view of what comes as a line; of one place for each channel, of the channels themselves."""
        if source in self.images:
            return self.images[source]
        shape, before = _shape(source), source.args[0] if source.args else None
        moves = source.op != "call_module" and source.target in _MOVING
        spread = isinstance(before, fx.Node) and moves and (*_shape(before), 1) == shape
        with self.graph.inserting_after(source):
            if spread:
                image = self.graph.call_method("reshape", (before, -1, shape[1], 1, 1))
            else:
                image = self.graph.call_method("unsqueeze", (source, -2))
                image.meta["layout"] = True
        image.meta.update(shape=(*shape[:2], 1, shape[2]), dtype=source.meta["dtype"])
        self.images[source] = image
        self.replaced |= {source, image}
        return image

    def _move(self, node: fx.Node) -> None:
        """Note what only moves elements of a line; of four dimensions on the way to others it is no image."""
        self.moved.add(node)
        node.meta["passing"] = all(user.op != "call_module" and user.target in _MOVING for user in node.users)

    def _line(self, node: fx.Node, image: fx.Node) -> fx.Node:
        line = self._before(node, "call_method", "squeeze", (image, -2))
        self._view(line, image)
        return line

    def _view(self, line: fx.Node, image: fx.Node) -> None:
        self.images[line] = image
        self.replaced.add(line)
        line.meta["layout"] = True  # nothing the model computes: no report speaks of it

    def _before(self, node: fx.Node, op: str, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """A call in front of a node, of its shape."""
        with self.graph.inserting_before(node):
            made = self.graph.create_node(op, target, args)
        made.meta.update(shape=_shape(node), dtype=node.meta["dtype"])
        return made

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.replaced.add(node)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta.get("shape", ()))


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _is_view(node: fx.Node, method: str, image: tuple[int, ...]) -> bool:
    """Whether a node makes a line of an `image` of height 1, or the image of a line."""
    named = node.op in ("call_method", "call_function") and node.target in (method, getattr(torch, method))
    return named and _argument(node, 1, "dim") in (2, -2) and len(image) == 4 and image[2] == 1


def _is_along(node: fx.Node) -> bool:
    """Whether a mean is taken over the places of a line alone."""
    dims = _argument(node, 1, "dim")
    return dims in (2, -1, (2,), (-1,), [2], [-1]) and node.kwargs.get("dtype") is None


def _place_of(node: fx.Node) -> int | None:
    """The one place that an index takes of all channels."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(index[-1], int):
        return None
    return index[-1] if index[:-1] in ((slice(None), slice(None)), (...,)) else None


def _ask(node: fx.Node, image: fx.Node) -> None:
    """Sizes of a line are read of its image, where they are asked one by one."""
    places = {2: 3, -2: 1, -3: 0}
    if node.target == "size" and len(node.args) == 2:
        node.args = (image, places.get(node.args[1], node.args[1]))  # type: ignore[arg-type]
    elif (node.target == "size" and not node.kwargs) or node.args[1:] == ("shape",):
        items = list(node.users)
        if all(item.target is operator.getitem and isinstance(item.args[1], int) for item in items):
            node.args, node.meta["number"] = (image, *node.args[1:]), torch.Size(_shape(image))
            for item in items:
                item.args = (node, places.get(item.args[1], item.args[1]))  # type: ignore[arg-type]


def _widened_if(sides: dict[str, int], name: str, value: Any) -> Any:
    return widened(value, sides[name]) if name in sides else value
