"""The Triton kernels in Triton's interpreter against the reference, every element.

Triton decides whether to interpret when it is imported, so these run in a process of their own, started by
tests/kernels/test_triton_interpreted.py; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/check_triton.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import one_step
import programs
import pytest
import torch
import triton
import triton.language as tl
from contenders import assert_same
from test_activations import one_activation
from torch import Tensor

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.gpu.triton.common import INTERPRETED, fma
from lbs_kernels.gpu.triton.depthwise_columns import columns_meta
from lbs_kernels.program.activations import KINDS
from lbs_kernels.program.epilogue import fma32
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Emit, Program, WeightGrid
from lbs_kernels.run.reference import ReferenceRunner

BITS = (2, 4, 8)
SMALL = GemmConfig(block_m=16, block_o=32, block_words=1, warps=4, stages=2, weights_first=False)
# Masked-out lanes of a tile may hold anything, infinities too; numpy warns where a GPU would not.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def test_the_interpreter_is_on() -> None:
    assert INTERPRETED.value


def check(program: Program, blob: Tensor, images: list[Tensor], runner: GpuRunner | None = None) -> dict[int, Tensor]:
    """Trace and outputs equal the reference, from buffers full of garbage; returns the reference's trace."""
    expected: dict[int, Tensor] = {}
    outputs = ReferenceRunner(program, blob).run(images, expected)
    runner = GpuRunner(program, blob, "cpu") if runner is None else runner
    runner.plan(images[0].shape[0]).arena.random_(generator=torch.Generator().manual_seed(0))
    actual: dict[int, Tensor] = {}
    results = runner.run(images, actual)
    assert actual.keys() == expected.keys()
    for index in set(expected) - set(program.inputs):
        spec = program.tensors[index]
        assert_same(actual[index], expected[index], f"tensor {index} ({spec.name})")
    for result, output in zip(results, outputs, strict=True):
        assert_same(result, output, "output")
    return expected


@pytest.mark.parametrize("name", ["chain", "preact_residual_bfloat16", "depthwise", "one_pixel"])
def test_named_programs(name: str) -> None:
    program, blob = programs.CASES[name](seed=1)
    trace = check(program, blob, programs.random_inputs(program, batch=2, seed=2))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["byte_image", "byte_image_of_five_channels"])
def test_images_are_read_where_they_lie(name: str, layout: torch.memory_format) -> None:
    """Bytes, floats, with and without a multiplier and a bias."""
    program, blob = programs.CASES[name](seed=1)
    images = [x.contiguous(memory_format=layout) for x in programs.random_inputs(program, batch=2, seed=2)]
    trace = check(program, blob, images)
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("name", ["normed_stream", "normed_stream_bfloat16"])
def test_streams_are_normed(name: str) -> None:
    program, blob = programs.CASES[name](seed=1)
    trace = check(program, blob, programs.random_inputs(program, batch=2, seed=2))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("name", ["interpolated", "interpolated_float16"])
def test_interpolation(name: str) -> None:
    program, blob = programs.CASES[name](seed=1)
    trace = check(program, blob, programs.random_inputs(program, batch=2, seed=2))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("name", ["coded_residual", "coded_residual_bfloat16"])
def test_residuals_of_codes(name: str) -> None:
    program, blob = programs.CASES[name](seed=1)
    trace = check(program, blob, programs.random_inputs(program, batch=2, seed=2))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("name", ["imagenet_stem", "preact_residual", "preact_residual_float16"])
def test_more_named_programs(name: str) -> None:
    program, blob = programs.CASES[name](seed=3)
    trace = check(program, blob, programs.random_inputs(program, batch=1, seed=4))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("name", ["activated", "gated", "activated_float16", "gated_bfloat16", "averaged_bfloat16"])
