"""The records of a program's JSON as data, read off the dataclasses, and the headers that hand them to C++.

`program/text.py` reads by these tables and `csrc/program/conform.cpp` by the same ones:

    python -m lbs_kernels.program.schema     writes HEADERS below the folder it is called from

A test compares the headers with what would be written.
"""

from __future__ import annotations

import enum
import functools
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lbs_kernels.program import planes, rules, steps


class Kind(enum.Enum):
    """What one value is."""

    INT = "Int"
    NUMBER = "Number"
    BOOL = "Bool"
    TEXT = "Text"
    CHOICE = "Choice"
    RECORD = "Record"
    STEP = "Step"  # a record chosen by its `op`


class Count(enum.Enum):
    """How many values a field has."""

    ONE = "One"
    PAIR = "Pair"
    LIST = "List"
    MAP = "Map"  # by keys that are free


_PLAIN = {int: Kind.INT, float: Kind.NUMBER, bool: Kind.BOOL, str: Kind.TEXT}


@dataclass(frozen=True)
class Field:
    """One key of a record."""

    name: str
    kind: Kind
    count: Count = Count.ONE
    nullable: bool = False
    default: str | None = None  # JSON text; None where the key is required
    choices: tuple[str, ...] = ()
    record: Record | None = None


@dataclass(frozen=True)
class Record:
    """One kind of object."""

    made: type
    fields: dict[str, Field]


@functools.cache
def record(made: type) -> Record:
    """The record of a dataclass: its fields in their order, with the types and defaults it declares."""
    hints = typing.get_type_hints(made)
    return Record(made, {f.name: _field(f.name, hints[f.name], _default(f)) for f in fields(made)})


def _default(field: Any) -> str | None:
    if field.name == "version":
        return None  # a reader must know before it reads anything else
    if field.default_factory is not MISSING:
        return json.dumps(field.default_factory())
    return None if field.default is MISSING else json.dumps(field.default)


def _field(name: str, hint: Any, default: str | None) -> Field:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    count, nullable = Count.ONE, False
    if origin is tuple:
        count = Count.LIST if arguments[-1] is Ellipsis else Count.PAIR
        hint = arguments[0]
        if count is Count.PAIR and arguments != (hint, hint):
            raise TypeError(f"{name} is {arguments}; a tuple is a pair of equal types or a list")
    elif origin is dict:
        count, hint = Count.MAP, arguments[1]
    elif origin in (types.UnionType, typing.Union) and types.NoneType in arguments:
        nullable, (hint,) = True, [a for a in arguments if a is not types.NoneType]
    if hint is steps.Step:
        return Field(name, Kind.STEP, count, nullable, default)
    if typing.get_origin(hint) is typing.Literal:
        return Field(name, Kind.CHOICE, count, nullable, default, choices=typing.get_args(hint))
    if is_dataclass(hint):
        return Field(name, Kind.RECORD, count, nullable, default, record=record(typing.cast(type, hint)))
    return Field(name, _PLAIN[hint], count, nullable, default)


# Read by C++ as csrc/common/format.h.
CONSTANTS = (
    ("int", "kWord", planes.WORD, "channels in one plane word"),
    ("int", "kFormatVersion", planes.FORMAT_VERSION, "planes"),
    ("int", "kProgramVersion", steps.PROGRAM_VERSION, "program text"),
    ("int", "kBlobAlignment", steps.BLOB_ALIGNMENT, "bytes"),
    ("int", "kMaxBits", planes.MAX_BITS, "of a code"),
    ("int64_t", "kMaxText", rules.MAX_TEXT, "characters of a program text"),
    ("int", "kMaxDepth", rules.MAX_DEPTH, "lists and objects inside one another"),
    ("int", "kMaxDigits", rules.MAX_DIGITS, "of a whole number"),
    ("int64_t", "kMaxCount", rules.MAX_COUNT, "tensors, steps, arrays"),
    ("int64_t", "kMaxSize", rules.MAX_SIZE, "one dimension"),
    ("int64_t", "kMaxElements", rules.MAX_ELEMENTS, "one tensor of one image, padding included"),
    ("int64_t", "kMaxName", rules.MAX_NAME, "characters"),
)
_NOTICE = "// Written by `python -m lbs_kernels.program.schema`; change what it reads and run it again."


