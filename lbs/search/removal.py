"""Filters that go after training: in which order, what that costs, and networks without them.

Their order, and how the layers that read them make up for it, is that of `lbs/search/readers.py`. What it costs to lose
filters is measured on images that no weights were fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lbs.channels import ChannelGroup
from lbs.graph import record_of
from lbs.plan import Plan, grid_at
from lbs.quant.layers import QuantLayer
from lbs.search.freeze import freeze
from lbs.search.layers import FULL_BITS
from lbs.search.ledger import Choice, Ledger
from lbs.search.prepare import SearchConfig, prepare
from lbs.search.readers import Reader, elimination, observe, readers_of
from lbs.search.sensitivity import Loss, losses
from lbs.traced import evaluating
from lbs.wrappers import copied

LEVELS = 7  # numbers of filters whose loss is measured; in between it is interpolated
SWEEPS = 3  # parts the readers are fitted in, each on what the network computes after those before it


def plain(model: nn.Module, example: Tensor, config: SearchConfig) -> tuple[nn.Module, tuple[ChannelGroup, ...]]:
    """A copy of a float network in plain layers, as searchable ones are named, and its groups of channels."""
    copy = freeze(prepare(model, example, replace(config, bits=(FULL_BITS,), pruning=False)))
    return copy.eval(), record_of(copy).groups


class _Trial:
    """Filters of a float network that are gone for a while, for `losses`: levels of choices, applied to the readers."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self._fits: dict[Choice, list[list[tuple[Reader, Tensor, Tensor | None]]]] = {}
        self._present: dict[Choice, int] = {}

    def add(self, producer: str, readers: Sequence[Reader], kept: Sequence[Sequence[int]]) -> Choice:
        """A choice whose levels are filters kept, fewest first, all of them last."""
        choice = Choice(producer, "filters", None, tuple(map(len, kept)), len(kept) - 1)
        fits: list[list[tuple[Reader, Tensor, Tensor | None]]] = []
        for living in kept[:-1]:
            found = [(reader, *reader.fitted(living, *reader.folds)) for reader in readers]
            fits.append([(reader, reader.spread(living, weight), bias) for reader, weight, bias in found])
        fits.append([(reader, reader.matrix(), reader.layer.bias) for reader in readers])
        self.choices.append(choice)
        self._fits[choice], self._present[choice] = fits, choice.level
        return choice

    def apply(self) -> None:
        """Make the readers compute what the levels say."""
        for choice in self.choices:
            if self._present[choice] != choice.level:
                for reader, weight, bias in self._fits[choice][choice.level]:
                    reader.compute(weight, bias)
                self._present[choice] = choice.level


def measure(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    ledger: Ledger,
    batches: Sequence[Tensor],
    count: int,
    loss: Loss,
    progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Give choices of filters their order, and as errors what losing them adds to a loss once readers made up for it.

    Arguments:
        model: the plain float network, whose readers are changed and restored. groups: of it. ledger: of a searchable
            copy, its prune gates of groups of one filter. batches: images; weights are fitted to the even ones, and
            losses measured on `count` of the odd ones. loss: of the outputs and the float ones. progress: is told what
        begins.
    """
    by_gate = {choice.layer: choice for choice in ledger.filters}
    found = {group.producer: readers_of(model, group) for group in groups if group.producer in by_gate}
    progress(f"what {sum(map(len, found.values()))} layers read")
    observe(model, model, [reader for readers in found.values() for reader in readers], batches)
    trial = _Trial()
    pairs: dict[str, Choice] = {}
    for place, (name, readers) in enumerate(found.items(), 1):
        progress(f"filters of {name}, {place} of {len(found)}")
        choice = by_gate[name]
        choice.order = elimination(readers, 0)[::-1]  # strongest first
        levels = sorted({round(part * choice.top / LEVELS) for part in range(LEVELS + 1)})
        kept = [sorted(choice.order[: choice.amounts[level]]) for level in levels]
        pairs[name] = trial.add(name, readers, kept)
    held_out = torch.cat(list(batches))[1::2][:count].split(len(batches[0]))
    with evaluating(model):
        told = [(batch, model(batch)) for batch in held_out]
    progress(f"losses without them, on {sum(map(len, held_out))} images")
    whole, below = losses(model, trial, told, loss)
    for name, tried in pairs.items():
        by_gate[name].errors = _steps(by_gate[name].amounts, tried.amounts, [*below[tried], whole])


def _steps(amounts: Sequence[int], measured: Sequence[int], found: Sequence[float]) -> tuple[float, ...]:
    """What each step down adds to a loss that was measured at some amounts, rising; never less than nothing."""
    highest = list(accumulate(reversed(found), max))[::-1]  # fewer filters are no gain
    at: list[float] = []
    for amount in amounts:
        above = next(place for place, known in enumerate(measured) if known >= amount)
        if measured[above] == amount:
            at.append(highest[above])
            continue
        low, high = measured[above - 1], measured[above]
        share = (amount - low) / (high - low)
        at.append((1 - share) * highest[above - 1] + share * highest[above])
    return tuple(lower - upper for lower, upper in pairwise(at))


def compensated(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: dict[str, tuple[int, ...]], batches: Sequence[Tensor]
) -> nn.Module:
    """A copy of a plain float network that reads nothing of the filters that go, its readers fitted to those kept.

    Arguments:
        groups: of the network, in its order. kept: of the producers that lose some. batches: images.
    """
    made = copied(model)
    losing = [group for group in groups if group.prunable and group.producer in kept]  # depthwise layers follow
    size = max(1, -(-len(losing) // SWEEPS))
    for start in range(0, len(losing), size):
        part = [(group, readers_of(made, group)) for group in losing[start : start + size]]
        observe(made, model, [reader for _, readers in part for reader in readers], batches)
        for group, readers in part:
            living = kept[group.producer]
            for reader in readers:
                weight, bias = reader.settled(living)
                reader.compute(reader.spread(living, weight), bias)
    return made


@torch.no_grad()
def make_up(searched: nn.Module, compensated: nn.Module, groups: Sequence[ChannelGroup], kept: Collection[str]) -> None:
    """Give a searchable copy whose filters are closed the weights of readers that were fitted to those kept.

    Readers that have no bias of their own get none: norms behind them are estimated anew, and take in what it would be.
    """
    for group in groups:
        for name in group.consumers if group.producer in kept else ():
            layer: Any = searched.get_submodule(name)
            fitted: Any = compensated.get_submodule(name)
            layer.weight.copy_(fitted.weight)
            if layer.bias is not None:
                layer.bias.copy_(fitted.bias)


def without_filters(model: nn.Module, example: Tensor, config: SearchConfig, plan: Plan, streams: int) -> nn.Module:
    """A float network at the widths and without the filters of a plan that was made for it; then calibrate.

    Unlike a frozen copy of the searched model it knows nothing of the search: no range and no statistics.
    """
    narrowest = min(
        min(layer.w_bits, layer.a_bits) for layer in plan.layers
    )  # lets every sum pass that the plan allows
    searched = prepare(model, example, replace(config, bits=(narrowest,)), streams)
    layers = tuple(replace(layer, w_grid=grid_at(layer.w_bits), ranges="filter") for layer in plan.layers)
    made = freeze(searched, replace(plan, layers=layers))
    for layer in made.modules():
        if isinstance(layer, QuantLayer):
            layer.adopt_scale()  # the deviation of the weights that are left, zeros of channels that are gone aside
    return made
