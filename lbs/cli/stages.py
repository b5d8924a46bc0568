"""What happens to a run after training: pack, verify, bench. Each stage writes its section of results.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lbs
import lbs.data
from lbs.cli.packed import PACKED, of_run
from lbs.run_folder import RunFolder
from lbs.search import network
from lbs_kernels.errors import LbsError

_EXAMPLES = 4


def pack_run(folder: RunFolder, stream_dtype: str = "float32") -> dict[str, Any]:
    """Pack the network of a run into packed.lbs.safetensors; a few test images check it layer by layer."""
    started = time.monotonic()
    model, card = network.load_network(folder)
    images, _ = next(iter(lbs.data.eval_loader(network.images_of(card), _EXAMPLES)))
    packed = lbs.pack(model, example=images, stream_dtype=stream_dtype)
    path = folder.file(PACKED)
    packed.save(path)
    section = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "packed_bytes": packed.packed_bytes,
        "stream_dtype": stream_dtype,
        "kept_float": [list(row) for row in packed.kept_float],
        "seconds": time.monotonic() - started,
    }
    folder.add_result("pack", section)
    return section


def verify_run(folder: RunFolder, images: int = 64, strict: bool = False) -> dict[str, Any]:
    """Compare the saved file with the trained network: every code on `images` test images, every prediction on all.

    An image whose prediction differs is compared code by code too: it is excused only where all that differs lies on a
    rounding boundary, and never if `strict`.
    """
    if images < 1:
        raise LbsError(f"{images} images to compare code by code; give --images 1 or more")
    started = time.monotonic()
    model, card = network.load_network(folder)
    packed = of_run(folder).packed
    data = network.images_of(card)
    report = lbs.verify(model, packed, _some(data, images))
    trained, served, labels, differing = _predictions(model, packed, data)
    places = (trained != served).nonzero().flatten()
    excused = not len(places) or (not strict and lbs.verify(model, packed, differing).ok)
    section = {
        "images": len(labels),
        "equal_predictions": len(labels) - len(places),
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


def bench_run(folder: RunFolder, say: Callable[[str], None], **options: Any) -> dict[str, Any]:
    """Time the packed network of a run against its float network and our uniform 8 bits. Options as `lbs.bench`."""
    source = of_run(folder)
    timed = lbs.bench(source.packed, model=source.float_model, **options)
    say(str(timed))
    section = timed.to_json()
    folder.add_result("bench", section)
    return section


def _some(data: lbs.data.ImageSet, count: int) -> Tensor:
    """`count` test images spread over the whole set."""
    places = torch.linspace(0, data.test_count - 1, min(count, data.test_count)).long()
    return lbs.data.images_at(data, places)


@torch.inference_mode()
def _predictions(model: nn.Module, packed: nn.Module, data: lbs.data.ImageSet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes by the trained network, by the packed one, and the labels, of all test images; images they differ on."""
    trained, served, labels, differing = [], [], [], []
    for images, of_batch in lbs.data.eval_loader(data):
        trained.append(model(images).argmax(1))
        served.append(packed(images).argmax(1))
        labels.append(of_batch)
        differing.append(images[trained[-1] != served[-1]])
    return torch.cat(trained), torch.cat(served), torch.cat(labels), torch.cat(differing)
