"""Evaluation without gradients computes exact integer accumulators; everything else the differentiable path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lbs.quant import ActivationQuantizer, InputQuantizer, QuantConv2d, QuantLayer, QuantLinear
from lbs_kernels.program.epilogue import fma32


def make_conv(w_bits: int, a_bits: int, channels: int, seed: int = 0, by_filter: bool = False) -> QuantConv2d:
    torch.manual_seed(seed)
    layer = QuantConv2d(channels, 20, 3, padding=1, w_bits=w_bits, quantizer=ActivationQuantizer(a_bits)).eval()
    layer.adopt_scale()
    with torch.no_grad():
        layer.w_range.fill_(1.7)
        layer.quantizer.range.fill_(2.3)
        if by_filter:
            layer.range_by_filter()
            layer.w_range.mul_(torch.linspace(0.5, 1.5, 20))
    return layer


def epilogue(layer: QuantLayer, acc: Tensor) -> Tensor:
    """fma(float32(acc), M, B) of the packed format, with M and B rounded once."""
    step, bias = (layer.weight_step() * layer.quantizer.step()).float(), layer.bias.detach()
    window = (1, 1) if acc.dim() == 4 else ()
    return fma32(acc.float(), step.view(-1, *window), bias.view(-1, *window))


# 8/8 bits over 64 channels pass 2^24 and need float64; the others stay below it.
@pytest.mark.parametrize("by_filter", [False, True])
@pytest.mark.parametrize(("w_bits", "a_bits", "channels"), [(2, 2, 7), (4, 4, 64), (8, 2, 32), (8, 8, 64)])
def test_convolution_equals_integer_arithmetic(w_bits: int, a_bits: int, channels: int, by_filter: bool) -> None:
    layer = make_conv(w_bits, a_bits, channels, by_filter=by_filter)
    x = torch.rand(2, channels, 6, 5) * 3
    codes = layer.quantizer.codes(x).long()
    signs = 2 * layer.weight_codes().long() - (2**w_bits - 1)
    acc = F.conv2d(codes.double(), signs.double(), padding=1)  # below 2^53: exact
    with torch.no_grad():
        assert torch.equal(layer(x), epilogue(layer, acc))


def test_linear_reads_affine_inputs() -> None:
    torch.manual_seed(1)
    layer = QuantLinear(33, 9, w_bits=8, quantizer=InputQuantizer()).eval()
    layer.adopt_scale()
    layer.quantizer.set_range(-2.0, 2.5)
    x = torch.randn(4, 33)
    units = layer.quantizer.codes(x).double() - layer.quantizer.zero
    with torch.no_grad():
        acc = units @ (2 * layer.weight_codes().double() - 255).T
        assert torch.equal(layer(x), epilogue(layer, acc))


def test_gradients_take_the_differentiable_path() -> None:
    layer = make_conv(4, 4, 16)
    x = torch.rand(2, 16, 6, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert layer.w_range.grad is not None
    with torch.no_grad():
        exact = layer(x)
    # K = 144 float32 products of values below 2.3 * 1.7 * scale, summed in any order
    tolerance = 144 * 144 * 2.0**-24 * float(layer.output_scale) * 2.3 * 1.7
    assert float((y.detach() - exact).abs().max()) < tolerance
    assert not torch.equal(exact, torch.zeros_like(exact))


def test_autocast_does_not_touch_the_sums() -> None:
    layer = make_conv(4, 4, 16)
    x = torch.rand(2, 16, 6, 5)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), plain)


def test_one_image_without_a_batch_computes_the_same() -> None:
    layer = make_conv(4, 4, 16)
    x = torch.rand(1, 16, 90, 90)  # more numbers than are worked on at once
    with torch.no_grad():
        assert torch.equal(layer(x[0]), layer(x)[0])


def test_another_buffer_at_the_same_address_is_read_again() -> None:
    memory = np.zeros((), np.float32)
    quantizer = ActivationQuantizer(8)
    quantizer.zero_point = torch.from_numpy(memory)
    assert quantizer.zero == 0
    memory[...] = 3
    quantizer.zero_point = torch.from_numpy(memory)
    assert quantizer.zero == 3
