"""Times single packed layers on a GPU: every layer shape of the known networks over the tuning candidates.

Each layer is a program of two steps, quantizer and layer; the layer's launch alone is timed, writing its codes (or the
logits) as in a network. The baseline beside every row is float16 channels_last through torch, on the same shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import lbs.cost
import lbs.models
from lbs_kernels import timing
from lbs_kernels.bitconv2d import tuning as bitconv2d_tuning
from lbs_kernels.bitlinear import tuning as bitlinear_tuning
from lbs_kernels.errors import LbsError
from lbs_kernels.format import pack_weights
from lbs_kernels.gemm_config import GemmConfig
from lbs_kernels.gpu_layout import to_logical
from lbs_kernels.problem import Problem
from lbs_kernels.program import (
    Consumer,
    ConvStep,
    Emit,
    LinearStep,
    Program,
    QuantPackStep,
    Step,
    TensorSpec,
    build_blob,
)
from lbs_kernels.reference_runner import ReferenceRunner

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "cifar_resnet20", "cifar_resnet56")
BATCHES = (32, 1, 128, 256)  # in order of interest: the budget may end the sweep early
BITS = ((4, 4), (2, 2), (8, 8), (2, 4), (4, 2))
HALF = "float16"
NEIGHBOURS = 12  # configurations timed besides the default where time allows
MAX_IMAGE = 1 << 31  # bytes of float32 input to quantize; no layer of a real network is larger


class WrongResultError(LbsError):
    """A kernel's codes differ from the reference, so its speed means nothing."""


def problems(networks: Iterable[str], batches: Iterable[int], bits: Iterable[tuple[int, int]]) -> list[Problem]:
    """Every distinct layer, bits before batches before networks; first and last layers stay at 8/8 bits."""
    layers = {name: lbs.cost.network_layers(lbs.models.create(name), lbs.models.example(name)) for name in networks}
    found: dict[Problem, None] = {}
    for batch in batches:
        for w_bits, a_bits in bits:
            for network in layers.values():
                for layer in network.with_bits(w_bits, a_bits).layers:
                    found[replace(layer.problem, batch=batch)] = None
    return [problem for problem in found if _image_bytes(problem) <= MAX_IMAGE]


def configurations(problem: Problem, limit: int) -> list[GemmConfig]:
    """The default, then up to `limit` candidates that differ from it in one field: what a first sweep should ask."""
    tuning = bitconv2d_tuning if problem.op == "bitconv2d" else bitlinear_tuning
    default = tuning.default(problem)
    names = [field.name for field in fields(GemmConfig)]
    near = [
        config
        for config in tuning.candidates(problem)
        if sum(getattr(config, name) != getattr(default, name) for name in names) == 1
    ]
    return [default, *near[:limit]]


