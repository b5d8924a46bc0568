"""The books of a budget: every open choice of a searchable model, and what each layer costs under the present ones.

Plain numbers on the host. `read` takes them from the gates, `apply` writes them back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import Any

import torch
from torch import nn

from lbs.graph import record_of
from lbs.plan import LayerPlan
from lbs.search.gates import BitGate, PruneGate
from lbs.search.layers import SearchLayer, searched_gate
from lbs.search.quantities import Quantity
from lbs.search.stacks import BitStack, prune_stacks
from lbs_kernels.errors import PlanError

NOISE = 0.05  # of a time: by how much two measurements of the same differ; bits that pay save a quarter and more


@dataclass(eq=False)
class Choice:
    """One thing that can be narrower or wider. Level k stands for amounts[k] bits or filters, rising."""

    layer: str
    kind: str  # weights | activations | filters
    gate: Any  # None: there is nothing to choose, and one amount
    amounts: tuple[int, ...]
    level: int = 0
    touched: tuple[Row, ...] = ()  # layers whose cost it changes
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


@dataclass(eq=False)
class Row:
    """A layer of the books: the choices its price follows, and the prices that came up, by quantity and amounts."""

    entry: LayerPlan
    inputs: Choice
    outputs: Choice
    weights: Choice
    activations: Choice
    prices: dict[tuple[str, tuple[int, int, int, int]], float] = field(default_factory=dict)

    def amounts(self) -> tuple[int, int, int, int]:
        """Channels that live, filters that live, bits of weights and activations."""
        i, o, w, a = self.inputs, self.outputs, self.weights, self.activations
        return i.amounts[i.level], o.amounts[o.level], w.amounts[w.level], a.amounts[a.level]

    def price(self, quantity: Quantity) -> float:
        """What the layer costs under the present choices.

        Of a measured quantity the running minimum over all that is as wide or wider in bits, channels and filters: what
        is narrower never costs more. Widths that are faster by less than `NOISE` cost what the wider ones do. So
        neither noise nor a width that is slower than the one above it is a reason to close anything. Tables stay as
        they were measured.
        """
        key = quantity.name, self.amounts()
        if key not in self.prices:
            if quantity.measured:
                self._price_upwards(quantity)
            else:
                self.prices[key] = self._own_price(quantity)
        return self.prices[key]

    def _own_price(self, quantity: Quantity) -> float:
        inputs, outputs, w_bits, a_bits = self.amounts()
        return quantity.price(self.entry.problem(inputs, outputs, w_bits=w_bits, a_bits=a_bits))

    def _price_upwards(self, quantity: Quantity) -> None:
        """Running minima from the top of every choice down to the present levels."""
        choices = list(dict.fromkeys(_followed(self)))
        present = [choice.level for choice in choices]
        for levels in product(*(range(choice.top, choice.level - 1, -1) for choice in choices)):
            for choice, level in zip(choices, levels, strict=True):
                choice.level = level
            key = quantity.name, self.amounts()
            if key in self.prices:
                continue
            own, wider, more = self._own_price(quantity), math.inf, math.inf  # more: channels or filters
            for choice in choices:
                if choice.level < choice.top:
                    choice.level += 1
                    price = self.prices[quantity.name, self.amounts()]
                    choice.level -= 1
                    if choice.kind == "filters":
                        more = min(more, price)
                    else:
                        wider = min(wider, price)
            self.prices[key] = min(own if own < (1 - NOISE) * wider else wider, more)
        for choice, level in zip(choices, present, strict=True):
            choice.level = level


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
        filters = {
            layer.prune: Choice(name, "filters", layer.prune, _filter_counts(layer.prune))
            for name, layer in self.layers.items()
            if layer.prune is not None
        }
        self.rows = [_row(entry, self.layers[entry.name], filters) for entry in self.plan.layers]
        self.choices: list[Choice] = []
        for row in self.rows:
            own = (row.weights, row.activations, row.outputs)
            self.choices += [choice for choice in own if choice.gate is not None and choice.layer == row.entry.name]
        for choice in self.choices:
            choice.touched = tuple(row for row in self.rows if choice in _followed(row))
        with torch.no_grad():
            self.prune_stacks = prune_stacks(self.layers.values())
        self.filters = [filters[gate] for stack in self.prune_stacks for gate in stack.gates]  # in the stacks' order
        self.widths = [choice for choice in self.choices if choice.kind != "filters"]
        self._bit_gates = BitStack(choice.gate for choice in self.widths)
        self.read()

    @torch.no_grad()
    def read(self, errors: bool = False) -> None:
        """Take the levels from the gates in one transfer; with `errors` also what projections rank by."""
        if not self.choices:
            return
        unread = [] if self._bit_gates.mirrored else self._bit_gates.gates
        parts = [self._bit_gates.opened()] if unread else []
        parts += [stack.decide() for stack in self.prune_stacks]
        opened = torch.cat(parts).tolist() if parts else []
        for gate, level in zip(unread, opened, strict=False):
            gate.level = level
        for choice in self.widths:
            choice.level = choice.gate.level
            if errors:
                choice.errors = tuple(choice.gate.statistic.tolist())
        for choice, groups in zip(self.filters, opened[len(unread) :], strict=True):
            choice.level = choice.gate.level_of(groups)
            _read_filters(choice, errors)

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

    def total(self, quantity: Quantity) -> float:
        """What the network costs under the present choices."""
        return quantity.constant + sum(row.price(quantity) for row in self.rows)

    def change(self, quantity: Quantity, choice: Choice, level: int) -> float:
        """What the network would cost more with `choice` at `level`."""
        return self._touched(quantity, choice, level) - self._touched(quantity, choice, choice.level)

    def changes(self, quantity: Quantity, choice: Choice) -> list[float]:
        """`change` to every level."""
        present = self._touched(quantity, choice, choice.level)
        return [self._touched(quantity, choice, level) - present for level in range(len(choice.amounts))]

    def _touched(self, quantity: Quantity, choice: Choice, level: int) -> float:
        """What the layers that a choice touches would cost with it at `level`."""
        present, choice.level = choice.level, level
        cost = sum(row.price(quantity) for row in choice.touched)
        choice.level = present
        return cost

    def floor(self, quantity: Quantity) -> float:
        """What the network costs with the fewest filters and the cheapest widths.

        That is the least it can cost where nothing wider costs less: of bit operations, bytes and running minima. A
        modelled time may be some percent less with more filters.
        """
        present = [choice.level for choice in self.choices]
        self.make_cheapest(quantity)
        total = self.total(quantity)
        for choice, level in zip(self.choices, present, strict=True):
            choice.level = level
        return total

    def ceiling(self, quantity: Quantity) -> float:
        """What the network costs with everything as wide as it can be."""
        present = [choice.level for choice in self.choices]
        for choice in self.choices:
            choice.level = choice.top
        total = self.total(quantity)
        for choice, level in zip(self.choices, present, strict=True):
            choice.level = level
        return total

    def make_cheapest(self, quantity: Quantity) -> None:
        """Fewest filters, and in each layer the widest of the cheapest pairs of widths."""
        for choice in self.choices:
            choice.level = 0
        for row in self.rows:
            own = [choice for choice in (row.weights, row.activations) if choice.gate is not None]
            wide_first = list(product(*(range(choice.top, -1, -1) for choice in own)))
            prices = [self._price_at(quantity, row, own, levels) for levels in wide_first]
            self._price_at(quantity, row, own, wide_first[prices.index(min(prices))])

    def _price_at(self, quantity: Quantity, row: Row, own: list[Choice], levels: tuple[int, ...]) -> float:
        for choice, level in zip(own, levels, strict=True):
            choice.level = level
        return row.price(quantity)


def _row(entry: LayerPlan, layer: SearchLayer, filters: dict[PruneGate, Choice]) -> Row:
    """A layer with the choices of its own, and those of the filters it computes and reads."""

    def widths(kind: str, gate: BitGate | None, bits: int) -> Choice:
        return Choice(entry.name, kind, gate, (bits,) if gate is None else gate.chain)

    def channels(gate: PruneGate | None, count: int) -> Choice:
        return Choice(entry.name, "filters", None, (count,)) if gate is None else filters[gate]

    return Row(
        entry,
        channels(next(iter(layer.through_gate or layer.input_gate), None), entry.in_channels),
        channels(layer.own_gate(), entry.filters),
        widths("weights", layer.w_gate, layer.w_bits),
        widths("activations", searched_gate(layer.quantizer), layer.a_bits),
    )


def _followed(row: Row) -> tuple[Choice, ...]:
    return row.inputs, row.outputs, row.weights, row.activations


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
    counts = _filter_counts(gate, choice.order)
    if counts != choice.amounts:  # a short group has another place: running minima are over other amounts
        for row in choice.touched:
            row.prices.clear()
    choice.amounts = counts
    statistic = gate.statistic.nan_to_num(posinf=1.0).tolist()
    found = []
    for level in range(gate.levels - 1):
        going = choice.order[gate.open_groups(level) : gate.open_groups(level + 1)]
        found.append(sum(statistic[group] for group in going))
    choice.errors = tuple(found)
