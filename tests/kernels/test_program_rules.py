"""One set of rules: the readers in Python and C++ give the same verdict on any text, and name the same rule."""

from __future__ import annotations

import itertools
import json
import locale
import os
import shutil
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from outcomes import Disagreement
from program_breaches import breaches
from program_mutants import Mutant, dump, random_mutants, source
from programs import CASES, Builder, random_inputs
from torch import Tensor

from lbs_kernels import extension
from lbs_kernels.errors import BackendError, FormatError
from lbs_kernels.program import schema
from lbs_kernels.program.checks import check_planes
from lbs_kernels.program.rules import NOT_PRINTABLE, RULES
from lbs_kernels.program.steps import ConvStep, Emit, Program
from lbs_kernels.program.text import read_program
from lbs_kernels.run.compiled import CompiledProgram

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("LBS_FUZZ_SEED", "0"))  # a run by night may give another one each time

native = pytest.mark.skipif(extension.cpu is None, reason=f"native module missing: {extension.cpu_reason}")


def known(error: FormatError) -> str:
    """The name of the rule, which must have one."""
    assert error.rule in RULES, error
    return error.rule


def judged_by_python(mutant: Mutant) -> tuple[str, Program | None]:
    """The rule that is broken, or empty and the program."""
    try:
        text = mutant.text.decode()
    except UnicodeDecodeError:
        return "json", None
    try:
        program = read_program(text, mutant.blob.numel())
        check_planes(program, mutant.blob)
    except FormatError as error:
        return known(error), None
    return "", program


def judged_by_cpp(mutant: Mutant) -> str:
    try:
        extension.cpu.check_program(mutant.text, mutant.blob.data_ptr(), mutant.blob.numel())
    except FormatError as error:
        return known(error)
    return ""


def judge_one(mutant: Mutant) -> tuple[str, Program | None]:
    """The rule that both say is broken, or empty and the program. Raises Disagreement."""
    python, program = judged_by_python(mutant)
    cpp = judged_by_cpp(mutant)
    if python != cpp:
        raise Disagreement(f"{mutant.what}: Python says {python!r}, C++ {cpp!r}: {mutant.text[:3000]!r}")
    return python, program


def judge(mutants: Iterable[Mutant]) -> tuple[Counter[str], list[tuple[Mutant, Program]]]:
    """The verdicts on all mutants, how often each, and what was accepted."""
    verdicts: Counter[str] = Counter()
    accepted = []
    for mutant in mutants:
        verdict, program = judge_one(mutant)
        verdicts[verdict] += 1
        if program is not None:
            accepted.append((mutant, program))
    return verdicts, accepted


def size(program: Program) -> int:
    return sum(spec.channels * spec.height * spec.width for spec in program.tensors)


def run_both(mutant: Mutant, program: Program) -> bool:
    """Runs an accepted program where it is small: the reference and the native kernels must give the same bits."""
    if size(program) > 1 << 16:
        return False
    plain = replace(program, digest="")
    images = random_inputs(program, batch=1, seed=0)
    expected = CompiledProgram(plain, mutant.blob, "reference").run(images)
    for one, other in zip(CompiledProgram(plain, mutant.blob, "auto").run(images), expected, strict=True):
        if not torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)):
            raise Disagreement(f"{mutant.what}: other numbers: {plain.to_json()}")
    return True


def run_all(accepted: list[tuple[Mutant, Program]], count: int) -> int:
    """Runs up to `count` accepted programs; how many."""
    return sum(itertools.islice(filter(None, itertools.starmap(run_both, accepted)), count))


@native
def test_every_rule_is_broken_by_a_mutant_and_named_by_both() -> None:
    broken = set()
    for rule, mutant in breaches():
        assert (judged_by_python(mutant)[0], judged_by_cpp(mutant)) == (rule, rule), mutant.what
        broken.add(rule)
    assert broken == set(RULES)


@native
def test_random_mutants_are_judged_alike_and_run_where_accepted() -> None:
    verdicts, accepted = judge(random_mutants(SEED, 1000))
    assert verdicts[""] > 75  # else nothing is said about what is accepted
    assert len(verdicts) > len(RULES) // 2
    assert run_all(accepted, 25) == 25


@native
@pytest.mark.slow
def test_many_random_mutants() -> None:
    verdicts, accepted = judge(random_mutants(SEED + 1, 20_000))
    assert verdicts[""] > 1000
    assert run_all(accepted, 600) == 600


@native
def test_bytes_that_are_no_text() -> None:
    """Every byte in every third place of a small program: JSON's grammar and UTF-8."""
    text, blob = source(0)
    raw = text.encode()
    places = range(0, len(raw), 97)
    nasty = b'\x00\x0b\x1f "\\{}[],:-+.eE019utfn\x7f\x80\xbf\xc0\xc2\xe0\xed\xf0\xf5\xff'
    mutants = [Mutant(raw[:at] + bytes([byte]) + raw[at + 1 :], blob, str(at)) for at in places for byte in nasty]
    verdicts, _ = judge(mutants)
    assert verdicts["json"] > len(mutants) // 3


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_weights_beyond_the_last_channel_are_refused_by_every_back_end(backend: str) -> None:
    program, blob = CASES["chain"](0)
    step = next(step for step in program.steps if isinstance(step, ConvStep))
    damaged = blob.clone()
    program.array(damaged, step.planes)[-1, -1, -1, -1] |= 1 << program.tensors[step.input].channels
    with pytest.raises(FormatError, match="bits beyond channel 2; unused bits are 0") as caught:
        CompiledProgram(replace(program, digest=""), damaged, backend)
    assert caught.value.rule == "unused-bits"


