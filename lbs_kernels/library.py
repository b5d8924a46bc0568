"""The `torch.library` namespace `lbs_kernels`: one way to define an operation, and the checks operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.program.planes import MAX_BITS, words

# cudagraph_unsafe: back ends keep buffers between calls, which graphs that torch.compile records by itself would count
# as leaks. Who wants a graph records one (PackedModel.capture, torch.cuda.graph).
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)
# Kept here: an operation lives as long as the Library that defined it.
_library = torch.library.Library("lbs_kernels", "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `lbs_kernels::<schema>` for every device. `fake` computes shapes only, and may be given symbolic ones."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lbs_kernels::{name}", fake, lib=_library)


_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_profiling = getattr(torch.autograd, "_profiler_enabled", lambda: True)


def unwatched(x: Tensor) -> bool:
    """Whether nobody would see an operation on `x`: no graph is traced, no mode or profiler is on.

    Its implementation may then be called as it is, which saves the way through the dispatcher (8 us of a call that
    finds cold caches behind it, Zen 4). False where this torch does not tell.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _dispatch_modes()
        and not _profiling()
    )


def check_codes(op: str, x: Tensor, form: str, bits: int, zero: int, signed: bool) -> None:
    """Codes are uint8 with one dimension per word of `form` ("N H W C"), and their reading makes sense.

    Raises:
        ShapeError: another dtype or number of dimensions.
        FormatError: illegal bits, a zero that is no code, or a zero of signed codes.
    """
    if x.dtype is not torch.uint8:
        raise ShapeError(f"{op}: x_codes is {x.dtype}; codes are uint8, encode the floats with quantpack first")
    if x.dim() != len(form.split()):
        raise ShapeError(f"{op}: x_codes has shape {list(x.shape)}; expected [{form.replace(' ', ', ')}]")
    check_reading(op, bits, zero, signed)


def check_reading(op: str, bits: int, zero: int, signed: bool) -> None:
    """Bits, zero and sign fit together. Raises FormatError."""
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"{op}: {bits} bits; codes have 1 to {MAX_BITS}")
    if not 0 <= zero < 1 << bits:
        raise FormatError(f"{op}: zero = {zero}; it is a code, 0 to {(1 << bits) - 1}")
    if signed and zero:
        raise FormatError(f"{op}: signed codes with zero = {zero}; signed codes have none, set it to 0")


def check_code_range(op: str, x: Tensor, bits: int) -> None:
    """Codes are below 2^bits. Only on the CPU: elsewhere looking at the values would stall the device.

    Raises:
        FormatError: a code that does not fit.
    """
    if x.device.type == "cpu" and x.numel() and bits < MAX_BITS and int(x.max()) >= 1 << bits:
        raise FormatError(f"{op}: largest code is {int(x.max())}; {bits} bits hold 0 to {(1 << bits) - 1}")


def check_weights(
    op: str, x: Tensor, w_planes: Tensor, multiplier: Tensor, bias: Tensor, channels: int, taps: int
) -> None:
    """Planes int32 [w_bits, O, taps, CW] over `channels`, multiplier and bias float32 [O], all on x's device.

    Raises:
        ShapeError: another dtype, shape or device.
    """
    if w_planes.dtype is not torch.int32 or w_planes.dim() != 4 or not 1 <= w_planes.shape[0] <= MAX_BITS:
        raise ShapeError(
            f"{op}: w_planes is {w_planes.dtype} {list(w_planes.shape)}; expected int32 [w_bits, O, T, CW], "
            "see pack_weights"
        )
    if w_planes.shape[2] != taps or w_planes.shape[3] != words(channels):
        raise ShapeError(
            f"{op}: x has {channels} channels per group and the kernel {taps} taps, which need planes of "
            f"[T, CW] = [{taps}, {words(channels)}]; these have {list(w_planes.shape[2:])}: run the layer on the "
            "tensor it was packed for, or pack again"
        )
    filters = w_planes.shape[1]
    for name, value in (("multiplier", multiplier), ("bias", bias)):
        if value.dtype is not torch.float32 or tuple(value.shape) != (filters,):
            raise ShapeError(f"{op}: {name} is {value.dtype} {list(value.shape)}; expected float32 [{filters}]")
    for name, value in (("w_planes", w_planes), ("multiplier", multiplier), ("bias", bias)):
        if value.device != x.device:
            raise ShapeError(f"{op}: {name} lies on {value.device}, x on {x.device}; move one of them")
