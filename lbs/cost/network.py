"""The layers of a float network as Problems, found by running it once on shapes only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lbs.cost.bops import bops, full_precision, physical_bops
from lbs.cost.edges import edge_layers, uniform_bits
from lbs_kernels.errors import GraphError
from lbs_kernels.program.problem import TRANSPOSED, Problem


@dataclass(frozen=True)
class CountedLayer:
    """One use of one layer."""

    name: str
    problem: Problem


@dataclass(frozen=True)
class NetworkLayers:
    """Layers in execution order; `uncounted` names modules with weight matrices that no formula covers."""

    layers: tuple[CountedLayer, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the first and the last layer, which stay at 8 / 8 bits (`lbs.cost.edge_layers`)."""
        return edge_layers(layer.name for layer in self.layers)

    def with_bits(self, w_bits: int, a_bits: int) -> NetworkLayers:
        """Uniform bits, the edges at 8 / 8: what `lbs.uniform` makes of the network if it converts every layer."""
        bits = uniform_bits((layer.name for layer in self.layers), w_bits, a_bits)
        changed = []
        for layer in self.layers:
            w, a = bits[layer.name]
            changed.append(replace(layer, problem=replace(layer.problem, w_bits=w, a_bits=a)))
        return replace(self, layers=tuple(changed))

    def bops(self) -> int:
        """Logical bit operations of all layers."""
        return sum(bops(layer.problem) for layer in self.layers)

    def physical_bops(self) -> int:
        """Bit operations with channels filled up to the words kernels execute."""
        return sum(physical_bops(layer.problem) for layer in self.layers)

    def full_precision_bops(self) -> int:
        """The same layers at 32 x 32 bits."""
        return sum(bops(full_precision(layer.problem)) for layer in self.layers)


def conv_problem(module: nn.Conv1d | nn.Conv2d, x: Tensor, y: Tensor) -> Problem:
    """The Problem of an nn.Conv2d applied to x [N, C, H, W], at 8/8 bits and for one image; of an nn.Conv1d applied to
    [N, C, L], which is one of height 1.

    Raises GraphError where the padding cannot be written as one number per side.
    """
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    if module.padding == "valid":
        padding = (0, 0)
    elif module.padding == "same":
        spans = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
        if spans[0] % 2 or spans[1] % 2:
            raise GraphError(
                f"a convolution with kernel {kernel}, dilation {dilation} and padding 'same' pads one side more than "
                "the other; use an odd kernel or pad explicitly"
            )
        padding = (spans[0] // 2, spans[1] // 2)
    else:
        padding = _pair(module.padding, 0)
    return Problem(
        "bitconv2d",
        1,
        *_size(module, x),
        module.in_channels,
        module.out_channels,
        kernel,
        stride,
        padding,
        dilation,
        module.groups,
    )


def transposed_problem(module: nn.ConvTranspose1d | nn.ConvTranspose2d, x: Tensor, y: Tensor) -> Problem:
    """Likewise of an nn.ConvTranspose2d or nn.ConvTranspose1d."""
    kernel, stride, dilation = map(_pair, (module.kernel_size, module.stride, module.dilation))
    size = (*_size(module, x), module.in_channels, module.out_channels)
    return Problem(TRANSPOSED, 1, *size, kernel, stride, _pair(module.padding, 0), dilation, module.groups)


def linear_problem(module: nn.Linear, x: Tensor, y: Tensor) -> Problem:
    """The Problem of an nn.Linear applied to x [N, ..., C], at 8/8 bits: `batch` is the positions of one image."""
    positions = 1
    for size in x.shape[1:-1]:
        positions *= size
    return Problem("bitlinear", positions, 1, 1, x.shape[-1], y.shape[-1])


# Kind of module -> its Problem, given the module, its input and its output.
GEOMETRY: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Problem]] = {
    nn.Conv2d: conv_problem,
    nn.Conv1d: conv_problem,
    nn.ConvTranspose2d: transposed_problem,
    nn.ConvTranspose1d: transposed_problem,
    nn.Linear: linear_problem,
}


def network_layers(model: nn.Module, example: Tensor) -> NetworkLayers:
    """Every convolution and linear layer that `model(example)` runs, at 8/8 bits, per image.

    A copy runs in evaluation mode on the meta device: shapes only, the model itself stays as it is.

    Raises GraphError where the model cannot run on shapes, or runs no countable layer.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    found: list[CountedLayer] = []
    uncounted: list[str] = []
    for name, module in shadow.named_modules():
        geometry = next((make for kind, make in GEOMETRY.items() if isinstance(module, kind)), None)
        if geometry is not None:
            module.register_forward_hook(_recorder(name, geometry, found), with_kwargs=True)
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            uncounted.append(name)
    try:
        shadow(example.to("meta"))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(
            f"the model does not run on an example of shape {tuple(example.shape)}: {error}; give an example of the "
            "shape it expects, and keep data-dependent branches out of forward"
        ) from error
    if not found:
        kinds = ", ".join(kind.__name__ for kind in GEOMETRY)
        raise GraphError(
            f"{type(model).__name__} runs no layer whose cost is known ({kinds}); there is nothing to count"
        )
    return NetworkLayers(tuple(found), tuple(uncounted))


def _recorder(
    name: str, geometry: Callable[[Any, Tensor, Tensor], Problem], found: list[CountedLayer]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        found.append(CountedLayer(name, geometry(module, args[0] if args else kwargs["input"], output)))

    return record


def _size(module: nn.Module, x: Tensor) -> tuple[int, int]:
    return (1 if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) else x.shape[-2]), x.shape[-1]


def _pair(value: Any, other: int = 1) -> tuple[int, int]:
    """Two sizes from one, or from a sequence of two, as nn.Conv2d keeps them; nn.Conv1d's one follows `other`."""
    if isinstance(value, int):
        return value, value
    first, second = value if len(value) == 2 else (other, *value)
    return int(first), int(second)
