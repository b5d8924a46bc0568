"""Networks that are given bytes: packed with the normalisation, equal to the model on the normalised images."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.data import normalize
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.packing.region import PackedRegion
from lbs.packing.verify import verify
from lbs_kernels.errors import CheckpointError, FormatError, GraphError, ShapeError
from lbs_kernels.program.steps import QuantPackStep, blob_digest
from lbs_kernels.run import compiled as run

SHAPE = (3, 10, 7)
PIXELS = ((0.48, 0.45, 0.4), (0.22, 0.27, 0.3))


class Net(nn.Module):
    """Reads its images twice: a convolution, and a sum that needs their floats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)) + x)
        return self.fc(self.conv(y).mean((2, 3)))


def bytes_of(batch: int, shape: tuple[int, ...] = SHAPE, seed: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(4)
    return pack_nets.quantized(Net(), SHAPE)


@pytest.fixture(scope="module")
def packed(model: nn.Module) -> PackedModel:
    return pack(model, normalize=PIXELS)


def test_every_back_end_equals_the_model_on_normalised_images(model: nn.Module, packed: PackedModel) -> None:
    x = bytes_of(40)  # more than one part of the verification
    for backend in ("reference", "auto"):
        report = verify(model, packed, x, backend)
        assert report.ok, report
        assert report.agreeing is not None
        assert report.agreeing >= 39
    expected, traces = packed.run_traced(x, "reference")
    assert torch.equal(packed(x), expected)
    assert pack_nets.unsaturated_share(packed.programs[0], traces[0]) > 0.3
    floats = normalize(x.permute(0, 2, 3, 1), *PIXELS)
    torch.testing.assert_close(packed(x), pack(model)(floats), rtol=0, atol=0.05)


def test_the_normalisation_is_rounded_once_from_float64(packed: PackedModel) -> None:
    program, blob = packed.programs[0], packed.regions[0].blob
    first = next(step for step in program.steps if isinstance(step, QuantPackStep))
    assert program.tensors[first.input].dtype == "uint8"
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in PIXELS)
    assert torch.equal(program.array(blob, str(first.multiplier)), (1 / (255 * std)).float())
    assert torch.equal(program.array(blob, str(first.bias)), (-mean / std).float())


def test_a_wrong_normalisation_is_found(model: nn.Module, packed: PackedModel) -> None:
    other = copy.deepcopy(packed)
    blob = other.regions[0].blob.clone()
    program = other.regions[0].program
    program.array(blob, "x.quantize.offset")[1] += 0.05
    other.body.region0 = PackedRegion(replace(program, digest=blob_digest(blob)), blob)
    report = verify(model, other, bytes_of(4))
    assert report.first_layer == "x.quantize"


