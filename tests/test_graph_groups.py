"""Traces: geometry of layers, which filters may go with whom and why not, and what cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs.models
from lbs.channels import ChannelGroup
from lbs.graph import ModelGraph, observe_layers, record_of, template_plan, trace
from lbs.search.prepare import prepare
from lbs_kernels.errors import GraphError


def graph_of(name: str) -> ModelGraph:
    with torch.device("meta"):
        return trace(lbs.models.create(name), lbs.models.example(name))


@pytest.mark.parametrize(
    ("name", "prunable", "of"),
    [("preresnet20", 9, 21), ("cifar_resnet20", 9, None), ("resnet18", 8, 20), ("resnet50", 33, 53)],
)
def test_inner_convolutions_of_residual_blocks_are_prunable(name: str, prunable: int, of: int | None) -> None:
    groups = graph_of(name).groups
    going = {producer for producer, group in groups.items() if group.prunable}
    assert len(going) == prunable
    assert of is None or len(groups) == of
    inner = ("conv1", "conv2") if name == "resnet50" else ("conv1",)
    going -= {"conv1"} if name == "resnet50" else set()  # its stem feeds two convolutions and no sum
    assert all(producer.startswith("layer") and producer.endswith(inner) for producer in going)
    assert all(bool(group.reason) != group.prunable for group in groups.values())


def test_group_of_a_pre_activation_block() -> None:
    groups = graph_of("preresnet20").groups
    assert groups["layer2.0.conv1"] == ChannelGroup("layer2.0.conv1", ("layer2.0.bn2",), ("layer2.0.conv2",), True)
    assert "add" in groups["layer2.0.conv2"].reason
    assert "add" in groups["conv1"].reason


def test_template_names_the_sources() -> None:
    graph = graph_of("preresnet20")
    plan = template_plan(graph.layers, graph.groups, "net")
    assert plan.layer("layer2.0.conv2").source == "layer2.0.conv1"
    assert plan.layer("layer2.0.conv1").source is None
    assert [entry.name for entry in plan.layers][:2] == ["conv1", "layer1.0.conv1"]
    assert plan.layers[-1].name == "fc"


class _Many(nn.Module):
    """Each convolution has another reason to keep its filters, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.before_depthwise = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, (3, 1), padding=(2, 0), dilation=(2, 1), groups=6)
        self.pooled = nn.Conv2d(6, 5, 1)
        self.flat = nn.Linear(5, 8)
        self.pixels = nn.Conv2d(8, 2, 1)
        self.head = nn.Linear(2 * 4 * 5, 3)
        self.shared = nn.Conv2d(8, 8, 1)
        self.dead = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.free(x))
        pixels = self.head(self.pixels(self.shared(self.shared(x))).flatten(1))
        y = self.pooled(self.depthwise(self.before_depthwise(x).relu()))
        return self.flat(F.adaptive_avg_pool2d(y, 1).flatten(1)), pixels


def test_reasons() -> None:
    graph = trace(_Many(), torch.zeros(2, 3, 8, 9))
    groups = graph.groups
    assert groups["pooled"] == ChannelGroup("pooled", (), ("flat",), True)
    assert groups["before_depthwise"] == ChannelGroup("before_depthwise", (), ("pooled",), True, "", ("depthwise",))
    assert "it is a grouped convolution" in groups["depthwise"].reason
    assert "flattened with pixels before head" in groups["pixels"].reason
    assert "shared is called more than once" in groups["shared"].reason
    # a consumer that also reads other channels cannot lose columns for one of its callers
    assert "shared is called more than once" in groups["free"].reason
    assert graph.repeated == {"shared"}
    assert "dead" not in graph.layers


def test_geometry() -> None:
    layers = trace(_Many(), torch.zeros(2, 3, 8, 9)).layers
    free, depthwise = layers["free"], layers["depthwise"]
    assert (free.kind, free.in_channels, free.filters, free.height, free.width) == ("conv2d", 3, 8, 8, 9)
    assert (free.kernel, free.stride, free.padding) == ((3, 3), (2, 2), (1, 1))
    assert (depthwise.kernel, depthwise.padding, depthwise.dilation) == ((3, 1), (2, 0), (2, 1))
    assert (depthwise.groups, depthwise.height, depthwise.width) == (6, 4, 5)
    assert (layers["head"].kind, layers["head"].in_channels, layers["head"].filters) == ("linear", 40, 3)
    assert layers["shared"].positions == 2  # called twice
    assert observe_layers(_Many(), torch.zeros(2, 3, 8, 9)) == (layers, frozenset())


class _Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.wider, self.last = nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wider(self.grouped(self.before(x))))


def test_grouped_convolutions_that_are_not_depthwise_keep_their_inputs() -> None:
    groups = trace(_Grouped(), torch.zeros(1, 3, 4, 4)).groups
    assert "feed the grouped convolution grouped" in groups["before"].reason
    assert "feed the grouped convolution wider" in groups["grouped"].reason  # two filters a channel


def test_hidden_channels_of_inverted_residuals_go_through_the_depthwise_layer() -> None:
    groups = graph_of("mobilenet_v2").groups
    expand = groups["features.2.conv.0.0"]
    assert expand.prunable
    assert expand.through == ("features.2.conv.1.0",)
    assert expand.norms == ("features.2.conv.0.1", "features.2.conv.1.1")
    assert expand.consumers == ("features.2.conv.2",)
    hidden = [g for g in groups.values() if g.prunable and g.through]
    assert len(hidden) == 17  # the stem feeds the first one, which does not expand
    assert "add" in groups["features.3.conv.2"].reason


