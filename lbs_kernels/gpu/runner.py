"""The GPU back end: a program as a list of launches on buffers that are allocated once per batch size and stream."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.branches import branches, enqueue
from lbs_kernels.gpu.configs.cuda import on_hopper
from lbs_kernels.gpu.depthwise_project import ProjectedDepthwise
from lbs_kernels.gpu.kernels import Choice
from lbs_kernels.gpu.launch import Launch, in_order
from lbs_kernels.gpu.layout import arena_view, plan_arena, to_logical
from lbs_kernels.gpu.stem import unfolded
from lbs_kernels.gpu.stem_pool import PooledStem
from lbs_kernels.gpu.triton.common import INTERPRETED, device_guard
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.runner import StepKernel, output_shape
from lbs_kernels.program.steps import ConvStep, LinearStep, Program, Step
from lbs_kernels.times import graph
from lbs_kernels.times.stopwatch import cuda_graph, interleave

MAX_PLANS = 16  # batch sizes times streams whose buffers are kept


@dataclass(frozen=True)
class BatchPlan:
    """Everything that one batch size needs on one stream, so that a call only enqueues launches."""

    arena: Tensor  # uint8; the buffers are views of it
    buffers: dict[int, Tensor]
    choices: tuple[Choice, ...]  # one per step
    launches: tuple[Launch, ...]  # one per step
    beside: dict[int, int]  # steps that run beside others in a recorded graph, and where they join (gpu/branches.py)
    aside: torch.cuda.Stream | None  # that they run on; None where there are none


class GpuRunner:
    """Runs a program on a CUDA device, or in Triton's interpreter on CPU tensors.

    Each step runs on the kernel that was measured fastest for its problem and batch bucket (gpu/kernels.py). The first
    call of a batch size on a stream allocates its buffers and compiles its kernels. Later calls allocate their results
    only, or nothing where the caller passes `out`, and never wait for the device.

    Streams: every stream has buffers of its own, so calls on different streams may overlap; calls on one stream follow
    one another on it. Threads may share a runner. Inputs must stay unchanged until the work enqueued on them is done,
    as for any torch operation.

    CUDA graphs: a call that is being recorded gives the buffers of an earlier call to the graph, for good, so a replay
    may overlap with calls and with other graphs. The batch size must have run before, outside the recording.
    """

    def __init__(
        self,
        program: Program,
        blob: Tensor,
        device: torch.device | str,
        configs: dict[str, Any] | None = None,
        families: tuple[str, ...] | None = None,
        whole: bool = True,
    ) -> None:
        """
        Args:
            program: a valid program (`check_program`).
            blob: uint8, its arrays, on any device; copied to `device`.
            device: where to run.
            configs: configurations by step name, of any type in `kernels.KERNELS`; the others are chosen.
            families: kernels to choose from ("triton", ...); all exact ones unless given.
            whole: run the program as `kernels.program_on` makes it, where no configuration is named; else as it is.

        Raises:
            BackendError: a step or configuration no kernel serves, or a CPU device without the interpreter.
        """
        self.device = torch.device(device)
        self.configs = dict(configs or {})
        self.families = families
        # Configurations that are named are those of the program as it is.
        self.given = program
        self._blob = blob
        if whole and not self.configs:
            program, blob = kernels.program_on(program, blob, str(self.device), families)
        self.program = program
        # Steps that another one takes in -> that one.
        self._run_by = {
            step.takes: step.name for step in program.steps if isinstance(step, PooledStem | ProjectedDepthwise)
        }
        if self.device.type != "cuda" and not INTERPRETED.value:
            raise BackendError(
                f"GPU kernels cannot run on {self.device}: they need a CUDA device; move the tensors to one, take "
                "another back end, or set TRITON_INTERPRET=1 before Triton is imported to test without a GPU"
            )
        self.arrays = {key: program.array(blob, key).to(self.device) for key in program.arrays}
        self._weights: dict[tuple[str, str], Any] = {}
        self._plans: dict[tuple[int, int], BatchPlan] = {}
        self._lock = threading.RLock()
        for step in program.steps:
            self._weights_for(step, self._choice(step, self._problem(step, batch=1)))
        self._finish()

    def run(
        self,
        inputs: list[Tensor],
        trace: dict[int, Tensor] | None = None,
        *,
        threads: int | None = None,
        out: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Outputs float32 [N, C, H, W] (or [N, C] where flat) of dense images [N, C, H, W], N >= 1, channels first or
        last in memory.

        Args:
            inputs: on this runner's device, in the order of program.inputs.
            threads: of the processor; none are used.
            trace: receives every tensor by index in its logical form: images as given, codes uint8 [N, H, W, C],
                streams in the stream dtype. Copies, and so not for timing.
            out: tensors to write the outputs to, of their shape; made new if left out.

        Raises:
            ShapeError: a tensor of this batch has more elements than the kernels can count.
            BackendError: the call is being recorded into a CUDA graph and this batch size did not run since another
                one was recorded.
        """
        batch = inputs[0].shape[0]
        if trace is not None and self._run_by:
            # What lies between steps that are one is nowhere; a runner of the program as it is given tells it.
            GpuRunner(self.given, self._blob, self.device, families=self.families, whole=False).run(inputs, trace)
        with self._lock, device_guard(self.device):
            recorded = capturing(self.device)
            plan = self._recorded_plan(batch) if recorded else self.plan(batch)
            if recorded and plan.aside is not None and trace is None:
                current = torch.cuda.current_stream(self.device)
                enqueue(plan.launches, inputs, plan.beside, current, plan.aside)
            else:
                for step, launch in zip(self.program.steps, plan.launches, strict=True):
                    launch(inputs)
                    if trace is not None:
                        self._record(step, plan, trace)
            given = [None] * len(self.program.outputs) if out is None else out
            results = [
                self._result(index, plan, batch, result, recorded)
                for index, result in zip(self.program.outputs, given, strict=True)
            ]
        if trace is not None:
            trace.update(zip(self.program.inputs, inputs, strict=True))
        return results

    def _result(self, index: int, plan: BatchPlan, batch: int, out: Tensor | None, recorded: bool) -> Tensor:
        """An output, copied to `out` or to new memory: the buffers are written again by the next call.

        A recorded graph owns its buffers: there logits that are float32 already stay where they were written.
        """
        spec, values = self.program.tensors[index], plan.buffers[index].permute(0, 3, 1, 2)
        values = values.flatten(1) if spec.flat else values
        if out is None and recorded and spec.flat and values.dtype == torch.float32:
            return values
        if out is None:
            out = torch.empty((batch, *output_shape(spec)), dtype=torch.float32, device=self.device)
        return out.copy_(values)

    def plan(self, batch: int) -> BatchPlan:
        """Buffers and launches of one batch size on the current stream, made on first use.

        The `MAX_PLANS` used last are kept, until `release`.
        """
        with self._lock:
            key = (batch, stream_handle(self.device))
            plan = self._plans.pop(key, None)
            if plan is None:
                while len(self._plans) >= MAX_PLANS:
                    self._plans.pop(next(iter(self._plans)))
                plan = self._make_plan(batch)
                self._announce()
            self._plans[key] = plan
            return plan

    def release(self) -> None:
        """Free the buffers of every batch size and stream."""
        with self._lock:
            self._plans.clear()

    def problems(self, batch: int) -> dict[str, Problem]:
        """The key of every step at one batch size, by step name."""
        return {step.name: self._problem(step, batch) for step in self.program.steps}

    def choices(self, batch: int) -> list[Choice]:
        """The kernel and configuration of every step at one batch size, in the order of the program."""
        return [self._choice(step, self._problem(step, batch)) for step in self.program.steps]

    def kernels(self, batch: int, *, threads: int | None = None) -> list[StepKernel]:
        """The kernel of each step with its configuration, as tuning tables name it."""
        choices = dict(zip((step.name for step in self.program.steps), self.choices(batch), strict=True))
        found = (choices[self._run_by.get(step.name, step.name)] for step in self.given.steps)
        return [StepKernel(choice.name, choice.kernel.exact) for choice in found]

    def step_seconds(self, inputs: list[Tensor], *, threads: int | None = None, rounds: int = 30) -> list[float] | None:
        """Median of a CUDA graph of each launch, the steps interleaved; None in the interpreter. 0 of a step that
        another one takes in.
        """
        if self.device.type != "cuda":
            return None
        launches = self.plan(inputs[0].shape[0]).launches
        names = [step.name for step in self.program.steps]
        calls = {
            name: cuda_graph(functools.partial(launch, inputs)) for name, launch in zip(names, launches, strict=True)
        }
        times = interleave(calls, device=self.device, rounds=rounds)
        return [times[step.name].median if step.name in times else 0.0 for step in self.given.steps]

    def _recorded_plan(self, batch: int) -> BatchPlan:
        """The plan of an earlier call, given to the graph that is being recorded: binding and compiling would wait.

        Whatever stream it was made on: recording begins when all work is done.
        """
        own = (batch, stream_handle(self.device))
        keys = sorted((key for key in self._plans if key[0] == batch), key=lambda key: key != own)
        if not keys:
            raise BackendError(
                f"batch {batch} is being recorded into a CUDA graph but did not run: kernels are compiled by a call "
                "that is not recorded; call the model once with this batch first, or use packed.capture"
            )
        plan = self._plans.pop(keys[0])
        graph.keep((self, plan))
        return plan

    def _make_plan(self, batch: int) -> BatchPlan:
        program = self.program
        problems = [self._problem(step, batch) for step in program.steps]
        choices = [self._choice(step, problem) for step, problem in zip(program.steps, problems, strict=True)]
        configs = [choice.config for choice in choices]
        # The model is that of compute capability 9.0.
        beside = branches(program, list(zip(problems, configs, strict=True))) if on_hopper(str(self.device)) else {}
        slots, size = plan_arena(program, batch, beside)
        arena = torch.empty(size, dtype=torch.uint8, device=self.device)
        buffers = {
            index: arena_view(arena, slot, program.tensors[index], program.stream_dtype, batch)
            for index, slot in slots.items()
        }
        launches = []
        for place, (step, problem, choice) in enumerate(zip(program.steps, problems, choices, strict=True)):
            with in_order() if place in {*beside, *beside.values()} else contextlib.nullcontext():
                launches.append(self._bind(step, problem, choice, buffers))
        self._finish()  # what was laid out for these configurations
        # Made now: recording a graph is no time to make a stream.
        aside = torch.cuda.Stream(self.device) if beside else None
        return BatchPlan(arena, buffers, tuple(choices), tuple(launches), beside, aside)

    def _finish(self) -> None:
        """Wait until the weights lie ready, so that every stream may read them."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _announce(self) -> None:
        """Tell the allocator that the current stream reads the weights: freed, they wait for its work."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for tensor in tensors_in([self.arrays, self._weights], self.device.type):
                tensor.record_stream(stream)

    def _problem(self, step: Step, batch: int) -> Problem:
        return problem_of(step, self.program, batch, str(self.device))

    def _choice(self, step: Step, problem: Problem) -> Choice:
        """The kernel of a step. Raises BackendError where the one named, or every one, cannot serve it."""
        try:
            if step.name not in self.configs:
                return kernels.choose(problem, self.families, functools.partial(self._step_why_not, step))
            config = self.configs[step.name]
            choice = Choice(kernels.kernel_of(config), config)
            reason = choice.why_not(problem) or self._step_why_not(step, choice)
            if reason is not None:
                raise BackendError(f"{choice.kernel.family} cannot serve {problem}: {reason}")
        except BackendError as error:
            raise BackendError(f"step {step.name!r}: {error}") from error
        return choice

    def _step_why_not(self, step: Step, choice: Choice) -> str | None:
        """Why a kernel cannot run a step, beyond what its problem says, or None."""
        module = choice.kernel.implementation(step.op)
        reads, writes = (getattr(module, name, None) for name in ("step_why_not", "writes_why_not"))
        reason = None if reads is None else reads(step, self.program.tensors[step.input])
        return reason if reason or writes is None else writes(step, choice.config, self.program)

    def _weights_for(self, step: Step, choice: Choice) -> Any:
        """The weights of a step as its kernel wants them, made once; None for a step that has none."""
        if not isinstance(step, ConvStep | LinearStep):
            return None
        module: Any = choice.kernel.implementation(step.op)
        key = (step.name, module.__name__)
        if key not in self._weights:
            if isinstance(step, ProjectedDepthwise):
                self._weights[key] = module.prepare_step(step, self.program, self.arrays, self.device)
                return self._weights[key]
            kernel, groups = (step.kernel, step.groups) if isinstance(step, ConvStep) else ((1, 1), 1)
            operands = (self.arrays[step.planes], kernel, groups, self.program.tensors[step.input])
            self._weights[key] = module.prepare_weights(*operands, self.device, step.w_grid)
        return self._weights[key]

    def _bind(self, step: Step, problem: Problem, choice: Choice, buffers: dict[int, Tensor]) -> Launch:
        module: Any = choice.kernel.implementation(step.op)
        weights = () if (found := self._weights_for(step, choice)) is None else (found,)
        launch: Launch = module.bind(step, problem, choice.config, self.program, self.arrays, *weights, buffers)
        return launch

    def _record(self, step: Step, plan: BatchPlan, trace: dict[int, Tensor]) -> None:
        """Copy what the step wrote, before a later step reuses its memory."""
        written = [consumer.tensor for consumer in step.emit.consumers]
        for index in written if step.emit.stream is None else [step.emit.stream, *written]:
            found = to_logical(plan.buffers[index], self.program.tensors[index])
            own = (
                self.program.tensors[index].channels == self.given.tensors[index].channels
            )  # a fold changes these always
            trace[index] = found if own else unfolded(found, index, self.given, self.program)


def stream_handle(device: torch.device) -> int:
    """The stream that work is enqueued on now; 0 on the CPU (interpreter)."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def tensors_in(value: Any, device_type: str) -> Iterator[Tensor]:
    """Every tensor of this kind of device inside lists, tuples, dictionaries and dataclasses.

    Weights keep some on the processor, from which they lay out others; those know no streams.
    """
    if isinstance(value, Tensor):
        if value.device.type == device_type:
            yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()), device_type)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, device_type)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)], device_type)
