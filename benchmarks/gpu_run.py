"""The parent of a GPU suite: parts in time boxes, processes that may break, files that are always whole."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_search, gpu_targets
from lbs_kernels import files
from lbs_kernels.tune.blame import Blame

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("gpu_suite.py")
GRACE = 5.0  # seconds a child may take to end after its time
RESTARTS = 8  # of a part whose kernels broke the device
WORTHWHILE = 12.0  # seconds; less is not worth the start of a process
SLACK = 5.0  # seconds kept for the last files
LOG = 4000  # characters kept of what a part printed


@dataclass(frozen=True)
class Run:
    """Where the results go and when to stop."""

    out: Path
    end: float  # of `clock`
    header: dict[str, Any]
    scratch: Path  # packed networks, logs, reports of single tools: nothing to keep
    clock: Callable[[], float] = time.time
    networks: int | None = None  # how many of gpu_models.ORDER are timed; None: as many as the time allows
    data: str = ""  # CIFAR-100, for the part `row`

    def save(self, part: str, body: dict[str, Any]) -> Path:
        """Write DIR/<part>.json whole or not at all."""
        path = self.out / f"{part}.json"
        text = json.dumps({"level": f"gpu_{part}", "version": 1, "header": self.header, **body}, indent=1)
        files.replace(path, (text + "\n").encode())
        return path

    def load(self, part: str) -> dict[str, Any]:
        """What DIR/<part>.json holds; empty where there is none."""
        path = self.out / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else {}


class Attempts(Blame):
    """Blame across processes: a child writes down what it is about to run, and its parent finds it there."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(folder / f".{part}.broken.json")
        self.current = folder / f".{part}.now"

    def __call__(self, name: str) -> bool:
        """Whether to run `name`; recorded if so."""
        if not super().__call__(name):
            return False
        self.current.write_text(name)
        return True

    def blame(self) -> str | None:
        """For the parent: what the child was running when it broke, from now on to be left out; None if it is known."""
        self.running = self.current.read_text() if self.current.exists() else None
        return None if self.running in self.broken else self.keep()


def header() -> dict[str, Any]:
    """What the numbers depend on: device, clocks, driver, versions, commit."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "clocks_and_driver": gpu_checks.output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv"
        ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "commit": gpu_checks.output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def deadline(boxes: dict[str, float], part: str, now: float, end: float) -> float:
    """When a part that begins now must end: whatever the boxes of the later parts leave.

    Boxes shrink in proportion where the time is shorter than all of them; what is left over goes to this part.
    """
    names = list(boxes)
    later = [boxes[name] for name in names[names.index(part) + 1 :]]
    left = max(0.0, end - now - SLACK)
    scale = min(1.0, left / (sum(later) + boxes[part]))
    return now + left - scale * sum(later)


def run_parts(
    run: Run,
    boxes: dict[str, float],
    parts: dict[str, Callable[[Run, float], Any]] | None = None,
    beside: Callable[[Run, float], contextlib.AbstractContextManager[None]] | None = None,
) -> bool:
    """Run parts one after the other, saving each and the targets; one that raises is recorded, the next still runs.

    Args:
        beside: goes on beside the build, until its deadline at most, where models are timed later.
    """
    parts = PARTS if parts is None else parts
    good, found, layers = True, [], resnet_layers()
    for name in boxes:
        begin = run.clock()
        until = deadline(boxes, name, begin, run.end)
        warming = beside(run, until) if beside and name == "build" and "models" in boxes else contextlib.nullcontext()
        try:
            with warming:
                body = parts[name](run, until)
        except Exception as error:  # noqa: BLE001  one broken part must not cost the measurements of the others
            body = {"error": f"{type(error).__name__}: {error}"}
        good = good and "error" not in body and body.get("passed", True)
        seconds = round(run.clock() - begin, 1)
        path = run.save(name, {**body, "seconds": seconds})
        found = gpu_targets.rows({part: run.load(part) for part in parts}, layers)
        run.save("targets", {"rows": found})
        print(f"{name}: {'failed' if 'error' in body else 'done'} in {seconds:.0f} s -> {path}", flush=True)
    for half_written in run.out.glob("*.json*.tmp"):  # by a child that was ended
        half_written.unlink()
    print(gpu_targets.table(found))
    return good


@functools.cache
def resnet_layers() -> list[str]:
    """The layers the targets speak of."""
    from benchmarks import gpu_layers

    order = ((gpu_layers.RESNETS, (128,), (gpu_layers.W4A4,)),)
    return [str(problem) for problem in gpu_layers.every(order)]


def child(run: Run, part: str, until: float, start: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Run a part in processes of its own until it is complete or its time is up; one that breaks is started again."""
    start = start_child if start is None else start
    broken: list[str] = []
    reason = ""
    for _ in range(1 + RESTARTS):
        if until - run.clock() < WORTHWHILE:
            reason = reason or "the time was up before it could begin"
            break
        process = start(run, part, until)
        code = finish(process, until + GRACE - run.clock())
        if isinstance(process, subprocess.Popen):
            kill(process)  # what it started may still compile
        if code in (0, None):
            reason = "" if code == 0 else "the time was up"
            break
        blamed = Attempts(run.scratch, part).blame()
        reason = f"its process ended with code {code}"
        if blamed is None:
            break
        broken.append(blamed)
    body = run.load(part)
    failed = {"error": reason} if reason.startswith("its process") or not body else {}
    log = run.scratch / f"{part}.log"
    words = log.read_text(errors="replace")[-LOG:] if log.exists() else ""
    return {**body, **failed, "broke_the_device": broken, "ended": reason or "complete", "log": words}


