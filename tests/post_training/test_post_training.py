"""`lbs.quantize`: one network whatever holds the images, the report's numbers counted again, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbs
import lbs.models
from lbs.errors import DataError, GraphError, LbsError, PlanError, ShapeError
from lbs.packing.model import PackedModel
from lbs.post_training import CHAINS
from lbs.quant.layers import QuantLayer
from lbs.quantization_report import LEAST_AGREEMENT, MOST_ERROR, Fidelity
from lbs.search.prepare import at_widths

PIXELS = ((0.4,), (0.3,))


def images(count: int = 24, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Module:
    """digits_resnet8 whose norms have seen data."""
    torch.manual_seed(seed)
    model = lbs.models.create("digits_resnet8").train()
    with torch.no_grad():
        for _ in range(3):
            model(images())
    return model.eval()


def outputs(packed: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return packed(x)


# What it makes.


def test_eight_bits_are_uniform_calibrated_packed_and_the_model_stays_as_it_is() -> None:
    model, x = network().train(), images()
    before = copy.deepcopy(model.state_dict())
    packed = lbs.quantize(model, x)
    expected = lbs.pack(lbs.calibrate(lbs.uniform(model, x[:2]), [x]).eval())
    assert torch.equal(outputs(packed, images(seed=9)), outputs(expected, images(seed=9)))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _pairs(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from ((part, torch.zeros(len(part))) for part in x.split(10))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a list of batches": lambda x: list(x.split(7)),
    "a list of tuples": lambda x: list(_pairs(x)),
    "one tuple": lambda x: (x, torch.zeros(len(x))),
    "one dictionary": lambda x: {"pixel_values": x},
    "a loader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=10),
    "an iterator": _pairs,
}


@pytest.mark.parametrize("form", FORMS)
def test_images_come_in_many_forms(form: str) -> None:
    model, x = network(), images()
    packed, expected = lbs.quantize(model, FORMS[form](x)), lbs.quantize(model, x)
    assert packed.report.fidelity.images == len(x)
    torch.testing.assert_close(outputs(packed, x), outputs(expected, x), rtol=0, atol=0.02)


def test_of_a_loader_the_first_images_are_taken_and_of_a_list_all(caplog: pytest.LogCaptureFixture) -> None:
    endless = (images(100, seed) for seed in range(1000))
    with caplog.at_level(logging.INFO, "lbs"):
        assert lbs.quantize(network(), endless).report.fidelity.images == 300
    assert "the first 300 images of the loader are used" in caplog.text
    assert lbs.quantize(network(), [images(100, seed) for seed in range(4)]).report.fidelity.images == 400


def test_bytes_are_normalised_by_the_packed_network() -> None:
    model = network()
    pixels = torch.randint(0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    floats = (pixels.double() / 255 - PIXELS[0][0]) / PIXELS[1][0]
    packed, expected = lbs.quantize(model, pixels, normalize=PIXELS), lbs.quantize(model, floats.float())
    assert packed.input_dtype is torch.uint8
    torch.testing.assert_close(outputs(packed, pixels), outputs(expected, floats.float()), rtol=0, atol=0.02)
    assert packed.report.fidelity.agreement == lbs.fidelity(model, packed, pixels).agreement


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_taken_off(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    packed = lbs.quantize(wrapped(model), images())
    assert torch.equal(outputs(packed, images()), outputs(lbs.quantize(model, images()), images()))


@pytest.mark.parametrize(("bits", "pair"), [(None, (8, 8)), (4, (4, 4)), ((4, 8), (4, 8))])
def test_widths_that_are_named(bits: Any, pair: tuple[int, int]) -> None:
    report = lbs.quantize(network(), images(), bits=bits).report
    inner = [row for row in report.widths if row[:2] != (8, 8)]
    assert inner == ([] if pair == (8, 8) else [(*pair, 8)])
    assert sum(count for *_, count in report.widths) == 10


def test_optimized_rounding_comes_nearer_to_float() -> None:
    nearest, optimized = (
        lbs.quantize(network(), images(64), bits=(3, 8), rounding=rounding).report
        for rounding in ("nearest", "optimized")
    )
    assert optimized.fidelity.error < 0.8 * nearest.fidelity.error
    assert "round" in optimized.seconds


# Budgets.


def test_a_budget_holds_and_ranges_are_those_of_the_float_network_at_its_widths() -> None:
    """Nothing of the search is left in the result: converting anew at the plan gives the same network."""
    model, x = network(), images()
    packed = lbs.quantize(model, x, bops=0.03)
    report = packed.report
    assert report.bops <= 0.03 * report.full_precision_bops
    assert report.outcome is not None
    assert report.outcome.met
    assert {row[:2] for row in report.widths} <= {(w, a) for w in (4, 8) for a in (4, 8)}
    assert len(report.widths) > 1
    expected = lbs.pack(lbs.calibrate(at_widths(model, x[:2], packed.plan), [x]).eval())
    assert torch.equal(outputs(packed, x), outputs(expected, x))


def test_the_layer_that_hurts_least_is_narrowed() -> None:
    """A layer that the outputs do not depend on gives its bits, one that they do keeps them."""
    model = network()
    with torch.no_grad():
        model.get_submodule("layer2.0.bn2").weight.zero_()
    plan = lbs.quantize(model, images(), bops=0.045).plan
    assert plan is not None
    assert (plan.layer("layer2.0.conv2").w_bits, plan.layer("layer2.0.conv2").a_bits) == (4, 4)
    assert any(layer.w_bits == 8 for layer in plan.layers if layer.name not in plan.edges)


def test_two_bits_are_chosen_only_where_the_budget_needs_them() -> None:
    four = lbs.uniform(network(), images(2), 4, 4).lbs_record.plan
    widths = lbs.quantize(network(), images(), bops=0.9 * four.bops() / four.full_precision_bops()).report.widths
    assert any(2 in row[:2] for row in widths)
    assert all(2 not in row[:2] for row in lbs.quantize(network(), images(), bops=four.bops()).report.widths)
    assert CHAINS == ((4, 8), (2, 4, 8))


def test_bytes_and_seconds_are_budgets_too() -> None:
    report = lbs.quantize(network(), images(), size_mb=0.05).report
    assert report.packed_bytes <= 50_000
    with pytest.raises(PlanError, match=r"latency_ms needs table=: lbs\.cost\.Tuned\(\)"):
        lbs.quantize(network(), images(), latency_ms=1)
    outcome = lbs.quantize(
        network(), images(), latency_ms=5, table=lambda problem: 1e-4 * problem.w_bits
    ).report.outcome
    assert outcome is not None
    assert 0 < outcome.value <= 5e-3


def test_uniform_widths_are_a_plan_like_any_other() -> None:
    model, x = network(), images()
    uniform = lbs.uniform(model, x[:2], 4, 8)
    same = at_widths(model, x[:2], uniform.lbs_record.plan)
    assert same.lbs_record.plan == uniform.lbs_record.plan
    states = zip(same.state_dict().items(), uniform.state_dict().items(), strict=True)
    assert all(key == other and torch.equal(one, two) for (key, one), (other, two) in states)


# The report.


def test_numbers_of_the_report() -> None:
    model, x = network(), images()
    packed = lbs.quantize(model, x, bits=(4, 4))
    report = packed.report
    with torch.no_grad():
        plain, ours = model(x), packed(x)
    assert report.fidelity.agreement == float((plain.argmax(1) == ours.argmax(1)).double().mean())
    assert report.fidelity.error == pytest.approx(float((plain - ours).norm() / plain.norm()), rel=1e-5)
    assert report.float_bytes == sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert report.packed_bytes == packed.packed_bytes
    assert report.bops == packed.plan.bops()
    assert list(report.seconds) == ["convert", "calibrate", "pack and verify", "compare"]
    text = str(report)
    assert all(word in text for word in ("same class", "output error", "8 at 4/4 bits, 2 at 8/8 bits", "calibrate"))
    assert json.loads(json.dumps(report.to_json()))["agreement"] == report.fidelity.agreement


class Partly(nn.Module):
    """Three convolutions, one of them excluded below, and a transformer layer whose cost no formula counts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three, self.mixed = nn.Conv2d(8, 8, 1), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.unused, self.fc = nn.Linear(3, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.three(torch.relu(self.two(torch.relu(self.one(x))))))
        return self.fc(self.mixed(x.flatten(2).transpose(1, 2)).mean(1))


