"""What `lbs.quantize` keeps of a network's accuracy without training it, how long it takes, and at how much memory.

    python benchmarks/bench_quantize.py --model cifar_resnet20 --weights FILE --data cifar100.npz --save
    python benchmarks/bench_quantize.py --model mobilenet_v2 --weights FILE --data images.tar --bops 0.025 --save

A .npz file (train_x, train_y, test_x, test_y) gives 512 training images to calibrate on, and is tested by all test
images. A folder or .tar of images with a `labels.txt` (lines "file name, class") is shuffled and halved: the first half
calibrates, the second tests. `zeros` are the smallest weights of every convolution, set to 0 in the float network.
Each row runs in a process of its own. Top-1 is that of the packed network on test images. Seconds are the processor's
in `lbs.quantize`, of all threads, so that others at work do not count; memory is the growth of its peak over what the
float network and the images take. The file is written again with every row.

    {"version": 1, "level": "quantization", "header": {..., "model", "calibration", "test" (images), "float_top1"},
     "rows": [{"bits", "rounding", "zeros", "bops_asked", "float_top1" (with these zeros), "top1" (percent), "bops",
               "full_precision_bops", "bytes", "seconds", "steps" (elapsed seconds of each), "peak_bytes"}]}
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, header, resident
from PIL import Image
from torch import Tensor, nn

import lbs
import lbs.data
import lbs.models
from lbs.data.decode import central_crop
from lbs.run_folder import write_json
from lbs.train.checkpoint import apply_weights, load_weights
from lbs_kernels.times.table import device_slug

CALIBRATION = 512  # training images
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = "labels.txt"
PART = 2 << 20  # values of the images computed at once


@dataclass(frozen=True)
class Asked:
    """One row: weight and activation bits, or a budget, a share of the full-precision bit operations."""

    bits: tuple[int, int] | None
    rounding: str = "nearest"
    zeros: float = 0.0  # share of the weights
    bops_asked: float | None = None

    @property
    def name(self) -> str:
        widths = f"bops {self.bops_asked:g}" if self.bits is None else f"{self.bits[0]}/{self.bits[1]}"
        return f"{widths} {self.rounding}" + (f", {self.zeros:.0%} zeros" if self.zeros else "")


def asked_rows(bops: float | None) -> list[Asked]:
    """Every row, in the order of the table."""
    both = [(bits, rounding) for bits in ((4, 8), (4, 4)) for rounding in ("nearest", "optimized")]
    rows = [Asked((8, 8)), Asked((8, 8), zeros=0.3), *(Asked(bits, rounding) for bits, rounding in both)]
    return rows + [Asked(None, rounding, bops_asked=bops) for rounding in ("nearest", "optimized") if bops is not None]


@dataclass(frozen=True)
class Images:
    """float32 [N, C, H, W], normalised, and labels int64 [N]."""

    calibration: Tensor
    test: Tensor
    labels: Tensor


def read_images(path: Path) -> Images:
    """Of a .npz file, a folder or a .tar."""
    if path.suffix == ".npz":
        data = lbs.data.from_npz(path)
        chosen = data.subset(CALIBRATION, seed=0)
        x, test = (_normalised(part, data.mean, data.std) for part in (chosen.train_x, data.test_x))
        return Images(x, test, data.test_y)
    pixels, labels = _tarred(path) if path.is_file() else _of_folder(path)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, labels = _normalised(pixels, *IMAGENET)[order], labels[order]
    half = len(x) // 2
    return Images(x[:half], x[half:], labels[half:])


def _normalised(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    values = pixels.permute(0, 3, 1, 2).float() / 255
    return ((values - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)).contiguous()


def _tarred(path: Path) -> tuple[Tensor, Tensor]:
    with tarfile.open(path) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
        return _labelled({name: archive.extractfile(member).read() for name, member in members.items()})  # type: ignore[union-attr]


def _of_folder(path: Path) -> tuple[Tensor, Tensor]:
    return _labelled({file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})


def _labelled(files: dict[str, bytes], size: int = 224) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, size, size, 3] and classes of all images in labels.txt; those cropped already lose their rim."""
    pairs = [line.split() for line in files[LABELS].decode().splitlines() if line.strip()]
    pictures = []
    for name, _ in pairs:
        image = Image.open(io.BytesIO(files[Path(name).name])).convert("RGB")
        side = min(image.size)
        rim = image.size[0] == image.size[1] and size <= side < size * 8 / 7
        edge = (side - size) // 2
        crop = np.asarray(image)[edge : edge + size, edge : edge + size] if rim else central_crop(image, size)
        pictures.append(torch.from_numpy(np.array(crop)))
    return torch.stack(pictures), torch.tensor([int(label) for _, label in pairs])


