"""`lbs tune` from the shell's point of view."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import lbs
import lbs.models
import lbs.zoo
from lbs.cli import main, tune
from lbs.cost import Tuned, latency
from lbs.graph import record_of
from lbs.packing.explain import estimated_call
from lbs.plan import LayerPlan
from lbs.run_folder import RunFolder, sealed
from lbs.runs import tuning
from lbs.search.budget import Budget
from lbs_kernels import extension
from lbs_kernels.errors import CheckpointError, FormatError
from lbs_kernels.program.problem import Problem
from lbs_kernels.times import table as tuning_table
from lbs_kernels.tune import tuner
from lbs_kernels.tune.blame import Blame

native = pytest.mark.skipif(extension.cpu is None, reason=f"native module: {extension.cpu_reason}")
SMALL = ["tune", "--shapes", "digits_resnet8", "--bits", "4/4", "--points", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LBS_TUNING_DIR", str(tmp_path))
    tuning_table.forget()
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    tuning_table.forget()


@native
def test_layers_are_measured_once_and_the_table_is_named(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*SMALL, "--json"]) == 0
    done = capsys.readouterr()
    body = json.loads(done.out)
    path = Path(body["path"])
    assert path.parent == tables
    rows = tuning_table.read(path).rows
    assert body["measured"] == len(rows) > 3
    assert {name for times in rows.values() for name in times} >= {"cpu:t1", "cpu/direct:t1"}
    assert all(name.endswith(":t1") for times in rows.values() for name in times)
    assert body["roof"] == tuning_table.read(path).roofs["cpu:t1"] > 1e8
    assert f"{len(rows)}/{len(rows) + 1} " in done.err
    calls = tuning_table.read(path).calls
    assert body["calls"] == {name: times["cpu:t1"] for name, times in calls.items()}
    assert [name.partition("_")[2] for name in calls] == ["n1_w4a4_cpu"]
    assert f"{len(rows) + 1}/{len(rows) + 1} a call, {next(iter(calls))}: " in done.err
    assert main.main([*SMALL, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["measured"], body["skipped"], body["calls"]) == (0, len(rows), {})


NET = """
from torch import nn