def test_bit_operations_of_layers_in_float_are_told_apart() -> None:
    torch.manual_seed(0)
    report = lbs.quantize(Partly().eval(), images(), exclude=("two",)).report
    one, two, three, fc = (macs * 32 * 32 for macs in (9 * 8 * 64, 9 * 64 * 64, 64 * 64, 8 * 4))
    assert report.bops == (one + three + fc) // 16
    assert report.float_bops == two
    assert report.full_precision_bops == one + two + three + fc
    assert report.uncounted == ("mixed",)
    row = dict(report.rows())["bit operations"]
    assert row == "packed layers 559.1k; in float 37.7M, the float network 46.7M; not counted: mixed"
    assert "unused" in dict(report.unpacked)
    whole = lbs.quantize(network(), images()).report
    assert (whole.float_bops, whole.uncounted) == (0, ())
    assert "packed layers" not in dict(whole.rows())["bit operations"]


def test_what_stays_in_float_is_timed_when_asked() -> None:
    torch.manual_seed(0)
    report = lbs.quantize(Partly().eval(), images(8), exclude=("two",), measure=True).report
    rows = {value.partition(":")[0]: value for name, value in report.rows() if name == "not packed"}
    assert rows["two"].endswith(" % of a call)")
    assert rows["mixed"].endswith(" % of a call)")
    assert "of a call" not in rows["unused"]
    assert {part["name"] for part in report.to_json()["bench"]["parts"]} >= {"two", "mixed", "region 0"}


