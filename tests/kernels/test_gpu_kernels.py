"""Which GPU kernel is chosen: by measured times where there are any, among those that can run the exact problem."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.gpu import kernels
from lbs_kernels.gpu.configs.defaults import DEFAULTS, conv_default
from lbs_kernels.gpu.configs.gemm import GemmConfig
from lbs_kernels.gpu.kernels import Kernel
from lbs_kernels.program.problem import Problem
from lbs_kernels.program.steps import STEP_TYPES
from lbs_kernels.times import table
from lbs_kernels.times.table import TuningTable
from lbs_kernels.tune import tuner

LAYER = Problem("bitconv2d", 32, 28, 28, 128, 100, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=4, device="cuda:0")
STEM = Problem("stem_pool", 32, 115, 115, 12, 64, (4, 4), device="cuda:0")  # of two steps that a GPU runs as one
PROJECT = Problem("depthwise_project", 32, 28, 28, 192, 32, (3, 3), (1, 1), (1, 1), device="cuda:0")  # of two as well
PAIRS = {problem.op: problem for problem in (STEM, PROJECT)}
FAST = GemmConfig(64, 64, 2, 4, 2, weights_first=False)


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


@pytest.mark.parametrize("op", sorted(DEFAULTS))
def test_every_configuration_is_read_as_it_is_written(op: str) -> None:
    found = kernels.candidates(PAIRS.get(op, replace(LAYER, op=op)))
    assert len(found) > 5
    for choice in found:
        assert choice.kernel.config.parse(str(choice.config)) == choice.config
        assert kernels.kernel_of(choice.config) is choice.kernel
        assert kernels.parse(choice.name) == choice


def test_every_operation_has_a_default_and_a_kernel() -> None:
    assert set(DEFAULTS) == {*STEP_TYPES, *PAIRS} == {op for kernel in kernels.KERNELS for op in kernel.ops}


def test_the_table_needs_no_triton() -> None:
    code = f"""
import sys
sys.modules["triton"] = None
from dataclasses import replace
from lbs_kernels.gpu import kernels
from lbs_kernels.program.problem import Problem
layer = {LAYER!r}
for op in {sorted(DEFAULTS)}:
    problem = {PAIRS!r}.get(op, replace(layer, op=op))
    kernels.choose(problem), kernels.candidates(problem), kernels.why_not_by_family(problem)
try:
    kernels.choose(layer).kernel.implementation("bitconv2d")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "import of triton halted" in done.stdout, done.stderr


def test_text_that_no_kernel_knows() -> None:
    with pytest.raises(FormatError, match="'m64' is no configuration of the GEMM"):
        GemmConfig.parse("m64")
    assert kernels.parse("triton:m64") is None
    assert kernels.parse("metal:elementwise_m32_c32_w4") is None
    with pytest.raises(BackendError, match="3 is a int; GPU kernels take GemmConfig"):
        kernels.kernel_of(3)


def test_the_default_where_nothing_was_measured() -> None:
    found = kernels.choose(LAYER)
    assert (found.config, found.seconds) == (conv_default(LAYER), None)


def test_the_fastest_measured_configuration_is_chosen() -> None:
    measured(LAYER, **{f"triton__{FAST}": 2e-5, f"triton__{conv_default(LAYER)}": 3e-5})
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
    assert kernels.choose(LAYER).config == conv_default(LAYER)


@dataclass(frozen=True)
class OtherConfig:
    """A kernel that this project does not have."""

    size: int

    valid: ClassVar[tuple[int, ...]] = ()

    def __str__(self) -> str:
        return f"size{self.size}"

    def why_not(self, problem: Problem) -> str | None:
        return None if self.size in self.valid else "too large"

    @classmethod
    def parse(cls, text: str) -> OtherConfig:
        return cls(int(text.removeprefix("size")))


def with_other(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...] = (1, 2), valid: tuple[int, ...] = (1,)) -> None:
    """One more row of the table, with configurations of these sizes; none in CUDA: not everybody builds it."""
    row = Kernel(
        "other",
        ("bitconv2d",),
        OtherConfig,
        lambda problem: [OtherConfig(size) for size in sizes],
        lambda op: ModuleType("other"),
        why_none=lambda problem: None if problem.w_bits == 4 else "it takes 4 bits",
    )
    monkeypatch.setattr(OtherConfig, "valid", valid)
    portable = [kernel for kernel in kernels.KERNELS if kernel.family != "cuda"]
    monkeypatch.setattr(kernels, "KERNELS", [*portable, row])


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> None:
    with_other(monkeypatch)


@pytest.mark.usefixtures("other")
def test_one_row_adds_a_kernel() -> None:
    assert kernels.exact_families() == ("triton", "other")
    names = [choice.name for choice in kernels.candidates(LAYER)]
    assert names[0] == f"triton:{conv_default(LAYER)}"
    assert "other:size1" in names
    assert "other:size2" not in names
    assert len(names) == len(set(names))
    measured(LAYER, other__size2=1e-6, other__size1=2e-6, **{f"triton__{FAST}": 3e-6})
    assert kernels.choose(LAYER).config == OtherConfig(1)
    assert kernels.choose(LAYER, ("triton",)).config == FAST
    eight = replace(LAYER, w_bits=8)
    measured(eight, other__size1=2e-6)
    assert kernels.choose(eight).kernel.family == "triton"
    assert kernels.why_not_by_family(eight) == {"triton": None, "fp16": None, "other": "it takes 4 bits"}
    assert kernels.why_not_by_family(replace(LAYER, op="pool"))["other"] == "there is no such kernel for pool"


def test_the_shortlist_looks_in_every_direction_and_at_other_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_other(monkeypatch, tuple(range(10)), tuple(range(10)))
    default = conv_default(LAYER)
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
    assert kernels.why_not_by_family(LAYER)["cuda"] == "nvcc was not found"
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    assert kernels.choose(LAYER).kernel.family == "cuda"
