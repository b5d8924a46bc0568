"""Errors speak of arguments by their Python names; the command line makes options of those it has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def texts_of(raised: ast.Raise) -> str:
    """The constant words of an error."""
    return "".join(
        node.value for node in ast.walk(raised) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_no_error_below_the_command_line_names_an_option_of_an_unnamed_command() -> None:
    seen, odd = 0, []
    for path in [*ROOT.glob("lbs/**/*.py"), *ROOT.glob("lbs_kernels/**/*.py")]:
        if path.is_relative_to(ROOT / "lbs" / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                seen += 1
                words = texts_of(node)
                if (
                    re.search(r"--[a-z]", words)
                    and not re.search(r"lbs [a-z]+ ", words)
                    and "_command(" not in ast.unparse(node)
                ):
                    odd.append(f"{path.relative_to(ROOT)}:{node.lineno}: {words}")
    assert seen > 300
    assert odd == []
