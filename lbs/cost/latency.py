"""Which problems to measure so that the latency of a network can be told for any kept filters and bits.

Times are measured by `lbs tune`, kept in tuning tables, and read with `lbs_kernels.times.table.estimate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lbs.cost.network import NetworkLayers
from lbs_kernels.errors import PlanError
from lbs_kernels.program.problem import TRANSPOSED, Problem
from lbs_kernels.program.transposed import phases
from lbs_kernels.program.window import Window


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
