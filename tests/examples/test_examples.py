"""examples/: each runs as it stands, on what ships with the packages, and none is long."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
# In place of `import timm` alone: torchvision, which it imports, may be built for another torch.
TIMM = "import runpy, zoo_nets; zoo_nets.torchvision(); runpy.run_path({path!r}, run_name='__main__')"


def _run(folder: Path, *command: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "post_training")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _path(name: str) -> str:
    return str(ROOT / "examples" / f"{name}.py")


def _percent(output: str, after: str) -> float:
    return float(output.partition(after)[2].split("%")[0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    lines = Path(_path(name)).read_text().splitlines()
    assert sum(1 for line in lines if line.strip()) < 60


@pytest.mark.slow
def test_own_cnn(tmp_path: Path) -> None:
    output = _run(tmp_path, _path("own_cnn"))
    assert "packed equals model" in output
    assert ", met" in output
    assert _percent(output, "packed:") > 95
    assert (tmp_path / "own_cnn.lbs.safetensors").exists()


@pytest.mark.slow
def test_mobilenet(tmp_path: Path) -> None:
    output = _run(tmp_path, _path("mobilenet"))
    assert "gives the same bits: True" in output
    assert _percent(output, "of 256 images (") > 95


@pytest.mark.slow
def test_timm_network(tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install -e .[zoos]")
    output = _run(tmp_path, "-c", TIMM.format(path=_path("timm_network")))
    assert _percent(output, "of 224 images (") > 95
    assert "layer4.1.conv2" in output


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    output = _run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", _path("ddp"))
    assert "packed equals model" in output
    assert ", met" in output
