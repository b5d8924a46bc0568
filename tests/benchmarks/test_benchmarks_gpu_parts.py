"""The parts of the GPU suite: targets from made-up results, networks, and the children with interpreted kernels."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_children, gpu_layers, gpu_models, gpu_nets, gpu_search, gpu_steps, gpu_targets
from benchmarks.gpu_run import Attempts, Run
from lbs_kernels.errors import LbsError
from lbs_kernels.program.problem import Problem, problem_of
from lbs_kernels.times.stopwatch import Times
from lbs_kernels.tune import tuner

ROOT = Path(__file__).resolve().parents[2]
LAYER = "bitconv2d_n128_128x28x28_to128_k3x3_s1_p1_w{bits}_cuda"


def layer(contender: str, seconds: float, bits: str = "4a4", problem: str = LAYER) -> dict[str, Any]:
    return {"problem": problem.format(bits=bits), "contender": contender, "median_s": seconds}


def found(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = gpu_targets.rows(results, [LAYER.format(bits="4a4").replace("n128", "n1")])
    assert len({row["target"] for row in rows}) == len(rows)
    assert all(set(row) == {"target", "needed", "measured", "met", "detail"} for row in rows)
    return {row["target"]: row for row in rows}


def test_nothing_measured_meets_nothing() -> None:
    assert {row["met"] for row in found({}).values()} == {None}
    assert "not measured  b1 / INT8" in gpu_targets.table(gpu_targets.rows({}))


def test_layers_take_the_fastest_kernel_and_the_wanted_shapes_only() -> None:
    rows = [
        layer("float16", 6e-4),
        layer("triton:a", 3e-4),
        layer("triton:b", 2.5e-4),
        layer("cuda:c", 2e-4),
        {**layer("triton:d", 1.0), "median_s": 1e-9, "contender": "fast but other"},
        layer("float16", 1.0, problem="bitconv2d_n128_7x28x28_to128_k3x3_s1_p1_w{bits}_cuda"),
        layer("triton:a", 1e-9, problem="bitconv2d_n128_7x28x28_to128_k3x3_s1_p1_w{bits}_cuda"),
        layer("float16", 6e-4, bits="8a8"),
        layer("triton:a", 5e-4, bits="8a8"),
        {"problem": LAYER.format(bits="8a8"), "contender": "triton:z", "error": "wrong"},
        layer("triton:a", 3e-4, bits="2a2"),
    ]
    targets = found({"layers": {"rows": rows}})
    label = "{} over cuDNN float16 channels_last, ResNet-18/50 layers, batch 128"
    assert targets[label.format("w4a4")]["measured"] == pytest.approx(3.0)
    assert targets[label.format("w4a4")]["met"] is True
    assert targets[label.format("w8a8")]["measured"] == pytest.approx(1.2)
    assert targets[label.format("w8a8")]["met"] is False
    assert targets[label.format("w2a2")]["met"] is None  # its float16 was not timed


ONE_BIT = "bitconv2d_n32_{c}x28x28_to128_k3x3_s1_p1_w2a2_cuda"


@pytest.mark.parametrize(
    ("ratios", "met", "detail"),
    [
        ((1.0, 4.0), True, "the first holds: it is chosen for 1 of 2 layers"),
        ((0.9, 0.8), True, "the second holds: it is chosen for 0 of 2 layers"),
        ((1.2, 0.8), False, "neither holds: it is chosen for 1 of 2 layers"),
        ((), None, "no layer was timed with both"),
    ],
)
def test_the_one_bit_kernel_is_faster_or_not_chosen(ratios: tuple[float, ...], met: bool | None, detail: str) -> None:
    rows = [layer("cuda:a", 1e-9, problem=ONE_BIT.format(c=64)), layer("triton:a", 1.0, problem=ONE_BIT.format(c=64))]
    for channels, ratio in zip((128, 256), ratios, strict=False):
        problem = ONE_BIT.format(c=channels)
        rows += [layer("triton:a", ratio, problem=problem), layer("cuda:b", 1.0, problem=problem)]
    row = next(row for name, row in found({"layers": {"rows": rows}}).items() if name.startswith("one-bit"))
    assert (row["met"], row["detail"]) == (met, detail)
    assert row["measured"] == (pytest.approx(math.sqrt(ratios[0] * ratios[1])) if ratios else None)


def test_models_tests_and_sanitizer() -> None:
    def row(network: str, batch: int, contender: str, median: float, **ratios: float) -> dict[str, Any]:
        named = {name.replace("_", " "): value for name, value in ratios.items()}
        return {
            "network": network, "batch": batch, "contender": contender, "median": median,
            "images_per_s": batch / median, "ratios": named,
        }  # fmt: skip

    models = [
        row("resnet18", 128, "w4a4", 1e-3, torch_float32=16.0, torch_float16_compiled=1.7),
        row("resnet50", 256, "mixed", 256 / 95_000),
        row("resnet50", 256, "w4a4", 256 / 99_000, torch_float32=14.0),
        row("resnet18", 256, "w4a4 pruned", 1e-3, torch_float16_compiled=2.6),
        row("resnet18", 1, "torch float16", 1e-6),
        row("resnet18", 1, "w4a4", 70e-6),
        row("resnet18", 1, "w2a2", 55e-6),
        row("resnet50", 1, "w2a2", 155e-6),
    ]
    sanitizer = {"tools": {"memcheck": {"errors": 0, "reason": "3 tests"}, "racecheck": {"errors": 2, "reason": ""}}}
    targets = found(
        {
            "models": {
                "rows": models,
                "compiled": {"resnet18 128": "default"},
                "missing": {"resnet18 128": {"w8a8": "BackendError: x"}, "resnet18 256": {}},
                "ended": "the time was up",
            },
            "roofs": {"b1_over_int8": 6.5},
            "tests": {"passed": True, "tests": 60},
            "sanitizer": sanitizer,
        }
    )
    met = {name: row["met"] for name, row in targets.items() if row["met"] is not None}
    assert met == {
        "b1 / INT8 tensor-core rate is measured": True,
        "resnet18 w4a4 over float32 (TF32 off), batch 128": True,
        "resnet50 w4a4 over float32 (TF32 off), batch 256": False,
        "resnet18 w4a4 over compiled float16, batch 128": False,
        "resnet18 w4a4 pruned over compiled float16, batch 256": True,
        "resnet50 images/s, batch 256, mixed plan (TensorRT INT8: 94,620)": True,
        "resnet18 seconds, batch 1": True,
        "resnet50 seconds, batch 1": False,
        "every gpu test is green": True,
        "compute-sanitizer memcheck errors": True,
        "compute-sanitizer racecheck errors": False,
    }
    assert targets["resnet18 seconds, batch 1"]["detail"] == "w2a2"
    assert targets["resnet18 w4a4 over compiled float16, batch 128"]["detail"] == "torch.compile: default"
    assert targets["resnet18 w8a8 over compiled float16, batch 128"]["detail"] == "w8a8: BackendError: x"
    left = targets["resnet50 w8a8 over compiled float16, batch 256"]
    assert (left["met"], left["detail"]) == (None, "resnet50 256 was not timed (the time was up)")


def test_training_steps_are_measured_in_turn_and_each_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = []

    def call(command: list[str], seconds: float) -> tuple[int | None, str]:
        boxes.append(seconds)
        options = dict(zip(command[2::2], command[3::2], strict=True))
        if options["--model"] == "resnet18":
            return None, "float: CUDA graphs"
        rows = [
            {"contender": "search", "median": 2.0, "slower_than_float": 1.5, "memory_over_float": 1.6},
            {"contender": "multi-path", "median": 5.0, "slower_than_float": 3.75, "memory_over_float": 2.5},
        ]
        Path(options["--output"]).write_text(json.dumps({"rows": rows}))
        return 0, "wrote it"

    monkeypatch.setattr(gpu_search, "call", call)
    (tmp_path / "search_resnet18.json").write_text("of another run")
    body = gpu_search.measure(tmp_path, 60.0)
    assert body["passed"]
    assert boxes == [pytest.approx(30.0), pytest.approx(60.0, abs=1.0)]  # what one leaves goes to the next
    targets = found({"search": body})
    assert {name: row["met"] for name, row in targets.items() if "search" in name or "branches" in name} == {
        "cifar_resnet20, batch 128: a search step over float, time": True,
        "cifar_resnet20, batch 128: a search step over float, memory": False,
        "cifar_resnet20, batch 128: separate branches over shared bits, time": True,
        "resnet18, batch 128: a search step over float, time": None,
        "resnet18, batch 128: a search step over float, memory": None,
        "resnet18, batch 128: separate branches over shared bits, time": None,
    }
    assert targets["resnet18, batch 128: a search step over float, time"]["detail"] == "the time was up"
    monkeypatch.setattr(gpu_search, "call", lambda *_: (1, "a mistake"))
    failed = gpu_search.measure(tmp_path, 60.0)
    assert (failed["passed"], failed["networks"]["cifar_resnet20"]["rows"]) == (False, [])


def test_networks_that_targets_speak_of_come_first() -> None:
    names = " ".join(row["target"] for row in gpu_targets.rows({}))
    wanted = set(re.findall(r"(resnet\d+) [^,]*, batch (\d+)", names))
    assert len(set(gpu_models.ORDER)) == len(gpu_models.ORDER)
    compiled = gpu_models.COMPILED_AT
    assert gpu_models.ORDER[: len(compiled)] == compiled
    every = {(network, batch) for network in (*gpu_layers.RESNETS, "mobilenet_v2") for batch in (128, 1)}
    assert set(compiled) == every
    assert {(network, int(batch)) for network, batch in wanted} <= set(gpu_models.ORDER)


def test_at_batch_1_contenders_go_without_each_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_models.contenders("resnet18", 128) == gpu_models.variants("resnet18")
    extra = set(gpu_models.contenders("resnet18", 1)) - set(gpu_models.variants("resnet18"))
    assert extra == {"w8a8, LBS_PDL=0", "w8a8, LBS_FORK=0"}
    for before in (None, "1", "0"):
        for name in gpu_models.SWITCHES:
            monkeypatch.delenv(name, raising=False)
            if before is not None:
                monkeypatch.setenv(name, before)
        for contender, expected in (("w8a8, LBS_PDL=0", ["0", "1"]), ("w4a4 pruned", ["1", "1"])):
            with gpu_models.switches_of(contender) as variant:
                assert variant == contender.partition(", ")[0]
                assert [os.environ[name] for name in gpu_models.SWITCHES] == expected
        assert [os.environ.get(name) for name in gpu_models.SWITCHES] == [before, before]


def test_norms_are_folded_for_every_contender() -> None:
    model = gpu_models.folded("cifar_resnet20")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), gpu_nets.float_model("cifar_resnet20")(images), rtol=1e-4, atol=1e-4)


def test_the_costliest_layers_are_tuned() -> None:
    layer = Problem("bitconv2d", 128, 28, 28, 64, 64, (3, 3), (1, 1), (1, 1), w_bits=4, a_bits=8)
    rows = [
        {"problem": asdict(problem), "batch": problem.batch, "seconds": took, "modelled_seconds": 1.0}
        for problem, took in (
            (layer, 3e-5),
            (replace(layer, in_channels=32), 5e-5),
            (replace(layer, batch=1), 9.0),
            (replace(layer, op="pool", w_bits=0), 9.0),
            (replace(layer, in_channels=96), None),  # by the model
            (layer, 1e-5),
        )
    ]
    rows = json.loads(json.dumps(rows))
    found = gpu_steps.costliest(rows, 2)
    assert found == [replace(layer, in_channels=96), replace(layer, in_channels=32)]
    assert gpu_layers.problems(rows)[0] == replace(layer, in_channels=96, device=gpu_layers.gpu_device.DEVICE)
    assert gpu_steps.costliest([], 2) == []
    by_model = gpu_layers.problems()
    assert len(by_model) == gpu_layers.COSTLIEST
    assert by_model[0].in_channels == 3  # the stem


def test_a_row_needs_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_search, "call", lambda *_: pytest.fail("it was begun"))
    assert not gpu_search.row(tmp_path, "", 10.0)["passed"]
    asked = []
    monkeypatch.setattr(gpu_search, "call", lambda command, seconds: (asked.append(command), (0, "done"))[1])
    assert gpu_search.row(tmp_path, "cifar.npz", 10.0)["passed"]
    from lbs.runs.rows import row_named

    assert row_named(asked[0][asked[0].index("reproduce") + 1]).name == gpu_search.ROW


def test_problems_are_distinct_and_begin_with_what_the_targets_ask_for() -> None:
    order = ((("resnet18",), (128,), ((4, 4), (8, 8))), (("cifar_resnet20",), (1,), ((2, 2),)))
    problems = gpu_layers.every(order)
    assert len(set(problems)) == len(problems)
    assert {problem.batch for problem in problems[:10]} == {128}
    assert problems[-1].batch == 1
    for problem in problems:
        edge = problem.op == "bitlinear" or problem.in_channels == 3
        assert (problem.w_bits, problem.a_bits) in ([(8, 8)] if edge else [(4, 4), (8, 8), (2, 2)])


def test_the_pruned_network_brings_its_own_shapes() -> None:
    order = ((("digits_resnet8",), (128,), ((4, 4), gpu_layers.PRUNED)),)
    problems = gpu_layers.every(order)
    whole = gpu_layers.every(((("digits_resnet8",), (128,), ((4, 4),)),))
    added = problems[len(whole) :]
    assert problems[: len(whole)] == whole
    assert added
    assert {problem.batch for problem in added} == {128}
    assert {(problem.w_bits, problem.a_bits) for problem in added} == {(4, 4)}


def test_a_problem_that_cannot_be_measured_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [Problem("bitconv2d", 1, 4, 4, channels, 8, w_bits=2, a_bits=2) for channels in (8, 16)]
    good = Times(gpu_layers.HALF, (1.0,))

    def measure_gpu(problem: Problem, *arguments: object, **options: object) -> tuner.Measured:
        if problem == todo[0]:
            raise RuntimeError("out of memory")
        return tuner.Measured(problem, {"triton:x": 1.0}, {}, {gpu_layers.HALF: good, "triton:x": good})

    class Compiler:
        def __init__(self, workers: int) -> None: ...
        def submit(self, *job: object) -> None: ...
        def stop(self) -> None: ...
        def wait(self, name: object, until: float) -> str:
            return ""

    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path / "tuning"))
    monkeypatch.setattr(gpu_children.gpu_device, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_children.gpu_compile, "Compiler", Compiler)
    monkeypatch.setattr(gpu_layers, "problems", lambda steps: todo)
    monkeypatch.setattr(gpu_children.tuner, "measure_gpu", measure_gpu)
    run = Run(tmp_path, time.time() + 60, {}, tmp_path)
    gpu_children.layers(run, Attempts(tmp_path, "layers"))
    body = run.load("layers")
    assert body["complete"]
    errors = [row["error"] for row in body["rows"] if "error" in row]
    assert errors == ["RuntimeError: out of memory"]
    assert [row["contender"] for row in body["rows"] if row["problem"] == str(todo[1])] == [gpu_layers.HALF, "triton:x"]


def test_packed_networks_follow_their_rule(tmp_path: Path) -> None:
    import lbs
    import lbs.models

    for variant in ("mixed", "w4a4 pruned"):
        packed = lbs.load(gpu_nets.build(str(tmp_path), "digits_resnet8", variant))
        assert packed.plan is not None
        layers = packed.plan.layers
        assert {(layer.w_bits, layer.a_bits) for layer in (layers[0], layers[-1])} == {(8, 8)}
        assert {(layer.w_bits, layer.a_bits) for layer in layers[1:-1]} == {(4, 4)}
        kept = [layer.kept_filters / layer.filters for layer in layers if layer.kept is not None]
        assert bool(kept) == (variant == "w4a4 pruned")
        assert all(0.5 < share < 0.9 for share in kept)
        (program,) = packed.programs
        posed = [problem_of(step, program, 1, "cpu") for step in program.steps]
        wanted = gpu_nets.layers("digits_resnet8", variant)
        assert {problem for problem in posed if problem.w_bits} == set(wanted)
    before = gpu_nets.file_of(tmp_path, "digits_resnet8", "mixed").stat().st_mtime_ns
    gpu_nets.build(str(tmp_path), "digits_resnet8", "mixed")
    assert gpu_nets.file_of(tmp_path, "digits_resnet8", "mixed").stat().st_mtime_ns == before
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
    model = lbs.prepare(small, torch.randn(1, 3, 8, 8))
    with pytest.raises(LbsError, match="no layer whose filters can go"):
        gpu_nets.plan(model, "digits_resnet8", "w4a4 pruned")


def test_layers_and_networks_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels that the timing process asks for, by a compiler that launches nothing."""
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path / "none"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "kernels"))
    from ahead_of_time import compiling

    from benchmarks import gpu_compile
    from lbs_kernels.gpu import runner

    before = runner.INTERPRETED
    problem = Problem("bitconv2d", 1, 8, 8, 16, 16, (3, 3), (1, 1), (1, 1), w_bits=2, a_bits=2, device="cuda")
    with compiling("sm_90", tmp_path / "cache") as kernels:
        assert gpu_compile.compile_layer(problem, 1) == 2
    assert [kernel.name for kernel in kernels] == ["quantpack_kernel", "gemm_kernel", "quantpack_kernel"] * 2
    assert runner.INTERPRETED is before


