"""tools/fuzz.py and bench_robustness.py: what a mutant does is counted, by kind, and the others are still judged."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import outcomes
import pytest
from outcomes import Disagreement, Outcome

from benchmarks.readme_tables import robustness_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("fuzz")


def raising(error: BaseException) -> Any:
    def judged() -> str:
        raise error

    return judged


def endless() -> str:
    while True:
        pass


def test_what_mutants_do_is_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "SECONDS_PER_MB", 0.05)
    outcome = Outcome()
    assert outcome.judge("one", 10, lambda: "refused")
    for name, judged in (
        ("two", raising(KeyError("odd"))),
        ("three", raising(SystemExit(1))),
        ("four", raising(Disagreement("other numbers"))),
        ("five", endless),
    ):
        assert not outcome.judge(name, 10, judged)
    assert (outcome.done, dict(outcome.verdicts)) == (5, {"refused": 1})
    assert dict(outcome.failed) == {"foreign": 2, "disagreement": 1, "hang": 1}
    assert outcome.failures[0] == "foreign: two: KeyError: 'odd'"
    assert outcome.slowest == "five"
    assert 0.5 < outcome.seconds_per_mb < 10
    again = Outcome.of_json(json.loads(json.dumps(outcome.to_json())))
    again.add(outcome)
    assert (again.done, again.failed["foreign"], len(again.failures)) == (10, 4, 8)


def test_pieces_are_kept_and_not_judged_again(fuzz: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fuzz, "PIECE", 3)
    out = tmp_path / "counts.json"
    found = fuzz.run(5, {"files": 0, "programs": 5}, tmp_path, out)
    assert (found["programs"].done, found["programs"].failures, found["files"].done) == (5, [], 0)
    assert list(tmp_path.iterdir()) == [out]
    monkeypatch.setattr(fuzz, "piece", lambda *given: pytest.fail(f"{given} again"))
    assert fuzz.run(5, {"files": 0, "programs": 5}, tmp_path, out)["programs"] == found["programs"]


def test_a_crash_ends_its_process_and_the_others_are_judged(fuzz: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    run, codes = subprocess.run, [-signal.SIGSEGV, -signal.SIGXCPU]

    def crashing(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if not codes:
            return run(command, **options)
        place, first = Path(command[3]), int(command[-1])
        (place / fuzz.PROGRAM).write_text("{}")
        (place / fuzz.NOTE).write_text(json.dumps({"number": first + 1, "outcome": Outcome(done=1).to_json()}))
        return subprocess.CompletedProcess(command, codes.pop(0), "", "last words")

    monkeypatch.setattr(fuzz.subprocess, "run", crashing)
    outcome = fuzz.piece(tmp_path, "programs", 7, 6)
    assert (outcome.done, dict(outcome.failed)) == (6, {"crash": 1, "hang": 1})
    assert "seed 7, programs 1: ended with -11: last words" in outcome.failures[0]
    (place,) = tmp_path.iterdir()
    assert {path.name for path in place.glob("seed7-*")} == {f"seed7-{n}-{fuzz.PROGRAM}" for n in (1, 3)}


def test_figures_and_their_table() -> None:
    bench = importlib.import_module("benchmarks.bench_robustness")
    grown, times = bench.memory_grown(2), bench.alone_and_beside(3)
    kinds = {kind: Outcome(done=2, peak_bytes=3 * 10**8).to_json() for kind in ("files", "programs")}
    beside = {"batch": bench.BATCH, "alone_s": times[0], "beside_s": 2 * times[0]}
    header = {"device": "a processor", "torch": "2"}
    body = {"header": header, "seed": 3, "kinds": kinds, "notes": ["found something"], "beside": beside}
    table = "\n".join(robustness_table("x.json", {**body, "memory": {"networks": 2, "grown_bytes": grown}}))
    assert "| crashes | 0 | 0 | 0 |" in table
    assert "| peak memory of a process, MB | 1000 | 300 | 300 |" in table
    assert "batch 512, of its time alone | 3 | 2.00 |" in table
    assert "Found something." in table
