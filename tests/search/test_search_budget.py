"""The budget: cost and its derivative, refusals, alternation, freezing at the hit, the final projection."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lbs.models
from lbs.config import SearchRun
from lbs.quant.calibrate import calibrate
from lbs.search.budget import Budget, parameter_groups
from lbs.search.freeze import freeze, plan_of
from lbs.search.gates import BitGate, PruneGate
from lbs.search.layers import SearchLayer
from lbs.search.prepare import SearchConfig, prepare
from lbs_kernels.errors import PlanError


def images(name: str = "digits_resnet8", count: int = 4, seed: int = 0) -> Tensor:
    shape = lbs.models.REGISTRY[name].input_shape
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def searchable(
    name: str = "digits_resnet8", config: SearchConfig | None = None, seed: int = 0, ties: bool = False
) -> nn.Module:
    """A calibrated searchable network whose gammas differ, unless `ties`."""
    torch.manual_seed(seed)
    model = lbs.models.create(name)
    if not ties:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 1.2)
    return calibrate(prepare(model, images(name)[:1], config), [images(name)]).train()


def layers_of(model: nn.Module) -> list[SearchLayer]:
    return [m for m in model.modules() if isinstance(m, SearchLayer)]


def scatter_gates(model: nn.Module, seed: int) -> None:
    """Close gates at random, some bit gates and some filter groups."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        gates = [layer.w_gate, getattr(layer.quantizer, "gate", None)]
        for gate in gates:
            if gate is not None:
                gate.close_to(int(torch.randint(0, len(gate.chain), (), generator=generator)))
        if layer.prune is not None:
            ordered = layer.prune.statistic.detach().sort().values
            with torch.no_grad():
                layer.prune.alpha.copy_(ordered[int(torch.randint(0, len(ordered) // 2, (), generator=generator))])


@pytest.mark.parametrize("seed", range(5))
def test_cost_equals_the_plan_under_hard_gates(seed: int) -> None:
    model = searchable()
    budget = Budget(model, bops=0.05)
    for _, gate, _ in budget.bit_gates():
        gate.active = True
    model(images())  # every gate has seen a batch
    scatter_gates(model, seed)
    assert len({(entry.w_bits, entry.a_bits, entry.kept_filters) for entry in plan_of(model).layers}) > 3
    for steps in (0, 1):
        budget.steps = steps
        budget._assign_sides()
        assert budget.cost().item() == plan_of(model).bops() == budget.value()


@pytest.mark.parametrize("weights", [True, False])
def test_derivative_equals_the_explicit_sum(weights: bool) -> None:
    """dR/d alpha = - s (1 - s) * pairs * (other side's hard bits) * (b_j - b_(j-1)) * product of the gates before."""
    model = searchable()
    budget = Budget(model, bops=0.05)
    budget.steps = 0 if weights else 1
    budget._assign_sides()
    model(images())
    grads = _gradients(budget)
    chain = (2, 4, 8)
    for entry in budget.plan.layers:
        layer = budget.layers[entry.name]
        gate = layer.w_gate if weights else getattr(layer.quantizer, "gate", None)
        if gate is None:
            continue
        other = layer.quantizer.bits if weights else layer.w_bits
        s = torch.sigmoid(gate.statistic.double() - gate.alpha.detach().double())
        increments = torch.tensor([chain[2] - chain[0], chain[2] - chain[1]], dtype=torch.float64)  # all open
        expected = -s * (1 - s) * increments * entry.problem().macs * other
        torch.testing.assert_close(grads[gate].double(), expected, rtol=1e-5, atol=0)
        idle = getattr(layer.quantizer, "gate", None) if weights else layer.w_gate
        assert idle not in grads


def test_derivative_of_pruning_reaches_the_layer_and_its_consumer() -> None:
    model = searchable()
    budget = Budget(model, bops=0.05)
    budget()
    grads = _gradients(budget)
    producer, consumer = budget.plan.layer("layer1.0.conv1"), budget.plan.layer("layer1.0.conv2")
    gate = budget.layers[producer.name].prune
    assert gate is not None
    s = torch.sigmoid(gate.statistic.detach() - gate.alpha.detach())
    filter_cost = 64 * (producer.problem().macs + consumer.problem().macs) / producer.filters
    expected = -(s * (1 - s)).sum() * gate.size * filter_cost
    torch.testing.assert_close(grads[gate], expected, rtol=1e-5, atol=0)


def _gradients(budget: Budget) -> dict[nn.Module, Tensor]:
    gates = [m for m in budget.model.modules() if isinstance(m, BitGate | PruneGate)]
    found = torch.autograd.grad(budget.cost(), [gate.alpha for gate in gates], allow_unused=True, retain_graph=True)
    return {gate: grad for gate, grad in zip(gates, found, strict=True) if grad is not None}


def test_term_is_strength_times_log_cost() -> None:
    budget = Budget(searchable(), bops=0.05, strength=0.7)
    assert budget().dtype == torch.float32
    assert budget().item() == pytest.approx(0.7 * math.log(budget.value()), rel=1e-6)


@pytest.mark.parametrize("bops", [0, 0.0, -1, -0.5, float("nan"), float("inf"), -float("inf"), "650M"])
def test_targets_that_are_no_positive_number_are_refused(bops: float) -> None:
    with pytest.raises(PlanError, match=r"budget bops=.*; give a fraction of full precision in \(0, 1\]"):
        Budget(searchable(), bops=bops)


def test_fractions_and_absolute_targets() -> None:
    model = searchable()
    full = plan_of(model).full_precision_bops()
    assert Budget(model, bops=0.03).target == 0.03 * full
    assert Budget(model, bops=1).target == full
    assert Budget(model, bops=3e6).target == 3e6


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.5])
@pytest.mark.parametrize("group", [3, 4])
def test_smallest_reachable_value_is_named_and_reached(group: int, ratio: float, ties: bool) -> None:
    model = searchable(config=SearchConfig(group_size=group, max_pruning_ratio=ratio), ties=ties)
    with pytest.raises(
        PlanError, match=r"budget 0\.001M BOPs is out of reach; the gates reach .*M BOPs at the least"
    ) as seen:
        Budget(model, bops=1000)
    floor = float(str(seen.value).split("the gates reach ")[1].split("M")[0]) * 1e6
    budget = Budget(model, bops=floor + 1000)
    result = budget.finish()
    assert result.value <= result.target
    assert plan_of(freeze(model)).bops() == result.value


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(PlanError, match="has no gates"):
        Budget(freeze(searchable()), bops=0.05)


@pytest.mark.parametrize("bops", [0.05, 0.03, 0.016, 0.008])
def test_projection_meets_the_target_closely(bops: float) -> None:
    model = searchable("cifar_resnet20")
    with torch.no_grad():
        for steps in (0, 1):  # each side looks at a batch
            budget = Budget(model, bops=bops)
            budget.steps = steps
            budget._assign_sides()
            model(images("cifar_resnet20", 2))
    result = budget.finish()
    assert 0.97 * result.target <= result.value <= result.target
    assert result.value == plan_of(freeze(model)).bops()
    assert "met" in str(result)
    assert f"{result.target / 1e6:.1f}M" in str(result)


def test_what_is_left_over_is_spent() -> None:
    model = searchable("cifar_resnet20", SearchConfig(pruning=False))
    budget = Budget(model, bops=0.03)
    for _, gate, _ in budget.bit_gates():
        gate.close_to(0)
    budget.freeze()  # far below the target
    assert budget.value() < 0.3 * budget.target
    result = budget.finish()
    assert 0.97 * result.target <= result.value <= result.target


def train(model: nn.Module, budget: Budget, steps: int) -> list[tuple[int, bool]]:
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01, gate_lr=0.02), lr=0.01, momentum=0.9, nesterov=True)
    rows = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(seed=seed)), torch.tensor([0, 1, 2, 3])) + budget()
        loss.backward()
        optimizer.step()
        budget.step()
        rows.append((budget.value(), budget.frozen))
    return rows


