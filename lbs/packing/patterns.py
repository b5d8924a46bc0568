"""What each node of a traced model means to a packed program: one small Op per node, or the reason why it has none."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from lbs.graph import called_module
from lbs.packing.index_maps import IndexMap, index_map, is_on_the_way
from lbs.quant.activations import FUNCTIONS, Function, float32, function_of
from lbs.quant.deployed import computes_as, positions
from lbs.quant.layers import QuantConv2d, QuantLinear
from lbs.quant.quantizers import StreamQuantizer
from lbs_kernels.program.window import Window

Kind = Literal[
    "layer",
    "norm",
    "clamp",
    "activation",
    "gate",
    "scale",
    "add",
    "max_pool",
    "average_pool",
    "mean_pool",
    "select",
    "resize",
    "stream",
    "alias",
    "shape",
]
Pair = tuple[int, int]
POINT = Window()


@dataclass(frozen=True)
class Op:
    """A node a program can express.

    alias: the same values, possibly flattened, or on the way of a select. shape: sizes only, no values (`x.size(0)`).
    gate: a product with one number for each image and channel; scale: with one that is always the same. select:
    channels of what it reads side by side, or pixels of it in other places. resize: bilinear interpolation, `size`
    pixels at positions `scale` apart from `offset` on. stream: what 8-bit codes of a residual stream stand for.
    """

    kind: Kind
    low: float | None = None  # clamp
    high: float | None = None
    window: Window = POINT  # max_pool, average_pool
    function: Function | None = None  # activation
    channels: tuple[int, ...] | None = None  # select; None: all, in order
    size: Pair = (1, 1)  # resize
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    moved: IndexMap | None = None  # select, of pixels
    factor: float = 1.0  # scale


def classify(module: fx.GraphModule, node: fx.Node) -> Op | str:
    """The Op of a node, or why it stays in float."""
    if node.op == "call_module":
        target = called_module(module, node)
        kind = next((kind for kind in _MODULES if isinstance(target, kind)), None)
        if kind is not None and not computes_as(target, kind):
            return f"{type(target).__name__} has a forward of its own"
        found = _MODULES[kind](target, node) if kind is not None else None
        found = found or _moving(module, node) or _resized_module(target, node)
        return found if found is not None else f"{type(target).__name__} has no packed form"
    if node.op in ("call_function", "call_method"):
        call_rule = _CALLS.get(node.target)
        found = call_rule(node) if call_rule is not None else None
        found = found or _moving(module, node) or _size(node) or _resized_call(node)
        return found if found is not None else f"{_call_name(node)} has no packed form"
    return f"{node.op} is no computation"


def _moving(module: fx.GraphModule, node: fx.Node) -> Op | None:
    """What only moves channels and pixels, or repeats pixels by whole factors."""
    found = index_map(module, node)
    if found is None:
        return Op("alias") if is_on_the_way(module, node) else None
    if found.grid is not None:
        return Op("select", moved=found)
    return Op("alias") if found.same else Op("select", channels=found.channels)


def _size(node: fx.Node) -> Op | None:
    """A number made of sizes."""
    numbers = [source for source in node.all_input_nodes if "number" in source.meta]
    whole = "number" in node.meta and numbers and len(numbers) == len(node.all_input_nodes)
    return Op("shape") if whole else None


def _resized_module(module: nn.Module | None, node: fx.Node) -> Op | None:
    if not isinstance(module, nn.Upsample) or module.mode != "bilinear" or not computes_as(module, nn.Upsample):
        return None
    factor = None if module.recompute_scale_factor else module.scale_factor
    return _resized(node, factor if module.size is None else None, bool(module.align_corners))


def _resized_call(node: fx.Node) -> Op | None:
    """F.interpolate, or one of its older names."""
    if node.target not in (F.interpolate, F.upsample, F.upsample_bilinear):
        return None
    older = node.target is not F.interpolate
    mode = "bilinear" if node.target is F.upsample_bilinear else argument(node, 3, "mode", "nearest")
    align = node.target is F.upsample_bilinear or bool(argument(node, 4, "align_corners"))
    exact = bool(argument(node, 5, "recompute_scale_factor")) or argument(node, 1, "size") is not None
    if mode != "bilinear" or (not older and argument(node, 6, "antialias", False)):
        return None
    return _resized(node, None if exact else argument(node, 2, "scale_factor"), align)


def _resized(node: fx.Node, factor: Any, align: bool) -> Op | None:
    """Bilinear interpolation to the shape of a node. `factor`: as it was given, where positions follow it and not the
    sizes, which it may not divide.
    """
    source, result = shape_of(node.args[0]) if node.args else (), shape_of(node)
    if len(source) != 4 or len(result) != 4:
        return None
    if source[2:] == (1, 1):
        return Op("select")  # repeated, whatever the weights
    factors = factor if isinstance(factor, list | tuple) else (factor, factor)
    if any(isinstance(one, fx.Node) for one in factors):
        return None
    sides = [positions(*side, align) for side in zip(source[2:], result[2:], factors, strict=True)]
    (down, top), (across, left) = sides
    return Op("resize", size=(result[2], result[3]), scale=(down, across), offset=(top, left))


def float_bound(value: Any) -> float | None:
    """A clamp bound as an exact float32 number; None where it bounds nothing."""
    return None if value is None or math.isinf(value) else float32(value)


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a node's tensor with its batch, () if it is none."""
    return tuple(node.meta.get("shape", ())) if isinstance(node, fx.Node) else ()


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Positional or keyword argument of a call."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _call_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _pair(value: Any) -> Pair:
    """A size as it was called with, or as the sizes of the traced images made it."""
    if isinstance(value, fx.Node):
        value = value.meta.get("number", (0, 0))
    if isinstance(value, int):
        return value, value
    first, second = (item.meta.get("number", 0) if isinstance(item, fx.Node) else item for item in value)
    return int(first), int(second)


