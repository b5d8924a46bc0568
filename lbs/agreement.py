"""Whether a graph computes on an example what the model computes, and in words where it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lbs.traced import Evaluation, run, tensors_of

# Of the largest magnitude. Model and graph run the same operations in the same order, so outputs are equal where torch
# picks the same kernels; where it does not, rounding u = 2^-24 grows like sqrt(K) in a sum and with the number of
# layers: 2^-24 * sqrt(4608) * 100 layers = 4e-4.
TOLERANCE = 1e-3


def hooked(module: nn.Module) -> bool:
    """Whether a hook of its own sees what the module reads or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def hooked_modules(model: nn.Module) -> list[str]:
    """Their names."""
    return [name or "the model" for name, module in model.named_modules() if hooked(module)]


def is_meta(outputs: Any) -> bool:
    """Whether outputs have no values to compare."""
    return any(tensor.is_meta for tensor in tensors_of(outputs))


def same(expected: Any, found: Any) -> bool:
    """Whether a graph has found the outputs of the model, in number, shape and within the tolerance."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    return 0 < len(ours) == len(theirs) and all(
        one.shape == other.shape and _distance(one, other)[0] == 0 for one, other in zip(ours, theirs, strict=True)
    )


def _distance(one: Tensor, other: Tensor) -> tuple[int, float]:
    """(elements beyond the tolerance, the largest difference); of meta tensors none."""
    if one.is_meta or other.is_meta:
        return 0, 0.0
    limit = TOLERANCE * finite_peak(other)
    error = (one.double() - other.double()).abs()
    error = torch.where((one == other) | (one.isnan() & other.isnan()), torch.zeros_like(error), error)
    return int((~(error <= limit)).sum()), float(error.max()) if error.numel() else 0.0


def finite_peak(values: Tensor) -> float:
    """The largest finite magnitude."""
    return float(values.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if values.numel() else 0.0


def difference(model: nn.Module, module: fx.GraphModule, example: Tensor, expected: Any, found: Any) -> str:
    """What differs between model and graph, where first, and what may be the reason."""
    name = type(model).__name__
    if not tensors_of(expected):
        return (
            f"{name} returns a {type(expected).__name__}, in which no tensor is found; return tensors, or tuples, "
            "lists, dictionaries or data classes of tensors"
        )
    again = run(model, example)
    if not same(expected, again):
        return (
            f"{name} returns other values when it is run again on the same images in evaluation mode; take out what is "
            "random, such as F.dropout(x) without training=self.training"
        )
    pairs = [(a, b) for a, b in zip(tensors_of(found), tensors_of(expected), strict=False) if a.shape == b.shape]
    sizes = [(_distance(a, b)[1], finite_peak(b)) for a, b in pairs]
    told = " and ".join(f"by {error:.3g} at a magnitude of {peak:.3g}" for error, peak in sizes) or "in number or shape"
    where = _first_difference(model, module, example)
    hooks = hooked_modules(model)
    also = f"; hooks of {', '.join(hooks)} may change values" if hooks else ""
    return (
        f"{name} computes something else than its torch.fx trace: on the example the outputs differ {told}, first at "
        f"{where}{also}. Look there for Python that a trace does not see (isinstance or shape tests of tensors, state "
        "kept on the module) and write it with torch operations"
    )


def _first_difference(model: nn.Module, module: fx.GraphModule, example: Tensor) -> str:
    """The first layer, in order of the graph, whose output differs between model and graph."""
    names = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    seen: dict[str, list[Any]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda layer, args, output: seen[name].append(output)

    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    handles = [layer.register_forward_hook(keep(name), prepend=True) for name, layer in layers.items()]
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    walk = Evaluation(module)
    walk.garbage_collect_values = False
    walk.run(example.clone())
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls = seen[str(node.target)]
            if not calls or not same(calls.pop(0), walk.env[node]):
                return str(node.target)
    return "the output"
