"""Which codes a GPU keeps as bytes, and that a program stays what it was."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import one_step
import programs
import pytest
import torch
from contenders import assert_same
from s8_cases import random_codes

from lbs_kernels import extension
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs import cuda
from lbs_kernels.gpu.configs.cost import H200, seconds
from lbs_kernels.gpu.configs.cuda import S8Config
from lbs_kernels.gpu.configs.defaults import conv_default
from lbs_kernels.gpu.configs.direct import depthwise_default
from lbs_kernels.gpu.forms import as_kept, configurations, step_seconds
from lbs_kernels.gpu.layout import kept, nbytes, written_by
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.program.steps import Activation, ConvStep, Emit, LinearStep, Program, WeightGrid, sources
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times import table


def bytes_pay(problem: Problem) -> float:
    """Seconds by which codes as bytes are always faster."""
    return 1e-5 / problem.a_bits


def turned(before: Program, after: Program) -> list[int]:
    pairs = enumerate(zip(before.tensors, after.tensors, strict=True))
    return [index for index, (old, new) in pairs if old.bits != new.bits]


@pytest.mark.parametrize("name", sorted(programs.CASES))
def test_what_is_turned_is_read_by_layers_alone_and_stays_what_it_was(name: str) -> None:
    program, blob = programs.CASES[name](seed=5)
    kept = as_kept(program, bytes_pay)
    for index in turned(program, kept):
        assert not program.tensors[index].signed
        assert kept.tensors[index] == replace(program.tensors[index], bits=8)
        readers = [step for step in program.steps if index in sources(step)]
        assert readers
        assert all(isinstance(step, ConvStep | LinearStep) for step in readers)
    images = programs.random_inputs(program, batch=2, seed=3)
    for one, other in zip(
        ReferenceRunner(program, blob).run(images), ReferenceRunner(kept, blob).run(images), strict=True
    ):
        assert_same(one, other, name)


def test_something_is_turned() -> None:
    """Else the test above would hold of nothing."""
    counts = {
        name: len(turned(p, as_kept(p, bytes_pay)))
        for name, p in ((n, c(seed=5)[0]) for n, c in programs.CASES.items())
    }
    assert sum(counts.values()) >= 5, counts


def chain(size: int, channels: int, kernel: int, bits: int, **form: object) -> tuple[Program, int]:
    b = programs.Builder(0)
    image = b.image(channels, size, size)
    codes = b.consumer((size, size, channels), bits, **form)
    b.quantize(image, Emit(consumers=(codes,)))
    shape = b.conv_shape(codes.tensor, channels, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2))
    emit = Emit(stream=b.stream(shape, output=True))
    window = {"kernel": (kernel, kernel), "padding": (kernel // 2, kernel // 2)}
    b.conv(codes.tensor, emit, channels, w_bits=bits, **window)
    return b.build()[0], codes.tensor


def form(program: Program, index: int) -> str:
    return kept(as_kept(program).tensors[index])


def test_the_model_decides_where_nothing_was_measured() -> None:
    assert form(*chain(28, 128, 3, 4)) == "nibbles"  # fewer bytes of operands for each product
    assert form(*chain(28, 128, 3, 2)) == "planes"  # single bits are faster
    assert form(*chain(28, 128, 3, 5)) == "bytes"  # products are what it waits for
    assert form(*chain(56, 64, 1, 4)) == "nibbles"  # memory is
    assert form(*chain(56, 16, 1, 4)) == "bytes"  # a pixel of nibbles is as large
    program, codes = chain(28, 128, 3, 4)
    for planes, as_bytes, found in ((1e-6, 2e-6, []), (2e-6, 1e-6, [codes])):
        times = {4: planes, 8: as_bytes}
        assert turned(program, as_kept(program, lambda problem, t=times: t[problem.a_bits])) == found
        # A time of one form alone says nothing.
        alone = {(4, False): times[4]}
        one = as_kept(program, lambda problem, t=alone: t.get((problem.a_bits, problem.nibbles)))
        assert kept(one.tensors[codes]) == "nibbles"
    by_form = {(4, False): 3e-6, (8, False): 2e-6, (4, True): 1e-6}
    assert kept(as_kept(program, lambda p: by_form[p.a_bits, p.nibbles]).tensors[codes]) == "nibbles"
    by_form[4, True] = 4e-6
    assert kept(as_kept(program, lambda p: by_form[p.a_bits, p.nibbles]).tensors[codes]) == "bytes"


def test_nibbles_where_every_reader_takes_them() -> None:
    def of_readers(w_bits: int, grid: WeightGrid, signed: bool = False, active: bool = False) -> str:
        b = programs.Builder(0)
        codes = b.consumer((56, 56, 64), 4, signed=signed)
        b.quantize(b.image(64, 56, 56), Emit(consumers=(codes,)))
        window: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
        shape = b.conv_shape(codes.tensor, 64, **window)
        for bits, own, last in ((4, "odd", None), (w_bits, grid, Activation("silu") if active else None)):
            emit = Emit(stream=b.stream(shape, output=True), activation=last)
            b.conv(codes.tensor, emit, 64, w_bits=bits, grid=own, **window)
        return form(b.build()[0], codes.tensor)

    assert of_readers(4, "odd") == of_readers(8, "zero") == of_readers(4, "odd", signed=True) == "nibbles"
    assert of_readers(8, "odd") == "bytes"  # whose sums of codes are made of bytes
    assert of_readers(8, "odd", signed=True) == "planes"
    assert of_readers(4, "odd", active=True) != "nibbles"  # Triton has the activation


def test_sums_that_would_not_fit_keep_planes() -> None:
    b = programs.Builder(0)
    image = b.image(40000, 1, 1)
    codes = b.consumer((1, 1, 40000), 2)
    b.quantize(image, Emit(consumers=(codes,)))
    b.linear(codes.tensor, Emit(stream=b.stream((1, 1, 3), output=True)), 3, w_bits=8)
    assert turned(b.build()[0], as_kept(b.build()[0], bytes_pay)) == []


def test_they_are_turned_where_the_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    program, codes = chain(28, 128, 3, 5)
    blob = torch.empty(0, dtype=torch.uint8)  # nothing of it is changed
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    assert kernels.program_on(program, blob, "cuda")[0] is program  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "machines", lambda device: ("wgmma", "mma"))
    monkeypatch.setattr(table, "times", lambda problem: {})
    assert turned(program, kernels.program_on(program, blob, "cuda")[0]) == [codes]
    assert kernels.program_on(program, blob, "cuda", ("triton",))[0] is program
    monkeypatch.setattr(cuda, "machines", lambda device: ("mma",))
    assert kernels.program_on(program, blob, "cuda")[0] is program
    monkeypatch.setattr(cuda, "machines", lambda device: ("wgmma", "mma"))
    monkeypatch.setattr(extension, "cuda", None)
    assert kernels.program_on(program, blob, "cuda")[0] is program


def test_measured_times_and_modelled_ones_are_not_summed() -> None:
    """Two layers read the codes; of one a time is known, by which planes are far better: the model alone decides."""
    b = programs.Builder(0)
    image = b.image(128, 28, 28)
    codes = b.consumer((28, 28, 128), 5)
    b.quantize(image, Emit(consumers=(codes,)))
    for filters in (128, 96):
        shape = b.conv_shape(codes.tensor, filters, kernel=(3, 3), padding=(1, 1))
        emit = Emit(stream=b.stream(shape, output=True))
        b.conv(codes.tensor, emit, filters, w_bits=4, kernel=(3, 3), padding=(1, 1))
    program = b.build()[0]
    assert turned(program, as_kept(program)) == [codes.tensor]
    times = {5: 1.0, 8: 2.0}
    part = as_kept(program, lambda problem: times[problem.a_bits] if problem.out_channels == 96 else None)
    assert turned(program, part) == [codes.tensor]
    assert turned(program, as_kept(program, lambda problem: times[problem.a_bits])) == []


def test_kernels_that_cannot_write_a_step_are_not_modelled() -> None:
    problem = Problem("bitconv2d", 128, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), device="cuda")
    step = one_step.conv(*random_codes(0, (1, 4, 4, 8), 3, (3, 3), 8), a_bits=8, kernel=(3, 3)).program.steps[0]
    assert type(configurations(step, problem)[0]) is S8Config
    active = replace(step, emit=replace(step.emit, activation=Activation("silu")))
    assert configurations(active, problem) == [conv_default(problem)]


def test_strips_of_columns_are_not_modelled_where_they_do_not_serve() -> None:
    """With an activation a depthwise layer takes the time of the kernel that has it."""
    program = programs.depthwise_and_layer(0, channels=96, filters=24, size=(28, 28))[0]
    step = next(step for step in program.steps if isinstance(step, ConvStep) and step.groups > 1)
    active = replace(step, emit=replace(step.emit, activation=Activation("silu")))
    problem = problem_of(active, program, 128, "cuda")
    assert step_seconds(step, program, 128) < step_seconds(active, program, 128)
    moved = 128 * sum(nbytes(program.tensors[i], program.stream_dtype, 1) for i in (step.input, *written_by(step)))
    moved += problem.out_channels * problem.reduction
    assert step_seconds(active, program, 128) == seconds(problem, depthwise_default(problem), H200, moved)


def test_every_form_is_tuned_where_one_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("bitconv2d", 128, 14, 14, 512, 256, w_bits=4, a_bits=4, device="cuda")
    assert kernels.forms_on(problem, "cuda") == [problem]  # no GPU
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "machines", lambda device: ("wgmma", "mma"))
    as_bytes, nibbles = replace(problem, a_bits=8), replace(problem, nibbles=True)
    assert kernels.forms_on(problem, "cuda") == [problem, as_bytes, nibbles]
    assert kernels.forms_on(replace(problem, in_channels=16), "cuda")[1:] == [replace(as_bytes, in_channels=16)]
    assert kernels.forms_on(replace(problem, in_channels=2**20), "cuda")[1:] == [replace(nibbles, in_channels=2**20)]
    assert kernels.forms_on(as_bytes, "cuda") == [as_bytes]
    pool = replace(problem, op="pool")
    assert kernels.forms_on(pool, "cuda") == [pool]
    assert all(isinstance(choice.config, S8Config) for choice in kernels.candidates(nibbles))