def test_a_norm_of_the_images_joins_the_normalisation() -> None:
    class NormFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.norm(x)).mean((2, 3)))

    torch.manual_seed(1)
    model = pack_nets.quantized(NormFirst(), SHAPE)
    for pixels, x in ((None, pack_nets.images(3, SHAPE)), (PIXELS, bytes_of(3))):
        packed = pack(model, normalize=pixels, verify=False)
        assert packed.kept_float == ()
        assert [step.op for step in packed.programs[0].steps] == ["quantpack", "bitconv2d", "pool", "bitlinear"]
        assert verify(model, packed, x).ok


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_channels_last_is_read_without_a_copy(
    model: nn.Module, packed: PackedModel, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, x = (packed, bytes_of(5)) if dtype == "uint8" else (pack(model), pack_nets.images(5, SHAPE))
    given: list[int] = []
    runner = type(served.regions[0].compiled().runner)
    original = runner.run
    monkeypatch.setattr(
        runner, "run", lambda s, xs, *rest, **kw: given.append(xs[0].data_ptr()) or original(s, xs, *rest, **kw)
    )
    last = x.contiguous(memory_format=torch.channels_last)
    assert last.data_ptr() != x.data_ptr()
    expected = served(x)
    assert torch.equal(served(last), expected)
    assert torch.equal(served.run_traced(last, "reference")[0], expected)
    gaps = torch.stack([x, x], dim=-1)[..., 0]
    assert run.dense(gaps) is not gaps
    assert torch.equal(served(gaps), expected)
    assert given[:2] == [x.data_ptr(), last.data_ptr()]


def test_a_file_of_bytes_comes_back(model: nn.Module, packed: PackedModel, tmp_path: Path) -> None:
    packed.save(tmp_path / "net.lbs.safetensors")
    loaded = lbs.load(tmp_path / "net.lbs.safetensors")
    assert loaded.normalize == packed.normalize
    assert loaded.input_dtype is torch.uint8
    assert torch.equal(loaded(bytes_of(3)), packed(bytes_of(3)))
    assert verify(model, loaded, bytes_of(3)).ok
    assert "uint8" in repr(loaded)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from test_pack_checkpoint import header_of, rewrite

    header, data = header_of(path)
    body = json.loads(header["__metadata__"]["model"])
    change(body)
    header["__metadata__"]["model"] = json.dumps(body)
    rewrite(path, header, data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "images are normalised by None, and its programs take bytes"),
        ([[0.5], [0.2]], "its programs take bytes of shape"),
        ([[0.5] * 3, [0.2, 0.2, 0.0]], "std is above 0"),
        ([[0.5] * 3, ["x"] * 3], "images are normalised by .*; give \\[mean, std\\]"),
        ("text", "images are normalised by text; give \\[mean, std\\]"),
    ],
)
def test_a_file_that_disagrees_with_its_programs_is_refused(
    packed: PackedModel, tmp_path: Path, value: Any, message: str
) -> None:
    path = tmp_path / "net.lbs.safetensors"
    packed.save(path)
    _edit(path, lambda body: body.update(normalize=value))
    with pytest.raises(CheckpointError, match=message):
        lbs.load(path)


def test_wrong_images_are_refused_with_the_way_out(model: nn.Module, packed: PackedModel) -> None:
    floats = pack_nets.images(2, SHAPE)
    with pytest.raises(ShapeError, match=r"torch.float32; the program takes the bytes .* pack without normalize="):
        packed(floats)
    with pytest.raises(ShapeError, match=r"uint8; the program takes normalised float32 .*normalize=\(mean, std\)"):
        pack(model, verify=False)(bytes_of(2))
    with pytest.raises(ShapeError, match="images are torch"):
        pack(model, example=floats, normalize=PIXELS)
    with pytest.raises(ShapeError, match="normalize has 1 means and deviations, the images 3 channels"):
        pack(model, normalize=((0.5,), (0.2,)))
    for wrong in (((0.5,) * 3, (0.2, 0.2, 0.0)), ((0.5,) * 3, (0.2,)), ((float("nan"),) * 3, (0.2,) * 3), 3, ((), ())):
        with pytest.raises(FormatError, match="normalize"):
            pack(model, normalize=wrong)  # type: ignore[arg-type]


def test_float_parts_that_read_the_images_are_refused() -> None:
    class Gate(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.sigmoid(x).mean()

    torch.manual_seed(4)
    model = pack_nets.quantized(Gate(), SHAPE)
    with pytest.raises(GraphError, match="sigmoid stays in float and reads the images"):
        pack(model, normalize=PIXELS)


def test_compiled_and_exported(packed: PackedModel) -> None:
    x = bytes_of(3)
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(compiled(x), packed(x))
    assert torch.equal(compiled(last), packed(x))
    exported = torch.export.export(packed, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert torch.equal(exported.module()(bytes_of(5)), packed(bytes_of(5)))


def test_bench_and_explain_give_bytes(packed: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    model = Net().eval()
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    monkeypatch.setattr(PackedModel, "random_images", lambda self, batch, generator=None: bytes_of(batch))
    found = lbs.bench(packed, model=model, batches=(2,), threads=1, baselines=("float32", "uniform8"), rounds=1)
    assert [row.contender for row in found.rows] == ["packed", "torch float32", "packed uniform 8-bit"]
    torch.testing.assert_close(given[-1], normalize(bytes_of(2).permute(0, 2, 3, 1), *PIXELS))
    assert lbs.explain(packed, rounds=1).rows[0].operation == "normalize"
