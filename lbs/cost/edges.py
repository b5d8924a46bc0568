"""The rule of the edges: the first and the last layer of a network stay at 8 / 8 bits, and their filters all live.

The first reads the input, which is coded in 8 bits, and the filters of the last are the outputs. LBS (arXiv 2101.04935)
states it of the first convolution and the last linear layer, and its totals count them so; of a network that has a
linear layer in front, or ends in a convolution, it is those.
"""

from __future__ import annotations

from collections.abc import Iterable

EDGE_BITS = 8


def edge_layers(names: Iterable[str]) -> tuple[str, ...]:
    """The first and the last name, whatever kind of layer they are; of one layer twice the same, of none nothing.

    names: layers in execution order. One that is used again stands where it was used first, as in a plan.

    >>> edge_layers(["conv1", "conv2", "conv1", "fc"]), edge_layers(["conv", "head", "conv"]), edge_layers(["fc"])
    (('conv1', 'fc'), ('conv', 'head'), ('fc', 'fc'))
    """
    once = list(dict.fromkeys(names))
    return (*once[:1], *once[-1:])


def uniform_bits(names: Iterable[str], w_bits: int, a_bits: int) -> dict[str, tuple[int, int]]:
    """(weight, activation) bits of every layer of a network at one pair of widths, its edges at `EDGE_BITS`.

    >>> uniform_bits(["conv1", "conv2", "fc"], 4, 2)
    {'conv1': (8, 8), 'conv2': (4, 2), 'fc': (8, 8)}
    """
    bits = dict.fromkeys(names, (w_bits, a_bits))
    return bits | dict.fromkeys(edge_layers(bits), (EDGE_BITS, EDGE_BITS))
