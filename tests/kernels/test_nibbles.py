"""Activations of at most 4 bits kept two in a byte: their layout, and the s8 kernels that read and write them.

On a model of the GPU, equal to the reference in every element.
"""

from __future__ import annotations

from dataclasses import replace

import one_step
import programs
import pytest
import torch
from cuda_steps import check_steps
from gpu_model import launches_on_the_model
from s8_cases import NIBBLES, SHAPES, as_nibbles, deep, layer, random_codes, residuals

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.cuda import OneBitConfig, S8Config, onebit_form_why_not, s8_form_why_not
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.cuda.layout import S8Layout
from lbs_kernels.gpu.cuda.s8 import prepare_weights
from lbs_kernels.gpu.layout import pack_nibbles, unpack_nibbles
from lbs_kernels.program.layer import LAYER, layer_program
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import Emit

CONFIGS = [S8Config(*tile) for tile in S8Config.tiles]
WIDE, NARROW = S8Config("wgmma", 128, 128, 6), S8Config("wgmma", 64, 64, 12)
BY_EIGHTS, BY_FOURS = S8Config("wgmma", 128, 96, 7), S8Config("wgmma", 128, 48, 9)
SHARED = S8Config(*S8Config.clusters[0])
POINTWISE = Problem("bitconv2d", 128, 56, 56, 64, 256, w_bits=4, a_bits=4, device="cuda", nibbles=True)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    launches_on_the_model(monkeypatch)


def check(made: one_step.OneStep, config: S8Config) -> None:
    assert check_steps(made.program, made.blob, [made.image], config=config) == [one_step.STEP]


