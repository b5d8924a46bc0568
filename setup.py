"""Builds the native parts; all metadata is in pyproject.toml.

`lbs_kernels._cpu` and the C library, lbs_kernels/liblbs.so with lbs.h beside it (docs/c.md), are built wherever a C++17
compiler is found, `lbs_kernels._cuda` where nvcc is. None can break an installation: what failed, why, and the command
that mends it go to lbs_kernels/_build_report.json (`lbs doctor` shows it). `cuda_model` (tests/native) serves tests: it
is built in place only and part of no wheel. What compilers warn of is shown, then one line says what was made.
Environment:

    LBS_BUILD_CPU=0|1|auto       0 leaves the C++ module out, 1 makes its failure an error
    LBS_BUILD_C=0|1|auto         the same for the C library; what LBS_BUILD_CPU says unless it is set
    LBS_BUILD_CUDA=0|1|auto      the same for the CUDA module; auto (the default) records a failure and goes on
    LBS_BUILD_TESTS=0|1|auto     the same for the module of the tests; 0 is its default
    LBS_BUILD_NATIVE=0           leaves all modules as they are: somebody else builds them meanwhile, as make does
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
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
TEST_SOURCES = ROOT / "tests" / "native"
# -ffp-contract=off: a fused multiply-add happens only where the format says so.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Modules that read a stranger's file end where their stack, or a buffer of known size, would be overwritten, and where
# functions lie cannot be written to once they are loaded. ResNet-20 at batch 1 takes 102 us either way (Zen 5).
HARDENED = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
HARDENED_LINK = [f"-Wl,-z,{word}" for word in ("relro", "now", "noexecstack") if sys.platform.startswith("linux")]
# Its threads may still spin when a program unloads the library: it stays.
C_LINK = [f"-Wl,--version-script={SOURCES / 'include' / 'lbs.map'}", "-Wl,-soname,liblbs.so", "-Wl,-z,nodelete"]
C_LINK = C_LINK if sys.platform.startswith("linux") else []
MADE = ("_c*.so", "liblbs.so", "lbs.h", "_build_report.json")  # of lbs_kernels
ISA_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"]}
ISA_FLAGS["avx512vnni"] = [f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "vnni")] + ISA_FLAGS["avx2"]
# GCC 12's own AVX-512 headers read what they did not set: 62,000 lines of warnings for one file.
ISA_FLAGS["avx512vnni"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512vnni"], "-mamx-tile", "-mamx-int8"]
ISA_FLAGS["avxvnni"] = [*ISA_FLAGS["avx2"], "-mavxvnni"]
ISA_FLAGS["neon"] = ["-march=armv8.2-a+dotprod"]
ISA_FLAGS["neon_i8mm"] = ["-march=armv8.2-a+dotprod+i8mm"]
# No other source has flags of its own: whatever runs before the processor was asked is compiled for any of its kind.
ISA_FILES = {
    "avx2": ["isa/avx2.cpp"],
    "avxvnni": ["isa/avxvnni.cpp"],
    "avx512vnni": ["isa/avx512vnni.cpp", "isa/amx_model.cpp"],
    "amx": ["isa/amx.cpp"],
    "neon": ["isa/neon.cpp"],
    "neon_i8mm": ["isa/neon_i8mm.cpp"],
}
# Begun first, 27 to 9 s of a Zen 4 core each: else one processor is left with the last of them.
LONGEST = (
    "csrc.isa.portable.cpp.o",
    "csrc.onebit.onebit_cuda.cu.o",
    "csrc.s8.s8_cuda.cu.o",
    "csrc.bindings.cpp.o",
    "csrc.bindings_cuda.cpp.o",
)


STATUS = "| "  # in front of what ninja says itself
Runs = dict[Path, list["subprocess.CompletedProcess[str]"]]  # by library: the commands that were run for it


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
        arm = "#if defined(__aarch64__)\n#include <arm_neon.h>\n#else\n#include <immintrin.h>\n#endif\n"
        source.write_text(f"{arm}int main() {{ return 0; }}\n")
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
    """Objects and shared libraries, written as one build.ninja and built in parallel.

    Where there is no ninja the same commands run as they are, as many at once as there are processors, and those whose
    results are newer than all they were made from are left out, as ninja leaves them out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8"]
        self.rules: dict[str, list[str]] = {}
        self.compilations: dict[str, tuple[list[str], Command]] = {}  # by object: its lines, and what compiles it
        self.libraries: dict[Path, tuple[list[str], Command]] = {}  # objects, and what links them
        self.whole = subprocess.CompletedProcess[str]([], 0, "", "")  # the run of ninja for all

    def rule(self, name: str, command: list[str]) -> None:
        """A rule whose command uses $in, $out and $flags, and writes what it read to $out.d; several may ask for it."""
        if name in self.rules:
            return
        self.rules[name] = command
        text = escape(command).replace("$$", "$")
        self.lines += [f"rule {name}", f"  command = {text}", f"  description = {name} $in"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: list[str]) -> str:
        """One object file, by its name."""
        target = str(source.relative_to(ROOT)).replace("/", ".") + ".o"
        words = fill(self.rules[rule], [str(source)], target, flags)
        command = Command(self.folder, words, self.folder / target, self.folder / target)
        self.compilations[target] = [f"build {target}: {rule} {source}", f"  flags = {escape(flags)}"], command
        return target

    def link(self, library: Path, objects: list[str], command: list[str]) -> None:
        """The library from the objects, by a command that uses $in and $out.

        It is linked beside its place and renamed: whoever stops the linker never leaves half a module to be imported.
        """
        part = partial(library)
        words = fill(command, objects, str(part), [])
        made = Command(self.folder, words, part, library, [self.folder / name for name in objects])
        text = escape(command).replace("$$", "$").replace("$out", "$out.part")
        rule = f"link{len(self.libraries)}"
        self.lines += [f"rule {rule}", f"  command = {text} && mv -f $out.part $out", "  description = link $out"]
        self.lines.append(f"build {library}: {rule} {' '.join(objects)}")
        self.libraries[library] = objects, made

    def build(self) -> dict[Path, BuildFailure]:
        """Compile and link all libraries together; those that failed, each with its compiler's last words."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = {name: place for place, name in enumerate(LONGEST)}
        self.compilations = dict(sorted(self.compilations.items(), key=lambda one: rank.get(one[0], len(rank))))
        ninja, started = find_ninja(), time.monotonic()
        names = ", ".join(library.name for library in self.libraries)
        print(f"{names}: {len(self.compilations)} sources, minutes the first time ...", file=sys.stderr, flush=True)
        runs = self.run_commands() if ninja is None else self.run_ninja(ninja)
        show_warnings([self.whole, *(run for done in runs.values() for run in done)])
        failed = {library: failure_of(done) for library, done in runs.items() if any(run.returncode for run in done)}
        made = ", ".join(library.name for library in self.libraries if library not in failed)
        seconds = time.monotonic() - started
        print(f"{made or 'nothing'} built of {len(self.compilations)} sources in {seconds:.0f} s", file=sys.stderr)
        return failed

    def run_ninja(self, ninja: str) -> Runs:
        """One run of ninja for all; after a failure one for each library, which tells the words of its own alone."""
        compilations = [line for lines, _ in self.compilations.values() for line in lines]
        (self.folder / "build.ninja").write_text("\n".join([*self.lines, *compilations]) + "\n")

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "NINJA_STATUS": STATUS}
            return subprocess.run([ninja, *words], capture_output=True, text=True, cwd=self.folder, env=environment)

        self.whole = run("-k", "0")
        return {library: [run(str(library))] if self.whole.returncode else [] for library in self.libraries}

    def run_commands(self) -> Runs:
        """The same without ninja: all compilations, then the links of the libraries whose objects are there."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            each = pool.map(Command.make, [command for _, command in self.compilations.values()])
            made = dict(zip(self.compilations, each, strict=True))
        runs = {path: [run for name in names for run in made[name]] for path, (names, _) in self.libraries.items()}
        for path, (_, link) in self.libraries.items():
            if not any(run.returncode for run in runs[path]):
                runs[path] += link.make()
        return runs


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

    def make(self) -> list[subprocess.CompletedProcess[str]]:
        """Runs it, unless it is done; only a success is kept."""
        if self.done():
            return []
        self.made.unlink(missing_ok=True)
        making = self.made.with_suffix(".making")
        making.write_text("\n".join(self.words))
        done = subprocess.run(self.words, capture_output=True, text=True, cwd=self.folder)
        if done.returncode == 0:
            self.output.replace(self.target)
            making.replace(self.made)
        return [done]

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
    lists = {"$in": sources, "$flags": flags}
    return [filled for word in command for filled in lists.get(word, [word.replace("$out", target)])]


