"""Real networks: packed equals quantized, layer by layer, on every back end."""

from __future__ import annotations

import pack_nets
import pytest
import torch
from torch import nn

from lbs.models.cifar_resnet import BasicBlock
from lbs.models.resnet import ResNet
from lbs.packing.packing import pack
from lbs.packing.verify import verify
from lbs_kernels.program.steps import ConvStep, LinearStep, Program


def layer_steps(program: Program) -> dict[str, ConvStep | LinearStep]:
    return {step.name: step for step in program.steps if isinstance(step, ConvStep | LinearStep)}


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_cifar_resnet20_is_one_region_and_equal(bits: int) -> None:
    model = pack_nets.network("cifar_resnet20", bits, bits)
    packed = pack_nets.check_equal(model, (3, 32, 32))
    assert packed.kept_float == ()
    assert len(packed.programs) == 1
    assert set(layer_steps(packed.programs[0])) == set(pack_nets.layers_of(model))
    x = pack_nets.images(16, (3, 32, 32), 6)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=float(0.02 * expected.abs().max()))


def test_codes_of_the_test_networks_are_not_saturated() -> None:
    """Where most codes are 0 or n, comparing them proves nothing."""
    for model in (pack_nets.network("cifar_resnet20", 4, 4), pack_nets.mixed_network()):
        packed = pack(model, verify=False)
        _, traces = packed.run_traced(pack_nets.images(4, (3, 32, 32), 5))
        assert pack_nets.unsaturated_share(packed.programs[0], traces[0]) > 0.3


def test_mixed_bits_and_pruned_filters() -> None:
    model = pack_nets.mixed_network()
    packed = pack_nets.check_equal(model, (3, 32, 32))
    steps, program = layer_steps(packed.programs[0]), packed.programs[0]
    pruned = steps["layer1.1.conv1"]
    planes = program.arrays[pruned.planes]
    assert (pruned.total_filters, planes.shape[1]) == (16, 4)
    follower = steps["layer1.1.conv2"]
    assert program.tensors[follower.input].channels == 4
    widths = {(step.w_bits, program.tensors[step.input].bits) for step in steps.values()}
    assert len(widths) >= 7
    assert packed.plan == model.lbs_record.plan


@pytest.mark.parametrize("name", ["preresnet20", pytest.param("preresnet56", marks=pytest.mark.slow)])
def test_preactivation_network_is_one_region(name: str) -> None:
    """The last norm and ReLU are read by the mean alone: one step of their own, on the smallest map."""
    model = pack_nets.network(name, 4, 4)
    packed = pack_nets.check_equal(model, (3, 32, 32))
    assert packed.kept_float == ()
    (program,) = packed.programs
    assert set(layer_steps(program)) == set(pack_nets.layers_of(model))
    affine = [step for step in program.steps if getattr(step, "op", "") == "quantpack" and step.multiplier is not None]
    assert [(step.name, step.emit.low, step.emit.consumers) for step in affine] == [("bn", 0.0, ())]


def test_imagenet_resnet_pools_its_stem() -> None:
    torch.manual_seed(7)
    float_model = ResNet(BasicBlock, (1, 1, 1, 1), 20)  # the layer shapes of ResNet-18, each block once
    model = pack_nets.quantized(float_model, (3, 64, 64), w_bits=4, a_bits=2)
    packed = pack_nets.check_equal(model, (3, 64, 64), batch=2)
    assert packed.kept_float == ()
    assert [step.op for step in packed.programs[0].steps[:3]] == ["quantpack", "bitconv2d", "pool"]


def test_mobilenet_with_depthwise_layers_and_negative_activations() -> None:
    model = pack_nets.network("mobilenet_v2", 4, 4, size=32)
    packed = pack_nets.check_equal(model, (3, 32, 32), batch=2)
    steps = layer_steps(packed.programs[0])
    assert any(isinstance(step, ConvStep) and step.groups > 1 for step in steps.values())
    codes = [spec for spec in packed.programs[0].tensors[2:] if spec.form == "codes"]
    assert any(spec.zero for spec in codes)
    assert not any(spec.signed for spec in codes)


@pytest.mark.parametrize("stream_dtype", ["float16", "bfloat16"])
def test_half_precision_streams(stream_dtype: str) -> None:
    packed = pack_nets.check_equal(pack_nets.mixed_network(), (3, 32, 32), stream_dtype=stream_dtype)
    assert packed.programs[0].stream_dtype == stream_dtype
    assert not torch.equal(
        packed(pack_nets.images(2, (3, 32, 32))), pack(pack_nets.mixed_network())(pack_nets.images(2, (3, 32, 32)))
    )


def test_model_stays_as_it_is_and_training_mode_does_not_matter() -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = pack_nets.images(3, (1, 8, 8))
    expected = pack(model)(x)
    model.train()
    nn.Module.eval(model.layer1)
    try:
        assert torch.equal(pack(model)(x), expected)
        assert model.training
        assert not model.layer1.training
    finally:
        model.eval()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_top_class_agreement_is_reported() -> None:
    model = pack_nets.network("cifar_resnet20", 4, 4)
    x = pack_nets.images(40, (3, 32, 32), 11)  # more than one part of the verification
    report = verify(model, pack(model, verify=False), x)
    assert report.ok
    assert report.images == 40
    assert report.agreeing is not None
    assert report.agreeing >= 39
    assert report.codes > 40 * 16 * 32 * 32
