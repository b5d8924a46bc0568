"""bench: fair contenders, checked results, honest gaps."""

from __future__ import annotations

import json

import pack_nets
import pytest
import torch
from torch import Tensor

import lbs
import lbs.models
from lbs import benchmark as bench_module
from lbs.benchmark import BASELINES, DEFAULT_BASELINES
from lbs.engines import ENGINES, EngineModels, why_not
from lbs.packing.model import PackedModel
from lbs_kernels.errors import BackendError, LbsError

OWN_BASELINES = tuple(name for name in BASELINES if name not in ENGINES)


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
    pruned = bench_module._float_model(pack_nets.mixed_network(), notes)
    assert pack_nets.layers_of(pruned) == {}
    assert pruned.layer1[1].conv1.out_channels == 4
    assert len(notes) == 1
    model = pack_nets.network("cifar_resnet20", 8, 8)
    plain = bench_module._float_model(model, notes).eval()
    assert len(notes) == 1  # nothing is pruned here
    x = pack_nets.images(8, (3, 32, 32))
    with torch.no_grad():
        one, other = plain(x), model(x)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.99
    assert pack_nets.layers_of(model)  # the model given stays quantized
    assert {type(m) for m in plain.modules()} == {type(m) for m in lbs.models.create("cifar_resnet20").modules()}
    bench_module._baseline("float32_folded", plain)


def test_baselines_compute_what_the_float_model_does() -> None:
    model = pack_nets.unsettle(lbs.models.create("digits_resnet8", 10)).eval()
    x = pack_nets.images(4, (1, 8, 8))
    with torch.no_grad():
        expected = model(x)
        for name in ("float32", "float32_folded"):
            torch.testing.assert_close(bench_module._baseline(name, model)(x), expected, rtol=1e-3, atol=1e-4)
        half = bench_module._baseline("bfloat16", model)
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
    monkeypatch.setattr(bench_module, "why_not", lambda name: None)
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
