"""What a call takes: which problems to measure so that it can be told for any kept filters and bits, and how it is.

    seconds of a call = sum of the layers' steps + what surrounds them

`lbs tune` measures both and keeps them in tuning tables: layers one by one, at many sizes, and whole calls of the
network at uniform bits. What a call takes beyond its layers surrounds them: entering the program, quantizing the image,
residuals, pools, sums, what stays in float. It depends on filters little, and on bits somewhat (ResNet-20 at batch 1,
AMD EPYC family 26: 19, 17 and 14 us of 110 at 2, 4 and 8 bits), so layers are charged with what theirs add.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lbs.cost.edges import EDGE_BITS
from lbs.cost.network import NetworkLayers
from lbs_kernels.errors import PlanError
from lbs_kernels.program.problem import TRANSPOSED, Problem
from lbs_kernels.program.transposed import phases
from lbs_kernels.program.window import Window
from lbs_kernels.times import table

FLOAT_STREAMS = 32  # bits of residual streams that are floats


def kept_sizes(channels: int, group: int, points: int) -> list[int]:
    """Channel counts to measure: `points` of them evenly up to `channels`, in steps of the group filters are cut in.

    >>> kept_sizes(64, 8, 4), kept_sizes(16, 8, 4), kept_sizes(3, 8, 4), kept_sizes(100, 8, 2)
    ([16, 32, 48, 64], [8, 16], [3], [56, 100])
    """
    steps = (-(-channels * part // (points * group)) * group for part in range(1, points + 1))
    return sorted({min(size, channels) for size in steps})


def timed(problem: Problem) -> list[Problem]:
    """What a layer takes its time for: itself, or the convolutions that a transposed one is packed as.

    The selection behind those is left out: it moves bytes.

    >>> layer = Problem("conv_transpose2d", 1, 8, 8, in_channels=16, out_channels=8, kernel=(4, 4), stride=(2, 2))
    >>> [str(step) for step in timed(layer)]
    ['bitconv2d_n1_16x8x8_to32_k2x2_s1_p1_w8a8_cpu']
    """
    if problem.op != TRANSPOSED:
        return [problem]
    found = list(phases(problem.kernel, problem.stride, problem.dilation))
    counts = {(rows.count, columns.count) for rows, columns in found}
    together = len(found) if len(counts) == 1 else 1
    steps = []
    for rows, columns in found[::together]:
        kernel, apart = (max(1, rows.count), max(1, columns.count)), (rows.dilation, columns.dilation)
        window = Window(kernel, (1, 1), (apart[0] * (kernel[0] - 1), apart[1] * (kernel[1] - 1)), apart, problem.groups)
        filters = problem.out_channels * together
        steps.append(replace(problem, op="bitconv2d", out_channels=filters, **vars(window)))
    return steps


def latency_grid(
    layers: NetworkLayers,
    bits: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    group: int = 8,
    points: int = 4,
    device: str = "cpu",
) -> list[Problem]:
    """Every layer over a grid of kept input channels and filters and pairs of bits; whole layers come first.

    The channels of the image and the outputs of the last layer stay, and the edges are at 8/8 bits
    (`lbs.cost.edge_layers`). A depthwise layer keeps as many filters as channels.

    Args:
        layers: of a float network (`lbs.cost.network_layers`). bits: (weight, activation) pairs.
        group: filters that are kept or cut together. points: sizes per axis; 1 measures whole layers only.

    Raises:
        PlanError: a group, number of points or batch below 1.
    """
    if min(group, points, batch) < 1:
        raise PlanError(f"group {group}, points {points}, batch {batch}; each is at least 1")
    first, last = layers.edges
    whole: dict[Problem, None] = {}
    cut: dict[Problem, None] = {}
    for w_bits, a_bits in bits:
        for layer in layers.with_bits(w_bits, a_bits).layers:
            problem = replace(layer.problem, batch=layer.problem.batch * batch, device=device)
            whole[problem] = None
            inputs = [problem.in_channels] if layer.name == first else kept_sizes(problem.in_channels, group, points)
            outputs = [problem.out_channels] if layer.name == last else kept_sizes(problem.out_channels, group, points)
            cut.update(dict.fromkeys(_cuts(problem, inputs, outputs)))
    return list(dict.fromkeys(step for problem in (*whole, *cut) for step in timed(problem)))


def _cuts(problem: Problem, inputs: Sequence[int], outputs: Sequence[int]) -> Iterable[Problem]:
    if problem.groups == 1:
        for c in inputs:
            for o in outputs:
                yield replace(problem, in_channels=c, out_channels=o)
    elif problem.depthwise:
        for c in inputs:
            yield replace(problem, in_channels=c, out_channels=c, groups=c)


def at_uniform_bits(layers: Sequence[Problem], w_bits: int, a_bits: int) -> list[Problem]:
    """A network's layers, in execution order, at one pair of widths, its edges at `EDGE_BITS`."""
    inner = [replace(layer, w_bits=w_bits, a_bits=a_bits) for layer in layers]
    for edge in (0, -1):
        inner[edge] = replace(inner[edge], w_bits=EDGE_BITS, a_bits=EDGE_BITS)
    return inner


