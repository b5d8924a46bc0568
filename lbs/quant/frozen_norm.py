"""Norms whose statistics and parameters never change, as detection networks have them (`FrozenBatchNorm2d`).

Those classes keep weight, bias, running_mean and running_var as buffers and are no norms of torch's; here they become
one, so that everything that knows norms knows them.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


class FrozenNorm(nn.BatchNorm2d):
    """A norm in evaluation mode for ever; its weight and bias are not trained."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def reset_running_stats(self) -> None:
        """They stay."""


def adopt_frozen_norms(model: nn.Module) -> None:
    """Replace frozen norms of other libraries in place, wherever they are registered. Names of tensors stay."""
    made: dict[int, FrozenNorm] = {}
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is not None and _is_frozen_norm(child):
                parent._modules[leaf] = made.setdefault(id(child), _frozen(child))


def _is_frozen_norm(module: nn.Module) -> bool:
    """Told by name and buffers, and by what it computes."""
    if "FrozenBatchNorm" not in type(module).__name__ or not isinstance(getattr(module, "eps", None), float):
        return False
    buffers = dict(module.named_buffers())
    if set(buffers) - {"num_batches_tracked"} != _BUFFERS or next(module.parameters(), None) is not None:
        return False
    if any(buffers[name].shape != buffers["weight"].shape or buffers[name].dim() != 1 for name in _BUFFERS):
        return False
    weight: Tensor = buffers["weight"]
    x = torch.linspace(-3, 3, 4 * len(weight), dtype=weight.dtype, device=weight.device).reshape(1, len(weight), 2, 2)
    with torch.no_grad():
        return torch.allclose(module(x), _frozen(module)(x), rtol=1e-4, atol=1e-5)


def _frozen(module: nn.Module) -> FrozenNorm:
    weight = module.get_buffer("weight")
    made = FrozenNorm(len(weight), module.eps, device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
    made.load_state_dict({name: module.get_buffer(name) for name in _BUFFERS}, strict=False)
    made.get_buffer("num_batches_tracked").fill_(1)  # its statistics are no fresh ones
    return made.requires_grad_(False).eval()
