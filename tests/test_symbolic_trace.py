"""The trace computes what the model computes, or it is refused with the place where they part."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbs.graph import trace
from lbs.symbolic import symbolic
from lbs.traced import Evaluation, evaluating
from lbs_kernels.errors import GraphError


class Net(nn.Module):
    """Two convolutions and a linear layer, with a forward of the test's own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def check_same(model: nn.Module) -> torch.fx.GraphModule:
    """The trace gives the model's bits on other images than the traced ones, and leaves those alone."""
    model.eval()
    example = images()
    module = symbolic(model, example)
    assert torch.equal(example, images())
    x = images(1)
    with evaluating(model):
        expected = model(x.clone())
        found = Evaluation(module).run(x.clone())
    assert torch.equal(expected, found)
    return module


def targets(module: torch.fx.GraphModule) -> set[Any]:
    return {node.target for node in module.graph.nodes if node.op != "call_module"}


def aliased_sum(n: Net, x: Tensor) -> Tensor:
    kept = torch.relu(n.a(x))
    levels = [kept]
    levels[0] += n.b(levels[0])
    return levels[0] * 2 + kept


def method_in_place(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    before = n.b(y)
    y.mul_(2).add_(1)
    return before + y


def module_in_place(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    before = n.b(y)
    return before + n.b(n.act(y)) + y


def function_in_place(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    F.relu(y, inplace=True)
    z = n.b(y)
    F.leaky_relu_(z, 0.2)
    F.relu6(z, True)
    return y + z


def same_view_by_another_name(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    z = y.contiguous()
    z += 1
    return n.b(y)


def the_images_themselves(n: Net, x: Tensor) -> Tensor:
    x -= 0.5
    x /= 0.25
    return n.a(x)


IN_PLACE = [
    *(aliased_sum, method_in_place, module_in_place, function_in_place),
    *(same_view_by_another_name, the_images_themselves),
]


@pytest.mark.parametrize("forward", IN_PLACE)
def test_operations_in_place_change_what_others_read(forward: Callable[..., Any]) -> None:
    module = check_same(Net(forward))
    names = {str(getattr(target, "__name__", target)) for target in targets(module)}
    assert not {name for name in names if name.endswith("_") or name in ("iadd", "isub", "itruediv")}
    assert not any(node.kwargs.get("inplace") for node in module.graph.nodes)


def view_read_later(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    rows = y.flatten(1)
    y += 1
    return rows


def part_read_later(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    first, second = y.chunk(2, 1)
    first += second
    return y


@pytest.mark.parametrize(("forward", "who"), [(view_read_later, "iadd|add"), (part_read_later, "iadd|add")])
def test_a_view_that_is_read_after_the_change_is_refused(forward: Callable[..., Any], who: str) -> None:
    with pytest.raises(
        GraphError, match=rf"({who}).* in place, and output reads a view of it afterwards; use the form"
    ):
        symbolic(Net(forward), images())


def plain(n: Net, x: Tensor) -> Tensor:
    return n.c(torch.relu(n.b(torch.relu(n.a(x)))).mean((2, 3)))


def hook_cases() -> dict[str, nn.Module]:
    made = {
        name: Net(plain) for name in ("root before", "root behind", "conv before", "conv behind", "keywords", "act")
    }
    made["root before"].register_forward_pre_hook(lambda m, args: ((args[0] - 0.3) / 0.5,))
    made["root behind"].register_forward_hook(lambda m, args, y: y.softmax(1))
    made["conv before"].b.register_forward_pre_hook(lambda m, args: args[0] * 2)
    made["conv behind"].b.register_forward_hook(lambda m, args, y: y * args[0])
    made["keywords"].c.register_forward_hook(lambda m, args, kwargs, y: y + 1, with_kwargs=True)
    made["act"].body = lambda n, x: n.act(n.a(x))
    made["act"].act.register_forward_hook(lambda m, args, y: y.clamp(max=0.1))
    return made


@pytest.mark.parametrize("case", hook_cases())
def test_hooks_that_change_values_are_part_of_the_trace(case: str) -> None:
    assert check_same(hook_cases()[case]).meta["hooks"]


def test_hooks_that_only_look_see_tensors_and_leave_no_trace() -> None:
    model, seen = Net(plain), []
    for part in (model, model.a):
        part.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    module = check_same(model)
    assert not module.meta["hooks"]
    assert set(seen) == {(2, 4), (2, 8, 6, 6)}


def test_forwards_patched_on_the_instance_are_traced_through() -> None:
    circular, method, partial = Net(plain), Net(plain), Net(plain)
    circular.a._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w, b)
    method.b.forward = types.MethodType(lambda self, x: 3 * F.conv2d(x, self.weight, self.bias), method.b)
    partial.forward = functools.partial(lambda self, x: plain(self, x * 2), partial)
    for model, layer in ((circular, "a"), (method, "b"), (partial, None)):
        module = check_same(model)
        called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
        assert called == {"a", "b", "c"} - {layer}


class Options(nn.Module):
    """Arguments of every kind behind the images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)

    def forward(
        self, pixels: Tensor, mask: Tensor | None = None, *more: Tensor, features: bool = False, **rest: Tensor
    ) -> Any:
        torch._assert(pixels.shape[2] == 6, "a size that images always have")
        y = self.a(pixels)
        if mask is not None or more or rest:
            y = y * 0
        return (y, pixels) if features else y


def test_other_arguments_have_their_defaults() -> None:
    module = check_same(Options())
    assert [node.target for node in module.graph.nodes if node.op == "placeholder"] == ["pixels"]
    assert targets(module) == {"pixels", "output"}  # nothing is left of the assertion


def test_a_forward_that_needs_more_than_images_is_told_before_anything_runs() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor, *, scale: float, flag: bool = False) -> Tensor:
            return x + y * scale

    with pytest.raises(GraphError, match=r"forward of Pair needs x, y, scale; .* give y, scale defaults, or wrap"):
        symbolic(Pair(), images())


def python_branch(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    if isinstance(y, Tensor):
        y = y * 3
    return n.c(n.b(y).mean((2, 3)))


def test_python_that_the_trace_does_not_see_is_named_with_the_first_layer() -> None:
    with pytest.raises(
        GraphError, match=r"Net computes something else than its torch\.fx trace: .*, first at b\. Look"
    ):
        symbolic(Net(python_branch), images())
    assert symbolic(Net(python_branch), images(), strict=False).graph is not None


def outputs_of(wrong: int) -> Callable[..., Any]:
    @dataclass
    class Found:
        scores: Tensor
        rest: list[Any]

    def forward(n: Net, x: Tensor) -> Any:
        y = n.a(x)
        return Found(y, [{"late": n.b(y) * (2 if wrong and isinstance(y, Tensor) else 1)}])

    return forward


def test_outputs_are_compared_however_they_are_held() -> None:
    assert symbolic(Net(outputs_of(0)), images()).graph is not None
    with pytest.raises(GraphError, match="first at the output"):
        symbolic(Net(outputs_of(1)), images())
    with pytest.raises(GraphError, match="Net returns a int, in which no tensor is found"):
        symbolic(Net(lambda n, x: 3), images())


def test_a_global_hook_that_changes_values_is_noticed() -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: y * 2 if isinstance(m, nn.Linear) else None
    )
    try:
        with pytest.raises(GraphError, match=r"computes something else than its torch\.fx trace: .*, first at c"):
            symbolic(Net(plain), images())
    finally:
        handle.remove()


def test_randomness_in_evaluation_is_called_so() -> None:
    with pytest.raises(GraphError, match=r"other values when it is run again .* F\.dropout\(x\) without training"):
        symbolic(Net(lambda n, x: F.dropout(plain(n, x))), images())


def test_a_model_compiled_in_place_is_traced_as_it_is_written() -> None:
    model = Net(plain)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert trace(model, images()).layers.keys() == {"a", "b", "c"}
    assert model._compiled_call_impl is compiled
