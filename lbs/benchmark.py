"""`lbs.bench`: a packed network against torch and against our own uniform 8 bits, in one process, interleaved.

Results are checked before anything is timed: a packed network must equal the reference bit for bit on random images.
Baselines compute in the memory format that suits them best (channels last), on inputs already converted; where the
packed network takes bytes, they are given the normalised floats of the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

from lbs.convolutions import plain_kind
from lbs.engines import ENGINES, EngineModels, why_not
from lbs.packing.model import PackedModel, need_packed
from lbs.packing.packing import pack
from lbs.packing.parts import PartRow, time_parts, told, torch_threads
from lbs.quant.calibrate import calibrate
from lbs.quant.deployed import undeploy
from lbs.quant.layers import QuantLayer
from lbs.run_folder import environment
from lbs.search.prepare import uniform
from lbs.search.replace import carry, layer_arguments, layer_options, replace_layer
from lbs.search.streams import take_quantizers_off
from lbs_kernels.errors import BackendError, LbsError, first_line
from lbs_kernels.times.stopwatch import SETTLE, Times, cuda_graph, interleave

PACKED = "packed"
# Name of the option -> name of the row. float32_folded: norms merged into the convolutions, as deployment tools do.
BASELINES = {
    "float32": "torch float32",
    "float32_folded": "torch float32, norms folded",
    "bfloat16": "torch bfloat16",
    "float16": "torch float16",
    "uniform8": "packed uniform 8-bit",
    **ENGINES,
}
DEFAULT_BASELINES = ("float32", "bfloat16", "onnxruntime8", "openvino8", "uniform8")
_CHECKED = 4  # images compared with the reference, which is slow
Call = Callable[[], object]


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
    """What was timed, where, and what could not be. Printing it gives a table."""

    device: str
    threads: int
    rows: tuple[BenchRow, ...]
    missing: dict[str, str]
    notes: tuple[str, ...] = ()
    first_call: bool = False  # times are of the first call after a pause, not of calls in a loop
    header: dict[str, Any] = field(default_factory=dict)
    kept_float: tuple[tuple[str, str], ...] = ()
    parts: tuple[PartRow, ...] = ()  # of the packed network where parts of it stay in float, at the first batch

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
        lines = [f"{self.device}, {self.threads} threads; images of random numbers; {calls}; median [p20 p80]"]
        for row in self.rows:
            times = f"{row.median * 1e3:9.3f} ms [{row.p20 * 1e3:.3f} {row.p80 * 1e3:.3f}]"
            ratios = ""
            if row.contender == PACKED:
                ratios = "  " + ", ".join(f"x{ratio:.2f} {name}" for name, ratio in row.ratios.items())
            lines.append(f"batch {row.batch:4d}  {row.contender:28s} {times}{ratios}")
        lines += [f"not timed: {name}: {reason}" for name, reason in self.missing.items()]
        where = [f"a call at batch {self.rows[0].batch}:"] if self.parts else []
        return "\n".join([*lines, *self.notes, *where, *told(self.parts, self.kept_float)])


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
) -> BenchReport:
    """Time a packed network against baselines of the same architecture.

    Args:
        packed: the network that is timed.
        batches: images per call. threads: for all contenders alike; torch's number unless given.
        model: the float network the packed one came from. A quantized one is turned into floats again, with the filters
            it has kept, which is noted. Without a model only the packed network is timed.
        baselines: of "float32", "float32_folded", "bfloat16", "float16", "uniform8", and on the CPU "onnxruntime",
            "onnxruntime8", "openvino", "openvino8" (post-training int8) where these are installed.
        rounds: measurements of each contender.
        first_call: on the CPU, time the first call after a pause, when threads sleep and caches are cold, instead of
            calls in a loop.
        uniform8: the network of that row, such as `lbs.quantize(model, images)` makes; unless it is given, `model` is
            packed at 8 bits with ranges of random images, which takes as long and is of no other use.

    Raises:
        LbsError: an unknown baseline, batches below 1, or first_call on a GPU. BackendError: a wrong packed result;
            nothing is timed.

    Example:
        print(lbs.bench(packed, model=float_model, threads=2))
    """
    need_packed(packed, "bench")
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise LbsError(f"unknown baselines {unknown}; there are {', '.join(BASELINES)}")
    if not batches or min(batches) < 1:
        raise LbsError(f"batches {list(batches)}; name at least one, and each is at least 1")
    missing: dict[str, str] = {}
    notes: list[str] = []
    device = packed.device
    if first_call and device.type != "cpu":
        raise LbsError(f"first_call is timed on the CPU; the network is on {device}. Leave it out, or move the network")
    rows: list[BenchRow] = []
    with torch_threads(threads) as count, torch.inference_mode(), _no_tf32():
        models = _models(packed, model, [name for name in baselines if name not in ENGINES], missing, notes, uniform8)
        engines = _engines(packed, model, baselines, missing)
        for batch in batches:
            images = packed.random_images(batch)
            floats = packed.float_images(images).float()  # what baselines are given, at no cost to them
            calls = {name: _call(contender, images, floats) for name, contender in models.items()}
            calls |= _engine_calls(engines, baselines, floats, count, missing)
            if device.type == "cuda":
                calls = {name: cuda_graph(call) for name, call in calls.items()}
            rows.extend(_rows(batch, interleave(calls, device=device, rounds=rounds, first_call=first_call)))
        header = environment()
        parts = time_parts(packed, packed.random_images(batches[0]), rounds) if packed.kept_float else ()
    name = str(header["gpu"] if device.type == "cuda" else header["cpu"])
    return BenchReport(name, count, tuple(rows), missing, tuple(notes), first_call, header, packed.kept_float, parts)


@contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _models(
    packed: PackedModel,
    model: nn.Module | None,
    baselines: Sequence[str],
    missing: dict[str, str],
    notes: list[str],
    uniform8: PackedModel | None,
) -> dict[str, nn.Module]:
    """Contenders by row name, every packed one checked."""
    models: dict[str, nn.Module] = {PACKED: packed}
    if model is None:
        missing.update((BASELINES[name], "no float network was given (model=)") for name in baselines)
        _check(packed)
        return models
    plain = _float_model(model, notes).to(packed.device).eval()
    for name in baselines:
        if name == "uniform8":
            models[BASELINES[name]] = uniform8 or _uniform8(plain, packed)
        else:
            models[BASELINES[name]] = _baseline(name, plain)
    for contender in models.values():
        if isinstance(contender, PackedModel):
            _check(contender)
    return models


def _float_model(model: nn.Module, notes: list[str]) -> nn.Module:
    """A copy in which quantized layers, and the norms and means around them, are torch's own again."""
    model = copy.deepcopy(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]
    for name, layer in layers:
        plain: Any = plain_kind(layer)(*layer_arguments(layer), **layer_options(layer))
        plain.weight = nn.Parameter(layer.quantized_weight().detach().clone())
        plain.bias = layer.bias
        carry(plain, layer)
        replace_layer(model, name, plain)
    take_quantizers_off(model)
    for module in model.modules():
        undeploy(module)
    if any(layer.kept is not None for _, layer in layers):
        notes.append("the float baselines have only the filters that were kept: the model given is already pruned")
    return model


