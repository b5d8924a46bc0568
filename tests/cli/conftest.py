"""What the tests of several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lbs.cli import main


@pytest.fixture
def lbs_command(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, Any, str]]:
    """Run `lbs ... --json`: (exit code, parsed stdout, stderr)."""

    def run(line: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = main.main([*line.split(), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run
