"""Runs the interpreted checks in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_interpreted(*arguments: str, cache: Path) -> None:
    """pytest with the interpreter on; a failure shows what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout


def test_triton_equals_the_reference(tmp_path: Path) -> None:
    run_interpreted(str(HERE / "interpreted" / "check_triton.py"), cache=tmp_path)


@pytest.mark.slow
def test_triton_equals_the_reference_on_random_programs(tmp_path: Path) -> None:
    run_interpreted(str(HERE / "interpreted" / "check_triton.py"), "-m", "slow", cache=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["test_run_program.py", "test_bitconv2d.py", "test_bitlinear.py", "test_pool.py", "test_quantpack.py"]
)
def test_tests_of_every_back_end_hold_for_triton(file: str, tmp_path: Path) -> None:
    run_interpreted(str(HERE / file), "-k", "triton", cache=tmp_path)
