"""`lbs.quantize`: a trained network and some images in, a packed network and a report out; no training, no labels."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbs import cost
from lbs.benchmark import PACKED, BenchReport, bench
from lbs.channels import ChannelGroup
from lbs.graph import ResidualStream, record_of
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.packing.pixels import Normalization
from lbs.plan import Plan
from lbs.quant.calibrate import calibrate, images_of
from lbs.quant.rounding import optimize
from lbs.reporting import units
from lbs.search import removal
from lbs.search.baselines import project_budget
from lbs.search.budget import Budget
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import FULL_BITS
from lbs.search.ledger import Ledger
from lbs.search.outcome import BudgetResult
from lbs.search.prepare import SearchConfig, at_widths, prepare, uniform
from lbs.search.quantities import Table
from lbs.search.streams import FLOAT
from lbs.traced import evaluating, run, tensors_of
from lbs.train.following import follow
from lbs.wrappers import unwrapped
from lbs_kernels.errors import DataError, GraphError, PlanError, ShapeError

CHAINS = ((4, 8), (2, 4, 8))  # widths a budget chooses from; two bits, which cost most, only where it needs them
# Share of the images that must keep their class. MobileNetV2 on 64 images: 91 % at 8 bits, which cost no top-1 accuracy
# on others; 75 % at 4/8, which cost 3 points.
LEAST_AGREEMENT = 0.8
MOST_ERROR = 0.2  # of what returns no classes, relative to the float outputs (12 % and 38 % there)
_KEPT = 256  # images taken of a loader
_ROUNDED = 1 << 23  # values of the images that rounding is optimised for, 64 at least: it holds all of them at once
_PLANNED = 32  # images that losses are measured on: one pass for each width of each layer
_TILE = 8  # filters that come and go together: kernels compute as many at a time, and more
_VALUES = 1 << 21  # of images computed at once: 13 images of 224 x 224

_log = logging.getLogger("lbs")


@dataclass(frozen=True)
class Fidelity:
    """How near the outputs of a network lie to those of its float original.

    agreement: share of the images whose largest output is the same one; None where outputs are no [N, classes].
    error: |difference| / |float outputs|, both as Euclidean norms over all images.
    """

    images: int
    agreement: float | None
    error: float

    @property
    def warning(self) -> str | None:
        """What a user must be told: under 80 % of the classes kept, or (of other outputs) over 20 % error."""
        if self.agreement is not None:
            low, told = self.agreement < LEAST_AGREEMENT, f"the class of {self.kept} of {self.images} images is kept"
            rule = f"at least {units.percent(LEAST_AGREEMENT)} are expected"
        else:
            low, told = not self.error <= MOST_ERROR, f"outputs are off by {units.percent(self.error)}"
            rule = f"at most {units.percent(MOST_ERROR)} is expected"
        return f"{told}, {rule}; allow more bits, give more images, or train it: lbs.prepare" if low else None

    @property
    def kept(self) -> int | None:
        """Images whose class is kept."""
        return None if self.agreement is None else round(self.agreement * self.images)


@dataclass(frozen=True)
class QuantizationReport:
    """What `lbs.quantize` did. Printing it gives a table.

    float_bytes, packed_bytes: parameters and buffers. bops: bit operations of one image in packed layers; float_bops:
    in layers that stay in float, at 32 x 32 bits; full_precision_bops: of all these layers at 32 x 32 bits. widths:
    (weight bits, activation bits, layers). unpacked: (name, reason) of what stays in float, or is never called.
    uncounted: of that, layers whose bit operations no formula counts. seconds: of each step. streams: residual ones,
    where streams of 8 bits were asked for. stream_dtype: what those that are floats are stored in.
    """

    model: str
    fidelity: Fidelity
    float_bytes: int
    packed_bytes: int
    bops: int
    float_bops: int
    full_precision_bops: int
    widths: tuple[tuple[int, int, int], ...]
    unpacked: tuple[tuple[str, str], ...]
    seconds: dict[str, float]
    uncounted: tuple[str, ...] = ()
    outcome: BudgetResult | None = None
    times: BenchReport | None = field(default=None, repr=False)
    streams: tuple[ResidualStream, ...] = ()
    stream_dtype: str = "float32"

    def rows(self) -> list[tuple[str, str]]:
        """The table's rows."""
        near, steps = self.fidelity, ", ".join(f"{step} {units.seconds(took)}" for step, took in self.seconds.items())
        rows = [] if self.outcome is None else [("budget", str(row)) for row in self.outcome.reached]
        if near.agreement is not None:
            rows.append(("same class", f"{near.kept} of {near.images} images ({units.percent(near.agreement)})"))
        rows += [
            ("output error", f"{units.percent(near.error)} of the float outputs on {near.images} images"),
            ("bytes", f"{units.size(self.packed_bytes)}, float {units.size(self.float_bytes)}"),
            ("bit operations", self._bit_operations()),
            ("layers", ", ".join(f"{count} at {w}/{a} bits" for w, a, count in self.widths)),
            *self._streams(),
            *(("not packed", f"{name}: {reason}{self._took(name)}") for name, reason in self.unpacked),
            ("seconds", steps),
        ]
        for row in () if self.times is None else self.times.rows:
            slower = f", packed is {units.times(1 / row.ratios[PACKED])} as fast" if row.contender != PACKED else ""
            rows.append(("one image", f"{row.contender} {units.seconds(row.median)}{slower}"))
        return rows

    def _streams(self) -> list[tuple[str, str]]:
        floats = [one for one in self.streams if one.reason]
        count = f"{len(self.streams) - len(floats)} of {len(self.streams)} residual ones are codes of 8 bits"
        left = [("stream in float", f"{one.name}: {one.reason}") for one in floats]
        stored = [] if self.stream_dtype == "float32" else [("streams", f"floats are stored in {self.stream_dtype}")]
        return stored + ([("streams", count), *left] if self.streams else [])

    def _bit_operations(self) -> str:
        told = units.bops(self.bops)
        if self.float_bops or self.uncounted:
            told = f"packed layers {told}; in float {units.bops(self.float_bops)}"
        told += f", the float network {units.bops(self.full_precision_bops)}"
        return told + (f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else "")

    def _took(self, name: str) -> str:
        """The share of a call, where one was timed, of what stays in float."""
        parts = () if self.times is None else self.times.parts
        shares = [part for part in parts if part.name == name and part.reason is not None]
        return f" ({units.seconds(shares[0].seconds)}, {units.percent(shares[0].share)} of a call)" if shares else ""

    def to_json(self) -> dict[str, Any]:
        """Numbers, in base units."""
        return {
            "model": self.model,
            "images": self.fidelity.images,
            "agreement": self.fidelity.agreement,
            "output_error": self.fidelity.error,
            "warning": self.fidelity.warning,
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "bops": self.bops,
            "float_bops": self.float_bops,
            "full_precision_bops": self.full_precision_bops,
            "uncounted": list(self.uncounted),
            "widths": [list(row) for row in self.widths],
            "unpacked": [list(row) for row in self.unpacked],
            "streams": [[one.name, one.reason] for one in self.streams],
            "stream_dtype": self.stream_dtype,
            "seconds": self.seconds,
            "bench": None if self.times is None else self.times.to_json(),
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.model}, packed", *(f"  {name:14s}  {value}" for name, value in self.rows())])


