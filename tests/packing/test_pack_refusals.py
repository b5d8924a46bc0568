"""What cannot be packed or run is refused with one error: what, the value, the rule, the way out."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.packing.packing import pack
from lbs_kernels.errors import FormatError, GraphError, ShapeError

DIGITS = (1, 8, 8)


def fresh() -> nn.Module:
    return copy.deepcopy(pack_nets.network("digits_resnet8", 4, 4, classes=10))


def test_model_under_search_is_told_to_freeze() -> None:
    model = lbs.prepare(lbs.models.create("digits_resnet8"), pack_nets.images(2, DIGITS))
    with pytest.raises(
        GraphError, match=r"still searchable; fix bits and filters first: lbs.pack\(lbs.freeze\(model\)\)"
    ):
        pack(model)


def test_float_model_is_told_how_to_become_quantized() -> None:
    with pytest.raises(GraphError, match=r"no quantized layer, so there is nothing to pack; make it with lbs.prepare"):
        pack(lbs.models.create("digits_resnet8"), example=pack_nets.images(2, DIGITS))


def test_no_layer_left_that_can_be_packed() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((0, 1, 2)))

    model = lbs.uniform(Sequence(), pack_nets.images(2, DIGITS))
    with pytest.raises(
        GraphError, match=r"no layer can be packed \(fc: it is applied at several positions of a tensor of 1"
    ):
        pack(model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer1.0.conv1.weight", float("nan"), r"layer1\.0\.conv1\.weight holds NaN or infinite"),
        ("layer2.0.conv2.w_range", float("inf"), r"layer2\.0\.conv2: w_range is inf; it must be positive and finite"),
        ("layer2.0.conv2.w_range", 0.0, r"layer2\.0\.conv2: w_range is 0\.0"),
        ("layer1.0.conv2.quantizer.range", float("nan"), r"layer1\.0\.conv2: the step of its quantizer is nan"),
        ("fc.bias", float("-inf"), r"fc\.bias holds NaN"),
        ("fc.output_scale", float("nan"), r"fc: output_scale is nan"),
        ("layer2.0.bn1.running_var", float("nan"), r"the scale of layer2\.0\.bn1 is nan at channel 0"),
        ("layer2.0.bn1.running_var", -1.0, r"layer2\.0\.bn1 .*negative variance"),
        ("layer2.0.bn2.bias", float("inf"), r"the shift of layer2\.0\.bn2 is inf at channel 0"),
        ("bn1.weight", 3e38, r"the multiplier of conv1|the scale of bn1"),
    ],
)
def test_values_that_are_not_finite_name_their_layer(name: str, value: float, message: str) -> None:
    model = fresh()
    with torch.no_grad():
        tensor = dict(model.state_dict(keep_vars=True))[name]
        tensor.view(-1)[0] = value
        if name == "bn1.weight":
            model.bn1.running_var.fill_(1e-30)
            model.bn1.eps = 1e-30
    with pytest.raises(GraphError, match=message):
        pack(model)


def test_all_layers_with_bad_values_are_told_at_once() -> None:
    model = fresh()
    with torch.no_grad():
        model.layer1[0].conv2.quantizer.range.fill_(float("nan"))
        model.fc.bias[0] = float("inf")
    model.layer2[0].conv2.quantizer.signed = True
    with pytest.raises(GraphError) as seen:
        pack(model)
    assert [line.split()[0].rstrip(":") for line in str(seen.value).splitlines()] == [
        *("layer1.0.conv2", "layer2.0.conv2", "fc.bias")
    ]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_layer_of_equal_weights_packs(value: float) -> None:
    """A dead or constant layer has no deviation to divide by, and codes all the same."""
    model = fresh()
    with torch.no_grad():
        model.layer1[0].conv1.weight.fill_(value)
    pack_nets.check_equal(model, DIGITS)


def test_signed_activations_into_zero_padding() -> None:
    model = fresh()
    model.layer2[0].conv2.quantizer.signed = True
    with pytest.raises(
        GraphError, match=r"layer2\.0\.conv2 pads signed activations with zeros .* put a ReLU before it"
    ):
        pack(model)


def test_accumulator_overflow_is_refused_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`uniform` and `prepare` refuse it before; packing looks for itself."""
    monkeypatch.setattr(sys.modules["lbs.search.prepare"], "check_sum", lambda *_: None)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(34000, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.flatten(x, 1))

    shape = (34, 10, 100)
    model = pack_nets.quantized(Wide(), shape)
    with pytest.raises(
        FormatError, match=r"fc: 34000 products of weights up to 255 and activations up to 255 sum to 2210850000"
    ):
        pack(model)


