"""bitlinear in half precision, for layers that are faster so and users who allow it; see gpu/half.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.half import HalfWeights, bind_half, prepare_weights
from lbs_kernels.gpu.kernels import Launch
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import LinearStep, Program

__all__ = ["bind", "prepare_weights", "supports"]


def supports(problem: Problem) -> str | None:
    """Why this fallback cannot serve `problem`, or None."""
    return None


def bind(
    step: LinearStep,
    problem: Problem,
    config: HalfConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: HalfWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """The launches of the step, its buffers fixed."""
    weight = weights.weight.flatten(1)

    def product(image: Tensor) -> Tensor:
        return torch.nn.functional.linear(image.flatten(1), weight)[:, :, None, None]

    return bind_half(step, problem, program, arrays, weights, buffers, product)
