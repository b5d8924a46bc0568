"""The budget: differentiable cost terms whose weights are driven until every target is met (LBS eq. 16).

loss = task + budget()          budget() = sum of lambda * log R,  R = bit operations, bytes or seconds under the gates
loss.backward(); optimizer.step(); budget.step()
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lbs.config import SearchRun
from lbs.graph import record_of
from lbs.search import projection
from lbs.search.controller import Controller
from lbs.search.gates import BitGate, PruneGate, set_plain
from lbs.search.ledger import Ledger
from lbs.search.outcome import BudgetResult, Reached
from lbs.search.prices import Prices, renewed, sent
from lbs.search.quantities import Quantity, Table, Target, targets_of
from lbs.search.stacks import BitStack, PruneStack
from lbs.wrappers import unwrapped
from lbs_kernels.errors import PlanError


class Budget:
    """Drives gates to a number of bit operations, megabytes or milliseconds, or to several at once.

    Weight gates learn on even steps, activation gates on odd ones; an idle gate stands still, whatever momentum or
    decay the optimizer holds for it. Once every target is met all gates are frozen as they are, so the result holds by
    construction; `finish` closes the cheapest gates if training ended before that, then opens the ones that pay most
    while they still fit.

        loss = task + budget(),  budget() = sum of lambda * log R,  R = bit operations, bytes or seconds under the gates

    Arguments:
        model: searchable and calibrated, on its device.
        bops: absolute (above 1) or a fraction of the full-precision count (at most 1). size_mb: packed weights, in
            10^6 bytes. latency_ms: of one image. table: of times, `lbs.cost.Tuned()` for what `lbs tune` measured, or
            Problem -> seconds (or None: interpolated), which leaves out what surrounds the layers in a call. Its times
            are read as running minima: nothing narrower costs more.
        strength: starting lambda. gain: growth of lambda per step while above the target (integral part, in log R).
            Both, and the rates of `parameter_groups`, are by default those of `lbs search`, which belong together.
        read_every: steps between looks at what the gates cost; 1 on the CPU, 8 on a GPU, whose work a look waits for.

    Raises:
        PlanError: no target, one that is no positive number, or one outside what the gates can reach; the smallest
            reachable value is named.

    Source:
        arXiv 2101.04935 (Loss-aware Bit Sharing), section 3.3 and eq. 16, where lambda is a constant.
    """

    def __init__(
        self,
        model: nn.Module,
        bops: float | None = None,
        strength: float = SearchRun.strength,
        gain: float = SearchRun.gain,
        *,
        size_mb: float | None = None,
        latency_ms: float | None = None,
        table: Table | None = None,
        read_every: int | None = None,
    ) -> None:
        self.model = model = unwrapped(model)
        self.full_precision = record_of(model).plan.full_precision_bops()
        self.ledger = Ledger(model)
        self.plan, self.layers = self.ledger.plan, self.ledger.layers
        self.targets = targets_of(self.plan, bops, size_mb, latency_ms, table)
        for target in self.targets:
            _check_reachable(self.ledger, target)
        self.controllers = [Controller(strength, gain, span=_span(self.ledger, target)) for target in self.targets]
        self.read_every = read_every or (8 if next(model.parameters()).is_cuda else 1)
        self.steps, self.frozen = 0, False
        self._held: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []  # thresholds, and what they were
        self._prices: dict[tuple[str, str], Prices] = {}  # of a quantity, while one side learns
        self._strengths: Tensor | None = None  # as float64 [targets] beside the gates
        self._sides = {
            side: BitStack(choice.gate for choice in self.ledger.choices if choice.kind == side)
            for side in ("weights", "activations")
        }
        self._assign_sides()

    @property
    def target(self) -> float:
        """The limit of the first quantity."""
        return self.targets[0].limit

    @property
    def strength(self) -> float:
        """The largest present lambda."""
        return max(controller.strength for controller in self.controllers)

    def bit_gates(self) -> list[tuple[str, BitGate, bool]]:
        """(layer, gate, is it the weights'?) of every searched width."""
        return [(c.layer, c.gate, c.kind == "weights") for c in self.ledger.choices if c.kind != "filters"]

    def prune_gates(self) -> list[PruneGate]:
        """The prune gate of every layer that has one."""
        return [choice.gate for choice in self.ledger.choices if choice.kind == "filters"]

    @property
    def side(self) -> str:
        """Whose bit gates learn in this step: `weights`, `activations`, or nobody's once `frozen`."""
        return "frozen" if self.frozen else ("weights", "activations")[self.steps % 2]

    def _assign_sides(self) -> None:
        for side, stack in self._sides.items():
            for gate in stack.gates:
                set_plain(gate, active=side == self.side)
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        """Remember the thresholds that must not move."""
        idle: list[BitStack | PruneStack] = [stack for side, stack in self._sides.items() if side != self.side]
        idle += self.ledger.prune_stacks if self.frozen else []
        self._held = [(stack.alphas, stack.thresholds()) for stack in idle if stack.gates]

    def cost(self, quantity: Quantity | None = None) -> Tensor:
        """R, differentiable in the active side's and the prune thresholds (LBS section 3.3).

            R + sum over active gates of (R(b_j) - R(b_(j-1))) * (g_2 ... g_j)
              + sum over prune gates of (filters that live) * (slope to the neighbouring number of filters)

        with the gates' values subtracted, so that a float64 scalar equal to `value` is left, as long as alphas have not
        moved since the last forward pass.
        """
        self._take_in()
        return self._cost(quantity or self.targets[0].quantity)

    def _cost(self, quantity: Quantity) -> Tensor:
        """`cost`, by the ledger as it is."""
        prices = self._prices_of(quantity)
        total = prices.total
        if prices.widths.gates:
            total = total + ((prices.widths.shares().double() - prices.open) * prices.steps).sum()
        if prices.filters:
            living = torch.cat([stack.living() for stack in prices.filters])
            total = total + ((living - living.detach()) * prices.slopes).sum()
        return total

    def _prices_of(self, quantity: Quantity) -> Prices:
        """Those of the side that learns; of the latest look, unless every step is one."""
        key = quantity.name, self.side
        if key not in self._prices:
            self._prices[key] = Prices(self.ledger, quantity, self.side, next(self.model.parameters()).device)
        elif self.read_every == 1:
            self._prices[key].read()
        return self._prices[key]

    def __call__(self) -> Tensor:
        """Sum of lambda * log R over the targets that are not met; zero once frozen."""
        self._hold()
        if self.frozen or not self.strength:
            return torch.zeros((), dtype=torch.float32, device=next(self.model.parameters()).device)
        self._take_in()
        if self._strengths is None or self.read_every == 1:
            self._strengths = self._renewed_strengths()
        logs = torch.stack([self._cost(target.quantity).log() for target in self.targets])
        return (self._strengths * logs).sum().float()

    def _take_in(self) -> None:
        """Rank the filters in this iteration's graph and let the thresholds decide, with a look where all steps do."""
        self._observe_filters()
        if self.read_every == 1:
            self.ledger.read()
        else:
            for stack in self.ledger.prune_stacks:
                stack.decide()

    def _observe_filters(self) -> None:
        for stack in self.ledger.prune_stacks:
            stack.observe()

    @torch.no_grad()
    def step(self) -> None:
        """After each optimizer step: clamp thresholds, swap sides, adjust lambda, freeze at the target."""
        self.clamp()
        self.advance()

    @torch.no_grad()
    def clamp(self) -> None:
        """The first part of `step`: work on the device, the same in every step of a `side`."""
        for alphas, values in self._held:
            torch._foreach_copy_(alphas, values)
        if self.frozen:
            return
        self._observe_filters()
        self._sides[self.side].clamp()
        for stack in self.ledger.prune_stacks:
            stack.clamp()

    @torch.no_grad()
    def advance(self) -> None:
        """The second part: to the next side, with a look at what the gates cost where it is due."""
        if self.frozen:
            return
        self.steps += 1
        if self.steps % self.read_every == 0:
            self._look()
        if not self.frozen:
            self._assign_sides()

    def _look(self) -> None:
        """Read back what the gates cost, once for all; freeze or press harder."""
        if self.read_every > 1:
            self._read()
        else:
            self.ledger.read()  # no step is recorded, and `clamp` has just told the gates
        values = [self.ledger.total(target.quantity) for target in self.targets]
        for value, target, controller in zip(values, self.targets, self.controllers, strict=True):
            controller.update(value, target.limit, self.read_every)
        if all(value <= target.limit for value, target in zip(values, self.targets, strict=True)):
            self.freeze()
        elif self.read_every > 1:
            self._renew()

    def _read(self, errors: bool = False) -> None:
        """The ledger of the filters as they rank now: a recorded step has told the gates without telling Python."""
        with torch.no_grad():
            self._observe_filters()
        self.ledger.read(errors)

    def _renew(self) -> None:
        """What steps read on the device until the next look."""
        self._strengths = self._renewed_strengths()
        for prices in self._prices.values():
            prices.read()

    def _renewed_strengths(self) -> Tensor:
        values, old = [controller.strength for controller in self.controllers], self._strengths
        return sent(values, next(self.model.parameters()).device) if old is None else renewed(old, values)

    def freeze(self) -> None:
        """Hold every gate as it is; only weights, norms and ranges go on training."""
        self.frozen = True
        for prune in self.prune_gates():
            prune.freeze()
        for _, gate, _ in self.bit_gates():
            gate.settle()
        self._note_model()
        self._assign_sides()

    def value(self, quantity: Quantity | None = None) -> float:
        """What the present hard gates cost; bit operations and bytes are whole numbers."""
        self._read()
        return self.ledger.total(quantity or self.targets[0].quantity)

    @torch.no_grad()
    def finish(self) -> BudgetResult:
        """Close gates until the targets hold, spend what is left over, freeze, and return targets and result.

        The result also tells what the thresholds had reached before: how much was left to the projection.
        """
        self._read(errors=True)
        before = [self.ledger.total(target.quantity) for target in self.targets]
        projection.project(self.ledger, self.targets)
        self.ledger.apply()
        self.freeze()
        result = self.result()
        rows = (replace(row, thresholds=value) for row, value in zip(result.reached, before, strict=True))
        return replace(result, reached=tuple(rows))

    def _note_model(self) -> None:
        """The plan tells by whose modelled times it was chosen."""
        record = record_of(self.model)
        marks = [target.quantity.modelled for target in self.targets if target.quantity.modelled]
        if marks:
            self.model.lbs_record = replace(record, plan=replace(record.plan, modelled=marks[0]))  # type: ignore[assignment]

    def result(self) -> BudgetResult:
        """Targets and what the present gates cost."""
        self._read()
        rows = []
        for target in self.targets:
            step = projection.smallest_step(self.ledger, target.quantity)
            rows.append(Reached(target.quantity, target.limit, self.ledger.total(target.quantity), step))
        record = record_of(self.model)
        left = tuple(name for name, _ in record.unconverted)
        return BudgetResult(tuple(rows), self.full_precision, left, record.float_bops)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs besides the model's own state."""
        state = {"steps": float(self.steps), "frozen": float(self.frozen)}
        for target, controller in zip(self.targets, self.controllers, strict=True):
            state[f"strength.{target.quantity.name}"] = controller.integral
            state[f"excess.{target.quantity.name}"] = controller.excess
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was taken; load the model's state first."""
        self.steps, self.frozen = int(state["steps"]), bool(state["frozen"])
        for target, controller in zip(self.targets, self.controllers, strict=True):
            controller.integral = state[f"strength.{target.quantity.name}"]
            controller.excess = state[f"excess.{target.quantity.name}"]
        self._read()
        self._renew()
        if self.frozen:
            self._note_model()
        self._assign_sides()


def _span(ledger: Ledger, target: Target) -> float:
    """How far the widest network is above a target, as log of the ratio; 1 where it is further, or within it."""
    over = math.log(ledger.ceiling(target.quantity) / target.limit)
    return min(1.0, over) if over > 0 else 1.0


def _check_reachable(ledger: Ledger, target: Target) -> None:
    floor = ledger.floor(target.quantity)
    if not floor <= target.limit:
        filters = "a larger max_pruning_ratio" if ledger.filters else "a search for filters (pruning=True)"
        raise PlanError(
            f"budget {target.quantity.show(target.limit)} is out of reach; the gates reach "
            f"{target.quantity.show_enough(floor)} at the least. Raise it, allow narrower bits or "
            f"{filters}"
        )


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = SearchRun.weight_decay,
    gate_lr: float = SearchRun.gate_lr,
    prune_lr: float = SearchRun.prune_lr,
) -> list[dict[str, object]]:
    """Groups for torch.optim.SGD: weights (decayed), norms, biases and ranges (not decayed), bit and prune thresholds.

    Thresholds have no weight decay and no momentum, so that an idle gate cannot drift.

    Arguments:
        model: searchable or frozen. lr: of weights, norms, biases and ranges. weight_decay: of weights alone.
            gate_lr: of bit thresholds. prune_lr: of those of filters.
    """
    bit_alphas = [m.alpha for m in model.modules() if isinstance(m, BitGate) and m.alpha.numel()]
    prune_alphas = [m.alpha for m in model.modules() if isinstance(m, PruneGate)]
    special = {id(p) for p in bit_alphas + prune_alphas}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1 and id(p) not in special]
    groups: list[dict[str, object]] = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        {"params": plain, "lr": lr, "weight_decay": 0.0, "name": "scales"},
    ]
    for name, params, rate in (("bit_gates", bit_alphas, gate_lr), ("prune_gates", prune_alphas, prune_lr)):
        if params:
            groups.append(
                {"params": params, "lr": rate, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "name": name}
            )
    return groups
