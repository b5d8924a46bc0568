"""Layers that read filters which may go: which of those goes first, and the weights that make up for it.

Which one goes next is what a second-order step says (optimal brain surgeon, Hassibi and Stork 1993, for the columns of
a channel together): with the covariance H of what the reader reads, and its weights W [columns, outputs],

    error(c) = tr( W_c^T ((H^-1)_cc)^-1 W_c ),      W -= (H^-1)_:c ((H^-1)_cc)^-1 W_c

In the end the reader's weights are fitted anew to the channels that stay (He et al. 2017, arXiv 1707.06168):

    W' = argmin |X W - Y|^2 + ridge |W - W_0|^2

Y is what it computes in the float network, X what it reads in the one that has lost filters before it. A few hundred
images are few for the hundreds of weights behind an output: a fit without a ridge kept 87 % of the classes of the
images it saw and 75 % of those of others (MobileNetV2, 325 images). So images are seen in other views too, and every
ridge is judged on images that its weights were not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbs.channels import ChannelGroup
from lbs.convolutions import TransposedConv2d
from lbs.traced import evaluating
from lbs_kernels.errors import DataError

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean variance of what is read
PLACES = 64  # pixels looked at in each image
_DAMPING = 1e-2  # of H, relative to its mean diagonal


class Moments:
    """Sums over rows of x [columns] and y [outputs], float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.parts: list[Tensor] = []  # x, y, x x, x y, y y
        self._centred: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x [M, columns] with y [M, outputs]."""
        sums = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())
        found = [part.double().cpu() for part in sums]
        self.parts = [one + other for one, other in zip(self.parts, found, strict=True)] if self.parts else found
        self.rows += len(x)
        self._centred = None

    def __add__(self, other: Moments) -> Moments:
        both = Moments()
        both.rows = self.rows + other.rows
        both.parts = [one + two for one, two in zip(self.parts, other.parts, strict=True)]
        return both

    @property
    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y; covariances xx and xy, and the sum of the variances of y."""
        if self._centred is None:
            x, y, xx, xy, yy = (part / self.rows for part in self.parts)
            self._centred = x, y, xx - torch.outer(x, x), xy - torch.outer(x, y), yy - y.square().sum()
        return self._centred

    def error(self, columns: Tensor, weight: Tensor, bias: Tensor) -> float:
        """Mean |x W + b - y|^2 over the rows, x without all but some of its columns."""
        x, y, xx, xy, yy = self.centred
        own = xx[columns][:, columns]
        spread = yy - 2 * (weight * xy[columns]).sum() + (weight * (own @ weight)).sum()
        return float(spread + (x[columns] @ weight + bias - y).square().sum())


