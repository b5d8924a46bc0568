"""Pruning: gradients through A_c, what ranks filters, tiles, float networks, and hidden channels behind depthwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_grids import as_searched
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.models
from lbs.models.mobilenet_v2 import InvertedResidual
from lbs.search.budget import Budget
from lbs.search.freeze import freeze, plan_of
from lbs.search.gates import PruneGate
from lbs.search.importance import IMPORTANCE
from lbs.search.layers import SearchLayer
from lbs.search.prepare import SearchConfig, conversion_report, prepare
from lbs_kernels.errors import PlanError


def net(bias: bool = False) -> nn.Sequential:
    """Stem, a prunable convolution with norm, its consumer, classifier."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    nn.init.uniform_(made[3].weight, 0.2, 1.5)
    nn.init.uniform_(made[3].bias, 0.1, 0.5)
    return made


def batch(dtype: torch.dtype = torch.float64, size: int = 3) -> Tensor:
    return torch.rand(size, 3, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def searchable(importance: str, bits: tuple[int, ...] = (32,), dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    config = SearchConfig(bits=bits, group_size=3, importance=importance, max_pruning_ratio=0.75, **more)
    made = prepare(net().to(dtype), batch(dtype), config)
    return lbs.calibrate(made, [batch(dtype)]).train()


class _Step(torch.autograd.Function):
    """1(A > alpha), slope of the sigmoid to both (LBS eq. 13-15), written apart from the product's."""

    @staticmethod
    def forward(ctx, statistic, alpha):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(statistic, alpha)
        return (statistic > alpha).to(statistic)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        statistic, alpha = ctx.saved_tensors
        e = torch.exp(alpha - statistic)
        slope = grad * e / (1 + e) ** 2
        return slope, -slope.sum()


def explicit(model: Any, x: Tensor, importance: str, alpha: Tensor) -> Tensor:
    """The masked network, literally: the mask multiplies the activation behind norm and ReLU."""
    conv, norm, consumer = model[2], model[3], model[5]
    if importance == "gamma":
        score = norm.weight.abs() / norm.weight.detach().abs().max()
    else:
        score = torch.stack([w.abs().mean() for w in conv.weight]) / conv.weight.detach().abs().max()
    groups = torch.stack([score[3 * c : 3 * c + 3].mean() for c in range(4)])
    mask = torch.cat([gate.expand(3) for gate in _Step.apply(groups, alpha)])
    hidden = F.relu(norm(conv.product(conv.quantizer(F.relu(model[0](x))), conv.quantized_weight(), conv.bias)))
    gate, consumer.input_gate = consumer.input_gate, []
    masked = consumer.quantizer(hidden) * mask.view(1, -1, 1, 1)
    y = consumer.product(masked, consumer.quantized_weight(), consumer.bias)
    consumer.input_gate = gate
    return model[9](F.relu(y).mean((2, 3)))


@pytest.mark.parametrize("importance", ["magnitude", "gamma"])
@pytest.mark.parametrize("bits", [(32,), (4,)], ids=str)
def test_task_gradient_reaches_alpha_and_what_ranks_the_filters(importance: str, bits: tuple[int, ...]) -> None:
    model = searchable(importance, bits, standardize="none")  # standardising looks at the mask, without a gradient
    gate, weight = model[2].prune, torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        gate.alpha.copy_(gate.statistic.sort().values[:2].mean())
    wanted = [model[2].weight, model[3].weight, model[5].weight]
    twin = gate.alpha.detach().clone().requires_grad_()
    # `explicit` reads the mask of the last layer, which belongs to this iteration's graph.
    got = torch.autograd.grad(model(batch()), [*wanted, gate.alpha], weight, retain_graph=True)
    expected = torch.autograd.grad(explicit(model, batch(), importance, twin), [*wanted, twin], weight)
    assert sum(gate.gates().tolist()) == 3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    closed = slice(3 * int(gate.gates().argmin()), 3 * int(gate.gates().argmin()) + 3)
    through_a = got[1] if importance == "gamma" else got[0].flatten(1).abs().sum(1)
    assert (through_a[closed] != 0).all()  # a closed filter has no other path


def test_taylor_is_the_first_order_change_of_cutting_the_filter() -> None:
    model = searchable("taylor")
    gate = model[2].prune
    seen: list[Tensor] = []
    model[4].register_forward_hook(lambda m, a, y: (y.retain_grad(), seen.append(y))[1])
    model(batch()).square().sum().backward()
    expected = (seen[0] * seen[0].grad).sum((0, 2, 3)).abs()  # type: ignore[operator]
    torch.testing.assert_close(gate.score, 0.1 * expected.to(gate.score))
    model[2].observe_filters()
    torch.testing.assert_close(gate.statistic, (expected / expected.max()).view(4, 3).mean(1).to(gate.statistic))


def test_activation_ranks_by_the_mean_behind_norm_and_relu() -> None:
    model = searchable("activation")
    seen: list[Tensor] = []
    model[4].register_forward_hook(lambda m, a, y: seen.append(y))
    model(batch())
    torch.testing.assert_close(model[2].prune.score, 0.1 * seen[0].mean((0, 2, 3)).to(model[2].prune.score))
    model.eval()
    model(batch())
    torch.testing.assert_close(model[2].prune.score, 0.1 * seen[0].mean((0, 2, 3)).to(model[2].prune.score))


@pytest.mark.parametrize("importance", sorted(IMPORTANCE))
def test_every_rule_trains_freezes_and_survives_saving(importance: str) -> None:
    model = searchable(importance, (2, 4, 8), torch.float32)
    budget = Budget(model, bops=0.012)
    optimizer = torch.optim.SGD(lbs.search.budget.parameter_groups(model, lr=0.01), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (F.cross_entropy(model(batch(torch.float32)), torch.tensor([0, 1, 2])) + budget()).backward()
        optimizer.step()
        budget.step()
    gate = model[2].prune
    assert gate.statistic.max() <= 1
    assert len(set(gate.statistic.tolist())) == 4
    twin = searchable(importance, (2, 4, 8), torch.float32)
    twin.load_state_dict(model.state_dict())
    twin[2].observe_filters()
    assert torch.equal(twin[2].prune.statistic, gate.statistic)
    assert budget.finish().met
    assert freeze(model)(batch(torch.float32)).isfinite().all()


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 2, 4, 6, 8]), st.floats(0, 0.95), st.data())
def test_kept_counts_are_multiples_of_the_tile(blocks: int, size: int, tile: int, ratio: float, data: Any) -> None:
    """For any threshold, ties included, and the cap holds as well."""
    import math

    filters = blocks * math.lcm(size, tile)
    gate = PruneGate(filters, size, ratio, tile)
    gate.statistic = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=gate.groups,
                                                     max_size=gate.groups)))  # fmt: skip
    with torch.no_grad():
        gate.alpha.fill_(data.draw(st.floats(0, 2)))
    kept = gate.kept()
    assert kept
    assert len(kept) % tile == 0
    assert len(kept) >= (1 - ratio) * filters - 1e-6
    weakest_kept = gate.statistic[gate.gates() > 0].min()
    assert (gate.statistic[gate.gates() == 0] <= weakest_kept).all()


