"""README: what a reader pastes works in a fresh place, block by block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lbs.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TEXT = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [line.split("#")[0].strip() for line in re.findall(r"^ {4}(\S.*)$", TEXT, re.MULTILINE)]


def _output(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**_environment(), **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    """Ours without what the make around a test run, or its Python, says."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}


@pytest.mark.parametrize("block", PYTHON, ids=[f"block{index}" for index in range(len(PYTHON))])
def test_python(block: str, tmp_path: Path) -> None:
    """In a process and a folder of its own: no block leans on the one before it."""
    output = _output([sys.executable, "-c", block], tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert "same class" in output or ", met" in output


def test_all_kinds_of_blocks_are_known() -> None:
    assert len(PYTHON) == 2
    assert SHELL == ["make quickstart", "make test"]
    assert set(re.findall(r"^```(\w+)", README, re.MULTILINE)) == {"python"}


@pytest.mark.parametrize("command", SHELL)
def test_shell(command: str) -> None:
    """What make would do; the gate of the project is one of them, so it is not run within itself."""
    assert {"quickstart": "/lbs quickstart", "test": "-m pytest"}[command.split()[1]] in _output(
        [*command.split(), "-n"], ROOT
    )


@pytest.mark.slow
def test_quickstart_in_a_fresh_clone(tmp_path: Path) -> None:
    """From nothing: environment, native modules, a searched network and its page; some minutes, most of them pip's."""
    clone = tmp_path / "lbs"
    _output(["git", "clone", "-q", str(ROOT), str(clone)], tmp_path)
    assert "test images right" in _output(["make", "quickstart"], clone)
    assert (clone / "runs" / "quickstart" / "report.html").stat().st_size > 10_000


def test_commands_of_the_text_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"`(?:\.venv/bin/)?lbs ([a-z]+)`", README)
    assert commands
    for name in commands:
        assert main([name, "--help"]) == 0, capsys.readouterr()


def test_length_and_links() -> None:
    lines = README.splitlines()
    assert len(lines) <= 95
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("https://") or (ROOT / name).exists(), name
