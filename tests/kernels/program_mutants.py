"""Programs with something changed at random: fields of every record, keys, numbers, bytes of the text.

A mutant is the text of a program as bytes, which need not be UTF-8, and a blob that may be damaged too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from programs import CASES, random_program
from torch import Tensor

from lbs_kernels.program.rules import MAX_COUNT, MAX_DEPTH, MAX_DIGITS, MAX_ELEMENTS, MAX_NAME, MAX_SIZE
from lbs_kernels.program.schema import Count, Field, Kind, Record, record
from lbs_kernels.program.steps import STEP_TYPES, Program

SOURCES = (
    "one_pixel",
    "chain",
    "preact_residual",
    "many_consumers",
    "byte_image",
    "depthwise",
    "imagenet_stem",
    "normed_stream",
    "weights_with_a_zero",
    "gated",
    "averaged",
    "concatenated",
    "selected_streams",
    "interpolated",
    "moved",
    "moved_streams",
    "coded_residual",
)


class Raw(str):
    """A piece of JSON text that stands for itself."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may be repeated."""


@dataclass
class Mutant:
    text: bytes
    blob: Tensor
    what: str


def dump(value: Any) -> str:
    """JSON text of a tree that may hold `Raw` and `Pairs`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{key if isinstance(key, Raw) else json.dumps(key)}:{dump(v)}" for key, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


@dataclass(frozen=True)
class Place:
    """One key of one object of a program."""

    holder: dict[str, Any]
    field: Field
    made: str


def places(body: dict[str, Any], kind: Record | None = None) -> Iterator[Place]:
    """Every field of every record in the body."""
    kind = kind or record(Program)
    for field in kind.fields.values():
        if field.name in body:
            yield Place(body, field, kind.made.__name__)
            value = body[field.name]
            items = value.values() if field.count is Count.MAP else value if isinstance(value, list) else [value]
            for item in items:
                inner = record(STEP_TYPES[item["op"]]) if field.kind is Kind.STEP else field.record
                if inner is not None and isinstance(item, dict):
                    yield from places(item, inner)


def _raw(*texts: str) -> list[Raw]:
    return [Raw(text) for text in texts]


EDGES = [0, 1, 2, 8, 16, 32, 64, 255, MAX_COUNT, MAX_SIZE, MAX_ELEMENTS, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64]
WHOLE: list[Any] = [*{sign * (edge + near) for edge in EDGES for near in (-1, 0, 1) for sign in (1, -1)}]
WHOLE += [
    10**30,
    -(10**30),
    64 * 10**40,
    Raw("9" * MAX_DIGITS),
    Raw("9" * (MAX_DIGITS + 1)),
    Raw("-" + "9" * MAX_DIGITS),
]
WHOLE += _raw("-0", "1.0", "1e0", "1E0", "1e+2", "01", "-01", "+1", "0x1", "1.", ".5", "-", "1e", "1e+", "1_0", "٣")
NUMBERS: list[Any] = [0.0, -0.0, 0.1, 0.5, -0.5, 1, 3, 16777217, 1e300, 1e-300, 3.4028234663852886e38, 5e-324]
NUMBERS += [3.4028234663852889e38, 3.4028235677973366e38, 1.401298464324817e-45, 7e-46, 1.1754943508222875e-38]
NUMBERS += _raw("1e999", "-1e999", "1e-999", "-1e-400", "0e999", "-0", "1" + "0" * 400, "0." + "0" * 400 + "1", "0.5e0")
NUMBERS += _raw(
    "1" + "0" * 400 + "e-400", "0." + "0" * 400 + "1e401", "1e99999999999999999999", "1e-99999999999999999999"
)
NUMBERS += _raw("NaN", "Infinity", "-Infinity", "nan", "inf", "1,5", "9007199254740993", "0.1e1.5", "9" * 400)
TEXTS: list[Any] = [
    "",
    "x",
    " ",
    "é",
    "😀",
    "٣",
    "a b",
    "a\x00",
    "\x01",
    "\x7f",
    "\x85",
    "\xa0",
    "\xad",
    "\u200b",
    "\u2028",
]
TEXTS += [
    "\ufeff",
    "\ue000",
    "\U000e0001",
    "\U0010ffff",
    "\ufffe",
    "a" * MAX_NAME,
    "a" * (MAX_NAME + 1),
    "é" * MAX_NAME,
]
TEXTS += [
    "😀" * MAX_NAME,
    "😀" * (MAX_NAME + 1),
    "float16",
    "bfloat16",
    "int32",
    "uint8",
    "a" * 64,
    "0" * 64,
    "0" * 64 + "\n",
]
TEXTS += _raw(
    '"😀"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\ude00\\ud83d"', '"\\ud83d\\ud83d\\ude00"', '"\\u0000"', '"\\/"'
)
TEXTS += _raw(
    '"\\x"', '"\\u12"', '"\\u 123"', '"\\ud83d\\u12"', '"\\', '"open', '"\t"', '"\x1f"', "'x'", '"\\u00e9"', "x"
)
OTHERS: list[Any] = [None, True, False, 0, 1, -1, 1.5, "1", "", [], [1], [1, 1], [1, 1, 1], {}, {"a": 1}, [[]], Raw("")]
OTHERS += _raw("tru", "nulll", "True", "[1,]", "{,}", '{"a"}', "[1 1]", '{"a":1,}', "[", "]", "{", "//x\n1", "{1:1}")
DEEP = [Raw("[" * depth + "]" * depth) for depth in (10, MAX_DEPTH - 8, MAX_DEPTH, MAX_DEPTH + 9, 5000)]
BY_KIND = {Kind.INT: WHOLE, Kind.NUMBER: NUMBERS + WHOLE, Kind.TEXT: TEXTS, Kind.CHOICE: TEXTS}


def nasty_values(field: Field, value: Any, choice: random.Random) -> list[Any]:
    """What the field may be instead of `value`."""
    plain: list[Any] = [*BY_KIND.get(field.kind, []), *field.choices]
    if type(value) is int:
        plain += [value - 1, value + 1, 2 * value, value + 64, float(value)]
    if field.count is Count.ONE:
        return [*plain, *OTHERS, *DEEP]
    if field.count is Count.PAIR:
        return [*([item, value[1]] for item in plain), *([value[0], item] for item in plain), *OTHERS, value[::-1]]
    if isinstance(value, list):
        at = choice.randrange(len(value)) if value else 0
        swapped = choice.sample(value, len(value))
        lists: list[Any] = [value[:at] + value[at + 1 :], value + value[at : at + 1], swapped, value[::-1]]
        return [*lists, *([*value[:at], item, *value[at + 1 :]] for item in (*plain, *OTHERS)), *OTHERS, *DEEP]
    return [*OTHERS, *DEEP]


def change_field(body: dict[str, Any], choice: random.Random) -> str:
    """One field of a record of one kind, all fields of all records being equally likely."""
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in places(body):
        groups.setdefault((place.made, place.field.name), []).append(place)
    key = choice.choice(list(groups))
    place = choice.choice(groups[key])
    place.holder[key[1]] = choice.choice(nasty_values(place.field, place.holder[key[1]], choice))
    return ".".join(key)


def change_keys(body: dict[str, Any], choice: random.Random) -> str:
    """A key dropped, added, repeated, or spelled with an escape."""
    parents = list({id(place.holder): place.holder for place in places(body)}.values())
    holder = choice.choice(parents)
    key = choice.choice(list(holder))
    how = choice.choice(["drop", "extra", "repeat", "escape", "shuffle"])
    if how == "drop":
        del holder[key]
    elif how == "extra":
        holder[choice.choice(["extra", "", "op", "Name", "dtype", "multiplier", "é", "\ud800"])] = choice.choice(OTHERS)
    elif how == "shuffle":
        items = choice.sample(list(holder.items()), len(holder))
        holder.clear()
        holder.update(items)
    elif holder is not body:
        spelled = Raw(f'"\\u{ord(key[0]):04x}{key[1:]}"') if key else Raw('""')
        pairs = [(spelled if name == key and how == "escape" else name, value) for name, value in holder.items()]
        twice = [(choice.choice([spelled, key]), holder[key])] if how == "repeat" else []
        _replace(body, holder, Pairs([*pairs, *twice]))
    return how


def _replace(value: Any, old: Any, new: Any) -> None:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items:
        if item is old:
            value[key] = new
        else:
            _replace(item, old, new)


def swap(body: dict[str, Any], choice: random.Random) -> str:
    """Two values of one kind exchanged: numbers of tensors, keys of arrays, steps, specs."""
    tensor_fields = ("input", "tensor", "stream", "residual", "gate")
    numbers = [(p.holder, p.field.name) for p in places(body) if p.field.name in tensor_fields]
    keys = [
        (p.holder, p.field.name) for p in places(body) if p.field.name in ("planes", "multiplier", "bias", "pre_scale")
    ]
    lists: list[tuple[Any, Any]] = [(body["steps"], i) for i in range(len(body["steps"]))]
    tensors: list[tuple[Any, Any]] = [(body["tensors"], i) for i in range(len(body["tensors"]))]
    arrays: list[tuple[Any, Any]] = [(body["arrays"], key) for key in body["arrays"]]
    group = choice.choice([numbers, keys, lists, tensors, arrays])
    (one, first), (other, second) = choice.choice(group), choice.choice(group)
    one[first], other[second] = other[second], one[first]
    return "swap"


def damage_text(text: bytes, choice: random.Random) -> bytes:
    """Cut, lengthened, or a byte of it changed."""
    at = choice.randrange(len(text))
    return choice.choice(
        [
            lambda: text[:at],
            lambda: text[:at] + bytes([choice.randrange(256)]) + text[at + 1 :],
            lambda: (
                text[:at]
                + choice.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80"])
                + text[at:]
            ),
            lambda: text[:at] + choice.choice([b" ", b"\n", b"\t", b"\r", b"\x0b", b"\x00", b"\xc2\xa0"]) + text[at:],
            lambda: choice.choice([b"\xef\xbb\xbf", b" \n", b"\x00", b"x"]) + text,
            lambda: text + choice.choice([b"\x00", b" \r\n\t", b"{}", b",", b"x", b"\xff", b"\xef\xbb\xbf"]),
        ]
    )()


_sources: dict[int, tuple[str, Tensor]] = {}


def source(number: int) -> tuple[str, Tensor]:
    """A valid program, the same for the same number."""
    if number not in _sources:
        program, blob = CASES[SOURCES[number]](number) if number < len(SOURCES) else random_program(number)
        _sources[number] = program.to_json(), blob
    return _sources[number]


def random_mutants(seed: int, count: int) -> Iterator[Mutant]:
    """Valid programs with one to three things changed."""
    choice = random.Random(seed)
    for _ in range(count):
        text, blob = source(choice.choice([0, 0, 0, *range(1, len(SOURCES) + 2)]))
        body, done = json.loads(text), []
        for _ in range(choice.choice([1, 1, 1, 2, 3])):
            change = choice.choices([change_field, change_keys, swap], [8, 2, 2])[0]
            try:
                done.append(change(body, choice))
            except (TypeError, KeyError, AttributeError, IndexError):
                break  # an earlier change left nothing to change
        raw = dump(body).encode("utf-8", "surrogatepass")
        if choice.random() < 0.1:
            raw = damage_text(raw, choice)
        if choice.random() < 0.05:
            blob = blob[: choice.choice([0, 1, 64, blob.numel() - 64, blob.numel() - 1])]
        yield Mutant(raw, blob, " ".join(done))
