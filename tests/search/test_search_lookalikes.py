"""Modules of other libraries that compute what torch's do: replaced in the copy, by what they compute, not by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.graph import record_of
from lbs.search.lookalikes import as_torch_has_them


class Sigmoid(nn.Module):
    """Written anew, as libraries do."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid_() if self.inplace else x.sigmoid()


class Tanh(nn.Module):
    """It has the name of another function."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 2)


class PReLU(nn.PReLU):
    """Derived from torch's, its forward written out again."""

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)


class NormAct(nn.BatchNorm2d):
    """A norm, dropout and an activation in one module, the norm written out."""

    def __init__(self, channels: int, act: nn.Module, scale: float = 1.0) -> None:
        super().__init__(channels)
        self.drop, self.act, self.scale = nn.Identity(), act, scale

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.1,
            self.eps,
        )
        return self.act(self.drop(x)) * self.scale


class SqueezeExcite(nn.Module):
    """Its mean is called as a method; `largest`: it looks at the largest pixel too."""

    def __init__(self, channels: int, largest: bool = False) -> None:
        super().__init__()
        self.conv_reduce, self.act = nn.Conv2d(channels, 5, 1), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(5, channels, 1), Sigmoid()
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        if self.largest:
            y = (y + x.amax((2, 3), keepdim=True)) / 2
        return x * self.gate(self.conv_expand(self.act(self.conv_reduce(y))))


class Gated(nn.Module):
    """Convolutions with such norms, and squeeze and excite with such a gate."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), NormAct(8, nn.SiLU(inplace=True))
        self.inner, self.norm2 = nn.Conv2d(8, 12, 1, bias=False), NormAct(12, PReLU(), scale)
        self.pool, self.squeeze, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), Sigmoid()
        self.excite = SqueezeExcite(12)
        self.last, self.norm3 = nn.Conv2d(12, 8, 1, bias=False), NormAct(8, nn.Identity())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x))
        y = self.excite(self.norm2(self.inner(x)))
        y = self.norm3(self.last(y * self.gate(self.squeeze(self.pool(y)))))
        return self.fc(self.pool(x + y).flatten(1))


def images() -> Tensor:
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model.train()
    with torch.no_grad():
        model(images() * 2 + 0.5)
    return model.eval()


def test_a_network_of_them_packs_whole_and_computes_the_same() -> None:
    model = settled(Gated())
    quantized = lbs.calibrate(lbs.uniform(model, images()), [images()]).eval()
    packed = lbs.pack(quantized)
    assert packed.kept_float == ()
    assert len(packed.programs) == 1
    kinds = [step.emit.activation.kind for step in packed.programs[0].steps if step.emit.activation is not None]
    assert kinds == ["silu", "leaky_relu", "silu", "sigmoid", "sigmoid"]
    assert {layer.name for layer in packed.plan.layers} >= {"excite.conv_reduce", "excite.conv_expand"}
    with torch.no_grad():
        assert torch.equal(packed(images()), quantized(images()))
    assert type(model.gate) is Sigmoid  # the model given stays as it is
    assert type(model.norm1) is NormAct


def test_copies_compute_the_same_in_both_modes_and_share_what_was_shared() -> None:
    model = Gated()
    model.again = model.norm1
    settled(model)
    copied = as_torch_has_them(copy.deepcopy(model))
    assert copied.again is copied.norm1
    assert isinstance(copied.norm1, nn.Sequential)
    for mode in (True, False):
        torch.testing.assert_close(copied.train(mode)(images()), model.train(mode)(images()), rtol=1e-5, atol=1e-6)


def test_modes_are_kept() -> None:
    model = Gated()
    model.norm2.eval()
    made = as_torch_has_them(model)
    assert made.norm1.training
    assert made.norm1.norm.training
    assert not made.norm2.norm.training
    assert made.gate.training


@pytest.mark.parametrize("name", ["other_function", "hooked", "scaled_norm", "mean_and_maximum"])
def test_what_computes_something_else_stays(name: str) -> None:
    model: nn.Module
    if name == "other_function":
        model = nn.Sequential(Tanh())
    elif name == "hooked":
        model = nn.Sequential(Sigmoid())
        model[0].register_forward_hook(lambda module, args, output: output / 2)
    elif name == "mean_and_maximum":
        model = nn.Sequential(SqueezeExcite(6, largest=True))
    else:
        model = nn.Sequential(NormAct(8, nn.ReLU(), scale=0.5))
    kind = type(model[0])
    assert type(as_torch_has_them(model)[0]) is kind


class CastingLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


class NoisyConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        y = nn.functional.conv2d(input, self.weight, self.bias, self.stride, self.padding)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight / self.weight.std(), self.bias)


class Asked(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)

    def size(self) -> int:
        return self.out_features


def test_layers_that_only_call_torchs_are_converted_and_no_others() -> None:
    model = nn.Sequential(
        nn.Conv2d(images().shape[1], 8, 1), nn.ReLU(), NoisyConv(8, 8, 1), nn.ReLU(), Standardized(8, 8, 1)
    )
    model.extend([nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Asked(8, 8), nn.ReLU(), CastingLinear(8, 4)])
    made = as_torch_has_them(copy.deepcopy(model))
    assert [type(made[index]) for index in (2, 4, 8, 10)] == [NoisyConv, Standardized, Asked, nn.Linear]
    left = dict(record_of(lbs.uniform(model.eval(), images())).unconverted)
    assert set(left) == {"2", "4", "8"}
    assert made[10].training
