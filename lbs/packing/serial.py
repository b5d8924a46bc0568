"""A packed network as tensors and text, and back.

Tensors: `region{i}.{array}` for every array of program i, `float.{path}` for what stays in float. Metadata: `format`,
`version`, `digest`, `program{i}` (the program's JSON), `graph` (the nodes around the regions), `model` (name, input
shape, what stays in float and why, how bytes are normalised), `plan` (bits and kept filters, where known).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lbs.packing.container import read_container, write_container
from lbs.packing.graph_json import graph_from_json, graph_to_json
from lbs.packing.pixels import Normalization
from lbs.packing.region import PackedRegion
from lbs.packing.work import check_work
from lbs.plan import Plan
from lbs_kernels.errors import CheckpointError, FormatError, PlanError, printable
from lbs_kernels.program.checks import check_planes
from lbs_kernels.program.steps import ARRAY_DTYPES, BLOB_ALIGNMENT, Program, blob_digest
from lbs_kernels.program.text import parse_json, read_program

FORMAT = "lbs-packed"
# 2: the model may take bytes. 3: more float parts, values and names in the graph. 4: programs of version 4, more
# functions in the graph, and what its nodes are part of. Programs may be of the same version or of an earlier one.
FILE_VERSION = 4
_FLOAT = "float."


@dataclass(frozen=True)
class PackedParts:
    """All that makes a PackedModel."""

    graph: fx.GraphModule
    input_shape: tuple[int, ...]
    kept_float: tuple[tuple[str, str], ...]
    plan: Plan | None
    name: str
    normalize: Normalization | None


def write(path: Path, parts: PackedParts) -> None:
    """Write a packed network to one file.

    Raises:
        CheckpointError: a float part that has no form without pickle; a disk that is full (an old file stays).
    """
    metadata = {"format": FORMAT, "version": str(FILE_VERSION)}
    tensors: dict[str, Tensor] = {}
    regions = [(name, module) for name, module in parts.graph.named_children() if isinstance(module, PackedRegion)]
    for name, region in regions:
        metadata[name.replace("region", "program")] = region.loaded.text
        for key in sorted(region.program.arrays):
            tensors[f"{name}.{key}"] = region.program.array(region.blob, key)
    blobs = {f"{name}.blob" for name, _ in regions}
    tensors |= {_FLOAT + key: value for key, value in parts.graph.state_dict().items() if key not in blobs}
    pixels = parts.normalize
    model = {
        "name": parts.name,
        "input_shape": parts.input_shape,
        "kept_float": parts.kept_float,
        "normalize": None if pixels is None else [pixels.mean, pixels.std],
    }
    metadata["model"] = json.dumps(model)
    metadata["graph"] = json.dumps(graph_to_json(parts.graph))
    metadata["plan"] = parts.plan.to_json() if parts.plan is not None else ""
    write_container(path, tensors, metadata)


def read(path: Path, budget: float | None = 1.0) -> PackedParts:
    """Read `write`'s file, onto the CPU. `budget`: see `check_work`.

    Raises:
        CheckpointError: missing, truncated, damaged, foreign or newer, parts that do not fit together, or more work for
            one image than the budget has.
    """
    tensors, metadata = read_container(path, FORMAT, FILE_VERSION)
    try:
        count = sum(key.startswith("program") for key in metadata)
        regions = [_region(index, metadata[f"program{index}"], tensors) for index in range(count)]
        floats = {key.removeprefix(_FLOAT): value for key, value in tensors.items() if key.startswith(_FLOAT)}
        model = parse_json(metadata["model"], "its model")
        shape = tuple(_size(value) for value in model["input_shape"])
        name, kept = _labels(model)
        plan = Plan.from_json(metadata["plan"]) if metadata["plan"] else None
        graph = graph_from_json(parse_json(metadata["graph"], "its graph"), regions, floats)
        if not regions:
            raise CheckpointError("it holds no program")
        normalize = _normalization(model, shape, regions)
        check_work(graph, shape, torch.float32 if normalize is None else torch.uint8, budget)
        return PackedParts(graph, shape, kept, plan, name, normalize)
    except (CheckpointError, FormatError, PlanError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); write it again") from error


def _region(index: int, text: str, tensors: dict[str, Tensor]) -> PackedRegion:
    """The region of program `index`, its arrays laid into a blob no larger than what the file holds."""
    prefix = f"region{index}."
    arrays = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    size = sum(-(-value.numel() * 4 // BLOB_ALIGNMENT) * BLOB_ALIGNMENT for value in arrays.values())
    program = read_program(text, size)
    _check_arrays(program, arrays, index)
    blob = torch.zeros(size, dtype=torch.uint8, device="cpu")
    for key, spec in program.arrays.items():
        blob[spec.offset : spec.offset + spec.nbytes] = arrays[key].reshape(-1).view(torch.uint8)
    if program.digest != blob_digest(blob):
        raise CheckpointError(f"program {index} was packed with other arrays than the file holds; write the file again")
    check_planes(program, blob)
    return PackedRegion(program, blob)


def _check_arrays(program: Program, arrays: dict[str, Tensor], index: int) -> None:
    if set(arrays) != set(program.arrays):
        odd = sorted(set(arrays) ^ set(program.arrays))
        raise CheckpointError(f"program {index} and the tensors of the file differ in {', '.join(odd[:4])}")
    for key, spec in program.arrays.items():
        if arrays[key].dtype != ARRAY_DTYPES[spec.dtype] or tuple(arrays[key].shape) != spec.shape:
            raise CheckpointError(
                f"array {key} is {arrays[key].dtype} {tuple(arrays[key].shape)}; program {index} needs {spec.dtype} "
                f"{spec.shape}"
            )


def _normalization(model: dict[str, Any], shape: tuple[int, ...], regions: list[PackedRegion]) -> Normalization | None:
    """How the images are normalised, which must be what the programs expect."""
    found = None if model.get("normalize") is None else Normalization.of(_number_lists(model["normalize"]))
    programs = [region.program for region in regions]
    bytes_read = any(program.tensors[index].dtype == "uint8" for program in programs for index in program.inputs)
    if bytes_read != (found is not None) or (found is not None and shape[:1] != (len(found.mean),)):
        raise CheckpointError(
            f"it says that images are normalised by {model.get('normalize')!r}, and its programs take "
            f"{'bytes' if bytes_read else 'floats'} of shape {list(shape)}; write the file again"
        )
    return found


def _labels(model: dict[str, Any]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The network's name, and what stays in float and why."""
    name, kept = model["name"], model["kept_float"]
    pairs = isinstance(kept, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in kept)
    if not pairs or not all(isinstance(text, str) for text in (name, *(part for pair in kept for part in pair))):
        raise CheckpointError("it has a name or kept_float that is no text, or list of pairs of texts; write it again")
    return printable(name), tuple((printable(label), printable(reason)) for label, reason in kept)


def _number_lists(value: Any) -> Any:
    """`value` where it is two lists of numbers that a float64 can hold. Raises CheckpointError."""
    lists = isinstance(value, list) and len(value) == 2 and all(isinstance(part, list) for part in value)
    if not lists or not all(_is_finite(number) for part in value for number in part):
        raise CheckpointError(
            f"it says that images are normalised by {str(value)[:80]}; give [mean, std], each of numbers"
        )
    return value


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"input size {value!r}; sizes are positive integers")
    return value
