"""Linear layers applied at several positions become convolutions over pixels, which programs have.

    y = linear(x), x [N, ..., C]     becomes     x' [N, C, P, 1], P the number of positions;  y' = conv1x1(x')

Elementwise operations behind it are computed of y', so that a layer, its activation and the next layer make one region.
Where the positions are not the same for every batch size ([L, N, C]), or a layer is called in other ways too, every
position is a row of its own: x [..., C] becomes [rows, C].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbs.graph import called_module
from lbs.lines import POINTWISE, POINTWISE_FUNCTIONS, POINTWISE_METHODS
from lbs.quant.layers import QuantConv2d, QuantLinear
from lbs.traced import Evaluation

_MODULES = tuple(kind for kind in POINTWISE if kind is not nn.PReLU)  # whose channels are dimension 1


class OverPositions(QuantConv2d):
    """A linear layer as a 1x1 convolution: its codes, ranges and quantizer."""

    def __init__(self, linear: QuantLinear) -> None:
        nn.Module.__init__(self)
        held = {"_parameters", "_buffers", "_modules"}
        self.__dict__.update({key: value for key, value in linear.__dict__.items() if key not in held})
        for key in held:
            self.__dict__[key] = dict(linear.__dict__[key])
        self.linear = [linear]  # in a list: no module of this one
        self.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
        self.in_channels, self.out_channels, self.groups = linear.in_features, linear.out_features, 1
        self.kernel_size = self.stride = self.dilation = (1, 1)
        self.padding, self.padding_mode = (0, 0), "zeros"

    def float_weight(self) -> Tensor:
        """Of the linear layer, whatever order sums over its weights have."""
        return self.linear[0].float_weight()[:, :, None, None]

    def code_bytes(self) -> Tensor:
        return self.linear[0].code_bytes()[:, :, None, None]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, over positions"


def over_positions(module: fx.GraphModule, images: Tensor) -> None:
    """Rewrite a traced graph.

    Args:
        images: two or more, of which the graph's shapes are.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if type(called_module(module, node)) is QuantLinear:
            calls.setdefault(str(node.target), []).append(node)
    spread = [node for nodes in calls.values() for node in nodes if len(node.meta["shape"]) > 2]
    if not spread:
        return
    shapes = _Shapes(module)
    shapes.run(torch.cat([images[:1]] * (len(images) + 1)))
    still = {node for node in spread if shapes.found[node][1:] == node.meta["shape"][1:]}
    views = _Views(module)
    for path, nodes in calls.items():
        parent = module.get_submodule(path.rpartition(".")[0])
        if still.issuperset(nodes) and (parent is module or type(parent) is nn.Module):  # no module of the model's
            setattr(parent, path.rpartition(".")[2], OverPositions(module.get_submodule(path)))  # type: ignore[arg-type]
            views.pixels.update(nodes)
    for node in list(module.graph.nodes):
        if node in views.pixels or views.follows(node):
            views.over_pixels(node)
        elif node in spread:
            views.over_rows(node)
    module.graph.eliminate_dead_code(lambda node: node not in views.added)
    module.graph.lint()
    module.recompile()


class _Shapes(Evaluation):
    """The shape of every node's value, for another batch size."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


class _Views:
    """Nodes of a graph in two forms: [N, ..., C], and `images` [N, C, P, 1] of it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.pixels: set[fx.Node] = set()
        self.images: dict[fx.Node, fx.Node] = {}
        self.added: set[fx.Node] = set()  # views, which nobody may read in the end

    def follows(self, node: fx.Node) -> bool:
        """Whether a node computes each element by itself, of values that have the form of images."""
        sources = node.all_input_nodes
        if not sources or any(source not in self.images for source in sources):
            return False
        if node.op == "call_module":
            found = isinstance(called_module(self.module, node), _MODULES)
        else:
            found = node.target in (POINTWISE_METHODS if node.op == "call_method" else POINTWISE_FUNCTIONS)
        return found and {source.meta["shape"] for source in sources} == {node.meta["shape"]}

    def over_pixels(self, node: fx.Node) -> None:
        """Compute a node on images; who reads it reads a view of that."""
        shape = node.meta["shape"]
        for source in node.all_input_nodes:
            if source not in self.images:
                self.images[source] = self._images(source, node)
        with self.module.graph.inserting_after(node):
            image = self.module.graph.node_copy(node, lambda read: self.images[read])
        image.meta = {**node.meta, "shape": (shape[0], shape[-1], math.prod(shape[1:-1]), 1)}
        last = self._behind(image, "squeeze", (3,), image.meta["shape"][:3])
        last = self._behind(last, "transpose", (1, 2), (shape[0], math.prod(shape[1:-1]), shape[-1]))
        # In memory as torch's own layer leaves it: sums of what follows depend on that in their last bits.
        last = self._behind(last, "contiguous", (), last.meta["shape"])
        if len(shape) > 3:
            last = self._behind(last, "unflatten", (1, tuple(shape[1:-1])), shape)
        node.replace_all_uses_with(last)
        self.module.graph.erase_node(node)
        self.images[last] = image

    def _images(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        shape = source.meta["shape"]
        count, channels = math.prod(shape[1:-1]), shape[-1]
        last = source
        if len(shape) > 3:
            last = self._before(reader, last, "flatten", (1, -2), (shape[0], count, channels))
        last = self._before(reader, last, "transpose", (1, 2), (shape[0], channels, count))
        return self._before(reader, last, "unsqueeze", (3,), (shape[0], channels, count, 1))

    def over_rows(self, node: fx.Node) -> None:
        """Call a linear layer on rows [R, C]."""
        (source,) = node.all_input_nodes
        lead, result = source.meta["shape"][:-1], node.meta["shape"]
        rows = self._before(node, source, "flatten", (0, -2), (math.prod(lead), source.meta["shape"][-1]))
        sizes = []
        for place, size in enumerate(lead):
            sizes.append(self._before(node, source, "size", (place,), None))
            sizes[-1].meta["number"] = size
        node.replace_input_with(source, rows)
        node.meta["shape"] = (math.prod(lead), result[-1])
        readers = list(node.users)
        back = self._behind(node, "unflatten", (0, tuple(sizes)), result)
        for reader in readers:
            reader.replace_input_with(node, back)

    def _before(
        self, reader: fx.Node, source: fx.Node, method: str, args: tuple[Any, ...], shape: tuple[int, ...] | None
    ) -> fx.Node:
        with self.module.graph.inserting_before(reader):
            return self._call(source, method, args, shape)

    def _behind(self, source: fx.Node, method: str, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
        with self.module.graph.inserting_after(source):
            return self._call(source, method, args, shape)

    def _call(self, source: fx.Node, method: str, args: tuple[Any, ...], shape: tuple[int, ...] | None) -> fx.Node:
        made = self.module.graph.call_method(method, (source, *args))
        if shape is not None:
            made.meta.update(shape=shape, dtype=source.meta["dtype"])
        made.meta["layout"] = True  # nothing the model computes: no report speaks of it
        self.added.add(made)
        return made
