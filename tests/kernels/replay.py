"""Programs with what the reference makes of them, as a file, and the program in C++ that runs it without Python.

For processors that are emulated and for ThreadSanitizer: neither Python nor torch has to run there.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import pytest
import test_native_depthwise as depthwise
import test_native_lanes as lanes
import test_native_lean as lean
import test_native_winograd as winograd
import torch
from programs import CASES, one_conv, random_inputs, random_program
from project_setup import ROOT, load_setup
from test_activations import one_activation
from test_native_program import GEOMETRY, MAXIMA, maximum_of_floats
from torch import Tensor

from lbs_kernels.program.activations import KINDS
from lbs_kernels.program.steps import STREAM_DTYPES, Program
from lbs_kernels.run.reference import ReferenceRunner

SOURCE = ROOT / "tests" / "native" / "replay" / "replay.cpp"
BATCH = 3
Case = tuple[str, Program, Tensor, list[str], list[Tensor]]  # name, program, blob, algorithms of its steps, images


def networks() -> Iterator[Case]:
    """Small networks of every kind of step; images are few, as emulated processors are slow."""
    for name, make in CASES.items():
        program, blob = make(11)
        yield name, program, blob, [], random_inputs(program, BATCH, seed=5)
    for seed in range(8):
        program, blob = random_program(seed)
        yield f"random program {seed}", program, blob, [], random_inputs(program, BATCH, seed=5)


def operations() -> Iterator[Case]:
    """Shapes that were chosen for vectors, tiles and rows, by every algorithm that takes them."""
    for bits in (4, 8):
        widths = {"w_bits": bits, "a_bits": bits, "zero": 0 if bits < 8 else 101}
        for name, shape in GEOMETRY.items():
            program, blob = one_conv(3, **widths, **shape)  # type: ignore[arg-type]
            yield f"{name} w{bits}", program, blob, [], random_inputs(program, BATCH, seed=5)
        for name, shape in depthwise.SHAPES.items():
            program, blob = depthwise.depthwise(3, **widths, **shape)  # type: ignore[arg-type]
            yield f"depthwise, {name} w{bits}", program, blob, [], random_inputs(program, BATCH, seed=5)
        for name, shape in lanes.SHAPES.items():
            program, blob = one_conv(3, grid="zero", **widths, **shape)  # type: ignore[arg-type]
            chosen = lanes.algorithms(program)
            yield f"lanes, {name} w{bits}", program, blob, chosen, random_inputs(program, BATCH, seed=5)
    for name, shape in winograd.SHAPES.items():
        program, blob = one_conv(2, w_bits=4, a_bits=4, **shape)  # type: ignore[arg-type]
        chosen = winograd.algorithms(program, blob, "avx2")  # whose rule is the narrowest
        yield f"winograd, {name}", program, blob, chosen, random_inputs(program, 1, seed=5)
    for layer, results in product(lean.LAYERS, lean.RESULTS):
        for residual in lean.RESIDUALS:
            program, blob = lean.net(layer, residual, results, (3, 19))
            name = f"{layer}, residual: {residual}, {results}"
            yield name, program, blob, [], random_inputs(program, BATCH, seed=5)
    for size, results in product(((3, 19), (7, 7), (13, 13)), lean.RESULTS):
        for residual in lean.RESIDUALS:
            program, blob = lean.net((128, 48, 3), residual, results, size, w_bits=4, a_bits=4)
            ways = {"lanes": lanes.algorithms(program), "winograd": winograd.algorithms(program, blob, "avx2")}
            for way, chosen in ways.items():
                name = f"{way} of many channels, {size}, residual: {residual}, {results}"
                yield name, program, blob, chosen, random_inputs(program, 1, seed=5)
    for kind in KINDS:
        step, _ = one_activation(kind)
        yield kind, step.program, step.blob, [], [step.image]
    for name in MAXIMA:
        program, blob, images = maximum_of_floats(name, (5, 17), None)
        yield f"maximum, {name}", program, blob, [], [images]


def write(path: Path, cases: Iterable[Case]) -> int:
    """Writes the cases as replay.cpp reads them, with what the reference makes of them; how many there are."""
    count = 0
    with path.open("wb") as file:
        for name, program, blob, algorithms, images in cases:
            trace: dict[int, Tensor] = {}
            outputs = ReferenceRunner(program, blob).run(images, trace)
            file.write(_bytes(name.encode()) + _bytes(program.to_json().encode()))
            file.write(_list([_bytes(one.encode()) for one in algorithms]) + _bytes(_raw(blob)))
            file.write(_number(len(images[0])) + _list([_bytes(_raw(x)) for x in images]))
            file.write(_list([_bytes(_raw(y)) for y in outputs]))
            forms = {index: program.tensors[index].form for index in trace}
            stream = STREAM_DTYPES[program.stream_dtype]
            kept = {i: x.to(stream) if forms[i] == "stream" else x for i, x in trace.items() if forms[i] != "image"}
            file.write(_list([_number(i) + _number(x.element_size()) + _bytes(_raw(x)) for i, x in kept.items()]))
            count += 1
    return count


def _number(value: int) -> bytes:
    return struct.pack("<q", value)


def _bytes(value: bytes) -> bytes:
    return _number(len(value)) + value


def _list(values: list[bytes]) -> bytes:
    return _number(len(values)) + b"".join(values)


def _raw(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def build(
    name: str, monkeypatch: pytest.MonkeyPatch, compiler: str, flags: str = "", portable_only: bool = False
) -> Path:
    """The program for the processors of `compiler`, with more `flags`; kept in build/, where what is unchanged stays.

    Skips where there is no such compiler.
    """
    setup = load_setup(monkeypatch)
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("LBS_CXXFLAGS", flags)
    if portable_only:
        monkeypatch.setattr(setup, "takes_flags", lambda compiler, flags: False)
    folder, part = ROOT / "build" / "replay" / name, setup.Part()
    ninja, program = setup.NinjaFile(folder), folder / "replay"
    link = [word for word in setup.cxx_rule(ninja, "replay", part, for_python=False) if word != "-shared"]
    ninja.link(program, [ninja.compile("replay", SOURCE, []), *setup.cpu_objects(ninja, "replay", part)], link)
    for failure in ninja.build().values():
        raise failure
    return program


def run(program: Path, *words: object, emulator: tuple[str, ...] = (), **environment: str) -> str:
    """What it prints; an error with its words where it fails."""
    command = [*emulator, str(program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
