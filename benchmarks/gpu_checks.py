"""What a GPU machine is asked beside times: does it build, do the tests pass, is compute-sanitizer content."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_carry

ROOT = Path(__file__).resolve().parents[1]
BOTH = 30.0  # seconds; with less left the CPU module is not begun
TEST_PROCESSES = 12  # compiling their kernels is what takes the time; each holds half a GiB of the GPU
NO_PYTEST = "pytest is not installed, and with it the tests run: pip install pytest hypothesis"
# A file that cannot be imported, for want of hypothesis say, is an error of its own and must not stop the others.
PYTEST = ("-p", "no:cacheprovider", "--continue-on-collection-errors")
GPU_TEST = r"mark\.gpu|CONTENDERS"
# What has changed since it ran on a GPU, or never did: kernels in CUDA, those of bytes before the others; then those of
# training, and what torch compiles, which takes one process half a minute; at the end the hundreds of tiles that
# compilers are busy with for minutes.
FIRST = ("s8", "nibbles", "onebit", "cuda|search_recorded|forms|stem|depthwise", "fakequant|search|half|pack_gpu")
LAST = "triton_gpu"
# Kernels in CUDA; those in Triton are not ours to sanitize. A few cases of each, as everything runs 10 to 100 times
# slower, the most telling first: every tile with windows that leave the image, then both epilogues.
SANITIZED = ("test_onebit_gpu.py", "test_s8_gpu.py", "test_nibbles_gpu.py")
# Each tensor an allocation of its own, so that an access behind its end is one outside every allocation.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
CASES = "2-4-odd or 4-4-outside or w8_zero-outside or w8a4_zero-outside or codes_alone"
INTERRUPTED = 8.0  # seconds kept for pytest's words about the failures when its time is up
SUMMARY = 5.0  # seconds kept for the end of a test and the sanitizer's summary


def output(*command: str) -> str:
    """What a program prints, or why it did not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def call(command: list[str], seconds: float, grace: float = 0.0, **environment: str) -> tuple[int | None, str]:
    """Exit code and output of a command; the code is None where it was ended because the time was up.

    grace: seconds before the end at which it is interrupted, to say what it has found so far.
    """
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=max(1.0, seconds - grace))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if grace else signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            return None, text
    return process.returncode, text


def architecture() -> str:
    """The GPU's own, for nvcc: "90a" of an H100 or H200."""
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def build(seconds: float) -> dict[str, Any]:
    """The CUDA module that was carried here, else both native modules for this machine, in place; it fails without the
    one in CUDA, whose reason is told.
    """
    refused = gpu_carry.why_not()
    if not refused:
        return {"passed": True, "ended": "carried", "modules": json.loads(gpu_carry.NOTE.read_text())}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    begin = time.monotonic()
    # The CUDA module first: the other one takes a minute and nothing here depends on it.
    code, text = call(command, seconds, LBS_CUDA_ARCHS=architecture(), LBS_BUILD_CPU="0")
    cuda_code = code
    left = seconds - (time.monotonic() - begin)
    if left > BOTH:
        code, text = call(command, left, LBS_CUDA_ARCHS=architecture())
    report = ROOT / "lbs_kernels" / "_build_report.json"
    modules = json.loads(report.read_text()) if report.exists() else {}
    doctor_code, doctor = call([sys.executable, "-m", "lbs", "doctor"], 30)
    return {
        # Without the CUDA module its tests would all be skipped, and look green.
        "passed": cuda_code == 0 and bool(modules.get("cuda", {}).get("built")),
        "ended": "the time was up" if code is None else f"exit code {code}",
        "not_carried": refused,
        "modules": modules,
        "doctor": doctor.splitlines(),
        "doctor_code": doctor_code,
        "tail": text[-2000:],
    }


