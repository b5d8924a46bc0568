"""What is distributed: a wheel that runs where nothing but its dependencies is installed, and sources without tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
BIN = Path(sys.executable).parent

if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)


def run(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSTARTUP")}
    command = list(map(str, words))
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=1800, env={**kept, **environment}, check=False
    )


def needed(names: list[str]) -> dict[str, Requirement]:
    """Distributions that these need, themselves included, by their names."""
    found: dict[str, Requirement] = {}
    waiting = list(map(Requirement, names))
    while waiting:
        one = waiting.pop()
        if one.name.lower() in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found[one.name.lower()] = one
        waiting += map(Requirement, distribution(one.name).requires or ())
    return found


def empty_environment(folder: Path, dependencies: list[str]) -> Path:
    """A virtual environment of these distributions and what they need, which are linked to: its folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    for name in needed(dependencies):
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
            target = folder / SITE / top
            if not target.exists():
                target.symlink_to(Path(str(found.locate_file(top))))
    return folder


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_environment(tmp_path: Path) -> None:
    auditwheel = shutil.which("auditwheel", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if auditwheel is None:
        pytest.skip("auditwheel is not installed")
    made = run(BIN / "python", "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    (plain,) = (tmp_path / "made").glob("lbs-*.whl")
    tools = f"{Path(auditwheel).parent}{os.pathsep}{os.environ['PATH']}"
    repaired = run(auditwheel, "repair", plain, "-w", tmp_path / "fixed", PATH=tools)
    assert repaired.returncode == 0, repaired.stderr
    (wheel,) = (tmp_path / "fixed").glob("lbs-*-manylinux_*.whl")

    venv = empty_environment(tmp_path / "venv", ["torch", "numpy", "safetensors"])
    python, lbs = venv / "bin" / "python", venv / "bin" / "lbs"
    words = ("install", "--no-deps", "--no-index", wheel)
    installed = run(BIN / "python", "-m", "pip", "--python", python, *words)
    assert installed.returncode == 0, installed.stderr
    absent = (
        "import importlib.util as u; print([n for n in ('matplotlib', 'sklearn', 'PIL', 'tqdm') if u.find_spec(n)])"
    )
    assert run(python, "-c", absent, cwd=tmp_path).stdout.strip() == "[]"

    timed = run(lbs, "bench", "--zoo", "cifar100-resnet20", "--batches", 1, "--rounds", 3, cwd=tmp_path)
    assert timed.returncode == 0, timed.stderr
    assert "packed" in timed.stdout
    examined = run(lbs, "doctor", cwd=tmp_path)
    assert examined.returncode == 0, examined.stdout
    assert "ok       native CPU module: " in examined.stdout
    assert f"ok       C library: {venv / SITE / 'lbs_kernels' / 'liblbs.so'}" in examined.stdout
    drawn = run(lbs, "report", "run", cwd=tmp_path)
    assert (drawn.returncode, drawn.stderr.endswith(": pip install jinja2 matplotlib\n")) == (2, True)


@pytest.mark.slow
def test_sources_are_complete_and_carry_no_tests(tmp_path: Path) -> None:
    done = run(BIN / "python", "setup.py", "-q", "sdist", "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("lbs-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    own = {
        path.relative_to(ROOT).as_posix() for folder in ("csrc", "examples") for path in (ROOT / folder).rglob("*.*")
    }
    own |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "lbs").rglob("*") if path.suffix in (".py", ".html")}
    own |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "tools/make_venv.sh"}
    assert not {name for name in own if "__pycache__" not in name} - names
    assert not [name for name in names if name.startswith(("tests", "benchmarks")) or name.endswith(".so")]
