"""The native module around its kernels: threads, concurrency, fork, memory, damaged programs, format constants."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import CASES, one_conv, random_inputs, random_program
from torch import Tensor

import lbs_kernels.program.steps
from lbs_kernels import device, extension
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.program import planes
from lbs_kernels.program.steps import Program
from lbs_kernels.run.loaded import clear_runners, run_program
from lbs_kernels.run.reference import ReferenceRunner

if extension.cpu is None:
    pytest.skip(f"native module missing: {extension.cpu_reason}", allow_module_level=True)


def native(program: Program, blob: Tensor, isa: str = "auto") -> object:
    return extension.cpu.Program(program.to_json(), blob.data_ptr(), blob.numel(), isa)


def call(runner: object, program: Program, inputs: list[Tensor], threads: int) -> list[Tensor]:
    specs = [program.tensors[index] for index in program.outputs]
    batch = inputs[0].shape[0]
    outputs = [torch.full((batch, s.channels, s.height, s.width), math.nan) for s in specs]
    runner.run([x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs], batch, threads)  # type: ignore[attr-defined]
    return outputs


def equal(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(outputs, expected, strict=True))


def test_constants_are_those_of_the_python_side() -> None:
    assert extension.cpu.WORD == planes.WORD
    assert extension.cpu.FORMAT_VERSION == planes.FORMAT_VERSION
    assert extension.cpu.PROGRAM_VERSION == lbs_kernels.program.steps.PROGRAM_VERSION
    assert extension.cpu.BLOB_ALIGNMENT == lbs_kernels.program.steps.BLOB_ALIGNMENT
    assert extension.cpu.MAX_BITS == planes.MAX_BITS


@pytest.mark.parametrize("case", ["preact_residual", "interpolated"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_batches_and_threads_do_not_matter(threads: int, case: str) -> None:
    program, blob = CASES[case](3)
    inputs = random_inputs(program, 64, seed=1)
    expected = ReferenceRunner(program, blob).run(inputs)
    runner = native(program, blob)
    for batch in (64, 0, 1, 2, 3, 7, 64):  # down and up again: memory is kept between calls
        part = [x[:batch].contiguous() for x in inputs]
        assert equal(call(runner, program, part, threads), [y[:batch] for y in expected])


def test_threads_join_whenever_they_wake() -> None:
    """Pauses around the time a thread spins and wakes: it comes before, during and after the call, or not at all."""
    program, blob = CASES["preact_residual"](3)
    inputs = random_inputs(program, 7, seed=4)
    expected = ReferenceRunner(program, blob).run(inputs)
    parts = [[x[:batch].contiguous() for x in inputs] for batch in range(8)]
    runner = native(program, blob)
    chance = random.Random(0)
    for _ in range(1500):
        batch, threads = chance.randrange(1, 8), chance.randrange(1, 6)
        time.sleep(chance.choice((0, 0, 5e-5, 2e-4, 5e-4)))
        assert equal(call(runner, program, parts[batch], threads), [y[:batch] for y in expected]), (batch, threads)


def test_calls_from_several_threads_at_once() -> None:
    """They share programs, and compete for the pool; who does not get it runs alone."""
    cases = [CASES[name](4) for name in ("chain", "depthwise", "preact_residual")]
    inputs = [random_inputs(program, 3, seed=2) for program, _ in cases]
    expected = [ReferenceRunner(*case).run(x) for case, x in zip(cases, inputs, strict=True)]
    runners = [native(*case) for case in cases]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for turn in range(60):
            i = (turn + offset) % len(cases)
            if not equal(call(runners[i], cases[i][0], inputs[i], threads=2), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_forked_child_gets_threads_of_its_own() -> None:
    code = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from programs import CASES, random_inputs
from test_native_runner import call, equal, native
program, blob = CASES["chain"](1)
inputs = random_inputs(program, 5, seed=0)
runner = native(program, blob)
before = call(runner, program, inputs, threads=2)
child = os.fork()
if child == 0:
    os._exit(0 if equal(call(runner, program, inputs, threads=2), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert equal(call(runner, program, inputs, threads=2), before)
"""
    code = code.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_forked_while_another_thread_calls_is_free_of_it(threads: int) -> None:
    code = """
import os, signal, sys, threading, torch
sys.path.insert(0, {tests!r})
from programs import CASES, random_inputs
from test_native_runner import call, equal, native
program, blob = CASES["chain"](1)
inputs = random_inputs(program, 64, seed=0)
runner = native(program, blob)
before = call(runner, program, inputs, threads={threads})
stop = []

def busy():
    while not stop:
        call(runner, program, inputs, threads={threads})

other = threading.Thread(target=busy, daemon=True)
other.start()
for _ in range(12):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # kills one that waits for ever
        os._exit(0 if equal(call(runner, program, inputs, threads={threads}), before) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.append(True)
other.join()
assert equal(call(runner, program, inputs, threads={threads}), before)
"""
    code = code.format(tests=str(Path(__file__).parent), threads=threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_working_memory_is_reused() -> None:
    program, blob = CASES["chain"](0)
    runner = native(program, blob)
    inputs = random_inputs(program, 9, seed=0)
    assert runner.held_bytes == 0  # type: ignore[attr-defined]
    call(runner, program, inputs, threads=1)
    held = runner.held_bytes  # type: ignore[attr-defined]
    assert 0 < runner.image_bytes < held  # type: ignore[attr-defined]
    for threads in (1, 2, 2, 2, 1):
        call(runner, program, inputs, threads)
        assert runner.held_bytes in (held, 2 * held)[: threads + 1]  # a thread that came late took none  # type: ignore[attr-defined]
    # Tensors that never live together share memory: less than all of them side by side.
    assert runner.image_bytes < sum(s.channels * s.height * s.width * 4 for s in program.tensors) * 4  # type: ignore[attr-defined]


def test_step_times_cover_every_step() -> None:
    program, blob = CASES["preact_residual"](0)
    inputs = random_inputs(program, 4, seed=0)
    output = [
        torch.empty(4, program.tensors[i].channels, program.tensors[i].height, program.tensors[i].width)
        for i in program.outputs
    ]
    times = native(program, blob).step_times(  # type: ignore[attr-defined]
        [x.data_ptr() for x in inputs], [y.data_ptr() for y in output], 4, 2
    )
    assert len(times) == len(program.steps)
    assert all(0 < seconds < 1 for seconds in times)


def test_arguments_are_checked() -> None:
    program, blob = CASES["one_pixel"](0)
    runner = native(program, blob)
    with pytest.raises(FormatError, match="1 inputs and 1 outputs; 0 and 0 were given"):
        runner.run([], [], 1, 1)  # type: ignore[attr-defined]
    x = torch.zeros(1)
    with pytest.raises(FormatError, match="batch is -1"):
        runner.run([x.data_ptr()], [x.data_ptr()], -1, 1)  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match="channels_last has 2 entries for 1 inputs"):
        runner.run([x.data_ptr()], [x.data_ptr()], 1, 1, [True, False])  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match="0 threads"):
        runner.run([x.data_ptr()], [x.data_ptr()], 1, 0)  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match=r"isa 'sse9' is unknown; it is one of portable, avx2, .*, auto"):
        native(program, blob, "sse9")


