"""The running average of the weights that fine-tuning may keep (`Recipe.ema`)."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The running average of a model's weights and norm statistics; integers are copied.

    The decay rises to `decay` as (1 + n) / (10 + n) over the steps n, so that the weights training began with are soon
    forgotten. As torch's AveragedModel, without reading the number of steps back from a GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model), decay
        pairs = [
            (mine.detach(), theirs.detach())
            for ours, others in ((self.model.parameters(), model.parameters()), (self.model.buffers(), model.buffers()))
            for mine, theirs in zip(ours, others, strict=True)
        ]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After 0-based step `step`: move towards the model's present weights."""
        update = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update([mine for mine, _ in self._floats], [theirs for _, theirs in self._floats], step)
        for mine, theirs in self._others:
            mine.copy_(theirs)
