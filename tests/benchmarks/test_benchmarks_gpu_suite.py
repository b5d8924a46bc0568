"""benchmarks/gpu_suite.py as far as a machine without a GPU can run it: order, time boxes, crashes, whole files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks, gpu_models, gpu_run, gpu_suite
from benchmarks.gpu_run import Attempts, Run, deadline

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU; the suite would run")


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float, **body: Any) -> Callable[[Run, float], dict[str, Any]]:
        """A part that takes so long, or until its deadline."""

        def part(run: Run, until: float) -> dict[str, Any]:
            begin, self.now = self.now, min(self.now + seconds, until)
            return {"begin": begin, "until": until, **body}

        return part


def make_run(out: Path, clock: Callable[[], float], minutes: float = 9.0) -> Run:
    return Run(out, clock() + 60 * minutes, {"device": "none"}, out, clock)


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
        ([], "give --out DIR, or set the environment variable OUT"),
        (["--out", "x", "--only", "everything"], "invalid choice"),
        (["--out", "x", "--minutes", "0"], "positive number"),
        (["--out", "x", "--minutes", "nan"], "positive number"),
        (["--out", "x", "--networks", "0"], "positive number"),
    ],
)
def test_arguments_that_make_no_sense(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.arguments(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_folder_is_that_of_the_environment_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "there")
    assert gpu_suite.arguments([]).out == Path("there")
    assert gpu_suite.arguments(["--out", "here"]).out == Path("here")


def test_parts_run_in_order_and_by_name() -> None:
    args = gpu_suite.arguments(["--out", "x", "--only", "layers", "--only", "tests"])
    assert gpu_suite.selected(args.only) == ["layers", "tests"]
    assert gpu_suite.selected(None) == list(gpu_suite.BOXES)
    assert gpu_suite.selected(["row"]) == ["row"]
    assert list(gpu_suite.BOXES | gpu_suite.APART) == list(gpu_run.PARTS) == list(gpu_suite.WHAT)


def test_the_boxes_fit_into_eight_minutes() -> None:
    assert gpu_suite.MINUTES <= 8
    for boxes in (gpu_suite.BOXES, gpu_suite.APART):
        assert sum(boxes.values()) + gpu_run.SLACK < 60 * gpu_suite.MINUTES


def test_the_plan_is_printed_and_nothing_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_suite.main(["--plan"]) == 0
    *parts, total = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in parts] == list(gpu_suite.BOXES)
    assert [float(line.split()[0]) for line in parts] == list(gpu_suite.BOXES.values())
    assert float(total.split()[0]) == sum(gpu_suite.BOXES.values())


def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    """Kernels interpreted on tiny shapes: every part begins, saves and ends, and nothing is told as measured."""
    pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    bodies = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in gpu_suite.BOXES}
    assert not [part for part, body in bodies.items() if "error" in body]
    rows = bodies["steps"]["rows"]
    assert {row["batch"] for row in rows} == {1, 2}
    assert all(row["seconds"] is None and row["modelled_seconds"] > 0 for row in rows)
    assert bodies["models"]["complete"]
    assert bodies["layers"]["complete"]
    assert len({row["problem"] for row in bodies["layers"]["rows"]}) == 1
    assert bodies["tests"]["collected"] > 100
    assert "    met" not in done.stdout


def test_a_carried_module_is_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "_carried.json"
    monkeypatch.setattr(gpu_checks.gpu_carry, "NOTE", note)
    assert "none was carried" in gpu_checks.gpu_carry.why_not()
    other = {"sources": "of another day", "file": "_cuda.so", "archs": "90a"}
    note.write_text(json.dumps(other))
    assert "built from other sources" in gpu_checks.gpu_carry.why_not()
    note.write_text(json.dumps({**other, "sources": gpu_checks.gpu_carry.sources()}))
    monkeypatch.setattr(gpu_checks.gpu_carry, "LOAD", "print('no such symbol'); raise SystemExit(True)")
    assert gpu_checks.gpu_carry.why_not() == "_cuda.so does not load: no such symbol"
    monkeypatch.setattr(gpu_checks.gpu_carry, "LOAD", "raise SystemExit(False)")
    assert gpu_checks.gpu_carry.why_not() == ""
    monkeypatch.setattr(gpu_checks, "call", lambda *_, **__: pytest.fail("it was built"))
    assert gpu_checks.build(10)["passed"]


def test_what_one_part_leaves_goes_to_the_next() -> None:
    boxes = {"a": 100.0, "b": 50.0, "c": 50.0}
    end = 200 + gpu_run.SLACK
    assert deadline(boxes, "a", 0, end) == 100
    assert deadline(boxes, "b", 20, end) == 150  # 80 s were left over
    assert deadline(boxes, "c", 150, end) == 200
    assert deadline(boxes, "c", 40, end) == 200
    assert deadline({"b": 50.0}, "b", 0, end) == 200  # alone it has everything


def test_boxes_shrink_where_the_time_is_short() -> None:
    boxes = {"a": 100.0, "b": 100.0}
    end = 50 + gpu_run.SLACK
    assert deadline(boxes, "a", 0, end) == 25
    assert deadline(boxes, "b", 30, end) == 50
    assert deadline(boxes, "b", 90, end) == 90  # too late: its end has come


def test_a_whole_run_ends_in_time_whatever_its_parts_take(tmp_path: Path) -> None:
    clock = Clock()
    run = make_run(tmp_path, clock)
    greedy = {name: clock.spend(1e9) for name in gpu_suite.BOXES}
    assert gpu_run.run_parts(run, gpu_suite.BOXES, greedy, beside=None)
    assert clock.now <= run.end
    for name, box in gpu_suite.BOXES.items():
        body = run.load(name)
        assert body["until"] - body["begin"] >= box * 0.98, name
        assert (body["level"], body["header"]) == (f"gpu_{name}", {"device": "none"})


def test_every_part_is_saved_when_it_ends_and_a_broken_one_stops_nothing(tmp_path: Path) -> None:
    clock = Clock()
    seen: list[list[str]] = []

    def look(run: Run, until: float) -> dict[str, Any]:
        seen.append(sorted(path.name for path in tmp_path.glob("*.json")))
        return {}

    def broken(run: Run, until: float) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    parts = {"build": look, "roofs": broken, "tests": look}
    assert not gpu_run.run_parts(make_run(tmp_path, clock), dict.fromkeys(parts, 10.0), parts, beside=None)
    assert seen == [[], ["build.json", "roofs.json", "targets.json"]]
    assert json.loads((tmp_path / "roofs.json").read_text())["error"] == "RuntimeError: out of memory"
    assert gpu_run.run_parts(make_run(tmp_path, clock), {"build": 10.0}, parts, beside=None)


def test_failing_gpu_tests_fail_the_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"tests": lambda run, until: {"passed": False, "tests": 5, "failures": 2}}
    assert not gpu_run.run_parts(make_run(tmp_path, Clock()), {"tests": 10.0}, parts, beside=None)
    assert "MISSED  every gpu test is green: 5; 5 tests, 2 failures" in capsys.readouterr().out


class Child:
    """A process that does a piece of work when it is waited for."""

    def __init__(self, work: Callable[[float], int]) -> None:
        self.work, self.pid = work, -1

    def wait(self, timeout: float) -> int:
        return self.work(timeout)


def test_a_kernel_that_breaks_the_device_costs_itself_alone(tmp_path: Path) -> None:
    clock, tried = Clock(), []

    def work(run: Run, timeout: float) -> int:
        attempt = Attempts(tmp_path, "layers")
        rows = run.load("layers").get("rows", [])
        for name in ("one", "two", "three", "four"):
            if name in rows or not attempt(name):
                continue
            tried.append(name)
            clock.now += 10
            if name in ("two", "four"):
                return -11
            rows.append(name)
            run.save("layers", {"rows": rows})
        return 0

    run = make_run(tmp_path, clock)
    body = gpu_run.child(run, "layers", run.end, lambda run, part, until: Child(lambda t: work(run, t)))
    assert tried == ["one", "two", "three", "four"]
    assert (body["rows"], body["broke_the_device"], body["ended"]) == (["one", "three"], ["two", "four"], "complete")
    assert "error" not in body


def test_a_part_that_breaks_twice_at_one_place_is_given_up(tmp_path: Path) -> None:
    starts = []

    def start(run: Run, part: str, until: float) -> Child:
        starts.append(part)
        return Child(lambda timeout: 1)

    run = make_run(tmp_path, Clock())
    body = gpu_run.child(run, "roofs", run.end, start)
    assert starts == ["roofs"]  # it named nothing it was trying
    assert body["error"] == "its process ended with code 1"
    Attempts(tmp_path, "models")("net")
    assert gpu_run.child(run, "models", run.end, start)["broke_the_device"] == ["net"]
    assert starts == ["roofs", "models", "models"]


def test_a_part_without_time_is_not_started(tmp_path: Path) -> None:
    clock = Clock()
    run = make_run(tmp_path, clock)
    body = gpu_run.child(run, "models", clock.now + 3, lambda *_: pytest.fail("it was started"))
    assert "the time was up" in body["error"]


@pytest.mark.parametrize(
    ("compiled_at", "ends_at", "box", "waited"),
    [(3.0, 99.0, 10.0, 3.0), (99.0, 99.0, 10.0, 10.0), (99.0, 2.0, 10.0, 2.0), (0.0, 99.0, 10.0, 0.0)],
)
def test_what_torch_compiles_is_waited_for(
    compiled_at: float, ends_at: float, box: float, waited: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ended = Clock(), []
    begin = clock.now
    process = SimpleNamespace(poll=lambda: 1 if clock.now - begin >= ends_at else None)
    monkeypatch.setattr(gpu_run, "start_child", lambda run, part, until: process)
    monkeypatch.setattr(gpu_run, "kill", ended.append)
    monkeypatch.setattr(gpu_run.time, "sleep", lambda seconds: clock.spend(seconds)(run, begin + 1e9))
    monkeypatch.setattr(gpu_models, "plain_done", lambda folder, count: clock.now - begin >= compiled_at)
    run = make_run(tmp_path, clock)
    with gpu_run.warm(run, begin + box):
        pass
    assert clock.now - begin == pytest.approx(waited, abs=0.3)
    with pytest.raises(RuntimeError), gpu_run.warm(run, begin + box):
        raise RuntimeError("the tests broke")
    assert clock.now - begin == pytest.approx(waited, abs=0.3)
    assert ended == [process] * 2


def test_children_share_what_triton_compiled_whatever_torch_does(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")
    given = gpu_run.environment(make_run(tmp_path, Clock()))
    assert given["TRITON_CACHE_DIR"] == triton.knobs.cache.dir
    assert given["TRITON_PTXAS_PATH"] == triton.knobs.nvidia.ptxas.path


def test_half_written_files_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "models.json.1.tmp").write_text("{")
    (tmp_path / "notes.tmp").write_text("somebody's")
    parts = {"build": lambda run, until: {}}
    gpu_run.run_parts(make_run(tmp_path, Clock()), {"build": 10.0}, parts, beside=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json", "notes.tmp", "targets.json"]


def test_a_child_is_ended_with_all_it_started(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = f"import subprocess, time; pid = subprocess.Popen({sleep!r}).pid; "
    program += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(pid)); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    begin = time.monotonic()
    assert gpu_run.finish(process, 0.2) is None
    assert time.monotonic() - begin < 10
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 30
        time.sleep(0.02)


def test_counts_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    assert gpu_checks.count(report) == {}
    report.write_text('<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>')
    assert gpu_checks.count(report) == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}


@pytest.mark.parametrize(("built", "code", "passed"), [(True, 0, True), (False, 0, False), (True, 1, False)])
def test_a_build_without_the_cuda_module_fails(
    built: bool, code: int, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lbs_kernels").mkdir()
    report = json.dumps({"cuda": {"built": built, "reason": "no nvcc"}})
    (tmp_path / "lbs_kernels" / "_build_report.json").write_text(report)
    monkeypatch.setattr(gpu_checks, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_checks, "architecture", lambda: "90a")
    monkeypatch.setattr(gpu_checks.gpu_carry, "why_not", lambda: "none was carried")
    monkeypatch.setattr(gpu_checks, "call", lambda command, seconds, **environment: (code, ""))
    assert gpu_checks.build(10)["passed"] is passed


def test_tests_skipped_for_want_of_the_module_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase><skipped message="CUDA module missing: no nvcc"/></testcase>'
        '<testcase><skipped message="no channels_last there"/></testcase></testsuite></testsuites>'
    )
    assert gpu_checks.no_module(report) == 1
    assert gpu_checks.no_module(tmp_path / "none.xml") == 0


def test_the_files_with_gpu_tests_are_found() -> None:
    found = gpu_checks.gpu_files()
    assert {"tests/kernels/test_triton_gpu.py", "tests/packing/test_pack_gpu.py"} <= set(found)
    assert "tests/kernels/test_bitconv2d.py" in found  # through CONTENDERS
    assert "tests/test_plan_json.py" not in found
    assert "tests/cli/test_cli_tune.py" not in found  # it speaks of GPUs and needs none
    first = ("kernels/test_s8_gpu", "kernels/test_nibbles_gpu", "kernels/test_onebit_gpu")
    order = (*first, "kernels/test_bitconv2d", "kernels/test_triton_gpu")
    places = [found.index(f"tests/{name}.py") for name in order]
    assert places == sorted(places)


def test_counts_of_tests_that_were_cut_off() -> None:
    text = """
