"""What searching costs: seconds of a training step, and peak memory, against float training and separate branches.

    python benchmarks/bench_search.py --model cifar_resnet20 --batch 128 --amp bf16 --threads 1 --save

Steps are the trainer's own (batch in memory, forward, backward, SGD, budget), contenders interleaved in one process.
The search keeps every gate open, its dearest state; `multi-path` computes a branch of its own for every width, and one
convolution for their sum, `multi-path, convolutions` a convolution for every branch, with its own weights. All three
are a weight and an activation step, halved; `search, budget alone` is processor time, without the budget's gradient.
Peak memory is that of four steps in a process of its own, over what torch takes there; on a GPU, where steps are
recorded (`--single`: not), what torch reserves for a contender more than before.
The file is written as soon as there are times, and again with every peak.

    {"version": 1, "level": "training", "header": {...},
     "rows": [{"contender", "median", "p20", "p80", "epoch"  (seconds of a step, of an epoch), "slower_than_float",
               "peak_bytes", "memory_over_float"}]}
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, header, resident
from torch import Tensor

import lbs
import lbs.data
import lbs.models
from lbs.recipe import Recipe
from lbs.run_folder import write_json
from lbs.search import Budget, parameter_groups
from lbs.train.recorded import SINGLE_STEPS
from lbs.train.trainer import Trainer
from lbs_kernels.times.stopwatch import SelfTimed, Times, interleave
from lbs_kernels.times.table import device_slug

CONTENDERS = ("float", "fine-tuning 4/4", "search", "multi-path", "multi-path, convolutions")
PATHS: dict[str, Any] = dict(zip(CONTENDERS[2:], (False, True, "convolutions"), strict=True))
SEARCHES = CONTENDERS[2:]  # two kinds of step in turn
HALVES = ("search, weight step", "search, activation step")  # parts of `search`, timed on the CPU only
PARTS = (*HALVES, "search, budget alone")
STEPS_FOR_PEAK = 4
STEPS_TO_RECORD = 2 * (SINGLE_STEPS + 2)  # both kinds


def trainer_of(contender: str, args: argparse.Namespace) -> Trainer:
    """A trainer whose steps are those of a contender, on images of noise."""
    entry = lbs.models.entry(args.model)
    channels, size, _ = entry.input_shape
    data = lbs.data.synthetic(entry.num_classes, args.batch, 1, size, channels)
    torch.manual_seed(0)
    model = lbs.models.create(args.model)
    loader = lbs.data.train_loader(data, args.batch, augment=False, device=args.device)
    example, groups, budget = lbs.models.example(args.model), None, None
    if contender != "float":
        if contender in SEARCHES:
            quantized = lbs.prepare(model, example, lbs.SearchConfig(multi_path=PATHS[contender]))
        else:
            quantized = lbs.uniform(model, example, 4, 4)
        model = lbs.calibrate(quantized.to(args.device), [next(iter(loader))[0]])
        groups = parameter_groups(model, 1e-3, gate_lr=0.0, prune_lr=0.0)
        # 8/8 bits are .0625, and rates of 0 hold them: the budget presses to the end.
        budget = Budget(model, bops=0.06) if contender in SEARCHES else None
    recipe = Recipe(epochs=1_000_000, lr=1e-3, amp=args.amp, log_every=1_000_000_000, cuda_graphs=not args.single)
    trainer = Trainer(model.to(args.device), loader, recipe, phase=contender, groups=groups, budget=budget)
    trainer.model.train()
    return trainer


def batch_of(trainer: Trainer) -> tuple[Tensor, Tensor]:
    images, labels = next(iter(trainer.train))
    return images, labels


def stepper(trainer: Trainer, steps: int = 1) -> Callable[[], None]:
    """One call: that many training steps on one batch."""
    images, labels = batch_of(trainer)

    def call() -> None:
        for _ in range(steps):
            trainer._train_step(images, labels)

    return call


def half(trainer: Trainer, activations: bool) -> SelfTimed:
    """One call: a weight step and an activation step, of which one is timed."""
    step = stepper(trainer)

    def seconds() -> float:
        spent = []
        for _ in range(2):
            start = time.perf_counter()
            step()
            spent.append(time.perf_counter() - start)
        return spent[activations]

    return SelfTimed(seconds)


def budget_alone(trainer: Trainer) -> SelfTimed:
    """One call: a weight step and an activation step; the processor's seconds in calls of the budget, halved."""
    step, budget, spent = stepper(trainer, 2), trainer.budget, [0.0]

    def timed(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            start = time.process_time()
            result = call()
            spent[0] += time.process_time() - start
            return result

        return run

    trainer._work._losses.budget = timed(budget)
    budget.clamp, budget.advance = timed(budget.clamp), timed(budget.advance)

    def seconds() -> float:
        spent[0] = 0.0
        step()
        return spent[0] / 2

    return SelfTimed(seconds)


def steps_of(contender: str) -> int:
    """Training steps in one timed call."""
    return 2 if contender in SEARCHES else 1


def measure(args: argparse.Namespace) -> tuple[dict[str, Times], dict[str, int]]:
    """Seconds of a step by contender, of searches of two; and on a GPU, bytes at the peak."""
    calls: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        load_libraries(args)
    for name in CONTENDERS:
        begin = time.perf_counter()
        if on_gpu:
            trainer, peaks[name] = recorded(name, args)
            print(f"{name}: {trainer._work.launches}, after {time.perf_counter() - begin:.1f} s", flush=True)
        else:
            trainer = trainer_of(name, args)
        calls[name] = stepper(trainer, steps_of(name))
    if not on_gpu:
        searching = trainer_of("search", args)
        calls |= {name: half(searching, bool(index)) for index, name in enumerate(HALVES)}
        calls[PARTS[-1]] = budget_alone(trainer_of("search", args))
    return interleave(calls, device=args.device, rounds=args.rounds, warmup=0.0), peaks


def load_libraries(args: argparse.Namespace) -> None:
    """A small step of float training: what torch takes for itself is no contender's."""
    stepper(trainer_of("float", argparse.Namespace(**{**vars(args), "batch": 2})))()


def recorded(contender: str, args: argparse.Namespace) -> tuple[Trainer, int]:
    """A trainer on a GPU that has recorded its steps, and what they made torch reserve."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    trainer = trainer_of(contender, args)
    torch.cuda.empty_cache()  # what building and calibrating freed is none of the steps'
    torch.cuda.reset_peak_memory_stats()
    stepper(trainer, STEPS_TO_RECORD)()
    return trainer, torch.cuda.max_memory_reserved() - before


def peak_of(contender: str, args: argparse.Namespace) -> int:
    """Bytes, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", contender]
    for name in ("model", "batch", "amp", "threads", "device"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the same lbs, wherever it comes from
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def peak_here(contender: str, args: argparse.Namespace) -> int:
    """Growth of the peak over `STEPS_FOR_PEAK` steps, libraries already loaded."""
    load_libraries(args)
    before = resident("VmRSS")
    step = stepper(trainer_of(contender, args), STEPS_FOR_PEAK)
    ctypes.CDLL(None).malloc_trim(0)  # what building and calibrating freed is none of the steps'
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building and calibrating
    step()
    return resident("VmHWM") - before


def rows_of(times: dict[str, Times], peaks: dict[str, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the file."""
    rows = []
    for name, measured in times.items():
        steps = steps_of(name)
        peak = peaks.get(name)
        rows.append(
            {
                "contender": name,
                "median": measured.median / steps,
                "p20": measured.p20 / steps,
                "p80": measured.p80 / steps,
                "epoch": measured.median / steps * (args.epoch_images // args.batch),
                "slower_than_float": times["float"].ratio(measured) / steps,
                "peak_bytes": peak,
                "memory_over_float": None if peak is None else peak / peaks["float"],
            }
        )
    return rows


def run(args: argparse.Namespace, path: Path | None) -> None:
    """Measure everything, keep it at `path`, and print the table."""
    head = {
        **header(args),
        "model": args.model,
        "amp": args.amp,
        "single": args.single,
        "epoch_images": args.epoch_images,
    }
    times, peaks = measure(args)
    write(path, head, rows_of(times, peaks, args))
    for name in () if peaks else CONTENDERS:
        peaks[name] = peak_of(name, args)
        write(path, head, rows_of(times, peaks, args))
    for row in rows_of(times, peaks, args):
        memory = (
            "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e6:7.1f} MB x{row['memory_over_float']:.2f}"
        )
        print(
            f"{row['contender']:26s} {row['median'] * 1e3:8.1f} ms [{row['p20'] * 1e3:.1f} {row['p80'] * 1e3:.1f}] "
            f"x{row['slower_than_float']:.2f} float  {row['epoch']:7.1f} s an epoch{memory}"
        )


def write(path: Path | None, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file, whole or not at all."""
    if path is not None:
        write_json(path, {"version": 1, "level": "training", "header": head, "rows": rows})


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="cifar_resnet20", choices=sorted(lbs.models.REGISTRY))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--single", action="store_true", help="steps on a GPU as single launches, no CUDA graphs")
    parser.add_argument("--epoch-images", type=int, default=50_000, help="images of the epoch that is told")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/search_<model>.json")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_here(args.peak_of, args))
        return
    default = RESULTS / device_slug(args.device) / f"search_{args.model}.json" if args.save else None
    path = args.output or default
    run(args, path)
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
