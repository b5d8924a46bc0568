"""Top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lbs.train import distributed


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in 0..1, in float32, with the mode of `model` restored. The count is read back once, at the end.

    Where the loader gives each process a part, the result is that of all of them.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    correct, count = torch.zeros((), dtype=torch.int64, device=device), 0
    for images, labels in loader:
        logits = model(images.to(device))
        correct += (logits.argmax(1) == labels.to(device)).sum()
        count += len(labels)
    model.train(was_training)
    if getattr(loader, "world_size", 1) > 1:
        correct, count = distributed.reduce_sum(correct), sum(distributed.gather(count))
    return int(correct) / count
