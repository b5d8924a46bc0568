"""One layer in the place of another: constructor arguments, and what the user hung on it, which goes along."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lbs.convolutions import TransposedConv2d
from lbs.quant.layers import QuantConvTranspose2d, QuantLayer
from lbs.search.layers import SEARCH_STATE

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
)


def layer_arguments(old: nn.Module) -> tuple[int, int] | tuple[int, int, object]:
    """Positional constructor arguments that repeat `old`."""
    if isinstance(old, nn.Conv2d):
        return old.in_channels, old.out_channels, old.kernel_size
    return old.in_features, old.out_features  # type: ignore[return-value]


def layer_options(old: nn.Module) -> dict[str, object]:
    """Keyword constructor arguments that repeat `old`."""
    options: dict[str, object] = {"bias": old.bias is not None}
    if isinstance(old, nn.Conv2d):
        options |= {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "groups": old.groups}
        options["padding_mode"] = old.padding_mode
    if isinstance(old, TransposedConv2d):
        options["output_padding"] = old.output_padding
    return options


def adopt(new: QuantLayer, old: nn.Module) -> QuantLayer:
    """Move weights and what else is on `old` to `new`, and keep the size of its weights as `output_scale`."""
    new.weight, new.bias = old.weight, old.bias  # type: ignore[assignment]
    carry(new, old)
    like(new, old)
    if new.standardize != "none" and not isinstance(old, QuantLayer):
        new.adopt_scale()
    return new


def like(new: nn.Module, old: nn.Module) -> None:
    """Move `new` to the device of `old`, and to float64 if `old` is (ranges stay float32 beside shorter weights)."""
    weight: Tensor = old.weight  # type: ignore[assignment]
    new.to(weight.device)
    if weight.dtype == torch.float64:
        new.double()


def carry(new: nn.Module, old: nn.Module) -> None:
    """Move mode, hooks and what users hung on `old` (attributes, parameters, buffers, modules) to `new`."""
    own = _names(new) | _quantized_names() | set(SEARCH_STATE)
    for home in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(old, home).items():
            if name not in own:
                getattr(new, home)[name] = value
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set - own
    for name, value in vars(old).items():
        if name not in own:
            vars(new)[name] = value
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    new.train(old.training)


@functools.cache
def _quantized_names() -> set[str]:
    return _names(QuantConvTranspose2d(1, 1, 1, device="meta"))  # which draws no random numbers


def _names(module: nn.Module) -> set[str]:
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is, and wherever else the same module is registered."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, new)


def kept_like(value: Tensor, old: Any) -> nn.Parameter:
    """A parameter of its own that holds `value`, trained where `old` is."""
    return nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad)
