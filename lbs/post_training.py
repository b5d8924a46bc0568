"""`lbs.quantize`: a trained network and some images in, a packed network and a report out; no training, no labels."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbs.benchmark import bench
from lbs.graph import record_of
from lbs.image_batches import batches_of, ranks_of
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.packing.pixels import Normalization
from lbs.plan import Plan
from lbs.quant.calibrate import calibrate
from lbs.quant.rounding import optimize
from lbs.quantization_report import fidelity, report_of
from lbs.search import removal
from lbs.search.baselines import project_budget
from lbs.search.budget import Budget
from lbs.search.freeze import plan_of
from lbs.search.ledger import Ledger
from lbs.search.outcome import BudgetResult
from lbs.search.prepare import SearchConfig, at_widths, prepare, uniform
from lbs.search.quantities import Table
from lbs.search.streams import FLOAT
from lbs.traced import evaluating, run
from lbs.train.following import distance, follow
from lbs.wrappers import unwrapped
from lbs_kernels.errors import PlanError

CHAINS = ((4, 8), (2, 4, 8))  # widths a budget chooses from; two bits, which cost most, only where it needs them
_ROUNDED = 1 << 23  # values of the images that rounding is optimised for, 64 at least: it holds all of them at once
_PLANNED = 32  # images that losses are measured on: one pass for each width of each layer
_TILE = 8  # filters that come and go together: kernels compute as many at a time, and more

_log = logging.getLogger("lbs")


@torch.inference_mode(False)  # scales, weights and filters are learned, on tensors that may be written to
def quantize(
    model: nn.Module,
    images: Any,
    *,
    bits: int | tuple[int, ...] | None = None,
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
    they are chosen alike, and what reads them is fitted to those that stay (`lbs/search/readers.py`).

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
    given = batches_of(images, pixels, device, ranks_of(model))
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
            plan, outcome = _planned(model, floats, asked, streams, table, targets, progress)
        with clock.step("convert"):
            network = _converted(model, floats, asked, streams, plan)
    else:
        with clock.step("convert"):
            network = uniform(model, floats[0][:2], *_pair(bits), exclude=exclude, streams=streams)
    with clock.step("calibrate"):
        calibrate(network.eval(), floats, norms="correct" if rounding == "nearest" else "keep")
    if distill:
        with clock.step("distill"):
            teacher, _ = removal.plain(model, floats[0][:2], SearchConfig(exclude=exclude))
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
    packed.report = report_of(model, network, packed, near, clock.seconds, outcome, times)
    if near.warning is not None:
        _log.warning("%s: %s", packed.name, near.warning)
    return packed


def _planned(
    model: nn.Module,
    floats: list[Tensor],
    config: SearchConfig,
    streams: int,
    table: Table | None,
    targets: dict[str, Any],
    progress: Callable[[str], None],
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
        plain, groups = removal.plain(model, floats[0][:2], config)
        removal.measure(plain, groups, ledger, floats, _PLANNED, distance, lambda step: progress(f"plan: {step}"))
        progress("plan: losses of fewer bits")

    outcome = project_budget(budget, pairs, distance, filters if budget.ledger.filters else None)
    return plan_of(searched), outcome


def _converted(model: nn.Module, floats: list[Tensor], config: SearchConfig, streams: int, plan: Plan) -> nn.Module:
    """The float network converted anew at the widths of a plan, and without the filters that it does not keep."""
    kept = {layer.name: layer.kept for layer in plan.layers if layer.kept is not None}
    if not kept:
        return at_widths(model, floats[0][:2], plan, config.exclude, streams)
    plain, groups = removal.plain(model, floats[0][:2], config)
    compensated = removal.compensated(plain, groups, kept, floats)
    return removal.without_filters(compensated, floats[0][:2], config, plan, streams)


def _pair(bits: int | tuple[int, ...] | None) -> tuple[int, int]:
    given = (8,) if bits is None else (bits,) if isinstance(bits, int) else tuple(bits)
    if len(given) not in (1, 2):
        raise PlanError(f"bits={bits!r}; give one width, or those of weights and activations, such as bits=(4, 8)")
    return given[0], given[-1]


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
