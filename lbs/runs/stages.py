"""What happens to a run after training: pack, verify, bench. Each stage writes its section of results.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lbs
import lbs.data
from lbs.contenders import PACKED as PACKED_ROW
from lbs.contenders import UNIFORM8 as UNIFORM8_ROW
from lbs.cost.latency import fastest, surroundings
from lbs.packing.explain import estimated_call, streams_of, streams_of_codes
from lbs.packing.model import PackedModel
from lbs.packing.parts import time_call, torch_threads
from lbs.run_folder import RunFolder, read_sections
from lbs.runs import network
from lbs.runs.bench_images import of_data
from lbs.runs.packed import PACKED, Source, of_run
from lbs.runs.session import one_writer
from lbs.search.streams import FLOAT
from lbs_kernels.device import default_threads
from lbs_kernels.errors import CheckpointError, DataError, GraphError, LbsError, TrainingError
from lbs_kernels.times.table import kind

UNIFORM8 = "uniform8.lbs.safetensors"
_EXAMPLES = 4
_BATCH = 256
_IMAGES = ("images", "labels", "calibration")  # arguments of lbs.bench


@one_writer
def pack_run(folder: RunFolder, stream_dtype: str = "float32", uint8: bool = False) -> dict[str, Any]:
    """Pack the network of a run into packed.lbs.safetensors; a few test images check it layer by layer.

    `uint8`: it takes the bytes of images and normalises them as the data of the run was.
    """
    started = time.monotonic()
    model, card = network.load_network(folder)
    if network.plan_of_run(folder).in_float:
        raise GraphError(
            f"{folder.path} holds a float network: its search cut filters and no bits. There is nothing to pack; "
            "search bits too, in a new run with mode=joint or mode=two-stage"
        )
    target = _processor_target(folder)
    data = network.images_of(card)
    normalize = (data.mean, data.std) if uint8 else None
    pixels, _ = lbs.data.pixels_at(data, torch.arange(min(_EXAMPLES, data.test_count)))
    images = _served(data, pixels, uint8)
    packed = lbs.pack(model, example=images, stream_dtype=stream_dtype, normalize=normalize)
    path = folder.file(PACKED)
    packed.save(path)
    section = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "packed_bytes": packed.packed_bytes,
        "stream_dtype": stream_dtype,
        "coded_streams": [name for program in packed.programs for name in streams_of_codes(program)],
        "input_dtype": str(packed.input_dtype).removeprefix("torch."),
        "kept_float": [list(row) for row in packed.kept_float],
        "seconds": time.monotonic() - started,
    }
    if target is not None:
        section["latency"] = {"target": target, **_latency(packed)}
    folder.add_result("pack", section, stale=("verify", "bench"))
    return section


def _processor_target(folder: RunFolder) -> float | None:
    """Seconds of a call that the search of the run was to reach on the processor; None where it had no such target.

    Raises CheckpointError for a configuration that holds something else there.
    """
    path = folder.file("config.json")
    search = read_sections(path).get("search", {})
    target, device = search.get("latency_ms"), search.get("latency_device")
    if not target:
        return None
    if type(target) not in (int, float) or not 0 < target < float("inf") or not isinstance(device, str):
        raise CheckpointError(
            f"{path}, section search: latency_ms is {target!r} and latency_device {device!r}, where a positive number "
            "and a text are expected; restore the file"
        )
    return float(target) / 1e3 if kind(device) == "cpu" else None


def _latency(packed: PackedModel) -> dict[str, Any]:
    """Seconds that a call at batch 1 takes, and that a budget of milliseconds counts it to take, on this processor."""
    plan = packed.plan
    around = {} if plan is None else surroundings(plan.whole_problems(), streams=streams_of(packed))
    threads = fastest(around) if around else default_threads()
    with torch_threads(threads):
        measured = time_call(packed, packed.random_images(1)).p20
    return {"threads": threads, "measured": measured, "estimated": estimated_call(packed, 1, threads)}


@one_writer
def verify_run(folder: RunFolder, images: int = 64, strict: bool = False, budget: float | None = 1.0) -> dict[str, Any]:
    """Compare the saved file with the trained network: every code on `images` test images, every prediction on all.

    An image whose prediction differs is compared code by code too: it is excused only where all that differs lies on a
    rounding boundary, and never if `strict`. `budget`: of the file, as for `lbs.load`.
    """
    if images < 1:
        raise LbsError(f"{images} images to compare code by code; give images=1 or more")
    started = time.monotonic()
    model, card = network.load_network(folder)
    packed = of_run(folder, with_float=False, budget=budget).packed
    data = network.images_of(card)
    spread = torch.linspace(
        0, data.test_count - 1, min(images, data.test_count), dtype=torch.float32
    ).long()  # over the whole set
    bytes_in = packed.normalize is not None
    report = lbs.verify(model, packed, _served(data, lbs.data.pixels_at(data, spread)[0], bytes_in))
    trained, served, labels, differing, identical = _predictions(model, packed, data)
    places = (trained != served).nonzero().flatten()
    excused = True
    if len(places):
        excused = not strict and lbs.verify(model, packed, _served(data, differing, bytes_in)).ok
    section = {
        "images": len(labels),
        "equal_predictions": len(labels) - len(places),
        "identical_outputs": identical,  # bit for bit
        "differing_images": places.tolist(),
        "packed_accuracy": float((served == labels).double().mean()),
        "trained_accuracy": float((trained == labels).double().mean()),
        "codes": report.codes,
        "codes_on_boundary": report.near_boundary,
        "first_difference": report.first_difference,
        "passed": report.ok and excused,
        "seconds": time.monotonic() - started,
    }
    folder.add_result("verify", section)
    return section


@one_writer
def uniform8_run(
    folder: RunFolder, images: list[Tensor], budget: float | None = 1.0, streams: int = FLOAT
) -> dict[str, Any]:
    """The float network of a run at 8 bits in every layer, with all its filters: what a search is to beat.

    images: batches of training images, float32 [N, C, H, W]; they and `streams` are for `lbs.quantize`. budget: as for
        `verify_run`.
    """
    started = time.monotonic()
    source, card = of_run(folder, budget=budget), network.NetworkCard.read(folder)
    if source.float_model is None:
        raise CheckpointError(f"{folder.path} holds no float network; search there with float_epochs or weights")
    packed = lbs.quantize(source.float_model, images, streams=streams)
    path = folder.file(UNIFORM8)
    packed.save(path)
    _, served, labels, _, _ = _predictions(source.float_model, packed, network.images_of(card))
    section = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "accuracy": float((served == labels).double().mean()),
        "seconds": time.monotonic() - started,
    }
    folder.add_result("uniform8", section)
    return section


@one_writer
def bench_run(
    folder: RunFolder,
    say: Callable[[str], None],
    source: Source | None = None,
    budget: float | None = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Time the packed network of a run against its float network and others, options as `lbs.bench`.

    The network of `uniform8_run` is taken where there is one. All are asked for test images of the run's data unless
    `images` are given, or where that is not there any more, which is said. `budget`: of the files, as for `lbs.load`.
    `of_bits` of the section: by batch, how many times faster than the same filters at 8 bits the packed network is.
    """
    source = source or of_run(folder, budget=budget)
    packed, device = source.packed, source.packed.device
    if "images" not in options:
        try:
            options |= of_data(network.images_of(network.NetworkCard.read(folder)), packed).options()
        except (DataError, TrainingError) as error:
            say(f"images of random numbers, and no accuracies: {error}")
    even = lbs.load(folder.file(UNIFORM8), str(device), budget=budget) if "uniform8" in folder.results() else None
    timed = lbs.bench(packed, model=source.float_model, uniform8=even, **options)
    say(str(timed))
    section = timed.to_json()
    if UNIFORM8_ROW in timed.bytes:
        alone = {key: value for key, value in options.items() if key not in (*_IMAGES, "baselines")}
        kept = lbs.bench(packed, model=network.load_network(folder)[0], baselines=("uniform8",), **alone)
        ratios = {row.batch: row.ratios[UNIFORM8_ROW] for row in kept.rows if row.contender == PACKED_ROW}
        section["of_bits"] = {str(batch): ratio for batch, ratio in ratios.items()}
    folder.add_result("bench", section)
    return section


def _served(data: lbs.data.ImageSet, pixels: Tensor, uint8: bool) -> Tensor:
    """uint8 [N, H, W, C] as a packed network is given them: [N, C, H, W], channels last in memory."""
    return pixels.permute(0, 3, 1, 2) if uint8 else lbs.data.normalize(pixels, data.mean, data.std)


@torch.inference_mode()
def _predictions(
    model: nn.Module, packed: PackedModel, data: lbs.data.ImageSet
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Of all test images: classes by the trained network, by the packed one, labels; pixels where the two differ; and
    for how many images their outputs are equal bit for bit.
    """
    trained, served, labels, differing, identical = [], [], [], [], 0
    for places in torch.arange(data.test_count).split(_BATCH):
        pixels, of_batch = lbs.data.pixels_at(data, places)
        logits = model(_served(data, pixels, uint8=False))
        ours = packed(_served(data, pixels, packed.normalize is not None))
        identical += int((logits == ours).all(1).sum())
        trained.append(logits.argmax(1))
        served.append(ours.argmax(1))
        labels.append(of_batch)
        differing.append(pixels[trained[-1] != served[-1]])
    return torch.cat(trained), torch.cat(served), torch.cat(labels), torch.cat(differing), identical
