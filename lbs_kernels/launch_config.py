"""Every launch configuration of the GPU kernels, and back from its printed form, by which a tuning table names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from lbs_kernels.direct_config import DepthwiseConfig, GroupedConfig
from lbs_kernels.elementwise_config import ElementwiseConfig
from lbs_kernels.errors import FormatError
from lbs_kernels.gemm_config import GemmConfig

LaunchConfig = GemmConfig | DepthwiseConfig | GroupedConfig | ElementwiseConfig
FAMILIES: dict[str, type[LaunchConfig]] = {
    "gemm": GemmConfig,
    "depthwise": DepthwiseConfig,
    "grouped": GroupedConfig,
    "elementwise": ElementwiseConfig,
}


def parse(text: str) -> LaunchConfig:
    """The configuration that prints as `text`.

    Raises:
        FormatError: no configuration prints like that.

    >>> parse("depthwise_m64_c32_w2")
    DepthwiseConfig(block_m=64, block_c=32, warps=2)
    """
    family = text.split("_")[0]
    if family not in FAMILIES:
        raise FormatError(f"{text!r} is not a launch configuration; they begin with {', '.join(FAMILIES)}")
    return FAMILIES[family].parse(text)


def neighbours(config: LaunchConfig, candidates: Iterable[LaunchConfig]) -> list[LaunchConfig]:
    """Those of the same family that differ from `config` in one field: what a first sweep should ask."""
    fields = asdict(config).items()
    same = (other for other in candidates if type(other) is type(config))
    return [other for other in same if len(asdict(other).items() - fields) == 1]
