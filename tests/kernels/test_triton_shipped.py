"""Every Triton kernel that the defaults choose over the layers of known networks, compiled ahead of time.

`make test` runs these beside the default suite: weights and activations of equal bits with every window for sm_90 and
once for each configuration for sm_80, pairs that differ `in_turn` for sm_90. The rest is slow. Of 255 registers these
kernels take 216 at most with Triton 3.7, those of tiles that leave a thread fewer accumulators than it may have 184.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS
from compiled_layers import check_shipped, shipped

from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.gemm import ACCUMULATORS, GemmConfig
from lbs_kernels.program.problem import Problem

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "cifar_resnet20", "cifar_resnet56")
BITS = (2, 4, 8)
EQUAL = tuple((bits, bits) for bits in BITS)
MIXED = tuple(itertools.permutations(BITS, 2))
PARTS = 20

TARGET = pytest.mark.parametrize("target", sorted(TARGETS))
PART = pytest.mark.parametrize("part", range(PARTS))


@functools.cache
def kernels(bits: tuple[tuple[int, int], ...], windows: bool) -> dict[str, Problem]:
    return shipped(NETWORKS, bits, windows)


def in_turn(found: dict[str, Problem]) -> dict[str, Problem]:
    """Of kernels of one configuration that differ in whether codes have 2 or 4 bits, one: the first, then the second.

    So every configuration multiplies fields by planes, fields by bytes and bytes by planes, and half of them every pair
    of bits. Tiles with as many accumulators as registers allow are not chosen from: what spills first is all there.
    """
    alike = defaultdict(list)
    for name, layer in found.items():
        config, pair = name.rsplit("-", 1)
        alike[config, pair if fills_registers(layer) else re.sub("[24]", "few", pair)].append(name)
    chosen = (names[turn % len(names)] for turn, names in enumerate(alike.values()))
    return {name: found[name] for name in chosen}


def fills_registers(layer: Problem) -> bool:
    config = conv_default(layer)
    return isinstance(config, GemmConfig) and config.block_m * config.block_o == ACCUMULATORS * 32 * config.warps


def check_part(found: dict[str, Problem], part: int, target: str, folder: Path) -> None:
    failures = {}
    for name, layer in itertools.islice(found.items(), part, None, PARTS):
        try:
            check_shipped(layer, target, folder / name)
        except AssertionError as error:
            failures[name] = str(error)
    assert not failures


@pytest.mark.shipped
@PART
def test_equal_bits_with_every_window(part: int, tmp_path: Path) -> None:
    check_part(kernels(EQUAL, windows=True), part, "sm_90", tmp_path)


@pytest.mark.shipped
@PART
def test_equal_bits_for_ampere(part: int, tmp_path: Path) -> None:
    check_part(kernels(EQUAL, windows=False), part, "sm_80", tmp_path)


@pytest.mark.shipped
@PART
def test_mixed_bits(part: int, tmp_path: Path) -> None:
    check_part(in_turn(kernels(MIXED, windows=False)), part, "sm_90", tmp_path)


@pytest.mark.slow
@PART
def test_equal_bits_for_ampere_with_every_window(part: int, tmp_path: Path) -> None:
    check_part(kernels(EQUAL, windows=True), part, "sm_80", tmp_path)


@pytest.mark.slow
@TARGET
@PART
def test_mixed_bits_with_every_window(part: int, target: str, tmp_path: Path) -> None:
    check_part(kernels(MIXED, windows=True), part, target, tmp_path)


@pytest.mark.shipped
def test_every_kind_is_among_them() -> None:
    """All widths, windows and kernels: a set that shrank would pass unnoticed."""
    equal, ampere, mixed = kernels(EQUAL, windows=True), kernels(EQUAL, windows=False), kernels(MIXED, windows=False)
    assert all(f"-w{bits}a{bits}" in " ".join(names) for bits in BITS for names in (equal, ampere))
    assert all(sum(f"-w{w_bits}a{a_bits}" in name for name in in_turn(mixed)) > 15 for w_bits, a_bits in MIXED)
    assert {name.rsplit("-", 1)[0] for name in in_turn(mixed)} == {name.rsplit("-", 1)[0] for name in mixed}
    assert all(f"-k{size}-" in " ".join(equal) for size in (1, 3, 7))
    assert {layer.kernel[0] for layer in ampere.values()} == {1, 3, 7}
    for names in (equal, ampere, mixed):
        assert {name.split("_")[0] for name in names} == {"gemm", "depthwise"}
    assert len(equal) > 150
    assert len(ampere) > 100
    assert len(in_turn(mixed)) > 130
    full = [name for name, layer in mixed.items() if fills_registers(layer)]
    assert len(full) > 20
    assert set(full) <= set(in_turn(mixed))
