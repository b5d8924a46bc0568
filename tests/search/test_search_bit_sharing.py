"""Bit sharing: the gated value against the nested residuals, gradients of alpha against autograd, gates that idle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lbs.quant import codec, fused
from lbs.quant.codec import CODINGS, UNSIGNED, Coding
from lbs.quant.fake import fake_activation, fake_weight
from lbs.search import bit_sharing
from lbs.search.bit_sharing import gated, width_errors
from lbs.search.budget import parameter_groups
from lbs.search.gates import BitGate
from lbs.search.layers import SearchConv2d, SearchQuantizer
from lbs_kernels import extension

KINDS = ["unsigned", "affine", "signed", "weight"]
CHAINS = [(2, 4, 8), (2, 6), (3, 6), (1, 2, 4, 8), (4, 8)]


def coding_of(kind: str, chain: tuple[int, ...]) -> Coding:
    """`affine`: real 0 is code 1 of the narrowest width."""
    return Coding("unsigned", 1, codec.levels(chain[0])) if kind == "affine" else CODINGS[kind]


def unit(x: Tensor, v: Tensor, coding: Coding) -> Tensor:
    """z in [0, 1] of LBS eq. 1-2."""
    if coding.kind == "unsigned":
        return (x / v + coding.zero / coding.levels).clamp(0, 1)
    return ((x / v).clamp(-1, 1) + 1) / 2


class _Step(torch.autograd.Function):
    """1(A > alpha) with the sigmoid's slope to alpha, written apart from the product's own."""

    @staticmethod
    def forward(ctx, statistic, alpha):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(statistic, alpha)
        return (statistic > alpha).to(alpha)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        statistic, alpha = ctx.saved_tensors
        e = torch.exp(-(statistic - alpha))
        return None, -grad * e / (1 + e) ** 2


def decode(z: Tensor, v: Tensor, coding: Coding) -> Tensor:
    return v * (z - coding.zero / coding.levels) if coding.kind == "unsigned" else v * (2 * z - 1)


def discrete(z: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1
    return (n * z).round() / n


def explicit(
    x: Tensor, v: Tensor, alpha: Tensor, chain: tuple[int, ...], coding: Coding
) -> tuple[Tensor, list[Tensor]]:
    """z_b1 + g_2 (r_b2 + g_3 (r_b3 + ...)) (LBS eq. 12-13), gates one after the other; value and statistics.

    x and v count as constants here: the straight-through estimator cancels their path through the residuals. A gate
    behind a closed one counts as closed.
    """
    z = unit(x, v, coding).detach()
    partial = discrete(z, chain[0])
    total: Tensor = partial
    product = torch.ones((), dtype=x.dtype)
    statistics = []
    for j, bits in enumerate(chain[1:]):
        statistic = (z - partial).abs().mean()
        statistics.append(statistic)
        gate = _Step.apply(statistic, alpha[j])
        residual = discrete(z - partial, bits)
        product = product * gate
        total = total + product * residual
        if not gate:
            break
        partial = partial + residual
    return decode(total, v.detach(), coding), statistics


def sample(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(40, 11, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gate_at(chain: tuple[int, ...], level: int, x: Tensor, v: Tensor, kind: str) -> BitGate:
    """A gate whose thresholds leave chain[level] open on x."""
    gate = BitGate(chain).double()
    statistics = width_errors(x, v, chain, coding_of(kind, chain))
    with torch.no_grad():
        gate.alpha.copy_(statistics * 0.5)
        if level < len(chain) - 1:
            gate.alpha[level] = statistics[level] * 1.01
    return gate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", CHAINS)
def test_value_equals_the_nested_residuals(chain: tuple[int, ...], kind: str) -> None:
    x, v = sample(1), torch.tensor(1.3, dtype=torch.float64)
    for level, bits in enumerate(chain):
        gate = gate_at(chain, level, x, v, kind)
        y = gated(x, v, gate, coding_of(kind, gate.chain))
        expected, statistics = explicit(x, v, gate.alpha, chain, coding_of(kind, chain))
        assert gate.bits == bits
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gate.statistic[: len(statistics)], torch.stack(statistics), rtol=1e-9, atol=1e-12)
        assert (gate.statistic[len(statistics) :] == gate.statistic[len(statistics) - 1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", CHAINS)
def test_alpha_gradients_equal_the_explicit_formulation(chain: tuple[int, ...], kind: str) -> None:
    x, v, weight = sample(2), torch.tensor(1.1, dtype=torch.float64), sample(3)
    for level in range(len(chain)):
        gate = gate_at(chain, level, x, v, kind)
        (got,) = torch.autograd.grad(gated(x, v, gate, coding_of(kind, gate.chain)), gate.alpha, weight)
        twin = gate.alpha.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(explicit(x, v, twin, chain, coding_of(kind, chain))[0], twin, weight)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert got[min(level, len(chain) - 2)] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_x_and_v_see_the_straight_through_gradient_of_the_open_width(kind: str) -> None:
    x, v = sample(4).requires_grad_(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    gate = gate_at((2, 4, 8), 1, x.detach(), v.detach(), kind)
    plain = fake_weight(x, v, 4) if kind == "weight" else fake_activation(x, v, 4, coding_of(kind, (2, 4, 8)))
    y = gated(x, v, gate, coding_of(kind, gate.chain))
    assert torch.equal(y, plain)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, v), sample(5)), torch.autograd.grad(plain, (x, v), sample(5)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(CHAINS),
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.floats(0.05, 5),
)
def test_any_chain_any_range(chain: tuple[int, ...], kind: str, seed: int, v: float) -> None:
    """Value and statistics of open gates; ties of a coarse step have measure zero in random data."""
    x, scale = sample(seed), torch.tensor(v, dtype=torch.float64)
    gate = BitGate(chain).double()
    y = gated(x, scale, gate, coding_of(kind, chain))
    expected, _ = explicit(x, scale, gate.alpha, chain, coding_of(kind, chain))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert y.detach().abs().max() <= v * (1 + 1e-12)
    if kind == "weight":
        assert torch.equal(y, codec.weight_values(codec.weight_codes(x, scale, gate.bits), scale, gate.bits))
    else:
        codes = codec.activation_codes(x, scale, gate.bits, coding_of(kind, chain))
        assert torch.equal(y, codec.activation_values(codes, scale, gate.bits, coding_of(kind, chain)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_decisions_that_stay_on_the_device_are_the_same(level: int, kind: str) -> None:
    """A level in a tensor, as on a GPU, against one in Python: value and every gradient."""
    v, weight = torch.tensor(1.2, dtype=torch.float64), sample(8)
    results = []
    for place, bits in ((level, (2, 4, 8)[level]), (torch.tensor(level), torch.tensor((2, 4, 8)[level]))):
        x, scale = sample(7).requires_grad_(), v.clone().requires_grad_()
        gates = torch.ones(2, dtype=torch.float64, requires_grad=True)
        y = bit_sharing._Gated.apply(x, scale, gates, (2, 4, 8), place, bits, coding_of(kind, (2, 4, 8)))
        results.append((y, *torch.autograd.grad(y, (x, scale, gates), weight)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.skipif(extension.cpu is None, reason="the compiled extension is not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["unsigned", "affine", "signed"])
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_native_passes_equal_the_torch_path(
    chain: tuple[int, ...], kind: str, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every level; also in the iteration in which the decision changes, and the first pass guessed wrong."""
    generator = torch.Generator().manual_seed(9)
    data = torch.randn(3, 5, 17, 16, generator=generator).to(dtype).to(memory_format=layout)
    weight = torch.randn(3, 5, 17, 16, generator=generator).to(dtype)
    magnitude = float(weight.float().abs().sum())
    for level in range(len(chain)):
        results = []
        for native in (True, False):
            x, v = data.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
            gate = BitGate(chain)
            with torch.no_grad():
                statistics = width_errors(data.float(), v, chain, coding_of(kind, chain))
                gate.alpha.copy_(statistics * torch.where(torch.arange(len(chain) - 1) < level, 0.5, 1.01))
            with monkeypatch.context() as patch:
                if not native:
                    patch.setattr(fused, "serves", lambda *_: False)
                for _ in range(2):  # the second pass guesses right
                    y = gated(x, v, gate, coding_of(kind, gate.chain))
                    grads = torch.autograd.grad(y, (x, v, gate.alpha), weight)
            assert gate.bits == chain[level]
            results.append((y, *grads, gate.statistic.clone()))
        ours, theirs = results
        assert torch.equal(ours[0], theirs[0])
        assert ours[0].stride() == data.stride()
        assert torch.equal(ours[1], theirs[1])
        # float32 sums in another order; in bfloat16 the torch path also rounds y before y - x: 2^-9 of up to 1.3
        unit = (1e-6 if dtype == torch.float32 else 2**-8) * magnitude
        torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=unit)
        torch.testing.assert_close(ours[3], theirs[3], rtol=0, atol=unit)
        torch.testing.assert_close(ours[4], theirs[4], rtol=1e-5, atol=1e-7)


