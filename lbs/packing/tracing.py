"""Tracing a quantized model as it computes in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbs.graph import ModelGraph, record_of, trace
from lbs_kernels.errors import ShapeError


def trace_model(model: nn.Module, example: Tensor | None, strict: bool = True) -> tuple[ModelGraph, tuple[int, ...]]:
    """Trace a model on `example`, or on random images of the shape it carries a record of.

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
    if images.dtype != torch.float32 or images.dim() != 4 or images.shape[0] == 0:
        raise ShapeError(
            f"example is {images.dtype} of shape {list(images.shape)}; give a batch of float32 images [N, C, H, W]"
        )
    return trace(model, images, strict), shape