def partial(library: Path) -> Path:
    """Where the library is linked to before it is renamed; no name that Python would import."""
    return library.with_name(f"{library.name}.part")


def show_warnings(runs: list[subprocess.CompletedProcess[str]]) -> None:
    """What compilers said in runs that succeeded; who failed says why elsewhere."""
    for run in runs:
        lines = [] if run.returncode else (run.stdout + run.stderr).splitlines()
        for line in lines:
            if not line.startswith((STATUS, "ninja: ")):
                print(line, file=sys.stderr)


def failure_of(runs: list[subprocess.CompletedProcess[str]]) -> BuildFailure:
    """The errors of the runs that failed."""
    lines = [line for run in runs if run.returncode for line in (run.stdout + run.stderr).splitlines()]
    told = [line for line in lines if "error" in line or "fatal" in line] or lines
    return BuildFailure("the compiler failed: " + "\n".join(told[:8]), "mend what it names, then: pip install -e .")


def plan_cpu(ninja: NinjaFile, library: Path, part: Part) -> None:
    """lbs_kernels._cpu."""
    link = cxx_rule(ninja, "python", part)
    cxx_rule(ninja, "cxx", part, for_python=False)
    bindings = ninja.compile("python", SOURCES / "bindings.cpp", [])
    ninja.link(library, [bindings, *cpu_objects(ninja, "cxx", part)], link)


