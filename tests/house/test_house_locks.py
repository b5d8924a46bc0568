"""locks/: every package of the set-up has the hashes of its files; a file that is another one is not installed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)


def name_of(package: str) -> str:
    """As indexes spell it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def pins(text: str) -> dict[str, set[str]]:
    """Versions by package; builds of torch for processors alone count as torch."""
    found: dict[str, set[str]] = {}
    for package, version in PIN.findall(text):
        found.setdefault(name_of(package), set()).add(version.partition("+")[0])
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.stem for lock in LOCKS])
def test_every_pin_has_hashes_and_the_version_of_constraints(lock: Path) -> None:
    text, given = lock.read_text(), pins((ROOT / "constraints.txt").read_text())
    entries = text.replace("\\\n", " ").splitlines()[1:]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[^ ]+==[^ ]+( ; [^-]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", entry), entry
    for package, versions in pins(text).items():
        assert versions == given.get(package, versions), f"{package}: run make lock"


def test_what_the_project_depends_on_is_locked() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL) for name in ("dependencies", "dev")]
    wanted = {name_of(one) for found in lists if found for one in re.findall(r'"([A-Za-z0-9_-]+)[^"]*"', found[1])}
    assert wanted - {"lbs"} <= pins("\n".join(lock.read_text() for lock in LOCKS)).keys(), "run make lock"
    assert "torch" in wanted


def test_a_file_that_is_another_one_is_not_installed(tmp_path: Path) -> None:
    wheel = tmp_path / "one_thing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one_thing.py", "")
        archive.writestr("one_thing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: one-thing\nVersion: 1\n")
        archive.writestr(
            "one_thing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("one_thing-1.dist-info/RECORD", "")
    (tmp_path / "locks").mkdir()
    shutil.copy(ROOT / "constraints.txt", tmp_path)

    def install(digest: str, **extra: str) -> tuple[int, str, bool]:
        (tmp_path / "locks/one.txt").write_text(f"# one\none-thing==1 \\\n    --hash=sha256:{digest}\n")
        target = tmp_path / f"target{len(list(tmp_path.iterdir()))}"
        places = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_TARGET": str(target)}
        command = [str(ROOT / "tools/install_locked.sh"), sys.executable, "one"]
        environment = {**os.environ, **places, "PIP_CONFIG_FILE": os.devnull, **extra}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr, (target / "one_thing.py").exists()

    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert install(right)[::2] == (0, True)
    code, said, there = install("0" * 64)
    assert (code, there) == (1, False)
    assert "what pip gets is not what locks/one.txt names" in said
    code, said, there = install("0" * 64, LBS_LOCK="no")
    assert (code, there) == (0, True)
    assert "without comparing hashes" in said
