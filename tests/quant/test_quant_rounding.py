"""Rounding layer by layer: codes of the layer's own grid, a smaller error at every layer, and what keeps its codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.quant import codec, rounding
from lbs.quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLayer, QuantLinear
from lbs.search.prepare import uniform


def correlated(seed: int, *shape: int) -> Tensor:
    """Neighbouring channels and pixels alike, as in images: others can make up for what rounding a weight breaks."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(1).div(shape[1] ** 0.5) + noise.cumsum(-1).div(shape[-1] ** 0.5)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2, groups=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)),
    )


def quantized(bits: int, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """A float network whose norms have seen the images, and its calibrated counterpart, weights at nearest codes."""
    model = network().train()
    with torch.no_grad():
        model(images)
    model.eval()
    return model, lbs.calibrate(uniform(model, images[:1], bits, 8), [images], norms="keep").eval()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_network_is_nearer_to_the_float_one(bits: int) -> None:
    images = correlated(1, 256, 3, 8, 8)
    model, nearest = quantized(bits, images)
    found = copy.deepcopy(nearest)
    left = dict(rounding.optimize(found, images))
    lbs.calibrate(nearest, [images])  # corrected, as the other is
    unseen = correlated(2, 256, 3, 8, 8)
    with torch.no_grad():
        ours, theirs = ((one(unseen) - model(unseen)).square().mean() for one in (found, nearest))
    assert float(ours) < 0.8 * float(theirs)
    assert left == {"0": "8 bits", "14": "8 bits"}
    assert lbs.verify(found, lbs.pack(found), unseen).ok


def test_weights_are_codes_and_nothing_but_codes_has_changed() -> None:
    images = correlated(1, 16, 3, 8, 8)
    _, before = quantized(4, images)
    after = copy.deepcopy(before)
    left = dict(rounding.optimize(after, images))
    assert set(left) == {"0", "12", "14"}
    for name, layer in after.named_modules():
        old = before.get_submodule(name)
        if not isinstance(layer, QuantConv2d | QuantLinear) or name in left:
            continue
        assert isinstance(old, QuantLayer)
        torch.testing.assert_close(layer.unrounded_weight(), layer.quantized_weight(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.weight_step(), old.weight_step(), rtol=1e-5, atol=0)
        codes, nearest = layer.weight_codes(), old.weight_codes()
        assert (codes != nearest).any()
        assert float((codes - nearest).abs().mean()) < 1


def test_few_images_for_long_sums_are_no_worse_than_the_nearest_codes_on_others() -> None:
    """Sums of 96 products over 4 pixels of 12 images, inputs of 4 bits: what is made up for there is there alone."""
    torch.manual_seed(0)
    blocks = [part for _ in range(4) for part in (nn.Conv2d(96, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), *blocks, nn.Conv2d(96, 5, 1))
    images, unseen = correlated(1, 12, 3, 8, 8), correlated(2, 256, 3, 8, 8)
    with torch.no_grad():
        for seed in range(4):
            model.train()(correlated(10 + seed, 64, 3, 8, 8))
    nearest = lbs.calibrate(uniform(model.eval(), images[:1], 4, 4), [images], norms="keep").eval()
    found = copy.deepcopy(nearest)
    rounding.optimize(found, images)
    lbs.calibrate(nearest, [images])
    with torch.no_grad():
        ours, theirs = ((one(unseen) - model(unseen)).square().mean() for one in (found, nearest))
    assert float(ours) < 1.02 * float(theirs)


def test_moments_are_those_of_the_windows() -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    plain, coded = torch.randn(2, 5, 4, 8, 8) + 20
    x_f, x = (rounding._windows(layer, side, 2).double() for side in (plain, coded))
    for centred in (False, True):
        found = rounding._moments(layer, plain, coded, 2, centred)
        if centred:
            x_f, x = (side - side.mean(2, keepdim=True) for side in (x_f, x))
        torch.testing.assert_close(found.h, x @ x.mT / x.shape[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.c, x_f @ x.mT / x.shape[2], rtol=1e-5, atol=1e-5)
        w, q = torch.randn(2, 2, 3, 18, dtype=torch.float64)
        other = torch.randn(2, 3, 18, dtype=torch.float64)
        scale = (w @ x).square().mean(2)
        errors = [((w @ x_f - one @ x).square().mean(2) / scale).sum() for one in (q, other)]
        difference = found.error(w, q) - found.error(w, other)
        assert difference == pytest.approx(float(errors[0] - errors[1]), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_and_constant_inputs_are_rounded_to_numbers(count: int) -> None:
    """Of one image a linear layer reads one window, which centred is nothing; a dead layer reads zeros."""
    images = correlated(1, 16, 3, 8, 8)
    model, _ = quantized(4, images)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    found = lbs.calibrate(uniform(model, images[:1], 4, 4), [images], norms="keep").eval()
    rounding.optimize(found, images[:count])
    assert all(bool(value.isfinite().all()) for value in found.state_dict().values())
    assert bool(found(images).isfinite().all())


def test_independent_inputs_leave_the_nearest_codes() -> None:
    """H is the unit matrix and both networks agree: there is nothing to make up for."""
    w, v = torch.randn(3, 4, 9, dtype=torch.float64), torch.full((3, 4, 1), 1.7, dtype=torch.float64)
    h = torch.eye(9, dtype=torch.float64).expand(3, 9, 9)
    for grid in ("odd", "zero"):
        assert torch.equal(rounding._gptq(w, h, v, 4, grid), codec.round_trip(w, v, 4, codec.WEIGHTS[grid]))


def test_blocks_of_columns_are_no_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 70, 400, generator=generator, dtype=torch.float64).cumsum(1)
    h, w = x @ x.mT / 400, torch.randn(2, 5, 70, generator=generator, dtype=torch.float64)
    v = w.abs().amax(2, keepdim=True)
    results = []
    for block in (1, 7, 70):
        monkeypatch.setattr(rounding, "_BLOCK", block)
        results.append(rounding._gptq(w, h, v, 3, "odd"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    error = [((one - w) @ x).square().mean() for one in (results[0], codec.round_trip(w, v, 3, codec.WEIGHTS["odd"]))]
    assert error[0] < 0.5 * error[1]


def test_what_the_input_has_lost_is_made_up_for() -> None:
    """The quantized network reads half of what the float one reads: weights twice as large, up to their range."""
    x = correlated(4, 8, 200).T.double()[None].mT
    w, v = torch.full((1, 1, 8), 0.3, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    h, c = x @ x.mT / 200, 2 * x @ x.mT / 200
    found = rounding._gptq(rounding._made_up(w, rounding._Moments(h, c), 0.001), h, v, 8, "zero")
    error = ((found - 2 * w) @ x).square().mean() / ((2 * w) @ x).square().mean()
    assert float(error) < 1e-3


def test_dead_channels_and_shared_or_repeated_layers() -> None:
    torch.manual_seed(0)
    images = correlated(1, 12, 3, 6, 6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.one, self.other, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
            self.other.weight = self.one.weight
            self.deep = nn.Conv2d(8, 8, 3, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x) * torch.tensor([0.0] + [1.0] * 7).view(8, 1, 1))
            x = torch.relu(self.deep(x))
            x = torch.relu(self.twice(torch.relu(self.twice(x))))
            return self.fc(torch.relu(self.other(torch.relu(self.one(x)))).mean((2, 3)))

    model = lbs.calibrate(uniform(Net(), images[:1], 4, 8), [images], norms="keep").eval()
    left = dict(rounding.optimize(model, images))
    assert set(left) == {"stem", "twice", "one", "other", "fc"}
    assert left["twice"] == "it is called more than once"
    assert left["one"] == left["other"] == "it shares its weights"
    assert bool(torch.isfinite(model(images)).all())


def test_sums_too_long_for_a_matrix_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    images = correlated(1, 8, 3, 8, 8)
    _, model = quantized(4, images)
    monkeypatch.setattr(rounding, "LARGEST", 100)
    assert dict(rounding.optimize(model, images))["8"] == "sums of 108 products; at most 100"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (4, 3, 5)])
def test_windows_of_a_transposed_convolution_times_its_weights_are_its_outputs(
    window: tuple[int, int, int], groups: int
) -> None:
    options = {"output_padding": (1, 0), "dilation": 2, "groups": groups, "bias": False}
    layer = QuantConvTranspose2d(4, 6, *window, **options).double()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.detach()
    columns = rounding._windows(layer, x, groups)
    found = weight.reshape(groups, 6 // groups, -1) @ columns
    expected = layer.product(x, weight, None).flatten(2).permute(1, 0, 2).reshape(found.shape)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
