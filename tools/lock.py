"""Writes locks/*.txt: what `make` installs, every package pinned with the hashes of all its files.

    make lock        after a change of constraints.txt or of the dependencies in pyproject.toml

build.txt   what the native build takes              torch.txt       torch as PyPI has it, with what it takes for CUDA
dev.txt     what `make test` takes but for torch     torch-cpu.txt   torch for processors alone, of PyTorch's own index
audit.txt   what `make audit` takes

Versions are those of constraints.txt, hashes those PyPI tells of every wheel and source archive, so that one lock
serves every platform and Python. Only those of torch-cpu.txt are of wheels that were seen: of the one that pip gets on
the machine this runs on, and of those that were there before while the version stays.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
OLDEST = "3.10"  # requires-python of pyproject.toml
TOOLS = {"build": ("setuptools", "pybind11", "ninja"), "audit": ("pip-audit",)}
OF_TORCH = re.compile(r"torch==|nvidia-|cuda-")
HEAD = "# Written by tools/lock.py (make lock), not by hand: pins with the hashes of every file of a release.\n"
Entry = tuple[str, list[str]]  # requirement with its marker, hashes


def main() -> int:
    """Write every lock."""
    LOCKS.mkdir(exist_ok=True)
    for name, packages in TOOLS.items():
        write(name, compiled(*packages))
    entries = compiled("--extra", "dev", "pyproject.toml")
    write("dev", [entry for entry in entries if not OF_TORCH.match(entry[0])])
    write("torch", [entry for entry in entries if OF_TORCH.match(entry[0])])
    write("torch-cpu", for_processors(next(pin for pin, _ in entries if pin.startswith("torch=="))))
    return 0


def compiled(*what: str) -> list[Entry]:
    """Everything that packages, or the project with an extra, need, on any platform."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        if not what[0].startswith("--"):
            file.write("\n".join(what))
            file.flush()
            what = (file.name,)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--python-version", OLDEST, "--constraint", "constraints.txt"]
        done = subprocess.run([*command, *what], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"uv cannot lock {' '.join(what)}: {done.stderr}")
    return entries_of(done.stdout)


def entries_of(text: str) -> list[Entry]:
    """The pins of a lock: `name==version ; marker` and the hashes of each."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.partition(" --hash=")[0].strip(), re.findall(r" --hash=(\S+)", line)) for line in lines]


def for_processors(pin: str) -> list[Entry]:
    """torch without CUDA, with the hashes of wheels that were seen: known ones, and that of this machine's pip."""
    path = LOCKS / "torch-cpu.txt"
    known = dict(entries_of(path.read_text())) if path.exists() else {}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run([*command, "--report", "-", f"{pin}+cpu"], capture_output=True, text=True, check=False)
    here = json.loads(done.stdout)["install"] if done.returncode == 0 else []
    seen = [f"sha256:{found['download_info']['archive_info']['hashes']['sha256']}" for found in here]
    if not seen:
        print(f"pip has no {pin}+cpu here; hashes of its wheels stay those that were known")
    return [(f"{pin}+cpu", sorted({*known.get(f"{pin}+cpu", []), *seen}))]


def write(name: str, entries: list[Entry]) -> None:
    """Write a lock."""
    pins = [" \\\n".join([pin, *(f"    --hash={digest}" for digest in hashes)]) for pin, hashes in entries]
    (LOCKS / f"{name}.txt").write_text(HEAD + "\n".join(pins) + "\n")
    print(f"locks/{name}.txt: {len(entries)} pins, {sum(len(hashes) for _, hashes in entries)} hashes")


if __name__ == "__main__":
    sys.exit(main())
