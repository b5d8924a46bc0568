"""setup.py when something is missing: the installation goes on, and the report says why and how to mend it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from project_setup import ROOT, load_setup

from lbs_kernels import extension

if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)


def build(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A build into `folder` in an environment of its own, and its report (empty if none was written)."""
    kept = {key: os.environ[key] for key in ("HOME", "PYTHONPATH", "SYSTEMROOT") if key in os.environ}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
    report = folder / "lbs_kernels" / "_build_report.json"
    return done, json.loads(report.read_text()) if report.exists() else {}


def test_no_compiler(tmp_path: Path) -> None:
    done, report = build(tmp_path, PATH=str(tmp_path), NVCC="")
    assert done.returncode == 0, done.stderr
    assert report["cpu"] == {
        "built": False,
        "reason": "no C++17 compiler was found",
        "fix": "apt-get install g++   (then: pip install -e .)",
        "compiler": "",
        "details": {},
    }
    assert "lbs_kernels._cpu is left out: no C++17 compiler was found" in done.stderr
    assert report["c"] == report["cpu"]
    assert not report["cuda"]["built"]
    assert report["cuda"]["reason"]


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'main.cpp:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    done, report = build(tmp_path, PATH=os.environ["PATH"], CXX=str(broken), LBS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not report["cpu"]["built"]
    assert report["cpu"]["reason"].startswith("the compiler failed: ")
    assert "error: out of ideas" in report["cpu"]["reason"]
    assert "error: out of ideas" in report["c"]["reason"]
    assert not (tmp_path / "lbs_kernels" / "lbs.h").exists()
    assert report["cpu"]["details"]["amx"].startswith("left out")
    assert report["cuda"]["reason"] == "LBS_BUILD_CUDA=0 left it out"