def test_the_number_of_threads_does_not_matter() -> None:
    x, v = torch.randn(7, 64, 20, 20, generator=torch.Generator().manual_seed(3)), torch.tensor(1.3)
    seen = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        gate = BitGate((2, 4, 8))
        y = gated(x.clone().requires_grad_(), v, gate, UNSIGNED)
        (grad,) = torch.autograd.grad(y, gate.alpha, torch.ones_like(y))
        seen.append((gate.statistic.clone(), grad))
    torch.set_num_threads(before)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_bfloat16_activations_decide_in_float32() -> None:
    x = sample(6, torch.float32).relu().bfloat16()
    v = torch.tensor(1.7)
    gate, reference = BitGate((2, 4, 8)), BitGate((2, 4, 8))
    y = gated(x, v, gate, UNSIGNED)
    wide = gated(x.float(), v, reference, UNSIGNED)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wide.bfloat16())
    assert torch.equal(gate.statistic, reference.statistic)


def test_idle_gates_do_not_drift() -> None:
    """Weight gates on even steps, activation gates on odd ones; the idle side keeps its very bits."""
    torch.manual_seed(0)
    layer = SearchConv2d(
        3, 4, 3, chain=(2, 4, 8), quantizer=SearchQuantizer((2, 4, 8)), standardize="scale", importance="gamma"
    )
    layer.adopt_scale()
    net = nn.Sequential(layer)
    optimizer = torch.optim.SGD(parameter_groups(net, lr=0.01, gate_lr=0.01), lr=0.01, momentum=0.9, nesterov=True)
    w_gate, a_gate = layer.w_gate, layer.quantizer.gate
    assert w_gate is not None
    moved = {"weights": 0, "activations": 0}
    for iteration in range(12):
        w_gate.active, a_gate.active = iteration % 2 == 0, iteration % 2 == 1
        before = w_gate.alpha.detach().clone(), a_gate.alpha.detach().clone()
        optimizer.zero_grad()
        loss = net(torch.rand(2, 3, 6, 6)).square().mean() + w_gate.shares().sum() * w_gate.active
        (loss + a_gate.shares().sum() * a_gate.active).backward()
        optimizer.step()
        idle, active = (1, 0) if iteration % 2 == 0 else (0, 1)
        now = w_gate.alpha.detach(), a_gate.alpha.detach()
        assert torch.equal(now[idle], before[idle])
        moved["weights" if active == 0 else "activations"] += int(not torch.equal(now[active], before[active]))
    assert moved == {"weights": 6, "activations": 6}


