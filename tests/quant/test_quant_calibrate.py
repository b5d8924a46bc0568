"""Calibration: lossless standardisation, ranges of least squared error, norms, and inputs that are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.quant import codec, norms
from lbs.quant.calibrate import _best_affine, _Images, _observe, _stride, calibrate, estimate_norms
from lbs.quant.layers import QuantConv2d, QuantLayer, QuantLinear
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer
from lbs.search.freeze import plan_of
from lbs.search.prepare import SearchConfig, prepare, uniform
from lbs_kernels.errors import GraphError, PlanError


def images(seed: int = 0, count: int = 8, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def small_model(seed: int = 0) -> nn.Module:
    """digits_resnet8 whose norms have seen data, so that running statistics matter."""
    torch.manual_seed(seed)
    model = lbs.models.create("digits_resnet8").train()
    with torch.no_grad():
        for _ in range(3):
            model(images(seed))
    return model.eval()


def quant_layers(model: nn.Module) -> list[QuantLayer]:
    return [m for m in model.modules() if isinstance(m, QuantLayer)]


@pytest.mark.parametrize("standardize", ["scale", "none"])
def test_standardising_a_float_network_changes_nothing_but_the_rounding(standardize: str) -> None:
    model = small_model().double()
    searched = prepare(model, images()[:1].double(), SearchConfig(standardize=standardize))
    for layer in quant_layers(searched):
        layer.quantize = False
    x = images(5).double()
    torch.testing.assert_close(searched(x), model(x), rtol=1e-12, atol=1e-12)


def test_observed_weights_are_those_that_are_rounded() -> None:
    """After training the deviation has moved away from output_scale: ranges must fit what the layer computes with."""
    layer = QuantConv2d(3, 4, 3, bias=False)
    layer.adopt_scale()
    with torch.no_grad():
        layer.weight.mul_(3)
    layer.w_range.data.fill_(float(layer.float_weight().detach().abs().max()))
    x = images(channels=3)
    step = layer.weight_step()
    layer.quantize = False
    _, observed = layer.operands(x)
    assert (observed - layer.quantized_weight()).abs().max() <= float(step[0]) * 1.001


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_have_the_least_squared_error(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    layer = QuantLinear(64, 32, w_bits=bits, quantizer=ActivationQuantizer(bits))
    x = torch.randn(500, 64, generator=generator).relu()
    calibrate(layer, [x], bits=None)
    weights = layer.float_weight().detach()

    def errors(v: float) -> tuple[float, float]:
        r = torch.tensor(v)
        a = codec.round_trip(x, r, bits, codec.UNSIGNED)
        w = codec.round_trip(weights, r, bits, codec.WEIGHTS[layer.w_grid])
        return float(((a - x) ** 2).mean()), float(((w - weights) ** 2).mean())

    assert isinstance(layer.quantizer, ActivationQuantizer)
    best_a, best_w = errors(layer.quantizer.range.item())[0], errors(layer.w_range.item())[1]
    grid = [errors(float(v)) for v in torch.linspace(0.05, 1, 300) * max(float(x.max()), float(weights.abs().max()))]
    # 80 candidates instead of 300, and a thinned sample: a little above the true minimum, far below the maximum's
    assert best_a <= 1.05 * min(a for a, _ in grid)
    assert best_w <= 1.05 * min(w for _, w in grid)


def test_stride_sees_every_column() -> None:
    for count, share in ((128 * 16 * 32 * 32, 65536), (64 * 64 * 8 * 8, 8192), (7, 100), (1, 1), (30, 7)):
        stride = _stride(count, share)
        assert stride >= max(1, count // share)
        assert stride < 2 * max(1, count // share) + 2
        for width in (2, 4, 8, 32):
            if count % width == 0 and count // stride >= width:
                assert len({i % width for i in range(0, count, stride)}) == width


def test_network_input_covers_its_extremes() -> None:
    model = small_model()
    x = images(3)
    x[2, 0, 3, 5] = 9.5  # one pixel the stride may miss
    calibrated = calibrate(uniform(model, x[:1], 4, 4), [x])
    quantizer = quant_layers(calibrated)[0].quantizer
    assert isinstance(quantizer, InputQuantizer)
    assert quantizer.codes(torch.tensor([float(x.min()), 9.5])).tolist() == [0, 255]


def test_norms_are_estimated_again() -> None:
    model = uniform(small_model(), images()[:1], 4, 4)
    batches = [images(1), images(2)]
    calibrate(model, batches, norms="keep")
    before = copy.deepcopy(model.state_dict())
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    estimate_norms(model, batches)
    # the first norm sees the first convolution's output, whatever the later ones do
    outputs = [model.conv1(x) for x in batches]  # type: ignore[operator]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(model.bn1.running_var, variance, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    assert not torch.equal(before["bn1.running_mean"], model.state_dict()["bn1.running_mean"])
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert not model.training


def test_norms_keep_their_statistics_where_the_model_fails() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 8), nn.BatchNorm2d(2))
    model[1].running_mean.fill_(7.0)  # type: ignore[union-attr,operator]
    with pytest.raises(GraphError, match=r"failed on a calibration batch of shape \(1, 1, 8, 8\)"):
        estimate_norms(model, [torch.rand(2, 1, 8, 8), torch.rand(1, 1, 8, 8)])
    assert model[1].running_mean.tolist() == [7.0, 7.0]  # type: ignore[union-attr,operator]
    assert model[1].momentum == 0.1


def test_modes_and_hooks_are_put_back() -> None:
    model = prepare(small_model().train(), images()[:1])
    calibrate(model, [images()])
    assert model.training
    for layer in quant_layers(model):
        assert layer.quantize
        assert not layer._forward_pre_hooks


def test_pairs_of_images_and_labels_are_taken() -> None:
    a = calibrate(uniform(small_model(), images()[:1]), [images(1)])
    b = calibrate(uniform(small_model(), images()[:1]), iter([(images(1), torch.zeros(8))]))
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())


def test_not_a_number_names_the_layer_and_leaves_quantization_on() -> None:
    model = uniform(small_model(), images()[:1])
    bad = images()
    bad[1, 0, 2, 2] = float("nan")
    with pytest.raises(GraphError, match=r"^the input of conv1 holds NaN") as seen:
        calibrate(model, [images(), bad])
    assert len(str(seen.value).splitlines()) == len(quant_layers(model))  # all layers behind it are told as well
    with torch.no_grad():
        model.bn1.weight[0] = float("inf")  # type: ignore[union-attr,index]
    with pytest.raises(GraphError, match=r"input of layer1\.0\.conv1 holds NaN or infinite"):
        calibrate(model, [images()])
    assert all(layer.quantize for layer in quant_layers(model))


def test_no_batches_and_empty_batches_are_refused() -> None:
    model = uniform(small_model(), images()[:1])
    with pytest.raises(PlanError, match="got no batch"):
        calibrate(model, [])
    with pytest.raises(PlanError, match=r"batch 1 of shape \(0, 1, 8, 8\) is empty"):
        calibrate(model, [images(), images()[:0]])


def test_what_cannot_calibrate_is_refused() -> None:
    model = uniform(small_model(), images()[:1])
    with pytest.raises(PlanError, match=r"one tensor of shape .* list of batches"):
        calibrate(model, images())
    for bits in (0, 9, 1.5):
        with pytest.raises(PlanError, match=f"{bits}"):
            calibrate(model, [images()], bits=bits)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="has no quantized layer"):
        calibrate(small_model(), [images()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.expand(-1, 3, -1, -1), r"\(\d+, 3, 8, 8\), torch.float32 on cpu"),
        (lambda x: x.double(), r".*, torch.float64 on cpu"),
        (lambda x: x.to("meta"), r".*, torch.float32 on meta"),
        (lambda x: x[0], r"\(1, 8, 8\), torch.float32"),
    ],
)
def test_batches_the_model_cannot_take_are_named(change: Callable[[Tensor], Tensor], said: str) -> None:
    model = uniform(small_model(), images()[:1])
    with pytest.raises(GraphError, match=f"failed on a calibration batch of shape {said}"):
        calibrate(model, [change(images())])
    assert all(layer.quantize for layer in quant_layers(model))


class _Signed(nn.Module):
    """The second convolution reads values of both signs."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=padding)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).relu())


