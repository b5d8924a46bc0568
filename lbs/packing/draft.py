"""A program under construction: steps that can still absorb what follows them, and their assembly into a Program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from lbs.convolutions import TransposedConv2d
from lbs.packing.fold import affine, multiplier_and_bias, rounded, through_norms
from lbs.packing.patterns import Op
from lbs.quant.activations import Function
from lbs.quant.layers import QuantLayer
from lbs_kernels.program.planes import check_accumulator, pack_weights
from lbs_kernels.program.steps import (
    Activation,
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    PoolStep,
    Program,
    QuantPackStep,
    ResizeStep,
    SelectStep,
    Step,
    TensorSpec,
    build_blob,
)
from lbs_kernels.program.window import Window

if TYPE_CHECKING:
    from lbs.packing.transposed import Part

Shape = tuple[int, int, int]  # channels, height, width
Norm = tuple[str, nn.BatchNorm2d]


@dataclass(eq=False)
class Slot:
    """A tensor that has no number yet."""

    name: str
    form: Literal["image", "codes", "stream"]
    shape: Shape
    bits: int = 0
    zero: int = 0
    signed: bool = False
    flat: bool = False
    dtype: Literal["float32", "uint8"] = "float32"

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.form, *self.shape, self.bits, self.zero, self.signed, self.flat, self.dtype)


@dataclass(eq=False)
class Target:
    """Codes written by a step: of the value itself, or of its norm and ReLU."""

    slot: Slot
    scale: float
    norm: Norm | None = None
    relu: bool = False
    step: float | None = None  # where targets behind it read what its codes stand for
    behind: Target | None = None  # the target whose codes stand for the value this one is of


@dataclass(frozen=True)
class Selection:
    """Channels of the sources side by side (none mean all), how often pixels are repeated, and where they move to."""

    channels: tuple[int, ...] = ()
    repeat: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (0, 0)  # and below: where pixels are moved (`SelectStep`)
    block: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    top: tuple[int, ...] = ()
    left: tuple[int, ...] = ()


@dataclass(eq=False)
class Draft:
    """One step. `value` is the node whose float value the step produces; it moves on while nodes are absorbed.

    sources: several of a selection. pixels: (scale, shift) float64 [C] that turn the bytes of an image into the values
    of its node.
    """

    name: str
    value: fx.Node
    sources: tuple[Slot, ...]
    shape: Shape
    layer: QuantLayer | None = None
    part: Part | None = None  # of a transposed convolution: which of its outputs
    pool: Op | None = None  # or interpolation
    selection: Selection | None = None
    pixels: tuple[Tensor, Tensor] | None = None
    factor: float = 1.0  # of a step without a layer: what its input is multiplied by
    norms: list[Norm] = field(default_factory=list)
    function: Function | None = None
    function_first: bool = False  # in front of gate and residual
    gate: Slot | None = None
    residual: Slot | None = None
    residual_step: float | None = None  # of a residual of codes
    low: float | None = None
    high: float | None = None
    clamped: bool = False
    stream: Slot | None = None
    targets: list[Target] = field(default_factory=list)

    @property
    def source(self) -> Slot:
        """The tensor that every step but a selection reads."""
        return self.sources[0]

    def takes_norm(self) -> bool:
        """Whether a norm of the value can become part of the step: one with a multiplier, and only norms absorbed."""
        multiplies = self.pool is None and self.selection is None and self.factor == 1
        return multiplies and self._is_bare() and self.function is None

    def moves_only(self) -> bool:
        """Whether it is a selection that has absorbed nothing."""
        return self.selection is not None and self._is_bare() and self.function is None

    def takes_function(self) -> bool:
        """Whether an activation of the value can become part of the step."""
        return self.function is None and not self.clamped

    def takes_gate(self) -> bool:
        """Whether a product with one number per channel can become part of the step."""
        return self._is_bare() and not self.is_spread()

    def _is_bare(self) -> bool:
        return self.gate is None and self.residual is None and not self.clamped

    def is_spread(self) -> bool:
        """Whether the step becomes several, none of which has the pixels of a gate or a residual."""
        return isinstance(self.layer, TransposedConv2d)

    def takes_residual(self) -> bool:
        """Whether a sum can become part of the step: an activation stands on one side of gate and residual."""
        between = self.function is not None and self.gate is not None and not self.function_first
        return self.residual is None and not self.clamped and not between and not self.is_spread()

    def multiply(self, gate: Slot) -> None:
        """Absorb y * gate[c]."""
        self.gate, self.function_first = gate, self.function is not None

    def add(self, residual: Slot, step: float | None) -> None:
        """Absorb y + residual; the step is that of codes."""
        self.residual, self.residual_step, self.function_first = residual, step, self.function is not None

    def target_of(self, slot: Slot) -> Target:
        """The target that writes a tensor of this step's."""
        return next(target for target in self.targets if target.slot is slot)

    def stand_for_value(self, target: Target, step: float) -> bool:
        """Let codes stand for the value of targets behind them; whether they can: those of one target do, at most."""
        if any(other.step is not None for other in self.targets if other is not target):
            return False
        target.step = step
        return True

    def stored(self) -> Slot:
        """The stream of the value."""
        if self.stream is None:
            self.stream = Slot("", "stream", self.shape)
        return self.stream

    def clamp(self, low: float | None, high: float | None) -> None:
        """Absorb max(y, low), then min(y, high)."""
        if low is not None:
            self.low = low if self.low is None else max(self.low, low)
            self.high = None if self.high is None else max(self.high, low)
        if high is not None:
            self.low = None if self.low is None else min(self.low, high)
            self.high = high if self.high is None else min(self.high, high)
        self.clamped = True

    def written(self) -> list[Slot]:
        """Tensors the step writes."""
        return [t.slot for t in self.targets] + ([self.stream] if self.stream is not None else [])


