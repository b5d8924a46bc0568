"""One small net per pattern: it packs into the form it should, and equals the model."""

from __future__ import annotations

from collections.abc import Callable

import pack_nets
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lbs
from lbs.packing.model import PackedModel
from lbs_kernels.errors import GraphError
from lbs_kernels.program.steps import ConvStep, LinearStep, PoolStep, QuantPackStep

SHAPE = (3, 9, 7)


class Net(nn.Module):
    """A stem, one inner convolution, a classifier; `middle` is the pattern under test."""

    def __init__(self, middle: Callable[[Net, Tensor], object], channels: int = 8, **inner: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, channels, **{"kernel_size": 3, "padding": 1, **inner})  # type: ignore[arg-type]
        self.norm2 = nn.BatchNorm2d(channels)
        self.other = nn.Conv2d(channels, channels, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, 5)
        self.wide = nn.Linear(channels * 20, 5)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.middle = middle

    def forward(self, x: Tensor) -> object:
        return self.middle(self, torch.relu(self.norm(self.stem(x))))


def head(net: Net, x: Tensor) -> Tensor:
    return net.fc(torch.flatten(net.mean(x), 1))


def gated(net: Net, x: Tensor) -> Tensor:
    return net.other(x * torch.sigmoid(net.mean(x)))


def packed_net(middle: Callable[[Net, Tensor], object], **inner: object) -> PackedModel:
    torch.manual_seed(3)
    model = pack_nets.quantized(Net(middle, **inner), SHAPE)
    return pack_nets.check_equal(model, SHAPE)


def operations(packed: PackedModel) -> list[list[str]]:
    return [[step.op for step in program.steps] for program in packed.programs]


WHOLE = ["quantpack", "bitconv2d", "bitconv2d", "pool", "bitlinear"]