@pytest.mark.parametrize("padding", [0, 1])
def test_negative_inputs_get_a_code_for_zero(padding: int) -> None:
    torch.manual_seed(0)
    model = calibrate(uniform(_Signed(padding), images()[:1]), [images()])
    _, body, head = quant_layers(model)
    assert 0 < body.quantizer.zero < 255
    assert float(body.quantizer(torch.zeros(1))) == 0
    assert head.quantizer.zero == 0
    assert lbs.verify(model.eval(), lbs.pack(model.eval()), images()).ok


def test_a_searched_zero_is_one_at_every_width() -> None:
    torch.manual_seed(0)
    model = calibrate(prepare(_Signed(1), images()[:1], SearchConfig(pruning=False)), [images()])
    quantizer = model.get_submodule("body").quantizer
    assert quantizer.coding.levels == 3
    assert [quantizer.coding.zero_at(bits) for bits in (2, 4, 8)] == [z * quantizer.coding.zero for z in (1, 5, 85)]


def test_four_bits_take_the_better_grid_and_the_plan_says_which() -> None:
    """Weights of a few sizes around 0, many of them exactly 0, against weights of two sizes and nothing between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model.append(nn.ReLU()).append(nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[2].weight.mul_(torch.rand_like(model[2].weight) < 0.3)  # type: ignore[operator,arg-type]
        model[4].weight.copy_(torch.randn(8, 8, 3, 3).sign())  # type: ignore[operator]
    quantized = calibrate(uniform(model, images()[:1], 4, 8), [images()])
    grids = [layer.w_grid for layer in quant_layers(quantized)]
    assert grids == ["zero", "zero", "odd", "zero"]
    assert [entry.w_grid for entry in plan_of(quantized).layers] == grids
    zeros = model[2].weight == 0  # type: ignore[comparison-overlap]
    assert (quant_layers(quantized)[1].quantized_weight()[zeros] == 0).all()


@pytest.mark.parametrize(("low", "high"), [(0.28, 8.0), (3.0, 3.0), (1.0, 0.0), (0.001, 6.0)])
def test_ranges_around_zero_have_the_least_squared_error(low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20000, generator=generator)
    values = torch.where(values < 0, values * low / 3, values * high / 3)
    for bits, zero_bits in ((4, 4), (8, 8), (4, 2)):
        v, zero = _best_affine(values, bits, zero_bits)
        n = codec.levels(zero_bits)

        def error(v: float, zero: int, bits: int = bits, n: int = n) -> float:
            rounded = codec.round_trip(values, torch.tensor(v), bits, codec.Coding("unsigned", zero, n))
            return float(((rounded - values) ** 2).mean())

        every = [error(float(w), z) for z in range(0, n + 1, max(1, n // 15)) for w in torch.linspace(0.1, 1.5, 60) * 4]
        assert error(v, zero) <= 1.15 * min(every)


def test_a_layer_that_is_never_called_is_named() -> None:
    model = uniform(small_model(), images()[:1])
    model.forward = lambda x: model.conv1(x)  # type: ignore[method-assign,operator,assignment]
    with pytest.raises(GraphError, match=r"layer1\.0\.conv1.* were not called"):
        calibrate(model, [images()])


def test_a_dead_layer_keeps_a_legal_range() -> None:
    model = small_model()
    with torch.no_grad():
        model.bn1.weight.zero_()  # type: ignore[union-attr,operator]
        model.bn1.bias.fill_(-1)  # type: ignore[union-attr,operator]
    calibrated = calibrate(uniform(model, images()[:1]), [images()])
    assert torch.isfinite(calibrated(images())).all()
    assert all(bool((layer.w_range > 0).all()) for layer in quant_layers(calibrated))


def test_the_statistics_are_corrected_by_the_difference_that_quantization_makes() -> None:
    """With one batch, also behind norms that were corrected themselves."""
    model, x = small_model(), images(3, 32)
    before = copy.deepcopy(model.state_dict())
    calibrated = calibrate(uniform(model, x[:1], 4, 4), [x]).eval()
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen.setdefault(name, []).append(args[0].detach().double())

    with torch.no_grad():
        for net in (model, calibrated):
            watched = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
            hooks = [m.register_forward_pre_hook(keep(name)) for name, m in watched]
            net(x)
            for hook in hooks:
                hook.remove()
    assert len(seen) > 3
    after = calibrated.state_dict()
    for name, (plain, coded) in seen.items():
        mean, variance = before[f"{name}.running_mean"].double(), before[f"{name}.running_var"].double()
        wanted = mean + coded.mean((0, 2, 3)) - plain.mean((0, 2, 3))
        torch.testing.assert_close(after[f"{name}.running_mean"].double(), wanted, rtol=1e-5, atol=1e-5)
        change = coded.var((0, 2, 3), False) - plain.var((0, 2, 3), False)
        wanted = variance * (1 + change / torch.maximum(variance, plain.var((0, 2, 3), False)))
        torch.testing.assert_close(after[f"{name}.running_var"].double(), wanted, rtol=1e-4, atol=1e-6)


def test_images_that_hardly_vary_do_not_inflate_a_variance() -> None:
    """What rounding adds to values that are nearly equal is many times their variance, not that of the norm."""
    norm = nn.BatchNorm2d(3)
    norm.running_var.copy_(torch.tensor([4.0, 4.0, 0.5]))  # type: ignore[union-attr]
    noise = torch.randn(2, 64, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = noise[0] * torch.tensor([1e-4, 2.0, 2.0]).view(3, 1, 1)
    coded = plain + 0.5 * noise[1]
    norms.correct_one(norm, plain, coded)
    wanted = torch.tensor([4.0 + 0.25, 4.0 + 0.25, 0.5 * (1 + 0.25 / 4)])
    torch.testing.assert_close(norm.running_var, wanted, rtol=0.02, atol=0)


def test_biases_of_layers_without_a_norm_are_corrected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(16, 3, 12, 12)
    kept, corrected = (calibrate(uniform(model, x[:1], 2, 2), [x], norms=how).eval() for how in ("keep", "correct"))
    with torch.no_grad():
        plain, before, after = (net(x).mean((0, 2, 3)) for net in (model, kept, corrected))
    assert (after - plain).abs().max() < 1e-4 < (before - plain).abs().max()


def test_fresh_statistics_are_settled_before_ranges_are_set() -> None:
    torch.manual_seed(0)
    model = lbs.models.create("digits_resnet8").eval()
    x = images(2, 32) * 7
    calibrated = calibrate(uniform(model, x[:1], 8, 8), [x]).eval()
    with torch.no_grad():
        assert calibrated.bn1(calibrated.conv1(x)).std() == pytest.approx(1.0, abs=0.05)  # type: ignore[operator]
    quantizer = quant_layers(calibrated)[1].quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    assert 1 < float(quantizer.range) < 8  # of normalised values, not of seven times as large ones


def test_batches_as_loaders_give_them() -> None:
    model, x = small_model(), images(4)
    expected = calibrate(uniform(model, x[:1]), [x]).state_dict()
    labels = torch.zeros(len(x))
    for batches in (
        [(x, labels)],
        [[x, {"label": labels}]],
        [{"labels": labels, "pixel_values": x}],
        [((x, x), labels)],
        iter([x]),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=len(x)),
    ):
        found = calibrate(uniform(model, x[:1]), batches).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(PlanError, match="calibration batch 0 holds keys 'labels'; give images"):
        calibrate(uniform(model, x[:1]), [{"labels": labels}])
    with pytest.raises(PlanError, match="calibration batch 0 holds a str"):
        calibrate(uniform(model, x[:1]), ["images"])


def test_of_an_iterator_the_first_images_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    model, read = small_model(), []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield images(len(read), 256)

    calibrate(uniform(model, images()[:1]), endless())
    assert len(read) == 5  # the fifth is asked for before the first 1024 are known to be enough
    assert "first 1024 images are used" in caplog.text


def test_samples_of_many_batches_stay_bounded() -> None:
    layer = QuantLinear(64, 8)
    batches = [torch.randn(256, 64, generator=torch.Generator().manual_seed(i)).relu() for i in range(60)]
    batches[17][3, 5] = 11.0
    found = _observe(layer, {"": layer}, _Images(_Sizeless(batches)), layer)
    assert len(found[""]) <= 5 * 65536
    assert float(found[""].max()) == 11.0


class _Sizeless:
    """A loader that does not know how many batches it has."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


@pytest.mark.parametrize("statistics", ["correct", "estimate"])
def test_statistics_are_what_they_were_where_a_batch_cannot_be_read(statistics: str) -> None:
    model = uniform(small_model(), images()[:1], 4, 4)
    calibrate(model, [images(1)], norms="keep")
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    arguments = _Images([images(1), images(2)[:0]]), model
    work = {
        "correct": lambda: norms.correct(model, quant_layers(model), *arguments),
        "estimate": lambda: norms.estimate(model, *arguments),
    }
    with pytest.raises(PlanError, match="calibration batch 1 of shape"):
        work[statistics]()
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in before.items())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