@pytest.mark.skipif(device.cpu_features().get("amx_int8", False), reason="this processor has AMX")
def test_an_instruction_set_that_is_missing_is_refused() -> None:
    program, blob = CASES["one_pixel"](0)
    with pytest.raises(BackendError, match=r"isa 'amx' cannot run: .*lacks AMX"):
        native(program, blob, "amx")


def switched(name: str, value: str, code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own with an environment variable set, in which `runner`, `program` and `inputs` are ready."""
    start = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from programs import CASES, random_inputs
from test_native_runner import call, equal, native
program, blob = CASES["chain"](1)
inputs = random_inputs(program, 5, seed=0)
runner = native(program, blob)
"""
    words = [sys.executable, "-c", start.format(tests=str(Path(__file__).parent)) + code]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, name: value})


@pytest.mark.parametrize("isa", [isa for isa, reason in device.isa_reasons().items() if not reason])
def test_an_instruction_set_is_forced_by_the_environment(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBS_ISA", isa)
    program, blob = CASES["chain"](1)
    inputs = random_inputs(program, 3, seed=0)
    runner = native(program, blob)
    assert runner.isa == device.default_isa() == isa  # type: ignore[attr-defined]
    assert equal(call(runner, program, inputs, 1), ReferenceRunner(program, blob).run(inputs))
    assert native(program, blob, "portable").isa == "portable", "a call's own word goes first"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("value", "message"), [("sse9", "is unknown; it is one of portable"), ("neon", "cannot run")])
