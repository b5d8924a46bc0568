"""Networks as people hand them over: wrapped, masked, normed, padded by words, with things hung on layers."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import lbs
import lbs.models
from lbs.graph import record_of
from lbs.quant.layers import QuantConv2d, QuantLayer
from lbs.search.freeze import freeze, plan_of
from lbs.search.layers import SEARCH_STATE, SearchLayer
from lbs.search.plain import plain_copy
from lbs.search.prepare import SearchConfig, prepare, uniform
from lbs_kernels.errors import GraphError


def net() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    with torch.no_grad():
        model(images(7))  # statistics that are worth keeping
    return model.eval()


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class _Inner(nn.Module):
    """A network of which one part is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.DataParallel(net())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(net()),
    "AveragedModel": lambda: AveragedModel(net()),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "several": lambda: AveragedModel(nn.DataParallel(net())),
    "inside": _Inner,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off(kind: str) -> None:
    wrapped, x = WRAPPED[kind](), images()
    names = [entry.name for entry in record_of(prepare(wrapped, x)).plan.layers]
    prefix = "part." if kind == "inside" else ""
    assert names == [f"{prefix}{name}" for name in ("0", "3", "7")]
    model = lbs.calibrate(uniform(wrapped, x), [x])
    again: Any = nn.DataParallel(AveragedModel(model))  # as it comes back from training
    packed = lbs.pack(freeze(again).eval())
    assert lbs.verify(again, packed, x).ok
    assert plan_of(again) == plan_of(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_what_is_no_module_of_python_is_refused() -> None:
    name: Any = "resnet18"
    with pytest.raises(GraphError, match=r"the model is a str; give a torch\.nn\.Module"):
        prepare(name, images())
    with pytest.raises(GraphError, match=r"is compiled by torch\.jit; give the module it was made from"):
        prepare(torch.jit.trace(net(), images()), images())


def old_weight_norm(conv: nn.Conv2d) -> str:
    torch.nn.utils.weight_norm(conv)
    return "weight norm"


def weight_norm(conv: nn.Conv2d) -> str:
    parametrizations.weight_norm(conv)
    return "weight norm"


def old_spectral_norm(conv: nn.Conv2d) -> str:
    torch.nn.utils.spectral_norm(conv)
    return "spectral norm"


def spectral_norm(conv: nn.Conv2d) -> str:
    parametrizations.spectral_norm(conv)
    return "spectral norm"


def masks(conv: nn.Conv2d) -> str:
    prune.random_unstructured(conv, "weight", 0.5)
    prune.l1_unstructured(conv, "weight", 0.2)
    prune.random_unstructured(conv, "bias", 0.3)
    return "pruning mask"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("apply", [old_weight_norm, weight_norm, old_spectral_norm, spectral_norm, masks])
def test_computed_weights_become_weights_of_the_copy(
    apply: Callable[[nn.Conv2d], str], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = net(), images()
    what = apply(model[3])
    model.train()(x)  # a weight that hangs on the graph of the last step
    model.eval()
    kept, expected = type(model[3]), model(x)
    with caplog.at_level("WARNING", logger="lbs"):
        copies = [plain_copy(model) for _ in range(2)]
    assert f"3: its {what} is part of its weights in the copy" in caplog.text
    for made in copies:
        assert type(made[3]) is nn.Conv2d
        assert {name for name, _ in made[3].named_parameters()} == {"weight", "bias"}
        assert not made[3]._forward_pre_hooks
        assert torch.equal(made(x), expected)
    assert type(model[3]) is kept
    assert torch.equal(model(x), expected)  # the model given still computes its weights
    assert dict(record_of(uniform(model, x)).unconverted) == {}


def test_other_parametrizations_stay_in_float_with_the_way_out() -> None:
    model = net()
    parametrizations.orthogonal(model[3])
    reasons = dict(record_of(uniform(model, images())).unconverted)
    assert "remove_parametrizations(layer, 'weight') makes it a parameter" in reasons["3"]


PADDED = {
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "even": {"kernel_size": (2, 4), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    "replicate": {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "dilation": 2},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", PADDED)
def test_every_padding_is_packed(kind: str, tmp_path: Any) -> None:
    model, x = net(), images()
    model[3] = nn.Conv2d(16, 8, **PADDED[kind])  # type: ignore[arg-type]
    names, expected = set(model.state_dict()), model(x)
    assert torch.equal(plain_copy(model)(x), expected)
    fixed = lbs.calibrate(uniform(model, x), [x], norms="keep")
    assert isinstance(fixed[3], QuantConv2d)  # type: ignore[index]
    assert names <= set(fixed.state_dict())
    packed = lbs.pack(fixed)
    assert lbs.verify(fixed, packed, images(3)).ok
    with torch.no_grad():
        assert torch.equal(packed(images(3)), fixed(images(3)))
        assert float((packed(x) - expected).norm() / expected.norm()) < 0.05
    words = kind in ("valid", "same")
    assert [name for name, _ in packed.kept_float] == ([] if words else ["pad"])
    searched = lbs.calibrate(prepare(model, x), [x])
    assert plan_of(searched).macs(plan_of(searched).layer("3")) == plan_of(fixed).macs(plan_of(fixed).layer("3"))
    frozen = lbs.calibrate(freeze(searched), [x]).eval()
    assert lbs.verify(frozen, lbs.pack(frozen), x).ok
    packed.save(tmp_path / "padded.lbs.safetensors")
    assert torch.equal(lbs.load(tmp_path / "padded.lbs.safetensors")(x), packed(x))


def test_sizes_set_on_the_instance_as_one_number() -> None:
    model, x = net(), images()
    model[3].stride, model[3].padding, model[3].dilation = 2, 0, 1
    entry = plan_of(prepare(model, x)).layer("3")
    assert (entry.stride, entry.padding, entry.dilation) == ((2, 2), (0, 0), (1, 1))


class _Hung(nn.Module):
    """A layer on which its network has put an attribute, a parameter, buffers and a module, and uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))
        layer: Any = self.b
        layer.gain, layer.power = nn.Parameter(torch.tensor(0.5)), 2
        layer.register_buffer("shift", torch.ones(8, 1, 1))
        layer.register_buffer("lost", torch.ones(1), persistent=False)
        layer.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        b: Any = self.b
        y = torch.relu(b(torch.relu(self.a(x)))) * b.gain**b.power + b.shift * b.lost
        return self.fc(torch.relu(self.c(torch.relu(b.inner(y)))))


@pytest.mark.parametrize("made", ["uniform", "prepared", "frozen", "in float"])
def test_what_hangs_on_a_layer_goes_along(made: str) -> None:
    torch.manual_seed(0)
    model, x = _Hung(), images()
    config = SearchConfig(bits=(32,)) if made == "in float" else SearchConfig()
    if made == "uniform":
        changed = lbs.calibrate(uniform(model, x), [x])
    else:
        changed = lbs.calibrate(prepare(model, x, config), [x])
    if made in ("frozen", "in float"):
        changed = freeze(changed)
        assert not set(SEARCH_STATE) & set(vars(changed.b))
    assert set(model.state_dict()) <= set(changed.state_dict())
    assert not [key for key in changed.state_dict() if key.endswith("lost")]
    assert changed.b.power == 2  # type: ignore[union-attr]
    assert isinstance(changed.b.inner, QuantLayer) != (made == "in float" and isinstance(changed.b.inner, nn.Conv2d))  # type: ignore[union-attr]
    again = pickle.loads(pickle.dumps(changed.eval()))  # noqa: S301
    assert torch.equal(again(x), changed(x))
    other = copy.deepcopy(changed)
    other.load_state_dict(changed.state_dict())


def test_state_of_the_search_is_named_in_full() -> None:
    """What a searchable layer has beside one of fixed bits, so that nothing of it is taken for the user's."""
    searched = prepare(lbs.models.create("digits_resnet8"), lbs.models.example("digits_resnet8"))
    layer = next(m for m in searched.modules() if isinstance(m, SearchLayer) and m.prune is not None)
    fixed = QuantConv2d(1, 1, 1)
    names = [{*vars(m), *m._modules, *m._parameters, *m._buffers} for m in (layer, fixed)]
    assert names[0] - names[1] == set(SEARCH_STATE)


class _Special(nn.Conv2d):
    """A convolution like torch's that can do more."""

    def normalised(self) -> Tensor:
        return self.weight / self.weight.norm()


def test_a_layer_with_methods_of_its_own_stays_what_it_is() -> None:
    model = net()
    model[3] = _Special(16, 8, 3)
    changed = uniform(model, images())
    assert type(changed[3]) is _Special  # type: ignore[index]
    assert (
        "_Special has methods that a quantized layer has not: normalised" in dict(record_of(changed).unconverted)["3"]
    )


@pytest.mark.parametrize("multi_path", [False, True])
def test_parameters_that_are_not_trained_are_not_trained_afterwards(multi_path: bool) -> None:
    model, x = lbs.models.create("digits_resnet8"), torch.rand(4, 1, 8, 8)
    held = {"conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.bias", "fc.bias"}
    for name in held:
        model.get_parameter(name).requires_grad_(False)
    searched = lbs.calibrate(prepare(model, x, SearchConfig(multi_path=multi_path)), [x])
    ranges = {"layer1.0.conv2.w_range"}
    searched.get_parameter(*ranges).requires_grad_(False)
    searched.get_submodule("layer1.0.conv1").prune.hold((0,), -1)  # type: ignore[union-attr,operator]
    frozen = freeze(searched)
    assert frozen.get_parameter("layer1.0.conv1.weight").shape[0] == 12
    assert {name for name, p in frozen.named_parameters() if not p.requires_grad} == held | ranges
    fixed = uniform(model, x)
    assert {name for name, p in fixed.named_parameters() if not p.requires_grad} == held


def test_the_default_dtype_changes_nothing() -> None:
    x = images()

    def run() -> list[Tensor]:
        searched = lbs.calibrate(prepare(copy.deepcopy(model), x), [x]).train()
        budget = lbs.Budget(searched, bops=0.05)
        (searched(x).square().mean() + budget()).backward()
        budget.step()
        budget.finish()
        frozen = lbs.calibrate(freeze(searched), [x]).eval()
        fixed = lbs.calibrate(uniform(copy.deepcopy(model), x), [x])
        tensors = [*searched.state_dict().values(), *frozen.state_dict().values(), *fixed.state_dict().values()]
        with torch.no_grad():
            return [*tensors, lbs.pack(frozen)(x), lbs.pack(fixed)(x)]

    model = net()
    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_buffers_that_are_no_weights_may_hold_anything() -> None:
    model = net()
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert record_of(uniform(model, images())).plan.layers
    with torch.no_grad():
        model[1].running_var[0], model[3].weight[0, 0, 0, 0], model[7].bias[0] = (float("nan"),) * 3
    with pytest.raises(GraphError, match=r"^3\.weight, 7\.bias, 1\.running_var hold NaN or infinite values"):
        uniform(model, images())


def test_what_cannot_be_copied_is_named() -> None:
    model = net()
    model[3].guard = threading.Lock()
    for make in (prepare, uniform):
        with pytest.raises(GraphError, match=r"Sequential cannot be copied: 3\.guard \(TypeError: cannot pickle"):
            make(model, images())
    del model[3].guard
    searched: Any = prepare(model, images())
    searched.guard = threading.Lock()
    with pytest.raises(GraphError, match=r"cannot be copied: guard"):
        freeze(searched)
    model.seen = model[0](images())  # hangs on the graph of the last step
    assert torch.equal(uniform(model, images()).seen, model.seen)  # type: ignore[arg-type]
    assert model.seen.requires_grad


def test_forwards_that_lead_out_of_the_copy_are_refused() -> None:
    model = net()
    inner = model.forward
    model.forward = lambda x: inner(x * 2)
    with pytest.raises(GraphError, match="forward of the model is patched on the instance"):
        prepare(model, images())


def test_all_layers_that_cannot_be_packed_are_told_at_once() -> None:
    sizes = (3, 33026, 2, 33026, 2)
    layers = nn.Sequential(*(nn.Conv2d(one, other, 1) for one, other in pairwise(sizes)))
    with pytest.raises(GraphError) as seen:
        prepare(layers, torch.rand(1, 3, 2, 2))
    lines = str(seen.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["1", "3"]
    assert all("leave it in float" in line for line in lines)
