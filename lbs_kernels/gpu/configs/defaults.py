"""Which configurations run an operation where nothing was measured: one rule for each operation. Needs no Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lbs_kernels.gpu.configs.cost import executed, seconds
from lbs_kernels.gpu.configs.cuda import OneBitConfig, S8Config, on_hopper, onebit_form_why_not, s8_form_why_not
from lbs_kernels.gpu.configs.depthwise_project import OP as DEPTHWISE_PROJECT
from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig, project_candidates
from lbs_kernels.gpu.configs.direct import (
    DepthwiseConfig,
    GroupedConfig,
    depthwise_defaults,
    grouped_default,
)
from lbs_kernels.gpu.configs.elementwise import ElementwiseConfig, channel_block, elementwise_default
from lbs_kernels.gpu.configs.gemm import GemmConfig, gemm_default
from lbs_kernels.gpu.configs.stem_pool import OP as STEM_POOL
from lbs_kernels.gpu.configs.stem_pool import stem_pool_default
from lbs_kernels.program.planes import MAX_BITS
from lbs_kernels.program.problem import Problem


def conv_default(problem: Problem) -> GemmConfig | DepthwiseConfig | GroupedConfig:
    """The matrix product, or a direct kernel where there are groups."""
    if problem.groups == 1:
        return gemm_default(problem)
    return depthwise_defaults(problem)[0] if problem.depthwise else grouped_default(problem)


def pool_default(problem: Problem) -> ElementwiseConfig:
    """Planes are whole words, one for each thread."""
    if 0 < problem.a_bits < MAX_BITS:
        return ElementwiseConfig(128, channel_block(problem.in_channels), warps=4)
    return elementwise_default(problem)


def project_defaults(problem: Problem) -> list[ProjectConfig]:
    """The one that the model finds fastest; none where registers hold no tile."""
    return sorted(project_candidates(problem), key=lambda config: seconds(problem, config))[:1]


def weighted_defaults(problem: Problem, hopper: bool | None = None) -> Iterator[Any]:
    """Kernels in CUDA that the model of `cost.py` finds faster than Triton's, the fastest first, then Triton's.

    Of tiles that take equally long, because memory does, the one that computes fewest products of padding comes first.

    This is the one rule for which family serves a layer that nobody measured, and these are its reasons:

    - Only on compute capability 9.0 (hopper; by default that of the device, False where there is none to ask). Triton
      ends every product of bytes before the next begins, there and elsewhere; `wgmma` in CUDA does not. Below 9.0 both
      have `mma.sync`, and nothing is gained.
    - Bytes, csrc/s8, wherever the model finds a tile of them faster: large tiles move fewer bytes for each product, and
      their epilogue costs nothing. Where there are few tiles, batch 1 or late layers, the blocks of a cluster share the
      reduction of one, or Triton's programs do, through device memory.
    - Single bits, csrc/onebit, at 2 by 2 bits where the model finds them faster, which it does for 3 x 3 windows. A
      product costs w * a / 8 of one of bytes: a half at 2 by 2, as much at 2 by 4, twice as much at 4 by 4. K is cut
      into 256 bits across taps, so that 64 channels waste none of it.
    - Nibbles, which are there only where `gpu/forms.py` chose them, are read by csrc/s8 alone.
    """
    if problem.nibbles:
        yield from (config for *_, config in _rated(problem))
        return
    last = conv_default(problem)
    if on_hopper(problem.device) if hopper is None else hopper:
        own = seconds(problem, last)
        yield from (config for took, _, config in _rated(problem) if took < own)
    yield from depthwise_defaults(problem) if problem.depthwise else [last]


def _rated(problem: Problem) -> list[tuple[float, int, S8Config | OneBitConfig]]:
    """Seconds, products and configuration of the kernels in CUDA, the fastest first."""
    rated = [(seconds(problem, config), executed(problem, config), config) for config in _cuda_configs(problem)]
    return sorted(rated, key=lambda row: row[:2])


def _cuda_configs(problem: Problem) -> list[S8Config | OneBitConfig]:
    """One of every tile of the kernels in CUDA that the rule lets serve `problem` on compute capability 9.0, whatever
    GPU is here.
    """
    found: list[S8Config | OneBitConfig] = []
    if s8_form_why_not(problem) is None:
        found += S8Config.with_splits(problem)
    if (problem.w_bits, problem.a_bits) == (2, 2) and onebit_form_why_not(problem) is None:
        found += [OneBitConfig(*tile) for tile in OneBitConfig.tiles if tile[0] == "wgmma"]
    return found


# In the order of preference; the last serves every problem of the operation.
DEFAULTS: dict[str, Callable[[Problem], Iterator[Any]]] = {
    "bitconv2d": weighted_defaults,
    "bitlinear": weighted_defaults,
    STEM_POOL: lambda problem: iter([stem_pool_default(problem)]),
    DEPTHWISE_PROJECT: lambda problem: iter(project_defaults(problem)),
    "pool": lambda problem: iter([pool_default(problem)]),
    "quantpack": lambda problem: iter([elementwise_default(problem)]),
    "resize": lambda problem: iter([elementwise_default(problem)]),
    "select": lambda problem: iter([elementwise_default(problem)]),
}
