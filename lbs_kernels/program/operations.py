"""The definition of the operations in plain torch. Every back end is judged by it; the epilogue is epilogue.py.

bitconv2d, an exact integer convolution, then one fused multiply-add per output:

    acc = sum_k w x    w = 2 qw - n_w on the grid `odd`, qw - 2^(w_bits - 1) on the grid `zero`
                       x = qx - zero, or 2 qx - n_x if signed; padding is the code `zero`, a real 0
    y = fma(float32(acc), multiplier[o], bias[o])

bitlinear is bitconv2d of one pixel by a window of one. quantpack makes the float32 values that the epilogue encodes.
pool is the maximum over a window, or the mean of all pixels or of a window in a fixed order. select takes channels.
resize interpolates between pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbs_kernels.errors import ShapeError
from lbs_kernels.program.epilogue import fma32
from lbs_kernels.program.planes import check_accumulator, unpack_weights, weight_units
from lbs_kernels.program.steps import SelectStep
from lbs_kernels.program.window import Window

LINEAR = Window()


def accumulate(
    x_codes: Tensor,
    w_planes: Tensor,
    window: Window = LINEAR,
    *,
    a_bits: int,
    zero: int = 0,
    signed: bool = False,
    grid: str = "odd",
) -> Tensor:
    """The accumulator of bitconv2d, and of bitlinear with H = W = 1 and the window left out.

    The sum runs in float64, where integers are exact below 2^53 and the order of additions does not matter; the guard
    keeps |acc| below 2^31.

    Args:
        x_codes: uint8 [N, H, W, C], values below 2^a_bits.
        w_planes: int32 [w_bits, O, kh * kw, CW], CW over the C / groups channels of one group.
        a_bits, zero, signed: how codes are read; signed codes have no zero and cannot be padded.
        grid: how weight codes are read, `odd` or `zero`.

    Returns:
        int32 [N, H', W', O].

    Raises:
        FormatError: the accumulator could overflow, or the planes do not fit C / groups.
        ShapeError: signed codes with padding.
    """
    if signed and window.padding != (0, 0):
        raise ShapeError(f"padding {window.padding} of signed codes: they have no code for 0; pad before encoding")
    w_bits, filters, taps, _ = w_planes.shape
    channels = x_codes.shape[3] // window.groups
    check_accumulator(taps * channels, w_bits, a_bits, "the definition")
    scale, shift = weight_units(w_bits, grid)
    weight = unpack_weights(w_planes, channels).double() * scale + shift
    weight = weight.reshape(filters, *window.kernel, channels).permute(0, 3, 1, 2)
    x = x_codes.double() * 2 - ((1 << a_bits) - 1) if signed else x_codes.double() - zero
    # Plain im2col and matrix product: cuDNN might pick a transform (FFT, Winograd) that is not exact.
    with torch.backends.cudnn.flags(enabled=False):
        acc = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, None, *window.fields()[1:])
    return acc.permute(0, 2, 3, 1).to(torch.int32)


def read_values(x: Tensor, form: str, multiplier: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """quantpack: y = fma(float32(x), multiplier[c], bias[c]), or float32(x) without them.

    Args:
        x: an image float32 or uint8 [N, C, H, W] in any memory format, or a stream [N, H, W, C] in any stream type.
        form: "image" or "stream".
        multiplier, bias: float32 [C], both or none.

    Returns:
        float32 [N, H, W, C].
    """
    values = x.permute(0, 2, 3, 1).float() if form == "image" else x.float()
    return values if multiplier is None or bias is None else fma32(values, multiplier, bias)


def max_pool(x: Tensor, window: Window) -> Tensor:
    """Maximum over each window; padding never wins.

    Args:
        x: uint8 codes or a stream, [N, H, W, C].

    Returns:
        The same dtype for codes, float32 for a stream; [N, H', W', C].
    """
    pooled = torch.nn.functional.max_pool2d(x.float().permute(0, 3, 1, 2), *window.fields()[:4])
    pooled = pooled.permute(0, 2, 3, 1)
    return pooled.to(torch.uint8) if x.dtype == torch.uint8 else pooled


def mean_pool(x: Tensor) -> Tensor:
    """Global mean float32 [N, 1, 1, C] of a stream [N, H, W, C].

    y[c] = (((x[0, c] + x[1, c]) + x[2, c]) + ...) * float32(1 / (H W)): float32 sums over pixels in row-major order.
    The order is part of the definition, so that every back end gives the same bits.
    """
    pixels = x.float().flatten(1, 2)
    count = pixels.shape[1]
    total = pixels[:, 0]
    for index in range(1, count):
        total = total + pixels[:, index]
    return (total * torch.tensor(1.0 / count, dtype=torch.float32, device=x.device))[:, None, None]


def average_pool(x: Tensor, window: Window) -> Tensor:
    """Mean over each window of a stream [N, H, W, C], float32 [N, H', W', C]; padding counts as zeros.

    y = (((x[0] + x[1]) + x[2]) + ...) * float32(1 / (kh kw)): float32 sums over the taps in row-major order.
    """
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = window.kernel, window.stride, window.padding
    height, width = window.output(x.shape[1], x.shape[2])
    padded = torch.nn.functional.pad(x.float(), (0, 0, pad_w, pad_w, pad_h, pad_h))
    total: Tensor | None = None
    for row in range(kernel_h):
        for column in range(kernel_w):
            taps = padded[:, row::stride_h, column::stride_w][:, :height, :width]
            total = taps if total is None else total + taps
    assert total is not None
    return total * torch.tensor(1.0 / (kernel_h * kernel_w), dtype=torch.float32, device=x.device)


def select(inputs: Sequence[Tensor], step: SelectStep) -> Tensor:
    """Channels of all inputs side by side, every pixel repeated to the size of the result, or moved (see `SelectStep`).

    Args:
        inputs: uint8 codes or streams [N, H_i, W_i, C_i].

    Returns:
        The same dtype for codes, float32 for streams; [N, H, W, C].
    """
    channels = step.channels
    if step.moves:
        return _moved(inputs, step)
    height, width = inputs[0].shape[1] * step.repeat[0], inputs[0].shape[2] * step.repeat[1]
    parts = [x.repeat_interleave(height // x.shape[1], 1).repeat_interleave(width // x.shape[2], 2) for x in inputs]
    whole = torch.cat(parts, 3)
    chosen = whole[..., list(channels)] if channels else whole
    return chosen if chosen.dtype == torch.uint8 else chosen.float()


def _moved(inputs: Sequence[Tensor], step: SelectStep) -> Tensor:
    """Every place of a block by itself: its channels, of pixels that lie a stride apart."""
    rows, columns = step.block
    holders = [(i, k) for i, x in enumerate(inputs) for k in range(x.shape[3])]
    channels = step.channels or range(len(holders))
    each = len(channels) // (rows * columns)
    dtype = torch.uint8 if inputs[0].dtype == torch.uint8 else torch.float32
    result = inputs[0].new_empty((inputs[0].shape[0], *step.size, each), dtype=dtype)
    for place in range(rows * columns):
        target = result[:, place // columns :: rows, place % columns :: columns]
        _, height, width, _ = target.shape
        chosen = [holders[channel] for channel in channels[place * each : (place + 1) * each]]
        for i in {i for i, _ in chosen}:
            top, left = (values[i] if values else 0 for values in (step.top, step.left))
            window = inputs[i][:, top :: step.stride[0], left :: step.stride[1]][:, :height, :width]
            held = [c for c, (holder, _) in enumerate(chosen) if holder == i]
            target[..., held] = window[..., [chosen[c][1] for c in held]].to(dtype)
    return result


def resize_taps(size: int, count: int, scale: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows (or columns) of an interpolated image come from.

    p = clamp(i * scale + offset, 0, size - 1) in float64;  k = floor(p);  w = float32(p - k)

    Args:
        size: rows of the input. count: rows that are written.

    Returns:
        k and min(k + 1, size - 1), int64 [count], and w, float32 [count], all on the CPU.
    """
    at = torch.arange(count, dtype=torch.float64, device="cpu")
    at = (at * scale + offset).clamp(0, size - 1)
    first = at.floor()
    return first.long(), (first.long() + 1).clamp(max=size - 1), (at - first).float()


def resize(x: Tensor, size: tuple[int, int], scale: tuple[float, float], offset: tuple[float, float]) -> Tensor:
    """Bilinear interpolation of a stream [N, H, W, C], float32 [N, *size, C]: x[k] * (1 - w) + x[k + 1] * w, every
    operation rounded to float32, along columns and then along rows.
    """
    y = x.float()
    for side in (1, 0):
        dim = 1 + side
        taps = resize_taps(y.shape[dim], size[side], scale[side], offset[side])
        first, second, weight = (part.to(x.device) for part in taps)
        weight = weight.view(-1, *[1] * (3 - dim))
        y = y.index_select(dim, first) * (1 - weight) + y.index_select(dim, second) * weight
    return y
