"""packed.capture: the logic around the graphs with a recorder that calls again instead of replaying."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pack_nets
import pytest
import torch
from torch import Tensor

from lbs.packing import captured as captured_module
from lbs.packing.captured import CapturedModel
from lbs_kernels.errors import BackendError, ShapeError
from lbs_kernels.times.graph import Recorded

SHAPE = (1, 8, 8)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recorder for the processor: a replay computes again and writes into the first result. Returns the turns."""
    seen: list[str] = []

    def record(call: Callable[[], Any], device: object) -> Recorded:
        result = call()
        return Recorded(lambda: seen.append("replay") or result.copy_(call()), result)  # type: ignore[func-returns-value]

    class Turns:
        def __init__(self, device: torch.device) -> None:
            pass

        def begin(self) -> None:
            seen.append("begin")

        def end(self) -> None:
            seen.append("end")

    monkeypatch.setattr(captured_module.cuda_graph, "record", record)
    monkeypatch.setattr(captured_module, "Turns", Turns)
    monkeypatch.setattr(captured_module, "_check_device", lambda device: None)
    return seen


def test_a_model_on_the_processor_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r'lies on cpu.*lbs\.load\(path, device="cuda"\)'):
        pack_nets.packed_digits().capture(pack_nets.images(1, SHAPE))


def test_every_batch_size_has_its_graph(turns: list[str]) -> None:
    packed = pack_nets.packed_digits()
    captured = packed.capture(pack_nets.images(1, SHAPE), pack_nets.images(3, SHAPE))
    assert captured.batches == (1, 3)
    for batch in (3, 1, 3):
        x = pack_nets.images(batch, SHAPE, seed=batch + 20)
        assert torch.equal(captured(x), packed(x))
    assert turns == ["begin", "replay", "end"] * 3


def test_the_output_is_the_graphs_own_unless_copies_are_asked_for(turns: list[str]) -> None:
    packed = pack_nets.packed_digits()
    x, y = (pack_nets.images(2, SHAPE, seed) for seed in (3, 4))
    shared = packed.capture(x)
    first = shared(x)
    assert shared(y) is first
    assert torch.equal(first, packed(y))
    copying = packed.capture(x, clone=True)
    first = copying(x)
    assert copying(y) is not first
    assert torch.equal(first, packed(x))


def test_the_example_is_not_written_to(turns: list[str]) -> None:
    example = pack_nets.images(2, SHAPE)
    before = example.clone()
    pack_nets.packed_digits().capture(example)(pack_nets.images(2, SHAPE, seed=9))
    assert torch.equal(example, before)


def test_what_is_refused(turns: list[str]) -> None:
    packed = pack_nets.packed_digits()
    with pytest.raises(ShapeError, match="no example was given"):
        packed.capture()
    with pytest.raises(ShapeError, match="empty batch"):
        packed.capture(pack_nets.images(0, SHAPE))
    with pytest.raises(ShapeError, match=r"\[2, 1, 9, 8\]"):
        packed.capture(pack_nets.images(2, (1, 9, 8)))
    captured = packed.capture(pack_nets.images(1, SHAPE), pack_nets.images(4, SHAPE))
    with pytest.raises(ShapeError, match="batch 2 was not recorded, 1, 4 were; pad the batch"):
        captured(pack_nets.images(2, SHAPE))
    with pytest.raises(ShapeError, match="float32"):
        captured(pack_nets.images(1, SHAPE).half())


def test_threads_take_turns(turns: list[str]) -> None:
    packed = pack_nets.packed_digits()
    captured = packed.capture(pack_nets.images(2, SHAPE), clone=True)
    wrong: list[int] = []

    def work(seed: int) -> None:
        x: Tensor = pack_nets.images(2, SHAPE, seed)
        expected = packed(x)
        wrong.extend(seed for _ in range(20) if not torch.equal(captured(x), expected))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert isinstance(captured, CapturedModel)
    assert turns == ["begin", "replay", "end"] * 40
