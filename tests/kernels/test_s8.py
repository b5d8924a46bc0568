"""The s8 tensor-core kernels: their own source on a model of the GPU, equal to the reference in every element."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import one_step
import programs
import pytest
import torch
from cuda_steps import bound, check_steps, input_buffer
from gpu_model import launches_on_the_model, native
from s8_cases import READINGS, SHAPES, all_as_bytes, coded_residuals, deep, layer, random_codes, residuals, shortcuts

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs import cuda
from lbs_kernels.gpu.configs.cuda import OneBitConfig, S8Config, s8_why_not
from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.cuda.layout import S8Layout, channel_order
from lbs_kernels.gpu.cuda.s8 import prepare_weights, step_why_not
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import ConvStep, Emit
from lbs_kernels.times import table
from lbs_kernels.tune import tuner

CONFIGS = [S8Config(*tile) for tile in S8Config.tiles]
SHARED = [S8Config(*tile, split=split) for tile in S8Config.clusters for split in (2, 4, 8)]
WIDE, NARROW = S8Config("wgmma", 128, 128, 6), S8Config("wgmma", 64, 64, 12)
READ = {  # bytes of K under an output, 16 channels at a time
    name: math.prod(case["kernel"]) * -(-case["shape"][-1] // 16) * 16 for name, case in SHAPES.items()
}
LOW, TALL = S8Config("wgmma", 64, 128, 8), S8Config("wgmma", 128, 64, 8)
BY_EIGHTS, BY_FOURS = S8Config("wgmma", 128, 96, 7), S8Config("wgmma", 128, 48, 9)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    launches_on_the_model(monkeypatch)


def check(made: one_step.OneStep, config: S8Config) -> None:
    assert check_steps(made.program, made.blob, [made.image], config=config) == [one_step.STEP]


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("config", [WIDE, NARROW], ids=str)
def test_geometry(config: S8Config, name: str) -> None:
    check(layer(name, "w8_zero" if SHAPES[name].get("padding") else "w8"), config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_tile(config: S8Config) -> None:
    check(layer("strided", "w4_odd"), config)
    check(layer("odd", "w8_odd"), config)  # with sums of codes, over channels that leave bytes of a pixel unused


# Chunks of K: 7 (odd), 6 (smallest), 22 (long), 5 (outside: windows beyond the image).
@pytest.mark.parametrize("name", ["odd", "long", "stem", "same", "outside"])
@pytest.mark.parametrize("config", SHARED, ids=str)
def test_blocks_of_a_cluster_share_a_reduction(config: S8Config, name: str) -> None:
    made = layer(name, "w8_odd")
    chunks = -(-READ[name] // 128)
    if config.split <= chunks:
        check(made, config)
    else:
        with pytest.raises(BackendError, match=f"shared by {config.split} blocks; .* are possible"):
            check(made, config)


@pytest.mark.parametrize("reading", sorted(READINGS))
def test_shared_sums_count_zero_points_once(reading: str) -> None:
    check(layer("long" if not READINGS[reading].get("signed") else "pixel", reading), SHARED[0])


@pytest.mark.parametrize(("late", "seed"), [(False, 0), (True, 0), (False, 1), (True, 2)])
@pytest.mark.parametrize("config", [SHARED[0], SHARED[2]], ids=str)
def test_no_block_depends_on_moments_and_orders(
    config: S8Config, late: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on which block of its cluster comes first; several tiles, so several clusters."""
    launched = launches_on_the_model(monkeypatch, 1, late, seed)
    x, planes = random_codes(seed, (1, 9, 9, 130), 70, (3, 3), 8)
    check(one_step.conv(x, planes, a_bits=8, kernel=(3, 3), padding=(1, 1), zero=77), config)
    assert len(launched) == 1


@pytest.mark.parametrize("filters", [130, 72, 68, 33])
@pytest.mark.parametrize("config", SHARED[:2], ids=str)
def test_shared_tiles_are_written_as_others(config: S8Config, filters: int) -> None:
    for program, blob in (residuals(filters, "float16"), coded_residuals(filters)):
        images = programs.random_inputs(program, 2, 1)
        assert check_steps(program, blob, images, config=config) == ["step1", "step2"]


