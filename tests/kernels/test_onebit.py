"""The one-bit tensor-core kernels: their own source on a model of the GPU, equal to the reference in every element."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import one_step
import programs
import pytest
import torch
from contenders import assert_same
from cuda_steps import bound, check_steps
from gpu_model import launches_on_the_model, native
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.gpu.configs.cuda import OneBitConfig, onebit_why_not
from lbs_kernels.gpu.cuda.layout import OneBitLayout, channel_order
from lbs_kernels.gpu.cuda.onebit import prepare_weights, step_why_not
from lbs_kernels.gpu.cuda.task import threshold_tables
from lbs_kernels.gpu.layout import storage
from lbs_kernels.program.epilogue import emit_reference, fma32
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import Activation, ConvStep, Emit

CONFIGS = [OneBitConfig(*tile) for tile in OneBitConfig.tiles]
HOPPER, AMPERE = OneBitConfig("wgmma", 64, 128, 4), OneBitConfig("mma", 64, 64, 3)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    launches_on_the_model(monkeypatch)


def random_case(
    seed: int, shape: tuple[int, int, int, int], filters: int, kernel: tuple[int, int], w_bits: int, a_bits: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, H, W, C] and weight planes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 1 << a_bits, shape, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 1 << w_bits, (filters, *kernel, shape[3]), generator=generator, dtype=torch.uint8)
    return x, pack_weights(codes, w_bits)


def check_accumulator(x: Tensor, planes: Tensor, config: OneBitConfig, a_bits: int, **window: object) -> None:
    """The sums alone: a stream of float32(acc)."""
    step = one_step.conv(x, planes, a_bits=a_bits, **window)  # type: ignore[arg-type]
    assert check_steps(step.program, step.blob, [step.image], config=config) == [one_step.STEP]


# Words of a pixel: 5 (single copies), 2 (pairs), 4 (whole units). K: 45, 18 and 36 words, none of them whole chunks.
@pytest.mark.parametrize(("channels", "filters", "size"), [(130, 13, (5, 4)), (64, 70, (9, 8)), (128, 129, (7, 10))])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_tile(config: OneBitConfig, channels: int, filters: int, size: tuple[int, int]) -> None:
    x, planes = random_case(channels, (2, *size, channels), filters, (3, 3), 2, 2)
    check_accumulator(x, planes, config, 2, kernel=(3, 3), stride=(2, 1), padding=(1, 1))


@pytest.mark.parametrize("config", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 4), (4, 2), (4, 4)])
def test_several_passes_share_the_accumulators(w_bits: int, a_bits: int, config: OneBitConfig) -> None:
    x, planes = random_case(w_bits, (1, 5, 6, 72), 20, (3, 3), w_bits, a_bits)
    check_accumulator(x, planes, config, a_bits, kernel=(3, 3), padding=(1, 1))


@pytest.mark.parametrize(
    "geometry",
    [
        {"shape": (1, 3, 3, 33), "kernel": (3, 3)},  # one output pixel, a word and one bit
        {"shape": (1, 1, 1, 1), "kernel": (1, 1), "filters": 1},  # everything at its smallest
        {"shape": (2, 7, 6, 31), "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},  # odd and even borders
        {"shape": (1, 6, 5, 40), "kernel": (3, 3), "stride": (3, 2), "padding": (0, 1)},
        {"shape": (1, 7, 7, 32), "kernel": (3, 3), "dilation": (2, 3), "padding": (2, 3)},
        {"shape": (1, 3, 4, 32), "kernel": (5, 1), "padding": (5, 1)},  # windows wholly outside the image
        {"shape": (1, 15, 14, 3), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
        {"shape": (3, 9, 5, 128), "kernel": (1, 1), "filters": 65},  # one step, pixels +-1 of two tiles
        {"shape": (1, 8, 8, 512), "kernel": (1, 1), "filters": 64},  # exactly a chunk, a tile of pixels, of filters
        {"shape": (1, 1, 65, 520), "kernel": (1, 1), "filters": 63},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [HOPPER, AMPERE], ids=str)
def test_geometry(config: OneBitConfig, geometry: dict[str, object]) -> None:
    window = {"filters": 5, **geometry}
    shape, filters = window.pop("shape"), window.pop("filters")
    x, planes = random_case(7, shape, filters, window["kernel"], 2, 2)  # type: ignore[arg-type]
    check_accumulator(x, planes, config, 2, **window)


def test_signed_codes_and_zero_points_are_an_offset() -> None:
    x, planes = random_case(3, (2, 4, 4, 70), 9, (3, 3), 4, 4)
    check_accumulator(x, planes, HOPPER, 4, kernel=(3, 3), signed=True)
    check_accumulator(x, planes, HOPPER, 4, kernel=(3, 3), zero=5)


@pytest.mark.parametrize(("w_bits", "a_bits", "reading"), [(2, 4, {}), (4, 2, {"zero": 3}), (4, 4, {"signed": True})])
def test_weights_with_a_zero(w_bits: int, a_bits: int, reading: dict[str, object]) -> None:
    x, planes = random_case(w_bits, (2, 4, 4, 70), 9, (3, 3), w_bits, a_bits)
    for config in (HOPPER, AMPERE):
        check_accumulator(x, planes, config, a_bits, kernel=(3, 3), grid="zero", **reading)


@pytest.mark.parametrize(("rows", "channels", "filters"), [(1, 512, 10), (65, 100, 33), (0, 64, 8)])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (4, 4)])
def test_linear(rows: int, channels: int, filters: int, w_bits: int, a_bits: int) -> None:
    x, planes = random_case(rows, (1, rows, 1, channels), filters, (1, 1), w_bits, a_bits)
    step = one_step.linear(x[0, :, 0], planes, a_bits=a_bits)
    assert check_steps(step.program, step.blob, [step.image]) == [one_step.STEP]


# Two and a bit tiles of pixels; K of four chunks, and of one, so that copies run several tiles ahead.
@pytest.mark.parametrize(("late", "seed"), [(False, 0), (True, 0), (False, 1), (True, 2)])
@pytest.mark.parametrize(("blocks", "channels", "kernel"), [(1, 96, 3), (2, 96, 3), (100, 96, 3), (1, 40, 1)])
@pytest.mark.parametrize("config", [HOPPER, AMPERE], ids=str)
def test_nothing_depends_on_moments_and_orders(
    config: OneBitConfig,
    blocks: int,
    channels: int,
    kernel: int,
    late: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies and products happen where they are issued, or where they are waited for; threads run in another order."""
    launched = launches_on_the_model(monkeypatch, blocks, late, seed)
    x, planes = random_case(blocks, (1, 12, 12, channels), 70, (kernel, kernel), 2, 2)
    check_accumulator(x, planes, config, 2, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2))
    assert len(launched) == 1


