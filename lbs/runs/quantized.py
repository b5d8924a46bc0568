"""A network by name, its weights and a folder of images become a packed file, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lbs.data
from lbs.data.pictures import read_pictures
from lbs.packing.model import PackedModel
from lbs.post_training import quantize
from lbs.runs import network
from lbs.runs.limits import latency_table, targets_section
from lbs.search.streams import FLOAT
from lbs.train import checkpoint
from lbs_kernels.errors import CheckpointError, DataError, LbsError

SUFFIX = ".lbs.safetensors"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation that most published weights expect


def quantize_files(
    name: str,
    images: str,
    *,
    weights: str | None = None,
    out: str | None = None,
    count: int = 256,
    size: int | None = None,
    classes: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    uint8: bool = False,
    latency_device: str | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> tuple[PackedModel, dict[str, Any]]:
    """Quantize and save: (packed network, what `--json` tells).

    Arguments:
        name: as in `network.build`. images: see `read_pictures`. weights: a state dict, .safetensors or .pth; only a
            function may come with its own.
        out: the file written, at once or not at all; it ends in .lbs.safetensors, and by default is called as the
            network. size: of images; by default that of the network where it is known, else that of the images.
        classes: by default as many as the last matrix of the weights has rows. uint8: the packed network is given bytes
            and normalises them. latency_device: whose times latency_ms counts (cpu). say: is told what is done, and
            which images cannot be read. options: of `lbs.quantize`.

    Raises:
        LbsError: of its family, whatever is wrong with model, weights, images or targets.
    """
    out = out or name.rpartition(":")[2]
    target = Path(out if out.endswith(".safetensors") else out + SUFFIX)
    if target.is_dir():
        raise LbsError(f"{target} is a folder; name a file")
    if latency_device is not None and options.get("latency_ms") is None:
        raise LbsError(
            f"latency_device={latency_device} says whose times a budget counts; there is none: give latency_ms=X too"
        )
    model = _trained(name, weights, classes).eval()
    form = network.image_form(name, model)
    channels, sides = form.channels, form.side
    pictures, unread = read_pictures(images, count, channels, size or sides)
    for reason in unread.values():
        say(f"left out: {reason}")
    mean, std = _statistics(mean, std, form, say)
    say(f"{len(pictures)} images of {' x '.join(map(str, pictures.shape[1:]))} from {images}")
    if options.get("latency_ms") is not None:
        options["table"] = latency_table(name, latency_device or "cpu", options.get("streams", FLOAT))
    normalize = (mean, std) if uint8 else None
    given = pictures if uint8 else lbs.data.normalize(pictures.permute(0, 2, 3, 1), mean, std)
    packed = quantize(model, given, normalize=normalize, progress=lambda step: say(f"{step} ..."), **options)
    packed.save(target)
    report = packed.report
    section = {"file": str(target), "bytes": target.stat().st_size, "unreadable": unread, **report.to_json()}
    return packed, section | (targets_section(report.outcome) if report.outcome is not None else {})


def _trained(name: str, weights: str | None, classes: int | None) -> nn.Module:
    if weights is not None:
        tensors = checkpoint.load_weights(Path(weights))
        model = network.build(name, classes or _classes(tensors, weights))
        checkpoint.apply_weights(model, tensors, weights)
        return model
    if not network.is_function(name):
        raise LbsError(f"{name} is built with random weights, and none are downloaded; give weights=FILE")
    return network.build(name, classes)


def _classes(tensors: dict[str, Tensor], weights: str) -> int:
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    if not matrices:
        raise CheckpointError(f"{weights} holds no matrix that says how many classes there are; give classes=N")
    return len(matrices[-1])


def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], form: network.ImageForm, say: Callable[[str], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those given, those the network comes with, or of three channels ImageNet's. Raises DataError."""
    channels = form.channels
    if not mean and not std and form.mean:
        say(f"images are normalised by mean {form.mean} and deviation {form.std}, as the network has them")
        return form.mean, form.std
    if not mean and not std and channels == len(IMAGENET[0]):
        say(f"images are normalised by ImageNet's mean {IMAGENET[0]} and deviation {IMAGENET[1]}, as none were given")
        return IMAGENET
    if len(mean) != channels or len(std) != channels:
        raise DataError(
            f"mean={mean} and std={std} are for images of {channels} channels; give the pixel mean and deviation, of "
            "0..1, that the network is trained with, one of each per channel"
        )
    return mean, std