@pytest.mark.parametrize("config", [WIDE, replace(SHARED[1], split=4)], ids=str)
def test_the_networks_that_gpu_tests_replay(config: S8Config) -> None:
    for (program, blob), layers in ((deep(2, size=9), 4), (shortcuts(1, between=2, size=9), 3)):
        small = replace(config, split=1) if layers == 3 else config  # one chunk in a shortcut
        found = check_steps(program, blob, programs.random_inputs(program, 1, 0), config=small)
        assert found == [step.name for step in program.steps[1:]]


def test_where_blocks_may_share_a_reduction() -> None:
    late = replace(LAYER, batch=1, height=7, width=7, in_channels=512, out_channels=512)
    found = [config for config in S8Config.with_splits(late) if config.split > 1]
    assert [config.split for config in found] == [2, 4, 8]
    assert all(S8Config.parse(str(config)) == config for config in found)
    assert str(found[-1]) == "s8_wgmma_m64_o64_s5_t2_k8"
    assert set(found) <= set(S8Config.candidates(late))
    assert not [config for config in S8Config.with_splits(replace(late, batch=128)) if config.split > 1]  # tiles enough
    short = replace(late, in_channels=64, kernel=(1, 1), padding=(0, 0))
    assert {config.split for config in S8Config.with_splits(short)} == {1}  # one chunk
    assert "blocks; (1,) are possible" in str(replace(WIDE, split=2).why_not(late))
    assert "blocks; (1,) are possible" in str(OneBitConfig(*OneBitConfig.tiles[0], split=2).why_not(late))


@pytest.mark.parametrize("reading", sorted(READINGS))
def test_weights_and_zero_points(reading: str) -> None:
    check(layer("pixel", reading), NARROW)  # no padding, which signed codes have not
    if not READINGS[reading].get("signed"):
        check(layer("dilated", reading), NARROW)


@pytest.mark.parametrize(("rows", "channels", "filters"), [(1, 512, 10), (65, 100, 33), (0, 64, 8), (130, 16, 64)])
def test_linear(rows: int, channels: int, filters: int) -> None:
    x, planes = random_codes(rows, (rows, channels), filters, (1, 1), 8)
    check(one_step.linear(x, planes, a_bits=8, grid="zero", zero=9), NARROW)


@pytest.mark.parametrize("weight", [0, 255])
def test_sums_near_the_end_of_32_bits(weight: int) -> None:
    """33,000 products of the largest codes: 2^31 less 1,616,352 or so, and of both signs."""
    x = torch.full((1, 33000), 255, dtype=torch.uint8)
    planes = random_codes(0, (1, 33000), 1, (1, 1), 8)[1]
    planes = torch.where(torch.tensor(weight > 0), -1, 0).to(torch.int32).expand_as(planes).clone()
    planes[..., -1] &= (1 << 33000 % 32) - 1
    check(one_step.linear(x, planes, a_bits=8, grid="zero"), NARROW)


