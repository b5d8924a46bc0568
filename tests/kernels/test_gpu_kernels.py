"""Which GPU kernel is chosen: by measured times where there are any, among those that can run the exact problem."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from lbs_kernels import extension
from lbs_kernels.bitconv2d import tuning as conv_tuning
from lbs_kernels.bitlinear import tuning as linear_tuning
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.kernels import Kernel
from lbs_kernels.pool import tuning as pool_tuning
from lbs_kernels.program.problem import Problem
from lbs_kernels.quantpack import tuning as quantpack_tuning
from lbs_kernels.run import backends
from lbs_kernels.times import table
from lbs_kernels.times.table import TuningTable
from lbs_kernels.tune import tuner

LAYER = Problem("bitconv2d", 32, 28, 28, 128, 100, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=4, device="cuda:0")
FAST = GemmConfig(64, 64, 2, 4, 2, weights_first=False)
TUNING = {"bitconv2d": conv_tuning, "bitlinear": linear_tuning, "pool": pool_tuning, "quantpack": quantpack_tuning}


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measured times but those a test writes."""
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(table, "device_slug", table.kind)
    table.forget()
    yield
    table.forget()


def measured(problem: Problem, **seconds: float) -> None:
    rows = {table.key(problem): {name.replace("__", ":"): value for name, value in seconds.items()}}
    table.write(table.user_path("cuda"), TuningTable("cuda", rows))


@pytest.mark.parametrize("op", sorted(TUNING))
def test_every_configuration_is_read_as_it_is_written(op: str) -> None:
    problem = replace(LAYER, op=op)
    found = TUNING[op].candidates(problem)
    assert len(found) > 5
    for config in found:
        kernel = kernels.kernel_of(config)
        assert kernel.config.parse(str(config)) == config
        assert kernels.parse(f"{kernel.family}:{config}") == kernels.Choice(kernel, config)


def test_text_that_no_kernel_knows() -> None:
    with pytest.raises(FormatError, match="'m64' is no configuration of the GEMM"):
        GemmConfig.parse("m64")
    assert kernels.parse("triton:m64") is None
    assert kernels.parse("metal:elementwise_m32_c32_w4") is None
    with pytest.raises(BackendError, match="3 is a int; GPU kernels take GemmConfig"):
        kernels.kernel_of(3)


def test_the_default_where_nothing_was_measured() -> None:
    found = kernels.choose(LAYER)
    assert (found.config, found.seconds) == (conv_tuning.default(LAYER), None)


def test_the_fastest_measured_configuration_is_chosen() -> None:
    measured(LAYER, **{f"triton__{FAST}": 2e-5, f"triton__{conv_tuning.default(LAYER)}": 3e-5})
    found = kernels.choose(LAYER)
    assert (found.config, found.seconds, found.name) == (FAST, 2e-5, f"triton:{FAST}")
    assert kernels.choose(replace(LAYER, device="cuda:1")) == found


def test_batches_share_the_nearest_measured_bucket() -> None:
    measured(LAYER, **{f"triton__{FAST}": 2e-5})
    assert kernels.choose(replace(LAYER, batch=27)).config == FAST
    assert kernels.choose(replace(LAYER, batch=128)).config == FAST  # two buckets away
    assert kernels.choose(replace(LAYER, batch=8)).config == FAST
    assert kernels.choose(replace(LAYER, batch=256)).seconds is None
    assert kernels.choose(replace(LAYER, batch=4)).seconds is None


def test_a_fast_configuration_that_does_not_fit_the_exact_problem_is_passed_over() -> None:
    """100 filters may not be cut into tiles of 16, which would share words of 32; 16 filters may."""
    narrow = GemmConfig(64, 16, 1, 4, 2, weights_first=False)
    measured(LAYER, **{f"triton__{narrow}": 1e-9, "triton__gone": 1e-9, "other__x": 1e-9, f"triton__{FAST}": 2e-5})
    assert kernels.choose(LAYER).config == FAST


def test_a_configuration_of_another_operation_is_passed_over() -> None:
    measured(LAYER, triton__elementwise_m32_c32_w4=1e-9)
    assert kernels.choose(LAYER).config == conv_tuning.default(LAYER)


def test_the_explanation_lists_every_kernel_with_time_or_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = GemmConfig(64, 16, 1, 4, 2, weights_first=False)
    measured(LAYER, **{f"triton__{narrow}": 1e-6, "triton__gone": 1e-6, f"triton__{FAST}": 2e-5})
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device_type: "no compiler")
    rows = {row.name: row for row in backends.explain(LAYER)}
    assert "no kernel knows this configuration" in str(rows["triton:gone"])
    assert "would share words" in str(rows[f"triton:{narrow}"])
    assert str(rows[f"triton:{FAST}"]) == f"-> triton:{FAST}: 20.0 us"
    assert "not measured" in str(rows[f"triton:{conv_tuning.default(LAYER)}"])
    assert "no compiler" in str(rows["cpu"])
    assert [row.chosen for row in rows.values()].count(True) == 1


