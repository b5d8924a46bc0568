"""Networks of lines [N, C, L] run as those of images of height 1: one region, the bits of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
from test_pack_exact import frozen
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.cost import network_layers
from lbs.graph import record_of, trace
from lbs.search.prepare import conversion_report
from lbs.symbolic import symbolic
from lbs.traced import Evaluation, evaluating, run
from lbs_kernels.errors import GraphError, ShapeError

SHAPE = (3, 50)


def conv(inputs: int, filters: int, taps: int = 3, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(inputs, filters, taps, padding=taps // 2, **options)


def normed(inputs: int, filters: int, taps: int = 3, **options: Any) -> list[nn.Module]:
    return [conv(inputs, filters, taps, bias=False, **options), nn.BatchNorm1d(filters), nn.ReLU(inplace=True)]


def equal(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    """Every back end has the same tensors, and they are those of the model as it is evaluated, bit for bit."""
    packed = pack_nets.check_equal(model, shape)
    x = pack_nets.images(3, shape, 6)
    with torch.no_grad():
        pack_nets.assert_same(packed(x), model(x))
    return packed


def one_region(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Any:
    packed = equal(model, shape)
    assert len(packed.regions) == 1
    assert packed.kept_float == ()
    return packed


def between(*parts: nn.Module, inputs: int = 8) -> nn.Sequential:
    return nn.Sequential(*normed(3, 8), *parts, conv(inputs, 5))


WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 5},
    "stride": {"kernel_size": 7, "stride": 3, "padding": 2},
    "dilation": {"kernel_size": 3, "dilation": 4, "padding": 4},
    "groups": {"kernel_size": 3, "groups": 4},
    "depthwise": {"kernel_size": 9, "groups": 8, "padding": 4},
    "same": {"kernel_size": 5, "padding": "same", "dilation": 2},
    "no_bias": {"kernel_size": 2, "stride": 2, "bias": False},
}


@pytest.mark.parametrize("bits", [(2, 2), (4, 8), (8, 8)])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, bits: tuple[int, int]) -> None:
    model = between(nn.Conv1d(8, 8, **WINDOWS[name]), nn.BatchNorm1d(8), nn.ReLU())
    one_region(pack_nets.quantized(model, SHAPE, *bits))


def test_the_graph_rounds_once_behind_a_layer_as_the_network_does() -> None:
    """A norm that lost what its layer computed rounds twice: half of the outputs differ in their last bit."""
    model = pack_nets.quantized(nn.Sequential(*normed(3, 8), conv(8, 8), nn.BatchNorm1d(8)), SHAPE, 8, 8)
    x = pack_nets.images(8, SHAPE, 6)
    with evaluating(model):
        graph = symbolic(model, x, strict=False)
        pack_nets.assert_same(Evaluation(graph).run(x), run(model, x))


@pytest.mark.parametrize(
    "options", [{"padding_mode": "circular"}, {"padding_mode": "reflect"}, {"kernel_size": 4, "padding": "same"}]
)
def test_other_padding_is_done_before_the_layer(options: dict[str, Any]) -> None:
    model = between(nn.Conv1d(8, 8, **{"kernel_size": 5, "padding": 2, **options}), nn.ReLU())
    packed = equal(pack_nets.quantized(model, SHAPE))
    assert {name for name, _ in packed.kept_float} == {"pad"}
    assert {"0", "3", "5"} <= {step.name for program in packed.programs for step in program.steps}


def halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.relu(one + other)


BEHIND: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "maximum": (lambda: [nn.MaxPool1d(3, 2, 1)], 8),
    "mean_of_windows": (lambda: [nn.AvgPool1d(4, 2)], 8),
    "padded_mean_of_windows": (lambda: [nn.AvgPool1d(3, 2, 1)], 8),
    "maximum_as_a_function": (lambda: [pack_nets.Call(lambda x: F.max_pool1d(x, 2, padding=1))], 8),
    "mean_as_a_function": (lambda: [pack_nets.Call(lambda x: F.avg_pool1d(x, kernel_size=2))], 8),
    "slopes_of_channels": (lambda: [conv(8, 8), nn.PReLU(8)], 8),
    "activations": (lambda: [conv(8, 8), nn.SiLU(), nn.BatchNorm1d(8), nn.GELU()], 8),
    "norm_first": (lambda: [conv(8, 8), nn.MaxPool1d(2), nn.BatchNorm1d(8), nn.ReLU()], 8),
    "dropout": (lambda: [nn.Dropout(0.5), nn.Dropout1d(0.5)], 8),
    "clamp": (lambda: [conv(8, 8), pack_nets.Call(lambda x: x.clamp(-0.5, 1.0))], 8),
    "constant": (lambda: [conv(8, 8), pack_nets.Call(lambda x: 0.3 * x)], 8),
    "concatenation": (lambda: [pack_nets.Call(lambda x: torch.cat([x, F.max_pool1d(x, 3, 1, 1)], dim=-2))], 16),
    "crop": (lambda: [pack_nets.Call(lambda x: torch.relu(x[:, :, 2:-3]))], 8),
    "halves": (lambda: [conv(8, 8), pack_nets.Call(halves)], 4),
    "shuffle": (
        lambda: [pack_nets.Call(lambda x: x.view(x.size(0), 2, 4, x.shape[-1]).transpose(1, 2).flatten(1, 2))],
        8,
    ),
    "repeated": (lambda: [nn.Upsample(scale_factor=2)], 8),
    "interpolated": (lambda: [nn.Upsample(scale_factor=1.5, mode="linear")], 8),
    "interpolated_to_a_size": (lambda: [nn.Upsample(70, mode="linear", align_corners=True)], 8),
    "longer": (lambda: [nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.BatchNorm1d(8), nn.ReLU()], 8),
    "longer_by_unequal_taps": (lambda: [nn.ConvTranspose1d(8, 8, 3, 2, 1, 1), nn.ReLU()], 8),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_between_layers(name: str) -> None:
    parts, inputs = BEHIND[name]
    one_region(pack_nets.quantized(between(*parts(), inputs=inputs), SHAPE))


ENDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pool": (lambda: nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten()), 8),
    "pool_as_a_function": (lambda: pack_nets.Call(lambda x: F.adaptive_avg_pool1d(x, 1).squeeze(-1)), 8),
    "index_of_a_pool": (lambda: nn.Sequential(nn.AdaptiveAvgPool1d(1), pack_nets.Call(lambda x: x[..., 0])), 8),
    "all_places": (lambda: pack_nets.Call(lambda x: x.view(x.size(0), -1)), 8 * 50),
    "last_place": (lambda: pack_nets.Call(lambda x: x[:, :, -1]), 8),
    "place_in_the_middle": (lambda: pack_nets.Call(lambda x: x[:, :, 7]), 8),
}


@pytest.mark.parametrize("name", ENDS)
def test_linear_layers_behind_lines(name: str) -> None:
    end, inputs = ENDS[name]
    one_region(pack_nets.quantized(nn.Sequential(*normed(3, 8), end(), nn.Linear(inputs, 5)), SHAPE))


@pytest.mark.parametrize("mean", [lambda x: x.mean(-1), lambda x: torch.mean(x, dim=2, keepdim=True).flatten(1)])
def test_a_mean_that_is_called_is_a_pool(mean: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(*normed(3, 8), pack_nets.Call(mean), nn.Linear(8, 5))
    packed = pack_nets.check_equal(pack_nets.quantized(model, SHAPE), SHAPE)  # torch adds in an order of its own
    assert (len(packed.regions), packed.kept_float) == (1, ())


class Block(nn.Module):
    """A residual block, with squeeze and excite where it is asked."""

    def __init__(self, inputs: int, filters: int, stride: int, excite: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*normed(inputs, filters, 7, stride=stride), *normed(filters, filters, 7)[:2])
        same = stride == 1 and inputs == filters
        self.short = (
            nn.Identity() if same else nn.Sequential(nn.Conv1d(inputs, filters, 1, stride), nn.BatchNorm1d(filters))
        )
        self.pool, self.excite = nn.AdaptiveAvgPool1d(1), excite
        self.gate = nn.Sequential(nn.Linear(filters, 4), nn.ReLU(), nn.Linear(4, filters), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.excite:
            count, channels, _ = y.size()
            y = y * self.gate(self.pool(y).view(count, channels)).view(count, channels, 1).expand_as(y)
        y += self.short(x)
        return F.relu_(y)


class ResNet(nn.Module):
    """As for electrocardiograms: a long first convolution, residual blocks, the mean, a linear layer."""

    def __init__(self, excite: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(*normed(3, 16, 15, stride=2), nn.MaxPool1d(3, 2, 1))
        self.blocks = nn.Sequential(Block(16, 16, 1, excite), Block(16, 24, 2, excite))
        self.pool, self.last = nn.AdaptiveAvgPool1d(1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Causal(nn.Module):
    """Dilated convolutions that are padded on both sides and cropped behind; the last place is read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(i, 8, 3, padding=2 * d, dilation=d) for i, d in ((3, 1), (8, 2), (8, 4)))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            y = torch.relu(layer(x)[:, :, : -layer.padding[-1]].contiguous())
            x = x + y if place else y
        return self.last(x[:, :, -1])


