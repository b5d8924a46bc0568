"""The half-precision fallback, kernels interpreted: near the reference, never taken unless allowed, told everywhere.

Started by tests/kernels/test_gpu_runner.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import one_step
import pack_nets
import programs
import pytest
import torch

import lbs
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.half import HalfConfig
from lbs_kernels.gpu.runner import GpuRunner
from lbs_kernels.program.planes import pack_weights
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import ConvStep, Emit, LinearStep
from lbs_kernels.run import backends
from lbs_kernels.run.loaded import clear_runners
from lbs_kernels.run.reference import ReferenceRunner
from lbs_kernels.times import table
from lbs_kernels.times.table import TuningTable
from lbs_kernels.tune import tuner

HALF = HalfConfig()
NAME = f"fp16:{HALF}"


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measured times but those a test writes; models on the processor use the GPU's kernels."""
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    monkeypatch.setitem(backends.AUTOMATIC, "cpu", ("gpu", "reference"))
    table.forget()
    clear_runners()
    yield
    table.forget()
    clear_runners()


def measured(problems: list[Problem], seconds: dict[str, float]) -> None:
    device = table.device_slug("cpu")
    rows = {table.key(problem): seconds for problem in problems}
    table.write(table.user_path(device), TuningTable(device, rows))


# 33 channels: a word and one bit. Zero, sign, groups: how codes are read. 8/8 bits over 9 * 33 overflow float16.
@pytest.mark.parametrize(
    "geometry",
    [
        {"w_bits": 8, "a_bits": 8, "channels": 33},
        {"w_bits": 2, "a_bits": 4, "channels": 33, "stride": (2, 1)},
        {"w_bits": 4, "a_bits": 8, "zero": 117},
        {"w_bits": 4, "a_bits": 4, "signed": True, "padding": (0, 0)},
        {"w_bits": 8, "a_bits": 4, "groups": 4, "channels": 8, "filters": 12},
    ],
    ids=str,
)
def test_codes_differ_by_one_at_most(geometry: dict[str, object]) -> None:
    program, blob = programs.one_conv(5, **{"channels": 5, "filters": 13, "size": (5, 4), **geometry})  # type: ignore[arg-type]
    images = programs.random_inputs(program, batch=2, seed=6)
    expected: dict[int, torch.Tensor] = {}
    ReferenceRunner(program, blob).run(images, expected)
    runner = GpuRunner(program, blob, "cpu", {"step1": HALF})
    actual: dict[int, torch.Tensor] = {}
    runner.run(images, actual)
    step = next(step for step in program.steps if isinstance(step, ConvStep))
    target = step.emit.consumers[0].tensor
    difference = (actual[target].int() - expected[target].int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.05
    assert programs.share_unsaturated(program, expected) > 0.3


# 40 filters and 40 pixels: more than a tile of 32 x 32.
def test_the_whole_epilogue_follows_the_sum() -> None:
    b = programs.Builder(7)
    shape = (5, 4, 40)
    codes, residual, output = b.consumer(shape, 4), b.stream(shape), b.stream(shape, output=True)
    b.quantize(b.image(40, 5, 4), Emit(stream=residual, consumers=(codes,)))
    consumers = (b.consumer(shape, 4), b.consumer(shape, 8, zero=40, norm=True, relu=True))
    b.conv(codes.tensor, Emit(residual, -0.5, 2.0, output, consumers), 40, w_bits=4)
    program, blob = b.build()
    images = programs.random_inputs(program, batch=2, seed=8)
    expected: dict[int, torch.Tensor] = {}
    actual: dict[int, torch.Tensor] = {}
    ReferenceRunner(program, blob).run(images, expected)
    GpuRunner(program, blob, "cpu", {"step1": HALF}).run(images, actual)
    torch.testing.assert_close(actual[output], expected[output], rtol=0, atol=2.0**-8)
    for consumer in consumers:
        difference = (actual[consumer.tensor].int() - expected[consumer.tensor].int()).abs()
        assert int(difference.max()) <= 1
    assert programs.share_unsaturated(program, expected) > 0.3


def test_a_sum_is_rounded_to_float16_and_no_more() -> None:
    program, blob = programs.chain(3)
    images = programs.random_inputs(program, 2, 0)
    expected: dict[int, torch.Tensor] = {}
    wanted = ReferenceRunner(program, blob).run(images, expected)
    last = program.steps[-1]
    assert isinstance(last, LinearStep)
    found = GpuRunner(program, blob, "cpu", {last.name: HALF}).run(images)
    spread = float(wanted[-1].abs().max())
    assert float((found[-1] - wanted[-1]).abs().max()) <= 2.0**-9 * spread
    assert not torch.equal(found[-1], wanted[-1])  # it is not exact, whoever thinks so


def test_the_largest_sums_fit_in_float16() -> None:
    """Of codes at their ends: one bit less of shift would make infinities of them."""
    channels = 500
    codes = torch.zeros(2, 1, 1, channels, dtype=torch.uint8)
    codes[1] = 255
    step = one_step.linear(torch.full((1, channels), 255, dtype=torch.uint8), pack_weights(codes, 8), a_bits=8)
    (found,) = GpuRunner(step.program, step.blob, "cpu", {one_step.STEP: HALF}).run([step.image])
    torch.testing.assert_close(found, step.run("reference").view_as(found), rtol=2.0**-11, atol=0)


def test_it_is_never_chosen_unless_allowed() -> None:
    program, blob = programs.one_conv(0, channels=5, filters=6, size=(4, 4), w_bits=2, a_bits=2)
    runner = GpuRunner(program, blob, "cpu")
    problem = runner.problems(2)["step1"]
    measured([problem], {NAME: 1e-6, f"triton:{kernels.default(problem).config}": 2e-6})
    assert {choice.kernel.family for choice in runner.choices(2)} == {"triton"}
    allowed = GpuRunner(program, blob, "cpu", families=("triton", "fp16"))
    assert [choice.kernel.family for choice in allowed.choices(2)][1] == "fp16"
    measured([problem], {NAME: 3e-6, f"triton:{kernels.default(problem).config}": 2e-6})
    assert {choice.kernel.family for choice in allowed.choices(2)} == {"triton"}
    with pytest.raises(BackendError, match="fallback 'int4' does not exist"):
        kernels.check_fallback("int4")
    with pytest.raises(FormatError, match="no configuration of the half-precision fallback"):
        HalfConfig.parse("cudnn")


def test_the_tuner_measures_it_within_its_tolerance() -> None:
    problem = Problem("bitconv2d", 1, 4, 4, 8, 8, (3, 3), (1, 1), (1, 1), w_bits=8, a_bits=8, device="cpu")
    found = tuner.measure_gpu(problem, torch.device("cpu"), limit=0, rounds=1)
    assert set(found.seconds) == {NAME, f"triton:{kernels.default(problem).config}"}
    assert not found.refused


def test_a_model_says_where_it_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack_nets.two_regions()
    exact = lbs.pack(model, verify=False)
    path = tmp_path / "net.lbs.safetensors"
    exact.save(path)
    half = lbs.load(path, fallback="fp16")
    assert (exact.fallback, half.fallback) == (None, "fp16")
    x = pack_nets.images(2, (3, 10, 10))
    assert torch.equal(half(x), exact(x))  # nothing was measured, so nothing is faster
    clear_runners()
    posed = [region.compiled().runner.problems(2) for region in exact.regions]  # type: ignore[attr-defined]
    layers = {n: p for problems in posed for n, p in problems.items() if p.op in ("bitconv2d", "bitlinear")}
    measured(list(layers.values()), {NAME: 1e-9})
    clear_runners()
    assert half.inexact_layers(2) == set(layers)
    assert not exact.inexact_layers(2)
    assert not torch.equal(half(x), exact(x))
    report = lbs.verify(model, half, x)
    assert report.ok, str(report)
    strict = lbs.verify(model, exact, x)
    assert strict.ok
    wide, narrow = ({check.what: check.tolerance for check in one.checks} for one in (report, strict))
    assert sum(wide[what] > 2 * narrow[what] for what in wide) > 3
    with monkeypatch.context() as patch:  # the wider tolerance is needed, and no wider than that
        patch.setattr(type(half), "inexact_layers", lambda self, batch, backend="auto": frozenset())
        assert not lbs.verify(model, half, x).ok
    explained = lbs.explain(half, batch=2, rounds=1)
    assert any("in half precision, not exact: " in note for note in explained.notes)
    assert NAME in {row.kernel for row in explained.rows}