def test_shares_of_a_network_are_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path / "none"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "kernels"))
    from ahead_of_time import compiling

    from benchmarks import gpu_compile

    path = gpu_nets.build(str(tmp_path), "digits_resnet8", "w4a4")
    with compiling("sm_90", tmp_path / "cache"):
        whole = gpu_compile.compile_network(path, 128)
        shares = [gpu_compile.compile_network(path, 128, (share, 3)) for share in range(3)]
    assert sum(shares) == whole
    assert min(shares) > 0


def test_every_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for every batch size is slower than one for the size it is timed at."""
    compiler, kinds = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        kinds.append({type(value) for value in inputs} | {type(size) for value in inputs for size in value.shape})
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, mode, **given: compiler(model, backend=backend, **given))
    for batch in (2, 3, 4):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
        gpu_models.compiled_half(model, gpu_models.PLAIN)(torch.randn(batch, 3, 5, 5))
    assert len(kinds) == 3
    assert not any(torch.SymInt in group or int not in group for group in kinds)


COMPILED = """
import json, sys, torch, lbs.models
from torch._dynamo.utils import counters
from benchmarks import gpu_device, gpu_models

def tiny(classes):
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

lbs.models.REGISTRY["tiny"] = lbs.models.ModelEntry(tiny, 4, (3, 8, 8), 1)
gpu_device.DEVICE = "cpu"
if sys.argv[1] == "warm":
    gpu_models.warm("tiny", 2, gpu_models.PLAIN)
