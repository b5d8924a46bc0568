"""Every network that packs can be saved, and loads again as the same thing: parts, names, values and outputs."""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

import lbs
from lbs.packing import float_modules, graph_json, vocabulary
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.quant.frozen_norm import FrozenNorm
from lbs_kernels.errors import CheckpointError

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A layer, whatever is in the middle, a layer."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.middle = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.middle(self, self.stem(x))


def rows(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def comes_back(model: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> PackedModel:
    """Save and load; the same outputs to the last bit, in the same containers."""
    torch.manual_seed(1)
    packed = pack(pack_nets.quantized(model, shape))
    packed.save(path / "net")
    loaded = lbs.load(path / "net")
    x = pack_nets.images(3, shape)
    with torch.no_grad():
        (one, form), (other, again) = pytree.tree_flatten(packed(x)), pytree.tree_flatten(loaded(x))
    assert form == again
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert set(loaded.state_dict()) == set(packed.state_dict())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    loaded.save(path / "again")
    assert (path / "again").read_bytes() == (path / "net").read_bytes()
    return loaded


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "prelu": lambda: nn.PReLU(8),
    "sync_norm": lambda: nn.SyncBatchNorm(8),
    "instance_norm": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "group_norm": lambda: nn.GroupNorm(2, 8, affine=False),
    "local_response": lambda: nn.LocalResponseNorm(3),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, 2, output_padding=1, groups=2, bias=False),
    "reflected": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(8, 8, (3, 1), padding="same"),
    "zero_pad": lambda: nn.ZeroPad2d((1, 2, 0, 1)),
    "constant_pad": lambda: nn.ConstantPad2d(1, 0.25),
    "reflection_pad": lambda: nn.ReflectionPad2d(1),
    "circular_pad": lambda: nn.CircularPad2d(1),
    "softplus": lambda: nn.Softplus(2.0),
    "threshold": lambda: nn.Threshold(0.1, 0.2, inplace=True),
    "infinite_bound": lambda: nn.Sequential(nn.Hardtanh(-0.5, float("inf")), nn.Mish()),
    "power_pool": lambda: nn.LPPool2d(2, 2),
    "adaptive_max": lambda: nn.AdaptiveMaxPool2d((None, 3)),
    "upsample": lambda: nn.Upsample(size=(7, 7), mode="bilinear", align_corners=True),
    "nearest": lambda: nn.UpsamplingNearest2d(scale_factor=2),
    "shuffle": lambda: nn.Sequential(nn.ChannelShuffle(2), nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
    "folded": lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Fold(8, 2, stride=2)),
    "unflattened": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_layers_of_torch_on_images(name: str, tmp_path: Path) -> None:
    comes_back(Net(lambda n, y: n.last(n.odd(torch.sigmoid(y))), odd=IMAGES[name]()), tmp_path)


SERIES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any]]] = {
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 8, 2), nn.MaxPool1d(2)),
        lambda n, y: n.odd(y.flatten(2)),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(8, 8, (1, 3, 3)), nn.BatchNorm3d(8), nn.ConvTranspose3d(8, 8, 1)),
        lambda n, y: n.odd(y.unsqueeze(2)),
    ),
    "lstm": (lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), lambda n, y: n.odd(rows(y))[0]),
    "gru": (lambda: nn.GRU(8, 6, bias=False), lambda n, y: n.odd(rows(y))),
    "layer_norm": (lambda: nn.LayerNorm(8, bias=False), lambda n, y: n.odd(rows(y))),
    "root_norm": (lambda: nn.RMSNorm(8, eps=1e-6), lambda n, y: n.odd(rows(y))),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        lambda n, y: n.odd(rows(y), rows(y), rows(y), need_weights=False)[0],
    ),
    "transformer_layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True),
        lambda n, y: n.odd(rows(y)),
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8)),
        lambda n, y: n.odd(rows(y)),
    ),
    "embedding": (
        lambda: nn.Embedding(10, 5, padding_idx=1),
        lambda n, y: n.odd((y.abs() * 3).clamp(max=9).long()),
    ),
    "bilinear": (lambda: nn.Bilinear(8, 8, 3), lambda n, y: n.odd(rows(y), rows(y))),
    "distance": (lambda: nn.PairwiseDistance(1.0, keepdim=True), lambda n, y: n.odd(rows(y), rows(y) + 1)),
}


