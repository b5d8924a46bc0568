"""What hostile files and many callers do to a process: the fuzzer's counts, memory after many networks, one image
beside a large batch.

    python benchmarks/bench_robustness.py --seed 7 --files 20000 --programs 20000 --pieces fuzz.json --save

Schema: {"version": 1, "level": "robustness", "header", "seed", "kinds": {"files" and "programs": what became of them,
as tests/kernels/outcomes.py counts}, "memory": {"networks", "grown_bytes"}, "beside": {"batch", "alone_s", "beside_s"},
"notes"}. Mutants take half an hour or more: with --pieces what is done is kept, and it goes on there (tools/fuzz.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import lbs  # noqa: E402  the paths above come first
import lbs.zoo  # noqa: E402
from benchmarks.common import RESULTS, header, resident  # noqa: E402
from lbs.packing.model import PackedModel  # noqa: E402
from lbs_kernels.times.table import device_slug  # noqa: E402

NETWORKS = 200
BATCH = 512
CALLS = 2000


def network() -> PackedModel:
    """The shipped one, read anew."""
    return lbs.load(lbs.zoo.entry("cifar100-resnet20").path)


def memory_grown(networks: int = NETWORKS) -> int:
    """Bytes that this process has more after so many networks, each loaded, called and let go."""
    image = torch.randn(1, 3, 32, 32)
    for _ in range(5):
        network()(image)
    gc.collect()
    before = resident("VmRSS")
    for _ in range(networks):
        network()(image)
    gc.collect()
    return resident("VmRSS") - before


def alone_and_beside(calls: int = CALLS) -> tuple[float, float]:
    """Median seconds of batch 1, alone and while another thread calls the same network with a large batch."""
    packed = network()
    image, batch = torch.randn(1, 3, 32, 32), torch.randn(BATCH, 3, 32, 32)
    ended, stop = [0], threading.Event()

    def loop() -> None:
        while not stop.is_set():
            packed(batch)
            ended[0] += 1

    def median(count: int) -> float:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            packed(image)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    median(100)
    alone = median(calls)
    other = threading.Thread(target=loop)
    other.start()
    try:
        while ended[0] == 0:
            time.sleep(0.001)
        return alone, median(calls)
    finally:
        stop.set()
        other.join()


def main() -> int:
    """Attack and measure; 1 where a mutant ended as none may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, required=True, help="of all mutants")
    parser.add_argument("--files", type=int, default=20_000, help="mutated packed files")
    parser.add_argument("--programs", type=int, default=20_000, help="mutated programs")
    parser.add_argument("--pieces", type=Path, help="where the fuzzer keeps its counts, and goes on from")
    parser.add_argument("--note", action="append", default=[], help="a remark that is kept with the figures")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/robustness.json")
    args = parser.parse_args()
    import fuzz

    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz.run(args.seed, {"files": args.files, "programs": args.programs}, Path(folder), args.pieces)
    alone, beside = alone_and_beside()
    settings = argparse.Namespace(device="cpu", threads=torch.get_num_threads(), batch=1, rounds=CALLS)
    body = {
        "version": 1,
        "level": "robustness",
        "header": header(settings),
        "seed": args.seed,
        "kinds": {kind: outcome.to_json() for kind, outcome in outcomes.items()},
        "memory": {"networks": NETWORKS, "grown_bytes": memory_grown()},
        "beside": {"batch": BATCH, "alone_s": alone, "beside_s": beside},
        "notes": args.note,
    }
    for kind, outcome in outcomes.items():
        print(f"{outcome.done} {kind}: {outcome}")
    print(json.dumps({name: body[name] for name in ("memory", "beside")}))
    if args.save:
        path = RESULTS / device_slug("cpu") / "robustness.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1) + "\n")
        print(f"wrote {path}")
    return 1 if any(outcome.failures for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
