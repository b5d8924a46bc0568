"""Activation quantizers: modules that own a range and turn floats into codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbs.quant import codec, fake
from lbs_kernels.errors import PlanError


class ActivationQuantizer(nn.Module):
    """Codes of b bits over [0, v], or [-v, v] if signed; v is learned and used as |v| (LBS eq. 1, 5)."""

    def __init__(self, bits: int = 8, signed: bool = False) -> None:
        super().__init__()
        self._bits = bits
        self.signed = signed
        self.range = nn.Parameter(torch.tensor(1.0, dtype=torch.float32))

    @property
    def bits(self) -> int:
        """Width of the codes."""
        return self._bits

    @property
    def zero(self) -> int:
        """The code of real 0 that padding holds (unsigned); signed activations have none."""
        return 0

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, computed in x's dtype (half precision: in float32)."""
        source = codec.wide(x)
        return codec.activation_codes(source, self.range.abs().to(source.dtype), self.bits, self.signed)

    def values(self, codes: Tensor) -> Tensor:
        """Real values of codes."""
        return codec.activation_values(codes, self.range.abs().to(codes.dtype), self.bits, self.signed)

    def units(self, codes: Tensor) -> Tensor:
        """What codes count as in the accumulator: q, or 2 q - n if signed."""
        return 2 * codes - codec.levels(self.bits) if self.signed else codes

    def step(self) -> float:
        """Real value of one code unit of the accumulator: v / n."""
        return float(self.range.detach().double().abs()) / codec.levels(self.bits)

    def scale(self) -> float:
        """What a float is multiplied by to reach code units, exactly as `codes` does in float32."""
        v = self.range.detach().float().abs()
        return float(codec.activation_scale(v, self.bits, self.signed))

    def forward(self, x: Tensor) -> Tensor:
        return fake.fake_activation(x, self.range, self.bits, self.signed)

    def set_range(self, low: float, high: float) -> None:
        """Clip at `high`, or at the larger of |low|, |high| if signed."""
        value = max(abs(low), abs(high)) if self.signed else high
        if not value > 0:
            raise PlanError(
                f"activation range [{low}, {high}] is empty; calibrate on batches in which the layer is active"
            )
        with torch.no_grad():
            self.range.fill_(value)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class InputQuantizer(nn.Module):
    """8-bit affine codes of the network input: real value step * (q - zero), integer zero; padding is code zero."""

    step_size: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bits = 8
        self.signed = False
        self.register_buffer("step_size", torch.tensor(1.0 / 32, dtype=torch.float32))
        # An integer, kept as a float: averages of a model's buffers truncate integers.
        self.register_buffer("zero_point", torch.tensor(128.0, dtype=torch.float32))

    @property
    def zero(self) -> int:
        return round(float(self.zero_point))

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, computed in x's dtype (half precision: in float32)."""
        source = codec.wide(x)
        return codec.input_codes(source, self.step_size.to(source.dtype), self._offset(source))

    def values(self, codes: Tensor) -> Tensor:
        """Real values of codes."""
        return codec.input_values(codes, self.step_size.to(codes.dtype), self._offset(codes))

    def _offset(self, like: Tensor) -> Tensor:
        """`zero` beside `like` and in its dtype; nothing is read back."""
        return self.zero_point.round().to(like.dtype)

    def units(self, codes: Tensor) -> Tensor:
        """What codes count as in the accumulator: q - zero."""
        return codes - self.zero

    def step(self) -> float:
        """Real value of one code unit."""
        return float(self.step_size.double())

    def scale(self) -> float:
        """What a float is multiplied by to reach code units, exactly as `codes` does in float32."""
        return float(1.0 / self.step_size.float())

    def forward(self, x: Tensor) -> Tensor:
        return self.values(self.codes(x)).to(x.dtype)

    def set_range(self, low: float, high: float) -> None:
        """Cover [low, high], widened to hold 0, with 256 steps."""
        low, high = min(low, 0.0), max(high, 0.0)
        if not high > low:
            raise PlanError(f"input range [{low}, {high}] is empty; calibrate on real images")
        step = (high - low) / 255
        self.step_size.fill_(step)
        self.zero_point.fill_(round(-low / step))

    def extra_repr(self) -> str:
        return "bits=8, affine"
