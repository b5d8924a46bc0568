"""The GPU back end: a program as a list of Triton launches on buffers that are allocated once per batch size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbs_kernels.bitconv2d import triton_impl as bitconv2d
from lbs_kernels.bitconv2d import tuning as bitconv2d_tuning
from lbs_kernels.bitlinear import triton_impl as bitlinear
from lbs_kernels.bitlinear import tuning as bitlinear_tuning
from lbs_kernels.elementwise_config import ElementwiseConfig
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu_layout import arena_view, plan_arena, to_logical
from lbs_kernels.pool import triton_impl as pool
from lbs_kernels.pool import tuning as pool_tuning
from lbs_kernels.problem import Problem
from lbs_kernels.program import ConvStep, LinearStep, Program, Step
from lbs_kernels.quantpack import triton_impl as quantpack
from lbs_kernels.quantpack import tuning as quantpack_tuning
from lbs_kernels.triton_common import INTERPRETED, Launch, device_guard
from lbs_kernels.triton_gemm import GemmWeights, prepare_weights

Config = bitconv2d_tuning.Config | ElementwiseConfig
_OPS = {op.__name__.split(".")[-2]: op for op in (bitconv2d, bitlinear, quantpack, pool)}
_TUNING = {
    "bitconv2d": bitconv2d_tuning,
    "bitlinear": bitlinear_tuning,
    "quantpack": quantpack_tuning,
    "pool": pool_tuning,
}


@dataclass(frozen=True)
class BatchPlan:
    """Everything that one batch size needs, so that a call only enqueues launches."""

    arena: Tensor  # uint8; the buffers are views of it
    buffers: dict[int, Tensor]
    launches: tuple[Launch, ...]  # one per step


class TritonRunner:
    """Runs a program on a CUDA device, or in Triton's interpreter on CPU tensors.

    The first call of a batch size allocates its buffers and compiles its kernels. Later calls allocate their results
    only, or nothing where the caller passes `out`, and never wait for the device, so they can be captured in a CUDA
    graph. The buffers are shared by all calls of one batch size: calls must follow one another on one stream.
    """

    def __init__(
        self, program: Program, blob: Tensor, device: torch.device | str, configs: dict[str, Config] | None = None
    ) -> None:
        """
        Args:
            program: a valid program (`program_json.validate`).
            blob: uint8, its arrays, on any device; copied to `device`.
            device: where to run.
            configs: launch configurations by step name; those left out are the defaults of tuning.py.

        Raises:
            BackendError: a step or configuration no kernel serves, or a CPU device without the interpreter.
        """
        self.program = program
        self.device = torch.device(device)
        self.configs = dict(configs or {})
        if self.device.type != "cuda" and not INTERPRETED.value:
            raise BackendError(
                f"triton cannot run on {self.device}: kernels need a CUDA device; move the tensors to one, take "
                "another back end, or set TRITON_INTERPRET=1 before Triton is imported to test without a GPU"
            )
        self.arrays = {key: program.array(blob, key).to(self.device) for key in program.arrays}
        self._weights: dict[str, GemmWeights] = {}
        for step in program.steps:
            self._config(step, self._problem(step, batch=1))
            if isinstance(step, ConvStep | LinearStep):
                kernel, groups = (step.kernel, step.groups) if isinstance(step, ConvStep) else ((1, 1), 1)
                source, planes = program.tensors[step.input], self.arrays[step.planes]
                self._weights[step.name] = prepare_weights(planes, kernel, groups, source, self.device)
        self._plans: dict[int, BatchPlan] = {}

    def run(
        self, inputs: list[Tensor], trace: dict[int, Tensor] | None = None, out: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs float32 [N, C, H, W] (or [N, C] where flat) of contiguous images float32 [N, C, H, W], N >= 1.

        Args:
            inputs: on this runner's device, in the order of program.inputs.
            trace: receives every tensor by index in its logical form: images as given, codes uint8 [N, H, W, C],
                streams in the stream dtype. Copies, and so not for timing.
            out: tensors to write the outputs to, of their shape; made new if left out.

        Raises:
            ShapeError: a tensor of this batch has more elements than the kernels can count.
        """
        plan = self.plan(inputs[0].shape[0])
        with device_guard(self.device):
            for step, launch in zip(self.program.steps, plan.launches, strict=True):
                launch(inputs)
                if trace is not None:
                    self._record(step, plan, trace)
            results = self._empty_outputs(inputs[0].shape[0]) if out is None else out
            for index, result in zip(self.program.outputs, results, strict=True):
                values = plan.buffers[index].permute(0, 3, 1, 2)
                result.copy_(values.flatten(1) if self.program.tensors[index].flat else values)
        if trace is not None:
            trace.update(zip(self.program.inputs, inputs, strict=True))
        return results

    def plan(self, batch: int) -> BatchPlan:
        """Buffers and launches of one batch size, made on first use and kept until `release`."""
        if batch not in self._plans:
            program = self.program
            slots, size = plan_arena(program, batch)
            arena = torch.empty(size, dtype=torch.uint8, device=self.device)
            buffers = {
                index: arena_view(arena, slot, program.tensors[index], program.stream_dtype, batch)
                for index, slot in slots.items()
            }
            launches = tuple(self._bind(step, batch, buffers) for step in program.steps)
            self._plans[batch] = BatchPlan(arena, buffers, launches)
        return self._plans[batch]

    def release(self) -> None:
        """Free the buffers of every batch size. Graphs captured from this runner must not be replayed afterwards."""
        self._plans.clear()

    def problems(self, batch: int) -> dict[str, Problem]:
        """The key of every step at one batch size, by step name."""
        return {step.name: self._problem(step, batch) for step in self.program.steps}

    def _problem(self, step: Step, batch: int) -> Problem:
        source, device = self.program.tensors[step.input], str(self.device)
        if isinstance(step, ConvStep | LinearStep):
            filters = self.program.arrays[step.planes].shape[1]
            return _OPS[step.op].problem_of(step, source, filters, batch, device)
        return _OPS[step.op].problem_of(step, source, batch, device)

    def _config(self, step: Step, problem: Problem) -> Config:
        """The configuration of a step. Raises BackendError where the kernel or the configuration does not fit."""
        tuning = _TUNING[step.op]
        reason = _OPS[step.op].supports(problem)
        if reason is None:
            config = self.configs.get(step.name) or tuning.default(problem)
            reason = tuning.invalid_reason(config, problem)
        if reason is not None:
            raise BackendError(f"step {step.name!r}: triton cannot serve {problem}: {reason}")
        return config

    def _bind(self, step: Step, batch: int, buffers: dict[int, Tensor]) -> Launch:
        problem = self._problem(step, batch)
        config = self._config(step, problem)
        if isinstance(step, ConvStep | LinearStep):
            weights = self._weights[step.name]
            return _OPS[step.op].bind(step, problem, config, self.program, self.arrays, weights, buffers)
        return _OPS[step.op].bind(step, problem, config, self.program, self.arrays, buffers)

    def _record(self, step: Step, plan: BatchPlan, trace: dict[int, Tensor]) -> None:
        """Copy what the step wrote, before a later step reuses its memory."""
        written = [consumer.tensor for consumer in step.emit.consumers]
        for index in written if step.emit.stream is None else [step.emit.stream, *written]:
            trace[index] = to_logical(plan.buffers[index], self.program.tensors[index])

    def _empty_outputs(self, batch: int) -> list[Tensor]:
        outputs = []
        for index in self.program.outputs:
            spec = self.program.tensors[index]
            shape = (batch, spec.channels) if spec.flat else (batch, spec.channels, spec.height, spec.width)
            outputs.append(torch.empty(shape, dtype=torch.float32, device=self.device))
        return outputs
