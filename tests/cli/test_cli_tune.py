"""`lbs tune` from the shell's point of view."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lbs
import lbs.models
import lbs.zoo
from lbs.cli import main, tune
from lbs.plan import LayerPlan
from lbs_kernels import extension
from lbs_kernels.errors import FormatError
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
    assert f"{len(rows)}/{len(rows)} " in done.err
    assert main.main([*SMALL, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["measured"], body["skipped"]) == (0, len(rows))


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
    ],
)
def test_what_makes_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(arguments) == 2
    assert message in capsys.readouterr().err
