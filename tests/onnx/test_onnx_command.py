"""`lbs export` writes the file that packed.to_onnx writes, and says what is not exact."""

from __future__ import annotations

import json
from pathlib import Path

import pack_nets
import pytest

from lbs.cli import main

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx onnxscript")


def test_a_packed_file_becomes_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = pack_nets.packed_digits()
    packed.save(tmp_path / "network.lbs.safetensors")
    notes = packed.to_onnx(tmp_path / "expected.onnx")
    command = ["export", str(tmp_path / "network.lbs.safetensors"), "--out", str(tmp_path / "network")]
    assert main.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    written = (tmp_path / "network.onnx").read_bytes()
    assert written == (tmp_path / "expected.onnx").read_bytes()
    assert told == {"file": str(tmp_path / "network.onnx"), "bytes": len(written), "notes": list(notes)}
    assert main.main([*command, "--float32"]) == 0
    assert "a code on a rounding boundary may come out one beside" in capsys.readouterr().out
    (tmp_path / "folder.onnx").mkdir()
    assert main.main(["export", "--zoo", "cifar100-resnet20", "--out", str(tmp_path / "folder")]) == 2
    assert "cannot write" in capsys.readouterr().err
