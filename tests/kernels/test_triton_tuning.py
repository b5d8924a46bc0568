"""Launch configurations: the rule refuses what it should, and the default serves every layer of the known networks."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

import lbs.cost
import lbs.models
from lbs_kernels.bitconv2d import tuning as conv_tuning
from lbs_kernels.bitlinear import tuning as linear_tuning
from lbs_kernels.elementwise_config import ElementwiseConfig
from lbs_kernels.gemm_config import GemmConfig
from lbs_kernels.pool import tuning as pool_tuning
from lbs_kernels.problem import Problem
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
        ({"block_words": 4, "warps": 4}, "128 + 64 operands per thread"),
        ({"block_m": 64, "block_o": 128, "block_words": 4}, "64 + 128 operands per thread"),
        ({"block_m": 128, "block_o": 64, "block_words": 4, "warps": 8, "stages": 5}, "bytes of shared memory"),
    ],
)
def test_rules_of_the_gemm(change: dict[str, int], reason: str) -> None:
    assert conv_tuning.is_valid(FINE, LAYER)
    found = conv_tuning.invalid_reason(replace(FINE, **change), LAYER)
    assert found is not None
    assert reason in found


def test_weights_of_eight_bits_get_fewer_registers() -> None:
    wide = replace(FINE, block_m=64, block_o=128)
    assert conv_tuning.is_valid(wide, LAYER)
    found = conv_tuning.invalid_reason(wide, replace(LAYER, w_bits=8))
    assert found is not None
    assert "64 8-bit weights per thread" in found


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
