"""Activations, squeeze-and-excite and the order of both: inside one region, and equal to the frozen network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pack_nets
import pytest
import torch
from test_pack_patterns import Net, head, packed_net
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.packing.model import PackedModel
from lbs.quant import deployed
from lbs.quant.activations import FUNCTIONS, function_of
from lbs_kernels.program.activations import KINDS
from lbs_kernels.program.steps import PROGRAM_VERSION, Activation, Emit, PoolStep, Program

SHAPE = (3, 9, 7)
Middle = Callable[[Net, Tensor], Tensor]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "mish": nn.Mish,
    "prelu": lambda: nn.PReLU(8),
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x, 0.7),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, negative_slope=0.2),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "silu": lambda x: F.silu(x, True),
    "tanh": lambda x: x.tanh(),
}


class Excite(nn.Module):
    """A gate of its own kind beside the net; `gate` makes it of the pixels."""

    def __init__(self, gate: Callable[[Excite, Tensor], Tensor]) -> None:
        super().__init__()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.fc1, self.fc2, self.one = nn.Linear(8, 5, bias=False), nn.Linear(5, 8, bias=False), nn.Conv2d(8, 8, 1)
        self.relu, self.act = nn.ReLU(), nn.SiLU()
        self.sigmoid, self.hard = nn.Sigmoid(), nn.Hardsigmoid()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self, x)


def identical(model: nn.Module) -> PackedModel:
    """Packed whole, and equal on every back end; its outputs are those of the model, every bit."""
    packed = pack_nets.check_equal(model, SHAPE)
    assert packed.kept_float == ()
    assert len(packed.programs) == 1
    x = pack_nets.images(64, SHAPE, 7)
    with torch.no_grad():
        assert torch.equal(model(x), packed(x))
    return packed


def net(middle: Middle, **extra: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    made = Net(middle, kernel_size=1, padding=0)  # what a signed activation is read by pads nothing
    for name, module in extra.items():
        setattr(made, name, module)
    return pack_nets.quantized(made, SHAPE, 8, 8)


def emits(program: Program) -> list[Emit]:
    return [step.emit for step in program.steps]


@pytest.mark.parametrize("kind", MODULES)
def test_modules_become_activations_of_the_step_before(kind: str) -> None:
    model = net(lambda n, x: head(n, n.other(n.act(n.norm2(n.inner(x))))), act=MODULES[kind]())
    (program,) = identical(model).programs
    (activation,) = [emit.activation for emit in emits(program) if emit.activation is not None]
    value = {"elu": 0.7, "leaky_relu": 0.2}.get(kind, 0.0)
    slope = "inner.slope" if kind == "prelu" else None
    assert activation == Activation(kind, float(torch.tensor(value)), slope)  # type: ignore[arg-type]
    assert emits(program)[2].activation is activation


@pytest.mark.parametrize("kind", CALLS)
def test_functions_become_activations(kind: str) -> None:
    """Called as functions they are evaluated as torch does, which is not to the last bit what packed networks do."""
    packed = packed_net(lambda n, x: head(n, n.other(CALLS[kind](n.norm2(n.inner(x))))))
    assert packed.kept_float == ()
    value = {"elu": 0.7, "leaky_relu": 0.2}.get(kind, 0.0)
    assert emits(packed.programs[0])[2].activation == Activation(kind, float(torch.tensor(value)))  # type: ignore[arg-type]


def test_every_kind_has_a_module() -> None:
    assert sorted(MODULES) == sorted(KINDS)
    assert {type(make()) for make in MODULES.values()} == set(FUNCTIONS)


def test_one_slope_for_all_channels_is_a_leaky_relu() -> None:
    model = net(lambda n, x: head(n, n.other(n.act(n.inner(x)))), act=nn.PReLU(init=0.3))
    (program,) = identical(model).programs
    assert emits(program)[2].activation == Activation("leaky_relu", float(torch.tensor(0.3)))


# name: the pattern, and per step behind the stem (activation kind, in front, gate, residual, low)
ORDERS: dict[str, tuple[Middle, list[tuple[str | None, bool, bool, bool, float | None]]]] = {
    "before_a_sum": (lambda n, x: head(n, x + n.act(n.inner(x))), [("silu", True, False, True, None)]),
    "behind_a_sum": (lambda n, x: head(n, n.act(x + n.inner(x))), [("silu", False, False, True, None)]),
    "before_a_sum_and_relu": (lambda n, x: head(n, n.relu(x + n.act(n.inner(x)))), [("silu", True, False, True, 0.0)]),
    "then_relu": (lambda n, x: head(n, n.relu(n.act(n.inner(x)))), [("silu", False, False, False, 0.0)]),
    "behind_relu": (
        lambda n, x: head(n, n.act(n.relu(n.inner(x)))),
        [(None, False, False, False, 0.0), ("silu", False, False, False, None)],
    ),
    "twice": (
        lambda n, x: head(n, n.tanh(n.act(n.inner(x)))),
        [("silu", False, False, False, None), ("tanh", False, False, False, None)],
    ),
    "on_both_sides_of_a_sum": (
        lambda n, x: head(n, n.tanh(x + n.act(n.inner(x)))),
        [("silu", True, False, True, None), ("tanh", False, False, False, None)],
    ),
    "norm_behind": (
        lambda n, x: head(n, n.norm2(n.act(n.inner(x)))),
        [("silu", False, False, False, None), (None, False, False, False, None)],
    ),
    "behind_a_norm_of_a_stream": (
        lambda n, x: head(n, x + n.inner(n.act(n.norm2(x)))),
        [("silu", False, False, False, None), (None, False, False, True, None)],
    ),
    "of_a_mean": (lambda n, x: n.fc(n.act(n.mean(n.inner(x))).flatten(1)), [(None, False, False, False, None)]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_activations_and_sums(name: str) -> None:
    middle, expected = ORDERS[name]
    (program,) = identical(net(middle, act=nn.SiLU(), tanh=nn.Tanh())).programs
    found = [
        (e.activation and e.activation.kind, bool(e.activation and e.activation.first), e.gate is not None,
         e.residual is not None, e.low)
        for e in emits(program)[2:]
    ]  # fmt: skip
    assert found[: len(expected)] == expected
    pooled = found[len(expected)]
    assert pooled[0] == ("silu" if name == "of_a_mean" else None)


GATES: dict[str, Callable[[Excite, Tensor], Tensor]] = {
    "convolutions": lambda m, x: m.sigmoid(m.expand(m.act(m.reduce(m.mean(x))))) * x,
    "hard": lambda m, x: x * m.hard(m.expand(m.relu(m.reduce(m.mean(x))))),
    "one_convolution": lambda m, x: x * m.hard(m.one(m.mean(x))),
    "linear": lambda m, x: (
        x * m.sigmoid(m.fc2(m.relu(m.fc1(m.mean(x).view(x.size(0), -1))))).view(x.size(0), x.size(1), 1, 1)
    ),
    "repeated": lambda m, x: (
        x * m.sigmoid(m.fc2(m.relu(m.fc1(m.mean(x).flatten(1))))).view(x.shape[0], 8, 1, 1).expand_as(x)
    ),
    "in_place": lambda m, x: x.mul_(m.sigmoid(m.one(m.mean(x)))),
    "of_what_it_reads": lambda m, x: x * m.mean(x),
}


@pytest.mark.parametrize("name", GATES)
def test_squeeze_and_excite_stays_inside(name: str) -> None:
    model = net(lambda n, x: head(n, n.other(n.excite(n.act(n.inner(x))))), act=nn.SiLU(), excite=Excite(GATES[name]))
    (program,) = identical(model).programs
    (gated,) = [step for step in program.steps if step.emit.gate is not None]
    assert gated.op == "quantpack"
    assert gated.emit.consumers  # what reads the product, encoded where it is computed


GATED_ORDERS: dict[str, Middle] = {
    "sum_behind": lambda n, x: head(n, n.relu(x + n.excite(n.norm2(n.inner(x))))),
    "activation_behind": lambda n, x: head(n, n.act(n.excite(n.norm2(n.inner(x))))),
    "activation_and_sum_behind": lambda n, x: head(n, x + n.act(n.excite(n.norm2(n.inner(x))))),
    "sum_and_activation_behind": lambda n, x: head(n, n.act(x + n.excite(n.norm2(n.inner(x))))),
    "norm_behind": lambda n, x: head(n, n.norm2(n.excite(n.inner(x)))),
    "relu_before": lambda n, x: head(n, n.excite(n.relu(n.inner(x)))),
    "twice": lambda n, x: head(n, n.excite(n.excite2(n.inner(x)))),
    "of_another": lambda n, x: head(n, n.act(n.inner(x)) * n.excite.sigmoid(n.excite.one(n.mean(x)))),
    "of_a_gate": lambda n, x: (lambda g: n.fc((g * g).flatten(1)))(n.mean(n.inner(x))),
    "pooled": lambda n, x: head(n, n.other(n.pool(n.relu(n.excite(n.inner(x)))))),
}


@pytest.mark.parametrize("name", GATED_ORDERS)
def test_order_of_gates(name: str) -> None:
    gate = GATES["convolutions"]
    model = net(GATED_ORDERS[name], act=nn.SiLU(), excite=Excite(gate), excite2=Excite(gate))
    (program,) = identical(model).programs
    assert any(emit.gate is not None for emit in emits(program))


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 1, 1), (3, 2, 1), ((2, 3), (1, 2), (1, 0))])
def test_averages_of_windows_stay_inside(window: tuple[object, ...]) -> None:
    model = net(lambda n, x: head(n, n.other(n.average(n.inner(x)))), average=nn.AvgPool2d(*window))  # type: ignore[arg-type]
    (program,) = identical(model).programs
    assert [step.kind for step in program.steps if isinstance(step, PoolStep)] == ["average", "mean"]


def test_a_product_of_two_convolutions_and_a_gate_behind_one_is_one_step() -> None:
    model = net(GATED_ORDERS["of_another"], act=nn.SiLU(), excite=Excite(GATES["linear"]))
    (program,) = identical(model).programs
    (gated,) = [step for step in program.steps if step.emit.gate is not None]
    assert (gated.op, gated.name) == ("bitconv2d", "inner")
    assert gated.emit.activation == Activation("silu", first=True)


def test_slopes_of_flattened_pixels_and_repeated_numbers_stay_in_float() -> None:
    model = net(lambda n, x: n.wide(n.act(n.pool(n.inner(x)).flatten(1))), act=nn.PReLU(160))
    packed = pack_nets.check_equal(model, SHAPE)
    assert dict(packed.kept_float)["act"] == "it has 160 slopes for 8 channels, flattened"
    repeated = net(lambda n, x: head(n, n.other(n.mean(x).expand_as(x) * 2 + n.inner(x))))
    assert "expand_as" in dict(pack_nets.check_equal(repeated, SHAPE).kept_float)


def test_an_activation_with_a_forward_of_its_own_stays_in_float() -> None:
    class Half(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model = net(lambda n, x: head(n, n.other(n.act(n.inner(x)))), act=Half())
    packed = pack_nets.check_equal(model, SHAPE)
    assert dict(packed.kept_float)["act"] == "Half has a forward of its own"


@pytest.mark.parametrize("kind", MODULES)
def test_a_frozen_activation_computes_the_formula_in_evaluation_alone(kind: str) -> None:
    module, x = MODULES[kind](), torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * 3
    plain = type(module)
    wrapped = nn.Sequential(module)
    deployed.deploy(wrapped, ())
    assert type(module) is not plain
    with torch.no_grad():
        exact = function_of(module)(x)
        assert torch.equal(wrapped.eval()(x.clone()), exact)
        assert torch.equal(wrapped.train()(x.clone()), plain.forward(module, x.clone()))
        wide = copy.deepcopy(wrapped).double().eval()
        assert torch.equal(wide(x.double()), plain.forward(wide[0], x.double()))
        torch.testing.assert_close(exact, plain.forward(module, x.clone()), rtol=2e-6, atol=1e-6)
    gradient = x.clone().requires_grad_()
    (wrapped(gradient * 1) * x).sum().backward()
    assert gradient.grad is not None
    deployed.undeploy(module)
    assert type(module) is plain


def test_a_saved_network_of_activations_and_gates_comes_back(tmp_path: object) -> None:
    model = net(GATED_ORDERS["activation_and_sum_behind"], act=nn.GELU(), excite=Excite(GATES["hard"]))
    packed = identical(model)
    path = f"{tmp_path}/network.lbs.safetensors"
    packed.save(path)
    loaded = lbs.load(path)
    assert [program.version for program in loaded.programs] == [PROGRAM_VERSION]
    x = pack_nets.images(3, SHAPE, 8)
    assert torch.equal(loaded(x), packed(x))
