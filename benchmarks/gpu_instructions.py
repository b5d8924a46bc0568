"""What the kernels of representative layers cost, read from their machine code: nothing runs, no GPU is needed.

    python benchmarks/gpu_instructions.py [--tree DIR] [--state NAME] [--layer NAME ...] [--save FILE]

Layers of ResNet-18, -50 and MobileNetV2 at batch 128, compiled for sm_90 as the default rule of the tree chooses them:
Triton's kernels ahead of time, those in CUDA as they lie in the built module. `--tree DIR` takes the kernels of another
checkout (an older commit) in the place of these; `--save FILE` puts the rows into a result file as its state NAME
(`now`, or `before`), beside the other ones, with the commit they are of.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET, BATCH = "sm_90", 128
SHAPES = {  # channels, filters, size, kernel, stride; depthwise where filters are 0
    "stem 7x7 3->64 at 224": (3, 64, 224, 7, 2),
    "3x3 64->64 at 56": (64, 64, 56, 3, 1),
    "3x3 256->256 at 14": (256, 256, 14, 3, 1),
    "3x3 512->512 at 7": (512, 512, 7, 3, 1),
    "1x1 64->256 at 56": (64, 256, 56, 1, 1),
    "1x1 1024->256 at 14": (1024, 256, 14, 1, 1),
    "expand 1x1 16->96 at 112": (16, 96, 112, 1, 1),
    "expand 1x1 24->144 at 56": (24, 144, 56, 1, 1),
    "project 1x1 96->24 at 56": (96, 24, 56, 1, 1),
    "depthwise 3x3 96 at 112": (96, 0, 112, 3, 2),
    "depthwise 3x3 144 at 56": (144, 0, 56, 3, 1),
}
STEM, PAIR = "stem 7x7 3->64 at 224", "stem and maximum 3x3"
MEMORY = {"STS": r"STS", "LDS": r"LDSM?", "IDP": r"IDP", "BAR": r"BAR\b|WARPSYNC"}
Row = dict[str, Any]


def problems() -> dict[tuple[str, str], Any]:
    """(layer, bits) -> problem; a stem has 8 bits alone."""
    from lbs_kernels.program.problem import Problem

    found = {}
    for name, (channels, filters, size, kernel, stride) in SHAPES.items():
        groups, window = (1, kernel) if filters else (channels, kernel)
        sizes = (BATCH, size, size, channels, filters or channels)
        for bits in (8,) if name == STEM else (8, 4):
            found[name, f"{bits}/{bits}"] = Problem(
                "bitconv2d", *sizes, (window, window), (stride, stride), (kernel // 2, kernel // 2), groups=groups,
                w_bits=bits, a_bits=bits, device="cuda",
            )  # fmt: skip
    return found


def triton_row(problem: Any, config: Any) -> Row:
    """Instructions of a thread for one tile; where nothing of the tensor core is there, all of them, as such kernels
    are unrolled.
    """
    from disassembly import Loop, instructions, main_loop

    kernel = compiled(problem)
    code = Loop(tuple(text for _, text in instructions(kernel)))
    found: Row = {"kernel": f"triton:{config}", "registers": kernel.registers, "spill_bytes": kernel.spill_bytes}
    found["shared_bytes"] = kernel.shared_bytes
    filters = getattr(config, "block_o", getattr(config, "block_c", 0))
    strip = (3 - problem.stride[0]) * getattr(config, "columns", 0)  # of depthwise kernels by columns
    outputs = config.block_m * filters * (strip or 1) / (32 * config.warps)
    found["instruction"], steps, loop = "", 0, Loop(())
    if code.products:
        loop, steps = main_loop(kernel), reduction_steps(problem, config)
        found["instruction"] = next(text for text in loop.instructions if Loop((text,)).products).split()[0]
        found["per_product"] = len(loop.instructions) / loop.products
    looped = len(loop.instructions) * steps
    found |= {"in_loops": looped, "outside": len(code.instructions) - len(loop.instructions)}
    found["per_output"] = (looped + found["outside"]) / outputs
    return found | {"memory": {name: (loop if steps else code).count(text) for name, text in MEMORY.items()}}


def compiled(problem: Any) -> Any:
    """The launch of a layer that writes codes, and a stream where it is one of a residual network."""
    import programs
    from ahead_of_time import compiling
    from compiled_layers import launches

    from lbs_kernels.program.steps import Emit

    b = programs.Builder(0)
    size, channels, filters = (problem.height, problem.width), problem.in_channels, problem.out_channels
    codes = b.consumer((*size, channels), problem.a_bits)
    b.quantize(b.image(channels, *size), Emit(consumers=(codes,)))
    window = {"kernel": problem.kernel, "stride": problem.stride, "padding": problem.padding}
    shape = b.conv_shape(codes.tensor, filters, **window)
    out = b.consumer(shape, problem.a_bits)
    inverted = problem.groups > 1 or channels < 32 < filters  # what an inverted residual begins with
    emit = Emit(low=0.0, high=6.0, consumers=(out,)) if inverted else Emit(
        low=0.0, stream=b.stream(shape, output=True), consumers=(out,)
    )  # fmt: skip
    window |= grid_of(b.conv, problem.w_bits)
    b.conv(codes.tensor, emit, filters, w_bits=problem.w_bits, groups=problem.groups, **window)
    if inverted:  # a program returns something
        b.conv(out.tensor, Emit(stream=b.stream((*shape[:2], 8), output=True)), 8, w_bits=4)
    _, launch, *_ = launches(*b.build(), problem.batch)
    with tempfile.TemporaryDirectory() as folder, compiling(TARGET, Path(folder)) as kernels:
        launch([])  # it reads what the step before wrote
    return kernels[0]


def pair_row() -> Row:
    """A stem and the maximum of 3 x 3 behind it, which writes a float16 stream and codes: as one kernel where the tree
    has one, else as two. For one output of the maximum, of which a stem without it computes four.
    """
    from compiled_layers import compile_steps

    program, blob = pair_program()
    try:
        from lbs_kernels.gpu.stem import fold_stem
        from lbs_kernels.gpu.stem_pool import pool_stems

        program, blob = fold_stem(program, blob)
        program = pool_stems(program, blob)
    except ImportError:  # a tree from before there was one
        pass
    with tempfile.TemporaryDirectory() as folder:
        _, *kernels = compile_steps(program, blob, BATCH, TARGET, Path(folder))
    parts = [loop_parts(kernel) for kernel in kernels]
    if len(kernels) == 1:
        from lbs_kernels.gpu.configs.stem_pool import stem_pool_default, stem_pool_steps

        problem = problem_of(program.steps[1], program)
        config = stem_pool_default(problem)
        steps, outside, (step, line, emitted) = stem_pool_steps(config), *parts[0]
        looped = steps * step + steps // 3 * line + config.rows * emitted
        found = {"kernel": f"triton:{config}", "per_product": step / 8, "in_loops": looped, "outside": outside}
        found["per_output"] = (looped + outside) / (config.rows * config.block_m * config.block_o / 32 / config.warps)
    else:
        from lbs_kernels.gpu.configs.defaults import conv_default, elementwise_default

        (conv, pool), (stem, taps) = (problem_of(step, program) for step in program.steps[1:]), parts
        one, two = conv_default(conv), elementwise_default(pool)
        each = (stem[0] + sum(stem[1]) * reduction_steps(conv, one)) / (one.block_m * one.block_o / 32 / one.warps)
        behind = (taps[0] + sum(taps[1]) * 9) / (two.block_m * two.block_c / 32 / two.warps)
        found = {"kernel": f"triton:{one} and triton:{two}", "per_output": 4 * each + behind}
    found |= {name: max(getattr(k, name) for k in kernels) for name in ("registers", "spill_bytes", "shared_bytes")}
    from disassembly import main_loop

    loop = main_loop(kernels[0])
    found["instruction"] = next(text for text in loop.instructions if "GMMA" in text).split()[0]
    return found | {"memory": {name: loop.count(text) for name, text in MEMORY.items()}}


def pair_program() -> tuple[Any, Any]:
    import programs

    from lbs_kernels.program.steps import Emit

    b = programs.Builder(0, "float16")
    codes, window = b.consumer((224, 224, 3), 8), {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)}
    b.quantize(b.image(3, 224, 224), Emit(consumers=(codes,)))
    between, out = b.stream((112, 112, 64)), b.stream((56, 56, 64), output=True)
    b.conv(codes.tensor, Emit(low=0.0, stream=between), 64, w_bits=8, **grid_of(b.conv, 8), **window)
    behind = Emit(stream=out, consumers=(b.consumer((56, 56, 64), 8),))
    b.pool(between, behind, "max", (3, 3), (2, 2), (1, 1))
    return b.build()


def grid_of(maker: Any, bits: int) -> dict[str, str]:
    """Weights of 8 bits have a zero where the tree knows weights that have."""
    return {"grid": "zero"} if bits == 8 and "grid" in inspect.signature(maker).parameters else {}


def problem_of(step: Any, program: Any) -> Any:
    from lbs_kernels.program.problem import problem_of

    return problem_of(step, program, BATCH, "cuda")


def loop_parts(kernel: Any) -> tuple[int, list[int]]:
    """Instructions outside the longest loop, and of it what always runs and what every branch over its rest adds."""
    from disassembly import instructions

    code = instructions(kernel)
    index = {address: at for at, (address, _) in enumerate(code)}
    jumps = {at: index.get(int(found[1], 16), at) for at, (_, text) in enumerate(code)
             if (found := re.match(r"BRA.*?0x([0-9a-f]+)\s*$", text))}  # fmt: skip
    back = [(to, at) for at, to in jumps.items() if to < at]
    if not back:  # all unrolled
        return len(code), []
    start, end = max(back, key=lambda loop: loop[1] - loop[0])
    over = sorted((at, to) for at, to in jumps.items() if start <= at < to <= end and to - at > 32)
    edges = [at + 1 for at, _ in over] + [over[0][1]] if over else []
    added = [after - before for before, after in itertools.pairwise(edges)]
    return len(code) - (end + 1 - start), [end + 1 - start - sum(added), *added]


def reduction_steps(problem: Any, config: Any) -> int:
    """Of one program."""
    from lbs_kernels.gpu.configs.gemm import reduction_steps

    return -(-reduction_steps(problem, config.block_words, config.block_taps) // config.split_k)


def cuda_row(problem: Any, config: Any) -> Row:
    """A kernel of the built module: the loops of a thread that multiplies. What stands behind them branches by what is
    written, and overlaps the products of another tile, so that no number of it is told.
    """
    from disassembly import Loop
    from test_cuda_compile import kernels

    from lbs_kernels import extension

    if extension.cuda is None:
        raise SystemExit(f"{config} is in CUDA, and its module is missing: {extension.cuda_reason}")

    groups, nibbles = config.block_m // 64, getattr(problem, "nibbles", False)
    reads = "nibbles" if nibbles else "bytes"
    kernel = next(
        found
        for found in kernels("sm_90a")
        if (found.family, found.machine, found.groups, found.filters, getattr(found, "reads", "bytes"), found.sums)
        == (config.kind, config.machine, groups, config.block_o, reads, False)
    )
    loops = [Loop(tuple(texts)) for texts in kernel.loops("B?I?GMMA")]
    name = f"cuda:{config}" + (" of nibbles" if nibbles else "")
    found: Row = {"kernel": name, "registers": kernel.registers, "spill_bytes": kernel.stack}
    found["shared_bytes"] = shared_bytes(config, nibbles)
    found["instruction"] = next(text for text in loops[0].instructions if "GMMA" in text).split()[0]
    found["per_product"] = len(loops[0].instructions) / loops[0].count("IGMMA|BGMMA")
    if config.kind == "s8":
        steps = -(-problem.window.taps * -(-problem.in_channels // 16) * 16 // 32)
        chunks = -(-steps // 4)
        last = len(loops[1].instructions) / (2 if nibbles else 1) * (steps - 4 * (chunks - 1))
        found["in_loops"] = round(len(loops[0].instructions) * (chunks - 1) + last)
    return found | {"memory": {name: loops[0].count(text) for name, text in MEMORY.items()}}


def shared_bytes(config: Any, nibbles: bool) -> int:
    """Of a kernel in CUDA, as the module launches it. What it tells of csrc/s8 is of kernels that sum codes, which have
    eight columns of 128 bytes more in every stage; rows of nibbles are 48 bytes shorter.
    """
    from lbs_kernels import extension

    native: Any = extension.cuda
    tiles = getattr(native, f"{config.kind}_tiles")()
    told = next(int(shared) for *row, shared in tiles if tuple(row) == config.row)
    less = 8 * 128 + (48 * config.block_m if nibbles else 0)
    return told - config.stages * less if config.kind == "s8" else told


def rows(layers: list[str]) -> list[Row]:
    """Every layer and width, by the rule of the tree that is imported."""
    from lbs_kernels.gpu.configs.defaults import conv_default

    try:
        from lbs_kernels.gpu.forms import fastest
    except ImportError:  # a tree from before there was a choice

        def fastest(problem: Any, hopper: bool = True) -> tuple[Any, Any]:
            return problem, conv_default(problem)

    found = []
    if PAIR in layers:
        found.append({"layer": PAIR, "bits": "8/8", **pair_row()})
        print(json.dumps(found[-1]), flush=True)
    for (layer, bits), problem in problems().items():
        if layer in layers:
            form, config = fastest(problem)
            one = cuda_row if hasattr(config, "machine") else triton_row
            found.append({"layer": layer, "bits": bits, **one(form, config)})
            print(json.dumps(found[-1]), flush=True)
    return found


def commit(tree: Path) -> str:
    """Of a checkout; with a + where files differ from it."""
    said = [["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "lbs_kernels", "csrc"]]
    head, changed = (
        subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=True).stdout.strip()
        for words in said
    )
    return head + ("+" if changed else "")


def main(argv: list[str] | None = None) -> int:
    """Count, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="whose kernels (default: these)")
    parser.add_argument("--state", default="now", help="the name of the rows in the file (default: %(default)s)")
    parser.add_argument("--layer", action="append", choices=[PAIR, *SHAPES], help="(default: all)")
    parser.add_argument("--save", type=Path, help="a result file")
    args = parser.parse_args(argv)
    # How code is read is always of this tree, what is read of the other.
    sys.path[:0] = [str(ROOT / "tests" / "kernels")]
    import ahead_of_time  # noqa: F401
    import disassembly  # noqa: F401
    import triton

    tree = args.tree.resolve()
    sys.path[:0] = [str(tree), str(tree / "tests" / "kernels")]
    body = json.loads(args.save.read_text()) if args.save and args.save.exists() else {"states": {}}
    body |= {"level": "instructions", "target": TARGET, "batch": BATCH}
    counted = rows(args.layer or [PAIR, *SHAPES])
    body["states"][args.state] = {"commit": commit(tree), "triton": triton.__version__, "rows": counted}
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(body, indent=1) + "\n")
        print(f"wrote {args.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