def pointwise(channels: int, filters: int, pixels: int, seed: int = 0) -> one_step.OneStep:
    x, planes = random_codes(seed, (1, 1, pixels, channels), filters, (1, 1), 4, 4)
    made = one_step.conv(x, planes, a_bits=4, kernel=(1, 1), zero=5)
    return replace(made, program=as_nibbles(made.program))


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 31, 32, 33, 176])
def test_nibbles_have_an_exact_inverse(channels: int) -> None:
    codes = torch.randint(0, 16, (2, 3, channels), generator=torch.Generator().manual_seed(channels), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape[-1] == 4 * -(-channels // 32)
    assert torch.equal(unpack_nibbles(packed, channels), codes)


def test_one_nibble_has_the_place_the_layout_says() -> None:
    """Channels 9 and 13 of 14: word 1, byte 1, its low and its high half. A mask and a shift give bytes in order."""
    codes = torch.zeros(14, dtype=torch.uint8)
    codes[9], codes[13] = 7, 12
    assert pack_nibbles(codes).tolist() == [0, 0xC700, 0, 0]
    (word,) = pack_nibbles(torch.arange(1, 9, dtype=torch.uint8))[:1].tolist()
    assert [(word & 0x0F0F0F0F) >> 8 * i & 255 for i in range(4)] == [1, 2, 3, 4]
    assert [(word >> 4 & 0x0F0F0F0F) >> 8 * i & 255 for i in range(4)] == [5, 6, 7, 8]


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("config", [WIDE, NARROW], ids=str)
def test_geometry(config: S8Config, name: str) -> None:
    check(layer(name, "w8a4_zero" if SHAPES[name].get("padding") else "w8a4"), config)


# A step is 32 channels, a chunk 128; copies are of 32 channels, or of 16 where a pixel has an odd number of them. 48,
# 96, 176 and 352 are left of pruned layers.
@pytest.mark.parametrize("channels", [1, 16, 31, 32, 33, 48, 64, 65, 96, 97, 127, 128, 129, 176, 192, 352, 1152])
@pytest.mark.parametrize("config", [WIDE, NARROW], ids=str)
def test_reductions(config: S8Config, channels: int) -> None:
    check(pointwise(channels, 24, 70, channels), config)


@pytest.mark.parametrize("channels", [48, 96, 176])
@pytest.mark.parametrize("config", [WIDE, NARROW, BY_FOURS], ids=str)
def test_steps_run_across_taps(config: S8Config, channels: int) -> None:
    x, planes = random_codes(channels, (1, 6, 5, channels), 50, (3, 3), 4, 4)
    made = one_step.conv(x, planes, a_bits=4, kernel=(3, 3), padding=(1, 1), zero=3)
    check(replace(made, program=as_nibbles(made.program)), config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_tile(config: S8Config) -> None:
    check(layer("strided", "w4a4_odd"), config)
    check(layer("odd", "w8a4_zero"), config)


@pytest.mark.parametrize("reading", sorted(NIBBLES))
def test_weights_and_zero_points(reading: str) -> None:
    check(layer("pixel", reading), NARROW)  # no padding, which signed codes have not
    if not NIBBLES[reading].get("signed"):
        check(layer("dilated", reading), NARROW)


@pytest.mark.parametrize(("name", "split"), [("odd", 2), ("long", 2), ("long", 4), ("long", 8)])
def test_blocks_of_a_cluster_share_a_reduction(name: str, split: int) -> None:
    check(layer(name, "w8a4_zero"), replace(SHARED, split=split))


# Several tiles for every block, of fewer and of more chunks than the ring has; copies and products where they are
# issued or where they are waited for, and threads in another order.
@pytest.mark.parametrize(("late", "seed"), [(False, 0), (True, 0), (False, 1), (True, 2)])
@pytest.mark.parametrize("channels", [96, 400, 1700])
@pytest.mark.parametrize("config", [WIDE, NARROW, SHARED], ids=str)
def test_nothing_depends_on_moments_and_orders(
    config: S8Config, channels: int, late: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launches_on_the_model(monkeypatch, 1, late, seed)
    check(pointwise(channels, 2 * config.block_o + 8, 200, seed), config)
    assert len(launched) == 1


@pytest.mark.parametrize(("rows", "channels", "filters"), [(1, 512, 10), (65, 100, 33), (0, 64, 8), (130, 16, 64)])
def test_linear(rows: int, channels: int, filters: int) -> None:
    x, planes = random_codes(rows, (rows, channels), filters, (1, 1), 8, 4)
    made = one_step.linear(x, planes, a_bits=4, grid="zero", zero=9)
    check(replace(made, program=as_nibbles(made.program)), NARROW)


# 130 filters: two blocks and two of 16 channels; 72 and 68: multiples of 8 and of 4; 33: of nothing.
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("filters", "config"),
    [(130, WIDE), (72, NARROW), (33, S8Config("wgmma", 64, 128, 8)), (68, BY_EIGHTS), (130, BY_EIGHTS)],
    ids=str,
)
def test_nibbles_are_written_beside_streams_and_other_codes(filters: int, config: S8Config, bits: int) -> None:
    """By a layer that reads bytes, and by one that reads nibbles; residuals, signs, norms and zero points."""
    program, blob = residuals(filters, "float16", bits)
    program = as_nibbles(program)
    assert sum(spec.nibbles for spec in program.tensors) == 3 + (bits == 4)
    assert check_steps(program, blob, programs.random_inputs(program, 2, 1), config=config) == ["step1", "step2"]


@pytest.mark.parametrize("config", [OneBitConfig(*tile) for tile in OneBitConfig.tiles], ids=str)
def test_one_bit_kernels_write_them_too(config: OneBitConfig) -> None:
    b = programs.Builder(1)
    codes = b.consumer((6, 5, 40), 2)
    b.quantize(b.image(40, 6, 5), Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, 77)
    b.conv(codes.tensor, Emit(low=0.0, consumers=(b.consumer(shape, 4, norm=True),)), 77, w_bits=2)
    b.conv(codes.tensor, Emit(stream=b.stream(shape, output=True)), 77, w_bits=2)
    program, blob = b.build()
    tensors = as_nibbles(program).tensors
    program = replace(program, tensors=(*program.tensors[:2], *tensors[2:]))  # but planes are what is read
    assert [spec.nibbles for spec in program.tensors] == [False, False, True, False]
    assert check_steps(program, blob, programs.random_inputs(program, 2, 1), config=config) == ["step1", "step2"]


def test_a_deep_network() -> None:
    program, blob = deep(2, size=9, bits=4)
    program = as_nibbles(program)
    found = check_steps(program, blob, programs.random_inputs(program, 1, 0), config=WIDE)
    assert found == [step.name for step in program.steps[1:]]


def test_tiles_that_cannot_write_them_say_so() -> None:
    program, blob = residuals(33, "float32")
    with pytest.raises(BackendError, match="is kept as nibbles; s8_wgmma_m128_o48_s9_t2 writes bytes and streams"):
        check_steps(as_nibbles(program), blob, programs.random_inputs(program, 1, 1), config=BY_FOURS)


@pytest.mark.parametrize("block_o", [48, 64, 96, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 9, 20), (64, 1, 128), (129, 9, 33), (128, 49, 3)])
def test_weights_have_an_exact_inverse(shape: tuple[int, int, int], block_o: int) -> None:
    weights = torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(block_o)).to(torch.int8)
    layout = S8Layout(shape[0], block_o, *shape[1:], nibbles=True)
    laid_out = layout.forward(weights)
    assert tuple(laid_out.shape) == layout.shape
    assert torch.equal(layout.inverse(laid_out), weights)
    assert int((laid_out != 0).sum()) == weights.numel()


def test_one_weight_has_the_place_at_which_its_nibble_is_expanded() -> None:
    """Channel 32 + 8 * 2 + 4 + 3 of a pixel: step 1, thread 2, last half, byte 3. The swizzle leaves column 0."""
    weights = torch.zeros(1, 1, 70, dtype=torch.int8)
    weights[0, 0, 55] = -5
    laid_out = S8Layout(1, 64, 1, 70, nibbles=True).forward(weights)
    assert (laid_out != 0).nonzero().tolist() == [[0, 0, 0, 32 + 16 + 4 * 2 + 3]]


def test_who_reads_them() -> None:
    assert s8_form_why_not(POINTWISE) is None
    assert "are no nibbles" in str(s8_form_why_not(replace(POINTWISE, a_bits=5)))
    assert "take planes" in str(onebit_form_why_not(replace(POINTWISE, w_bits=2, a_bits=2)))
    gemm = next(kernel for kernel in kernels.KERNELS if kernel.config is GemmConfig)
    assert "csrc/s8 alone reads" in str(gemm.why_not(POINTWISE))
    half = next(kernel for kernel in kernels.KERNELS if not kernel.exact)
    assert all(config.why_not(POINTWISE) for config in half.candidates(POINTWISE))
    assert type(kernels.default(POINTWISE).config) is S8Config
    made = layer("pixel", "w8a4")
    source = made.program.tensors[1]
    with pytest.raises(BackendError, match="beside nibbles no weights of 8 bits on the grid odd"):
        prepare_weights(torch.zeros(8, 1, 9, 2, dtype=torch.int32), (3, 3), 1, source, "cpu", "odd")


def test_a_key_of_its_own() -> None:
    planes = replace(POINTWISE, nibbles=False)
    assert str(POINTWISE) == str(planes).replace("_cuda", "_nibbles_cuda")
    program, blob = layer_program(replace(POINTWISE, batch=1, height=9, width=8))
    image = torch.rand(1, 64, 9, 8)
    assert [spec.nibbles for spec in program.tensors] == [False, True, True, False]
    assert check_steps(program, blob, [image], config=WIDE) == [LAYER]
