"""Ranges from data: least squared error at each layer's width, then norms and biases corrected for the rounding."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbs.cost import FULL_PRECISION_BITS
from lbs.quant import codec
from lbs.quant import norms as statistics
from lbs.quant.layers import QuantLayer, still
from lbs.quant.quantizers import ActivationQuantizer, InputQuantizer, StreamQuantizer
from lbs_kernels.errors import GraphError, LbsError, PlanError, raise_together
from lbs_kernels.program.steps import WeightGrid

_SHARES = 80  # of the largest magnitude, among which a range is looked for: every fifth, then between the best two
_SAMPLES = 65536
_COLUMNS = 1024  # weights of one filter that are looked at; its largest always counts
_FIRST_LOOK = 8192  # values that sort the candidates for a range around 0; the best of them see the whole sample
_FINALISTS = 8
_KEPT = 1024  # images of an iterator, which can be read once only
_IMAGES = ("pixel_values", "images", "image", "inputs", "input", "x", "img", "data")  # keys of a batch

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int | None = None,
    norms: bool | Literal["correct", "estimate", "keep"] = True,
) -> nn.Module:
    """Set every range of a searchable, uniform or frozen model from data, in place, and return it.

    A range minimises the mean squared error at the layer's own width, or at `bits`; a layer whose width is still
    searched is set at the middle one. Weights of 3 to 7 bits that are searched no more take the better of two grids;
    inputs with negative values get a code for 0 among them. The network input covers its observed minimum and maximum.
    Then norms and biases are corrected for what quantization does to their inputs (`lbs/quant/norms.py`): a network
    that nobody trains afterwards is as good as its codes allow.

    Arguments:
        model: as `lbs.prepare`, `lbs.uniform` or `lbs.freeze` return it. bits: the width of all ranges, 1 to 8, in
            place of each layer's own.
        batches: a loader or list of batches, read twice; a few hundred images do, and memory does not grow with more.
            A batch is images [N, C, H, W], or a tuple, list or dictionary that holds them (labels are not looked at).
            Of an iterator, which can be read once, the first 1,024 images are kept.
        norms: "correct" their statistics (True), "estimate" them anew (they then are those of these images alone), or
            "keep" them (False). Those that never saw a batch are estimated in float first.

    Raises:
        PlanError: no batch, one without images, or a width outside 1..8. GraphError: no quantized layer; a batch the
            model cannot take; values that are not finite, or layers that are never called: they are named.

    Example:
        lbs.calibrate(lbs.uniform(model, images[:1]), loader)
    """
    if isinstance(batches, Tensor):
        raise PlanError(f"calibrate got one tensor of shape {tuple(batches.shape)}; give a list of batches: [images]")
    how = ("correct" if norms else "keep") if isinstance(norms, bool) else norms
    if how not in ("correct", "estimate", "keep"):
        raise PlanError(f"norms={norms!r} is unknown; use correct, estimate or keep")
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

    if statistics.fresh(model):
        logger.info("norms that never saw a batch are estimated from the calibration images")
        with statistics.observing(model, layers.values()):
            statistics.estimate(model, stored, run)
    told: list[LbsError] = []
    streams = {name: m for name, m in model.named_modules() if isinstance(m, StreamQuantizer)}
    for name, values in _observe(model, {**layers, **streams}, stored, run).items():
        try:
            if not bool(values.isfinite().all()):
                raise GraphError(f"the input of {name} holds NaN or infinite values; check the data and the weights")
            if name in streams:
                _set_activation_range(streams[name], values, streams[name].bits)
            else:
                _set_ranges(layers[name], values, bits)
        except (GraphError, PlanError) as error:
            told.append(error)
    raise_together(told)
    if how == "correct":
        statistics.correct(model, layers.values(), stored, run)
    elif how == "estimate":
        statistics.estimate(model, stored, run)
    return model


def estimate_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace every norm's running statistics by their mean over the batches, quantization as it is.

    Raises GraphError where the model fails on a batch, such as a single image at a norm of one pixel; statistics are
    then what they were.
    """
    statistics.estimate(model, _Images(batches), _runner(model))


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
    model: nn.Module,
    watched: dict[str, QuantLayer | StreamQuantizer],
    batches: _Images,
    run: Callable[[Tensor], None],
) -> dict[str, Tensor]:
    """What layers and quantizers of streams read while the model computes in float, thinned to a bounded sample with
    its extremes.
    """
    layers = [one for one in watched.values() if isinstance(one, QuantLayer)]
    collected: dict[str, list[Tensor]] = {name: [] for name in watched}
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
    for name, layer in watched.items():
        handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        with (
            torch.no_grad(),
            still(model),
            statistics.observing(model, layers),
            statistics.in_torch_arithmetic(model),
        ):
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
def _set_ranges(layer: QuantLayer, values: Tensor, bits: int | None) -> None:
    w_bits, a_bits = (bits, bits) if bits is not None else layer.range_widths
    _set_weight_range(layer, w_bits)
    if not isinstance(layer.quantizer, StreamQuantizer):  # whose range is that of the stream
        _set_activation_range(layer.quantizer, values, a_bits)


