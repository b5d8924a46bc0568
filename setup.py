"""Builds the native parts; all metadata is in pyproject.toml.

`lbs_kernels._cpu` is built wherever a C++17 compiler is found, `lbs_kernels._cuda` where nvcc is. Neither can break an
installation: what failed, why, and the command that mends it go to lbs_kernels/_build_report.json (`lbs doctor`
shows it). Environment:

    LBS_BUILD_CPU=0|1|auto       0 leaves the C++ module out, 1 makes its failure an error
    LBS_BUILD_CUDA=0|1|auto      the same for the CUDA module; auto (the default) records a failure and goes on
    LBS_CUDA_ARCHS="80;90a"      the GPU architectures compiled for
    LBS_CXXFLAGS                 more flags for the C++ compiler (a sanitizer, say)
    CXX, NVCC                    the compilers
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
# -ffp-contract=off: a fused multiply-add happens only where the format says so.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512vnni": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"],
}
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512vnni"], "-mamx-tile", "-mamx-int8"]
ISA_FILES = {
    "avx2": ["isa/avx2.cpp"],
    "avx512vnni": ["isa/avx512vnni.cpp", "isa/amx_model.cpp"],
    "amx": ["isa/amx.cpp"],
}


class BuildFailure(Exception):
    """A part that cannot be built: the reason and the command that mends it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass
class Part:
    """What became of one module, as the report says it."""

    built: bool = False
    reason: str = ""
    fix: str = ""
    compiler: str = ""
    details: dict[str, str] = field(default_factory=dict)


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++. Raises BuildFailure."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildFailure("no C++17 compiler was found", "apt-get install g++   (then: pip install -e .)")


