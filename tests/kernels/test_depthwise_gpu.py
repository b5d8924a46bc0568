"""Depthwise convolutions column by column, on a GPU: run with -m gpu on a machine that has one."""

from __future__ import annotations

import programs
import pytest
from contenders import assert_same

from lbs_kernels.gpu.configs.direct import DepthwiseConfig, depthwise_candidates
from lbs_kernels.program.problem import problem_of
from lbs_kernels.run.reference import ReferenceRunner

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_strips_of_every_length_equal_the_reference(stride: int, padding: int) -> None:
    """Each length in one tile; channels that end within a block, and rows that strips do not divide."""
    from lbs_kernels.gpu.runner import GpuRunner  # here, so that collecting needs no Triton

    program, blob = programs.one_conv(
        0, channels=100, filters=100, groups=100, size=(15, 16), w_bits=4, a_bits=8, zero=7, out_bits=8,
        padding=(padding, padding), stride=(stride, stride), stream_dtype="float16",
    )  # fmt: skip
    images = programs.random_inputs(program, 3, 0)
    expected = ReferenceRunner(program, blob).run(images)[0]
    problem = problem_of(program.steps[1], program, 3, "cuda")
    lengths: dict[int, DepthwiseConfig] = {
        config.columns: config for config in depthwise_candidates(problem) if not config.wide
    }
    assert len(lengths) > 4
    for config in lengths.values():
        runner = GpuRunner(program, blob, "cuda", {"step1": config})
        assert_same(runner.run([images[0].cuda()])[0].cpu(), expected, str(config))
