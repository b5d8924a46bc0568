"""The books of a budget: every open choice of a searchable model, and what each layer costs under the present ones.

Plain numbers on the host. `read` takes them from the gates, `apply` writes them back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor, nn

from lbs.graph import record_of
from lbs.plan import LayerPlan
from lbs.search.gates import BitGate, PruneGate
from lbs.search.layers import SearchLayer, searched_gate
from lbs.search.quantities import Quantity
from lbs_kernels.errors import PlanError


@dataclass(eq=False)
class Choice:
    """One thing that can be narrower or wider. Level k stands for amounts[k] bits or filters, rising."""

    layer: str
    kind: str  # weights | activations | filters
    gate: Any
    amounts: tuple[int, ...]
    touched: tuple[LayerPlan, ...]  # layers whose cost it changes
    level: int = 0
    errors: tuple[float, ...] = ()  # errors[k]: what going down from level k + 1 to k adds
    order: tuple[int, ...] = ()  # filters: groups, strongest first

    @property
    def amount(self) -> int:
        """Bits or filters at the present level."""
        return self.amounts[self.level]

    @property
    def top(self) -> int:
        """The widest level."""
        return len(self.amounts) - 1


class Ledger:
    """Choices and prices of a searchable model.

    Raises:
        PlanError: the model has no searchable layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.plan = record_of(model).plan
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, SearchLayer)}
        if not self.layers:
            raise PlanError(f"{type(model).__name__} has no gates; make it searchable with lbs.prepare first")
        self.choices: list[Choice] = []
        self._weights: dict[str, Choice] = {}
        self._activations: dict[str, Choice] = {}
        self._filters: dict[int, Choice] = {}  # by id of the gate
        for entry in self.plan.layers:
            self._add_choices(entry)
        self._prices: dict[tuple[object, ...], float] = {}
        with torch.no_grad():
            for layer in self.layers.values():
                layer.observe_filters()  # on the device the model is on now
        self.read()

    def _add_choices(self, entry: LayerPlan) -> None:
        layer = self.layers[entry.name]
        if layer.w_gate is not None:
            self._weights[entry.name] = Choice(entry.name, "weights", layer.w_gate, layer.w_gate.chain, (entry,))
        gate = searched_gate(layer.quantizer)
        if gate is not None:
            self._activations[entry.name] = Choice(entry.name, "activations", gate, gate.chain, (entry,))
        if layer.prune is not None:
            prune = layer.prune
            touched = tuple(e for e in self.plan.layers if prune in (self._own(e), self._feeding(e)))
            self._filters[id(prune)] = Choice(entry.name, "filters", prune, _filter_counts(prune), touched)
        own = (self._weights.get(entry.name), self._activations.get(entry.name), self._filters.get(id(layer.prune)))
        self.choices += [choice for choice in own if choice is not None]

    def _own(self, entry: LayerPlan) -> PruneGate | None:
        return self.layers[entry.name].own_gate()

    def _feeding(self, entry: LayerPlan) -> PruneGate | None:
        layer = self.layers[entry.name]
        return next(iter(layer.through_gate or layer.input_gate), None)

    @torch.no_grad()
    def read(self, errors: bool = False) -> None:
        """Take the levels from the gates in one transfer; with `errors` also what projections rank by."""
        if not self.choices:
            return
        device = self.choices[0].gate.alpha.device
        levels = torch.stack([_level(choice.gate).to(device) for choice in self.choices]).tolist()
        for choice, level in zip(self.choices, levels, strict=True):
            choice.level = level
            if choice.kind == "filters":
                _read_filters(choice, errors)
            else:
                choice.gate.level = level
                if errors:
                    choice.errors = tuple(choice.gate.statistic.tolist())

    @torch.no_grad()
    def apply(self) -> None:
        """Make the gates hold the present levels."""
        for choice in self.choices:
            if choice.kind == "filters":
                count = choice.gate.open_groups(choice.level)
                choice.gate.hold(choice.order[:count], 1)
                choice.gate.hold(choice.order[count:], -1)
            else:
                choice.gate.close_to(choice.level)

    def price(self, quantity: Quantity, entry: LayerPlan) -> float:
        """What a layer costs under the present choices."""
        layer, name = self.layers[entry.name], entry.name
        inputs, outputs = self._living(self._feeding(entry)), self._living(self._own(entry))
        w_bits = self._weights[name].amount if name in self._weights else layer.w_bits
        a_bits = self._activations[name].amount if name in self._activations else layer.a_bits
        key = (quantity.name, name, inputs, outputs, w_bits, a_bits)
        if key not in self._prices:
            problem = replace(entry.problem(inputs, outputs), w_bits=w_bits, a_bits=a_bits)
            self._prices[key] = quantity.price(problem)
        return self._prices[key]

    def _living(self, gate: PruneGate | None) -> int | None:
        return self._filters[id(gate)].amount if gate is not None else None

    def total(self, quantity: Quantity) -> float:
        """What the network costs under the present choices."""
        return sum(self.price(quantity, entry) for entry in self.plan.layers)

    def change(self, quantity: Quantity, choice: Choice, level: int) -> float:
        """What the network would cost more with `choice` at `level`."""
        present, before = choice.level, sum(self.price(quantity, entry) for entry in choice.touched)
        choice.level = level
        after = sum(self.price(quantity, entry) for entry in choice.touched)
        choice.level = present
        return after - before

    def floor(self, quantity: Quantity) -> float:
        """The least the network can cost, as far as fewer filters never cost more."""
        present = [choice.level for choice in self.choices]
        self.make_cheapest(quantity)
        total = self.total(quantity)
        for choice, level in zip(self.choices, present, strict=True):
            choice.level = level
        return total

    def make_cheapest(self, quantity: Quantity) -> None:
        """Fewest filters, and in each layer the cheapest pair of widths: the narrowest need not be the fastest."""
        for choice in self.choices:
            choice.level = 0
        for entry in self.plan.layers:
            own = [found[entry.name] for found in (self._weights, self._activations) if entry.name in found]
            _, best = min(
                (self._price_at(quantity, entry, own, levels), levels)
                for levels in product(*(range(len(choice.amounts)) for choice in own))
            )
            self._price_at(quantity, entry, own, best)

    def _price_at(self, quantity: Quantity, entry: LayerPlan, own: list[Choice], levels: tuple[int, ...]) -> float:
        for choice, level in zip(own, levels, strict=True):
            choice.level = level
        return self.price(quantity, entry)


