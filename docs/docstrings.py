"""The house's docstrings as reStructuredText: a Sphinx extension.

A docstring is a sentence, paragraphs, and sections `Arguments:`, `Returns:`, `Raises:`, `Example:`, `Source:`. Several
arguments may share a line ("bits: ... bops: ..."), which no reader of docstrings knows; names of the signature tell
them apart here. Everything that is no code in backticks is text: a star or a bar is a star or a bar.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

SECTIONS = {"Arguments": "Arguments", "Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
_SECTION = re.compile(rf"({'|'.join([*SECTIONS, 'Example', 'Source'])}):$")
_ERRORS = re.compile(r"(?:^|(?<=[.;] ))((?:\w+Error)(?:, \w+Error)*): ")


def inline(text: str) -> str:
    """One piece of text: code in double backticks, and no markup elsewhere.

    >>> inline("`x` times *y*, see name_")
    '``x`` times \\\\*y\\\\*, see name\\\\_'
    """
    parts = text.split("`")
    words = [re.sub(r"([\\*|]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(words, [*code, ""], strict=False)) if len(parts) % 2 else text


def entries(text: str, names: frozenset[str]) -> list[tuple[str, str]]:
    """(names, what is said of them) of a section's text; the first may have no name.

    >>> entries("a: one. b, c: two; nothing: more.", frozenset("abc"))
    [('a', 'one.'), ('b, c', 'two; nothing: more.')]
    """
    if names:
        known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        marks = list(re.finditer(rf"(?:^|(?<=[.;] ))((?:{known})(?:, (?:{known}))*): ", text))
    else:
        marks = list(_ERRORS.finditer(text))
    if not marks:
        return [("", text)]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    found = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    return [("", text[: marks[0].start()].strip()), *found] if marks[0].start() else found


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def converted(lines: list[str], names: frozenset[str]) -> list[str]:
    """A docstring's lines in reStructuredText."""
    told: list[str] = []
    section = ""
    for block in blocks(lines):
        head = _SECTION.match(block[0])
        if head and len(block) > 1:
            section, block = head[1], block[1:]
        elif not block[0].startswith(" "):
            section = ""
        told += _block(block, section, names)
    return told


def _block(block: list[str], section: str, names: frozenset[str]) -> list[str]:
    if block[0].lstrip().startswith(">>>"):
        return [*block, ""]
    if section in SECTIONS:
        text = " ".join(line.strip() for line in block)
        found = entries(text, names if SECTIONS[section] == "Arguments" else frozenset())
        rows = [f"- ``{name}``: {inline(said)}" if name else f"- {inline(said)}" for name, said in found]
        return [f"**{SECTIONS[section]}**", "", *rows, ""]
    if section == "Example" or (block[0].startswith("    ") and section != "Source"):
        margin = min(len(line) - len(line.lstrip()) for line in block)
        language = "python" if section == "Example" else "text"
        return [f".. code-block:: {language}", "", *("    " + line[margin:] for line in block), ""]
    text = " ".join(line.strip() for line in block)
    if section == "Source":
        return [f"**Source**: {inline(text)}", ""]
    found = entries(text, names) if names else []
    if len(found) > 1 and found[0][0]:  # fields of a dataclass, in a paragraph of their own
        return [*(f"- ``{name}``: {inline(said)}" for name, said in found), ""]
    return [inline(text), ""]


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event `autodoc-process-docstring`: `lines` are changed in place."""
    function = getattr(obj, "__init__", obj) if inspect.isclass(obj) else obj
    try:
        names = frozenset(inspect.signature(function).parameters) - {"self"}
    except (TypeError, ValueError):  # a module, a property
        names = frozenset()
    lines[:] = converted(lines, names)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