def test_a_part_that_was_insisted_on_fails_loudly(tmp_path: Path) -> None:
    done, _ = build(tmp_path, PATH=str(tmp_path), LBS_BUILD_CPU="1", LBS_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "lbs_kernels._cpu: no C++17 compiler was found\nfix: apt-get install g++" in done.stderr


def test_a_stale_module_does_not_stay(tmp_path: Path) -> None:
    module = tmp_path / "lbs_kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.parent.mkdir()
    module.write_bytes(b"old")
    c_library = [module.with_name(name) for name in ("liblbs.so", "lbs.h")]
    for path in c_library:
        path.write_bytes(b"old")
    done, report = build(tmp_path, PATH=os.environ["PATH"], LBS_BUILD_CPU="0", LBS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert report["cpu"]["reason"] == "LBS_BUILD_CPU=0 left it out"
    assert not any(path.exists() for path in (module, *c_library))


def test_the_header_of_the_c_library_is_put_in_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads the one before it goes on reading that."""
    setup = load_setup(monkeypatch)
    library, header, read = (tmp_path / name for name in ("liblbs.so", "lbs.h", "read"))
    header.write_text("old")
    os.link(header, read)
    setup.BuildNative.conclude(None, "c", library, setup.Part(built=True), None)
    assert header.read_bytes() == (ROOT / "csrc" / "include" / "lbs.h").read_bytes()
    assert read.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lbs.h", "read"]


def test_modules_are_left_as_they_are_where_somebody_else_builds_them(tmp_path: Path) -> None:
    module = tmp_path / "lbs_kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.parent.mkdir()
    module.write_bytes(b"new")
    done, report = build(tmp_path, PATH=os.environ["PATH"], LBS_BUILD_NATIVE="0", LBS_BUILD_CPU="1")
    assert done.returncode == 0, done.stderr
    assert (report, module.read_bytes()) == ({}, b"new")


def test_the_module_of_the_tests_is_part_of_no_installation(tmp_path: Path) -> None:
    done, report = build(tmp_path, PATH=os.environ["PATH"], LBS_BUILD_CPU="0", LBS_BUILD_CUDA="0", LBS_BUILD_TESTS="1")
    assert done.returncode == 0, done.stderr
    assert sorted(report) == ["c", "cpu", "cuda"]
    assert report["c"]["reason"] == "LBS_BUILD_C=0 left it out"
    assert [path.name for path in (tmp_path / "lbs_kernels").iterdir()] == ["_build_report.json"]
    assert [path.name for path in (tmp_path / "temp").iterdir()] == ["build.ninja"]
    assert "tests.native" not in (tmp_path / "temp" / "build.ninja").read_text()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_modules_are_hardened(name: str) -> None:
    """Stack protector, all symbols bound when it is loaded and their table read-only then, no code on the stack."""
    module = getattr(extension, name)
    if module is None or shutil.which("readelf") is None:
        pytest.skip(f"needs the {name} module and readelf")
    command = ["readelf", "--dynamic", "--program-headers", "--dyn-syms", "--wide", module.__file__]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "BIND_NOW" in words
    assert "GNU_RELRO" in words
    assert [line.split()[-2] for line in words.splitlines() if "GNU_STACK" in line] == ["RW"]
    assert "__stack_chk_fail" in words


def test_torch_stands_in_for_pybind11(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup(monkeypatch)
    monkeypatch.setitem(sys.modules, "pybind11", None)
    folder = Path(setup.find_pybind11())
    assert (folder / "pybind11" / "pybind11.h").exists()
    assert folder.parent.name == "torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup.BuildFailure, match=r"pybind11 is missing .*, and torch's copy of its headers too"):
        setup.find_pybind11()


# A compiler that copies what it is given, writes what it read as make would, and counts its runs. As a linker it writes
# half its library; the word `die` in an object then kills it, as a full machine would.
COPY = """
import os, signal, sys
from pathlib import Path
what, out, *sources = sys.argv[1:]
with open("{log}", "a") as log:
    log.write(Path(out).name + "\\n")
text = "".join(Path(source).read_text() for source in sources)
if "wrong" in text:
    sys.exit("error: a wrong word")
if what == "compile":
    headers = sorted(Path(sources[0]).parent.glob("*.h"))
    Path(out + ".d").write_text(out + ": " + " \\\\\\n ".join(str(path) for path in (*sources, *headers)) + "\\n")
if what == "link":
    Path(out).write_text(text[:1])
    if "die" in text:
        os.kill(os.getpid(), signal.SIGKILL)
Path(out).write_text(text)
"""


class Project:
    """Two sources, a header, and a library made of them by the compiler above; `runs` is what it was run for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool) -> None:
        self.setup = load_setup(monkeypatch)
        if ninja and self.setup.find_ninja() is None:
            pytest.skip("ninja is not installed")
        if not ninja:
            monkeypatch.setattr(self.setup, "find_ninja", lambda: None)
        self.sources, self.folder, self.log = folder / "src", folder / "work", folder / "log"
        monkeypatch.setattr(self.setup, "ROOT", self.sources)
        (self.sources / "a").mkdir(parents=True)
        (self.sources / "a" / "one.cpp").write_text("1")
        (self.sources / "a" / "one.h").write_text("")
        (self.sources / "two.cpp").write_text("2")
        (folder / "copy.py").write_text(COPY.replace("{log}", str(self.log)))
        self.copy = [sys.executable, str(folder / "copy.py")]
        self.library = folder / "library"

    def build(self, *flags: str) -> list[str]:
        """Builds; the names that were made, sorted."""
        self.log.write_text("")
        for failure in self.build_libraries({self.library: ("a/one.cpp", "two.cpp")}, *flags).values():
            raise failure
        return sorted(self.log.read_text().split())

    def build_libraries(self, libraries: dict[Path, tuple[str, ...]], *flags: str) -> dict[Path, Exception]:
        """What failed of the libraries, each made of its sources."""
        file = self.setup.NinjaFile(self.folder)
        file.rule("cxx", [*self.copy, "compile", "$out", "$in", *flags])
        for library, sources in libraries.items():
            objects = [file.compile("cxx", self.sources / source, []) for source in sources]
            file.link(library, objects, [*self.copy, "link", "$out", "$in"])
        return dict(file.build())


@pytest.fixture(params=[True, False], ids=["ninja", "no ninja"])
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Project:
    return Project(tmp_path, monkeypatch, request.param)


def touch(path: Path, text: str) -> None:
    """`path` with another text, at a time the file system tells from the last."""
    time.sleep(0.02)
    path.write_text(text)


def test_a_second_build_makes_only_what_changed(project: Project) -> None:
    assert project.build() == ["a.one.cpp.o", "library.part", "two.cpp.o"]
    assert project.library.read_text() == "12"
    assert project.build() == []
    touch(project.sources / "two.cpp", "3")
    assert project.build() == ["library.part", "two.cpp.o"]
    assert project.library.read_text() == "13"
    touch(project.sources / "a" / "one.h", "a header")
    assert project.build() == ["a.one.cpp.o", "library.part"]
    project.library.unlink()
    assert project.build() == ["library.part"]
    extra = project.sources / "more.txt"
    extra.write_text("+")
    assert project.build(str(extra)) == ["a.one.cpp.o", "library.part", "two.cpp.o"], "another command"
    assert project.library.read_text() == "1+3+"


def test_a_linker_that_is_killed_leaves_the_old_library(project: Project) -> None:
    project.build()
    touch(project.sources / "two.cpp", "die")
    with pytest.raises(project.setup.BuildFailure):
        project.build()
    assert project.library.read_text() == "12"
    with pytest.raises(project.setup.BuildFailure):
        project.build()  # and what was half made is not taken for made
    touch(project.sources / "two.cpp", "3")
    assert project.build() == ["library.part", "two.cpp.o"]
    assert project.library.read_text() == "13"
    assert not project.setup.partial(project.library).exists()


def test_the_compilers_words_are_told(project: Project) -> None:
    touch(project.sources / "two.cpp", "wrong")
    with pytest.raises(project.setup.BuildFailure, match=r"the compiler failed: error: a wrong word$"):
        project.build()
    touch(project.sources / "two.cpp", "2")
    project.build()
    assert project.library.read_text() == "12"


def test_one_library_that_fails_does_not_stop_the_others(project: Project) -> None:
    touch(project.sources / "two.cpp", "wrong")
    libraries = {project.folder / name: (f"{name}.cpp",) for name in ("two", "three")}
    (project.sources / "three.cpp").write_text("3")
    failures = project.build_libraries({project.library: ("a/one.cpp",), **libraries})
    assert {path.name: str(failure) for path, failure in failures.items()} == {
        "two": "the compiler failed: error: a wrong word"
    }
    assert project.library.read_text() == "1"
    assert (project.folder / "three").read_text() == "3"


def test_the_longest_compilations_begin_first(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project.setup, "LONGEST", ("two.cpp.o",))
    monkeypatch.setattr(project.setup.os, "cpu_count", lambda: 1)
    if project.setup.find_ninja() is not None:
        one = project.folder.parent / "one_at_once"
        one.write_text(f'#!/bin/sh\nexec {project.setup.find_ninja()} -j1 "$@"\n')
        one.chmod(0o755)
        monkeypatch.setattr(project.setup, "find_ninja", lambda: str(one))
    project.log.write_text("")
    project.build_libraries({project.library: ("a/one.cpp", "two.cpp")})
    assert project.log.read_text().split() == ["two.cpp.o", "a.one.cpp.o", "library.part"]
