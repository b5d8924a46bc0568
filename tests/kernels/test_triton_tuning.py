"""Launch configurations: the rule refuses what it should, and the default serves every layer of the known networks."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

import lbs.cost
import lbs.models
from lbs_kernels.errors import FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.direct import DepthwiseConfig, GroupedConfig, depthwise_defaults
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.kernels import Choice
from lbs_kernels.program.problem import Problem

LAYER = Problem("bitconv2d", 32, 28, 28, 128, 100, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=4)
FINE = GemmConfig(128, 64, 2, 4, 3, weights_first=True)


def why_not(config: Any, problem: Problem) -> str | None:
    """Why the kernel of `config` cannot run `problem` with it, or None."""
    return Choice(kernels.kernel_of(config), config).why_not(problem)


def triton_candidates(problem: Problem) -> list[Any]:
    return [choice.config for choice in kernels.candidates(problem) if choice.kernel.family == "triton"]


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
    assert FINE.why_not(LAYER) is None
    found = replace(FINE, **change).why_not(LAYER)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w_bits": 5}, "5-bit weights; fields hold at most 4 bits"),
        ({"a_bits": 8, "in_channels": 96}, "96 channels of bytes, whose rest holds anything, in blocks of 64"),
        # 9 * 16384 * 3 * 255 = 112 M fits in 32 bits, 32 times as much does not.
        ({"w_bits": 2, "a_bits": 8, "in_channels": 16384}, "while weights are fields, beyond 32 bits"),
        ({"groups": 4}, "4 groups leave a tensor core too little"),
    ],
)
def test_rules_of_fields_and_groups(change: dict[str, int], reason: str) -> None:
    fields = replace(FINE, weights="fields")
    assert fields.why_not(LAYER) is None
    found = fields.why_not(replace(LAYER, **change))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DepthwiseConfig(48, 32, 4), "powers of two"),
        (DepthwiseConfig(32, 16, 4), "words of 32"),
        (DepthwiseConfig(256, 128, 4), "128 sums for each thread"),
        (DepthwiseConfig(64, 32, 4, 7), "activations of 4 bits are planes"),
        (GroupedConfig(16, 16, 4), "100 filters in blocks of 16 would share words"),
        (GroupedConfig(256, 64, 4), "64 sums for each thread"),
        (GroupedConfig(16, 48, 4), "powers of two"),
    ],
    ids=str,
)
def test_rules_of_the_direct_kernels(config: DepthwiseConfig | GroupedConfig, reason: str) -> None:
    layer = replace(LAYER, in_channels=100, groups=100)
    found = why_not(config, layer)
    assert found is not None
    assert reason in found
    assert why_not(config, LAYER) is not None  # one group


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (DepthwiseConfig(64, 32, 4, 7), {"kernel": (5, 5)}, "windows of 3 x 3"),
        (DepthwiseConfig(64, 32, 4, 7), {"stride": (2, 1)}, "step by 1 or 2"),
        (DepthwiseConfig(64, 32, 4, 7), {"padding": (2, 1)}, "padded by at most 1"),
        (DepthwiseConfig(64, 32, 4, 7), {"dilation": (2, 2)}, "windows of 3 x 3"),
        (DepthwiseConfig(128, 32, 4, 7), {}, "16 channels for each thread"),
        (DepthwiseConfig(64, 32, 4, 9), {}, "8 columns"),
    ],
    ids=str,
)
def test_rules_of_strips_of_columns(config: DepthwiseConfig, change: dict[str, object], reason: str) -> None:
    layer = replace(LAYER, in_channels=100, out_channels=100, groups=100, a_bits=8)
    assert DepthwiseConfig(64, 32, 4, 7).why_not(layer) is None
    assert reason in (config.why_not(replace(layer, **change)) or "")  # type: ignore[arg-type]


def test_strips_divide_rows_and_keep_the_machine_at_work() -> None:
    def chosen(size: int, channels: int, batch: int = 128) -> DepthwiseConfig:
        sides = {"height": size, "width": size, "in_channels": channels, "out_channels": channels, "groups": channels}
        return depthwise_defaults(replace(LAYER, batch=batch, a_bits=8, **sides))[0]  # type: ignore[arg-type]

    layers = {(112, 32): 8, (56, 144): 8, (28, 192): 7, (14, 384): 7, (7, 960): 7}  # of MobileNetV2
    assert {layer: chosen(*layer).columns for layer in layers} == layers
    assert chosen(29, 96).columns == 4  # a prime
    assert str(chosen(7, 960)) == "depthwise_m32_c32_w2_x7"
    assert str(chosen(14, 384, batch=1)) == "depthwise_m16_c32_w1_x1"


def test_a_configuration_of_another_kernel_is_refused() -> None:
    for op in ("bitconv2d", "bitlinear"):
        found = why_not(ElementwiseConfig(32, 32, 4), replace(LAYER, op=op))
        assert found == f"there is no such kernel for {op}"
    assert why_not(DepthwiseConfig(32, 32, 1), replace(LAYER, op="bitlinear")) is not None


def test_which_kernel_serves() -> None:
    """Groups equal to channels: depthwise; other groups: grouped; few tiles: parts of the reduction; else one GEMM."""
    assert isinstance(conv_default(replace(LAYER, in_channels=100, groups=100)), DepthwiseConfig)
    assert isinstance(conv_default(replace(LAYER, in_channels=200, groups=100)), GroupedConfig)
    many, few = conv_default(LAYER), conv_default(replace(LAYER, batch=1, height=7, width=7))
    assert isinstance(many, GemmConfig)
    assert isinstance(few, GemmConfig)
    assert (many.split_k, few.split_k) == (1, 4)
    families = {type(config) for config in triton_candidates(replace(LAYER, in_channels=100, groups=100))}
    assert families == {DepthwiseConfig, GroupedConfig}
    few_candidates = triton_candidates(replace(LAYER, batch=1, height=7, width=7))
    assert {config.split_k for config in few_candidates if isinstance(config, GemmConfig)} == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("network", ["cifar_resnet20", "mobilenet_v2"])
def test_configurations_print_themselves_and_parse_back(network: str) -> None:
    printed: dict[str, Any] = {}
    for problem in {replace(problem, batch=batch) for problem in network_problems(network) for batch in (1, 32)}:
        pool = Problem("pool", problem.batch, 7, 7, problem.in_channels, problem.in_channels, (3, 3), w_bits=0)
        for config in (*triton_candidates(problem), *triton_candidates(pool)):
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
    assert replace(FINE, block_o=16).why_not(small) is None
    assert replace(FINE, block_o=16).why_not(replace(LAYER, out_channels=17)) is not None


@functools.cache
def network_problems(network: str) -> frozenset[Problem]:
    layers = lbs.cost.network_layers(lbs.models.create(network), lbs.models.example(network)).layers
    return frozenset(layer.problem for layer in layers)


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "mobilenet_v2", "cifar_resnet20", "preresnet56"])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_defaults_and_candidates_serve_every_layer(network: str, batch: int) -> None:
    for problem in {replace(problem, batch=batch) for problem in network_problems(network)}:
        default = kernels.default(problem)
        assert default.kernel.family == "triton"
        assert default.why_not(problem) is None
        found = list(default.kernel.candidates(problem))
        assert found, str(problem)
        assert len(set(found)) == len(found)
        assert all(why_not(config, problem) is None for config in found)


@pytest.mark.parametrize("channels", [1, 3, 16, 31, 33, 2048])
def test_elementwise_defaults_and_candidates(channels: int) -> None:
    for op in ("pool", "quantpack", "resize", "select"):
        problem = Problem(op, 4, 7, 7, channels, channels, (3, 3), w_bits=0, a_bits=4)
        default = kernels.default(problem)
        assert default.why_not(problem) is None
        assert default.config.block_c >= min(channels, 32)
        assert all(config.why_not(problem) is None for config in default.kernel.candidates(problem))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ElementwiseConfig(48, 32, 4), "powers of two"),
        (ElementwiseConfig(32, 16, 4), "33 channels in blocks of 16 would share words"),
        (ElementwiseConfig(256, 64, 4), "more than 64 elements per thread"),
    ],
)
def test_rules_of_elementwise_kernels(config: ElementwiseConfig, reason: str) -> None:
    found = config.why_not(Problem("pool", 1, 4, 4, 33, 33))
    assert found is not None
    assert reason in found