# Several tiles for each consumer; K of five chunks, and of one, so that copies run several tiles ahead.
@pytest.mark.parametrize(("late", "seed"), [(False, 0), (True, 0), (False, 1), (True, 2)])
@pytest.mark.parametrize(("blocks", "channels", "kernel"), [(1, 64, 3), (2, 64, 3), (100, 64, 3), (1, 40, 1)])
@pytest.mark.parametrize("config", [WIDE, NARROW, BY_FOURS], ids=str)
def test_nothing_depends_on_moments_and_orders(
    config: S8Config,
    blocks: int,
    channels: int,
    kernel: int,
    late: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies and products happen where they are issued, or where they are waited for; threads run in another order."""
    launched = launches_on_the_model(monkeypatch, blocks, late, seed)
    x, planes = random_codes(blocks, (1, 20, 20, channels), 70, (kernel, kernel), 4)
    padding = (kernel // 2, kernel // 2)
    check(one_step.conv(x, planes, a_bits=8, kernel=(kernel, kernel), padding=padding, zero=77), config)
    assert len(launched) == 1


# 22 chunks, more than any ring has, and as many as one of six or of twelve stages, under several tiles of each
# consumer: those who multiply in turn come back to a stage when it was filled for the other meanwhile.
@pytest.mark.parametrize(("late", "seed"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("channels", [304, 80, 160])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tiles_of_more_chunks_than_the_ring_follow_one_another(
    config: S8Config, channels: int, late: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches_on_the_model(monkeypatch, 1, late, seed)
    x, planes = random_codes(channels, (1, 6, 6, channels), 2 * config.block_o + 40, (3, 3), 4)
    check(one_step.conv(x, planes, a_bits=8, kernel=(3, 3), padding=(1, 1), zero=77), config)


# 130 filters: two blocks and a word of two bits; 72 and 68: multiples of 8 and of 4, a word begun; 33: of nothing.
@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("filters", "config"),
    [
        (130, WIDE),
        (72, NARROW),
        (68, TALL),
        (33, LOW),
        *[(filters, config) for config in (BY_EIGHTS, BY_FOURS) for filters in (33, 68, 72, 96, 130)],
    ],
    ids=str,
)
def test_residual_clamp_stream_and_several_consumers(filters: int, config: S8Config, stream_dtype: str) -> None:
    program, blob = residuals(filters, stream_dtype)
    program = program if config.writes("planes") else all_as_bytes(program)
    assert check_steps(program, blob, programs.random_inputs(program, 2, 1), config=config) == ["step1", "step2"]


# 72 and 13: a piece of 8 channels begun inside the pitch of 80, and one that is partly behind the channels.
@pytest.mark.parametrize(
    ("filters", "config"),
    [(130, WIDE), (72, NARROW), (13, LOW), (72, BY_EIGHTS), (13, BY_EIGHTS), (52, BY_FOURS), (13, BY_FOURS)],
    ids=str,
)
def test_residuals_of_codes_and_codes_that_stand_for_values(filters: int, config: S8Config) -> None:
    program, blob = coded_residuals(filters)
    program = program if config.writes("planes") else all_as_bytes(program)
    assert check_steps(program, blob, programs.random_inputs(program, 2, 1), config=config) == ["step1", "step2"]


@pytest.mark.parametrize("thresholds", [0, 4])
@pytest.mark.parametrize("out_bits", [2, 4])
@pytest.mark.parametrize("tile", [NARROW, BY_EIGHTS], ids=str)
def test_codes_alone_by_thresholds_or_floats(tile: S8Config, out_bits: int, thresholds: int) -> None:
    b = programs.Builder(out_bits)
    image = b.image(40, 6, 5)
    codes = b.consumer((6, 5, 40), 8)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, 77)
    b.conv(codes.tensor, Emit(low=0.0, consumers=(b.consumer(shape, out_bits, norm=True),)), 77, w_bits=4)
    b.conv(codes.tensor, Emit(stream=b.stream(shape, output=True)), 77, w_bits=2)
    program, blob = b.build()
    config = replace(tile, thresholds=thresholds)
    assert check_steps(program, blob, programs.random_inputs(program, 2, 1), config=config) == ["step1", "step2"]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_narrow_codes_as_bytes_keep_their_levels(config: S8Config) -> None:
    """Both ways: a layer writes codes of 2 and 4 bits as bytes, one reads them; thresholds write planes, not these."""
    b = programs.Builder(3)
    image = b.image(40, 6, 5)
    codes = b.consumer((6, 5, 40), 4, zero=3)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, 52)
    few = b.consumer(shape, 2, zero=1, norm=True)
    b.conv(codes.tensor, Emit(consumers=(few,)), 52, w_bits=4)
    b.conv(few.tensor, Emit(stream=b.stream(b.conv_shape(few.tensor, 20), output=True)), 20, w_bits=2)
    program, blob = b.build()
    program = all_as_bytes(program)
    images = programs.random_inputs(program, 2, 1)
    assert check_steps(program, blob, images, config=replace(config, thresholds=4)) == ["step1", "step2"]


def test_planes_are_refused_by_tiles_that_cannot_write_them() -> None:
    program, blob = residuals(33, "float32")
    with pytest.raises(BackendError, match="is kept as planes; s8_wgmma_m128_o48_s9_t2 writes bytes and streams"):
        check_steps(program, blob, programs.random_inputs(program, 1, 1), config=BY_FOURS)


@pytest.mark.parametrize("name", sorted(programs.CASES))
def test_named_programs(name: str) -> None:
    program, blob = programs.CASES[name](seed=5)
    images = programs.random_inputs(program, batch=2, seed=3)
    bytes_read = [
        step.name for step in program.steps
        if getattr(step, "w_bits", 0) and program.tensors[step.input].bits == 8 and getattr(step, "groups", 1) == 1  # type: ignore[union-attr]
        and (step.emit.activation, step.emit.gate) == (None, None)  # type: ignore[union-attr]
    ]  # fmt: skip
    assert check_steps(program, blob, images, kind=S8Config) == bytes_read


@pytest.mark.parametrize("block_o", [48, 64, 96, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 9, 20), (64, 1, 128), (129, 9, 33), (128, 49, 3)])
def test_weights_have_an_exact_inverse(shape: tuple[int, int, int], block_o: int) -> None:
    weights = torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(block_o)).to(torch.int8)
    filters, taps, channels = shape
    layout = S8Layout(filters, block_o, taps, channels)
    laid_out = layout.forward(weights)
    assert (tuple(laid_out.shape), laid_out.dtype) == (layout.shape, torch.int8)
    assert torch.equal(layout.inverse(laid_out), weights)
    assert int((laid_out != 0).sum()) == weights.numel()  # every byte has one place, the others are 0
    with_sums = replace(layout, sums=True).forward(weights)
    assert torch.equal(with_sums[:, :, :block_o], laid_out)
    # A column of ones is the first filter of a block, the same places at the same turns, as if all its weights were 1.
    ones = layout.forward(torch.ones_like(weights))[:1, :, :1].expand(layout.blocks, -1, -1, -1)
    assert torch.equal(with_sums[:, :, block_o : block_o + 1], ones)
    assert bool((with_sums[:, :, block_o:].sum(-1) == ones.sum(-1)).all())
    with pytest.raises(FormatError, match=r"the layout was made for torch\.int8"):
        layout.forward(weights[:, :, :0])


def test_one_byte_has_the_place_the_layout_says() -> None:
    """Filter 37 of a block of 128, tap 2, channel 21 of 40: byte 2 * 48 + 21 = 117, unit 7."""
    weights = torch.zeros(64, 4, 40, dtype=torch.int8)
    weights[37, 2, 21] = -5
    laid_out = S8Layout(64, 128, 4, 40).forward(weights)
    column = 8 * ((37 % 32) // 2) + 2 * (37 // 32) + 37 % 2
    assert int(channel_order(128)[column]) == 37
    assert (laid_out != 0).nonzero().tolist() == [[0, 0, column, 16 * (7 ^ (column % 8)) + 117 % 16]]


@pytest.mark.parametrize("address", [0, 1024, 5 * 1024, 227 * 1024])
def test_descriptors_say_where_a_matrix_lies_and_how(address: int) -> None:
    """The fields as the manual of the instruction has them: start / 16, distances / 16, offset, kind of swizzle."""
    descriptor = native().matrix_descriptor(address)
    fields = {"start": (0, 14), "along_k": (16, 14), "groups_of_8": (32, 14), "offset": (49, 3), "swizzle": (62, 2)}
    found = {name: descriptor >> first & (1 << count) - 1 for name, (first, count) in fields.items()}
    assert found == {"start": address // 16, "along_k": 1, "groups_of_8": 64, "offset": 0, "swizzle": 1}
    assert descriptor == sum(found[name] << first for name, (first, _) in fields.items())  # and nothing else is set


def test_both_sides_state_the_same_tiles() -> None:
    rows = [row[:4] for row in native().s8_tiles()]
    assert rows == [config.row for config in CONFIGS]
    assert all(row[4] + 1024 <= 227 * 1024 for row in native().s8_tiles())  # 1 KB more is asked for the alignment
    if extension.cuda is not None:
        assert extension.cuda.s8_tiles() == native().s8_tiles()


LAYER = Problem("bitconv2d", 32, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=8, device="cuda")


def test_configurations() -> None:
    for problem in (LAYER, replace(LAYER, batch=1, height=1, width=1, kernel=(1, 1), padding=(0, 0))):
        found = list(S8Config.candidates(problem))
        assert len(set(map(str, found))) == len(found) >= 3
        assert all(S8Config.parse(str(config)) == config for config in found)
        assert {kernels.parse(f"cuda:{config}") for config in found} == {
            kernels.Choice(kernels.kernel_of(config), config) for config in found
        }
    with pytest.raises(FormatError, match="is no configuration of the s8 kernels"):
        S8Config.parse("onebit_wgmma_m128_o128_s6_t2")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    """As if this machine had a GPU of these instructions and the module that was built for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "machines", lambda device: instructions)
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    monkeypatch.setattr(table, "times", lambda problem: {})