def assemble(
    drafts: Iterable[Draft], inputs: list[Slot], outputs: list[Slot], stream_dtype: str
) -> tuple[Program, Tensor]:
    """Number the tensors, order the steps, pack the weights: (Program, blob uint8 on the CPU)."""
    ordered = _ordered([draft for draft in drafts if draft.written()])
    slots = list(inputs)
    for draft in ordered:
        if draft.stream is not None:
            draft.stream.name = draft.stream.name or draft.value.name
        slots.extend(draft.written())
    number = {slot: index for index, slot in enumerate(slots)}
    arrays: dict[str, Tensor] = {}
    steps = tuple(_step(draft, number, arrays) for draft in ordered)
    specs, blob, digest = build_blob(arrays)
    program = Program(
        tuple(slot.spec() for slot in slots),
        steps,
        tuple(number[slot] for slot in inputs),
        tuple(number[slot] for slot in outputs),
        specs,
        stream_dtype,
        digest,
    )
    return program, blob


def _ordered(drafts: list[Draft]) -> list[Draft]:
    """Steps in the given order, but none before the steps that write what it reads."""
    writer = {slot: draft for draft in drafts for slot in draft.written()}
    done: dict[Draft, None] = {}
    stack = list(reversed(drafts))
    while stack:
        draft = stack[-1]
        reads = (*draft.sources, draft.gate, draft.residual)
        needed = [writer[s] for s in reads if s in writer and writer[s] not in done]
        if needed:
            stack.extend(needed)
        else:
            done.setdefault(stack.pop())
    return list(done)


def _step(draft: Draft, number: dict[Slot, int], arrays: dict[str, Tensor]) -> Step:
    emit = Emit(
        number[draft.residual] if draft.residual is not None else None,
        draft.low,
        draft.high,
        number[draft.stream] if draft.stream is not None else None,
        tuple(_consumer(target, number, arrays) for target in sorted(draft.targets, key=_rank)),
        _activation(draft, arrays),
        number[draft.gate] if draft.gate is not None else None,
        draft.residual_step,
    )
    if draft.selection is not None:
        inputs = tuple(number[slot] for slot in draft.sources)
        return SelectStep(draft.name, inputs, emit, *vars(draft.selection).values())
    source = number[draft.source]
    if draft.pool is not None:
        op = draft.pool
        if op.kind == "resize":
            return ResizeStep(draft.name, source, emit, op.size, op.scale, op.offset)
        kind = op.kind.removesuffix("_pool")
        return PoolStep(draft.name, source, emit, kind, *op.window.fields()[:3])  # type: ignore[arg-type]
    if draft.layer is None:
        return QuantPackStep(draft.name, source, emit, *_affine_keys(draft, arrays))
    return _layer_step(draft, draft.layer, source, emit, arrays)