def tests(scratch: Path, seconds: float) -> dict[str, Any]:
    """Tests marked `gpu` that are not slow: a benchmark of kernels that fail their tests is worth nothing.

    The slow ones are some hundreds more random programs, whose compilation alone would take the whole lease.
    """
    if importlib.util.find_spec("pytest") is None:
        return {"passed": False, "reason": NO_PYTEST}
    report = scratch / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not slow", f"--junitxml={report}"]
    command += [*PYTEST, *gpu_files()]
    environment = {"COLUMNS": "300"}  # else pytest cuts the reasons of its summary off
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(TEST_PROCESSES), "--maxschedchunk", "1"]  # else one process compiles what takes longest
        environment["OMP_NUM_THREADS"] = "1"  # else the references of all processes fight for the processors
    begin = time.monotonic()
    code, text = call(command, seconds, grace=INTERRUPTED, **environment)
    passed = code == 0 and not no_module(report)  # skipped for want of the module is not green
    body = {"passed": passed, **count(report), "left_out": "slow", "pytest_seconds": round(time.monotonic() - begin, 1)}
    if code is None:
        body = {**so_far(text), **body, "reason": "the time was up before the tests ended"}
    failed = [line.strip() for line in text.splitlines() if re.search(r"\b(FAILED|ERROR)\b", line)]
    failed.sort(key=lambda line: not line.startswith(("FAILED", "ERROR")))  # the summary first, which tells reasons
    return {**body, "failed": failed[:100], "tail": text[-30_000:]}


def so_far(text: str) -> dict[str, int]:
    """Counts of the tests that ended, from what `pytest -v` printed."""
    words = {"tests": "PASSED|FAILED|ERROR|SKIPPED", "failures": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}
    lines = [line for line in text.splitlines() if "::" in line and " - " not in line]  # not those of the summary
    return {key: sum(bool(re.search(rf"\b({word})\b", line)) for line in lines) for key, word in words.items()}


def gpu_files() -> list[str]:
    """Test files that hold a test marked `gpu`, in the order to run them: the time may end the tests anywhere.

    Importing the others would take longer than running these.
    """
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(GPU_TEST, path.read_text())]
    names = sorted(str(path.relative_to(ROOT)) for path in found)

    def place(name: str) -> int:
        turn = next((turn for turn, pattern in enumerate(FIRST) if re.search(pattern, name)), len(FIRST))
        return len(FIRST) + 1 if re.search(LAST, name) else turn

    return sorted(names, key=place)


def count(report: Path) -> dict[str, int]:
    """Numbers of a JUnit report, added over its suites; empty where pytest wrote none."""
    if not report.exists():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}


def no_module(report: Path) -> int:
    """How many tests of a JUnit report were skipped because the CUDA module is missing."""
    if not report.exists():
        return 0
    skips = ElementTree.parse(report).getroot().iter("skipped")
    return sum("CUDA module" in (skip.get("message") or "") for skip in skips)


def sanitizer(seconds: float) -> dict[str, Any]:
    """compute-sanitizer over the GPU tests of kernels in CUDA: memcheck, then racecheck, half of the time each."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    reason = "compute-sanitizer was not found" if program is None else ""
    if importlib.util.find_spec("pytest") is None:
        reason = NO_PYTEST
    if program is None or reason:
        return {"passed": True, "tools": {tool: {"errors": None, "reason": reason} for tool in TOOLS}}
    files = [f"tests/kernels/{name}" for name in SANITIZED]
    found: dict[str, Any] = {}
    for place, tool in enumerate(TOOLS):
        begin = time.monotonic()
        command = [program, "--tool", tool, "--print-limit", "20", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-v", "-x", "-m", "gpu", "-k", CASES]
        command += ["-p", "benchmarks.gpu_stop", *PYTEST, *files]
        box = seconds / (len(TOOLS) - place)
        code, text = call(command, box, **UNCACHED, LBS_STOP_AT=str(time.time() + box - SUMMARY))
        seconds -= time.monotonic() - begin
        found[tool] = {**verdict(code, text), "tail": text[-2000:]}
    return {"passed": not any(one["errors"] for one in found.values()), "tools": found, "cases": CASES, "files": files}


TOOLS = ("memcheck", "racecheck")


def verdict(code: int | None, text: str) -> dict[str, Any]:
    """{errors, reason, covered} of what compute-sanitizer printed.

    errors: None where it did not come to a summary. reason: how far it came, or why nowhere. covered: what passed.
    """
    summaries = [int(number) for number in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)]
    chosen = re.search(r"\b(\d+) selected", text) or re.search(r"\bcollected (\d+) items?", text)
    covered = re.findall(r"^(\S+::.+?) PASSED", text, re.MULTILINE)
    reason = f"{len(covered)} of {chosen[1] if chosen else '?'} tests"
    errors: int | None = sum(summaries)
    if code is None:
        errors, reason = None, f"the time was up after {reason}"
    elif not summaries:
        errors, reason = None, f"it printed no summary (exit code {code}) after {reason}"
    elif not covered:
        errors, reason = errors or None, "no test passed under it"
    elif "Interrupted" in text:
        reason += ", as far as the time went"
    return {"errors": errors, "reason": reason, "covered": covered}
