"""What the benchmarks of single operations share: layer shapes of real networks, checks, the table and the JSON file.

One schema for all of them:

    {"version": 1, "level": "op", "op": ..., "header": {...}, "roofs": {...}, "missing": {contender: reason},
     "rows": [{"problem", "contender", "median", "p20", "p80",      seconds
               "ops_per_s", "bytes_per_s", "roof", "faster_than": {baseline: ratio}}],
     "geomean": {contender: {baseline: ratio}}}

Operations (two per multiply-accumulate) and bytes are those of the logical shapes, no padding counted. `roof` is the
share of what the machine reached in the same run: the larger of operations over an int8 (GPU: float16) matrix product's
and bytes over a copy's. `packed` is the step inside one native call (what the first thread spent), which is how it runs
in a network; `packed call` is that call on its own, with the conversion of its image and its results. A torch contender
is one call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lbs.models
from lbs_kernels import device as machine
from lbs_kernels.errors import BackendError
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Program
from lbs_kernels.run.cpu import CpuRunner
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times.stopwatch import SelfTimed, Times, cuda_graph, interleave
from lbs_kernels.times.table import device_slug
from lbs_kernels.tune.roof import SIZE, int8_product

RESULTS = Path(__file__).with_name("results")
SOURCES = ("csrc", "lbs", "lbs_kernels", "benchmarks", ":!benchmarks/results")
Contender = Callable[[], object]


@dataclass
class Case:
    """One problem and everybody who solves it. `moved` is bytes read and written, by contender."""

    problem: Problem
    contenders: dict[str, Contender]
    moved: dict[str, float]
    operations: float


@dataclass
class Report:
    """What becomes the JSON file."""

    op: str
    header: dict[str, object]
    roofs: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, object]] = field(default_factory=list)
    geomean: dict[str, dict[str, float]] = field(default_factory=dict)
    version: int = 1
    level: str = "op"


def arguments(op: str) -> argparse.Namespace:
    """The command line every op benchmark has."""
    parser = argparse.ArgumentParser(description=f"Time {op} on the layers of real networks.")
    parser.add_argument("--networks", nargs="+", default=["preresnet20"], choices=sorted(lbs.models.REGISTRY))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", nargs="+", default=["2/2", "4/4", "8/8"], help="weight/activation bits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/<device>/op_{op}.json")
    parser.add_argument("--output", type=Path, help="write the JSON here instead")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


def bit_pairs(args: argparse.Namespace) -> list[tuple[int, int]]:
    """[(weight bits, activation bits)] of --bits."""
    return [(int(w), int(a)) for w, a in (pair.split("/") for pair in args.bits)]


def layers(networks: Iterable[str], kind: type[nn.Module]) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Every distinct layer of a kind and the shape of its input, from a forward pass that computes nothing."""
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for name in networks:
        model = lbs.models.create(name).to("meta").eval()

        def record(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            found.setdefault(f"{module} {tuple(inputs[0].shape)}", (module, tuple(inputs[0].shape)))

        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_hook(record)
        model(lbs.models.example(name).to("meta"))
    return list(found.values())


def packed(program: Program, blob: Tensor, image: Tensor, step: int, threads: int) -> dict[str, Contender]:
    """Our own contenders for one step of a program, after every code and stream was found equal to the reference.

    Raises:
        BackendError: no native back end here. AssertionError: a result is wrong, so no time is told.
    """
    on_cpu = image.device.type == "cpu"
    runner = CpuRunner(program, blob) if on_cpu else _gpu_runner(program, blob, image.device)
    actual: dict[int, Tensor] = {}
    expected: dict[int, Tensor] = {}
    runner.run([image], trace=actual)
    ReferenceRunner(program, blob).run([image.cpu()], trace=expected)
    for index, value in expected.items():
        if not torch.equal(actual[index].cpu(), value):
            raise AssertionError(
                f"{program.steps[step].name}: tensor {index} differs from the reference; nothing is timed"
            )
    if not on_cpu:
        launch = runner.plan(image.shape[0]).launches[step]
        return {"packed": cuda_graph(lambda: launch([image])), "packed call": cuda_graph(lambda: runner.run([image]))}
    inside = SelfTimed(lambda: runner.step_seconds([image], threads=threads, rounds=1)[step])
    return {"packed": inside, "packed call": lambda: runner.run([image], threads=threads)}


def _gpu_runner(program: Program, blob: Tensor, device: torch.device) -> Any:
    from lbs_kernels.gpu.runner import GpuRunner  # needs Triton; the processor's part does not

    return GpuRunner(program, blob, device)


def layer(problem: Problem, threads: int) -> dict[str, Contender]:
    """Our own contenders for a layer as it stands in a network, on random data."""
    program, blob = layer_program(problem)
    shape = (problem.batch, problem.in_channels, problem.height, problem.width)
    step = [step.name for step in program.steps].index(LAYER)
    return packed(program, blob, torch.rand(shape, device=problem.device), step, threads)


def torch_dtypes(device: str) -> dict[str, torch.dtype]:
    """float32 and the half precision a user of this device would reach for, by contender name."""
    half = torch.bfloat16 if torch.device(device).type == "cpu" else torch.float16
    return {f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in (torch.float32, half)}


def recorded(call: Contender, device: str) -> Contender:
    """The call itself on the CPU, a CUDA graph of it on a GPU."""
    return call if torch.device(device).type == "cpu" else cuda_graph(call)


def header(args: argparse.Namespace) -> dict[str, object]:
    """Day, machine, versions and settings; `changed`: sources differ from the commit; `load`: others were at work."""
    on_gpu = torch.device(args.device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": machine.gpu_name() if on_gpu else machine.cpu_name(),
        "isa": None if on_gpu else machine.default_isa(),
        "processors": machine.processors(),
        "load": os.getloadavg()[0],
        "threads": args.threads,
        "batch": args.batch,
        "rounds": args.rounds,
        "l2": "warm" if on_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", *SOURCES)),
    }


def _git(*arguments: str) -> str:
    """What git prints, or nothing outside a repository."""
    root = Path(__file__).resolve().parents[1]
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, what this process holds, VmHWM, the most it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def roofs(device: str) -> dict[str, float]:
    """Operations per second of a large matrix product and bytes per second of a large copy, measured here and now."""
    on_cpu = torch.device(device).type == "cpu"
    size = SIZE if on_cpu else 8192
    source = torch.randint(0, 255, (64 << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if on_cpu:
        product: Contender = int8_product()
    else:
        h = torch.randn(size, size, dtype=torch.float16, device=device)
        product = lambda: h @ h  # noqa: E731
    times = interleave({"product": product, "copy": lambda: target.copy_(source)}, device=device, rounds=10)
    return {
        "operations_per_s": 2 * size**3 / times["product"].p20,
        "bytes_per_s": 2 * source.numel() / times["copy"].p20,
    }


def run(op: str, cases: Iterable[Case], args: argparse.Namespace, missing: dict[str, str]) -> Report:
    """Time every case, print its rows as they come, and write the file where --save or --output asks for it."""
    report = Report(op, header(args), roofs(args.device), missing)
    print("  ".join(f"{key}={value}" for key, value in report.header.items()))
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    for case in cases:
        times = interleave(case.contenders, device=args.device, rounds=args.rounds, warmup=0.05)
        for name, measured in times.items():
            report.rows.append(_row(case, name, times, report.roofs))
            ratios = " ".join(f"x{ratio:.2f} {other}" for other, ratio in _ratios(measured, times).items())
            print(f"{case.problem}  {measured}  {ratios}")
    report.geomean = _geomean(report.rows)
    for name, means in report.geomean.items():
        print(f"geomean {name}: " + ", ".join(f"x{mean:.2f} {other}" for other, mean in means.items()))
    path = args.output or (RESULTS / device_slug(args.device) / f"op_{op}.json" if args.save else None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(report), indent=1) + "\n")
        print(f"wrote {path}")
    return report


def _ratios(measured: Times, times: dict[str, Times]) -> dict[str, float]:
    if not measured.name.startswith("packed"):
        return {}
    return {name: measured.ratio(other) for name, other in times.items() if not name.startswith("packed")}


def _row(case: Case, name: str, times: dict[str, Times], roof: dict[str, float]) -> dict[str, object]:
    measured = times[name]
    moved = case.moved[name]
    share = max(case.operations / roof["operations_per_s"], moved / roof["bytes_per_s"]) / measured.median
    return {
        "problem": str(case.problem),
        "contender": name,
        "median": measured.median,
        "p20": measured.p20,
        "p80": measured.p80,
        "ops_per_s": case.operations / measured.median,
        "bytes_per_s": moved / measured.median,
        "roof": share,
        "faster_than": _ratios(measured, times),
    }


def _geomean(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    collected: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for other, ratio in row["faster_than"].items():  # type: ignore[attr-defined]
            collected.setdefault(str(row["contender"]), {}).setdefault(other, []).append(ratio)
    return {
        name: {other: math.exp(sum(map(math.log, ratios)) / len(ratios)) for other, ratios in others.items()}
        for name, others in collected.items()
    }


def require_backend(device: str) -> None:
    """Stop early, with the way out, where there is nothing of ours to time."""
    if torch.device(device).type == "cpu" and machine.default_isa() is None:
        raise BackendError("the native module is missing, there is nothing to time; build it: pip install -e .")
