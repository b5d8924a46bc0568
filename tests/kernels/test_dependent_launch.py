"""Programmatic dependent launch: every kernel of a step waits for those in front of it, and one switch turns it off."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import programs
import pytest
import torch
from s8_cases import deep, shortcuts

import lbs_kernels
from lbs_kernels.errors import BackendError
from lbs_kernels.gpu.launch import in_order, overlaps
from lbs_kernels.gpu.layout import plan_arena
from lbs_kernels.run.reference import ReferenceRunner

TRITON = Path(lbs_kernels.__file__).parent / "gpu" / "triton"
FILES = sorted(TRITON.glob("*.py"))


def kernels_and_launches() -> tuple[dict[str, ast.FunctionDef], dict[Path, set[str]]]:
    """Functions that Triton compiles by their names; and by file the names of those it launches, `name[grid]`."""
    functions, launched = {}, {}
    for file in FILES:
        tree = ast.parse(file.read_text())
        functions.update({node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)})
        subscripts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
        launched[file] = {name.id for name in subscripts if isinstance(name, ast.Name) and name.id.endswith("_kernel")}
    return functions, launched


def test_every_triton_kernel_that_may_overlap_waits_first() -> None:
    """By its first statement: one that forgets it would read what is not yet written."""
    functions, launched = kernels_and_launches()
    overlapping = {name for file, names in launched.items() if "overlaps" in file.read_text() for name in names}
    assert {"gemm_kernel", "quantpack_kernel", "mean_kernel", "depthwise_kernel", "select_planes_kernel"} <= overlapping
    for name in overlapping:
        body = functions[name].body
        documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        assert ast.unparse(body[1 if documented else 0]) == "begin_step()", name


def test_only_kernels_of_steps_are_launched_so() -> None:
    """Others, those of training and of half precision, do not wait by themselves: the stream orders them."""
    package = Path(lbs_kernels.__file__).parent
    users = {file for file in package.rglob("*.py") if re.search(r"launch_pdl|\boverlaps\(", file.read_text())}
    _, launched = kernels_and_launches()
    others = {package / "gpu" / "launch.py", package / "gpu" / "cuda" / "task.py"}
    assert others < users
    assert users - others <= {file for file, names in launched.items() if names}


def on_capability(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_one_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBS_PDL", raising=False)
    for capability, expected in (((9, 0), True), ((12, 0), True), ((8, 0), False), ((8, 9), False)):
        on_capability(monkeypatch, *capability)
        assert overlaps(0) is expected
    on_capability(monkeypatch, 9, 0)
    monkeypatch.setenv("LBS_PDL", "0")
    assert not overlaps()
    monkeypatch.setenv("LBS_PDL", "1")
    assert overlaps()
    with in_order():
        assert not overlaps()
    assert overlaps()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not overlaps()
    monkeypatch.setenv("LBS_PDL", "no")
    with pytest.raises(BackendError, match="LBS_PDL is 'no'; set it to 0, off"):
        overlaps()


def test_the_network_that_gpu_tests_run_would_show_a_step_that_is_too_early() -> None:
    """Its memory is written again two steps later, and its codes are not all the same."""
    for (program, blob), values in ((deep(12), 50), (deep(8, channels=128, bits=2), 4)):
        slots, _ = plan_arena(program, 1)
        codes = [index for index, spec in enumerate(program.tensors) if spec.form == "codes"]
        assert len({slots[index].offset for index in codes}) <= 4 < len(codes)
        trace: dict[int, torch.Tensor] = {}
        ReferenceRunner(program, blob).run(programs.random_inputs(program, 1, 0), trace)
        for index in codes:
            assert trace[index].unique().numel() >= values, index


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_launches_ask_for_it(wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every Triton launch of a program, on a GPU of compute capability 9.0 that is not there."""
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    from ahead_of_time import compiling
    from compiled_layers import launches
    from triton.runtime.jit import JITFunction

    program, blob = programs.imagenet_stem(0)
    with monkeypatch.context() as patch:
        patch.setenv("LBS_PDL", wanted)
        on_capability(patch, 9, 0)
        bound = launches(program, blob, 1)
    asked: list[bool] = []
    image = torch.empty(1, 3, 64, 64)
    with compiling("sm_90", tmp_path), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, **options: asked.append(options["launch_pdl"]))
        for launch in bound:
            launch([image])
    assert asked == [wanted == "1"] * len(program.steps)


def test_where_streams_fork_and_join_nothing_begins_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    from ahead_of_time import compiling
    from compiled_layers import launches
    from triton.runtime.jit import JITFunction

    from lbs_kernels.gpu import runner

    program, blob = shortcuts(2)
    with monkeypatch.context() as patch:
        on_capability(patch, 9, 0)
        patch.setattr(runner, "on_hopper", lambda device: True)
        patch.setattr(runner, "branches", lambda program, chosen: {1: 3, 4: 6})
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        bound = launches(program, blob, 1)
    asked: list[bool] = []
    with compiling("sm_90", tmp_path), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, **options: asked.append(options["launch_pdl"]))
        for launch in bound:
            launch([torch.empty(1, 64, 28, 28)])
    assert asked == [True, False, True, False, False, True, False]
