"""The GPU runner's own logic, kernels interpreted: plans per stream, recording, threads, measured choices.

Started by tests/kernels/test_gpu_runner.py; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/check_runner.py
"""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pack_nets
import programs
import pytest
import torch
from contenders import assert_same
from cuda_steps import served
from gpu_model import launches_on_the_model
from torch import Tensor

import lbs
from lbs_kernels import extension
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu import runner as gpu_runner
from lbs_kernels.gpu.configs.cuda import S8Config
from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.forms import as_kept
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.gpu.stem import FoldedStep, fold_stem
from lbs_kernels.program.steps import Emit, Program, sources
from lbs_kernels.run import backends
from lbs_kernels.run.loaded import clear_runners
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times import table
from lbs_kernels.times.table import TuningTable

OTHER = GemmConfig(16, 32, 1, 4, 2, weights_first=False)


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measured times but those a test writes."""
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    table.forget()


@pytest.fixture
def net() -> tuple[Program, Tensor]:
    return programs.one_conv(0, channels=5, filters=6, size=(4, 4), w_bits=2, a_bits=2)


def check(runner: GpuRunner, blob: Tensor, batch: int, seed: int) -> None:
    images = programs.random_inputs(runner.program, batch, seed)
    expected = ReferenceRunner(runner.program, blob).run(images)
    for result, output in zip(runner.run(images), expected, strict=True):
        assert_same(result, output, "output")


def assert_traced(runner: GpuRunner, program: Program, blob: Tensor, images: list[Tensor]) -> None:
    """Every tensor of the program is what the reference makes of it, whatever program the runner walks."""
    expected: dict[int, Tensor] = {}
    actual: dict[int, Tensor] = {}
    ReferenceRunner(program, blob).run(images, expected)
    runner.run(images, actual)
    for index in expected:
        assert_same(actual[index], expected[index], f"tensor {index}")


def test_every_stream_has_buffers_of_its_own(net: tuple[Program, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = GpuRunner(*net, "cpu")
    first = runner.plan(2)
    monkeypatch.setattr(gpu_runner, "stream_handle", lambda device: 7)
    second = runner.plan(2)
    assert second is not first
    assert second.arena.data_ptr() != first.arena.data_ptr()
    assert runner.plan(2) is second
    monkeypatch.undo()
    assert runner.plan(2) is first
    runner.release()
    assert runner.plan(2) is not first


def test_streams_are_told_of_tensors_on_their_device_only(net: tuple[Program, Tensor]) -> None:
    """Weights keep codes on the processor, where `record_stream` raises; "meta" stands in for the GPU here."""
    runner = GpuRunner(*net, "cpu")
    weights = next(iter(runner._weights.values()))
    on_device = replace(weights, planes=weights.planes.to("meta"), offset=weights.offset.to("meta"))
    found = list(gpu_runner.tensors_in([runner.arrays, {"layer": (on_device,)}], "meta"))
    assert [tensor.shape for tensor in found] == [weights.planes.shape, weights.offset.shape]
    assert len(list(gpu_runner.tensors_in([runner.arrays], "cpu"))) == len(runner.arrays)


def test_the_plans_used_last_are_kept(net: tuple[Program, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "MAX_PLANS", 2)
    runner = GpuRunner(*net, "cpu")
    one, two = runner.plan(1), runner.plan(2)
    assert runner.plan(1) is one
    runner.plan(3)  # 2 was used longest ago
    assert runner.plan(1) is one
    assert runner.plan(2) is not two


def test_a_recorded_call_is_given_the_buffers_of_an_earlier_one(
    net: tuple[Program, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = GpuRunner(*net, "cpu")
    kept: list[object] = []
    monkeypatch.setattr(gpu_runner.graph, "keep", kept.append)

    def record(seed: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(gpu_runner, "capturing", lambda device: True)
            patch.setattr(runner, "_bind", lambda *arguments: pytest.fail("binding may wait, which no recording may"))
            check(runner, net[1], 2, seed)

    with pytest.raises(BackendError, match=r"batch 2 is being recorded .* call the model once with this batch first"):
        record(0)
    check(runner, net[1], 2, 0)
    given = runner.plan(2)
    record(1)
    assert kept == [(runner, given)]
    given.arena.fill_(77)  # what a replay would do meanwhile
    check(runner, net[1], 2, 2)
    assert (given.arena == 77).all()
    assert runner.plan(2) is not given
    with monkeypatch.context() as patch:  # a plan of another stream will do
        patch.setattr(gpu_runner, "stream_handle", lambda device: 7)
        record(3)
    assert len(kept) == 2


def test_a_step_may_be_refused_beyond_its_problem(net: tuple[Program, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from lbs_kernels.gpu import half

    refused = lambda step, source: f"{step.name} reads {source.name}"  # noqa: E731
    monkeypatch.setattr(half, "step_why_not", refused, raising=False)
    runner = GpuRunner(*net, "cpu", families=("triton", "fp16"))
    device = table.device_slug("cpu")
    rows = {table.key(runner.problems(2)["step1"]): {"fp16:torch": 1e-9}}
    table.write(table.user_path(device), TuningTable(device, rows))
    assert {choice.kernel.family for choice in runner.choices(2)} == {"triton"}
    with pytest.raises(BackendError, match=r"step 'step1': fp16 cannot serve .*: step1 reads "):
        GpuRunner(*net, "cpu", {"step1": HalfConfig()})


def test_threads_share_a_runner(net: tuple[Program, Tensor]) -> None:
    runner = GpuRunner(*net, "cpu")
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(4):
                check(runner, net[1], 2, 10 * seed + turn)
        except BaseException as error:  # noqa: BLE001  told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_measured_configuration_runs(net: tuple[Program, Tensor]) -> None:
    runner = GpuRunner(*net, "cpu")
    problem = runner.problems(2)["step1"]
    assert conv_default(problem) != OTHER
    key = table.key(problem)
    device = table.device_slug("cpu")
    rows = {key: {f"triton:{OTHER}": 1e-5, f"triton:{conv_default(problem)}": 2e-5}}
    table.write(table.user_path(device), TuningTable(device, rows))
    choices = {step.name: choice for step, choice in zip(net[0].steps, runner.choices(2), strict=True)}
    assert choices["step1"].config == OTHER
    assert choices["step1"].seconds == 1e-5
    assert [kernel.name for kernel in runner.kernels(2)] == [choice.name for choice in runner.choices(2)]
    assert f"triton:{OTHER}" not in [kernel.name for kernel in runner.kernels(256)]  # another bucket: nothing measured
    check(runner, net[1], 2, 0)
    assert runner.plan(2).choices == tuple(runner.choices(2))


@pytest.mark.parametrize("name", ["weights_with_a_zero", "imagenet_stem", "preact_residual"])
def test_cuda_and_triton_kernels_share_a_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that an s8 kernel serves runs on one, on a model of the GPU, in the buffers of the plan."""
    launched = launches_on_the_model(monkeypatch)
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    program, blob = programs.CASES[name](seed=2)
    s8 = S8Config(*S8Config.tiles[-1])
    configs = {step.name: s8 for step in program.steps if served(program, step, 2, "cpu", S8Config)}
    assert configs
    runner = GpuRunner(program, blob, "cpu", configs)
    check(runner, blob, batch=2, seed=4)
    assert len(launched) == len(configs)
    assert {choice.kernel.family for choice in runner.choices(2)} == {"cuda", "triton"}


