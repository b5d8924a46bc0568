"""Transposed convolutions as steps: convolutions of what they read, whose outputs a selection puts side by side.

Outputs whose rows and columns have the same remainders by the stride are one convolution of the input
(`lbs_kernels/program/transposed.py`). Where all of these see as many taps, they are filters of one step (a kernel of 2
with stride 2, of 4 with stride 2); else each is a step: a grid of weights may have no zero to fill them up with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lbs.convolutions import TransposedConv2d
from lbs.packing.draft import Draft, Selection, Slot, Target
from lbs_kernels.program.transposed import Phase, phase
from lbs_kernels.program.window import Window

PART = "@part"  # behind the layer's name in the names of its steps but the first


class NoWindow(Exception):
    """A step would pad more than a program may; the message says so."""


@dataclass(frozen=True)
class Place:
    """One place of the blocks that the stride makes of the output: its taps, and its pixel (0, 0) in its step."""

    sides: tuple[Phase, Phase]
    first: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.sides[0].count * self.sides[1].count


@dataclass(frozen=True)
class Part:
    """One step: a convolution with stride 1 that computes some places of a layer, and the size of what it writes."""

    window: Window
    places: tuple[Place, ...]
    size: tuple[int, int]

    def codes(self, codes: Tensor) -> Tensor:
        """The weights [F, C / groups, kh, kw] of the layer's [O, C / groups, ...]: in each group place by place."""
        return self._spread([self._seen(place, codes) for place in self.places])

    def by_filter(self, values: Tensor) -> Tensor:
        """Numbers of the layer's filters [O] for those of the step [F]."""
        return self._spread([values] * len(self.places))

    def multiplier(self, values: Tensor) -> Tensor:
        """The same of multipliers, which are 0 where outputs are the bias alone."""
        return self._spread([values if place.taps else torch.zeros_like(values) for place in self.places])

    def put(self, codes: Tensor, into: Tensor) -> None:
        """The inverse of `codes`: write weights of the step where they come from in those of the layer."""
        grouped = codes.view(self.window.groups, len(self.places), -1, *codes.shape[1:])
        for index, place in enumerate(self.places):
            if place.taps:
                own = grouped[:, index].reshape(len(into), *codes.shape[1:])
                into[:, :, place.sides[0].taps, place.sides[1].taps] = own.flip(2, 3)

    def channel(self, place: int, filters: int, o: int) -> int:
        """Where filter `o` of the layer's `filters` is among those of the step."""
        each = filters // self.window.groups
        return (o // each * len(self.places) + place) * each + o % each

    def _seen(self, place: Place, codes: Tensor) -> Tensor:
        if not place.taps:
            return codes[:, :, :1, :1]  # multiplied by 0
        rows, columns = (side.taps for side in place.sides)
        return codes[:, :, rows, columns].flip(2, 3)

    def _spread(self, values: Sequence[Tensor]) -> Tensor:
        groups = self.window.groups
        parts = torch.stack([value.reshape(groups, -1, *value.shape[1:]) for value in values], 1)
        return parts.reshape(-1, *values[0].shape[1:])


def parts_of(layer: TransposedConv2d, source: tuple[int, int], size: tuple[int, int]) -> tuple[Part, ...]:
    """The steps of a layer that makes `size` pixels of `source`; their places in row-major order.

    Raises:
        NoWindow: of kernels and dilations at whose edge pixels see nothing but padding.
    """
    sides = [
        [_Side.at(rho, *along) for rho in range(min(along[2], along[5]))]
        for along in zip(source, layer.kernel_size, layer.stride, layer.padding, layer.dilation, size, strict=True)
    ]
    places = [(rows, columns) for rows in sides[0] for columns in sides[1]]
    met = [rows.phase.count * columns.phase.count > 0 for rows, columns in places]
    places = [place if seen else (place[0].bare(), place[1].bare()) for place, seen in zip(places, met, strict=True)]
    shapes = {(rows.phase.count, columns.phase.count) for rows, columns in places}
    together = len(shapes) == 1 and all(met)
    return tuple(_part(layer, source, held) for held in ([places] if together else [[place] for place in places]))


@dataclass(frozen=True)
class _Side:
    """Rows or columns of a place: m of its first and last output, in the words of `Phase`."""

    phase: Phase
    first: int
    last: int

    @staticmethod
    def at(rho: int, size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> _Side:
        found = phase((rho + padding) % stride, kernel, stride, dilation)
        first = (rho + padding - found.first * dilation) // stride if found.count else 0
        return _Side(found, first, first + (outputs - 1 - rho) // stride)

    def bare(self) -> _Side:
        """The same of a place that no tap meets, in rows or in columns: any pixels will do."""
        return _Side(replace(self.phase, count=0), 0, self.last - self.first)


def _part(layer: TransposedConv2d, source: tuple[int, int], places: list[tuple[_Side, _Side]]) -> Part:
    kernel, dilation, padding, size = [], [], [], []
    for side in range(2):
        held = [place[side] for place in places]
        count, apart = max(1, held[0].phase.count), held[0].phase.dilation
        reach = apart * (count - 1)
        pad = max(0, *(reach - one.first for one in held), *(one.last - source[side] + 1 for one in held))
        if pad > reach + 1:
            raise NoWindow(f"its outputs reach {pad} pixels beyond an edge, and the taps they see {reach + 1}")
        kernel.append(count)
        dilation.append(apart if count > 1 else 1)
        padding.append(pad)
        size.append(source[side] + 2 * pad - reach)
    window = Window(tuple(kernel), (1, 1), tuple(padding), tuple(dilation), layer.groups)  # type: ignore[arg-type]

    def corner(place: tuple[_Side, _Side]) -> tuple[int, int]:
        shifts = [one.first - d * (k - 1) + p for one, d, k, p in zip(place, dilation, kernel, padding, strict=True)]
        return shifts[0], shifts[1]

    made = tuple(Place((place[0].phase, place[1].phase), corner(place)) for place in places)
    return Part(window, made, (size[0], size[1]))


def expanded(draft: Draft) -> list[Draft]:
    """The drafts of a draft's steps: of a transposed convolution its parts, and the selections behind them.

    Raises NoWindow as `parts_of`.
    """
    layer = draft.layer
    if not isinstance(layer, TransposedConv2d) or not draft.written():
        return [draft]
    filters, *size = draft.shape
    parts = parts_of(layer, draft.source.shape[1:], (size[0], size[1]))
    steps = [_step(draft, part, index) for index, part in enumerate(parts)]
    if len(parts) == len(parts[0].places) == 1 and parts[0].places[0].first == (0, 0) and parts[0].size == tuple(size):
        steps[0].targets, steps[0].stream = draft.targets, draft.stream
        return steps
    block = (min(layer.stride[0], size[0]), min(layer.stride[1], size[1]))
    selection = _selection(parts, filters, (size[0], size[1]), block)
    order = _listed(parts)
    if draft.stream is None and not any(target.norm for target in draft.targets):
        made = []
        for target in draft.targets:
            slots = []
            for step in steps:
                slots.append(Slot(f"{step.name}@{target.slot.name}", "codes", step.shape, *_coding(target.slot)))
                step.targets.append(Target(slots[-1], target.scale))
            sources = tuple(slots[part] for part, _ in order)
            name = f"{draft.name}@{target.slot.name}"
            made.append(Draft(name, draft.value, sources, draft.shape, selection=selection, targets=[target]))
        return [*steps, *made]
    for step in steps:
        step.stream = Slot(f"{step.name}@stream", "stream", step.shape)
    sources = tuple(steps[part].stored() for part, _ in order)
    # Named, so that whoever looks at streams of half precision finds the one that norms are computed of.
    behind = Draft(f"{draft.name}@pixels", draft.value, sources, draft.shape, selection=selection)
    behind.targets, behind.stream = draft.targets, draft.stored()
    return [*steps, behind]


def _coding(slot: Slot) -> tuple[int, int, bool]:
    return slot.bits, slot.zero, slot.signed


def _step(draft: Draft, part: Part, index: int) -> Draft:
    """The draft of one part, which computes what `draft` does up to its clamp."""
    filters = draft.shape[0] * len(part.places)
    name = draft.name if index == 0 else f"{draft.name}{PART}{index}"
    step = Draft(name, draft.value, draft.sources, (filters, *part.size))
    step.layer, step.part, step.norms = draft.layer, part, draft.norms
    step.low, step.high, step.clamped = draft.low, draft.high, draft.clamped
    step.function = draft.function
    if draft.function is not None and draft.function.slope is not None:
        slope = part.by_filter(draft.function.slope)
        step.function = type(draft.function)(draft.function.kind, draft.function.value, slope)
    return step


def _listed(parts: tuple[Part, ...]) -> list[tuple[int, tuple[int, int]]]:
    """The inputs of the selection: parts, and where the pixels begin that some of their places are."""
    found = [(index, place.first) for index, part in enumerate(parts) for place in part.places]
    return list(dict.fromkeys(found))


def _selection(parts: tuple[Part, ...], filters: int, size: tuple[int, int], block: tuple[int, int]) -> Selection:
    listed = _listed(parts)
    widths = [filters * len(parts[index].places) for index, _ in listed]
    begin = {key: sum(widths[:number]) for number, key in enumerate(listed)}
    channels: list[int] = []
    for index, part in enumerate(parts):
        for number, place in enumerate(part.places):
            first = begin[index, place.first]
            channels.extend(first + part.channel(number, filters, o) for o in range(filters))
    top, left = zip(*(corner for _, corner in listed), strict=True)
    return Selection(tuple(channels), size=size, block=block, top=top, left=left)
