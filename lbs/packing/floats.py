"""The float network of a packed one: its graph in torch's own layers, with the weights that the codes stand for.

What was pruned stays away and norms behind layers stay folded; nothing is rounded to codes. It is what a packed file is
timed against where the network it came from is not at hand.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lbs.packing.model import PackedModel
from lbs.packing.region import PackedRegion
from lbs_kernels.errors import GraphError
from lbs_kernels.program.planes import unpack_weights, weight_units
from lbs_kernels.program.steps import (
    Activation,
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    PoolStep,
    Program,
    QuantPackStep,
    ResizeStep,
    SelectStep,
    Step,
)


def float_network(packed: PackedModel) -> fx.GraphModule:
    """The network in float32, for normalised images, in evaluation mode on the CPU; nothing of it is the packed one's.

    Raises:
        GraphError: steps that move pixels, which the layers of torch that made them cannot be told from.
    """
    modules: dict[str, Any] = {}
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    memo: dict[int, Any] = {}  # parts in float that share weights share those of the copies
    for node in packed.body.graph.nodes:
        called = packed.body.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, PackedRegion):
            inputs = [made[read] for read in node.args]
            made[node] = _Region(graph, modules, called.program, called.blob.cpu(), str(node.target)).write(inputs)
        elif node.target is operator.getitem and isinstance(made[node.args[0]], list):
            made[node] = made[node.args[0]][node.args[1]]
        else:
            made[node] = graph.node_copy(node, lambda read: made[read])
            if node.op in ("call_module", "get_attr"):
                path = str(node.target)
                part = called if called is not None else operator.attrgetter(path)(packed.body)
                modules[path] = copy.deepcopy(part, memo)
    graph.lint()
    return fx.GraphModule(modules, graph, class_name=packed.name or "FloatNetwork").cpu().eval()


class _Region:
    """Writes a program's steps into a graph; images are [N, C, H, W] throughout."""

    def __init__(self, graph: fx.Graph, modules: dict[str, Any], program: Program, blob: Tensor, name: str) -> None:
        self.graph, self.modules, self.program, self.blob, self.name = graph, modules, program, blob, name
        self.values: dict[int, fx.Node] = {}
        self.units: dict[int, float] = {}  # what one code stands for

    def write(self, inputs: list[fx.Node]) -> list[fx.Node]:
        """The outputs."""
        self.values.update(zip(self.program.inputs, inputs, strict=True))
        for step in self.program.steps:
            self._step(step)
        outputs = [(self.values[index], self.program.tensors[index]) for index in self.program.outputs]
        return [self.graph.call_function(torch.flatten, (x, 1)) if spec.flat else x for x, spec in outputs]

    def _call(self, step: Step, part: str, module: nn.Module, x: fx.Node) -> fx.Node:
        path = f"{self.name}_{len(self.modules)}_{''.join(c if c.isalnum() else '_' for c in step.name)}_{part}"
        self.modules[path] = module.requires_grad_(False)
        return self.graph.call_module(path, (x,))

    def _array(self, key: str) -> Tensor:
        return self.program.array(self.blob, key)

    def _step(self, step: Step) -> None:
        x, source = self.values[step.input], self.program.tensors[step.input]
        if isinstance(step, QuantPackStep):
            if step.multiplier is not None and step.bias is not None and source.form == "stream":
                x = self._norm(step, step.multiplier, step.bias, x)
        elif isinstance(step, ConvStep | LinearStep):
            x = self._layer(step, x)
        elif isinstance(step, PoolStep):
            x = self._call(step, "pool", _pool(step), x)
        elif isinstance(step, SelectStep):
            x = self._select(step)
        else:
            x = self._resize(step, x)
        if source.form == "codes" and isinstance(step, PoolStep | SelectStep):
            (consumer,) = step.emit.consumers
            self.values[consumer.tensor], self.units[consumer.tensor] = x, self.units[step.input]
        else:
            self._emit(step, x, step.emit)

    def _norm(self, step: Step, multiplier: str, bias: str, x: fx.Node) -> fx.Node:
        norm = nn.BatchNorm2d(len(self._array(multiplier)), eps=0.0)
        norm.weight.data, norm.bias.data = self._array(multiplier).clone(), self._array(bias).clone()
        return self._call(step, "norm", norm, x)

    def _layer(self, step: ConvStep | LinearStep, x: fx.Node) -> fx.Node:
        source = self.program.tensors[step.input]
        groups = step.groups if isinstance(step, ConvStep) else 1
        unit = self.units[step.input] / (2 if source.signed else 1)
        scale, shift = weight_units(step.w_bits, step.w_grid)
        codes = unpack_weights(self._array(step.planes), source.channels // groups).float()  # [O, T, C]
        weight = (codes * scale + shift) * (self._array(step.multiplier) / unit).view(-1, 1, 1)
        window = step.window.fields() if isinstance(step, ConvStep) else ((1, 1), (1, 1), (0, 0), (1, 1), 1)
        kernel, stride, padding, dilation, _ = window
        layer: nn.Module = nn.Conv2d(source.channels, len(weight), kernel, stride, padding, dilation, groups)
        form = weight.view(len(weight), *kernel, -1).permute(0, 3, 1, 2)
        if isinstance(step, LinearStep):
            layer, form = nn.Linear(source.channels, len(weight)), weight[:, 0]
            x = self.graph.call_function(torch.flatten, (x, 1))
        layer.weight.data, layer.bias.data = form.contiguous(), self._array(step.bias).clone()
        x = self._call(step, "layer", layer, x)
        return x if isinstance(step, ConvStep) else self._call(step, "pixel", nn.Unflatten(1, (len(weight), 1, 1)), x)

    def _select(self, step: SelectStep) -> fx.Node:
        if step.moves:
            raise GraphError(f"{step.name} moves pixels; no float network can be made of the packed one, give its own")
        first = self.program.tensors[step.input]
        size = first.height * step.repeat[0], first.width * step.repeat[1]
        parts = []
        for index in step.inputs:
            spec, x = self.program.tensors[index], self.values[index]
            if (spec.height, spec.width) != size:
                factors = float(size[0] // spec.height), float(size[1] // spec.width)
                x = self._call(step, "repeat", nn.Upsample(scale_factor=factors), x)
            parts.append(x)
        x = parts[0] if len(parts) == 1 else self.graph.call_function(torch.cat, (parts, 1))
        if step.channels:
            x = self.graph.call_function(operator.getitem, (x, (slice(None), list(step.channels))))
        return x

    def _resize(self, step: ResizeStep, x: fx.Node) -> fx.Node:
        options: dict[str, Any] = {"size": step.size, "mode": "bilinear", "align_corners": step.offset == (0.0, 0.0)}
        return self.graph.call_function(F.interpolate, (x,), options)

    def _emit(self, step: Step, x: fx.Node, emit: Emit) -> None:
        if emit.activation is not None and emit.activation.first:
            x = self._call(step, "function", self._function(emit.activation), x)
        if emit.gate is not None:
            x = self.graph.call_function(operator.mul, (x, self.values[emit.gate]))
        if emit.residual is not None:
            x = self.graph.call_function(operator.add, (x, self.values[emit.residual]))
        if emit.activation is not None and not emit.activation.first:
            x = self._call(step, "function", self._function(emit.activation), x)
        clamp = _clamp(emit.low, emit.high)
        if clamp is not None:
            x = self._call(step, "clamp", clamp, x)
        if emit.stream is not None:
            self.values[emit.stream] = x
        for consumer in emit.consumers:
            self._consume(step, x, consumer)

    def _consume(self, step: Step, x: fx.Node, consumer: Consumer) -> None:
        if consumer.pre_scale is not None and consumer.pre_bias is not None:
            x = self._norm(step, consumer.pre_scale, consumer.pre_bias, x)
        if consumer.relu:
            x = self._call(step, "relu", nn.ReLU(), x)
        self.values[consumer.tensor], self.units[consumer.tensor] = x, 1 / consumer.scale

    def _function(self, activation: Activation) -> nn.Module:
        if activation.slope is not None:
            slopes = self._array(activation.slope).clone()
            prelu = nn.PReLU(len(slopes))
            prelu.weight.data = slopes
            return prelu
        made: dict[str, nn.Module] = {
            "elu": nn.ELU(activation.value),
            "gelu": nn.GELU(),
            "gelu_tanh": nn.GELU("tanh"),
            "hardsigmoid": nn.Hardsigmoid(),
            "hardswish": nn.Hardswish(),
            "leaky_relu": nn.LeakyReLU(activation.value),
            "mish": nn.Mish(),
            "sigmoid": nn.Sigmoid(),
            "silu": nn.SiLU(),
            "tanh": nn.Tanh(),
        }
        return made[activation.kind]


def _pool(step: PoolStep) -> nn.Module:
    if step.kind == "mean":
        return nn.AdaptiveAvgPool2d(1)
    kind = nn.MaxPool2d if step.kind == "max" else nn.AvgPool2d
    return kind(step.kernel, step.stride, step.padding)


def _clamp(low: float | None, high: float | None) -> nn.Module | None:
    if low is None and high is None:
        return None
    if low == 0.0 and high in (None, 6.0):
        return nn.ReLU() if high is None else nn.ReLU6()
    largest = torch.finfo(torch.float32).max
    return nn.Hardtanh(-largest if low is None else low, largest if high is None else high)