def test_without_triton_the_explanation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "gpu", lambda device_type: "Triton is not installed")
    monkeypatch.setattr(kernels, "default", lambda problem: pytest.fail("a kernel was asked for"))
    rows = {row.name: str(row) for row in backends.explain(LAYER)}
    assert rows["gpu"] == "   gpu: cannot serve: Triton is not installed"
    assert rows["reference"].startswith("->")


@dataclass(frozen=True)
class OtherConfig:
    """A kernel that this project does not have."""

    size: int

    def __str__(self) -> str:
        return f"size{self.size}"

    @classmethod
    def parse(cls, text: str) -> OtherConfig:
        return cls(int(text.removeprefix("size")))


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One more row of the table, its implementation and its configurations; none in CUDA: not everybody builds it."""
    module = ModuleType("lbs_kernels.bitconv2d.other_impl")
    module.supports = lambda problem: None if problem.w_bits == 4 else "it takes 4 bits"  # type: ignore[attr-defined]
    module.bind = lambda *arguments: None  # type: ignore[attr-defined]
    module.candidates = lambda problem: [OtherConfig(1), OtherConfig(2)]  # type: ignore[attr-defined]
    module.invalid_reason = lambda config, problem: None if config.size == 1 else "too large"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = Kernel("other", ("bitconv2d",), OtherConfig, "other_impl", module.__name__)
    portable = [kernel for kernel in kernels.KERNELS if kernel.family != "cuda"]
    monkeypatch.setattr(kernels, "KERNELS", [*portable, row])
    return module


@pytest.mark.usefixtures("other")
def test_one_row_adds_a_kernel() -> None:
    assert kernels.exact_families() == ("triton", "other")
    names = [choice.name for choice in kernels.candidates(LAYER)]
    assert names[0] == f"triton:{conv_tuning.default(LAYER)}"
    assert "other:size1" in names
    assert "other:size2" not in names
    assert len(names) == len(set(names))
    assert [choice.name for choice in kernels.candidates(LAYER, ("other",))] == ["other:size1"]
    measured(LAYER, other__size2=1e-6, other__size1=2e-6, **{f"triton__{FAST}": 3e-6})
    assert kernels.choose(LAYER).config == OtherConfig(1)
    assert kernels.choose(LAYER, ("triton",)).config == FAST
    eight = replace(LAYER, w_bits=8)
    measured(eight, other__size1=2e-6)
    assert kernels.choose(eight).kernel.family == "triton"
    assert kernels.reasons(eight) == {"triton": None, "fp16": None, "other": "it takes 4 bits"}
    assert kernels.reasons(replace(LAYER, op="pool"))["other"] == "there is no such kernel for pool"


def test_the_shortlist_looks_in_every_direction_and_at_other_kernels(
    other: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other, "candidates", lambda problem: [OtherConfig(size) for size in range(10)])
    monkeypatch.setattr(other, "invalid_reason", lambda config, problem: None)
    default = conv_tuning.default(LAYER)
    names = [choice.name for choice in tuner.shortlist(LAYER, 4)]
    assert names[0] == f"triton:{default}"
    assert sum(name.startswith("triton:") for name in names) == 5
    assert [name for name in names if name.startswith("other:")] == [f"other:size{n}" for n in range(4)]
    assert [name for name in names if name.startswith("fp16:")] == ["fp16:torch"]
    near = [choice.config for choice in tuner.shortlist(LAYER, 12) if choice.kernel.family == "triton"]
    changes = [
        tuple(i for i, (a, b) in enumerate(zip(astuple(one), astuple(default), strict=True)) if a != b) for one in near
    ]
    assert len(set(changes)) == 13  # no direction twice while others are left
    assert [len(changed) for changed in changes] == sorted(len(changed) for changed in changes)
    assert len(tuner.shortlist(LAYER, None)) == len(kernels.candidates(LAYER))
    assert len(tuner.shortlist(LAYER, 0)) == 3


@pytest.mark.usefixtures("other")
def test_a_kernel_in_cuda_needs_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(kernels.KERNELS[-1], family="cuda")
    monkeypatch.setattr(kernels, "KERNELS", [*kernels.KERNELS[:-1], row])
    monkeypatch.setattr(extension, "cuda", None)
    monkeypatch.setattr(extension, "cuda_reason", "nvcc was not found")
    measured(LAYER, cuda__size1=2e-6)
    assert kernels.choose(LAYER).kernel.family == "triton"
    assert kernels.reasons(LAYER)["cuda"] == "nvcc was not found"
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    assert kernels.choose(LAYER).kernel.family == "cuda"
