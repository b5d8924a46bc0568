"""Without the packages that write ONNX, to_onnx says which to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pack_nets
import pytest

from lbs_kernels.errors import BackendError


def test_without_onnx_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lbs.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"onnx.*pip install onnx onnxscript"):
        pack_nets.packed_digits().to_onnx(tmp_path / "network.onnx")
