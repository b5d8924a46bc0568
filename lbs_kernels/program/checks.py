"""The rules a program must keep, checked before anything is allocated from its numbers.

`csrc/program/checks.cpp` holds the same rules in the same order; `program/rules.py` names them.
"""

from __future__ import annotations

import re

from torch import Tensor

from lbs_kernels.errors import FormatError
from lbs_kernels.program.planes import MAX_BITS, WORD
from lbs_kernels.program.rules import MAX_COUNT, MAX_ELEMENTS, MAX_NAME, MAX_SIZE, NOT_PRINTABLE
from lbs_kernels.program.steps import (
    ARRAY_DTYPES,
    BLOB_ALIGNMENT,
    IMAGE_DTYPES,
    STREAM_DTYPES,
    ConvStep,
    LinearStep,
    PoolStep,
    Program,
    QuantPackStep,
    ResizeStep,
    SelectStep,
    Step,
    TensorSpec,
)
from lbs_kernels.program.walk import Walk

_HIDDEN = re.compile(f"[{''.join(f'{chr(first)}-{chr(last)}' for first, last in NOT_PRINTABLE)}]")


def check_program(program: Program, blob_bytes: int | None = None) -> None:
    """Refuse a program that

    - numbers tensors that do not exist, writes one twice or never, or reads one before it is written;
    - has sizes that are not positive, absurd, or do not follow from the step that writes them;
    - has arrays outside the blob, unaligned, or of another shape than their step needs;
    - pads signed codes, could overflow an accumulator, or mixes tensor forms;
    - says it is of a version and uses what came with a later one.

    Raises:
        FormatError: what, where, the value and the rule.
    """
    for name, items in (("tensors", program.tensors), ("steps", program.steps), ("arrays", program.arrays)):
        if len(items) > MAX_COUNT:
            raise FormatError(f"program has {len(items)} {name}; at most {MAX_COUNT} are allowed", "count")
    if program.stream_dtype not in STREAM_DTYPES:
        raise FormatError(
            f"stream_dtype is {program.stream_dtype!r}; expected one of {', '.join(STREAM_DTYPES)}", "stream-dtype"
        )
    if not re.fullmatch(r"([0-9a-f]{64})?", program.digest):
        raise FormatError(f"digest is {program.digest[:80]!r}; expected 64 hexadecimal digits, or nothing", "digest")
    for index, spec in enumerate(program.tensors):
        _check_tensor(spec, f"tensor {index}")
    _check_version(program)
    for key in program.arrays:
        _check_array(program, key, blob_bytes)
    for step in program.steps:
        _check_name(step.name, "a step")
    Walk(program).check()


def _check_version(program: Program) -> None:
    if program.version < 2:
        _check_version_1(program)
    for step in program.steps:
        if program.version < 3:
            _check_version_2(step, program.version)
        if program.version < 4:
            _check_version_3(step, program.version)
        if program.version < 5:
            _check_version_4(step, program.version)


def _moves_pixels(step: SelectStep) -> bool:
    return (step.size, step.block, step.stride, step.top, step.left) != ((0, 0), (1, 1), (1, 1), (), ())


def _check_version_1(program: Program) -> None:
    for spec in program.tensors:
        if spec.dtype != "float32":
            raise FormatError(
                f"image {spec.name} is {spec.dtype} in a program of version 1; write it as version 2", "version-1"
            )
    for step in program.steps:
        if isinstance(step, QuantPackStep) and (step.multiplier, step.bias) != (None, None):
            raise FormatError(
                f"step {step.name!r} has a multiplier or bias in a program of version 1; write it as version 2",
                "version-1",
            )


def _check_version_2(step: Step, version: int) -> None:
    if isinstance(step, ConvStep | LinearStep) and step.w_grid != "odd":
        raise FormatError(
            f"step {step.name!r} has weights on grid {step.w_grid!r} in a program of version {version}; "
            "write it as version 3",
            "version-2",
        )
    if (step.emit.activation, step.emit.gate) != (None, None):
        raise FormatError(
            f"step {step.name!r} has an activation or a gate in a program of version {version}; write it as version 3",
            "version-2",
        )
    if (isinstance(step, PoolStep) and step.kind == "average") or isinstance(step, SelectStep):
        raise FormatError(
            f"step {step.name!r} is an average or a selection in a program of version {version}; write it as version 3",
            "version-2",
        )


def _check_version_3(step: Step, version: int) -> None:
    if isinstance(step, ResizeStep):
        raise FormatError(
            f"step {step.name!r} interpolates in a program of version {version}; write it as version 4", "version-3"
        )
    if isinstance(step, SelectStep) and _moves_pixels(step):
        raise FormatError(
            f"step {step.name!r} moves pixels in a program of version {version}; write it as version 4", "version-3"
        )


