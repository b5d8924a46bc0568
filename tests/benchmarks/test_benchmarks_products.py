"""Products that default kernels compute for networks with 30 % fewer filters, against those that are asked for."""

from __future__ import annotations

import pytest

from benchmarks import gpu_products

PRUNED = [(network, f"{bits} pruned") for network in gpu_products.NETWORKS for bits in ("w8a8", "w4a4")]


@pytest.mark.parametrize(("network", "variant"), PRUNED)
def test_tiles_are_cut_to_what_is_left_on_hopper(network: str, variant: str) -> None:
    stem, *rest = gpu_products.count(network, variant, "sm_90")
    assert gpu_products.ratio([stem, *rest]) <= 1.1
    assert gpu_products.ratio(rest) <= 1.06
    assert all(layer.ratio >= 1.0 for layer in (stem, *rest))
    asked = sum(layer.useful for layer in rest)
    whole = sum(layer.useful for layer in gpu_products.count(network, "w8a8", "sm_90")[1:])
    assert asked < 0.75 * whole  # 30 % of the filters that can go, and the channels that read them
    assert sum(layer.executed for layer in rest) < 0.78 * whole  # they are not computed all the same


def test_padding_is_counted_where_tiles_are_powers_of_two() -> None:
    """Below 9.0 Triton serves; its tiles are what `executed` must tell of."""
    rest = gpu_products.count("resnet50", "w4a4 pruned", "sm_80")[1:]
    assert 1.4 < gpu_products.ratio(rest) < 1.6


def test_the_command_prints_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_products.main(["--network", "cifar_resnet20", "--variant", "w4a4", "--batch", "1", "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = gpu_products.count("cifar_resnet20", "w4a4", "sm_90", 1)
    assert f"{gpu_products.ratio(found):.3f} executed / useful" in lines[len(found)]
    assert all(str(row.problem) in line for row, line in zip(found, lines, strict=False))
