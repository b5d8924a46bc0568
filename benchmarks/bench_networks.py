"""Packed networks on the CPU against int8 in OpenVINO and ONNX Runtime: seconds a batch, algorithms, memory, start.

    python benchmarks/bench_networks.py --save
    python benchmarks/bench_networks.py --networks resnet50 --threads 2 --save     these rows again, others stay

Ours are uniform 8/8 and 4/4 bits, 4/4 without 30 % of the filters of each layer that can lose some, and the network
that ships where there is one; the engines run the whole float network, post-training quantized (`lbs/engines.py`).
Residual streams have 8 bits, as the engines' have, where that is faster than floats: everywhere but at 4/4 of networks
that are named below.
Weights are random, norms and ranges those of smooth random images: codes are distributed as rounding leaves them, which
is what the choice of an algorithm looks at. Every packed network equals the reference bit for bit on an image first.

Contenders of a network are interleaved in one process, a process for each number of threads, pinned to as many
processors, the last ones. Start is from the file to the end of the first call, an image of batch 1, libraries imported
and the file in the page cache; memory is the growth of the peak meanwhile. Each start has a process of its own.

    {"version": 1, "level": "networks", "header": {...}, "notes": [...], "missing": {engine: reason},
     "rows": [{"network", "threads", "batch", "contender", "median", "p20", "p80", "fastest"  (seconds),
               "ratios": {other: times faster}, "algorithms": {name: layers} (null for engines), "load",
               "rounds", "commit"}],
     "starts": [{"network", "threads", "contender", "seconds", "peak_bytes"}]}
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, header, require_backend, resident
from gpu_nets import PRUNING, float_model, plan
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.models
import lbs.zoo
from lbs.engines import ENGINES, EngineModels, onnx_file, session, why_not
from lbs.packing.model import PackedModel
from lbs.run_folder import write_json
from lbs_kernels.errors import BackendError
from lbs_kernels.times.stopwatch import interleave
from lbs_kernels.times.table import device_slug

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "cifar_resnet20")
BITS = {"w8a8": 8, "w4a4": 4, "w4a4 pruned": 4}
FLOAT_STREAMS = ("cifar_resnet20",)  # at 4/4: codes are 2 % slower there (Zen 5), in others as fast or up to 8 % faster
SHIPPED = "shipped"  # a searched network
RIVALS = ("openvino8", "onnxruntime8")
STARTS = ("w8a8", "w4a4", *RIVALS)
CALIBRATION = 8  # images
ALGORITHMS = ("direct", "winograd")


def smooth_images(network: str, batch: int) -> Tensor:
    """Noise of several grains, float32 [N, C, H, W] of unit variance: neighbours are alike, as in photos."""
    generator = torch.Generator().manual_seed(batch)
    channels, height, width = lbs.models.entry(network).input_shape
    images = torch.zeros(batch, channels, height, width)
    for grain in (1, 4, 16):
        coarse = torch.randn(batch, channels, -(-height // grain) + 1, -(-width // grain) + 1, generator=generator)
        images += grain**0.5 * F.interpolate(coarse, scale_factor=grain, mode="bilinear")[..., :height, :width]
    return images / images.std()


@torch.no_grad()
def warm_network(network: str) -> nn.Module:
    """The float network, its norms as after an epoch on such images."""
    model = float_model(network)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average
    model.train()(smooth_images(network, CALIBRATION))
    return model.eval()


def build(args: argparse.Namespace) -> None:
    """Every file of a network that the folder has not."""
    network, folder = args.networks[0], args.folder
    model, images = warm_network(network), smooth_images(network, CALIBRATION)
    for variant, bits in BITS.items():
        path = packed_file(folder, network, variant)
        if path.exists():
            continue
        streams = 32 if bits < 8 and network in FLOAT_STREAMS else 8
        quantized = lbs.uniform(model, images, bits, bits, streams=streams)
        if variant in PRUNING:
            quantized = lbs.freeze(quantized, plan(quantized, network, variant))
        packed = lbs.pack(lbs.calibrate(quantized, [images]).eval(), verify=False)
        expected, _ = packed.run_traced(images[:1], backend="reference")
        if not torch.equal(packed(images[:1]), expected):
            raise BackendError(f"{network} {variant} differs from the reference; a wrong result is not timed")
        packed.save(path)
    if not all(why_not(name) for name in RIVALS):
        engines = EngineModels(model, lbs.models.entry(network).input_shape, folder)
        for batch in {1, *args.batches}:
            engines.file(8, batch)


def packed_file(folder: Path, network: str, variant: str) -> Path:
    """Where a packed network is."""
    if variant == SHIPPED:
        return next(entry.path for entry in lbs.zoo.ENTRIES.values() if entry.model == network)
    return folder / f"{variant.replace(' ', '-')}.lbs.safetensors"


def algorithms(packed: PackedModel, batch: int) -> dict[str, int]:
    """How many layers each algorithm computes, of those that more than one can."""
    kernels = [kernel.name for region in packed.regions for kernel in region.compiled().runner.kernels(batch)]
    found = Counter(name.split("/", 2)[2] for name in kernels if name.count("/") > 1)
    return dict.fromkeys(ALGORITHMS, 0) | found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network and number of threads."""
    network, threads = args.networks[0], args.threads[0]
    shipped = any(entry.model == network for entry in lbs.zoo.ENTRIES.values())
    ours = {name: lbs.load(packed_file(args.folder, network, name)) for name in (*BITS, *([SHIPPED] * shipped))}
    engines = EngineModels(warm_network(network), lbs.models.entry(network).input_shape, args.folder)
    rows = []
    for batch in args.batches:
        images = smooth_images(network, batch)
        calls: dict[str, Any] = {name: partial(packed, images) for name, packed in ours.items()}
        with torch.no_grad():
            calls |= {ENGINES[name]: engines.call(name, images, threads) for name in RIVALS if not why_not(name)}
        load = os.getloadavg()[0]
        with torch.inference_mode():
            times = interleave(calls, rounds=args.rounds)
        for name, one in times.items():
            ratios = {other: one.ratio(times[other]) for other in times if other != name}
            row = {"network": network, "threads": threads, "batch": batch, "contender": name, "median": one.median}
            row |= {
                "p20": one.p20,
                "p80": one.p80,
                "fastest": min(one.seconds),
                "ratios": ratios,
                "rounds": args.rounds,
            }
            rows.append({**row, "algorithms": algorithms(ours[name], batch) if name in ours else None, "load": load})
    return rows


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and growth of the peak from a file to the logits of one image, in this process."""
    name, threads = args.contender, args.threads[0]
    images = smooth_images(args.networks[0], 1)
    if name in RIVALS:
        __import__(name.removesuffix("8"))
    ctypes.CDLL(None).malloc_trim(0)  # what making the image freed is not asked for again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
    before, begin = resident("VmRSS"), time.perf_counter()
    if name in RIVALS:
        session(name, onnx_file(args.folder, 8, 1), threads)(images.numpy())
    else:
        lbs.load(packed_file(args.folder, args.networks[0], name))(images)
    return {"seconds": time.perf_counter() - begin, "peak_bytes": resident("VmHWM") - before}


PARTS = {"build": build, "measure": measure, "start": start}


def apart(part: str, args: argparse.Namespace, folder: Path, network: str, threads: int, contender: str = "") -> Any:
    """What a part returns, from a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--networks", network, "--threads", str(threads)]
    command += ["--folder", str(folder), "--rounds", str(args.rounds), "--contender", contender]
    command += ["--batches", *map(str, args.batches)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the same lbs, wherever it comes from
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def starts_of(args: argparse.Namespace, folder: Path, network: str, threads: int) -> list[dict[str, Any]]:
    """Medians of three starts of every contender."""
    rows = []
    for name in STARTS:
        if name in RIVALS and why_not(name):
            continue
        found = [apart("start", args, folder, network, threads, name) for _ in range(3)]
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.append({"network": network, "threads": threads, "contender": ENGINES.get(name, name), **middle})
    return rows


def run(args: argparse.Namespace, path: Path | None) -> None:
    """Measure networks, keep the file at `path` after each, and print rows as they come."""
    body: dict[str, Any] = {"rows": [], "starts": [], "notes": []}
    if path is not None and path.exists():
        body = json.loads(path.read_text())
    head = header(args)
    for key in ("threads", "batch", "rounds", "load"):  # of rows
        del head[key]
    head["engines"] = {name: version(name) for name in ("openvino", "onnxruntime") if not why_not(name)}
    missing = {ENGINES[name]: reason for name in RIVALS if (reason := why_not(name))}
    with tempfile.TemporaryDirectory(prefix="lbs-networks-") as scratch:
        for threads, network in ((threads, network) for threads in args.threads for network in args.networks):
            folder = (args.folder or Path(scratch)) / network
            folder.mkdir(parents=True, exist_ok=True)
            apart("build", args, folder, network, threads)
            rows = [{**row, "commit": head["commit"]} for row in apart("measure", args, folder, network, threads)]
            starts = starts_of(args, folder, network, threads) if network in args.starts else []
            for key, found in (("rows", rows), ("starts", starts)):
                measured = {_place(row) for row in found}
                body[key] = [row for row in body[key] if _place(row) not in measured] + found
            told(rows, starts)
            if path is not None:
                fixed = {
                    "version": 1,
                    "level": "networks",
                    "header": head,
                    "notes": args.note or body["notes"],
                    "missing": missing,
                }
                write_json(path, {**fixed, **{key: body[key] for key in ("rows", "starts")}})


def _place(row: dict[str, Any]) -> tuple[object, ...]:
    """What a later run measures again as a whole."""
    return row["network"], row["threads"], row.get("batch")


def told(rows: list[dict[str, Any]], starts: list[dict[str, Any]]) -> None:
    """Print rows of a network."""
    for row in rows:
        times = f"{row['median'] * 1e3:9.3f} ms [{row['p20'] * 1e3:.3f} {row['p80'] * 1e3:.3f}]"
        ratios = ", ".join(f"x{ratio:.2f} {other}" for other, ratio in row["ratios"].items())
        where = f"{row['network']} threads {row['threads']} batch {row['batch']}"
        print(f"{where}  {row['contender']:18s} {times}  {ratios}  {row['algorithms'] or ''}", flush=True)
    for row in starts:
        where = f"{row['network']} threads {row['threads']} start"
        print(f"{where}  {row['contender']:18s} {row['seconds']:.3f} s, {row['peak_bytes'] / 1e6:.0f} MB", flush=True)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=sorted(lbs.models.REGISTRY))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--starts", nargs="*", default=["resnet50"], help="networks whose start is measured too")
    parser.add_argument("--note", nargs="*", help="what else this machine was doing; said of the whole file")
    parser.add_argument("--folder", type=Path, help="keep packed and exported networks here, and find them again")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/networks.json")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.device, args.batch = "cpu", args.batches  # of the header that all benchmarks share
    if args.part:
        if args.part != "build":  # before any library starts a thread
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads[0] :])
            torch.set_num_threads(args.threads[0])
        print(json.dumps(PARTS[args.part](args)))
        return
    require_backend(args.device)
    path = args.output or (RESULTS / device_slug("cpu") / "networks.json" if args.save else None)
    run(args, path)
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
