"""What this machine has: processor features, instruction sets of the native kernels, threads, GPU."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from lbs_kernels import extension


def cpu_name() -> str:
    """The processor's model name, as the operating system tells it; with family and model where it has no number.

    Virtual machines shorten names to "AMD EPYC", which would file the times of different processors under one.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return _described(lines) or platform.machine()


def _described(cpuinfo: list[str]) -> str:
    """The name in the lines of /proc/cpuinfo; empty where there is none."""
    facts: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in cpuinfo):
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", "")
    if name and not any(letter.isdigit() for letter in name) and {"cpu family", "model"} <= facts.keys():
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    return name


def cpu_features() -> dict[str, bool]:
    """Flags the native kernels choose by, name -> present; empty where the native module is missing."""
    return dict(extension.cpu.cpu_features()) if extension.cpu is not None else {}


def isa_reasons() -> dict[str, str]:
    """Instruction set -> why its kernels cannot run here, "" where they can; empty without the native module."""
    return dict(extension.cpu.isa_reasons()) if extension.cpu is not None else {}


def named_isa() -> str:
    """The instruction set that LBS_ISA names; empty where it leaves the choice."""
    name = os.environ.get("LBS_ISA", "")
    return "" if name == "auto" else name


def default_isa() -> str | None:
    """The instruction set isa="auto" stands for here; None without the native module."""
    return str(extension.cpu.resolve_isa("auto")) if extension.cpu is not None else None


def processors() -> int:
    """Processors this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def default_threads() -> int:
    """Threads a native call uses unless told otherwise: torch's number, at most the processors there are."""
    import torch  # lazily, as below: who computes in numpy asks for processors alone

    return max(1, min(torch.get_num_threads(), processors()))


@dataclass(frozen=True)
class Gpu:
    """What kernels and measurements count on, of the largest GPU of a compute capability."""

    multiprocessors: int
    shared_bytes: int  # that one block may have
    l2_bytes: int


# Where nothing is asked of the device: defaults are chosen, and kernels compiled, on machines without one.
GPUS = {
    "sm_80": Gpu(108, 163 * 1024, 40 << 20),  # A100
    "sm_90": Gpu(132, 227 * 1024, 60 << 20),  # H200; an H100 has 50 MB
}


def gpu_name() -> str | None:
    """Name and compute capability of GPU 0, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (sm_{major}{minor})"
