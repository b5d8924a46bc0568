"""Freezing: the masked network and the one whose filters are gone compute the same; plans that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from search_grids import as_searched
from torch import Tensor, nn

import lbs.models
from lbs.graph import record_of
from lbs.plan import LayerPlan, Plan
from lbs.quant.calibrate import calibrate
from lbs.quant.layers import QuantConv2d, QuantLayer
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import SearchLayer, SearchQuantizer
from lbs.search.prepare import SearchConfig, prepare, uniform
from lbs_kernels.errors import PlanError


def images(name: str, count: int = 4, seed: int = 0) -> Tensor:
    shape = lbs.models.REGISTRY[name].input_shape
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def searchable(name: str = "digits_resnet8", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = lbs.models.create(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.4)  # a pruned channel is not zero before its norm and ReLU
    x = images(name).to(dtype)
    return calibrate(prepare(model.to(dtype), x[:1], SearchConfig(**options)), [x])


def decide(model: nn.Module, seed: int) -> None:
    """Bits and filter groups at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(0, count, (), generator=generator))

    for layer in model.modules():
        if not isinstance(layer, SearchLayer):
            continue
        if layer.w_gate is not None:
            layer.w_gate.close_to(pick(3))
        if isinstance(layer.quantizer, SearchQuantizer):
            layer.quantizer.gate.close_to(pick(3))
        if layer.prune is not None:
            weakest = layer.prune.statistic.argsort(stable=True).tolist()
            layer.prune.hold(tuple(weakest[: pick(layer.prune.groups - layer.prune.least + 1)]), -1)


@pytest.mark.parametrize("name", ["preresnet20", "cifar_resnet20", "digits_resnet8"])
def test_masked_equals_cut(name: str) -> None:
    model = searchable(name, torch.float64, group_size=3).eval()
    for seed in range(2):
        decide(model, seed)
        plan = as_searched(model)
        frozen = freeze(model, plan)
        assert any(entry.kept is not None for entry in plan.layers)
        for entry in plan.layers:
            layer = frozen.get_submodule(entry.name)
            assert isinstance(layer, QuantLayer)
            assert tuple(layer.weight.shape[:2]) == (entry.kept_filters, plan.kept_inputs(entry))
            assert (layer.w_bits, layer.a_bits, layer.kept) == (entry.w_bits, entry.a_bits, entry.kept)
        x = images(name, 2, seed + 9).double()
        with torch.no_grad():
            # Sums of another order in float64; far below the smallest step of any code.
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
        assert plan_of(frozen) == plan
        assert sum(p.numel() for p in frozen.parameters()) < sum(p.numel() for p in model.parameters())


def test_layers_of_8_bits_get_a_zero_and_cut_filters_take_their_ranges_along() -> None:
    model = searchable("preresnet20").eval()
    decide(model, 4)
    frozen = freeze(model)
    assert {entry.w_bits for entry in plan_of(frozen).layers} == {2, 4, 8}
    for entry in plan_of(frozen).layers:
        cut, masked = frozen.get_submodule(entry.name), model.get_submodule(entry.name)
        assert isinstance(cut, QuantLayer)
        assert isinstance(masked, QuantLayer)
        assert entry.w_grid == cut.w_grid == ("zero" if cut.w_bits == 8 else "odd")
        assert entry.ranges == "filter"
        assert torch.equal(cut.w_range, masked.w_range[torch.tensor(entry.kept or range(entry.filters))])


def test_a_plan_says_whose_the_ranges_are() -> None:
    model = searchable().eval()
    layers = tuple(replace(entry, ranges="layer") for entry in plan_of(model).layers)
    frozen = freeze(model, replace(plan_of(model), layers=layers))
    for entry in layers:
        own, whole = model.get_submodule(entry.name), frozen.get_submodule(entry.name)
        assert isinstance(own, QuantLayer)
        assert isinstance(whole, QuantLayer)
        assert float(whole.w_range) == float(own.w_range.abs().max())
    again = freeze(frozen, plan_of(model))
    assert all(m.w_range.dim() for m in again.modules() if isinstance(m, QuantLayer))


