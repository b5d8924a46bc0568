"""Tracing a quantized model as it computes in evaluation mode."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbs.graph import ModelGraph, record_of, trace
from lbs.packing.positions import over_positions
from lbs.traced import evaluating
from lbs_kernels.errors import ShapeError


def trace_model(model: nn.Module, example: Tensor | None, strict: bool = True) -> tuple[ModelGraph, tuple[int, ...]]:
    """Trace a model on `example`, or on random images of the shape it carries a record of.

    Linear layers at several positions are convolutions in the graph (lbs/packing/positions.py), and named tuples and
    data classes that the model returns are plain tuples and dicts.

    Returns:
        The graph, and the shape [C, H, W] of one image.

    Raises:
        GraphError: no record and no example, or a model that cannot be traced, or (strict) computes something else than
            its trace. ShapeError: an example that is no batch of float32 images.
    """
    shape = tuple(record_of(model).input_shape) if example is None else tuple(example.shape[1:])
    device = next(iter(model.parameters())).device
    if example is None:
        example = torch.randn(
            (2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
        )
    images = example[:2].to(device)
    if len(images) == 1:  # of two, what is added to every image is told from what is added to one
        images = torch.cat([images, images])
    if images.dtype != torch.float32 or images.dim() < 2 or images.shape[0] == 0:
        raise ShapeError(
            f"example is {images.dtype} of shape {list(images.shape)}; give a batch of float32 images [N, C, H, W], or "
            "whatever batch the model takes"
        )
    graph = trace(model, images, strict)
    with evaluating(model):
        over_positions(graph.module, images)
    _plain_outputs(graph.module)
    return graph, shape


def _plain_outputs(module: fx.GraphModule) -> None:
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (_plain(output.args[0]),)
    module.graph.eliminate_dead_code(lambda node: not _is_record(node))
    module.recompile()


def _is_record(node: fx.Node) -> bool:
    """Whether a node makes a named tuple or a data class, which happens in outputs only."""
    kind = node.target
    named = isinstance(kind, type) and (is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields")))
    return node.op == "call_function" and named


def _plain(value: Any) -> Any:
    """An output without classes of the model's own. Those that are dicts themselves hold no fields that are None."""
    if isinstance(value, fx.Node) and _is_record(value):
        kind: Any = value.target
        if issubclass(kind, tuple):
            return _plain(value.args)
        value = {name: item for name, item in value.kwargs.items() if not (issubclass(kind, dict) and item is None)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(_plain(item) for item in value)
    return value
