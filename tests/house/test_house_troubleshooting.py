"""docs/troubleshooting.md: every class of error that a user can meet, with messages that the sources hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lbs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^\((\w+)\)=\n## `\1`\n(.*?)(?=^\(|^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def classes() -> set[str]:
    """Names of the public classes of the family, read from the sources: not every module can be imported."""
    bases: dict[str, set[str]] = {}
    for path in python():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    family = {"LbsError"}
    while grown := {name for name, above in bases.items() if above & family} - family:
        family |= grown
    return {name for name in family if not name.startswith("_")}


def python() -> Iterator[Path]:
    return (path for folder in ("lbs", "lbs_kernels") for path in (ROOT / folder).rglob("*.py"))


def sources() -> str:
    """All string pieces of the project's Python, without the quotes between pieces that follow one another."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in python())
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_class_has_its_section() -> None:
    assert set(SECTIONS) == classes()
    assert set(SECTIONS) >= set(lbs.errors.__all__)


@pytest.mark.parametrize("name", SECTIONS)
def test_messages_are_those_of_the_sources(name: str) -> None:
    """What stands between the dots stands in a message, word by word."""
    text = sources()
    for message in re.findall(r"^\| `([^|]*)` \|", SECTIONS[name], re.MULTILINE):
        pieces = [piece.strip(" ,;()") for piece in re.split(r"…|torch\.float64", message)]
        gone = [piece for piece in pieces if piece and piece not in text]
        assert not gone, (message, gone)
