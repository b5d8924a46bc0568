"""Quantizers and search steps through the interpreted Triton kernels: tensors of the CPU pretend to be on a GPU.

Started by tests/kernels/test_triton_fakequant.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from test_search_device import trained
from torch import Tensor

from lbs.quant import fused
from lbs.quant.codec import CODINGS
from lbs.quant.fake import fake_activation, fake_weight
from lbs.search.bit_sharing import gated, width_errors
from lbs.search.gates import BitGate
from lbs_kernels.fakequant import triton_impl, triton_weights

KINDS = ["unsigned", "signed", "weight"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Pretends that tensors are on a GPU; counts the kernels' launches by name."""
    seen: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_impl, f"{name}_kernel")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            seen[self.name] += 1
            return self.kernel[grid]  # type: ignore[no-any-return]

    for name in ("forward", "correct", "backward", "total"):
        monkeypatch.setattr(triton_impl, f"{name}_kernel", Counted(name))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return seen


def sample(seed: int, dtype: torch.dtype) -> Tensor:
    """3162 elements, more than a block, channels last."""
    x = torch.randn(2, 3, 17, 31, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def both(
    call: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Check y and the gradients of `call(x, v)` on the kernels' path against torch's; both gradients to v."""
    x, grad, results = sample(1, dtype), sample(2, dtype).contiguous(), []  # grad: in another order of memory
    for served in (True, False):
        with monkeypatch.context() as patch:
            if not served:
                patch.setattr(fused, "serves", lambda *_: False)
            source, v = x.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
            y = call(source, v)
            results.append((y, *torch.autograd.grad(y, (source, v), grad)))
    ours, theirs = results
    assert torch.equal(ours[0], theirs[0])
    assert ours[0].stride() == x.stride()
    assert torch.equal(ours[1], theirs[1])
    return ours[2], theirs[2]


def unit(dtype: torch.dtype) -> float:
    """Sums: float32 in another order; in half precision torch also rounds y before y - x, 2^-9 of up to 1.3."""
    return (1e-6 if dtype == torch.float32 else 2**-8) * float(sample(2, dtype).float().abs().sum())


@pytest.mark.parametrize("dtype", triton_impl.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_width(kind: str, dtype: torch.dtype, launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel each way, and one for the sum; a width in Python or on the device."""
    for bits in (4, torch.tensor(4)) if dtype == torch.float32 else (torch.tensor(4),):

        def call(x: Tensor, v: Tensor, bits: int = bits) -> Tensor:  # type: ignore[assignment]
            return fake_weight(x, v, bits) if kind == "weight" else fake_activation(x, v, bits, CODINGS[kind])

        launches.clear()
        ours, theirs = both(call, dtype, monkeypatch)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=unit(dtype))
        served = kind != "weight" or dtype == torch.float32  # half-precision weights have codes of their own
        assert launches == (dict.fromkeys(("forward", "backward", "total"), 1) if served else {})


LONGEST, F32 = (1, 2, 4, 8), torch.float32
SEARCHED = [((2, 4, 8), "unsigned", torch.bfloat16), ((2, 4, 8), "signed", F32), (LONGEST, "weight", F32)]
OTHERS = [((2, 4, 8), "unsigned", torch.float16), ((3, 6), "weight", F32), (LONGEST, "signed", torch.bfloat16)]


@pytest.mark.parametrize(
    ("chain", "kind", "dtype"), SEARCHED + [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS], ids=str
)
def test_a_searched_width(
    chain: tuple[int, ...], kind: str, dtype: torch.dtype, launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every level, also in the iteration in which the decision changes and y was computed at another width."""
    for level in range(len(chain)):
        seen: list[tuple[Tensor, BitGate]] = []

        def call(x: Tensor, v: Tensor, level: int = level, seen: list[tuple[Tensor, BitGate]] = seen) -> Tensor:
            gate = BitGate(chain)  # opens everything at first
            with torch.no_grad():
                statistics = width_errors(x.float(), v, chain, CODINGS[kind])
                gate.alpha.copy_(statistics * torch.where(torch.arange(len(chain) - 1) < level, 0.5, 1.01))
            before = gated(x, v, gate, CODINGS[kind])
            y = gated(x, v, gate, CODINGS[kind])
            assert torch.equal(before, y)
            assert torch.equal(gate.open_width(), torch.tensor(chain[level]))
            (slope,) = torch.autograd.grad(before, gate.alpha, sample(2, dtype), retain_graph=True)
            seen.append((slope, gate))
            return y

        launches.clear()
        ours, theirs = both(call, dtype, monkeypatch)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=unit(dtype))
        torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=unit(dtype))
        torch.testing.assert_close(seen[0][1].statistic, seen[1][1].statistic, rtol=1e-5, atol=1e-7)
        assert launches == {"forward": 2, "correct": 2, "backward": 2, "total": 4}


def test_a_search_step_waits_for_nothing(launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs for the weights of one layer and one for all else, as each takes the interpreter as long as numpy
    takes for hundreds of them.
    """
    monkeypatch.setattr(triton_impl, "BLOCK", 1 << 15)
    monkeypatch.setitem(triton_weights._META, "BLOCK", 1 << 15)
    monkeypatch.setattr(triton_weights, "BLOCK", 1 << 15)
    _, waits, _ = trained(2, 2, "gamma")
    assert waits == [0, 1]
    assert launches["forward"] >= 2 * 2 * 8  # weights and activations of every layer but the first and the last
    assert launches["correct"] >= 2 * 8  # and half of the gates decide


@pytest.mark.slow
def test_the_search_goes_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The same decisions; losses differ by float32 sums in another order."""
    here, _, losses = trained(4, 1, "gamma")
    request.getfixturevalue("launches")
    there, _, others = trained(4, 1, "gamma")
    torch.testing.assert_close(losses, others, rtol=1e-4, atol=0)
    assert here.value() == there.value()
    for (_, ours, _), (_, theirs, _) in zip(here.bit_gates(), there.bit_gates(), strict=True):
        torch.testing.assert_close(ours.alpha, theirs.alpha, rtol=1e-3, atol=1e-6)
