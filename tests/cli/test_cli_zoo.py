"""Shipped networks: found by name, refused by a clear line where they are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lbs
import lbs.models
import lbs.zoo
from lbs.cli import main
from lbs.plan import Plan
from lbs_kernels.errors import CheckpointError, LbsError


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo folder that holds a uniform ResNet-20 under the shipped name."""
    torch.manual_seed(0)
    model, images = lbs.models.create("cifar_resnet20", 100).eval(), torch.randn(4, 3, 32, 32)
    packed = lbs.pack(lbs.calibrate(lbs.uniform(model, images, 4, 4), [images]).eval(), verify=False)
    packed.save(tmp_path / "cifar100-resnet20.lbs.safetensors")
    assert packed.plan is not None
    packed.plan.save(tmp_path / "cifar100-resnet20.plan.json")
    (tmp_path / "cifar100-resnet20.record.json").write_text(json.dumps({"packed_top1": 1.0}))
    monkeypatch.setattr(lbs.zoo, "_FOLDER", tmp_path)
    return tmp_path


def test_a_shipped_network_is_explained_and_timed(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = lbs.zoo.entry("cifar100-resnet20")
    assert entry.plan() == Plan.load(shelf / "cifar100-resnet20.plan.json")
    assert entry.record() == {"packed_top1": 1.0}
    assert main.main(["explain", "--zoo", entry.name, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows if row["w_bits"]] == [layer.name for layer in entry.plan().layers]
    options = ["--batches", "2", "--rounds", "2", "--baselines", "float32", "--threads", "1"]
    assert main.main(["bench", "--zoo", entry.name, "--json", *options]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in timed["rows"]] == ["packed", "torch float32"]


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LbsError, match="the zoo has no network 'x'; it has cifar100-resnet20"):
        lbs.zoo.entry("x")
    monkeypatch.setattr(lbs.zoo, "_FOLDER", tmp_path)
    for read in (lambda e: e.path, lambda e: e.plan(), lambda e: e.record()):
        with pytest.raises(CheckpointError, match="is not there"):
            read(lbs.zoo.entry("cifar100-resnet20"))