def test_layer_that_observes_in_float_at_present() -> None:
    model = fresh()
    model.fc.quantize = False
    with pytest.raises(GraphError, match="fc computes in float at present"):
        pack(model)


def test_untraceable_model_names_file_and_line() -> None:
    class Branching(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.inner(x)
            return self.inner(-x)

    with pytest.raises(GraphError, match=r"test_pack_refusals\.py, line \d+: if x\.sum\(\) > 0"):
        pack(Branching(fresh()), example=pack_nets.images(2, DIGITS))


def test_neither_record_nor_example() -> None:
    model = fresh()
    del model.lbs_record
    with pytest.raises(GraphError, match="give example="):
        pack(model)
    assert pack(model, example=pack_nets.images(2, DIGITS)).plan is None


def test_example_that_is_no_batch_of_images() -> None:
    with pytest.raises(ShapeError, match=r"example is torch.float64 of shape \[2, 1, 8, 8\]"):
        pack(fresh(), example=pack_nets.images(2, DIGITS).double())
    with pytest.raises(FormatError, match="stream_dtype is 'float8'"):
        pack(fresh(), stream_dtype="float8")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"input has shape \[2, 3, 8, 8\]; the model was packed for \[N, 1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 9), r"input has shape \[2, 1, 8, 9\]"),
        (torch.zeros(1, 8, 8), r"input has shape \[1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8).double(), r"input is torch.float64; the program takes normalised float32"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"input is torch.uint8; .*pack with normalize="),
        ([[[[0.0]]]], "input is a list"),
        (torch.zeros(2, 1, 8, 8, device="meta"), r"input lies on meta, the packed model on cpu"),
    ],
)
def test_inputs_the_model_was_not_packed_for(x: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        pack_nets.packed_digits()(x)


def test_empty_batch_gives_empty_logits() -> None:
    assert pack_nets.packed_digits()(torch.zeros(0, 1, 8, 8)).shape == (0, 10)
    assert pack_nets.packed_two_regions()(torch.zeros(0, 3, 10, 10)).shape == (0, 5)


@pytest.mark.parametrize("look", [lbs.explain, lbs.bench, lambda model: lbs.verify(fresh(), model, torch.zeros(1))])
def test_a_model_that_is_not_packed_is_told_so(look: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(GraphError, match=r"got a \w+; it looks at a packed network: lbs\.pack\(model\)"):
        look(fresh())


def test_images_need_not_be_contiguous() -> None:
    x = pack_nets.images(6, DIGITS)
    packed = pack_nets.packed_digits()
    expected = packed(x)
    assert torch.equal(packed(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(packed(x[::2]), expected[::2])
    assert torch.equal(packed(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


def test_float_parts_are_logged_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="lbs"):
        packed = pack(pack_nets.two_regions())
    assert [name for name, _ in packed.kept_float] == ["softplus", "mul"]
    assert "TwoRegions: softplus stays in float: softplus has no packed form" in caplog.text


def test_operations_that_share_a_reason_are_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(6)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = nn.functional.softplus(layer(x))
            return x

    with caplog.at_level("WARNING", logger="lbs"):
        pack(pack_nets.quantized(Many(), (3, 4, 4)))
    told = "softplus, softplus_1, softplus_2 and 3 more stay in float: softplus has no packed form"
    assert [record.message for record in caplog.records if "float" in record.message] == [f"Many: {told}"]
