"""Ranges from data: mean squared error at a stated width, then norm statistics estimated again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lbs.cost import FULL_PRECISION_BITS
from lbs.quant import codec
from lbs.quant.layers import QuantLayer
from lbs.quant.quantizers import InputQuantizer
from lbs_kernels.errors import GraphError, PlanError

_CANDIDATES = 80
_SAMPLES = 65536


def calibrate(model: nn.Module, batches: Iterable[Tensor], bits: int | None = 4, norms: bool = True) -> nn.Module:
    """Set every range of a searchable, uniform or frozen model from data, in place, and return it.

    A range minimises the mean squared error at `bits` bits (4 suits a search that starts at 8 and ends near 4), or at
    each layer's own width if None. The network input covers its observed minimum and maximum. Then the norms'
    running statistics are estimated again with quantization on.

    Arguments:
        batches: input batches [N, C, H, W], used twice; a few hundred images do.

    Raises:
        PlanError: no batch, one without images, or a width outside 1..8. GraphError: no quantized layer; a batch the
            model cannot take; values that are not finite, a layer that is never called, or a signed activation in
            front of zero padding: the layer is named.
    """
    if isinstance(batches, Tensor):
        raise PlanError(f"calibrate got one tensor of shape {tuple(batches.shape)}; give a list of batches: [images]")
    if bits is not None:
        codec.check_chain((bits,))
    stored = [b[0] if isinstance(b, list | tuple) else b for b in batches]
    if not stored:
        raise PlanError("calibrate got no batch; give at least one batch of real inputs")
    empty = [index for index, batch in enumerate(stored) if not batch.numel()]
    if empty:
        raise PlanError(f"calibration batch {empty[0]} of shape {tuple(stored[empty[0]].shape)} is empty; leave it out")
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    if not found:
        raise GraphError(
            f"{type(model).__name__} has no quantized layer; make it with lbs.prepare or lbs.uniform first"
        )
    layers = {name: m for name, m in found.items() if m.w_bits < FULL_PRECISION_BITS}
    if not layers:
        return model  # every layer computes in float: the norms are as training left them
    samples = _observe(model, layers, stored)
    for name, layer in layers.items():
        values = samples[name]
        if not bool(values.isfinite().all()):
            raise GraphError(f"the input of {name} holds NaN or infinite values; check the data and the weights")
        _set_ranges(name, layer, values, bits)
    if norms:
        estimate_norms(model, stored)
    return model


def _observe(model: nn.Module, layers: dict[str, QuantLayer], batches: list[Tensor]) -> dict[str, Tensor]:
    """Inputs of every layer while the model computes in float, thinned to a bounded sample with its extremes."""
    collected: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = []
    share = max(1, _SAMPLES // len(batches))

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            flat = (args[0] if args else kwargs["input"]).detach().float().flatten()
            stride = _stride(flat.numel(), share)
            collected[name].append(torch.cat([flat[::stride], flat.amin()[None], flat.amax()[None]]))

        return record

    was_training = model.training
    model.eval()
    for name, layer in layers.items():
        layer.quantize = False
        handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    model(batch)
                except (RuntimeError, ValueError, TypeError) as error:
                    raise GraphError(_batch_message(model, batch, error)) from error
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.quantize = True
        model.train(was_training)
    unused = [name for name, values in collected.items() if not values]
    if unused:
        raise GraphError(f"layers {', '.join(unused)} were not called by the calibration batches; exclude them")
    return {name: torch.cat(values) for name, values in collected.items()}


def _batch_message(model: nn.Module, batch: Tensor, error: Exception) -> str:
    shape, dtype, device = tuple(batch.shape), batch.dtype, batch.device
    return (
        f"{type(model).__name__} failed on a calibration batch of shape {shape}, {dtype} on {device}: {error}; "
        "give batches [N, C, H, W] such as it is trained on, of its dtype and device"
    )


def _stride(count: int, share: int) -> int:
    """Distance between samples, without a common factor with `count`: a power of two would see one image column."""
    stride = max(1, count // share)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


@torch.no_grad()
def _set_ranges(name: str, layer: QuantLayer, values: Tensor, bits: int | None) -> None:
    layer.w_range.fill_(_best_range(layer.float_weight().flatten(), bits or layer.w_bits, "weight"))
    quantizer = layer.quantizer
    if isinstance(quantizer, InputQuantizer):
        quantizer.set_range(float(values.min()), float(values.max()))
        return
    if float(values.min()) < 0 and not quantizer.signed:
        if any(getattr(layer, "padding", (0,))):
            raise GraphError(
                f"{name} reads values down to {float(values.min()):.3g} and pads with zeros, but signed codes have no "
                "zero; put a ReLU before the layer or exclude it"
            )
        quantizer.signed = True
    kind = "signed" if quantizer.signed else "unsigned"
    best = _best_range(values, bits or quantizer.bits, kind)
    quantizer.set_range(-best if quantizer.signed else 0.0, best)


def _best_range(values: Tensor, bits: int, kind: str) -> float:
    """The clipping range with the least mean squared error among even shares of the largest magnitude."""
    top = values.abs().max()
    if not float(top) > 0:
        return 1.0
    errors = []
    shares = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES)
    for share in shares:
        v = top * share
        errors.append(((codec.round_trip(values, v, bits, kind) - values) ** 2).mean())
    return float(top * shares[int(torch.stack(errors).argmin())])


def estimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace every norm's running statistics by their mean over the batches, quantization as it is.

    Raises GraphError where the model fails on a batch, such as a single image at a norm of one pixel; statistics are
    then what they were.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    except Exception as error:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        raise GraphError(_batch_message(model, batch, error)) from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)
