"""One training step of a CIFAR network in time and peak memory: float, fixed bits, searched, one branch per width.

    python benchmarks/bench_search_step.py --model preresnet20 --batch 128 --threads 1 --amp bf16

Contenders run interleaved in one process, medians over the rounds. Peak memory is the growth of the resident set over
that of a process with torch, one small step and the same images, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.models
from lbs.search.budget import Budget, parameter_groups

Step = Callable[[], None]
KINDS = ("float", "fixed", "search", "multi-path")


def images(name: str, batch: int) -> tuple[Tensor, Tensor]:
    """A batch of random images and labels, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    shape = lbs.models.REGISTRY[name].input_shape
    x = torch.rand(batch, *shape, generator=generator).to(memory_format=torch.channels_last)
    return x, torch.randint(0, lbs.models.REGISTRY[name].num_classes, (batch,), generator=generator)


def training_step(model: nn.Module, budget: Budget | None, x: Tensor, y: Tensor, bf16: bool) -> Step:
    """Forward, backward, SGD and budget of one batch."""
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1e-3), lr=1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(x).float(), y)
        if budget is not None:
            loss = loss + budget()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if budget is not None:
            budget.step()

    return step


def contender(kind: str, name: str, x: Tensor, y: Tensor, bf16: bool) -> Step:
    """A step of `float`, `fixed` (4/4 bits), `multi-path`, or `search`: weight and activation gates in turn."""
    torch.manual_seed(0)
    model = lbs.models.create(name)
    if kind == "float":
        return training_step(model, None, x, y, bf16)
    if kind == "fixed":
        return training_step(lbs.calibrate(lbs.uniform(model, x[:1], 4, 4), [x]), None, x, y, bf16)
    searched = lbs.calibrate(lbs.prepare(model, x[:1], lbs.SearchConfig(multi_path=kind == "multi-path")), [x])
    return training_step(searched, Budget(searched, bops=0.012), x, y, bf16)


def measure(name: str, batch: int, rounds: int, bf16: bool) -> dict[str, float]:
    """Median seconds of a step, contenders interleaved."""
    x, y = images(name, batch)
    labels = {kind: (kind,) for kind in KINDS} | {"search": ("weight gates", "activation gates")}
    steps = {kind: contender(kind, name, x, y, bf16) for kind in KINDS}
    times: dict[str, list[float]] = {label: [] for kind in KINDS for label in labels[kind]}
    for index in range(rounds + 1):
        for kind in KINDS:
            for label in labels[kind]:
                started = time.perf_counter()
                steps[kind]()
                if index:  # the first round warms up
                    times[label].append(time.perf_counter() - started)
    return {label: statistics.median(values) for label, values in times.items()}


def peak_bytes(kind: str, name: str, batch: int, bf16: bool) -> int:
    """Growth of the peak resident set over four steps, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", kind, "--model", name, "--batch", str(batch)]
    command += ["--amp", "bf16" if bf16 else "off", "--threads", str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONPATH": str(Path(lbs.__file__).parent.parent)}  # the package measured here
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout.split()[-1])


def _peak_here(kind: str, name: str, batch: int, bf16: bool) -> int:
    x, y = images(name, batch)
    contender("float", name, x[:2], y[:2], bf16)()  # libraries and their buffers
    before = _status("VmRSS")
    step = contender(kind, name, x, y, bf16)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building and calibrating left behind is none of the step's
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(4):
        step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="preresnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--peak-of", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bf16 = args.amp == "bf16"
    if args.peak_of:
        print(_peak_here(args.peak_of, args.model, args.batch, bf16))
        return
    times = measure(args.model, args.batch, args.rounds, bf16)
    peaks = {kind: peak_bytes(kind, args.model, args.batch, bf16) for kind in KINDS}
    for label, seconds in times.items():
        print(f"{label:18} {seconds * 1e3:8.1f} ms   {seconds / times['float']:.2f}x")
    for kind, peak in peaks.items():
        print(f"{kind:18} {peak / 1e6:8.1f} MB   {peak / peaks['float']:.2f}x")
    row = {
        "model": args.model,
        "batch": args.batch,
        "threads": args.threads,
        "amp": args.amp,
        "torch": torch.__version__,
    }
    print(json.dumps({**row, "seconds": times, "peak_bytes": peaks}))


if __name__ == "__main__":
    main()
