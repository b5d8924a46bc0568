"""Modelled times of a GPU: what they are made of, and that they grow with the work."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lbs_kernels.errors import FormatError
from lbs_kernels.gpu.configs import cuda
from lbs_kernels.gpu.configs.cost import H200, bytes_moved, executed, seconds
from lbs_kernels.gpu.configs.cuda import OneBitConfig, S8Config
from lbs_kernels.gpu.configs.defaults import conv_default, weighted_defaults
from lbs_kernels.gpu.configs.direct import DepthwiseConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.modelled import Modelled, modelled
from lbs_kernels.program.problem import Problem

LAYER = Problem("bitconv2d", 1, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), device="cuda")
SIZES = ((56, 3, 1), (28, 3, 2), (14, 1, 1), (7, 3, 1), (1, 1, 1))
SPLITS = 0.94  # of the time of eight channels fewer: one step more lets twice as many programs share a reduction


def layer(size: int, kernel: int, stride: int, inputs: int, outputs: int, bits: tuple[int, int]) -> Problem:
    padding = (kernel // 2, kernel // 2)
    shape = ((kernel, kernel), (stride, stride), padding)
    return Problem("bitconv2d", 1, size, size, inputs, outputs, *shape, w_bits=bits[0], a_bits=bits[1])


def estimate(model: Modelled, problem: Problem) -> float:
    found = model.estimate(problem)
    assert found is not None
    return found


@pytest.mark.parametrize("batch", [1, 16, 128])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (2, 2)])
def test_time_grows_with_filters_and_channels(batch: int, bits: tuple[int, int]) -> None:
    model = Modelled(batch=batch)
    for size, kernel, stride in SIZES:
        for other in (16, 48, 256):
            by_filters = [estimate(model, layer(size, kernel, stride, other, n, bits)) for n in range(8, 513, 24)]
            by_channels = [estimate(model, layer(size, kernel, stride, n, other, bits)) for n in range(8, 513, 24)]
            assert by_filters == sorted(by_filters)
            few = batch * (size // stride) ** 2 < 2 * H200.multiprocessors * 64
            assert all(more >= (SPLITS if few else 1.0) * less for less, more in itertools.pairwise(by_channels))
            if kernel == 3 and not few:  # else epilogues or launches may be all of it
                assert by_filters[-1] > by_filters[0]
                assert by_channels[-1] > by_channels[0]


@pytest.mark.parametrize("size", SIZES)
def test_time_grows_with_bits(size: tuple[int, int, int]) -> None:
    """In Triton, where bits are planes; and in whatever serves, as codes of any width may be kept as bytes."""
    for weights in (2, 4, 8):
        narrow, wide = (replace(layer(*size, 128, 128, (weights, a)), batch=128, device="cuda") for a in (2, 4))
        assert seconds(narrow, conv_default(narrow)) < seconds(wide, conv_default(wide))
    for other in (2, 4, 8):
        by_weights = [estimate(Modelled(batch=128), layer(*size, 128, 128, (w, other))) for w in (2, 4, 8)]
        by_activations = [estimate(Modelled(batch=128), layer(*size, 128, 128, (other, a))) for a in (2, 4, 8)]
        assert by_weights == sorted(by_weights)
        assert by_activations == sorted(by_activations)


def test_executed_products_are_those_of_whole_tiles() -> None:
    exact = GemmConfig(128, 128, 4, 8, 3, weights_first=False)
    assert executed(replace(LAYER, batch=8), exact) == replace(LAYER, batch=8).macs  # 6272 = 49 * 128 pixels
    cut = replace(LAYER, batch=8, in_channels=96, out_channels=48)
    assert executed(cut, exact) == 6272 * 128 * 9 * 128
    assert executed(cut, S8Config("wgmma", 128, 64, 8)) == 6272 * 64 * 9 * 96  # K goes by 16 channels, across taps
    assert executed(replace(cut, in_channels=3), S8Config("wgmma", 128, 64, 8)) == 6272 * 64 * 160  # 144 in steps of 32
    assert executed(cut, OneBitConfig("wgmma", 128, 64, 8)) == 6272 * 64 * 1024  # 27 words in steps of 8
    depthwise = replace(LAYER, batch=8, groups=128)
    assert executed(depthwise, DepthwiseConfig(128, 32, 4)) == 6272 * 128 * 12  # four taps at a time


def test_a_time_is_the_longest_of_its_parts() -> None:
    """Of a layer that waits for memory and of one that multiplies, by hand."""
    tile = S8Config("wgmma", 128, 128, 6)
    memory = replace(LAYER, batch=128, height=56, width=56, kernel=(1, 1), padding=(0, 0))
    assert bytes_moved(memory, tile) == 2 * 128 * 56 * 56 * 128 + 128 * 128
    rounds = -(-128 * 56 * 56 // 128 // 132)
    own = rounds * 128 * 128 * (783 / 64) / 128 + 128 * 128 * (783 / 64) / 128  # its epilogue, longer than K = 128
    moved = bytes_moved(memory, tile) / H200.bandwidth
    assert seconds(memory, tile) == pytest.approx(H200.step + max(moved, own / H200.clock), rel=1e-12)
    deep = replace(LAYER, batch=128, in_channels=1024)
    chunks, rounds = 9 * 1024 / 128, -(-128 * 28 * 28 // 128 // 132)
    refill = chunks * 256 * 128 / H200.refill
    found = (seconds(deep, tile) - H200.step) * H200.clock
    assert found == pytest.approx(rounds * refill + 128 * 128 * (783 / 64) / 128, rel=1e-9)
    assert seconds(deep, tile, moved=1e12) == pytest.approx(H200.step + 1e12 / H200.bandwidth)


def test_the_rule_follows_the_model() -> None:
    def chosen(problem: Problem) -> list[str]:
        return [type(config).__name__ for config in weighted_defaults(problem, hopper=True)]

    many = replace(LAYER, batch=128)
    assert chosen(many)[0] == "S8Config"
    assert chosen(many)[-1] == "GemmConfig"
    assert chosen(replace(many, w_bits=2, a_bits=2))[0] == "OneBitConfig"
    assert "OneBitConfig" not in chosen(replace(many, w_bits=4, a_bits=4))
    late = replace(LAYER, height=7, width=7, in_channels=512, out_channels=512)
    first, *_ = weighted_defaults(late, hopper=True)  # too few tiles: their reduction is shared
    assert (first.tile in first.clusters, first.split) == (True, 8)
    assert chosen(replace(late, kernel=(1, 1), padding=(0, 0)))[-1] == "GemmConfig"
    assert chosen(replace(many, groups=128)) == ["DepthwiseConfig"]
    for problem in (many, replace(many, w_bits=2, a_bits=2), replace(many, kernel=(1, 1), padding=(0, 0))):
        *preferred, last = (seconds(problem, config) for config in weighted_defaults(problem, hopper=True))
        assert preferred == sorted(preferred)
        assert all(time < last for time in preferred)
        assert list(weighted_defaults(problem, hopper=False)) == [conv_default(problem)]


def test_a_model_prints_as_it_is_asked_for() -> None:
    for model in (Modelled(), Modelled(batch=128)):
        assert modelled(str(model)) == model
        assert model.modelled == f"modelled, nvidia-h200, batch {model.batch}"
    assert modelled("cpu") is None
    for text in ("modelled:nvidia-x1", "modelled:nvidia-h200:0", "modelled:nvidia-h200:many", "modelled:nvidia-h200:²"):
        with pytest.raises(FormatError, match="is no modelled GPU; there is modelled:nvidia-h200"):
            modelled(text)
    assert Modelled().estimate(replace(LAYER, op="pool")) is None
    assert Modelled().estimate(replace(LAYER, w_bits=32, a_bits=32)) is None
    assert Modelled(batch=128).estimate(LAYER) == seconds(
        replace(LAYER, batch=128), next(iter(weighted_defaults(replace(LAYER, batch=128), hopper=True)))
    ) / 128  # fmt: skip


def test_the_gpu_of_this_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modelled times are those of the GPU they name, on whatever they are computed."""
    layers = [replace(LAYER, w_bits=w, a_bits=a) for w, a in ((8, 8), (4, 4), (2, 2))]
    expected = [estimate(Modelled(batch=128), problem) for problem in layers]
    cuda.machines.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert cuda.machines("cuda") == ("mma",)
    found = [estimate(Modelled(batch=128), problem) for problem in layers]
    cuda.machines.cache_clear()
    assert found == expected