def test_masked_equals_cut_in_float32() -> None:
    model = searchable("preresnet20").eval()
    decide(model, 4)
    frozen = freeze(model, as_searched(model))
    for entry in plan_of(frozen).layers:
        cut, masked = frozen.get_submodule(entry.name), model.get_submodule(entry.name)
        rows = torch.tensor(entry.kept or range(entry.filters))
        source = plan_of(model).layer(entry.source).kept if entry.source else None
        columns = torch.tensor(source or range(entry.in_channels))
        assert isinstance(cut, QuantLayer)
        assert isinstance(masked, QuantLayer)
        assert torch.equal(cut.weight_codes(), masked.weight_codes()[rows][:, columns])


def test_norms_lose_the_same_channels() -> None:
    model = searchable()
    decide(model, 1)
    model.get_submodule("layer1.0.conv1").prune.hold((2,), -1)  # type: ignore[union-attr,operator]
    frozen = freeze(model)
    kept = plan_of(model).layer("layer1.0.conv1").kept
    assert kept is not None
    old, new = model.get_submodule("layer1.0.bn1"), frozen.get_submodule("layer1.0.bn1")
    assert isinstance(new, nn.BatchNorm2d)
    assert new.num_features == len(kept)
    for name, value in new.state_dict().items():
        expected = old.state_dict()[name]
        assert torch.equal(value, expected[list(kept)] if expected.dim() else expected)
    assert isinstance(frozen.get_submodule("layer1.0.bn2"), nn.BatchNorm2d)
    assert frozen.get_submodule("layer1.0.bn2").num_features == 16


def test_the_searchable_model_is_left_alone() -> None:
    model = searchable().eval()
    decide(model, 2)
    x = images("digits_resnet8")
    with torch.no_grad():
        before = model(x)
        frozen = freeze(model)
        for parameter in frozen.parameters():
            parameter.zero_()
        assert torch.equal(model(x), before)
    assert not frozen.training


def test_frozen_parameters_train() -> None:
    model = searchable().train()
    decide(model, 2)
    frozen = freeze(model)
    frozen(images("digits_resnet8")).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in frozen.parameters())
    assert not any("gate" in name or "alpha" in name for name in frozen.state_dict())


def hand_written(model: nn.Module, layer: str, **changes: Any) -> Plan:
    plan = plan_of(model)
    return replace(plan, layers=tuple(replace(e, **changes) if e.name == layer else e for e in plan.layers))


def test_a_hand_written_plan_through_json() -> None:
    model = searchable()
    plan = hand_written(model, "layer1.0.conv1", w_bits=3, a_bits=5, kept=(0, 5, 6, 15))
    frozen = freeze(model, Plan.from_json(plan.to_json()))
    layer = frozen.get_submodule("layer1.0.conv1")
    assert isinstance(layer, QuantConv2d)
    assert (layer.w_bits, layer.a_bits, layer.kept, layer.total_filters) == (3, 5, (0, 5, 6, 15), 16)
    assert torch.equal(layer.weight, model.get_submodule("layer1.0.conv1").weight[[0, 5, 6, 15]])  # type: ignore[index]
    assert plan_of(frozen) == plan
    assert Plan.from_json(plan_of(frozen).to_json()) == plan
    assert frozen(images("digits_resnet8")).shape == (4, 10)


def test_order_sources_and_input_sizes_are_the_models() -> None:
    model = searchable()
    plan = plan_of(model)
    shuffled = tuple(replace(entry, source=None, height=entry.height * 2) for entry in reversed(plan.layers))
    assert plan_of(freeze(model, Plan(shuffled))) == plan


def test_rebuilt_from_files() -> None:
    model = searchable()
    decide(model, 5)
    frozen = freeze(model).eval()
    torch.manual_seed(77)
    fresh = prepare(lbs.models.create("digits_resnet8"), images("digits_resnet8"))
    rebuilt = freeze(fresh, Plan.from_json(plan_of(frozen).to_json())).eval()
    rebuilt.load_state_dict(frozen.state_dict())
    assert torch.equal(rebuilt(images("digits_resnet8")), frozen(images("digits_resnet8")))