def quantize(
    model: nn.Module,
    images: Any,
    *,
    bits: int | tuple[int, int] | None = None,
    bops: float | None = None,
    size_mb: float | None = None,
    latency_ms: float | None = None,
    table: Table | None = None,
    rounding: Literal["nearest", "optimized"] = "nearest",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    exclude: tuple[str, ...] = (),
    streams: int = FLOAT,
    max_pruning_ratio: float = 0.0,
    distill: int = 0,
    measure: bool = False,
    progress: Callable[[str], None] = _log.info,
) -> PackedModel:
    """Pack a trained float network without training it; `report` of the result says how near to it that came.

    Convert, set ranges from the images, correct norms and biases for the rounding, pack, verify, and compare with the
    float network on the images. With a budget the width of every layer is chosen first, by how far the outputs move
    where it alone is narrower; then the float network is converted anew at these widths. Where filters may go as well,
    they are chosen alike, and what reads them is fitted to those that stay (`lbs/search/removal.py`).

    Arguments:
        model: as `lbs.uniform` takes it, in wrappers or not; it stays as it is. images: float32 [N, C, H, W], or
            [N, C, L], such as it is trained on, or bytes with `normalize`; a tensor, a list of batches, or a loader, of
            which the first 256 are taken. A batch may be a tuple or dictionary that holds images. A few hundred do;
            labels are not read.
        bits: of all layers but the first and the last: (weights, activations), or one number; 8 unless there is a
            budget. bops, size_mb, latency_ms, table: a budget, as in `lbs.Budget`; what `lbs tune` measured is the
            table `lbs.cost.Tuned()`.
        rounding: of weights of fewer than 8 bits, each to its nearest code, or so that layers compute on these images
            what they compute in float (`lbs/quant/rounding.py`; half a minute more for MobileNetV2 at 4 bits).
        normalize: see `lbs.pack`. exclude: name patterns left in float. streams: bits of what residual sums store until
            they add it: 8, or 32 for floats, on a GPU float16 where verification holds then (`stream_dtype` of
            `lbs.pack`; the report names it). max_pruning_ratio: share of a layer's filters that may go for the budget,
            in eighths. distill: epochs over the images, in which the quantized network is trained to return what the
            float one returns (`lbs/train/following.py`). measure: time one image beside float and uniform 8 bits.
            progress: is told what begins.

    Raises:
        ShapeError: images of several sizes, of another rank or dtype. DataError: no images, or values that are not
            finite. GraphError: as `lbs.uniform`, `lbs.calibrate` and `lbs.pack`. PlanError: bits and a budget at once,
            widths that do not exist, or a budget out of reach.

    Example:
        packed = lbs.quantize(model, loader, bops=0.03)
        print(packed.report)
    """
    pixels = None if normalize is None else Normalization.of(normalize)
    model = unwrapped(model)
    targets = {name: value for name, value in (("bops", bops), ("size_mb", size_mb)) if value is not None}
    if latency_ms is not None:
        targets["latency_ms"] = latency_ms
    if rounding not in ("nearest", "optimized"):
        raise PlanError(f"rounding={rounding!r} is unknown; use nearest or optimized")
    if max_pruning_ratio and not targets:
        raise PlanError(
            f"max_pruning_ratio={max_pruning_ratio:g}: filters go for a budget; name bops=, size_mb= or more"
        )
    if distill < 0:
        raise PlanError(f"distill={distill}; it counts epochs, from 0 on")
    if bits is not None and targets:
        raise PlanError(f"bits={bits!r} and a budget ({', '.join(targets)}) both name widths; leave one of them out")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    given = _batches(images, pixels, device, _ranks(model))
    floats = given if pixels is None else [pixels.values(batch).float() for batch in given]
    clock = _Clock(progress)
    outcome = None
    if targets:
        with clock.step("plan"):
            asked = SearchConfig(
                pruning=max_pruning_ratio > 0,
                group_size=1,
                filter_tile=_TILE,
                max_pruning_ratio=max_pruning_ratio,
                exclude=exclude,
            )
            plan, outcome = _planned(model, floats, asked, streams, table, targets)
        with clock.step("convert"):
            network = _converted(model, floats, asked, streams, plan)
    else:
        with clock.step("convert"):
            network = uniform(model, floats[0][:2], *_pair(bits), exclude=exclude, streams=streams)
    with clock.step("calibrate"):
        calibrate(network.eval(), floats, norms="correct" if rounding == "nearest" else "keep")
    if distill:
        with clock.step("distill"):
            teacher, _ = _plain(model, floats, SearchConfig(exclude=exclude))
            follow(network, teacher, floats, distill, record_of(network).plan.edges[-1])
    if rounding == "optimized":
        with clock.step("round"):
            rows = torch.cat(floats)
            optimize(network, rows[: max(64, _ROUNDED // rows[0].numel())])
    with clock.step("pack and verify"):
        packed = pack(network, example=given[0][:2], normalize=normalize)
    with clock.step("compare"):
        near = fidelity(model, packed, given)
    times = None
    if measure:
        with clock.step("measure"):
            times = bench(packed, batches=(1,), model=model, baselines=("float32", "uniform8"))
    packed.report = _report(model, network, packed, near, clock.seconds, outcome, times)
    if near.warning is not None:
        _log.warning("%s: %s", packed.name, near.warning)
    return packed


def fidelity(model: nn.Module, network: nn.Module, images: Any) -> Fidelity:
    """How near a quantized or packed network comes to its float original on images, labels aside.

    Arguments:
        model: the float network. network: what `lbs.calibrate`, `lbs.freeze` or `lbs.pack` made of it. images: as in
            `quantize`, of the dtype the network takes.

    Raises:
        ShapeError, DataError: as `quantize`. GraphError: float outputs that are not finite.
    """
    model, network = unwrapped(model), unwrapped(network)
    packed = network if isinstance(network, PackedModel) else None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    count, same, off, size = 0, 0, 0.0, 0.0
    classes = True
    with evaluating(model), evaluating(network):
        for batch in _batches(images, packed.normalize if packed else None, device, _ranks(model)):
            expected = run(model, packed.float_images(batch).float() if packed else batch)
            found = network(batch)
            count += len(batch)
            classes = classes and isinstance(expected, Tensor) and expected.dim() == 2 and expected.shape[1] > 1
            same += int((expected.argmax(1) == found.argmax(1)).sum()) if classes else 0
            parts = _squares(found, expected)
            off, size = off + float(parts[0]), size + float(parts[1])
    if not size < float("inf"):
        raise GraphError(
            f"{type(model).__name__} returns NaN or infinite values on the images; check its weights, and that images "
            "are normalised as it is trained"
        )
    return Fidelity(count, same / count if classes else None, (off / size) ** 0.5 if size else off**0.5)


def _squares(found: Any, expected: Any) -> tuple[Tensor, Tensor]:
    """Squared distance of all outputs, and what it is relative to."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    wide = [(one.double(), other.double()) for one, other in pairs]
    return (
        torch.stack([(one - other).square().sum() for one, other in wide]).sum(),
        torch.stack([other.square().sum() for _, other in wide]).sum(),
    )


def _distance(found: Any, expected: Any) -> Tensor:
    """Loss without labels: the relative squared distance of the outputs from those in float."""
    off, size = _squares(found, expected)
    return off / size if size else off


def _planned(
    model: nn.Module,
    floats: list[Tensor],
    config: SearchConfig,
    streams: int,
    table: Table | None,
    targets: dict[str, Any],
) -> tuple[Plan, BudgetResult]:
    """Widths and filters of every layer from measured losses, and what the budget reached."""
    for chain in CHAINS:
        searched = prepare(model, floats[0][:2], replace(config, bits=chain), streams)
        try:
            budget = Budget(searched, table=table, **targets)
            break
        except PlanError:  # out of reach
            if chain is CHAINS[-1]:
                raise
    if budget.ledger.widths:
        calibrate(searched.eval(), floats)
    chosen = list(torch.cat(floats)[:_PLANNED].split(len(floats[0])))
    with evaluating(model):
        pairs = [(batch, run(model, batch)) for batch in chosen]

    def filters(ledger: Ledger) -> None:
        plain, groups = _plain(model, floats, config)
        removal.measure(plain, groups, ledger, floats, _PLANNED, _distance)

    outcome = project_budget(budget, pairs, _distance, filters if budget.ledger.filters else None)
    return plan_of(searched), outcome


def _converted(model: nn.Module, floats: list[Tensor], config: SearchConfig, streams: int, plan: Plan) -> nn.Module:
    """The float network converted anew at the widths of a plan, and without the filters that it does not keep."""
    kept = {layer.name: layer.kept for layer in plan.layers if layer.kept is not None}
    if not kept:
        return at_widths(model, floats[0][:2], plan, config.exclude, streams)
    plain, groups = _plain(model, floats, config)
    compensated = removal.compensated(plain, groups, kept, floats)
    return removal.without_filters(compensated, floats[0][:2], config, plan, streams)


def _plain(model: nn.Module, floats: list[Tensor], config: SearchConfig) -> tuple[nn.Module, tuple[ChannelGroup, ...]]:
    """A copy of the float network in plain layers, as searchable ones are named, and its groups of channels."""
    copy = freeze(prepare(model, floats[0][:2], replace(config, bits=(FULL_BITS,), pruning=False)))
    return copy.eval(), record_of(copy).groups


def _pair(bits: int | tuple[int, int] | None) -> tuple[int, int]:
    pair = (8, 8) if bits is None else (bits, bits) if isinstance(bits, int) else tuple(bits)
    if len(pair) != 2:
        raise PlanError(f"bits={bits!r}; give one width, or (weights, activations) such as (4, 8)")
    return pair


# Images.


def _ranks(model: nn.Module) -> tuple[int, ...]:
    """Dimensions that a batch may have: 4, or 3 where a network of lines [N, C, L] takes it."""
    return (3, 4) if any(isinstance(m, nn.Conv1d | nn.ConvTranspose1d) for m in model.modules()) else (4,)


def _batches(images: Any, pixels: Normalization | None, device: torch.device, ranks: tuple[int, ...]) -> list[Tensor]:
    """Checked batches on the device, as the packed network is given them, small enough to be computed at once.

    Raises ShapeError, DataError.
    """
    found = list(_tensors(images))
    if not found:
        raise DataError("there are no images; give a tensor float32 [N, C, H, W], a list of batches or a loader")
    dtype = torch.float32 if pixels is None else torch.uint8
    first = found[0].shape[1:]
    for index, batch in enumerate(found):
        _check_batch(batch, index, dtype, ranks)
        if batch.shape[1:] != first:
            raise ShapeError(
                f"images of batch {index} are {list(batch.shape[1:])}, those of batch 0 {list(first)}; a packed "
                "network takes one size: resize or crop them to it"
            )
        bad = (~batch.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"images {bad[:5]} of batch {index} hold NaN or infinite values ({len(bad)} of {len(batch)} images); "
                "leave them out, or mend how they are read"
            )
    rows = max(1, _VALUES // max(first.numel(), 1))
    return [part.to(device) for batch in found for part in batch.split(rows) if len(part)]


def _check_batch(batch: Tensor, index: int, dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    if batch.dim() not in ranks:
        way = "images[None] makes one image a batch, torch.stack(images) several" if batch.dim() == 3 else "reshape it"
        raise ShapeError(f"batch {index} has shape {list(batch.shape)}; images are [N, C, H, W]: {way}")
    if not batch.numel():
        raise DataError(f"batch {index} of shape {list(batch.shape)} is empty; leave it out, or give images")
    if batch.dtype == dtype:
        return
    if dtype == torch.uint8:
        way = "give the bytes of images, or leave normalize= out and give normalised float32 images"
    elif batch.dtype == torch.uint8:
        way = "give normalize=(mean, std) of pixels scaled to 0..1, or normalise them: float32"
    else:
        way = "convert them with images.float()"
    raise ShapeError(f"images of batch {index} are {batch.dtype}, {dtype} is expected; {way}")


def _tensors(images: Any) -> Iterator[Tensor]:
    """The image tensor of every batch. A tuple is one batch, as loaders make them; a list holds batches."""
    if isinstance(images, Tensor | Mapping | tuple):
        images = [images]
    if not isinstance(images, Iterable):
        raise DataError(
            f"images are a {type(images).__name__}; give a tensor float32 [N, C, H, W], a list of batches or a loader"
        )
    count = 0
    for index, batch in enumerate(images):
        if count >= _KEPT and not isinstance(images, list):
            _log.info("the first %d images of the loader are used; give a list of batches to use more", count)
            return
        found = images_of(batch, index)
        yield found
        count += len(found) if found.dim() else 0


# The report.


class _Clock:
    """Says which step begins, and keeps how long each took."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.progress(name)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def _report(
    model: nn.Module,
    network: nn.Module,
    packed: PackedModel,
    near: Fidelity,
    seconds: dict[str, float],
    outcome: BudgetResult | None,
    times: BenchReport | None,
) -> QuantizationReport:
    record = record_of(network)
    plan, told = record.plan, dict(packed.kept_float)
    uncalled = tuple((name, reason) for name, reason in record.unconverted if name not in told)
    packed_layers = [layer for layer in plan.layers if layer.name not in told]
    unpacked_bops = sum(cost.bops(cost.full_precision(layer.problem())) for layer in plan.layers if layer.name in told)
    counted = {layer.name for layer in (*plan.layers, *record.in_float)}
    others = {name for name, module in network.named_modules() if name not in counted and _multiplies(module)}
    widths = Counter((layer.w_bits, layer.a_bits) for layer in packed_layers)
    return QuantizationReport(
        packed.name,
        near,
        _bytes(model),
        _bytes(packed),
        sum(plan.macs(layer) * layer.w_bits * layer.a_bits for layer in packed_layers),
        record.float_bops + unpacked_bops,
        plan.full_precision_bops() + record.float_bops,
        tuple((*pair, count) for pair, count in sorted(widths.items())),
        (*packed.kept_float, *uncalled),
        seconds,
        tuple(name for name in told if name in others),
        outcome,
        times,
        record.streams,
        packed.programs[0].stream_dtype,
    )


def _multiplies(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each counted once."""
    return sum(value.numel() * value.element_size() for value in {*model.parameters(), *model.buffers()})