def test_the_default_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.default(LAYER).config == conv_default(LAYER)  # no GPU was asked
    on_a_gpu(monkeypatch, "wgmma", "mma")
    many = replace(LAYER, batch=128)
    assert kernels.default(many).config == WIDE
    assert kernels.default(replace(many, out_channels=64)).config == TALL
    names = [choice.name for choice in tuner.shortlist(many, 2)]
    assert names[0] == str(kernels.default(many).name)
    assert any(name.startswith("triton:gemm") for name in names)
    few = replace(LAYER, batch=1)
    assert kernels.default(few).config == replace(SHARED[1], split=4)  # few tiles: their reduction is shared
    for other in (replace(many, a_bits=4), replace(many, groups=2)):
        assert kernels.default(other).config == conv_default(other)
    assert kernels.choose(many, ("triton",)).config == conv_default(many)
    refused = kernels.choose(many, why_not=lambda choice: "no" if choice.kernel.family == "cuda" else None)
    assert refused.config == conv_default(many)
    monkeypatch.setattr(extension, "cuda", None)
    monkeypatch.setattr(extension, "cuda_reason", "nvcc was not found")
    assert kernels.default(many).config == conv_default(many)


def test_the_default_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, "mma")
    assert kernels.default(LAYER).config == conv_default(LAYER)
    assert "of compute capability 9.0" in str(s8_why_not(LAYER))