else:
    with torch.no_grad():
        calls, missing = gpu_models.baselines("tiny", 2, gpu_models.PLAIN, lambda name: True)
        with gpu_models.tf32(False):
            calls[gpu_models.COMPILED]()
    assert not missing, missing
print(json.dumps(counters["inductor"]))
"""


@pytest.mark.slow
def test_what_was_compiled_ahead_is_found_where_it_is_timed(tmp_path: Path) -> None:
    """Slow because two processes compile."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for step, count in (("warm", "fxgraph_cache_miss"), ("time", "fxgraph_cache_hit")):
        command = [sys.executable, "-c", COMPILED, step]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert {key: value for key, value in found.items() if key.startswith("fxgraph_cache")} == {count: 1}


def test_the_best_way_of_compiling_that_was_made_is_taken(tmp_path: Path) -> None:
    def make(mode: str) -> None:
        gpu_models.mark_of(tmp_path, "resnet50", 128, mode).touch()

    assert gpu_models.warmed(tmp_path, "resnet50", 128) == ""
    make(gpu_models.PLAIN)
    assert gpu_models.warmed(tmp_path, "resnet50", 128) == gpu_models.PLAIN
    make(gpu_models.AUTOTUNED)
    assert gpu_models.warmed(tmp_path, "resnet50", 128) == gpu_models.AUTOTUNED
    assert gpu_models.warmed(tmp_path, "resnet50", 256) == ""  # not wanted there
    assert not gpu_models.plain_done(tmp_path)
    for place in gpu_models.compiled_at(2):
        gpu_models.mark_of(tmp_path, *place, gpu_models.PLAIN).touch()
    assert gpu_models.plain_done(tmp_path, 2)
    assert not gpu_models.plain_done(tmp_path)
    for network, batch in gpu_models.COMPILED_AT:
        gpu_models.mark_of(tmp_path, network, batch, gpu_models.PLAIN).touch()
    assert gpu_models.plain_done(tmp_path)