def format_header() -> str:
    """csrc/common/format.h: the constants of the plane and program format."""
    lines = [_NOTICE, "#pragma once", "", "#include <cstdint>", "", "namespace lbs {", ""]
    lines += [f"constexpr {kind} {name} = {value};  // {comment}" for kind, name, value, comment in CONSTANTS]
    return "\n".join([*lines, "", "}  // namespace lbs", ""])


def rules_header() -> str:
    """csrc/common/rules.h: the names of the rules."""
    lines = [_NOTICE, "#pragma once", "", "namespace lbs {", "namespace rule {", ""]
    for name, words in rules.RULES.items():
        lines += [f"// {words}", f'constexpr char {_constant(name)}[] = "{name}";']
    return "\n".join([*lines, "", "}  // namespace rule", "}  // namespace lbs", ""])


def schema_header() -> str:
    """csrc/program/schema.h: the records, and which characters names do not have."""
    lines = [
        _NOTICE,
        "#pragma once",
        "",
        '#include "program/record.h"',
        "",
        "namespace lbs {",
        "namespace schema {",
        "",
    ]
    lines += ["constexpr CodePoints kNotPrintable[] = {"]
    lines += [f"    {{0x{first:x}, 0x{last:x}}}," for first, last in rules.NOT_PRINTABLE]
    lines += ["};", ""]
    for one in _below(record(steps.Program)):
        lines += _record_lines(one)
    lines += ["// By their op.", "constexpr StepRecord kSteps[] = {"]
    lines += [f'    {{"{op}", &{_constant(made.__name__)}}},' for op, made in steps.STEP_TYPES.items()]
    return "\n".join([*lines, "};", "", "}  // namespace schema", "}  // namespace lbs", ""])


def _below(top: Record) -> list[Record]:
    """All records that `top` is made of, each after those it refers to."""

    def walk(one: Record) -> Iterator[Record]:
        for field in one.fields.values():
            inner = [record(made) for made in steps.STEP_TYPES.values()] if field.kind is Kind.STEP else [field.record]
            for other in filter(None, inner):
                yield from walk(other)
        yield one

    return list({id(one): one for one in walk(top)}.values())


def _record_lines(one: Record) -> list[str]:
    name = _constant(one.made.__name__)
    lines = [
        f"constexpr const char* {name}_{field.name}[] = {{{', '.join(map(json.dumps, field.choices))}, nullptr}};"
        for field in one.fields.values()
        if field.choices
    ]
    lines += [f"constexpr Field {name}Fields[] = {{"]
    for field in one.fields.values():
        words = [
            json.dumps(field.name),
            f"Kind::k{field.kind.value}",
            f"Count::k{field.count.value}",
            "true" if field.nullable else "false",
            "nullptr" if field.default is None else json.dumps(field.default),
            f"{name}_{field.name}" if field.choices else "nullptr",
            "nullptr" if field.record is None else f"&{_constant(field.record.made.__name__)}",
        ]
        lines += [f"    {{{', '.join(words)}}},"]
    return [*lines, "};", f'constexpr Record {name} = {{"{one.made.__name__}", {name}Fields, {len(one.fields)}}};', ""]


def _constant(name: str) -> str:
    """
    >>> _constant("read-unwritten"), _constant("ConvStep")
    ('kReadUnwritten', 'kConvStep')
    """
    return "k" + "".join(word[:1].upper() + word[1:] for word in name.split("-"))


HEADERS = {
    "csrc/common/format.h": format_header,
    "csrc/common/rules.h": rules_header,
    "csrc/program/schema.h": schema_header,
}

if __name__ == "__main__":
    for path, text in HEADERS.items():
        Path(path).write_text(text())
