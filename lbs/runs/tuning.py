"""What `lbs tune` measures: the steps of a packed network, the layers of a plan or a float network, and whole calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import lbs
import lbs.cost
import lbs.models
from lbs.cost.latency import at_uniform_bits, call_key, latency_grid
from lbs.graph import record_of
from lbs.packing.explain import streams_of
from lbs.packing.model import PackedModel
from lbs.packing.parts import time_call
from lbs.plan import Plan
from lbs.run_folder import RunFolder
from lbs.runs import network
from lbs.runs.packed import PACKED
from lbs.search.streams import FLOAT
from lbs_kernels.errors import LbsError, PlanError
from lbs_kernels.gpu.modelled import ways
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.times import table
from lbs_kernels.times.table import TuningTable

Pairs = Sequence[tuple[int, int]]
_IMAGES = 4  # of random numbers, that set the ranges of what is only timed
_ROUNDS = 60  # measurements of a call: two seconds, which all estimates of the network rest on


@dataclass(frozen=True)
class Shapes:
    """A float network, whose weights do not matter."""

    name: str
    model: nn.Module
    example: Tensor


def shapes_of(name: str, input_shape: tuple[int, ...] = (), classes: int | None = None) -> Shapes:
    """A network by registry name or `module:function`, which needs the shape of one image and the number of classes.

    Raises:
        LbsError: an unknown name, a function that gives no network, or one that does not say what it takes; a shape
            that is none.
    """
    if input_shape and (len(input_shape) not in (2, 3) or min(input_shape) < 1):
        raise LbsError(
            f"input_shape={input_shape} is no image; give channels, height and width, such as 3, 32 and 32 (a line: "
            "channels and length), each at least 1"
        )
    if classes is not None and classes < 1:
        raise LbsError(f"classes={classes}; give at least 1")
    if ":" in name and not (input_shape and classes):
        raise LbsError(
            f"{name} does not say what it takes; name the shape of one image and the number of classes: "
            "input_shape=(3, 32, 32), classes=100"
        )
    known = None if ":" in name else lbs.models.entry(name)
    if known is not None:
        input_shape, classes = input_shape or known.input_shape, classes or known.num_classes
    return Shapes(name, network.build(name, classes or 0).eval(), torch.zeros(1, *input_shape))


def searched_plan(path: Path | None, folder: RunFolder | None) -> Plan | None:
    """The plan that was named: a .json file, or that of a run that is not packed; None of what is packed.

    Raises:
        PlanError: no plan, or one of a network that stays in float, whose layers are never packed. CheckpointError: the
            plan of a run is missing or was edited.
    """
    if folder is not None:
        if folder.file(PACKED).exists():
            return None
        path, plan = folder.file("plan.json"), network.plan_of_run(folder)
    elif path is None or path.suffix != ".json":
        return None
    else:
        plan = Plan.load(path)
    if plan.in_float:
        raise PlanError(f"{path} is of a network that stays in float; its layers are never packed, nothing is measured")
    return plan


def plan_problems(plan: Plan, batches: Iterable[int], device: str) -> list[Problem]:
    """The layers of a plan with the filters that live, at their bits and on their grids."""
    kept = plan.kept_problems()
    wanted = [replace(one, batch=one.batch * batch, device=device) for batch in batches for one in kept]
    return [step for problem in wanted for step in lbs.cost.timed(problem)]


def step_problems(packed: PackedModel, batches: Iterable[int], device: str) -> list[Problem]:
    """The steps of a packed network, and its layers that are on unusual grids once more, as estimates ask for them. Of
    a GPU also the steps it may run in their place.
    """
    programs = [way for program in packed.programs for way in (ways(program) if device != "cpu" else [program])]
    steps = [
        problem_of(step, program, batch, device) for batch in batches for program in programs for step in program.steps
    ]
    layers = [] if packed.plan is None else plan_problems(packed.plan, batches, device)
    return steps + [layer for layer in layers if layer.grid is not None]


def shape_problems(
    shapes: Shapes, bits: Pairs, batches: Iterable[int], *, group: int | None, points: int, device: str
) -> list[Problem]:
    """The layers of a float network over a grid of kept filters, see `latency_grid`. group: None: the network's own."""
    layers = lbs.cost.network_layers(shapes.model, shapes.example)
    size = network.prune_group(shapes.name) if group is None else group
    return [
        problem
        for batch in batches
        for problem in latency_grid(layers, bits, batch=batch, group=size, points=points, device=device)
    ]


@dataclass(frozen=True)
class Call:
    """One call to be timed: a network at uniform bits and a batch, made when it is its turn."""

    name: str
    batch: int
    make: Callable[[], PackedModel]

    def measure(self, threads: int, again: bool = False) -> float | None:
        """Seconds with torch's `threads`, put into this machine's table; None if they were there."""
        slug, implementation = table.device_slug("cpu"), table.native(threads)
        table.forget()  # another process may have put it there since the tables were read
        if not again and implementation in table.load(slug).calls.get(self.name, {}):
            return None
        packed = self.make()
        seconds = time_call(packed, packed.random_images(self.batch), _ROUNDS).p20
        table.add(TuningTable(slug, calls={self.name: {implementation: seconds}}))
        return seconds


def calls_of_shapes(
    shapes: Shapes, bits: Pairs, batches: Iterable[int], exclude: tuple[str, ...] = (), streams: int = FLOAT
) -> list[Call]:
    """Calls of a float network packed at every pair of one width; at every pair where none is of one width.

    exclude, streams: as `lbs.uniform` has them.
    """
    images = torch.randn(_IMAGES, *shapes.example.shape[1:], generator=torch.Generator().manual_seed(0))
    searched = lbs.prepare(shapes.model, images[:1], lbs.SearchConfig(pruning=False, exclude=exclude))
    layers = record_of(searched).plan.whole_problems()

    def made(w_bits: int, a_bits: int) -> PackedModel:
        uniform = lbs.uniform(shapes.model, images[:1], w_bits, a_bits, exclude, streams=streams)
        return lbs.pack(lbs.calibrate(uniform, [images]).eval(), verify=False)

    pairs = [pair for pair in bits if pair[0] == pair[1]] or list(bits)
    return [
        Call(call_key(layers, batch, w, a, streams), batch, lambda w=w, a=a: made(w, a))  # type: ignore[misc]
        for batch in batches
        for w, a in pairs
    ]


def calls_of_packed(packed: PackedModel, batches: Iterable[int]) -> list[Call]:
    """Calls of a packed network that has all its filters at one pair of bits; of another one none.

    None either of one whose calls take otherwise than those of the network that a search is of: it is given bytes,
    stores its streams in half precision, or may run inexact kernels.
    """
    plan = packed.plan
    if plan is None or packed.device.type != "cpu":
        return []
    halved = any(program.stream_dtype != "float32" for program in packed.programs)
    if packed.normalize is not None or packed.fallback is not None or halved:
        return []
    inner = {(layer.w_bits, layer.a_bits) for layer in plan.layers[1:-1]} or {(8, 8)}
    if len(inner) > 1:
        return []
    ((w_bits, a_bits),) = inner
    layers = plan.whole_problems()
    if plan.kept_problems() != at_uniform_bits(layers, w_bits, a_bits):
        return []
    streams = streams_of(packed)
    return [Call(call_key(layers, batch, w_bits, a_bits, streams), batch, lambda: packed) for batch in batches]
