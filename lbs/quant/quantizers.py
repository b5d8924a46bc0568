"""Activation quantizers: modules that own a range and turn floats into codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant import codec, fake
from lbs.symbolic import Whole
from lbs_kernels.errors import PlanError


class ActivationQuantizer(nn.Module):
    """Codes of b bits over a range of width v, which is learned and used as |v| (LBS eq. 1, 5).

    The range is [-v z / n, v (n - z) / n], z being the code of real 0 among codes of `zero_bits` bits, the fewest that
    are chosen from: [0, v] until data have shown negative values. `signed` is what was learned before there was a zero:
    [-v, v], and no code for 0.
    """

    zero_point: Tensor

    def __init__(self, bits: int = 8, signed: bool = False, zero_bits: int | None = None) -> None:
        super().__init__()
        self._bits = bits
        self.signed = signed
        self.zero_bits = zero_bits or bits
        self.range = nn.Parameter(torch.tensor(1.0, dtype=torch.float32))
        # An integer, kept as a float: averages of a model's buffers truncate integers.
        self.register_buffer("zero_point", torch.tensor(0.0, dtype=torch.float32))
        # The buffer that was read (held, so that no other gets its address), its storage and version, and its value.
        self._read: tuple[Tensor | None, int, int, int] = (None, 0, -1, 0)

    @property
    def bits(self) -> int:
        """Width of the codes."""
        return self._bits

    @property
    def coding(self) -> codec.Coding:
        """How values become codes; the device is asked once for every value that `zero_point` is given."""
        if self.signed:
            return codec.SIGNED
        point = self.zero_point
        key = (point.data_ptr(), 0 if point.is_inference() else point._version)
        if self._read[0] is not point or self._read[1:3] != key:
            self._read = (point, *key, round(float(point)))
        zero = self._read[3]
        return codec.Coding("unsigned", zero, codec.levels(self.zero_bits)) if zero else codec.UNSIGNED

    @property
    def zero(self) -> int:
        """The code of real 0, which padding holds; signed activations have none."""
        return self.coding.zero_at(self.bits)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, computed in x's dtype (half precision: in float32)."""
        source = codec.wide(x)
        return codec.activation_codes(source, self.range.abs().to(source.dtype), self.bits, self.coding)

    def values(self, codes: Tensor) -> Tensor:
        """Real values of codes."""
        return codec.activation_values(codes, self.range.abs().to(codes.dtype), self.bits, self.coding)

    def units(self, codes: Tensor) -> Tensor:
        """What codes count as in the accumulator: q - zero, or 2 q - n if signed."""
        return 2 * codes - codec.levels(self.bits) if self.signed else codes - self.zero

    def step(self) -> float:
        """Real value of one code unit of the accumulator: v / n."""
        return float(self.range.detach().double().abs()) / codec.levels(self.bits)

    def scale(self) -> float:
        """What a float is multiplied by to reach code units, exactly as `codes` does in float32."""
        v = self.range.detach().float().abs()
        return float(codec.activation_scale(v, self.bits, self.signed))

    def forward(self, x: Tensor) -> Tensor:
        return fake.fake_activation(x, self.range, self.bits, self.coding)

    def set_range(self, low: float, high: float) -> None:
        """Cover [low, high] with a zero among the codes; at the larger of |low|, |high| if signed."""
        if self.signed:
            value, zero = max(abs(low), abs(high)), 0
        else:
            value, zero = codec.around_zero(max(0.0, -low), max(0.0, high), codec.levels(self.zero_bits))
        self.set_coding(value, zero)

    def set_coding(self, value: float, zero: int) -> None:
        """Give the range its width and real 0 its code among those of `zero_bits` bits.

        Raises:
            PlanError: a width that is not positive.
        """
        if not value > 0:
            raise PlanError(f"an activation range of width {value} is empty; calibrate on batches that activate it")
        _check_step(value / codec.levels(self.bits), f"an activation range of width {value}")
        with torch.no_grad():
            self.range.fill_(value)
            self.zero_point.fill_(zero)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}zero_point", torch.zeros_like(self.zero_point))  # files from before it: 0
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, zero={self.zero}" + (", signed" if self.signed else "")


class StreamQuantizer(ActivationQuantizer, Whole):
    """8-bit codes of a residual stream. What reads the value reads these; layers of 8-bit activations have it for their
    own quantizer, and encode(decode(q)) == q makes one tensor of the two.
    """

    def __init__(self) -> None:
        super().__init__(8)
        self.quantize = True  # False while a float model is being observed

    def value_step(self) -> float:
        """Real value of one code unit, exactly as `values` has it in float32."""
        return float(codec.code_step(self.range.detach().float().abs(), self.bits))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.quantize else x


def _check_step(step: float, what: str) -> None:
    """Raises PlanError for a step that is no float32, or whose reciprocal is none."""
    largest = torch.finfo(torch.float32).max
    if not 1 / largest < step < largest:
        raise PlanError(
            f"{what} has a step of {step:.3g} between codes, which lies outside {1 / largest:.3g} .. {largest:.3g}; "
            "scale the images, or the weights before it"
        )


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
        _check_step(step, f"input range [{low}, {high}]")
        self.step_size.fill_(step)
        self.zero_point.fill_(round(-low / step))

    def extra_repr(self) -> str:
        return "bits=8, affine"