def test_sides_alternate_and_the_idle_one_stands_still() -> None:
    model = searchable()
    budget = Budget(model, bops=0.01, strength=1.0)
    for iteration in range(4):
        alphas = {id(gate): gate.alpha.detach().clone() for _, gate, _ in budget.bit_gates()}
        active = {id(gate) for _, gate, _ in budget.bit_gates() if gate.active}
        assert active == {id(gate) for _, gate, weights in budget.bit_gates() if weights == (iteration % 2 == 0)}
        train(model, budget, 1)
        moved = {
            id(gate) for _, gate, _ in budget.bit_gates() if not torch.equal(gate.alpha.detach(), alphas[id(gate)])
        }
        assert moved <= active
        # A threshold at 0 that is pulled further down stays there.
        assert all(not alphas[gate].all() for gate in active - moved)
        assert moved


def test_freezes_at_the_first_hit_and_stays() -> None:
    model = searchable(config=SearchConfig(pruning=False))
    budget = Budget(model, bops=0.045, strength=3.0)
    rows = train(model, budget, 40)
    values, frozen = [v for v, _ in rows], [f for _, f in rows]
    assert True in frozen
    hit = frozen.index(True)
    assert 0 < hit < 39
    assert all(value > budget.target for value in values[:hit])
    assert values[hit] <= budget.target
    assert set(values[hit:]) == {values[hit]}
    assert budget().item() == 0
    assert not any(gate.active for _, gate, _ in budget.bit_gates())
    assert budget.finish().value <= budget.target


