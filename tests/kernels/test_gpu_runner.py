"""Runs the interpreted checks of the GPU runner in a process of their own, as test_triton_interpreted.py does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from test_triton_interpreted import HERE, ROOT, run_interpreted


@pytest.mark.parametrize("file", ["check_runner.py", "check_half.py"])
def test_the_runner_with_interpreted_kernels(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "pack"), os.environ.get("PYTHONPATH", "")]))
    run_interpreted(str(HERE / "interpreted" / file), cache=tmp_path)