def emit_case(
    seed: int, stream_dtype: str, filters: int, channels: int = 40, w_bits: int = 2, a_bits: int = 2
) -> tuple[programs.Builder, int, tuple[int, int, int]]:
    """A builder that stands before a 3x3 convolution: (builder, its input, its output's shape)."""
    b = programs.Builder(seed, stream_dtype)
    image = b.image(channels, 6, 5)
    codes = b.consumer((6, 5, channels), a_bits)
    b.quantize(image, Emit(consumers=(codes,)))
    return b, codes.tensor, b.conv_shape(codes.tensor, filters)


def run_emit(b: programs.Builder, config: OneBitConfig, batch: int = 2) -> list[str]:
    if not b.outputs:
        b.outputs.append(next(i for i, spec in enumerate(b.tensors) if spec.form == "stream"))
    program, blob = b.build()
    return check_steps(program, blob, programs.random_inputs(program, batch, 1), config=config)


# 130 filters: two blocks and a word of two bits; 72 and 68: multiples of 8 and of 4, a word begun; 33: of nothing.
@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("filters", "config"), [(130, HOPPER), (72, AMPERE), (68, HOPPER), (33, AMPERE)], ids=str)
def test_residual_clamp_stream_and_several_consumers(filters: int, config: OneBitConfig, stream_dtype: str) -> None:
    b, source, shape = emit_case(filters, stream_dtype, filters)
    residual = b.stream(shape)
    b.conv(source, Emit(stream=residual), filters, w_bits=4)
    consumers = (
        b.consumer(shape, 8, zero=90, norm=True),
        b.consumer(shape, 2, norm=True, relu=True),
        b.consumer(shape, 4, signed=True),
        b.consumer(shape, 8),
        b.consumer(shape, 1, relu=True),
        b.consumer(shape, 7, zero=11, norm=True),
    )
    emit = Emit(residual=residual, low=-0.7, high=1.5, stream=b.stream(shape), consumers=consumers)
    b.conv(source, emit, filters, w_bits=2)
    assert run_emit(b, config) == ["step1", "step2"]


