"""Ranges from data: least squared error at each layer's width, then norms and biases corrected for the rounding."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbs.cost import FULL_PRECISION_BITS
from lbs.quant import codec, norms
from lbs.quant.layers import QuantLayer
from lbs.quant.quantizers import InputQuantizer
from lbs_kernels.errors import GraphError, LbsError, PlanError, raise_together

_CANDIDATES = 80
_SAMPLES = 65536
_KEPT = 1024  # images of an iterator, which can be read once only
_IMAGES = ("pixel_values", "images", "image", "inputs", "input", "x", "img", "data")  # keys of a batch

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int | None = None,
    statistics: Literal["correct", "estimate", "keep"] = "correct",
) -> nn.Module:
    """Set every range of a searchable, uniform or frozen model from data, in place, and return it.

    A range minimises the mean squared error at the layer's own width, or at `bits`; a layer whose width is still
    searched is set at the middle one. The network input covers its observed minimum and maximum. Then norms and biases
    are corrected for what quantization does to their inputs (`lbs/quant/norms.py`): a network that nobody trains
    afterwards is as good as its codes allow.

    Arguments:
        batches: a loader or list of batches, read twice; a few hundred images do, and memory does not grow with more.
            A batch is images [N, C, H, W], or a tuple, list or dictionary that holds them (labels are not looked at).
            Of an iterator, which can be read once, the first 1,024 images are kept.
        statistics: "correct" them, "estimate" them anew (they then are those of these images alone), or "keep" them.
            Those that never saw a batch are estimated in float first.

    Raises:
        PlanError: no batch, one without images, or a width outside 1..8. GraphError: no quantized layer; a batch the
            model cannot take; values that are not finite, a layer that is never called, or a signed activation in
            front of zero padding: the layer is named.

    Example:
        lbs.calibrate(lbs.uniform(model, images[:1]), loader)
    """
    if isinstance(batches, Tensor):
        raise PlanError(f"calibrate got one tensor of shape {tuple(batches.shape)}; give a list of batches: [images]")
    if statistics not in ("correct", "estimate", "keep"):
        raise PlanError(f"statistics={statistics!r} is unknown; use correct, estimate or keep")
    if bits is not None:
        codec.check_chain((bits,))
    stored = _Images(batches)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    if not found:
        raise GraphError(
            f"{type(model).__name__} has no quantized layer; make it with lbs.prepare or lbs.uniform first"
        )
    layers = {name: m for name, m in found.items() if m.w_bits < FULL_PRECISION_BITS}
    if not layers:
        return model  # every layer computes in float: the norms are as training left them
    run = _runner(model)

    if norms.fresh(model):
        logger.info("norms that never saw a batch are estimated from the calibration images")
        with norms.observing(layers.values()):
            norms.estimate(model, stored, run)
    told: list[LbsError] = []
    for name, values in _observe(model, layers, stored, run).items():
        try:
            if not bool(values.isfinite().all()):
                raise GraphError(f"the input of {name} holds NaN or infinite values; check the data and the weights")
            _set_ranges(name, layers[name], values, bits)
        except (GraphError, PlanError) as error:
            told.append(error)
    raise_together(told)
    if statistics == "correct":
        norms.correct(model, layers.values(), stored, run)
    elif statistics == "estimate":
        norms.estimate(model, stored, run)
    return model


def estimate_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace every norm's running statistics by their mean over the batches, quantization as it is.

    Raises GraphError where the model fails on a batch, such as a single image at a norm of one pixel; statistics are
    then what they were.
    """
    norms.estimate(model, _Images(batches), _runner(model))


def _runner(model: nn.Module) -> Callable[[Tensor], None]:
    """Runs one batch, and tells in words what the model cannot take."""

    def run(batch: Tensor) -> None:
        try:
            model(batch)
        except (RuntimeError, ValueError, TypeError) as error:
            shape, dtype, device = tuple(batch.shape), batch.dtype, batch.device
            raise GraphError(
                f"{type(model).__name__} failed on a calibration batch of shape {shape}, {dtype} on {device}: {error}; "
                "give batches [N, C, H, W] such as it is trained on, of its dtype and device"
            ) from error

    return run