ONE_REGION: dict[str, tuple[Callable[[Net, Tensor], object], list[str]]] = {
    "plain": (lambda n, x: head(n, n.relu(n.norm2(n.inner(x)))), WHOLE),
    "bias_without_norm": (lambda n, x: head(n, n.relu(n.inner(x))), WHOLE),
    "two_norms": (lambda n, x: head(n, n.relu(n.norm2(n.norm(n.inner(x))))), WHOLE),
    "residual_left": (lambda n, x: head(n, n.relu(n.norm2(n.inner(x)) + x)), WHOLE),
    "residual_right": (lambda n, x: head(n, n.relu(x + n.norm2(n.inner(x)))), WHOLE),
    "residual_in_place": (lambda n, x: head(n, n.norm2(n.inner(x)).add_(x).relu_()), WHOLE),
    "residual_method": (lambda n, x: head(n, torch.add(x, n.inner(x)).relu()), WHOLE),
    "residual_without_relu": (lambda n, x: head(n, x + n.inner(x)), WHOLE),
    "relu6": (lambda n, x: head(n, F.relu6(n.inner(x))), WHOLE),
    "hardtanh": (lambda n, x: head(n, F.hardtanh(n.inner(x), 0.1, 0.7)), WHOLE),
    "clamp_after_clamp": (lambda n, x: head(n, torch.clamp(n.inner(x), 0.2, 1.5).clamp(max=0.9)), WHOLE),
    "dropout": (lambda n, x: n.fc(n.drop(torch.flatten(n.mean(n.drop(n.inner(x))), 1))), WHOLE),
    "mean_call": (lambda n, x: n.fc(n.relu(n.inner(x)).mean((2, 3))), WHOLE),
    "mean_keepdim": (lambda n, x: n.fc(n.inner(x).mean([-2, -1], keepdim=True).flatten(1)), WHOLE),
    "average_of_all": (lambda n, x: n.fc(F.avg_pool2d(n.inner(x), (9, 7)).view(x.size(0), -1)), WHOLE),
    "average_of_the_size": (lambda n, x: n.fc(F.avg_pool2d(n.inner(x), x.size()[2:]).flatten(1)), WHOLE),
    "average_of_two_sizes": (
        lambda n, x: n.fc(F.avg_pool2d(n.inner(x), (x.size(2), x.shape[3])).flatten(1)),
        WHOLE,
    ),
    "average_of_a_corner": (lambda n, x: n.fc(F.avg_pool2d(n.inner(x), 5).flatten(1)), WHOLE),
    "layer_by_keyword": (lambda n, x: head(n, n.inner(input=x)), WHOLE),
    "view_by_shape": (lambda n, x: n.fc(n.mean(n.inner(x)).reshape(x.shape[0], -1)), WHOLE),
    "unused_branch": (lambda n, x: (n.other(x), head(n, n.inner(x)))[1], WHOLE),
    "relu_behind_a_stream": (
        lambda n, x: head(n, n.relu(n.inner(x)) + x),
        ["quantpack", "bitconv2d", "bitconv2d", "quantpack", "pool", "bitlinear"],
    ),
    "value_and_its_relu": (
        lambda n, x: head(n, (lambda y: n.relu(y) + y)(n.inner(x))),
        ["quantpack", "bitconv2d", "bitconv2d", "quantpack", "quantpack", "pool", "bitlinear"],
    ),
    "earlier_one_absorbs_the_sum": (
        lambda n, x: head(n, n.inner(x) + n.relu(n.other(x))),
        [*WHOLE[:3], *WHOLE[2:]],
    ),
    "clamps_that_cross": (lambda n, x: head(n, torch.clamp(n.inner(x), max=0.2).clamp(min=0.4, max=3.0)), WHOLE),
    "norm_after_relu": (
        lambda n, x: head(n, n.other(n.relu(n.norm2(n.relu(n.inner(x)))))),
        [*WHOLE[:3], *WHOLE[2:]],
    ),
    "norm_after_sum": (
        lambda n, x: head(n, n.other(n.relu(n.norm2(n.inner(x) + x)))),
        [*WHOLE[:3], *WHOLE[2:]],
    ),
    "norm_of_a_shared_value": (
        lambda n, x: head(n, (lambda y: n.other(n.relu(n.norm2(y))) + y)(n.inner(x))),
        [*WHOLE[:3], *WHOLE[2:]],
    ),
    "sum_with_itself": (
        lambda n, x: head(n, n.inner(x + x)),
        ["quantpack", "bitconv2d", "quantpack", "bitconv2d", "pool", "bitlinear"],
    ),
    "two_layers_of_one_value": (lambda n, x: head(n, n.inner(x) + n.other(x)), [*WHOLE[:3], *WHOLE[2:]]),
    "max_pool_of_codes": (lambda n, x: head(n, n.inner(n.pool(x))), ["quantpack", "bitconv2d", "pool", *WHOLE[2:]]),
    "max_pool_of_a_stream": (
        lambda n, x: head(n, n.inner(n.pool(x)) + n.pool(x)),
        ["quantpack", "bitconv2d", "pool", "bitconv2d", "pool", "pool", "bitlinear"],
    ),
    "max_pool_then_relu": (
        lambda n, x: head(n, n.inner(n.relu(n.pool(n.other(x))))),
        ["quantpack", "bitconv2d", "bitconv2d", "pool", "bitconv2d", "pool", "bitlinear"],
    ),
    "pre_activation": (
        lambda n, x: head(n, x + n.inner(n.relu(n.norm2(x)))),
        WHOLE,
    ),
    "pre_activation_for_two": (
        lambda n, x: head(n, n.other(n.relu(n.norm2(x))) + n.inner(n.relu(n.norm2(x))) + x),
        ["quantpack", "bitconv2d", "bitconv2d", "bitconv2d", "quantpack", "pool", "bitlinear"],
    ),
    "norm_before_a_sum": (
        lambda n, x: head(n, n.inner(n.relu(n.norm2(x) + x))),
        [*WHOLE[:2], "quantpack", *WHOLE[2:]],
    ),
    "active_stream_for_a_layer_and_a_sum": (
        lambda n, x: head(n, (lambda y: n.inner(y) + y)(n.relu(n.norm2(n.other(x) + x)))),
        [*WHOLE[:3], "quantpack", *WHOLE[2:]],
    ),
    "active_stream_for_the_mean": (
        lambda n, x: head(n, n.relu(n.norm2(n.inner(x) + x))),
        [*WHOLE[:3], "quantpack", *WHOLE[3:]],
    ),
    "active_stream_for_a_maximum": (
        lambda n, x: head(n, n.inner(n.pool(n.relu(n.norm2(x))))),
        [*WHOLE[:2], "quantpack", "pool", *WHOLE[2:]],
    ),
    "norm_of_a_norm_behind_a_relu": (
        lambda n, x: head(n, F.relu6(n.norm(n.norm2(x)))),
        ["quantpack", "bitconv2d", "quantpack", "pool", "bitlinear"],
    ),
    "norm_for_a_sum_and_its_relu_for_a_layer": (
        lambda n, x: head(n, (lambda y: n.inner(n.relu(y)) + y)(n.norm2(n.other(x) + x))),
        [*WHOLE[:3], "quantpack", "quantpack", *WHOLE[2:]],
    ),
    "norm_of_a_result": (lambda n, x: (n.norm2(x), head(n, n.inner(x))), [*WHOLE[:2], "quantpack", *WHOLE[2:]]),
    "norm_alone_before_a_layer": (lambda n, x: head(n, x + n.inner(n.norm2(x).relu())), WHOLE),
    "flattened_pixels": (
        lambda n, x: n.wide(torch.flatten(n.relu(n.pool(n.inner(x))), 1)),
        ["quantpack", "bitconv2d", "bitconv2d", "pool", "bitconv2d"],
    ),
    "flatten_then_relu": (
        lambda n, x: n.wide(n.relu(n.drop(torch.flatten(n.pool(n.inner(x)), 1)))),
        ["quantpack", "bitconv2d", "bitconv2d", "pool", "bitconv2d"],
    ),
    "concatenation_of_slices": (
        lambda n, x: n.fc(torch.cat([n.inner(x)[:, :4], n.other(x)[:, 4:]], 1).mean((2, 3))),
        [*WHOLE[:3], "select", *WHOLE[2:]],
    ),
    "half_of_each": (
        lambda n, x: n.fc(n.mean(torch.cat([n.inner(x), x], 1)[:, 4:12]).flatten(1)),
        [*WHOLE[:3], "select", "pool", "bitlinear"],
    ),
    "concatenation_of_one": (lambda n, x: head(n, torch.cat([n.inner(x)], 1)), WHOLE),
    "slice_of_all": (lambda n, x: head(n, n.inner(x)[:, :, :, :]), WHOLE),
    "concatenation_and_a_sum": (
        lambda n, x: head(n, torch.cat([n.inner(x)[:, :3], n.other(x)[:, 3:]], 1) + x),
        [*WHOLE[:3], "select", *WHOLE[2:]],
    ),
    "concatenation_then_relu_and_a_gate": (
        lambda n, x: head(n, gated(n, torch.cat([x, n.inner(x)], 1)[:, ::2].relu())),
        ["quantpack", "bitconv2d", "bitconv2d", "select", "pool", "quantpack", "bitconv2d", "pool", "bitlinear"],
    ),
    "one_pixel_repeated": (
        lambda n, x: head(n, n.inner(F.interpolate(n.mean(x), (9, 7)))),
        ["quantpack", "bitconv2d", "pool", "select", "bitconv2d", "pool", "bitlinear"],
    ),
    "several_results": (
        lambda n, x: (n.inner(x), {"y": head(n, x)}),
        ["quantpack", "bitconv2d", "bitconv2d", "pool", "bitlinear"],
    ),
}


