"""One run, one writer: a folder that a process writes to is refused to others, who are told whom to wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbs.plan import Plan
from lbs.run_folder import RunFolder, write_bytes
from lbs_kernels import files
from lbs_kernels.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[[str], tuple[int, Any, str]]
HOLDER = """
import sys, time
from lbs.run_folder import RunFolder
with RunFolder(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the folder `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_the_first_is(
    tmp_path: Path, lbs_command: Command, holder: subprocess.Popen[str]
) -> None:
    line = f"search --run {tmp_path / 'run'} --data digits --model digits_resnet8 --float-epochs 1 --bops 0.03"
    code, body, _ = lbs_command(line)
    assert (code, body["kind"]) == (2, "CheckpointError")
    assert f"is written by process {holder.pid} of " in body["error"]
    assert "wait until that has ended, or give a run folder of its own" in body["error"]
    assert not (tmp_path / "run/config.json").exists()
    with pytest.raises(CheckpointError, match=f"process {holder.pid} of .*, since 20"):
        RunFolder(tmp_path / "run").add_result("bench", {})


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Also of one that had no time to let go, and with what it left half written long ago: a writer may be alive."""
    left = tmp_path / "run" / ".plan.json.0123456789abcdef.part"
    left.write_text("half")
    long_ago = time.time() - 2 * 3600
    os.utime(left, (long_ago, long_ago))
    fresh = tmp_path / "run" / ".report.html.0123456789abcdef.part"
    fresh.write_text("half")
    mine = tmp_path / "run" / ".notes.part"
    mine.write_text("a user's own")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run").held():
        assert f"process {os.getpid()} of" in (tmp_path / "run/lock").read_text()
        assert not left.exists()
        assert fresh.exists()
    assert mine.exists()
    assert (tmp_path / "run/lock").read_text() == ""


def test_a_folder_is_held_again_by_who_holds_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.held(), RunFolder(tmp_path / "run" / ".").held():
        folder.add_result("bench", {"rows": []})
    assert folder.results() == {"bench": {"rows": []}}


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    """A stranger's folder may hold links to the user's own files, under the names that a run writes."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    for name in ("lock", "metrics.jsonl", "plan.json", "plan.json.part", "results.json.part"):
        (run / name).symlink_to(victim)
    folder = RunFolder(run)
    with pytest.raises(CheckpointError, match="lock could not be written"), folder.held():
        pass
    (run / "lock").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl could not be written"):
        folder.append_metrics({"step": 1})
    folder.add_result("bench", {})
    Plan((), "").save(run / "plan.json")
    assert victim.read_text() == "precious"
    assert not (run / "plan.json").is_symlink()


def test_scratch_files_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers of one path never write to one scratch file, and none is left behind, also where renaming fails."""
    seen: list[str] = []
    replaced = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append(Path(source).name)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", watched)
    for content in (b"one", b"two"):
        write_bytes(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"two"
    assert len(set(seen)) == 2
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder could not be written"):
        write_bytes(tmp_path / "folder", b"three")
    assert not files.scratch_of(tmp_path)


@pytest.mark.slow
def test_two_commands_at_once_leave_the_record_of_one(tmp_path: Path) -> None:
    line = f"search --run {tmp_path / 'run'} --data digits --model digits_resnet8 --float-epochs 1 --bops 0.05"
    command = [sys.executable, "-m", "lbs", *f"{line} --epochs 1 --threads 1 --train-images 256".split()]
    both = [
        subprocess.Popen([*command, "--seed", seed], cwd=ROOT, stderr=subprocess.PIPE, text=True) for seed in ("1", "2")
    ]
    ends = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2]
    assert "is written by process" in ends[codes.index(2)] or "already holds a search" in ends[codes.index(2)]