def test_calls_of_different_sizes_are_uneven() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.max_pool2d(self.conv(x), 2))

    assert trace(Pyramid(), torch.zeros(1, 2, 4, 4)).uneven == {"conv"}
    assert observe_layers(Pyramid(), torch.zeros(1, 2, 4, 4))[1] == {"conv"}


def test_linear_positions() -> None:
    assert trace(nn.Sequential(nn.Linear(4, 6)), torch.zeros(2, 5, 7, 4)).layers["0"].positions == 35


class _Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 0:
            x = x + 1
        return x


def test_control_flow_names_file_and_line() -> None:
    line = _Flow.forward.__code__.co_firstlineno + 2
    with pytest.raises(GraphError, match=rf"_Flow cannot be traced.*test_graph_groups\.py, line {line}: if x\.mean"):
        trace(_Flow(), torch.zeros(1, 1, 4, 4))


def test_an_example_that_does_not_fit_is_refused() -> None:
    for look in (trace, observe_layers):
        with pytest.raises(GraphError, match=r"failed on an example of shape \(1, 2, 4, 4\)"):
            look(nn.Sequential(nn.Conv2d(1, 1, 1)), torch.zeros(1, 2, 4, 4))


class _Training(nn.Module):
    """An extra branch while training, and a norm that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.extra, self.norm = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.extra(x) if self.training else x


def test_the_graph_is_that_of_inference_and_modes_are_restored() -> None:
    model = _Training()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for look in (lambda m, x: trace(m, x).layers, lambda m, x: observe_layers(m, x)[0]):
        assert list(look(model, torch.ones(2, 1, 3, 3))) == ["conv"]
        assert model.training
        assert model.conv.training
        assert not model.norm.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.conv._forward_pre_hooks


def test_a_model_without_a_record() -> None:
    with pytest.raises(GraphError, match="Sequential carries no record"):
        record_of(nn.Sequential())


class _Pixels(nn.Module):
    """As many filters as pixels, which a linear layer mixes; then both are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mix, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 4), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(F.relu(self.wide(x)).flatten(2)).flatten(1))


def test_channels_are_followed_by_their_dimension() -> None:
    group = trace(_Pixels(), torch.zeros(2, 3, 4, 4)).groups["wide"]
    assert not group.prunable
    assert "mix reads the last of 3 dimensions, which is not its channels" in group.reason
    rows = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(0, 2), nn.Linear(4, 4))  # images, channels and rows in one
    assert "reach _1 (1)" in trace(rows, torch.zeros(2, 3, 4, 4)).groups["0"].reason
    images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    assert "reach _2 (2)" in trace(images, torch.zeros(2, 3, 4, 4)).groups["0"].reason


@pytest.mark.parametrize(
    ("mean", "prunable"),
    [
        (lambda x: x.mean((2, 3)), True),
        (lambda x: torch.mean(x, dim=(-1, -2)), True),
        (lambda x: x.mean([2, 3], keepdim=True).flatten(1), True),
        (lambda x: x.mean((1, 2)), False),
        (lambda x: x.mean(1).flatten(1), False),
    ],
)
def test_means_over_pixels_keep_channels(mean: Any, prunable: bool) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.fc = nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(mean(self.conv(x)))

    model = Mean()
    model(torch.zeros(2, 3, 4, 4))
    assert trace(model, torch.zeros(2, 3, 4, 4)).groups["conv"].prunable is prunable


def test_a_layer_is_what_it_is_and_not_what_it_is_called() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.relu(self.conv(x)))

    assert "reach relu" in trace(Named(), torch.zeros(1, 3, 4, 4)).groups["conv"].reason


class _Auxiliary(nn.Module):
    """A head that training alone has; `needs_labels`: and that cannot be traced."""

    def __init__(self, needs_labels: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.extra, self.fc = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)
        self.needs_labels = needs_labels

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = F.relu(self.norm(self.b(F.relu(self.a(x)))))
        out = self.fc(F.relu(self.c(y)))
        if not self.training:
            return out
        if self.needs_labels and labels is None:
            raise ValueError("training needs labels")
        return out, self.extra(F.dropout(y, training=self.training))


@pytest.mark.parametrize("needs_labels", [False, True])
def test_filters_that_training_alone_reads_are_kept(needs_labels: bool) -> None:
    model = _Auxiliary(needs_labels).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    record = record_of(prepare(model, torch.rand(2, 3, 4, 4)))
    groups = {group.producer: group for group in record.groups}
    assert not groups["b"].prunable
    if needs_labels:
        assert "extra may read its channels in training, which cannot be traced" in groups["a"].reason
        assert "training needs labels" in groups["a"].reason
    else:
        assert groups["b"].reason == "in training its channels reach dropout (dropout)"
        assert groups["a"].prunable
        assert groups["c"].prunable
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_that_cannot_be_traced_keeps_no_filters_of_a_network_without_layers_of_its_own() -> None:
    class Checked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.sum() == 0:
                raise ValueError("empty images")
            return super().forward(x)

    model = Checked(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    assert [group.prunable for group in record_of(prepare(model, torch.rand(2, 3, 4, 4))).groups] == [True, True, False]
