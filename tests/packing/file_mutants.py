"""Packed files with something changed at random and the digest made right again, and what becomes of them.

A mutant may be refused (CheckpointError) or loaded; a loaded one is run and explained, and may then raise errors of the
family only. `attack` counts what happened; `tools/fuzz.py` runs it for as long as one likes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pack_nets
import torch
from outcomes import Disagreement, Outcome
from test_pack_checkpoint import header_of, rewrite
from torch import Tensor, nn

import lbs
from lbs.packing.packing import pack
from lbs_kernels import extension
from lbs_kernels.errors import CheckpointError, FormatError, LbsError
from lbs_kernels.program.text import read_program

MUTANT = "mutant.lbs.safetensors"
Note = Callable[[int, Outcome], None]
NUMBERS: list[Any] = [0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 1 << 16, 1 << 24, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64]
NUMBERS += [10**30, -(1 << 40), 0.5, -0.0, 1e300, 5e-324, float("inf"), float("nan")]
TEXTS: list[Any] = [
    "",
    "x",
    "region0",
    "region1",
    "add",
    "size",
    "mean",
    "cat",
    "torch.cat",
    "operator.getitem",
    "output",
]
TEXTS += [
    "conv1",
    "\x1b[2J",
    "\ud800",
    "é",
    "a.b",
    "__class__",
    "operator.pow",
    "expand",
    "repeat",
    "Linear",
    "float32",
]
ODD: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [0],
    {"node": "x"},
    {"tuple": []},
    {"float": "nan"},
    {"slice": [None, 1, 0]},
]
ODD += [
    {"dtype": "complex64"},
    {"list": [1 << 40]},
    [[[]]],
    {"dict": {"dim": 1}},
    {"device": "cuda"},
    {"ellipsis": None},
]


class Parts(nn.Module):
    """Float parts of many kinds around packed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.norm, self.rnn = nn.GroupNorm(2, 8), nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shift = nn.Parameter(torch.randn(8, dtype=torch.float32))

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.interpolate(self.norm(self.stem(x)), scale_factor=0.5, mode="bilinear")
        lines = y.flatten(2).transpose(1, 2) + self.shift
        lines = torch.cat([lines, self.rnn(lines)[0]], 1)
        lines = self.attention(lines, lines, lines)[0]
        return {"logits": self.last(lines.mean(1)), "lines": lines[:, 1:-1:2].softmax(-1).clamp(0.0, 1.0)}


def sources(folder: Path) -> list[Path]:
    """Small networks: one region, two with a float part between, floats of many kinds, bytes in."""
    torch.manual_seed(0)
    shape = (3, 8, 8)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    packed = [
        pack_nets.packed_digits(),
        pack_nets.packed_two_regions(),
        pack(pack_nets.quantized(Parts(), shape)),
        pack(pack_nets.quantized(plain, shape), normalize=((0.5,) * 3, (0.25,) * 3)),
    ]
    paths = [folder / f"source{index}" for index in range(len(packed))]
    for path, network in zip(paths, packed, strict=True):
        network.save(path)
    return paths


