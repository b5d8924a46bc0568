"""The nodes and constants of one ONNX graph, as they are made: every name once, every constant once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

# Integers of ONNX that weights are stored in, narrowest first: (name, lowest, highest).
INTEGERS = (("INT4", -8, 7), ("INT8", -(1 << 7), (1 << 7) - 1), ("INT16", -(1 << 15), (1 << 15) - 1))


class Nodes:
    """Nodes in order of execution, and initializers by name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._taken: set[str] = set()
        self._constants: dict[tuple[Any, ...], str] = {}

    def reserve(self, name: str) -> str:
        """A name nothing else has: this one, or with a number behind it."""
        free, number = name, 1
        while free in self._taken:
            number += 1
            free = f"{name}_{number}"
        self._taken.add(free)
        return free

    def add(self, op: str, inputs: Sequence[str], place: str, **attributes: Any) -> str:
        """The name of what a node computes. place: of the layer it belongs to."""
        name = self.reserve(f"{place}/{op}")
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: np.ndarray[Any, Any], place: str) -> str:
        """The name of a constant of numpy's own types; equal ones are stored once."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.reserve(place)
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            self._store(self._constants[key], kind, value.shape, value.tobytes())
        return self._constants[key]

    def floats(self, value: Any, place: str) -> str:
        """A constant of float32."""
        return self.constant(np.asarray(value, dtype=np.float32), place)

    def sizes(self, *values: int, place: str) -> str:
        """A list of sizes or positions."""
        return self.constant(np.asarray(values, dtype=np.int64), place)

    def integers(self, value: np.ndarray[Any, Any], place: str) -> tuple[str, str]:
        """(name, type) of whole numbers in the narrowest of `INTEGERS` that holds them."""
        kind = next(kind for kind, low, high in INTEGERS if low <= value.min() and value.max() <= high)
        name = self.reserve(place)
        if kind == "INT4":
            codes = np.append(value.ravel(), [0] * (value.size % 2)).astype(np.int8).view(np.uint8) & 15
            content = (codes[::2] | codes[1::2] << 4).tobytes()  # the first of two in the low half of a byte
        else:
            content = value.astype(np.int8 if kind == "INT8" else np.int16).tobytes()
        self._store(name, TensorProto.DataType.Value(kind), value.shape, content)
        return name, kind

    def _store(self, name: str, kind: int, shape: Sequence[int], content: bytes) -> None:
        self.initializers.append(helper.make_tensor(name, kind, list(shape), content, raw=True))
