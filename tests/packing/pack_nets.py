"""Networks for the tests of packing: random weights, norms with awkward statistics, calibrated on random images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.models
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.packing.verify import verify
from lbs.quant.layers import QuantLayer
from lbs_kernels.program.steps import Program


class Call(nn.Module):
    """A function as a module that is traced through."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def images(batch: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics, signs and shifts that no fresh network has."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = (module.num_features,)
            with torch.no_grad():
                module.running_mean += 0.3 * torch.randn(size, generator=generator)
                module.running_var *= 0.5 + torch.rand(size, generator=generator)
                module.weight.copy_(torch.randn(size, generator=generator).sign() * (0.5 + module.weight.abs()))
                module.bias.copy_(0.4 * torch.randn(size, generator=generator))
    return model


def quantized(
    model: nn.Module, shape: tuple[int, ...], w_bits: int = 4, a_bits: int = 4, seed: int = 0, streams: int = 32
) -> nn.Module:
    """Uniform bits, calibrated; a net of one layer has 8-bit edges only."""
    calibration = images(8, shape, seed + 100)
    frozen = lbs.uniform(unsettle(model.eval(), seed), calibration, w_bits, a_bits, streams=streams)
    return lbs.calibrate(frozen, [calibration], bits=None, norms="keep").eval()


@functools.cache
def network(name: str, w_bits: int, a_bits: int, size: int | None = None, classes: int = 20) -> nn.Module:
    torch.manual_seed(7)
    channels, height, width = lbs.models.entry(name).input_shape
    shape = (channels, size or height, size or width)
    return quantized(lbs.models.create(name, classes), shape, w_bits, a_bits)


@functools.cache
def mixed_network() -> nn.Module:
    """cifar_resnet20 with a hand-made plan: every pair of widths occurs, four layers lose filters."""
    torch.manual_seed(8)
    calibration = images(8, (3, 32, 32), 100)
    model = lbs.prepare(unsettle(lbs.models.create("cifar_resnet20", 20).eval()), calibration)
    pairs = [(2, 4), (4, 2), (8, 4), (4, 8), (2, 2), (2, 8), (8, 2)]
    kept = {
        "layer1.0.conv1": (0, 1, 2, 3, 12, 13, 14, 15),
        "layer1.1.conv1": tuple(range(4)),
        "layer2.1.conv1": tuple(range(4, 32)),
        "layer3.2.conv1": tuple(range(0, 64, 2)),
    }
    plan = model.lbs_record.plan
    layers = []
    for index, layer in enumerate(plan.layers):
        w_bits, a_bits = (8, 8) if layer.name in plan.edges else pairs[index % len(pairs)]
        layers.append(replace(layer, w_bits=w_bits, a_bits=a_bits, kept=kept.get(layer.name)))
    frozen = lbs.freeze(model.eval(), replace(plan, layers=tuple(layers)))
    return lbs.calibrate(frozen, [calibration], bits=None).eval()


class TwoRegions(nn.Module):
    """Packed layers, a function and a product no program has, packed layers again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x * F.softplus(self.conv(x))
        x = torch.relu(self.last(x))
        return self.fc(x.mean((2, 3)))


@functools.cache
def two_regions() -> nn.Module:
    torch.manual_seed(9)
    return quantized(TwoRegions(), (3, 10, 10))


@functools.cache
def packed_digits() -> PackedModel:
    return pack(network("digits_resnet8", 4, 4, classes=10), verify=False)


@functools.cache
def packed_two_regions() -> PackedModel:
    return pack(two_regions(), verify=False)


def check_equal(model: nn.Module, shape: tuple[int, ...], batch: int = 3, **options: str) -> PackedModel:
    """Pack; every back end gives the same codes and floats, and those of the model."""
    packed = pack(model, verify=False, **options)
    x = images(batch, shape, 5)
    report = verify(model, packed, x, backend="reference")
    assert report.ok, report
    expected, traces = packed.run_traced(x, "reference")
    actual, found = packed.run_traced(x)
    for one, other in zip(traces, found, strict=True):
        for index, tensor in one.items():
            assert torch.equal(tensor, other[index]), index
    assert_same(expected, actual)
    with torch.no_grad():  # torch chooses other kernels for float parts where gradients may be asked for
        assert_same(expected, packed(x))
    return packed


def assert_same(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert torch.equal(one, other)
        return
    assert isinstance(one, dict) == isinstance(other, dict)
    items, others = (list(v.values()) if isinstance(v, dict) else list(v) for v in (one, other))  # type: ignore[call-overload]
    for item, another in zip(items, others, strict=True):
        assert_same(item, another)


def unsaturated_share(program: Program, trace: dict[int, Tensor]) -> float:
    """Share of codes that are neither the smallest nor the largest."""
    inner = total = 0
    for index, spec in enumerate(program.tensors):
        if spec.form == "codes":
            codes = trace[index]
            inner += int(((codes > 0) & (codes < (1 << spec.bits) - 1)).sum())
            total += codes.numel()
    return inner / total


def layers_of(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
