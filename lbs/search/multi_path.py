"""The multi-path baseline: a branch of its own for every width, mixed by learned weights (DNAS), nothing shared.

    w' = sum_b p_b * Q_b(w; v_b),   p = softmax(alpha / T),   v_b = |range| * |scale_b|

T puts logits on the scale of bit sharing's thresholds, so that one learning rate serves both. The widest branch starts
with two thirds of the weight: among equal ones the first step of the budget would decide everything.

Every step computes K_w + K_a quantized copies where bit sharing computes one of each. What the papers compare with is
dearer: there a branch is a convolution with weights of its own,

    y = sum_b p_b * (Q_b(w_b; v_b) * x'),   x' = the mix of the activations' branches

(Wu et al. 2018, arXiv 1812.00090): `SearchConfig(multi_path="convolutions")`. With equal weights both are the same
number, so that they differ in what they learn, in time and in memory. One convolution for the sum is the cheaper form,
as Cai and Vasconcelos have it (2020, arXiv 2004.05795). The same `Budget` drives it: the share of the increment to
width b_j is p_j + p_(j+1) + ... instead of a product of gates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant import codec, fake
from lbs.search.gates import BitGate

TEMPERATURE = 0.1
FIRST_SHARE = 2 / 3  # of the widest branch


class BranchGate(BitGate):
    """Branches of one tensor: `alpha` float [K], T times their logits; `scale` [K], ranges over the common one."""

    def __init__(self, chain: tuple[int, ...]) -> None:
        super().__init__(chain)
        others = (1 - FIRST_SHARE) / max(1, len(self.chain) - 1)
        self.alpha = nn.Parameter(torch.zeros(len(self.chain), dtype=torch.float32))
        self.alpha.data[-1] = TEMPERATURE * math.log(FIRST_SHARE / others)
        self.scale = nn.Parameter(torch.ones(len(self.chain), dtype=torch.float32))

    def open_level(self) -> Tensor:
        """The branch with the largest weight, the widest of equals: where training starts."""
        return len(self.chain) - 1 - self.alpha.flip(0).argmax()

    def weights(self) -> Tensor:
        """p [K], what each branch counts."""
        return (self.alpha / TEMPERATURE).softmax(0)

    def shares(self) -> Tensor:
        """p_j + p_(j+1) + ... for every step of the chain [J]."""
        tail = self.weights().flip(0).cumsum(0).flip(0)[1:]
        self.statistic.copy_(tail.detach())
        return tail

    def mix(self, x: Tensor, v: Tensor, coding: codec.Coding) -> Tensor:
        """sum_b p_b * Q_b(x)."""
        shares = self.weights().to(x.dtype)
        parts = [shares[level] * self.branch(x, v, coding, level) for level in range(len(self.chain))]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def branch(self, x: Tensor, v: Tensor, coding: codec.Coding, level: int) -> Tensor:
        """Q_b(x; v_b) of one branch."""
        own, bits = v * self.scale[level].abs(), self.chain[level]
        if coding.is_weight:
            return fake.fake_weight(x, own, bits)
        return fake.fake_activation(x, own, bits, coding)

    @torch.no_grad()
    def clamp(self) -> None:
        """Logits are free."""

    @torch.no_grad()
    def close_to(self, level: int) -> None:
        """Give one branch all the weight."""
        self.alpha.fill_(-40.0)
        self.alpha[level] = 0.0
        self.level = level

    def settle(self) -> None:
        """One branch is left once the search is over."""
        self.close_to(int(self.open_level()))


def settled_weight(layer: Any, bits: int) -> Tensor:
    """The weights of the branch of a width, or the layer's where its branches share them."""
    gate = getattr(layer, "w_gate", None)
    if not getattr(layer, "paths", None) or gate is None or bits not in gate.chain:
        return layer.weight
    return layer.path_weight(gate.chain.index(bits))


def settled_range(common: nn.Parameter, gate: BitGate | None) -> nn.Parameter:
    """The range of the branch that is left; the common range itself where there are no branches."""
    if not isinstance(gate, BranchGate):
        return common
    scale = gate.scale.detach()[int(gate.open_level())].abs()
    return nn.Parameter(common.detach().abs() * scale, requires_grad=common.requires_grad)
