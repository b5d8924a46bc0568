"""Threshold gates: the only home of the rule g = 1(A > alpha) (LBS eq. 13-15)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant.codec import check_chain


class _Step(torch.autograd.Function):
    """1(A > alpha); the gradient is that of sigmoid(A - alpha): -s(1 - s) to alpha, +s(1 - s) to A."""

    @staticmethod
    def forward(ctx: Any, statistic: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(statistic, alpha)
        return (statistic > alpha).to(alpha.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        statistic, alpha = ctx.saved_tensors
        s = torch.sigmoid(statistic - alpha)
        slope = grads[0] * s * (1 - s)
        return (slope if ctx.needs_input_grad[0] else None), (-slope).sum_to_size(alpha.shape)


def step(statistic: Tensor, alpha: Tensor) -> Tensor:
    """Hard gates 0/1 in alpha's dtype, shape of `statistic` broadcast with alpha, differentiable in both."""
    return _Step.apply(statistic, alpha)


class BitGate(nn.Module):
    """Nested gates of one tensor: gate j opens the step from width j to j + 1; a closed gate closes the later ones.

    Buffers hold what the last active iteration saw, so that an idle gate stands still: `statistic` float [J] and
    `is_open` bool [J], J = len(chain) - 1. `alpha` float [J] starts at 0: everything open.
    """

    statistic: Tensor
    is_open: Tensor

    def __init__(self, chain: tuple[int, ...]) -> None:
        super().__init__()
        self.chain = check_chain(chain)
        count = len(self.chain) - 1
        self.alpha = nn.Parameter(torch.zeros(count))
        self.register_buffer("statistic", torch.full((count,), torch.inf))
        self.register_buffer("is_open", torch.ones(count, dtype=torch.bool))
        self.level = count  # index of the open width in the chain; mirrors is_open
        self.active = False  # gates decide and learn in this iteration

    @property
    def bits(self) -> int:
        """The width that is open now."""
        return self.chain[self.level]

    def observe(self, statistic: Tensor) -> Tensor:
        """Decide from the statistics [J] of this batch, remember them, and return hard gates [J] for the quantizer."""
        self.statistic.copy_(statistic)
        gates = step(self.statistic.clone(), self.alpha)
        self.is_open.copy_(gates.detach() > 0)
        self.refresh()
        return gates

    def refresh(self) -> None:
        """Recompute `level` from `is_open` (after loading a state)."""
        self.level = int(self.is_open.long().cumprod(0).sum())

    def soft_bits(self) -> Tensor:
        """b_1 + sum_j (b_j - b_(j-1)) g_2 ... g_j, differentiable in alpha; equals `bits`."""
        gates = step(self.statistic.clone(), self.alpha).cumprod(0)
        widths = torch.tensor(self.chain, dtype=gates.dtype, device=gates.device)
        return widths[0] + ((widths[1:] - widths[:-1]) * gates).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """alpha in [0, 1.05 A]: a gate far beyond its statistic could never open again."""
        high = torch.where(self.statistic.isfinite(), 1.05 * self.statistic, torch.full_like(self.statistic, torch.inf))
        self.alpha.copy_(torch.minimum(self.alpha.clamp(min=0), high))

    @torch.no_grad()
    def close_to(self, level: int) -> None:
        """Force the open width to chain[level] and hold it there."""
        count = len(self.chain) - 1
        self.is_open.copy_(torch.arange(count) < level)
        finite = torch.where(self.statistic.isfinite(), self.statistic, torch.ones_like(self.statistic))
        self.alpha.copy_(torch.where(self.is_open, self.alpha.clamp(max=0.9 * finite), finite))
        self.refresh()


class PruneGate(nn.Module):
    """One threshold for the filter groups of a layer: g_c = 1(A_c > alpha), c = 0..G-1, groups of `size` filters.

    At most `max_ratio` of the groups close, and never all of them; groups that tie at that cap stay open. The statistic
    is what `observe` is given: the paper's mean |w| / max |w|, or the following norm's |gamma| / max |gamma|.
    """

    def __init__(self, filters: int, size: int, max_ratio: float) -> None:
        super().__init__()
        self.filters, self.size, self.max_ratio = filters, size, max_ratio
        self.groups = -(-filters // size)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.register_buffer("forced", torch.full((self.groups,), -1, dtype=torch.int8))  # -1 free, 0 closed, 1 open
        self.statistic = torch.full((self.groups,), torch.inf)

    forced: Tensor

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave the autograd graph of the last iteration behind."""
        return {**self.__dict__, "statistic": self.statistic.detach()}

    def observe(self, importance: Tensor) -> None:
        """Set this iteration's statistic from per-filter importance [filters] in 0..1, differentiable."""
        padded = nn.functional.pad(importance, (0, self.groups * self.size - self.filters))
        sizes = torch.full((self.groups,), float(self.size), device=importance.device)
        sizes[-1] = self.filters - self.size * (self.groups - 1)
        self.statistic = padded.view(self.groups, self.size).sum(1) / sizes

    def gates(self) -> Tensor:
        """Hard gates [G], differentiable."""
        free = step(self.statistic, self._capped_alpha())
        return torch.where(self.forced >= 0, self.forced.to(free.dtype), free)

    @property
    def least(self) -> int:
        """Groups that stay open whatever alpha says."""
        return max(1, self.groups - int(self.max_ratio * self.groups))

    def _capped_alpha(self) -> Tensor:
        """alpha, lowered so that enough groups stay open (also where their statistic is 0)."""
        limit = self.statistic.detach().sort(descending=True).values[self.least - 1]
        if not bool(limit.isfinite()):
            return self.alpha
        return torch.minimum(self.alpha, limit * 0.999999 - 1e-20)

    def mask(self) -> Tensor:
        """Per-filter mask [filters] of 0 and 1, differentiable."""
        return self.gates().repeat_interleave(self.size)[: self.filters]

    @torch.no_grad()
    def clamp(self) -> None:
        """alpha >= 0 and within the cap."""
        self.alpha.copy_(self._capped_alpha().clamp(min=0))

    @torch.no_grad()
    def weakest(self) -> int | None:
        """The open group with the smallest statistic; None if no more may close."""
        gates = self.gates()
        if int(gates.sum()) <= self.least:
            return None
        return int(torch.where(gates > 0, self.statistic, torch.inf).argmin())

    @torch.no_grad()
    def force(self, group: int, state: int) -> None:
        """Hold one group closed (0) or open (1), or let alpha decide (-1)."""
        self.forced[group] = state

    @torch.no_grad()
    def freeze(self) -> None:
        """Hold the present gates."""
        self.forced.copy_(self.gates().to(torch.int8))

    def kept(self) -> tuple[int, ...]:
        """Indices of the filters that live."""
        return tuple(int(i) for i in self.mask().detach().nonzero().flatten())