def _rank(target: Target) -> int:
    """Codes that stand for the value come behind those of the value itself, and before what is made of them."""
    return 2 if target.behind is not None else int(target.step is not None)


def _activation(draft: Draft, arrays: dict[str, Tensor]) -> Activation | None:
    function = draft.function
    if function is None:
        return None
    key = None
    if function.slope is not None:
        key = f"{draft.name}.slope"
        arrays[key] = rounded(function.slope.cpu(), f"the slope behind {draft.name}")
    return Activation(function.kind, function.value, key, draft.function_first)  # type: ignore[arg-type]


def _affine_keys(draft: Draft, arrays: dict[str, Tensor]) -> tuple[str, ...]:
    """Keys of the multiplier and bias of a step without a layer; none where it takes its input as it is."""
    if draft.pixels is None and not draft.norms and draft.factor == 1:
        return ()
    ones, zeros = (torch.full(draft.shape[:1], value, dtype=torch.float64) for value in (draft.factor, 0.0))
    scale, shift = draft.pixels or (ones, zeros)
    keys = (f"{draft.name}.gain", f"{draft.name}.offset")  # no layer's array ends like this
    arrays.update(zip(keys, through_norms(scale, shift, draft.name, draft.norms), strict=True))
    return keys


def _consumer(target: Target, number: dict[Slot, int], arrays: dict[str, Tensor]) -> Consumer:
    slot = target.slot
    scale_key = shift_key = None
    if target.norm is not None:
        name, norm = target.norm
        scale_key, shift_key = f"{name}.scale", f"{name}.shift"
        if scale_key not in arrays:
            gain, shift = affine(norm, name)
            arrays[scale_key] = rounded(gain, f"the scale of {name}")
            arrays[shift_key] = rounded(shift, f"the shift of {name}")
    return Consumer(
        *(number[slot], slot.bits, target.scale, slot.zero, slot.signed, scale_key, shift_key),
        relu=target.relu,
        step=target.step,
    )


def _layer_step(draft: Draft, layer: QuantLayer, source: int, emit: Emit, arrays: dict[str, Tensor]) -> Step:
    keys = (f"{draft.name}.planes", f"{draft.name}.multiplier", f"{draft.name}.bias")
    part = draft.part
    arrays[keys[0]] = pack_weights(weight_codes(layer, draft.source.shape, part), layer.w_bits)
    multiplier, bias = multiplier_and_bias(layer, draft.name, draft.norms)
    arrays[keys[1]] = multiplier if part is None else part.multiplier(multiplier)
    arrays[keys[2]] = bias if part is None else part.by_filter(bias)
    _, filters, taps, _ = arrays[keys[0]].shape
    window = Window(draft.source.shape[1:])  # linear: the whole image at once
    if part is not None:
        window = part.window
    elif isinstance(layer, nn.Conv2d):
        geometry: tuple[Any, ...] = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        window = Window(*geometry)
    check_accumulator(taps * (draft.source.shape[0] // window.groups), layer.w_bits, layer.a_bits, draft.name)
    total = max(layer.total_filters * (1 if part is None else len(part.places)), filters)
    if not isinstance(layer, nn.Conv2d) and taps == 1:
        return LinearStep(draft.name, source, emit, layer.w_bits, total, *keys, layer.w_grid)
    return ConvStep(draft.name, source, emit, layer.w_bits, *window.fields(), total, *keys, layer.w_grid)


def weight_codes(layer: QuantLayer, shape: Shape, part: Part | None = None) -> Tensor:
    """Codes uint8 [O, kh, kw, C] on the CPU, of a part of the layer where one is given; a linear layer reads an image
    of `shape` [C, H, W] as one window.
    """
    codes = layer.code_bytes().cpu()
    if part is not None:
        codes = part.codes(codes)
    if codes.dim() == 2:
        codes = codes.reshape(codes.shape[0], *shape)
    return codes.permute(0, 2, 3, 1).contiguous()