[gw0] [  1%] PASSED tests/a.py::test_one[x]
[gw1] [  2%] FAILED tests/a.py::test_two
tests/a.py::test_three SKIPPED (no reason) [  3%]
tests/a.py::test_four ERROR
tests/a.py::test_five
FAILED tests/a.py::test_two - assert 1 == 2
"""
    assert gpu_checks.so_far(text) == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}


RAN = "collected 12 items / 3 deselected / 9 selected\na.py::b[1] PASSED [ 1%]\na.py::c PASSED [ 2%]\n"


@pytest.mark.parametrize(
    ("code", "text", "errors", "reason"),
    [
        (0, f"{RAN}========= ERROR SUMMARY: 0 errors", 0, "2 of 9 tests"),
        (0, f"{RAN}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 2, "2 of 9 tests"),
        (2, f"{RAN}!!! Interrupted: x !!!\n===== ERROR SUMMARY: 0 errors", 0, "2 of 9 tests, as far as the time went"),
        (0, "collected 1 item\na.py::b PASSED\n========= ERROR SUMMARY: 0 errors", 0, "1 of 1 tests"),
        (1, "========= ERROR SUMMARY: 4 errors\n========= ERROR SUMMARY: 0 errors", 4, "no test passed under it"),
        (5, "no tests ran\n========= ERROR SUMMARY: 0 errors", None, "no test passed under it"),
        (None, RAN, None, "the time was up after 2 of 9 tests"),
        (1, "Device not supported", None, "it printed no summary (exit code 1) after 0 of ? tests"),
    ],
)
def test_verdicts_of_compute_sanitizer(code: int | None, text: str, errors: int | None, reason: str) -> None:
    found = gpu_checks.verdict(code, text)
    assert (found["errors"], found["reason"]) == (errors, reason)
    assert found["covered"] == re.findall(r"a\.py::\S+", text)


def test_a_run_under_the_sanitizer_ends_in_order_when_its_time_is_up(tmp_path: Path) -> None:
    slow = tmp_path / "test_slow.py"
    slow.write_text("def test_one() -> None:\n    pass\n\n\ndef test_two() -> None:\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-v", *gpu_checks.PYTEST, "-p", "benchmarks.gpu_stop", str(slow)]
    for until, passed in ((time.time() - 1, 1), (time.time() + 60, 2)):
        _, text = gpu_checks.call(command, 60, LBS_STOP_AT=str(until))
        assert f"{passed} passed" in text
        reason = gpu_checks.verdict(0, f"{text}ERROR SUMMARY: 0 errors")["reason"]
        assert reason == ("1 of 2 tests, as far as the time went" if passed == 1 else "2 of 2 tests")


def test_a_missing_sanitizer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: None)
    body = gpu_checks.sanitizer(10)
    assert body["tools"]["memcheck"] == {"errors": None, "reason": "compute-sanitizer was not found"}


def test_without_pytest_both_parts_that_need_it_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None)
    body = gpu_checks.tests(tmp_path, 10)
    assert (body["passed"], body["reason"]) == (False, gpu_checks.NO_PYTEST)
    assert gpu_checks.sanitizer(10)["tools"]["racecheck"] == {"errors": None, "reason": gpu_checks.NO_PYTEST}


@pytest.mark.parametrize("installed", [True, False])
def test_many_test_processes_take_one_processor_each(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(command: list[str], seconds: float, grace: float, **environment: str) -> tuple[int, str]:
        assert ("-n" in command) == (environment.get("OMP_NUM_THREADS") == "1") == installed
        return 0, ""

    monkeypatch.setattr(gpu_checks, "call", call)
    monkeypatch.setattr(
        gpu_checks.importlib.util, "find_spec", lambda name: name if installed or name != "xdist" else None
    )
    assert gpu_checks.tests(tmp_path, 300)["passed"]


def test_a_file_that_cannot_be_imported_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, good = tmp_path / "test_gpu_a.py", tmp_path / "test_gpu_b.py"
    broken.write_text("import a_package_that_is_not_there\n")
    good.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_one() -> None:\n    pass\n")
    monkeypatch.setattr(gpu_checks, "gpu_files", lambda: [str(broken), str(good)])
    body = gpu_checks.tests(tmp_path, 300)
    assert (body["passed"], body["tests"], body["errors"], body["failures"]) == (False, 2, 1, 0)


def test_the_sanitizer_is_given_tests_of_every_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    left: list[float] = []

    def call(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        left.append(float(environment["LBS_STOP_AT"]) - time.time())
        asked.append(command[command.index("-m") :])
        return 0, "a.py::b PASSED\n========= ERROR SUMMARY: 0 errors"

    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_checks, "call", call)
    body = gpu_checks.sanitizer(40)
    assert body["passed"]
    assert body["tools"]["racecheck"]["covered"] == ["a.py::b"]
    assert left == pytest.approx([20 - gpu_checks.SUMMARY, 40 - gpu_checks.SUMMARY], abs=1)
    listed = subprocess.run(
        [sys.executable, *asked[0], "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ("test_accumulator[onebit_wgmma", "test_codes_alone"):
        assert name in listed
    assert listed.index("onebit_wgmma") < listed.index("test_codes_alone")


def test_a_command_that_takes_too_long_keeps_its_words() -> None:
    program = "import time; print('so far', flush=True); time.sleep(60)"
    code, text = gpu_checks.call([sys.executable, "-c", program], 1.5)
    assert (code, text) == (None, "so far\n")
    code, text = gpu_checks.call([sys.executable, "-c", program], 30, grace=28)
    assert code is None
    assert "so far" in text
    assert "KeyboardInterrupt" in text  # asked first, it tells what it knows


def test_tests_whose_time_is_up_tell_of_the_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "test_gpu.py"
    tests.write_text(
        "import time\nimport pytest\n\n\n@pytest.mark.gpu\n@pytest.mark.parametrize('seconds', [0, 0, 60])\n"
        "def test_one(seconds):\n    time.sleep(seconds)\n    assert seconds, 'it is nothing'\n"
    )
    monkeypatch.setattr(gpu_checks, "gpu_files", lambda: [str(tests)])
    monkeypatch.setattr(gpu_checks, "INTERRUPTED", 15.0)
    found = gpu_checks.importlib.util.find_spec
    monkeypatch.setattr(gpu_checks.importlib.util, "find_spec", lambda name: None if name == "xdist" else found(name))
    body = gpu_checks.tests(tmp_path, 40)
    assert (body["passed"], body["tests"], body["failures"]) == (False, 2, 2)
    assert "time was up" in body["reason"]
    assert "it is nothing" in body["failed"][0]


def test_saving_replaces_the_file_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path, Clock())
    run.save("layers", {"rows": [1]})
    with pytest.raises(TypeError):
        run.save("layers", {"rows": object()})
    assert run.load("layers")["rows"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]