@dataclass
class Reader:
    """A layer that reads channels some of which may go. Its weights are [channels x taps, outputs] here."""

    name: str
    layer: nn.Conv2d | nn.Linear
    channels: int
    folds: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))  # by parity of the image

    @property
    def taps(self) -> int:
        """Columns of a channel."""
        return self.layer.weight[0].numel() // self.channels

    def matrix(self) -> Tensor:
        """The weights, float64."""
        return self.layer.weight.detach().flatten(1).T.double().cpu()

    def columns(self, kept: Sequence[int]) -> Tensor:
        """Of the channels that stay."""
        return (torch.tensor(kept)[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def rows(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is read and computed at some places of every image: [M, columns] and [M, outputs]."""
        if isinstance(self.layer, nn.Linear):
            return x.flatten(0, -2), y.flatten(0, -2)
        layer, size, y = self.layer, y.shape[2:], y.flatten(2)
        places = torch.randperm(y.shape[2], generator=generator)[:PLACES].to(y.device)
        if isinstance(layer, TransposedConv2d):
            windows = _met(layer, x, size)[:, :, places]
        elif layer.kernel_size == (1, 1) and not any(layer.padding):
            windows = x[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)[:, :, places]
        else:
            windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[:, :, places]  # type: ignore[arg-type]
        return windows.transpose(1, 2).flatten(0, 1), y[:, :, places].transpose(1, 2).flatten(0, 1)

    def fitted(self, kept: Sequence[int], fit: Moments, judge: Moments) -> tuple[Tensor, Tensor]:
        """Weights [kept columns, outputs] and bias [outputs] that suit the channels that stay, with the ridge that does
        best on other rows.
        """
        found = self._ridges(self.columns(kept), fit)
        errors = [judge.error(self.columns(kept), weight, bias) for weight, bias in found]
        return found[errors.index(min(errors))]

    def settled(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `fitted`, to all rows, with the ridge that does best where each fold judges the other."""
        columns, totals = self.columns(kept), [0.0] * len(RIDGES)
        for fit, judge in (self.folds, self.folds[::-1]):
            errors = [judge.error(columns, weight, bias) for weight, bias in self._ridges(columns, fit)]
            totals = [total + error for total, error in zip(totals, errors, strict=True)]
        best = RIDGES[totals.index(min(totals))]
        return self._ridges(columns, self.folds[0] + self.folds[1], (best,))[0]

    def _ridges(self, columns: Tensor, rows: Moments, ridges: Sequence[float] = RIDGES) -> list[tuple[Tensor, Tensor]]:
        """Weights [columns, outputs] and bias [outputs] for every ridge."""
        x, y, xx, xy, _ = rows.centred
        own, start = xx[columns][:, columns], self.matrix()[columns]
        found = []
        for ridge in ridges:
            pull = ridge * own.diagonal().mean().clamp(min=1e-12)
            factor = torch.linalg.cholesky(own + pull * torch.eye(len(own), dtype=own.dtype))
            weight = torch.cholesky_solve(xy[columns] + pull * start, factor)
            found.append((weight, y - x[columns] @ weight))
        return found

    def spread(self, kept: Sequence[int], weight: Tensor) -> Tensor:
        """Weights of the channels that stay, among zeros [columns, outputs]."""
        whole = weight.new_zeros(self.layer.weight[0].numel(), weight.shape[1])
        whole[self.columns(kept)] = weight
        return whole

    @torch.no_grad()
    def compute(self, weight: Tensor, bias: Tensor | None) -> None:
        """Compute with other weights [columns, outputs] and another bias from here on."""
        own = self.layer.weight
        own.copy_(weight.T.view_as(own))
        if bias is None or isinstance(bias, nn.Parameter):
            self.layer.bias = bias  # its own
        else:
            self.layer.bias = nn.Parameter(bias.to(own))


def _met(layer: TransposedConv2d, x: Tensor, size: Sequence[int]) -> Tensor:
    """What each tap of a transposed convolution meets at every output pixel, [N, C x taps, P]: mostly zeros, as it is
    the convolution without a stride, its kernel turned around, of pixels with zeros between them.
    """
    strides, kernels, dilations = layer.stride, layer.kernel_size, layer.dilation
    paddings: Any = layer.padding
    apart = [(length - 1) * stride + 1 for length, stride in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *apart)
    spread[:, :, :: strides[0], :: strides[1]] = x
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(dilations, kernels, strict=True)]
    before = [far - padding for far, padding in zip(reach, paddings, strict=True)]
    after = [out + far - at - first for out, far, at, first in zip(size, reach, apart, before, strict=True)]
    padded = F.pad(spread, [before[1], after[1], before[0], after[0]])
    windows = F.unfold(padded, kernels, dilations)
    return windows.unflatten(1, (-1, *kernels)).flip(2, 3).flatten(1, 3)


def elimination(readers: Sequence[Reader], fold: int) -> tuple[int, ...]:
    """Channels in the order in which they go, by the sum over the readers; the rows of one fold say what they read."""
    states = []
    for reader in readers:
        _, _, xx, _, _ = reader.folds[fold].centred
        damped = xx + _DAMPING * xx.diagonal().mean().clamp(min=1e-12) * torch.eye(len(xx), dtype=xx.dtype)
        states.append((torch.linalg.inv(damped), reader.matrix().clone(), reader.taps))
    channels, order = readers[0].channels, []
    gone = torch.zeros(channels, dtype=torch.bool)
    for _ in range(channels):
        scores: Any = 0.0
        for inverse, weight, taps in states:
            blocks = inverse.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            own = weight.view(channels, taps, -1)
            scores = scores + (own * torch.linalg.solve(blocks, own)).sum((1, 2))
        scores[gone] = math.inf
        channel = int(scores.argmin())
        for inverse, weight, taps in states:
            at = slice(channel * taps, (channel + 1) * taps)
            step = torch.linalg.solve(inverse[at, at], inverse[at]).T  # (H^-1)_:c ((H^-1)_cc)^-1
            weight -= step @ weight[at].clone()
            inverse -= step @ inverse[at].clone()
            weight[at] = 0.0
            inverse[at], inverse[:, at] = 0.0, 0.0
            inverse[at, at] = torch.eye(taps, dtype=inverse.dtype)
        gone[channel] = True
        order.append(channel)
    return tuple(order)


def readers_of(model: nn.Module, group: ChannelGroup) -> list[Reader]:
    """The layers of `model` that read the filters of a group."""
    producer: Any = model.get_submodule(group.producer)
    layers: list[Any] = [model.get_submodule(name) for name in group.consumers]
    return [Reader(name, one, producer.weight.shape[0]) for name, one in zip(group.consumers, layers, strict=True)]


@torch.no_grad()
def observe(model: nn.Module, beside: nn.Module, readers: Sequence[Reader], batches: Sequence[Tensor]) -> None:
    """Fill the readers' moments: rows of what they read in `model`, and of what they compute in `beside`.

    Every image is seen in two views, the second turned around. The first image of all belongs to the first fold, the
    next to the second, and so on.

    Raises:
        DataError: a single image, which leaves a fold empty.
    """
    if sum(map(len, batches)) < 2:
        raise DataError(
            "filters go by what other images than those that weights are fitted to say, and there is a single one; "
            "give 2 images at least, a few hundred as a rule"
        )
    seen = list(accumulate(map(len, batches), initial=0))[:-1]  # before each batch
    names = [reader.name for reader in readers]
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), evaluating(beside), _noted(model, names) as read, _noted(beside, names) as wanted:
        for start, view in ((at, x) for at, batch in zip(seen, batches, strict=True) for x in (batch, batch.flip(-1))):
            model(view)
            if beside is not model:
                beside(view)
            for reader in readers:
                for (x, _), (_, y) in zip(read.pop(reader.name), wanted.pop(reader.name), strict=True):
                    for fold, moments in enumerate(reader.folds):
                        first = (start + fold) % 2
                        if len(x) > first:
                            moments.add(*reader.rows(x[first::2], y[first::2], generator))


@contextmanager
def _noted(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What layers were given and returned, call by call, until it is taken."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, given, y: seen.setdefault(name, []).append((given[0], y))

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
