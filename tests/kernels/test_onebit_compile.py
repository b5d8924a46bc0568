"""The built CUDA module: one-bit tensor-core instructions are in every kernel, and nothing spills.

Reads the machine code of `lbs_kernels._cuda` as it was built, by the disassembler that Triton ships; compiles nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lbs_kernels import extension

SPEC = importlib.util.find_spec("triton")
TOOL = Path(SPEC.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if SPEC and SPEC.origin else Path()
pytestmark = [
    pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}"),
    pytest.mark.skipif(not TOOL.is_file(), reason="no cuobjdump; it comes with Triton: pip install triton"),
]
REGISTERS = 255  # what one thread may have


@dataclass(frozen=True)
class Kernel:
    """Machine code and resources of one kernel for one architecture."""

    machine: str
    groups: int
    filters: int
    sass: str
    registers: int
    stack: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def ask(option: str, arch: str) -> str:
    assert extension.cuda is not None
    assert extension.cuda.__file__
    command = [str(TOOL), option, "-arch", arch, extension.cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sections(text: str) -> dict[tuple[str, int, int], str]:
    """Text after the name of every one-bit kernel, up to the next kernel."""
    parts = re.split(r"Function :? ?(\S+?):?\n", text)
    found = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        match = re.search(r"onebit_(wgmma|mma)I.*?TileILi(\d+)ELi(\d+)ELi\d+E", name)
        if match:
            found[match.group(1), int(match.group(2)), int(match.group(3))] = body
    return found


@functools.cache
def kernels(arch: str) -> list[Kernel]:
    code, usage = sections(ask("-sass", arch)), sections(ask("-res-usage", arch))
    rows = []
    for key, sass in code.items():
        registers, stack = (int(re.search(rf"{word}:(\d+)", usage[key]).group(1)) for word in ("REG", "STACK"))  # type: ignore[union-attr]
        rows.append(Kernel(*key, sass, registers, stack))
    built = {(machine, groups, filters) for machine, groups, filters, *_ in extension.cuda.onebit_tiles()}  # type: ignore[union-attr]
    assert set(code) == built
    return rows


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nothing_spills(arch: str) -> None:
    for kernel in kernels(arch):
        assert kernel.stack == 0, kernel
        assert kernel.count(r"\b(LDL|STL)\b") == 0, kernel
        assert kernel.registers <= REGISTERS
        # A multiprocessor has 65536 registers: the block must fit.
        assert kernel.registers * kernel.groups * 128 <= 65536


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_mma_kernels_multiply_single_bits(arch: str) -> None:
    """2 x 2 products for every eight columns of a step, whose operands come by ldmatrix; copies are asynchronous."""
    for kernel in kernels(arch):
        if kernel.machine == "mma":
            assert kernel.count(r"BMMA\.168256\.AND\.POPC") == kernel.filters // 8 * 4
            assert kernel.count(r"LDSM") == 2 + kernel.filters // 16 * 2
            assert kernel.count(r"LDGSTS") > 0
            assert kernel.count(r"\bIMMA\b") == 0


def test_wgmma_kernels_multiply_single_bits_asynchronously() -> None:
    """Four products of 2 x 2 planes in the loop, one arrival, and two waits: in the loop for a chunk before, and after.

    Where the compiler cannot follow the accumulators it ends every product before the next: that would show as a wait
    and an arrival for each of them.
    """
    for kernel in kernels("sm_90a"):
        if kernel.machine == "wgmma":
            assert kernel.count(rf"BGMMA\.64x{kernel.filters}x256\.AND\.POPC") == 4
            assert kernel.count(r"WARPGROUP\.ARRIVE") == 1
            assert kernel.count(r"WARPGROUP\.DEPBAR") == 2
            assert kernel.count(r"FENCE\.VIEW\.ASYNC") == 1
            assert kernel.count(r"LDGSTS") > 0


def test_floats_are_contracted_nowhere_but_where_the_format_says() -> None:
    """Fused multiply-adds: one per channel and row for step 2, and one for a norm before a consumer."""
    for kernel in kernels("sm_90a"):
        runs = 2 * kernel.filters // 4  # two rows of a quarter of the filters
        assert kernel.count(r"\bFFMA\b") == 2 * runs, kernel.count(r"\bFFMA\b")