class _Images:
    """The images of batches, as often as they are asked for."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator):
            batches = self._first(batches)
        self.batches = batches
        self.expected = len(batches) if isinstance(batches, Sized) else 64
        if self.expected == 0:
            raise PlanError("calibrate got no batch; give at least one batch of real inputs")

    @staticmethod
    def _first(batches: Iterator[Any]) -> list[Any]:
        kept, count = [], 0
        for index, batch in enumerate(batches):
            if count >= _KEPT:
                logger.warning(
                    "calibrate got an iterator, which can be read once: its first %d images are used; give a list or "
                    "a loader to use all",
                    count,
                )
                break
            kept.append(batch)
            count += len(images_of(batch, index))
        return kept

    def __iter__(self) -> Iterator[Tensor]:
        read = False
        for index, batch in enumerate(self.batches):
            images = images_of(batch, index)
            if not images.numel():
                raise PlanError(f"calibration batch {index} of shape {tuple(images.shape)} is empty; leave it out")
            read = True
            yield images
        if not read:
            raise PlanError("calibrate got no batch; give at least one batch of real inputs")


def images_of(batch: Any, index: int) -> Tensor:
    """The images of one batch: a tensor, the first of a tuple or list, or by its key in a dictionary.

    Raises:
        PlanError: there are none.
    """
    found = batch
    while not isinstance(found, Tensor):
        if isinstance(found, list | tuple) and found:
            found = found[0]
        elif isinstance(found, Mapping) and (keys := [key for key in _IMAGES if key in found]):
            found = found[keys[0]]
        else:
            what = f"keys {', '.join(map(repr, found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
            raise PlanError(
                f"calibration batch {index} holds {what}; give images [N, C, H, W], a tuple or list that begins with "
                f"them, or a dictionary with one of the keys {', '.join(_IMAGES)}"
            )
    return found


def _observe(
    model: nn.Module, layers: dict[str, QuantLayer], batches: _Images, run: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Inputs of every layer while the model computes in float, thinned to a bounded sample with its extremes."""
    collected: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = []
    share = max(64, _SAMPLES // batches.expected)

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            flat = (args[0] if args else kwargs["input"]).detach().float().flatten()
            stride = _stride(flat.numel(), share)
            collected[name].append(torch.cat([flat[::stride], flat.amin()[None], flat.amax()[None]]))
            if sum(map(len, collected[name])) > 4 * _SAMPLES:  # many batches: the sample stays bounded
                collected[name] = [_thinned(torch.cat(collected[name]))]

        return record

    was_training = model.training
    model.eval()
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        with torch.no_grad(), norms.observing(layers.values()):
            for batch in batches:
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    unused = [name for name, values in collected.items() if not values]
    if unused:
        raise GraphError(f"layers {', '.join(unused)} were not called by the calibration batches; exclude them")
    return {name: torch.cat(values) for name, values in collected.items()}


def _thinned(values: Tensor) -> Tensor:
    """Every so many values, and the extremes."""
    return torch.cat([values[:: _stride(len(values), _SAMPLES)], values.amin()[None], values.amax()[None]])


def _stride(count: int, share: int) -> int:
    """Distance between samples, without a common factor with `count`: a power of two would see one image column."""
    stride = max(1, count // share)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


@torch.no_grad()
def _set_ranges(name: str, layer: QuantLayer, values: Tensor, bits: int | None) -> None:
    w_bits, a_bits = (bits, bits) if bits is not None else layer.range_widths
    weights = layer.float_weight().flatten(1) if layer.w_range.dim() else layer.float_weight().reshape(1, -1)
    layer.w_range.copy_(_best_ranges(weights, w_bits, "weight").reshape(layer.w_range.shape))
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
    best = float(_best_ranges(values[None], a_bits, kind))
    quantizer.set_range(-best if quantizer.signed else 0.0, best)


def _best_ranges(values: Tensor, bits: int, kind: str) -> Tensor:
    """For every row the clipping range with the least mean squared error among even shares of its largest magnitude."""
    top = values.abs().amax(1, keepdim=True)
    top = torch.where(top > 0, top, torch.ones_like(top))
    shares = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES, dtype=torch.float32)
    errors = [((codec.round_trip(values, top * share, bits, kind) - values) ** 2).mean(1) for share in shares]
    return top[:, 0] * shares.to(top.device)[torch.stack(errors).argmin(0)]