@pytest.mark.parametrize("name", SERIES)
def test_layers_of_torch_on_series(name: str, tmp_path: Path) -> None:
    make, forward = SERIES[name]
    comes_back(Net(forward, odd=make()), tmp_path)


VALUES: dict[str, Callable[[Any, Tensor], Any]] = {
    "dtypes": lambda n, y: n.last(y.to(torch.float64).to(y.dtype).to(memory_format=torch.channels_last).float()),
    "slices": lambda n, y: n.last(y[..., ::2, :][:, None][:, 0]),
    "attributes": lambda n, y: y.flatten(2).mT.to(y.device),
    "infinity": lambda n, y: n.last(F.leaky_relu(torch.where(y > 0, y, float("-inf")).clamp(min=-5.0), 0.1)),
    "attend": lambda n, y: F.scaled_dot_product_attention(rows(y), rows(y), rows(y)),
    "signal": lambda n, y: torch.fft.irfft2(torch.fft.rfft2(y)),
    "einsum": lambda n, y: torch.einsum("nchw,nchw->nc", y, y).cumsum(1).erf(),
}


@pytest.mark.parametrize("name", VALUES)
def test_functions_methods_and_constants(name: str, tmp_path: Path) -> None:
    comes_back(Net(VALUES[name]), tmp_path)


NAMES = ["my-layer", "größe", "0", "a b", "日本", "x{y}", "weight's", "back\\slash", "%s"]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of the trace, in code that torch.fx writes
@pytest.mark.parametrize("name", NAMES)
def test_module_names_of_any_characters(name: str, tmp_path: Path) -> None:
    parts = {name: nn.Sequential(nn.GELU(), nn.GroupNorm(2, 8)), f"{name}2": nn.Conv2d(8, 8, 1)}
    loaded = comes_back(Net(lambda n, y: n.last(n._modules[f"{name}2"](n._modules[name](y))), **parts), tmp_path)
    assert any(label.startswith(name) for label, _ in loaded.kept_float)


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Result:
    logits: Any = None
    hidden: Any = None


@dataclasses.dataclass
class Mapped(collections.OrderedDict):  # type: ignore[type-arg]
    """As model libraries have it: a dict of the fields that are there, and a data class."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


OUTPUTS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Any]]] = {
    "numbers": (lambda n, y: {0: n.last(y), 1: y}, lambda out: list(out) == [0, 1]),
    "keys": (
        lambda n, y: {True: y, None: 1.5, (2, "a"): "text", 2.5: [y, (y,)]},
        lambda out: type(out[2.5][1]) is tuple,
    ),
    "named_tuple": (lambda n, y: Pair(y, n.last(y)), lambda out: type(out) is tuple and len(out) == 2),
    "data_class": (lambda n, y: {"a": Result(n.last(y), [y])}, lambda out: set(out["a"]) == {"logits", "hidden"}),
    "mapped": (lambda n, y: Mapped(n.last(y)), lambda out: type(out) is dict and list(out) == ["logits"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_any_form(name: str, tmp_path: Path) -> None:
    forward, holds = OUTPUTS[name]
    loaded = comes_back(Net(forward), tmp_path)
    assert holds(loaded(pack_nets.images(2, SHAPE)))


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def computed(kind: str) -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    if kind == "parametrized":
        parametrize.register_parametrization(layer, "weight", Doubling())
        return layer
    if kind == "pruned":
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
        layer.weight = layer.weight.detach()  # as it is after a pass without gradients
        return layer
    ways = {"weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm}
    ways["new_weight_norm"] = parametrizations.weight_norm  # type: ignore[assignment]
    ways["new_spectral_norm"] = parametrizations.spectral_norm
    made = ways[kind](layer).eval()
    with torch.no_grad():
        made(torch.zeros(1, 8, 4, 4))
    return made


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "new_weight_norm", "new_spectral_norm", "pruned", "parametrized"]
)
def test_weights_that_are_computed(kind: str, tmp_path: Path) -> None:
    model = Net(lambda n, y: n.last(n.odd(y)), odd=computed(kind))
    x = pack_nets.images(2, SHAPE)
    with torch.no_grad():
        before = model.eval()(x)
        comes_back(model, tmp_path)
        assert torch.equal(model(x), before)  # what was made permanent is the copy's


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class Halving(nn.AvgPool2d):
    def __init__(self) -> None:
        super().__init__(2, divisor_override=3)  # of no packed form


class AskedRelu(nn.ReLU):
    """Its code asks a tensor for its values, so no trace goes through it."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(input) if float(input.abs().sum()) >= 0 else input


