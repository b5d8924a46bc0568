"""A depthwise window and the layer behind it as one step, on a GPU: run with -m gpu on a machine that has one."""

from __future__ import annotations

import programs
import pytest
from contenders import assert_same

from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig
from lbs_kernels.gpu.depthwise_project import pairs, projected
from lbs_kernels.run.reference import ReferenceRunner

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("written", ["stream", "codes", "residual", "coded"])
@pytest.mark.parametrize(
    ("config", "stride"),
    [
        (ProjectConfig(32, 32, 0, 4, 4), 1),
        (ProjectConfig(32, 32, 0, 4, 4), 2),
        (ProjectConfig(64, 32, 0, 8, 2), 1),
        (ProjectConfig(64, 64, 16, 4, 1), 1),
        (ProjectConfig(32, 64, 32, 4, 1, 3), 1),
        (ProjectConfig(64, 32, 0, 4, 2, 2), 2),
    ],
    ids=str,
)
def test_it_equals_the_two_steps(config: ProjectConfig, stride: int, written: str) -> None:
    """Several tiles, channels and strips that end within one, from buffers full of garbage; a workspace used twice."""
    from lbs_kernels.gpu.runner import GpuRunner  # here, so that collecting needs no Triton

    program, blob = programs.depthwise_and_layer(
        3, written, channels=100, filters=24, size=(27, 30), stride=(stride, stride), zeros=(7, 0),
        stream_dtype="float16",
    )  # fmt: skip
    ((first, layer),) = pairs(program)
    runner = GpuRunner(projected(program, first, layer), blob, "cuda", {first.name: config}, whole=False)
    images = programs.random_inputs(program, 5, 2)
    runner.plan(5).arena.random_()
    expected = ReferenceRunner(program, blob).run(images)
    for _ in range(2):
        for result, output in zip(runner.run([image.cuda() for image in images]), expected, strict=True):
            assert_same(result.cpu(), output, "output")
