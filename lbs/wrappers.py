"""What a user's network comes wrapped in, taken off, and a copy of it that owns everything it computes with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lbs_kernels.errors import GraphError, first_line

_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile.

    Raises:
        GraphError: no module at all, or one that torch.jit has compiled.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise GraphError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
        if isinstance(model, torch.jit.ScriptModule):
            raise GraphError(f"{type(model).__name__} is compiled by torch.jit; give the module it was made from")
        compiled = model._modules.get("_orig_mod")  # of torch.compile, whose class costs seconds to import
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif compiled is not None:
            model = compiled
        else:
            return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that the last forward pass left on modules lose its gradient graph.

    Raises:
        GraphError: something on the model cannot be copied; it is named.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} cannot be copied: {_uncopyable(model)} ({type(error).__name__}: "
            f"{first_line(error)}). The model given stays as it is, so its copy is worked on: take that off the model, "
            "or give its class a __deepcopy__"
        ) from error


def _uncopyable(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key != "_modules":
                try:
                    copy.deepcopy(value)
                except Exception:  # noqa: BLE001  # any class may raise anything
                    return f"{name}.{key}" if name else key
    return "its modules together"
