"""docs/: the pages that a reader follows run from top to bottom, and every public name has its place."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lbs
import lbs.search

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RUN = ("quickstart", "after_training", "network", "latency", "deploy")  # those whose blocks follow one another


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    code = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "expected; allow more bits" not in done.stderr  # the warning about a network that lost its classes


@pytest.mark.parametrize("name", [f"lbs.{name}" for name in lbs.__all__ if name != "errors"])
def test_api_has_every_public_name(name: str) -> None:
    assert re.search(rf"^\.\. auto(?:function|class):: {re.escape(name)}(?:\(\))?$", API, re.MULTILINE), name


@pytest.mark.parametrize("name", sorted(set(lbs.search.__all__) - set(lbs.__all__)))
def test_api_has_every_name_of_the_search(name: str) -> None:
    assert re.search(rf"^\.\. auto(?:function|class):: lbs\.search\.{name}(?:\(\))?$", API, re.MULTILINE), name


API = (DOCS / "api.md").read_text(encoding="utf-8")


def test_every_page_is_listed() -> None:
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")


PUBLIC = {f"lbs.{name}": getattr(lbs, name) for name in lbs.__all__ if name != "errors"} | {
    f"lbs.search.{name}": getattr(lbs.search, name) for name in lbs.search.__all__ if name not in lbs.__all__
}
MADE_BY_LBS = {"lbs.PackedModel", "lbs.search.BudgetResult"}  # nobody else calls these classes


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - MADE_BY_LBS))
def test_docstring_names_every_argument(name: str) -> None:
    """As `docs/docstrings.py` reads it: each stands before a colon, alone or in a list. One alone needs no words."""
    told = inspect.getdoc(PUBLIC[name]) or ""
    arguments = list(inspect.signature(PUBLIC[name]).parameters)
    gone = [argument for argument in arguments if not _is_told(argument, told)]
    assert len(arguments) == 1 or not gone, f"{name} does not say what {', '.join(gone)} is"


def _is_told(argument: str, told: str) -> bool:
    return re.search(rf"(?:^|[\s,]){argument}(?:, \w+)*:\s", told) is not None


@pytest.mark.parametrize("name", sorted(name for name, value in PUBLIC.items() if inspect.isfunction(value)))
def test_docstring_says_what_is_raised(name: str) -> None:
    assert "Raises" in (inspect.getdoc(PUBLIC[name]) or "") or name in RAISES_NOTHING


RAISES_NOTHING = {"lbs.search.conversion_report", "lbs.search.parameter_groups"}
