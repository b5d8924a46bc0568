"""Budgets by modelled times of a GPU: held, and called modelled wherever they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lbs
import lbs.models
from lbs import SearchConfig, prepare
from lbs.cost import Tuned
from lbs.plan import Plan
from lbs.reporting import tables
from lbs.reporting.gathered import line_of
from lbs.reporting.records import Record
from lbs.runs.limits import latency_table, targets_section
from lbs.search import Budget, freeze
from lbs.search.baselines import project_budget
from lbs.search.freeze import plan_of
from lbs.search.quantities import seconds
from lbs_kernels.errors import FormatError, PlanError
from lbs_kernels.gpu.modelled import Modelled
from lbs_kernels.times import table

MARK = "modelled, nvidia-h200, batch 128"


def searched(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = prepare(lbs.models.create(name).eval(), lbs.models.example(name), SearchConfig())
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 32, 32))
    return model.train()


@pytest.mark.parametrize("share", [0.8, 0.65])
def test_a_resnet_18_comes_within_a_modelled_time(share: float) -> None:
    model = searched("resnet18")
    table = latency_table("resnet18", "modelled:nvidia-h200:128", 32)
    whole = Budget(model, latency_ms=1e3, table=table).value()
    outcome = Budget(model, latency_ms=share * whole * 1e3, table=table).finish()
    assert outcome.met
    assert 0.97 * outcome.target <= outcome.value <= outcome.target
    own = Modelled(batch=128)
    plan = plan_of(model)
    assert outcome.value == pytest.approx(
        sum(own.estimate(row.problem(plan.kept_inputs(row), row.kept_filters)) or 0.0 for row in plan.layers)
    )


@pytest.fixture(scope="module")
def found() -> tuple[nn.Module, Any]:
    model = searched("cifar_resnet20")
    table = latency_table("cifar_resnet20", "modelled:nvidia-h200:128", 32)
    whole = Budget(model, latency_ms=1e3, table=table).value()
    return model, Budget(model, bops=0.05, latency_ms=0.95 * whole * 1e3, table=table).finish()


def test_the_record_of_a_search_says_modelled(found: tuple[nn.Module, Any]) -> None:
    bops, latency = str(found[1]).splitlines()[:2]
    assert MARK not in bops
    assert latency.count(MARK) >= 2
    section = targets_section(found[1])
    assert section["targets"]["latency_ms"]["modelled"] == MARK
    assert "modelled" not in section["targets"]["bops"]
    record = Record("run", results={"search": section})
    [row] = [row for row in tables.budget_table(record).rows if row[0] == tables.TARGET_NAMES["latency_ms"]]
    assert all(MARK in cell for cell in row[1:4] if cell != "-")
    line = line_of(record)
    assert MARK in line.of_targets("value")
    assert MARK in line.of_targets("target")


def test_a_measured_time_does_not() -> None:
    model = searched("cifar_resnet20")
    outcome = Budget(model, latency_ms=1e3, table=lambda problem: 1e-6).finish()
    assert "modelled" not in str(outcome)
    assert "modelled" not in str(targets_section(outcome))
    assert "modelled" not in json.loads(plan_of(model).to_json())


def test_the_plan_says_modelled_and_goes_on_saying_it(found: tuple[nn.Module, Any], tmp_path: Path) -> None:
    plan = plan_of(found[0])
    assert plan.modelled == MARK
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert plan_of(freeze(searched("cifar_resnet20"), again)).modelled == MARK


def test_explain_tells_modelled_times_apart() -> None:
    torch.manual_seed(0)
    model = lbs.models.create("digits_resnet8", 10).eval()
    packed = lbs.quantize(model, torch.rand(8, 1, 8, 8))
    told = lbs.explain(packed, batch=2, rounds=1, gpu="nvidia-h200")
    assert all(row.modelled is not None and row.modelled > 0 for row in told.rows)
    total = sum(row.modelled or 0.0 for row in told.rows)
    [note] = [note for note in told.notes if note.startswith("us modelled")]
    assert f"modelled, nvidia-h200, batch 2, {total * 1e6:.1f} us" in note
    assert "not measured" in note
    assert "us modelled" in str(told).splitlines()[0]
    assert told.seconds != total
    plain = lbs.explain(packed, batch=2, rounds=1)
    assert "modelled" not in str(plain)
    with pytest.raises(FormatError, match="no modelled GPU; there is modelled:nvidia-h200"):
        lbs.explain(packed, gpu="nvidia-x1")
    as_advised = lbs.explain(packed, batch=2, rounds=1, gpu="modelled:nvidia-h200")
    assert [row.modelled for row in as_advised.rows] == [row.modelled for row in told.rows]
    with pytest.raises(FormatError, match="names a batch; leave it out"):
        lbs.explain(packed, gpu="modelled:nvidia-h200:128")


@pytest.mark.parametrize("word", ["gpu", "modelled", "nvidia-h200", "tpu:0"])
def test_a_device_without_times_is_refused(word: str) -> None:
    with pytest.raises(PlanError, match="has no times; name cpu, cuda, modelled:nvidia-h200"):
        latency_table("resnet18", word, 32)
    assert latency_table("resnet18", "cuda:1", 32) == Tuned("cuda:1", model="resnet18")


def test_plans_that_no_training_ended_say_modelled() -> None:
    """Of `project`, of a budget that goes on where it was met, and of `lbs.quantize`."""
    images, table = torch.rand(8, 1, 8, 8), Modelled(batch=128)
    model = lbs.models.create("digits_resnet8", 10).eval()
    projected = lbs.calibrate(prepare(model, images, SearchConfig(pruning=False)), [images])
    budget = Budget(projected, latency_ms=1e3, table=table)
    project_budget(budget, [(images, torch.zeros(8, dtype=torch.long))])
    assert plan_of(projected).modelled == MARK
    resumed = prepare(model, images, SearchConfig(pruning=False))
    again = Budget(resumed, latency_ms=1e3, table=table)
    assert plan_of(resumed).modelled == ""  # no choice was made yet
    again.load_state_dict(budget.state_dict())
    assert plan_of(resumed).modelled == MARK
    packed = lbs.quantize(model, images, latency_ms=1e3, table=table)
    assert packed.plan is not None
    assert packed.plan.modelled == MARK


def test_the_method_of_a_model_says_modelled_too() -> None:
    assert seconds(Modelled(batch=128).estimate).modelled == MARK
    assert not seconds(Modelled(batch=128).estimate).measured
    assert seconds(table.estimate).measured