def call_key(layers: Sequence[Problem], batch: int, w_bits: int, a_bits: int, streams: int = FLOAT_STREAMS) -> str:
    """The name of a network at uniform bits in tuning tables: by its whole layers, as executed, of one image.

    Networks that differ in nothing but what lies between these layers (sums, pools, activations, what stays in float)
    share it, and what was measured of one is taken for the other.
    """
    return f"{_network(layers, streams)}_n{batch}_w{w_bits}a{a_bits}_cpu"


def _network(layers: Sequence[Problem], streams: int) -> str:
    text = "\n".join(str(replace(layer, w_bits=EDGE_BITS, a_bits=EDGE_BITS, device="")) for layer in layers)
    coded = "" if streams == FLOAT_STREAMS else f"-streams{streams}"
    return f"network-{hashlib.sha256(text.encode()).hexdigest()[:16]}{coded}"


@dataclass(frozen=True)
class Around:
    """What surrounds the layers of a network in a call, with one number of threads.

    rests: seconds by the uniform (weight, activation) bits of the calls that were measured. call: the median of those
    calls. inner: steps of the layers beside the network's edges.
    """

    rests: dict[tuple[int, int], float]
    call: float
    inner: int

    def at(self, w_bits: int, a_bits: int) -> float:
        """Seconds beside the layers at uniform bits: measured, or else between those of the nearest widths."""
        if (w_bits, a_bits) in self.rests:
            return self.rests[w_bits, a_bits]
        nearest = (
            min(self.rests, key=lambda pair: (abs(pair[0] - w_bits), abs(pair[1] - w_bits))),
            min(self.rests, key=lambda pair: (abs(pair[1] - a_bits), abs(pair[0] - a_bits))),
        )
        return statistics.mean(self.rests[pair] for pair in nearest)

    @property
    def constant(self) -> float:
        """Seconds of a call that no layer is charged with: those at the bits of the edges."""
        return self.at(EDGE_BITS, EDGE_BITS)

    def share(self, problem: Problem) -> float:
        """What a step of a layer (`timed`) at other bits adds to `constant`; it may be below 0."""
        return (self.at(problem.w_bits, problem.a_bits) - self.constant) / self.inner


def surroundings(layers: Sequence[Problem], *, batch: int = 1, streams: int = FLOAT_STREAMS) -> dict[int, Around]:
    """What surrounds the steps of a network in a call on the processor, by threads, as far as it was measured.

    Args:
        layers: of the network, whole, in execution order, of one image. streams: bits of its residual streams.
    """
    rests: dict[int, dict[tuple[int, int], float]] = {}
    calls: dict[int, list[float]] = {}
    own = re.compile(rf"{_network(layers, streams)}_n{batch}_w(\d+)a(\d+)_cpu")
    for name, times in table.calls("cpu").items():
        bits = own.fullmatch(name)
        if bits is None:
            continue
        pair = int(bits[1]), int(bits[2])
        for implementation, seconds in times.items():
            threads = table.threads_of(implementation)
            steps = layer_seconds(at_uniform_bits(layers, *pair), batch=batch, threads=threads)
            if threads is not None and steps is not None:
                rests.setdefault(threads, {})[pair] = max(0.0, seconds - steps)
                calls.setdefault(threads, []).append(seconds)
    inner = max(1, sum(len(timed(layer)) for layer in layers[1:-1]))
    return {threads: Around(found, statistics.median(calls[threads]), inner) for threads, found in rests.items()}


