"""Budgets of size and latency, several at once, and projections: at most the target and within 3 %, or said why not."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.models
from lbs import cost
from lbs.plan import Plan
from lbs.search import projection
from lbs.search.baselines import evenly_pruned, project, two_stage
from lbs.search.budget import Budget, parameter_groups
from lbs.search.controller import Controller
from lbs.search.freeze import freeze, plan_of
from lbs.search.ledger import NOISE
from lbs.search.prepare import SearchConfig, prepare
from lbs.search.quantities import Quantity, packed_bytes, seconds
from lbs_kernels.errors import PlanError
from lbs_kernels.program.problem import Problem


def images(count: int = 4, seed: int = 0, name: str = "cifar_resnet20") -> Tensor:
    shape = (1, 8, 8) if name == "digits_resnet8" else (3, 16, 16)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def searchable(name: str = "cifar_resnet20", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = lbs.models.create(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.2)
    x = images(name=name)
    return lbs.calibrate(prepare(model, x[:1], SearchConfig(**options)), [x]).train()


def made_up(problem: Problem) -> float:
    """Seconds that grow with the work, with an offset a layer and steps of 8 filters, as measured ones do."""
    filters = -(-problem.out_channels // 8) * 8
    work = problem.macs / problem.out_channels * filters
    return 2e-6 + work * (0.4 + 0.1 * problem.w_bits * problem.a_bits / 16) * 1e-11


def total(quantity: Quantity, plan: Plan) -> float:
    """A quantity of a plan, layer by layer with the channels that live."""
    kept = (layer.problem(plan.kept_inputs(layer), layer.kept_filters) for layer in plan.layers)
    return quantity.constant + sum(map(quantity.price, kept))


def plan_bytes(model: nn.Module) -> int:
    return total(Quantity("bytes", "", 1.0, cost.weight_bytes), plan_of(model))


def plan_seconds(model: nn.Module) -> float:
    return total(Quantity("seconds", "", 1.0, made_up), plan_of(model))


def look(model: nn.Module, budget: Budget) -> None:
    """Both sides see a batch."""
    with torch.no_grad():
        for steps in (0, 1):
            budget.steps = steps
            budget._assign_sides()
            model(images(2))


@pytest.mark.parametrize("share", [0.55, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.8, 0.35))])
def test_size_is_that_of_the_packed_planes(share: float) -> None:
    model = searchable()
    budget = Budget(model, size_mb=share * plan_bytes(model) / 1e6)
    look(model, budget)
    result = budget.finish()
    assert 0.97 * result.target <= result.value == plan_bytes(freeze(model)) <= result.target
    packed = lbs.pack(lbs.calibrate(freeze(model), [images()], bits=None).eval())
    assert packed.packed_bytes >= result.value  # with norms and scales of the epilogues


@pytest.mark.parametrize("share", [0.7, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.85, 0.6))])
def test_latency_comes_from_the_table(share: float) -> None:
    model = searchable()
    budget = Budget(model, latency_ms=share * plan_seconds(model) * 1e3, table=made_up)
    look(model, budget)
    result = budget.finish()
    assert 0.97 * result.target <= result.value <= result.target
    assert result.value == pytest.approx(plan_seconds(freeze(model)), rel=1e-12)


def slow_in_the_middle(problem: Problem) -> float:
    """Seconds by which four bits are slower than eight, two faster, and filters count by tiles of eight."""
    filters = -(-problem.out_channels // 8) * 8
    rate = {2: 0.6, 4: 1.5, 8: 1.0}
    return 1e-6 + problem.macs / problem.out_channels * filters * rate[problem.w_bits] * rate[problem.a_bits] * 1e-11


def test_a_width_that_is_slower_than_the_one_above_is_stepped_over() -> None:
    model = searchable()
    budget = Budget(model, latency_ms=1.0, table=slow_in_the_middle)
    quantity = budget.targets[0].quantity
    floor = budget.ledger.floor(quantity)
    look(model, budget)
    tight = Budget(model, latency_ms=1.0001 * floor / 1e-3, table=slow_in_the_middle)
    assert tight.finish().met
    searched = [entry for entry in plan_of(model).layers if (entry.w_bits, entry.a_bits) != (8, 8)]
    assert searched
    assert {bits for entry in searched for bits in (entry.w_bits, entry.a_bits)} <= {2, 8}
    with pytest.raises(PlanError, match="out of reach"):
        Budget(model, latency_ms=0.999 * floor / 1e-3, table=slow_in_the_middle)


@pytest.mark.parametrize(("gain", "pays"), [(0.6 * NOISE, False), (2.0 * NOISE, True)])
def test_bits_that_are_faster_by_no_more_than_measurements_differ_are_no_reason(gain: float, pays: bool) -> None:
    """Filters are there to be cut as well, so the target is within reach of both."""

    def nearly_alike(problem: Problem) -> float:
        return problem.macs * 1e-11 * (1.0 if problem.w_bits == problem.a_bits == 8 else 1.0 - gain)

    model = searchable()
    full = Budget(model, latency_ms=1000.0, table=nearly_alike)
    look(model, full)
    result = Budget(model, latency_ms=0.9 * full.ledger.total(full.targets[0].quantity) / 1e-3, table=nearly_alike)
    outcome = result.finish()
    plan = plan_of(model)
    narrow = [entry for entry in plan.layers if (entry.w_bits, entry.a_bits) != (8, 8)]
    assert outcome.met
    assert bool(narrow) == pays
    assert any(entry.kept is not None for entry in plan.layers) or pays


def together(problem: Problem) -> float:
    """Seconds that fall only where weights and activations have two bits both, as on one-bit tensor cores."""
    return 1e-6 + problem.macs * (0.2 if (problem.w_bits, problem.a_bits) == (2, 2) else 1.0) * 1e-11


def four_is_fastest(problem: Problem) -> float:
    rate = {2: 1.5, 4: 0.6, 8: 1.0}
    return 1e-6 + problem.macs * rate[problem.w_bits] * rate[problem.a_bits] * 1e-11


@pytest.mark.parametrize("table", [together, four_is_fastest])
@pytest.mark.parametrize("closed", [False, True])
def test_what_no_single_closing_saves_is_reached_by_pairs(table: Callable[[Problem], float], closed: bool) -> None:
    model = searchable()
    budget = Budget(model, latency_ms=1000.0, table=table)
    floor = budget.ledger.floor(budget.targets[0].quantity)
    look(model, budget)
    if closed:
        for _, gate, _ in budget.bit_gates():
            gate.close_to(0)
    outcome = Budget(model, latency_ms=1.05 * floor / 1e-3, table=table).finish()
    assert outcome.met, outcome


def test_tables_are_functions_or_have_estimates() -> None:
    class Measured:
        def estimate(self, problem: Problem) -> float:
            return made_up(problem)

    plan = plan_of(prepare(lbs.models.create("cifar_resnet20", 10), images()))
    assert total(seconds(Measured()), plan) == total(seconds(made_up), plan) > 0


def test_several_targets_hold_at_once_and_are_printed_side_by_side() -> None:
    model = searchable()
    size, time = 0.6 * plan_bytes(model) / 1e6, 0.9 * plan_seconds(model) * 1e3
    budget = Budget(model, bops=0.03, size_mb=size, latency_ms=time, table=made_up)
    look(model, budget)
    result = budget.finish()
    assert result.met
    assert any(row.near for row in result.reached)
    lines = str(result).splitlines()
    assert [line.split(":")[0].split()[-1] for line in lines] == ["bops", "size_mb", "latency_ms"]
    assert all("target" in line and "result" in line and "thresholds reached" in line for line in lines)
    assert ["by running minima of measured times" in line for line in lines] == [False, False, True]
    values = (plan_of(model).bops(), plan_bytes(model), plan_seconds(model))
    for row, value in zip(result.reached, values, strict=True):
        assert row.value == pytest.approx(value, rel=1e-12)
        if not row.near:
            assert "are left" in str(row)


@pytest.mark.parametrize("kind", ["size", "latency"])
def test_derivatives_are_increments_between_neighbours(kind: str) -> None:
    """Against R recomputed from the plan with one gate moved by hand; times towards where a filter saves most."""
    model = searchable()
    options: dict[str, Any] = {"size_mb": 0.2} if kind == "size" else {"latency_ms": 1.0, "table": made_up}
    budget = Budget(model, **options)
    budget.steps = 0
    budget._assign_sides()
    model(images(2))
    measure = plan_bytes if kind == "size" else plan_seconds
    total = measure(model)
    layer: Any = model.get_submodule("layer2.1.conv1")
    alphas = [layer.w_gate.alpha, layer.prune.alpha]
    of_width, of_filters = torch.autograd.grad(budget.cost(), alphas)
    by_bits = []
    for level in (0, 1):
        layer.w_gate.is_open.copy_(torch.tensor([level > 0, False]))
        layer.w_gate.refresh()
        by_bits.append(measure(model))
    layer.w_gate.is_open.fill_(1)
    layer.w_gate.refresh()
    s = torch.sigmoid(layer.w_gate.statistic - layer.w_gate.alpha.detach()).double()
    to_two, to_four = by_bits[1] - by_bits[0], total - by_bits[1]
    expected = -s * (1 - s) * torch.tensor([to_two + to_four, to_four], dtype=torch.float64)
    torch.testing.assert_close(of_width.double(), expected, rtol=1e-5, atol=0)
    slopes = []
    for count in range(1, layer.prune.groups - layer.prune.least + 1):
        layer.prune.hold(tuple(range(count)), -1)
        slopes.append((total - measure(model)) / (count * layer.prune.size))
        layer.prune.hold(tuple(range(count)), 0)
    slope = slopes[0] if kind == "size" else max(slopes)  # times fall by stairs
    assert kind == "size" or slope > 1.1 * slopes[0]
    s = torch.sigmoid(layer.prune.statistic.detach() - layer.prune.alpha.detach()).double()
    torch.testing.assert_close(of_filters.double(), -(s * (1 - s)).sum() * layer.prune.size * slope, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 64), min_size=2), st.integers(1, 64))
def test_unknown_sizes_lie_between_their_neighbours(known: set[int], filters: int) -> None:
    times = {count: 1e-6 * count**0.7 for count in known}
    price = seconds(lambda problem: times.get(problem.out_channels)).price
    problem = Problem("bitconv2d", 1, 8, 8, 16, filters, (3, 3), (1, 1), (1, 1))
    below, above = [c for c in known if c <= filters], [c for c in known if c >= filters]
    if filters in known:
        assert price(problem) == times[filters]
    elif below and above:
        low, high = max(below), min(above)
        share = (filters - low) / (high - low)
        assert price(problem) == pytest.approx((1 - share) * times[low] + share * times[high])
    else:
        nearest = max(below) if below else min(above)
        assert price(problem) == pytest.approx(times[nearest] * filters / nearest)


def test_a_table_that_knows_nothing_names_the_layer() -> None:
    with pytest.raises(PlanError, match="no time for bitconv2d_n1_3x16x16"):
        Budget(searchable(), latency_ms=1.0, table=lambda problem: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "without a target; give bops=, size_mb= or latency_ms="),
        ({"latency_ms": 1.0}, "latency_ms needs table="),
        ({"size_mb": -1.0}, "size_mb=-1.0; give a positive number"),
        ({"size_mb": 1e-6}, r"budget 1e-06 MB is out of reach; the gates reach 0\.\d+ MB at the least"),
        ({"bops": 1.5e6}, r"budget 1\.5M BOPs is out of reach; the gates reach \d\d\.\d\d\dM BOPs at the least"),
        ({"latency_ms": 1e-9, "table": made_up}, r"out of reach; the gates reach 0\.\d+ ms at the least"),
    ],
)
def test_targets_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Budget(searchable(), **options)


@pytest.mark.parametrize(("bops", "better"), [(0.02, True), (0.025, True), (0.0136, False), (0.05, False)])
def test_what_greedy_steps_leave_over_is_exchanged_for_less_error(bops: float, better: bool) -> None:
    """Targets at which closing and opening one after the other leaves more than 3 %: with what is gained by that."""
    model = searchable("digits_resnet8", pruning=False)
    budget = Budget(model, bops=bops)
    with torch.no_grad():
        for steps in (0, 1):
            budget.steps = steps
            budget._assign_sides()
            model(images(2, 0, "digits_resnet8"))
    ledger, targets = budget.ledger, budget.targets

    def errors() -> float:
        return sum(sum(choice.errors[choice.level :]) for choice in ledger.choices)

    ledger.read(errors=True)
    projection.close_cheapest(ledger, targets, filters_last=True)
    projection.spend_rest(ledger, targets)
    assert projection.fits(ledger, targets)
    assert projection.fill(ledger, targets) < 0.97
    before, levels = errors(), [choice.level for choice in ledger.choices]
    projection.exchange(ledger, targets)
    assert projection.fits(ledger, targets)
    assert (errors() < before and projection.fill(ledger, targets) >= 0.97) is better
    assert ([choice.level for choice in ledger.choices] != levels) is better


def narrow_is_slow(problem: Problem) -> float:
    """Seconds that are the longer the fewer the bits."""
    rate = {2: 3.0, 4: 1.5, 8: 1.0}
    return 1e-6 + problem.macs * rate[problem.w_bits] * rate[problem.a_bits] * 1e-11


@pytest.mark.parametrize("over", [1.001, 1.7, 3.0, 100.0])
@pytest.mark.parametrize("closed", [False, True])
def test_a_target_above_the_whole_network_gives_the_whole_network(over: float, closed: bool) -> None:
    """However much is left over, and whatever thresholds had closed: nothing is closed to fill a target."""
    model = searchable(max_pruning_ratio=0.5)
    whole = sum(narrow_is_slow(layer.problem(w_bits=8, a_bits=8)) for layer in plan_of(model).layers)
    budget = Budget(model, latency_ms=over * whole * 1e3, table=narrow_is_slow)
    look(model, budget)
    if closed:
        for _, gate, _ in budget.bit_gates():
            gate.close_to(0)
    result = budget.finish()
    assert result.met
    assert {(entry.w_bits, entry.a_bits) for entry in plan_of(model).layers} == {(8, 8)}
    assert all(entry.kept is None or entry.kept_filters == entry.filters for entry in plan_of(model).layers)
    assert result.value == pytest.approx(whole)


def test_bits_that_save_nothing_stay_where_filters_have_to_go() -> None:
    model = searchable(max_pruning_ratio=0.5)
    whole = sum(narrow_is_slow(layer.problem(w_bits=8, a_bits=8)) for layer in plan_of(model).layers)
    budget = Budget(model, latency_ms=0.95 * whole * 1e3, table=narrow_is_slow)
    look(model, budget)
    assert budget.finish().met
    plan = plan_of(model)
    assert {(entry.w_bits, entry.a_bits) for entry in plan.layers} == {(8, 8)}
    assert any(entry.kept_filters < entry.filters for entry in plan.layers)


@pytest.mark.parametrize("seed", range(3))
def test_prices_of_noisy_times_never_rise_with_what_is_narrower(seed: int) -> None:
    """And they are those that were measured wherever nothing as wide or wider takes less, or hardly more."""

    def noisy(problem: Problem) -> float:
        return made_up(problem) * (1 + 0.3 * ((zlib.crc32(f"{seed} {problem}".encode()) % 1000) / 1000))

    model = searchable(max_pruning_ratio=0.5)
    budget = Budget(model, latency_ms=100.0, table=noisy)
    ledger, quantity = budget.ledger, budget.targets[0].quantity
    generator = random.Random(seed)
    measured = 0
    for _ in range(200):
        for choice in ledger.choices:
            choice.level = generator.randint(0, choice.top)
        for row in ledger.rows:
            inputs, outputs, w_bits, a_bits = row.amounts()
            own = noisy(row.entry.problem(inputs, outputs, w_bits=w_bits, a_bits=a_bits))
            assert row.price(quantity) <= own / (1 - NOISE)
            measured += row.price(quantity) == own
        for choice in ledger.choices:
            assert all(change >= 0 for change in map(float.__sub__, *_neighbours(ledger.changes(quantity, choice))))
    assert measured > 200


def _neighbours(values: list[float]) -> tuple[list[float], list[float]]:
    return values[1:], values[:-1]


def test_nets_too_coarse_for_three_percent_say_so() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    searched = lbs.calibrate(prepare(model, images(), SearchConfig(pruning=False)), [images()]).train()
    narrow = plan_of(searched).bops() - 9 * 64 * 256 * (64 - 32) * 0.5
    result = Budget(searched, bops=narrow).finish()
    assert result.met
    assert not result.reached[0].near
    assert "less than the smallest step of these gates" in str(result)


def test_the_controller_eases_off_and_presses_on() -> None:
    controller = Controller(1.0, 0.01)
    assert controller.strength == 1.0
    controller.update(1.1, 1.0)
    near = controller.strength
    assert 0.5 < near < 0.6  # proportional: half of the pressure goes with the distance
    for _ in range(100):
        controller.update(1.1, 1.0)
    assert controller.strength == pytest.approx(near * (1 + 0.01 * math.log(1.1)) ** 100)  # integral
    controller.update(0.9, 1.0)
    assert controller.strength == 0.0


def labelled(name: str) -> list[tuple[Tensor, Tensor]]:
    return [(images(8, seed, name), torch.arange(8)) for seed in (1, 2)]


def train(model: nn.Module, budget: Budget | None, steps: int, name: str = "cifar_resnet20") -> None:
    groups = parameter_groups(model, lr=0.01, gate_lr=0.02)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(images(4, step, name)), torch.arange(4))
        (loss if budget is None else loss + budget()).backward()
        optimizer.step()
        if budget is not None:
            budget.step()


def test_idle_and_frozen_thresholds_stand_still_under_momentum_and_decay_for_all() -> None:
    """The user's own optimizer keeps momentum and decay for every parameter, and zero gradients instead of none."""
    name = "digits_resnet8"
    model = searchable(name)
    budget = Budget(model, bops=0.02, strength=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2)

    def alphas() -> dict[Any, Tensor]:
        gates = [gate for _, gate, _ in budget.bit_gates()] + budget.prune_gates()
        return {gate: gate.alpha.detach().clone() for gate in gates}

    def step(seed: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        (F.cross_entropy(model(images(4, seed, name)), torch.arange(4)) + budget()).backward()
        optimizer.step()
        budget.step()

    moved = 0
    for seed in range(6):
        before = alphas()
        active = {gate for _, gate, _ in budget.bit_gates() if gate.active}
        step(seed)
        for gate, value in alphas().items():
            still = torch.equal(value, before[gate])
            assert still or gate in active or gate in budget.prune_gates()
            moved += not still
    assert moved
    assert any(group["momentum_buffer"].any() for p, group in optimizer.state.items() if p.dim() <= 1)
    budget.freeze()
    frozen = alphas()
    for seed in range(3):
        step(seed)
    assert all(torch.equal(value, frozen[gate]) for gate, value in alphas().items())


@pytest.mark.parametrize("targets", [{"bops": 0.02}, {"bops": 0.04, "size_mb": 0.045}])
def test_training_reaches_the_targets_and_stays(targets: dict[str, float]) -> None:
    name = "digits_resnet8"
    model = searchable(name)
    budget = Budget(model, strength=6.0, **targets)
    train(model, budget, 30, name)
    assert budget.steps <= 30
    result = budget.finish()
    assert result.met
    assert any(row.near for row in result.reached)
    assert budget().item() == 0


@pytest.mark.parametrize(
    ("name", "bops"),
    [
        ("digits_resnet8", 0.03),
        *(pytest.param("cifar_resnet20", b, marks=pytest.mark.slow) for b in (0.05, 0.02, 0.01)),
    ],
)
def test_projection_by_measured_losses(name: str, bops: float) -> None:
    model = searchable(name, max_pruning_ratio=0.5).eval()
    result = project(model, labelled(name), bops=bops)
    assert result.met
    assert result.reached[0].near
    assert result.value == plan_of(freeze(model)).bops()
    assert not model.training


def test_measured_projection_spares_the_layer_that_matters() -> None:
    """One layer's weights cannot bear fewer bits: its loss goes up, and it is the last to close."""
    model = searchable("digits_resnet8", pruning=False).eval()
    sensitive: Any = model.get_submodule("layer2.0.conv1")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.tensor(float(8 - sensitive.w_bits))

    project(model, labelled("digits_resnet8"), bops=0.03, loss=loss)
    assert sensitive.w_bits == 8
    assert {e.w_bits for e in plan_of(model).layers[1:-1]} - {8}


def test_an_even_share_of_filters_goes_by_the_norms() -> None:
    torch.manual_seed(0)
    model = lbs.models.create("cifar_resnet20", 10)
    gamma = model.get_submodule("layer2.1.bn1").weight
    with torch.no_grad():
        gamma.copy_(torch.arange(32.0).flip(0) + 1)
    plan = evenly_pruned(model, images(), 0.25)
    counts = {layer.name: (layer.kept_filters, layer.filters) for layer in plan.layers}
    for name, (kept, filters) in counts.items():
        can_go = name.endswith("conv1") and name.startswith("layer")
        assert kept == (filters * 3 // 4 if can_go else filters), name
    assert plan.layer("layer2.1.conv1").kept == tuple(range(24))  # the largest
    assert {layer.w_bits for layer in plan.with_bits(4, 4).layers} == {4, 8}
    with pytest.raises(PlanError, match="max_pruning_ratio=1"):
        evenly_pruned(model, images(), 1.0)


def test_two_stages_prune_in_float_then_quantize() -> None:
    torch.manual_seed(0)
    model = lbs.models.create("cifar_resnet20", 10)
    seen: list[tuple[int, ...]] = []

    def search(searched: nn.Module, budget: Budget) -> None:
        seen.append(tuple(sorted({e.w_bits for e in plan_of(searched).layers})))
        train(searched.train(), budget, 1)

    frozen = two_stage(
        model, images(), [images()], search, lambda pruned: train(pruned, None, 1), prune_bops=0.7, bops=0.02
    )
    assert seen == [(32,), (8,)]
    full = plan_of(prepare(model, images())).full_precision_bops()
    plan = plan_of(frozen)
    assert 0.66 * full < plan.full_precision_bops() <= 0.7 * full
    assert plan.bops() <= 0.02 * plan.full_precision_bops()
    assert lbs.verify(frozen.eval(), lbs.pack(frozen), images()).ok


def test_bytes_of_float_layers() -> None:
    model = prepare(lbs.models.create("cifar_resnet20", 10), images(), SearchConfig(bits=(32,)))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert total(packed_bytes(), plan_of(model)) == 4 * weights
