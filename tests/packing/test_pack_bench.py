"""bench: fair contenders, checked results, honest gaps."""

from __future__ import annotations

import json

import pack_nets
import pytest
import torch
from torch import Tensor

import lbs
import lbs.data
import lbs.models
from lbs import contenders
from lbs.benchmark import BenchRow, bits_told
from lbs.contenders import BASELINES, DEFAULT_BASELINES
from lbs.engines import ENGINES, EngineModels, why_not
from lbs.layer_times import LayerTimes
from lbs.packing.model import PackedModel
from lbs_kernels.errors import BackendError, LbsError, ShapeError

OWN_BASELINES = tuple(name for name in BASELINES if name not in ENGINES)


def test_a_batch_that_takes_too_long_has_fewer_rounds_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lbs.benchmark, "LIMIT", 0.0)
    found = lbs.bench(pack_nets.packed_digits(), batches=(1, 2), threads=1, baselines=(), rounds=7)
    assert found.notes[-2:] == tuple(f"batch {batch}: 5 of 7 rounds were made in 0 s" for batch in (1, 2))
    assert found.rows[0].median > 0


def test_all_contenders_are_timed_in_rows_that_the_report_reads() -> None:
    packed, model = pack_nets.packed_digits(), lbs.models.create("digits_resnet8", 10)
    before = torch.get_num_threads()
    found = lbs.bench(packed, model=model, batches=(1, 3), threads=1, baselines=OWN_BASELINES, rounds=2)
    assert torch.get_num_threads() == before
    names = ["packed", *(BASELINES[name] for name in OWN_BASELINES)]
    assert [(row.batch, row.contender) for row in found.rows] == [(batch, name) for batch in (1, 3) for name in names]
    for row in found.rows:
        assert 0 < row.p20 <= row.median <= row.p80
        assert set(row.ratios) == set(names) - {row.contender}
    assert found.ratio("float32", 3) == found.rows[len(names)].ratios["torch float32"]
    body = json.loads(json.dumps(found.to_json()))
    assert (body["version"], body["level"], body["threads"]) == (1, "model", 1)
    assert body["rows"][0]["contender"] == "packed"
    assert "x" in str(found)
    assert found.missing == {}


def test_without_a_float_network_the_baselines_are_missing_by_name() -> None:
    found = lbs.bench(pack_nets.packed_digits(), batches=(2,), threads=1, rounds=1)
    assert [row.contender for row in found.rows] == ["packed"]
    assert set(found.missing) == {BASELINES[name] for name in DEFAULT_BASELINES}
    assert "not timed: torch float32: no float network was given" in str(found)
    with pytest.raises(LbsError, match="torch float32 was not timed at batch 2: no float network"):
        found.ratio("float32", 2)


def test_quantized_model_becomes_float_again_and_pruning_is_noted() -> None:
    notes: list[str] = []
    pruned = contenders.float_model(pack_nets.mixed_network(), notes)
    assert pack_nets.layers_of(pruned) == {}
    assert pruned.layer1[1].conv1.out_channels == 4
    assert len(notes) == 1
    model = pack_nets.network("cifar_resnet20", 8, 8)
    plain = contenders.float_model(model, notes).eval()
    assert len(notes) == 1  # nothing is pruned here
    x = pack_nets.images(8, (3, 32, 32))
    with torch.no_grad():
        one, other = plain(x), model(x)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.99
    assert pack_nets.layers_of(model)  # the model given stays quantized
    assert {type(m) for m in plain.modules()} == {type(m) for m in lbs.models.create("cifar_resnet20").modules()}
    contenders.baseline("float32_folded", plain)


def test_baselines_compute_what_the_float_model_does() -> None:
    model = pack_nets.unsettle(lbs.models.create("digits_resnet8", 10)).eval()
    x = pack_nets.images(4, (1, 8, 8))
    with torch.no_grad():
        expected = model(x)
        for name in ("float32", "float32_folded"):
            torch.testing.assert_close(contenders.baseline(name, model)(x), expected, rtol=1e-3, atol=1e-4)
        half = contenders.baseline("bfloat16", model)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert half.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_nets.packed_digits()

    def slightly_wrong(self: PackedModel, x: Tensor) -> Tensor:
        return self.body(x) + 1e-6

    monkeypatch.setattr(PackedModel, "forward", slightly_wrong)
    with pytest.raises(BackendError, match=r"differs from the reference by .*; a wrong result is not timed"):
        lbs.bench(packed, batches=(1,), threads=1, rounds=1)


