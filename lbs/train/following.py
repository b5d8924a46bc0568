"""A quantized network trained to return what its float original returns, on images without labels.

Few images are seen often, so every step sees them otherwise: cropped, scaled back, turned around. Norms keep their
statistics and ranges stay as calibration set them. What the last layer reads, which has far more to say of an image
than a class, is followed beside the outputs, and the layer itself stays (Wang et al. 2022, arXiv 2201.02620).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbs.quant.layers import QuantLayer
from lbs.traced import evaluating, tensors_of

RATE = 2e-4  # of Adam, falling as a cosine
BATCH = 32
WARMUP = 20  # steps
SMALLEST = 0.5  # area of a crop


def follow(
    network: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], epochs: int, last: str, seed: int = 0
) -> float:
    """Train a calibrated network of fixed bits in place, its norms as in evaluation; the loss of the last epoch.

    Arguments:
        teacher: the float network, without gradients. batches: images [N, C, H, W] or [N, C, L]. last: the name of the
            last layer, in both.
    """
    images = torch.cat(list(batches))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(_learning(network, last), lr=RATE)
    steps = epochs * -(-len(images) // BATCH)
    step, total = 0, 0.0
    network.eval()
    with evaluating(teacher), torch.enable_grad(), _read_by(teacher, last) as wanted, _read_by(network, last) as read:
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(images), generator=generator).split(BATCH):
                view = varied(images[rows.to(images.device)], generator)
                with torch.no_grad():
                    expected = teacher(view)
                loss = distance(network(view), expected)
                for ours, theirs in zip(read, wanted, strict=True):
                    if ours.shape == theirs.shape:  # no filter in front of the last layer is gone
                        loss = loss + distance(ours, theirs)
                read.clear()
                wanted.clear()
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(1.0, (step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step, total = step + 1, total + float(loss.detach()) * len(rows) / len(images)
    return total


def _learning(network: nn.Module, last: str) -> list[nn.Parameter]:
    """Weights, biases and scales, but those of the last layer."""
    layers = [module for module in network.modules() if isinstance(module, QuantLayer)]
    fixed: set[int] = {id(parameter) for parameter in network.get_submodule(last).parameters()}
    for layer in layers:
        fixed |= {id(layer.w_range), *(id(parameter) for parameter in layer.quantizer.parameters())}
    return [parameter for parameter in network.parameters() if parameter.requires_grad and id(parameter) not in fixed]


def distances(found: Any, expected: Any) -> tuple[Tensor, Tensor]:
    """Squared distance of all outputs, and what it is relative to."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    wide = [(one.double(), other.double()) for one, other in pairs]
    return (
        torch.stack([(one - other).square().sum() for one, other in wide]).sum(),
        torch.stack([other.square().sum() for _, other in wide]).sum(),
    )


def distance(found: Any, expected: Any) -> Tensor:
    """Loss without labels: the relative squared distance of the outputs from those in float."""
    off, size = distances(found, expected)
    return off / size if size else off


@contextmanager
def _read_by(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """What a layer was given, call by call, until it is taken out of the list."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another view of every image [N, C, H, W]: a crop of half its area or more, scaled back, every second turned
    around. Lines [N, C, L] are as they are.
    """
    if images.dim() != 4:
        return images
    height, width = images.shape[2:]
    views = []
    for image in images.split(1):
        share, top, left, turned = torch.rand(4, generator=generator).tolist()
        side = math.sqrt(SMALLEST + (1 - SMALLEST) * share)
        rows, columns = max(1, round(side * height)), max(1, round(side * width))
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        part = image[:, :, y : y + rows, x : x + columns]
        part = part.flip(-1) if turned < 0.5 else part
        views.append(F.interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(views)