def test_a_frozen_model_can_be_frozen_again() -> None:
    model = searchable().eval()
    decide(model, 1)
    model.get_submodule("layer1.0.conv1").prune.hold((1,), -1)  # type: ignore[union-attr,operator]
    frozen = freeze(model)
    x = images("digits_resnet8")
    assert torch.equal(freeze(frozen)(x), frozen(x))
    kept = plan_of(frozen).layer("layer1.0.conv1").kept
    assert kept is not None
    twice = freeze(frozen, hand_written(frozen, "layer1.0.conv1", kept=kept[1:]))
    once = freeze(model, hand_written(frozen, "layer1.0.conv1", kept=kept[1:]))
    torch.testing.assert_close(twice(x), once(x))
    with pytest.raises(PlanError, match=r"keeps filters \[4, 5, 6, 7\] of layer1\.0\.conv1, which were cut before"):
        freeze(frozen, hand_written(frozen, "layer1.0.conv1", kept=None))


def test_uniform_models_take_plans_too() -> None:
    model = calibrate(
        uniform(lbs.models.create("digits_resnet8"), images("digits_resnet8"), 8, 8), [images("digits_resnet8")]
    )
    frozen = freeze(model, hand_written(model, "layer2.0.conv1", w_bits=2, kept=(1, 2)))
    assert plan_of(frozen).layer("layer2.0.conv1").kept == (1, 2)
    assert record_of(model).plan.layer("layer2.0.conv1").kept is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("layer1.0.conv1", {"filters": 32}, "layer1.0.conv1 has filters 16, the plan says 32"),
        ("layer1.0.conv1", {"in_channels": 8}, "has in_channels 16, the plan says 8"),
        ("layer1.0.conv1", {"kernel": (1, 1)}, "has kernel"),
        ("layer1.0.conv1", {"padding": (0, 0)}, "has padding"),
        ("layer1.0.conv1", {"kind": "linear"}, "has kind conv2d, the plan says linear"),
        ("layer1.0.conv2", {"kept": (0, 1)}, "prunes layer1.0.conv2, whose filters cannot go: its channels reach"),
        ("conv1", {"kept": (0, 1)}, "prunes conv1, whose filters cannot go"),
        ("fc", {"kept": (0, 1)}, "prunes fc, whose filters cannot go: it is no convolution"),
        ("layer1.0.conv1", {"kept": (0, 16)}, "kept filter 16 is outside 0..15"),
        ("layer1.0.conv1", {"kept": (-1, 3)}, "kept filter -1 is outside 0..15"),
        ("layer1.0.conv1", {"kept": ()}, "list at least one filter"),
        ("layer1.0.conv1", {"kept": (3, 3)}, "none twice"),
        ("layer1.0.conv1", {"w_bits": 9}, "w_bits=9"),
        ("layer1.0.conv1", {"a_bits": 0}, "a_bits=0"),
        ("layer1.0.conv1", {"w_bits": 32, "a_bits": 32}, "32 bits, but it was searched quantized"),
        ("conv1", {"a_bits": 4}, "gives the first layer conv1 4-bit inputs"),
        ("layer1.0.conv1", {"name": "layer1.9.conv1"}, r"layers layer1.0.conv1, layer1.9.conv1"),
    ],
)
def test_plans_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    model = searchable()
    with pytest.raises(PlanError) as seen:
        freeze(model, hand_written(model, name, **changes))
    assert message in str(seen.value)


def test_missing_and_doubled_layers_are_refused() -> None:
    model = searchable()
    plan = plan_of(model)
    with pytest.raises(PlanError, match=r"plan is a str; read one with lbs\.Plan\.load"):
        freeze(model, "plan.json")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="does not fit the model: layers conv1;"):
        freeze(model, Plan(plan.layers[1:]))
    with pytest.raises(PlanError, match="listed twice"):
        freeze(model, Plan((plan.layers[0], *plan.layers)))
    other = LayerPlan("fc", "linear", 8, 8, 4, 2)
    with pytest.raises(PlanError, match="does not fit the model"):
        freeze(model, Plan((other,)))