def test_layers_that_cannot_keep_a_multiple_of_the_tile_keep_all() -> None:
    model = prepare(net(), batch(torch.float32), SearchConfig(group_size=4, filter_tile=8))
    assert "filters kept: 12 are no multiple of 8, the smallest one" in dict(conversion_report(model))["2"]
    assert prepare(net(), batch(torch.float32), SearchConfig(group_size=4, filter_tile=6))[2].prune.unit == 3  # type: ignore


def test_a_threshold_above_everything_leaves_one_group() -> None:
    model = searchable("gamma")
    gate = model[2].prune
    with torch.no_grad():
        gate.alpha.fill_(1e9)
    assert len(gate.kept()) == 3
    assert model(batch()).isfinite().all()


class TestFloatPruning:
    """bits=(32,): only filters are searched, bit operations count 32 x 32."""

    def test_full_precision_is_counted(self) -> None:
        model = prepare(lbs.models.create("preresnet20"), lbs.models.example("preresnet20"), SearchConfig(bits=(32,)))
        assert plan_of(model).bops() == plan_of(model).full_precision_bops()
        assert f"{plan_of(model).bops() / 1e6:.1f}" == "41798.6"

    def test_the_published_target_is_within_reach_and_hit(self) -> None:
        config = SearchConfig(bits=(32,), group_size=4)
        model = prepare(lbs.models.create("preresnet20"), lbs.models.example("preresnet20"), config)
        result = Budget(model, bops=28586.5e6).finish()
        assert 0.97 * result.target <= result.value <= result.target
        assert all(entry.w_bits == entry.a_bits == 32 for entry in plan_of(model).layers)

    def test_masked_equals_cut_and_the_rest_is_plain_torch(self) -> None:
        model = searchable("gamma").eval()
        model[2].prune.hold((1, 3), -1)
        frozen = freeze(model)
        assert type(frozen[2]) is nn.Conv2d  # type: ignore[index]
        assert frozen[5].weight.shape == (6, 6, 3, 3)  # type: ignore[index,union-attr]
        torch.testing.assert_close(frozen(batch()), model(batch()), rtol=1e-12, atol=1e-12)
        assert plan_of(frozen) == plan_of(model)
        again = freeze(prepare(frozen, batch(), SearchConfig(pruning=False)))  # two stages: prune, then quantize
        assert plan_of(again).bops() == 64 / 1024 * plan_of(frozen).bops()

    def test_weights_and_norms_are_those_of_the_float_network(self) -> None:
        model = searchable("gamma").eval()
        torch.testing.assert_close(model(batch()), net().double().eval()(batch()), rtol=1e-12, atol=1e-12)