@pytest.mark.parametrize("family", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["chain", "preact_residual", "weights_with_a_zero", "depthwise"])
def test_narrow_codes_kept_as_bytes_stay_what_they_are(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and read by kernels of both families, all codes and streams those of the program as it was."""
    launched = launches_on_the_model(monkeypatch)
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    program, blob = programs.CASES[name](seed=2)
    kept = as_kept(program, lambda problem: 1e-5 / problem.a_bits)
    assert kept != program
    s8 = S8Config(*S8Config.tiles[-1])
    served_by_s8 = [step.name for step in kept.steps if served(kept, step, 2, "cpu", S8Config)]
    runner = GpuRunner(kept, blob, "cpu", dict.fromkeys(served_by_s8, s8) if family == "cuda" else None)
    images = programs.random_inputs(program, 2, 4)
    assert_traced(runner, program, blob, images)
    assert len(launched) == (len(served_by_s8) if family == "cuda" else 0)


@pytest.mark.parametrize(
    "name", ["weights_with_a_zero", "imagenet_stem", "many_consumers", "averaged", "selected_streams", "moved_streams"]
)
def test_nibbles_written_by_triton_are_read_by_s8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By depthwise layers, matrix products, quantizers, averages, and selections of streams."""
    launched = launches_on_the_model(monkeypatch)
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    program, blob = programs.CASES[name](seed=2)
    kept = as_kept(program, lambda problem: 1e-6 if problem.nibbles else 1e-5)
    nibbles = [index for index, spec in enumerate(kept.tensors) if spec.nibbles]
    readers = [step.name for step in kept.steps if {*sources(step)} & {*nibbles}]
    assert readers
    runner = GpuRunner(kept, blob, "cpu", dict.fromkeys(readers, S8Config(*S8Config.tiles[-1])))
    assert_traced(runner, program, blob, programs.random_inputs(program, 2, 4))
    assert len(launched) == len(readers)


STEMS = {
    "7x7": {"kernel": (7, 7), "padding": (3, 3), "size": (13, 12)},
    "3x3": {"kernel": (3, 3), "padding": (1, 1), "size": (8, 9)},
    "even": {"kernel": (4, 6), "padding": (1, 2), "size": (10, 10)},
    "one row": {"kernel": (2, 3), "padding": (1, 1), "size": (1, 9)},  # as high as it was
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("name", sorted(STEMS))
def test_a_folded_stem_is_the_stem(
    name: str, dtype: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of the image as the program has them, and what the stem makes of them, by Triton and by the s8 kernels."""
    launched = launches_on_the_model(monkeypatch)
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    program, blob = programs.stem(0, dtype, **STEMS[name])
    monkeypatch.setattr(kernels, "program_on", lambda program, blob, *_: fold_stem(program, blob))
    runner = GpuRunner(program, blob, "cpu")
    assert any(isinstance(step, FoldedStep) for step in runner.program.steps)
    images = [x.contiguous(memory_format=layout) for x in programs.random_inputs(program, 2, 4)]
    assert_traced(runner, program, blob, images)
    s8 = GpuRunner(*fold_stem(program, blob), "cpu", {"step1": S8Config(*S8Config.tiles[-1])})
    assert_same(s8.run(images)[0], ReferenceRunner(program, blob).run(images)[0], "output")
    assert len(launched) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_of_a_recorded_call_stay_where_they_were_written(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy where they are float32; a graph owns that memory. Other calls copy."""
    b = programs.Builder(0, dtype)
    codes = b.consumer((4, 4, 8), 4)
    b.quantize(b.image(8, 4, 4), Emit(consumers=(codes,)))
    pooled, mean = b.stream((4, 4, 6)), b.consumer((1, 1, 6), 4)
    b.conv(codes.tensor, Emit(stream=pooled), 6, w_bits=2)
    b.pool(pooled, Emit(consumers=(mean,)), "mean")
    b.linear(mean.tensor, Emit(stream=b.stream((1, 1, 5), output=True, flat=True)), 5, w_bits=4)
    program, blob = b.build()
    runner = GpuRunner(program, blob, "cpu")
    monkeypatch.setattr(gpu_runner.graph, "keep", lambda thing: None)
    images = programs.random_inputs(program, 3, 1)
    (expected,) = ReferenceRunner(program, blob).run(images)
    for recorded in (False, True):
        runner.run(images)
        arena = runner.plan(3).arena.untyped_storage().data_ptr()
        with monkeypatch.context() as patch:
            patch.setattr(gpu_runner, "capturing", lambda device, recorded=recorded: recorded)
            (result,) = runner.run(images)
        assert_same(result, expected, "logits")
        assert (result.untyped_storage().data_ptr() == arena) == (recorded and dtype == "float32")


def test_plans_free_what_they_hold(net: tuple[Program, Tensor]) -> None:
    runner = GpuRunner(*net, "cpu")
    check(runner, net[1], 2, 0)
    del runner
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, GpuRunner)]


def test_explain_names_the_kernel_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.AUTOMATIC, "cpu", ("gpu", "reference"))
    clear_runners()
    try:
        packed = pack_nets.packed_two_regions()
        rows = lbs.explain(packed, rounds=1).rows
    finally:
        clear_runners()
    assert all(row.kernel.startswith(("triton:gemm_", "triton:elementwise_")) for row in rows)
    assert len({row.kernel for row in rows}) > 1
    assert all(row.seconds is None for row in rows)