@fx.wrap
def halved(x: Tensor, times: int) -> Tensor:
    return halved(x * 0.5, times - 1) if times > 1 else x * 0.5


def test_modules_and_functions_of_the_users_own_become_torchs(tmp_path: Path) -> None:
    model = Net(
        lambda n, y: n.last(n.own(y)) + halved(n.shaped(y), 1).mean(), own=Standardized(8, 8, 3), shaped=Halving()
    )
    loaded = comes_back(model, tmp_path)
    kinds = {type(module) for module in loaded.body.children()}
    assert nn.AvgPool2d in kinds
    assert not kinds & {Standardized, Halving}
    assert any(node.target is torch.std or node.target == "std" for node in loaded.body.graph.nodes)


def test_a_trace_that_computes_something_else_is_not_taken(tmp_path: Path) -> None:
    """Where a proxy is told from a tensor, the part is recorded as it runs."""

    class Unlike(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return torch.tan(input) if isinstance(input, Tensor) else input * 3

    loaded = comes_back(Net(lambda n, y: n.last(n.odd(y)), odd=Unlike()), tmp_path)
    assert [node.target for node in loaded.body.graph.nodes].count(torch.tan) == 1


def test_parts_that_no_file_holds_are_told_by_pack_and_all_at_once_by_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net(lambda n, y: n.last(n.one(y)) + n.two(y).mean(), one=AskedRelu(), two=AskedRelu())
    with caplog.at_level(logging.WARNING, "lbs"):
        packed = pack(pack_nets.quantized(model, SHAPE))
    told = [text for text in caplog.messages if "cannot be saved" in text]
    assert [text.split("saved: ")[1] for text in told] == ["one is a AskedRelu", "two is a AskedRelu"]
    with pytest.raises(CheckpointError, match=r"one is a AskedRelu; two is a AskedRelu.*torch's own layers"):
        packed.save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_whose_weight_is_read_beside_it(tmp_path: Path) -> None:
    tied = nn.ConvTranspose2d(8, 8, 3, padding=1)
    loaded = comes_back(Net(lambda n, y: F.conv2d(n.tied(y).sigmoid(), n.tied.weight, padding=1), tied=tied), tmp_path)
    assert loaded.body.tied.weight.data_ptr() == loaded.body.get_parameter("tied.weight").data_ptr()


class FrozenBatchNorm2d(nn.Module):
    """As detection networks have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", torch.rand(channels) + 0.5), ("bias", torch.randn(channels))):
            self.register_buffer(name, value)
        for name, value in (("running_mean", torch.randn(channels)), ("running_var", torch.rand(channels) + 0.5)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (value.reshape(1, -1, 1, 1) for value in self.buffers())
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_norms_are_norms(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Net(lambda n, y: n.last(torch.relu(n.norm(y))), norm=FrozenBatchNorm2d(8))
    quantized = pack_nets.quantized(copy.deepcopy(model), SHAPE)
    norm = quantized.norm
    assert isinstance(norm, FrozenNorm)
    assert not norm.train().training
    assert not any(parameter.requires_grad for parameter in norm.parameters())
    x = pack_nets.images(3, SHAPE)
    searched = lbs.prepare(model.eval(), x)
    assert torch.allclose(
        searched.norm(x.repeat(1, 3, 1, 1)[:, :8]), model.norm(x.repeat(1, 3, 1, 1)[:, :8]), atol=1e-5
    )
    before = searched.train().norm.running_mean.clone()
    searched(x)
    lbs.calibrate(searched, [x], norms="estimate")
    assert torch.equal(searched.norm.running_mean, before)
    assert pack(quantized).kept_float == ()
    with torch.no_grad():
        assert torch.equal(pack(quantized)(x), quantized(x))
    comes_back(Net(lambda n, y: n.last(n.norm(y.sigmoid()).sigmoid()), norm=FrozenBatchNorm2d(8)), tmp_path)


# What a file may say of a module.


def entry(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class": kind, "arguments": {"dict": arguments}}


LIES = {
    "another_class": (entry("ModuleList"), "which this release does not know"),
    "unknown_argument": (entry("ReLU", hook="x"), "takes inplace"),
    "flag": (entry("ReLU", inplace=1), "inplace = 1"),
    "word": (entry("GELU", approximate=3), "approximate = 3"),
    "text_for_a_size": (entry("Conv2d", in_channels="3", out_channels=3, kernel_size=1), "in_channels = '3'"),
    "fraction": (entry("Linear", in_features=2.5, out_features=2), "in_features = 2.5"),
    "too_large": (entry("Linear", in_features=1 << 31, out_features=2), "in_features = 2147483648"),
    "too_many": (entry("ZeroPad2d", padding={"tuple": [1] * 17}), "padding = "),
    "nested": (entry("ZeroPad2d", padding={"tuple": [{"tuple": [1]}]}), "padding = "),
    "endless_layers": (
        entry("LSTM", input_size=2, hidden_size=2, num_layers=1 << 30),
        "1073741824 layers and 0 tensors",
    ),
    "node": (entry("ReLU", inplace={"node": "x"}), "'x'"),
}


@pytest.mark.parametrize("name", LIES)
def test_arguments_are_checked_before_a_module_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, message = LIES[name]
    monkeypatch.setattr(float_modules.torch, "device", None)  # what modules are made under
    with pytest.raises((CheckpointError, KeyError), match=message):
        float_modules.module_from_json("it", body, {})


def test_tensors_of_another_shape_are_refused_and_none_is_allocated() -> None:
    body = entry("Linear", in_features=1 << 30, out_features=1 << 30, bias=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        float_modules.module_from_json("it", body, {"weight": torch.zeros(2, 2)})


NODES: dict[str, tuple[dict[str, Any], str]] = {
    "quote_in_a_path": ({"op": "call_module", "target": 'a"+str(1)+"'}, "does not have"),
    "quote_in_an_attribute": ({"op": "get_attr", "target": 'a"+str(1)+"'}, "names no module"),
    "line_end": ({"op": "get_attr", "target": "a\nimport os"}, "names no module"),
    "empty_part": ({"op": "get_attr", "target": "a..b"}, "names no module"),
    "keyword": ({"op": "get_attr", "target": "a.lambda"}, "names no module"),
    "dunder": ({"op": "call_function", "target": "builtins.getattr", "args": ["x", "__class__"]}, "reads"),
    "computed_name": ({"op": "call_function", "target": "builtins.getattr", "args": ["x", {"node": "x"}]}, "reads"),
    "method": ({"op": "call_method", "target": "__reduce__"}, "calls the method"),
    "function": ({"op": "call_function", "target": "torch.load"}, "does not know"),
    "value": ({"op": "call_method", "target": "add", "args": ["x", {"eval": "1"}]}, "value of kind 'eval'"),
    "dtype": ({"op": "call_method", "target": "to", "args": ["x", {"dtype": "storage"}]}, "damaged"),
    "key_twice": ({"op": "call_method", "target": "add", "args": ["x", {"items": [[1, 2], [1, 3]]}]}, "a key twice"),
}


@pytest.mark.parametrize("name", NODES)
def test_graphs_that_nobody_wrote(name: str) -> None:
    fields, message = NODES[name]
    args = [{"node": "x"} if value == "x" else value for value in fields.get("args", ["x"])]
    node = {"name": "y", **fields, "args": {"tuple": args}}
    nodes = [
        {"name": "x", "op": "placeholder", "target": "x", "args": {"tuple": []}},
        node,
        {"name": "output", "op": "output", "target": "output", "args": {"tuple": [{"node": "y"}]}},
    ]
    with pytest.raises(CheckpointError, match=message):
        graph_json.graph_from_json({"nodes": nodes, "modules": {}}, [], {})


def test_every_argument_of_a_listed_module_is_of_one_kind() -> None:
    kinds = (vocabulary.FLAGS, vocabulary.WORDS, vocabulary.NUMBERS)
    assert not any(one & other for one in kinds for other in kinds if one is not other)
    listed = {name for arguments in vocabulary.MODULES.values() for name in arguments}
    assert set().union(*kinds) <= listed
