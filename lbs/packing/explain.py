"""`explain`: what a packed model is made of, which kernel runs each step, and where the time goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lbs.cost.latency import FLOAT_STREAMS, call_seconds
from lbs.packing.draft import DECODED
from lbs.packing.model import PackedModel, need_packed
from lbs.packing.parts import PartRow, time_call, time_parts, told, torch_threads
from lbs_kernels.device import default_threads
from lbs_kernels.errors import FormatError, ShapeError
from lbs_kernels.gpu.modelled import PREFIX, Modelled, modelled
from lbs_kernels.program.problem import problem_of
from lbs_kernels.program.runner import StepKernel
from lbs_kernels.program.steps import ConvStep, LinearStep, PoolStep, Program, ResizeStep, SelectStep, Step, TensorSpec
from lbs_kernels.times import table as tuning_table

_HEADER = ("layer", "operation", "input", "output", "bits w/a", "filters", "kernel", "time us", "share")


@dataclass(frozen=True)
class StepRow:
    """One step. Shapes are height, width, channels; bits are 0 where there are none; seconds is None if unmeasured.

    roof: multiply-adds per second, as a share of what `lbs tune` found a matrix product of bytes to reach on this
    processor, above 1 where an algorithm saves products; None where it was not measured. modelled: seconds on a GPU
    that is not here, by a model; None where none was asked.
    """

    region: int
    name: str
    operation: str
    input: tuple[int, int, int]
    output: tuple[int, int, int]
    w_bits: int
    a_bits: int
    kept_filters: int
    total_filters: int
    kernel: str
    seconds: float | None
    share: float | None
    roof: float | None = None
    modelled: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Rows in execution order, and what is not packed. Printing it gives a table.

    parts: regions and parts in float, each with its time in a call; empty on a GPU. call: measured seconds of a call,
    the 20th percentile of the rounds, as in tuning tables; None on a GPU. estimated: the same by what `lbs tune`
    measured, as a latency budget counts it (`lbs.cost.latency`); None where something that takes was not measured, or
    there is no plan.
    """

    rows: tuple[StepRow, ...]
    kept_float: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    batch: int
    threads: int
    packed_bytes: int
    parts: tuple[PartRow, ...] = ()
    call: float | None = None
    estimated: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    @property
    def seconds(self) -> float | None:
        """Sum over the measured steps."""
        known = [row.seconds for row in self.rows if row.seconds is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        table = [_HEADER, *(_cells(row) for row in self.rows)]
        if any(row.roof is not None for row in self.rows):
            roofs = ("" if row.roof is None else f"{row.roof:.0%}" for row in self.rows)
            table = [(*line, cell) for line, cell in zip(table, ("of roof", *roofs), strict=True)]
        if any(row.modelled is not None for row in self.rows):
            told_by_model = ("" if row.modelled is None else f"{row.modelled * 1e6:.1f}" for row in self.rows)
            table = [(*line, cell) for line, cell in zip(table, ("us modelled", *told_by_model), strict=True)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines += told(self.parts, self.kept_float)
        lines += list(self.notes)
        total = f", {self.seconds * 1e6:.1f} us in the steps" if self.seconds is not None else ""
        lines.append(f"{self.packed_bytes} bytes packed, batch {self.batch}, {self.threads} threads{total}")
        if self.call is not None:
            lines.append(f"a call takes {self.call * 1e6:.1f} us; {told_estimate(self.estimated, self.call)}")
        return "\n".join(lines)


def told_estimate(estimated: float | None, measured: float) -> str:
    """The estimate of a call beside what it was measured to take."""
    if estimated is None:
        return "lbs tune has not measured what an estimate needs: layers, and calls of the network at uniform bits"
    return f"estimated from what lbs tune measured: {estimated * 1e6:.1f} us ({estimated / measured - 1:+.1%})"


def explain(
    packed: PackedModel, *, batch: int = 1, threads: int | None = None, rounds: int = 30, gpu: str = ""
) -> Explanation:
    """Describe a packed model step by step, timed on random images.

    Args:
        packed: the network that is described.
        batch: images per run. threads: of the native kernels and of torch, whose number it is unless given. rounds:
            runs whose median is the time of a step: what the first thread spent in it on the native back end, a CUDA
            graph of its launch on a GPU; the reference does not tell it. The same number of calls times the parts.
        gpu: a GPU that is not here, such as "nvidia-h200" or "modelled:nvidia-h200": a column tells what a
            model gives for its steps.

    Raises:
        ShapeError: an empty batch, no rounds, or no threads. GraphError: no packed network. FormatError: no such GPU,
            or one with a batch of its own.

    Example:
        print(lbs.explain(packed, batch=64))
    """
    need_packed(packed, "explain")
    count = default_threads() if threads is None else threads
    if min(batch, rounds, count) < 1:
        raise ShapeError(f"batch = {batch}, rounds = {rounds}, threads = {count}; each is at least 1")
    model = _model_of(gpu, batch)
    generator = torch.Generator().manual_seed(0)
    images = packed.random_images(batch, generator)
    _, traces = packed.run_traced(images)
    rows: list[StepRow] = []
    notes: list[str] = []
    roof = tuning_table.roof(tuning_table.device_slug("cpu"), count) if packed.device.type == "cpu" else None
    for index, (region, trace) in enumerate(zip(packed.regions, traces, strict=True)):
        compiled = region.compiled()
        if compiled.fallback:
            notes.append(f"region {index} fell back to {compiled.backend}: {compiled.fallback}")
        inexact = sorted(packed.inexact_layers(batch) & {step.name for step in region.program.steps})
        if inexact:
            notes.append(f"region {index}: in half precision, not exact: {', '.join(inexact)}")
        coded = streams_of_codes(region.program)
        if coded:
            notes.append(f"region {index}: residual streams of 8 bits: {', '.join(coded)}")
        inputs = [trace[place].contiguous() for place in region.program.inputs]
        seconds = compiled.runner.step_seconds(inputs, threads=count, rounds=rounds)
        if seconds is None:
            notes.append(f"region {index}: the {compiled.backend} back end does not tell times of steps")
        kernels = compiled.runner.kernels(batch, threads=count)
        found = _rows(index, region.program, kernels, batch, seconds, roof)
        if model is not None:
            times = model.of_steps(region.program)
            found = [replace(row, modelled=time) for row, time in zip(found, times, strict=True)]
        rows.extend(found)
    if model is not None:
        total = sum(row.modelled or 0.0 for row in rows)
        notes.append(
            f"us modelled: {model.modelled}, {total * 1e6:.1f} us in the steps; computed from counts, not measured"
        )
    if roof is not None and any(row.roof is not None for row in rows):
        notes.append(f"roof: {roof / 1e9:.0f} G multiply-adds a second, a matrix product of bytes with {count} threads")
    with torch_threads(count):
        parts = time_parts(packed, images, rounds)
        call = time_call(packed, images, rounds).p20 if packed.device.type == "cpu" else None
    about = (batch, count, packed.packed_bytes, parts, call, estimated_call(packed, batch, count))
    return Explanation(_with_shares(rows), packed.kept_float, tuple(notes), *about)


def _model_of(gpu: str, batch: int) -> Modelled | None:
    name = gpu.removeprefix(PREFIX)
    if ":" in name:
        raise FormatError(f"gpu={gpu!r} names a batch; leave it out, the model counts the batch that is run ({batch})")
    return modelled(f"{PREFIX}{name}:{batch}") if gpu else None


def estimated_call(packed: PackedModel, batch: int, threads: int) -> float | None:
    """Seconds of a call on the processor by what `lbs tune` measured on this machine, None where it cannot be told."""
    plan = packed.plan
    if plan is None or packed.device.type != "cpu":
        return None
    streams = streams_of(packed)
    return call_seconds(plan.whole_problems(), plan.kept_problems(), batch=batch, threads=threads, streams=streams)


def streams_of(packed: PackedModel) -> int:
    """Bits of its residual streams: 8 where one of them is made of codes."""
    return 8 if any(streams_of_codes(program) for program in packed.programs) else FLOAT_STREAMS


def streams_of_codes(program: Program) -> list[str]:
    """The names of the codes that sums read, each once."""
    read = (step.emit.residual for step in program.steps if step.emit.residual_step is not None)
    return list(dict.fromkeys(program.tensors[index].name for index in read if index is not None))


def _rows(
    index: int,
    program: Program,
    kernels: list[StepKernel],
    batch: int,
    seconds: list[float] | None,
    roof: float | None,
) -> list[StepRow]:
    rows = []
    for place, step in enumerate(program.steps):
        source, result = program.tensors[step.input], program.tensors[_written(step)]
        weights = isinstance(step, ConvStep | LinearStep) and not step.name.endswith(DECODED)
        took = seconds[place] if seconds is not None else None
        rate = problem_of(step, program, batch, "cpu").macs / took if weights and took else None
        rows.append(
            StepRow(
                index,
                step.name,
                _operation(step),
                _size(source),
                _size(result),
                getattr(step, "w_bits", 0) if weights else 0,
                source.bits,
                result.channels if weights else 0,
                getattr(step, "total_filters", 0) if weights else 0,
                kernels[place].name,
                took,
                None,
                rate / roof if roof is not None and rate is not None else None,
            )
        )
    return rows


def _with_shares(rows: list[StepRow]) -> tuple[StepRow, ...]:
    total = sum(row.seconds or 0.0 for row in rows)
    if not total:
        return tuple(rows)
    return tuple(replace(row, share=row.seconds / total if row.seconds is not None else None) for row in rows)


def _written(step: Step) -> int:
    targets = [consumer.tensor for consumer in step.emit.consumers]
    return targets[0] if step.emit.stream is None else step.emit.stream


def _size(spec: TensorSpec) -> tuple[int, int, int]:
    return spec.height, spec.width, spec.channels


def _operation(step: Step) -> str:
    if step.name.endswith(DECODED):
        return "decode"
    if isinstance(step, ConvStep):
        window = f"conv {step.kernel[0]}x{step.kernel[1]}"
        down, across = step.stride
        stride = "" if step.stride == (1, 1) else f" /{down}" if down == across else f" /{down}x{across}"
        return window + stride + (f" groups {step.groups}" if step.groups > 1 else "")
    if isinstance(step, LinearStep):
        return "linear"
    if isinstance(step, PoolStep):
        return "mean pool" if step.kind == "mean" else f"{step.kind} pool {step.kernel[0]}x{step.kernel[1]}"
    if isinstance(step, SelectStep):
        if step.moves and step.emit.low is not None and step.emit.low == step.emit.high:
            return "constant"
        if step.moves:
            return f"move pixels of {len(set(step.inputs))}"
        return f"select of {len(step.inputs)}" if step.repeat == (1, 1) else "repeat {}x{}".format(*step.repeat)
    if isinstance(step, ResizeStep):
        return "interpolate to {}x{}".format(*step.size)
    if step.multiplier is not None:
        return "normalize"
    if step.emit.gate is not None:
        return "gate"
    if step.emit.activation is not None:
        return step.emit.activation.kind
    return "quantize" if step.emit.residual is None else "add"


def _cells(row: StepRow) -> tuple[str, ...]:
    def size(shape: tuple[int, int, int]) -> str:
        return "x".join(str(value) for value in shape)

    return (
        row.name,
        row.operation,
        size(row.input),
        size(row.output),
        f"{row.w_bits}/{row.a_bits}" if row.w_bits else "",
        f"{row.kept_filters}/{row.total_filters}" if row.total_filters else "",
        row.kernel,
        f"{row.seconds * 1e6:.1f}" if row.seconds is not None else "",
        f"{row.share:.1%}" if row.share is not None else "",
    )
