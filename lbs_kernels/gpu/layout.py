"""How the GPU back end keeps tensors: packed codes, biased bytes, streams; and where they lie in one arena.

    codes below 8 bits   planes int32 [N, H, W, bits, CW], the form of program/planes.py
    codes of 8 bits      int8 [N, H, W, pitch], q - 128, pitch = C rounded up to 16: what the tensor core multiplies,
                         and 16-byte loads for every pixel. Channels beyond C hold nothing in particular.
    nibbles              int32 [N, H, W, pitch] where a tensor says so (`NibbleSpec`): codes of at most 4 bits, those of
                         eight channels in a word, pitch = 4 for every 32 channels. Word w holds channel 8 w + j (j < 4)
                         in bits 8 j and up and channel 8 w + 4 + j in bits 8 j + 4 and up: w & 0x0f0f0f0f and
                         w >> 4 & 0x0f0f0f0f are bytes in order. Channels beyond C hold nothing in particular.
    streams              [N, H, W, C] in the stream type

Each form has an exact inverse, `to_logical(from_logical(x)) == x`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lbs_kernels.errors import ShapeError
from lbs_kernels.program.planes import pack_planes, unpack_planes, words
from lbs_kernels.program.steps import STREAM_DTYPES, Program, Step, TensorSpec, sources

PITCH = 16  # bytes: one vector load
ALIGNMENT = 256  # bytes: what cudaMalloc gives
MAX_INDEX = 2**31 - 1  # kernels count elements of one tensor in int32
BYTE_BITS = 8  # codes of this width are bytes, narrower ones planes or nibbles
NIBBLE_BITS = 4  # at most
NIBBLE_CHANNELS = 2 * PITCH  # of 16 bytes
Kept = Literal["planes", "bytes", "nibbles"]


def byte_pitch(channels: int) -> int:
    """Elements between two pixels of biased bytes."""
    return -(-channels // PITCH) * PITCH


def kept(spec: TensorSpec) -> Kept:
    """How the codes of a tensor lie."""
    if spec.nibbles:
        return "nibbles"
    return "bytes" if spec.bits == BYTE_BITS else "planes"


def pixel_elements(spec: TensorSpec) -> int:
    """Elements between two pixels of a tensor in its GPU form."""
    if spec.form != "codes":
        return spec.channels
    pitches = {"bytes": byte_pitch, "nibbles": nibble_pitch, "planes": lambda channels: spec.bits * words(channels)}
    return pitches[kept(spec)](spec.channels)


def nbytes(spec: TensorSpec, stream_dtype: str, batch: int) -> int:
    """Bytes of a tensor in its GPU form."""
    codes = 1 if kept(spec) == "bytes" else 4
    size = codes if spec.form == "codes" else STREAM_DTYPES[stream_dtype].itemsize
    return batch * spec.height * spec.width * pixel_elements(spec) * size


def nibble_pitch(channels: int) -> int:
    """Words between two pixels of nibbles."""
    return -(-channels // NIBBLE_CHANNELS) * (PITCH // 4)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int32 [..., pitch] of codes uint8 [..., C] below 16; unused nibbles are 0."""
    channels = 8 * nibble_pitch(codes.shape[-1])
    padded = torch.nn.functional.pad(codes, (0, channels - codes.shape[-1])).unflatten(-1, (-1, 2, 4))
    return (padded[..., 0, :] | padded[..., 1, :] << 4).flatten(-2).contiguous().view(torch.int32)


def unpack_nibbles(words: Tensor, channels: int) -> Tensor:
    """Codes uint8 [..., C] of nibbles int32 [..., pitch], the inverse of `pack_nibbles`."""
    pairs = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 1, 4))
    return torch.cat([pairs & 15, pairs >> 4], dim=-2).flatten(-3)[..., :channels].contiguous()


