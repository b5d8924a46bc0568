"""A search step on a GPU launches work and reads nothing back, except every `read_every` steps.

Tensors of the CPU pretend to be on a GPU here; a dispatch mode counts what would wait for it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lbs
import lbs.models
from lbs.quant import fused
from lbs.search.budget import Budget, parameter_groups

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select")


class _Waits(TorchDispatchMode):
    """Counts operations whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> Any:
        self.tensor, self.tolist = torch.tensor, torch.Tensor.tolist  # read or fill the CPU's memory without a dispatch

        def tolist(tensor: Tensor) -> Any:
            self.seen["tolist"] += 1
            return self.tolist(tensor)

        def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            self.seen["tensor"] += device is not None  # Python numbers are copied while the host waits
            return self.tensor(*args, device=device, **kwargs)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        torch.tensor = tensor
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self.tolist  # type: ignore[method-assign]
        torch.tensor = self.tensor
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name in WAITING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def images(seed: int) -> Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(steps: int, read_every: int, importance: str) -> tuple[Budget, list[int], list[float]]:
    """Losses, and how often the host waited inside each step."""
    torch.manual_seed(0)
    model = lbs.prepare(lbs.models.create("digits_resnet8"), images(0), lbs.SearchConfig(importance=importance))
    budget = Budget(lbs.calibrate(model, [images(0)]).train(), bops=0.012, strength=1.0, read_every=read_every)
    groups = parameter_groups(model, lr=0.01, gate_lr=0.02)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, foreach=False)
    waits, losses = [], []
    for seed in range(steps):
        with _Waits() as mode:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images(seed)), torch.arange(4))
            (loss + budget()).backward()
            optimizer.step()
            budget.step()
        waits.append(sum(mode.seen.values()))
        losses.append(float(loss.detach()))
    return budget, waits, losses


@pytest.mark.parametrize("importance", ["gamma", "taylor"])
def test_the_host_waits_only_when_it_looks(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    _, waits, _ = trained(8, 4, importance)
    assert waits == [0, 0, 0, 1] * 2


WAITING_BACK = ("CumprodBackward", "ProdBackward")


@pytest.mark.parametrize("importance", ["gamma", "magnitude", "taylor", "activation"])
@pytest.mark.parametrize("multi_path", [False, True])
def test_the_gradient_waits_for_nothing(multi_path: bool, importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some operations of torch read a number in their gradient, where no dispatch mode sees it; none of them is there.

    As a GPU would go: what the device has decided is not known in Python.
    """
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    torch.manual_seed(0)
    options = lbs.SearchConfig(importance=importance, multi_path=multi_path)
    model = lbs.prepare(lbs.models.create("digits_resnet8"), images(0), options)
    budget = Budget(lbs.calibrate(model, [images(0)]).train(), bops=0.012, strength=1.0, read_every=4)
    for _ in range(2):  # both sides
        left, names = [(F.cross_entropy(model(images(0)), torch.arange(4)) + budget()).grad_fn], set()
        while left:
            node = left.pop()
            if node is not None and node not in names:
                names.add(node)
                left += [parent for parent, _ in node.next_functions]
        found = {name for node in names for name in WAITING_BACK if node.name().startswith(name)}
        assert len(names) > 200
        assert not found
        budget.step()


def test_decisions_left_on_the_device_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back every step, or decided there: the same losses, thresholds and bits as on the CPU, bit for bit."""
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    here, _, losses = trained(6, 1, "gamma")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    there, _, others = trained(6, 1, "gamma")
    assert losses == others
    assert here.value() == there.value()
    for (_, ours, _), (_, theirs, _) in zip(here.bit_gates(), there.bit_gates(), strict=True):
        assert torch.equal(ours.alpha, theirs.alpha)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    """torch itself says so: every wait but that of the look raises."""
    model = lbs.prepare(lbs.models.create("digits_resnet8"), images(0), lbs.SearchConfig())
    model = lbs.calibrate(model, [images(0)]).train().cuda()
    budget = Budget(model, bops=0.012, strength=1.0, read_every=4)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01, gate_lr=0.02), lr=0.01, momentum=0.9)
    batches, labels = [images(seed).cuda() for seed in range(4)], torch.arange(4).cuda()
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number in (1, 2) else "default")  # the first compiles, the last looks
        try:
            optimizer.zero_grad()
            (F.cross_entropy(model(batch), labels) + budget()).backward()
            optimizer.step()
            budget.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
