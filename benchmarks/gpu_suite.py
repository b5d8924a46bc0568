"""Everything this project wants to know from a GPU, in one command that may be the only one a machine ever runs.

    python benchmarks/gpu_suite.py --out DIR [--only PART ...] [--minutes M]

Parts run in the order of `PARTS`; each writes DIR/<part>.json when it ends (layers: after every problem), so that
whatever ends the run early leaves what was measured. The header of every file says what it was measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script from anywhere
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_layers  # noqa: E402  the path above comes first
from lbs_kernels import timing  # noqa: E402

COPY_BYTES = 1 << 30  # far beyond any L2, so that the copy runs at the speed of the memory
NO_GPU = (
    "gpu_suite: torch sees no CUDA device here; it measures GPU kernels and nothing else. Run it on a machine with an "
    "NVIDIA GPU (sm_80 or newer) and a CUDA build of torch; `lbs bench` measures the CPU."
)


@dataclass(frozen=True)
class Run:
    """Where the results go and when to stop."""

    out: Path
    deadline: float  # of time.monotonic()
    header: dict[str, Any]

    def save(self, part: str, body: dict[str, Any]) -> Path:
        """Write DIR/<part>.json whole or not at all."""
        path = self.out / f"{part}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"part": part, "header": self.header, **body}, indent=1) + "\n")
        os.replace(temporary, path)
        return path

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def part_tests(run: Run) -> dict[str, Any]:
    """`pytest -m gpu`: a benchmark of kernels that fail their tests is worth nothing."""
    report = run.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, run.seconds_left)
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "reason": "the time was up before the tests ended"}
    return {"passed": done.returncode == 0, **_count(report), "tail": done.stdout[-4000:] + done.stderr[-1000:]}


def _count(report: Path) -> dict[str, int]:
    """Numbers of a JUnit report, added over its suites; empty where pytest wrote none."""
    if not report.exists():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}


def part_bandwidth(run: Run) -> dict[str, Any]:
    """Copy of 1 GiB, device to device: the roof that memory-bound layers are compared with."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = timing.interleave({"copy": lambda: target.copy_(source)}, device="cuda", rounds=30)["copy"]
    return {
        "bytes": 2 * COPY_BYTES,
        "median_s": times.median,
        "p20_s": times.p20,
        "p80_s": times.p80,
        "bytes_per_s": 2 * COPY_BYTES / times.median,
    }


def part_layers(run: Run) -> dict[str, Any]:
    """Layer shapes of the networks over the tuning candidates."""
    todo = gpu_layers.problems(gpu_layers.NETWORKS, gpu_layers.BATCHES, gpu_layers.BITS)
    return gpu_layers.sweep(todo, torch.device("cuda"), run.deadline, lambda body: run.save("layers", body))


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "tests": part_tests,
    "bandwidth": part_bandwidth,
    "layers": part_layers,
}


def header() -> dict[str, Any]:
    """What the numbers depend on: device, clocks, driver, versions, commit."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "clocks_and_driver": _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv"
        ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _output(*command: str) -> str:
    """What a program prints, or why it did not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result files; made if missing")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="run this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this long (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: the run needs some time, give a positive number")
    return args


def selected(only: list[str] | None) -> list[str]:
    """Parts to run, always in the order of `PARTS`."""
    return [name for name in PARTS if only is None or name in only]


def run_parts(run: Run, names: list[str]) -> bool:
    """Run parts one after the other, saving each; a part that raises is recorded and the next one still runs."""
    good = True
    for name in names:
        start = time.monotonic()
        try:
            body = PARTS[name](run)
        except Exception as error:  # noqa: BLE001  one broken part must not cost the measurements of the others
            body = {"error": f"{type(error).__name__}: {error}"}
        good = good and "error" not in body and body.get("passed", True)
        path = run.save(name, {**body, "seconds": round(time.monotonic() - start, 1)})
        print(
            f"{name}: {'failed' if 'error' in body else 'done'} in {time.monotonic() - start:.0f} s -> {path}",
            flush=True,
        )
    return good


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 where every part went well, 1 where one failed, 2 without a GPU."""
    args = arguments(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, time.monotonic() + 60 * args.minutes, header())
    return 0 if run_parts(run, selected(args.only)) else 1


if __name__ == "__main__":
    sys.exit(main())
