"""What ranks the filters of a layer: one small function per rule, in a table.

A rule gives one number in 0..1 per filter, the largest of the layer at 1; `PruneGate` averages it over groups. Rules
that `watch` something keep a running mean of it in the gate's `score`: `gradient` is |dL / d mask|, the first-order
change of the loss if the filter were cut (the sum over its activations of a * dL/da, taken where its consumers multiply
by the mask); `activation` is the mean of the filter's activation behind norm and ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def magnitude(layer: Any) -> Tensor:
    """mean |w_i| / max |w|, the paper's rule (LBS eq. 14); differentiable in w."""
    size = layer.weight.abs()
    return size.flatten(1).mean(1) / _positive(size.detach().max())


def relative(scores: Tensor) -> Tensor:
    """|x_i| / max |x| of numbers [..., filters]."""
    size = scores.abs()
    return size / _positive(size.detach().amax(-1, keepdim=True))


def _positive(largest: Tensor) -> Tensor:
    """Never 0: where all are zero no group ranks higher."""
    return largest.clamp(min=torch.finfo(largest.dtype).tiny)


@dataclass(frozen=True)
class Importance:
    """look: layer -> what ranks its filters [filters]. score: importance by that, of a layer or several [P, filters].

    watches: "", `gradient` or `activation`.
    """

    look: Callable[[Any], Tensor]
    score: Callable[[Tensor], Tensor] = relative
    watches: str = ""


IMPORTANCE: dict[str, Importance] = {
    "magnitude": Importance(magnitude, lambda found: found),
    "gamma": Importance(lambda layer: layer.norm_behind[0].weight),
    "taylor": Importance(lambda layer: layer.prune.score, watches="gradient"),
    "activation": Importance(lambda layer: layer.prune.score, watches="activation"),
}


def rule_of(layer: Any) -> Importance:
    """The rule of a layer: without a norm behind it, `gamma` is `magnitude`."""
    return IMPORTANCE["magnitude" if layer.importance == "gamma" and not layer.norm_behind else layer.importance]