def test_activations_gates_and_averages(name: str) -> None:
    program, blob = programs.CASES[name](seed=1)
    trace = check(program, blob, programs.random_inputs(program, batch=2, seed=2))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize(
    "name", [name for name in programs.CASES if name.startswith(("concatenated", "selected", "moved"))]
)
def test_selections(name: str) -> None:
    program, blob = programs.CASES[name](seed=1)
    trace = check(program, blob, programs.random_inputs(program, batch=2, seed=2))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_any_bits(kind: str) -> None:
    step, expected = one_activation(kind)
    assert_same(step.run("triton"), expected, kind)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_random_programs(seed: int) -> None:
    program, blob = programs.random_program(seed)
    check(program, blob, programs.random_inputs(program, batch=1 + seed % 3, seed=seed))


# 33 channels: a word and one bit. 13 filters of 64: what pruning leaves. 5 x 4 pixels: every window touches a border.
@pytest.mark.parametrize("w_bits", BITS)
@pytest.mark.parametrize("a_bits", BITS)
def test_every_pair_of_bits(w_bits: int, a_bits: int) -> None:
    out_bits = {2: 8, 4: 2, 8: 4}[w_bits]
    program, blob = programs.one_conv(
        w_bits + a_bits, channels=33, filters=13, size=(5, 4), w_bits=w_bits, a_bits=a_bits, out_bits=out_bits
    )
    trace = check(program, blob, programs.random_inputs(program, batch=1, seed=a_bits))
    assert programs.share_unsaturated(program, trace) > 0.3


@pytest.mark.parametrize(
    "geometry",
    [
        {"size": (3, 3), "padding": (0, 0)},  # one output pixel
        {"size": (7, 6), "stride": (2, 2)},  # odd and even borders under a stride
        {"size": (6, 5), "stride": (3, 2), "padding": (0, 1)},
        {"size": (7, 7), "dilation": (2, 3), "padding": (2, 3)},
        {"size": (3, 4), "kernel": (5, 1), "padding": (5, 1)},  # windows wholly outside the image
        {"size": (5, 5), "kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)},
        {"size": (4, 4), "a_bits": 8, "zero": 117},  # padding is a code, not 0
        {"size": (4, 4), "a_bits": 8, "zero": 255, "w_bits": 8},
        {"size": (4, 4), "a_bits": 4, "zero": 5},
        {"size": (4, 4), "a_bits": 8, "signed": True, "w_bits": 8, "padding": (0, 0)},
        {"size": (4, 4), "a_bits": 8, "signed": True, "w_bits": 2, "padding": (0, 0)},
        {"size": (4, 4), "a_bits": 2, "signed": True, "w_bits": 8, "padding": (0, 0)},
        {"size": (4, 4), "a_bits": 8, "zero": 9, "w_bits": 8, "grid": "zero"},
        {"size": (4, 4), "a_bits": 4, "w_bits": 4, "grid": "zero"},
        {"size": (4, 4), "groups": 7, "channels": 7, "a_bits": 8, "zero": 9, "w_bits": 8, "grid": "zero"},
        {"size": (4, 4), "groups": 4, "channels": 8, "filters": 12, "a_bits": 4, "w_bits": 2, "grid": "zero"},
        {"size": (4, 4), "a_bits": 1, "w_bits": 7, "out_bits": 7},
        {"size": (4, 4), "a_bits": 7, "w_bits": 3, "out_bits": 1},
        {"size": (4, 4), "groups": 4, "channels": 8, "filters": 12, "a_bits": 8, "zero": 3, "w_bits": 8},
        {"size": (2, 3), "groups": 2, "channels": 70, "filters": 34, "a_bits": 2, "kernel": (1, 1), "padding": (0, 0)},
    ],
    ids=lambda geometry: "-".join(f"{key}{value}" for key, value in geometry.items()).replace(" ", ""),
)
def test_geometry_and_reading_of_codes(geometry: dict[str, object]) -> None:
    defaults = {"channels": 5, "filters": 7, "w_bits": 4, "a_bits": 4}
    program, blob = programs.one_conv(11, **{**defaults, **geometry})  # type: ignore[arg-type]
    check(program, blob, programs.random_inputs(program, batch=2, seed=5))


# Words +-1 (31, 32, 33), bytes +-1 of a pitch (15, 17), filters +-1 of a tile of 32, rows +-1 of a tile of 16.
@pytest.mark.parametrize(
    ("channels", "filters", "rows"), [(31, 31, 15), (32, 32, 16), (33, 33, 17), (15, 1, 33), (17, 65, 1), (65, 64, 16)]
)
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (8, 8), (8, 4), (4, 8)])
def test_accumulator_around_tiles(channels: int, filters: int, rows: int, w_bits: int, a_bits: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randint(0, 1 << a_bits, (1, rows, 1, channels), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 1 << w_bits, (filters, 1, 1, channels), generator=generator, dtype=torch.uint8)
    planes = pack_weights(codes, w_bits)
    check_sums(one_step.conv(x, planes, a_bits=a_bits, kernel=(1, 1)), SMALL)


def check_sums(step: one_step.OneStep, config: GemmConfig, quantizer: ElementwiseConfig | None = None) -> None:
    """The accumulator by one configuration: a stream of float32(acc), which holds all of it below 2^24."""
    configs = {one_step.STEP: config, **({one_step.INPUT: quantizer} if quantizer else {})}
    runner = GpuRunner(step.program, step.blob, "cpu", configs)
    check(step.program, step.blob, [step.image], runner)


def check_accumulator(
    config: GemmConfig,
    w_bits: int,
    a_bits: int,
    channels: int,
    zero: int = 0,
    filters: int = 33,
    grid: WeightGrid = "odd",
) -> None:
    """A strided 3 x 3 window over 4 x 5 pixels: every window touches a border."""
    generator = torch.Generator().manual_seed(w_bits + a_bits)
    x = torch.randint(0, 1 << a_bits, (2, 4, 5, channels), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 1 << w_bits, (filters, 3, 3, channels), generator=generator, dtype=torch.uint8)
    planes = pack_weights(codes, w_bits)
    window = {"a_bits": a_bits, "kernel": (3, 3), "stride": (2, 1), "padding": (1, 1), "zero": zero, "grid": grid}
    check_sums(one_step.conv(x, planes, **window), config)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [1, 2, 4])
