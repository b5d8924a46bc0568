"""The frozen network evaluated in torch is the packed network: codes, streams and logits, every element."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pack_nets
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import lbs
import lbs.models
from lbs.graph import called_module
from lbs.models.mobilenet_v2 import InvertedResidual
from lbs.models.resnet import Bottleneck
from lbs.packing.model import PackedModel
from lbs.packing.packed_tensors import PackedTensors
from lbs.packing.packing import pack
from lbs.packing.tracing import trace_model
from lbs.packing.verify import verify
from lbs.quant.deployed import DeployedNorm, undeploy
from lbs.quant.layers import QuantLayer


def frozen(float_model: nn.Module, shape: tuple[int, ...], seed: int) -> nn.Module:
    """Random bits (8/8 in the last convolution, whose sums pass 2^24 where it is wide), every second prunable layer
    cut, norms with awkward statistics.
    """
    chance, calibration = random.Random(seed), pack_nets.images(8, shape, seed + 100)
    model = lbs.prepare(pack_nets.unsettle(float_model.eval(), seed), calibration)
    record = model.lbs_record
    names = [layer.name for layer in record.plan.layers]
    fixed = (names[0], *names[-2:])
    prunable = {g.producer for g in record.groups if g.prunable and g.producer not in record.plan.edges}
    cut = {name for name in sorted(prunable) if chance.random() < 0.5}
    layers = []
    for layer in record.plan.layers:
        w_bits, a_bits = (8, 8) if layer.name in fixed else (chance.choice((2, 4, 8)), chance.choice((2, 4, 8)))
        kept = tuple(sorted(chance.sample(range(layer.filters), layer.filters * 3 // 4 // 4 * 4)))
        layers.append(replace(layer, w_bits=w_bits, a_bits=a_bits, kept=kept if layer.name in cut and kept else None))
    model = lbs.freeze(model, replace(record.plan, layers=tuple(layers)))
    return lbs.calibrate(model, [calibration], bits=None).eval()


def to_boundaries(model: nn.Module) -> nn.Module:
    """Give norms behind layers multipliers and biases that put sums on halves of the codes read next, to the last bit
    that float32 weights allow; signs and sizes stay about what they were.
    """
    graph, _ = trace_model(model, None)
    for node in graph.module.graph.nodes:
        norm, source = called_module(graph.module, node), node.args[0] if node.args else None
        layer = called_module(graph.module, source) if isinstance(source, fx.Node) else None
        reader = next_layer(graph.module, node)
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(layer, QuantLayer) or reader is None:
            continue
        step = 1 / reader.quantizer.scale()
        with torch.no_grad():
            deviation = (norm.running_var.double() + norm.eps).sqrt()
            unit = layer.weight_step() * layer.quantizer.step() / step  # codes per unit of the sum, without the norm
            gain = norm.weight.double() / deviation * unit
            gain = gain.sign() * torch.exp2(gain.abs().clamp_min(2.0**-12).log2().round())
            norm.weight.copy_(gain / unit * deviation)
            shift = ((norm.bias.double() - norm.running_mean.double() * gain / unit) / step * 2).round() / 2
            norm.bias.copy_(shift * step + norm.running_mean.double() * gain / unit)
    return model


def next_layer(module: fx.GraphModule, node: fx.Node) -> QuantLayer | None:
    """The first quantized layer downstream."""
    queue = list(node.users)
    for user in queue:
        found = called_module(module, user)
        if isinstance(found, QuantLayer):
            return found
        queue += [follower for follower in user.users if follower not in queue]
    return None


def plain_norms(model: nn.Module) -> nn.Module:
    """A copy whose norms and means are torch's own."""
    other = copy.deepcopy(model)
    for module in other.modules():
        undeploy(module)
    return other


def evaluated(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(output, codes each quantized layer reads, output of each module), as the model computes in evaluation."""
    codes: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, QuantLayer):
                codes[name] = module.quantizer.codes(args[0])
            if isinstance(output, Tensor):
                outputs[name.replace(".", "_")] = output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        output = model(x)
    for handle in handles:
        handle.remove()
    return output, codes, outputs


def check_identical(model: nn.Module, packed: PackedModel, x: Tensor, backend: str = "auto") -> int:
    """Codes, streams that a module's output is, and logits are equal. Returns the number of codes."""
    output, codes, outputs = evaluated(model, x)
    expected, traces = packed.run_traced(x, backend)
    tensors = PackedTensors(packed.programs, [region.blob for region in packed.regions], traces)
    assert set(codes) == set(tensors.steps)
    for name, found in codes.items():
        differing = int((found != tensors.input_codes(name, found.shape)).sum())
        assert differing == 0, f"{differing} of {found.numel()} codes read by {name}"
    for name in set(outputs) & set(tensors.streams):
        for stored, _, _ in tensors.stored(name, outputs[name].shape):
            assert torch.equal(outputs[name].double(), stored), name
    assert torch.equal(output, expected)
    return sum(found.numel() for found in codes.values())


def differing_codes(one: nn.Module, other: nn.Module, x: Tensor) -> int:
    codes, others = (evaluated(model, x)[1] for model in (one, other))
    return sum(int((codes[name] != others[name]).sum()) for name in codes)


def small(blocks: list[nn.Module], width: int) -> nn.Module:
    """A stem of 16 channels, maximum pooling, the blocks, mean pooling and a classifier."""
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, 20)]
    parts = {"stem": stem, "body": blocks, "head": head}
    return nn.Sequential(OrderedDict((name, nn.Sequential(*modules)) for name, modules in parts.items()))


