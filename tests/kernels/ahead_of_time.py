"""Compile Triton launches for a GPU that is not there: the real argument binder, compiler and ptxas, but no launch.

with compiling("sm_90", folder) as kernels:
    some_kernel[grid](...)          # compiled, not run
kernels[0].ptx, kernels[0].spill_bytes
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    name: str
    ttgir: str
    ptx: str
    cubin: bytes
    log: str  # of ptxas -v
    shared_bytes: int  # of a block

    @functools.cached_property
    def sass(self) -> str:
        """The machine code, by the disassembler that Triton ships."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [
                str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"),
                "-sass",
                file.name,
            ]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def registers(self) -> int:
        return max(int(count) for count in re.findall(r"Used (\d+) registers", self.log))

    @property
    def spill_bytes(self) -> int:
        """Spilled stores and loads together; fails where ptxas did not say."""
        found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        assert found, f"ptxas reported nothing: {self.log!r}"
        return sum(int(stores) + int(loads) for stores, loads in found)


class _NoDevice:
    """Stands in for the CUDA driver: says which GPU to compile for."""

    _count = itertools.count()

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self._number = next(self._count)  # not id(self), which a later object may have again

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"none {self._number}"  # a key of the kernels' caches: nothing compiled before is found again

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: str, folder: Path) -> Iterator[list[Compiled]]:
    """Inside, every launch of a kernel compiles it for `target` and appends to the list that is yielded.

    `folder` takes the compiler's cache: what was compiled before has no log of ptxas.
    """
    kernels: list[Compiled] = []
    run = JITFunction.run
    previous = driver._active  # None without a GPU, where asking for `active` raises

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, **{**kwargs, "warmup": True})
        kernels.append(
            Compiled(
                kernel.name, kernel.asm["ttgir"], kernel.asm["ptx"], kernel.asm["cubin"], log.getvalue(),
                kernel.metadata.shared,
            )
        )  # fmt: skip
        return kernel

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        stack.enter_context(triton.knobs.nvidia.scope())
        stack.enter_context(triton.knobs.compilation.scope())
        triton.knobs.cache.dir = str(folder)
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.disable_line_info = True  # the same instructions, a twentieth sooner
        JITFunction.run = compile_only
        stack.callback(setattr, JITFunction, "run", run)
        driver.set_active(_NoDevice(TARGETS[target]))
        stack.callback(driver.set_active, previous)
        yield kernels
