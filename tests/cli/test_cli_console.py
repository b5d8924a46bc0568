"""What a command tells while one waits: a bar with room for its bar, a line for every phase and every silence."""

from __future__ import annotations

import argparse
import io
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest

from lbs.cli import console, main
from lbs.cli.console import BarProgress, Console, LineProgress, describe

ROW = {"kind": "epoch", "epoch": 30, "loss": 0.512, "train_accuracy": 0.81, "test_accuracy": 0.79, "bops": 6.5e8}


@pytest.mark.parametrize(("columns", "told"), [(80, "test 79.00%"), (200, "BOPs")])
def test_a_bar_has_room_for_its_bar(monkeypatch: pytest.MonkeyPatch, columns: int, told: str) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    target = Console(as_json=False)
    bar = BarProgress(target)
    bar.begin("finetune", 1000, 0)
    assert target.stepping
    bar.bar.mininterval, bar.bar.ncols, bar.bar.dynamic_ncols = 0, columns, None
    bar.advance(500)
    bar.note(ROW)
    line = stream.getvalue().split("\r")[-1]
    bar.end()
    assert len(line.rstrip()) <= columns
    assert line.count("#") == 10  # of 20 cells, half way
    assert line.startswith("finetune  50%|")
    assert told in line
    assert not target.stepping


def test_of_a_row_as_much_is_told_as_fits() -> None:
    assert describe(ROW) == "epoch 30, loss 0.512, test 79.00%, train 81.00%, 650.0M BOPs"
    assert describe(ROW, 35) == "epoch 30, loss 0.512, test 79.00%"
    assert describe(ROW, 3) == ""


def test_without_a_terminal_a_phase_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LineProgress(Console(as_json=False))
    lines.begin("search", 100, 40)
    lines.end()
    lines.begin("search", 100, 100)
    assert capsys.readouterr().out == "search: 60 steps\n"


def fake(monkeypatch: pytest.MonkeyPatch, run: Callable[[argparse.Namespace], int]) -> None:
    module: Any = types.ModuleType("lbs.cli.report")
    module.add_arguments, module.run = (lambda parser: None), run
    monkeypatch.setitem(sys.modules, "lbs.cli.report", module)
    monkeypatch.setattr(console, "_SILENT_SECONDS", 0.08)


def test_a_silence_is_broken_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        time.sleep(0.5)
        console.console(args).say("half")
        time.sleep(0.5)
        return 0

    fake(monkeypatch, run)
    assert main.main(["report"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("half\n", "drawing ...\ndrawing ...\n")


def test_steps_that_are_counted_or_named_are_no_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        out = console.console(args)
        progress = out.progress()
        progress.begin("search", 4, 0)
        time.sleep(0.3)
        progress.end()
        out.step("calibrate ...")
        time.sleep(0.3)
        return 0

    fake(monkeypatch, run)
    assert main.main(["report", "--json"]) == 0
    assert capsys.readouterr().err == "search: 4 steps\ncalibrate ...\n"


def test_every_command_says_what_it_does_while_it_is_silent() -> None:
    assert main.WAITS.keys() == main.COMMANDS.keys()
