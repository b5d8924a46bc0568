"""What the compiler made of a kernel: instructions of its main loop, and where the bytes of a register lie."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass

from ahead_of_time import Compiled

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);")
TENSOR_CORE = re.compile(r"(IMMA|IGMMA|mma\.sync|wgmma\.mma_async)\.")
SPLIT = "mov.b32 $0, $1;"
SUM = "dp4a.s32.s32 $0, $4"


@dataclass(frozen=True)
class Loop:
    """Instructions of one loop, without their predicates."""

    instructions: tuple[str, ...]

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return sum(bool(TENSOR_CORE.match(text)) for text in self.instructions)

    def count(self, pattern: str) -> int:
        """Instructions that begin with the pattern."""
        return sum(bool(re.match(pattern, text)) for text in self.instructions)

    def histogram(self) -> dict[str, int]:
        """Instructions by their first word without its suffixes."""
        return dict(collections.Counter(re.split(r"[.\s]", text)[0] for text in self.instructions).most_common())


def instructions(kernel: Compiled) -> list[tuple[int, str]]:
    """(address, text without predicate) of every instruction."""
    found = INSTRUCTION.findall(kernel.sass)
    return [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text.strip())) for address, text in found]


def main_loop(kernel: Compiled) -> Loop:
    """The smallest loop with a tensor-core instruction."""
    code = instructions(kernel)
    index = {address: at for at, (address, _) in enumerate(code)}
    jumps = [re.match(r"BRA.*?0x([0-9a-f]+)\s*$", text) for _, text in code]
    starts = [index.get(int(jump[1], 16)) if jump else None for jump in jumps]
    return smallest(kernel, [text for _, text in code], starts)


def ptx_loop(kernel: Compiled) -> Loop:
    """The same of what the compiler gave to ptxas, which needs no disassembler: that takes a third of a second."""
    code = [re.sub(r"^@!?%\w+\s+", "", line.strip()) for line in kernel.ptx.splitlines()]
    labels = [re.match(r"(\$L\w+):", text) for text in code]
    index = {label[1]: at for at, label in enumerate(labels) if label}
    jumps = [re.match(r"bra\S*\s+(\$L\w+);", text) for text in code]
    return smallest(kernel, code, [index.get(jump[1]) if jump else None for jump in jumps])


def smallest(kernel: Compiled, code: list[str], starts: list[int | None]) -> Loop:
    """The smallest loop with a tensor-core instruction; `starts` is where the jump at each place of the code goes."""
    loops = [Loop(tuple(code[start : at + 1])) for at, start in enumerate(starts) if start is not None and start < at]
    with_products = [loop for loop in loops if loop.products]
    assert with_products, f"no loop of {kernel.name} has a tensor-core instruction"
    return min(with_products, key=lambda loop: len(loop.instructions))


def packed_layouts(kernel: Compiled, assembly: str) -> list[str]:
    """Layouts of the tensors of which inline assembly that begins like this takes 4 elements at once."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", kernel.ttgir, flags=re.MULTILINE))
    names = re.findall(rf'inline_asm "{re.escape(assembly)}.*-> tensor<.*, (#\w+)>', kernel.ttgir)
    return [layouts[name] for name in names]


def neighbours_in_a_thread(layout: str, dimensions: int) -> bool:
    """Whether the 4 elements a thread counts first are neighbours: 2 x 2 of the last two dimensions, or 4 of one."""
    blocked = re.match(r"#ttg\.blocked<\{sizePerThread = \[([\d, ]+)\].*order = \[([\d, ]+)\]", layout)
    if blocked is None:
        steps = ("0, 1", "1, 0") if dimensions == 2 else ("0, 1", "0, 2")
        linear = re.match(r"#ttg\.linear<\{register = \[\[([\d, ]+)\], \[([\d, ]+)\]", layout)
        return linear is not None and all(linear[i + 1].endswith(steps[i]) for i in range(2))
    size, order = ([int(number) for number in group.split(",")] for group in blocked.groups())
    last = len(size) - 1
    if dimensions == 2:
        return size[-2:] == [2, 2] and order[:2] == [last, last - 1]
    return size[-1] % 4 == 0 and order[0] == last
