"""Where training broke: the first layer that holds or yields a number that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def finite_weights(model: nn.Module) -> bool:
    """Whether every parameter is finite; one wait for the device."""
    checks = [p.detach().isfinite().all() for p in model.parameters()]
    return not checks or bool(torch.stack(checks).all())


def first_nonfinite(model: nn.Module, images: Tensor) -> str:
    """A sentence that names the first place where a batch [N, C, H, W] meets NaN or infinity."""
    if not bool(images.isfinite().all()):
        return "the input batch holds NaN or infinite pixels"
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            return f"layer {name.rpartition('.')[0] or name}: its parameter {name} is NaN or infinite"
    found: list[str] = []
    hooks = [m.register_forward_hook(_watch(name, found)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"layer {found[0]}: its output is NaN or infinite although its weights are finite"
    return "no layer: all outputs are finite, so the loss itself (or its budget term) is not"


def _watch(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
            found.append(name)

    return hook
