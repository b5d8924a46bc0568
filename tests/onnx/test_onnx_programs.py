"""Every kind of step as ONNX nodes: ONNX Runtime and OpenVINO compute the codes and streams of the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import programs
import pytest
from engines_here import ENGINES, run
from torch import Tensor

from lbs_kernels.errors import GraphError
from lbs_kernels.program.steps import Program
from lbs_kernels.run.compiled import CompiledProgram

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx onnxscript")

from lbs.onnx.nodes import Nodes  # noqa: E402
from lbs.onnx.steps import ProgramNodes  # noqa: E402

BATCH = 3
OTHER_ON_A_BOUNDARY = 0.002  # share of codes where float32 rounds twice behind a sum and an epilogue once
CASES: dict[str, Callable[[int], tuple[Program, Tensor]]] = {
    **programs.CASES,
    "float16": lambda seed: programs.preact_residual(seed, "float16"),
    "bfloat16": lambda seed: programs.coded_residual(seed, "bfloat16"),
    **{f"random{number}": lambda seed, number=number: programs.random_program(number) for number in range(6)},
}


def with_zeros(program: Program) -> Program:
    """The program with a zero among all its codes: signed ones become those around the code in their middle."""

    def changed(codes: Any) -> Any:
        return replace(codes, signed=False, zero=1 << codes.bits - 1) if codes.signed else codes

    steps = [
        replace(step, emit=replace(step.emit, consumers=tuple(map(changed, step.emit.consumers))))
        for step in program.steps
    ]
    return replace(program, tensors=tuple(map(changed, program.tensors)), steps=tuple(steps))


def off_ties(program: Program) -> Program:
    """The program with clamps that end elsewhere than in the middle between two codes: OpenVINO divides by the range of
    all codes, and decides such ties itself.
    """

    def moved(step: Any) -> Any:
        high = step.emit.high
        return step if high is None else replace(step, emit=replace(step.emit, high=high * 1.03125))

    return replace(program, steps=tuple(map(moved, program.steps)))


def write(program: Program, blob: Tensor, path: Path, exact: bool = True) -> tuple[list[int], set[str]]:
    """An ONNX file that returns all tensors of a program as floats: their numbers, and what is the engine's own."""
    nodes = Nodes()
    inputs = [nodes.reserve(f"images{i}") for i in range(len(program.inputs))]
    written = ProgramNodes(nodes, program, blob, exact=exact)
    written.write(inputs)
    kinds = {"uint8": onnx.TensorProto.UINT8, "float32": onnx.TensorProto.FLOAT}
    info = onnx.helper.make_tensor_value_info
    specs = program.tensors
    given = [
        info(name, kinds[specs[i].dtype], ["N", specs[i].channels, specs[i].height, specs[i].width])
        for name, i in zip(inputs, program.inputs, strict=True)
    ]
    numbers = [i for i, spec in enumerate(specs) if spec.form != "image"]
    casts = [nodes.add("Cast", [written.values[i]], specs[i].name, to=onnx.TensorProto.FLOAT) for i in numbers]
    made = [
        info(name, onnx.TensorProto.FLOAT, ["N", specs[i].channels, specs[i].height, specs[i].width])
        for name, i in zip(casts, numbers, strict=True)
    ]
    graph = onnx.helper.make_graph(nodes.nodes, "program", given, made, nodes.initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return numbers, written.own


def compare(program: Program, blob: Tensor, engine: str, path: Path, exact: bool = True) -> None:
    """Codes are equal where all that makes them is exact; ONNX Runtime has float64, OpenVINO takes float32 for it."""
    images = programs.random_inputs(program, BATCH, 5)
    trace: dict[int, Tensor] = {}
    CompiledProgram(program, blob, "reference").run(images, trace=trace)
    numbers, own = write(program, blob, path, exact)
    same = exact and engine == "onnxruntime" and not own
    for i, found in zip(numbers, run(engine, path, *images), strict=True):
        spec, expected = program.tensors[i], trace[i].float().permute(0, 3, 1, 2)
        assert found.shape == expected.shape
        # Behind a code on a boundary sums differ by a product; elsewhere by the rounding of float32.
        allowed = 0.0 if same or spec.form == "codes" else 1e-4 * float(expected.abs().max())
        other = float(((found - expected).abs() > allowed).float().mean())
        assert other <= (0.0 if same else OTHER_ON_A_BOUNDARY), (spec.name, spec.form, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_steps_compute_what_the_reference_does(name: str, engine: str, tmp_path: Path) -> None:
    program, blob = CASES[name](1)
    if engine == "openvino":
        program = off_ties(replace(program, stream_dtype="float32"))  # it leaves casts to half precision out
    compare(with_zeros(program), blob, engine, tmp_path / "program.onnx")


@pytest.mark.parametrize("engine", ENGINES)
def test_in_float32_codes_on_a_boundary_alone_differ(engine: str, tmp_path: Path) -> None:
    program, blob = programs.chain(1)
    compare(with_zeros(program), blob, engine, tmp_path / "program.onnx", exact=False)
    nodes = onnx.load(str(tmp_path / "program.onnx")).graph.node
    assert onnx.TensorProto.DOUBLE not in [
        value.i for node in nodes if node.op_type == "Cast" for value in node.attribute
    ]


def test_codes_without_a_zero_are_refused() -> None:
    program, blob = programs.depthwise(1)
    with pytest.raises(GraphError, match="symmetric around 0 and none stands for it"):
        ProgramNodes(Nodes(), program, blob)