@pytest.mark.parametrize("weights_first", [True, False])
def test_every_order_of_operands_and_word_block(words: int, weights_first: bool) -> None:
    config = GemmConfig(32, 32, words, warps=4, stages=3, weights_first=weights_first)
    check_accumulator(config, w_bits=8, a_bits=8, channels=70, zero=9)


# 1 and 3 bits leave room in their field; 70 channels end inside the third of four words; 128 fill the block of bytes.
@pytest.mark.parametrize(
    ("w_bits", "a_bits", "channels"),
    [
        (1, 1, 70),
        (2, 8, 128),
        pytest.param(3, 4, 70, marks=pytest.mark.slow),
        pytest.param(2, 3, 33, marks=pytest.mark.slow),
        pytest.param(4, 7, 70, marks=pytest.mark.slow),
    ],
)
def test_fields(w_bits: int, a_bits: int, channels: int) -> None:
    config = GemmConfig(16, 32, 4, warps=4, stages=3, weights_first=True, weights="fields")
    check_accumulator(config, w_bits, a_bits, channels, zero=1, filters=13)


@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 8), (4, 4)])
def test_fields_with_a_zero(w_bits: int, a_bits: int) -> None:
    config = GemmConfig(16, 32, 4, warps=4, stages=3, weights_first=True, weights="fields")
    check_accumulator(config, w_bits, a_bits, 128, zero=1, filters=13, grid="zero")