def test_the_report_is_not_saved(tmp_path: Path) -> None:
    packed = lbs.quantize(network(), images())
    packed.save(tmp_path / "net.lbs.safetensors")
    loaded = lbs.load(tmp_path / "net.lbs.safetensors")
    assert loaded.report is None
    assert torch.equal(outputs(loaded, images()), outputs(packed, images()))


def test_one_image_is_timed_when_asked() -> None:
    report = lbs.quantize(network(), images(), measure=True).report
    assert {row.contender for row in report.times.rows} == {"packed", "torch float32", "packed uniform 8-bit"}
    assert "packed is" in str(report)
    assert report.to_json()["bench"]["rows"]


def test_a_layer_that_is_never_called_is_told() -> None:
    model = network()
    model.add_module("spare", nn.Conv2d(1, 4, 3))
    report = lbs.quantize(model, images()).report
    assert report.unpacked == (("spare", "the forward pass does not call it"),)
    assert "spare: the forward pass does not call it" in str(report)


def test_excluded_layers_stay_in_float() -> None:
    report = lbs.quantize(network(), images(), exclude=("layer2.*",)).report
    assert ("layer2.0.conv1", "excluded by name") in report.unpacked


class Parts(nn.Module):
    """Returns no classes: a dictionary of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"one": y, "others": (y.reshape(-1, 2, 5),)}


@pytest.mark.parametrize("options", [{}, {"bops": 0.03}])
def test_outputs_of_another_form_have_an_error_and_no_agreement(options: dict[str, Any]) -> None:
    near = lbs.quantize(Parts(), images(), **options).report.fidelity
    assert near.agreement is None
    assert 0 < near.error < 0.2


def test_fidelity_of_the_network_itself_and_of_another() -> None:
    model, x = network(), images()
    assert lbs.fidelity(model, model, x) == Fidelity(24, 1.0, 0.0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.weight.neg_()
        other.fc.bias.neg_()
    found = lbs.fidelity(model, other, x)
    assert found.agreement is not None
    assert found.agreement < 0.5
    assert found.error == pytest.approx(2.0)


def test_a_result_far_from_float_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lbs.quantize(network(), images())
    assert not caplog.records
    monkeypatch.setattr("lbs.quantization_report.LEAST_AGREEMENT", 1.0)
    packed = lbs.quantize(network(), images(), bits=1)
    kept = packed.report.fidelity.kept
    assert kept < 24
    assert f"the class of {kept} of 24 images is kept, at least 100.00 % are expected" in caplog.text


def test_the_rule_of_the_warning() -> None:
    assert (LEAST_AGREEMENT, MOST_ERROR) == (0.8, 0.2)
    assert "the class of 7 of 10 images is kept, at least 80.00 %" in str(Fidelity(10, 0.7, 0.1).warning)
    assert Fidelity(10, 0.8, 0.9).warning is None
    assert Fidelity(10, None, 0.2).warning is None
    assert "outputs are off by 21.00 %" in str(Fidelity(10, None, 0.21).warning)


# What is refused.


def _with(place: tuple[int, ...], value: float) -> Tensor:
    x = images()
    x[place] = value
    return x


REFUSED: dict[str, tuple[Any, dict[str, Any], type[LbsError], str]] = {
    "no batch": ([], {}, DataError, "there are no images; give a tensor"),
    "nothing": (None, {}, DataError, "images are a NoneType; give a tensor"),
    "no image": (images()[:0], {}, DataError, r"batch 0 of shape \[0, 1, 8, 8\] is empty; leave it out"),
    "one image without a batch": (images()[0], {}, ShapeError, r"shape \[1, 8, 8\].*images\[None\] makes"),
    "two sizes": (
        [images(), torch.randn(2, 1, 9, 9)],
        {},
        ShapeError,
        r"images of batch 1 are \[1, 9, 9\], those of batch 0 \[1, 8, 8\].*resize or crop",
    ),
    "channels": (torch.randn(4, 3, 8, 8), {}, GraphError, r"failed on an example of shape \(2, 3, 8, 8\).*give an"),
    "bytes without a normalisation": (images().byte(), {}, ShapeError, r"torch.uint8.*give normalize=\(mean, std\)"),
    "floats with a normalisation": (images(), {"normalize": PIXELS}, ShapeError, "float32.*give the bytes of images"),
    "other means": (images().byte(), {"normalize": ((0,) * 3, (1,) * 3)}, ShapeError, "normalize has 3 means"),
    "half precision": (images().half(), {}, ShapeError, r"torch.float16, torch.float32 is expected; convert them"),
    "NaN": (_with((3, 0, 1, 1), float("nan")), {}, DataError, r"images \[3\] of batch 0 hold NaN .*1 of 24 images"),
    "infinity": (_with((5, 0, 0, 0), float("inf")), {}, DataError, r"images \[5\] of batch 0 hold NaN or infinite"),
    "black": (torch.zeros(4, 1, 8, 8), {}, PlanError, r"input range \[.*\] is empty; calibrate on real images"),
    "too faint": (images() * 1e-42, {}, PlanError, "input range .* has a step of .* outside .* scale the images"),
    "no labels, no keys": ([{"y": 1}], {}, PlanError, "calibration batch 0 holds keys 'y'; give images"),
    "two wishes": (images(), {"bits": 4, "bops": 0.1}, PlanError, r"bits=4 and a budget \(bops\).*leave one"),
    "no width": (images(), {"bits": 9}, PlanError, "9 bits are outside 1..8"),
    "three widths": (images(), {"bits": (2, 4, 8)}, PlanError, r"bits=\(2, 4, 8\); give one width, or"),
    "out of reach": (images(), {"bops": 1e-5}, PlanError, "out of reach; the gates reach .* Raise it"),
    "no budget": (images(), {"bops": -1}, PlanError, "budget bops=-1; give a fraction"),
    "no rounding": (images(), {"rounding": "best"}, PlanError, "rounding='best' is unknown; use nearest or"),
    "no layer of this name": (images(), {"exclude": ("x*",)}, PlanError, r"exclude='x\*' matches no layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_error(name: str) -> None:
    x, options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        lbs.quantize(network(), x, **options)
    assert "\n" not in str(caught.value)


def test_models_that_are_refused() -> None:
    x = images()
    with pytest.raises(GraphError, match=r"no layer that can be converted .*no Conv2d and no Linear"):
        lbs.quantize(nn.Sequential(nn.ReLU(), nn.Flatten()), x)
    with pytest.raises(GraphError, match="already holds quantized layers; give the float model"):
        lbs.quantize(lbs.uniform(network(), x), x)
    broken = network()
    broken.get_submodule("conv1").weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(GraphError, match=r"conv1\.weight holds NaN or infinite values"):
        lbs.quantize(broken, x)


def test_values_that_overflow_are_named_and_statistics_stay() -> None:
    model = network()
    model.get_submodule("fc").weight.data.fill_(3e38)  # finite; sums of its products are not
    with pytest.raises(GraphError, match=r"^values at fc are NaN or infinite on the calibration images.*check weights"):
        lbs.quantize(model, images())
    quantized = lbs.uniform(model, images())
    before = copy.deepcopy([quantized.get_submodule(name).state_dict() for name in ("bn1", "layer1.0.bn1")])
    with pytest.raises(GraphError, match="values at fc"):
        lbs.calibrate(quantized, [images()])
    after = [quantized.get_submodule(name).state_dict() for name in ("bn1", "layer1.0.bn1")]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def _one_image(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model, x[:1]


def _constant_images(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model, torch.full_like(x, 2.0)


def _filter_of_zeros(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    model.get_submodule("conv1").weight.data[2] = 0
    return model, x


def _layer_of_zeros(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    model.get_submodule("layer1.0.conv2").weight.data.zero_()
    return model, x


@pytest.mark.parametrize("change", [_one_image, _constant_images, _filter_of_zeros, _layer_of_zeros])
@pytest.mark.parametrize("options", [{}, {"bops": 0.03}])
def test_little_to_see_is_no_obstacle(change: Callable[..., tuple[nn.Module, Tensor]], options: dict[str, Any]) -> None:
    packed = lbs.quantize(*change(network(), images()), **options)
    assert isinstance(packed, PackedModel)
    assert packed.report.fidelity.error < 0.2


def test_a_constant_channel_of_colour_images() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(16, 3, 8, 8)
    x[:, 1] = 0.5
    model(x)
    assert lbs.quantize(model.eval(), x).report.fidelity.error < 0.05


# Large layers.


def test_large_layers_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their codes, sums and planes are those of the whole, and nothing differs after packing."""
    model, x = network(), images()
    quantized = lbs.calibrate(lbs.uniform(model, x, 4, 8), [x]).eval()
    layers = [layer for layer in quantized.modules() if isinstance(layer, QuantLayer)]
    whole = [(layer.code_bytes(), layer.weight_codes()) for layer in layers]
    expected = outputs(quantized, x)
    monkeypatch.setattr("lbs.quant.codec.PART", 100)
    monkeypatch.setattr("lbs_kernels.program.planes._CACHED", 40)
    for layer, (codes, floats) in zip(layers, whole, strict=True):
        assert torch.equal(codes.float(), floats)
        assert torch.equal(layer.code_bytes(), codes)
    assert torch.equal(outputs(quantized, x), expected)
    assert lbs.verify(quantized, lbs.pack(quantized), x).identical == len(x)


