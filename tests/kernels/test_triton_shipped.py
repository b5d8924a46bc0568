"""Every Triton kernel that the defaults choose over the layers of known networks, compiled ahead of time.

`make test` runs these beside the default suite. Weights and activations of equal bits are compiled with every window,
for both targets; pairs that differ once for each configuration, for sm_90. The rest of the pairs is slow.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from ahead_of_time import TARGETS
from compiled_layers import check_shipped, shipped

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


def check_part(found: dict[str, Problem], part: int, target: str, folder: Path) -> None:
    failures = {}
    for name, layer in itertools.islice(found.items(), part, None, PARTS):
        try:
            check_shipped(layer, target, folder / name)
        except AssertionError as error:
            failures[name] = str(error)
    assert not failures


@pytest.mark.shipped
@TARGET
@PART
def test_equal_bits(part: int, target: str, tmp_path: Path) -> None:
    check_part(kernels(EQUAL, windows=True), part, target, tmp_path)


@pytest.mark.shipped
@PART
def test_mixed_bits(part: int, tmp_path: Path) -> None:
    check_part(kernels(MIXED, windows=False), part, "sm_90", tmp_path)


@pytest.mark.slow
@TARGET
@PART
def test_mixed_bits_with_every_window(part: int, target: str, tmp_path: Path) -> None:
    check_part(kernels(MIXED, windows=True), part, target, tmp_path)


@pytest.mark.shipped
def test_every_kind_is_among_them() -> None:
    """All widths, windows and kernels: a set that shrank would pass unnoticed."""
    names = " ".join((*kernels(EQUAL, windows=True), *kernels(MIXED, windows=False)))
    assert all(f"-w{w_bits}a{a_bits}" in names for w_bits, a_bits in EQUAL + MIXED)
    assert all(f"-k{size}-" in names for size in (1, 3, 7))
    assert "gemm_" in names
    assert "depthwise_" in names
    assert len(kernels(EQUAL, windows=True)) > 150
    assert len(kernels(MIXED, windows=False)) > 200
