"""The built CUDA module: its tensor-core instructions are in every kernel, run asynchronously, and nothing spills.

Reads the machine code of `lbs_kernels._cuda` as it was built, by the disassembler that Triton ships; compiles nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lbs_kernels import extension
from lbs_kernels.gpu.configs.cuda import S8Config

SPEC = importlib.util.find_spec("triton")
TOOL = Path(SPEC.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if SPEC and SPEC.origin else Path()
pytestmark = [
    pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}"),
    pytest.mark.skipif(not TOOL.is_file(), reason="no cuobjdump; it comes with Triton: pip install triton"),
]
REGISTERS = 255  # what one thread may have
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);")


@dataclass(frozen=True)
class Kernel:
    """Machine code and resources of one kernel for one architecture."""

    family: str
    machine: str
    groups: int
    filters: int
    reads: str  # "bytes"; "summed", and codes are summed as well, by products of eight columns; or "nibbles"
    sass: str
    registers: int
    stack: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    @property
    def sums(self) -> bool:
        return self.reads == "summed"

    @property
    def threads(self) -> int:
        if self.family == "s8 cluster":
            return 2 * 2 * 128  # two blocks on a multiprocessor
        return 3 * 128 if self.family == "s8" else self.groups * 128

    def loops(self, pattern: str) -> list[list[str]]:
        """Instructions of the loops that hold one of the pattern and no smaller loop that does, without predicates."""
        code = [
            (int(at, 16), re.sub(r"^@!?U?P\w+\s+", "", text.strip())) for at, text in INSTRUCTION.findall(self.sass)
        ]
        place = {at: index for index, (at, _) in enumerate(code)}
        found: list[tuple[int, int]] = []
        for end, (_, text) in enumerate(code):
            jump = re.match(r"BRA.*?0x([0-9a-f]+)\s*$", text)
            start = place.get(int(jump[1], 16), end) if jump else end
            if start < end and any(re.match(pattern, text) for _, text in code[start:end]):
                found.append((start, end))
        inner = [one for one in found if not any(one != (a, b) and one[0] <= a and b <= one[1] for a, b in found)]
        return [[text for _, text in code[start : end + 1]] for start, end in inner]


def ask(option: str, arch: str) -> str:
    assert extension.cuda is not None
    assert extension.cuda.__file__
    command = [str(TOOL), option, "-arch", arch, extension.cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


READS = ("bytes", "summed", "nibbles")  # as csrc/s8/kernel.h counts them


def sections(text: str) -> dict[tuple[str, str, int, int, str], str]:
    """Text after the name of every kernel of a table of tiles, up to the next kernel."""
    parts = re.split(r"Function :? ?(\S+?):?\n", text)
    found = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        match = re.search(r"(onebit|s8)_(wgmma|mma)I.*?TileILi(\d+)ELi(\d+)ELi\d+E(?:LNS0_5ReadsE(\d)E)?", name)
        shared = re.search(r"s8_cluster_wgmmaI.*?ClusterTileILi(\d+)ELi\d+ELNS0_5ReadsE(\d)E", name)
        if match:
            found[match[1], match[2], int(match[3]), int(match[4]), READS[int(match[5] or 0)]] = body
        elif shared:
            found["s8 cluster", "wgmma", 1, int(shared[1]), READS[int(shared[2])]] = body
    return found


@functools.cache
def kernels(arch: str) -> list[Kernel]:
    code, usage = sections(ask("-sass", arch)), sections(ask("-res-usage", arch))
    rows = []
    for key, sass in code.items():
        registers, stack = (int(re.search(rf"{word}:(\d+)", usage[key]).group(1)) for word in ("REG", "STACK"))  # type: ignore[union-attr]
        rows.append(Kernel(*key, sass, registers, stack))
    tiles = {"onebit": extension.cuda.onebit_tiles(), "s8": extension.cuda.s8_tiles()}  # type: ignore[union-attr]
    shared = [(machine, m // 64, o, stages) for machine, m, o, stages in S8Config.clusters]
    built = {("onebit", *row[:3], "bytes") for row in tiles["onebit"]}
    built |= {("s8", *row[:3], reads) for row in tiles["s8"] if row[:4] not in shared for reads in READS}
    built |= {("s8 cluster", *row[:3], reads) for row in shared for reads in READS}
    assert set(code) == built
    return rows


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nothing_spills(arch: str) -> None:
    for kernel in kernels(arch):
        assert kernel.stack == 0, kernel
        assert kernel.count(r"\b(LDL|STL)\b") == 0, kernel
        assert kernel.registers <= REGISTERS
        # A multiprocessor has 65536 registers: the block must fit.
        assert kernel.registers * kernel.threads <= 65536


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
        if (kernel.family, kernel.machine) == ("onebit", "wgmma"):
            assert kernel.count(rf"BGMMA\.64x{kernel.filters}x256\.AND\.POPC") == 4
            assert kernel.count(r"WARPGROUP\.ARRIVE") == 1
            assert kernel.count(r"WARPGROUP\.DEPBAR") == 2
            assert kernel.count(r"FENCE\.VIEW\.ASYNC") == 1
            assert kernel.count(r"LDGSTS") > 0


def s8_kernels(*families: str) -> list[Kernel]:
    found = [kernel for kernel in kernels("sm_90a") if kernel.family in (families or ("s8", "s8 cluster"))]
    assert found
    return found


def test_s8_kernels_multiply_bytes_asynchronously() -> None:
    """A loop of whole chunks, four steps each, and one of the steps of the last; all are waited for behind them once.

    In both a group of products may still run when the next is begun.
    """
    for kernel in (kernel for kernel in s8_kernels() if kernel.reads != "nibbles"):
        product = rf"IGMMA\.64x{kernel.filters}x32\.S8\.S8"
        whole, last = kernel.loops("IGMMA")
        for loop, steps in ((whole, 4), (last, 1)):
            assert sum(bool(re.match(product, text)) for text in loop) == steps * kernel.groups
            sums = sum(bool(re.match(r"IGMMA\.64x8x32\.S8\.S8", text)) for text in loop)
            assert sums == (steps * kernel.groups if kernel.sums else 0)
            assert [text for text in loop if "DEPBAR" in text] == ["WARPGROUP.DEPBAR.LE gsb0, 0x1"]
            assert sum("WARPGROUP.ARRIVE" in text for text in loop) == 1
        assert kernel.count("IGMMA") == 5 * kernel.groups * (2 if kernel.sums else 1)
        assert kernel.count(r"DEPBAR\.LE gsb0, 0x0") == 1 + kernel.sums  # before accumulators of either kind are read


def test_nibbles_are_expanded_in_registers_while_products_run() -> None:
    """Operand A is registers. Each step is a group of products, of which one may run when the next is begun; a step
    loads eight nibbles of each of a thread's two rows, and nothing of it is stored.
    """
    for kernel in (kernel for kernel in s8_kernels() if kernel.reads == "nibbles"):
        product = rf"IGMMA\.64x{kernel.filters}x32\.S8\.S8 R\d+, R\d+, gdesc"
        for loop, steps in zip(kernel.loops("IGMMA"), (4, 2), strict=True):
            assert sum(bool(re.match(product, text)) for text in loop) == steps * kernel.groups
            assert [text for text in loop if "DEPBAR" in text] == ["WARPGROUP.DEPBAR.LE gsb0, 0x1"] * steps
            assert sum("WARPGROUP.ARRIVE" in text for text in loop) == steps
            assert sum(bool(re.match(r"LDS R", text)) for text in loop) == 2 * steps * kernel.groups
            assert not [text for text in loop if re.match(r"(LDSM|STS|LDG|IDP|IMMA|BAR|LDL|STL)\b", text)]
        whole, last = (len(loop) / kernel.groups for loop in kernel.loops("IGMMA"))
        assert whole <= 4 * (21 if kernel.groups == 1 else 16)
        assert last <= 2 * (26 if kernel.groups == 1 else 16)
        assert kernel.count("IGMMA") == 6 * kernel.groups
        assert kernel.count(r"DEPBAR\.LE gsb0, 0x0") == 1


def test_few_instructions_of_s8_kernels_stand_between_products() -> None:
    """Per product of the loop of whole chunks, waiting for the chunk and leaving the one before included."""
    for kernel in (kernel for kernel in s8_kernels() if kernel.reads != "nibbles"):
        whole = kernel.loops("IGMMA")[0]
        assert len(whole) <= 20 * 4 * kernel.groups, len(whole)
        assert not [text for text in whole if re.match(r"(LDS|LDSM|STS|LDG|IDP|IMMA|BAR)\b", text)]


def test_s8_operands_come_by_asynchronous_copies_alone() -> None:
    """Activations by LDGSTS of 16 bytes, or of 8 of nibbles, weights by one bulk copy a chunk, in the loop and in front
    of it; stored is a window alone, once a tile.
    """
    for kernel in s8_kernels("s8"):
        copies = kernel.loops("LDGSTS")[0]
        assert not [text for text in copies if re.match(r"STS\b|LDG\b|BAR\b", text)]
        small = kernel.count(r"LDGSTS\.E\.64")  # 16 channels of nibbles
        assert (small > 0) == (kernel.reads == "nibbles")
        assert kernel.count(r"LDGSTS\.E\.BYPASS\.128") == kernel.count("LDGSTS") - small > 0
        assert kernel.count("UBLKCP") == 2
        assert kernel.count(r"\bSTS\b") == 1
        assert kernel.count(r"\bIDP\b") == 0
        assert kernel.count("USETMAXREG") == 2


def test_blocks_that_share_a_reduction_meet_in_shared_memory() -> None:
    """Sums are stored and read 16 bytes at a time, between two barriers of the cluster; no atomics, nothing in the
    device's memory but what the epilogue writes. Two blocks have room on a multiprocessor.
    """
    for kernel in s8_kernels("s8 cluster"):
        sums = 2 * kernel.filters // 4  # of a thread
        together, *behind = kernel.sass.split("UCGABAR_WAIT")
        assert len(behind) == kernel.count("UCGABAR_ARV") == 2
        assert len(re.findall(r"STS\.128", together)) == sums // 4 + 1  # and a window
        assert len(re.findall(r"\bLD\.E\.128\b", behind[0])) == 4 * 16 // 4  # a run of 16, of four blocks at once
        assert kernel.count(r"\bLD\.E") == 4 * 16 // 4
        assert kernel.count(r"\bSTS\b") == sums // 4 + 1
        assert kernel.count(r"(?<![.\w])(RED|ATOM|ATOMG|ATOMS)\b") == 0
        assert not re.search(r"\bSTG\b", together)
        assert kernel.registers * kernel.threads <= 65536
        (row,) = (row for row in extension.cuda.s8_tiles() if row[1:4] == (1, kernel.filters, 5))  # type: ignore[union-attr]
        assert 2 * (row[4] + 1024 + 1024) <= 228 * 1024  # with what a block takes beside its own


MEMORY = r"(?<![.\w])(LDG|STG|LDGSTS|RED|ATOM)\b"  # of the device, but the bulk copies of weights


def test_kernels_begin_before_those_in_front_have_ended() -> None:
    """Programmatic dependent launch: the next kernel is let go first, barriers and weights come before the wait, and
    whatever another kernel may write, or read, behind it.
    """
    for kernel in kernels("sm_90a"):
        assert kernel.count(r"\bPREEXIT\b") == 1
        if kernel.family == "onebit":
            before, wait, behind = kernel.sass.partition("ACQBULK")
            assert wait
            assert "PREEXIT" in before
            weights = kernel.filters * 128 // 16 // kernel.threads  # copies of a thread for a chunk
            assert re.findall(r"LDGSTS\S*", before) == ["LDGSTS.E.BYPASS.128"] * weights
            assert not re.findall(r"\b(LDG|STG|BMMA|BGMMA)\b", before)
            assert "ACQBULK" not in behind
            continue
        if kernel.family == "s8 cluster":
            together, consumers, rest = kernel.sass.split("ACQBULK")
            assert re.search(r"PREEXIT[\s\S]*SYNCS\.EXCH", together)
            assert not re.search(MEMORY, together + consumers)
            assert "IGMMA" not in together
            assert consumers.count("UBLKCP") == 1
            assert re.search(MEMORY, rest)
            continue
        # The branch of those that multiply comes first, then that of those that copy.
        together, consumers, producers = re.split("USETMAXREG", kernel.sass)
        assert "PREEXIT" in together
        assert "SYNCS.EXCH" in together
        assert not re.search(MEMORY, together)
        for part, early in ((consumers, "IGMMA"), (producers, "UBLKCP")):
            before, wait, behind = part.partition("ACQBULK")
            assert wait
            assert not re.search(MEMORY, before)
            assert re.search(MEMORY, behind)
            assert ("UBLKCP" in before) == (early == "UBLKCP")
            assert early in behind
            assert "ACQBULK" not in behind


def test_kernels_for_ampere_know_nothing_of_it() -> None:
    for kernel in kernels("sm_80"):
        assert kernel.count("PREEXIT|ACQBULK") == 0


def test_floats_are_contracted_nowhere_but_where_the_format_says() -> None:
    """Fused multiply-adds: one per channel and row for step 2, and one for a norm before a consumer."""
    for kernel in kernels("sm_90a"):
        # Two rows of a quarter of the filters; the s8 kernels loop over runs of 16 channels, or of what divides theirs.
        one_bit = kernel.family == "onebit"
        runs = 2 * kernel.filters // 4 if one_bit else math.gcd(16, kernel.filters // 4)
        assert kernel.count(r"\bFFMA\b") == 2 * runs, kernel.count(r"\bFFMA\b")