def test_evaluation_neither_looks_nor_decides() -> None:
    quantizer = SearchQuantizer((2, 4, 8))
    quantizer.gate.active = True
    quantizer.eval()
    quantizer.gate.close_to(1)
    before = quantizer.gate.statistic.clone()
    quantizer(torch.rand(3, 3))
    assert torch.equal(quantizer.gate.statistic, before)
    assert quantizer.bits == 4


def test_ranges_of_filters_share_a_gate() -> None:
    """Weights with a range for every filter: each row as with a range of its own, errors in units of its range."""
    w, ranges = sample(5).reshape(8, 5, 11), torch.linspace(0.5, 1.9, 8, dtype=torch.float64).reshape(8, 1, 1)
    rows = [width_errors(row, v.reshape(()), (2, 4, 8), CODINGS["weight"]) for row, v in zip(w, ranges, strict=True)]
    gate = BitGate((2, 4, 8)).double()
    ours = [t.clone().requires_grad_() for t in (w, ranges)]
    y = gated(*ours, gate, CODINGS["weight"])
    torch.testing.assert_close(gate.statistic, torch.stack(rows).mean(0))
    plain = [t.clone().requires_grad_() for t in (w, ranges)]
    expected = torch.stack([fake_weight(row, v.reshape(()), gate.bits) for row, v in zip(*plain, strict=True)])
    assert torch.equal(y, expected)
    for got, wanted in zip(
        torch.autograd.grad(y, ours, torch.cos(w)), torch.autograd.grad(expected, plain, torch.cos(w)), strict=True
    ):
        torch.testing.assert_close(got, wanted)