@pytest.mark.parametrize("config", [replace(HOPPER, thresholds=4), replace(AMPERE, thresholds=4), HOPPER], ids=str)
@pytest.mark.parametrize("out_bits", [1, 2, 4])
def test_codes_alone_by_thresholds_or_floats(out_bits: int, config: OneBitConfig) -> None:
    b, source, shape = emit_case(out_bits, "float32", 77)
    b.conv(source, Emit(low=0.0, high=2.0, consumers=(b.consumer(shape, out_bits),)), 77, w_bits=2)
    norm = b.consumer(shape, out_bits, norm=True, relu=True)
    b.conv(source, Emit(consumers=(norm,)), 77, w_bits=2)
    b.conv(source, Emit(stream=b.stream(shape, output=True)), 77, w_bits=2)
    assert run_emit(b, config) == ["step1", "step2", "step3"]


def test_a_launch_holds_what_it_reads_and_writes() -> None:
    """The kernel has addresses only: whoever keeps the launch alone must keep the memory behind them."""
    b, source, shape = emit_case(0, "float32", 33)
    residual = b.stream(shape)
    b.conv(source, Emit(stream=residual), 33, w_bits=2)
    consumer = b.consumer(shape, 2, norm=True)
    b.conv(source, Emit(residual=residual, stream=b.stream(shape, output=True), consumers=(consumer,)), 33, w_bits=2)
    program, blob = b.build()
    step = program.steps[-1]
    assert isinstance(step, ConvStep)
    arrays = {key: program.array(blob, key) for key in program.arrays}
    buffers = {}
    for index in (source, residual, step.emit.stream, consumer.tensor):
        dtype, size = storage(program.tensors[index], program.stream_dtype, 2)
        buffers[index] = torch.zeros(size, dtype=dtype)
    held = {index: weakref.ref(buffer) for index, buffer in buffers.items()}
    problem = problem_of(step, program, 2, "cpu")
    launch = bound(program, arrays, step, problem, HOPPER, buffers)
    del buffers
    gc.collect()
    assert [index for index, buffer in held.items() if buffer() is None] == []
    launch([])
    assert bool(held[step.emit.stream]().any())


@pytest.mark.parametrize("name", sorted(programs.CASES))
def test_named_programs(name: str) -> None:
    program, blob = programs.CASES[name](seed=5)
    names = check_steps(program, blob, programs.random_inputs(program, batch=2, seed=3))
    only_bytes = ("one_pixel", "byte_image", "byte_image_of_five_channels", "concatenated")  # layers read 8-bit codes
    moved = name.startswith("moved") and "streams" not in name  # layers read what a selection has written, as bytes
    assert bool(names) != (moved or name.startswith((*only_bytes, "activated", "gated"))), names


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300, 330))
def test_random_programs(seed: int) -> None:
    program, blob = programs.random_program(seed)
    config = CONFIGS[seed % len(CONFIGS)]
    check_steps(program, blob, programs.random_inputs(program, 1 + seed % 3, seed), config=config)


