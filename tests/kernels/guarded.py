"""Buffers with pages around them that cannot be touched: a kernel that leaves one ends the process.

Sanitizers look at the loads and stores of a compiler, and not at masked stores and gathers, so they pass a kernel that
writes four bytes too far. Pages see every instruction. What a caller owns is guarded by `guarded`, what the native
module allocates by LBS_GUARD; as a process of its own this file runs networks between them:

    guarded.py ISA SIDE        names each case before it runs, and at the end how many there were
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator

import test_native_bands as bands
import test_native_fakequant as fakequant
import test_native_short as short
import torch
from programs import random_inputs
from replay import Case, networks, operations
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.program.runner import empty_tensors

# What LBS_GUARD says of the native module's memory. That of a caller ends at its pages, or begins there ("start").
SIDES = ("reads", "writes", "start")
_PROT_NONE = 0
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: Tensor, side: str) -> Tensor:
    """A copy of `x`, its strides kept, that begins behind such a page or ends in front of one."""
    count = x.numel() * x.element_size()
    if count == 0:
        return x  # nothing to leave
    inner = -(-count // _PAGE) * _PAGE
    pages = mmap.mmap(-1, inner + 2 * _PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + _PAGE
    for page in (first - _PAGE, first + inner):
        if _libc.mprotect(page, _PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if side == "start" else _PAGE + inner - count
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=offset).view(x.dtype)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def cases() -> Iterator[Case]:
    """Every network and shape of `replay`, short sums, and bands, for which maps are large."""
    yield from networks()
    yield from operations()
    for layer in short.LAYERS:
        for reader in short.READERS:
            program, blob = short.net(layer, reader, (7, 19))
            yield f"short, {layer}, {reader}", program, blob, [], random_inputs(program, 3, seed=5)
    for window in bands.WINDOWS:
        for size, filters in bands.SIZES:
            program, blob = bands.net(window, size, filters)
            yield f"bands, {window}, {size}", program, blob, [], random_inputs(program, 1, seed=5)


def run(case: Case, isa: str, side: str) -> None:
    """A program between guards, in every way it is called: what it makes is what it makes without them."""
    name, program, blob, _, images = case
    batch = len(images[0])
    expected = _outputs(_runner(case, blob, isa), case, images, 1, None)
    os.environ["LBS_GUARD"] = side
    try:
        runner = _runner(case, guarded(blob, side), isa)
        for last in (False, True):
            layout = torch.channels_last if last else torch.contiguous_format
            given = [guarded(x.contiguous(memory_format=layout), side) for x in images]
            for threads in (1, 2):
                found = _outputs(runner, case, given, threads, side)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
        trace = {i: guarded(x, side) for i, x in empty_tensors(program, batch, "cpu")}
        found = _outputs(runner, case, given, 1, side, trace)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    finally:
        del os.environ["LBS_GUARD"]


def _runner(case: Case, blob: Tensor, isa: str) -> object:
    return extension.cpu.Program(case[1].to_json(), blob.data_ptr(), blob.numel(), isa, case[3])


def _outputs(
    runner: object,
    case: Case,
    images: list[Tensor],
    threads: int,
    side: str | None,
    trace: dict[int, Tensor] | None = None,
) -> list[Tensor]:
    program, batch = case[1], len(images[0])
    specs = [program.tensors[index] for index in program.outputs]
    outputs = [torch.full((batch, s.channels, s.height, s.width), math.nan) for s in specs]
    if side is not None:
        outputs = [guarded(y, side) for y in outputs]
    addresses = [x.data_ptr() for x in images], [y.data_ptr() for y in outputs]
    last = [not x.is_contiguous() for x in images]
    if trace is None:
        runner.run(*addresses, batch, threads, last)  # type: ignore[attr-defined]
    else:
        targets = {index: x.data_ptr() for index, x in trace.items()}
        runner.run_traced(*addresses, batch, threads, targets, last)  # type: ignore[attr-defined]
    return [torch.nan_to_num(y) for y in outputs]


def run_fake_quant(isa: str, side: str) -> None:
    """The quantizers of training at every number of elements up to some vectors, and at the end of a block."""
    for count in (*range(1, 70), 2047, 2049):
        for dtype, code in fakequant.DTYPES.items():
            x, y, g = (guarded(fakequant.sample(count, dtype, seed), side) for seed in range(3))
            how = fakequant.arguments((2, 4, 8), "unsigned")
            extension.cpu.fake_quant_forward(x.data_ptr(), y.data_ptr(), count, *how, 2, code, isa)
            extension.cpu.fake_quant_backward(x.data_ptr(), g.data_ptr(), y.data_ptr(), count, *how, 2, code, isa)


def main(isa: str, side: str) -> None:
    """All cases, one after the other."""
    ran = 0
    for case in cases():
        if case[3] and isa.startswith("amx"):
            continue  # tiles have one algorithm
        print(case[0], file=sys.stderr, flush=True)
        run(case, isa, side)
        ran += 1
    if not isa.startswith("amx"):
        print("fake quantizers", file=sys.stderr, flush=True)
        run_fake_quant(isa, side)
    print(ran)


if __name__ == "__main__":
    main(*sys.argv[1:])
