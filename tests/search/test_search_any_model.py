"""Models as people have them: shared and tied layers, tokens, blocks, EMA, hooks, copies, memory formats, autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from search_grids import as_searched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lbs
import lbs.models
from lbs.graph import record_of
from lbs.models.cifar_resnet import BasicBlock
from lbs.models.mobilenet_v2 import InvertedResidual
from lbs.models.preresnet import PreActBlock
from lbs.models.resnet import Bottleneck
from lbs.quant.layers import QuantLayer
from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import SearchLayer
from lbs.search.prepare import SearchConfig, prepare, uniform


def images(size: int = 4, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(size, channels, 8, 8, generator=torch.Generator().manual_seed(size)).to(dtype)


class _Blocks(nn.Module):
    """Stem, one block of the wanted kind, classifier."""

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block, self.fc = block, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.block(F.relu(self.norm(self.stem(x))))), 1).flatten(1))


def kinds() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "basic": _Blocks(BasicBlock(8, 16, 2), 16),
        "bottleneck": _Blocks(Bottleneck(8, 8, 2), 32),
        "pre-activation": _Blocks(PreActBlock(8, 16, 2), 16),
        "inverted residual": _Blocks(InvertedResidual(8, 8, 1, 3), 8),
    }


def train(model: nn.Module, budget: Budget, steps: int, x: Tensor, amp: bool = False, **options: Any) -> Any:
    groups = parameter_groups(model, lr=0.01, gate_lr=0.006, prune_lr=0.05)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    labels = torch.arange(len(x)) % 5
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            task = F.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        (task + budget()).backward()
        optimizer.step()
        budget.step()
    return optimizer


PRUNABLE = {"basic": 1, "bottleneck": 2, "pre-activation": 1, "inverted residual": 1}


@pytest.mark.parametrize("kind", PRUNABLE)
def test_blocks_are_searched_frozen_and_packed_equal(kind: str) -> None:
    x = images(8)
    model = lbs.calibrate(prepare(kinds()[kind], x, SearchConfig(group_size=4)), [x]).train()
    budget = Budget(model, bops=0.03)
    assert len(budget.prune_gates()) == PRUNABLE[kind]
    train(model, budget, 2, x)
    for gate in budget.prune_gates():
        gate.hold((int(gate.statistic.argmin()),), -1)
    budget.finish()
    frozen = lbs.calibrate(freeze(model), [x], bits=None).eval()
    packed = lbs.pack(frozen)
    report = lbs.verify(frozen, packed, x)
    assert report.ok, report


class _Shared(nn.Module):
    """One convolution called twice at one size, and two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(F.relu(self.other(F.relu(self.one(x)))))


def test_a_layer_called_twice_counts_twice_with_one_set_of_gates() -> None:
    torch.manual_seed(2)
    x = images()
    model = lbs.calibrate(prepare(_Shared(), x), [x]).train()
    entry = plan_of(model).layer("twice")
    assert entry.positions == 2
    assert plan_of(model).macs(entry) == 2 * 9 * 8 * 8 * 64
    budget = Budget(model, bops=0.05)
    assert [name for name, _, _ in budget.bit_gates()].count("twice") == 2
    train(model, budget, 2, x)
    budget.finish()
    frozen = freeze(model).eval()
    torch.testing.assert_close(frozen(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert lbs.verify(frozen, lbs.pack(frozen), x).ok


def test_tied_weights_stay_tied() -> None:
    model = lbs.calibrate(prepare(_Shared(), images()), [images()]).train()
    assert model.one.weight is model.other.weight
    train(model, Budget(model, bops=0.05), 1, images())
    frozen = freeze(model)
    assert frozen.one.weight is frozen.other.weight
    assert frozen.one.weight is not model.one.weight
    twin = copy.deepcopy(frozen)
    assert twin.one.weight is twin.other.weight
    assert len(list(frozen.parameters())) == len({id(p) for p in frozen.parameters()})


class _TiedConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))
        self.fc = nn.Linear(8, 5)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.a, self.b, self.c, self.d):
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


