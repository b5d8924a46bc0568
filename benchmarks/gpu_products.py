"""Products that the chosen kernels compute against those a network asks for: what tiles cost that do not divide it.

    python benchmarks/gpu_products.py [--network NAME ...] [--variant NAME ...] [--batch N] [--layers]

For every layer the kernel and configuration that the default rule takes where nothing was measured, on compute
capability 9.0 and 8.0. A count of shapes: nothing runs, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script from anywhere
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_nets  # noqa: E402  the path above comes first
from lbs_kernels.gpu.configs.cost import executed  # noqa: E402
from lbs_kernels.gpu.forms import fastest  # noqa: E402
from lbs_kernels.program.problem import Problem  # noqa: E402

ARCHITECTURES = {"sm_90": True, "sm_80": False}  # name -> whether it is compute capability 9.0
NETWORKS, VARIANTS = ("resnet18", "resnet50"), ("w8a8", "w8a8 pruned", "w4a4", "w4a4 pruned")


@dataclass(frozen=True)
class Counted:
    """One layer: products asked for, and executed by its kernel."""

    problem: Problem  # as a GPU runs it
    config: Any
    useful: int
    executed: int

    @property
    def ratio(self) -> float:
        return self.executed / self.useful


def count(network: str, variant: str, architecture: str, batch: int = 128) -> list[Counted]:
    """Every layer of a network (`gpu_nets`), with what the default rule chooses for it."""
    found = []
    for layer in gpu_nets.layers(network, variant):
        layer = replace(layer, batch=layer.batch * batch, device="cuda")
        form, config = fastest(layer, ARCHITECTURES[architecture])
        found.append(Counted(form, config, layer.macs, executed(form, config)))
    return found


def ratio(layers: list[Counted]) -> float:
    """Executed over useful products of all of them."""
    return sum(layer.executed for layer in layers) / sum(layer.useful for layer in layers)


def lines(network: str, variant: str, architecture: str, batch: int, each: bool) -> Iterator[str]:
    """For people."""
    found = count(network, variant, architecture, batch)
    if each:
        yield from (f"    {row.ratio:5.2f}  {row.problem}  {row.config}" for row in found)
    stem, rest = found[0], found[1:]
    yield (
        f"{network} {variant} {architecture} batch {batch}: {ratio(found):.3f} executed / useful; "
        f"stem {stem.ratio:.2f}, the others {ratio(rest):.3f}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", help=f"of lbs.models (default: {', '.join(NETWORKS)})")
    parser.add_argument(
        "--variant", action="append", choices=gpu_nets.RULES, help="(default: 8 and 4 bits, cut or not)"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--layers", action="store_true", help="every layer with its kernel")
    args = parser.parse_args(argv)
    for network in args.network or NETWORKS:
        for variant in args.variant or VARIANTS:
            for architecture in ARCHITECTURES:
                print("\n".join(lines(network, variant, architecture, args.batch, args.layers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
