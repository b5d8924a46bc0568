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
    return size.flatten(1).mean(1) / _largest(size)


def gamma(layer: Any) -> Tensor:
    """|gamma_i| / max |gamma| of the norm behind the layer, differentiable; without one, `magnitude`."""
    if not layer.norm_behind:
        return magnitude(layer)
    size = layer.norm_behind[0].weight.abs()
    return size / _largest(size)


def running(layer: Any) -> Tensor:
    """The running mean that the rule watches, over its maximum; a constant."""
    score = layer.prune.score
    return score / _largest(score)


def _largest(size: Tensor) -> Tensor:
    """The maximum, detached, and never 0: where all are zero no group ranks higher."""
    return size.detach().max().clamp(min=torch.finfo(size.dtype).tiny)


@dataclass(frozen=True)
class Importance:
    """score: layer -> importance [filters]. watches: "", `gradient` or `activation`."""

    score: Callable[[Any], Tensor]
    watches: str = ""


IMPORTANCE: dict[str, Importance] = {
    "magnitude": Importance(magnitude),
    "gamma": Importance(gamma),
    "taylor": Importance(running, "gradient"),
    "activation": Importance(running, "activation"),
}
