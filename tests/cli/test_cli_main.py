"""The shell's door: exit codes, help, errors in one line, JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lbs.cli import doctor, main
from lbs.cli.console import Console
from lbs.cli.options import bit_operations, decimal, decimals, numbers
from lbs_kernels import extension
from lbs_kernels.errors import PlanError


def test_every_command_has_help_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    for name in main.COMMANDS:
        assert main.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert "--json" in text
        assert name in text


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in main.COMMANDS)
    assert main.main(["fly"]) == 2
    assert main.main(["search"]) == 2
    assert "--run" in capsys.readouterr().err
    assert main.main(["search", "--run", "x", "--epochs", "many"]) == 2


def test_alone_it_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    told = capsys.readouterr().out
    for line in [line for line in told.splitlines() if line.startswith("  lbs ")]:
        command, *options = line.split("  ")[1].split()[1:]
        parser = argparse.ArgumentParser()
        importlib.import_module(f"lbs.cli.{command}").add_arguments(parser)
        known = main.options_of(parser)
        assert {option for option in options if option.startswith("--")} <= known, line


SCREEN = 24  # lines of 80 columns


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_fits_a_screen_for_each_group(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main([name, "--help"]) == 0
    groups = re.split(r"\n(?=[a-z][^\n]*:\n)", capsys.readouterr().out)
    assert len(groups) > 1
    assert {group.partition("\n")[0]: group.count("\n") for group in groups if group.count("\n") > SCREEN} == {}


@pytest.mark.parametrize(
    ("outcome", "code"), [(PlanError("bits (3, 4):\nno chain"), 2), (OSError("disk"), 2), (KeyboardInterrupt(), 130)]
)
def test_errors_are_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: BaseException, code: int
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise outcome

    fake: Any = types.ModuleType("lbs.cli.report")
    fake.add_arguments, fake.run = (lambda parser: None), run
    monkeypatch.setitem(sys.modules, "lbs.cli.report", fake)
    assert main.main(["report", "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("lbs report: ")
    assert captured.err.count("\n") == 1
    if code == 2:
        body = json.loads(captured.out)
        assert body["kind"] == type(outcome).__name__
        assert "\n" not in body["error"]


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        ("search", "no model= is given, and run holds none", "no --model is given, and run holds none"),
        (
            "search",
            "gate_lr=-1; search bits=(2, 4), or exclude=('fc',)",
            "--gate-lr -1; search --bits 2,4, or --exclude 'fc'",
        ),
        ("search", "it holds a search; go on with resume=True", "it holds a search; go on with --resume"),
        ("finetune", "gate_lr=-1 (batch_size=0)", "gate_lr=-1 (--batch-size 0)"),  # a search has the rate, not this
        ("reproduce", "lr=0; go on with resume=True", "lr=0; go on with --resume"),  # --lr, or --search lr=0
        # What only looks like an argument: a folder, a path, a longer name.
        ("search", "lr=0.1 and runs/lr=0.1 and lr=0.1/config.json", "lr=0.1 and runs/lr=0.1 and lr=0.1/config.json"),
        ("quantize", "max_pruning_ratio=0.3: filters go", "--prune 0.3: filters go"),
        ("search", "augment=True, no_augment=True", "augment=True, --no-augment"),
        ("search", "own.lr=1, model=net/a.py:f", "own.lr=1, model=net/a.py:f"),
    ],
)
def test_arguments_of_python_are_told_as_options(command: str, message: str, shown: str) -> None:
    assert main.as_options(message, command, ["--run", "lr=0.1"]) == shown


def test_errors_are_told_in_words_of_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "search --run lr=0.5 --data digits --model digits_resnet8 --bops 0.03 --threads 1"
    assert main.main([*line.split(), "--lr", "0"]) == 2
    assert capsys.readouterr().err == "lbs search: --lr 0.0; it must be above 0\n"
    assert main.main([*line.split(), "--resume"]) == 2
    assert "lr=0.5 holds no search to resume; start it without --resume" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `lbs doctor | head -1`."""
    code = "import sys; from lbs.cli.main import main; sys.exit(main(['doctor']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors.replace(b"looking ...\n", b"")) == (141, b"")  # which slow imports take


def test_a_mistake_in_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("lbs.cli.report")
    fake.add_arguments, fake.run = (lambda parser: None), lambda args: 1 // 0
    monkeypatch.setitem(sys.modules, "lbs.cli.report", fake)
    with pytest.raises(ZeroDivisionError):
        main.main(["report"])