CHILDREN = """
import sys, time, torch, lbs.models
from pathlib import Path
from benchmarks import gpu_children, gpu_compile, gpu_device, gpu_layers, gpu_models, gpu_roofs, gpu_run, gpu_steps
from lbs_kernels.run import backends
from lbs_kernels.times import stopwatch

def tiny(classes):
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes),
    )

lbs.models.REGISTRY["tiny"] = lbs.models.ModelEntry(tiny, 3, (1, 4, 4), 1)
out = Path(sys.argv[1])
(out / "scratch").mkdir()
gpu_device.DEVICE = "cpu"
gpu_roofs.COPY_BYTES, gpu_roofs.SIZE = 1 << 16, 64
gpu_layers.every.__defaults__ = (((("tiny",), (1,), ((2, 2), gpu_layers.PRUNED)),),)
gpu_steps.NETWORKS, gpu_steps.BATCHES = (("tiny", "w4a4"),), (2,)
gpu_layers.NEAR, gpu_layers.FAR = 0, 1
gpu_models.ORDER = (("tiny", 2), ("tiny", 3))
gpu_models.variants = lambda network: ["w4a4", "w4a4 pruned"]
quick, quicker = stopwatch.interleave, {"rounds": 2, "warmup": 1e-4, "cold_l2": False}
stopwatch.interleave = lambda calls, **options: quick(calls, **{**options, **quicker})
backends.AUTOMATIC["cpu"] = ("gpu", "reference")

class Compiler:
    jobs = {}
    def __init__(self, workers): pass
    def submit(self, name, function, *arguments): pass
    def wait(self, name, until): return "not here"
    def stop(self): pass

gpu_compile.Compiler = Compiler
for part in ("roofs", "layers", "models"):
    header = {"device": "interpreter"}
    gpu_children.run(part, gpu_run.Run(out, time.time() + 300, header, out / "scratch", networks=1))
"""


