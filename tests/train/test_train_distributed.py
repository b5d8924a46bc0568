"""What a process does with an error while it trains with others, and how long it waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lbs.train import distributed
from lbs_kernels.errors import TrainingError


@pytest.fixture
def one_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"active": True, "rank": 0, "world_size": 3}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)


@pytest.mark.usefixtures("one_of_three")
@pytest.mark.parametrize(
    ("error", "missing", "told"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Read error"), [1, 2], "ranks 1, 2 of 3 give no answer"),
        (RuntimeError("Connection closed by peer"), [2], "rank 2 of 3 gives no answer"),
        (dist.DistBackendError("broken"), [2], "rank 2 of 3 gives no answer"),
    ],
)
def test_whoever_gives_no_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, missing: list[int], told: str
) -> None:
    monkeypatch.setattr(distributed, "_missing", lambda: missing)
    with pytest.raises(TrainingError, match=f"rank 0: {told}"), distributed.answered():
        raise error


@pytest.mark.usefixtures("one_of_three")
def test_errors_of_ones_own_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_missing", lambda: [1, 2])
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("mat1 and mat2 cannot be multiplied")):
        with pytest.raises(type(error)) as raised, distributed.answered():
            raise error
        assert raised.value is error


@pytest.mark.usefixtures("one_of_three")
def test_what_rank_0_does_alone_is_waited_for_longer_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, src, group: groups.append(group))
    for name in ("_waiting", "_steps"):
        monkeypatch.setattr(distributed, name, name)
    assert (distributed.first(lambda: 5), distributed.first(lambda: 6, in_step=True)) == (5, 6)
    assert groups == ["_waiting", "_steps"]
