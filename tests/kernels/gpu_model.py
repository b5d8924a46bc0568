"""The CUDA kernels' source on a model of the GPU: `cuda_model` (tests/native/cuda), in the place of launches."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.gpu.configs.cuda import CudaConfig
from lbs_kernels.gpu.launch import Launch

BLOCKS = 3  # thread blocks of a launch: several, so that each works off more than one tile
FOLDER = Path(__file__).resolve().parents[1] / "native"


def native() -> ModuleType:
    """`cuda_model`. Skips where nothing native was built; fails where it alone was forgotten."""
    try:
        return importlib.import_module("cuda_model")
    except ImportError as error:
        if extension.cpu is None:
            pytest.skip(f"CPU module missing: {extension.cpu_reason}")
        build = "make setup, or LBS_BUILD_TESTS=1 python setup.py build_ext --inplace"
        pytest.fail(f"cuda_model is not in {FOLDER} ({error}); build it: {build}")


def launches_on_the_model(
    monkeypatch: pytest.MonkeyPatch, blocks: int = BLOCKS, late: bool = True, seed: int = 0
) -> list[dict[str, Any]]:
    """From now on tensors of the processor are served by the model; the tasks it was given, one for each launch."""
    model, tasks = native(), []

    def launch_of(task: dict[str, Any], config: CudaConfig, device: torch.device, kept: list[Tensor]) -> Launch:
        assert device.type == "cpu", "the model reads memory of the processor"

        def launch(inputs: list[Tensor], kept: list[Tensor] = kept) -> None:
            tasks.append(task)
            run = getattr(model, f"run_{config.kind}")
            run(task, *config.row, blocks=blocks, late=late, seed=seed)

        return launch

    monkeypatch.setattr("lbs_kernels.gpu.cuda.task.launch_of", launch_of)
    monkeypatch.setattr("lbs_kernels.gpu.configs.cuda.machines", lambda device: ("wgmma", "mma"))
    return tasks