def _check_version_4(step: Step, version: int) -> None:
    if step.emit.residual_step is not None or any(consumer.step is not None for consumer in step.emit.consumers):
        raise FormatError(
            f"step {step.name!r} has a step of codes in a program of version {version}; write it as version 5",
            "version-4",
        )


def _check_name(name: str, place: str) -> None:
    if not 1 <= len(name) <= MAX_NAME or _HIDDEN.search(name):
        raise FormatError(
            f"{place} is named {name[:MAX_NAME]!r}; names are 1 to {MAX_NAME} printable characters", "name"
        )


def _check_tensor(spec: TensorSpec, place: str) -> None:
    _check_name(spec.name, place)
    if spec.form not in ("image", "codes", "stream"):
        raise FormatError(f"{place} has form {spec.form!r}; expected image, codes or stream", "choice")
    for name, size in (("channels", spec.channels), ("height", spec.height), ("width", spec.width)):
        if not 1 <= size <= MAX_SIZE:
            raise FormatError(f"{place} has {name} = {size}; sizes are 1 to {MAX_SIZE}", "size")
    if spec.channels * spec.height * spec.width > MAX_ELEMENTS:
        raise FormatError(
            f"{place} has {spec.channels} x {spec.height} x {spec.width} elements; at most {MAX_ELEMENTS} per image",
            "elements",
        )
    if spec.form == "codes":
        if not 1 <= spec.bits <= MAX_BITS:
            raise FormatError(f"{place} has {spec.bits} bits; codes have 1 to {MAX_BITS}", "bits")
        if not 0 <= spec.zero < 1 << spec.bits:
            raise FormatError(f"{place} has zero = {spec.zero}; it is a code, 0 to {(1 << spec.bits) - 1}", "zero")
        if spec.signed and spec.zero:
            raise FormatError(
                f"{place} is signed with zero = {spec.zero}; signed codes have none, set it to 0", "signed-zero"
            )
    elif spec.bits or spec.zero or spec.signed:
        raise FormatError(f"{place} is a {spec.form} with bits, zero or sign; only codes have them", "codes-only")
    if spec.dtype not in IMAGE_DTYPES or (spec.dtype != "float32" and spec.form != "image"):
        raise FormatError(
            f"{place} is a {spec.form} of {spec.dtype}; only images have a dtype, float32 or uint8", "image-dtype"
        )
    if spec.flat and (spec.form != "stream" or spec.height * spec.width != 1):
        raise FormatError(f"{place} is flat; only a stream of 1 x 1 pixels can be", "flat")


def _check_array(program: Program, key: str, blob_bytes: int | None) -> None:
    spec, place = program.arrays[key], f"array {key!r}"
    _check_name(key, "an array")
    if spec.dtype not in ARRAY_DTYPES:
        raise FormatError(f"{place} has dtype {spec.dtype!r}; expected one of {', '.join(ARRAY_DTYPES)}", "array-dtype")
    if not 1 <= len(spec.shape) <= 4 or any(not 1 <= size <= MAX_SIZE for size in spec.shape):
        raise FormatError(
            f"{place} has shape {spec.shape[:8]}; expected 1 to 4 sizes of 1 to {MAX_SIZE}", "array-shape"
        )
    if not 0 <= spec.offset < 1 << 63 or spec.offset % BLOB_ALIGNMENT:
        raise FormatError(
            f"{place} starts at byte {spec.offset}; offsets are multiples of {BLOB_ALIGNMENT}, from 0 to below 2^63",
            "array-place",
        )
    if blob_bytes is not None and spec.offset + spec.nbytes > blob_bytes:
        end = spec.offset + spec.nbytes
        raise FormatError(
            f"{place} ends at byte {end}; the blob has {blob_bytes}: it is truncated or another's",
            "array-place",
        )


def check_planes(program: Program, blob: Tensor) -> None:
    """Refuse weights with bits beyond their last channel: kernels multiply whole words.

    Args:
        program: one that `check_program` has passed.
        blob: its blob, uint8 on the CPU.

    Raises:
        FormatError: which step, and which channels its planes have.
    """
    for step in program.steps:
        if not isinstance(step, ConvStep | LinearStep):
            continue
        channels = program.tensors[step.input].channels // (step.groups if isinstance(step, ConvStep) else 1)
        if channels % WORD == 0:
            continue
        last = program.array(blob, step.planes).numpy()[..., -1].view("uint32")
        if (last >> channels % WORD).any():
            raise FormatError(
                f"step {step.name!r} has planes with bits beyond channel {channels - 1}; unused bits are 0, the "
                "planes are damaged",
                "unused-bits",
            )