# Modules: (module, node) -> Op, a reason, or None.


def _conv(module: QuantConv2d, node: fx.Node) -> Op | str:
    return Op("layer") if len(shape_of(node)) == 4 else "it is given images without a batch"


def _linear(module: QuantLinear, node: fx.Node) -> Op | str:
    rank = len(shape_of(node))
    return Op("layer") if rank == 2 else f"it is applied at several positions of a tensor of {rank} dimensions"


def _norm(module: nn.BatchNorm2d, node: fx.Node) -> Op | str:
    if not module.track_running_stats or module.running_mean is None:
        return "it keeps no running statistics"
    return Op("norm")


def _hardtanh(module: nn.Hardtanh, node: fx.Node) -> Op:  # also ReLU6
    return Op("clamp", float_bound(module.min_val), float_bound(module.max_val))


def _max_pool(module: nn.MaxPool2d, node: fx.Node) -> Op | None:
    window = module.kernel_size, module.stride, module.padding, module.dilation
    return _max_pool_op(window, module.ceil_mode, module.return_indices, node)


def _mean_pool(module: nn.AdaptiveAvgPool2d, node: fx.Node) -> Op | None:
    return _adaptive_mean(node)


def _avg_pool(module: nn.AvgPool2d, node: fx.Node) -> Op | None:
    window = module.kernel_size, module.stride, module.padding
    return _windowed_mean(node, window, module.count_include_pad, module.divisor_override)


def _flatten(module: nn.Flatten, node: fx.Node) -> Op | None:
    return _reshaped(node)


def _identity(module: nn.Module, node: fx.Node) -> Op:
    return Op("alias")


def _activation(module: nn.Module, node: fx.Node) -> Op:
    return Op("activation", function=function_of(module))


_MODULES: dict[type[nn.Module], Callable[[Any, fx.Node], Op | str | None]] = {
    QuantConv2d: _conv,
    QuantLinear: _linear,
    nn.BatchNorm2d: _norm,
    nn.ReLU: lambda module, node: Op("clamp", 0.0, None),
    nn.Hardtanh: _hardtanh,
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: _mean_pool,
    nn.AvgPool2d: _avg_pool,
    nn.Flatten: _flatten,
    StreamQuantizer: lambda module, node: Op("stream"),
    nn.Identity: _identity,
    nn.Dropout: _identity,
    nn.Dropout2d: _identity,
    **dict.fromkeys(FUNCTIONS, _activation),
}


# Functions and methods: node -> Op, or None.


def _max_pool_op(window: tuple[Any, ...], ceil_mode: Any, indices: Any, node: fx.Node) -> Op | None:
    """`window`: kernel, stride, padding, dilation."""
    kernel, stride, padding, dilation = window
    if _pair(dilation) != (1, 1) or indices or len(shape_of(node)) != 4:
        return None
    made = Window(_pair(kernel), _pair(stride or kernel), _pair(padding))
    floor = made.output(*shape_of(node.args[0])[2:])
    return Op("max_pool", window=made) if not ceil_mode or floor == shape_of(node)[2:] else None