def one_maximum(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> tuple[str, Tensor]:
    """image -> codes -> a maximum of codes -> a linear layer, padded by half of the kernel."""
    b = Builder(0)
    image = b.image(3, *size)
    codes = b.consumer((*size, 3), 4)
    b.quantize(image, Emit(consumers=(codes,)))
    padding = (kernel[0] // 2, kernel[1] // 2)
    shape = b.conv_shape(codes.tensor, 3, kernel, stride, padding)
    pooled = b.consumer(shape, 4)
    b.pool(codes.tensor, Emit(consumers=(pooled,)), "max", kernel, stride, padding)
    stream = b.stream((*shape[:2], 5), output=True)
    b.conv(pooled.tensor, Emit(stream=stream), 5, w_bits=4, kernel=(1, 1), padding=(0, 0))
    program, blob = b.build()
    return program.to_json(), blob


@native
@pytest.mark.parametrize("kernel", [(255, 255), (257, 257), (8191, 3)])
def test_windows_larger_than_the_image(kernel: tuple[int, int]) -> None:
    """Tables of taps are made for windows up to 2^16 taps; larger ones are cut to the image."""
    text, blob = one_maximum((5, 4), kernel, stride=(1 << 12, 1 << 12))
    images = random_inputs(read_program(text), 2, 0)
    expected = CompiledProgram(read_program(text), blob, "reference").run(images)
    assert torch.equal(CompiledProgram(read_program(text), blob, "cpu").run(images)[0], expected[0])


@native
def test_a_program_that_native_kernels_cannot_address_falls_back() -> None:
    """Two maxima that pad other directions: each within the limit of elements, a layout for both beyond 2 GiB."""
    b = Builder(0)
    image = b.image(1, 1, 1)
    codes = b.consumer((1, 1, 1), 4)
    b.quantize(image, Emit(consumers=(codes,)))
    for kernel in ((1 << 16, 1), (1, 1 << 16)):
        padding, stride = (kernel[0] // 2, kernel[1] // 2), (1 << 20, 1 << 20)
        pooled = b.consumer((1, 1, 1), 4)
        b.pool(codes.tensor, Emit(consumers=(pooled,)), "max", kernel, stride, padding)
        b.conv(pooled.tensor, Emit(stream=b.stream((1, 1, 1), output=True)), 1, w_bits=1, kernel=(1, 1), padding=(0, 0))
    program, blob = b.build()
    images = random_inputs(program, 1, 0)
    compiled = CompiledProgram(program, blob)
    assert compiled.backend == "reference"
    assert "needs more than 2 GiB per image with its padding" in compiled.fallback
    assert len(compiled.run(images)) == 2
    with pytest.raises(BackendError, match="more than 2 GiB"):
        CompiledProgram(program, blob, "cpu")


@pytest.mark.parametrize("path", schema.HEADERS)
def test_headers_are_those_that_python_writes(path: str) -> None:
    assert (ROOT / path).read_text() == schema.HEADERS[path](), "run python -m lbs_kernels.program.schema"


def test_printable_is_what_unicode_says_of_all_it_has_assigned() -> None:
    hidden = {code for first, last in NOT_PRINTABLE for code in range(first, last + 1)}
    odd = [
        hex(code)
        for code in range(0x110000)
        if (code in hidden) == chr(code).isprintable() and unicodedata.category(chr(code)) != "Cn"
    ]
    assert odd == []


@pytest.fixture
def decimal_comma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process in a locale that writes 0,5. It is made where the machine has none but can make one."""
    before = locale.setlocale(locale.LC_NUMERIC)
    if shutil.which("localedef"):
        made = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "comma")]
        if subprocess.run(made, capture_output=True).returncode == 0:
            monkeypatch.setenv("LOCPATH", str(tmp_path))
    for name in ("comma", "de_DE.UTF-8", "fr_FR.UTF-8", "ru_RU.UTF-8"):
        try:
            locale.setlocale(locale.LC_NUMERIC, name)
            break
        except locale.Error:
            continue
    else:
        pytest.skip("no locale with a decimal comma, and localedef has no source of one")
    yield
    locale.setlocale(locale.LC_NUMERIC, before)


@native
@pytest.mark.usefixtures("decimal_comma")
def test_a_decimal_comma_changes_nothing() -> None:
    assert locale.localeconv()["decimal_point"] == ","
    verdicts, _ = judge(random_mutants(SEED + 2, 100))
    assert verdicts[""] > 0
    text, blob = source(1)
    for high, rule in ((0.5, ""), (0.1, "bound")):
        assert judged_by_cpp(Mutant(text.replace('"high":null', f'"high":{high}').encode(), blob, "high")) == rule


@native
def test_numbers_do_not_depend_on_the_locale() -> None:
    """The source, for machines without such a locale."""
    banned = ("strtod", "strtof", "atof", "stod", "stof", "sscanf")
    for path in (ROOT / "csrc").rglob("*.*"):
        lines = [line.partition("//")[0] for line in path.read_text().splitlines()]
        assert not [line for line in lines for word in banned if f"{word}(" in line], path


def test_dump_writes_what_json_writes() -> None:
    body = json.loads(source(2)[0])
    assert json.loads(dump(body)) == body
