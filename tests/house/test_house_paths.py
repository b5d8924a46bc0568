"""Files and modules of the project that a page, a comment or a docstring names are there, wherever files move."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lbs", "lbs_kernels", "csrc", "tests", "benchmarks", "docs", "examples", "tools")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml", "setup.py")
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")
# Made by building, or by whoever ships measured times.
MADE = ("lbs_kernels/_build_report.json", "lbs_kernels/_cpu", "lbs_kernels/_cuda", "lbs_kernels/tuning")
MADE += ("lbs_kernels/liblbs.so", "lbs_kernels/lbs.h")
FOREIGN = ("WGMMAPipeline.cpp",)  # files of other projects
INVENTED = "shuffle"  # CONTRIBUTING.md adds an operation of this name; its files go where those of the others are

# A word may hold * <op> {op}, which stand for any name, and {a, b}, which stands for both.
_WORD = re.compile(r"(?:[\w./*<>~$-]|\{[\w*, ]+\})+")
_ANY = re.compile(rf"<\w+>|\{{\w+\}}|{INVENTED}")
_SEVERAL = re.compile(r"\{([^{}]*)\}")
_MODULE = re.compile(r"(?:lbs|lbs_kernels)(?:\.(?:\w+|\*))+")
# Of Python, docstrings and comments; a text in three quotes that something is done with is neither.
# Imports are read besides: those of a text that another process runs nothing else looks at.
_IMPORT = re.compile(r"from ((?:lbs|lbs_kernels)[\w.]*) import ([\w, ]+)")
_PYTHON = re.compile(r'(^[ \t]*r?)?"""(.*?)"""|(?:^|\s)# ([^\n]*)', re.DOTALL | re.MULTILINE)


@cache
def tree() -> frozenset[str]:
    """Files and folders by their path from the root, and by every end of it: texts name a file as its neighbours do."""
    here = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    paths = [*FOLDERS, *PAGES, *MADE, *(path.relative_to(ROOT).as_posix() for path in here if path.suffix != ".pyc")]
    parts = [path.split("/") for path in paths]
    return frozenset("/".join(path[first:]) for path in parts for first in range(len(path)))


@cache
def is_file(name: str) -> bool:
    return name in tree() or ("*" in name and any(fnmatchcase(path, name) for path in tree()))


@cache
def is_module(name: str) -> bool:
    """A module, or a name that the text of the module it is said to be of knows."""
    owner, _, last = name.replace(".", "/").rpartition("/")
    if is_file(f"{owner}/{last}") or is_file(f"{owner}/{last}.py"):
        return True
    for source in (ROOT / f"{owner}.py", ROOT / owner / "__init__.py"):
        if source.exists():
            return re.search(rf"\b{last}\b", source.read_text(encoding="utf-8")) is not None
    return "*" not in name and "/" in owner and is_module(owner)  # lbs.Plan.bops


def spelled_out(word: str) -> list[str]:
    word = _ANY.sub("*", word)
    several = _SEVERAL.search(word)
    if several is None:
        return [word]
    choices = several[1].split(",")
    return [one for choice in choices for one in spelled_out(word.replace(several[0], choice.strip(), 1))]


def missing(text: str) -> list[str]:
    """Words of `text` that name a file or a module of the project which is not there."""
    gone = []
    for word in {word.rstrip("./-") for word in _WORD.findall(text) if "/" in word or "." in word}:
        if word.startswith(("/", "~", "$")) or word in FOREIGN:
            continue
        for name in spelled_out(word):
            is_path = ("/" in name and name.split("/")[0] in FOLDERS) or name.endswith(SOURCES)
            is_name = not is_path and "__" not in name and _MODULE.fullmatch(name)  # lbs.h is a file, __path__ Python's
            if (is_path and not is_file(name)) or (is_name and not is_module(name)):
                gone.append(word)
    return sorted(set(gone))


def comments(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = _PYTHON.finditer(text)
        imports = [f"{owner}.{name.split()[0]}" for owner, names in _IMPORT.findall(text) for name in names.split(",")]
        return "\n".join([*(one[3] or one[2] for one in found if one[3] or one[1] is not None), *imports])
    return "\n".join(line.partition("//")[2] for line in text.splitlines())


def texts() -> Iterator[tuple[Path, str]]:
    for path in [*(ROOT / page for page in PAGES), *(ROOT / "docs").glob("*.md")]:
        if path.suffix != ".py":
            yield path, path.read_text(encoding="utf-8")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCES:
                yield path, comments(path)
    yield ROOT / "setup.py", comments(ROOT / "setup.py")


def test_what_texts_name_is_there() -> None:
    gone = {path: names for path, text in texts() if (names := missing(text))}
    assert not gone, "\n".join(f"{path.relative_to(ROOT)}: {', '.join(names)}" for path, names in gone.items())


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("`lbs/plan.py`, [gpu](docs/gpu.md), ~/lbs/nowhere.py and program/plan.h (both at load).", []),
        (
            "lbs/plan: csrc/program/nowhere.h; docs/nowhere.md",
            ["csrc/program/nowhere.h", "docs/nowhere.md", "lbs/plan"],
        ),
        ("See nowhere.py, and program/nowhere.h.", ["nowhere.py", "program/nowhere.h"]),
        ("lbs_kernels/{tuner, nowhere}.py", ["lbs_kernels/{tuner, nowhere}.py"]),
        ("lbs_kernels/<part>/reference.py, <part>/table.py, lbs/cli/*.py, lbs_kernels.{part}.table", []),
        ("lbs_kernels.*.nowhere_impl, <op>/nowhere_impl.py", ["<op>/nowhere_impl.py", "lbs_kernels.*.nowhere_impl"]),
        ("lbs.plan.Plan.bops, lbs.calibrate, x.lbs.safetensors, torch.ops.lbs_kernels.nowhere", []),
        ("lbs.plan.nowhere, lbs.nowhere.Plan, lbs.nowhere", ["lbs.nowhere", "lbs.nowhere.Plan", "lbs.plan.nowhere"]),
    ],
)
def test_what_counts_as_a_name(text: str, gone: list[str]) -> None:
    assert missing(text) == gone
