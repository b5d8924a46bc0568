"""Networks of the registry: shapes, parameters, state-dict keys of published weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import lbs.models
from lbs_kernels.errors import LbsError

# Parameters as published (torchvision's model table; chenyaofo/pytorch-cifar-models for CIFAR).
PARAMETERS = {
    "cifar_resnet20": 278_324,
    "cifar_resnet56": 861_620,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
}


@pytest.mark.parametrize("name", list(lbs.models.REGISTRY))
def test_output_is_one_logit_per_class_for_any_batch(name: str) -> None:
    channels, height, width = lbs.models.entry(name).input_shape
    size = (channels, min(height, 64), min(width, 64))
    model = lbs.models.create(name, num_classes=7).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *size, generator=generator)
    with torch.no_grad():
        logits = model(images)
        alone = model(images[1:2])
    assert logits.shape == (3, 7)
    assert logits.std() > 0
    torch.testing.assert_close(logits[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = lbs.models.create(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", list(lbs.models.REGISTRY))
def test_every_network_traces(name: str) -> None:
    with torch.device("meta"):
        graph = torch.fx.symbolic_trace(lbs.models.create(name))
    assert any(node.op == "output" for node in graph.graph.nodes)


def test_resnet18_has_torchvision_keys() -> None:
    with torch.device("meta"):
        keys = lbs.models.create("resnet18").state_dict().keys()
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.bias",
        "layer4.1.bn2.num_batches_tracked",
        "fc.weight",
        "fc.bias",
    } <= keys
    assert "layer1.0.downsample.0.weight" not in keys
    assert len(keys) == 122


def test_resnet50_bottleneck_strides_in_its_3x3() -> None:
    with torch.device("meta"):
        model = lbs.models.create("resnet50")
    block = model.get_submodule("layer2.0")
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)
    assert "layer1.0.downsample.0.weight" in model.state_dict()


def test_preactivation_shortcut_reads_the_activated_input() -> None:
    model = lbs.models.create("preresnet20").eval()
    seen: dict[str, torch.Tensor] = {}
    block = model.get_submodule("layer2.0")
    for name in ("conv1", "downsample"):
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(seen["conv1"], seen["downsample"])
    assert seen["conv1"].min() == 0


def test_mobilenet_loads_published_weights() -> None:
    path = os.environ.get("LBS_MOBILENET_V2_WEIGHTS")
    if not path:
        pytest.skip("set LBS_MOBILENET_V2_WEIGHTS to torchvision's mobilenet_v2-b0353104.pth")
    model = lbs.models.create("mobilenet_v2")
    model.load_state_dict(torch.load(Path(path), weights_only=True))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(LbsError, match=r"'resnet19'; known are .*resnet18"):
        lbs.models.create("resnet19")


def test_no_classes_is_refused() -> None:
    with pytest.raises(LbsError, match="num_classes is 0"):
        lbs.models.create("cifar_resnet20", num_classes=0)