class UNet(nn.Module):
    """Two levels down and up, joined with what had their size; lines come out."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(*normed(i, o)) for i, o in ((3, 8), (8, 12), (12, 16)))
        self.up = nn.ModuleList(nn.ConvTranspose1d(i, o, 2, 2) for i, o in ((16, 12), (12, 8)))
        self.joined = nn.ModuleList(nn.Sequential(*normed(i, o)) for i, o in ((24, 12), (16, 8)))
        self.last = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for place, block in enumerate(self.down):
            x = block(F.max_pool1d(x, 2) if place else x)
            kept.append(x)
        for up, block, other in zip(self.up, self.joined, (kept[1], kept[0]), strict=True):
            x = block(torch.cat([up(x), other], 1))
        return self.last(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "excited": lambda: ResNet(excite=True),
    "causal": Causal,
    "u_net": UNet,
    "separable": lambda: nn.Sequential(
        *normed(3, 8), *normed(8, 8, 5, groups=8), *normed(8, 16, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(16, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_one_region_and_come_back(name: str, tmp_path: Path) -> None:
    shape = (3, 64)
    torch.manual_seed(3)
    packed = one_region(frozen(NETWORKS[name](), shape, 5), shape)
    told = str(lbs.explain(packed))
    assert "in float" not in told
    assert ("conv 1x15 /1x2" in told) is ("stem.0" in told)
    packed.save(tmp_path / "network.lbs.safetensors")
    loaded, x = lbs.load(tmp_path / "network.lbs.safetensors"), pack_nets.images(3, shape, 5)
    assert loaded.input_shape == shape
    assert torch.equal(loaded(x), packed(x))
    assert torch.equal(loaded(x[:1]), packed(x)[:1])
    assert loaded(x[:0]).shape == packed(x)[:0].shape
    with pytest.raises(ShapeError, match=r"packed for \[N, 3, 64\]"):
        loaded(x[:, :, 1:])


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_computes_and_learns_what_the_network_does(training: bool) -> None:
    torch.manual_seed(4)
    model, x = ResNet(excite=True).train(training), pack_nets.images(4, SHAPE)
    twin = lbs.prepare(model, x, lbs.SearchConfig(bits=(32,), pruning=False))
    torch.testing.assert_close(twin(x), model(x))
    for one, other in ((model, twin), (twin, model)):  # the order does not matter
        one(x), other(x)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name].reshape(value.shape), value)


def test_filters_are_pruned_along_lines() -> None:
    model = lbs.prepare(ResNet().eval(), pack_nets.images(4, SHAPE))
    report = dict(conversion_report(model))
    assert report["blocks.1.body.0"] == "bits (2, 4, 8); filters in 6 groups"
    group = next(group for group in record_of(model).groups if group.producer == "blocks.1.body.0")
    assert (group.norms, group.consumers) == (("blocks.1.body.1",), ("blocks.1.body.3",))
    plan = record_of(model).plan
    kept = tuple(range(4, 16))
    layers = tuple(replace(one, kept=kept) if one.name == group.producer else one for one in plan.layers)
    small: Any = lbs.freeze(model, replace(plan, layers=layers))
    assert small.blocks[1].body[0].weight.shape == (12, 16, 1, 7)
    assert small.blocks[1].body[1].num_features == small.blocks[1].body[3].in_channels == 12
    one_region(lbs.calibrate(small, [pack_nets.images(4, SHAPE)], bits=None).eval())


def test_a_search_moves_bits_and_filters() -> None:
    torch.manual_seed(5)
    x = pack_nets.images(8, SHAPE)
    model = lbs.calibrate(lbs.prepare(ResNet(), x), [x])
    budget = lbs.Budget(model, bops=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(30):
        loss = model.train()(x).square().mean() + budget()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
    result = budget.finish()
    assert result.value <= result.target
    one_region(lbs.freeze(model).eval())


def test_bit_operations_are_those_of_the_convolution() -> None:
    x = pack_nets.images(2, SHAPE)
    counted = network_layers(UNet(), pack_nets.images(2, (3, 64)))
    plan = record_of(lbs.uniform(UNet(), pack_nets.images(2, (3, 64)), 8, 8)).plan
    assert counted.bops() == plan.bops()
    (layer,) = network_layers(nn.Sequential(nn.Conv1d(3, 8, 5, 2, 3)), x).layers
    assert layer.problem.out_height == 1
    assert counted.uncounted == ()
    assert network_layers(nn.Sequential(nn.Conv1d(3, 8, 5, 2, 3)), x).bops() == 26 * 8 * 3 * 5 * 8 * 8


def flat(lines: nn.Module) -> nn.Sequential:
    """A sequence of lines as one of images of height 1, written by hand."""
    made: list[nn.Module] = []
    for part in lines.children():
        if isinstance(part, nn.Conv1d):
            sizes = [(1, *part.kernel_size), (1, *part.stride), (0, *part.padding)]
            made.append(nn.Conv2d(part.in_channels, part.out_channels, *sizes, bias=part.bias is not None))
            made[-1].load_state_dict({k: v[:, :, None] if v.dim() > 1 else v for k, v in part.state_dict().items()})
        elif isinstance(part, nn.BatchNorm1d):
            made.append(nn.BatchNorm2d(part.num_features))
            made[-1].load_state_dict(part.state_dict())
        elif isinstance(part, nn.MaxPool1d):
            made.append(nn.MaxPool2d((1, part.kernel_size), (1, part.stride)))
        else:
            made.append(nn.AdaptiveAvgPool2d(1) if isinstance(part, nn.AdaptiveAvgPool1d) else part)
    return nn.Sequential(*made)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "rounding": "optimized"}, {"bops": 0.03}])
def test_without_training_it_is_the_network_of_images(options: dict[str, Any]) -> None:
    torch.manual_seed(6)
    parts = (*normed(3, 8, 7, stride=2), nn.MaxPool1d(2), *normed(8, 16), conv(16, 16), nn.ReLU())
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5))
    twin, x = flat(pack_nets.unsettle(model.eval())).eval(), pack_nets.images(32, SHAPE)
    packed, other = lbs.quantize(model, x, **options), lbs.quantize(twin, x[:, :, None], **options)
    assert (len(packed.regions), packed.kept_float) == (1, ())
    assert packed.plan is not None
    assert other.plan is not None
    assert packed.plan.layers == other.plan.layers
    assert torch.equal(packed(x), other(x[:, :, None]))
    assert packed.report.fidelity == other.report.fidelity


def test_a_network_of_images_is_given_no_lines() -> None:
    with pytest.raises(ShapeError, match="makes one image a batch"):
        lbs.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), pack_nets.images(2, SHAPE))


class Own(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.read = conv(3, 8), conv(3, 8), conv(8, 8, 1)
        self.second.weight, self.last, self.own = self.first.weight, conv(8, 5), Own(8, 8, 1)
        self.unused = conv(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(torch.relu(self.first(x) + self.second(x)))
        return self.last(F.conv1d(self.read(y), self.read.weight))


def test_what_stays_in_float_says_why() -> None:
    model = pack_nets.quantized(Tied(), SHAPE)
    reasons = dict(record_of(model).unconverted)
    assert reasons == {
        "first": "its weight is used beside it as well",
        "second": "its weight is used beside it as well",
        "read": "its weight is used beside it as well",
        "own": "Own has methods of its own: forward",
        "unused": "the forward pass does not call it with one tensor [N, C, L] alone",
    }
    packed = equal(model)
    assert [step.name for program in packed.programs for step in program.steps][1:] == ["last"]
    config = lbs.SearchConfig(pruning=False, trace=False)
    untraced = lbs.prepare(
        nn.Sequential(conv(3, 8), nn.Flatten(), nn.Linear(400, 2)), pack_nets.images(2, SHAPE), config
    )
    assert (
        dict(record_of(untraced).unconverted)["0"] == "Conv1d is converted along the traced graph only; set trace=True"
    )


def test_an_excluded_convolution_is_a_float_part() -> None:
    model = between(conv(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    x = pack_nets.images(8, SHAPE)
    network = lbs.calibrate(lbs.uniform(model.eval(), x, 4, 4, exclude=("3",)), [x], bits=None).eval()
    packed = equal(network)
    assert dict(packed.kept_float)["3"] == "excluded by name"
    assert len(packed.regions) == 2


def test_hooks_of_the_user_see_lines() -> None:
    seen: list[tuple[int, ...]] = []
    model = between(conv(8, 8), nn.BatchNorm1d(8))
    for part in (model[3], model[4]):
        part.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        part.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    network = pack_nets.quantized(model, SHAPE)
    seen.clear()
    network(pack_nets.images(2, SHAPE))
    assert seen == [(2, 8, 50)] * 4


FLOATS: dict[str, tuple[Callable[[], list[nn.Module]], set[str]]] = {
    "indices": (lambda: [nn.MaxPool1d(2, return_indices=True), pack_nets.Call(lambda x: x[0])], {"3", "getitem"}),
    "norm_of_groups": (lambda: [conv(8, 8), nn.GroupNorm(2, 8), nn.ReLU()], {"4", "5"}),
    "padding": (lambda: [nn.ReflectionPad1d(2)], {"3"}),
    "softmax": (lambda: [pack_nets.Call(lambda x: torch.softmax(x, 2))], {"softmax"}),
}


@pytest.mark.parametrize("name", FLOATS)
def test_what_has_no_packed_form_is_computed_on_lines(name: str) -> None:
    parts, kept = FLOATS[name]
    packed = equal(pack_nets.quantized(between(*parts(), conv(8, 8)), SHAPE))
    names = {name for name, _ in packed.kept_float}
    assert names == kept
    assert len(packed.regions) == 2


def test_attention_over_channels_is_a_line() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3)
            self.pool, self.line = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            gate = self.line(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
            return self.last(x * torch.sigmoid(gate).expand_as(x))

    one_region(pack_nets.quantized(Channels(), (3, 9, 8)), (3, 9, 8))


def test_floats_of_norms_come_out_bit_for_bit() -> None:
    for parts in ([nn.BatchNorm1d(8)], [nn.Identity(), nn.BatchNorm1d(8)], [nn.MaxPool1d(2), nn.BatchNorm1d(8)]):
        one_region(pack_nets.quantized(nn.Sequential(*normed(3, 8), conv(8, 8), *parts), SHAPE))


def test_the_line_that_is_given_becomes_one_image() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = conv(3, 8), conv(3, 8, 5), conv(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.one(x), self.other(x)], 1).relu())

    assert len(one_region(pack_nets.quantized(Both(), SHAPE)).programs[0].inputs) == 1


def test_lines_are_no_bytes() -> None:
    model = pack_nets.quantized(between(), SHAPE)
    with pytest.raises(GraphError, match="reads the images, which would be bytes"):
        lbs.pack(model, normalize=([0.5] * 3, [0.25] * 3))


def test_without_a_record_the_example_says_the_shape() -> None:
    model, x = pack_nets.quantized(ResNet(), SHAPE), pack_nets.images(3, SHAPE)
    del model.lbs_record
    packed = lbs.pack(model, example=x)
    assert packed.input_shape == SHAPE
    assert lbs.verify(model, packed, x).ok


def test_it_is_timed_beside_the_network() -> None:
    model = pack_nets.quantized(between(conv(8, 8)), SHAPE)
    report = lbs.bench(
        lbs.pack(model), model=model, batches=(1,), threads=1, rounds=3, baselines=("float32", "uniform8")
    )
    assert {row.contender for row in report.rows} == {"packed", "torch float32", "packed uniform 8-bit"}


def test_a_norm_of_lines_and_of_rows_stays() -> None:
    shared = nn.BatchNorm1d(8)
    model = nn.Sequential(*normed(3, 8), shared, nn.AdaptiveAvgPool1d(1), nn.Flatten(), shared, nn.Linear(8, 5))
    packed = equal(pack_nets.quantized(model, SHAPE))
    assert {name for name, _ in packed.kept_float} == {"3", "4", "flatten"}


def test_a_graph_of_lines_computes_what_it_did() -> None:
    model = lbs.uniform(UNet().eval(), pack_nets.images(2, (3, 64)))
    graph = trace(copy.deepcopy(model), pack_nets.images(2, (3, 64)))
    kinds = [str(node.target) for node in graph.module.graph.nodes if node.meta.get("layout")]
    assert kinds == ["unsqueeze", "squeeze"]  # where lines come in and go out
    assert all(len(node.meta["shape"]) in (3, 4) for node in graph.module.graph.nodes if "shape" in node.meta)
