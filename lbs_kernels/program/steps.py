"""Program: the tensors and steps of one packed region, as plain data.

A program is what packing produces and every back end runs. It names no layout: a back end may keep codes as bytes,
planes or tiles, as long as the numbers are those of the reference. All arrays live in one `blob`, so that a program is
one JSON text plus one tensor of bytes; `docs/format.md` defines both. `program/text.py` reads and validates the text.

Tensor forms, per image (the batch is the leading dimension at run time):

    image   `dtype` [C, H, W]   what the region is given, channels first: float32, or uint8 for the bytes of pictures
    codes   uint8   [H, W, C]   integers of `bits` bits
    stream  float   [H, W, C]   values in the program's stream type; a region returns these as float32 [C, H, W],
                                or [C] where `flat`
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program.window import Window

# 2: images of bytes, and quantpack steps with a multiplier and a bias. 3: weights with a zero, activations and gates in
# `emit`, averages, selections. 4: interpolation, selections that move pixels. 5: residuals of codes.
PROGRAM_VERSION = 5
BLOB_ALIGNMENT = 64
WeightGrid = Literal["odd", "zero"]  # a weight code counts as 2 q - n, or as q - 2^(bits - 1)
IMAGE_DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
STREAM_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ARRAY_DTYPES = {"float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True)
class TensorSpec:
    """One numbered tensor of a program, without its batch dimension."""

    name: str
    form: Literal["image", "codes", "stream"]
    channels: int
    height: int
    width: int
    bits: int = 0  # codes only
    zero: int = 0  # codes only: the code of real 0, which padding holds
    signed: bool = False  # codes only: real value v * (2q - n) / n
    flat: bool = False  # stream only: returned as [N, C] instead of [N, C, 1, 1]
    dtype: Literal["float32", "uint8"] = "float32"  # image only
    nibbles: ClassVar[bool] = False


@dataclass(frozen=True)
class NibbleSpec(TensorSpec):
    """Codes of at most 4 bits that a back end keeps two in a byte (gpu/layout.py); in files there are none."""

    nibbles: ClassVar[bool] = True


@dataclass(frozen=True)
class Consumer:
    """One code tensor written from a float value y (step 6 of the epilogue).

    u = fma(y, G[c], H[c])        if pre_scale
    u = max(u, 0)                 if relu
    t = u * scale                 rounded to float32
    t = t + n / 2                 if signed, rounded to float32
    q = clamp(rint(t) + zero, 0, n),  n = 2^bits - 1, half to even
    y = float32((q - zero) * step)  if step: what the consumers behind this one are given
    """

    tensor: int
    bits: int
    scale: float  # float32 value of n / v; of n / (2 v) if signed; of 1 / s for the network input
    zero: int = 0
    signed: bool = False
    pre_scale: str | None = None  # float32 [C], key of an array
    pre_bias: str | None = None
    relu: bool = False
    step: float | None = None  # float32 value of v / n, of unsigned codes of 8 bits that stand for y from here on


@dataclass(frozen=True)
class Activation:
    """A function of y, in float32 as `program/activations.py` defines it. ReLU and clamps are `low` and `high`."""

    kind: Literal[
        "elu",
        "gelu",
        "gelu_tanh",
        "hardsigmoid",
        "hardswish",
        "leaky_relu",
        "mish",
        "prelu",
        "sigmoid",
        "silu",
        "tanh",
    ]
    value: float = 0.0  # alpha of elu, slope of leaky_relu
    slope: str | None = None  # prelu: float32 [C], key of an array
    first: bool = False  # before the gate and the residual, else behind them


@dataclass(frozen=True)
class Emit:
    """What becomes of a float value y (steps 3-6): activation, gate, residual, clamp, stream, consumers.

    y = activation(y)          if it comes first
    y = y * gate[n, c]         if gate
    y = y + residual           if residual: a stream, or float32((q - zero) * residual_step) of codes
    y = activation(y)          if it comes behind
    y = min(max(y, low), high)
    """

    residual: int | None = None  # a stream, or unsigned codes of 8 bits
    low: float | None = None  # 0.0 for ReLU
    high: float | None = None  # 6.0 for ReLU6
    stream: int | None = None  # y is stored here; consumers read the stored value
    consumers: tuple[Consumer, ...] = ()
    activation: Activation | None = None
    gate: int | None = None  # a stream of one pixel
    residual_step: float | None = None  # float32 value of v / n of a residual of codes


@dataclass(frozen=True)
class QuantPackStep:
    """Read an image (or a stream) as floats x; y = fma(x, multiplier[c], bias[c]) if they are given, else x; emit."""

    op: ClassVar[str] = "quantpack"
    name: str
    input: int
    emit: Emit
    multiplier: str | None = None  # float32 [C]
    bias: str | None = None  # float32 [C]


@dataclass(frozen=True)
class ConvStep:
    """Integer convolution of codes; y = fma(float32(acc), multiplier[o], bias[o]); emit."""

    op: ClassVar[str] = "bitconv2d"
    name: str
    input: int
    emit: Emit
    w_bits: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    total_filters: int  # before pruning; the planes hold the kept ones only
    planes: str  # int32 [w_bits, O, T, CW], CW over the channels of ONE group
    multiplier: str  # float32 [O]
    bias: str  # float32 [O]
    w_grid: WeightGrid = "odd"

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class LinearStep:
    """Integer matrix product of codes [C] (H = W = 1); y = fma(float32(acc), multiplier[o], bias[o]); emit."""

    op: ClassVar[str] = "bitlinear"
    name: str
    input: int
    emit: Emit
    w_bits: int
    total_filters: int
    planes: str  # int32 [w_bits, O, 1, CW]
    multiplier: str
    bias: str
    w_grid: WeightGrid = "odd"


@dataclass(frozen=True)
class PoolStep:
    """Pooling of a stream, or the maximum of codes.

    `max`: padding never wins; codes in give codes out unchanged (one consumer, scale ignored), a stream is emitted.
    `mean` (global, streams only): y[c] = (float32 sum over pixels in row-major order, one after the other) *
    float32(1 / (H * W)); the order is part of the definition, so every back end gives the same bits.
    `average` (streams only): the same over each window; padding counts as zeros.
    """

    op: ClassVar[str] = "pool"
    name: str
    input: int
    emit: Emit
    kind: Literal["max", "mean", "average"]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class SelectStep:
    """Channels of several tensors as one: concatenation, slices, shuffles, and pixels repeated by whole factors.

    y[h, w, c] = x[h // (H / H_x), w // (W / W_x), k]   x, k: the input that holds channel `channels[c]` of all inputs
                                                        side by side, and its number there
    (H, W) = repeat * the size of the first input, whole multiples of the sizes of all. Streams are emitted; codes of
    one kind give codes out unchanged (one consumer, scale ignored).

    Where `size` is given, pixels are moved: blocks of pixels become one (space to depth), one a block (depth to space),
    images are cropped.

    y[h, w, c] = x[top + stride[0] * (h // block[0]), left + stride[1] * (w // block[1]), k]
    (H, W) = size; x, k: of channel `channels[((h % block[0]) * block[1] + w % block[1]) * C + c]`; top, left of input x
    """

    op: ClassVar[str] = "select"
    name: str
    inputs: tuple[int, ...]
    emit: Emit
    channels: tuple[int, ...] = ()  # empty: all, in order
    repeat: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (0, 0)  # of the result where pixels are moved
    block: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    top: tuple[int, ...] = ()  # one for each input; empty: 0
    left: tuple[int, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether pixels are moved, and not only repeated."""
        return self.size != (0, 0)

    @property
    def input(self) -> int:
        """The first one, whose form, bits and size are those of the step."""
        return self.inputs[0]


@dataclass(frozen=True)
class ResizeStep:
    """Bilinear interpolation of a stream to another size, by two pixels a side, columns first.

    p = clamp(i * scale + offset, 0, size of the input - 1)   position of output row or column i, in float64
    k = floor(p);  w = float32(p - k)
    t[r, j] = x[r, k] * (1 - w) + x[r, min(k + 1, W - 1)] * w   along columns, every operation rounded to float32
    y[i, j] = t[k, j] * (1 - w) + t[min(k + 1, H - 1), j] * w   along rows
    """

    op: ClassVar[str] = "resize"
    name: str
    input: int
    emit: Emit
    size: tuple[int, int]  # rows and columns that are written
    scale: tuple[float, float]  # positions of the input from one output row, column to the next
    offset: tuple[float, float]  # the position of output row 0, column 0


Step = QuantPackStep | ConvStep | LinearStep | PoolStep | SelectStep | ResizeStep
STEP_TYPES: dict[str, type] = {t.op: t for t in (QuantPackStep, ConvStep, LinearStep, PoolStep, SelectStep, ResizeStep)}


def sources(step: Step) -> tuple[int, ...]:
    """The tensors a step computes from, gate and residual left out."""
    return step.inputs if isinstance(step, SelectStep) else (step.input,)


@dataclass(frozen=True)
class ArraySpec:
    """Where one array lies in the blob."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, a multiple of BLOB_ALIGNMENT

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return 4 * count


@dataclass(frozen=True)
class Program:
    """Tensors, steps in execution order, and where the arrays lie. Equal text and blob mean equal results."""

    tensors: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arrays: dict[str, ArraySpec] = field(default_factory=dict)
    stream_dtype: str = "float32"
    digest: str = ""  # sha256 of the blob, hex
    version: int = PROGRAM_VERSION

    def to_json(self) -> str:
        """The canonical JSON text (sorted keys, no spaces)."""
        body = asdict(self)
        body["steps"] = [{"op": step.op, **asdict(step)} for step in self.steps]
        _drop_additions(body, self.version)
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    def array(self, blob: Tensor, key: str) -> Tensor:
        """The array `key` as a view of the blob."""
        spec = self.arrays[key]
        raw = blob[spec.offset : spec.offset + spec.nbytes]
        return raw.view(ARRAY_DTYPES[spec.dtype]).view(spec.shape)


def _drop_additions(body: dict[str, Any], version: int) -> None:
    """Leave out what a version does not know; a valid program of that version holds the defaults there."""
    if version < 5:
        for step in body["steps"]:
            del step["emit"]["residual_step"]
            for consumer in step["emit"]["consumers"]:
                del consumer["step"]
    if version < 4:
        for step in body["steps"]:
            if step["op"] == SelectStep.op:
                for key in ("size", "block", "stride", "top", "left"):
                    del step[key]
    if version < 3:
        for step in body["steps"]:
            step.pop("w_grid", None)
            del step["emit"]["activation"], step["emit"]["gate"]
    if version < 2:
        for spec in body["tensors"]:
            del spec["dtype"]
        for step in body["steps"]:
            if step["op"] == QuantPackStep.op:
                del step["multiplier"], step["bias"]


def build_blob(arrays: dict[str, Tensor]) -> tuple[dict[str, ArraySpec], Tensor, str]:
    """Lay arrays into one blob: (specs, uint8 blob, sha256 hex digest). Order follows the dict."""
    specs: dict[str, ArraySpec] = {}
    offset = 0
    names = {dtype: name for name, dtype in ARRAY_DTYPES.items()}
    for key, value in arrays.items():
        if value.dtype not in names:
            raise FormatError(f"array {key} is {value.dtype}; a program holds float32 and int32 arrays only")
        specs[key] = ArraySpec(names[value.dtype], tuple(value.shape), offset)
        offset += -(-specs[key].nbytes // BLOB_ALIGNMENT) * BLOB_ALIGNMENT
    blob = torch.zeros(offset, dtype=torch.uint8, device="cpu")
    for key, value in arrays.items():
        spec = specs[key]
        blob[spec.offset : spec.offset + spec.nbytes] = value.contiguous().cpu().reshape(-1).view(torch.uint8)
    return specs, blob, blob_digest(blob)


def blob_digest(blob: Tensor) -> str:
    """sha256 of the blob's bytes, hex."""
    return hashlib.sha256(blob.cpu().numpy().data).hexdigest()


def describe(program: Program) -> list[dict[str, Any]]:
    """One row per step: name, op, shapes and bits, for printing."""
    rows: list[dict[str, Any]] = []
    for step in program.steps:
        source = program.tensors[step.input]
        targets = [consumer.tensor for consumer in step.emit.consumers]
        if step.emit.stream is not None:
            targets.append(step.emit.stream)
        result = program.tensors[targets[0]]
        rows.append(
            {
                "name": step.name,
                "op": step.op,
                "input": (source.height, source.width, source.channels),
                "output": (result.height, result.width, result.channels),
                "w_bits": getattr(step, "w_bits", 0),
                "a_bits": source.bits,
                "total_filters": getattr(step, "total_filters", 0),
            }
        )
    return rows