class _Mobile(nn.Module):
    """Two inverted residuals, one of them with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.down, self.same = InvertedResidual(8, 12, 2, 3), InvertedResidual(12, 12, 1, 2)
        self.head = nn.Sequential(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.head(self.same(self.down(self.stem(x)))), 1).flatten(1))


def mobile(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(1)
    model = _Mobile().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 1.3)
            nn.init.uniform_(module.bias, 0.1, 0.6)  # a cut hidden channel is not zero behind the depthwise norm
    config = SearchConfig(group_size=4, **options)
    return lbs.calibrate(prepare(model, batch(dtype), config), [batch(dtype, 8)])


def test_hidden_channels_go_together() -> None:
    model = mobile().eval()
    report = dict(conversion_report(model))
    assert report["down.conv.0.0"].endswith("filters in 6 groups")
    assert report["down.conv.1.0"].endswith("filters go with those before it")
    model.down.conv[0][0].prune.hold((0, 4), -1)
    model.same.conv[0][0].prune.hold((2,), -1)
    plan = plan_of(model)
    assert plan.layer("down.conv.1.0").kept == plan.layer("down.conv.0.0").kept
    frozen = freeze(model, as_searched(model))
    assert frozen.down.conv[1][0].weight.shape == (16, 1, 3, 3)  # type: ignore[union-attr,index]
    assert frozen.down.conv[1][0].groups == 16  # type: ignore[union-attr,index]
    assert frozen.down.conv[1][1].num_features == 16  # type: ignore[union-attr,index]
    assert frozen.down.conv[2].weight.shape[1] == 16  # type: ignore[union-attr,index]
    torch.testing.assert_close(frozen(batch()), model(batch()), rtol=1e-9, atol=1e-9)
    assert plan_of(frozen).bops() == plan.bops()


def test_cost_of_a_cut_depthwise_layer_is_that_of_the_network_that_is_left() -> None:
    model = mobile(torch.float32, bits=(32,))
    model.down.conv[0][0].prune.hold((0, 4), -1)
    frozen = freeze(model)
    counted = lbs.cost.network_layers(frozen, batch(torch.float32)[:1])
    assert counted.full_precision_bops() == plan_of(model).bops() < plan_of(model).full_precision_bops()


def test_depthwise_cost_follows_the_kept_channels() -> None:
    model = mobile().train()
    budget = Budget(model, bops=0.05)
    gate = model.down.conv[0][0].prune
    model(batch())
    (grad,) = torch.autograd.grad(budget.cost(), gate.alpha)
    macs = [budget.plan.macs(budget.plan.layer(f"down.conv.{name}")) for name in ("0.0", "1.0", "2")]
    s = torch.sigmoid(gate.statistic.detach())
    expected = -(s * (1 - s)).sum() * gate.size * 64 * sum(macs) / 24
    torch.testing.assert_close(grad, expected.to(grad), rtol=1e-6, atol=0)


def test_packed_inverted_residuals_verify_equal() -> None:
    model = mobile(torch.float32, bits=(2, 4, 8))
    result = Budget(model, bops=0.03).finish()
    assert result.met
    model.down.conv[0][0].prune.hold((1,), -1)
    frozen = freeze(model).eval()
    packed = lbs.pack(frozen)
    assert not packed.kept_float or all("pool" in name for name, _ in packed.kept_float)
    assert lbs.verify(frozen, packed, batch(torch.float32, 4)).ok


def test_plans_that_separate_a_depthwise_layer_are_refused() -> None:
    from dataclasses import replace

    model = mobile()
    plan = plan_of(model)
    alone = [replace(e, kept=(0, 1)) if e.name == "down.conv.1.0" else e for e in plan.layers]
    with pytest.raises(PlanError, match=r"down\.conv\.1\.0.*live and die together"):
        freeze(model, replace(plan, layers=tuple(alone)))
    leader = [replace(e, kept=(0, 1)) if e.name == "down.conv.0.0" else e for e in plan.layers]
    assert plan_of(freeze(model, replace(plan, layers=tuple(leader)))).layer("down.conv.1.0").kept == (0, 1)


def test_searched_layers_of_mobilenet_v2() -> None:
    model = prepare(lbs.models.create("mobilenet_v2"), torch.zeros(1, 3, 32, 32), SearchConfig(bits=(8,)))
    layers = [m for m in model.modules() if isinstance(m, SearchLayer)]
    assert sum(bool(layer.through_gate) for layer in layers) == 16
    assert sum(layer.prune is not None for layer in layers) > 16
