"""The GPU suite as far as a processor runs it: kernels interpreted, on tiny shapes. Its times mean nothing.

Parts that measure run in their own process as they do on a GPU, with the device taken for the processor; the build is
looked at, tests are collected, and what needs a GPU says so. What is checked is that every part begins, saves and ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_checks
from benchmarks.gpu_run import Run, run_parts

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "it needs a GPU"
# A child as the suite starts it, with what it works on made small.
CHILD = """
import sys, time
from pathlib import Path
import lbs.models
from benchmarks import gpu_children, gpu_compile, gpu_device, gpu_layers, gpu_models, gpu_roofs, gpu_run, gpu_steps
from lbs_kernels.run import backends
from lbs_kernels.times import stopwatch

part, out, scratch, until = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
small = lbs.models.entry("digits_resnet8")
gpu_device.DEVICE = "cpu"
gpu_roofs.COPY_BYTES, gpu_roofs.SIZE = 1 << 16, 64
gpu_steps.NETWORKS, gpu_steps.BATCHES = (("digits_resnet8", "w4a4"),), (2, 1)
gpu_layers.COSTLIEST = 1
gpu_layers.NEAR, gpu_layers.FAR = 0, 1
gpu_models.ORDER, gpu_models.COMPILED_AT = (("digits_resnet8", 2),), ()
gpu_models.variants = lambda network: ["w4a4"]
quick = stopwatch.interleave
stopwatch.interleave = lambda calls, **options: quick(
    calls, **{**options, "rounds": 2, "warmup": 1e-4, "cold_l2": False}
)
backends.AUTOMATIC["cpu"] = ("gpu", "reference")

class Compiler:
    jobs = {}
    def __init__(self, workers): pass
    def submit(self, name, function, *arguments): pass
    def wait(self, name, until): return "nothing is compiled"
    def stop(self): pass

gpu_compile.Compiler = Compiler
gpu_children.run(part, gpu_run.Run(out, until, {"device": "interpreter"}, scratch))
"""


def interpreted(part: str) -> Callable[[Run, float], dict[str, Any]]:
    """A part that measures, in a process of its own."""

    def go(run: Run, until: float) -> dict[str, Any]:
        environment = {
            **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "LBS_TUNING_DIR": str(run.out),
            "TRITON_CACHE_DIR": str(run.scratch / "triton"),
        }  # fmt: skip
        command = [sys.executable, "-c", CHILD, part, str(run.out), str(run.scratch), str(until)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, until - run.clock()),
            check=False,
        )  # fmt: skip
        body = run.load(part)
        return body if done.returncode == 0 else {**body, "error": done.stderr[-2000:]}

    return go


def collected(run: Run, until: float) -> dict[str, Any]:
    """How many GPU tests are there to run."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu and not slow", *gpu_checks.PYTEST]
    code, text = gpu_checks.call([*command, *gpu_checks.gpu_files()], until - run.clock())
    count = sum("::" in line for line in text.splitlines())
    failed = {"error": f"exit code {code}"} if code or not count else {}
    return {"collected": count, "reason": f"{count} were collected, none ran", "tail": text[-500:], **failed}


PARTS: dict[str, Callable[[Run, float], dict[str, Any]]] = {
    "build": lambda run, until: {"not_carried": gpu_checks.gpu_carry.why_not()},
    **{part: interpreted(part) for part in ("steps", "models", "roofs", "layers")},
    "tests": collected,
    "search": lambda run, until: {"reason": NO_GPU},
    "sanitizer": lambda run, until: {"reason": NO_GPU},
}
SECONDS = 120.0  # of every part at most


def main(out: Path) -> int:
    """Exit code 0 where every part went well."""
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="lbs-gpu-dry-"))
    run = Run(out, time.time() + SECONDS * len(PARTS), {"device": "interpreter"}, scratch)
    return 0 if run_parts(run, dict.fromkeys(PARTS, SECONDS), PARTS) else 1
