"""The JSON text of a program: read strictly, then refuse everything a back end could not run safely.

A text may come from a file of unknown origin. Nothing is allocated from its numbers here, and a program that passes
`check_program` reads and writes inside its arrays and tensors only. `csrc/program/conform.cpp` reads by the same tables
in the same order.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from lbs_kernels.errors import FormatError
from lbs_kernels.program.checks import check_program
from lbs_kernels.program.rules import MAX_DEPTH, MAX_TEXT
from lbs_kernels.program.schema import Count, Field, Kind, Record, record
from lbs_kernels.program.steps import PROGRAM_VERSION, STEP_TYPES, Program

_ESCAPES = re.compile(r"\\.", re.DOTALL)
_MARKS = re.compile(r'"[^"]*"?|[\[\]{}]')  # strings without escapes, and what opens and closes
_TYPES: dict[Kind, type] = {Kind.INT: int, Kind.BOOL: bool, Kind.TEXT: str}


def read_program(text: str, blob_bytes: int | None = None) -> Program:
    """Parse and validate a program.

    Args:
        text: what `Program.to_json` writes. Unknown, missing and repeated keys are refused.
        blob_bytes: size of the blob the program belongs to, if known; every array must lie inside.

    Raises:
        FormatError: names the place (`steps[3].emit.low`), the value and the rule.
    """
    body = parse_json(text, "program text")
    if not isinstance(body, dict):
        raise FormatError(f"program text is a JSON {type(body).__name__}; expected an object", "type")
    version = body.get("version")
    if type(version) is not int or not 1 <= version <= PROGRAM_VERSION:
        raise FormatError(
            f"program has version {version!r}; this library reads 1 to {PROGRAM_VERSION}, update it or pack again",
            "version",
        )
    program: Program = _read_record(body, record(Program), "program")
    check_program(program, blob_bytes)
    return program


def parse_json(text: str, what: str) -> Any:
    """The value of a text that readers in every language take alike: JSON of RFC 8259, its keys unique, its lists and
    objects at most MAX_DEPTH inside one another.

    Args:
        what: the text is, in words of an error.

    Raises:
        FormatError: another text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys: set[str] = set()
            repeated = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{what} repeats the key {repeated!r} in one object; keys are unique", "repeated-key")
        return result

    def refuse_constant(name: str) -> float:
        raise FormatError(f"{what} holds {name}; numbers are finite", "json")

    if len(text) > MAX_TEXT:
        raise FormatError(f"{what} has {len(text)} characters; at most {MAX_TEXT} are read", "text-size")
    deep = _too_deep(text)
    try:
        text.encode()
        # Up to there, so that what is wrong before it is told first; what is cut is never whole.
        return json.loads(text[:deep], object_pairs_hook=unique, parse_constant=refuse_constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        if deep is not None and getattr(error, "pos", None) == deep:
            raise FormatError(
                f"{what} is not JSON: nested too deeply at character {deep}; at most {MAX_DEPTH} lists and objects lie "
                "inside one another",
                "json",
            ) from error
        raise FormatError(f"{what} is not JSON: {error}; it is damaged, write it again", "json") from error


def _too_deep(text: str) -> int | None:
    """Where the first list or object begins that lies in MAX_DEPTH others."""
    depth = 0
    for mark in _MARKS.finditer(_ESCAPES.sub("__", text)):  # as long as before
        if mark[0] in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                return mark.start()
        elif mark[0] in ("]", "}"):
            depth -= 1
    return None


def _read_record(value: Any, kind: Record, place: str) -> Any:
    _expect(value, dict, place)
    for key in value:
        if key not in kind.fields:
            raise FormatError(
                f"{place} has an unknown key {key!r}; {kind.made.__name__} has {', '.join(kind.fields)}", "unknown-key"
            )
    read = {}
    for name, field in kind.fields.items():
        if name in value:
            read[name] = _read_field(value[name], field, f"{place}.{name}")
        elif field.default is None:
            raise FormatError(f"{place} lacks the key {name!r}", "missing-key")
    return kind.made(**read)


def _read_field(value: Any, field: Field, place: str) -> Any:
    if value is None and field.nullable:
        return None
    if field.count is Count.ONE:
        return _read_one(value, field, place)
    if field.count is Count.MAP:
        _expect(value, dict, place)
        return {key: _read_one(item, field, f"{place}[{key!r}]") for key, item in value.items()}
    _expect(value, list, place)
    if field.count is Count.PAIR and len(value) != 2:
        raise FormatError(f"{place} has {len(value)} items; expected 2", "items")
    return tuple(_read_one(item, field, f"{place}[{i}]") for i, item in enumerate(value))


def _read_one(value: Any, field: Field, place: str) -> Any:
    if field.record is not None:
        return _read_record(value, field.record, place)
    if field.kind is Kind.STEP:
        return _read_step(value, place)
    if field.kind is Kind.NUMBER:
        return _read_number(value, place)
    if field.kind is Kind.CHOICE:
        if value not in field.choices:
            raise FormatError(f"{place} is {value!r}; expected one of {', '.join(field.choices)}", "choice")
        return value
    if type(value) is not _TYPES[field.kind]:  # exact: True is not an int here
        raise FormatError(f"{place} is {value!r}; expected {_TYPES[field.kind].__name__}", "type")
    return value


def _read_number(value: Any, place: str) -> float:
    if type(value) not in (int, float):
        raise FormatError(f"{place} is {value!r}; expected a number", "type")
    try:
        number = float(value)
    except OverflowError as error:
        raise FormatError(f"{place} is beyond the range of a float; numbers are finite", "finite") from error
    if not math.isfinite(number):  # 1e999 parses as infinity
        raise FormatError(f"{place} is {number}; numbers are finite", "finite")
    return number


def _read_step(value: Any, place: str) -> Any:
    _expect(value, dict, place)
    op = value.get("op")
    if not isinstance(op, str) or op not in STEP_TYPES:
        raise FormatError(f"{place}.op is {op!r}; this library runs {', '.join(sorted(STEP_TYPES))}", "op")
    return _read_record({key: item for key, item in value.items() if key != "op"}, record(STEP_TYPES[op]), place)


def _expect(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind):
        raise FormatError(f"{place} is a JSON {type(value).__name__}; expected a {kind.__name__}", "type")
