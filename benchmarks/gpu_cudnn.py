"""int8 convolutions of cuDNN, through its front end, as a baseline for single layers: bytes in, int32 sums out.

The front end is no part of torch: its wheel (nvidia-cudnn-frontend, 12 MB, no other package needed for this) may be
carried and installed beside it, over the cuDNN that torch brings. Where it is not there, `missing` says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError
from lbs_kernels.program.problem import Problem
from lbs_kernels.tune.tuner import Layer

NAME = "cudnn int8"
LEVELS = 8  # codes of -8 .. 7: sums that float64 holds, and that no product overflows


def missing() -> dict[str, str]:
    """{name: why it is not timed}; empty where the front end and cuDNN are there."""
    try:
        importlib.import_module("cudnn").backend_version()
    except (ImportError, RuntimeError) as error:
        return {NAME: f"cuDNN's front end is not here: {type(error).__name__}: {error}; carry nvidia-cudnn-frontend"}
    return {}


def int8(layer: Layer) -> dict[str, Callable[[], object]]:
    """The contender of one layer, on a GPU that has it: without norm, activation or addition, 4 bytes an output."""
    if layer.device.type != "cuda" or missing():
        return {}
    return {NAME: Int8Convolution(layer.problem, layer.device)}


class Int8Convolution:
    """A convolution whose plan is built, and compared with float64, by its first call. cuDNN's refusal is an error."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)

        def codes(*shape: int) -> Tensor:
            values = torch.randint(-LEVELS, LEVELS, shape, generator=generator, device=device, dtype=torch.int8)
            return values.contiguous(memory_format=torch.channels_last)

        channels = problem.in_channels // problem.groups
        self.x = codes(problem.batch, problem.in_channels, problem.height, problem.width)
        self.w = codes(problem.out_channels, channels, *problem.kernel)
        shape = (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
        y = torch.empty(shape, dtype=torch.int32, device=device)
        self.y = y.contiguous(memory_format=torch.channels_last)
        self._execute: Callable[[], object] | None = None

    def __call__(self) -> None:
        if self._execute is None:
            self._execute = self._plan()
            self._execute()
            self._compare()
        self._execute()

    def _plan(self) -> Callable[[], object]:
        """The plan that cuDNN's heuristics prefer, on the stream that is current at each call."""
        cudnn: Any = importlib.import_module("cudnn")
        kinds, handle = cudnn.data_type, cudnn.create_handle()
        graph = cudnn.pygraph(
            io_data_type=kinds.INT8, intermediate_data_type=kinds.INT32, compute_data_type=kinds.INT32, handle=handle
        )
        x, w = (
            graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=kinds.INT8)
            for name, t in (("x", self.x), ("w", self.w))
        )
        problem = self.problem
        y = graph.conv_fprop(
            image=x, weight=w, padding=list(problem.padding), stride=list(problem.stride),
            dilation=list(problem.dilation), compute_data_type=kinds.INT32,
        )  # fmt: skip
        y.set_output(True).set_data_type(kinds.INT32)
        y.set_dim(list(self.y.shape)).set_stride(list(self.y.stride()))
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=self.x.device)
        tensors = {x: self.x, w: self.w, y: self.y}

        def execute() -> None:
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(self.x.device).cuda_stream)
            graph.execute(tensors, workspace, handle=handle)

        return execute

    def _compare(self) -> None:
        """The first image with float64. Raises BackendError where a sum differs."""
        problem = self.problem
        settings = (None, problem.stride, problem.padding, problem.dilation, problem.groups)
        expected = torch.nn.functional.conv2d(self.x[:1].double(), self.w.double(), *settings)
        if not torch.equal(self.y[:1].double(), expected):
            raise BackendError(f"{NAME}: sums of {problem} differ from float64; it is not timed")
