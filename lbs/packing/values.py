"""Arguments of a graph as JSON values, and back. Objects have one entry, which says what they stand for.

{"node": name}  {"tuple": [...]}  {"list": [...]}  {"slice": [start, stop, step]}
{"dict": {text: value}}  {"items": [[key, value], ...]}      keys that are texts, keys of any kind
{"float": "inf"}  {"dtype": "float32"}  {"device": "cpu"}  {"memory_format": "channels_last"}  {"ellipsis": null}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from lbs.packing.vocabulary import DTYPE_NAMES, DTYPES, MEMORY_FORMAT_NAMES, MEMORY_FORMATS
from lbs_kernels.errors import CheckpointError

_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class NoForm(Exception):
    """A value that JSON has no form for; the message says what it is."""


def encode(value: Any) -> Any:
    """The JSON value of an argument. Raises NoForm."""
    if value is None or isinstance(value, bool | int | str):
        return value
    for kinds, form in _FORMS:
        if isinstance(value, kinds):
            return form(value)
    raise NoForm(f"has an argument {value!r}")


def _dict(value: Mapping[Any, Any]) -> Any:
    if all(type(key) is str for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    return {"items": [[encode(key), encode(item)] for key, item in value.items()]}


_FORMS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (fx.Node, lambda node: {"node": node.name}),
    (float, lambda number: number if math.isfinite(number) else {"float": str(number)}),
    (tuple, lambda items: {"tuple": [encode(item) for item in items]}),
    (list, lambda items: {"list": [encode(item) for item in items]}),
    (Mapping, _dict),
    (slice, lambda s: {"slice": [encode(item) for item in (s.start, s.stop, s.step)]}),
    (torch.dtype, lambda dtype: {"dtype": _named(dtype, DTYPE_NAMES)}),
    (torch.memory_format, lambda form: {"memory_format": _named(form, MEMORY_FORMAT_NAMES)}),
    (torch.device, lambda device: {"device": str(device)}),
    (type(...), lambda dots: {"ellipsis": None}),
)


def _named(value: Any, names: Mapping[Any, str]) -> str:
    if value not in names:
        raise NoForm(f"has an argument {value!r}")
    return names[value]


def decode(value: Any, made: Mapping[str, fx.Node]) -> Any:
    """The argument of a JSON value.

    Args:
        made: nodes by name.

    Raises:
        CheckpointError: no value that `encode` writes.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise CheckpointError(f"the file's graph holds {type(value).__name__} where a value belongs; it is damaged")
    ((kind, body),) = value.items()
    if kind not in _READERS:
        raise CheckpointError(f"the file's graph holds a value of kind {kind!r}, which this release does not know")
    return _READERS[kind](body, made)


def _items(body: Any, made: Mapping[str, fx.Node]) -> dict[Any, Any]:
    found = {decode(key, {}): decode(item, made) for key, item in body}
    if len(found) != len(body):
        raise CheckpointError("the file's graph holds a key twice; it is damaged")
    return found


def _several(body: Any, made: Mapping[str, fx.Node]) -> list[Any]:
    return [decode(item, made) for item in body]


_READERS: dict[str, Callable[[Any, Mapping[str, fx.Node]], Any]] = {
    "node": lambda body, made: made[body],
    "float": lambda body, made: _FLOATS[body],
    "tuple": lambda body, made: tuple(_several(body, made)),
    "list": _several,
    "dict": lambda body, made: {key: decode(item, made) for key, item in body.items()},
    "items": _items,
    "slice": lambda body, made: slice(*_several(body, made)),
    "dtype": lambda body, made: DTYPES[body],
    "memory_format": lambda body, made: MEMORY_FORMATS[body],
    "device": lambda body, made: torch.device(body),
    "ellipsis": lambda body, made: ...,
}
