"""Operations that only move elements, as maps: slices, shuffles, pixels repeated by whole factors, blocks of pixels.

Nothing is known of them here but that they move: a chain of them is applied to an image that holds the numbers of its
own elements, and what comes out says where every element came from. What moves pixels in another way than a
`SelectStep` does has no map.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lbs.graph import called_module

_NAMES = (
    "view reshape flatten unflatten transpose swapaxes swapdims permute movedim moveaxis contiguous squeeze unsqueeze "
    "chunk split tensor_split unbind narrow select expand repeat repeat_interleave flip"
)
_METHODS = frozenset(_NAMES.split())
_FUNCTIONS = frozenset(getattr(torch, name, None) for name in _METHODS) - {None} | {
    operator.getitem,
    torch.channel_shuffle,
    F.channel_shuffle,
    F.interpolate,
    F.upsample,
    F.upsample_nearest,
    F.pixel_shuffle,
    F.pixel_unshuffle,
}
_MODULES = (
    *(nn.ChannelShuffle, nn.Flatten, nn.Unflatten, nn.Upsample, nn.UpsamplingNearest2d),
    *(nn.PixelShuffle, nn.PixelUnshuffle),
)
_MOST_PLACES = 64  # of a block: those of 8 x 8 pixels


@dataclass(frozen=True)
class Grid:
    """Which pixels of an image make another one: as `size`, `block` and `stride` of a `SelectStep`."""

    size: tuple[int, int]
    block: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True)
class IndexMap:
    """y[:, c] = x[:, channels[c]], every pixel repeated by whole factors; `same`: y = x.

    Where there is a grid, pixels are moved as it says, channels are those of every place of a block, and `corners` are
    the (top, left) of each.
    """

    channels: tuple[int, ...]
    same: bool = False
    grid: Grid | None = None
    corners: tuple[tuple[int, int], ...] = ()


def index_map(module: fx.GraphModule, node: fx.Node) -> IndexMap | None:
    """The map from the images [N, C, H, W] that a chain of moving operations starts at to those that `node` gives."""
    chain = [node]
    while (source := _moved(module, chain[0])) is not None and not _is_images(source):
        chain.insert(0, source)
    if source is None or not _is_images(node):
        return None
    shape, result = source.meta["shape"], node.meta["shape"]
    if result[0] != shape[0] or 0 in (*shape, *result):
        return None
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu").view(shape)
    values: dict[fx.Node, Any] = {source: numbers}
    try:
        for step in chain:
            values[step] = _applied(module, step, values)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return None  # an argument that is no constant, or no operation on numbers
    return _repeated(numbers, values[node]) or _moved_pixels(numbers, values[node])


def is_on_the_way(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node moves elements to where everything behind it is a map: the five dimensions of a shuffle, parts."""
    if _is_images(node) or _moved(module, node) is None or not node.users:
        return False
    return all(index_map(module, user) is not None or is_on_the_way(module, user) for user in node.users)


def _moved(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What a node moves the elements of; None where it computes or chooses by values."""
    if node.op == "call_module":
        moves = isinstance(called_module(module, node), _MODULES)
    else:
        moves = node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS)
    source = node.args[0] if moves and node.args else None
    return source if isinstance(source, fx.Node) and "number" not in node.meta else None


def _is_images(node: fx.Node) -> bool:
    return len(node.meta.get("shape", ())) == 4 and not node.meta.get("passing", False)


def _applied(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def value(read: fx.Node) -> Any:
        return values[read] if read in values else read.meta["number"]

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    if node.op == "call_module":
        target: Any = called_module(module, node)
        return target.forward(*args, **kwargs)
    target = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    return target(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _repeated(numbers: Tensor, moved: Tensor) -> IndexMap | None:
    _, count, height, width = numbers.shape
    if moved.shape[2] % height or moved.shape[3] % width:
        return None
    channels = (moved[0, :, 0, 0] // (height * width)).long()
    if (channels >= count).any():
        return None  # of another image
    rows = numbers[:, channels].repeat_interleave(moved.shape[2] // height, 2)
    if not torch.equal(rows.repeat_interleave(moved.shape[3] // width, 3), moved):
        return None
    return IndexMap(tuple(channels.tolist()), torch.equal(numbers, moved))


def _moved_pixels(numbers: Tensor, moved: Tensor) -> IndexMap | None:
    images, count, height, width = numbers.shape
    first = torch.arange(images, dtype=torch.float64, device="cpu").view(-1, 1, 1, 1) * (count * height * width)
    own = moved[0].long()
    if not torch.equal(moved, moved[:1] + first) or (own >= count * height * width).any():
        return None  # of another image
    places = torch.stack([own // (height * width), own // width % height, own % width])  # channel, row, column
    blocks, strides = [], []
    for side, axis in ((1, 2), (2, 3)):
        found = _along(places, side, axis)
        whole = found is not None and 1 < found[0] == places.shape[axis] and numbers.shape[axis] > 1
        if found is None or whole:  # one block, as large as the image, says of anything where it is
            return None
        blocks.append(found[0])
        strides.append(found[1])
    if blocks[0] * blocks[1] > _MOST_PLACES:
        return None
    corner = places[:, :, : blocks[0], : blocks[1]].permute(2, 3, 1, 0).reshape(-1, 3).tolist()
    grid = Grid((moved.shape[2], moved.shape[3]), (blocks[0], blocks[1]), (strides[0], strides[1]))
    return IndexMap(tuple(k for k, _, _ in corner), grid=grid, corners=tuple((top, left) for _, top, left in corner))


def _along(places: Tensor, side: int, axis: int) -> tuple[int, int] | None:
    """(block, stride): elements a block apart along `axis` come from places a stride apart, on that side alone."""
    length = places.shape[axis]
    for block in range(1, min(length, _MOST_PLACES) + 1):
        apart = places.narrow(axis, block, length - block) - places.narrow(axis, 0, length - block)
        stride = int(apart[side].flatten()[0]) if apart.numel() else 1
        expected = torch.zeros(3, 1, 1, 1, dtype=apart.dtype)
        expected[side] = stride
        if stride > 0 and bool((apart == expected).all()):
            return block, stride
    return None