def storage(spec: TensorSpec, stream_dtype: str, batch: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of the buffer of one tensor.

    Raises:
        ShapeError: more elements than the kernels can count.
    """
    shape: tuple[int, ...] = (batch, spec.height, spec.width)
    if batch * spec.height * spec.width * pixel_elements(spec) > MAX_INDEX:
        raise ShapeError(
            f"{spec.name} has {batch} x {spec.height} x {spec.width} pixels of {pixel_elements(spec)} elements; "
            f"the GPU kernels count to {MAX_INDEX}, split the batch"
        )
    if spec.form != "codes":
        return STREAM_DTYPES[stream_dtype], (*shape, spec.channels)
    if kept(spec) == "bytes":
        return torch.int8, (*shape, byte_pitch(spec.channels))
    if spec.nibbles:
        return torch.int32, (*shape, nibble_pitch(spec.channels))
    return torch.int32, (*shape, spec.bits, words(spec.channels))


def to_logical(buffer: Tensor, spec: TensorSpec) -> Tensor:
    """A copy of the tensor in its logical form: codes uint8 [N, H, W, C], streams as they are.

    Raises:
        FormatError: planes with bits set beyond the last channel.
    """
    if spec.form != "codes":
        return buffer.clone()
    if spec.nibbles:
        return unpack_nibbles(buffer, spec.channels)
    if spec.bits == BYTE_BITS:
        return (buffer[..., : spec.channels].to(torch.int16) + 128).to(torch.uint8)
    return unpack_planes(buffer, spec.bits, spec.channels)


def from_logical(codes: Tensor, spec: TensorSpec) -> Tensor:
    """The GPU form of codes uint8 [N, H, W, C], the inverse of `to_logical`; unused bytes and nibbles are 0."""
    if spec.nibbles:
        return pack_nibbles(codes)
    if spec.bits < BYTE_BITS:
        return pack_planes(codes, spec.bits)
    padded = torch.nn.functional.pad(codes.to(torch.int16) - 128, (0, byte_pitch(spec.channels) - spec.channels))
    return padded.to(torch.int8)


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the arena, in bytes."""

    offset: int
    nbytes: int


def read_by(step: Step) -> list[int]:
    """The tensors a step reads."""
    return [index for index in (*sources(step), step.emit.gate, step.emit.residual) if index is not None]


def written_by(step: Step) -> list[int]:
    """The tensors a step writes."""
    written = [consumer.tensor for consumer in step.emit.consumers]
    return written if step.emit.stream is None else [step.emit.stream, *written]


def lifetimes(program: Program, beside: Mapping[int, int] = MappingProxyType({})) -> dict[int, tuple[int, int]]:
    """First and last step (inclusive) at which each tensor must keep its values; outputs stay to the end.

    beside: steps that run beside all up to the one they join (`gpu/branches.py`): what they touch stays until then.
    """
    spans: dict[int, tuple[int, int]] = {}
    for at, step in enumerate(program.steps):
        last = beside.get(at, at + 1) - 1
        for index in read_by(step):
            if index in spans:
                spans[index] = (spans[index][0], max(spans[index][1], last))
        for index in written_by(step):
            spans[index] = (at, last)
    end = len(program.steps)
    return {index: (first, end if index in program.outputs else last) for index, (first, last) in spans.items()}


def plan_arena(
    program: Program, batch: int, beside: Mapping[int, int] = MappingProxyType({})
) -> tuple[dict[int, Slot], int]:
    """Offsets for every tensor that steps write, and the arena's size. Tensors overlap only if never alive together.

    First fit in order of writing: networks are chains, and the gap a dead tensor leaves suits a later one.

    beside: as `lifetimes` takes them.
    """
    spans = lifetimes(program, beside)
    slots: dict[int, Slot] = {}
    size = 0
    for index, (first, last) in spans.items():
        dtype, shape = storage(program.tensors[index], program.stream_dtype, batch)
        nbytes = -(-dtype.itemsize * torch.Size(shape).numel() // ALIGNMENT) * ALIGNMENT
        taken = sorted(
            (slots[other].offset, slots[other].offset + slots[other].nbytes)
            for other in slots
            if spans[other][0] <= last and first <= spans[other][1]
        )
        offset = 0
        for start, stop in taken:
            if offset + nbytes <= start:
                break
            offset = max(offset, stop)
        slots[index] = Slot(offset, nbytes)
        size = max(size, offset + nbytes)
    return slots, size


def arena_view(arena: Tensor, slot: Slot, spec: TensorSpec, stream_dtype: str, batch: int) -> Tensor:
    """The buffer of one tensor inside the arena (uint8 [bytes])."""
    dtype, shape = storage(spec, stream_dtype, batch)
    count = dtype.itemsize * torch.Size(shape).numel()
    return arena[slot.offset : slot.offset + count].view(dtype).view(shape)