LARGE = """
    import resource, time
    import torch
    import lbs
    from torch import nn

    def plain(*widths):
        channels, layers = 3, []
        for width in widths:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers += [nn.MaxPool2d(2)]
        head = [nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
        return nn.Sequential(*layers, nn.Flatten(), *head).eval()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = plain(64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
    images = torch.randn(32, 3, 224, 224)
    started = time.process_time()
    report = lbs.quantize(model, images).report
    print(report)
    seconds, gigabytes = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{seconds:.1f} s of one processor, {gigabytes:.2f} GB")
    assert seconds < 60 and gigabytes < 4, (seconds, gigabytes)
    assert report.fidelity.error < 0.05
"""


@pytest.mark.slow
def test_a_network_of_133_million_weights_takes_a_minute_and_four_gigabytes() -> None:
    """Eight convolutions at 224 x 224 and three large linear layers, as VGG-11 has them."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LARGE)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


# Filters that go, and training to follow.


@pytest.mark.parametrize("distill", [0, 2])
def test_filters_go_for_a_budget_that_bits_do_not_reach(distill: int) -> None:
    model, x = network(), images(48)
    before = copy.deepcopy(model.state_dict())
    by_filters = lambda problem: 1e-6 * problem.in_channels * problem.out_channels  # noqa: E731  widths cost alike
    whole = sum(by_filters(layer.problem()) for layer in lbs.quantize(model, x[:8]).plan.layers)  # type: ignore[union-attr]
    target = 1e3 * 0.8 * whole
    with pytest.raises(PlanError, match="out of reach"):
        lbs.quantize(model, x, latency_ms=target, table=by_filters)
    packed = lbs.quantize(model, x, latency_ms=target, table=by_filters, max_pruning_ratio=0.5, distill=distill)
    plan = packed.plan
    assert plan is not None
    assert sum(map(by_filters, plan.kept_problems())) <= 0.8 * whole
    assert packed.report.outcome is not None
    assert packed.report.outcome.met
    pruned = [layer for layer in plan.layers if layer.kept_filters < layer.filters]
    assert pruned
    assert all(layer.kept_filters % 8 == 0 and layer.kept_filters >= layer.filters // 2 for layer in pruned)
    assert {(layer.w_bits, layer.a_bits) for layer in plan.layers} == {(8, 8)}  # narrower ones save nothing
    assert packed.report.full_precision_bops == plan.full_precision_bops()
    assert ("distill" in packed.report.seconds) == bool(distill)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"distill": 1}, {"bits": (3, 8), "rounding": "optimized"}, {"bops": 0.03}], ids=str
)
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_is_left_and_changes_nothing(made_inside: bool, options: dict[str, Any]) -> None:
    expected = lbs.quantize(network(), images(), **options)
    outside = network()
    with torch.inference_mode():
        model, x = (network() if made_inside else outside), images()
        packed = lbs.quantize(model, x, **options)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(outputs(packed, images(seed=9)), outputs(expected, images(seed=9)))
    assert not any(value.is_inference() for value in packed.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pruning_ratio": 0.5}, "max_pruning_ratio=0.5: filters go for a budget"),
        ({"bops": 0.05, "max_pruning_ratio": 1.0}, r"max_pruning_ratio=1.0; it lies in \[0, 1\)"),
        ({"distill": -1}, "distill=-1; it counts epochs"),
    ],
)
def test_pruning_and_distilling_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lbs.quantize(network(), images(), **options)
