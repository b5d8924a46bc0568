"""A run folder may be a stranger's: no command calls or imports what lies in it, or is named by a file of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_nets
import pytest

from lbs.cli import main
from lbs.run_folder import RunFolder, sealed
from lbs.runs.stages import bench_run, uniform8_run, verify_run
from lbs.train import checkpoint
from lbs_kernels.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
SEARCH = "--data digits --no-augment --batch-size 64 --train-images 128 --calibration 64 --threads 1"
TRAP = "import os, pathlib\npathlib.Path(os.environ['LBS_TEST_TRAP']).write_text(__name__)\n"
Command = Callable[[str], tuple[int, Any, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a network of its own and a run of it, searched and packed."""
    folder = tmp_path_factory.mktemp("trust")
    (folder / "tiny_trusted_net.py").write_text(cli_nets.SOURCE)
    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = "--model tiny_trusted_net:Net"
        assert main.main(f"search --run run {SEARCH} {model} --float-epochs 1 --epochs 1 --bops 0.05".split()) == 0
        assert main.main(f"pack --run run {model}".split()) == 0
        yield folder
    sys.path[:] = before
    sys.modules.pop("tiny_trusted_net", None)


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file, its hash made right."""
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "hash"}
    path.write_text(json.dumps(sealed({**body, **changes})))


def test_a_working_folder_that_was_deleted(tmp_path: Path) -> None:
    line = f"rmdir {tmp_path / 'gone'} && exec {sys.executable} -m lbs --help"
    (tmp_path / "gone").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, shell=True, cwd=tmp_path / "gone", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: lbs")


@pytest.mark.parametrize("line", ["verify --images 4", "bench --batches 1 --rounds 2", "explain"])
def test_what_a_run_may_cost_is_the_users_to_say(run: Path, lbs_command: Command, line: str) -> None:
    line = f"{line} --run run" + ("" if line == "explain" else " --model tiny_trusted_net:Net")
    code, body, _ = lbs_command(f"{line} --budget 1e-9")
    assert code == 2
    assert "give a larger --budget, or --budget none for any" in body["error"]
    assert lbs_command(f"{line} --budget none")[0] == 0


def test_stages_of_a_run_load_within_a_budget_too(run: Path) -> None:
    folder = RunFolder(run, ("tiny_trusted_net:Net",))
    stages: list[Callable[[], object]] = [
        lambda: verify_run(folder, budget=1e-9),
        lambda: uniform8_run(folder, [], budget=1e-9),
        lambda: bench_run(folder, print, budget=1e-9),
    ]
    for stage in stages:
        with pytest.raises(CheckpointError, match="give a larger budget"):
            stage()


@pytest.mark.parametrize("line", ["pack", "verify", "bench --batches 1 --rounds 2"])
def test_a_function_that_a_file_names_is_not_called(run: Path, lbs_command: Command, line: str) -> None:
    rewrite(run / "network.json", model="os:_exit")  # which would end this process
    code, body, _ = lbs_command(f"{line} --run run")
    assert (code, body["kind"]) == (2, "CheckpointError")
    assert "'os:_exit', and one is only called where it is named with the command" in body["error"]
    assert "give --model os:_exit" in body["error"]


def test_a_training_command_does_not_call_it_either(run: Path, lbs_command: Command) -> None:
    config = json.loads((run / "config.json").read_text())
    config["search"]["model"] = "os:_exit"
    (run / "config.json").write_text(json.dumps(config))
    rewrite(run / "network.json", model="os:_exit")
    code, body, _ = lbs_command("finetune --run run --epochs 1 --threads 1")
    assert (code, "os:_exit" in body["error"]) == (2, True)


def test_what_the_user_names_is_called(run: Path, lbs_command: Command) -> None:
    """And looking at a packed network needs no network in float."""
    assert lbs_command("verify --run run --images 4 --model tiny_trusted_net:Net")[0] == 0
    assert lbs_command("explain --run run")[0] == 0
    assert lbs_command("verify --run run --images 4 --model tiny_trusted_net:Other")[0] == 2


EDITS = {
    "network.json": ('"num_classes": 10', '"num_classes": 11', "pack"),
    "plan.json": ('"w_bits": 8', '"w_bits": 4', "pack"),
    "results.json": ('"accuracy": 0.', '"accuracy": 0.9', "verify --images 4"),
    "environment.json": ('"threads": 1', '"threads": 9', "report"),
    "metrics.jsonl": ('"loss":', '"loss":1', "report"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_hand_is_seen(run: Path, lbs_command: Command, name: str) -> None:
    old, new, line = EDITS[name]
    text = (run / name).read_text()
    changed = text.replace(old, new)
    assert changed != text
    (run / name).write_text(changed)
    command = "report run" if line == "report" else f"{line} --run run --model tiny_trusted_net:Net"
    code, body, _ = lbs_command(command)
    assert code == 2
    assert re.search(rf"{name}(, line \d+)? was edited by hand", body["error"])


def test_files_of_earlier_releases_have_no_hashes_and_are_read(run: Path, lbs_command: Command) -> None:
    for name in EDITS:
        bodies = [json.loads(text) for text in ((run / name).read_text().splitlines() if name[-1] == "l" else [])]
        bodies = bodies or [json.loads((run / name).read_text())]
        assert all(body.pop("hash") for body in bodies)
        (run / name).write_text("\n".join(map(json.dumps, bodies)) + "\n")
    assert lbs_command("verify --run run --images 4 --model tiny_trusted_net:Net")[0] == 0
    assert lbs_command("report run")[0] == 0


def test_weights_of_a_run_carry_a_digest(run: Path) -> None:
    path = run / "searched.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not match their digest"):
        checkpoint.load_weights(path)


def test_python_m_imports_nothing_from_the_working_folder(tmp_path: Path) -> None:
    """Modules that lie there have the names of what the command imports, and of what it would like to."""
    names = "argparse json torch numpy safetensors tqdm matplotlib jinja2 triton yaml contextlib re lbs_kernels PIL"
    for name in names.split():
        (tmp_path / f"{name}.py").write_text(TRAP)
    trap = tmp_path / "caught"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LBS_TEST_TRAP": str(trap)}
    command = [sys.executable, "-m", "lbs", "pack", "--run", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not trap.exists(), trap.read_text()
    assert (done.returncode, "nowhere" in done.stderr) == (2, True), done.stderr
