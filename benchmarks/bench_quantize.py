"""What `lbs.quantize` keeps of a network's accuracy without training it, how long it takes, and at how much memory.

    python benchmarks/bench_quantize.py --model cifar_resnet20 --weights FILE --data cifar100.npz --save
    python benchmarks/bench_quantize.py --model mobilenet_v2 --weights FILE --data images.tar --bops 0.025 --save

`--faster 1.3 --prune 0.75 --distill 20` adds rows under a budget of milliseconds: a call of our own 8/8 bits, as `lbs
tune --shapes MODEL` estimates it (measure first), over 1.3; without and with training on the calibration images. The
packed network and 8/8 bits are timed beside each other, interleaved, at batch 1.

A .npz file (train_x, train_y, test_x, test_y) gives 512 training images to calibrate on, and is tested by all test
images. A folder or .tar of images with a `labels.txt` (lines "file name, class") is shuffled and halved: the first half
calibrates, the second tests. `zeros` are the smallest weights of every convolution, set to 0 in the float network.
Each row runs in a process of its own. Top-1 is that of the packed network on test images. Seconds are the processor's
in `lbs.quantize`, of all threads, so that others at work do not count; memory is the growth of its peak over what the
float network and the images take. The file is written again with every row.

    {"version": 1, "level": "quantization", "header": {..., "model", "calibration", "test" (images), "float_top1"},
     "rows": [{"bits", "rounding", "zeros", "bops_asked", "faster_asked", "max_pruning_ratio", "distill",
               "latency": null or {"asked", "estimated", "packed": [p20, median], "w8a8": [p20, median]  (seconds),
                                   "faster"  (median of the ratios)}, "kept": {pruned layer: filters},
               "float_top1" (with these zeros), "top1" (percent), "bops", "full_precision_bops", "bytes", "seconds",
               "steps" (elapsed seconds of each), "peak_bytes"}]}
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, header, resident
from PIL import Image
from torch import Tensor, nn

import lbs
import lbs.cost
import lbs.data
import lbs.models
from lbs.cost.latency import call_seconds
from lbs.data.decode import central_crop
from lbs.packing.model import PackedModel
from lbs.run_folder import write_json
from lbs.train.checkpoint import apply_weights, load_weights
from lbs_kernels.errors import LbsError
from lbs_kernels.times.stopwatch import interleave
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
    faster_asked: float | None = None  # than our own 8/8 bits
    max_pruning_ratio: float = 0.0
    distill: int = 0  # epochs

    @property
    def name(self) -> str:
        if self.faster_asked is not None:
            return f"{self.faster_asked:g}x, up to {self.max_pruning_ratio:.0%} pruned, {self.distill} epochs"
        widths = f"bops {self.bops_asked:g}" if self.bits is None else f"{self.bits[0]}/{self.bits[1]}"
        return f"{widths} {self.rounding}" + (f", {self.zeros:.0%} zeros" if self.zeros else "")


def asked_rows(args: argparse.Namespace) -> list[Asked]:
    """Every row, in the order of the table."""
    bops = args.bops
    both = [(bits, rounding) for bits in ((4, 8), (4, 4)) for rounding in ("nearest", "optimized")]
    rows = [Asked((8, 8)), Asked((8, 8), zeros=0.3), *(Asked(bits, rounding) for bits, rounding in both)]
    rows += [Asked(None, rounding, bops_asked=bops) for rounding in ("nearest", "optimized") if bops is not None]
    epochs = () if args.faster is None else tuple(dict.fromkeys((0, args.distill)))
    quick = [Asked(None, faster_asked=args.faster, max_pruning_ratio=args.prune, distill=count) for count in epochs]
    return quick if args.only_faster else rows + quick


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


def budget_of(asked: Asked, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Arguments of `lbs.quantize` that name what a row is allowed."""
    if asked.faster_asked is None:
        return {"bits": asked.bits, "bops": asked.bops_asked}
    layers = [layer.problem for layer in lbs.cost.network_layers(model, images[:1]).with_bits(8, 8).layers]
    threads = torch.get_num_threads()
    call = call_seconds(layers, layers, batch=1, threads=threads)
    if call is None:
        raise LbsError("calls and layers of this network were not measured; run lbs tune --shapes MODEL first")
    table = lbs.cost.Tuned(threads=threads)
    ratio = asked.max_pruning_ratio
    return {"latency_ms": 1e3 * call / asked.faster_asked, "table": table, "max_pruning_ratio": ratio}