@torch.no_grad()
def top1(network: nn.Module, images: Images) -> float:
    """Percent of the test images."""
    rows = max(1, PART // images.test[0].numel())
    found = torch.cat([network(part).argmax(1) for part in images.test.split(rows)])
    return 100 * float((found == images.labels).float().mean())


@torch.no_grad()
def network_of(args: argparse.Namespace, images: Images, zeros: float) -> nn.Module:
    """The float network, the smallest weights of its convolutions set to 0."""
    weights = load_weights(args.weights)
    classes = max(tensor.shape[0] for tensor in weights.values() if tensor.dim() == 2)
    model = lbs.models.create(args.model, classes).eval()
    apply_weights(model, weights, args.weights)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and zeros:
            sizes = layer.weight.abs().flatten()
            layer.weight[layer.weight.abs() <= sizes.kthvalue(int(zeros * sizes.numel())).values] = 0
    return model


def measure(asked: Asked, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the file, in this process."""
    logging.disable(logging.WARNING)
    images = read_images(args.data)
    model = network_of(args, images, asked.zeros)
    float_top1 = top1(model, images) if args.float_top1 is None else args.float_top1
    ctypes.CDLL(None).malloc_trim(0)  # what reading the images freed is not asked for again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of reading and testing
    before, started = resident("VmRSS"), time.process_time()
    packed = lbs.quantize(
        model,
        images.calibration,
        bits=asked.bits,
        bops=asked.bops_asked,
        rounding=asked.rounding,  # type: ignore[arg-type]
    )
    seconds, peak = time.process_time() - started, resident("VmHWM") - before
    report = packed.report
    return {
        **asdict(asked),
        "float_top1": float_top1,
        "top1": top1(packed, images),
        "bops": report.bops,
        "full_precision_bops": report.full_precision_bops,
        "bytes": report.packed_bytes,
        "steps": report.seconds,
        "seconds": seconds,
        "peak_bytes": peak,
        "calibration": len(images.calibration),
        "test": len(images.test),
    }


def measured_apart(index: int, float_top1: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """The row, from a process of its own; float_top1 is measured there where it is not known."""
    command = [sys.executable, __file__, "--row", str(index)]
    options = {**vars(args), "float-top1": float_top1}
    for name in ("model", "weights", "data", "threads", "bops", "float-top1"):
        command += [] if options[name] is None else [f"--{name}", str(options[name])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the same lbs, wherever it comes from
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, path: Path | None) -> None:
    """Measure every row, keep the file at `path`, and print the rows as they come."""
    head = {**header(args), "model": args.model}
    rows: list[dict[str, Any]] = []
    floats: dict[float, float] = {}  # top-1 by share of zeros
    for index, asked in enumerate(asked_rows(args.bops)):
        row = measured_apart(index, floats.get(asked.zeros), args)
        floats[asked.zeros] = row["float_top1"]
        head |= {name: row.pop(name) for name in ("calibration", "test")}
        head["float_top1"] = floats[0.0]
        rows.append(row)
        if path is not None:
            write_json(path, {"version": 1, "level": "quantization", "header": head, "rows": rows})
        cost = f"{row['seconds']:6.1f} s {row['peak_bytes'] / 1e6:7.0f} MB"
        print(f"{asked.name:28s} {row['top1']:6.2f} % of {row['float_top1']:.2f} %  {cost}", flush=True)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, choices=sorted(lbs.models.REGISTRY))
    parser.add_argument("--weights", type=Path, required=True, help="its float weights, a state dict")
    parser.add_argument("--data", type=Path, required=True, help="a .npz file, a folder or a .tar with labels.txt")
    parser.add_argument("--bops", type=float, help="also rows under a budget: a share of the full-precision operations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/quantize_<model>.json")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--float-top1", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.device, args.batch, args.rounds = "cpu", 1, 1  # of the header that all benchmarks share
    if args.row is not None:
        print(json.dumps(measure(asked_rows(args.bops)[args.row], args)))
        return
    path = args.output or (RESULTS / device_slug("cpu") / f"quantize_{args.model}.json" if args.save else None)
    run(args, path)
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
