"""A packed network as one ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from torch import Tensor, fx

from lbs.onnx.nodes import Nodes
from lbs.onnx.outer import DOMAIN, outer_model
from lbs.onnx.steps import ProgramNodes
from lbs_kernels.errors import CheckpointError, GraphError, first_line
from lbs_kernels.files import replace
from lbs_kernels.program.steps import Program

OPSET = 21  # the first with integers of 4 bits
_IR_VERSION = 10  # the one of that opset
_LARGEST = 2**31 - 1  # bytes of a protocol buffer


@dataclass(frozen=True)
class Parts:
    """All of a packed network that a file is made of."""

    name: str
    body: fx.GraphModule
    programs: Mapping[str, Program]  # by the names of the regions in `body`, in order
    blobs: Mapping[str, Tensor]
    kept_float: tuple[tuple[str, str], ...]
    output: int | None  # which output of the only region the network returns; None: there is more than a region


def write(path: Path, parts: Parts, images: Tensor, exact: bool) -> tuple[str, ...]:
    """Write the file, checked, whole or not at all.

    Args:
        images: of the network, two at least. exact: see `ProgramNodes`.

    Returns:
        What an engine may compute otherwise than the packed network, and which weights are stored wider.

    Raises:
        GraphError: a part without a form in ONNX. CheckpointError: more than 2 GB, or a place that cannot be written.
    """
    made = _whole if parts.output is not None else _outer
    model, programs = made(parts, images, exact)
    if model.ByteSize() > _LARGEST:
        raise CheckpointError(f"{path}: an ONNX file holds 2 GB, this network takes {model.ByteSize()} bytes")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(
            f"to_onnx made a graph that breaks ONNX's rules, nothing is written: {first_line(error)}"
        ) from error
    try:
        replace(path, model.SerializeToString())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return _notes(programs, exact)


def _whole(parts: Parts, images: Tensor, exact: bool) -> tuple[onnx.ModelProto, list[ProgramNodes]]:
    """A network of one region."""
    (name,) = parts.programs
    program, nodes = parts.programs[name], Nodes()
    nodes.reserve("images")
    written = ProgramNodes(nodes, program, parts.blobs[name], exact=exact)
    outputs = written.write(_given(nodes, ["images"], [images.dim()]))
    assert parts.output is not None
    spec = program.tensors[program.outputs[parts.output]]
    result = nodes.reserve("output")
    nodes.nodes.append(helper.make_node("Identity", [outputs[parts.output]], [result], name=result))
    shape = [spec.channels] if spec.flat else [spec.channels, spec.height, spec.width]
    kind = helper.np_dtype_to_tensor_dtype(images[:0].cpu().numpy().dtype)
    graph = helper.make_graph(
        nodes.nodes,
        parts.name or "network",
        [helper.make_tensor_value_info("images", kind, ["N", *images.shape[1:]])],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", *shape])],
        nodes.initializers,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="lbs")
    return model, [written]


def _given(nodes: Nodes, names: list[str], dims: list[int]) -> list[str]:
    """Inputs [N, C] as images of one pixel."""
    axes = nodes.sizes(2, 3, place="axes") if min(dims) < 4 else ""
    return [n if d == 4 else nodes.add("Unsqueeze", [n, axes], n) for n, d in zip(names, dims, strict=True)]


def _outer(parts: Parts, images: Tensor, exact: bool) -> tuple[onnx.ModelProto, list[ProgramNodes]]:
    """A network with parts around its regions, whose nodes are replaced by the steps of their programs."""
    told = "; ".join(f"{name}: {reason}" for name, reason in parts.kept_float)
    model = outer_model(parts.body, parts.programs, images, OPSET, told)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    if opsets[""] < OPSET:
        raise GraphError(f"to_onnx: a part in float has no form in opset {OPSET}, only in {opsets['']} ({told})")
    graph, nodes, written = model.graph, Nodes(), []
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        nodes.reserve(value.name)
    for node in graph.node:
        nodes.reserve(node.name)
        for name in node.output:
            nodes.reserve(name)
    programs = list(parts.programs.items())
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.nodes.append(node)
            continue
        region, program = programs[node.attribute[0].i]
        written.append(ProgramNodes(nodes, program, parts.blobs[region], f"{region}/", exact))
        for made, name in zip(written[-1].write(node.input), node.output, strict=True):
            nodes.nodes.append(helper.make_node("Identity", [made], [name], name=nodes.reserve(f"{region}/{name}")))
    whole = helper.make_graph(
        nodes.nodes, parts.name or "network", graph.input, graph.output, [*graph.initializer, *nodes.initializers]
    )
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    made_model = helper.make_model(whole, opset_imports=kept, ir_version=_IR_VERSION, producer_name="lbs")
    made_model.functions.extend(model.functions)
    return made_model, written


def _notes(programs: list[ProgramNodes], exact: bool) -> tuple[str, ...]:
    wide = [layer for program in programs for layer in program.wide]
    own = sorted({name for program in programs for name in program.own})
    notes = []
    if not exact:
        notes.append(
            "float32 behind the sums: a code on a rounding boundary may come out one beside the packed network's"
        )
    if wide:
        notes.append(f"no narrower type of ONNX holds the weights of {', '.join(wide)}")
    if own:
        notes.append(f"the last bits of these are the engine's: {', '.join(own)}")
    return tuple(notes)
