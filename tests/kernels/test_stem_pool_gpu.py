"""A stem with the maximum behind it as one step, on a GPU: run with -m gpu on a machine that has one."""

from __future__ import annotations

import programs
import pytest
from contenders import assert_same

from lbs_kernels.gpu.configs.stem_pool import PIECES, StemPoolConfig
from lbs_kernels.gpu.stem import fold_stem
from lbs_kernels.gpu.stem_pool import pool_stems
from lbs_kernels.run.reference import ReferenceRunner

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("written", ["stream", "codes", "clamped"])
def test_it_equals_the_two_steps(written: str, piece: int) -> None:
    """Of several tiles and strips, from buffers full of garbage."""
    from lbs_kernels.gpu.runner import GpuRunner  # here, so that collecting needs no Triton

    program, blob = programs.stem_and_maximum(3, written, size=(64, 50), filters=64, stream_dtype="float16")
    folded, data = fold_stem(program, blob)
    config = StemPoolConfig(64, 64, 3, 4, 3, piece)
    runner = GpuRunner(pool_stems(folded, data), data, "cuda", {"step1": config}, whole=False)
    images = programs.random_inputs(program, 7, 2)
    runner.plan(7).arena.random_()
    expected = ReferenceRunner(program, blob).run(images)
    for result, output in zip(runner.run([image.cuda() for image in images]), expected, strict=True):
        assert_same(result.cpu(), output, "output")
