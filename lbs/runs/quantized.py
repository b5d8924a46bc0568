"""A network by name, its weights and a folder of images become a packed file, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lbs.data
import lbs.models
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
    weights: str,
    images: str,
    out: str,
    *,
    count: int = 256,
    size: int | None = None,
    classes: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    uint8: bool = False,
    latency_device: str = "cpu",
    say: Callable[[str], None] = print,
    **options: Any,
) -> tuple[PackedModel, dict[str, Any]]:
    """Quantize and save: (packed network, what `--json` tells).

    Arguments:
        name: as in `network.build`. weights: a state dict, .safetensors or .pth. images: see `read_pictures`.
        out: the file written, at once or not at all; it ends in .lbs.safetensors. size: of images; by default that of a
            network of lbs.models, else that of the images. classes: by default as many as the last matrix of the
            weights has rows. uint8: the packed network is given bytes and normalises them. latency_device: whose times
            latency_ms counts. say: is told what is done, and which images cannot be read. options: of `lbs.quantize`.

    Raises:
        LbsError: of its family, whatever is wrong with model, weights, images or targets.
    """
    target = Path(out if out.endswith(".safetensors") else out + SUFFIX)
    if target.is_dir():
        raise LbsError(f"{target} is a folder; name a file")
    tensors = checkpoint.load_weights(Path(weights))
    model = network.build(name, classes or _classes(tensors, weights))
    checkpoint.apply_weights(model, tensors, weights)
    model.eval()
    channels, sides = _image_form(name, model)
    pictures, unread = read_pictures(images, count, channels, size or sides)
    for reason in unread.values():
        say(f"left out: {reason}")
    mean, std = _statistics(mean, std, channels, say)
    say(f"{len(pictures)} images of {' x '.join(map(str, pictures.shape[1:]))} from {images}")
    if options.get("latency_ms") is not None:
        options["table"] = latency_table(name, latency_device, options.get("streams", FLOAT))
    normalize = (mean, std) if uint8 else None
    given = pictures if uint8 else lbs.data.normalize(pictures.permute(0, 2, 3, 1), mean, std)
    packed = quantize(model, given, normalize=normalize, progress=lambda step: say(f"{step} ..."), **options)
    packed.save(target)
    report = packed.report
    section = {"file": str(target), "bytes": target.stat().st_size, "unreadable": unread, **report.to_json()}
    return packed, section | (targets_section(report.outcome) if report.outcome is not None else {})


def _classes(tensors: dict[str, Tensor], weights: str) -> int:
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    if not matrices:
        raise CheckpointError(f"{weights} holds no matrix that says how many classes there are; give classes=N")
    return len(matrices[-1])


def _image_form(name: str, model: nn.Module) -> tuple[int, int | None]:
    """Channels and sides of the images; sides are None where the model does not say."""
    if name in lbs.models.REGISTRY:
        channels, height, _ = lbs.models.entry(name).input_shape
        return channels, height
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return (3 if first is None else first.in_channels), None


def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, say: Callable[[str], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those given, or of three channels ImageNet's. Raises DataError."""
    if not mean and not std and channels == len(IMAGENET[0]):
        say(f"images are normalised by ImageNet's mean {IMAGENET[0]} and deviation {IMAGENET[1]}, as none were given")
        return IMAGENET
    if len(mean) != channels or len(std) != channels:
        raise DataError(
            f"mean={mean} and std={std} are for images of {channels} channels; give the pixel mean and deviation, of "
            "0..1, that the network is trained with, one of each per channel"
        )
    return mean, std
