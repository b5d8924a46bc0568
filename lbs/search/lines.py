"""Modules of a network of lines [N, C, L] as those of images [N, C, 1, L], in a plain copy.

A convolution of k taps is one of 1 x k, and so are pools and norms. Hooks make an image of what such a module reads and
a line of what it returns, views both; names, state and whatever the user hung on them stay, but for one dimension more
of the weights. Where neighbours meet, lbs/lines.py takes the views out of the graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lbs.lines import widened
from lbs.search.lookalikes import own_methods
from lbs.search.plain import in_numbers, own_weights
from lbs.symbolic import ValueHook, check_example, is_patched
from lbs.traced import evaluating, run, with_affine

_LAYERS = (nn.Conv1d, nn.ConvTranspose1d)
_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.Conv2d,
    nn.ConvTranspose1d: nn.ConvTranspose2d,
    nn.BatchNorm1d: nn.BatchNorm2d,
    nn.MaxPool1d: nn.MaxPool2d,
    nn.AvgPool1d: nn.AvgPool2d,
    nn.AdaptiveAvgPool1d: nn.AdaptiveAvgPool2d,
    nn.Dropout1d: nn.Dropout2d,
    nn.Upsample: nn.Upsample,
}
# What the other side of an image has.
_SIDES = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "output_size": 1}
_SIDES |= {"size": 1, "scale_factor": 1}


def as_images(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Make modules that are given lines those of images, in place, if there is a convolution among them.

    Returns:
        Convolutions of lines that stay what they are, and why.

    Raises:
        GraphError: an example that does not fit.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    if not layers:
        return {}
    check_example(model, example)
    modules = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _KINDS and not getattr(module, "return_indices", False)
    }
    given = _given_lines(model, {**modules, **layers}, example)
    own = own_weights(model, layers)
    left = {name: reason for name, layer in layers.items() if (reason := _unfit(name, layer, given, own))}
    if len(left) < len(layers):
        for name, module in {**modules, **layers}.items():
            if name in given and name not in left:
                _widen(module)
    return left


def _unfit(name: str, layer: nn.Module, given: set[str], own: list[str]) -> str:
    """Why a convolution of lines stays; "" if it need not."""
    kind = next(kind for kind in _LAYERS if isinstance(layer, kind))
    if is_patched(layer):
        return "its forward is patched on the instance; make it a class of its own, or put it around the layer"
    methods = sorted(own_methods(type(layer), kind))
    if methods:
        return f"{type(layer).__name__} has methods of its own: {', '.join(methods)}"
    if layer._parameters.get("weight") is None:
        return "its weight is computed by a parametrization"
    if name not in given:
        return "the forward pass does not call it with one tensor [N, C, L] alone"
    return "" if name in own else "its weight is used beside it as well"


def _given_lines(model: nn.Module, modules: dict[str, nn.Module], example: Tensor) -> set[str]:
    """Modules that every call gives one tensor [N, C, L] and nothing else."""
    calls: dict[str, list[bool]] = {name: [] for name in modules}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            several = len(args) + len(kwargs) > 1
            calls[name].append(not several and (args[0] if args else kwargs["input"]).dim() == 3)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True, prepend=True) for name, module in modules.items()
    ]
    try:
        with evaluating(model):
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, lines in calls.items() if lines and all(lines)}


def _widen(module: Any) -> None:
    """Make one module that of images between two views."""
    kind = next(kind for kind in _KINDS if isinstance(module, kind))
    module.__class__ = _KINDS[kind]
    for name in _SIDES.keys() & vars(module).keys():
        setattr(module, name, widened(getattr(module, name), _SIDES[name]))
    if kind is nn.AvgPool1d:
        module.divisor_override = None
    if kind is nn.Upsample and module.mode == "linear":
        module.mode = "bilinear"
    module.register_forward_pre_hook(_Image(), with_kwargs=True)
    module.register_forward_hook(_Line(), prepend=True)
    if kind in _LAYERS:
        weight = module.weight
        module.weight = nn.Parameter(weight.detach().unsqueeze(-2), weight.requires_grad)
        module._reversed_padding_repeated_twice = [*module._reversed_padding_repeated_twice, 0, 0]
    if kind is nn.Conv1d:
        in_numbers(module)


class _Image(ValueHook):
    """A hook that makes a line an image."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        line = args[0] if args else kwargs["input"]
        return (with_affine(line.unsqueeze(-2), line),), {}


class _Line(ValueHook):
    """A hook that makes an image a line."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return with_affine(output.squeeze(-2), output)
