"""explain: one row per step, with shapes, bits, filters, kernel and time."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pack_nets
import pytest

import lbs
from lbs_kernels import extension
from lbs_kernels.errors import ShapeError
from lbs_kernels.times import table as tuning_table
from lbs_kernels.times.table import TuningTable


def test_rows_follow_the_program() -> None:
    packed = lbs.pack(pack_nets.mixed_network(), verify=False)
    found = lbs.explain(packed, batch=2, threads=1, rounds=3)
    names = [row.name for row in found.rows]
    assert names == [step.name for step in packed.programs[0].steps]
    row = found.rows[names.index("layer1.1.conv1")]
    layer = pack_nets.mixed_network().lbs_record.plan.layer("layer1.1.conv1")
    assert (row.kept_filters, row.total_filters) == (4, 16)
    assert (row.w_bits, row.a_bits) == (layer.w_bits, layer.a_bits)
    assert (row.input, row.output, row.operation) == ((32, 32, 16), (32, 32, 4), "conv 3x3")
    assert found.packed_bytes == packed.regions[0].blob.numel()


@pytest.mark.skipif(extension.cpu is None, reason="the native module is not built")
def test_native_steps_are_timed_and_shares_sum_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))  # no roof is known
    tuning_table.forget()
    found = lbs.explain(pack_nets.packed_two_regions(), batch=3, threads=1, rounds=3)
    assert {row.region for row in found.rows} == {0, 1}
    assert all(row.kernel.startswith("cpu/") for row in found.rows)
    assert all(row.seconds is not None and row.seconds > 0 for row in found.rows)
    assert sum(row.share or 0 for row in found.rows) == pytest.approx(1)
    assert found.notes == ()


def test_other_back_ends_say_that_they_tell_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_nets.packed_digits()
    for region in packed.regions:
        reference = region.compiled("reference")
        monkeypatch.setattr(type(region), "compiled", lambda self, backend="auto", made=reference: made)
    found = lbs.explain(packed, rounds=1)
    assert all(row.seconds is None and row.share is None and row.kernel == "reference" for row in found.rows)
    assert "reference back end does not tell times" in found.notes[0]
    assert found.seconds is None


def test_a_back_end_that_is_missing_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = copy.deepcopy(pack_nets.packed_digits())
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "cpu_reason", "no compiler was found")
    found = lbs.explain(packed, rounds=1)
    assert "region 0 fell back to reference: cpu: no compiler was found" in found.notes
    assert {row.kernel for row in found.rows} == {"reference"}


def test_text_and_json() -> None:
    found = lbs.explain(pack_nets.packed_two_regions(), batch=1, threads=1, rounds=1)
    text = str(found)
    assert text.splitlines()[0].split()[:3] == ["layer", "operation", "input"]
    assert "in float: softplus: softplus has no packed form" in text
    assert "batch 1, 1 threads" in text
    assert json.loads(json.dumps(found.to_json()))["rows"][0]["name"] == "x.quantize"


def test_senseless_requests() -> None:
    with pytest.raises(ShapeError, match="batch = 0"):
        lbs.explain(pack_nets.packed_digits(), batch=0)
    with pytest.raises(ShapeError, match="rounds = 0"):
        lbs.explain(pack_nets.packed_digits(), rounds=0)
    with pytest.raises(ShapeError, match="threads = 0"):
        lbs.explain(pack_nets.packed_digits(), threads=0)


@pytest.mark.skipif(extension.cpu is None, reason="the native module is not built")
def test_the_share_of_the_roof_is_told_where_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    tuning_table.forget()
    without = lbs.explain(pack_nets.packed_digits(), batch=2, threads=1, rounds=1)
    assert all(row.roof is None for row in without.rows)
    assert "roof" not in str(without)
    slug = tuning_table.device_slug("cpu")
    tuning_table.write(tuning_table.user_path(slug), TuningTable(slug, roofs={"cpu:t1": 5e9, "cpu:t2": 1.0}))
    found = lbs.explain(pack_nets.packed_digits(), batch=2, threads=1, rounds=1)
    tuning_table.forget()
    for row in found.rows:
        if not row.w_bits:
            assert row.roof is None
            continue
        # Every layer of the network is dense and keeps its filters, so its shapes tell its products.
        taps = int(row.operation[5]) * int(row.operation[7]) if row.operation.startswith("conv") else 1
        products = 2 * row.output[0] * row.output[1] * row.output[2] * taps * row.input[2]
        assert row.seconds is not None
        assert row.roof == pytest.approx(products / row.seconds / 5e9)
    assert "of roof" in str(found).splitlines()[0]
    assert "roof: 5 G multiply-adds a second, a matrix product of bytes with 1 threads" in found.notes
