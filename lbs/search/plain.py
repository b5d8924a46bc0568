"""A copy of a user's network in plain layers: nothing wrapped, no weights that hooks compute, padding in numbers.

Each of these computes what it computed before, in evaluation mode; names of layers stay.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lbs.convolutions import TransposedConv2d, as_convolution, as_torch, plain_kind
from lbs.search.replace import carry, replace_layer
from lbs.symbolic import ValueHook, is_patched, record
from lbs.traced import evaluating
from lbs.wrappers import copied, unwrapped
from lbs_kernels.errors import GraphError

_NORMS = {_WeightNorm: "weight norm", _SpectralNorm: "spectral norm"}
_log = logging.getLogger("lbs")


def plain_copy(model: nn.Module) -> nn.Module:
    """The copy. Raises GraphError where the model, or something on it, cannot be copied."""
    model = copied(unwrapped(model))
    for name, module in list(model.named_modules()):
        inner = unwrapped(module)
        if inner is not module:
            replace_layer(model, name, inner)
    with evaluating(model):
        for name, module in model.named_modules():
            for what in _make_permanent(module):
                _log.warning("%s: its %s is part of its weights in the copy, and training may undo it", name, what)
            if isinstance(module, nn.Conv2d) and has_own_forward(module) is None:
                in_numbers(module)
    return model


def as_convolutions(model: nn.Module) -> None:
    """Make transposed convolutions nn.Conv2d, in place, where their weights may read filters first."""
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.ConvTranspose2d}
    for name in own_weights(model, layers):
        made = as_convolution(layers[name])
        carry(made, layers[name])
        replace_layer(model, name, made)


def own_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Of these layers, those whose weight may be laid out anew: no other layer has it, nor does the forward pass read
    it beside them, and their forward is their class's.
    """
    if not layers:
        return []
    try:
        with evaluating(model):
            read = {str(node.target) for node in record(model, hooks=False).graph.nodes if node.op == "get_attr"}
    except GraphError:
        return []  # who traces it next says why
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    return [
        name
        for name, layer in layers.items()
        if owners[id(layer._parameters.get("weight"))] == 1 and f"{name}.weight" not in read and not is_patched(layer)
    ]


def in_torchs_form(layer: TransposedConv2d) -> nn.ConvTranspose2d:
    """A layer that stays in float as torch has it."""
    made = as_torch(layer)
    carry(made, layer)
    vars(made).pop("sized", None)
    return made


def has_own_forward(layer: nn.Conv2d | nn.Linear) -> str | None:
    """Why a layer computes something else than torch's, or None."""
    if is_patched(layer):
        return "its forward is patched on the instance; make it a class of its own, or put it around the layer"
    plain = plain_kind(layer)
    for method in ("forward", "_conv_forward"):
        if getattr(type(layer), method, None) is not getattr(plain, method, None):
            return f"{type(layer).__name__} has a {method} of its own"
    return None


def _make_permanent(module: nn.Module) -> list[str]:
    """Compute the weights of norms and masks once and for all; what they were."""
    done = []
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
            done.append("pruning mask")
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
            done.append("weight norm")
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            done.append("spectral norm")
    if parametrize.is_parametrized(module):
        done += _without_parametrizations(module)
    return done


def _without_parametrizations(module: Any) -> list[str]:
    """torch's own way of removing them takes properties off the class, which the copy shares with the model given."""
    steps = {name: list(chain) for name, chain in module.parametrizations.items()}
    if not all(type(step) in _NORMS for chain in steps.values() for step in chain):
        return []
    values = {
        name: nn.Parameter(getattr(module, name).detach().clone(), any(p.requires_grad for p in chain.parameters()))
        for name, chain in module.parametrizations.items()
    }
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, value)
    return [_NORMS[type(step)] for chain in steps.values() for step in chain]


def in_numbers(conv: nn.Conv2d) -> None:
    """Sizes as pairs; padding that zeros on both sides alike cannot express is done in front of the layer."""
    for name in ("stride", "padding", "dilation"):
        if isinstance(getattr(conv, name), int):
            setattr(conv, name, (getattr(conv, name),) * 2)
    if isinstance(conv.padding, tuple) and conv.padding_mode == "zeros":
        return
    widths = list(conv._reversed_padding_repeated_twice)  # left, right, top, bottom
    alike = widths[::2] == widths[1::2]
    if conv.padding_mode != "zeros" or not alike:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        conv.register_forward_pre_hook(_Pad(widths, mode), with_kwargs=True)
        widths, conv.padding_mode = [0, 0, 0, 0], "zeros"
    conv.padding = (widths[2], widths[0])


class _Pad(ValueHook):
    """A hook that pads what a convolution reads."""

    def __init__(self, widths: list[int], mode: str) -> None:
        self.widths, self.mode = widths, mode

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        x = args[0] if args else kwargs["input"]
        return (F.pad(x, self.widths, self.mode),), {}
