"""The JSON text of a program: read strictly, then refuse everything a back end could not run safely.

A text may come from a file of unknown origin. Nothing is allocated from its numbers here, and a program that passes
`validate` reads and writes inside its arrays and tensors only.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from lbs_kernels.errors import FormatError
from lbs_kernels.program.checks import check_program
from lbs_kernels.program.steps import PROGRAM_VERSION, STEP_TYPES, Program, Step

MAX_TEXT = 1 << 26  # characters; a ResNet-50 has about 10^5


def read_program(text: str, blob_bytes: int | None = None) -> Program:
    """Parse and validate a program.

    Args:
        text: what `Program.to_json` writes. Unknown, missing and repeated keys are refused.
        blob_bytes: size of the blob the program belongs to, if known; every array must lie inside.

    Raises:
        FormatError: names the place (`steps[3].emit.low`), the value and the rule.
    """
    if len(text) > MAX_TEXT:
        raise FormatError(f"program text has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        body = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"program text is not JSON: {error}; write it with Program.to_json") from error
    if not isinstance(body, dict):
        raise FormatError(f"program text is a JSON {type(body).__name__}; expected an object")
    version = body.get("version")
    if type(version) is not int or not 1 <= version <= PROGRAM_VERSION:
        raise FormatError(
            f"program has version {version!r}; this library reads 1 to {PROGRAM_VERSION}, update it or pack again"
        )
    program = _convert(body, Program, "program")
    validate(program, blob_bytes)
    return program


def validate(program: Program, blob_bytes: int | None = None) -> None:
    """Refuse a program that breaks the rules of a program; program/checks.py has the list.

    Raises:
        FormatError: what, where, the value and the rule.
    """
    check_program(program, blob_bytes)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"program text repeats the key {repeated!r} in one object; keys are unique")
    return result


def _refuse_constant(name: str) -> float:
    raise FormatError(f"program text holds {name}; numbers are finite")


def _convert(value: Any, kind: Any, place: str) -> Any:
    """`value` (parsed JSON) as an instance of the annotation `kind`, or FormatError naming `place`."""
    if kind is Step:
        return _convert_step(value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in arguments if a is not types.NoneType), place)
    if origin is typing.Literal:
        if value not in arguments:
            raise FormatError(f"{place} is {value!r}; expected one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, place)
    if origin is dict:
        _expect(value, dict, place)
        return {key: _convert(item, arguments[1], f"{place}[{key!r}]") for key, item in value.items()}
    if is_dataclass(kind):
        return _convert_fields(value, kind, place)  # type: ignore[arg-type]
    if kind is float:
        return _convert_float(value, place)
    if type(value) is not kind:  # exact: True is not an int here
        raise FormatError(f"{place} is {value!r}; expected {kind.__name__}")
    return value


def _convert_float(value: Any, place: str) -> float:
    if type(value) not in (int, float):
        raise FormatError(f"{place} is {value!r}; expected a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise FormatError(f"{place} is beyond the range of a float; numbers are finite") from error
    if not math.isfinite(number):  # 1e999 parses as infinity
        raise FormatError(f"{place} is {number}; numbers are finite")
    return number


def _convert_tuple(value: Any, arguments: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    _expect(value, list, place)
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise FormatError(f"{place} has {len(value)} items; expected {len(kinds)}")
    return tuple(_convert(item, kind, f"{place}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _convert_step(value: Any, place: str) -> Any:
    _expect(value, dict, place)
    op = value.get("op")
    if not isinstance(op, str) or op not in STEP_TYPES:
        raise FormatError(f"{place}.op is {op!r}; this library runs {', '.join(sorted(STEP_TYPES))}")
    return _convert_fields({key: item for key, item in value.items() if key != "op"}, STEP_TYPES[op], place)


def _convert_fields(value: Any, kind: type, place: str) -> Any:
    _expect(value, dict, place)
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            raise FormatError(f"{place} has an unknown key {key!r}; {kind.__name__} has {', '.join(known)}")
    hints = _hints(kind)
    converted = {}
    for name, field in known.items():
        if name in value:
            converted[name] = _convert(value[name], hints[name], f"{place}.{name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FormatError(f"{place} lacks the key {name!r}")
    return kind(**converted)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(value: Any, kind: type, place: str) -> None:
    if not isinstance(value, kind):
        raise FormatError(f"{place} is a JSON {type(value).__name__}; expected a {kind.__name__}")