def find_nvcc() -> str:
    """nvcc from $NVCC, the path, or /usr/local/cuda. Raises BuildFailure."""
    for name in (os.environ.get("NVCC", ""), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return str(shutil.which(name))
    raise BuildFailure("nvcc was not found", "install the CUDA toolkit, then: LBS_BUILD_CUDA=1 pip install -e .")


def takes_flags(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler accepts `flags`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
        command = [*compiler.split(), "-std=c++17", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def version_line(compiler: str) -> str:
    """The line of `compiler --version` that names the version."""
    lines = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.splitlines()
    release = [line for line in lines if "release" in line]
    return (release or lines or ["unknown"])[0]


def include_flags() -> list[str]:
    """Header folders: ours, pybind11's and Python's. Raises BuildFailure where one is missing."""
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise BuildFailure(f"Python.h is not in {python}", "apt-get install python3-dev   (then: pip install -e .)")
    return [f"-I{SOURCES}", "-isystem", find_pybind11(), "-isystem", python]


def find_pybind11() -> str:
    """The folder of pybind11's headers: of the package, else those that torch carries. Raises BuildFailure."""
    try:
        import pybind11
    except ImportError as error:
        found = importlib.util.find_spec("torch")  # looked for, not imported: the build needs no torch
        for folder in found.submodule_search_locations or () if found else ():
            if (Path(folder) / "include" / "pybind11" / "pybind11.h").exists():
                return str(Path(folder) / "include")
        raise BuildFailure(
            f"pybind11 is missing ({error}), and torch's copy of its headers too", "pip install pybind11 ninja"
        ) from error
    return str(pybind11.get_include())


def find_ninja() -> str | None:
    """The ninja program, or None."""
    beside = Path(sys.executable).parent / "ninja"
    if beside.exists():
        return str(beside)
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def escape(words: list[str]) -> str:
    """A command line for a ninja file."""
    return " ".join(word.replace("$", "$$").replace(" ", "\\ ") for word in words)


class NinjaFile:
    """Objects and one shared library, written as build.ninja and built in parallel.

    Where there is no ninja the same commands run as they are, as many at once as there are processors, and those whose
    results are newer than all they were made from are left out, as ninja leaves them out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8"]
        self.rules: dict[str, list[str]] = {}
        self.objects: list[str] = []
        self.compilations: list[Command] = []
        self.linking: list[Command] = []
        folder.mkdir(parents=True, exist_ok=True)

    def rule(self, name: str, command: list[str]) -> None:
        """A rule whose command uses $in, $out and $flags, and writes what it read to $out.d."""
        self.rules[name] = command
        self.lines += [
            f"rule {name}",
            f"  command = {escape(command).replace('$$', '$')}",
            f"  description = {name} $in",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def compile(self, rule: str, source: Path, flags: list[str]) -> None:
        """One object file."""
        target = str(source.relative_to(SOURCES)).replace("/", ".") + ".o"
        self.objects.append(target)
        words = fill(self.rules[rule], [str(source)], target, flags)
        self.compilations.append(Command(self.folder, words, self.folder / target, self.folder / target))
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {escape(flags)}"]

    def link(self, library: Path, command: list[str]) -> None:
        """The library from all objects so far, by a command that uses $in and $out.

        It is linked beside its place and renamed: whoever stops the linker never leaves half a module to be imported.
        """
        part = partial(library)
        words = fill(command, self.objects, str(part), [])
        self.linking = [Command(self.folder, words, part, library, [self.folder / name for name in self.objects])]
        text = escape(command).replace("$$", "$").replace("$out", "$out.part")
        self.lines += ["rule link", f"  command = {text} && mv -f $out.part $out", "  description = link $out"]
        self.lines += [f"build {library}: link {' '.join(self.objects)}"]

    def build(self) -> None:
        """Compile and link. Raises BuildFailure with the compiler's last words."""
        ninja = find_ninja()
        if ninja is not None:
            (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
            judge([subprocess.run([ninja], capture_output=True, text=True, cwd=self.folder)])
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for commands in (self.compilations, self.linking):
                judge(list(pool.map(Command.run, [command for command in commands if not command.done()])))


@dataclass
class Command:
    """One command run without ninja: it writes `output`, which becomes `target` once it has succeeded.

    `target.made` is what it was made by, begun before the command and renamed after it: a source that changes
    meanwhile is newer, and a command that was killed has left none.
    """

    folder: Path
    words: list[str]
    output: Path
    target: Path
    sources: list[Path] | None = None  # None: what the compiler wrote to target.d

    def done(self) -> bool:
        """Whether `target` was made by this command from sources that have not changed since."""
        try:
            made = self.made.stat().st_mtime_ns
            sources = self.sources if self.sources is not None else self.read_sources()
            same = self.made.read_text() == "\n".join(self.words)
            return same and self.target.exists() and all(source.stat().st_mtime_ns <= made for source in sources)
        except OSError:
            return False

    def run(self) -> subprocess.CompletedProcess[str]:
        """Runs it; only a success is kept."""
        self.made.unlink(missing_ok=True)
        making = self.made.with_suffix(".making")
        making.write_text("\n".join(self.words))
        done = subprocess.run(self.words, capture_output=True, text=True, cwd=self.folder)
        if done.returncode == 0:
            self.output.replace(self.target)
            making.replace(self.made)
        return done

    @property
    def made(self) -> Path:
        return self.folder / f"{self.target.name}.made"

    def read_sources(self) -> list[Path]:
        """The files named in target.d, in the words of make: `target: file file`, lines joined by a backslash."""
        text = self.target.with_name(f"{self.target.name}.d").read_text().replace("\\\n", " ")
        names = text.partition(": ")[2].replace("\\ ", "\0").split()
        return [self.folder / name.replace("\0", " ") for name in names]


def fill(command: list[str], sources: list[str], target: str, flags: list[str]) -> list[str]:
    """The words of one command, $in, $out and $flags filled in."""
    words: list[str] = []
    for word in command:
        if word in ("$in", "$flags"):
            words += sources if word == "$in" else flags
        else:
            words.append(word.replace("$out", target))
    return words


def partial(library: Path) -> Path:
    """Where the library is linked to before it is renamed; no name that Python would import."""
    return library.with_name(f"{library.name}.part")


def judge(runs: list[subprocess.CompletedProcess[str]]) -> None:
    """Raises BuildFailure with the errors of the runs that failed."""
    lines = [line for run in runs if run.returncode for line in (run.stdout + run.stderr).splitlines()]
    if any(run.returncode for run in runs):
        told = [line for line in lines if "error" in line or "fatal" in line] or lines
        words = "the compiler failed: " + "\n".join(told[:8])
        raise BuildFailure(words, "mend what it names, then: pip install -e .")


def build_cpu(library: Path, work: Path, part: Part) -> None:
    """lbs_kernels._cpu: one object per instruction set, each with its own flags."""
    compiler = find_compiler()
    part.compiler = f"{compiler}: {version_line(compiler)}"
    flags = [*CXX_FLAGS, *os.environ.get("LBS_CXXFLAGS", "").split()]
    includes = include_flags()
    isas = {isa: takes_flags(compiler, isa_flags) for isa, isa_flags in ISA_FLAGS.items()}
    part.details = {isa: "built" if ok else "left out: the compiler refuses its flags" for isa, ok in isas.items()}
    defines = [f"-DLBS_BUILD_{isa.upper()}" for isa, ok in isas.items() if ok]
    special = {SOURCES / name: isa for isa, names in ISA_FILES.items() for name in names}

    ninja = NinjaFile(work)
    ninja.rule(
        "cxx",
        [*compiler.split(), "-MMD", "-MF", "$out.d", *flags, *includes, *defines, "$flags", "-c", "$in", "-o", "$out"],
    )
    for source in sorted(SOURCES.rglob("*.cpp")):
        if source.name.endswith("_cuda.cpp"):
            continue
        isa = special.get(source)
        if isa is None or isas[isa]:
            ninja.compile("cxx", source, ISA_FLAGS[isa] if isa else [])
    last = ["-pthread", *os.environ.get("LBS_CXXFLAGS", "").split()]
    ninja.link(library, [*compiler.split(), "-shared", "$in", "-o", "$out", *last])
    ninja.build()


def build_cuda(library: Path, work: Path, part: Part) -> None:
    """lbs_kernels._cuda: device code for the architectures of LBS_CUDA_ARCHS, the CUDA runtime linked in statically."""
    nvcc = find_nvcc()
    part.compiler = f"{nvcc}: {version_line(nvcc)}"
    archs = os.environ.get("LBS_CUDA_ARCHS", "80;90a").split(";")
    codes = [word for arch in archs for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    host = ["-ccbin", find_compiler().split()[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    host += ["-std=c++17", "-O3", "-fmad=false"]
    ninja = NinjaFile(work)
    includes = include_flags()
    ninja.rule("nvcc", [nvcc, "-MMD", "-MF", "$out.d", *host, *includes, *codes, "$flags", "-c", "$in", "-o", "$out"])
    for source in sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*_cuda.cpp")]):
        ninja.compile("nvcc", source, [])
    ninja.link(library, [nvcc, *host, "-shared", "-cudart", "static", "$in", "-o", "$out"])
    ninja.build()
    part.details = {f"sm_{arch}": "built" for arch in archs}


class BuildNative(build_ext):
    """Builds both modules into the package folder of the target and writes the report beside them."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / "lbs_kernels"
        target.mkdir(parents=True, exist_ok=True)
        report = {}
        for name, build in (("cpu", build_cpu), ("cuda", build_cuda)):
            library = target / f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            report[name] = self.build_part(name, build, library)
        written = partial(target / "_build_report.json")
        written.write_text(json.dumps(report, indent=2) + "\n")
        written.replace(target / "_build_report.json")

    def build_part(self, name: str, build: object, library: Path) -> dict[str, object]:
        """Builds one module; a failure becomes part of the report unless the user insisted."""
        part = Part()
        wish = os.environ.get(f"LBS_BUILD_{name.upper()}", "auto")
        try:
            if wish == "0":
                raise BuildFailure(
                    f"LBS_BUILD_{name.upper()}=0 left it out", f"LBS_BUILD_{name.upper()}=1 pip install -e ."
                )
            build(library, Path(self.build_temp).resolve() / name, part)  # type: ignore[operator]
            part.built = True
        except BuildFailure as failure:
            part.reason, part.fix = str(failure), failure.fix
            library.unlink(missing_ok=True)  # a stale module is worse than none
            partial(library).unlink(missing_ok=True)
            if wish == "1":
                raise SystemExit(f"lbs_kernels._{name}: {failure}\nfix: {failure.fix}") from failure
            print(f"lbs_kernels._{name} is left out: {failure}\nfix: {failure.fix}", file=sys.stderr)
        return asdict(part)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "lbs_kernels"
        return [str(path) for path in (*folder.glob("_c*.so"), *folder.glob("_build_report.json"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# Named so that setuptools runs build_ext and marks the wheel as native; the sources are found by BuildNative.
setup(ext_modules=[Extension("lbs_kernels._cpu", sources=[])], cmdclass={"build_ext": BuildNative})
