"""The int8 baseline of cuDNN: absent, it says so; present, it is asked as its front end wants it (a stand-in of it)."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_cudnn, gpu_layers, readme_tables
from lbs_kernels.errors import BackendError
from lbs_kernels.program.problem import Problem
from lbs_kernels.tune.tuner import Layer

PROBLEM = Problem("bitconv2d", 2, 6, 5, 8, 12, (3, 3), (2, 1), (1, 1))


class Described:
    """A tensor of a graph."""

    def __init__(self, **known: Any) -> None:
        self.known = known

    def __getattr__(self, name: str) -> Any:
        def keep(value: Any) -> Described:
            self.known[name] = value
            return self

        if name.startswith("set_"):
            return keep
        raise AttributeError(name)


class Graph:
    """What the baseline uses of a graph, computed by torch."""

    off = 0

    def __init__(self, **known: Any) -> None:
        self.known = known

    def tensor(self, **known: Any) -> Described:
        return Described(**known)

    def conv_fprop(self, **known: Any) -> Described:
        self.conv = known
        self.result = Described()
        return self.result

    def build(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        assert self.result.known["set_output"] is True

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensors: dict[Described, Tensor], workspace: Tensor, handle: object) -> None:
        x, w, y = (tensors[key] for key in (self.conv["image"], self.conv["weight"], self.result))
        for described, tensor in tensors.items():
            known = described.known
            assert known.get("dim", known.get("set_dim")) == list(tensor.shape)
            assert known.get("stride", known.get("set_stride")) == list(tensor.stride())
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        settings = (None, self.conv["stride"], self.conv["padding"], self.conv["dilation"])
        y.copy_(torch.nn.functional.conv2d(x.double(), w.double(), *settings) + self.off)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    kinds = types.SimpleNamespace(INT8="int8", INT32="int32")
    module = types.SimpleNamespace(
        data_type=kinds, heur_mode=types.SimpleNamespace(A="A", FALLBACK="FALLBACK"), pygraph=Graph,
        create_handle=object, set_stream=lambda handle, stream: None, backend_version=lambda: 92000,
    )  # fmt: skip
    monkeypatch.setattr(gpu_cudnn.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    return module


def test_absent_it_says_so_and_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(gpu_cudnn.importlib, "import_module", absent)
    found = gpu_cudnn.missing()
    assert "carry nvidia-cudnn-frontend" in found[gpu_cudnn.NAME]
    layer = types.SimpleNamespace(problem=PROBLEM, device=torch.device("cuda"))
    assert gpu_cudnn.int8(layer) == {}  # type: ignore[arg-type]
    header = {"device": "a", "torch": "b", "triton": "c"}
    body = {"header": header, "l2": "cold", "rows": [], "missing": found}
    assert f"Not timed: {gpu_cudnn.NAME}" in "\n".join(readme_tables.gpu_layers_table("layers.json", body))


def test_it_is_no_contender_on_a_processor(stand_in: types.SimpleNamespace) -> None:
    assert gpu_cudnn.missing() == {}
    assert list(gpu_layers.baselines(Layer(PROBLEM, torch.device("cpu")))) == [gpu_layers.HALF]


def test_the_plan_computes_the_convolution(stand_in: types.SimpleNamespace) -> None:
    call = gpu_cudnn.Int8Convolution(PROBLEM, torch.device("cpu"))
    call()
    call.y.zero_()
    call()  # a second call computes again
    assert int(call.y.abs().max()) > 100


def test_sums_that_differ_are_an_error(stand_in: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "off", 1)
    with pytest.raises(BackendError, match="differ from float64"):
        gpu_cudnn.Int8Convolution(PROBLEM, torch.device("cpu"))()