def _level(gate: BitGate | PruneGate) -> Tensor:
    if isinstance(gate, PruneGate):
        steps = (gate.gates().sum().long() - gate.least + gate.unit - 1) // gate.unit
        return steps.clamp(min=0)
    return gate.open_level()


def _filter_counts(gate: PruneGate, order: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Filters that live at each level. Without an order a short last group counts as the first to go."""
    sizes = [gate.group_size(group) for group in (order or range(gate.groups))]
    living = [0, *accumulate(sizes)]
    return tuple(living[gate.open_groups(level)] for level in range(gate.levels))


def _read_filters(choice: Choice, errors: bool) -> None:
    """The order of the groups, where it decides a number or is asked for."""
    gate = choice.gate
    if not errors and gate.filters % gate.size == 0:
        return
    open_first = torch.where(gate.gates() > 0, 2.0, 0.0) + gate.statistic.nan_to_num(posinf=1.0).clamp(0, 1)
    choice.order = tuple(open_first.argsort(descending=True, stable=True).tolist())
    choice.amounts = _filter_counts(gate, choice.order)
    statistic = gate.statistic.nan_to_num(posinf=1.0).tolist()
    found = []
    for level in range(gate.levels - 1):
        going = choice.order[gate.open_groups(level) : gate.open_groups(level + 1)]
        found.append(sum(statistic[group] for group in going))
    choice.errors = tuple(found)
