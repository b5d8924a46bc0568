"""ONNX files in ONNX Runtime and OpenVINO, where they are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ENGINES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed: pip install {name}"
        ),
    )
    for name in ("onnxruntime", "openvino")
]


def run(engine: str, path: Path, *inputs: Tensor) -> list[Tensor]:
    """What an engine makes of a file's inputs, in float32."""
    arrays = [x.contiguous().numpy() for x in inputs]
    return [
        torch.from_numpy(np.array(x)) for x in (_onnxruntime if engine == "onnxruntime" else _openvino)(path, arrays)
    ]


def _onnxruntime(path: Path, arrays: list[Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {given.name: x for given, x in zip(session.get_inputs(), arrays, strict=True)})


def _openvino(path: Path, arrays: list[Any]) -> list[Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    found = compiled.create_infer_request().infer(arrays)
    return [found[output] for output in compiled.outputs]