# 9 taps in steps of 2 and 4, the last with one tap and what lies behind the window: fields have no 0 for it, sums of x
# are taken over it, and padding is another code than it. 33 channels end in the second of two words.
@pytest.mark.parametrize(
    ("config", "w_bits", "a_bits", "channels"),
    [
        (GemmConfig(16, 32, 2, 4, 3, False, "fields", block_taps=2), 2, 4, 33),
        (GemmConfig(32, 16, 1, 4, 3, True, "bytes", block_taps=4), 8, 2, 17),
        (GemmConfig(16, 32, 1, 4, 3, True, "bytes", block_taps=4), 8, 8, 17),
        (GemmConfig(16, 32, 1, 4, 3, False, "fields", block_taps=4, split_k=2), 4, 8, 32),
        (GemmConfig(16, 32, 1, 4, 2, False, "bytes", block_taps=8), 4, 1, 5),
        pytest.param(
            GemmConfig(16, 32, 2, 4, 3, True, "fields", block_taps=2, split_k=5), 4, 2, 64, marks=pytest.mark.slow
        ),
        pytest.param(GemmConfig(32, 32, 4, 4, 3, False, "bytes", block_taps=2), 8, 7, 70, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_several_taps_in_a_step(config: GemmConfig, w_bits: int, a_bits: int, channels: int) -> None:
    check_accumulator(config, w_bits, a_bits, channels, zero=1, filters=13)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_reduction_of_one_short_step(bits: int) -> None:
    """The tile of what an inverted residual begins with; filters that end within a block."""
    program, blob = programs.one_conv(
        2, channels=24, filters=40, size=(20, 15), w_bits=bits, a_bits=bits, kernel=(1, 1), padding=(0, 0), zero=3
    )
    config = GemmConfig(256, 32, 1, 4, 2, weights_first=False)
    check(program, blob, programs.random_inputs(program, 1, 6), GpuRunner(program, blob, "cpu", {"step1": config}))


# 27 steps in 4 parts, the last of 6; in 16 parts of 2, where the last two parts have nothing to do.
@pytest.mark.parametrize("parts", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("bits", "weights"), [(4, "fields"), (8, "bytes")])
def test_parts_of_the_reduction_add_up(bits: int, weights: str, parts: int) -> None:
    config = GemmConfig(16, 32, 1, 4, 3, weights_first=True, weights=weights, split_k=parts)
    check_accumulator(config, bits, bits, channels=70, zero=3, filters=13)


def test_the_last_part_emits_and_leaves_zeros() -> None:
    """The second run finds the workspace as the first did; codes and a stream come from the total."""
    program, blob = programs.one_conv(0, channels=70, filters=13, size=(4, 4), w_bits=2, a_bits=4)
    config = GemmConfig(16, 32, 2, 4, 3, weights_first=False, weights="fields", split_k=5)
    runner = GpuRunner(program, blob, "cpu", {"step1": config})
    for seed in (0, 1):
        trace = check(program, blob, programs.random_inputs(program, 2, seed), runner)
    assert programs.share_unsaturated(program, trace) > 0.3


# Channels around a word, windows around a border, under strides, dilation, odd sizes and every reading of the codes.
DEPTHWISE: list[dict[str, object]] = [
    {"channels": 33, "w_bits": 2, "a_bits": 4},
    {"channels": 31, "w_bits": 8, "a_bits": 8, "zero": 7, "stride": (2, 2), "size": (5, 6)},
    {"channels": 40, "w_bits": 4, "a_bits": 2, "kernel": (5, 5), "padding": (2, 2), "stride": (2, 1)},
    {"channels": 70, "w_bits": 4, "a_bits": 8, "dilation": (2, 1), "padding": (2, 1)},
    {"channels": 5, "w_bits": 8, "a_bits": 4, "zero": 3},
    {"channels": 3, "w_bits": 7, "a_bits": 7, "kernel": (1, 1), "padding": (0, 0)},
    {"channels": 32, "w_bits": 8, "a_bits": 8, "signed": True, "padding": (0, 0)},
    {"channels": 2, "w_bits": 1, "a_bits": 1, "kernel": (2, 3), "padding": (0, 0), "size": (2, 3)},
]


@pytest.mark.parametrize("case", DEPTHWISE[:3], ids=str)
def test_depthwise(case: dict[str, object]) -> None:
    check_depthwise(case, DepthwiseConfig(32, 64, 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_with_other_configurations(case: dict[str, object]) -> None:
    check_depthwise(case, DepthwiseConfig(16, 32, 1))
    check_depthwise(case, GroupedConfig(16, 32, 4))


# Strips that divide the rows of the output, leave a rest, or are longer; blocks that end behind the channels; images of
# odd and even sides, also of one row; every reading of the weights.
COLUMNS: list[tuple[dict[str, object], DepthwiseConfig]] = [
    ({"channels": 33, "w_bits": 4, "zero": 7, "size": (5, 7)}, DepthwiseConfig(16, 32, 2, 7)),
    ({"channels": 33, "w_bits": 8, "grid": "zero", "stride": (2, 2), "size": (7, 8)}, DepthwiseConfig(16, 32, 2, 2)),
    ({"channels": 64, "w_bits": 2, "padding": (0, 0), "size": (6, 9)}, DepthwiseConfig(16, 64, 4, 4)),
    ({"channels": 32, "w_bits": 4, "padding": (0, 0), "size": (5, 6)}, DepthwiseConfig(16, 32, 2, 4)),
    (
        {"channels": 70, "w_bits": 8, "grid": "zero", "zero": 91, "size": (8, 8), "out_bits": 8},
        DepthwiseConfig(64, 32, 8, 8),
    ),
    ({"channels": 16, "w_bits": 4, "stride": (2, 2), "size": (9, 9), "out_bits": 4}, DepthwiseConfig(16, 32, 2, 4)),
    ({"channels": 5, "w_bits": 3, "grid": "zero", "padding": (1, 0), "size": (1, 4)}, DepthwiseConfig(16, 32, 2, 1)),
    ({"channels": 32, "w_bits": 4, "stride": (2, 2), "padding": (0, 1), "size": (8, 7)}, DepthwiseConfig(32, 32, 4, 2)),
]


@pytest.mark.parametrize(("case", "config"), COLUMNS, ids=str)
def test_depthwise_by_columns(case: dict[str, object], config: DepthwiseConfig) -> None:
    check_depthwise({"a_bits": 8, "out_bits": 8, "stream_dtype": "float16", **case}, config)


@pytest.mark.parametrize("stride", [1, 2])
def test_sixteen_channels_a_thread_where_bytes_alone_are_written(stride: int) -> None:
    b = programs.Builder(3)
    codes = b.consumer((6, 8, 40), 8, zero=5)
    b.quantize(b.image(40, 6, 8), Emit(consumers=(codes,)))
    out = b.consumer((6 // stride, 8 // stride, 40), 8)
    emit = Emit(low=0.0, high=2.0, consumers=(out,))
    b.conv(codes.tensor, emit, 40, w_bits=4, stride=(stride, stride), groups=40)
    b.conv(out.tensor, Emit(stream=b.stream(b.shape(out.tensor), output=True)), 40, w_bits=4, groups=40)
    program, blob = b.build()
    runner = GpuRunner(program, blob, "cpu")
    assert runner.choices(2)[1].config.wide
    trace = check(program, blob, programs.random_inputs(program, 2, 3), runner)
    assert len(trace[out.tensor].unique()) > 50
    assert not runner.choices(2)[2].config.wide  # a stream is written


def test_no_row_or_column_is_read_beyond_an_image() -> None:
    """Rows and columns that are not written are read all the same, where strips do not divide the output."""
    config = DepthwiseConfig(16, 32, 1, 4)
    layer = Problem("bitconv2d", 1, 8, 10, 32, 32, (3, 3), groups=32)  # 6 x 8 outputs
    assert columns_meta(layer, config) == (1, False, False, True)
    assert columns_meta(replace(layer, height=9), config).padded  # 7 rows, by two
    assert not columns_meta(replace(layer, height=9, width=17, stride=(2, 2)), config).padded  # 4 rows, by one
    assert columns_meta(replace(layer, width=11), config) == (1, True, False, False)
    assert columns_meta(replace(layer, padding=(1, 1)), config).padded


def test_depthwise_by_columns_is_the_default_of_bytes() -> None:
    """But where sums of the activations are asked for as well, or they are signed."""
    common = {"channels": 8, "filters": 8, "groups": 8, "size": (6, 6), "a_bits": 8}
    for changed, columns in (
        ({"w_bits": 4}, True),
        ({"w_bits": 8, "grid": "zero"}, True),
        ({"w_bits": 8}, False),
        ({"w_bits": 4, "signed": True, "padding": (0, 0)}, False),
        ({"w_bits": 4, "a_bits": 4}, False),
    ):
        program, blob = programs.one_conv(1, **{**common, **changed})
        runner = GpuRunner(program, blob, "cpu")
        assert (runner.choices(2)[1].config.columns > 0) is columns, changed
        check(program, blob, programs.random_inputs(program, 2, 3), runner)


def check_depthwise(case: dict[str, object], config: DepthwiseConfig | GroupedConfig) -> None:
    program, blob = programs.one_conv(
        5, **{"size": (4, 5), **case, "filters": case["channels"], "groups": case["channels"]}
    )
    check(program, blob, programs.random_inputs(program, 2, 6), GpuRunner(program, blob, "cpu", {"step1": config}))


# K * 255 * 255 is the largest multiple below 2^31; codes at the ends reach +-(2^31 - 65536), of which float32 keeps 24
# bits, and half of either cancel down to 255 * 255, of which it keeps all. Where activations are 1, what is summed and
# what is added to it are about 2^30 and odd, and all of their difference is kept: nothing may be rounded on the way.
def test_accumulator_at_the_overflow_corner() -> None:
    channels, ones = (2**31 - 1) // (255 * 255), (0, 16513, 33025)
    x = torch.tensor([[255], [1]], dtype=torch.uint8).expand(-1, channels)
    codes = torch.zeros(len(ones), 1, 1, channels, dtype=torch.uint8)
    for filter_codes, count in zip(codes, ones, strict=True):
        filter_codes[..., :count] = 255
    step = one_step.linear(x, pack_weights(codes, 8), a_bits=8)
    expected = torch.tensor([(2 * count - channels) * 255 * value for value in (255, 1) for count in ones])
    assert step.run("reference").flatten().tolist() == expected.float().tolist()
    # Few steps, and few programs that make the input: each is slow here.
    sums = GemmConfig(32, 16, block_words=16, warps=4, stages=2, weights_first=True)
    check_sums(step, sums, ElementwiseConfig(1, 8192, warps=4))


def test_not_a_number_and_infinity_become_codes() -> None:
    program, blob = programs.one_conv(0, channels=3, filters=4, size=(3, 3), w_bits=4, a_bits=8, zero=100)
    images = programs.random_inputs(program, batch=1, seed=0)
    images[0][0, :, 1, 1] = torch.tensor([math.nan, math.inf, -math.inf])
    check(program, blob, images)


def test_bounds_of_values_become_bounds_of_codes() -> None:
    """Where no stream is stored; ties, values beyond all bounds, infinities, what is no number; every kind of code."""
    b = programs.Builder(seed=0)
    image = b.image(1, 1, 48)
    shape = (1, 48, 1)
    for low, high in ((None, None), (0.0, 6.0), (-0.75, 1.25), (0.5, None), (2.0, 1.0)):
        kinds = [b.consumer(shape, 8, zero=zero, top=3.0) for zero in (0, 90, 91, 255)]
        kinds += [
            b.consumer(shape, 8, signed=True),
            b.consumer(shape, 8, zero=33, relu=True),
            b.consumer(shape, 4, zero=5),
        ]
        b.quantize(image, Emit(low=low, high=high, consumers=tuple(kinds)))
    b.quantize(image, Emit(low=0.0, stream=b.stream(shape, output=True)))
    program, blob = b.build()
    scale = kinds[1].scale
    ties = (torch.arange(-20, 20) + 0.5) / scale
    values = torch.cat([ties, torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 7.5, -7.5, 1.25])])
    trace = check(program, blob, [values.reshape(1, 1, 1, 48)])
    # Of the first kinds nothing is bounded but codes; of the last every value is the one above its bound.
    assert len(trace[program.steps[0].emit.consumers[1].tensor].unique()) > 20
    assert len(trace[kinds[1].tensor].unique()) == 1


def test_ties_round_to_even_and_bounds_saturate() -> None:
    b = programs.Builder(seed=0)
    image = b.image(1, 1, 8)
    shape = (1, 8, 1)
    target = programs.Consumer(b._tensor("codes", shape, bits=4), 4, scale=1.0)
    b.quantize(image, programs.Emit(stream=b.stream(shape, output=True), consumers=(target,)))
    program, blob = b.build()
    values = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, 14.5, 15.5, 1e30]).reshape(1, 1, 1, 8)
    trace = check(program, blob, [values])
    assert trace[target.tensor].flatten().tolist() == [0, 2, 2, 4, 0, 14, 15, 15]


# 3 channels of a tile of 4, 33 of 64: what lies beyond reads as 0, which is not code 0 for these consumers.
@pytest.mark.parametrize("channels", [3, 33])
def test_unused_bits_stay_zero(channels: int) -> None:
    b = programs.Builder(seed=0)
    image = b.image(channels, 4, 4)
    shape = (4, 4, channels)
    b.quantize(image, programs.Emit(consumers=(b.consumer(shape, 4, zero=5), b.consumer(shape, 6, signed=True))))
    program, blob = b.build()
    check(program, blob, programs.random_inputs(program, 1, 0))


@triton.jit
def fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, fma(tl.load(a_ptr + index), tl.load(b_ptr + index), tl.load(c_ptr + index)))


def test_fma_rounds_once() -> None:
    """Products halfway between two float32 numbers, moved off the tie by an addend that float64 loses."""
    generator = torch.Generator().manual_seed(0)
    a = 1 + torch.randint(0, 1 << 11, (256,), generator=generator) * 2.0**-12 + 2.0**-12
    b = 1 + torch.randint(0, 1 << 11, (256,), generator=generator) * 2.0**-12 + 2.0**-12
    sign = torch.randint(0, 2, (256,), generator=generator) * 2.0 - 1
    c = sign * 2.0 ** -torch.randint(60, 90, (256,), generator=generator)
    out = torch.empty(256)
    fma_kernel[(1,)](a, b, c, out, SIZE=256)
    expected = fma32(a, b, c)
    assert_same(out, expected, "fma")
    twice = (a.double() * b.double() + c.double()).float()
    assert not torch.equal(twice, expected)  # the data tell one rounding from two


@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
def test_streams_are_clamped_and_rounded_half_to_even(stream_dtype: str) -> None:
    b = programs.Builder(0, stream_dtype)
    image = b.image(2, 4, 8)
    shape = (4, 8, 2)
    b.quantize(image, programs.Emit(low=-1.5, high=2.25, stream=b.stream(shape, output=True)))
    program, blob = b.build()
    images = programs.random_inputs(program, 1, 0)
    # Half of a last bit of bfloat16 and of float16 above 1, on even and odd neighbours, and one bit beside the tie.
    for bit in (8, 11):
        ties = 1 + torch.arange(8) * 2.0 ** (1 - bit) + 2.0**-bit
        images[0][0, 0, bit % 4] = ties
        images[0][0, 1, bit % 4] = ties + 2.0**-23
    images[0][0, :, 1, :2] = torch.tensor([[math.nan, math.inf], [-math.inf, -0.0]])
    expected = ReferenceRunner(program, blob).run(images)[0]
    actual = GpuRunner(program, blob, "cpu").run(images)[0]
    assert float(actual.nan_to_num().min()) == -1.5
    assert float(actual.nan_to_num().max()) == 2.25
    assert_same(actual.nan_to_num(7.0), expected.nan_to_num(7.0), "stream")


# Planes of one, two and more than four bits, bytes; channels within a word and beyond it; a window over every border.
@pytest.mark.parametrize(
    ("bits", "channels"), [(4, 40), (8, 33), *(pytest.param(bits, 33, marks=pytest.mark.slow) for bits in (1, 2, 7))]
)
def test_the_maximum_of_codes(bits: int, channels: int) -> None:
    b = programs.Builder(bits)
    image = b.image(channels, 5, 6)
    codes = b.consumer((5, 6, channels), bits)
    b.quantize(image, programs.Emit(consumers=(codes,)))
    b.pool(codes.tensor, programs.Emit(consumers=(b.consumer((3, 6, channels), bits),)), "max", (3, 3), (2, 1), (1, 1))
    program, blob = b.build()
    check(program, blob, programs.random_inputs(program, 2, 1))


def test_the_mean_adds_in_order_and_multiplies_once() -> None:
    b = programs.Builder(0)
    image = b.image(5, 7, 7)
    stream = b.stream((7, 7, 5))
    b.quantize(image, programs.Emit(stream=stream))
    b.pool(stream, programs.Emit(stream=b.stream((1, 1, 5), output=True, flat=True)), "mean")
    program, blob = b.build()
    images = [image * 2.0 ** torch.arange(7) for image in programs.random_inputs(program, 3, 0)]
    check(program, blob, images)


def test_a_runner_serves_several_batches_from_kept_buffers() -> None:
    program, blob = programs.one_conv(0, channels=3, filters=5, size=(4, 4), w_bits=2, a_bits=2)
    runner = GpuRunner(program, blob, "cpu")
    first = runner.plan(2)
    for batch, seed in ((2, 0), (3, 1), (2, 2)):
        check(program, blob, programs.random_inputs(program, batch, seed), runner)
    assert runner.plan(2) is first
    runner.release()
    assert runner.plan(2) is not first


def test_outputs_go_where_the_caller_says() -> None:
    program, blob = programs.preact_residual(0)
    images = programs.random_inputs(program, 1, 0)
    runner = GpuRunner(program, blob, "cpu")
    expected = runner.run(images)
    out = [torch.full_like(value, math.nan) for value in expected]
    results = runner.run(images, out=out)
    for result, target, value in zip(results, out, expected, strict=True):
        assert result is target
        assert_same(target, value, "output")
    again = runner.run(images)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(again, expected, strict=True))


def test_configurations_by_step_name() -> None:
    program, blob = programs.one_conv(0, channels=40, filters=40, size=(4, 4), w_bits=4, a_bits=8)
    runner = GpuRunner(program, blob, "cpu", {"step1": SMALL})
    check(program, blob, programs.random_inputs(program, 1, 0), runner)
    shared = GemmConfig(16, 16, 1, 4, 2, False)
    with pytest.raises(BackendError, match=r"step 'step1'.*40 filters in blocks of 16 would share words"):
        GpuRunner(program, blob, "cpu", {"step1": shared})


def test_what_is_refused() -> None:
    planes = pack_weights(torch.zeros(2, 3, 3, 3, dtype=torch.uint8), 4)
    step = one_step.conv(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), planes, a_bits=4, kernel=(3, 3))
    with pytest.raises(BackendError, match="powers of two"):
        check_sums(step, GemmConfig(24, 16, 1, 4, 2, True))