def _baseline(name: str, model: nn.Module) -> nn.Module:
    if name == "float32_folded":
        model = optimization.fuse(model)
    dtype = torch.float32 if name.startswith("float32") else getattr(torch, name)
    return copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _uniform8(model: nn.Module, packed: PackedModel) -> PackedModel:
    with torch.inference_mode(False), torch.no_grad():
        images = packed.float_images(packed.random_images(8)).float()
        pixels = packed.normalize
        normalize = None if pixels is None else (pixels.mean, pixels.std)
        return pack(calibrate(uniform(model, images, 8, 8), [images]).eval(), normalize=normalize, verify=False)


def _engines(
    packed: PackedModel, model: nn.Module | None, baselines: Sequence[str], missing: dict[str, str]
) -> EngineModels | None:
    """The float network for the engines asked for; None where none of them can be timed."""
    asked = [name for name in baselines if name in ENGINES]
    for name in asked:
        reason = "no float network was given (model=)" if model is None else why_not(name)
        if packed.device.type != "cpu":
            reason = "timed on the CPU only"
        if reason is not None:
            missing[ENGINES[name]] = reason
    if model is None or all(ENGINES[name] in missing for name in asked):
        return None
    return EngineModels(_float_model(model, []), packed.input_shape)


def _engine_calls(
    engines: EngineModels | None, baselines: Sequence[str], images: Tensor, threads: int, missing: dict[str, str]
) -> dict[str, Call]:
    """Contenders of one batch. An engine that cannot run the network is listed as missing."""
    calls: dict[str, Call] = {}
    for name in baselines:
        if engines is None or name not in ENGINES or ENGINES[name] in missing:
            continue
        try:
            with torch.inference_mode(False), torch.no_grad():
                calls[ENGINES[name]] = engines.call(name, images.clone(), threads)
        except Exception as error:  # noqa: BLE001  whatever a foreign engine raises, the others are still timed
            missing[ENGINES[name]] = f"batch {len(images)}: {type(error).__name__}: {first_line(error)}"
    return calls


def _call(model: nn.Module, images: Tensor, floats: Tensor) -> Call:
    if isinstance(model, PackedModel):
        return lambda: model(images)
    dtype = next(iter(model.parameters())).dtype
    pixels = floats.dim() == 4
    ready = floats.to(dtype=dtype, memory_format=torch.channels_last if pixels else torch.preserve_format)
    return lambda: model(ready)


def _check(packed: PackedModel) -> None:
    """The network on its back end equals the reference on the first images, bit for bit."""
    images = packed.random_images(_CHECKED)
    output = packed(images)
    expected, _ = packed.run_traced(images, backend="reference")
    for one, other in zip(_flat(output), _flat(expected), strict=True):
        if not torch.equal(one, other):
            raise BackendError(
                f"{packed.name or 'the packed network'} differs from the reference by "
                f"{float((one - other).abs().max())}; a wrong result is not timed, run lbs.verify"
            )


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else list(value)
    return [tensor for item in items for tensor in _flat(item)]


def _rows(batch: int, times: dict[str, Times]) -> list[BenchRow]:
    rows = []
    for name, one in times.items():
        ratios = {other: one.ratio(times[other]) for other in times if other != name}
        rows.append(BenchRow(batch, name, one.median, one.p20, one.p80, ratios))
    return rows
