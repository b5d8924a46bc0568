"""`verify`: a packed model against the quantized model it was made from, layer by layer, in float64.

The traced model is evaluated in float64 with its weights' codes. Wherever the packed program stores a tensor, the two
are compared and the evaluation goes on with the PACKED tensor (teacher forcing), so that an element on a rounding
boundary changes nothing behind it, and what differs first is what is wrong.

- Codes are equal, except where the float64 value before rounding lies within the tolerance of a rounding boundary;
  those are counted. The tolerance is BOUNDARY code units, or more where the float32 error bound of the value is larger.
- Streams and outputs lie within that float32 error bound. It is carried along with the values: each product, sum and
  store of the epilogue adds its own rounding (u = 2^-24), and every stream that is taken over starts from 0 again.
- A layer that ran in half precision (fallback="fp16") is allowed the rounding of its sum to float16 besides.
- Weight codes are compared with the stored planes, all of them.

This judges the packed model independently of the model's own evaluation, which shares arithmetic with packing. That one
is compared besides: without rules about boundaries, its outputs in float32 are those of the packed model bit for bit
(not of bytes, of streams in half precision, or behind parts that stay in float), and the report counts the images.

All of this reads the trace of the model. The model itself, run as the user runs it, is compared with that trace.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lbs.agreement import TOLERANCE, finite_peak
from lbs.convolutions import TransposedConv2d
from lbs.graph import called_module
from lbs.packing.fold import affine
from lbs.packing.lower import step_names
from lbs.packing.model import need_packed
from lbs.packing.packed_tensors import PackedTensors
from lbs.packing.patterns import Op, classify
from lbs.packing.pixels import Normalization, along_channels
from lbs.packing.tracing import trace_model
from lbs.packing.transposed import PART, parts_of
from lbs.packing.verify_report import Check, VerifyReport, merged
from lbs.quant import codec
from lbs.quant.activations import Function
from lbs.quant.layers import QuantLayer, still
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer, StreamQuantizer
from lbs.traced import Evaluation, evaluating, run, tensors_of
from lbs.wrappers import unwrapped
from lbs_kernels.errors import GraphError
from lbs_kernels.program.activations import SLOPES

BATCH = 32  # images evaluated at once, to bound the memory
BOUNDARY = 1e-4
UNIT = 2.0**-24  # half a step of float32
HALF = 2.0**-11  # of float16
OUTER_TOLERANCE = 1e-4  # of the largest magnitude: float modules between regions, whose kernels torch chooses
# Half a step of what streams are stored in: of the value, and of the smallest, where steps no longer shrink with it.
_STREAM_UNIT = {"float32": (UNIT, 2.0**-150), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}


def verify(model: nn.Module, packed: Any, x: Tensor, backend: str = "auto") -> VerifyReport:
    """Compare a packed model with the quantized model on a batch.

    Args:
        model: the quantized model `packed` was made from. packed: PackedModel.
        x: images [N, C, H, W] on the device of both, of the packed model's dtype. Of bytes, the model sees the
            normalised values in float64.
        backend: whose codes are compared: "auto", "reference", "cpu", "gpu" or "triton".

    Returns:
        VerifyReport; `ok` is False where anything differs, and `first_difference` names it.

    Raises:
        GraphError: the packed model has other layers than the model, or is none. ShapeError: a batch of another shape.

    Example:
        report = lbs.verify(model, packed, images)
        print(report)
    """
    need_packed(packed, "verify")
    packed.check_input(x)
    model = unwrapped(model)
    with still(model):
        return _compared(model, packed, x, backend)


def _compared(model: nn.Module, packed: Any, x: Tensor, backend: str) -> VerifyReport:
    graph, _ = trace_model(model, packed.float_images(x[:2]).float() if len(x) else None, strict=False)
    checks, agreeing, identical = [], [], []
    with evaluating(model):
        for part in x.split(BATCH) if len(x) else [x]:
            output, traces = packed.run_traced(part, backend)
            tensors = PackedTensors(packed.programs, [region.blob for region in packed.regions], traces)
            tensors.inexact = frozenset(n.partition(PART)[0] for n in packed.inexact_layers(len(part), backend))
            floats = packed.float_images(part)
            judge = _Judge(graph.module, tensors, _image_bound(packed.normalize, part, floats))
            judge.compare_outputs(judge.run(floats), output)
            reference = run(model, floats.float())
            judge.compare_model(reference, Evaluation(graph.module).run(floats.float().clone()))
            checks.append(tuple(judge.checks))
            if _are_logits(reference) and _are_logits(output):
                agreeing.append(int((reference.argmax(1) == output.argmax(1)).sum()))
                identical.append(int((reference == output).all(1).sum()))
    counts = (sum(agreeing), sum(identical)) if agreeing else (None, None)
    return VerifyReport(merged(checks), len(x), *counts)


def _image_bound(pixels: Normalization | None, x: Tensor, values: Tensor) -> Tensor:
    """How far float32 arithmetic may lie from the values of images: nowhere, or of bytes fma(byte, M, B) rounds M, B
    and the result once each.
    """
    if pixels is None:
        return torch.zeros_like(values, dtype=torch.float64)
    scale, shift = (along_channels(part, x).abs() for part in pixels.affine)
    return UNIT * (x.double() * scale + shift + values.abs())


def _are_logits(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() == 2


class _Judge(Evaluation):
    """Float64 evaluation of the traced model that compares itself with the packed tensors as it goes."""

    def __init__(self, module: fx.GraphModule, tensors: PackedTensors, image_bound: Tensor) -> None:
        super().__init__(module)
        self.traced = module
        self.tensors = tensors
        self.image_bound = image_bound
        self.names = step_names(module)
        self.bounds: dict[fx.Node, Any] = {}  # tensors, and tuples of them
        self.checks: list[Check] = []
        self.doubles: dict[str, nn.Module] = {}
        unknown = sorted(set(tensors.steps) - set(self.names.values()))
        if unknown:
            raise GraphError(f"the packed model has a layer {unknown[0]}, the model has none; it was made from another")

    def run_node(self, n: fx.Node) -> Any:
        """The node's float64 value, replaced by the packed one where there is one."""
        if n.op == "placeholder":
            value = super().run_node(n).to(torch.float64, copy=True)
            self.bounds[n] = self.image_bound
            return value
        layer = called_module(self.traced, n)
        if isinstance(layer, QuantLayer) and self.names[n] in self.tensors.steps:
            value, bound = self._layer(n, layer)
        elif isinstance(layer, StreamQuantizer) and n.name in self.tensors.codes:
            value, bound = self._coded(n, layer)
        else:
            value = super().run_node(n)
            if isinstance(value, tuple | list) and n.op != "output" and self._is_moved(n):
                self.bounds[n] = self._moved(n)
            if not isinstance(value, Tensor) or n.op == "output":
                return value
            if n.op == "get_attr" and value.is_floating_point():  # a weight that a function is called with
                value = value.double()
            bound = self._bound(n, value)
        if n.name in self.tensors.images:
            value, bound = self._image(n, value, bound)
        if n.name in self.tensors.streams:
            value, bound = self._stream(n, value, bound)
        self.bounds[n] = bound
        for dead in self.user_to_last_uses.get(n, []):
            self.bounds.pop(dead, None)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Float modules compute in float64; a quantized layer left in float computes as it is."""
        module = self.fetch_attr(target)
        if isinstance(module, QuantLayer):
            return module.forward(*(arg.float() for arg in args)).double()
        if target not in self.doubles:
            self.doubles[target] = copy.deepcopy(module).double()
        return self.doubles[target].forward(*args, **kwargs)

    # Packed layers.

    def _layer(self, node: fx.Node, layer: QuantLayer) -> tuple[Tensor, Tensor]:
        """Compare the codes of a layer's input and its weights; evaluate it on the packed codes."""
        name = self.names[node]
        value, bound = self.env[node.args[0]], self.bounds[node.args[0]]  # type: ignore[index]
        codes = self.tensors.input_codes(name, value.shape)
        writer = self.tensors.writer_of_input(name)
        self._compare_codes(writer, f"codes read by {name}", layer.quantizer, value, bound, codes)
        weights = self._weights(name, layer, node)
        # In units of the two steps every sum is an exact integer, so that what is 0 stays 0.
        units = (layer.quantizer.values(codes) / layer.quantizer.step()).round()
        sums = layer.sums(units, weights)
        product = sums * self._steps(layer, sums)
        y = product
        if isinstance(layer.bias, Tensor):
            y = product + layer.bias.double().reshape(-1, *([1] * (product.dim() - 2)))
        # fma(float32(acc), M, B): acc, M, B (|B| <= |product| + |y|) and the result are rounded once each.
        bound = UNIT * (3 * product.abs() + 2 * y.abs())
        return y, bound + self._half_bound(layer, units, weights, product) if name in self.tensors.inexact else bound

    def _half_bound(self, layer: QuantLayer, units: Tensor, weights: Tensor, product: Tensor) -> Tensor:
        """Of a layer in half precision: the sum in float32, in any order, then rounded to float16."""
        magnitudes = codec.weight_units(weights.double(), layer.w_bits, layer.w_grid).abs()
        terms = weights[0].numel() * layer.product(units.abs(), magnitudes, None) * self._steps(layer, product)
        return HALF * product.abs() + UNIT * terms

    @staticmethod
    def _steps(layer: QuantLayer, like: Tensor) -> Tensor:
        """Real value of one unit of the sums of each filter, broadcastable to them."""
        return (layer.weight_step() * layer.quantizer.step()).view(-1, *[1] * (like.dim() - 2))

    def _coded(self, node: fx.Node, quantizer: StreamQuantizer) -> tuple[Tensor, Tensor]:
        """Compare the codes of a stream, and go on with what they stand for: the step and the product are rounded."""
        value, bound = self.env[node.args[0]], self.bounds[node.args[0]]  # type: ignore[index]
        codes, writer = self.tensors.coded(node.name, value.shape)
        self._compare_codes(writer, f"codes of stream {node.name}", quantizer, value, bound, codes)
        value = quantizer.values(codes)
        return value, 2 * UNIT * value.abs()

    def _compare_codes(
        self,
        writer: str,
        what: str,
        quantizer: ActivationQuantizer | InputQuantizer,
        value: Tensor,
        bound: Tensor,
        codes: Tensor,
    ) -> None:
        scale = quantizer.scale()
        expected = quantizer.codes(value)
        n = codec.levels(quantizer.bits)
        t = value * scale + (n / 2 if quantizer.signed else 0)
        tolerance = (bound * scale + 3 * UNIT * t.abs()).clamp_min(BOUNDARY)
        lowest, highest = (((t + d).round() + quantizer.zero).clamp(0, n) for d in (-tolerance, tolerance))
        differs = expected != codes
        excused = differs & (lowest <= codes) & (codes <= highest)
        self.checks.append(
            Check(
                writer,
                what,
                codes.numel(),
                int((differs & ~excused).sum()),
                int(excused.sum()),
                float((expected - codes).abs().max()) if codes.numel() else 0.0,
                float(tolerance.max()) if codes.numel() else 0.0,
            )
        )

    def _weights(self, name: str, layer: QuantLayer, node: fx.Node) -> Tensor:
        """The model's own weight codes, which are compared with the stored planes."""
        codes = layer.code_bytes()
        if isinstance(layer, TransposedConv2d):
            parts = parts_of(layer, self.env[node.args[0]].shape[2:], node.meta["shape"][2:])  # type: ignore[index]
            stored = self.tensors.transposed_codes(name, codes, parts).to(codes.device)
        else:
            stored = self.tensors.weight_codes(name, codes.shape).to(codes.device)
        wrong = codes != stored
        differ = int(wrong.sum())
        largest = float((codes[wrong].int() - stored[wrong].int()).abs().max()) if differ else 0.0
        self.checks.append(Check(name, "weight codes", codes.numel(), differ, 0, largest, 0.0))
        return codes

    # Floats.

    def _stream(self, node: fx.Node, value: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Compare a stored stream, and go on with it."""
        for stored, writer, dtype in self.tensors.stored(node.name, value.shape):
            unit, least = _STREAM_UNIT[dtype]
            tolerance = bound + (unit * (value.abs() + bound)).clamp_min(least)
            self._compare_floats(writer, f"stream {node.name}", value, stored, tolerance)
        return stored, torch.zeros_like(stored)

    def _image(self, node: fx.Node, value: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """What a later region is given by float modules."""
        given = self.tensors.images[node.name].double().reshape(value.shape)
        tolerance = bound + OUTER_TOLERANCE * finite_peak(value)
        self._compare_floats(node.name, "float input of a region", value, given, tolerance)
        return given, torch.zeros_like(given)

    def _compare_floats(self, writer: str, what: str, value: Tensor, actual: Tensor, tolerance: Tensor) -> None:
        error = torch.where(value == actual, 0.0, (value - actual).abs())  # also where both are the same infinity
        wrong = int((~(error <= tolerance)).sum())  # a NaN counts
        largest = float(error.max()) if error.numel() else 0.0
        limit = float(tolerance.max()) if error.numel() else 0.0
        self.checks.append(Check(writer, what, value.numel(), wrong, 0, largest, limit))

    def compare_outputs(self, expected: Any, actual: Any) -> None:
        """Compare what the models return; outputs that are no packed stream have the tolerance of float modules."""
        wanted, given = tensors_of(expected), tensors_of(actual)
        if len(wanted) != len(given):
            raise GraphError(f"the model returns {len(wanted)} tensors, the packed model {len(given)}; pack it again")
        for index, (one, other) in enumerate(zip(wanted, given, strict=True)):
            limit = OUTER_TOLERANCE * one.abs().amax() if one.numel() else one.sum()
            self._compare_floats("output", f"output {index}", one, other.double(), torch.ones_like(one) * limit)

    def compare_model(self, model: Any, trace: Any) -> None:
        """Compare what the model returns, run as it is, with what its trace does: the same steps, both in float32."""
        wanted, given = tensors_of(model), tensors_of(trace)
        if len(wanted) != len(given):
            raise GraphError(f"the model returns {len(wanted)} tensors, its trace {len(given)}; see lbs.prepare")
        for index, (one, other) in enumerate(zip(wanted, given, strict=True)):
            limit = torch.full_like(one, TOLERANCE * finite_peak(one), dtype=torch.float64)
            self._compare_floats("the model itself", f"output {index} against its trace", one, other.double(), limit)

    def _bound(self, node: fx.Node, value: Tensor) -> Tensor:
        """How far float32 arithmetic of the packed program may lie from `value`, element by element."""
        op = classify(self.traced, node)
        if self._is_moved(node):
            return self._moved(node)
        sources = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self.bounds]
        if not isinstance(op, Op) or not sources:
            return torch.zeros_like(value)
        bound: Tensor = self.bounds[sources[0]]
        if op.kind == "norm":
            return self._norm_bound(node, value, bound, self.env[sources[0]])
        if op.kind == "activation" and op.function is not None:
            return _activation_bound(op.function, value, bound, self.env[sources[0]])
        if op.kind == "gate":
            one, other = (self.env[source].abs() for source in sources)
            return bound * other + (one + bound) * self.bounds[sources[-1]] + UNIT * value.abs()
        if op.kind == "scale":  # by the float32 number nearest to the constant
            return abs(op.factor) * bound + 2 * UNIT * value.abs()
        if op.kind == "add":
            return bound + self.bounds[sources[-1]] + UNIT * value.abs()
        if op.kind == "max_pool":
            return F.max_pool2d(bound, *op.window.fields()[:4])
        if op.kind == "average_pool":
            window = op.window.fields()[:3]
            rounded = (op.window.taps + 2) * UNIT * F.avg_pool2d(self.env[sources[0]].abs(), *window)
            return F.avg_pool2d(bound, *window) + rounded
        if op.kind == "resize":
            # Weights are rounded by half a step of 1 at most, so that a pixel counts whose weight is hardly any.
            source = self.env[sources[0]].abs().amax((2, 3), keepdim=True)
            return self.bounds[sources[0]].amax((2, 3), keepdim=True).expand_as(value) + 8 * UNIT * source
        if op.kind == "stream":
            return bound + self._code_bound(node, self.env[sources[0]])
        if op.kind == "mean_pool":
            source = self.env[sources[0]]
            pixels = source.shape[2] * source.shape[3]
            return (bound.mean((2, 3)) + (pixels + 2) * UNIT * source.abs().mean((2, 3))).reshape(value.shape)
        return bound

    def _code_bound(self, node: fx.Node, source: Tensor) -> Tensor:
        """One step of a stream's codes where a float part in front of it may round to the other side, else none."""
        quantizer = called_module(self.traced, node)
        if not isinstance(quantizer, StreamQuantizer):
            return torch.zeros_like(source)
        scale = quantizer.scale()
        apart = ((source * scale) % 1 - 0.5).abs()
        return (apart <= OUTER_TOLERANCE * finite_peak(source) * scale) * quantizer.value_step()

    def _is_moved(self, node: fx.Node) -> bool:
        op = classify(self.traced, node)
        return isinstance(op, Op) and op.kind in ("alias", "select")

    def _moved(self, node: fx.Node) -> Any:
        """The bounds of values that a node only moves: moved in the same way."""
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda read: self.bounds[read] if read in self.bounds else self.env[read]
        )
        return getattr(self, node.op)(node.target, args, kwargs)

    def _norm_bound(self, node: fx.Node, value: Tensor, bound: Tensor, source: Tensor) -> Tensor:
        norm = called_module(self.traced, node)
        if not isinstance(norm, nn.BatchNorm2d):
            return bound
        gain = affine(norm, str(node.target))[0].abs().to(value.device)[:, None, None]
        return gain * bound + 2 * UNIT * (gain * source.abs() + value.abs())


def _activation_bound(function: Function, value: Tensor, bound: Tensor, source: Tensor) -> Tensor:
    """A function no steeper than its slope, and the distance of its formula from it that docs/format.md states."""
    steepest = SLOPES.get(function.kind)
    if steepest is None:
        others = 0.0 if function.slope is None else float(function.slope.abs().max())
        steepest = max(1.0, abs(function.value), others)
    rounding = 2 * source.abs() if function.kind == "gelu_tanh" else 14 * value.abs()  # 14: 7 units in the last place
    return steepest * bound + UNIT * rounding + 1e-29