def start_child(run: Run, part: str, until: float) -> subprocess.Popen[bytes]:
    """This suite again, for one part; what it prints goes to its log."""
    command = [sys.executable, str(SCRIPT), "--out", str(run.out), "--child", part, "--until", str(until)]
    command += ["--scratch", str(run.scratch)]
    command += [] if run.networks is None else ["--networks", str(run.networks)]
    with (run.scratch / f"{part}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(run), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def environment(run: Run) -> dict[str, str]:
    """Of a child."""
    import triton

    found = {**os.environ, "LBS_TUNING_DIR": str(run.out), "PYTHONUNBUFFERED": "1"}
    # Named, for torch.compile gives its process a cache and an assembler of its own where nobody did: what was compiled
    # ahead would not be found from then on. A Triton that keeps them elsewhere costs time, no part.
    with contextlib.suppress(Exception):
        found["TRITON_CACHE_DIR"] = str(triton.knobs.cache.dir)
        found["TRITON_PTXAS_PATH"] = triton.knobs.nvidia.ptxas.path
    return found


@contextlib.contextmanager
def warm(run: Run, until: float) -> Iterator[None]:
    """Inside, networks are packed and torch.compile chooses kernels: it uses the GPU, so nothing may be timed.

    Left early it waits, until `until` at most, for the default way of torch.compile, which half of the targets need.
    """
    from benchmarks import gpu_models

    process = start_child(run, "warm", until)
    try:
        yield
        while run.clock() < until and process.poll() is None and not gpu_models.plain_done(run.scratch, run.networks):
            time.sleep(0.2)
    finally:
        kill(process)


def finish(process: Any, seconds: float) -> int | None:
    """The exit code, or None where the time was up and the process and its own were ended."""
    try:
        return int(process.wait(timeout=max(0.1, seconds)))
    except subprocess.TimeoutExpired:
        kill(process)
        return None


def kill(process: Any) -> None:
    """End a child and every process it started: they share its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


PARTS: dict[str, Callable[[Run, float], dict[str, Any]]] = {
    "build": lambda run, until: gpu_checks.build(until - run.clock()),
    "steps": lambda run, until: child(run, "steps", until),
    "models": lambda run, until: child(run, "models", until),
    "roofs": lambda run, until: child(run, "roofs", until),
    "layers": lambda run, until: child(run, "layers", until),
    "tests": lambda run, until: gpu_checks.tests(run.scratch, until - run.clock()),
    "search": lambda run, until: gpu_search.measure(run.out, until - run.clock()),
    "sanitizer": lambda run, until: gpu_checks.sanitizer(until - run.clock()),
    "row": lambda run, until: gpu_search.row(run.out, run.data, until - run.clock()),
}
