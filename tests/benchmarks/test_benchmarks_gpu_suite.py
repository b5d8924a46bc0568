"""benchmarks/gpu_suite.py as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_layers, gpu_suite
from lbs_kernels.bitconv2d import tuning as conv_tuning
from lbs_kernels.problem import Problem
from lbs_kernels.reference_runner import ReferenceRunner

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; the suite would run")


@no_gpu
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--out"),
        (["--out", "x", "--only", "everything"], "invalid choice"),
        (["--out", "x", "--minutes", "0"], "positive number"),
        (["--out", "x", "--minutes", "nan"], "positive number"),
    ],
)
def test_arguments_that_make_no_sense(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.arguments(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_parts_run_in_order_and_by_name() -> None:
    args = gpu_suite.arguments(["--out", "x", "--only", "layers", "--only", "tests"])
    assert gpu_suite.selected(args.only) == ["tests", "layers"]
    assert gpu_suite.selected(gpu_suite.arguments(["--out", "x"]).only) == list(gpu_suite.PARTS)
    assert gpu_suite.arguments(["--out", "x", "--minutes", "2.5"]).minutes == 2.5


def make_run(out: Path, seconds: float = 60.0) -> gpu_suite.Run:
    return gpu_suite.Run(out, time.monotonic() + seconds, {"device": "none"})


def test_every_part_is_saved_when_it_ends_and_a_broken_one_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def good(run: gpu_suite.Run) -> dict[str, Any]:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        return {"value": 7}

    def broken(run: gpu_suite.Run) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_suite, "PARTS", {"first": good, "second": broken, "third": good})
    assert not gpu_suite.run_parts(make_run(tmp_path), ["first", "second", "third"])
    assert seen == [[], ["first.json", "second.json"]]
    body = json.loads((tmp_path / "third.json").read_text())
    assert (body["part"], body["value"], body["header"]) == ("third", 7, {"device": "none"})
    assert json.loads((tmp_path / "second.json").read_text())["error"] == "RuntimeError: out of memory"
    assert gpu_suite.run_parts(make_run(tmp_path), ["first"])


def test_failing_gpu_tests_fail_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "PARTS", {"tests": lambda run: {"passed": False}})
    assert not gpu_suite.run_parts(make_run(tmp_path), ["tests"])


def test_counts_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    assert gpu_suite._count(report) == {}
    report.write_text('<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>')
    assert gpu_suite._count(report) == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}


def test_saving_replaces_the_file_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.save("layers", {"rows": [1]})
    with pytest.raises(TypeError):
        run.save("layers", {"rows": object()})
    assert json.loads((tmp_path / "layers.json").read_text())["rows"] == [1]
    assert not (tmp_path / "layers.json").with_suffix(".json.tmp").exists()


def test_problems_are_distinct_and_keep_the_edges_at_eight_bits() -> None:
    found = gpu_layers.problems(["resnet18", "cifar_resnet20"], [32, 1], [(4, 4), (2, 2)])
    assert len(set(found)) == len(found)
    assert {problem.batch for problem in found} == {1, 32}
    for problem in found:
        edge = problem.op == "bitlinear" or problem.in_channels == 3
        assert (problem.w_bits, problem.a_bits) in ([(8, 8)] if edge else [(4, 4), (2, 2)])
    assert found[0].batch == 32


def test_configurations_start_with_the_default_and_stay_near_it() -> None:
    problem = Problem("bitconv2d", 32, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=4)
    default = conv_tuning.default(problem)
    assert gpu_layers.configurations(problem, 0) == [default]
    near = gpu_layers.configurations(problem, 8)
    assert near[0] == default
    assert 4 <= len(near) <= 9
    assert len(set(near)) == len(near)


@pytest.mark.parametrize(
    "problem",
    [
        Problem("bitconv2d", 2, 8, 8, 16, 20, (3, 3), (2, 2), (1, 1), w_bits=4, a_bits=2),
        Problem("bitconv2d", 2, 8, 8, 16, 16, (3, 3), (1, 1), (1, 1), groups=16, w_bits=8, a_bits=8),
        Problem("bitlinear", 3, 1, 1, 64, 10, w_bits=8, a_bits=8),
    ],
    ids=str,
)
def test_single_layers_are_mostly_unsaturated(problem: Problem) -> None:
    program, blob = gpu_layers.layer_program(problem)
    trace: dict[int, torch.Tensor] = {}
    image = torch.rand(problem.batch, problem.in_channels, problem.height, problem.width)
    ReferenceRunner(program, blob).run([image], trace)
    result = trace[2]
    assert tuple(result.shape) == (problem.batch, problem.out_height, problem.out_width, problem.out_channels)
    top = (1 << problem.a_bits) - 1 if problem.op == "bitconv2d" else float("inf")
    assert float(((result > 0) & (result < top)).float().mean()) > 0.3


INTERPRETED = """
import json, sys, time, torch
from dataclasses import replace
from pathlib import Path
from benchmarks import gpu_layers
from lbs_kernels.problem import Problem

problems = [
    Problem("bitconv2d", 1, 4, 4, 8, 8, (3, 3), (1, 1), (1, 1), w_bits=2, a_bits=4),
    Problem("bitlinear", 2, 1, 1, 16, 5, w_bits=8, a_bits=8),
]
saved = []
gpu_layers.NEIGHBOURS = 1
cpu = torch.device("cpu")
body = gpu_layers.sweep(problems, cpu, time.monotonic() + 100, lambda b: saved.append(len(b["rows"])), rounds=2)
late = gpu_layers.sweep(problems, cpu, time.monotonic() - 1, lambda b: saved.append(-1), rounds=2)
layer = gpu_layers.Layer(problems[0], cpu)
layer.expected[0, 0, 0, 0] += 1
try:
    layer.launch(gpu_layers.configurations(problems[0], 0)[0])
    refused = ""
except gpu_layers.WrongResultError as error:
    refused = str(error)
print(json.dumps({"body": body, "late": late, "saved": saved, "refused": refused}))
"""


def test_the_sweep_checks_times_and_saves(tmp_path: Path) -> None:
    """The whole sweep on two tiny layers, kernels interpreted; the times mean nothing, everything else does."""
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    body = result["body"]
    assert body["complete"]
    assert result["saved"] == sorted(result["saved"])
    assert len(result["saved"]) == 4  # two problems, defaults first, then neighbours
    assert {row["config"] for row in body["rows"]} > {"float16"}
    assert all("error" not in row and row["median_s"] > 0 for row in body["rows"])
    assert not result["late"]["complete"]
    assert result["late"]["rows"] == []
    assert "differ from the reference" in result["refused"]
