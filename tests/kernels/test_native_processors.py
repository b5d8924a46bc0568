"""The native kernels on other processors, which are emulated, and no function of one instruction set within another."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import replay
from project_setup import ROOT, load_setup

if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)

# By machine: the compiler, and more flags for what is emulated. QEMU 7.2 takes %ymm4 as the index of a gather for no
# index: the compiler is told to leave that register alone.
BUILDS = {"x86_64": ("g++", "-ffixed-xmm4"), "aarch64": ("aarch64-linux-gnu-g++", "-static")}
# The first two hold all headers of kernels, which the others include with other flags.
ISAS = {
    "avx2": "x86_64",
    "amx": "x86_64",
    "avxvnni": "x86_64",
    "avx512vnni": "x86_64",
    "neon": "aarch64",
    "neon_i8mm": "aarch64",
}


def symbols(words: list[str], source: Path, folder: Path) -> list[tuple[str, str]]:
    """(kind, name) of the symbols of a source, compiled without optimisation, so that nothing is inlined."""
    target = folder / f"{source.stem}.o"
    subprocess.run([*words, "-O0", "-w", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)], check=True)
    nm = words[0].replace("g++", "nm")
    lines = subprocess.run([nm, str(target)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(line.split()[-2], line.split()[-1]) for line in lines]


@pytest.mark.parametrize("isa", [*list(ISAS)[:2], *(pytest.param(i, marks=pytest.mark.slow) for i in list(ISAS)[2:])])
def test_no_function_of_an_instruction_set_can_stand_for_another(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of functions of one name the linker takes any: one that was compiled for AVX-512 would run everywhere. So a file
    with flags of its own shows its table and self-check alone, and nothing in it runs before main."""
    setup = load_setup(monkeypatch)
    assert set(setup.ISA_FLAGS) == set(ISAS)
    compiler, flags = BUILDS[ISAS[isa]][0], setup.ISA_FLAGS[isa]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    if not setup.takes_flags(compiler, flags):
        pytest.skip(f"{compiler} does not take {' '.join(flags)}")
    for name in setup.ISA_FILES[isa]:
        found = symbols([compiler, *setup.CXX_FLAGS, *flags], setup.SOURCES / name, tmp_path)
        assert not [name for kind, name in found if kind in "WwVvui" and not name.startswith("DW.ref.")]
        assert not [name for _, name in found if name.startswith("_GLOBAL__sub_I")]
        own = [name for kind, name in found if kind in "TDRB"]
        assert 1 <= len(own) <= 2, own


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A file of cases, and how many they are."""
    path = tmp_path_factory.mktemp("replay") / "cases"
    return path, replay.write(path, [*replay.networks(), *replay.operations()])


# Emulated processor: its machine, and all instruction sets that it has.
PROCESSORS = {
    "Nehalem": ("x86_64", ("portable",)),
    "Haswell": ("x86_64", ("portable", "avx2")),
    "cortex-a53": ("aarch64", ("portable",)),
    "cortex-a76": ("aarch64", ("portable", "neon")),
    "max": ("aarch64", ("portable", "neon", "neon-i8mm")),
}


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_emulated_processors(processor: str, cases: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No illegal instruction, and what the reference computes, by the instruction sets of that processor alone."""
    machine, isas = PROCESSORS[processor]
    emulator = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if emulator is None:
        pytest.skip(f"qemu-{machine} is not installed")
    compiler, flags = BUILDS[machine]
    if compiler == "g++" and platform.machine() != machine:
        pytest.skip(f"g++ compiles for {platform.machine()} here")
    program = replay.build(machine, monkeypatch, compiler, flags)
    path, count = cases
    words = replay.run(program, path, emulator=(emulator, "-cpu", processor)).splitlines()
    ran = {line.partition(": ")[0]: line.partition(": ")[2] for line in words if ": cannot run: " not in line}
    assert tuple(ran) == isas
    for isa, counts in ran.items():
        programs, *algorithms = (int(word.split()[0]) for word in counts.split(", "))
        assert programs == count, isa
        assert all(algorithms), f"{isa}: {counts}"
