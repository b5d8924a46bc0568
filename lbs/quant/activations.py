"""torch's activation modules as the functions that packed programs compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbs_kernels.program.activations import activate


@dataclass(frozen=True, eq=False)
class Function:
    """One activation. kind: of `lbs_kernels.program.activations`. value: of elu and leaky_relu, a float32 number.

    slope: float32 [C] of prelu.
    """

    kind: str
    value: float = 0.0
    slope: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """float32 of x float32 [N, C, ...], as every back end computes it."""
        slope = self.slope
        return activate(x, self.kind, self.value, None if slope is None else slope.view(-1, *[1] * (x.dim() - 2)))


def float32(value: float) -> float:
    """The nearest float32 number."""
    return float(torch.tensor(float(value), dtype=torch.float32))


def _gelu(module: nn.GELU) -> Function:
    return Function("gelu" if module.approximate == "none" else "gelu_tanh")


def _prelu(module: nn.PReLU) -> Function:
    slope = module.weight.detach().float()
    return Function("prelu", slope=slope) if len(slope) > 1 else Function("leaky_relu", float(slope))


FUNCTIONS: dict[type[nn.Module], Callable[[Any], Function]] = {
    nn.ELU: lambda module: Function("elu", float32(module.alpha)),
    nn.GELU: _gelu,
    nn.Hardsigmoid: lambda module: Function("hardsigmoid"),
    nn.Hardswish: lambda module: Function("hardswish"),
    nn.LeakyReLU: lambda module: Function("leaky_relu", float32(module.negative_slope)),
    nn.Mish: lambda module: Function("mish"),
    nn.PReLU: _prelu,
    nn.Sigmoid: lambda module: Function("sigmoid"),
    nn.SiLU: lambda module: Function("silu"),
    nn.Tanh: lambda module: Function("tanh"),
}


def function_of(module: nn.Module) -> Function:
    """What a module of one of these classes computes."""
    return next(made(module) for kind, made in FUNCTIONS.items() if isinstance(module, kind))
