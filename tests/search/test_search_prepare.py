"""Conversion: what becomes of every layer, and models that cannot be converted."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lbs.models
from lbs.graph import record_of
from lbs.quant.calibrate import calibrate
from lbs.quant.layers import QuantLayer
from lbs.quant.quantizers import InputQuantizer
from lbs.runs.network import NetworkCard, apply_plan
from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import SearchConv2d, SearchLayer, SearchLinear, SearchQuantizer
from lbs.search.prepare import SearchConfig, conversion_report, prepare, uniform
from lbs_kernels.errors import GraphError, PlanError


def digits() -> nn.Module:
    torch.manual_seed(0)
    return lbs.models.create("digits_resnet8")


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))


def test_every_layer_is_reported_with_what_became_of_it() -> None:
    model = digits()
    searched = prepare(model, images())
    report = dict(conversion_report(searched))
    assert set(report) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert report["conv1"].startswith("bits fixed at 8/8; filters kept: its channels reach add")
    assert report["layer1.0.conv1"] == "bits (2, 4, 8); filters in 4 groups"
    assert "filters kept: its channels reach" in report["layer1.0.conv2"]
    assert report["fc"] == "bits fixed at 8/8; filters kept: first or last layer, or pruning is off"
    fixed = dict(conversion_report(uniform(model, images(), 4, 2)))
    assert fixed["layer1.0.conv1"].startswith("bits fixed at 4/2; ")


def test_edges_stay_at_eight_bits() -> None:
    searched = prepare(digits(), images(), SearchConfig(bits=(2, 4)))
    assert isinstance(searched.conv1, SearchConv2d)
    assert isinstance(searched.conv1.quantizer, InputQuantizer)
    assert isinstance(searched.fc, SearchLinear)
    assert (searched.fc.w_bits, searched.fc.a_bits, searched.fc.w_gate) == (8, 8, None)
    inner = searched.get_submodule("layer1.0.conv1")
    assert isinstance(inner, SearchConv2d)
    assert (inner.w_bits, inner.a_bits) == (4, 4)


def test_the_given_model_is_left_alone() -> None:
    model = digits().train()
    model.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    searched = prepare(model, images())
    with torch.no_grad():
        for parameter in searched.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, QuantLayer) for m in model.modules())
    assert all(m.training for m in searched.modules())
    assert not searched.conv1.weight.requires_grad  # type: ignore[union-attr]


def test_copies_are_independent() -> None:
    searched = prepare(digits(), images()).train()
    Budget(searched, bops=0.03)()  # statistics now hang on the graph
    twin = copy.deepcopy(searched)
    gate = twin.get_submodule("layer1.0.conv1").prune
    assert twin.get_submodule("layer1.0.conv2").input_gate[0] is gate  # type: ignore[index,union-attr]
    with torch.no_grad():
        gate.hold((0,), -1)  # type: ignore[union-attr,operator]
    assert plan_of(twin).layer("layer1.0.conv1").kept == tuple(range(4, 16))
    assert plan_of(searched).layer("layer1.0.conv1").kept is None


class _Bag(nn.Module):
    """Layers of every kind that stays in float, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.patched = nn.Conv2d(4, 4, 1)
        self.patched.forward = lambda x: torch.conv2d(x, 2 * self.patched.weight)  # type: ignore[method-assign]
        self.twice = nn.Conv2d(4, 4, 1)
        self.normed = parametrizations.orthogonal(nn.Conv2d(4, 4, 1))
        self.own = _Doubling(4, 4, 1)
        self.wanted = nn.Conv2d(4, 4, 1)
        self.idle = nn.Linear(3, 3)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patched(self.first(x).relu()).relu()
        x = self.twice(nn.functional.max_pool2d(self.twice(x).relu(), 2))
        x = self.own(self.normed(x.relu()).relu()).relu()
        return self.last(self.wanted(x).relu())