def test_what_is_refused() -> None:
    assert "activations of 4 bits are planes" in str(s8_why_not(replace(LAYER, a_bits=4, device="cpu")))
    assert "2 groups" in str(s8_why_not(replace(LAYER, groups=2)))
    assert s8_why_not(LAYER) is None
    x, planes = random_codes(0, (1, 4, 4, 8), 3, (3, 3), 8)
    made = one_step.conv(x, planes, a_bits=8, kernel=(3, 3))
    program, step = made.program, made.program.steps[1]
    assert isinstance(step, ConvStep)
    source = program.tensors[step.input]
    gated = replace(step, emit=replace(step.emit, gate=0))
    assert "an activation or a gate" in str(step_why_not(gated, source))
    with pytest.raises(BackendError, match=r"4 bits as planes, 2 groups, .* they take bytes and nibbles, one group"):
        prepare_weights(planes, (3, 3), 2, replace(source, bits=4), "cpu", "zero")
    with pytest.raises(FormatError, match="planes have 9 taps; a window of 1 x 3 has 3"):
        prepare_weights(planes, (1, 3), 1, source, "cpu", "zero")
    with pytest.raises(FormatError, match="the 32-bit accumulator ends below"):
        prepare_weights(
            torch.zeros(8, 1, 1, 1100, dtype=torch.int32), (1, 1), 1, replace(source, channels=35200), "cpu", "zero"
        )
    problem = problem_of(step, program, 1, "cpu")
    buffers = {step.input: input_buffer(x, source, "cpu"), made.result: torch.zeros(1, 2, 2, 3)}
    arrays = {key: program.array(made.blob, key) for key in program.arrays}
    with pytest.raises(BackendError, match="no such kernel is built; there are wgmma 128 x 128, 6 stages"):
        bound(program, arrays, step, problem, S8Config("wgmma", 256, 128, 6), buffers)


def test_the_native_side_checks_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = launches_on_the_model(monkeypatch)
    check(layer("smallest"), NARROW)
    for change, words in (
        ({"a_bits": 5}, "activations of 5 bits; it takes 8, or nibbles of at most 4"),
        ({"a_bits": 4, "w_odd": True}, "weights of 8 bits without a zero multiply bytes, not nibbles"),
        ({"border": 0}, "there is no pixel that padding holds"),
        ({"split": 2}, "the number of thread blocks that share K is 2; it takes 1 to 1"),
        ({"batch": 2**28, "channels": 128}, "the number of input bytes is 34359738368"),
    ):
        with pytest.raises(FormatError, match=words):
            native().run_s8({**tasks[0], **change}, *NARROW.row)