def test_pressure_grows_until_the_hit() -> None:
    model = searchable()
    budget = Budget(model, bops=0.01, strength=0.1, gain=0.05)
    train(model, budget, 3)
    assert 0.1 < budget.strength <= 0.1 * 1.05**3 * (1 + 1e-9)


def test_a_resumed_budget_goes_on_where_it_was() -> None:
    model = searchable()
    budget = Budget(model, bops=0.04, strength=2.0)
    train(model, budget, 3)
    budget.finish()
    twin = searchable(seed=5)
    twin.load_state_dict(model.state_dict())
    resumed = Budget(twin, bops=0.04)
    resumed.load_state_dict(budget.state_dict())
    assert resumed.frozen
    assert (resumed.strength, resumed.steps) == (budget.strength, budget.steps)
    assert plan_of(twin) == plan_of(model)
    assert [(row.target, row.value) for row in resumed.finish().reached] == [
        (row.target, row.value) for row in budget.result().reached
    ]


def test_what_the_thresholds_reached_is_told_beside_the_result() -> None:
    for bops, word in ((0.014, "closed"), (0.03, "opened")):
        model = searchable()
        budget = Budget(model, bops=bops)
        model(images())
        scatter_gates(model, seed=1)  # 0.014 < cost < 0.03 of full precision
        before = budget.value()
        result = budget.finish()
        row = result.reached[0]
        assert row.thresholds == before != row.value
        assert (before > row.target) == (word == "closed")
        assert f"met; thresholds reached {before / 1e6:.1f}M BOPs, projection {word} the rest" in str(result)
        assert "thresholds" not in str(budget.result())  # gates that were closed without training


def test_a_loop_of_ones_own_has_the_numbers_of_the_command() -> None:
    model, usual = searchable(), SearchRun()
    budget = Budget(model, bops=0.05)
    assert [(c.integral, c.gain) for c in budget.controllers] == [(usual.strength, usual.gain)]
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, lr=0.1)}
    assert (rates["bit_gates"], rates["prune_gates"]) == (usual.gate_lr, usual.prune_lr)


def test_parameter_groups_hold_each_parameter_once() -> None:
    model = searchable()
    groups = {str(group["name"]): group for group in parameter_groups(model, lr=0.1, weight_decay=0.01)}
    held = [p for group in groups.values() for p in group["params"]]  # type: ignore[attr-defined]
    assert len(held) == len({id(p) for p in held})
    empty = {id(p) for p in model.parameters() if not p.numel()}
    assert {id(p) for p in held} - empty == {id(p) for p in model.parameters()} - empty
    for name in ("bit_gates", "prune_gates"):
        assert groups[name]["momentum"] == groups[name]["weight_decay"] == 0.0
    assert groups["weights"]["weight_decay"] == 0.01
    assert groups["scales"]["weight_decay"] == 0.0
    assert set(map(str, (g["name"] for g in parameter_groups(freeze(model), lr=0.1)))) == {"weights", "scales"}
