"""What stays in float is named with its share of the time of a call, and the regions beside it."""

from __future__ import annotations

import copy
from pathlib import Path

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.packing.model import PackedModel
from lbs.packing.parts import VIEWS, PartRow, time_parts
from lbs_kernels.errors import ShapeError

SHAPE = (3, 10, 10)


class Slow(nn.Module):
    """A product of two matrices of 800 x 800, a hundred times the work of everything beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("square", torch.eye(800))

    def forward(self, x: Tensor) -> Tensor:
        square = self.square * x.mean()
        return x + torch.matmul(square, square)[0, 0]


class Mixed(nn.Module):
    """Packed layers, a small function and a large module in float, packed layers again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.slow = Slow()

    def forward(self, x: Tensor) -> Tensor:
        x = self.slow(torch.relu(self.stem(x)))
        return self.last(torch.softmax(x, 1))


def packed_mixed() -> PackedModel:
    torch.manual_seed(2)
    return lbs.pack(pack_nets.quantized(Mixed(), SHAPE))


def by_name(parts: tuple[PartRow, ...]) -> dict[str, PartRow]:
    return {part.name: part for part in parts}


def test_the_part_that_takes_the_time_is_told_so(tmp_path: Path) -> None:
    packed = packed_mixed()
    parts = time_parts(packed, packed.random_images(1), rounds=5)
    assert by_name(parts)["matmul"].share > 0.5  # about 0.9
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.seconds > 0 for part in parts)
    assert {part.name for part in parts if part.reason is None} == {"region 0", "region 1", VIEWS}
    kept = dict(packed.kept_float)
    named = {part.name: part.reason for part in parts if part.reason is not None}
    assert named == {name: reason for name, reason in kept.items() if name in named}
    assert {"softmax", "matmul", "mean"} <= set(named)
    packed.save(tmp_path / "mixed.lbs.safetensors")
    loaded = lbs.load(tmp_path / "mixed.lbs.safetensors")
    again = time_parts(loaded, loaded.random_images(1), rounds=5)
    assert list(by_name(again)) == list(by_name(parts))
    assert by_name(again)["matmul"].share > 0.5


def test_explain_and_bench_tell_it() -> None:
    packed = packed_mixed()
    text = str(lbs.explain(packed, rounds=2, threads=1))
    assert "region 0: " in text
    for name, reason in packed.kept_float:
        (line,) = (line for line in text.splitlines() if line.startswith(f"in float: {name}: {reason}"))
        assert " ms, " in line
        assert line.endswith("% of a call)")
    found = lbs.bench(packed, batches=(2,), rounds=2)
    assert "a call at batch 2:" in str(found)
    assert by_name(found.parts).keys() == by_name(lbs.explain(packed, rounds=1).parts).keys()
    assert found.to_json()["parts"][0]["seconds"] > 0


def test_a_network_that_is_packed_whole_has_nothing_to_tell() -> None:
    packed = pack_nets.packed_digits()
    (part,) = (part for part in time_parts(packed, packed.random_images(1), 1) if part.name != VIEWS)
    assert (part.name, part.reason) == ("region 0", None)
    assert "of a call" not in str(lbs.explain(packed, rounds=1))
    assert lbs.bench(packed, batches=(1,), rounds=1).parts == ()


def test_parts_that_are_traced_through_keep_one_name() -> None:
    class Leaves(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(super().forward(x).softmax(1), 1)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Leaves(8, 8, 1), nn.Conv2d(8, 4, 1))
    packed = lbs.pack(pack_nets.quantized(model, SHAPE))
    names = by_name(time_parts(packed, packed.random_images(1), 1))
    assert [name for name, _ in packed.kept_float] == ["1"]
    assert list(names) == ["region 0", VIEWS, "1", "region 1"]


def test_nothing_is_timed_in_an_ordinary_call(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = copy.deepcopy(pack_nets.packed_two_regions())
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("a clock was read"))
    packed(packed.random_images(2))


def test_senseless_requests() -> None:
    packed = pack_nets.packed_digits()
    with pytest.raises(ShapeError, match="rounds = 0"):
        time_parts(packed, packed.random_images(1), 0)
    with pytest.raises(ShapeError, match="was packed for"):
        time_parts(packed, torch.zeros(1, 1, 9, 9))