@pytest.mark.parametrize("name", ONE_REGION)
def test_one_region(name: str) -> None:
    middle, steps = ONE_REGION[name]
    packed = packed_net(middle)
    assert packed.kept_float == ()
    found = operations(packed)
    assert len(found) == 1
    assert sorted(found[0]) == sorted(steps)


@pytest.mark.parametrize(
    "inner",
    [
        {"groups": 4},
        {"groups": 8},
        {"dilation": 2, "padding": 2},
        {"stride": 2},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ],
    ids=str,
)
def test_geometry(inner: dict[str, object]) -> None:
    packed = packed_net(lambda n, x: head(n, n.relu(n.inner(x))), **inner)
    assert packed.kept_float == ()


SPLIT: dict[str, tuple[Callable[[Net, Tensor], object], int, list[str]]] = {
    "softplus_between": (lambda n, x: head(n, n.inner(F.softplus(x))), 2, ["softplus"]),
    "gate_of_pixels": (lambda n, x: head(n, n.inner(x * torch.sigmoid(n.other(x)))), 2, ["mul"]),
    "gate_of_images": (lambda n, x: head(n, n.inner(x * x.mean((1, 2, 3), keepdim=True))), 2, ["mean", "mul"]),
    "softmax_at_the_end": (lambda n, x: torch.softmax(head(n, n.inner(x)), 1), 1, ["softmax"]),
    "concatenation_of_rows": (
        lambda n, x: head(n, n.inner(torch.cat([n.inner(x)[:, :, :4], n.other(x)[:, :, 4:]], 2))),
        2,
        ["cat"],
    ),
    "concatenation_of_flattened_pixels": (
        lambda n, x: n.fc(torch.cat([n.pool(n.inner(x)).flatten(1), n.mean(x).flatten(1)], 1)[:, 160:]),
        2,
        ["flatten", "cat", "getitem"],
    ),
    "rows_as_columns": (lambda n, x: head(n, n.inner(n.other(x).transpose(2, 3))), 2, ["transpose"]),
    "pixels_between_others": (
        lambda n, x: head(n, n.inner(F.interpolate(n.other(x), scale_factor=2, mode="bicubic"))),
        2,
        ["interpolate"],
    ),
    "parts_for_a_float_operation": (
        lambda n, x: head(n, n.inner(torch.cat([F.softplus(n.other(x).chunk(2, 1)[0]), x[:, 4:]], 1))),
        2,
        ["softplus"],
    ),
    "average_by_another_number": (
        lambda n, x: head(n, n.other(F.avg_pool2d(n.inner(x), 2, divisor_override=3))),
        2,
        ["avg_pool2d"],
    ),
    "average_of_partial_windows": (
        lambda n, x: head(n, n.other(F.avg_pool2d(n.inner(x), 2, ceil_mode=True))),
        2,
        ["avg_pool2d"],
    ),
    "average_without_padding": (
        lambda n, x: head(n, n.other(F.avg_pool2d(n.inner(x), 3, 1, 1, count_include_pad=False))),
        2,
        ["avg_pool2d"],
    ),
    "flattened_for_a_float_operation": (
        lambda n, x: n.wide(F.softplus(torch.flatten(n.pool(x), 1))),
        2,
        ["flatten", "softplus"],
    ),
    "size_used_by_a_float_operation": (lambda n, x: head(n, n.inner(x * x.size(1))), 2, ["size", "mul"]),
    "scaled_sum": (lambda n, x: head(n, n.inner(torch.add(x, n.relu(n.other(x)), alpha=2))), 2, ["add"]),
    "broadcast_sum": (lambda n, x: head(n, n.inner(x + n.mean(x))), 2, ["add"]),
    "relu_no_layer_reads": (lambda n, x: torch.relu(F.softplus(head(n, n.inner(x)))), 1, ["softplus", "relu_1"]),
    "linear_on_positions": (
        lambda n, x: n.fc(n.inner(x).flatten(2).transpose(1, 2)).mean(1),
        1,
        ["mean"],
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_float_parts_between_regions(name: str) -> None:
    middle, regions, floats = SPLIT[name]
    packed = packed_net(middle)
    assert len(packed.programs) == regions
    assert [label for label, _ in packed.kept_float] == floats
    assert all(reason for _, reason in packed.kept_float)


class Squared(nn.ReLU):
    """Derived from a module that has a packed form, and something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Blurred(nn.Module):
    """Functions with a buffer and a parameter, a sum of flattened pixels, and a batch of one that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.squared = Squared()
        self.register_buffer("kernel", torch.full((4, 1, 3, 3), 1 / 9))
        self.place = nn.Parameter(torch.randn(1, 4, 5, 4) * 0.1)
        self.first, self.second = nn.Linear(80, 80), nn.Linear(80, 80)
        self.scale = nn.Parameter(torch.randn(80, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.squared(self.stem(x)) + self.place
        y = F.conv2d(y, self.kernel, padding=1, groups=4).flatten(1)
        y = y + self.second(torch.relu(self.first(torch.relu(y))))
        return y @ self.scale


@pytest.mark.parametrize("images", [1, 3])
def test_what_only_looks_like_a_packed_form_stays_in_float(images: int) -> None:
    torch.manual_seed(5)
    model = pack_nets.quantized(Blurred(), SHAPE)
    packed = lbs.pack(model, example=pack_nets.images(images, SHAPE))
    reasons = dict(packed.kept_float)
    assert reasons["squared"] == "Squared has a forward of its own"
    assert len(packed.programs) == 2
    for batch in (1, 4):
        x = pack_nets.images(batch, SHAPE, seed=9)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_sum_of_flattened_pixels_stays_in_float() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1)
            self.first, self.second = nn.Linear(80, 80), nn.Linear(80, 80)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(torch.relu(self.stem(x))).flatten(1)
            return y + self.second(torch.relu(self.first(torch.relu(y))))

    packed = pack_nets.check_equal(pack_nets.quantized(Flat(), SHAPE), SHAPE)
    assert any("flattened" in reason for _, reason in packed.kept_float)


def test_a_float_module_of_a_name_that_packing_needs_is_refused() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__(lambda n, x: n.region0(head(n, n.inner(x))))
            self.region0 = nn.Softplus()

    with pytest.raises(GraphError, match="region0 stays in float and has a name that packed parts have; rename it"):
        lbs.pack(pack_nets.quantized(Named(), SHAPE))


def test_norm_folds_into_the_layer_and_pre_activation_into_its_readers() -> None:
    packed = packed_net(lambda n, x: head(n, x + n.inner(n.relu(n.norm2(x)))))
    stem = packed.programs[0].steps[1]
    assert isinstance(stem, ConvStep)
    (reader,) = stem.emit.consumers
    assert (reader.pre_scale, reader.pre_bias, reader.relu) == ("norm2.scale", "norm2.shift", True)
    assert stem.emit.stream is not None


def test_layers_that_want_the_same_codes_share_them() -> None:
    torch.manual_seed(3)
    model = pack_nets.quantized(Net(lambda n, x: head(n, n.inner(x) + n.other(x))), SHAPE)
    apart = pack_nets.check_equal(model, SHAPE)
    model.other.quantizer.range.data.copy_(model.inner.quantizer.range.data * 0.9)
    different = pack_nets.check_equal(model, SHAPE)
    count = [sum(spec.form == "codes" for spec in packed.programs[0].tensors) for packed in (apart, different)]
    assert count[1] == count[0] + 1


def test_equal_ranges_behind_different_norms_and_relus_are_different_codes() -> None:
    def branches(n: Net, x: Tensor) -> Tensor:
        y = n.norm2(x)
        return head(n, n.other(n.relu(y)) + n.third(y) + n.fourth(n.norm3(x)))

    torch.manual_seed(3)
    net = Net(branches)
    net.third, net.fourth, net.norm3 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    model = pack_nets.quantized(net, SHAPE)
    for layer in (model.other, model.third, model.fourth):
        layer.quantizer.signed = True
        layer.quantizer.range.data.fill_(1.5)
    packed = pack_nets.check_equal(model, SHAPE)
    assert packed.kept_float == ()
    stem = packed.programs[0].steps[1]
    assert [(c.pre_scale, c.relu) for c in stem.emit.consumers] == [
        ("norm2.scale", True),
        ("norm2.scale", False),
        ("norm3.scale", False),
    ]


def test_codes_are_pooled_as_codes_and_no_stream_is_stored() -> None:
    packed = packed_net(lambda n, x: head(n, n.inner(n.pool(x))))
    program = packed.programs[0]
    pool = next(step for step in program.steps if isinstance(step, PoolStep) and step.kind == "max")
    assert program.tensors[pool.input].form == "codes"
    assert sum(spec.form == "stream" for spec in program.tensors) == 2  # what is averaged, and the logits


def test_flattened_pixels_become_a_window_over_the_image() -> None:
    packed = packed_net(lambda n, x: n.wide(torch.flatten(n.pool(x), 1)))
    last = packed.programs[0].steps[-1]
    assert isinstance(last, ConvStep)
    assert last.kernel == (5, 4)
    assert packed.programs[0].tensors[-1].flat


def test_linear_network_on_flat_images() -> None:
    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3 * 9 * 7, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(torch.flatten(x, 1))))

    torch.manual_seed(0)
    packed = pack_nets.check_equal(pack_nets.quantized(Perceptron(), SHAPE), SHAPE)
    kinds = [type(step) for step in packed.programs[0].steps]
    assert kinds == [QuantPackStep, ConvStep, LinearStep]


def test_layer_called_twice_makes_two_steps() -> None:
    torch.manual_seed(3)
    model = pack_nets.quantized(Net(lambda n, x: head(n, n.relu(n.inner(x)))), SHAPE)
    model.middle = lambda n, x: head(n, n.relu(n.norm2(n.inner(n.relu(n.inner(x))))))
    packed = pack_nets.check_equal(model, SHAPE)
    assert [step.name for step in packed.programs[0].steps[2:4]] == ["inner", "inner#2"]


def test_layers_that_were_never_quantized_say_why() -> None:
    torch.manual_seed(3)
    model = Net(lambda n, x: head(n, n.inner(n.pool(n.relu(n.inner(x))))))
    packed = pack_nets.check_equal(pack_nets.quantized(model, SHAPE), SHAPE)
    assert dict(packed.kept_float)["inner"] == dict(pack_nets.quantized(model, SHAPE).lbs_record.unconverted)["inner"]


def test_float_stem_gives_the_region_an_image() -> None:
    class FloatStem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(F.softplus(self.norm(x))).mean((2, 3)))

    packed = pack_nets.check_equal(pack_nets.quantized(FloatStem(), SHAPE), SHAPE)
    assert [name for name, _ in packed.kept_float] == ["norm", "softplus"]