class _Doubling(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_stays_in_float_says_why() -> None:
    model = _Bag().eval()
    searched = prepare(model, images(), SearchConfig(exclude=("want*",)))
    reasons = dict(record_of(searched).unconverted)
    expected = {
        "patched": "its forward is patched on the instance",
        "twice": "calls it on inputs of different sizes",
        "normed": "computed by a parametrization",
        "own": "_Doubling has a forward of its own",
        "wanted": "excluded by name",
        "idle": "the forward pass does not call it",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name]
        assert type(searched.get_submodule(name)) is type(model.get_submodule(name))
    assert dict(conversion_report(searched)).keys() == {n for n, _ in model.named_children()}
    assert [layer.name for layer in record_of(searched).plan.layers] == ["first", "last"]
    assert plan_of(searched).bops() > 0
    for layer in (searched.first, searched.last):
        layer.quantize = False  # type: ignore[union-attr,assignment]
    torch.testing.assert_close(searched(images()), model(images()))


def test_filters_that_feed_an_excluded_layer_are_kept_and_cost_is_still_counted() -> None:
    searched = prepare(digits(), images(), SearchConfig(exclude=("layer1.0.conv1",)))
    report = dict(conversion_report(searched))
    assert report["layer1.0.conv1"] == "left in float: excluded by name"
    assert all(entry.source != "layer1.0.conv1" for entry in plan_of(searched).layers)
    Budget(searched, bops=0.05).finish()
    assert not isinstance(freeze(searched).get_submodule("layer1.0.conv1"), QuantLayer)


def test_a_layer_registered_twice_is_replaced_in_both_places() -> None:
    model = digits()
    model.alias = model.fc
    searched = prepare(model, images())
    assert isinstance(searched.alias, SearchLinear)
    assert searched.alias is searched.fc


def test_hooks_of_the_user_go_along() -> None:
    model = digits()
    calls = []
    model.conv1.register_forward_hook(lambda m, a, k, y: calls.append(tuple(y.shape)), with_kwargs=True)  # type: ignore[union-attr,operator]
    frozen = freeze(prepare(model, images()))
    calls.clear()
    frozen(images())
    assert calls == [(2, 16, 8, 8)]


def test_nothing_to_convert() -> None:
    with pytest.raises(GraphError, match=r"Sequential has no layer that can be converted \(it has no Conv2d"):
        prepare(nn.Sequential(nn.ReLU()), images())
    with pytest.raises(GraphError, match=r"no layer that can be converted \(0: excluded by name\)"):
        prepare(nn.Sequential(nn.Conv2d(1, 1, 1)), images(), SearchConfig(exclude=("*",)))


class _Wide(nn.Module):
    """A linear layer of `width` products between two small ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 1)
        self.grow = nn.Conv2d(1, width, 1)
        self.wide = nn.Linear(width, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.grow(torch.relu(self.first(x))))
        return self.last(torch.relu(self.wide(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))))


def test_a_sum_that_could_not_be_packed_is_refused_before_the_search() -> None:
    # 255 * 255 * 33025 < 2^31 <= 255 * 255 * 33026, as `lbs.pack` counts
    prepare(_Wide(33025), images())
    with pytest.raises(GraphError) as refusal:
        prepare(_Wide(33026), images())
    assert str(refusal.value) == (
        "wide: 33026 products of weights up to 255 and activations up to 255 sum to 2147515650, the 32-bit accumulator "
        "ends below 2147483648; use fewer bits or split the layer. It could be trained but not packed at 8 bits: "
        "search bits=(2, 4), which fit, or leave it in float, exclude=('wide',)"
    )
    with pytest.raises(GraphError, match=r"not packed at 8 bits: leave it in float, exclude=\('wide',\)$"):
        prepare(_Wide(33026), images(), SearchConfig(bits=(8,)))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": (2, 4)},
        {"exclude": ("wide",)},
        {"bits": (32,)},
        {"trace": False, "pruning": False},
    ],
)
def test_the_ways_out_of_a_sum_that_could_overflow(options: dict[str, Any]) -> None:
    prepare(_Wide(33026), images(), SearchConfig(**options))


def test_a_plan_is_held_to_its_own_sums() -> None:
    """A search of narrow bits is opened again at them, and wide ones are refused before anything is trained."""
    card = NetworkCard("wide", "none", 2, (1, 8, 8), (0.5,), (0.2,))
    model = _Wide(33026)
    searched = prepare(model, images(), SearchConfig(bits=(2, 4), pruning=False))
    plan = plan_of(searched)
    assert plan.layer("wide").w_bits == 4
    assert plan_of(apply_plan(model, card, plan)) == plan
    wider = replace(plan, layers=tuple(replace(x, w_bits=8, a_bits=8) if x.name == "wide" else x for x in plan.layers))
    with pytest.raises(GraphError, match=r"33026 products .* not packed at 8 bits: leave it in float"):
        apply_plan(model, card, wider)
    with pytest.raises(GraphError, match=r"33026 products .* not packed at 8 bits: leave it in float"):
        uniform(model, images(), 8, 8)
    uniform(model, images(), 8, 4)


def test_the_edges_count_at_eight_bits() -> None:
    model = nn.Sequential(nn.Conv2d(1, 33026, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(33026, 2))
    with pytest.raises(GraphError, match=r"4: 33026 products .* not packed at 8 bits: leave it in float, exclude="):
        prepare(model, images(), SearchConfig(bits=(2, 4)))
    depthwise = nn.Sequential(nn.Conv2d(1, 33026, 1), nn.ReLU(), nn.Conv2d(33026, 33026, 1, groups=33026))
    prepare(depthwise, images(), SearchConfig(pruning=False))


def test_bad_weights_name_the_tensor() -> None:
    for value in (float("nan"), float("inf")):
        model = digits()
        with torch.no_grad():
            model.get_submodule("layer1.0.conv2").weight[0, 0, 0, 0] = value  # type: ignore[index,operator]
        with pytest.raises(GraphError, match=r"layer1\.0\.conv2\.weight holds NaN or infinite"):
            prepare(model, images())


@pytest.mark.parametrize("trace", [True, False])
def test_an_example_that_is_no_batch_is_refused(trace: bool) -> None:
    config = SearchConfig(pruning=False, trace=trace)
    for example, name in ((None, "NoneType"), ((images(),), "tuple")):
        with pytest.raises(GraphError, match=f"the example for .* is a {name}; give one batch"):
            prepare(digits(), example, config)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"torch.float64 on cpu: [^\n]*; give an example batch") as seen:
        prepare(digits(), images().double(), config)
    assert "tlparse" not in str(seen.value)


def test_converted_models_are_refused() -> None:
    for made in (prepare(digits(), images()), uniform(digits(), images())):
        with pytest.raises(GraphError, match="already holds quantized layers"):
            prepare(made, images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (2, 3)}, "multiple"),
        ({"bits": ()}, "empty"),
        ({"bits": 4}, "no list of whole numbers"),
        ({"bits": (2.5, 5)}, "no list of whole numbers"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 2.5}, "group_size=2.5"),
        ({"exclude": "conv1"}, "give a tuple of patterns"),
        ({"max_pruning_ratio": 1.0}, r"max_pruning_ratio=1\.0"),
        ({"max_pruning_ratio": float("nan")}, "max_pruning_ratio=nan"),
        ({"importance": "size"}, "importance='size' is unknown; use magnitude, gamma"),
        ({"filter_tile": 0}, "filter_tile=0"),
        ({"trace": False}, "pruning=True needs trace=True"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SearchConfig(**options)


def test_misspelt_names_and_modes() -> None:
    with pytest.raises(PlanError, match=r"exclude='layer9\.\*' matches no layer; the layers are conv1, layer1"):
        prepare(digits(), images(), SearchConfig(exclude=("layer9.*",)))
    with pytest.raises(GraphError, match="standardize='mean' is unknown"):
        prepare(digits(), images(), SearchConfig(standardize="mean"))
    assert SearchConfig(bits=[2, 4]).bits == (2, 4)  # type: ignore[arg-type]
    assert replace(SearchConfig(), pruning=False, trace=False).bits == (2, 4, 8)


class _Branching(nn.Module):
    """Cannot be traced: which way it goes depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if x.sum() > -1:
            x = self.b(x).relu()
        return self.c(x.mean((2, 3)))


def test_untraceable_models_name_the_line_and_the_way_out() -> None:
    line = _Branching.forward.__code__.co_firstlineno + 2
    with pytest.raises(GraphError, match=rf"test_search_prepare\.py, line {line}.*SearchConfig\(pruning=False, trace="):
        prepare(_Branching(), images())


def test_untraceable_models_can_be_searched_and_frozen() -> None:
    torch.manual_seed(1)
    searched = prepare(_Branching(), images(), SearchConfig(pruning=False, trace=False))
    calibrate(searched, [images(8)])
    assert [entry.name for entry in plan_of(searched).layers] == ["a", "b", "c"]
    Budget(searched, bops=0.04).finish()
    frozen = freeze(searched).eval()
    torch.testing.assert_close(frozen(images()), searched.eval()(images()))


@pytest.mark.parametrize("importance", ["gamma", "magnitude"])
def test_a_training_step_under_bfloat16_autocast(importance: str) -> None:
    searched = prepare(digits(), images(), SearchConfig(importance=importance)).train()
    calibrate(searched, [images(8)])
    budget = Budget(searched, bops=0.02)
    optimizer = torch.optim.SGD(parameter_groups(searched, lr=0.01), lr=0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(searched(images(4)), torch.tensor([0, 1, 2, 3]))
        (loss + budget()).backward()
        optimizer.step()
        budget.step()
    layers = [m for m in searched.modules() if isinstance(m, SearchLayer)]
    for layer in layers:
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
        assert layer.weight.grad.isfinite().all()
    quantizer = searched.get_submodule("layer1.0.conv1.quantizer")
    assert isinstance(quantizer, SearchQuantizer)
    assert quantizer.range.grad is not None
    assert quantizer.gate.statistic.dtype == torch.float32
    assert quantizer.gate.statistic.isfinite().all()


def test_norms_without_gamma_are_ranked_by_magnitude() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )
    searched = prepare(model, images())
    weight = searched[2].weight.detach()  # type: ignore[index]
    expected = weight.abs().flatten(1).mean(1).view(2, 4).mean(1) / weight.abs().max()
    torch.testing.assert_close(searched[2].prune.statistic.detach(), expected)  # type: ignore[index]


def test_other_layers_are_told_by_every_report() -> None:
    class Sounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ear, self.place = nn.Conv3d(1, 8, (1, 1, 9), 4), nn.Parameter(torch.zeros(1, 8))
            self.words, self.one, self.two = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            heard = torch.relu(self.ear(x[:, :, None, None])).mean((2, 3, 4))
            y = self.norm(heard + self.place + self.words((x[:, 0, 0] > 0).long()))
            return self.two(torch.relu(self.one(y)))

    x = torch.randn(4, 1, 60)
    searched = lbs.calibrate(lbs.prepare(Sounds(), x), [x])
    left = dict(conversion_report(searched))
    assert left["ear"] == "left in float: Conv3d has no quantized form"
    assert left["words"] == "left in float: Embedding has no quantized form"
    assert set(left) == {"ear", "words", "one", "two"}
    result = str(lbs.Budget(searched, bops=0.5).result())
    assert result.endswith("not counted, in float: ear, words")  # no formula counts them
    packed = lbs.pack(lbs.freeze(searched).eval())
    assert dict(packed.kept_float)["ear"] == "Conv3d has no quantized form"
    assert "in float: ear: Conv3d has no quantized form" in str(lbs.explain(packed))


def test_what_layers_in_float_cost_is_told_beside_the_budget() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Flatten())
    model.append(nn.Linear(8 * 36, 5))
    x = torch.randn(2, 3, 10, 10)
    searched = lbs.prepare(model, x, lbs.SearchConfig(exclude=("2", "3")))
    record = record_of(searched)
    assert [layer.name for layer in record.in_float] == ["2", "3"]
    expected = (9 * 8 * 8 // 2 * 36 + 8 * 8 * 36) * 32 * 32
    assert record.float_bops == expected
    assert f"not counted, in float: 2, 3 ({expected:,} bit operations at 32 x 32 bits)" in str(
        lbs.Budget(lbs.calibrate(searched, [x]), bops=0.9).result()
    )
    whole = lbs.cost.network_layers(model, x)
    assert record.plan.full_precision_bops() + record.float_bops == whole.full_precision_bops()
