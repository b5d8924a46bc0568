"""docs/troubleshooting.md: every class of error that a user can meet, with messages that the sources hold."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import lbs
import lbs_kernels
from lbs.errors import LbsError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^\((\w+)\)=\n## `\1`\n(.*?)(?=^\(|^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
NEEDED = re.compile(r"gpu|triton|cuda")  # modules that need packages which not every machine has define no errors


def classes(kind: type[LbsError] = LbsError) -> set[str]:
    """Names of the public classes of the family, of every module that can be imported here."""
    for package in (lbs, lbs_kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not NEEDED.search(module.name) and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return {kind.__name__, *(name for child in kind.__subclasses__() for name in _names(child))}


def _names(kind: type[LbsError]) -> set[str]:
    found = {name for child in kind.__subclasses__() for name in _names(child)}
    return found if kind.__name__.startswith("_") else {kind.__name__, *found}


def sources() -> str:
    """All string pieces of the project's Python, without the quotes between pieces that follow one another."""
    text = "\n".join(path.read_text() for folder in ("lbs", "lbs_kernels") for path in (ROOT / folder).rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_class_has_its_section() -> None:
    assert set(SECTIONS) == classes()


@pytest.mark.parametrize("name", SECTIONS)
def test_messages_are_those_of_the_sources(name: str) -> None:
    """What stands between the dots stands in a message, word by word."""
    text = sources()
    for message in re.findall(r"^\| `([^|]*)` \|", SECTIONS[name], re.MULTILINE):
        pieces = [piece.strip(" ,;()") for piece in re.split(r"…|torch\.float64", message)]
        gone = [piece for piece in pieces if piece and piece not in text]
        assert not gone, (message, gone)


def test_no_module_that_is_skipped_defines_an_error() -> None:
    for folder in ("lbs", "lbs_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            if NEEDED.search(path.relative_to(ROOT).as_posix()):
                assert not re.search(r"^class \w+\(\w*Error", path.read_text(), re.MULTILINE), path
