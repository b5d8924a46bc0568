"""The roofs of a GPU: copy bandwidth, and the rates of its tensor cores on float16, INT8 and single bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu_device
from lbs_kernels import extension
from lbs_kernels.gpu.configs.cuda import machines
from lbs_kernels.times import stopwatch
from lbs_kernels.times.stopwatch import Times

COPY_BYTES = 1 << 30  # far beyond any L2, so that the copy runs at the speed of the memory
SIZE = 8192  # of a square matrix product that fills the chip
REPEATS = 1 << 14  # steps of one-bit products, or chunks of bytes, in one launch: some milliseconds


def measure(save: Callable[[dict[str, Any]], object], attempt: Callable[[str], bool]) -> dict[str, Any]:
    """{"rows": {roof: {median_s, p20_s, p80_s, operations | bytes per second}}, "b1_over_int8", "missing"}.

    b1_over_int8 is the rate of the one-bit instruction, on operands that lie ready, over that of the library's INT8
    product: the most a one-bit kernel could gain.
    """
    body: dict[str, Any] = {"rows": {}, "missing": {}, "b1_over_int8": None, "complete": False}
    for name, make in CONTENDERS.items():
        if not attempt(name):
            body["missing"][name] = "it broke the device"
            continue
        try:
            body["rows"][name] = make()
            gpu_device.survive()
        except Exception as error:  # noqa: BLE001  one roof that cannot be measured must not cost the others
            body["missing"][name] = f"{type(error).__name__}: {error}"
            gpu_device.survive()
        save(body)
    rows = body["rows"]
    if "b1" in rows and "int8" in rows:
        body["b1_over_int8"] = rows["b1"]["operations_per_s"] / rows["int8"]["operations_per_s"]
    return {**body, "complete": True}


def row(times: Times, **work: float) -> dict[str, float]:
    """Times and the rate of each kind of work."""
    rates = {f"{kind}_per_s": amount / times.median for kind, amount in work.items()}
    return {"median_s": times.median, "p20_s": times.p20, "p80_s": times.p80, **rates}


def _copy() -> dict[str, float]:
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=gpu_device.DEVICE)
    target = torch.empty_like(source)
    times = stopwatch.interleave({"copy": lambda: target.copy_(source)}, device=gpu_device.DEVICE, rounds=30)["copy"]
    return row(times, bytes=2 * COPY_BYTES)


def _product(dtype: torch.dtype) -> dict[str, float]:
    if dtype is torch.int8:
        a, b = (torch.randint(-128, 128, (SIZE, SIZE), dtype=dtype, device=gpu_device.DEVICE) for _ in range(2))
        call: Callable[[], object] = lambda: torch._int_mm(a, b.t())  # noqa: E731
    else:
        a, b = (torch.randn(SIZE, SIZE, device=gpu_device.DEVICE).to(dtype) for _ in range(2))
        call = lambda: a @ b.t()  # noqa: E731
    return row(stopwatch.interleave({"p": call}, device=gpu_device.DEVICE, rounds=20)["p"], operations=2 * SIZE**3)


def _one_bit() -> dict[str, float]:
    """One-bit products on operands that stay in shared memory, on the faster of the instructions this GPU has."""
    native = extension.require_cuda()
    index = torch.cuda.current_device()
    found = machines(gpu_device.DEVICE)
    if not found:
        raise RuntimeError("this GPU has no one-bit tensor core that multiplies by AND")
    out = torch.zeros(native.onebit_peak_threads(index), dtype=torch.int32, device=gpu_device.DEVICE)

    def multiply(machine: str) -> int:
        stream = torch.cuda.current_stream(index).cuda_stream
        return int(native.onebit_peak(machine, REPEATS, out.data_ptr(), index, stream))

    calls = {machine: functools.partial(multiply, machine) for machine in found}
    times = stopwatch.interleave(calls, device=gpu_device.DEVICE, rounds=20, warmup=0.02)
    rows = {machine: row(times[machine], operations=2 * multiply(machine)) for machine in found}
    best = max(found, key=lambda machine: rows[machine]["operations_per_s"])
    return {**rows[best], "machine": best}  # type: ignore[dict-item]


def _bytes() -> dict[str, float]:
    """Products of bytes on operands that stay in shared memory: what the s8 kernels could reach."""
    native = extension.require_cuda()
    index = torch.cuda.current_device()
    if "wgmma" not in machines(gpu_device.DEVICE):
        raise RuntimeError("this GPU has no tensor core that multiplies bytes asynchronously")
    out = torch.zeros(native.s8_peak_threads(index), dtype=torch.int32, device=gpu_device.DEVICE)

    def multiply() -> int:
        return int(native.s8_peak(REPEATS, out.data_ptr(), index, torch.cuda.current_stream(index).cuda_stream))

    times = stopwatch.interleave({"s8": multiply}, device=gpu_device.DEVICE, rounds=20, warmup=0.02)["s8"]
    return row(times, operations=2 * multiply())


CONTENDERS: dict[str, Callable[[], dict[str, float]]] = {
    "copy": _copy,
    "float16": lambda: _product(torch.float16),
    "int8": lambda: _product(torch.int8),
    "s8": _bytes,
    "b1": _one_bit,
}