def test_the_children_measure_and_save_with_interpreted_kernels(tmp_path: Path) -> None:
    """Roofs, layers and models from end to end on tiny shapes; the times mean nothing, everything else does."""
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "LBS_TUNING_DIR": str(tmp_path / "tuning"),
    }  # fmt: skip
    command = [sys.executable, "-c", CHILDREN, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    roofs, layers, models = (
        json.loads((tmp_path / f"{part}.json").read_text()) for part in ("roofs", "layers", "models")
    )
    assert set(roofs["rows"]) == {"copy", "float16", "int8"}
    assert set(roofs["missing"]) == {"b1", "s8"}
    assert (layers["complete"], layers["passes"]) == (True, 2)
    contenders = {row["contender"].split(":")[0] for row in layers["rows"]}
    assert contenders >= {"float16", "triton"}
    assert all("error" not in row and row["median_s"] > 0 and row["roof"] > 0 for row in layers["rows"])
    (table,) = (tmp_path / "tuning").glob("*.json")
    timed = {name.split(":")[0] for times in json.loads(table.read_text())["rows"].values() for name in times}
    assert timed - {"cuda"} == {"triton", "fp16"}  # the model of the GPU serves where it is built
    assert models["complete"]
    assert (models["left"], models["compiled"]) == ([], {})
    names = {row["contender"] for row in models["rows"]}
    assert names == {"torch float32", "torch TF32", "torch float16", "w4a4", "w4a4 pruned"}
    assert set(models["missing"]["tiny 2"]) == {"torch float16 compiled"}
    assert all(set(row["ratios"]) == names - {row["contender"]} for row in models["rows"])
    assert (tmp_path / "scratch" / ".layers.now").exists()


@pytest.mark.slow
def test_jobs_run_in_processes_and_their_failures_are_words() -> None:
    """Slow because every process imports torch."""
    from benchmarks.gpu_compile import Compiler

    compiler = Compiler(1)
    try:
        compiler.submit("good", math.sqrt, 4.0)
        compiler.submit("bad", math.sqrt, -1.0)
        compiler.submit("late", time.sleep, 60)
        assert compiler.wait("good", time.time() + 120) == ""
        assert compiler.wait("bad", time.time() + 60) == "ValueError: math domain error"
        assert compiler.wait("other", 0) == "it was not submitted"
        assert compiler.wait("late", time.time() + 0.1).startswith("TimeoutError")
    finally:
        processes = list(compiler.pool._processes.values())
        compiler.stop()
        for process in processes:
            process.kill()