def bottlenecks() -> nn.Module:
    return small([Bottleneck(16, 16, 1), Bottleneck(64, 16, 1), Bottleneck(64, 32, 2)], 128)


def inverted_residuals() -> nn.Module:
    shapes = [(16, 16, 1, 1), (16, 24, 2, 6), (24, 24, 1, 6), (24, 32, 2, 6), (32, 32, 1, 6)]
    return small([InvertedResidual(*shape) for shape in shapes], 32)


NETWORKS = {
    "cifar_resnet20": lambda: lbs.models.create("cifar_resnet20", 20),
    "preresnet20": lambda: lbs.models.create("preresnet20", 20),
    "inverted_residuals": inverted_residuals,
    "bottlenecks": bottlenecks,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_its_packed_self(name: str) -> None:
    torch.manual_seed(3)
    shape = (3, 32, 32)
    model = to_boundaries(frozen(NETWORKS[name](), shape, seed=4))
    packed = pack(model, verify=False)
    assert packed.kept_float == ()
    assert any(layer.kept is not None for layer in packed.plan.layers)
    x = pack_nets.images(32, shape, 5)
    check_identical(model, packed, x[:2], "reference")
    codes = check_identical(model, packed, x)
    assert codes > 32 * 60000
    # What makes that hard: with torch's own norms and means many of these codes differ.
    assert differing_codes(model, plain_norms(model), x) > codes / 100


def test_channels_last_and_inference_mode_change_nothing() -> None:
    model = to_boundaries(copy.deepcopy(pack_nets.mixed_network()))
    x = pack_nets.images(8, (3, 32, 32), 5)
    expected = pack(model, verify=False)(x)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(moved(x.to(memory_format=torch.channels_last)), expected)
        assert torch.equal(model(x), expected)


def test_statistics_that_change_and_copies_are_honoured() -> None:
    model = copy.deepcopy(pack_nets.mixed_network())
    x = pack_nets.images(8, (3, 32, 32), 5)
    before = pack(model, verify=False)(x)
    pack_nets.unsettle(model, seed=9)
    packed = pack(model, verify=False)
    with torch.no_grad():
        assert torch.equal(model(x), packed(x))
        assert not torch.equal(model(x), before)
        average = AveragedModel(model, use_buffers=True)
        average.update_parameters(model)
        assert torch.equal(average.module.eval()(x), packed(x))
        other = copy.deepcopy(pack_nets.mixed_network())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), packed(x))


def test_training_float64_and_gradients_compute_as_torch_does() -> None:
    model = to_boundaries(copy.deepcopy(pack_nets.mixed_network()))
    plain, x = plain_norms(model), pack_nets.images(4, (3, 32, 32), 5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
        assert torch.equal(copy.deepcopy(model).double()(x.double()), copy.deepcopy(plain).double()(x.double()))
        assert torch.equal(model.train()(x), plain.train()(x))


class Shared(nn.Module):
    """A norm behind its layer alone, one behind a layer that is read twice, one behind a ReLU in place, one behind
    another, one of the images; a layer without a norm; a mean over a window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=groups) for groups in (1, 8, 1))
        self.pool = nn.AvgPool2d(7)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(self.first(x)), inplace=True)
        x = torch.relu(self.norms[1](self.norms[0](x)))
        y = self.convs[0](x)
        x = torch.relu(self.norms[2](y) + y)
        x = torch.relu(self.norms[4](self.norms[3](self.convs[1](x))))
        return self.fc(self.pool(torch.relu(self.convs[2](x))).flatten(1))


def test_norms_fold_only_where_they_follow_alone() -> None:
    torch.manual_seed(11)
    model = pack_nets.quantized(Shared(), (3, 7, 7))
    packed = pack(model, verify=False)
    assert packed.kept_float == ()
    folds = {name for name, module in model.named_modules() if isinstance(module, DeployedNorm) and module.folds}
    assert folds == {"norms.1", "norms.3", "norms.4"}
    check_identical(model, packed, pack_nets.images(200, (3, 7, 7), 5))


def test_a_norm_put_in_place_of_another_is_applied_once() -> None:
    """The layer before knows nothing of its norm: whatever reads it reads its value."""
    model = copy.deepcopy(pack_nets.mixed_network())
    x = pack_nets.images(4, (3, 32, 32), 5)
    other = nn.BatchNorm2d(16).eval()
    other.load_state_dict(model.bn1.state_dict())
    with torch.no_grad():
        expected = model.bn1(model.conv1(x))
        model.bn1 = other
        torch.testing.assert_close(model.bn1(model.conv1(x)), expected, rtol=1e-5, atol=1e-5)


def test_the_report_counts_images_that_are_equal_bit_for_bit() -> None:
    model = to_boundaries(copy.deepcopy(pack_nets.mixed_network()))
    x = pack_nets.images(40, (3, 32, 32), 11)
    packed = pack(model, verify=False)
    report = verify(model, packed, x)
    assert (report.ok, report.agreeing, report.identical) == (True, 40, 40)
    assert "same class on 40 of 40 images, outputs bit for bit on 40" in str(report)
    other = verify(plain_norms(model), packed, x)
    assert other.ok
    assert other.identical < 40
