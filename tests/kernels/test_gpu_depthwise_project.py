"""A depthwise window and the layer that alone reads it become one step: when, and what is compiled of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import programs
import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import Compiled, compiling
from compiled_layers import check_gemm, check_order, launches
from disassembly import main_loop
from test_triton_interpreted import HERE, run_interpreted

from lbs.runs import tuning
from lbs_kernels.errors import FormatError
from lbs_kernels.gpu import forms, kernels, modelled
from lbs_kernels.gpu.configs.cost import bytes_moved, executed, seconds
from lbs_kernels.gpu.configs.defaults import project_defaults
from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig, project_candidates, project_steps, project_tiles
from lbs_kernels.gpu.depthwise_project import ProjectedDepthwise, pairs, projected
from lbs_kernels.gpu.modelled import Modelled, with_projected
from lbs_kernels.gpu.pair_layer import OPS, pair_layer
from lbs_kernels.program.checks import check_program
from lbs_kernels.program.layer import LAYER
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import Activation, Consumer, Program

BLOCK = Problem("depthwise_project", 128, 28, 28, 192, 32, (3, 3), (1, 1), (1, 1), device="cuda")
STEM = Problem("stem_pool", 2, 19, 19, 12, 64, (4, 4), device="cuda")
# Channels, filters, size and step of the inverted residuals of MobileNetV2.
BLOCKS = [
    (32, 16, 112, 1),
    (96, 24, 112, 2),
    (144, 24, 56, 1),
    (144, 32, 56, 2),
    (192, 32, 28, 1),
    (192, 64, 28, 2),
    (384, 64, 14, 1),
    (384, 96, 14, 1),
    (576, 96, 14, 1),
    (576, 160, 14, 2),
    (960, 160, 7, 1),
]


def fused(program: Program) -> Program:
    ((first, layer),) = pairs(program)
    return projected(program, first, layer)


def test_the_pair_becomes_one_step_where_the_second_was() -> None:
    program, _ = programs.depthwise_and_layer(0, "residual", stride=(2, 2))
    one = fused(program)
    assert [step.name for step in one.steps] == ["step0", "step1", "step2", "step4"]
    step = one.steps[2]
    assert isinstance(step, ProjectedDepthwise)
    first, layer = program.steps[2:4]
    assert (step.takes, step.first, step.emit, step.input) == (layer.name, first, layer.emit, first.input)
    problem = problem_of(step, one, 2, "cuda")
    assert (problem.op, problem.stride, problem.in_channels, problem.out_channels) == (
        "depthwise_project",
        (2, 2),
        40,
        24,
    )
    assert step.between(program) == replace(program.tensors[layer.input], bits=8)
    assert not list(pairs(one))


def changed(program: Program, place: int, **fields: Any) -> Program:
    """The program with fields of a step, or of its `emit`, changed."""
    step = program.steps[place]
    emit = {key: value for key, value in fields.items() if hasattr(step.emit, key)}
    own = {key: value for key, value in fields.items() if key not in emit}
    steps = list(program.steps)
    steps[place] = replace(step, emit=replace(step.emit, **emit), **own)
    return replace(program, steps=tuple(steps))


def consumer(program: Program, place: int, **fields: Any) -> tuple[Consumer, ...]:
    return (replace(program.steps[place].emit.consumers[0], **fields),)


def tensor(program: Program, index: int, **fields: Any) -> Program:
    tensors = list(program.tensors)
    tensors[index] = replace(tensors[index], **fields)
    return replace(program, tensors=tuple(tensors))


OTHERS: dict[str, Callable[[Program], Program]] = {
    "planes": lambda p: tensor(p, p.steps[1].input, bits=4),
    "signed codes": lambda p: tensor(p, p.steps[1].input, signed=True),
    "signed codes between": lambda p: changed(p, 1, consumers=consumer(p, 1, signed=True)),
    "a norm between": lambda p: changed(p, 1, consumers=consumer(p, 1, pre_scale="multiplier1", pre_bias="bias2")),
    "two kinds of codes": lambda p: changed(p, 1, consumers=2 * consumer(p, 1)),
    "a stream between": lambda p: changed(p, 1, stream=4),
    "an activation between": lambda p: changed(p, 1, activation=Activation("silu")),
    "an activation behind": lambda p: changed(p, 2, activation=Activation("silu")),
    "a residual between": lambda p: changed(p, 1, residual=4),
    "a gate behind": lambda p: changed(p, 2, gate=4),
    "read twice": lambda p: replace(p, steps=(*p.steps, replace(p.steps[2], name="again"))),
    "read as a residual": lambda p: changed(p, 3, residual=p.steps[2].input, residual_step=1.0),
    "returned": lambda p: replace(p, outputs=(*p.outputs, p.steps[2].input)),
    "another window": lambda p: changed(p, 1, kernel=(5, 5), padding=(2, 2)),
    "a wider padding": lambda p: changed(p, 1, padding=(2, 2)),
    "dilated": lambda p: changed(p, 1, dilation=(2, 2)),
    "steps of three": lambda p: changed(p, 1, stride=(3, 3)),
    "one way": lambda p: changed(p, 1, stride=(2, 1)),
    "groups": lambda p: changed(p, 1, groups=20),
    "a window behind": lambda p: changed(p, 2, kernel=(3, 3), padding=(1, 1)),
    "a step behind": lambda p: changed(p, 2, stride=(2, 2)),
    "weights without a zero": lambda p: changed(p, 1, w_bits=8, w_grid="odd"),
    "weights without a zero behind": lambda p: changed(p, 2, w_bits=8, w_grid="odd"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_pairs_stay_two_steps(what: str) -> None:
    """One thing each that the kernel does not compute, or that something else reads."""
    program, _ = programs.depthwise_and_layer(0, "codes")
    assert len(list(pairs(program))) == 1
    assert not list(pairs(OTHERS[what](program)))


def test_sums_that_could_overflow_for_a_byte_stay_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """K * n_w * n_x < 2^31, of codes of 8 bits, whatever those between the two have."""
    program, _ = programs.depthwise_and_layer(0, between=4)
    index = program.steps[2].input
    assert list(pairs(program))
    assert not list(pairs(tensor(program, index, channels=33_026)))  # times 255 * 255
    assert list(pairs(tensor(program, index, channels=33_025)))


def test_configurations_print_and_refuse() -> None:
    (own,) = project_defaults(BLOCK)
    assert ProjectConfig.parse(str(own)) == own
    two = ProjectConfig(32, 64, 32, 4, 2, 3)
    assert ProjectConfig.parse(str(two)) == two
    assert str(two) == "project_c32_o64_r32_w4_x2_p3"
    assert kernels.parse(f"triton:{two}") == kernels.Choice(kernels.kernel_of(two), two)
    with pytest.raises(FormatError, match="depthwise layer with a 1 x 1 layer"):
        ProjectConfig.parse("project_c32")
    bad = {
        "powers of two": replace(own, columns=3),
        "32 or 64 channels": replace(own, block_c=128),
        "4 or 8 warps": replace(own, warps=2),
        "at least 16": replace(own, block_o=8),
        "words": replace(own, block_o=16, rest=16),
        "all of 32 filters": replace(own, block_o=16),
        "one part": replace(own, split=7),
        "2 pixels or more": replace(own, columns=16),
        "at most 64 and 96, 128": replace(own, block_c=32, block_o=128, columns=1, rest=128),
    }
    for words, config in bad.items():
        assert words in (config.why_not(BLOCK) or ""), words
    assert project_defaults(replace(BLOCK, out_channels=320)) == []


@pytest.mark.parametrize("batch", [1, 128])
def test_parts_share_the_steps_where_tiles_are_few(batch: int) -> None:
    for block in BLOCKS:
        problem = problem_at(batch, block)
        (config,) = project_defaults(problem)
        assert (config.split > 1) == (batch == 1 and problem.in_channels > 32)
        assert config.split <= project_steps(problem, config)


def test_tiles_products_and_bytes() -> None:
    config = ProjectConfig(64, 32, 0, 4, 2)
    assert project_tiles(BLOCK, config) == 128 * 14 * 14 // 32
    assert executed(BLOCK, config) == 128 * 784 * 192 * (12 + 32)
    assert bytes_moved(BLOCK, config) == 128 * 784 * (192 + 32) + 192 * (9 + 32)
    assert seconds(BLOCK, config) < seconds(BLOCK, replace(config, columns=1))


def test_the_model_chooses_and_counts_the_pair_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = programs.depthwise_and_layer(0, channels=192, filters=32, size=(28, 28), stream_dtype="float16")
    assert with_projected(program) == with_projected(program, hopper=False) == fused(program)
    times = Modelled(batch=128).of_steps(program)
    assert len(times) == len(program.steps)
    assert times[2] == 0.0 < times[1]
    wide, _ = programs.depthwise_and_layer(0, channels=96, filters=320, size=(7, 7))
    assert list(pairs(wide))
    assert with_projected(wide) is wide  # no tile holds its filters
    monkeypatch.setattr(forms, "seconds", lambda problem, *_: 1.0 + (problem.op == "depthwise_project"))
    assert with_projected(program) is program


def test_measured_times_decide_where_all_three_are_known() -> None:
    program, _ = programs.depthwise_and_layer(0, channels=192, filters=32, size=(28, 28))
    times = {"depthwise_project": 3.0, (3, 3): 1.0, (1, 1): 1.0}

    def measured(problem: Problem) -> float | None:
        assert problem.batch == 128
        return times.get(problem.op, times.get(problem.kernel))

    assert with_projected(program, measured=measured) is program  # the model would take it
    times["depthwise_project"] = 1.5
    assert with_projected(program, measured=measured) == fused(program)
    times = {"depthwise_project": 3.0, (3, 3): 1.0}
    assert with_projected(program, measured=measured) == fused(program)  # by the model


def test_both_ways_are_tuned() -> None:
    """Steps as they are, with a folded stem and codes as bytes, and every pair as one; also of codes below 8 bits."""
    for between in (8, 4):
        program, _ = programs.depthwise_and_layer(0, between=between, w_bits=between)
        apart, kept, one = modelled.ways(program)
        assert apart is program
        assert len(kept.steps) == len(program.steps)
        assert one == fused(kept)
    stem, _ = programs.stem_and_maximum(0)
    assert [step.op for step in modelled.ways(stem)[2].steps] == ["quantpack", "stem_pool"]
    packed: Any = SimpleNamespace(programs=[program, stem], plan=None)
    alone = {"quantpack", "bitconv2d", "pool"}
    assert {problem.op for problem in tuning.step_problems(packed, [1], "cpu")} == alone
    assert {problem.op for problem in tuning.step_problems(packed, [1], "cuda")} == {*alone, *OPS}


@pytest.mark.parametrize("problem", [replace(BLOCK, batch=2), replace(BLOCK, stride=(2, 2), w_bits=4), STEM], ids=str)
def test_what_is_tuned_is_the_step_of_that_problem(problem: Problem) -> None:
    pair = pair_layer(problem)
    (step,) = (step for step in pair.one.steps if step.name == LAYER)
    assert problem_of(step, pair.one, problem.batch, "cuda") == problem
    assert pair.result in [consumer.tensor for consumer in step.emit.consumers]
    assert len(pair.one.steps) == len(pair.program.steps) - 1
    check_program(pair.program)


def test_interpreted_kernels_equal_the_reference(tmp_path: Path) -> None:
    run_interpreted(str(HERE / "interpreted" / "check_depthwise_project.py"), cache=tmp_path)


def compiled(block: tuple[int, int, int, int], config: ProjectConfig, written: str, folder: Path) -> Compiled:
    channels, filters, size, stride = block
    program, blob = programs.depthwise_and_layer(
        0, written, channels=channels, filters=filters, size=(size, size), stride=(stride, stride),
        stream_dtype="float16",
    )  # fmt: skip
    one = fused(program)
    place = next(at for at, step in enumerate(one.steps) if isinstance(step, ProjectedDepthwise))
    with compiling("sm_90", folder) as found:
        launches(one, blob, 1, {one.steps[place].name: config})[place]([])
    (kernel,) = found
    return kernel


def problem_at(batch: int, block: tuple[int, int, int, int]) -> Problem:
    channels, filters, size, stride = block
    window = ((3, 3), (stride, stride), (1, 1))
    return Problem("depthwise_project", batch, size, size, channels, filters, *window, device="cuda")


def shipped() -> dict[str, tuple[tuple[int, int, int, int], ProjectConfig]]:
    """Every kernel that the default rule chooses for MobileNetV2, with one block that it serves."""
    found = {}
    for block in BLOCKS:
        channels, _, size, stride = block
        for batch in (1, 32, 128):
            (config,) = project_defaults(problem_at(batch, block))
            kind = replace(config, split=min(config.split, 2))
            exact = size // stride % config.columns == 0
            found[f"{kind}-s{stride}-{channels % config.block_c > 0}-{exact}"] = (block, config)
    return found


@pytest.mark.parametrize(("block", "config"), shipped().values(), ids=shipped())
def test_codes_stay_with_the_thread_that_made_them(
    block: tuple[int, int, int, int], config: ProjectConfig, tmp_path: Path
) -> None:
    """Operand A goes to the tensor core from registers: a step stores weights to shared memory and nothing else."""
    kernel = compiled(block, config, "residual" if block[3] == 1 else "stream", tmp_path)
    check_gemm(kernel, "wgmma")
    check_order(kernel, "sm_90")
    loop = main_loop(kernel)
    assert loop.count("IGMMA") > 0
    assert loop.count("LDS|LDL|STL|SHFL") == 0
    weights = config.filters * config.block_c / (32 * config.warps)  # bytes of a thread
    assert loop.count("STS") <= max(1, weights // 4)
    strip = config.columns * (3 - block[3])
    assert loop.count("IDP") == 3 * strip * config.block_c // 4
    assert (config.split > 1) == bool(re.search(r"(red|atom)\.global", kernel.ptx))


@pytest.mark.parametrize(
    ("block", "config", "limit"),
    [
        ((192, 32, 28, 1), ProjectConfig(32, 32, 0, 4, 4), 15.5),
        ((384, 64, 14, 1), ProjectConfig(32, 64, 0, 4, 2), 18.5),
        ((96, 24, 112, 2), ProjectConfig(32, 32, 0, 4, 4), 19.5),
    ],
)
def test_a_step_is_hardly_more_than_the_window(
    block: tuple[int, int, int, int], config: ProjectConfig, limit: float, tmp_path: Path
) -> None:
    """Instructions of a thread for an output of the window, the products of the layer behind it included."""
    loop = main_loop(compiled(block, config, "stream", tmp_path))
    outputs = config.columns * (3 - block[3]) * config.block_c / 4
    assert len(loop.instructions) / outputs <= limit


def all_candidates() -> dict[str, tuple[tuple[int, int, int, int], ProjectConfig]]:
    found = {}
    for block in BLOCKS:
        channels, filters, size, stride = block
        window = ((3, 3), (stride, stride), (1, 1))
        for batch in (1, 128):
            for config in project_candidates(
                Problem("depthwise_project", batch, size, size, channels, filters, *window)
            ):
                found[f"{block}-{replace(config, split=min(config.split, 2))}"] = (block, config)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("block", "config"), all_candidates().values(), ids=all_candidates())
def test_no_candidate_spills(block: tuple[int, int, int, int], config: ProjectConfig, tmp_path: Path) -> None:
    check_gemm(compiled(block, config, "stream", tmp_path), "wgmma")
