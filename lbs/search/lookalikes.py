"""Modules of other libraries that compute what torch's own do: in a copy of a model they become those.

A norm with an activation in it becomes the norm and its parts, one after the other (`bn` -> `bn.norm`, `bn.act`); an
activation written anew becomes torch's. What a module computes is not guessed from its name: both must give the same
bits on an example.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from lbs.quant.activations import FUNCTIONS

# By the name of the class, letters alone.
_NAMED: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelutanh": lambda: nn.GELU("tanh"),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "leakyrelu": nn.LeakyReLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def as_torch_has_them(model: nn.Module) -> nn.Module:
    """The model, its look-alikes replaced in place, parts before the whole; hooked ones stay as they are."""
    found: dict[nn.Module, nn.Module] = {}

    def replace(parent: nn.Module) -> nn.Module:
        if parent not in found:
            found[parent] = parent  # a module that holds itself ends here
            for name, child in list(parent._modules.items()):
                if child is not None:
                    setattr(parent, name, replace(child))
            if parent is not model:
                found[parent] = _known(parent)
        return found[parent]

    return replace(model)


def _known(module: nn.Module) -> nn.Module:
    kind = type(module)
    if kind.__module__.startswith("torch.nn.") or module._forward_hooks or module._forward_pre_hooks:
        return module
    bases: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, *FUNCTIONS)
    base = next((one for one in bases if isinstance(module, one)), None)
    candidate: nn.Module | None = None
    if base is not None and kind.forward is not base.forward:
        candidate = _plain(module, base)
    elif base is None and not list(module.children()) and not list(module.parameters()):
        made = _NAMED.get("".join(filter(str.isalpha, kind.__name__)).lower())
        candidate = None if made is None else made().train(module.training)
    return candidate if candidate is not None and _same(module, candidate) else module


def _plain(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """torch's module with the state of one derived from it, and behind it what else the other one holds."""
    plain = base.__new__(base)
    vars(plain).update(vars(module))
    plain._modules = {}
    parts = dict(module.named_children())
    if not parts:
        return plain
    return nn.Sequential(OrderedDict([("norm", plain), *parts.items()])).train(module.training)


def _same(module: nn.Module, candidate: nn.Module) -> bool:
    """Whether both give the same bits in evaluation mode."""
    like = next(module.parameters(), torch.zeros(1))
    x = torch.randn(2, int(getattr(module, "num_features", 3)), 5, 5, generator=torch.Generator().manual_seed(0))
    modes = [(one, one.training) for both in (module, candidate) for one in both.modules()]
    try:
        with torch.no_grad():
            one, other = (made.eval()((3 * x).to(like)) for made in (module, candidate))
        return torch.equal(one, other)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it takes something else than images
    finally:
        for part, training in modes:
            part.training = training