def spots(value: Any, holder: Any = None, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside a JSON value."""
    if holder is not None:
        yield holder, key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in list(items):
        yield from spots(item, value, name)


def change(body: Any, chance: random.Random) -> str:
    """Change a JSON value in one place; says where and how."""
    found = list(spots(body))
    if not found:
        return "nothing"
    holder, key = chance.choice(found)
    old = holder[key]
    how = chance.choice(["set", "set", "set", "near", "near", "delete", "swap", "twice"])
    if how == "near" and type(old) in (int, float):
        holder[key] = chance.choice([old + 1, old - 1, -old, old * 2, old * 1000, old // 2])
    elif how == "near" and isinstance(old, str):
        holder[key] = chance.choice(
            [old + "x", old[1:], old.upper(), *(v for h, k in found if isinstance(v := h[k], str))]
        )
    elif how == "delete":
        del holder[key]
    elif how == "swap":
        other, there = chance.choice(found)
        holder[key], other[there] = json.loads(json.dumps(other[there])), json.loads(json.dumps(old))
    elif how == "twice" and isinstance(holder, list):
        holder.insert(chance.randrange(len(holder) + 1), json.loads(json.dumps(old)))
    else:
        holder[key] = chance.choice([*NUMBERS, *TEXTS, *ODD])
    return f"{how} {key}"


def mutate(source: Path, target: Path, chance: random.Random) -> str:
    """Write a mutant of a file; says what was changed."""
    header, data = header_of(source)
    content, done = bytearray(data), []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        part = chance.choice(["graph"] * 6 + ["model", "plan", "program", "program", "header", "tensor", "data"])
        texts = header["__metadata__"]
        keys = [key for key in texts if key.startswith(part)] if part in ("graph", "model", "plan", "program") else []
        if keys:
            key = chance.choice(keys)
            try:
                body = json.loads(texts[key] or "{}")
            except ValueError:  # the header was changed before, in this text
                break
            done.append(f"{key}: {change(body, chance)}")
            texts[key] = json.dumps(body)
        elif part == "header":
            done.append(f"header: {change(texts, chance)}")
        elif part == "tensor":
            done.append(f"tensors: {change({k: v for k, v in header.items() if k != '__metadata__'}, chance)}")
        elif content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            done.append("data")
        if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
            break
    _digests(header, bytes(content))
    rewrite(target, header, bytes(content))
    return "; ".join(done)


def _digests(header: dict[str, Any], data: bytes) -> None:
    """Make the digests of the programs' arrays right where they can be, so that what is behind them is reached."""
    for key, text in header["__metadata__"].items():
        try:
            program = json.loads(text) if key.startswith("program") else None
            if not program:
                continue
            end = max(-(-_bytes(spec) // 64) * 64 + spec["offset"] for spec in program["arrays"].values())
            blob = bytearray(min(end, 1 << 24))
            for name, spec in program["arrays"].items():
                begin, last = header[f"region{key.removeprefix('program')}.{name}"]["data_offsets"]
                blob[spec["offset"] : spec["offset"] + last - begin] = data[begin:last]
            program["digest"] = hashlib.sha256(bytes(blob)).hexdigest()
            header["__metadata__"][key] = json.dumps(program)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue  # too odd to have one


def _bytes(spec: dict[str, Any]) -> int:
    total = 4
    for size in spec["shape"]:
        total *= size
    return total


def judge(path: Path) -> str:
    """Load, run and explain a file: what came of it. Raises what is no error of the family."""
    try:
        packed = lbs.load(path)
    except CheckpointError as error:
        return "refused" if "\x1b" not in str(error) else "refused, with an escape in its words"
    try:
        with torch.no_grad():
            packed(packed.random_images(1, torch.Generator().manual_seed(0)))
        str(lbs.explain(packed, batch=1))
        packed.save(path.with_suffix(".again"))
    except LbsError as error:
        return f"loaded, then {type(error).__name__}"
    return "loaded and run"


def programs_agree(path: Path) -> bool:
    """Whether both readers of programs judge those of a file alike."""
    try:
        header, _ = header_of(path)
        texts = [text for key, text in header["__metadata__"].items() if key[:7] == "program" and isinstance(text, str)]
    except (AttributeError, KeyError, ValueError):
        return True
    blob = torch.zeros(1 << 20, dtype=torch.uint8)
    for text in texts:
        verdicts = []
        for read in (
            lambda text=text: read_program(text, blob.numel()),
            lambda text=text: extension.cpu.check_program(text.encode(), blob.data_ptr(), blob.numel()),
        ):
            try:
                read()
                verdicts.append("")
            except UnicodeEncodeError:
                verdicts.append("json")
            except FormatError as error:
                verdicts.append(error.rule)
        if verdicts[0] != verdicts[1]:
            return False
    return True


def attack(folder: Path, seed: int, count: int, first: int = 0, note: Note = lambda number, outcome: None) -> Outcome:
    """Judge the mutants `first` to `count` of a seed; files that end as none may are kept in the folder.

    note: called before each, when the file lies in the folder as `MUTANT`.
    """
    chance, found, outcome = random.Random(seed), sources(folder), Outcome()
    target = folder / MUTANT
    for source in found:  # what is imported with the first of a kind counts for no mutant
        assert judge(source) == "loaded and run"
    for number in range(count):
        what = mutate(chance.choice(found), target, chance)
        if number < first:
            continue
        note(number, outcome)
        if not outcome.judge(f"seed {seed}, file {number}, {what}", target.stat().st_size, lambda: verdict_of(target)):
            target.rename(folder / f"seed{seed}-{number}.lbs.safetensors")
    return outcome


def verdict_of(path: Path) -> str:
    """See `judge`; both readers must judge the programs of the file alike."""
    if extension.cpu is not None and not programs_agree(path):
        raise Disagreement("Python and C++ judge a program of it otherwise")
    return judge(path)
