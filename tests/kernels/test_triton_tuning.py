"""Launch configurations: the rule refuses what it should, and the default serves every layer of the known networks."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

import lbs.cost
import lbs.models
from lbs_kernels.bitconv2d import tuning as conv_tuning
from lbs_kernels.bitlinear import tuning as linear_tuning
from lbs_kernels.errors import FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.pool import tuning as pool_tuning
from lbs_kernels.program.problem import Problem
from lbs_kernels.quantpack import tuning as quantpack_tuning

LAYER = Problem("bitconv2d", 32, 28, 28, 128, 100, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=4)
FINE = GemmConfig(128, 64, 2, 4, 3, weights_first=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_m": 96}, "powers of two"),
        ({"block_words": 0}, "powers of two"),
        ({"block_m": 8}, "at least 16"),
        ({"block_o": 16}, "100 filters in blocks of 16 would share words of 32"),
        ({"warps": 2}, "4 or 8 warps"),
        ({"stages": 6}, "1 to 5 stages"),
        ({"block_m": 16, "block_o": 32, "warps": 8}, "some would idle"),
        ({"block_m": 256, "block_o": 128, "block_words": 1}, "256 accumulators per thread"),
        ({"block_words": 8}, "384 operands per thread"),
        ({"block_m": 256, "block_words": 4, "warps": 8, "stages": 5}, "bytes of shared memory"),
        ({"weights": "planes"}, "weights are bytes or fields"),
        ({"block_taps": 3}, "powers of two"),
        ({"block_taps": 2}, "2 of 9 taps with 128 channels in a step"),
        ({"block_taps": 32, "block_words": 4}, "32 of 9 taps"),
        ({"split_k": 0}, "0 parts of a reduction of 18 steps"),
        ({"split_k": 19}, "19 parts of a reduction of 18 steps"),
    ],
)
def test_rules_of_the_gemm(change: dict[str, int], reason: str) -> None:
    assert conv_tuning.is_valid(FINE, LAYER)
    found = conv_tuning.invalid_reason(replace(FINE, **change), LAYER)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w_bits": 5}, "5-bit weights; fields hold at most 4 bits"),
        ({"a_bits": 8, "in_channels": 96}, "96 channels of bytes, whose rest holds anything, in blocks of 64"),
        # 9 * 16384 * 3 * 255 = 112 M fits in 32 bits, 32 times as much does not.
        ({"w_bits": 2, "a_bits": 8, "in_channels": 16384}, "fields multiply them by 32, beyond 32 bits"),
        ({"groups": 4}, "4 groups leave a tensor core too little"),
    ],
)
def test_rules_of_fields_and_groups(change: dict[str, int], reason: str) -> None:
    fields = replace(FINE, weights="fields")
    assert conv_tuning.is_valid(fields, LAYER)
    found = conv_tuning.invalid_reason(fields, replace(LAYER, **change))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DepthwiseConfig(48, 32, 4), "powers of two"),
        (DepthwiseConfig(32, 16, 4), "words of 32"),
        (DepthwiseConfig(256, 128, 4), "128 sums for each thread"),
        (GroupedConfig(16, 16, 4), "100 filters in blocks of 16 would share words"),
        (GroupedConfig(256, 64, 4), "64 sums for each thread"),
        (GroupedConfig(16, 48, 4), "powers of two"),
    ],
    ids=str,
)
def test_rules_of_the_direct_kernels(config: DepthwiseConfig | GroupedConfig, reason: str) -> None:
    layer = replace(LAYER, in_channels=100, groups=100)
    found = conv_tuning.invalid_reason(config, layer)
    assert found is not None
    assert reason in found
    assert conv_tuning.invalid_reason(config, LAYER) is not None  # one group


def test_a_configuration_of_another_kernel_is_refused() -> None:
    for tuning in (conv_tuning, linear_tuning):
        found = tuning.invalid_reason(ElementwiseConfig(32, 32, 4), LAYER)  # type: ignore[arg-type]
        assert found == "elementwise_m32_c32_w4: it launches another kernel, not the matrix product"


def test_which_kernel_serves() -> None:
    """Groups equal to channels: depthwise; other groups: grouped; few tiles: parts of the reduction; else one GEMM."""
    assert isinstance(conv_tuning.default(replace(LAYER, in_channels=100, groups=100)), DepthwiseConfig)
    assert isinstance(conv_tuning.default(replace(LAYER, in_channels=200, groups=100)), GroupedConfig)
    many, few = conv_tuning.default(LAYER), conv_tuning.default(replace(LAYER, batch=1, height=7, width=7))
    assert isinstance(many, GemmConfig)
    assert isinstance(few, GemmConfig)
    assert (many.split_k, few.split_k) == (1, 4)
    families = {type(config) for config in conv_tuning.candidates(replace(LAYER, in_channels=100, groups=100))}
    assert families == {DepthwiseConfig, GroupedConfig}
    few_candidates = conv_tuning.candidates(replace(LAYER, batch=1, height=7, width=7))
    assert {config.split_k for config in few_candidates if isinstance(config, GemmConfig)} == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("network", ["cifar_resnet20", "mobilenet_v2"])
def test_configurations_print_themselves_and_parse_back(network: str) -> None:
    printed: dict[str, Any] = {}
    for problem in {replace(problem, batch=batch) for problem in network_problems(network) for batch in (1, 32)}:
        tuning = conv_tuning if problem.op == "bitconv2d" else linear_tuning
        pool = Problem("pool", problem.batch, 7, 7, problem.in_channels, problem.in_channels, (3, 3), w_bits=0)
        for config in (tuning.default(problem), *tuning.candidates(problem), *pool_tuning.candidates(pool)):
            assert printed.setdefault(str(config), config) == config  # unique
    assert {type(config) for config in printed.values()} >= {GemmConfig, ElementwiseConfig}
    for text, config in printed.items():
        choice = kernels.parse(f"triton:{text}")
        assert choice is not None
        assert choice.config == config


@pytest.mark.parametrize(
    "text", ["", "gemm", "m128_o64", "gemm_m128_o64_k33_w4_s3_wx_bytes_p1", "depthwise_m64_c32_w2 ", "grouped_m1_o2"]
)
def test_other_texts_are_refused(text: str) -> None:
    assert kernels.parse(f"triton:{text}") is None
    for kind in (GemmConfig, ElementwiseConfig, DepthwiseConfig, GroupedConfig):
        with pytest.raises(FormatError, match=r"is no configuration of the|multiples of 32"):
            kind.parse(text)


def test_a_small_tile_may_hold_all_filters() -> None:
    small = replace(LAYER, out_channels=16)
    assert conv_tuning.is_valid(replace(FINE, block_o=16), small)
    assert not conv_tuning.is_valid(replace(FINE, block_o=16), replace(LAYER, out_channels=17))


@functools.cache
def network_problems(network: str) -> frozenset[Problem]:
    layers = lbs.cost.network_layers(lbs.models.create(network), lbs.models.example(network)).layers
    return frozenset(layer.problem for layer in layers)


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "mobilenet_v2", "cifar_resnet20", "preresnet56"])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_defaults_and_candidates_serve_every_layer(network: str, batch: int) -> None:
    for problem in {replace(problem, batch=batch) for problem in network_problems(network)}:
        tuning = conv_tuning if problem.op == "bitconv2d" else linear_tuning
        assert tuning.invalid_reason(tuning.default(problem), problem) is None
        found = tuning.candidates(problem)
        assert found, str(problem)
        assert len(set(found)) == len(found)
        assert all(tuning.is_valid(config, problem) for config in found)


@pytest.mark.parametrize("channels", [1, 3, 16, 31, 33, 2048])
def test_elementwise_defaults_and_candidates(channels: int) -> None:
    problem = Problem("pool", 4, 7, 7, channels, channels, (3, 3), w_bits=0, a_bits=4)
    for tuning in (pool_tuning, quantpack_tuning):
        assert tuning.invalid_reason(tuning.default(problem), problem) is None
        assert tuning.default(problem).block_c >= min(channels, 32)
        assert all(tuning.is_valid(config, problem) for config in tuning.candidates(problem))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ElementwiseConfig(48, 32, 4), "powers of two"),
        (ElementwiseConfig(32, 16, 4), "33 channels in blocks of 16 would share words"),
        (ElementwiseConfig(256, 64, 4), "more than 64 elements per thread"),
    ],
)
def test_rules_of_elementwise_kernels(config: ElementwiseConfig, reason: str) -> None:
    found = pool_tuning.invalid_reason(config, Problem("pool", 1, 4, 4, 33, 33))
    assert found is not None
    assert reason in found
