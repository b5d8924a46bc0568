"""liblbs in tests: the library that was built, and programs of its sources for emulated processors and sanitizers."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from project_setup import ROOT, load_setup
from torch import Tensor

PACKAGE = ROOT / "lbs_kernels"  # where the build leaves liblbs.so and lbs.h
HEADER = ROOT / "csrc" / "include" / "lbs.h"
JUDGE = ROOT / "tests" / "native" / "c" / "judge.c"
WARNINGS = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
# What lbs.h calls its errors.
STATUS = {int(value): name for name, value in re.findall(r"^    LBS_(\w+) = (\d),? +/\*", HEADER.read_text(), re.M)}
STATUS[0] = "OK"


@dataclass(frozen=True)
class Case:
    """A file, and the images to run where it opens."""

    net: Path
    images: Tensor
    threads: int = 1
    channels_last: bool = False


@dataclass(frozen=True)
class Verdict:
    """The status of lbs.h without its prefix, the words of an error, and the bytes of the outputs."""

    status: str
    words: str
    output: bytes


@dataclass(frozen=True)
class Judge:
    """tests/native/c/judge.c as a program, run in a folder of its own."""

    program: Path
    emulator: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, folder: Path, cases: Iterable[Case], megabytes: int | None = None) -> list[Verdict]:
        """What comes of each case. megabytes: of address space that the program has."""
        lines, outputs = [], []
        for number, case in enumerate(cases):
            images, output = folder / f"{number}.images", folder / f"{number}.output"
            images.write_bytes(raw(case.images, case.channels_last))
            layout = int(case.channels_last)
            lines.append(f"{case.net} {images} {output} {len(case.images)} {case.threads} {layout}\n")
            outputs.append(output)
        size = (megabytes or 0) << 20
        limit = partial(resource.setrlimit, resource.RLIMIT_AS, (size, size)) if megabytes else None
        done = subprocess.run(
            [*self.emulator, str(self.program)],
            input="".join(lines),
            capture_output=True,
            text=True,
            timeout=1200,
            env=self.environment,
            preexec_fn=limit,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        found = [line.split(" ", 1) for line in done.stdout.splitlines()]
        assert len(found) == len(lines)
        read = [output.read_bytes() if output.exists() else b"" for output in outputs]
        return [Verdict(STATUS[int(status)], words, one) for (status, words), one in zip(found, read, strict=True)]


def raw(x: Tensor, channels_last: bool = False) -> bytes:
    """The bytes of a tensor, [N, H, W, C] where `channels_last`."""
    x = x.permute(0, 2, 3, 1) if channels_last else x
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def need_library() -> None:
    """Skips where liblbs was not built, or there is no C compiler."""
    if not (PACKAGE / "liblbs.so").exists():
        pytest.skip("liblbs.so was not built: lbs_kernels/_build_report.json says why")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")


def compile_c(source: Path, target: Path) -> Path:
    """A C program beside the library that was built, as a user compiles one."""
    need_library()
    place = f"-I{PACKAGE}", f"-L{PACKAGE}", "-llbs", f"-Wl,-rpath,{PACKAGE}"
    subprocess.run(["cc", *WARNINGS, str(source), "-o", str(target), *place], check=True)
    return target


def build(name: str, monkeypatch: pytest.MonkeyPatch, compiler: str, flags: str, sanitized: bool = False) -> Path:
    """judge with the library inside, for the processors of `compiler` and with more `flags`; kept in build/.

    sanitized: all but the kernels is, of which there are the portable ones. Skips where there is no such compiler.
    """
    setup = load_setup(monkeypatch)
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("LBS_CXXFLAGS", flags)
    part, ninja = setup.Part(), setup.NinjaFile(ROOT / "build" / "c" / name)
    if sanitized:
        monkeypatch.setattr(setup, "takes_flags", lambda compiler, flags: False)
        kernels = setup.SOURCES / "isa" / "portable.cpp"
        compile_one = ninja.compile
        plain = {kernels: ["-fno-sanitize=all"]}
        ninja.compile = lambda rule, source, more: compile_one(rule, source, [*more, *plain.get(source, [])])
    link = [word for word in setup.cxx_rule(ninja, "cxx", part, for_python=False) if word != "-shared"]
    cc = [compiler.replace("g++", "gcc"), "-MMD", "-MF", "$out.d", *WARNINGS, *flags.split(), f"-I{HEADER.parent}"]
    ninja.rule("cc", [*cc, "-c", "$in", "-o", "$out"])
    objects = [ninja.compile("cc", JUDGE, []), ninja.compile("cxx", setup.SOURCES / "bindings_c.cpp", [])]
    program: Path = ninja.folder / "judge"
    ninja.link(program, [*objects, *setup.cpu_objects(ninja, "cxx", part)], link)
    for failure in ninja.build().values():
        raise failure
    return program
