"""bitconv2d in half precision, for layers that are faster so and users who allow it; see gpu/half.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.half import HalfWeights, bind_half, prepare_weights
from lbs_kernels.gpu.kernels import Launch
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Program

__all__ = ["bind", "prepare_weights", "supports"]


def supports(problem: Problem) -> str | None:
    """Why this fallback cannot serve `problem`, or None."""
    return None


def bind(
    step: ConvStep,
    problem: Problem,
    config: HalfConfig,
    program: Program,
    arrays: Mapping[str, Tensor],
    weights: HalfWeights,
    buffers: Mapping[int, Tensor],
) -> Launch:
    """The launches of the step, its buffers fixed."""
    window = (step.stride, step.padding, step.dilation, step.groups)

    def product(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image, weights.weight, None, *window)

    return bind_half(step, problem, program, arrays, weights, buffers, product)