def test_senseless_requests() -> None:
    with pytest.raises(LbsError, match=r"unknown baselines \['int4'\].*float32_folded"):
        lbs.bench(pack_nets.packed_digits(), baselines=("int4",))
    with pytest.raises(LbsError, match=r"batches \[0\]; name at least one"):
        lbs.bench(pack_nets.packed_digits(), batches=(0,))
    with pytest.raises(LbsError, match="threads = 0"):
        lbs.bench(pack_nets.packed_digits(), threads=0)


def test_engines_that_are_not_installed_are_listed_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("onnxruntime", "openvino") else name)
    assert why_not("openvino") == "not installed: pip install openvino"
    assert why_not("openvino8") == "not installed: pip install onnxruntime openvino"  # it quantizes
    model = lbs.models.create("digits_resnet8", 10)
    found = lbs.bench(
        pack_nets.packed_digits(), model=model, batches=(1,), threads=1, baselines=tuple(ENGINES), rounds=1
    )
    assert set(found.missing) == set(ENGINES.values())
    assert "not timed: ONNX Runtime int8: not installed: pip install onnxruntime" in str(found)


def test_an_engine_that_fails_does_not_cost_the_other_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: EngineModels, name: str, images: Tensor, threads: int) -> None:
        raise RuntimeError(f"{name} has no kernel\nfor this")

    monkeypatch.setattr(EngineModels, "call", refuse)
    monkeypatch.setattr(contenders, "why_not", lambda name: None)
    model = lbs.models.create("digits_resnet8", 10)
    found = lbs.bench(
        pack_nets.packed_digits(), model=model, batches=(1,), threads=1, baselines=("float32", "openvino8"), rounds=1
    )
    assert [row.contender for row in found.rows] == ["packed", "torch float32"]
    assert found.missing == {"OpenVINO int8": "batch 1: RuntimeError: openvino8 has no kernel"}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_compute_the_float_network(name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        pytest.skip(reason)
    model = pack_nets.unsettle(lbs.models.create("digits_resnet8", 10)).eval()
    engines, images = EngineModels(model, (1, 8, 8)), pack_nets.images(3, (1, 8, 8))
    assert engines.call(name, images, 1)().shape == (3, 10)
    with torch.no_grad():
        engines._model.fc.bias += 100.0  # the file on disk still holds the network as it was
    with pytest.raises(BackendError, match="differs from torch by"):
        engines.call(name, images, 1)


def digits_images(count: int) -> tuple[Tensor, Tensor]:
    data = lbs.data.load("digits")
    pixels, labels = lbs.data.pixels_at(data, torch.arange(count))
    return lbs.data.normalize(pixels, data.mean, data.std), labels


def test_every_contender_is_asked_weighed_and_timed_in_one_table() -> None:
    packed, model = pack_nets.packed_digits(), lbs.models.create("digits_resnet8", 10)
    images, labels = digits_images(11)
    steps: list[str] = []
    found = lbs.bench(
        packed, model=model, batches=(1, 4), threads=1, baselines=("float32", "uniform8"), rounds=1, images=images,
        labels=labels, progress=steps.append,
    )  # fmt: skip
    made = ["make torch float32", "make packed uniform 8-bit"]
    assert steps == [*made, "time batch 1", "time batch 4", "classes of 11 images", "time layers"]
    names = ["packed", "torch float32", "packed uniform 8-bit"]
    assert list(found.accuracy) == list(found.agreement) == names
    classes = packed(images).argmax(1)
    assert found.accuracy["packed"] == float((classes == labels).double().mean())
    with torch.no_grad():
        of_float = model.eval()(images).argmax(1)
    assert found.agreement["packed"] == pytest.approx(float((classes == of_float).double().mean()))
    assert found.agreement["torch float32"] == 1.0
    assert found.bytes["torch float32"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert packed.packed_bytes < found.bytes["packed"] < found.bytes["packed uniform 8-bit"]
    lines = str(found).splitlines()
    assert "11 images" in lines[0]
    assert " ".join(lines[1].split()) == "right as float MB batch 1: ms packed is batch 4: ms packed is"
    assert [line[: len(name)] for line, name in zip(lines[2:], names, strict=False)] == names
    assert all(f"{found.accuracy[name]:.2%}" in line for line, name in zip(lines[2:], names, strict=False))
    layers = {layer.name: layer for layer in found.layers}
    assert layers.keys() == {layer.name for layer in packed.plan.layers}  # type: ignore[union-attr]
    assert all(set(layer.seconds) == set(names) and min(layer.seconds.values()) > 0 for layer in found.layers)
    assert layers["fc"].w_bits == 8


def test_images_that_do_not_fit_are_refused() -> None:
    packed, (images, labels) = pack_nets.packed_digits(), digits_images(3)
    with pytest.raises(ShapeError, match="2 labels for 3 images"):
        lbs.bench(packed, images=images, labels=labels[:2])
    with pytest.raises(ShapeError, match="1 labels for 0 images"):
        lbs.bench(packed, labels=labels[:1])
    with pytest.raises(ShapeError, match="no images; give at least one"):
        lbs.bench(packed, images=images[:0])
    with pytest.raises(ShapeError, match="was packed for"):
        lbs.bench(packed, images=images[:, :, :4])


@pytest.mark.parametrize(("ratio", "told"), [(1.02, True), (1.04, False)])
def test_bits_that_do_not_pay_are_told(ratio: float, told: bool) -> None:
    rows = [BenchRow(1, "packed", 1.0, 1.0, 1.0, {"packed uniform 8-bit": ratio})]
    layers = (
        LayerTimes("a", 4, {"packed": 1.0, "packed uniform 8-bit": 1.02}),
        LayerTimes("b", 4, {"packed": 1.0, "packed uniform 8-bit": 1.2}),
        LayerTimes("c", 8, {"packed": 1.0, "packed uniform 8-bit": 1.0}),
    )
    lines = bits_told(rows, {"packed": 50, "packed uniform 8-bit": 100}, layers, 1)
    whole = ["bits did not pay: against uniform 8-bit, packed is x1.02 at batch 1 with 50% of its bytes"]
    assert list(lines) == [
        *(whole if told else []),
        "layers of fewer bits that are no faster than at 8 (batch 1): 1 of 2: a",
    ]


def test_ranges_of_8_bits_come_from_the_images() -> None:
    model, packed = pack_nets.unsettle(lbs.models.create("digits_resnet8", 10)).eval(), pack_nets.packed_digits()
    images, _ = digits_images(8)
    with torch.no_grad():
        expected = model(images)
    off = []
    for ranges in (images, 1e-2 * images):
        even = contenders.Contenders(packed, model, ("uniform8",), None, ranges).network("packed uniform 8-bit")
        assert even is not None
        off.append(float((even(images) - expected).norm() / expected.norm()))
    assert off[0] < 0.1 < off[1]


@pytest.mark.parametrize("name", ["onnxruntime8", "openvino8"])
def test_engines_are_calibrated_asked_and_weighed(name: str) -> None:
    if (reason := why_not(name)) is not None:
        pytest.skip(reason)
    model = pack_nets.unsettle(lbs.models.create("digits_resnet8", 10)).eval()
    images, labels = digits_images(7)
    found = lbs.bench(
        pack_nets.packed_digits(), model=model, batches=(1, 4), threads=1, baselines=("float32", name), rounds=1,
        images=images, labels=labels,
    )  # fmt: skip
    assert found.missing == {}
    assert found.agreement[ENGINES[name]] > 0.8
    assert 0 < found.bytes[ENGINES[name]] < found.bytes["torch float32"]
    engines = EngineModels(model, (1, 8, 8), calibration=images)
    ranges = engines._ranges(4)
    assert [len(part) for part in ranges] == [4, 4]
    assert torch.equal(torch.cat(ranges)[:7], images)
    far = EngineModels(model, (1, 8, 8), calibration=1e-3 * images)
    with torch.no_grad():
        expected = model(images)
    near, off = (float((x.outputs(name, images, 4, 1) - expected).norm() / expected.norm()) for x in (engines, far))
    assert 3 * near < off
    assert near < 0.1