def test_numbers_in_options() -> None:
    assert numbers("2,4,8") == (2, 4, 8)
    assert [bit_operations(text) for text in ("0.03", "650M", "34.7G", "12k", "5000")] == [
        0.03,
        650e6,
        34.7e9,
        12e3,
        5000.0,
    ]
    for bad in ("0", "-3M"):
        with pytest.raises(argparse.ArgumentTypeError, match="no budget"):
            bit_operations(bad)
    for kind, text, message in (
        (bit_operations, "inf", "not finite"),
        (bit_operations, "M", "no number"),
        (decimal, "nan", "not finite"),
        (decimal, "1e999", "not finite"),
        (decimals, ".5,x", "no number"),
        (numbers, "2,x", "no list of whole numbers"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(text)


@pytest.mark.parametrize("option", ["--lr nan", "--bops inf", "--gain -inf", "--bits 2,x", "--mean .5,nan"])
def test_numbers_that_are_none_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    line = f"search --run {tmp_path / 'run'} --data digits --model digits_resnet8 --bops 0.03 {option}"
    assert main.main(line.split()) == 2
    assert f"argument {option.split()[0]}: " in capsys.readouterr().err.rstrip().split("\n")[-1]
    assert not list(tmp_path.iterdir())


def test_doctor_tells_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    code = main.main(["doctor", "--json"])
    body = json.loads(capsys.readouterr().out)
    assert code == (0 if body["healthy"] else 1)
    found = {finding["what"]: finding for finding in body["findings"]}
    assert {"native CPU module", "native CUDA module", "GPU", "Triton", "processor"} <= found.keys()
    for finding in body["findings"]:
        assert finding["state"] == "ok" or finding["fix"], f"{finding['what']} has no way out"


def test_doctor_says_what_is_missing_why_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"cpu": {"built": False, "reason": "no C++17 compiler was found", "fix": "apt-get install g++"}}
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "cpu_reason", "no C++17 compiler was found; to mend it: apt-get install g++")
    monkeypatch.setattr(extension, "build_report", lambda: report)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "MISSING  native CPU module: no C++17 compiler was found" in text
    assert "fix: apt-get install g++" in text
    assert "fix: pip install triton" in text
    assert "needed and missing: native CPU module" in text


@pytest.mark.parametrize(("gpu", "state"), [(None, "absent"), ("NVIDIA H200 (sm_90)", "missing")])
def test_doctor_needs_triton_where_there_is_a_gpu(gpu: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(doctor.device, "gpu_name", lambda: gpu)
    finding = doctor._triton()
    assert (finding.state, finding.fix) == (state, "pip install triton")


@pytest.mark.parametrize(
    ("version", "told"), [("3.7.1", False), ("3.8.0", True), ("3.9.0+git", True), ("3.10.0", False)]
)
def test_doctor_tells_of_releases_of_triton_that_spill(
    version: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = ModuleType("triton")
    release.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", release)
    finding = doctor._triton()
    assert finding.state == "ok"
    assert ("spills about 1 KB" in finding.detail, "triton<3.8" in finding.fix) == (told, told)


@pytest.mark.parametrize(
    ("instructions", "words"),
    [(("wgmma", "mma"), "runs its s8 and one-bit kernels"), (("mma",), "its one-bit kernels"), ((), "none of its")],
)
def test_doctor_names_the_cuda_kernels_of_a_gpu(
    instructions: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "cuda", ModuleType("module"))
    monkeypatch.setattr(doctor.device, "gpu_name", lambda: None)
    assert "its kernels need a GPU" in doctor._native_cuda().detail
    monkeypatch.setattr(doctor.device, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(doctor.cuda, "machines", lambda device: instructions)
    assert words in doctor._native_cuda().detail


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("it was never built; build it: pip install -e .", ("it was never built", "pip install -e .")),
        ("it was built but does not load: x; build again: pip install -e .", None),
    ],
)
def test_doctor_without_a_build_report(
    monkeypatch: pytest.MonkeyPatch, reason: str, words: tuple[str, str] | None
) -> None:
    monkeypatch.setattr(extension, "build_report", dict)
    why, fix = doctor._build_words("cpu", reason)
    assert fix == "pip install -e ."
    assert reason.startswith(why)
    assert words is None or (why, fix) == words


def test_progress_is_a_bar_on_a_terminal_and_lines_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"kind": "epoch", "epoch": 1, "loss": 0.5, "test_accuracy": 0.75, "bops": 2e6, "frozen": True}
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", "150")
        progress = Console(as_json=True).progress()
        progress.begin("search", 10, 2)
        progress.advance(3)
        progress.note(row)
        progress.end()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("search  50%|" in captured.err) == terminal
        assert (
            captured.err == "search: 8 steps\nsearch 5/10: epoch 1, loss 0.500, test 75.00%, 2.0M BOPs (met, held)\n"
        ) != terminal
