"""What several training processes must agree on before they decide."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all processes of the default group, the same bits everywhere; `value` itself in one.

    Every rank sees its share of a batch, and gates that were decided on a share would differ between ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
