"""Tunes and times single packed layers on a GPU: those that take longest, by what was measured of whole networks.

Each layer reads and writes codes (program/layer.py) and its launch alone is timed, against float16 channels_last
through torch on the same shape in the same run. Times go to the tuning table as they come.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import lbs.cost
import lbs.models
from benchmarks import gpu_cudnn, gpu_device, gpu_nets, gpu_steps
from lbs_kernels.gpu.modelled import Modelled
from lbs_kernels.program.problem import Problem
from lbs_kernels.tune import tuner
from lbs_kernels.tune.tuner import Layer, Measured

HALF = "float16"
# Said in the result. A table knows a layer by its problem, which says nothing of what its result goes through.
TIMED = (
    "one launch: codes in, codes out (floats out of a linear layer); residuals and several consumers are timed in "
    "whole networks alone. float16 and cudnn int8 are the convolution without norm, activation or addition; the latter "
    "writes int32"
)
W4A4, W8A8 = (4, 4), (8, 8)
PRUNED = gpu_nets.PRUNING[0]
RESNETS = ("resnet18", "resnet50")
Bits = tuple[int, int] | str  # of weights and activations, or a variant of gpu_nets with shapes of its own
ORDER: tuple[tuple[Iterable[str], Iterable[int], Iterable[Bits]], ...] = ((RESNETS, (128,), (W8A8, W4A4)),)
COSTLIEST = 10  # layers that are tuned
NEAR, FAR = 12, 40  # candidates of each kernel beside the default: of everything first, then of everything again
MAX_IMAGE = 1 << 31  # bytes of float32 input to quantize; no layer of a real network is larger


def problems(steps: list[dict[str, Any]] = ()) -> list[Problem]:  # type: ignore[assignment]
    """The layers to tune, the costliest first: of measured steps (`gpu_steps`), else of `ORDER`, by the model."""
    measured = gpu_steps.costliest(steps, COSTLIEST)
    if measured:
        return [replace(problem, device=gpu_device.DEVICE) for problem in measured]
    return sorted(every(), key=lambda problem: -(Modelled().estimate(problem) or 0.0))[:COSTLIEST]


def every(order: Iterable[tuple[Iterable[str], Iterable[int], Iterable[Bits]]] = ORDER) -> list[Problem]:
    """Every distinct layer, in order; first and last layers stay at 8/8 bits."""
    found: dict[Problem, None] = {}
    for networks, batches, every_bits in order:
        for batch in batches:
            for bits in every_bits:
                for name in networks:
                    for problem in _layers(name, bits):
                        found[replace(problem, batch=batch, device=gpu_device.DEVICE)] = None
    return [problem for problem in found if _image_bytes(problem) <= MAX_IMAGE]


@functools.cache
def _layers(network: str, bits: Bits) -> list[Problem]:
    """For one image."""
    if isinstance(bits, str):
        return gpu_nets.layers(network, bits)
    return [layer.problem for layer in _whole_layers(network).with_bits(*bits).layers]


@functools.cache
def _whole_layers(network: str) -> lbs.cost.NetworkLayers:
    return lbs.cost.network_layers(lbs.models.create(network), lbs.models.example(network))


def half(layer: Layer) -> dict[str, Callable[[], object]]:
    """The baseline: the same shape in float16, channels last, without an epilogue."""
    problem = layer.problem
    x = layer.image.half()
    weight = torch.randn(problem.out_channels, problem.in_channels // problem.groups, *problem.kernel).half()
    weight = weight.to(layer.device)
    if problem.op == "bitlinear":
        x, weight = x.flatten(1), weight.flatten(1)
        return {HALF: lambda: torch.nn.functional.linear(x, weight)}
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    settings = (None, problem.stride, problem.padding, problem.dilation, problem.groups)

    def convolve() -> Tensor:
        return torch.nn.functional.conv2d(x, weight, *settings)

    return {HALF: convolve}


def baselines(layer: Layer) -> dict[str, Callable[[], object]]:
    """What every layer is timed against: float16 through torch, and int8 of cuDNN where its front end is there."""
    return {**half(layer), **gpu_cudnn.int8(layer)}


def logical_bytes(problem: Problem) -> float:
    """Codes read, weights read and codes (or floats) written, each once, without padding."""
    pixels = problem.rows
    out_bits = 32 if problem.op == "bitlinear" else problem.a_bits
    read = problem.batch * problem.height * problem.width * problem.in_channels * problem.a_bits
    weights = problem.reduction * problem.out_channels * problem.w_bits
    return (read + weights + pixels * problem.out_channels * out_bits) / 8


def rows(measured: Measured, roofs: dict[str, float]) -> list[dict[str, Any]]:
    """One row per contender. roof: share of the larger of INT8 operations and bytes over the roofs of this run.

    over_float16: times as fast as the baseline; None where that has no time.
    """
    problem = measured.problem
    found: list[dict[str, Any]] = [
        {"problem": str(problem), "contender": name, "error": reason} for name, reason in measured.refused.items()
    ]
    if not measured.times:
        return found
    baseline = measured.times.get(HALF)
    for name, times in measured.times.items():
        moved = logical_bytes(problem)
        floor = max(2 * problem.macs / roofs["int8"], moved / roofs["copy"]) if {"int8", "copy"} <= set(roofs) else None
        over = None
        if baseline is not None:
            paired = len(times.seconds) == len(baseline.seconds)
            over = times.ratio(baseline) if paired else baseline.median / times.median
        found.append(
            {
                "problem": str(problem),
                "contender": name,
                "median_s": times.median,
                "p20_s": times.p20,
                "p80_s": times.p80,
                "operations_per_s": 2 * problem.macs / times.median,
                "bytes_per_s": moved / times.median,
                "roof": None if floor is None else floor / times.median,
                "over_float16": over,
            }
        )
    return found


def sweep(
    todo: list[Problem],
    measure: Callable[[Problem, int], Measured],
    until: float,
    save: Callable[[dict[str, Any]], object],
    earlier: list[dict[str, Any]],
    roofs: dict[str, float],
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Tune every problem with its nearest candidates, then with more, until the time is up.

    Args:
        measure: problem and candidates -> its times. until: of `clock`.
        save: called after every problem, so that a kill loses one of them at most.
        earlier: rows of a run that was cut off; problems that the table already knows are not measured again.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in earlier:
        found.setdefault(row["problem"], []).append(row)
    body: dict[str, Any] = {
        "problems": len(todo), "timed": TIMED, "l2": "cold", "complete": False, "passes": 0,
        "missing": gpu_cudnn.missing(),
    }  # fmt: skip

    def tell(measured: Measured | None) -> None:
        if measured is not None:
            found[str(measured.problem)] = rows(measured, roofs)
            save({**body, "rows": [row for group in found.values() for row in group]})

    for limit in (NEAR, FAR):
        done = tuner.tune(
            todo,
            lambda problem, limit=limit: measure(problem, limit),  # type: ignore[misc]
            tuner.known_on_gpu,
            device=gpu_device.DEVICE,
            seconds=until - clock(),
            again=limit == FAR,
            progress=tell,
            clock=clock,
        )
        if done.left:
            break
        body["passes"] += 1
    body["complete"] = body["passes"] > 0
    return {**body, "rows": [row for group in found.values() for row in group]}


def _image_bytes(problem: Problem) -> int:
    return 4 * problem.batch * problem.height * problem.width * problem.in_channels
