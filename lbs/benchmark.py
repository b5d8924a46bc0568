"""`lbs.bench`: a packed network against torch and against our own uniform 8 bits, in one process, interleaved.

Results are checked before anything is timed: a packed network must equal the reference bit for bit on random images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lbs.contenders import BASELINES, DEFAULT_BASELINES, FLOAT32, PACKED, UNIFORM8, Contenders
from lbs.layer_times import LayerTimes, layer_times
from lbs.packing.model import PackedModel, need_packed
from lbs.packing.parts import PartRow, time_parts, told, torch_threads
from lbs.run_folder import environment
from lbs_kernels.errors import LbsError, ShapeError
from lbs_kernels.times.stopwatch import SETTLE, Times, cuda_graph, interleave

PAYS = 1.03  # ratios nearer to 1 differ from run to run
LIMIT = 60.0  # seconds of timing a batch; fewer rounds then
_NAMED = 6  # layers in a line; all of them have their times in `layers`


@dataclass(frozen=True)
class BenchRow:
    """Seconds per batch of one contender. ratios: how many times faster than each other contender (median of pairs)."""

    batch: int
    contender: str
    median: float
    p20: float
    p80: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class BenchReport:
    """What was timed, where, and what could not be. Printing it gives one table of all contenders.

    images: how many real ones were looked at, 0 where random numbers were. accuracy: by contender, the share that it
    classifies as labelled; agreement: as torch's float32 does. bytes: of the file that is loaded, or of the parameters
    of a module of torch. layers: seconds by layer at the first batch. bits: lines that say whether fewer bits paid.
    """

    device: str
    threads: int
    rows: tuple[BenchRow, ...]
    missing: dict[str, str]
    notes: tuple[str, ...] = ()
    first_call: bool = False  # times are of the first call after a pause, not of calls in a loop
    header: dict[str, Any] = field(default_factory=dict)
    kept_float: tuple[tuple[str, str], ...] = ()
    parts: tuple[PartRow, ...] = ()  # of the packed network where parts of it stay in float, at the first batch
    images: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    layers: tuple[LayerTimes, ...] = ()
    bits: tuple[str, ...] = ()

    def ratio(self, baseline: str, batch: int) -> float:
        """How many times faster than `baseline` ("float32", ...) the packed network is.

        Raises:
            LbsError: it was not timed.
        """
        name = BASELINES.get(baseline, baseline)
        for row in self.rows:
            if row.contender == PACKED and row.batch == batch and name in row.ratios:
                return row.ratios[name]
        raise LbsError(f"{name} was not timed at batch {batch}: {self.missing.get(name, 'it was not asked for')}")

    def to_json(self) -> dict[str, Any]:
        """The schema of benchmarks/results, level `model`."""
        body = asdict(self)
        return {"version": 1, "level": "model", **body, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        calls = f"first call after {SETTLE * 1e3:.0f} ms of rest" if self.first_call else "calls in a loop"
        images = f"{self.images} images" if self.images else "images of random numbers"
        lines = [f"{self.device}, {self.threads} threads; {images}; {calls}; ms are medians [p20 p80]"]
        lines += _aligned(self._cells())
        lines += [f"not timed: {name}: {reason}" for name, reason in self.missing.items()]
        where = [f"a call at batch {self.rows[0].batch}:"] if self.parts else []
        return "\n".join([*lines, *self.bits, *self.notes, *where, *told(self.parts, self.kept_float)])

    def _cells(self) -> list[list[str]]:
        """A row per contender: right and as float where images were given, MB, and two cells for each batch."""
        batches = list(dict.fromkeys(row.batch for row in self.rows))
        names = list(dict.fromkeys(row.contender for row in self.rows))
        at = {(row.contender, row.batch): row for row in self.rows}
        shares = [(head, share) for head, share in (("right", self.accuracy), ("as float", self.agreement)) if share]
        table = [["", *(head for head, _ in shares), "MB"]]
        for batch in batches:
            table[0] += [f"batch {batch}: ms", "packed is"]
        for name in names:
            cells = [name, *(f"{share[name]:.2%}" if name in share else "-" for _, share in shares)]
            cells.append(f"{self.bytes[name] / 1e6:.3f}" if name in self.bytes else "-")
            for batch in batches:
                row, ratios = at.get((name, batch)), at[PACKED, batch].ratios
                cells.append(f"{row.median * 1e3:.3f} [{row.p20 * 1e3:.3f} {row.p80 * 1e3:.3f}]" if row else "-")
                cells.append(f"x{ratios[name]:.2f}" if name in ratios else "")
            table.append(cells)
        return table


def _aligned(table: list[list[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in table]
    return ["  ".join(row).rstrip() for row in cells]


def bench(
    packed: PackedModel,
    *,
    batches: Sequence[int] = (1, 64),
    threads: int | None = None,
    model: nn.Module | None = None,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    rounds: int = 30,
    first_call: bool = False,
    uniform8: PackedModel | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    calibration: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time a packed network against baselines of the same architecture, weigh them, and ask them for classes.

    Args:
        packed: the network that is timed.
        batches: images per call. threads: for all contenders alike; torch's number unless given.
        model: the float network the packed one came from. A quantized one is turned into floats again, with the filters
            it has kept, which is noted. Without a model only the packed network is timed.
        baselines: of "float32", "float32_folded", "bfloat16", "float16", "uniform8", and on the CPU "onnxruntime",
            "onnxruntime8", "openvino", "openvino8" (post-training int8) where these are installed.
        rounds: measurements of each contender; fewer, with a note, where those of a batch take more than a minute.
        first_call: on the CPU, time the first call after a pause, when threads sleep and caches are cold, instead of
            calls in a loop.
        uniform8: the network of that row, such as `lbs.quantize(model, images)` makes; unless it is given, `model` is
            packed at 8 bits with ranges of `calibration`.
        images: [N, C, H, W] as the packed network takes them, floats or bytes. The first are timed, each contender is
            asked for the classes of all. None: calls are timed on random numbers.
        labels: int64 [N], the classes of `images`.
        calibration: float32 [N, C, H, W], normalised; these set the ranges of 8 bits of the baselines. `images` do
            unless it is given, and random numbers where there are none.
        progress: is told each step as it begins, such as "time batch 64".

    Raises:
        LbsError: an unknown baseline, batches below 1, or first_call on a GPU. ShapeError: images the network was not
        packed for, or labels of another number. BackendError: a wrong packed result; nothing is timed.

    Example:
        print(lbs.bench(packed, model=float_model, threads=2))
    """
    need_packed(packed, "bench")
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise LbsError(f"unknown baselines {unknown}; there are {', '.join(BASELINES)}")
    if not batches or min(batches) < 1:
        raise LbsError(f"batches {list(batches)}; name at least one, and each is at least 1")
    device = packed.device
    if first_call and device.type != "cpu":
        raise LbsError(f"first_call is timed on the CPU; the network is on {device}. Leave it out, or move the network")
    images, ranges = _given(packed, images, labels, calibration)
    rows: list[BenchRow] = []
    made = rounds  # of the slowest batch
    said = progress or (lambda step: None)
    with torch_threads(threads) as count, torch.inference_mode(), _no_tf32():
        all_of_them = Contenders(packed, model, baselines, uniform8, ranges, said)
        for batch in batches:
            some = packed.random_images(batch) if images is None else images[torch.arange(batch) % len(images)]
            calls = all_of_them.calls(some, count)
            said(f"time batch {batch}")
            if device.type == "cuda":
                calls = {name: cuda_graph(call) for name, call in calls.items()}
            times = interleave(calls, device=device, rounds=rounds, limit=LIMIT, first_call=first_call)
            rows.extend(_rows(batch, times))
            made = min(made, len(times[PACKED].seconds))
            if made < rounds:
                all_of_them.notes.append(f"batch {batch}: {made} of {rounds} rounds were made in {LIMIT:.0f} s")
        if images is not None:
            said(f"classes of {len(images)} images")
        classes = {} if images is None else all_of_them.classes(images, max(batches), count)
        header = environment()
        said("time layers")
        first = packed.random_images(batches[0])
        parts = time_parts(packed, first, made) if packed.kept_float else ()
        named = ((name, all_of_them.network(name)) for name in (FLOAT32, UNIFORM8, PACKED))
        layers = layer_times({name: x for name, x in named if x is not None}, packed, first, count, made)
    name = str(header["gpu"] if device.type == "cuda" else header["cpu"])
    sizes = all_of_them.sizes(max(batches))
    return BenchReport(
        name, count, tuple(rows), all_of_them.missing, tuple(all_of_them.notes), first_call, header, packed.kept_float,
        parts, 0 if images is None else len(images), _shares(classes, labels), _shares(classes, classes.get(FLOAT32)),
        sizes, layers, bits_told(rows, sizes, layers, batches[0]),
    )  # fmt: skip