def fastest(around: Mapping[int, Around]) -> int:
    """Of what `surroundings` returns, the number of threads with which calls take least."""
    return min(around, key=lambda threads: around[threads].call)


def layer_seconds(layers: Iterable[Problem], *, batch: int, threads: int | None) -> float | None:
    """Sum of the times of layers of one image at a batch, measured on the processor; None where one is not known.

    Weights on another grid than the usual one of their width take what these take, where nobody measured them.
    """
    total = 0.0
    for layer in layers:
        for step in timed(replace(layer, batch=layer.batch * batch, device="cpu")):
            seconds = table.estimate(step, threads)
            if seconds is None and step.grid is not None:
                seconds = table.estimate(replace(step, grid=None), threads)
            if seconds is None:
                return None
            total += seconds
    return total


def call_seconds(
    layers: Sequence[Problem], kept: Sequence[Problem], *, batch: int, threads: int, streams: int = FLOAT_STREAMS
) -> float | None:
    """What a call of a network is estimated to take; None where something that it needs was not measured.

    Args:
        layers, streams: as `surroundings`. kept: the layers with the channels that live, at the bits they have.
    """
    around = surroundings(layers, batch=batch, streams=streams).get(threads)
    steps = layer_seconds(kept, batch=batch, threads=threads)
    if around is None or steps is None:
        return None
    return steps + around.constant + sum(around.share(step) for layer in kept for step in timed(layer))


@dataclass(frozen=True)
class Tuned:
    """What `lbs tune` measured on this machine, as the table of a budget: `lbs.Budget(..., table=lbs.cost.Tuned())`.

    device: whose times. threads: of the processor's; None takes the number with which calls of the network were
    measured to be fastest. model: the network's name, for messages. whole: its layers, where the network that is
    searched has lost filters already. streams: bits of its residual streams. Calls are measured on the processor alone:
    on a GPU what surrounds the steps counts nothing.
    """

    device: str = "cpu"
    threads: int | None = None
    model: str = "NAME"
    whole: tuple[Problem, ...] = ()
    streams: int = FLOAT_STREAMS

    def of_network(self, layers: Sequence[Problem]) -> tuple[Callable[[Problem], float], float]:
        """(Seconds of a step, seconds of a call that no step takes), of a network's layers as `surroundings` has them.

        Raises:
            PlanError: no call of the network was measured; the first also, later on, for a step that was not.
        """
        layers = self.whole or layers
        if table.kind(self.device) != "cpu":
            return self._steps(layers, None), 0.0
        found = surroundings(layers, streams=self.streams)
        usable = {count: pair for count, pair in found.items() if self.threads in (None, count)}
        if not usable:
            few = f" with {self.threads} threads" if self.threads else ""
            raise PlanError(
                f"for latency_ms= no call of this network{few} is known on this machine, so not what surrounds its "
                f"steps; measure layers and calls first, with {self._command(layers)}"
            )
        threads = fastest(usable)
        around, step = usable[threads], self._steps(layers, threads)
        return lambda problem: max(0.0, step(problem) + around.share(problem)), around.constant

    def _steps(self, layers: Sequence[Problem], threads: int | None) -> Callable[[Problem], float]:
        def seconds(problem: Problem) -> float:
            problem = replace(problem, device=self.device)
            known = table.estimate(problem, threads)
            if known is None:
                raise PlanError(
                    f"for latency_ms= no time of {problem} is known on this machine; measure the layers first, with "
                    f"{self._command(layers)} (and --bits with the pairs that are searched), or in Python with "
                    "lbs_kernels.tune.tuner.tune"
                )
            return known

        return seconds

    def _command(self, layers: Sequence[Problem]) -> str:
        first, last = layers[0], layers[-1]
        shape = f"{first.in_channels},{first.height},{first.width}"
        more = f" --threads {self.threads}" if self.threads else ""
        more += f" --streams {self.streams}" if self.streams != FLOAT_STREAMS else ""
        return (
            f"lbs tune --shapes {self.model} --input-shape {shape} --classes {last.out_channels} "
            f"--device {self.device}{more}"
        )
