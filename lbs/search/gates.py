"""Threshold gates: the only home of the rule g = 1(A > alpha) (LBS eq. 13-15).

What a gate holds is a float buffer, whole numbers too: it is saved with the model, and running averages of a model's
buffers are right, which would truncate integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant.codec import check_chain
from lbs.train.distributed import reduce_mean


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


def running_product(gates: Tensor) -> Tensor:
    """Products of the first 1, 2, ... along the last dimension. The gradient of torch.cumprod waits for a GPU."""
    parts = list(gates.unbind(-1))
    for place in range(1, len(parts)):
        parts[place] = parts[place - 1] * parts[place]
    return torch.stack(parts, -1)


class BitGate(nn.Module):
    """Nested gates of one tensor: gate j opens the step from width j to j + 1; a closed gate closes the later ones.

    Buffers hold what the last active iteration saw, so that an idle gate stands still: `statistic` float [J], 1 (above
    any error) until something was seen, and `is_open` float [J] of 0 and 1, J = len(chain) - 1. `alpha` float [J]
    starts at 0: everything open.
    """

    statistic: Tensor
    is_open: Tensor
    widths: Tensor  # the chain, beside is_open: a tensor made of Python numbers would have to wait for a GPU

    def __init__(self, chain: tuple[int, ...]) -> None:
        super().__init__()
        self.chain = check_chain(chain)
        count = len(self.chain) - 1
        self.alpha = nn.Parameter(torch.zeros(count))
        self.register_buffer("statistic", torch.ones(count))
        self.register_buffer("is_open", torch.ones(count))
        self.register_buffer("widths", torch.tensor(self.chain, dtype=torch.float32), persistent=False)
        self.level = count  # index of the open width in the chain; mirrors is_open
        self.active = False  # gates decide and learn in this iteration

    @property
    def bits(self) -> int:
        """The width that is open now."""
        return self.chain[self.level]

    def train(self, mode: bool = True) -> BitGate:
        """As in torch.nn.Module; `level` follows `is_open`, which an average of models may have changed."""
        self.refresh()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh()

    def observe(self, errors: Tensor) -> Tensor:
        """Decide on this batch and return hard gates [J] for the quantizer, differentiable in alpha.

        Arguments:
            errors: mean |z - z_j| at each width but the last, [J]. A_j is the error of the present gated sum: gates
                behind a closed one see what that one sees, the value they would refine.

        Nothing is read back from a GPU: there `level` follows at the next `refresh`.
        """
        with torch.no_grad():
            opened = (errors > self.alpha).long().cumprod(0)
            places = torch.arange(len(self.alpha), device=errors.device)
            self.statistic.copy_(errors.index_select(0, torch.minimum(places, opened.sum())))
        gates = step(self.statistic.clone(), self.alpha)
        self.is_open.copy_(gates.detach() > 0)
        if not self.is_open.is_cuda:
            self.refresh()
        return gates

    def open_level(self) -> Tensor:
        """`level` as an int64 scalar beside `is_open`, which is up to date on a GPU too."""
        return (self.is_open > 0.5).long().cumprod(0).sum()

    def open_width(self) -> Tensor:
        """`bits` as an int64 scalar beside `is_open`."""
        return self.widths.index_select(0, self.open_level().reshape(1))[0].long()

    def refresh(self) -> None:
        """Read `level` back from where the gates were decided."""
        self.level = int(self.open_level())

    def shares(self) -> Tensor:
        """g_2 ... g_j for every gate [J]: what the increment from width j - 1 to j counts, differentiable in alpha."""
        return running_product(step(self.statistic.clone(), self.alpha))

    @torch.no_grad()
    def clamp(self) -> None:
        """alpha in [0, 1.05 A]: a gate far beyond its statistic could never open again."""
        self.alpha.copy_(torch.minimum(self.alpha.clamp(min=0), 1.05 * self.statistic))

    @torch.no_grad()
    def close_to(self, level: int) -> None:
        """Force the open width to chain[level] and hold it there."""
        count = len(self.chain) - 1
        self.is_open.copy_(torch.arange(count) < level)
        below = torch.minimum(self.alpha, 0.9 * self.statistic)
        self.alpha.copy_(torch.where(self.is_open > 0.5, below, self.statistic))
        self.refresh()

    def settle(self) -> None:
        """Nothing more to do when the search is over: the open width is the only one computed."""


def shares_of(gates: Sequence[BitGate]) -> Tensor:
    """`shares` of one gate after the other, [sum of J]; those of equal chains at once, in as many operations as one."""
    if {type(gate) for gate in gates} == {BitGate} and len({gate.chain for gate in gates}) == 1:
        statistics, alphas = (torch.stack([getattr(gate, name) for gate in gates]) for name in ("statistic", "alpha"))
        return running_product(step(statistics, alphas)).flatten()
    return torch.cat([gate.shares() for gate in gates])


def refresh(gates: Sequence[BitGate]) -> None:
    """`level` of all gates, read back at once."""
    levels = torch.stack([gate.open_level() for gate in gates]).tolist() if gates else []
    for gate, level in zip(gates, levels, strict=True):
        gate.level = level


class PruneGate(nn.Module):
    """One threshold for the filter groups of a layer: g_c = 1(A_c > alpha), c = 0..G-1, groups of `size` filters.

    At most `max_ratio` of the groups close, never all of them, and as many groups live as make the filters a multiple
    of `tile`: where alpha would close more, the most important ones stay (the first of equals). alpha = 0 closes
    nothing. The statistic is what `observe` is given (lbs/search/importance.py). `score` [filters] is the running mean
    that some rules keep; the others have none.
    """

    held: Tensor
    score: Tensor
    sizes: Tensor  # filters of each group, beside alpha, as floats

    def __init__(self, filters: int, size: int, max_ratio: float, tile: int = 1, scored: bool = False) -> None:
        super().__init__()
        self.filters, self.size, self.max_ratio, self.tile = filters, size, max_ratio, tile
        self.groups = -(-filters // size)
        self.unit = math.lcm(size, tile) // size  # groups that come and go together
        self.alpha = nn.Parameter(torch.zeros(()))
        self.register_buffer("held", torch.zeros(self.groups))  # -1 closed, 0 free, 1 open
        sizes = torch.tensor([float(self.group_size(group)) for group in range(self.groups)])
        self.register_buffer("sizes", sizes, persistent=False)
        if scored:
            self.register_buffer("score", torch.zeros(filters))
        self.statistic = torch.full((self.groups,), torch.inf)
        self.shared: Tensor | None = None  # the mask of this iteration, one tensor for all that read it

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave the autograd graph of the last iteration behind."""
        return {**self.__dict__, "statistic": self.statistic.detach(), "shared": None}

    def observe(self, importance: Tensor) -> None:
        """Set this iteration's statistic from per-filter importance [filters] in 0..1, differentiable."""
        padded = nn.functional.pad(importance, (0, self.groups * self.size - self.filters))
        self.statistic = padded.view(self.groups, self.size).sum(1) / self.sizes.to(importance.dtype)
        self.shared = None

    def gates(self) -> Tensor:
        """Hard gates [G], differentiable in alpha and the statistic."""
        free = step(self.statistic, self.alpha)
        with torch.no_grad():
            wanted = torch.where(self.alpha > 0, (free > 0).sum(), self.groups).clamp(min=self.least)
            count = -(-wanted // self.unit) * self.unit
            order = self.statistic.argsort(descending=True, stable=True)
            hard = (order.argsort() < count).to(free.dtype)
        free = hard + (free - free.detach())
        held = self.held.round()
        return torch.where(held == 0, free, (held > 0).to(free.dtype))

    @property
    def least(self) -> int:
        """Groups that stay open whatever alpha says."""
        fewest = max(1, self.groups - int(self.max_ratio * self.groups))
        return min(self.groups, -(-fewest // self.unit) * self.unit)

    def mask(self) -> Tensor:
        """Per-filter mask [filters] of 0 and 1, differentiable."""
        return self.gates().unsqueeze(1).expand(-1, self.size).reshape(-1)[: self.filters]

    def shared_mask(self) -> Tensor:
        """`mask`, computed once an iteration: all consumers multiply by one tensor, and its gradient is their sum."""
        return self.mask() if self.shared is None else self.shared

    def share(self, watch: bool) -> None:
        """Make the shared mask of this iteration. watch: the running `score` follows |dL / d mask|."""
        self.shared = self.mask()
        if watch and self.shared.requires_grad:
            self.shared.register_hook(self.note)

    @torch.no_grad()
    def note(self, value: Tensor, keep: float = 0.9) -> None:
        """Let the running `score` follow |value| [filters], averaged over ranks."""
        self.score.mul_(keep).add_(reduce_mean(value.detach().to(self.score.dtype).abs()), alpha=1 - keep)

    @torch.no_grad()
    def clamp(self) -> None:
        """alpha >= 0 and just below the statistic of the last group that must live, so that it can fall again."""
        limit = self.statistic.detach().sort(descending=True).values[self.least - 1]
        below = torch.where(limit.isfinite(), limit * 0.999999, torch.full_like(limit, torch.inf))
        self.alpha.copy_(torch.minimum(self.alpha, below.to(self.alpha.dtype)).clamp(min=0))

    @property
    def levels(self) -> int:
        """How many numbers of open groups there are, from `least` to all."""
        return 1 + -(-(self.groups - self.least) // self.unit)

    def open_groups(self, level: int) -> int:
        """Open groups at a level, 0 the fewest."""
        return min(self.groups, self.least + level * self.unit)

    def group_size(self, group: int) -> int:
        """Filters of one group; the last may be short."""
        return min(self.size, self.filters - group * self.size)

    @torch.no_grad()
    def hold(self, groups: tuple[int, ...], state: int) -> None:
        """Hold groups closed (-1) or open (1), or let alpha decide (0)."""
        self.held[list(groups)] = float(state)
        self.shared = None

    @torch.no_grad()
    def freeze(self) -> None:
        """Hold the present gates."""
        self.held.copy_(2 * self.gates() - 1)

    def kept(self) -> tuple[int, ...]:
        """Indices of the filters that live."""
        return tuple(int(i) for i in self.mask().detach().nonzero().flatten())