def test_an_instruction_set_forced_in_vain_is_told(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not device.isa_reasons().get(value, "unknown"):
        pytest.skip(f"{value} can run here")
    program, blob = CASES["chain"](1)
    monkeypatch.setenv("LBS_ISA", value)
    with pytest.raises(BackendError, match=f"LBS_ISA: isa '{value}' {message}"):
        native(program, blob)
    clear_runners()
    with pytest.raises(BackendError, match=f"LBS_ISA: isa '{value}' {message}"):  # the reference is not what was asked
        run_program(program, blob, random_inputs(program, 1, seed=0))


def test_spinning_is_switched_off_by_the_environment() -> None:
    """How often threads gave up their processor: with no spinning the one that waits does so between any two calls, as
    the caller does. Counted, as time depends on what else runs.
    """
    code = """
import resource

def slept():
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw

for _ in range(20):
    call(runner, program, inputs, 2)
before = slept()
for _ in range(300):
    call(runner, program, inputs, 2)
    time.sleep(0.002)
print(slept() - before)
"""
    without, long = (int(switched("LBS_SPIN_US", value, code).stdout) for value in ("0", "1000000"))
    assert without > long + 150, (without, long)


@pytest.mark.parametrize("value", ["-1", "1000001", "1.5", "soon"])
def test_a_time_to_spin_that_is_none_is_refused(value: str) -> None:
    done = switched(
        "LBS_SPIN_US", value, "call(runner, program, inputs, 1)\nprint(1)\ncall(runner, program, inputs, 2)"
    )
    assert done.stdout == "1\n", "nothing spins for a call of one thread"
    assert f"LBS_SPIN_US is '{value}'; it is a whole number of microseconds from 0 to 1000000" in done.stderr


def mutate(value: object, choice: random.Random) -> object:
    """One random place of a JSON value changed."""
    if isinstance(value, dict) and value and choice.random() < 0.95:
        key = choice.choice(sorted(value))
        if choice.random() < 0.02:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(value[key], choice)}
    if isinstance(value, list) and value and choice.random() < 0.95:
        index = choice.randrange(len(value))
        return [*value[:index], mutate(value[index], choice), *value[index + 1 :]]
    return choice.choice(
        [-1, 0, 1, 2, 3, 7, 8, 9, 64, 1000, 2**31, 2**53, -(2**31), 0.5, 1e300, None, True, "", "planes0", [], {}]
    )


def test_damaged_programs_are_refused_or_run() -> None:
    """The native reader on its own, without the checks in Python: no crash, no hang, no enormous allocation."""
    choice = random.Random(9)
    refused = 0
    sources = [(program.to_json(), blob) for program, blob in map(random_program, range(7))]
    for turn in range(1000):
        source, blob = sources[turn % 7]
        body = json.loads(source)
        for _ in range(choice.randint(1, 2)):
            body = mutate(body, choice)
        try:
            text = json.dumps(body)
            runner = extension.cpu.Program(text, blob.data_ptr(), blob.numel(), "auto")
        except FormatError:
            refused += 1
            continue
        if runner.image_bytes > 1 << 24 or not isinstance(body, dict):
            continue
        shapes = [body["tensors"][i] for i in body["inputs"]]
        inputs = [torch.randn(1, s["channels"], s["height"], s["width"]) for s in shapes]  # enough for bytes too
        shapes = [body["tensors"][i] for i in body["outputs"]]
        outputs = [torch.empty(1, s["channels"], s["height"], s["width"]) for s in shapes]
        runner.run([x.data_ptr() for x in inputs], [y.data_ptr() for y in outputs], 1, 1)
    assert refused > 250


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "nul", '{"version":1', "1e999", '"\\x"', "[" * 100000, '{"a":1,"a":2}', "{} {}"]
)
def test_text_that_is_not_a_program(text: str) -> None:
    with pytest.raises(FormatError, match="program text"):
        extension.cpu.Program(text, 0, 0)


def test_a_newer_version_is_refused() -> None:
    program, blob = CASES["one_pixel"](0)
    text = program.to_json().replace('"version":5', '"version":6')
    with pytest.raises(FormatError, match="version 6; this library reads up to 5, update it"):
        extension.cpu.Program(text, blob.data_ptr(), blob.numel())


