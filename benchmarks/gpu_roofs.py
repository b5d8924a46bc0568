"""The roofs of a GPU: copy bandwidth, and the rates of its tensor cores on float16, INT8 and single bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu_device
from lbs_kernels import extension, gpu_kernels, onebit_config, timing, tuner
from lbs_kernels.problem import Problem
from lbs_kernels.timing import Times

COPY_BYTES = 1 << 30  # far beyond any L2, so that the copy runs at the speed of the memory
PEAK_REPEATS = 4096  # of four instructions: about a millisecond
SIZE = 8192  # of a square matrix product that fills the chip
# The one-bit kernel at its best: a 1 x 1 convolution that is a product of 131072 x 1024 by 1024 x 1024.
ONE_BIT = Problem("bitconv2d", 32, 64, 64, 1024, 1024, w_bits=2, a_bits=2, device="cuda")


def measure(save: Callable[[dict[str, Any]], object], attempt: Callable[[str], bool]) -> dict[str, Any]:
    """{"rows": {roof: {median_s, p20_s, p80_s, operations | bytes per second}}, "b1_over_int8", "missing"}.

    b1_over_int8 is the rate of the one-bit instruction, on operands that lie ready, over that of the library's INT8
    product: at most what a one-bit kernel could gain.
    """
    body: dict[str, Any] = {"rows": {}, "missing": {}, "b1_over_int8": None, "complete": False}
    for name, make in CONTENDERS.items():
        if not attempt(name):
            body["missing"][name] = "it broke the device"
            continue
        try:
            body["rows"][name] = make()
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
    times = timing.interleave({"copy": lambda: target.copy_(source)}, device=gpu_device.DEVICE, rounds=30)["copy"]
    return row(times, bytes=2 * COPY_BYTES)


def _product(dtype: torch.dtype) -> dict[str, float]:
    if dtype is torch.int8:
        a, b = (torch.randint(-128, 128, (SIZE, SIZE), dtype=dtype, device=gpu_device.DEVICE) for _ in range(2))
        call: Callable[[], object] = lambda: torch._int_mm(a, b.t())  # noqa: E731
    else:
        a, b = (torch.randn(SIZE, SIZE, device=gpu_device.DEVICE).to(dtype) for _ in range(2))
        call = lambda: a @ b.t()  # noqa: E731
    return row(timing.interleave({"p": call}, device=gpu_device.DEVICE, rounds=20)["p"], operations=2 * SIZE**3)


def _one_bit() -> dict[str, float]:
    """The one-bit instruction by itself, wgmma or mma.sync, whichever is faster here."""
    _require_one_bit()
    native, device = extension.require_cuda(), torch.cuda.current_device()
    out = torch.zeros(native.onebit_peak_threads(device), dtype=torch.int32, device=gpu_device.DEVICE)
    arguments = (PEAK_REPEATS, out.data_ptr(), device)
    stream = torch.cuda.current_stream
    machines = onebit_config.machines(gpu_device.DEVICE)
    counts = {name: native.onebit_peak(name, *arguments, stream().cuda_stream) for name in machines}
    calls = {
        name: functools.partial(lambda name: native.onebit_peak(name, *arguments, stream().cuda_stream), name)
        for name in machines
    }
    times = timing.interleave(calls, device=gpu_device.DEVICE, rounds=15, warmup=0.02)
    name = max(times, key=lambda name: counts[name] / times[name].median)
    return {**row(times[name], operations=2 * counts[name]), "kernel": name}  # type: ignore[dict-item]


def _one_bit_product() -> dict[str, float]:
    """The fastest one-bit kernel on a product that fills the chip; w * a one-bit products per product of codes."""
    _require_one_bit()
    layer = tuner.Layer(ONE_BIT, gpu_device.device())
    calls = {choice.name: layer.launch(choice) for choice in gpu_kernels.candidates(ONE_BIT, ("cuda",))}
    times = timing.interleave(calls, device=gpu_device.DEVICE, rounds=15, warmup=0.02)
    best = min(times.values(), key=lambda one: one.median)
    found = row(best, operations=2 * ONE_BIT.macs * ONE_BIT.w_bits * ONE_BIT.a_bits)
    return {**found, "kernel": best.name}  # type: ignore[dict-item]


def _require_one_bit() -> None:
    reason = gpu_kernels.reasons(ONE_BIT).get("cuda", "gpu_kernels.KERNELS has none")
    if gpu_device.device().type != "cuda":
        reason = "the model of the GPU is exact, and far too slow to time"
    if reason is not None:
        raise RuntimeError(f"no one-bit kernel: {reason}")


CONTENDERS: dict[str, Callable[[], dict[str, float]]] = {
    "copy": _copy,
    "float16": lambda: _product(torch.float16),
    "int8": lambda: _product(torch.int8),
    "b1": _one_bit,
    "b1 product": _one_bit_product,
}
