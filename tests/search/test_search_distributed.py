"""Two processes on the CPU: gates decided alike, equal weights, resumption bit for bit, and errors on every rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import two_processes

from lbs.run_folder import RunFolder
from lbs.train import distributed
from lbs_kernels.errors import TrainingError


def start_two(arguments: list[str], **options: Any) -> list[subprocess.Popen[str]]:
    """The same command twice, as torchrun starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left behind."""
    try:
        found = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What both ranks told, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("two")
    for code, _, errors in finish(start_two([two_processes.__file__, str(folder)])):
        assert code == 0, errors
    return folder, [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_end_with_the_same_gates_and_weights(answers: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = answers
    assert first["whole"] == second["whole"]
    assert first["whole"]["step"] == 12
    rows = [row for row in RunFolder(folder / "whole").metrics() if row["kind"] == "epoch"]
    assert [row["epoch"] for row in rows] == [1, 2]  # written once, though two processes trained
    assert rows[-1]["loss"] == first["whole"]["loss"]


def test_statistics_are_those_of_the_whole_batch(answers: tuple[Path, list[dict[str, Any]]]) -> None:
    """Rank 0's half alone would have closed the first gate, and measured another error at the second."""
    _, both = answers
    for own in both:
        reduced, whole = own["statistics"]
        assert reduced == pytest.approx(whole, rel=1e-6)
        assert reduced[0] > 0.02 > reduced[1]


def test_two_processes_that_were_killed_go_on_bit_for_bit(answers: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, both = answers
    for own in both:
        assert own["resumed"] == own["whole"]

    def rows(name: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(folder / name).metrics()]

    assert rows("parts") == rows("whole")


def test_ranks_that_disagree_are_named(answers: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, both = answers
    for own in both:
        assert "2 processes trained apart: rank 1 in conv1.weight differ" in own["disagreement"]
        assert "2 processes do not start alike: rank 1 in conv1.weight differ" in own["start"]
    # What was saved before stays: steps 1..5 of the first epoch.
    assert json.loads((folder / "apart/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_an_error_of_one_rank_ends_all_of_them(answers: tuple[Path, list[dict[str, Any]]]) -> None:
    _, both = answers
    for own in both:
        assert "on rank 1: layer conv1: its parameter conv1.weight is NaN" in own["not finite"]
        assert "a file is missing" in own["first"]
        assert "batch_size 9 for 2 processes" in own["uneven"]
    assert both[1]["first"].startswith("rank 0: ")


def test_another_number_of_processes_is_refused(answers: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = answers
    with pytest.raises(TrainingError, match=r"the saved loader had processes = 2, this one 1"):
        two_processes.make(folder / "whole").fit(resume=True)


def test_a_single_process_needs_no_group() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.active()) == (0, 1, False)
    assert distributed.gather("x") == ["x"]
    distributed.check_agreement({"weights": "a"})


@pytest.mark.slow
def test_the_command_line_in_two_processes(tmp_path: Path) -> None:
    """One row of the results, made by two processes, then resumed by one, which is refused."""
    line = "-m lbs reproduce digits-resnet8 --out row --schedule 1+1 --float-epochs 1 --threads 1 --json"
    results = finish(start_two(line.split(), cwd=tmp_path))
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[1][1] == ""  # the second process says nothing
    record = json.loads(results[0][1])
    assert record["verified"]
    assert record == json.loads((tmp_path / "row/record.json").read_text())
