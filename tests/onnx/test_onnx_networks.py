"""Packed networks as ONNX files: one region or several, floats or bytes, whole or refused, and what engines predict."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
from engines_here import ENGINES, run
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.data
import lbs.models
import lbs.zoo
from lbs_kernels.errors import CheckpointError, GraphError

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx onnxscript")
IMAGES = 1000
# OpenVINO takes float32 for float64: codes on a rounding boundary may come out one beside it, and move what is behind.
ALIKE = {"onnxruntime": 1.0, "openvino": 0.995}
FAR = {"onnxruntime": 1e-6, "openvino": 0.1}


def photographs(count: int) -> Tensor:
    """Pieces of 32 x 32 pixels of scikit-learn's two photographs, float32 [count, 3, 32, 32] within 0..1."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(p).permute(2, 0, 1) for p in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for i in range(count):
        picture = pictures[i % 2]
        top, left = (int(torch.randint(0, size - 96, (), generator=generator)) for size in picture.shape[1:])
        pieces.append(F.avg_pool2d(picture[:, top : top + 96, left : left + 96].float() / 255, 3))
    return torch.stack(pieces)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_shipped_network_predicts_the_same(engine: str, tmp_path: Path) -> None:
    entry = lbs.zoo.entry("cifar100-resnet20")
    packed = lbs.load(entry.path)
    packed.to_onnx(tmp_path / "network.onnx")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (entry.mean, entry.std))
    images = (photographs(IMAGES) - mean) / std
    expected = packed(images).argmax(1)
    assert len(expected.unique()) > 20
    (found,) = run(engine, tmp_path / "network.onnx", images)
    assert int((found.argmax(1) == expected).sum()) >= ALIKE[engine] * IMAGES


@functools.cache
def digits() -> tuple[nn.Module, Tensor]:
    """A network that has learned scikit-learn's digits, and a thousand of them as bytes [N, 1, 8, 8]."""
    data = lbs.data.load("digits")
    pixels = torch.as_tensor(data.train_x).permute(0, 3, 1, 2)
    images, labels = pixels.float() / 255, torch.as_tensor(data.train_y).long()
    torch.manual_seed(0)
    model = lbs.models.create("digits_resnet8").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    assert float((model.eval()(images).argmax(1) == labels).float().mean()) > 0.9
    return model, pixels[:IMAGES].contiguous()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, {"bits": (4, 4)}, {"bits": (2, 4)}, {"streams": 8}, {"uint8": True}])
def test_digits_are_recognised_alike(options: dict[str, Any], engine: str, tmp_path: Path) -> None:
    model, pixels = digits()
    images = pixels.float() / 255
    as_bytes = bool(options.get("uint8"))
    kept = {key: value for key, value in options.items() if key != "uint8"}
    normalize = ((0.0,), (1.0,)) if as_bytes else None
    packed = lbs.quantize(model, pixels[:64] if as_bytes else images[:64], normalize=normalize, **kept)
    given = pixels if as_bytes else images
    packed.to_onnx(tmp_path / "network.onnx")
    (found,) = run(engine, tmp_path / "network.onnx", given)
    assert int((found.argmax(1) == packed(given).argmax(1)).sum()) >= ALIKE[engine] * IMAGES


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mobilenet_v2", "preresnet20"])
def test_networks_come_out_alike(name: str, engine: str, tmp_path: Path) -> None:
    packed = lbs.pack(pack_nets.network(name, 8, 8, 64 if name == "mobilenet_v2" else None), verify=False)
    packed.to_onnx(tmp_path / "network.onnx")
    images = packed.random_images(8, torch.Generator().manual_seed(0))
    expected = packed(images)
    (found,) = run(engine, tmp_path / "network.onnx", images)
    assert float((found - expected).norm() / expected.norm()) < FAR[engine]
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_in_float_are_nodes_between_the_regions(engine: str, tmp_path: Path) -> None:
    packed = pack_nets.packed_two_regions()
    assert len(packed.regions) == 2
    packed.to_onnx(tmp_path / "network.onnx")
    model = onnx.load(str(tmp_path / "network.onnx"))
    assert {node.domain for node in model.graph.node} == {""}
    assert "Softplus" in {node.op_type for node in model.graph.node}
    for batch in (1, 5):
        images = packed.random_images(batch, torch.Generator().manual_seed(batch))
        (found,) = run(engine, tmp_path / "network.onnx", images)
        assert float((found - packed(images)).abs().max()) < 1e-4


def test_the_packed_network_keeps_its_graph(tmp_path: Path) -> None:
    packed = pack_nets.packed_two_regions()
    packed.to_onnx(tmp_path / "network.onnx")
    assert packed.body.graph.owning_module is packed.body


@pytest.mark.parametrize("engine", ENGINES)
def test_lines_are_taken(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    packed = lbs.pack(pack_nets.quantized(model, (2, 20)), verify=False)
    packed.to_onnx(tmp_path / "network.onnx")
    lines = packed.random_images(4, torch.Generator().manual_seed(0))
    (found,) = run(engine, tmp_path / "network.onnx", lines)
    assert float((found - packed(lines)).abs().max()) < 1e-4


def test_weights_are_the_narrowest_integers_and_pruned_filters_are_gone(tmp_path: Path) -> None:
    packed = lbs.pack(pack_nets.mixed_network(), verify=False)
    notes = packed.to_onnx(tmp_path / "network.onnx")
    model = onnx.load(str(tmp_path / "network.onnx"))
    stored = {weight.name: weight for weight in model.graph.initializer}
    kinds = onnx.TensorProto.DataType
    # Two bits are -3, -1, 1 and 3 and four bits on the grid without a zero reach 15.
    widths = {step.name: (step.w_bits, step.w_grid) for step in packed.programs[0].steps if hasattr(step, "w_bits")}
    for name, (bits, grid) in widths.items():
        kind = kinds.Name(stored[f"{name}/weight"].data_type)
        assert kind == {(2, "odd"): "INT4", (4, "zero"): "INT4", (4, "odd"): "INT8", (8, "odd"): "INT16"}[bits, grid]
        assert (f"{name} ({bits} bits as {kind})" in notes[0]) == (kind in ("INT8", "INT16"))
    assert list(stored["layer1.1.conv1/weight"].dims) == [4, 16, 3, 3]
    names = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in names
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= names
    assert "mean pooling" in notes[1]


def test_nothing_of_this_machine_is_in_a_file(tmp_path: Path) -> None:
    pack_nets.packed_two_regions().to_onnx(tmp_path / "network.onnx")
    content = (tmp_path / "network.onnx").read_bytes()
    assert str(Path(lbs.__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


class Sorted(nn.Module):
    """Packed layers behind what ONNX has no node for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cdist(x, x) + torch.fft.ifft(x).imag + torch.erfinv(x.tanh()))


def test_what_has_no_form_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed = lbs.pack(pack_nets.quantized(Sorted(), (3, 6, 6)), verify=False)
    path = tmp_path / "network.onnx"
    path.write_text("old")
    with pytest.raises(GraphError, match=r"what stays in float has no form in ONNX.*erfinv"):
        packed.to_onnx(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.onnx"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "network.onnx").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*network\.onnx"):
        pack_nets.packed_digits().to_onnx(tmp_path / "network.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.onnx"]
