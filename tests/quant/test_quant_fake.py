"""The fused quantizer against the torch path, and straight-through gradients against autograd and differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lbs.quant import codec, fused
from lbs.quant.codec import CODINGS, SIGNED, UNSIGNED, Coding
from lbs.quant.fake import fake_activation, fake_weight, ste_gradients
from lbs_kernels import extension

native = pytest.mark.skipif(extension.cpu is None, reason="the compiled extension is not built")


def both_paths(
    x: Tensor, v: Tensor, bits: int, grad: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(y, dL/dx, dL/dv) of the native path, then of the torch path."""
    results = []
    for native_path in (True, False):
        with monkeypatch.context() as patch:
            if not native_path:
                patch.setattr(fused, "serves", lambda *_: False)
            source, scale = x.detach().clone().requires_grad_(), v.clone().requires_grad_()
            y = fake_activation(source, scale, bits)
            assert y.grad_fn.fused is native_path  # type: ignore[union-attr]
            y.backward(grad)
            assert source.grad is not None
            assert scale.grad is not None
            results.append((y.detach(), source.grad, scale.grad))
    return results


def batch(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# one element; a tail behind every vector width; empty; more than one chunk of the kernel
SHAPES = [(1,), (2, 3, 5, 7), (0, 4), (3, 11, 33, 32)]


@native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fused_equals_torch(
    bits: int, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, shape in enumerate(SHAPES):
        x, grad, v = batch(dtype, shape, seed), batch(dtype, shape, seed + 9), torch.tensor(1.006)
        if len(shape) == 4:
            x = x.to(memory_format=layout)
        if x.numel() > 4:
            x[(0,) * x.dim()] = float(v)  # on the edge of the range (bfloat16 rounds it up, out of the range)
            x[(-1,) * x.dim()] = 0.0
        native_path, torch_path = both_paths(x, v, bits, grad, monkeypatch)
        assert torch.equal(native_path[0], torch_path[0])
        assert native_path[0].stride() == x.stride()
        assert torch.equal(native_path[1], torch_path[1])
        # Float32 sums in another order; in bfloat16 the torch path also rounds y (2^-9 relative) before y - x.
        unit = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            native_path[2], torch_path[2], rtol=0, atol=unit * float(grad.abs().sum(dtype=torch.float64)) + 1e-6
        )


@native
def test_gradients_of_another_layout_or_dtype_are_brought_into_line(monkeypatch: pytest.MonkeyPatch) -> None:
    x = batch(torch.float32, (2, 4, 3, 5), 1).to(memory_format=torch.channels_last)
    v = torch.tensor(0.9)
    for grad in (batch(torch.float32, (2, 4, 3, 5), 2), torch.ones(()).expand(2, 4, 3, 5)):
        native_path, torch_path = both_paths(x, v, 4, grad, monkeypatch)
        assert torch.equal(native_path[1], torch_path[1])
        torch.testing.assert_close(native_path[2], torch_path[2], rtol=1e-5, atol=1e-5)


@native
def test_a_view_with_gaps_takes_the_torch_path() -> None:
    x = batch(torch.float32, (4, 6), 0)[:, ::2].requires_grad_()
    y = fake_activation(x, torch.tensor(1.0), 4)
    assert not y.grad_fn.fused  # type: ignore[union-attr]
    assert torch.equal(y, fake_activation(x.detach().contiguous(), torch.tensor(1.0), 4))


def test_which_tensors_one_pass_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all but float64 and weights in half precision, if Triton is there; tensors here pretend to be on one."""
    v = torch.tensor(1.0)
    tensors = {dtype: torch.zeros(2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

    def served(kind: str) -> list[torch.dtype]:
        return [dtype for dtype, x in tensors.items() if fused.serves(x, v, CODINGS[kind])]

    native = [torch.float32, torch.bfloat16] if extension.cpu is not None else []
    assert (served("unsigned"), served("weight")) == (native, [])
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    assert (served("unsigned"), served("signed"), served("weight")) == ([*tensors], [*tensors], [torch.float32])
    assert not fused.serves(torch.zeros(2, dtype=torch.float64), v, UNSIGNED)
    assert not fused.serves(tensors[torch.float32], v.double(), UNSIGNED)
    assert not fused.serves(torch.zeros(4, 6)[:, ::2], v, UNSIGNED)
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    assert (served("unsigned"), served("weight")) == ([], [])


@pytest.mark.parametrize("signed", [False, True])
def test_bfloat16_values_are_compared_with_the_unrounded_range(signed: bool) -> None:
    v = torch.tensor(1.006)  # 1.0078125 in bfloat16
    x = torch.tensor([1.0, 1.0078125, -1.0, -1.0078125]).bfloat16()
    grad_x, _ = ste_gradients(torch.ones_like(x), x, v, x, SIGNED if signed else UNSIGNED)
    assert grad_x.tolist() == [1.0, 0.0, float(signed), 0.0]


def autograd_formula(x: Tensor, v: Tensor, bits: int, kind: str) -> Tensor:
    """LBS eq. 1-6 written out, round passing the gradient straight through."""
    n = 2**bits - 1

    def straight(t: Tensor) -> Tensor:
        return t + (t.round() - t).detach()

    if kind == "unsigned":
        return v * straight(n * (x / v).clamp(0, 1)) / n
    if kind == "affine":
        z = n // 3
        return v * straight(n * (x / v).clamp(-z / n, (n - z) / n)) / n
    if kind == "zero":
        top = 2 ** (bits - 1) - 1
        return v * straight(top * (x / v).clamp(-1, 1)) / top
    return v * (2 * straight(n * ((x / v).clamp(-1, 1) + 1) / 2) / n - 1)


@pytest.mark.parametrize("kind", ["unsigned", "affine", "signed", "weight", "zero"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_straight_through_gradients_equal_autograd(bits: int, kind: str) -> None:
    x = batch(torch.float64, (6, 50), bits).requires_grad_()
    v = torch.tensor(0.83, dtype=torch.float64, requires_grad=True)
    grad = batch(torch.float64, (6, 50), 77)
    if kind in ("weight", "zero"):
        y = fake_weight(x, v, bits, "odd" if kind == "weight" else "zero")
    else:
        y = fake_activation(x, v, bits, Coding("unsigned", 1, 3) if kind == "affine" else CODINGS[kind])
    expected = autograd_formula(x, v, bits, kind)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, v), grad), torch.autograd.grad(expected, (x, v), grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["unsigned", "signed"])
def test_range_gradient_by_differences(kind: str) -> None:
    """With codes and clipping held, y = v * f(codes) + STE: dy/dv is f - x/v inside, 1 or -1 outside."""
    v, bits, signed, coding = torch.tensor(0.7, dtype=torch.float64), 4, kind == "signed", CODINGS[kind]
    x = batch(torch.float64, (200,), 5)
    codes = codec.activation_codes(x, v, bits, coding)
    residual = codec.activation_values(codes, v, bits, coding) / v - (x / v).clamp(-1 if signed else 0, 1)

    def value(scale: Tensor) -> Tensor:
        return (scale * ((x / scale).clamp(-1 if signed else 0, 1) + residual)).sum()

    h = 1e-6
    difference = (value(v + h) - value(v - h)) / (2 * h)
    _, grad_v = ste_gradients(torch.ones_like(x), x, v, codec.activation_values(codes, v, bits, coding), coding)
    torch.testing.assert_close(grad_v, difference, rtol=1e-6, atol=1e-6)


def test_scalars_and_vectors_of_one() -> None:
    for shape in ((), (1,)):
        x = torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
        v = torch.ones((), dtype=torch.float64, requires_grad=True)
        fake_activation(x, v, 2, SIGNED).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        assert v.grad is not None
        assert v.grad.shape == ()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_for_every_filter_is_as_many_layers_of_one_filter(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    w, grad = (torch.randn(5, 3, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    w, v = w.requires_grad_(), torch.linspace(0.3, 2.5, 5, dtype=torch.float64).view(-1, 1, 1, 1).requires_grad_()
    y = fake_weight(w, v, bits)
    y.backward(grad)
    for o in range(5):
        one, of_it = w.detach()[o : o + 1].requires_grad_(), v.detach()[o].reshape(()).requires_grad_()
        alone = fake_weight(one, of_it, bits)
        alone.backward(grad[o : o + 1])
        assert torch.equal(alone, y[o : o + 1])
        assert torch.equal(one.grad, w.grad[o : o + 1])  # type: ignore[arg-type,index]
        torch.testing.assert_close(of_it.grad, v.grad[o].reshape(()))  # type: ignore[index]  # sums in another order