def _max_pool_call(node: fx.Node) -> Op | None:
    names = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1}
    window = tuple(argument(node, index + 1, name, default) for index, (name, default) in enumerate(names.items()))
    return _max_pool_op(window, argument(node, 5, "ceil_mode"), argument(node, 6, "return_indices"), node)


def _adaptive_mean(node: fx.Node) -> Op | None:
    """Pooling to a size; to the size that is there it does nothing."""
    source = shape_of(node.args[0])
    return Op("alias") if len(source) == 4 and source == shape_of(node) else _global_mean(node)


def _global_mean(node: fx.Node) -> Op | None:
    """Pooling whose output is one pixel, or the mean over both image dimensions."""
    source, result = shape_of(node.args[0]), shape_of(node)
    if len(source) != 4 or result not in ((*source[:2], 1, 1), source[:2]):
        return None
    return Op("mean_pool")


def _windowed_mean(node: fx.Node, window: tuple[Any, ...], count_padding: Any, divisor: Any) -> Op | None:
    """`window`: kernel, stride, padding. Every window has as many taps, padding among them."""
    kernel, stride, padding = window
    made = Window(_pair(kernel), _pair(stride or kernel), _pair(padding))
    source = shape_of(node.args[0])
    if len(source) != 4 or divisor is not None or (made.padding != (0, 0) and not count_padding):
        return None
    if made.kernel == source[2:] and made.padding == (0, 0):
        return _global_mean(node)
    return Op("average_pool", window=made) if made.output(*source[2:]) == shape_of(node)[2:] else None


def _avg_pool_call(node: fx.Node) -> Op | None:
    names = {"kernel_size": None, "stride": None, "padding": 0}
    window = tuple(argument(node, index + 1, name, default) for index, (name, default) in enumerate(names.items()))
    counted = argument(node, 5, "count_include_pad", True)
    return _windowed_mean(node, window, counted, argument(node, 6, "divisor_override"))


def _mean_call(node: fx.Node) -> Op | None:
    dims = argument(node, 1, "dim")
    over_pixels = isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
    return _global_mean(node) if over_pixels and node.kwargs.get("dtype") is None else None


def _reshaped(node: fx.Node) -> Op | None:
    """Flattening to [N, C * H * W], its inverse for one pixel, or a reshape that changes nothing."""
    source, result = shape_of(node.args[0]), shape_of(node)
    flattened = len(source) in (2, 4) and result == (source[0], math.prod(source[1:]))
    one_pixel = len(source) == 2 and result == (*source, 1, 1)
    return Op("alias") if source == result or flattened or one_pixel else None


def _expand_call(node: fx.Node) -> Op | None:
    """One number for each image and channel, repeated over pixels, where only products read it: they repeat it too."""
    products = all(user.target in _PRODUCTS and _mul_call(user) is not None for user in node.users)
    return Op("alias") if products and gate_shape(node) != shape_of(node) else None


def gate_shape(node: Any) -> tuple[int, ...]:
    """The shape of an operand of a product, without the repetition of an `expand_as`."""
    repeated = isinstance(node, fx.Node) and node.target in ("expand_as", "expand")
    source = shape_of(node.args[0]) if repeated else ()
    return source if source == (*shape_of(node)[:2], 1, 1) else shape_of(node)


def _dropout_call(node: fx.Node) -> Op | None:
    return Op("alias") if argument(node, 2, "training", True) is False else None


def _relu_call(node: fx.Node) -> Op:
    return Op("clamp", 0.0, None)


def _relu6_call(node: fx.Node) -> Op:
    return Op("clamp", 0.0, 6.0)


def _clamp_call(node: fx.Node) -> Op | None:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        return None
    return Op("clamp", float_bound(low), float_bound(high))


def _hardtanh_call(node: fx.Node) -> Op:
    low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return Op("clamp", float_bound(low), float_bound(high))


def _plain_call(kind: str) -> Callable[[fx.Node], Op]:
    """A function without further arguments but `inplace`, which traces do without."""
    return lambda node: Op("activation", function=Function(kind))


