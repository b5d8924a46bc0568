"""verify finds what is wrong, names it, and excuses rounding boundaries only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pack_nets
import pytest
import torch
from torch import Tensor, nn

import lbs
from lbs.packing.model import PackedModel
from lbs.packing.packing import pack
from lbs.packing.region import PackedRegion
from lbs.packing.verify import verify
from lbs.packing.verify_report import Check, VerifyReport
from lbs_kernels.errors import BackendError, GraphError, ShapeError
from lbs_kernels.program.steps import Program, blob_digest

DIGITS = (1, 8, 8)


def damaged(packed: PackedModel, change: Callable[[Program, Tensor], Program | None], region: int = 0) -> PackedModel:
    """A copy whose blob or program is changed and sealed again, so that only verification can notice."""
    other = copy.deepcopy(packed)
    old = other.regions[region]
    blob = old.blob.clone()
    program = change(old.program, blob) or old.program
    setattr(other.body, f"region{region}", PackedRegion(replace(program, digest=blob_digest(blob)), blob))
    return other


def flip_weight(layer: str) -> Callable[[Program, Tensor], None]:
    def change(program: Program, blob: Tensor) -> None:
        program.array(blob, f"{layer}.planes")[0, 2, 0, 0] ^= 1  # lowest bit of one weight

    return change


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv2", "layer2.0.downsample.0", "layer3.0.conv1", "fc"])
def test_one_flipped_weight_bit_is_found_in_its_layer(layer: str) -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    report = verify(model, damaged(pack_nets.packed_digits(), flip_weight(layer)), pack_nets.images(4, DIGITS))
    assert not report.ok
    assert report.first_layer == layer
    assert str(report.first_difference).startswith(f"{layer}: weight codes: 1 of ")
    assert "DIFFERS" in str(report)


def test_damage_behind_the_first_one_is_not_confused_with_it() -> None:
    """With teacher forcing a wrong layer does not make its successors look wrong."""
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)

    def change(program: Program, blob: Tensor) -> None:
        program.array(blob, "layer2.0.conv1.multiplier")[3] *= 1.5

    report = verify(model, damaged(pack_nets.packed_digits(), change), pack_nets.images(4, DIGITS))
    assert {check.layer for check in report.checks if check.wrong} == {"layer2.0.conv1"}
    assert str(report.first_difference).startswith("layer2.0.conv1: codes read by layer2.0.conv2: ")


def test_wrong_scale_of_a_consumer_is_found_in_the_step_that_writes() -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)

    def change(program: Program, blob: Tensor) -> Program:
        steps = list(program.steps)
        place = next(i for i, step in enumerate(steps) if step.name == "layer3.0.conv1")
        (consumer,) = steps[place].emit.consumers
        wrong = replace(consumer, scale=float(torch.tensor(consumer.scale * 1.25)))
        steps[place] = replace(steps[place], emit=replace(steps[place].emit, consumers=(wrong,)))
        return replace(program, steps=tuple(steps))

    report = verify(model, damaged(pack_nets.packed_digits(), change), pack_nets.images(4, DIGITS))
    assert report.first_layer == "layer3.0.conv1"


def test_wrong_stream_is_found_where_only_floats_are_read() -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)

    def change(program: Program, blob: Tensor) -> None:
        program.array(blob, "fc.bias")[0] += 1e-3

    report = verify(model, damaged(pack_nets.packed_digits(), change), pack_nets.images(4, DIGITS))
    assert [check.layer for check in report.checks if check.wrong] == ["fc"]
    assert "stream fc" in str(report.first_difference)


def test_second_region_and_float_modules_are_compared() -> None:
    model, packed = pack_nets.two_regions(), pack_nets.packed_two_regions()
    x = pack_nets.images(3, (3, 10, 10))
    assert verify(model, packed, x).ok
    report = verify(model, damaged(packed, flip_weight("last"), region=1), x)
    assert report.first_layer == "last"
    other = pack_nets.quantized(pack_nets.TwoRegions(), (3, 10, 10))
    assert not verify(other, packed, x).ok


def test_code_on_a_rounding_boundary_is_excused_and_others_are_not() -> None:
    """Inputs of exactly k + 1/2 steps: float32 and float64 round some of them apart. Inputs of k + 0.4 steps: none."""
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    packed = pack_nets.packed_digits()
    steps = torch.arange(-32, 32).reshape(1, 1, 8, 8)
    ties = verify(model, packed, ((steps + 0.5).double() * model.conv1.quantizer.step()).float())
    assert ties.ok
    assert 0 < ties.near_boundary <= 64
    clear = ((steps + 0.4).double() * model.conv1.quantizer.step()).float()
    assert verify(model, packed, clear).near_boundary == 0
    shifted = copy.deepcopy(model)
    shifted.conv1.quantizer.zero_point += 1
    wrong = verify(shifted, packed, clear)
    assert (wrong.first_layer, wrong.checks[0].wrong) == ("x.quantize", 64)


@pytest.mark.parametrize(("units", "passes"), [(5e-5, True), (0.05, False)])
def test_values_are_excused_within_the_stated_distance_only(units: float, passes: bool) -> None:
    model, packed = pack_nets.network("digits_resnet8", 4, 4, classes=10), pack_nets.packed_digits()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.layer3[0].bn1.bias += units * moved.layer3[0].conv2.quantizer.step()
    report = verify(moved, packed, pack_nets.images(32, DIGITS))
    assert report.ok is passes
    assert report.first_layer == (None if passes else "layer3.0.conv1")


def test_an_unknown_back_end_is_named_without_words_of_torch() -> None:
    with pytest.raises(BackendError) as seen:
        verify(
            pack_nets.network("digits_resnet8", 4, 4, classes=10),
            pack_nets.packed_digits(),
            pack_nets.images(2, (1, 8, 8)),
            backend="fpga",
        )
    assert str(seen.value).endswith("choose one of auto, cpu, gpu, triton, reference")


def test_model_of_another_shape_is_refused_by_name() -> None:
    other = pack_nets.network("cifar_resnet20", 4, 4)
    with pytest.raises(ShapeError, match=r"packed for \[N, 1, 8, 8\]"):
        verify(other, pack_nets.packed_digits(), pack_nets.images(2, (3, 32, 32)))
    with pytest.raises(GraphError, match="made from"):
        verify(
            pack_nets.two_regions(),
            pack(pack_nets.network("cifar_resnet20", 4, 4), verify=False),
            pack_nets.images(2, (3, 32, 32)),
        )


def test_empty_batch_verifies_the_weights() -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    report = verify(model, pack_nets.packed_digits(), pack_nets.images(0, DIGITS))
    assert report.ok
    assert sum(check.what == "weight codes" for check in report.checks) == 10
    assert not verify(model, damaged(pack_nets.packed_digits(), flip_weight("fc")), pack_nets.images(0, DIGITS)).ok


def test_pack_raises_where_verification_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = VerifyReport((Check("conv9", "weight codes", 4, 1, 0, 1.0, 0.0),), 1, 1)
    monkeypatch.setattr("lbs.packing.packing.compare", lambda *_: bad)
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    with pytest.raises(GraphError, match="conv9: weight codes: 1 of 4 DIFFER"):
        pack(model)
    assert isinstance(pack(model, verify=False), PackedModel)


def test_the_model_itself_is_compared_not_its_trace() -> None:
    """A hook that changes what loud images give is none that quiet ones show, and this one cannot be traced."""
    model = copy.deepcopy(pack_nets.network("digits_resnet8", 4, 4, classes=10))
    handle = model.register_forward_hook(lambda m, args, y: y + 1 if float(args[0].max()) > 9 else y)
    packed, x = pack(model), pack_nets.images(4, DIGITS)
    assert verify(model, packed, x).ok
    for count in (4, 2):
        loud = x.clone()
        loud[-count:] *= 10
        report = verify(model, packed, loud)
        assert not report.ok
        assert report.first_layer == "the model itself"
        assert str(report.first_difference).startswith("the model itself: output 0 against its trace: 40 of 40 DIFFER")
    handle.remove()
    assert verify(model, packed, loud).ok


def test_packing_refuses_a_model_that_is_not_its_trace() -> None:
    class Asking(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y * 2 if isinstance(y, Tensor) else y

    model = Asking(pack_nets.network("digits_resnet8", 4, 4, classes=10))
    with pytest.raises(GraphError, match=r"Asking computes something else than its torch\.fx trace"):
        pack(model, example=pack_nets.images(2, DIGITS))


def test_report_is_rows_and_text() -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    report = verify(model, pack_nets.packed_digits(), pack_nets.images(4, DIGITS))
    rows = report.rows()
    assert {row["layer"] for row in rows if row["what"] == "weight codes"} == set(pack_nets.layers_of(model))
    assert "same class on 4 of 4 images" in str(report)
    assert all(row["wrong"] == 0 for row in rows)


class _FloatPart(torch.nn.Module):
    """A branch in front of an activation in place that no program has, and hooks on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8)
        self.b, self.c = torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1)
        self.act = torch.nn.Threshold(0.1, -0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        return self.b(x) + self.c(self.act(x)) + x


@pytest.mark.parametrize("hooks", [False, True])
def test_float_parts_keep_hooks_and_order(hooks: bool) -> None:
    torch.manual_seed(0)
    model = _FloatPart()
    if hooks:
        model.act.register_forward_pre_hook(lambda m, args: args[0] * 2)
        model.act.register_forward_hook(lambda m, args, y: y + 1)
    shape = (3, 8, 8)
    packed = pack_nets.check_equal(pack_nets.quantized(model, shape), shape)
    assert {"norm", "act"} <= {name for name, _ in packed.kept_float}
    x = pack_nets.images(2, shape)
    before = x.clone()
    packed(x)
    assert torch.equal(x, before)
    assert not any(getattr(module, "inplace", False) for module in packed.modules())


def faint(scale: float) -> nn.Module:
    """A residual network whose first block adds, and stores, values of about `scale`."""
    model = copy.deepcopy(pack_nets.network("digits_resnet8", 8, 8, classes=10))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.startswith(("layer2", "layer3")):
                module.weight *= scale
                module.bias *= scale
    return lbs.calibrate(model, [pack_nets.images(4, DIGITS)], bits=None).eval()


@pytest.mark.parametrize("stream_dtype", ["float32", "float16", "bfloat16"])
def test_streams_of_the_smallest_numbers_are_rounded_by_half_of_their_step(stream_dtype: str) -> None:
    """Below 2^-14 the steps of float16 no longer shrink with the value: half of one is 2^-25, whatever is stored."""
    model = faint(1e-5)
    packed = pack(model, stream_dtype=stream_dtype, verify=False)
    images = pack_nets.images(4, DIGITS)
    assert verify(model, packed, images).ok
    _, (trace,) = packed.run_traced(images, "reference")
    program = packed.programs[0]
    streams = [trace[index] for index, spec in enumerate(program.tensors) if spec.form == "stream" and index in trace]
    smallest = [stream for stream in streams if float(stream.abs().max()) < 2.0**-14]
    assert smallest, "nothing here is below the normal numbers of float16"

    def change(program: Program, blob: Tensor) -> None:
        program.array(blob, "conv1.bias")[2] += 2.0**-23  # two steps

    report = verify(model, damaged(packed, change), images)
    assert not report.ok
    assert report.first_layer == "conv1"


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbs.packing.packing._on_gpu", lambda model: True)


def test_streams_are_half_precision_by_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack_nets.network("digits_resnet8", 4, 4, classes=10)
    assert [program.stream_dtype for program in pack(model).programs] == ["float32"]
    on_a_gpu(monkeypatch)
    assert [program.stream_dtype for program in pack(model).programs] == ["float16"]
    assert [program.stream_dtype for program in pack(model, stream_dtype="float32").programs] == ["float32"]
    assert [program.stream_dtype for program in pack(model, verify=False).programs] == ["float32"]


def test_values_beyond_float16_stay_in_float32_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_gpu(monkeypatch)
    model = faint(1e6)
    assert [program.stream_dtype for program in pack(model).programs] == ["float32"]
    assert "streams stay in float32, as in float16" in caplog.text
    with pytest.raises(GraphError, match="does not equal the model"):
        pack(model, stream_dtype="float16")


@pytest.mark.parametrize("fallback", [None, "fp16"])
def test_what_is_verified_on_a_gpu_is_what_runs(
    fallback: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_gpu(monkeypatch)
    verified: list[str | None] = []

    def compared(model: nn.Module, packed: PackedModel, images: torch.Tensor) -> VerifyReport:
        verified.append(packed.fallback)
        return verify(model, packed, images)

    monkeypatch.setattr("lbs.packing.packing.compare", compared)
    with caplog.at_level("INFO", "lbs"):
        packed = pack(pack_nets.network("digits_resnet8", 4, 4, classes=10), fallback=fallback)
    assert verified == [packed.fallback] == [fallback]
    assert "streams are stored in float16, the default on a GPU" in caplog.text


def test_quantize_tells_what_streams_are_stored_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lbs.models.create("digits_resnet8", 10).eval()
    assert "stored in" not in str(lbs.quantize(model, torch.rand(8, 1, 8, 8)).report)
    on_a_gpu(monkeypatch)
    report = lbs.quantize(model, torch.rand(8, 1, 8, 8)).report
    assert report.to_json()["stream_dtype"] == "float16"
    assert "floats are stored in float16" in str(report)