@torch.no_grad()
def _set_activation_range(quantizer: ActivationQuantizer | InputQuantizer, values: Tensor, a_bits: int) -> None:
    low, high = float(values.min()), float(values.max())
    if isinstance(quantizer, InputQuantizer):
        quantizer.set_range(low, high)
    elif quantizer.signed or low >= 0:
        best, _ = _best_ranges(values[None], a_bits, codec.SIGNED if quantizer.signed else codec.UNSIGNED)
        quantizer.set_coding(float(best), 0)
    else:
        quantizer.set_coding(*_best_affine(values, a_bits, quantizer.zero_bits))


def _set_weight_range(layer: QuantLayer, bits: int) -> None:
    """Ranges on the grid that serves these weights best: both at 3 to 7 bits; fewer stay odd, 8 bits have a zero."""
    weights = layer.float_weight().flatten(1) if layer.w_range.dim() else layer.float_weight().reshape(1, -1)
    grids: tuple[WeightGrid, ...] = (layer.w_grid,)
    if not layer.searched and 2 < layer.w_bits < 8:
        grids = ("odd", "zero")
    found = {grid: _best_ranges(weights, bits, codec.WEIGHTS[grid]) for grid in grids}
    layer.w_grid = min(found, key=lambda grid: float(found[grid][1].sum()))
    layer.w_range.copy_(found[layer.w_grid][0].reshape(layer.w_range.shape))


def _best_ranges(values: Tensor, bits: int, coding: codec.Coding) -> tuple[Tensor, Tensor]:
    """For every row of values [R, K] the clipping range of least squared error, and that error [R], float32.

    Looked for among even shares of the row's largest magnitude; of weights, in a sample of every row. Rows go in parts,
    so that memory does not grow with their number.
    """
    columns = values.shape[1]
    step = _stride(columns, _COLUMNS) if coding.is_weight and columns > 2 * _COLUMNS else 1
    parts = max(1, (1 << 22) // max(1, columns // step))
    found = [_ranges_of_rows(part, part[:, ::step].float(), bits, coding) for part in values.split(parts)]
    return torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])


def _ranges_of_rows(rows: Tensor, sample: Tensor, bits: int, coding: codec.Coding) -> tuple[Tensor, Tensor]:
    top = rows.abs().amax(1, keepdim=True).float()
    top = torch.where(top > 0, top, torch.ones_like(top))

    def errors(shares: Tensor) -> Tensor:  # [S, R] of shares [S, R]
        tried = [top * share[:, None] for share in shares]
        return torch.stack([(codec.round_trip(sample, v, bits, coding) - sample).square_().mean(1) for v in tried])

    def best(shares: Tensor) -> tuple[Tensor, Tensor]:
        found = errors(shares)
        least = found.argmin(0, keepdim=True)
        return shares.gather(0, least)[0], found.gather(0, least)[0]

    coarse = torch.arange(5, _SHARES + 1, 5, dtype=torch.float32, device=rows.device) / _SHARES
    share, _ = best(coarse[:, None].expand(-1, len(rows)))
    near = torch.arange(-4, 5, dtype=torch.float32, device=rows.device) / _SHARES
    share, error = best((share + near[:, None]).clamp(1 / _SHARES, 1))
    return top[:, 0] * share, error


def _best_affine(values: Tensor, bits: int, zero_bits: int) -> tuple[float, int]:
    """(width of the range, code of 0 among `zero_bits` bits) of least squared error at `bits`, where some are negative.

    Both ends are drawn in together, or each by itself; where they are few against the rest, negative values are cut.
    Outliers are few and weigh much, so the whole sample has the last word.
    """
    n = codec.levels(zero_bits)
    low, high = -float(values.min()), max(0.0, float(values.max()))
    shares = [count / 20 for count in range(1, 21)]
    ends = [(low * share, high * share) for share in shares]
    ends += [(low * part / 4, high * share) for part in range(5) for share in shares]
    tried = sorted({codec.around_zero(a, b, n) for a, b in ends if a + b > 0})

    def errors(sample: Tensor, candidates: list[tuple[float, int]]) -> list[float]:
        codings = [(sample.new_tensor(v), codec.Coding("unsigned", zero, n)) for v, zero in candidates]
        return [float((codec.round_trip(sample, v, bits, c) - sample).square_().mean()) for v, c in codings]

    rough = errors(values[:: _stride(len(values), _FIRST_LOOK)], tried)
    finalists = [candidate for _, candidate in sorted(zip(rough, tried, strict=True))[:_FINALISTS]]
    finalists.append(codec.around_zero(low, high, n))
    return min(zip(errors(values, finalists), finalists, strict=True))[1]
