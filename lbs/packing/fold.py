"""Scales, bias and norms become one multiplier and one bias per channel, rounded to float32 once.

    layer   y = conv(x, w) + b,   conv(x, w) = s_w * s_x * acc          s_w, s_x: real value of one unit of the sums
    norm    z = g * y + h         (lbs/quant/fold.py)
    so      z = M * acc + B,      M = g * s_w * s_x,            B = g * b + h

    bytes   x = byte / (255 std) - mean / std, which norms may follow in the same way

Weights are never quantized again: the codes are those that were trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lbs.quant import fold
from lbs.quant.layers import QuantLayer
from lbs_kernels.errors import GraphError


def affine(norm: nn.BatchNorm2d, name: str) -> tuple[Tensor, Tensor]:
    """(g, h) float64 [C] of a norm in evaluation mode, on the CPU: z = g * y + h.

    Raises:
        GraphError: statistics or parameters that are not finite, or a variance below -eps.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise GraphError(f"{name} keeps no running statistics; make it with track_running_stats=True and train it")
    gain, shift = fold.affine(norm)
    _finite(gain, f"the scale of {name}", "its weight or running_var holds NaN, infinity or a negative variance")
    _finite(shift, f"the shift of {name}", "its bias or running_mean holds NaN or infinity")
    return gain.cpu(), shift.cpu()


def multiplier_and_bias(
    layer: QuantLayer, name: str, norms: Sequence[tuple[str, nn.BatchNorm2d]]
) -> tuple[Tensor, Tensor]:
    """(M, B) float32 [O] of a layer followed by norms: y = fma(float32(acc), M, B).

    Args:
        norms: (name, norm) in the order they are applied; none is fine.

    Raises:
        GraphError: something is not finite, also after rounding to float32; layer or norm is named.
    """
    scale, shift = layer.affine()
    return through_norms(scale.cpu(), shift.cpu(), name, norms)


def through_norms(
    scale: Tensor, shift: Tensor, name: str, norms: Sequence[tuple[str, nn.BatchNorm2d]]
) -> tuple[Tensor, Tensor]:
    """(M, B) float32 [C] of scale * x + shift (float64 [C]) followed by norms. Raises as `multiplier_and_bias`."""
    for norm_name, norm in norms:
        scale, shift = fold.behind(scale, shift, *affine(norm, norm_name))
    return rounded(scale, f"the multiplier of {name}"), rounded(shift, f"the bias of {name}")


def rounded(value: Tensor, what: str) -> Tensor:
    """float32 of float64. Raises GraphError where it is not finite."""
    result = value.float()
    _finite(result, what, "weights, ranges and norms must stay inside float32")
    return result


def _finite(value: Tensor, what: str, rule: str) -> None:
    if not bool(value.isfinite().all()):
        index = int((~value.isfinite()).nonzero()[0])
        raise GraphError(f"{what} is {float(value[index])} at channel {index}: {rule}; train or load it again")