def _given(
    packed: PackedModel, images: Tensor | None, labels: Tensor | None, calibration: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Images on the device of the network, and normalised floats that set ranges."""
    if labels is not None and (images is None or len(labels) != len(images)):
        raise ShapeError(f"{len(labels)} labels for {0 if images is None else len(images)} images; give one for each")
    if images is not None:
        images = images.to(packed.device)
        packed.check_input(images)
        if not len(images):
            raise ShapeError("no images; give at least one, or None for random numbers")
    if calibration is None and images is not None:
        calibration = packed.float_images(images).float()
    return images, calibration


def _shares(classes: dict[str, Tensor], expected: Tensor | None) -> dict[str, float]:
    if expected is None:
        return {}
    return {name: float((found == expected.cpu()).double().mean()) for name, found in classes.items()}


def bits_told(
    rows: list[BenchRow], sizes: dict[str, int], layers: tuple[LayerTimes, ...], batch: int
) -> tuple[str, ...]:
    """Where the packed network is no faster than at 8 bits: as a whole, and by layer at the first batch."""
    lines = []
    ratios = {row.batch: row.ratios[UNIFORM8] for row in rows if row.contender == PACKED and UNIFORM8 in row.ratios}
    slow = [f"x{ratio:.2f} at batch {at}" for at, ratio in ratios.items() if ratio < PAYS]
    if slow:
        saved = (
            f" with {sizes[PACKED] / sizes[UNIFORM8]:.0%} of its bytes" if {PACKED, UNIFORM8} <= sizes.keys() else ""
        )
        lines.append(f"bits did not pay: against uniform 8-bit, packed is {', '.join(slow)}{saved}")
    fewer = [x for x in layers if 0 < x.w_bits < 8 and {PACKED, UNIFORM8} <= x.seconds.keys()]
    same = [x.name for x in fewer if x.seconds[UNIFORM8] < PAYS * x.seconds[PACKED]]
    if same:
        lines.append(
            f"layers of fewer bits that are no faster than at 8 (batch {batch}): {len(same)} of {len(fewer)}: "
            f"{', '.join(same[:_NAMED])}" + (", ..." if len(same) > _NAMED else "")
        )
    return tuple(lines)


@contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _rows(batch: int, times: dict[str, Times]) -> list[BenchRow]:
    rows = []
    for name, one in times.items():
        ratios = {other: one.ratio(times[other]) for other in times if other != name}
        rows.append(BenchRow(batch, name, one.median, one.p20, one.p80, ratios))
    return rows