def _valued_call(kind: str, name: str, default: float) -> Callable[[fx.Node], Op | None]:
    def rule(node: fx.Node) -> Op | None:
        value = argument(node, 1, name, default)
        if isinstance(value, fx.Node):
            return None
        return Op("activation", function=Function(kind, float32(value)))

    return rule


def _gelu_call(node: fx.Node) -> Op:
    plain = node.kwargs.get("approximate", "none") == "none"
    return Op("activation", function=Function("gelu" if plain else "gelu_tanh"))


def _add_call(node: fx.Node) -> Op | None:
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    shapes = {shape_of(left), shape_of(right), shape_of(node)}
    if len(shapes) != 1 or not shape_of(node) or node.kwargs.get("alpha", 1) != 1:
        return None
    return Op("add")


def _mul_call(node: fx.Node) -> Op | None:
    """A product of pixels and of one number for each image and channel, or of one constant."""
    constants = [_constant(argument(node, place, name)) for place, name in enumerate(("input", "other"))]
    (factor,) = [value for value in constants if value is not None] or (None,)
    if factor is not None:
        plain = len(shape_of(node)) in (2, 4) and node.meta.get("dtype") == torch.float32
        return (Op("alias") if factor == 1 else Op("scale", factor=factor)) if plain else None
    shapes = [gate_shape(argument(node, place, name)) for place, name in enumerate(("input", "other"))]
    main, gate = sorted(shapes, key=lambda shape: -math.prod(shape))
    if len(main) != 4 or gate != (*main[:2], 1, 1):
        return None
    return Op("gate")


def _constant(value: Any) -> float | None:
    """A number, or a tensor of the model's that holds one, as the float32 number that torch multiplies by."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        held: Any = operator.attrgetter(str(value.target))(value.graph.owning_module)
        value = (
            held.item()
            if isinstance(held, torch.Tensor) and held.dtype == torch.float32 and held.numel() == 1
            else None
        )
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float32(value) if known and math.isfinite(float32(value)) else None


def _cat_call(node: fx.Node) -> Op | None:
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    ranks = {len(shape_of(tensor)) for tensor in tensors} if isinstance(tensors, list | tuple) else set()
    if ranks not in ({2}, {4}) or dim not in (1, 1 - max(ranks)):
        return None
    return Op("select" if len(tensors) > 1 else "alias")


def _shape_call(node: fx.Node) -> Op | None:
    """Sizes of a tensor, and items of such sizes."""
    source = node.args[0]
    if node.target is operator.getitem:
        is_size = isinstance(source, fx.Node) and not shape_of(source) and source.target in ("size", getattr)
        return Op("shape") if is_size else None
    return None if node.target is getattr and node.args[1] != "shape" else Op("shape")


_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_CALLS: dict[Any, Callable[[fx.Node], Op | None]] = {
    torch.relu: _relu_call,
    F.relu: _relu_call,
    "relu": _relu_call,
    "relu_": _relu_call,
    F.relu6: _relu6_call,
    F.hardtanh: _hardtanh_call,
    F.elu: _valued_call("elu", "alpha", 1.0),
    F.gelu: _gelu_call,
    F.hardsigmoid: _plain_call("hardsigmoid"),
    F.hardswish: _plain_call("hardswish"),
    F.leaky_relu: _valued_call("leaky_relu", "negative_slope", 0.01),
    F.mish: _plain_call("mish"),
    F.silu: _plain_call("silu"),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), _plain_call("sigmoid")),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), _plain_call("tanh")),
    torch.clamp: _clamp_call,
    "clamp": _clamp_call,
    "clamp_": _clamp_call,
    operator.add: _add_call,
    operator.iadd: _add_call,
    torch.add: _add_call,
    "add": _add_call,
    "add_": _add_call,
    **dict.fromkeys(_PRODUCTS, _mul_call),
    "expand": _expand_call,
    "expand_as": _expand_call,
    F.max_pool2d: _max_pool_call,
    F.adaptive_avg_pool2d: _adaptive_mean,
    F.avg_pool2d: _avg_pool_call,
    torch.mean: _mean_call,
    "mean": _mean_call,
    torch.flatten: _reshaped,
    "flatten": _reshaped,
    "view": _reshaped,
    "reshape": _reshaped,
    "contiguous": _reshaped,
    F.dropout: _dropout_call,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat_call),
    "size": _shape_call,
    getattr: _shape_call,
    operator.getitem: _shape_call,
}
