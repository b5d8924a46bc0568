"""A stem and the maximum that alone reads it become one step: when, and what is compiled of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS
from compiled_layers import check_exact, check_gemm, compile_steps
from disassembly import main_loop
from test_triton_interpreted import HERE, run_interpreted

from lbs_kernels.errors import FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.cost import executed, seconds
from lbs_kernels.gpu.configs.stem_pool import StemPoolConfig, stem_pool_candidates, stem_pool_default, stem_pool_tiles
from lbs_kernels.gpu.modelled import Modelled, with_pooled_stem
from lbs_kernels.gpu.stem import FoldedStep, fold_stem
from lbs_kernels.gpu.stem_pool import PooledStem, pool_stems
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import Emit, PoolStep, Program, Step

RESNET = Problem("stem_pool", 128, 115, 115, 12, 64, (4, 4), device="cuda")


def fused(program: Program, blob: torch.Tensor) -> Program:
    return pool_stems(*fold_stem(program, blob))


def changed(program: Program, op: str, **fields: object) -> Program:
    """The program with the fields of its step of this kind changed; of `emit` where they are of it."""

    def one(step: Step) -> Step:
        if step.op != op:
            return step
        own = {key: value for key, value in fields.items() if not hasattr(step.emit, key)}
        emit = {key: value for key, value in fields.items() if hasattr(step.emit, key)}
        return replace(step, emit=replace(step.emit, **emit), **own)  # type: ignore[arg-type]

    return replace(program, steps=tuple(one(step) for step in program.steps))


@pytest.mark.parametrize("written", ["stream", "codes", "clamped"])
def test_the_pair_becomes_one_step_whose_image_holds_the_padding(written: str) -> None:
    program, blob = programs.stem_and_maximum(0, written, size=(32, 30))
    one = fused(program, blob)
    assert len(one.steps) == len(program.steps) - 1
    (stem,) = (step for step in one.steps if isinstance(step, PooledStem))
    (writer,) = (step for step in one.steps if isinstance(step, FoldedStep))
    (pool,) = (step for step in program.steps if isinstance(step, PoolStep))
    assert (stem.takes, stem.padding, writer.shift) == (pool.name, (0, 0), (3, 3))
    assert (one.tensors[stem.input].height, one.tensors[stem.input].width) == (19, 18)
    problem = problem_of(stem, one, 2, "cuda")
    assert (problem.op, problem.out_height, problem.out_width) == ("stem_pool", 16, 15)
    assert (stem.before is None) == (written != "clamped")
    assert [consumer.tensor for consumer in stem.emit.consumers] == [c.tensor for c in pool.emit.consumers]


def test_rounding_to_a_stream_is_kept_where_nothing_is_stored() -> None:
    program, blob = programs.stem_and_maximum(0, "clamped", stream_dtype="float16")
    bare = changed(program, "pool", low=None, high=None)
    (stem,) = (step for step in fused(bare, blob).steps if isinstance(step, PooledStem))
    assert stem.before == Emit(low=0.0)


def test_other_pairs_stay_two_steps() -> None:
    """One thing each that the kernel could not compute as it is, or that something else reads."""
    program, blob = programs.stem_and_maximum(0)
    assert fused(program, blob) != fold_stem(program, blob)[0]
    (pool,) = (step for step in program.steps if isinstance(step, PoolStep))
    between = pool.input
    others = {
        "read twice": replace(program, steps=(*program.steps, replace(pool, name="again"))),
        "read as a gate": replace(
            program, steps=(*program.steps, replace(pool, name="again", input=4, emit=Emit(gate=between)))
        ),
        "returned": replace(program, outputs=(*program.outputs, between)),
        "a mean": changed(program, "pool", kind="average"),
        "another window": changed(program, "pool", kernel=(2, 2), padding=(0, 0)),
        "another stride": changed(program, "pool", stride=(1, 1)),
        "a residual": changed(program, "bitconv2d", residual=between),
    }
    for what, other in others.items():
        folded, data = fold_stem(other, blob)
        assert pool_stems(folded, data) is folded, what
    assert pool_stems(program, blob) is program  # not folded


def test_codes_that_a_norm_turns_around_stay_two_steps() -> None:
    program, blob = programs.stem_and_maximum(0, "codes")
    (conv,) = (step for step in fold_stem(program, blob)[0].steps if step.name == "step1")
    normed = replace(conv.emit.consumers[0], pre_scale="multiplier1", pre_bias="bias2")
    other = changed(program, "bitconv2d")
    steps = tuple(
        replace(s, emit=replace(s.emit, consumers=(normed,))) if s.name == "step1" else s for s in other.steps
    )
    folded, data = fold_stem(replace(program, steps=steps), blob)
    assert pool_stems(folded, data) is folded


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_stay_two_steps(value: float) -> None:
    program, blob = programs.stem_and_maximum(0)
    (conv,) = (step for step in program.steps if step.name == "step1")
    blob = blob.clone()
    program.array(blob, conv.bias)[3] = value  # type: ignore[union-attr]
    folded, data = fold_stem(program, blob)
    assert pool_stems(folded, data) is folded


def test_configurations_print_and_refuse() -> None:
    own = stem_pool_default(RESNET)
    assert StemPoolConfig.parse(str(own)) == own
    assert own.why_not(RESNET) is None
    assert all(config.why_not(RESNET) is None for config in stem_pool_candidates(RESNET))
    assert len(set(stem_pool_candidates(RESNET))) == 12
    assert kernels.parse(f"triton:{own}") == kernels.Choice(kernels.kernel_of(own), own)
    with pytest.raises(FormatError):
        StemPoolConfig.parse("stempool_m64_o64")
    bad = {
        "no folded stem": (own, replace(RESNET, kernel=(3, 3))),
        "powers of two": (replace(own, block_m=48), RESNET),
        "at least 16": (replace(own, block_o=8), RESNET),
        "words": (replace(own, block_o=16), RESNET),
        "pieces": (replace(own, piece=4), RESNET),
        "32 sums": (replace(own, block_m=128), RESNET),
    }
    for words, (config, problem) in bad.items():
        assert words in (config.why_not(problem) or ""), words


def test_tiles_and_products_of_a_resnet() -> None:
    config = StemPoolConfig(64, 64, 7, 4, 3)
    assert stem_pool_tiles(RESNET, config) == 112 * 8
    assert executed(RESNET, config) == 112 * 8 * 3 * 15 * 64 * 64 * 256
    assert seconds(RESNET, config) < seconds(RESNET, replace(config, piece=16))


def test_the_model_chooses_and_counts_the_pair_as_one() -> None:
    """On a large batch, with kernels in CUDA for the stem and without."""
    program, blob = programs.stem_and_maximum(0, size=(224, 224), filters=64, stream_dtype="float16")
    folded, data = fold_stem(program, blob)
    for hopper in (True, False):
        assert with_pooled_stem(folded, data, hopper) == pool_stems(folded, data)
    times = Modelled(batch=128).of_steps(program)
    assert len(times) == len(program.steps)
    assert times[2] == 0.0 < times[1]


def test_interpreted_kernels_equal_the_reference(tmp_path: Path) -> None:
    run_interpreted(str(HERE / "interpreted" / "check_stem_pool.py"), cache=tmp_path)


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("signs", [True, False])
def test_the_kernel_compiles_to_pipelined_products(signs: bool, target: str, tmp_path: Path) -> None:
    """Of a stem of ResNet with a float16 stream: no spill, loads of steps ahead under the products of this one."""
    program, blob = programs.stem_and_maximum(
        0, size=(224, 224), filters=64, signs=signs, stream_dtype="float16"
    )  # fmt: skip
    folded, data = fold_stem(program, blob)
    kernels_of = compile_steps(pool_stems(folded, data), data, batch=8, target=target, folder=tmp_path)
    assert [kernel.name for kernel in kernels_of] == ["quantpack_kernel", "stem_pool_kernel"]
    check_exact(kernels_of[0])
    stem = kernels_of[1]
    check_gemm(stem, "wgmma" if target == "sm_90" else "mma.sync")
    loop = main_loop(stem)
    assert loop.products == (8 if target == "sm_90" else 64)  # K = 256, 64 x 64
    assert loop.count("LDGSTS") == 16  # of 8 bytes, which the first-level cache keeps
    assert "cp.async.ca.shared.global" in stem.ptx
    waits = [text for text in loop.instructions if text.startswith("DEPBAR")]
    assert waits == ["DEPBAR.LE SB0, 0x1"], waits  # the step behind this one is still on its way
    assert loop.count("IDP|LDL|STL") == 0
