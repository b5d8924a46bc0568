"""Builds the CUDA module beforehand for a machine without nvcc, for its Python, so that it is known again there.

    python benchmarks/gpu_carry.py --python PYTHON3.12 [--archs 90a]

PYTHON is an interpreter of the version that runs there, with its headers, setuptools and pybind11:

    python3.12 -m venv DIR; DIR/bin/pip install setuptools pybind11
    python benchmarks/gpu_carry.py --python DIR/bin/python

It writes lbs_kernels._cuda for that Python, which no other loads, and beside it `_carried.json`: what it was built
from. Both are ignored by git; their names are printed, to be copied with the tree. `benchmarks/gpu_suite.py` builds
nothing where they belong to its sources, and says why where they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lbs_kernels"
NOTE = PACKAGE / "_carried.json"
LOAD = """
import sys
from pathlib import Path
from lbs_kernels import extension
print(extension.cuda_reason or f"{extension.cuda.__file__} is loaded instead")
sys.exit(extension.cuda is None or Path(extension.cuda.__file__).name != sys.argv[1])
"""


def sources() -> str:
    """A digest of all that the module is built from."""
    found = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def build(python: str, archs: str) -> Path:
    """The module for another Python, in the package; raises SystemExit with the compiler's words."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "LBS_CUDA_ARCHS": archs, "LBS_BUILD_CPU": "0", "LBS_BUILD_CUDA": "1"}
        command = [python, "setup.py", "-q", "build_ext", "-b", scratch]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        made = list(Path(scratch).rglob("_cuda.*.so"))
        if done.returncode or not made:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        target = PACKAGE / made[0].name
        shutil.copyfile(made[0], target)
    NOTE.write_text(json.dumps({"sources": sources(), "file": target.name, "archs": archs}, indent=1) + "\n")
    return target


def why_not() -> str:
    """Why no module that was carried serves here; empty where one does."""
    if not NOTE.exists():
        return "none was carried: benchmarks/gpu_carry.py makes one"
    note = json.loads(NOTE.read_text())
    if note["sources"] != sources():
        return f"{note['file']} was built from other sources; make it again with benchmarks/gpu_carry.py"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, note["file"]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"{note['file']} does not load: {(done.stdout + done.stderr).strip()[-500:]}"


def main(argv: list[str] | None = None) -> int:
    """Build, and name the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter of the version that runs there")
    parser.add_argument("--archs", default="90a", help="as LBS_CUDA_ARCHS of setup.py (default: %(default)s)")
    args = parser.parse_args(argv)
    target = build(args.python, args.archs)
    for path in (target, NOTE):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
