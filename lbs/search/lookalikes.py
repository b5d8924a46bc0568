"""Modules of other libraries that compute what torch's own do: in a copy of a model they become those.

A norm with an activation in it becomes the norm and its parts, one after the other (`bn` -> `bn.norm`, `bn.act`); an
activation written anew becomes torch's, and so does a layer whose own forward only calls torch's; squeeze and excite
takes its mean by a module, which a frozen network evaluates as a packed one does. What a module computes is not guessed
from its name: both must give the same bits on an example, or, where the order of a mean is another, the same values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

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


class Excite(nn.Module):
    """x times what the parts, one behind the other, make of the mean over its pixels."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.mean_of_pixels = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mean_of_pixels(x)
        for part in list(self.children())[:-1]:
            gate = part(gate)
        return x * gate


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
    bases: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, *FUNCTIONS)
    base = next((one for one in bases if isinstance(module, one)), None)
    candidate: nn.Module | None = None
    if base in (nn.Conv2d, nn.Linear):
        candidate = _plain(module, base) if own_methods(kind, base) == {"forward"} else None
    elif base is not None and kind.forward is not base.forward:
        candidate = _plain(module, base)
    elif base is None and _may_excite(module):
        candidate = Excite(dict(module.named_children()))
        candidate.training = module.training
    elif base is None and not list(module.children()) and not list(module.parameters()):
        made = _NAMED.get("".join(filter(str.isalpha, kind.__name__)).lower())
        candidate = None if made is None else made().train(module.training)
    return candidate if candidate is not None and _same(module, candidate) else module


def own_methods(kind: type, base: type) -> set[str]:
    """What classes derived from torch's define besides how they are made."""
    own = {
        name for one in kind.__mro__[: kind.__mro__.index(base)] for name, value in vars(one).items() if callable(value)
    }
    return own - {"__init__", "extra_repr", "__repr__", "reset_parameters"}


def _plain(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """torch's module with the state of one derived from it, and behind it what else the other one holds."""
    plain = base.__new__(base)
    vars(plain).update(vars(module))
    plain._modules = {}
    parts = dict(module.named_children())
    if not parts:
        return plain
    return nn.Sequential(OrderedDict([("norm", plain), *parts.items()])).train(module.training)


def _may_excite(module: nn.Module) -> bool:
    """A convolution first, an activation last, and nothing of its own."""
    parts = list(module.children())
    gate = len(parts) > 1 and isinstance(parts[0], nn.Conv2d) and isinstance(parts[-1], tuple(FUNCTIONS))
    return gate and not module._parameters and not module._buffers


def _same(module: nn.Module, candidate: nn.Module) -> bool:
    """Whether both compute the same in evaluation mode; layers, also while they are trained."""
    like = next(module.parameters(), torch.zeros(1))
    first = module if isinstance(module, nn.Conv2d | nn.Linear) else next(module.children(), None)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else int(getattr(module, "num_features", 3))
    shape = (2, first.in_features) if isinstance(first, nn.Linear) else (2, channels, 5, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    modes = [(one, one.training) for both in (module, candidate) for one in both.modules()]
    try:
        with torch.no_grad():
            if first is module and not torch.equal(*(made.train()((3 * x).to(like)) for made in (module, candidate))):
                return False
            one, other = (made.eval()((3 * x).to(like)) for made in (module, candidate))
        if isinstance(candidate, Excite):
            return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        return torch.equal(one, other)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it takes something else than images
    finally:
        for part, training in modes:
            part.training = training