def plan_c(ninja: NinjaFile, library: Path, part: Part) -> None:
    """liblbs.so: the same objects behind csrc/include/lbs.h, whose functions are all that it shows."""
    link = [*cxx_rule(ninja, "cxx", part, for_python=False), *C_LINK]
    bindings = ninja.compile("cxx", SOURCES / "bindings_c.cpp", [])
    ninja.link(library, [bindings, *cpu_objects(ninja, "cxx", part)], link)


def cpu_objects(ninja: NinjaFile, rule: str, part: Part) -> list[str]:
    """The kernels for processors and all that runs them, without Python: one object per instruction set, each with its
    own flags."""
    compiler = find_compiler()
    isas = {isa: takes_flags(compiler, isa_flags) for isa, isa_flags in ISA_FLAGS.items()}
    part.details = {isa: "built" if ok else "left out: the compiler refuses its flags" for isa, ok in isas.items()}
    defines = [f"-DLBS_BUILD_{isa.upper()}" for isa, ok in isas.items() if ok]
    special = {SOURCES / name: isa for isa, names in ISA_FILES.items() for name in names}
    objects = []
    for source in sorted(SOURCES.rglob("*.cpp")):
        isa = special.get(source)
        if not source.name.startswith("bindings") and (isa is None or isas[isa]):
            objects.append(ninja.compile(rule, source, [*defines, *(ISA_FLAGS[isa] if isa else [])]))
    return objects


