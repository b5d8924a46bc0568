"""Layers of fixed bits: what a frozen network is made of and what packing reads.

A layer computes conv(Q_a(x), c * Q_w(w / std(w))) + bias. The constant c (`output_scale`) is the standard deviation the
weights had when the layer was made, so that standardising a float network changes nothing but the rounding, with or
without a norm behind the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbs.convolutions import TransposedConv2d, plain_kind
from lbs.quant import codec, fake
from lbs.quant.deployed import Affine
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer
from lbs_kernels.errors import GraphError
from lbs_kernels.program.steps import WeightGrid

STANDARDIZE = ("scale", "full", "none")


class QuantLayer(nn.Module):
    """What convolution and linear layers share: weight codes, ranges, the input quantizer."""

    weight: Tensor
    w_range: nn.Parameter  # of the layer [], or of every filter [O]; used as |w_range|
    w_grid: WeightGrid  # of the weight codes (`codec.Coding`)
    output_scale: Tensor
    quantizer: ActivationQuantizer | InputQuantizer
    _held: dict[str, Any] | None = None  # while `still`, codes and statistics once they were asked for

    def _init_quant(self, w_bits: int, quantizer: Any, standardize: str) -> None:
        if standardize not in STANDARDIZE:
            raise GraphError(f"standardize={standardize!r} is unknown; use one of {', '.join(STANDARDIZE)}")
        self._w_bits = w_bits
        self.w_grid = "odd"
        self.standardize = standardize
        self.quantizer = quantizer
        self.w_range = nn.Parameter(torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("output_scale", torch.tensor(1.0, dtype=torch.float32))
        self.kept: tuple[int, ...] | None = None  # indices among the filters before pruning; None: all
        self.total_filters = int(self.weight.shape[0])
        self.quantize = True  # False while a float model is being observed

    @property
    def w_bits(self) -> int:
        return self._w_bits

    @property
    def a_bits(self) -> int:
        return int(self.quantizer.bits)

    @property
    def searched(self) -> bool:
        """Whether the width of the weights is still to be chosen."""
        return False

    @property
    def range_widths(self) -> tuple[int, int]:
        """The widths (weights, activations) that ranges are set at."""
        return self.w_bits, self.a_bits

    def float_weight(self) -> Tensor:
        """Standardised weights, before quantization, without `output_scale`."""
        return codec.standardize(self.weight, self.standardize)

    def weight_codes(self) -> Tensor:
        """Integer codes like `weight`, in its dtype: exactly what is packed."""
        return codec.weight_codes(self.float_weight(), self.weight_range().abs(), self.w_bits, self.w_grid)

    @torch.no_grad()
    def code_bytes(self) -> Tensor:
        """`weight_codes` of a layer of fixed bits as uint8: part by part, without a second copy of large weights."""
        if self._held is not None and "codes" in self._held:
            return self._held["codes"]
        weight, ranges = self.weight, self.weight_range().abs().expand(len(self.weight), *[1] * (self.weight.dim() - 1))
        statistics = self._statistics()
        codes = torch.empty_like(weight, dtype=torch.uint8)
        rows = codec.part_rows(weight)
        for part, v, target in zip(weight.split(rows), ranges.split(rows), codes.split(rows), strict=True):
            units = codec.standardize(part, self.standardize, statistics=statistics)
            target.copy_(codec.weight_codes(units, v, self.w_bits, self.w_grid))
        if self._held is not None:
            self._held["codes"] = codes
        return codes

    @torch.no_grad()
    def _statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of the weights, where they are standardised by them."""
        if self.standardize == "none":
            return None
        if self._held is None:
            return codec.weight_statistics(self.weight)
        if "statistics" not in self._held:
            self._held["statistics"] = codec.weight_statistics(self.weight)
        return self._held["statistics"]

    def weight_range(self) -> Tensor:
        """`w_range`, broadcastable to `weight`."""
        return self.w_range.view(-1, *[1] * (self.weight.dim() - 1)) if self.w_range.dim() else self.w_range

    def range_by_filter(self) -> None:
        """Give every filter a range of its own, all as the layer's is now."""
        spread = self.w_range.detach().expand(self.weight.shape[0]).clone()
        self.w_range = nn.Parameter(spread, requires_grad=self.w_range.requires_grad)

    def weight_step(self) -> Tensor:
        """Real value of one unit of the weights (`codec.weight_units`) in each filter, float64 [O]."""
        top = codec.weight_top(self.w_bits, self.w_grid)
        step = self.output_scale.double() * self.w_range.detach().double().abs() / top
        return step.expand(self.weight.shape[0])

    def quantized_weight(self) -> Tensor:
        """Weights used by `forward`, differentiable."""
        if self._held is not None:
            units = codec.weight_units(self.code_bytes(), self.w_bits, self.w_grid, self.weight.dtype)
            return units.mul_(self.weight_step().to(units.dtype).view(-1, *[1] * (units.dim() - 1)))
        if self.standardize == "scale":
            scale = self.output_scale
            return fake.standardized_weight(self.weight, self.weight_range(), scale, self.w_bits, self.w_grid)
        return fake.fake_weight(self.float_weight(), self.weight_range(), self.w_bits, self.w_grid) * self.output_scale

    def adopt_scale(self) -> None:
        """Set `output_scale` to the present standard deviation, so that values keep their size."""
        if self.standardize == "none":
            return
        with torch.no_grad():
            _, std = codec.weight_statistics(self.weight)
            self.output_scale.copy_(std)

    def unrounded_weight(self) -> Tensor:
        """The weights that `quantized_weight` rounds: what a layer computes with while it is observed."""
        if self._held is not None and self.standardize == "scale":
            _, std = self._statistics()  # type: ignore[misc]
            if torch.equal(std, self.output_scale.to(std.dtype)):  # nothing was trained since: they are what they were
                return self.weight
        weight = self.float_weight()
        fresh = weight is not self.weight and not weight.requires_grad
        return weight.mul_(self.output_scale) if fresh else weight * self.output_scale

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(input, weight) of the float operation: quantized, or unrounded while observing."""
        if not self.quantize:
            return x, self.unrounded_weight()
        return self.quantizer(x), self.quantized_weight()

    @property
    def computes_integers(self) -> bool:
        """Whether `forward` takes the exact path: evaluation without gradients, quantized."""
        return self.quantize and not self.training and not torch.is_grad_enabled()

    def integer_forward(self, x: Tensor) -> Tensor:
        """The layer as packed back ends compute it: an exact accumulator and one rounding; of float64, in float64.

        Integers below 2^24 (2^53) are exact in float32 (float64) whatever the order of the sums, so threads and
        instruction sets change nothing. Devices whose convolutions may transform their operands get float64.
        """
        x = codec.wide(x)
        units = self.quantizer.units(self.quantizer.codes(x))
        bound = self.weight[0].numel() * codec.levels(self.w_bits) * codec.levels(self.a_bits)
        narrow = x.dtype == torch.float32 and x.device.type == "cpu" and bound < 1 << 24
        dtype = torch.float32 if narrow else torch.float64
        with torch.autocast(x.device.type, enabled=False):
            acc = self.sums(units.to(dtype), self.code_bytes())
        scale, shift = (part.view(-1, 1, 1) if isinstance(self, nn.Conv2d) else part for part in self.affine())
        if x.dtype == torch.float64:
            return acc * scale + shift
        return Affine(acc, bound, scale, shift).value()

    def sums(self, units: Tensor, codes: Tensor) -> Tensor:
        """The accumulator of input units and weight codes, in the dtype of the units; large layers in parts."""
        parts = (codes,) if getattr(self, "groups", 1) > 1 else codes.split(codec.part_rows(codes))
        found = [
            self.product(units, codec.weight_units(part, self.w_bits, self.w_grid, units.dtype), None) for part in parts
        ]
        return found[0] if len(found) == 1 else torch.cat(found, 1 if isinstance(self, nn.Conv2d) else -1)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) float64 [O]: the layer's output is scale * acc + shift."""
        scale = self.weight_step() * self.quantizer.step()
        bias = self.bias
        return scale, bias.detach().double() if isinstance(bias, Tensor) else torch.zeros_like(scale)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation on these operands, whatever they stand for."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if self.computes_integers:
            return self.integer_forward(input)
        source, weight = self.operands(input)
        return self.product(source, weight, self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return (
            f"{base}, w_bits={self.w_bits}, a_bits={self.a_bits}, filters={self.weight.shape[0]}/{self.total_filters}"
        )


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Weights and ranges of a model of fixed bits do not change meanwhile: their codes are computed once."""
    opened = [m for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear) and m._held is None]
    for layer in opened:
        layer._held = {}
    try:
        yield
    finally:
        for layer in opened:
            layer._held = None


class ConvProduct(QuantLayer, nn.Conv2d):
    """The operation of quantized and searchable convolutions."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class TransposedProduct(QuantLayer, TransposedConv2d):  # type: ignore[misc]
    """The operation of quantized and searchable transposed convolutions."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.spread(x, weight, bias, self.output_padding)


class LinearProduct(QuantLayer, nn.Linear):
    """The operation of quantized and searchable linear layers."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantConv2d(ConvProduct):
    """Convolution of b-bit weights and activations. Input [N, C, H, W], output [N, O, H', W'].

    Raises:
        GraphError: padding that is not zeros, or given as a word.
    """

    def __init__(
        self,
        *args: Any,
        w_bits: int = 8,
        quantizer: ActivationQuantizer | InputQuantizer | None = None,
        standardize: str = "scale",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise GraphError(
                f"padding {self.padding!r} in mode {self.padding_mode!r} has no integer form; use zeros and numbers"
            )
        self._init_quant(w_bits, quantizer or ActivationQuantizer(), standardize)


class QuantConvTranspose2d(TransposedProduct, QuantConv2d):  # type: ignore[misc]
    """Transposed convolution of b-bit weights and activations. Input [N, C, H, W], output [N, O, H', W']."""


class QuantLinear(LinearProduct):
    """Linear layer of b-bit weights and activations. Input [..., C], output [..., O]."""

    def __init__(
        self,
        *args: Any,
        w_bits: int = 8,
        quantizer: ActivationQuantizer | InputQuantizer | None = None,
        standardize: str = "scale",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_quant(w_bits, quantizer or ActivationQuantizer(), standardize)


_FIXED: dict[type[nn.Module], Any] = {
    TransposedConv2d: QuantConvTranspose2d,
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
}


def fixed_kind(layer: nn.Module) -> Any:
    """The class of layers of fixed bits that a convolution or linear layer becomes."""
    return _FIXED[plain_kind(layer)]
