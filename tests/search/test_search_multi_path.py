"""The multi-path baseline: branches of their own, mixed by softmax, the same budget, one branch left in the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from search_grids import as_searched
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.models
from lbs.quant import codec
from lbs.quant.codec import CODINGS
from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.multi_path import BranchGate
from lbs.search.prepare import SearchConfig, prepare
from lbs_kernels.errors import PlanError

OWN = "convolutions"


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def searchable(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = SearchConfig(**{"multi_path": True, **options})
    model = prepare(lbs.models.create("digits_resnet8").to(dtype), images().to(dtype), config)
    return lbs.calibrate(model, [images().to(dtype)]).train()


@pytest.mark.parametrize("kind", ["unsigned", "signed", "weight"])
def test_the_mix_is_the_sum_over_separate_quantizers(kind: str) -> None:
    gate = BranchGate((2, 4, 8)).double()
    with torch.no_grad():
        gate.alpha.copy_(torch.tensor([0.03, -0.02, 0.09], dtype=torch.float64))
        gate.scale.copy_(torch.tensor([1.4, 1.0, 0.7], dtype=torch.float64))
    x, v = torch.randn(50, dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)
    y = gate.mix(x, v, CODINGS[kind])
    p = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64).exp()
    p /= p.sum()
    branches = [codec.round_trip(x, v * s, b, CODINGS[kind]) for s, b in zip((1.4, 1.0, 0.7), (2, 4, 8), strict=True)]
    torch.testing.assert_close(y, sum(pi * yi for pi, yi in zip(p, branches, strict=True)))
    weight = torch.randn(50, dtype=torch.float64)
    of_alpha, of_scale = torch.autograd.grad(y, (gate.alpha, gate.scale), weight)
    towards = torch.stack([(weight * yi).sum() for yi in branches])
    torch.testing.assert_close(of_alpha, 10 * p * (towards - (p * towards).sum()))  # T = .1
    assert (of_scale != 0).all()


def test_cost_is_the_expectation_over_branches() -> None:
    model = searchable(pruning=False)
    budget = Budget(model, bops=0.03)
    torch.manual_seed(1)
    for _, gate, _ in budget.bit_gates():
        nn.init.normal_(gate.alpha, std=0.1)
    expected = 0.0
    for entry in budget.plan.layers:
        layer = budget.layers[entry.name]
        w = layer.w_gate
        bits = float(((10 * w.alpha.detach()).softmax(0) * torch.tensor([2.0, 4.0, 8.0])).sum()) if w is not None else 8
        quantizer: Any = layer.quantizer
        other = (2, 4, 8)[int(quantizer.gate.alpha.argmax())] if hasattr(quantizer, "gate") else 8
        expected += entry.problem().macs * bits * other
    assert budget.cost().item() == pytest.approx(expected, rel=1e-6)  # a weight step: activations at their argmax


@pytest.mark.parametrize("multi_path", [True, "convolutions"])
def test_training_meets_the_target_and_leaves_one_branch(multi_path: bool | str) -> None:
    model = searchable(multi_path=multi_path)
    budget = Budget(model, bops=0.02, strength=4.0)
    groups = parameter_groups(model, lr=0.01, gate_lr=0.05)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    for seed in range(12):
        idle = {gate: gate.alpha.detach().clone() for _, gate, _ in budget.bit_gates() if not gate.active}
        optimizer.zero_grad()
        (F.cross_entropy(model(images(seed)), torch.arange(4)) + budget()).backward()
        optimizer.step()
        budget.step()
        assert all(torch.equal(gate.alpha, value) for gate, value in idle.items() if not budget.frozen)
    layer = model.get_submodule("layer1.0.conv1")
    assert (layer.w_gate.scale != 1).any()  # every branch learns a range of its own
    result = budget.finish()
    assert result.met
    frozen = freeze(model, as_searched(model)).eval()
    assert plan_of(frozen).bops() == result.value
    torch.testing.assert_close(frozen(images()), model.eval()(images()), rtol=1e-3, atol=1e-4)
    assert lbs.verify(frozen, lbs.pack(frozen), images()).ok


def test_every_width_is_computed_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """K_w + K_a quantized copies, where bit sharing computes two."""
    from lbs.quant import fake

    calls = {"weight": 0, "activation": 0}
    for name in calls:
        original = getattr(fake, f"fake_{name}")

        def counted(*args: Any, name: str = name, original: Any = original) -> Tensor:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(fake, f"fake_{name}", counted)
    model = searchable()
    calls.update(weight=0, activation=0)
    model(images())
    searched = sum(isinstance(m, BranchGate) for m in model.modules()) // 2
    assert calls == {"weight": 3 * searched + 2, "activation": 3 * searched + 1}


def test_a_convolution_a_branch_is_the_sum_of_them() -> None:
    """At equal weights what one convolution of the mix gives; every branch computes and learns its own."""
    cheap, dear = searchable(torch.float64, pruning=False), searchable(torch.float64, pruning=False, multi_path=OWN)
    for model in (cheap, dear):
        for _, gate, _ in Budget(model, bops=0.03).bit_gates():
            gate.alpha.data.copy_(torch.tensor([0.03, -0.02, 0.09], dtype=torch.float64))
    x = images().double()
    torch.testing.assert_close(dear(x), cheap(x))
    layer, one = dear.get_submodule("layer2.0.conv2"), cheap.get_submodule("layer2.0.conv2")
    calls: list[Tensor] = []
    inner = layer.product

    def counted(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(weight)
        return inner(source, weight, bias)

    layer.product = counted
    dear(x).square().sum().backward()
    cheap(x).square().sum().backward()
    assert len(calls) == 3
    assert len({id(layer.path_weight(level)) for level in range(3)}) == 3
    torch.testing.assert_close(sum(layer.path_weight(level).grad for level in range(3)), one.weight.grad)
    p = layer.w_gate.weights().detach()
    with torch.no_grad():
        for level in range(3):
            layer.path_weight(level).mul_(level + 2)  # standardised away
            layer.path_weight(level)[0, 0, 0, 0] += 0.1 * (level + 1)
    source = torch.rand(2, layer.in_channels, 4, 4, dtype=torch.float64)
    calls.clear()
    y = layer(source)
    torch.testing.assert_close(y, sum(p[k] * inner(layer.quantizer(source), calls[k], None) for k in range(3)))
    assert not torch.equal(calls[0], calls[1])


def test_the_weights_of_the_branch_that_is_left_stay() -> None:
    model = searchable(multi_path=OWN)
    layer = model.get_submodule("layer1.0.conv2")
    with torch.no_grad():
        for level in range(3):
            layer.path_weight(level).fill_(level + 1.0)
    layer.w_gate.close_to(1)
    kept = freeze(model).get_submodule("layer1.0.conv2")
    assert kept.w_bits == 4
    assert (kept.weight == 2).all()
    with pytest.raises(PlanError, match="multi_path='all' is unknown"):
        SearchConfig(multi_path="all")  # type: ignore[arg-type]


def test_one_step_of_the_budget_does_not_decide() -> None:
    """The widest branch begins ahead, so that data has a say before the first width falls."""
    model = searchable()
    budget = Budget(model, bops=0.02, strength=1.4)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.001, gate_lr=0.006, prune_lr=0.05), lr=0.001)
    before = budget.value()
    (F.cross_entropy(model(images()), torch.arange(4)) + budget()).backward()
    optimizer.step()
    budget.step()
    assert budget.value() == before
    assert not budget.frozen