def net(classes):
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""
OWN = ["tune", "--shapes", "own_net:net", "--bits", "4/4,4/8,8/4,8/8", "--threads", "1", "--json"]


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_net.py").write_text(NET)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@native
def test_a_network_of_ones_own_then_its_budget_and_its_estimate(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From `module:function` to a budget that counts what surrounds layers, and to the estimate of a packed network."""
    assert main.main(OWN) == 2
    assert "own_net:net does not say what it takes; name the shape of one image" in capsys.readouterr().err
    assert main.main([*OWN, "--input-shape", "2,12,12", "--classes", "5"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert len(body["calls"]) == 2
    model, x = importlib.import_module("own_net").net(5).eval(), torch.randn(8, 2, 12, 12)
    searched = lbs.calibrate(lbs.prepare(model, x, lbs.SearchConfig(bits=(4, 8), pruning=False)), [x])
    layers = record_of(searched).plan.whole_problems()
    steps = latency.layer_seconds(latency.at_uniform_bits(layers, 8, 8), batch=1, threads=1)
    ((threads, found),) = latency.surroundings(layers).items()
    around, call = found.constant, found.call
    assert threads == 1
    assert steps is not None
    assert min(body["calls"].values()) <= call <= max(body["calls"].values())
    assert around > 0.2 * steps  # three small layers: most of a call is not in them
    budget = Budget(searched, latency_ms=1e3, table=Tuned())
    assert budget.value() == pytest.approx(steps + around)  # all is open, and nothing is wider
    lbs.pack(lbs.calibrate(lbs.uniform(model, x, 8, 8), [x]).eval()).save(own / "eight.lbs.safetensors")
    explain = ["explain", str(own / "eight.lbs.safetensors"), "--threads", "1"]
    assert main.main([*explain, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["estimated"] == pytest.approx(steps + around)
    assert 0.3 < told["estimated"] / told["call"] < 3  # both of this machine, whatever else it does meanwhile
    assert main.main(explain) == 0
    assert "us; estimated from what lbs tune measured: " in capsys.readouterr().out


@native
def test_plans_and_packed_networks_are_measured_as_they_are(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = lbs.models.create("digits_resnet8").eval(), torch.randn(8, 1, 8, 8)
    packed = lbs.pack(lbs.calibrate(lbs.uniform(model, x, 4, 2), [x]).eval())
    assert packed.plan is not None
    packed.plan.save(own / "plan.json")
    assert main.main(["tune", "plan.json", "--threads", "1", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["path"])
    table = tuning_table.read(path)
    assert set(table.rows) == {tuning_table.key(problem) for problem in packed.plan.kept_problems()}
    assert table.calls == {}
    folder = own / "run"
    folder.mkdir()
    packed.plan.save(folder / "plan.json")
    assert main.main(["tune", "--run", "run", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 0  # the same layers
    packed.save("packed.lbs.safetensors")
    assert main.main(["tune", "packed.lbs.safetensors", "--threads", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["calls"]) == 1  # of uniform bits, so that it serves budgets
    assert latency.surroundings(packed.plan.whole_problems()).keys() == {1}
    assert estimated_call(packed, 1, 1) is not None
    coded = lbs.pack(lbs.calibrate(lbs.uniform(model, x, 4, 2, streams=8), [x]).eval())
    assert estimated_call(coded, 1, 1) is None  # nobody measured a call with streams of 8 bits
    coded.save("coded.lbs.safetensors")
    assert main.main(["tune", "coded.lbs.safetensors", "--threads", "1", "--json"]) == 0
    assert "-streams8_" in next(iter(json.loads(capsys.readouterr().out)["calls"]))
    assert estimated_call(coded, 1, 1) is not None
    entry = packed.plan.layers[1]
    mixed = replace(packed.plan, layers=(packed.plan.layers[0], replace(entry, w_bits=8), *packed.plan.layers[2:]))
    mixed.save("plan.json")
    assert main.main(["tune", "plan.json", "--threads", "1", "--json"]) == 0
    row = tuning_table.key(replace(mixed.kept_problems()[1]))
    assert "_odd_" in row  # 8 bits on a grid without a zero, which takes longer
    assert row in tuning_table.read(path).rows


@native
def test_the_steps_of_a_packed_network(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--zoo", next(iter(lbs.zoo.ENTRIES)), "--threads", "1", "--minutes", "0.01", "--json"]
    assert main.main(command) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["measured"] + body["left"] > 10


@native
@pytest.mark.slow
def test_times_that_were_measured_are_a_budget(tables: Path) -> None:
    """Halfway between 8 bits everywhere and the fastest widths of every layer, by the table alone."""
    assert main.main(["tune", "--shapes", "digits_resnet8", "--bits", "4/4,4/8,8/4,8/8", *SMALL[5:]]) == 0
    model, x = lbs.models.create("digits_resnet8"), torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        model.train()(x)
    seconds = tuning_table.estimate

    def layer_seconds(entry: LayerPlan, w_bits: int, a_bits: int) -> float:
        found = seconds(entry.problem(entry.in_channels, entry.filters, w_bits=w_bits, a_bits=a_bits))
        assert found is not None, f"{entry.name} at {w_bits}/{a_bits} was not measured"
        return found

    plan = lbs.quantize(model.eval(), x).plan
    assert plan is not None
    inner = {entry.name for entry in plan.layers[1:-1]}  # the first and the last layer keep 8 bits
    pairs = [(w, a) for w in (4, 8) for a in (4, 8)]
    top = sum(layer_seconds(entry, 8, 8) for entry in plan.layers)
    least = sum(
        min(layer_seconds(entry, *pair) for pair in (pairs if entry.name in inner else [(8, 8)]))
        for entry in plan.layers
    )
    assert least < top
    target = (least + top) / 2
    packed = lbs.quantize(model, x, latency_ms=1e3 * target, table=seconds)
    assert packed.plan is not None
    assert packed.report.outcome is not None
    assert packed.report.outcome.met
    reached = sum(layer_seconds(entry, entry.w_bits, entry.a_bits) for entry in packed.plan.layers)
    assert reached <= target
    assert packed.report.outcome.reached[0].value == pytest.approx(reached)
    assert {(entry.w_bits, entry.a_bits) for entry in packed.plan.layers} - {(8, 8)}


def test_a_wrong_kernel_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(problem: Problem, threads: int) -> tuner.Measured:
        return tuner.Measured(problem, {}, {"cpu:t1": "3.00% of the elements differ from the reference"})

    monkeypatch.setattr(tuner, "measure_cpu", measure)
    assert main.main(SMALL) == 1
    assert "WRONG  bitconv2d_n1_" in capsys.readouterr().out


def test_a_kernel_that_breaks_the_device_is_named_and_left_out_from_then_on(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a CUDA context breaks: the error comes as a RuntimeError, whatever ran, and the process is lost."""
    ran: list[str] = []

    def measure(problem: Problem, device: torch.device, limit: int, attempt: Blame) -> tuner.Measured:
        for name in (f"{problem} good", f"{problem} bad"):
            if attempt(name):
                ran.append(name)
                if len(ran) == 4:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return tuner.Measured(problem, {"good": 1e-6})

    monkeypatch.setattr(tuner, "measure_gpu", measure)
    monkeypatch.setattr(tune, "device_of", lambda name: torch.device("cuda"))
    assert main.main(SMALL) == 2
    problem, bad = ran[-1].split(" ")
    words = capsys.readouterr().err
    assert f"{problem} {bad} broke cuda: CUDA error: an illegal memory access was encountered. It is left" in words
    assert "Compile with" not in words
    (table,) = tables.glob("*.json")
    assert list(tuning_table.read(table).rows) == [ran[0].split(" ")[0]]  # what was measured before
    assert main.main(SMALL) == 0
    assert ran.count(f"{problem} {bad}") == 1
    assert ran.count(f"{problem} good") == 2


@pytest.mark.parametrize("text", ["[1]", "{}", "["])
def test_a_list_of_broken_kernels_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.broken"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"list\.broken.*delete it to try every kernel again"):
        Blame(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "name one packed network"),
        ([*SMALL, "--minutes", "0"], "--minutes 0.0; give a positive number"),
        (["tune", "--shapes", "digits_resnet8", "--bits", "4"], "write weight/activation"),
        (["tune", "--shapes", "no_such_net"], "no_such_net"),
        ([*SMALL, "--input-shape", "1,-1,8"], "--input-shape 1,-1,8 is no image"),
        ([*SMALL, "--input-shape", "8"], "--input-shape 8 is no image"),
        ([*SMALL, "--input-shape", "1,8"], "on an example of shape (1, 1, 8)"),
        ([*SMALL, "--classes", "0"], "--classes 0; give at least 1"),
        ([*SMALL, "--zoo", "x"], "--shapes and zoo are both to be measured"),
        (["tune", "x.json", "--classes", "5", "--exclude", "fc"], "--classes, --exclude are for --shapes NAME"),
        (["tune", "--zoo", "x", "--input-shape", "3,4,4"], "--input-shape are for --shapes NAME"),
        (["tune", "--run", "x", "--streams", "8", "--bits", "4/4"], "--streams, --bits are for --shapes NAME"),
    ],
)
def test_what_makes_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_calls_that_take_otherwise_are_not_the_networks(tables: Path) -> None:
    model, x = lbs.models.create("digits_resnet8").eval(), torch.randn(8, 1, 8, 8)
    uniform = lbs.calibrate(lbs.uniform(model, x, 4, 4), [x]).eval()
    assert len(tuning.calls_of_packed(lbs.pack(uniform), [1])) == 1
    for options in ({"normalize": ([0.5], [0.5])}, {"stream_dtype": "float16"}, {"fallback": "fp16"}):
        assert tuning.calls_of_packed(lbs.pack(uniform, **options), [1]) == []  # type: ignore[arg-type]


def test_a_call_that_another_process_measured_is_known(tables: Path) -> None:
    call = tuning.Call("network-made-up", 1, lambda: pytest.fail("it was measured again"))
    slug = tuning_table.device_slug("cpu")
    assert tuning_table.load(slug).calls == {}
    other = tuning_table.TuningTable(slug, calls={call.name: {"cpu:t1": 1e-3}})
    body = json.dumps({"version": tuning_table.TABLE_VERSION, **asdict(other)})
    tuning_table.user_path(slug).write_text(body)  # as another process writes it: nothing here is forgotten
    assert call.measure(1) is None


def test_the_plan_of_a_run_that_was_edited_is_refused(tmp_path: Path) -> None:
    plan = lbs.Plan((LayerPlan("fc", "linear", 8, 8, 64, 10),))
    body = sealed(json.loads(plan.to_json()))
    (tmp_path / "plan.json").write_text(json.dumps(body))
    assert tuning.searched_plan(None, RunFolder(tmp_path)) == plan
    body["layers"][0]["w_bits"] = 4
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="was edited by hand"):
        tuning.searched_plan(None, RunFolder(tmp_path))
