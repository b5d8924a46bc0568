"""How near a quantized network comes to its float original, and the report of `lbs.quantize`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lbs import cost
from lbs.benchmark import PACKED, BenchReport
from lbs.graph import ResidualStream, record_of
from lbs.image_batches import batches_of, ranks_of
from lbs.packing.model import PackedModel
from lbs.reporting import units
from lbs.search.outcome import BudgetResult
from lbs.traced import evaluating, run
from lbs.train.following import distances
from lbs.wrappers import unwrapped
from lbs_kernels.errors import GraphError

# Share of the images that must keep their class. MobileNetV2 on 64 images: 91 % at 8 bits, which cost no top-1 accuracy
# on others; 75 % at 4/8, which cost 3 points.
LEAST_AGREEMENT = 0.8
MOST_ERROR = 0.2  # of what returns no classes, relative to the float outputs (12 % and 38 % there)


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
        for batch in batches_of(images, packed.normalize if packed else None, device, ranks_of(model)):
            expected = run(model, packed.float_images(batch).float() if packed else batch)
            found = network(batch)
            count += len(batch)
            classes = classes and isinstance(expected, Tensor) and expected.dim() == 2 and expected.shape[1] > 1
            same += int((expected.argmax(1) == found.argmax(1)).sum()) if classes else 0
            parts = distances(found, expected)
            off, size = off + float(parts[0]), size + float(parts[1])
    if not size < float("inf"):
        raise GraphError(
            f"{type(model).__name__} returns NaN or infinite values on the images; check its weights, and that images "
            "are normalised as it is trained"
        )
    return Fidelity(count, same / count if classes else None, (off / size) ** 0.5 if size else off**0.5)


def report_of(
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
