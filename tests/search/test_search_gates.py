"""Gates: the step and its surrogate gradient, nesting, clamps, caps, and gates that stand still."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lbs
import lbs.models
from lbs.search.freeze import plan_of
from lbs.search.gates import BitGate, PruneGate, step
from lbs.search.stacks import PruneStack
from lbs_kernels.errors import PlanError

INF = float("inf")


def test_step_and_its_gradient() -> None:
    statistic = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    gates = step(statistic, alpha)
    assert gates.tolist() == [1, 0, 0]  # equality is closed
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    grad_a, grad_alpha = torch.autograd.grad(gates, (statistic, alpha), weights)
    soft = torch.sigmoid(statistic - alpha)
    expected_a, expected_alpha = torch.autograd.grad(soft, (statistic, alpha), weights)
    torch.testing.assert_close(grad_a, expected_a)
    torch.testing.assert_close(grad_alpha, expected_alpha)


def soft_bits(gate: BitGate) -> torch.Tensor:
    """b_1 + sum_j (b_j - b_(j-1)) g_2 ... g_j: what the budget makes of shares, for a cost that is the width itself."""
    widths = gate.widths.float()
    return widths[0] + ((widths[1:] - widths[:-1]) * gate.shares()).sum()


def test_gates_start_open() -> None:
    gate = BitGate((2, 4, 8))
    assert gate.bits == 8
    assert soft_bits(gate) == 8
    assert gate.observe(torch.tensor([0.1, 0.01])).tolist() == [1, 1]
    assert gate.bits == 8


@given(st.lists(st.booleans(), min_size=2, max_size=3))
def test_a_closed_gate_closes_the_later_ones(opened: list[bool]) -> None:
    chain = (1, 2, 4, 8)[: len(opened) + 1]
    gate = BitGate(chain)
    with torch.no_grad():
        gate.alpha.fill_(0.5)
    gate.observe(torch.tensor([0.9 if is_open else 0.1 for is_open in opened]))
    expected = next((i for i, is_open in enumerate(opened) if not is_open), len(opened))
    assert gate.bits == chain[expected]
    assert float(soft_bits(gate).detach()) == chain[expected]


def test_soft_bits_gradient_is_the_increment_of_the_cumulative_product() -> None:
    gate = BitGate((2, 4, 8))
    gate.observe(torch.tensor([0.08, 0.016]))
    (grad,) = torch.autograd.grad(soft_bits(gate), gate.alpha)
    s = torch.sigmoid(gate.statistic)
    torch.testing.assert_close(grad, -s * (1 - s) * torch.tensor([2.0 + 4.0, 4.0]))


def test_clamp_keeps_gates_able_to_open_again() -> None:
    gate = BitGate((2, 4, 8))
    gate.observe(torch.tensor([0.08, 0.016]))
    with torch.no_grad():
        gate.alpha.copy_(torch.tensor([-0.3, 5.0]))
    gate.clamp()
    torch.testing.assert_close(gate.alpha.detach(), torch.tensor([0.0, 1.05 * 0.016]))


def test_clamp_before_any_observation() -> None:
    gate = BitGate((2, 4))
    with torch.no_grad():
        gate.alpha.fill_(0.7)
    gate.clamp()
    assert gate.alpha.item() == pytest.approx(0.7)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("seen", [True, False])
def test_close_to_holds_when_the_gate_looks_again(level: int, seen: bool) -> None:
    gate = BitGate((2, 4, 8))
    statistic = torch.tensor([0.08, 0.016])
    if seen:
        gate.observe(statistic)
    gate.close_to(level)
    assert gate.bits == (2, 4, 8)[level]
    if seen:
        gate.observe(statistic)
        assert gate.bits == (2, 4, 8)[level]


def test_a_gate_survives_saving_and_copying() -> None:
    gate = BitGate((2, 4, 8))
    gate.observe(torch.tensor([0.08, 0.016]))
    gate.close_to(1)
    twin = BitGate((2, 4, 8))
    twin.load_state_dict(gate.state_dict())
    twin.refresh()
    assert twin.bits == copy.deepcopy(gate).bits == 4


def prune_gate(statistic: list[float], size: int = 2, ratio: float = 0.5, filters: int | None = None) -> PruneGate:
    gate = PruneGate(filters or len(statistic) * size, size, ratio)
    gate.statistic = torch.tensor(statistic)
    return gate


def test_groups_average_their_filters_and_the_last_may_be_short() -> None:
    gate = PruneGate(7, 3, 0.5)
    importance = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], requires_grad=True)
    gate.observe(importance)
    torch.testing.assert_close(gate.statistic.detach(), torch.tensor([0.2, 0.5, 0.7]))
    with torch.no_grad():
        gate.alpha.fill_(0.3)
    assert gate.mask().tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert gate.kept() == (3, 4, 5, 6)
    gate.mask().sum().backward()
    assert importance.grad is not None
    assert (importance.grad > 0).all()
    assert gate.alpha.grad is not None
    assert gate.alpha.grad < 0


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12),
    st.floats(0, 0.99),
    st.floats(0, 2),
)
def test_the_cap_holds_for_any_threshold(statistic: list[float], ratio: float, alpha: float) -> None:
    gate = PruneGate(2 * len(statistic), 2, ratio, scored=True)
    gate.score.copy_(torch.tensor(statistic).repeat_interleave(2))
    with torch.no_grad():
        gate.alpha.fill_(alpha)
        stack = PruneStack([SimpleNamespace(prune=gate, importance="taylor", norm_behind=[])])  # type: ignore[list-item]
    closed = len(statistic) - int(gate.gates().sum())
    assert closed <= int(ratio * len(statistic))
    assert closed < len(statistic)
    with torch.no_grad():
        stack.clamp()
    assert gate.alpha.item() >= 0
    assert len(statistic) - int(gate.gates().sum()) <= closed  # groups that tie at the cap may open again


def test_weights_or_gammas_of_zero_leave_filters() -> None:
    gate = prune_gate([0.0, 0.0, 0.0, 0.0])
    assert gate.gates().tolist() == [1, 1, 1, 1]


def test_levels_count_units_of_groups_and_force_holds() -> None:
    gate = prune_gate([0.4, 0.2, 0.2, 0.9])
    assert (gate.levels, [gate.open_groups(level) for level in range(3)]) == (3, [2, 3, 4])
    gate.hold((1, 2), -1)
    assert gate.kept() == (0, 1, 6, 7)
    gate.hold((1,), 0)
    assert gate.kept() == (0, 1, 2, 3, 6, 7)


def test_frozen_prune_gates_ignore_what_comes() -> None:
    gate = prune_gate([0.4, 0.1, 0.2, 0.9])
    with torch.no_grad():
        gate.alpha.fill_(0.3)
    before = gate.kept()
    gate.freeze()
    gate.observe(torch.rand(8))
    with torch.no_grad():
        gate.alpha.fill_(0)
    assert gate.kept() == before == (0, 1, 6, 7)


def test_a_chain_that_does_not_nest_is_refused() -> None:
    with pytest.raises(PlanError, match="multiple"):
        BitGate((2, 3))


def test_a_plan_shows_what_the_device_has_decided() -> None:
    """On a GPU `is_open` moves in every step, and Python's `level` at a look."""
    model = lbs.models.create("digits_resnet8")
    model = lbs.prepare(model, lbs.models.example("digits_resnet8"))
    for gate in (module for module in model.modules() if isinstance(module, BitGate)):
        gate.is_open.zero_()
    searched = [layer for layer in plan_of(model).layers if layer.name not in ("conv1", "fc")]
    assert {(layer.w_bits, layer.a_bits) for layer in searched} == {(2, 2)}
