"""Gates side by side: what a budget does in every step with all gates of a network, in about the operations of one.

The gates hold everything; here their tensors are stacked, put through the rules of `gates.py`, and handed back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lbs.search.gates import BitGate, GroupRule, decided, group_means, open_steps, running_product, step
from lbs.search.importance import rule_of
from lbs.search.layers import SearchLayer


class BitStack:
    """Bit gates in a row; those of one chain and dtype are computed at once, others (branches too) one by one."""

    def __init__(self, gates: Iterable[BitGate]) -> None:
        self.gates = list(gates)
        self.alphas: list[Tensor] = [gate.alpha for gate in self.gates]
        kinds = {(type(gate), gate.chain, gate.alpha.dtype) for gate in self.gates}
        self._alike = {kind for kind, _, _ in kinds} == {BitGate} and len(kinds) == 1
        self._lengths = [len(alpha) for alpha in self.alphas]

    @property
    def mirrored(self) -> bool:
        """Whether `level` of every gate is up to date: plain gates on the CPU set it where they decide."""
        return not self.gates or (self._alike and not self.gates[0].is_open.is_cuda)

    def opened(self) -> Tensor:
        """`open_level` of every gate, int64 [n]."""
        if self._alike:
            return open_steps(self._rows([gate.is_open for gate in self.gates]))
        return torch.stack([gate.open_level() for gate in self.gates])

    def shares(self) -> Tensor:
        """`shares` of one gate after the other, [sum of J]."""
        if self._alike:
            return running_product(step(self._statistics(), self._rows(self.alphas))).flatten()
        return torch.cat([gate.shares() for gate in self.gates])

    def clamp(self) -> None:
        """`clamp` of every gate; without gradients."""
        if self._alike:
            within = BitGate.within_reach(self._rows(self.alphas), self._statistics())
            torch._foreach_copy_(self.alphas, within.unbind())
        else:
            for gate in self.gates:
                gate.clamp()

    def thresholds(self) -> tuple[Tensor, ...]:
        """A copy of `alphas`; without gradients."""
        return torch.cat(self.alphas).split(self._lengths)

    def _statistics(self) -> Tensor:
        return self._rows([gate.statistic for gate in self.gates])

    def _rows(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).view(len(tensors), -1)


class PruneStack:
    """Prune gates of one size of groups side by side: tensors [P, G], where the largest gate has G groups.

    The places that a smaller one does not have rank last, with an importance of 0, and are never open.
    """

    def __init__(self, layers: Sequence[SearchLayer]) -> None:
        self.layers = layers
        self.gates = [layer.prune for layer in layers if layer.prune is not None]
        self.alphas: list[Tensor] = [gate.alpha for gate in self.gates]
        self.importance = rule_of(layers[0])
        self._lengths = [gate.groups for gate in self.gates]
        self._lay_out()
        self.observe()
        self.decide()

    def _lay_out(self) -> None:
        """What does not change as long as the model stays where it is."""
        like, size, most = self.alphas[0], self.gates[0].size, max(self._lengths)
        filters, groups = [gate.filters for gate in self.gates], self._lengths
        self._filters = torch.tensor(_places(filters, most * size), device=like.device)
        self._groups = torch.tensor(_places(groups, most), device=like.device)
        real = (self._filters < sum(filters)).to(like.dtype)
        self._real = real.view(len(groups), most, size)  # 1 where there is a filter
        self._sizes = self._real.sum(-1).clamp(min=1)
        counts = torch.tensor([[[gate.groups], [gate.least]] for gate in self.gates], device=like.device)
        self._rule = GroupRule(counts[:, 0], counts[:, 1], self.gates[0].unit)
        self._cuts = [part for length in groups for part in (length, most - length)]  # own places, others

    def observe(self) -> None:
        """`observe_filters` of every layer, whose gates get what has no gradient: that is kept here, for `living`."""
        if self._real.device != self.alphas[0].device:
            self._lay_out()
        looked = _placed([self.importance.look(layer) for layer in self.layers], self._filters)
        self._statistic = group_means(self.importance.score(looked), self._sizes)
        own = self._statistic.detach().view(-1).split(self._cuts)[::2]
        for gate, statistic in zip(self.gates, own, strict=True):
            gate.rank_by(statistic)

    def decide(self) -> Tensor:
        """Let the thresholds decide about the groups as they rank; returns how many are open, int64 [P]."""
        held = _placed([gate.held for gate in self.gates], self._groups)
        self._open, self._free = self._rule.decide(self._statistic, self._columns(), held)
        return self._open.sum(1)

    def living(self) -> Tensor:
        """Filters that live by the latest decision, float64 [P], differentiable."""
        gates = decided(self._statistic, self._columns(), self._open, self._free, self._lengths)
        return (gates.unsqueeze(-1) * self._real).double().sum((1, 2))

    def clamp(self) -> None:
        """Keep every threshold within reach; without gradients."""
        last = self._statistic.sort(descending=True).values.gather(1, self._rule.least - 1)
        torch._foreach_copy_(self.alphas, self._rule.within_reach(torch.stack(self.alphas), last.squeeze(1)).unbind())

    def thresholds(self) -> tuple[Tensor, ...]:
        """A copy of `alphas`; without gradients."""
        return torch.stack(self.alphas).unbind()

    def _columns(self) -> Tensor:
        return torch.stack(self.alphas).unsqueeze(1)


def _places(counts: Sequence[int], most: int) -> list[int]:
    """For gates of so many filters or groups, the index of each in a row of all, behind which is one more for no one's.

    >>> _places([2, 3], 3)
    [0, 1, 5, 2, 3, 4]
    """
    total, starts = sum(counts), accumulate([0, *counts])
    return [s + k if k < n else total for s, n in zip(starts, counts, strict=False) for k in range(most)]


def _placed(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    """What each gate has [n] in its row of [P, N], and 0 in the places it does not have."""
    return torch.cat([*parts, parts[0].new_zeros(1)]).index_select(0, places).view(len(parts), -1)


def prune_stacks(layers: Iterable[SearchLayer]) -> list[PruneStack]:
    """The prune gates of all layers that have one, in as few stacks as their groups and what ranks them allow."""
    found: dict[object, list[SearchLayer]] = {}
    for layer in layers:
        gate = layer.prune
        if gate is not None:
            rule = rule_of(layer)
            found.setdefault((gate.size, gate.unit, rule, rule.look(layer).dtype), []).append(layer)
    return [PruneStack(alike) for alike in found.values()]