CHANGED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "packed_and_read_again": lambda n, y: F.relu(y, inplace=True) + y,
    "method_and_read_again": lambda n, y: y.clamp_(0.0, 0.5) + y,
    "branch_before": lambda n, y: n.other(y) + n.other(F.leaky_relu_(y, 0.1)),
    "sum_in_place": lambda n, y: (y.relu(), y.add_(torch.tanh(y)))[0] + y,
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_reads_a_value_before_and_after_it_is_changed_in_place(name: str) -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        return head(n, CHANGED[name](n, torch.sin(n.inner(x))))

    torch.manual_seed(3)
    model = pack_nets.quantized(Net(forward), SHAPE)
    packed = pack_nets.check_equal(model, SHAPE)
    x = pack_nets.images(3, SHAPE)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


@fx.wrap
def depth(x: Tensor, p: float, training: bool) -> Tensor:
    """Drops whole images of a branch while a network is trained; what torch.fx is told to leave alone."""
    return x * (torch.rand(len(x), 1, 1, 1) > p) if training and p else x


def test_functions_that_do_nothing_in_evaluation_leave_the_graph() -> None:
    model = Net(lambda net, y: net.other(y + depth(net.inner(y), 0.2, net.training)))
    packed = pack_nets.check_equal(pack_nets.quantized(model, SHAPE), SHAPE)
    assert packed.kept_float == ()
    assert len(packed.programs) == 1


@pytest.mark.parametrize("way", ["module", "function"])
def test_pooling_to_the_size_that_is_there_does_nothing(way: str) -> None:
    size = SHAPE[1:]
    model = Net(lambda net, y: net.other(net.pool(net.inner(y)) if way == "module" else F.adaptive_avg_pool2d(y, size)))
    model.pool = nn.AdaptiveAvgPool2d(size)
    packed = pack_nets.check_equal(pack_nets.quantized(model, SHAPE), SHAPE)
    assert packed.kept_float == ()
    assert not any(isinstance(step, PoolStep) for step in packed.programs[0].steps)
