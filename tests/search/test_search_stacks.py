"""What a budget does with all gates at once, against its definition, a gate and a price at a time: to the last bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.plan import LayerPlan
from lbs.search.budget import Budget
from lbs.search.controller import Controller
from lbs.search.freeze import plan_of
from lbs.search.gates import BitGate, PruneGate, running_product, step
from lbs.search.layers import SearchLayer, searched_gate
from lbs.search.ledger import NOISE
from lbs.search.quantities import Quantity, Target
from lbs_kernels.program.problem import Problem


def table(problem: Problem) -> float:
    """Times that no sum adds exactly, by which four bits are slower than eight and two faster, whatever the layer."""
    rate = {2: 0.61, 4: 1.53, 8: 1.07}
    return 1.1e-11 + problem.macs * rate[problem.w_bits] * rate[problem.a_bits] * 1.3e-11


def wider(gate: BitGate | None, bits: int) -> list[int]:
    """A width and those of a gate's chain above it, rising."""
    return [bits] if gate is None else [width for width in gate.chain if width >= bits]


class Definition:
    """A budget in plain words: every gate by itself, every price that of a Problem under hard gates."""

    def __init__(self, model: nn.Module, targets: tuple[Target, ...], strength: float, gain: float) -> None:
        self.plan = plan_of(model)
        self.layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, SearchLayer)}
        self.steps, self.frozen = 0, False
        over = [math.log(self.total(target.quantity) / target.limit) for target in targets]  # everything is open
        spans = [min(1.0, way) if way > 0 else 1.0 for way in over]
        self.targets, self.controllers = targets, [Controller(strength, gain, span=span) for span in spans]
        self.take_turns()

    def widths(self, side: str) -> Iterator[tuple[LayerPlan, BitGate]]:
        for entry in self.plan.layers:
            layer = self.layers[entry.name]
            gate = layer.w_gate if side == "weights" else searched_gate(layer.quantizer)
            if gate is not None:
                yield entry, gate

    def prunes(self) -> list[PruneGate]:
        return [layer.prune for layer in self.layers.values() if layer.prune is not None]

    @property
    def side(self) -> str:
        return "frozen" if self.frozen else ("weights", "activations")[self.steps % 2]

    def take_turns(self) -> None:
        for side in ("weights", "activations"):
            for _, gate in self.widths(side):
                gate.active = side == self.side

    def feeding(self, entry: LayerPlan) -> PruneGate | None:
        layer = self.layers[entry.name]
        return next(iter(layer.through_gate or layer.input_gate), None)

    def price(self, quantity: Quantity, entry: LayerPlan, living: dict[PruneGate, int], **bits: int) -> float:
        """Of a layer under the present gates, but for the counts and bits that are named; of times, whose table knows
        no number of filters that is faster than a smaller one, that of the pair with one width wider, unless it is
        less by more than noise.
        """
        layer = self.layers[entry.name]
        counts = [self.feeding(entry), layer.own_gate()]
        inputs, outputs = (gate and living.get(gate, self.living[gate]) for gate in counts)
        w_bits, a_bits = bits.get("w_bits", layer.w_bits), bits.get("a_bits", layer.a_bits)
        problem = entry.problem(inputs, outputs)
        own = quantity.price(replace(problem, w_bits=w_bits, a_bits=a_bits))
        if not quantity.measured:
            return own
        chains = {"w_bits": wider(layer.w_gate, w_bits), "a_bits": wider(searched_gate(layer.quantizer), a_bits)}
        above = [
            self.price(quantity, entry, living, **{**bits, name: chain[1]})
            for name, chain in chains.items()
            if len(chain) > 1
        ]
        return own if own < (1 - NOISE) * min(above, default=math.inf) else min(above)

    def total(self, quantity: Quantity) -> float:
        self.living = {gate: len(gate.kept()) for gate in self.prunes()}
        return sum(self.price(quantity, entry, {}) for entry in self.plan.layers)

    @torch.no_grad()
    def value(self, quantity: Quantity) -> float:
        self.observe()
        return self.total(quantity)

    def increments(self, quantity: Quantity, entry: LayerPlan, gate: BitGate) -> Tensor:
        """What each step of a chain adds: differences of the changes from the width that is open now."""
        name = "w_bits" if gate is self.layers[entry.name].w_gate else "a_bits"
        now = self.price(quantity, entry, {})
        changes = [self.price(quantity, entry, {}, **{name: bits}) - now for bits in gate.chain]
        return torch.tensor([wider - narrower for narrower, wider in pairwise(changes)], dtype=torch.float64)

    def slope(self, quantity: Quantity, gate: PruneGate) -> float:
        """What a filter costs, towards the next number of groups: one unit less, or where none may go, one more. Of
        times the most that it costs towards any number below.
        """
        is_open = gate.gates().detach() > 0
        ranked = torch.where(is_open, 2.0, 0.0) + gate.statistic.detach().clamp(0, 1)
        order = ranked.argsort(descending=True, stable=True).tolist()
        filters = [0, *accumulate(gate.group_size(group) for group in order)]
        groups = int(is_open.sum())
        others = [groups - gate.unit if groups > gate.least else groups + gate.unit]
        if quantity.measured and groups > gate.least:
            others = list(range(groups - gate.unit, gate.least - 1, -gate.unit))
        touched = [e for e in self.plan.layers if gate in (self.feeding(e), self.layers[e.name].own_gate())]

        def spent(living: dict[PruneGate, int]) -> float:
            return sum(self.price(quantity, entry, living) for entry in touched)

        now = spent({})
        return max((spent({gate: filters[x]}) - now) / (filters[x] - filters[groups]) for x in others)

    def cost(self, quantity: Quantity) -> Tensor:
        total = torch.tensor(float(self.total(quantity)), dtype=torch.float64)
        if widths := list(self.widths(self.side)):
            # In one tensor, as torch's sigmoid has other last bits at other places of one.
            rows = (torch.stack([getattr(gate, name) for _, gate in widths]) for name in ("statistic", "alpha"))
            shares = running_product(step(*rows)).double()
            for (entry, gate), share in zip(widths, shares, strict=True):
                total = total + ((share - share.detach()) * self.increments(quantity, entry, gate)).sum()
        for gate in self.prunes():
            if gate.levels > 1:
                count = gate.mask().double().sum()
                total = total + (count - count.detach()) * self.slope(quantity, gate)
        return total

    def term(self) -> Tensor:
        self.hold()
        if self.frozen:
            return torch.zeros(())
        self.observe()
        strengths = torch.tensor([controller.strength for controller in self.controllers], dtype=torch.float64)
        logs = torch.stack([self.cost(target.quantity).log() for target in self.targets])
        return (strengths * logs).sum().float()

    def observe(self) -> None:
        for layer in self.layers.values():
            layer.observe_filters()

    def hold(self) -> None:
        idle: list[Any] = [g for s in ("weights", "activations") if s != self.side for _, g in self.widths(s)]
        idle += self.prunes() if self.frozen else []
        self.held = [(gate, gate.alpha.detach().clone()) for gate in idle]

    @torch.no_grad()
    def step(self) -> None:
        for gate, alpha in self.held:
            gate.alpha.copy_(alpha)
        if self.frozen:
            return
        self.observe()
        for _, gate in self.widths(self.side):
            gate.clamp()
        for prune in self.prunes():
            last = prune.statistic.sort(descending=True).values[prune.least - 1]  # that must live
            prune.alpha.copy_(torch.minimum(prune.alpha, last * 0.999999).clamp(min=0))
        self.steps += 1
        values = [self.value(target.quantity) for target in self.targets]
        for controller, value, target in zip(self.controllers, values, self.targets, strict=True):
            controller.update(value, target.limit)
        if all(value <= target.limit for value, target in zip(values, self.targets, strict=True)):
            self.frozen = True
            for gate in self.prunes():
                gate.freeze()
        self.take_turns()


