"""`lbs doctor`: what this machine has, what it lacks, why, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib
import platform
from dataclasses import asdict, dataclass

import torch

import lbs
from lbs.cli.console import console
from lbs.extras import EXTRAS
from lbs_kernels import device, extension
from lbs_kernels.gpu.configs import cuda
from lbs_kernels.gpu.configs.gemm import spills

NEEDS = {"train": "images in files, the data set digits and bars of progress", "report": "lbs report"}
PACKAGES = {"numpy": "numpy", "safetensors": "safetensors"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: `ok`, `missing` (needed) or `absent` (optional: what goes without it is said)."""

    what: str
    state: str
    detail: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 if something needed is missing."""
    out = console(args)
    findings = examine()
    for finding in findings:
        mark = {"ok": "ok     ", "missing": "MISSING", "absent": "absent "}[finding.state]
        out.say(f"{mark}  {finding.what}: {finding.detail}")
        if finding.fix:
            out.say(f"         fix: {finding.fix}")
    missing = [finding.what for finding in findings if finding.state == "missing"]
    absent = [finding.what for finding in findings if finding.state == "absent"]
    verdict = f"needed and missing: {', '.join(missing)}" if missing else "all that is needed is here"
    out.say(verdict + (f"; optional and absent: {', '.join(absent)}" if absent else ""))
    out.finish({"healthy": not missing, "findings": [asdict(finding) for finding in findings]})
    return 1 if missing else 0


def examine() -> list[Finding]:
    """Every finding, in the order a newcomer would ask."""
    about = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    return [
        Finding(f"lbs {lbs.__version__}", "ok", about),
        *[_package(module, name) for module, name in PACKAGES.items()],
        *[_package(module, name, extra) for module, (name, extra) in EXTRAS.items()],
        _processor(),
        _native_cpu(),
        _c_library(),
        _gpu(),
        _triton(),
        _native_cuda(),
    ]


def _package(module: str, name: str, extra: str = "") -> Finding:
    """A package, needed by all of lbs or by what an extra of it names."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        if extra:
            return Finding(name, "absent", f"{error}; needed by {NEEDS[extra]} only", f"pip install {name}")
        return Finding(name, "missing", f"{error}", f"pip install {name}")
    return Finding(name, "ok", str(getattr(found, "__version__", "installed")))


def _processor() -> Finding:
    detail = (
        f"{device.cpu_name()}, {device.processors()} usable processors, torch uses {torch.get_num_threads()} threads"
    )
    return Finding("processor", "ok", detail)


def _native_cpu() -> Finding:
    if extension.cpu is None:
        reason, fix = _build_words("cpu", extension.cpu_reason)
        return Finding(
            "native CPU module", "missing", f"{reason}. Without it packed networks run on the slow reference", fix
        )
    sets = ", ".join(f"{isa} ({why})" if why else isa for isa, why in device.isa_reasons().items())
    return Finding("native CPU module", "ok", f"uses {device.default_isa()}; built for {sets}")


def _c_library() -> Finding:
    if extension.C_LIBRARY.exists():
        return Finding("C library", "ok", f"{extension.C_LIBRARY}, and lbs.h beside it")
    part = extension.build_report().get("c", {})
    reason = str(part.get("reason") or "it was never built").split("\n")[0]
    return Finding(
        "C library", "absent", f"{reason}; needed by programs in C only", part.get("fix") or "pip install -e ."
    )


def _gpu() -> Finding:
    name = device.gpu_name()
    if name is not None:
        return Finding("GPU", "ok", f"{name}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        fix = "install a CUDA build of torch if there is a GPU: https://pytorch.org/get-started/locally"
        return Finding("GPU", "absent", "this torch was built without CUDA; everything runs on the processor", fix)
    fix = "if there is a GPU, install its driver: nvidia-smi must list it"
    return Finding("GPU", "absent", "torch finds no CUDA device; everything runs on the processor", fix)


def _triton() -> Finding:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        if device.gpu_name() is not None:
            detail = f"{error}. Without it packed networks run on the slow reference on this GPU"
            return Finding("Triton", "missing", detail, "pip install triton")
        return Finding("Triton", "absent", f"{error}; needed on a GPU only", "pip install triton")
    version = str(triton.__version__)
    spilled = spills(version)
    if spilled is None:
        return Finding("Triton", "ok", version)
    detail = f"{version}, which {spilled}: results are right, those layers slower than they could be"
    return Finding("Triton", "ok", detail, "pip install 'triton<3.8'")


def _native_cuda() -> Finding:
    if extension.cuda is not None:
        return Finding("native CUDA module", "ok", f"loaded; {_cuda_kernels()}")
    reason, fix = _build_words("cuda", extension.cuda_reason)
    return Finding("native CUDA module", "absent", f"{reason}; needed on a GPU only, Triton serves without it", fix)


def _cuda_kernels() -> str:
    """Which kernels of the module this machine runs."""
    if device.gpu_name() is None:
        return "its kernels need a GPU: s8 compute capability 9.0, one-bit 8.x or 9.0"
    instructions = cuda.machines("cuda")
    kinds = [name for name, needed in (("s8", "wgmma"), ("one-bit", "mma")) if needed in instructions]
    runs = f"runs its {' and '.join(kinds)} kernels" if kinds else "runs none of its kernels"
    return f"this GPU {runs} (s8 takes compute capability 9.0, one-bit 8.x or 9.0)"


def _build_words(name: str, reason: str) -> tuple[str, str]:
    """(why, command) of an absent module: what the build wrote down if that is why, else what loading it said."""
    part = extension.build_report().get(name, {})
    if part.get("reason") and reason.startswith(str(part["reason"])):
        return str(part["reason"]).split("\n")[0], str(part["fix"])
    why, _, fix = reason.rpartition("; build")
    return (why, fix.partition(": ")[2]) if why else (reason, "pip install -e .")