def test_filters_of_tied_weights_are_kept() -> None:
    model = prepare(_TiedConvs(), images())
    reasons = {group.producer: group.reason for group in record_of(model).groups if not group.prunable}
    assert "b and c share their weights" in reasons["b"]
    assert "b and c share their weights" in reasons["c"]


class _Tokens(nn.Module):
    """A linear layer over 16 tokens, and one over the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.fc = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.relu(self.embed(x)).flatten(2).transpose(1, 2)
        return self.fc(F.relu(self.mix(tokens)).mean(1))


def test_linear_layers_count_their_positions() -> None:
    x = images()
    model = lbs.calibrate(prepare(_Tokens(), x, SearchConfig(pruning=False)), [x]).train()
    plan = plan_of(model)
    assert [plan.macs(plan.layer(name)) for name in ("embed", "mix", "fc")] == [16 * 12 * 8, 16 * 64, 40]
    budget = Budget(model, bops=0.05)
    train(model, budget, 2, x)
    result = budget.finish()
    assert result.value == plan_of(freeze(model)).bops() <= result.target


def digits(**options: Any) -> Any:
    torch.manual_seed(0)
    x = images(4, 1)
    return lbs.calibrate(prepare(lbs.models.create("digits_resnet8"), x, SearchConfig(**options)), [x]).train()


@pytest.mark.parametrize("stage", ["searchable", "frozen", "uniform"])
def test_exponential_moving_averages(stage: str) -> None:
    """Copies follow the weights; a plan of the original applies to the average of a searchable model."""
    model = digits()
    if stage == "frozen":
        model = freeze(model)
    elif stage == "uniform":
        model = lbs.calibrate(uniform(lbs.models.create("digits_resnet8"), images(4, 1), 4, 4), [images(4, 1)])
    model.train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    if stage == "searchable":
        budget = Budget(model, bops=0.03)
        train(model, budget, 2, images(4, 1))
        average.update_parameters(model)
        budget.finish()
        frozen = freeze(average.module, plan_of(model))
        assert plan_of(frozen).bops() <= budget.target
        average.module = frozen
    else:
        before = average.module.fc.weight.detach().clone()
        with torch.no_grad():
            model.fc.weight.add_(1.0)
        average.update_parameters(model)
        torch.testing.assert_close(average.module.fc.weight, before + 0.5)
    average.eval()
    assert lbs.verify(average.module, lbs.pack(average.module), images(4, 1)).ok


def test_a_budget_is_made_after_the_model_moved() -> None:
    model = digits().double()  # stands for another device: what is no buffer stays behind
    budget = Budget(model, bops=0.02)
    assert {gate.statistic.dtype for gate in budget.prune_gates()} == {torch.float64}


def test_evaluating_leaves_a_budget_that_can_be_differentiated() -> None:
    model = digits()
    budget = Budget(model, bops=0.02)
    train(model, budget, 1, images(4, 1))
    with torch.inference_mode():
        model.eval()(images(4, 1))
    gate = budget.prune_gates()[0]
    assert len(gate.kept()) == gate.filters
    budget.cost().backward()
    assert gate.alpha.grad is not None


def test_a_searched_model_is_restored_by_its_state_dict() -> None:
    model = digits()
    budget = Budget(model, bops=0.016)
    train(model, budget, 2, images(4, 1))
    budget.prune_gates()[0].hold((0,), -1)
    budget.finish()
    other = digits()
    other.load_state_dict(model.state_dict())
    assert plan_of(other) == plan_of(model)
    assert plan_of(other).bops() == budget.value()
    assert any(entry.kept_filters < entry.filters for entry in plan_of(model).layers)
    assert torch.equal(other.eval()(images(4, 1)), model.eval()(images(4, 1)))


@pytest.mark.parametrize("buffers", [False, True])
def test_an_average_follows_the_gates_of_a_search(buffers: bool) -> None:
    model = digits().train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    budget = Budget(model, bops=0.02)
    train(model, budget, 2, images(4, 1))
    budget.prune_gates()[0].hold((0,), -1)
    budget.finish()
    for _ in range(40):  # .9^40 < .02: every gate is past the half
        average.update_parameters(model)
    average.eval()
    assert plan_of(average.module) == plan_of(model)
    frozen = freeze(average.module, as_searched(average.module)).eval()
    torch.testing.assert_close(frozen(images(4, 1)), average(images(4, 1)), rtol=1e-4, atol=1e-5)
    assert lbs.verify(frozen, lbs.pack(frozen), images(4, 1)).ok


def test_copies_of_searchable_and_frozen_models_compute_the_same_and_train_apart() -> None:
    model = digits()
    for source in (model, freeze(model)):
        twin = copy.deepcopy(source)
        assert torch.equal(twin.eval()(images(2, 1)), source.eval()(images(2, 1)))
        twin.train()
        twin(images(4, 1)).sum().backward()
        assert all(p.grad is None for p in source.parameters())
        own = {id(p) for p in source.parameters()}
        assert not own & {id(p) for p in twin.parameters()}


def test_hooks_serve_before_and_after_freezing() -> None:
    torch.manual_seed(0)
    calls: list[str] = []
    float_model = lbs.models.create("digits_resnet8")
    layer: Any = float_model.get_submodule("layer1.0.conv1")
    layer.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    layer.register_forward_hook(lambda m, a, y: calls.append("post"))
    layer.register_full_backward_hook(lambda m, gi, go: calls.append("back"))
    model = lbs.calibrate(prepare(float_model, images(2, 1)), [images(2, 1)])
    for network in (model, freeze(model)):
        calls.clear()
        network.train()(images(2, 1)).sum().backward()
        assert calls == ["pre", "post", "back"]


@pytest.mark.parametrize("amp", [False, True])
def test_memory_formats_and_autocast_train_alike(amp: bool) -> None:
    """channels_last changes no decision; only the order of sums."""
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = digits().to(memory_format=layout)
        budget = Budget(model, bops=0.02, strength=1.0, gain=0.01)
        train(model, budget, 2, images(4, 1).to(memory_format=layout), amp)
        statistics = torch.cat([gate.statistic for _, gate, _ in budget.bit_gates()])
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        rows.append((statistics, plan_of(model).bops()))
    torch.testing.assert_close(rows[0][0], rows[1][0], rtol=2e-2 if amp else 1e-4, atol=1e-4 if amp else 1e-6)
    assert rows[0][1] == rows[1][1]


def test_patterns_exclude_layers_and_the_rest_is_searched() -> None:
    model = digits(exclude=("layer1.*", "*.downsample*"))
    left = dict(record_of(model).unconverted)
    assert {name for name in left if name.startswith("layer1.")} == {"layer1.0.conv1", "layer1.0.conv2"}
    assert set(left.values()) == {"excluded by name"}
    train(model, Budget(model, bops=0.05), 1, images(4, 1))
    assert not isinstance(freeze(model).get_submodule("layer1.0.conv1"), QuantLayer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pruning", [False, True])
def test_one_width_is_the_uniform_baseline(bits: int, pruning: bool) -> None:
    torch.manual_seed(0)
    x, float_model = images(4, 1), lbs.models.create("digits_resnet8")
    searched = lbs.calibrate(prepare(float_model, x, SearchConfig(bits=(bits,), pruning=pruning)), [x], norms="keep")
    plain = lbs.calibrate(uniform(float_model, x, bits, bits), [x], norms="keep")
    assert not any(layer.w_gate for layer in searched.modules() if isinstance(layer, SearchLayer))
    assert plan_of(searched).bops() == plan_of(plain).bops()
    # Norms of a network without gates round as deployed while ranges are looked for: those differ in their last bit.
    torch.testing.assert_close(freeze(searched).eval()(x), plain.eval()(x), rtol=0, atol=1e-5)
    if pruning:
        result = Budget(searched, bops=0.75 * plan_of(searched).bops()).finish()
        assert result.met
        assert {e.w_bits for e in plan_of(searched).layers} <= {bits, 8}