def timed(packed: PackedModel, model: nn.Module, images: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of a call beside those of the float network at 8/8 bits."""
    whole = lbs.pack(lbs.calibrate(lbs.uniform(model, images[:2]), [images[:8]]).eval(), verify=False)
    calls = {"packed": partial(packed, images[:1]), "w8a8": partial(whole, images[:1])}
    with torch.inference_mode():
        times = interleave(calls, rounds=rounds)
    found: dict[str, Any] = {name: [one.p20, one.median] for name, one in times.items()}
    return {**found, "faster": times["packed"].ratio(times["w8a8"])}


def measure(asked: Asked, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the file, in this process."""
    logging.disable(logging.WARNING)
    images = read_images(args.data)
    model = network_of(args, images, asked.zeros)
    float_top1 = top1(model, images) if args.float_top1 is None else args.float_top1
    budget = budget_of(asked, model, images.calibration)
    ctypes.CDLL(None).malloc_trim(0)  # what reading the images freed is not asked for again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of reading and testing
    before, started = resident("VmRSS"), time.process_time()
    packed = lbs.quantize(
        model,
        images.calibration,
        rounding=asked.rounding,  # type: ignore[arg-type]
        distill=asked.distill,
        **budget,
    )
    seconds, peak = time.process_time() - started, resident("VmHWM") - before
    report, plan = packed.report, packed.plan
    latency = None
    if asked.faster_asked is not None:
        estimated = report.outcome.reached[0].value if report.outcome is not None else None
        latency = {"asked": budget["latency_ms"] / 1e3, "estimated": estimated}
        latency |= timed(packed, model, images.calibration, args.rounds)
    layers = () if plan is None else plan.layers
    return {
        **asdict(asked),
        "latency": latency,
        "kept": {e.name: f"{e.kept_filters}/{e.filters}" for e in layers if e.kept_filters < e.filters},
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
    for name in ("model", "weights", "data", "threads", "rounds", "bops", "faster", "prune", "distill", "float-top1"):
        command += [] if options[name] is None else [f"--{name}", str(options[name])]
    command += ["--only-faster"] if args.only_faster else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the same lbs, wherever it comes from
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, path: Path | None) -> None:
    """Measure every row, keep the file at `path`, and print the rows as they come."""
    head = {**header(args), "model": args.model}
    rows: list[dict[str, Any]] = []
    floats: dict[float, float] = {}  # top-1 by share of zeros
    for index, asked in enumerate(asked_rows(args)):
        row = measured_apart(index, floats.get(asked.zeros), args)
        floats[asked.zeros] = row["float_top1"]
        head |= {name: row.pop(name) for name in ("calibration", "test")}
        head["float_top1"] = floats[0.0]
        rows.append(row)
        if path is not None:
            write_json(path, {"version": 1, "level": "quantization", "header": head, "rows": rows})
        cost = f"{row['seconds']:6.1f} s {row['peak_bytes'] / 1e6:7.0f} MB"
        cost += f"  x{row['latency']['faster']:.2f} of 8/8" if row["latency"] else ""
        print(f"{asked.name:28s} {row['top1']:6.2f} % of {row['float_top1']:.2f} %  {cost}", flush=True)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, choices=sorted(lbs.models.REGISTRY))
    parser.add_argument("--weights", type=Path, required=True, help="its float weights, a state dict")
    parser.add_argument("--data", type=Path, required=True, help="a .npz file, a folder or a .tar with labels.txt")
    parser.add_argument("--bops", type=float, help="also rows under a budget: a share of the full-precision operations")
    parser.add_argument("--faster", type=float, help="also rows under a budget of milliseconds: times our own 8/8")
    parser.add_argument("--prune", type=float, default=0.75, help="share of a layer's filters that may go for that")
    parser.add_argument("--distill", type=int, default=20, help="epochs of training on the calibration images for that")
    parser.add_argument("--only-faster", action="store_true", help="leave the other rows out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100, help="of timing")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/quantize_<model>.json")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--float-top1", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.device, args.batch = "cpu", 1  # of the header that all benchmarks share
    if args.row is not None:
        print(json.dumps(measure(asked_rows(args)[args.row], args)))
        return
    path = args.output or (
        RESULTS / device_slug("cpu") / f"quantize_{args.model}{'_faster' * args.only_faster}.json"
        if args.save
        else None
    )
    run(args, path)
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
