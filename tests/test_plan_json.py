"""Plans: totals of the templates, the JSON round trip, and every malformed file refused with its field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lbs.models
from lbs.cost import network_layers
from lbs.graph import template_plan, trace
from lbs.plan import LayerPlan, Plan
from lbs_kernels.errors import PlanError


def template(name: str) -> Plan:
    with torch.device("meta"):
        graph = trace(lbs.models.create(name), lbs.models.example(name))
    return template_plan(graph.layers, graph.groups, name)


# Printed totals of arXiv 2101.04935 in units of a million, at 32 / 8 / 4 / 2 bits.
@pytest.mark.parametrize(
    ("name", "full", "printed"),
    [
        ("preresnet20", "41798.6", {8: "2612.4", 4: "674.6", 2: "190.2"}),
        ("preresnet56", "128771.7", {8: "8048.2", 4: "2033.6", 2: "529.9"}),
    ],
)
def test_templates_cost_what_the_paper_prints(name: str, full: str, printed: dict[int, str]) -> None:
    plan = template(name)
    assert f"{plan.full_precision_bops() / 1e6:.1f}" == full
    for bits, total in printed.items():
        assert f"{plan.with_bits(bits, bits).bops() / 1e6:.1f}" == total


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "cifar_resnet20", "digits_resnet8"])
def test_templates_agree_with_the_count_by_hooks(name: str) -> None:
    with torch.device("meta"):
        counted = network_layers(lbs.models.create(name), lbs.models.example(name))
    assert template(name).full_precision_bops() == counted.full_precision_bops()
    assert template(name).with_bits(4, 4).bops() == counted.with_bits(4, 4).bops()


def test_pruned_filters_cost_nothing_in_their_layer_and_in_their_consumer() -> None:
    plan = template("cifar_resnet20")
    producer = plan.layer("layer1.0.conv1")
    consumer = next(entry for entry in plan.layers if entry.source == producer.name)
    assert consumer.name == "layer1.0.conv2"
    layers = tuple(replace(e, kept=tuple(range(12))) if e is producer else e for e in plan.layers)
    saved = plan.bops() - replace(plan, layers=layers).bops()
    assert saved == 2 * (16 * 4 * 9 * 32 * 32) * 64
    assert replace(plan, layers=layers).full_precision_bops() == plan.full_precision_bops()
    assert replace(plan, layers=layers).macs(layers[2]) == 12 * 16 * 9 * 32 * 32


def small() -> Plan:
    conv = LayerPlan("conv", "conv2d", 4, 2, 3, 8, (3, 3), (2, 1), (1, 1), (1, 1), 1, 9, 7, kept=(0, 3, 7))
    return Plan((conv, LayerPlan("fc", "linear", 8, 8, 8, 10, positions=5, source="conv")), "net")


def test_round_trip(tmp_path: Path) -> None:
    plan = small()
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.from_json(template("mobilenet_v2").to_json()) == template("mobilenet_v2")


def test_a_folder_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"runz/plan\.json cannot be written: .*runz is no folder"):
        small().save(tmp_path / "runz" / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("w_bits", 0, r"layer conv: w_bits=0; a width is an integer from 1 to 8"),
        ("w_bits", 9, "w_bits=9"),
        ("a_bits", "4", "a_bits='4'"),
        ("a_bits", 4.0, r"a_bits=4\.0"),
        ("a_bits", True, "a_bits=True"),
        ("a_bits", None, "a_bits=None"),
        ("kind", "conv3d", "kind='conv3d'"),
        ("name", 7, "layer name 7"),
        ("filters", 0, "filters=0"),
        ("filters", "8", "filters='8'"),
        ("in_channels", -3, "in_channels=-3"),
        ("height", 9.5, r"height=9\.5"),
        ("kernel", [3], r"kernel=\(3,\)"),
        ("kernel", 3, "kernel=3; give two integers"),
        ("stride", [0, 1], r"stride=\(0, 1\)"),
        ("padding", [-1, 0], r"padding=\(-1, 0\)"),
        ("kept", [], r"kept=\(\)"),
        ("kept", [3, 0], r"kept=\(3, 0\); list at least one filter"),
        ("kept", [0, 0], r"kept=\(0, 0\)"),
        ("kept", [0.5, 2], r"kept=\(0\.5, 2\)"),
        ("kept", [-1, 2], r"kept filter -1 is outside 0\.\.7"),
        ("kept", [0, 8], r"kept filter 8 is outside 0\.\.7"),
        ("kept", "all", "kept='all'"),
        ("source", 3, "source=3"),
        ("colour", "red", "colour"),
    ],
)
def test_bad_fields_are_refused_by_name(field: str, value: Any, message: str) -> None:
    body = json.loads(small().to_json())
    body["layers"][0][field] = value
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(body))


def test_what_does_not_belong_together_is_refused() -> None:
    body = json.loads(small().to_json())
    body["layers"].append(body["layers"][0])
    with pytest.raises(PlanError, match="lists conv more than once"):
        Plan.from_json(json.dumps(body))
    body = json.loads(small().to_json())
    body["layers"][1]["source"] = "stem"
    with pytest.raises(PlanError, match="source='stem' is no layer of the plan"):
        Plan.from_json(json.dumps(body))
    body["layers"][1] |= {"source": "conv", "in_channels": 9}
    with pytest.raises(PlanError, match="reads 9 channels, but its source conv has 8 filters"):
        Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"plan"', "{}", '{"layers": 3}', '{"layers": [3]}', "null"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_a_missing_field_is_named() -> None:
    body = json.loads(small().to_json())
    del body["layers"][1]["w_bits"]
    with pytest.raises(PlanError, match="w_bits"):
        Plan.from_json(json.dumps(body))


def test_newer_plans_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="version 3 is newer than 2"):
        Plan.from_json(json.dumps({"version": 3, "layers": []}))
    with pytest.raises(PlanError, match=r"absent\.json cannot be read"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="binary cannot be read"):
        Plan.load(tmp_path / "binary")


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(PlanError, match="no layer 'head'; it has conv, fc"):
        small().layer("head")