@pytest.mark.parametrize("block_o", [64, 128])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 13, 9, 2), (4, 64, 1, 16), (4, 129, 9, 5), (2, 128, 49, 1)])
def test_weights_have_an_exact_inverse(shape: tuple[int, int, int, int], block_o: int) -> None:
    generator = torch.Generator().manual_seed(block_o)
    planes = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    w_bits, filters, taps, words = shape
    layout = OneBitLayout(filters, block_o, w_bits, taps, words)
    laid_out = layout.forward(planes)
    assert tuple(laid_out.shape) == layout.shape
    assert torch.equal(layout.inverse(laid_out), planes)
    kept = torch.zeros_like(laid_out) + (layout.forward(torch.full_like(planes, -1)) == 0)
    assert bool((laid_out[kept.bool()] == 0).all())  # what does not exist is 0
    assert int((kept == 0).sum()) == planes.numel()  # and every word has one place
    with pytest.raises(FormatError, match=r"the layout was made for torch\.int32"):
        layout.forward(planes[:, :, :, :0])


def test_one_word_has_the_place_the_layout_says() -> None:
    """Filter 37 of a block of 128, tap 2, word 1 of 3: k = 7, plane 1."""
    planes = torch.zeros(2, 64, 4, 3, dtype=torch.int32)
    planes[1, 37, 2, 1] = -5
    laid_out = OneBitLayout(64, 128, 2, 4, 3).forward(planes)
    column = 8 * ((37 % 32) // 2) + 2 * (37 // 32) + 37 % 2
    assert int(channel_order(128)[column]) == 37
    unit = (4 + 7 // 4) ^ (column % 8)
    assert (laid_out != 0).nonzero().tolist() == [[0, 0, 0, column, 4 * unit + 7 % 4]]


def test_thresholds_equal_the_floats_at_every_accumulator() -> None:
    """All accumulators of 40 channels, filters with M of both signs, 0, tiny, huge and saturating."""
    b, source, shape = emit_case(0, "float32", 66)
    limit = 40 * 9 * 9
    b.conv(source, Emit(stream=b.stream(shape, output=True)), 66, w_bits=2)
    consumers = [
        b.consumer(shape, 2),
        b.consumer(shape, 4, norm=True, relu=True),
        b.consumer(shape, 3, signed=True, norm=True),
        b.consumer(shape, 1),
    ]
    b.steps[-1] = replace(b.steps[-1], emit=replace(b.steps[-1].emit, consumers=tuple(consumers)))  # type: ignore[type-var]
    program, blob = b.build()
    step = program.steps[-1]
    multiplier, bias = (program.array(blob, key).clone() for key in (step.multiplier, step.bias))  # type: ignore[union-attr]
    multiplier[:6] = torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, 1e-3])
    bias[5] = 100.0
    arrays = {key: program.array(blob, key) for key in program.arrays}
    layout = OneBitLayout(66, 64, 2, 9, 2)
    acc = torch.arange(-limit, limit + 1, dtype=torch.int32)
    for consumer in consumers:
        emit = Emit(low=-0.5, high=2.0, consumers=(consumer,))
        tables, flips = threshold_tables(layout, multiplier, bias, emit, program, arrays)
        expected: dict[int, Tensor] = {}
        y = fma32(acc.float()[:, None], multiplier, bias)
        emit_reference(y[None, None], emit, program, blob, expected)
        table = tables.transpose(0, 1).flatten(1)[:, :66]  # [levels, filters]
        flip = (flips[torch.arange(66) // 32] >> torch.arange(66) % 32) & 1
        reached = (acc[:, None] ^ -flip) >= table[:, None]
        assert_same(reached.sum(0).to(torch.uint8), expected[consumer.tensor][0, 0], f"codes of {consumer}")
        assert 0 < int(flip.sum()) < 66


def test_the_kernel_divides_exactly() -> None:
    divide = native().quotient
    generator = torch.Generator().manual_seed(0)
    divisors = [1, 2, 3, 5, 7, 9, 49, 64, 196, 784, 3136, 2**16 - 1, 2**16 + 1, 2**30, 2**31 - 1]
    for d in divisors + torch.randint(1, 2**31, (200,), generator=generator).tolist():
        edges = [k * d + e for k in (0, 1, 2, (2**31 - 1) // d) for e in (-1, 0, 1)]
        for n in [*edges, 2**31 - 1, *torch.randint(0, 2**31, (50,), generator=generator).tolist()]:
            if 0 <= n < 2**31:
                assert divide(n, d) == n // d, (n, d)


def test_floats_become_halves_as_torch_rounds_them() -> None:
    model = native()
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    # Near the ends of float16: subnormal numbers, their ties, the largest ones, infinity.
    near = torch.tensor([2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 65504.0, 65519.99, 65520.0, math.inf, 0.0, 5.5e-8])
    scales = 2.0 ** torch.randint(-30, 18, (5000,), generator=generator)
    values = torch.cat([bits.view(torch.float32), near, -near, torch.randn(5000, generator=generator) * scales])
    values = values[~values.isnan()]
    halves = torch.tensor([model.half(v) for v in values.tolist()], dtype=torch.int32).to(torch.int16)
    brains = torch.tensor([model.brain(v) for v in values.tolist()], dtype=torch.int32).to(torch.int16)
    assert_same(halves, values.half().view(torch.int16), "float16")
    assert_same(brains, values.bfloat16().view(torch.int16), "bfloat16")
    every = torch.arange(65536, dtype=torch.int32)
    back = torch.tensor([model.from_half(v) for v in every.tolist()])
    expected = every.to(torch.int16).view(torch.float16).float()
    assert torch.equal(back[~expected.isnan()], expected[~expected.isnan()])
    assert bool(back[expected.isnan()].isnan().all())


def test_both_sides_state_the_same_tiles() -> None:
    rows = [(machine, groups, filters, stages) for machine, groups, filters, stages, _ in native().onebit_tiles()]
    assert rows == [config.row for config in CONFIGS]
    if extension.cuda is not None:
        assert extension.cuda.onebit_tiles() == native().onebit_tiles()


def test_tiles_fit_shared_memory() -> None:
    """227 KB per block on sm_90, 99 KB on sm_86 and sm_89; 1 KB more is asked for the alignment."""
    for machine, _, _, _, shared in native().onebit_tiles():
        assert shared + 1024 <= (227 if machine == "wgmma" else 99) * 1024


def problem(**changes: object) -> Problem:
    base = Problem("bitconv2d", 32, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), w_bits=2, a_bits=2, device="cpu")
    return replace(base, **changes)  # type: ignore[arg-type]


def test_configurations() -> None:
    for one in (problem(), problem(batch=1, height=1, width=1, kernel=(1, 1), padding=(0, 0)), problem(w_bits=4)):
        found = list(OneBitConfig.candidates(one))
        assert len(set(map(str, found))) == len(found) >= 6
        assert all(OneBitConfig.parse(str(config)) == config for config in found)
        assert all(config.why_not(one) is None for config in found)


def small_step(
    padding: tuple[int, int] = (0, 0), zero: int = 0
) -> tuple[one_step.OneStep, dict[str, Tensor], ConvStep, Problem, dict[int, Tensor]]:
    """A small convolution, ready to be bound: what `bound` takes, but for the configuration."""
    x, planes = random_case(0, (1, 4, 4, 8), 3, (3, 3), 2, 2)
    made = one_step.conv(x, planes, a_bits=2, kernel=(3, 3), padding=padding, zero=zero)
    program, step = made.program, made.program.steps[1]
    assert isinstance(step, ConvStep)
    buffers = {}
    for index in (step.input, made.result):
        dtype, size = storage(program.tensors[index], program.stream_dtype, 1)
        buffers[index] = torch.zeros(size, dtype=dtype)
    arrays = {key: program.array(made.blob, key) for key in program.arrays}
    return made, arrays, step, problem_of(step, program, 1, "cpu"), buffers


def test_what_is_refused() -> None:
    assert onebit_why_not(problem(w_bits=8)) == "w8a2; the one-bit kernels take codes of 2 or 4 bits"
    assert "2 groups" in str(onebit_why_not(problem(groups=2)))
    assert onebit_why_not(problem()) is None
    made, arrays, step, posed, buffers = small_step((1, 1), zero=2)
    with pytest.raises(BackendError, match="codes pads with code 2; the one-bit kernels pad with 0"):
        bound(made.program, arrays, step, posed, HOPPER, buffers)
    made, arrays, step, posed, buffers = small_step()
    with pytest.raises(BackendError, match="no such kernel is built; there are wgmma 128 x 128, 6 stages"):
        bound(made.program, arrays, step, posed, OneBitConfig("wgmma", 256, 128, 6), buffers)
    with pytest.raises(BackendError, match="codes of 2 or 4 bits"):
        prepare_weights(arrays["planes"][:1, :, :1], (1, 1), 1, made.program.tensors[step.input], "cpu")


def test_tensors_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the model there is nothing that a processor could run."""
    monkeypatch.undo()
    monkeypatch.setattr("lbs_kernels.gpu.configs.cuda.machines", lambda device: ("wgmma", "mma"))
    made, arrays, step, posed, buffers = small_step()
    with pytest.raises(BackendError, match=r"run on a GPU, the tensors are on cpu; move them: \.to\('cuda'\)"):
        bound(made.program, arrays, step, posed, HOPPER, buffers)


def test_steps_that_are_refused() -> None:
    b, source, shape = emit_case(0, "float32", 8)
    consumers = tuple(b.consumer(shape, 2) for _ in range(9))
    b.conv(source, Emit(stream=b.stream(shape, output=True), consumers=consumers), 8, w_bits=2)
    program, _ = b.build()
    step, spec = program.steps[1], program.tensors[source]
    assert step_why_not(step, spec) == "9 consumers; the CUDA kernels write at most 8"  # type: ignore[arg-type]
    few = replace(step, emit=Emit(consumers=consumers[:8]))
    assert step_why_not(few, spec) is None  # type: ignore[arg-type]
    assert "pads with code 3" in str(step_why_not(few, replace(spec, zero=3)))  # type: ignore[arg-type]
    for extra in ({"activation": Activation("silu")}, {"gate": 0}):
        other = replace(few, emit=replace(few.emit, **extra))
        assert "an activation or a gate" in str(step_why_not(other, spec))  # type: ignore[arg-type]
    planes = torch.zeros(2, 8, 9, 2, dtype=torch.int32)
    with pytest.raises(FormatError, match="planes have 9 taps; a window of 1 x 3 has 3"):
        prepare_weights(planes, (1, 3), 1, spec, "cpu")


@pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    task = recorded_task(monkeypatch)
    with pytest.raises(BackendError, match=r"asking for the current GPU failed: cuda\w+, "):
        extension.require_cuda().onebit_launch(task, "wgmma", 2, 128, 6, 0)
    with pytest.raises(FormatError, match="codes of 3 bits"):
        extension.require_cuda().onebit_launch({**task, "w_bits": 3}, "wgmma", 2, 128, 6, 0)


def recorded_task(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What Python hands to the native side for a small convolution; its addresses are of tensors that are gone."""
    made, arrays, step, posed, buffers = small_step()
    tasks = launches_on_the_model(monkeypatch)
    bound(made.program, arrays, step, posed, HOPPER, buffers)([])
    return tasks[0]


def test_the_native_side_checks_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    model = native()
    with pytest.raises(FormatError, match="field 'x' is missing"):
        model.run_onebit({}, "wgmma", 2, 128, 6)
    task = recorded_task(monkeypatch)
    with pytest.raises(FormatError, match=r"no kernel wgmma of 128 x 128 tiles with 7 stages is built"):
        model.run_onebit(task, "wgmma", 2, 128, 7)
    for change, words in (
        ({"w_bits": 3}, "codes of 3 bits; it takes 2 or 4"),
        ({"kernel": (5, 5)}, "the output's height is 0; it takes 1 to"),
        ({"batch": 2**28}, "the number of input pixels is 4294967296; it takes 0 to 2147483647"),
        ({"batch": 2**30, "height": 2**24, "width": 2**24}, "the number of output pixels of an image is 2814"),
        ({"stream_type": "float8"}, "stream_type is 'float8'"),
        ({"signed": True, "padding": (1, 1)}, "signed codes cannot be padded"),
        ({"thresholds": 64}, "thresholds serve planes"),
    ):
        with pytest.raises(FormatError, match=words):
            model.run_onebit({**task, **change}, "wgmma", 2, 128, 6)
