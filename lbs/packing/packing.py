"""`pack`: from a quantized model to a PackedModel, verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lbs.packing.checks import check_calibrated, quantized_layers
from lbs.packing.graph_json import unsaved
from lbs.packing.lower import lower
from lbs.packing.model import PackedModel
from lbs.packing.outer import outer_graph
from lbs.packing.pixels import Normalization
from lbs.packing.tracing import trace_model
from lbs.packing.verify import verify as compare
from lbs.packing.verify_report import VerifyReport
from lbs.quant.layers import still
from lbs.wrappers import unwrapped
from lbs_kernels.errors import FormatError, GraphError
from lbs_kernels.program.steps import STREAM_DTYPES

_log = logging.getLogger("lbs")


def pack(
    model: nn.Module,
    *,
    example: Tensor | None = None,
    stream_dtype: str | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    verify: bool = True,
    fallback: str | None = None,
) -> PackedModel:
    """Pack a quantized model: weights into bit-planes, norms into the epilogue, layers into one program per region.

    The model is read as it computes in evaluation mode, and stays as it is. Layers that cannot be packed remain float
    modules; they are logged and listed in `kept_float`.

    Args:
        model: made by `lbs.freeze` or `lbs.uniform`.
        example: images [N, C, H, W] (or lines [N, C, L], float32 only) such as the packed model is given, float32, or
            uint8 with `normalize`; needed where the model carries no record of its input shape. Verification uses it.
        stream_dtype: what residual streams are stored in: "float32", "float16" or "bfloat16". By default float32; for a
            model on a GPU float16, half of the memory its kernels wait for, if verification holds then.
        normalize: (mean, std) per channel of pixels scaled to 0..1, as torchvision's Normalize takes them. The packed
            model is then given the bytes of images, uint8 [N, C, H, W], and no float image is stored.
        fallback: see `lbs.load`.
        verify: compare a few images (the example, or random ones) layer by layer with the float64 evaluation.

    Returns:
        PackedModel on the model's device.

    Raises:
        GraphError: still searchable, never calibrated, nothing to pack, untraceable, a trace that computes something
            else than the model itself, values that are not finite, signed activations that are padded with zeros, bytes
            that a float part would read, or a verification that failed (the layer is named). FormatError: an
            accumulator that could overflow, or means and deviations that are not finite and positive. ShapeError: an
            example of another form, or another number of channels.

    Example:
        packed = lbs.pack(lbs.freeze(model))
        packed.save("network.lbs.safetensors")
        logits = packed(images)
    """
    if stream_dtype is not None and stream_dtype not in STREAM_DTYPES:
        raise FormatError(f"stream_dtype is {stream_dtype!r}; choose one of {', '.join(STREAM_DTYPES)}")
    model = unwrapped(model)
    check_calibrated(quantized_layers(model))
    pixels = None if normalize is None else Normalization.of(normalize)
    floats = example if example is None or pixels is None else pixels.values(example[:2]).float()
    with still(model):
        packed = _in_half(model, example, floats, pixels, fallback) if stream_dtype is None and verify else None
        verify = verify and packed is None  # it was
        packed = packed or _packed(model, floats, stream_dtype or "float32", pixels)
        packed.fallback = fallback
        _tell_kept(packed.name, packed.kept_float)
        for label, reason in unsaved(packed.body).items():
            _log.warning("%s: the packed model cannot be saved: %s %s", packed.name, label, reason)
        if verify:
            _verify(model, packed, example)
    return packed


def _in_half(
    model: nn.Module, example: Tensor | None, floats: Tensor | None, pixels: Normalization | None, fallback: str | None
) -> PackedModel | None:
    """A model on a GPU with streams in float16, verified as it will run; None on a processor, or where a value does not
    fit them.
    """
    if not _on_gpu(model):
        return None
    packed = _packed(model, floats, "float16", pixels)
    packed.fallback = fallback
    report = _report(model, packed, example)
    if report.ok:
        _log.info('%s: streams are stored in float16, the default on a GPU; or stream_dtype="float32"', packed.name)
    else:
        _log.warning("%s: streams stay in float32, as in float16 %s", packed.name, report.first_difference)
    return packed if report.ok else None


def _on_gpu(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def _packed(model: nn.Module, floats: Tensor | None, stream_dtype: str, pixels: Normalization | None) -> PackedModel:
    graph, shape = trace_model(model, floats)
    if pixels is not None:
        pixels.check_channels(shape[0])
    lowered = lower(graph, stream_dtype, None if pixels is None else pixels.affine)
    record = getattr(model, "lbs_record", None)
    left_out = dict(record.unconverted) if record is not None else {}  # layers that were never quantized, and why
    device = next(iter(model.parameters())).device
    return PackedModel(
        outer_graph(graph, lowered),
        input_shape=shape,
        kept_float=tuple((label, left_out.get(label, reason)) for label, reason in lowered.kept_float),
        plan=record.plan if record is not None else None,
        name=type(model).__name__,
        normalize=pixels,
    ).to(device)


def _tell_kept(name: str, kept: tuple[tuple[str, str], ...]) -> None:
    """One line for each reason, not for each of the hundreds of operations that may share it."""
    by_reason: dict[str, list[str]] = {}
    for label, reason in kept:
        by_reason.setdefault(reason, []).append(label)
    for reason, labels in by_reason.items():
        listed = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
        _log.warning("%s: %s %s in float: %s", name, listed, "stays" if len(labels) == 1 else "stay", reason)


def _report(model: nn.Module, packed: PackedModel, example: Tensor | None) -> VerifyReport:
    if example is None:
        example = packed.random_images(2, torch.Generator().manual_seed(0))
    return compare(model, packed, example[:4].to(packed.device))


def _verify(model: nn.Module, packed: PackedModel, example: Tensor | None) -> None:
    report = _report(model, packed, example)
    if not report.ok:
        raise GraphError(f"the packed model does not equal the model: {report.first_difference}\n{report}")
