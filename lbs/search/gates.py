"""Threshold gates: the only home of the rule g = 1(A > alpha) (LBS eq. 13-15).

What a gate holds is a float buffer, whole numbers too: it is saved with the model, and running averages of a model's
buffers are right, which would truncate integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbs.quant.codec import check_chain
from lbs.train.distributed import reduce_mean


class _Step(torch.autograd.Function):
    """Gates as they were decided; those that are free have the gradient of s = sigmoid(A - alpha), +-s(1 - s).

    lengths: how many places of a row [P, G] are its gate's own. These are computed row by row, so that no gradient
    depends on the gates beside: torch's sigmoid has other last bits at the end of a tensor, where no vector is full,
    and sums of another length are added in another order.
    """

    @staticmethod
    def forward(
        ctx: Any, statistic: Tensor, alpha: Tensor, gates: Tensor, free: Tensor | None, lengths: Sequence[int] | None
    ) -> Tensor:
        ctx.save_for_backward(statistic, alpha, free)
        ctx.lengths = lengths
        return gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        statistic, alpha, free = ctx.saved_tensors
        s = statistic - alpha
        for row in _rows(s, ctx.lengths):
            row.sigmoid_()
        slope = (grads[0] if free is None else torch.where(free, grads[0], 0)) * s * (1 - s)
        of_alpha = -slope
        if ctx.lengths is None:
            of_alpha = of_alpha.sum_to_size(alpha.shape)
        else:
            of_alpha = torch.stack([row.sum() for row in _rows(of_alpha, ctx.lengths)]).view_as(alpha)
        return (slope if ctx.needs_input_grad[0] else None), of_alpha, None, None, None


def _rows(x: Tensor, lengths: Sequence[int] | None) -> list[Tensor]:
    return [x] if lengths is None else [row.narrow(0, 0, n) for row, n in zip(x.unbind(), lengths, strict=True)]


def step(statistic: Tensor, alpha: Tensor) -> Tensor:
    """Hard gates 0/1 in alpha's dtype, shape of `statistic` broadcast with alpha, differentiable in both.

    The gradient is that of s = sigmoid(A - alpha): -s(1 - s) to alpha, +s(1 - s) to A.
    """
    return _Step.apply(statistic, alpha, (statistic > alpha).to(alpha.dtype), None, None)


def decided(
    statistic: Tensor, alpha: Tensor, is_open: Tensor, free: Tensor, lengths: Sequence[int] | None = None
) -> Tensor:
    """Gates 0/1 that more than their threshold has decided about; those that are free have the gradient of `step`.

    lengths: how many places of a row [P, G] are its gate's own, where several gates are given at once.
    """
    return _Step.apply(statistic, alpha, is_open.to(alpha.dtype), free, lengths)


def running_product(gates: Tensor) -> Tensor:
    """Products of the first 1, 2, ... along the last dimension. The gradient of torch.cumprod waits for a GPU."""
    parts = list(gates.unbind(-1))
    for place in range(1, len(parts)):
        parts[place] = parts[place - 1] * parts[place]
    return torch.stack(parts, -1)


def open_steps(is_open: Tensor) -> Tensor:
    """How many gates [..., J] of 0 and 1 are open before the first closed one, int64."""
    return (is_open > 0.5).cumprod(-1).sum(-1)


def set_plain(module: nn.Module, **values: object) -> None:
    """Set attributes that are no parameters, buffers or modules past torch, which looks through all those each time."""
    vars(module).update(values)


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
        self.alpha = nn.Parameter(torch.zeros(count, dtype=torch.float32))
        self.register_buffer("statistic", torch.ones(count, dtype=torch.float32))
        self.register_buffer("is_open", torch.ones(count, dtype=torch.float32))
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
        return open_steps(self.is_open)

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
        self.alpha.copy_(self.within_reach(self.alpha, self.statistic))

    @staticmethod
    def within_reach(alpha: Tensor, statistic: Tensor) -> Tensor:
        """What `clamp` makes of thresholds."""
        return torch.minimum(alpha.clamp(min=0), 1.05 * statistic)

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


def refresh(gates: Sequence[BitGate]) -> None:
    """`level` of all gates, read back at once."""
    levels = torch.stack([gate.open_level() for gate in gates]).tolist() if gates else []
    for gate, level in zip(gates, levels, strict=True):
        gate.level = level


@dataclass(frozen=True)
class GroupRule:
    """Which groups of filters are open: of one prune gate [G], or of several [P, G], whose counts are tensors [P, 1].

    groups: how many a gate has. least: how many stay open whatever alpha says. unit: how many come and go together.
    """

    groups: Any
    least: Any
    unit: int

    @torch.no_grad()
    def decide(self, statistic: Tensor, alpha: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Which groups are open, and which are free: not held. bool like `statistic`; alpha is a scalar or [P, 1]."""
        wanted = torch.where(alpha > 0, (statistic > alpha).sum(-1, keepdim=True), self.groups).clamp(min=self.least)
        if self.unit > 1:
            wanted = (-(-wanted // self.unit) * self.unit).clamp(max=self.groups)
        rank = statistic.argsort(descending=True, stable=True).argsort()
        free = held.abs() <= 0.5  # whole numbers, but in an average of models
        return torch.where(free, rank < wanted, held > 0.5), free

    @staticmethod
    def within_reach(alpha: Tensor, last: Tensor) -> Tensor:
        """alpha >= 0 and just below the statistic of the last group that must live, so that it can fall again."""
        below = (last * 0.999999).nan_to_num(torch.inf, torch.inf, torch.inf)
        return torch.minimum(alpha, below.to(alpha.dtype)).clamp(min=0)


def group_means(importance: Tensor, sizes: Tensor) -> Tensor:
    """Means over groups of `sizes` [..., G] filters; importance [..., G x filters], 0 behind the end of a short one."""
    return importance.view(*sizes.shape, -1).sum(-1) / sizes.to(importance.dtype)


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
        fewest = max(1, self.groups - int(max_ratio * self.groups))
        self.least = min(self.groups, -(-fewest // self.unit) * self.unit)  # that stay open whatever alpha says
        self.rule = GroupRule(self.groups, self.least, self.unit)
        self.alpha = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.register_buffer("held", torch.zeros(self.groups, dtype=torch.float32))  # -1 closed, 0 free, 1 open
        sizes = torch.tensor([float(self.group_size(group)) for group in range(self.groups)], dtype=torch.float32)
        self.register_buffer("sizes", sizes, persistent=False)
        if scored:
            self.register_buffer("score", torch.zeros(filters, dtype=torch.float32))
        self.statistic = torch.full((self.groups,), torch.inf, dtype=torch.float32)
        self.shared: Tensor | None = None  # the mask of this iteration, one tensor for all that read it

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave the autograd graph of the last iteration behind."""
        return {**self.__dict__, "statistic": self.statistic.detach(), "shared": None}

    def observe(self, importance: Tensor) -> None:
        """Set this iteration's statistic from per-filter importance [filters] in 0..1, differentiable."""
        padded = nn.functional.pad(importance, (0, self.groups * self.size - self.filters))
        self.rank_by(group_means(padded, self.sizes))

    def rank_by(self, statistic: Tensor) -> None:
        """Set this iteration's statistic [G]."""
        set_plain(self, statistic=statistic, shared=None)

    def gates(self) -> Tensor:
        """Hard gates [G], differentiable in alpha and the statistic."""
        is_open, free = self.rule.decide(self.statistic, self.alpha, self.held)
        return decided(self.statistic, self.alpha, is_open, free)

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

    @property
    def levels(self) -> int:
        """How many numbers of open groups there are, from `least` to all."""
        return 1 + -(-(self.groups - self.least) // self.unit)

    def open_groups(self, level: int) -> int:
        """Open groups at a level, 0 the fewest."""
        return min(self.groups, self.least + level * self.unit)

    def level_of(self, opened: int) -> int:
        """The lowest level with at least so many open groups."""
        return max(0, -(-(opened - self.least) // self.unit))

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
