"""tools/make_venv.sh: picks a Python that can, and says what to install where none can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_venv.sh"
# A stand-in for python3: answers the version question and the ensurepip question, and records that it made a venv.
STUB = """#!/bin/sh
case "$*" in
    --version) echo "Python {version}" ;;
    *version_info*) exit {too_old} ;;
    *ensurepip*) exit {no_ensurepip} ;;
    "-m venv"*) echo "$*" > {record} ;;
esac
"""


def _stub(folder: Path, name: str, version: str, too_old: int = 0, no_ensurepip: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    record = folder / f"{name}.made"
    path.write_text(STUB.format(version=version, too_old=too_old, no_ensurepip=no_ensurepip, record=record))
    path.chmod(0o755)


def _make(folder: Path, venv: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(folder), **extra}
    return subprocess.run(["/bin/sh", str(SCRIPT), str(venv)], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(os.name != "posix", reason="the script is for POSIX shells")
class TestMakeVenv:
    def test_no_python_at_all(self, tmp_path: Path) -> None:
        done = _make(tmp_path / "nothing", tmp_path / "venv")
        assert done.returncode == 1
        assert "no Python 3.10 or newer was found" in done.stderr
        assert "apt-get install python3" in done.stderr

    def test_python_that_is_too_old_does_not_count(self, tmp_path: Path) -> None:
        _stub(tmp_path / "bin", "python3", "3.9.2", too_old=1)
        done = _make(tmp_path / "bin", tmp_path / "venv")
        assert done.returncode == 1
        assert "no Python 3.10 or newer was found" in done.stderr

    def test_python_without_ensurepip_names_the_package(self, tmp_path: Path) -> None:
        _stub(tmp_path / "bin", "python3", "3.11.2", no_ensurepip=1)
        done = _make(tmp_path / "bin", tmp_path / "venv")
        assert done.returncode == 1
        assert "Python 3.11.2 is here" in done.stderr
        assert "apt-get install python3-venv" in done.stderr

    def test_the_first_python_that_can_is_taken(self, tmp_path: Path) -> None:
        _stub(tmp_path / "bin", "python3", "3.9.2", too_old=1)
        _stub(tmp_path / "bin", "python3.13", "3.13.0", no_ensurepip=1)
        _stub(tmp_path / "bin", "python3.12", "3.12.1")
        done = _make(tmp_path / "bin", tmp_path / "venv")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "bin" / "python3.12.made").read_text().split()[-1] == str(tmp_path / "venv")
        assert not (tmp_path / "bin" / "python3.13.made").exists()

    def test_named_python_wins(self, tmp_path: Path) -> None:
        _stub(tmp_path / "bin", "python3", "3.12.1")
        _stub(tmp_path / "own", "mine", "3.11.0")
        done = _make(tmp_path / "bin", tmp_path / "venv", PYTHON3=str(tmp_path / "own" / "mine"))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "own" / "mine.made").exists()

    def test_working_environment_is_kept(self, tmp_path: Path) -> None:
        venv = Path(sys.executable).parents[1]
        if not (venv / "pyvenv.cfg").exists():
            pytest.skip("the tests do not run in a virtual environment")
        done = _make(tmp_path / "nothing", venv)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
