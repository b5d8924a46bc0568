"""A depthwise window and the layer behind it in one kernel, interpreted: every number is that of the two steps.

Started by tests/kernels/test_gpu_depthwise_project.py; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/check_depthwise_project.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import programs
import pytest
import torch
from contenders import assert_same, assert_traced
from torch import Tensor

from lbs_kernels.errors import BackendError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.depthwise_project import ProjectConfig
from lbs_kernels.gpu.depthwise_project import pairs, projected
from lbs_kernels.gpu.layout import to_logical
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import NibbleSpec, Program
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.tune import tuner


def fused(program: Program) -> tuple[Program, str]:
    """The program with its pair as one step, and the name of that."""
    ((first, layer),) = pairs(program)
    return projected(program, first, layer), first.name


def check(program: Program, blob: Tensor, config: ProjectConfig | None = None, batch: int = 2) -> None:
    images = programs.random_inputs(program, batch, 4)
    expected: dict[int, Tensor] = {}
    outputs = ReferenceRunner(program, blob).run(images, expected)
    # Whatever the test is of, most codes are inside their range.
    assert programs.share_unsaturated(program, expected) > 0.4
    one, name = fused(program)
    runner = GpuRunner(one, blob, "cpu", None if config is None else {name: config}, whole=False)
    for _ in range(1 if config is None else config.split):  # a workspace is left as it was found
        for result, output in zip(runner.run(images), outputs, strict=True):
            assert_same(result, output, "output")


@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("written", ["stream", "codes", "residual", "coded"])
def test_whatever_is_written(written: str, stream_dtype: str) -> None:
    check(*programs.depthwise_and_layer(3, written, stream_dtype=stream_dtype))


# Planes out, of blocks that share no word; codes between that are narrower than the byte they are kept in; zeros.
@pytest.mark.parametrize(
    "case",
    [
        {"w_bits": 4, "between": 4, "bits": 4},
        {"w_bits": 2, "between": 2, "bits": 2, "filters": 33},
        {"w_bits": 4, "between": 8, "bits": 3, "written": "residual"},
        {"w_bits": 8, "between": 4, "bits": 4, "written": "codes", "filters": 96},
        {"zeros": (117, 91), "high": None},
        {"zeros": (3, 5), "between": 4, "w_bits": 4, "high": None, "written": "coded"},
    ],
    ids=str,
)
def test_bits(case: dict[str, Any]) -> None:
    check(*programs.depthwise_and_layer(5, **case))


def test_codes_that_were_nibbles() -> None:
    """Between the two, where they are bytes in registers, and behind them, where they are written so."""
    program, blob = programs.depthwise_and_layer(5, "codes", between=4, bits=4, channels=33, filters=20)
    images = programs.random_inputs(program, 2, 4)
    (first, layer), *_ = pairs(program)
    kept = {layer.input, layer.emit.consumers[0].tensor}
    specs = (NibbleSpec(**vars(spec)) if index in kept else spec for index, spec in enumerate(program.tensors))
    one = projected(replace(program, tensors=tuple(specs)), first, layer)
    runner = GpuRunner(replace(one, steps=one.steps[:2]), blob, "cpu", whole=False)
    plan = runner.plan(2)
    for launch in plan.launches:
        launch(images)
    index = layer.emit.consumers[0].tensor
    trace: dict[int, Tensor] = {}
    ReferenceRunner(program, blob).run(images, trace)
    assert_same(to_logical(plan.buffers[index], one.tensors[index]), trace[index], "nibbles")


# One pixel; odd and even sides, whose last strip reaches beyond the image or not; without padding, or on one side.
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (0, 1)])
@pytest.mark.parametrize("size", [(3, 3), (7, 8), (8, 13)])
def test_sizes(size: tuple[int, int], padding: tuple[int, int], stride: tuple[int, int]) -> None:
    check(*programs.depthwise_and_layer(7, size=size, padding=padding, stride=stride, channels=17, filters=13))


# A step that is full, one with a single channel, several with a part; filters of one block and of two.
@pytest.mark.parametrize(("channels", "filters"), [(2, 1), (16, 16), (32, 24), (33, 48), (64, 160), (100, 96)])
def test_channels_and_filters(channels: int, filters: int) -> None:
    check(*programs.depthwise_and_layer(9, channels=channels, filters=filters, size=(4, 5)), batch=1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        ProjectConfig(32, 32, 0, 4, 4),
        ProjectConfig(32, 32, 0, 8, 2),
        ProjectConfig(64, 32, 0, 4, 2),
        ProjectConfig(32, 64, 32, 4, 2),
        ProjectConfig(32, 32, 0, 4, 2, 3),
        ProjectConfig(32, 64, 16, 4, 2, 2),
        ProjectConfig(64, 32, 16, 8, 2, 2),
        ProjectConfig(64, 64, 32, 4, 1),
    ],
    ids=str,
)
def test_configurations(config: ProjectConfig, stride: int) -> None:
    """Several tiles of several images, and parts that are not alike."""
    case = programs.depthwise_and_layer(11, channels=70, filters=20, size=(9, 10), stride=(stride, stride))
    if config.columns == 1 and stride == 2:  # one pixel is no strip
        with pytest.raises(BackendError, match="2 pixels or more"):
            check(*case, config, batch=3)
    else:
        check(*case, config, batch=3)


def test_the_trace_of_a_fused_program_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between the two is told as well, and every step of the program has its kernel."""
    program, blob = programs.depthwise_and_layer(13, "residual")
    monkeypatch.setattr(kernels, "program_on", lambda program, blob, *_: (fused(program)[0], blob))
    runner = GpuRunner(program, blob, "cpu")
    assert_traced(runner, program, blob)
    names = [kernel.name for kernel in runner.kernels(2)]
    assert len(names) == len(program.steps)
    assert names[2] == names[3]
    assert names[2].startswith("triton:project_")


@pytest.mark.parametrize(
    "problem",
    [
        Problem("depthwise_project", 2, 6, 5, 24, 16, (3, 3), (1, 1), (1, 1)),
        Problem("stem_pool", 2, 11, 11, 12, 16, (4, 4)),
    ],
    ids=str,
)
def test_steps_that_stand_for_two_are_tuned(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the two, under the names of tuning tables; a wrong one is refused."""
    found = tuner.measure_gpu(problem, torch.device("cpu"), limit=1, rounds=1)
    assert found.seconds, found.refused
    assert not found.refused
    assert kernels.default(problem).name in found.seconds
    monkeypatch.setattr(tuner, "to_logical", lambda *_: torch.zeros(1, dtype=torch.uint8))
    refused = tuner.measure_gpu(problem, torch.device("cpu"), limit=1, rounds=1).refused
    assert set(refused) == set(found.seconds)
    assert all(tuner.WRONG in reason for reason in refused.values())
