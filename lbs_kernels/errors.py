"""The error family: every message says what was wrong, the value, the rule and the way out."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with what would move a terminal's cursor, or be hidden in a page, spelled out. Lines and tabs stay.

    >>> print(printable("a\x1b[2J\u202eb"))
    a\\x1b[2J\\u202eb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class LbsError(Exception):
    """Base of every error this project raises on purpose. Names out of files stand in it as `printable` shows them."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(value) if isinstance(value, str) else value for value in args))


class FormatError(LbsError, ValueError):
    """Codes, planes or a program break the rules of the format.

    `rule`: of a program, the name of the rule in `program/rules.py`; else empty.
    """

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class ShapeError(LbsError, ValueError):
    """A tensor of another shape, dtype or device than the packed layer was made for."""


class CheckpointError(LbsError, ValueError):
    """A file that is truncated, damaged, foreign, newer, or claims more than it holds."""


class PlanError(LbsError, ValueError):
    """A plan, bit chain or budget that cannot be applied to the model."""


class GraphError(LbsError, ValueError):
    """A model that cannot be traced, converted or packed, or a packed one whose float parts fail on images."""


class TrainingError(LbsError, RuntimeError):
    """Training cannot go on: not a number, or a run folder of another configuration."""


class BackendError(LbsError, RuntimeError):
    """A back end the user named is missing or cannot serve the problem."""


class DataError(LbsError, ValueError):
    """A data set that is missing, damaged, or of another shape than the format says."""


def raise_together(errors: list[LbsError]) -> None:
    """Raise what several layers have to say as one error: a line for each, of the kind of the first. None is fine."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise type(errors[0])("\n".join(map(str, errors)))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing.

    >>> first_line(ValueError("one\\ntwo")), first_line(AssertionError())
    ('one', 'AssertionError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
