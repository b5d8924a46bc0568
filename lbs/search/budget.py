"""The budget: a differentiable cost term whose weight is driven until the target is met (LBS eq. 16).

loss = task + budget()          budget() = lambda * log R,  R = bit operations under the present gates
loss.backward(); optimizer.step(); budget.step()
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbs.cost import pair_macs
from lbs.graph import record_of
from lbs.plan import LayerPlan
from lbs.search.freeze import plan_of
from lbs.search.gates import BitGate, PruneGate
from lbs.search.layers import SearchLayer, SearchQuantizer
from lbs_kernels.errors import PlanError


@dataclass(frozen=True)
class BudgetResult:
    """Target and what was reached, in bit operations of one image."""

    target: float
    value: int
    full_precision: int

    def __str__(self) -> str:
        state = "met" if self.value <= self.target else "MISSED"
        share = f"{self.value / self.target:.1%}"
        return f"budget {self.target / 1e6:.1f}M BOPs, result {self.value / 1e6:.1f}M ({share}): {state}"


class Budget:
    """Drives gates to a number of bit operations.

    Weight gates learn on even steps, activation gates on odd ones; an idle gate stands still. Once the target is met
    all gates are frozen as they are, so the result holds by construction; `finish` closes the cheapest gates if
    training ended before that, then opens the ones that pay most while they still fit.

    Arguments:
        bops: absolute (above 1) or a fraction of the full-precision count (at most 1).
        strength: starting lambda. gain: growth of lambda per step while above the target (integral part, in log R).

    Raises:
        PlanError: a target that is no positive number, or outside what the gates can reach; the smallest reachable
            value is named.
    """

    def __init__(self, model: nn.Module, bops: float, strength: float = 1.0, gain: float = 0.01) -> None:
        if not (isinstance(bops, int | float) and math.isfinite(bops) and bops > 0):
            raise PlanError(
                f"budget bops={bops!r}; give a fraction of full precision in (0, 1], or bit operations of one image"
            )
        self.model = model
        self.plan = record_of(model).plan
        self.full_precision = self.plan.full_precision_bops()
        self.target = float(bops) * self.full_precision if bops <= 1 else float(bops)
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, SearchLayer)}
        if not self.layers:
            raise PlanError(f"{type(model).__name__} has no gates; make it searchable with lbs.prepare first")
        floor = self._reachable_floor()
        if not floor <= self.target:
            raise PlanError(
                f"budget {self.target / 1e6:.3f}M BOPs is out of reach; the gates reach {floor / 1e6:.3f}M at the "
                "least. Raise it, allow narrower bits or a larger max_pruning_ratio"
            )
        self.strength, self.gain = strength, gain
        self.steps, self.frozen = 0, False
        self._assign_sides()

    def bit_gates(self) -> list[tuple[str, BitGate, bool]]:
        """(layer, gate, is it the weights'?) of every searched width."""
        found = []
        for name, layer in self.layers.items():
            if layer.w_gate is not None:
                found.append((name, layer.w_gate, True))
            if isinstance(layer.quantizer, SearchQuantizer):
                found.append((name, layer.quantizer.gate, False))
        return found

    def prune_gates(self) -> list[PruneGate]:
        """The prune gate of every layer that has one."""
        return [layer.prune for layer in self.layers.values() if layer.prune is not None]

    def _assign_sides(self) -> None:
        for _, gate, weights in self.bit_gates():
            gate.active = not self.frozen and weights == (self.steps % 2 == 0)

    def _reachable_floor(self) -> float:
        total = 0.0
        for layer in self.plan.layers:
            module = self.layers[layer.name]
            w_bits = module.w_gate.chain[0] if module.w_gate is not None else module.w_bits
            quantizer = module.quantizer
            a_bits = quantizer.gate.chain[0] if isinstance(quantizer, SearchQuantizer) else quantizer.bits
            kept = [_least(module.prune), _least(module._input_gate[0] if module._input_gate else None)]
            total += layer.problem().macs * w_bits * a_bits * kept[0] * kept[1]
        return total

    def cost(self) -> Tensor:
        """R: bit operations under the present gates, differentiable in the active side's and the prune thresholds.

        A float64 scalar: whole numbers, so it equals `value` exactly as long as alphas have not moved since the last
        forward pass.
        """
        total = torch.zeros((), dtype=torch.float64, device=next(self.model.parameters()).device)
        for layer in self.plan.layers:
            module = self.layers[layer.name]
            w_bits = _soft(module.w_gate, module.w_bits)
            gate = module.quantizer.gate if isinstance(module.quantizer, SearchQuantizer) else None
            a_bits = _soft(gate, module.quantizer.bits)
            total = total + self._pairs(layer, module) * w_bits * a_bits
        return total

    def _pairs(self, layer: LayerPlan, module: SearchLayer) -> Tensor | float:
        """Multiply-accumulates of the layer over the filters that live."""
        outputs: Tensor | float = layer.filters if module.prune is None else module.prune.mask().double().sum()
        inputs: Tensor | float = layer.in_channels
        if module._input_gate:
            inputs = module._input_gate[0].mask().double().sum()
        return inputs * outputs * (pair_macs(layer.problem()) / layer.groups)

    def __call__(self) -> Tensor:
        """lambda * log R; zero once frozen."""
        if self.frozen:
            return torch.zeros(())
        for layer in self.layers.values():
            layer.observe_filters()
        return self.strength * self.cost().log().float()

    @torch.no_grad()
    def step(self) -> None:
        """After each optimizer step: clamp thresholds, swap sides, adjust lambda, freeze at the target."""
        if self.frozen:
            return
        for layer in self.layers.values():
            layer.observe_filters()
        for _, gate, _ in self.bit_gates():
            gate.clamp()
        for prune in self.prune_gates():
            prune.clamp()
        self.steps += 1
        value = self.value()
        if value <= self.target:
            self.freeze()
        else:
            self.strength *= 1 + self.gain * min(1.0, math.log(value / self.target))
            self._assign_sides()

    def freeze(self) -> None:
        """Hold every gate as it is; only weights, norms and ranges go on training."""
        self.frozen = True
        for prune in self.prune_gates():
            prune.freeze()
        self._assign_sides()

    def value(self) -> int:
        """Bit operations of the present hard gates."""
        return plan_of(self.model).bops()

    @torch.no_grad()
    def finish(self) -> BudgetResult:
        """Close gates until the target holds, spend what is left over, freeze, and return target and result."""
        if not self.frozen:
            self._close_cheapest()
        self._spend_rest()
        self.freeze()
        return self.result()

    def _close_cheapest(self) -> None:
        """Close the gate with the smallest error added per bit operation saved, until the target holds.

        Filters go only after every width is at its narrowest, one group at a time.
        """
        while self.value() > self.target:
            options = []
            for name, gate, weights in self.bit_gates():
                if gate.level > 0:
                    saved = self._saving(name, gate, weights, gate.level - 1)
                    options.append((float(_finite(gate.statistic[gate.level - 1])) / saved, name, gate))
            if options:
                _, name, gate = min(options, key=lambda option: option[:2])
                gate.close_to(gate.level - 1)
                self._sync(name)
            elif not self._close_weakest_group():
                return

    def _close_weakest_group(self) -> bool:
        """Close the filter group of least importance per bit operation saved; False if none may close."""
        options = []
        present = self.value()
        for index, prune in enumerate(self.prune_gates()):
            group = prune.weakest()
            if group is not None:
                before = int(prune.forced[group])
                prune.force(group, 0)
                saved = present - self.value()
                prune.force(group, before)
                options.append((float(_finite(prune.statistic[group])) / saved, index, group))
        if not options:
            return False
        _, index, group = min(options)
        self.prune_gates()[index].force(group, 0)
        return True

    def _spend_rest(self) -> None:
        """Open the gate whose error is largest per bit operation, as long as one fits."""
        while True:
            room = self.target - self.value()
            options = []
            for name, gate, weights in self.bit_gates():
                if gate.level + 1 < len(gate.chain):
                    price = -self._saving(name, gate, weights, gate.level + 1)
                    if price <= room:
                        options.append((float(_finite(gate.statistic[gate.level])) / price, name, gate))
            if not options:
                return
            _, name, gate = max(options, key=lambda option: option[:2])
            gate.close_to(gate.level + 1)
            self._sync(name)

    def _saving(self, name: str, gate: BitGate, weights: bool, level: int) -> float:
        module, layer = self.layers[name], self.plan.layer(name)
        other = module.quantizer.bits if weights else module.w_bits
        return float(self._pairs(layer, module)) * other * (gate.bits - gate.chain[level])

    def _sync(self, name: str) -> None:
        module = self.layers[name]
        if module.w_gate is not None:
            module.w_bits = module.w_gate.bits
        if isinstance(module.quantizer, SearchQuantizer):
            module.quantizer.bits = module.quantizer.gate.bits

    def result(self) -> BudgetResult:
        """Target and result."""
        return BudgetResult(self.target, self.value(), self.full_precision)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs besides the model's own state."""
        return {"strength": self.strength, "steps": float(self.steps), "frozen": float(self.frozen)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was taken; load the model's state first."""
        self.strength, self.steps, self.frozen = state["strength"], int(state["steps"]), bool(state["frozen"])
        for name, gate, _ in self.bit_gates():
            gate.refresh()
            self._sync(name)
        for layer in self.layers.values():
            layer.observe_filters()
        self._assign_sides()


def _finite(value: Tensor) -> Tensor:
    return torch.nan_to_num(value, posinf=1.0)


def _least(gate: PruneGate | None) -> float:
    """Smallest share of filters a prune gate can leave."""
    if gate is None:
        return 1.0
    return min(1.0, gate.least * gate.size / gate.filters)


def _soft(gate: BitGate | None, bits: int) -> Tensor | float:
    if gate is None:
        return float(bits)
    return gate.soft_bits() if gate.active else float(gate.bits)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 1e-4, gate_lr: float = 0.006, prune_lr: float = 0.05
) -> list[dict[str, object]]:
    """Groups for torch.optim.SGD: weights (decayed), norms, biases and ranges (not decayed), bit and prune thresholds.

    Thresholds have no weight decay and no momentum, so that an idle gate cannot drift.
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