def plan_cuda(ninja: NinjaFile, library: Path, part: Part) -> None:
    """lbs_kernels._cuda: device code for the architectures of LBS_CUDA_ARCHS, the CUDA runtime linked in statically."""
    nvcc = find_nvcc()
    part.compiler = f"{nvcc}: {version_line(nvcc)}"
    archs = os.environ.get("LBS_CUDA_ARCHS", "80;90a").split(";")
    codes = [word for arch in archs for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    host = ["-ccbin", find_compiler().split()[0], "-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *HARDENED])]
    host += ["-std=c++17", "-O3", "-fmad=false"]
    words = [nvcc, "-MMD", "-MF", "$out.d", *host, *include_flags(), *codes]
    ninja.rule("cuda", [*words, "$flags", "-c", "$in", "-o", "$out"])
    sources = sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*_cuda.cpp")])
    objects = [ninja.compile("cuda", source, []) for source in sources]
    device_link = [word for flag in HARDENED_LINK for word in ("-Xlinker", flag.removeprefix("-Wl,"))]
    ninja.link(library, objects, [nvcc, *host, "-shared", "-cudart", "static", "$in", "-o", "$out", *device_link])
    part.details = {f"sm_{arch}": "built" for arch in archs}


def plan_tests(ninja: NinjaFile, library: Path, part: Part) -> None:
    """cuda_model: the headers of the CUDA kernels on a model of the GPU (docs/cuda.md)."""
    sources = sorted((TEST_SOURCES / "cuda").glob("*.cpp"))
    if not sources:
        raise BuildFailure("a source distribution carries no tests", "clone the repository to run them")
    link = cxx_rule(ninja, "tests", part)
    # Nothing is computed there, and optimisation, which FORTIFY needs, is a third of its compilation.
    slow = {"bindings.cpp": ["-O0", "-U_FORTIFY_SOURCE"]}
    ninja.link(library, [ninja.compile("tests", source, slow.get(source.name, [])) for source in sources], link)


def cxx_rule(ninja: NinjaFile, name: str, part: Part, for_python: bool = True) -> list[str]:
    """The rule `name`, which compiles C++; returns the command that links a library. Raises BuildFailure."""
    compiler, extra = find_compiler(), os.environ.get("LBS_CXXFLAGS", "").split()
    part.compiler = f"{compiler}: {version_line(compiler)}"
    words = [*compiler.split(), "-MMD", "-MF", "$out.d", *CXX_FLAGS, *HARDENED, *extra]
    words += include_flags() if for_python else [f"-I{SOURCES}"]
    ninja.rule(name, [*words, "$flags", "-c", "$in", "-o", "$out"])
    return [*compiler.split(), "-shared", "$in", "-o", "$out", "-pthread", *HARDENED_LINK, *extra]


PLANS = {"cpu": plan_cpu, "c": plan_c, "cuda": plan_cuda, "tests": plan_tests}


class BuildNative(build_ext):
    """Builds the modules into the package folder of the target and writes the report beside them."""

    def run(self) -> None:
        if os.environ.get("LBS_BUILD_NATIVE") == "0":
            return
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / "lbs_kernels"
        target.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        libraries = {name: target / f"_{name}{suffix}" for name in ("cpu", "cuda")}
        libraries["c"] = target / "liblbs.so"
        if in_place:
            libraries["tests"] = TEST_SOURCES / f"cuda_model{suffix}"
        ninja = NinjaFile(Path(self.build_temp).resolve())
        parts = {name: self.plan(ninja, name, library) for name, library in libraries.items()}
        failures = ninja.build()
        for name, part in parts.items():
            self.conclude(name, libraries[name], part, failures.get(libraries[name]))
        report = {name: asdict(parts[name]) for name in ("cpu", "c", "cuda")}
        written = partial(target / "_build_report.json")
        written.write_text(json.dumps(report, indent=2) + "\n")
        written.replace(target / "_build_report.json")

    def plan(self, ninja: NinjaFile, name: str, library: Path) -> Part:
        """Adds one module to what is built, if it is wanted and its compiler is there."""
        part, asked = Part(), f"LBS_BUILD_{name.upper()}"
        try:
            if wish(name) == "0":
                raise BuildFailure(f"{asked}=0 left it out", f"{asked}=1 pip install -e .")
            PLANS[name](ninja, library, part)
            part.built = True
        except BuildFailure as failure:
            part.reason, part.fix = str(failure), failure.fix
        return part

    def conclude(self, name: str, library: Path, part: Part, failure: BuildFailure | None) -> None:
        """Tells of a module that is not there; an end with an error where the user insisted on it.

        The header of the C library comes and goes with it.
        """
        if failure is not None:
            part.built, part.reason, part.fix = False, str(failure), failure.fix
            part.details = {of: told for of, told in part.details.items() if told != "built"}
        header = library.with_name("lbs.h") if name == "c" else None
        if part.built:
            if header is not None:
                shutil.copyfile(SOURCES / "include" / "lbs.h", partial(header))
                partial(header).replace(header)
            return
        if header is not None:
            header.unlink(missing_ok=True)
        library.unlink(missing_ok=True)  # a stale module is worse than none
        partial(library).unlink(missing_ok=True)
        module = f"{library.parent.name}.{library.name.split('.')[0]}"
        if wish(name) == "1":
            raise SystemExit(f"{module}: {part.reason}\nfix: {part.fix}")
        if name != "tests" or wish(name) != "0":
            print(f"{module} is left out: {part.reason}\nfix: {part.fix}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "lbs_kernels"
        return [str(path) for pattern in MADE for path in folder.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def wish(name: str) -> str:
    """What the environment says of a module: 0, 1 or auto."""
    default = {"tests": "0", "c": os.environ.get("LBS_BUILD_CPU", "auto")}.get(name, "auto")
    return os.environ.get(f"LBS_BUILD_{name.upper()}", default)


# Named so that setuptools runs build_ext and marks the wheel as native; the sources are found by BuildNative.
setup(ext_modules=[Extension("lbs_kernels._cpu", sources=[])], cmdclass={"build_ext": BuildNative})