@pytest.mark.parametrize("version", [1, 2, 3])
def test_earlier_versions_are_read(version: int) -> None:
    program, blob = CASES["preact_residual"](0)
    old = replace(program, version=version)
    inputs = random_inputs(program, 2, 0)
    assert ('"multiplier":null' in old.to_json()) is (version > 1)
    assert ('"gate"' in old.to_json()) is (version > 2)
    assert equal(call(native(old, blob), program, inputs, 1), ReferenceRunner(program, blob).run(inputs))


@pytest.mark.parametrize(
    ("change", "message", "rule"),
    [
        (lambda t: t["tensors"][1].update(dtype="uint8"), "tensor 1 is of uint8; only images have", "image-dtype"),
        (lambda t: t["tensors"][0].update(dtype="int8"), r"tensors\[0\]\.dtype is none of float32, uint8", "choice"),
        (lambda t: t["tensors"][0].update(dtype=None), r"tensors\[0\]\.dtype is none of float32, uint8", "choice"),
        (lambda t: t["steps"][0].update(bias=None), "only one of multiplier and bias", "affine-pair"),
        (lambda t: t["steps"][0].update(bias="nothing"), "no array 'nothing'", "array-missing"),
        (lambda t: t["steps"][0].update(bias=t["steps"][2]["bias"]), "of another dtype or shape", "array-kind"),
        (lambda t: t["steps"][0].update(bias=t["steps"][2]["planes"]), "of another dtype or shape", "array-kind"),
        (lambda t: t.update(version=1), "is uint8 in a program of version 1", "version-1"),
        (
            lambda t: (t["tensors"][0].update(dtype="float32"), t.update(version=1)),
            "has a multiplier or bias in a program of version 1",
            "version-1",
        ),
    ],
)
def test_bad_bytes_and_multipliers_are_refused(change: Callable[[Any], Any], message: str, rule: str) -> None:
    program, blob = CASES["byte_image"](0)
    body = json.loads(program.to_json())
    change(body)
    with pytest.raises(FormatError, match=message) as caught:
        extension.cpu.Program(json.dumps(body), blob.data_ptr(), blob.numel(), "auto")
    assert caught.value.rule == rule


def test_an_accumulator_that_could_overflow_is_refused() -> None:
    limit = (2**31 - 1) // (255 * 255)
    for channels in (limit, limit + 1):
        program, blob = one_conv(
            0, channels=channels, filters=1, size=(1, 1), w_bits=8, a_bits=8, kernel=(1, 1), padding=(0, 0)
        )
        if channels == limit:
            native(program, blob)
            continue
        with pytest.raises(FormatError, match=f"could overflow its accumulator: {channels} products"):
            native(program, blob)


def test_a_truncated_blob_is_refused() -> None:
    program, blob = CASES["chain"](0)
    with pytest.raises(FormatError, match=f"outside the blob of {blob.numel() - 64} bytes"):
        extension.cpu.Program(program.to_json(), blob.data_ptr(), blob.numel() - 64)


def test_the_reason_for_a_missing_module_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setattr(extension, "_REPORT", report)
    assert extension._load("nothing") == (None, "it was never built; build it: pip install -e .")
    report.write_text(
        json.dumps({"nothing": {"built": False, "reason": "no C++17 compiler was found", "fix": "apt-get install g++"}})
    )
    assert extension._load("nothing") == (None, "no C++17 compiler was found; to mend it: apt-get install g++")
    report.write_text("{")  # a damaged report is no report
    assert extension.build_report() == {}
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "cpu_reason", "left out")
    with pytest.raises(BackendError, match="native CPU module is missing: left out"):
        extension.require_cpu()


def test_device_tells_what_there_is() -> None:
    assert device.cpu_name()
    assert device.default_isa() in device.isa_reasons()
    assert device.isa_reasons()["portable"] == ""
    assert 1 <= device.default_threads() <= device.processors() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 17)"),  # as virtual machines shorten it
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_processors_of_one_short_name_are_told_apart(model_name: str, expected: str) -> None:
    cpuinfo = ["cpu family\t: 25", "model\t\t: 17", f"model name\t: {model_name}", "", "model\t\t: 18"]
    assert device._described(cpuinfo) == expected
    assert device._described([f"model name\t: {model_name}"]) == model_name
    assert device._described([]) == ""