def layer_program(problem: Problem, seed: int = 0) -> tuple[Program, Tensor]:
    """image -> codes -> the layer -> codes of the same bits (convolution) or flat floats (linear)."""
    generator = torch.Generator().manual_seed(seed)
    n_w, n_x = (1 << problem.w_bits) - 1, (1 << problem.a_bits) - 1
    codes = torch.randint(
        0, n_w + 1, (problem.out_channels, *problem.kernel, problem.in_channels // problem.groups),
        generator=generator, dtype=torch.uint8,
    )  # fmt: skip
    # Products of uniform codes: this spread puts most outputs between the first and the last code.
    multiplier = 1.0 / (0.33 * problem.reduction**0.5 * n_w * n_x)
    arrays = {
        "planes": pack_weights(codes, problem.w_bits),
        "multiplier": torch.full((problem.out_channels,), multiplier),
        "bias": torch.ones(problem.out_channels),
    }
    size_in = (problem.in_channels, problem.height, problem.width)
    size_out = (problem.out_channels, problem.out_height, problem.out_width)
    tensors = [TensorSpec("image", "image", *size_in), TensorSpec("x", "codes", *size_in, bits=problem.a_bits)]
    quantize = QuantPackStep("quantize", 0, Emit(consumers=(Consumer(1, problem.a_bits, float(n_x)),)))
    step: Step
    if problem.op == "bitlinear":
        tensors.append(TensorSpec("y", "stream", *size_out, flat=True))
        emit = Emit(stream=2)
        step = LinearStep("layer", 1, emit, problem.w_bits, problem.out_channels, "planes", "multiplier", "bias")
    else:
        tensors.append(TensorSpec("y", "codes", *size_out, bits=problem.a_bits))
        emit = Emit(consumers=(Consumer(2, problem.a_bits, n_x / 2),))
        geometry = (problem.kernel, problem.stride, problem.padding, problem.dilation, problem.groups)
        step = ConvStep(
            "layer", 1, emit, problem.w_bits, *geometry, problem.out_channels, "planes", "multiplier", "bias"
        )
    specs, blob, digest = build_blob(arrays)
    outputs = (2,) if problem.op == "bitlinear" else ()
    return Program(tuple(tensors), (quantize, step), (0,), outputs, specs, digest=digest), blob


@dataclass
class Layer:
    """One layer on a device: its program, one fresh random batch, and the reference's result for two of its images."""

    problem: Problem
    device: torch.device

    def __post_init__(self) -> None:
        problem = self.problem
        self.program, self.blob = layer_program(problem)
        shape = (problem.batch, problem.in_channels, problem.height, problem.width)
        self.image = torch.rand(shape, device=self.device)
        self.checked = sorted({0, problem.batch - 1})
        trace: dict[int, Tensor] = {}
        ReferenceRunner(self.program, self.blob.to(self.device)).run([self.image[self.checked]], trace)
        self.expected = trace[2]

    def launch(self, config: GemmConfig) -> Callable[[], None]:
        """The layer's launch with one configuration, after its result was compared with the reference.

        Raises:
            WrongResultError: with the share of elements that differ.
        """
        from lbs_kernels.gpu_runner import GpuRunner  # needs Triton; `problems` and `--help` do not

        plan = GpuRunner(self.program, self.blob, self.device, {"layer": config}).plan(self.problem.batch)
        for launch in plan.launches:
            launch([self.image])
        actual = to_logical(plan.buffers[2][self.checked], self.program.tensors[2])
        if not torch.equal(actual, self.expected):
            wrong = float((actual != self.expected).float().mean())
            raise WrongResultError(
                f"{self.problem} with {config}: {wrong:.2%} of the elements differ from the reference"
            )
        return lambda: plan.launches[1]([])

    def half(self) -> Callable[[], Tensor]:
        """The baseline: the same shape in float16, channels last, without an epilogue."""
        problem = self.problem
        x = self.image.half()
        weight = torch.randn(problem.out_channels, problem.in_channels // problem.groups, *problem.kernel).half()
        weight = weight.to(self.device)
        if problem.op == "bitlinear":
            x, weight = x.flatten(1), weight.flatten(1)
            return lambda: torch.nn.functional.linear(x, weight)
        x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
        settings = (None, problem.stride, problem.padding, problem.dilation, problem.groups)
        return lambda: torch.nn.functional.conv2d(x, weight, *settings)

    @property
    def logical_bytes(self) -> int:
        """Codes read, weights read and codes (or floats) written, each once, without padding."""
        problem = self.problem
        pixels = problem.batch * problem.out_height * problem.out_width
        out_bits = 32 if problem.op == "bitlinear" else problem.a_bits
        bits = (
            problem.batch * problem.height * problem.width * problem.in_channels * problem.a_bits
            + problem.reduction * problem.out_channels * problem.w_bits
            + pixels * problem.out_channels * out_bits
        )
        return bits // 8


def time_layer(problem: Problem, device: torch.device, limit: int, rounds: int) -> list[dict[str, Any]]:
    """One row per configuration: medians in seconds, interleaved with the baseline in the same run."""
    layer = Layer(problem, device)
    rows: list[dict[str, Any]] = []
    contenders: dict[str, Callable[[], object]] = {HALF: layer.half()}
    for config in configurations(problem, limit):
        try:
            contenders[str(config)] = layer.launch(config)
        except WrongResultError as error:
            rows.append({"problem": str(problem), "config": str(config), "error": str(error)})
    if device.type == "cuda":
        contenders = {name: timing.cuda_graph(call) for name, call in contenders.items()}
    cold = device.type == "cuda"
    times = timing.interleave(contenders, device=device, rounds=rounds, warmup=0.02, cold_l2=cold)
    for name, measured in times.items():
        rows.append(
            {
                "problem": str(problem),
                "config": name,
                "median_s": measured.median,
                "p20_s": measured.p20,
                "p80_s": measured.p80,
                "macs_per_s": problem.macs / measured.median,
                "bytes_per_s": layer.logical_bytes / measured.median,
                "times_faster_than_float16": measured.ratio(times[HALF]),
            }
        )
    return rows


def sweep(
    todo: list[Problem],
    device: torch.device,
    deadline: float,
    save: Callable[[dict[str, Any]], None],
    rounds: int = 30,
) -> dict[str, Any]:
    """Times every problem with its default, then again with the neighbours, until `deadline` (time.monotonic()).

    `save` is called after every problem, so that a kill loses one of them at most.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    body: dict[str, Any] = {"problems": len(todo), "complete": False, "l2": "cold" if device.type == "cuda" else "warm"}
    for limit in (0, NEIGHBOURS):
        for problem in todo:
            if time.monotonic() >= deadline:
                return {**body, "rows": [row for group in rows.values() for row in group]}
            rows[str(problem)] = time_layer(problem, device, limit, rounds)
            save({**body, "rows": [row for group in rows.values() for row in group]})
    return {**body, "complete": True, "rows": [row for group in rows.values() for row in group]}


def _image_bytes(problem: Problem) -> int:
    return 4 * problem.batch * problem.height * problem.width * problem.in_channels