def searchable(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = lbs.models.create(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.2)
    shape = (1, 8, 8) if name == "digits_resnet8" else (3, 32, 32)
    return lbs.prepare(model, torch.zeros(1, *shape), lbs.SearchConfig(**options)).train()


@torch.no_grad()
def forward(model: nn.Module, generator: torch.Generator) -> None:
    """What a forward pass does to gates: those whose turn it is decide on new errors."""
    for gate in (m for m in model.modules() if isinstance(m, BitGate)):
        errors = torch.rand(len(gate.chain) - 1, generator=generator) * 0.1
        if gate.active:
            gate.observe(errors)


@torch.no_grad()
def optimize(model: nn.Module, generator: torch.Generator) -> None:
    """What an optimizer does: everything moves, idle thresholds too, and some too far; on average gates close."""
    for module in model.modules():
        if isinstance(module, BitGate | PruneGate):
            scale = 0.05 if isinstance(module, BitGate) else 0.3  # of errors, of importances
            module.alpha += scale * (0.4 + torch.randn(module.alpha.shape, generator=generator))
        elif isinstance(module, nn.BatchNorm2d):
            module.weight *= 1 + 0.1 * torch.randn(module.weight.shape, generator=generator)
        elif isinstance(module, SearchLayer) and module.importance == "magnitude":
            module.weight += 0.01 * torch.randn(module.weight.shape, generator=generator)


def gradients(model: nn.Module, term: Tensor) -> list[Tensor | None]:
    parameters = list(model.parameters())
    if not term.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(term, parameters, allow_unused=True))


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours, theirs)


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "bops": ("cifar_resnet20", ("bops",), {}),
    "size, short groups": ("cifar_resnet20", ("size_mb",), {"group_size": 3}),
    "seconds, short groups": ("preresnet20", ("latency_ms",), {"group_size": 5}),
    "seconds, depthwise": ("mobilenet_v2", ("latency_ms",), {"group_size": 8}),
    "all, tiles": ("cifar_resnet20", ("bops", "size_mb", "latency_ms"), {"filter_tile": 8}),
    "chain of four": ("digits_resnet8", ("size_mb",), {"bits": (1, 2, 4, 8)}),
    "magnitude": ("digits_resnet8", ("bops",), {"importance": "magnitude", "group_size": 3}),
    "no pruning": ("digits_resnet8", ("bops", "size_mb", "latency_ms"), {"pruning": False}),
    "filters only": ("digits_resnet8", ("bops",), {"bits": (32,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_walk_of_the_gates(case: str) -> None:
    """Six steps out of reach of the targets, one in which they are met, and two with everything frozen."""
    name, asked, options = CASES[case]
    model = searchable(name, **options)
    twin = copy.deepcopy(model)
    budget = Budget(model, **dict.fromkeys(asked, 1e15), table=table, strength=0.7, gain=0.05)
    budget.targets = tuple(replace(t, limit=budget.ledger.floor(t.quantity) / 2) for t in budget.targets)
    definition = Definition(twin, budget.targets, 0.7, 0.05)
    seen = set()
    for turn in range(9):
        if turn == 6:
            budget.targets = definition.targets = tuple(replace(t, limit=1e15) for t in budget.targets)
        for network in (model, twin):
            forward(network, torch.Generator().manual_seed(turn))
        ours, theirs = budget(), definition.term()
        assert ours.item().hex() == theirs.item().hex()
        names, found = [n for n, _ in model.named_parameters()], (gradients(model, ours), gradients(twin, theirs))
        assert [n for n, mine, other in zip(names, *found, strict=True) if not same(mine, other)] == []
        for network in (model, twin):
            optimize(network, torch.Generator().manual_seed(turn))
        budget.step()
        definition.step()
        states = model.state_dict(), twin.state_dict()
        assert [n for n in states[0] if not torch.equal(states[0][n], states[1][n])] == []
        for gate, other in zip(budget.prune_gates(), definition.prunes(), strict=True):
            assert torch.equal(gate.statistic, other.statistic)
        assert [c.strength for c in budget.controllers] == [c.strength for c in definition.controllers]
        for target in budget.targets:
            assert budget.value(target.quantity) == definition.value(target.quantity)
        seen.add(tuple(choice.level for choice in budget.ledger.choices))
    assert plan_of(model) == plan_of(twin)
    assert budget.frozen
    assert len(seen) > 4
