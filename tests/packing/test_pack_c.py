"""The C library: the bits of Python, its verdict on every file, and errors that end no process."""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import file_mutants
import numpy as np
import pack_nets
import pytest
import torch
from c_library import PACKAGE, Case, Judge, build, compile_c, need_library, raw
from project_setup import ROOT
from test_pack_checkpoint import Header, header_of, rewrite
from torch import nn

import lbs
import lbs.zoo
import lbs_kernels.network
from lbs.packing import work
from lbs.packing.model import PackedModel, whole_region
from lbs.packing.packing import pack
from lbs_kernels import extension
from lbs_kernels.errors import BackendError, CheckpointError, FormatError, LbsError, ShapeError
from lbs_kernels.program.rules import MAX_DEPTH

if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without the source tree", allow_module_level=True)

SEED = int(os.environ.get("LBS_FUZZ_SEED", "0"))


def rows() -> PackedModel:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    return pack(pack_nets.quantized(layers, (16,)))


def pictures() -> PackedModel:
    torch.manual_seed(4)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1))
    return pack(pack_nets.quantized(body, (3, 9, 7)), normalize=((0.5,) * 3, (0.25,) * 3))


# Small ones are run under sanitizers and emulated too.
SMALL: dict[str, Callable[[], PackedModel]] = {
    "digits": pack_nets.packed_digits,
    "rows": rows,
    "pictures, a map as result": pictures,
    "shipped ResNet-20": lambda: lbs.load(lbs.zoo.entry("cifar100-resnet20").path),
    "MobileNetV2, 32 pixels": lambda: pack(pack_nets.network("mobilenet_v2", 8, 8, size=32), verify=False),
}
NETWORKS: dict[str, Any] = {**SMALL}
NETWORKS["MobileNetV2"] = lambda: pack(pack_nets.network("mobilenet_v2", 8, 8), verify=False)
CALLS = [(1, 1, False), (1, 2, False), (5, 1, False), (5, 3, False), (0, 1, False), (4, 2, True)]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    source = ROOT / "tests" / "native" / "c" / "judge.c"
    return Judge(compile_c(source, tmp_path_factory.mktemp("judge") / "judge"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "digits.lbs.safetensors"
    pack_nets.packed_digits().save(path)
    return path


def calls_of(packed: PackedModel, path: Path) -> tuple[list[Case], list[bytes]]:
    """Calls of a network that was saved, and what Python computes."""
    cases, expected = [], []
    for number, (batch, threads, last) in enumerate(CALLS):
        x = packed.random_images(batch, torch.Generator().manual_seed(number))
        cases.append(Case(path, x, threads, last and x.dim() == 4))
        expected.append(raw(packed(x)))
    return cases, expected


def check_bits(judge: Judge, folder: Path, networks: dict[str, Callable[[], PackedModel]]) -> None:
    cases: list[Case] = []
    expected: list[bytes] = []
    for number, make in enumerate(networks.values()):
        packed, path = make(), folder / f"{number}.lbs.safetensors"
        packed.save(path)
        mine, bits = calls_of(packed, path)
        cases, expected = cases + mine, expected + bits
    found = judge(folder, cases)
    assert [(one.status, one.words) for one in found] == [("OK", "")] * len(cases)
    assert [one.output == bits for one, bits in zip(found, expected, strict=True)] == [True] * len(cases)


@pytest.mark.parametrize("name", [*SMALL, pytest.param("MobileNetV2", marks=pytest.mark.slow)])
def test_the_bits_are_those_of_python(name: str, judge: Judge, tmp_path: Path) -> None:
    check_bits(judge, tmp_path, {name: NETWORKS[name]})


def test_the_example_runs_as_it_is_shown(tmp_path: Path, saved: Path) -> None:
    program = compile_c(ROOT / "examples" / "run.c", tmp_path / "run")
    x = pack_nets.images(3, (1, 8, 8))
    (tmp_path / "x").write_bytes(raw(x))
    done = subprocess.run([program, saved, tmp_path / "x", tmp_path / "y", "3", "2"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "y").read_bytes() == raw(lbs.load(saved)(x))
    done = subprocess.run(
        [program, tmp_path / "x", tmp_path / "x", tmp_path / "y", "3", "2"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path / 'x'}: it has 768 bytes and claims a header of ")


# One verdict


def canonical(path: Path, packed: PackedModel) -> bool:
    """Whether the graph of a file has the form that a network of one program is written in."""
    graph = json.loads(header_of(path)[0]["__metadata__"]["graph"])
    names = [node["name"] for node in graph["nodes"]]
    plain = all(name.isascii() and name != "self" for name in (*names, graph["nodes"][0]["target"]))
    plain = plain and graph["nodes"][0]["args"] in ({"tuple": []}, {"tuple": [None]})
    plain = plain and all(node.get("kwargs", {"dict": {}}) == {"dict": {}} for node in graph["nodes"])
    whole = whole_region(packed.body)
    return whole is not None and whole[2] >= 0 and not graph["modules"] and len(packed.regions) == 1 and plain


def check_verdicts(judge: Judge, folder: Path, paths: list[Path], images: int = 2) -> dict[str, int]:
    """Both readers refuse, or both compute the same bits. How often each was what came of it."""
    loaded: list[PackedModel | None] = []
    cases: list[Case] = []
    for path in paths:
        try:
            packed = lbs.load(path)
        except CheckpointError:
            packed = None
        x = torch.zeros(images, 3) if packed is None else packed.random_images(images, torch.Generator().manual_seed(0))
        loaded.append(packed)
        cases.append(Case(path, x))
    counts: dict[str, int] = {}
    for packed, case, found in zip(loaded, cases, judge(folder, cases), strict=True):
        where = f"{case.net}: {found.status} {found.words}"
        counts[found.status] = counts.get(found.status, 0) + 1
        assert found.words.isprintable(), where
        if packed is None:
            assert found.status in ("FILE", "UNSUPPORTED"), where
        elif canonical(case.net, packed):
            assert found.status == "OK", where
            with torch.no_grad():
                assert found.output == raw(packed(case.images)), where
        else:
            assert found.status == "UNSUPPORTED", where
    return counts


def mutants(folder: Path, seed: int, count: int) -> list[Path]:
    """Files changed at random, whose plan, which the C library does not read, is left out."""
    chance, sources, paths = random.Random(seed), file_mutants.sources(folder), []
    for number in range(count):
        path = folder / f"mutant{number}"
        # Mostly those that the library runs.
        file_mutants.mutate(chance.choice([sources[0], sources[3], *sources]), path, chance)
        try:
            header, data = header_of(path)
            header["__metadata__"]["plan"] = ""
            rewrite(path, header, data)
        except (KeyError, TypeError, ValueError):  # it was changed where the plan is
            pass
        paths.append(path)
    return paths


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_get_one_verdict(judge: Judge, tmp_path: Path) -> None:
    counts = check_verdicts(judge, tmp_path, mutants(tmp_path, SEED, 200))
    assert all(counts[status] > 10 for status in ("OK", "FILE", "UNSUPPORTED")), counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files_get_one_verdict(judge: Judge, tmp_path: Path) -> None:
    print(check_verdicts(judge, tmp_path, mutants(tmp_path, SEED + 1, 10_000)))


def model(**changes: Any) -> Callable[[Header], None]:
    """A change of the text `model`."""

    def change(header: Header) -> None:
        body = json.loads(header["__metadata__"]["model"])
        header["__metadata__"]["model"] = json.dumps({**body, **changes})

    return change


def text(key: str, old: str, new: str) -> Callable[[Header], None]:
    """A change of any text of the metadata."""

    def change(header: Header) -> None:
        found = header["__metadata__"][key]
        assert old in found
        header["__metadata__"][key] = found.replace(old, new, 1)

    return change


def tensor(**changes: Any) -> Callable[[Header], None]:
    """A change of what the header says of the first tensor."""

    def change(header: Header) -> None:
        next(value for key, value in header.items() if key != "__metadata__").update(changes)

    return change


LIES: dict[str, Callable[[Header], Any]] = {
    "another format": lambda header: header["__metadata__"].update(format="pt"),
    "a newer version": lambda header: header["__metadata__"].update(version="5"),
    "a version of other digits": lambda header: header["__metadata__"].update(version="\u0664"),
    "a version without end": lambda header: header["__metadata__"].update(version="1" * 40),
    "a text that is none": lambda header: header["__metadata__"].update(extra=1),
    "no model": lambda header: header["__metadata__"].pop("model"),
    "no program": lambda header: header["__metadata__"].pop("program0"),
    "a program of another number": lambda header: header["__metadata__"].update(programs="{}"),
    "an unknown dtype": tensor(dtype="F128"),
    "another dtype": tensor(dtype="U32"),
    "a negative size": tensor(shape=[-1]),
    "a size that is true": tensor(shape=[True]),
    "sizes beyond any memory": tensor(shape=[1 << 39, 1 << 39, 0]),
    "nine sizes": tensor(shape=[1] * 9),
    "offsets of another tensor": tensor(data_offsets=[64, 128]),
    "offsets without end": tensor(data_offsets=[0, 10**30]),
    "one more key": tensor(more=1),
    "a tensor that is a list": lambda header: header.update(x=[]),
    "a tensor that is missing": lambda header: header.pop("region0.conv1.planes"),
    "a name that is a number": model(name=1),
    "reasons that are no pairs": model(kept_float=["ab"]),
    "images of another size": model(input_shape=[1, 8, 9]),
    "images of no size": model(input_shape=[]),
    "images of size true": model(input_shape=[True, 8, 8]),
    "bytes for a program of floats": model(normalize=[[0.5], [0.5]]),
    "a deviation of zero": model(normalize=[[0.5], [0]]),
    "a mean beyond any float": model(normalize=[[10**400], [1]]),
    "a mean in letters": model(normalize=[["0.5"], [1]]),
    "a mean that is NaN": model(normalize=[[math.nan], [1]]),
    "a key of the model twice": text("model", '"name"', '"name": "x", "name"'),
    "half of a surrogate pair in the graph": text("graph", '"part": "x"', '"part": "\ud800"'),
    "a graph that is a list": lambda header: header["__metadata__"].update(graph="[]"),
    "arguments that are a number": text("graph", '"args": {"tuple": []}', '"args": -0.0'),
    "two nodes of one name": text("graph", '"name": "output"', '"name": "x"'),
    "an output that is not there": text("graph", '"region0"}, 0]', '"region0"}, 1]'),
    "another digest of the program": text("program0", '"digest":"', '"digest":"0'),
    "an escape in a name": text("program0", '"name":"conv1"', '"name":"\\u001b[2J"'),
}


def refused_as(lie: str) -> str:
    """The C library knows one graph, and calls every other one unsupported before it looks whether it is one."""
    return "UNSUPPORTED" if lie in ("two nodes of one name", "arguments that are a number") else "FILE"


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_both(lie: str, judge: Judge, saved: Path, tmp_path: Path) -> None:
    header, data = header_of(saved)
    LIES[lie](header)
    rewrite(saved, header, data)
    with pytest.raises(CheckpointError):
        lbs.load(saved)
    (found,) = judge(tmp_path, [Case(saved, torch.zeros(0, 1, 8, 8))])
    assert (found.status, found.words[: len(str(saved))]) == (refused_as(lie), str(saved))
    assert found.words.isprintable()


@pytest.mark.parametrize("key", ["model", "graph"])
@pytest.mark.parametrize(("depth", "status"), [(MAX_DEPTH - 1, "OK"), (MAX_DEPTH, "FILE")])
def test_lists_in_one_another_are_read_as_deep_by_both(
    key: str, depth: int, status: str, judge: Judge, saved: Path, tmp_path: Path
) -> None:
    header, data = header_of(saved)
    text(key, "{", '{"more": ' + "[" * depth + "]" * depth + ", ")(header)  # the object is one more
    rewrite(saved, header, data)
    (found,) = judge(tmp_path, [Case(saved, torch.zeros(0, 1, 8, 8))])
    assert found.status == status, found.words
    if status == "OK":
        lbs.load(saved)
        return
    assert "nested too deeply" in found.words
    with pytest.raises(CheckpointError, match=f"its {key} is not JSON: nested too deeply"):
        lbs.load(saved)


def damaged(path: Path) -> list[Path]:
    """Copies of a file, none of which is one."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head, data = whole[8 : 8 + length], whole[8 + length :]
    mark = b"\xef\xbb\xbf" + head
    copies = {
        "empty": b"",
        "short": whole[:7],
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "no-digest": whole.replace(b'"digest":"', b'"digesT":"', 1),
        "promised": (1 << 40).to_bytes(8, "little") + whole[8:],
        "most": b"\xff" * 8 + whole[8:],
        "marked": len(mark).to_bytes(8, "little") + mark + data,
        "brackets": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "long-header": ((1 << 24) + 8).to_bytes(8, "little") + b" " * ((1 << 24) + 8),
        "wide": _with_encoding(whole, "utf-16"),
    }
    paths = [path.with_name(name) for name in copies]
    for name, content in copies.items():
        path.with_name(name).write_bytes(content)
    os.mkfifo(path.with_name("pipe"))
    path.with_name("folder").mkdir()
    others = [path.with_name("pipe"), path.with_name("folder"), path.with_name("missing"), Path("/dev/zero")]
    return [*paths, *others]


def _with_encoding(whole: bytes, encoding: str) -> bytes:
    length = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + length].decode().encode(encoding)
    return len(head).to_bytes(8, "little") + head + whole[8 + length :]


def test_damage_is_refused_by_both_within_little_memory(judge: Judge, saved: Path, tmp_path: Path) -> None:
    paths = damaged(saved)
    for path in paths:
        with pytest.raises(CheckpointError):
            lbs.load(path)
    cases = [Case(path, torch.zeros(0, 1, 8, 8)) for path in paths]
    found = judge(tmp_path, cases, megabytes=128)
    assert [(path.name, one.status) for path, one in zip(paths, found, strict=True)] == [
        (p.name, "FILE") for p in paths
    ]


def test_work_is_refused_before_it_is_laid_out(judge: Judge, tmp_path: Path) -> None:
    """A file of kilobytes whose image is large, within the budget and beyond it."""
    path = tmp_path / "large"
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    pack(pack_nets.quantized(network, (1, 4, 4))).save(path)
    header, data = header_of(path)
    for side, status in ((1 << 10, "OK"), (1 << 13, "FILE")):
        texts = dict(header["__metadata__"])
        for key in ("program0", "model"):
            texts[key] = texts[key].replace('"height":4', f'"height":{side}').replace('"width":4', f'"width":{side}')
            texts[key] = texts[key].replace("[1, 4, 4]", f"[1, {side}, {side}]")
        rewrite(path, {**header, "__metadata__": texts}, data)
        (found,) = judge(tmp_path, [Case(path, torch.zeros(0, 1, 1, 1))], megabytes=256)
        assert found.status == status, found.words
        if status == "OK":
            lbs.load(path)
            continue
        with pytest.raises(CheckpointError, match="more than 134217728 elements"):
            lbs.load(path)
        assert "more than 134217728 elements" in found.words
        assert "give a larger budget" in found.words


@pytest.mark.parametrize("name", ["digits", "pictures, a map as result", "shipped ResNet-20"])
def test_work_is_counted_as_in_python(name: str, tmp_path: Path) -> None:
    packed, path = SMALL[name](), tmp_path / "net"
    packed.save(path)
    spent = work.check_work(packed.body, packed.input_shape, packed.input_dtype, 1e9)
    shares = (
        spent.elements / work.MAX_ELEMENTS,
        spent.products / work.MAX_PRODUCTS,
        spent.operations / work.MAX_OPERATIONS,
    )
    for budget, status in ((max(shares), 0), (math.nextafter(max(shares), 0), 2)):
        assert Library().open(path, budget)[0] == status
    lbs.load(path, budget=max(shares))
    with pytest.raises(CheckpointError, match="one image takes more than"):
        lbs.load(path, budget=math.nextafter(max(shares), 0))


def test_others_are_refused_with_the_reason(judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "two"
    pack_nets.packed_two_regions().save(path)
    (found,) = judge(tmp_path, [Case(path, torch.zeros(0, 3, 10, 10))])
    assert found.status == "UNSUPPORTED"
    assert "it has 2 programs, and in float softplus (" in found.words
    assert "run it in Python (lbs.load)" in found.words


def test_another_function_of_the_outputs_is_computed(judge: Judge, saved: Path, tmp_path: Path) -> None:
    """No shortcut takes it for the item of a list."""
    header, data = header_of(saved)
    text("graph", "operator.getitem", "torch.stack")(header)
    x, expected = pack_nets.images(2, (1, 8, 8)), lbs.load(saved)
    rewrite(saved, header, data)
    assert torch.equal(lbs.load(saved)(x), expected(x)[None])
    assert judge(tmp_path, [Case(saved, x)])[0].status == "UNSUPPORTED"


# The interface


class Library:
    """liblbs in this process."""

    def __init__(self) -> None:
        need_library()
        self.c = ctypes.CDLL(str(PACKAGE / "liblbs.so"))
        self.c.lbs_error.restype = ctypes.c_char_p
        self.c.lbs_open.argtypes = [ctypes.c_char_p, ctypes.c_double, ctypes.c_void_p]
        self.c.lbs_run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
        for function in (self.c.lbs_close, self.c.lbs_input, self.c.lbs_output):
            function.argtypes = [ctypes.c_void_p] * (1 if function is self.c.lbs_close else 2)
        self.c.lbs_close.restype = None

    def open(self, path: Path, budget: float = 1.0) -> tuple[int, ctypes.c_void_p]:
        network = ctypes.c_void_p(1)
        return self.c.lbs_open(os.fsencode(path), budget, ctypes.byref(network)), network


def test_misuse_is_told(saved: Path) -> None:
    library = Library()
    c = library.c
    for budget in (0.0, -1.0, math.nan):
        status, network = library.open(saved, budget)
        assert (status, network.value) == (1, None)
        assert b"budget is no positive number" in c.lbs_error()
    assert c.lbs_open(None, 1, ctypes.byref(ctypes.c_void_p())) == 1
    assert b"a pointer is null" in c.lbs_error()
    assert c.lbs_open(os.fsencode(saved), 1, None) == 1
    status, network = library.open(saved, math.inf)
    assert status == 0
    x, y = np.zeros((2, 1, 8, 8), np.float32), np.zeros((2, 10), np.float32)
    good = (network, x.ctypes.data, 0, 2, 1, y.ctypes.data)
    for place, value, words in (
        (0, None, b"a pointer is null"),
        (1, None, b"a pointer is null"),
        (5, None, b"a pointer is null"),
        (2, 7, b"layout is neither"),
        (3, -1, b"count is -1"),
        (3, 2**62, b"count is 4611686018427387904; so many images of 64 elements have no place in any memory"),
        (4, 0, b"needs a thread"),
    ):
        assert c.lbs_run(*good[:place], value, *good[place + 1 :]) == 1
        assert words in c.lbs_error(), (words, c.lbs_error())
    assert c.lbs_run(*good) == 0
    assert c.lbs_input(network, None) == 1
    assert c.lbs_output(None, y.ctypes.data) == 1
    c.lbs_close(network)
    c.lbs_close(None)


def test_errors_belong_to_a_thread(saved: Path, tmp_path: Path) -> None:
    library = Library()
    library.open(tmp_path / "missing")
    assert b"missing: it cannot be read" in library.c.lbs_error()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(library.c.lbs_error).result() == b""


def test_threads_call_one_network_at_once(saved: Path) -> None:
    library = Library()
    _, network = library.open(saved)
    x = pack_nets.images(6, (1, 8, 8))
    expected = lbs.load(saved)(x).numpy()

    def call(number: int) -> bool:
        y = np.full((6, 10), np.nan, np.float32)
        images = x.numpy()
        status = library.c.lbs_run(network, images.ctypes.data, 0, 6, 1 + number % 3, y.ctypes.data)
        return status == 0 and y.tobytes() == expected.tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(64)))
    library.c.lbs_close(network)


def test_an_instruction_set_that_is_not_here(judge: Judge, saved: Path, tmp_path: Path) -> None:
    other = Judge(judge.program, environment={"LBS_ISA": "abacus"})
    (found,) = other(tmp_path, [Case(saved, torch.zeros(1, 1, 8, 8))])
    assert found.status == "BACKEND"
    assert "abacus" in found.words


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_shows_its_functions_and_needs_no_python() -> None:
    need_library()
    command = ["readelf", "--dynamic", "--dyn-syms", "--wide", str(PACKAGE / "liblbs.so")]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = [line for line in words.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [line for line in needed if "python" in line or "torch" in line]
    shown = [line.split()[7] for line in words.splitlines() if " UND " not in line and " GLOBAL " in line]
    weak = [line for line in words.splitlines() if " UND " not in line and " WEAK " in line]
    assert sorted(shown) == ["lbs_close", "lbs_error", "lbs_input", "lbs_open", "lbs_output", "lbs_run"]
    assert not weak
    assert "NODELETE" in words


# numpy


needs_module = pytest.mark.skipif(extension.cpu is None, reason=f"no native module: {extension.cpu_reason}")


@needs_module
@pytest.mark.parametrize("name", SMALL)
def test_numpy_runs_without_torch(name: str, tmp_path: Path) -> None:
    packed, path = SMALL[name](), tmp_path / "net"
    packed.save(path)
    x = packed.random_images(3)
    np.save(tmp_path / "x.npy", x.numpy())
    code = f"""
        import sys
        sys.modules["torch"] = None  # importing it fails
        import numpy as np
        import lbs_kernels.network
        network = lbs_kernels.network.load({str(path)!r})
        y = network(np.load({str(tmp_path / "x.npy")!r}))
        np.save({str(tmp_path / "y.npy")!r}, y)
        print(network.input_shape, network.input_dtype, network.output_shape)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = packed(x).numpy()
    assert np.load(tmp_path / "y.npy").tobytes() == expected.tobytes()
    assert done.stdout.strip() == f"{packed.input_shape} {x.numpy().dtype} {expected.shape[1:]}"


@needs_module
def test_numpy_images_lie_as_they_like(saved: Path, tmp_path: Path) -> None:
    network, packed = lbs_kernels.network.load(saved), lbs.load(saved)
    x = pack_nets.images(4, (1, 8, 8))
    expected = packed(x).numpy().tobytes()
    last = x.permute(0, 2, 3, 1).contiguous().numpy().transpose(0, 3, 1, 2)
    strided = np.repeat(x.numpy(), 2, axis=3)[..., ::2]
    for images in (x.numpy(), last, strided):
        assert network(images, threads=2).tobytes() == expected
    assert network(x.numpy()[:0]).shape == (0, 10)
    with pytest.raises(
        ShapeError, match=r"images are float64 \[4, 1, 8, 8\]; the network was packed for float32 \[N, 1,"
    ):
        network(x.numpy().astype(np.float64))
    with pytest.raises(ShapeError, match="packed for"):
        network(x.numpy()[0])
    with pytest.raises(LbsError, match="needs a thread"):
        network(x.numpy(), threads=0)
    with pytest.raises(CheckpointError, match="missing: it cannot be read"):
        lbs_kernels.network.load(tmp_path / "missing")
    pack_nets.packed_two_regions().save(tmp_path / "two")
    with pytest.raises(BackendError, match="it has 2 programs"):
        lbs_kernels.network.load(tmp_path / "two")


@needs_module
@pytest.mark.parametrize("threads", [0, -1, 2**31, 2**70, 1.5, "2"])
def test_numpy_calls_need_threads_that_can_be(saved: Path, threads: Any) -> None:
    network = lbs_kernels.network.load(saved)
    x = pack_nets.images(2, (1, 8, 8)).numpy()
    with pytest.raises(FormatError, match=f"threads is {threads!r}; a call needs a thread, takes at most 2147483647"):
        network(x, threads)
    assert np.array_equal(network(x, np.int64(2)), network(x, 2**31 - 1))  # type: ignore[arg-type]


@needs_module
def test_numpy_files_have_any_name_and_a_budget(saved: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path / "net") + b"\xff"
    shutil.copyfile(saved, odd)
    for path in (odd, os.fsdecode(odd), Path(os.fsdecode(odd))):
        assert lbs_kernels.network.load(path, np.float32(1)).input_shape == (1, 8, 8)  # type: ignore[arg-type]
    budgets: tuple[Any, ...] = (None, "1", 1j)
    for budget in budgets:
        with pytest.raises(CheckpointError, match=r"budget is .*; give a positive number .*, math.inf for any"):
            lbs_kernels.network.load(saved, budget)


@needs_module
@pytest.mark.parametrize("last", [False, True])
def test_numpy_images_are_read_where_they_can_be(last: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats at an odd address are copied first."""
    network = lbs_kernels.network.load(saved)
    native, given = network._native, []

    class Watched:
        def run(self, images: int, *more: Any) -> None:
            given.append(images)
            native.run(images, *more)

    monkeypatch.setattr(network, "_native", Watched())
    x = pack_nets.images(2, (1, 8, 8)).numpy()
    bytes_of = np.zeros(x.nbytes + 1, np.uint8)
    odd = bytes_of[1:].view(np.float32).reshape((2, 8, 8, 1) if last else x.shape)
    odd = odd.transpose(0, 3, 1, 2) if last else odd
    odd[...] = x
    assert not odd.flags.aligned
    assert network(odd).tobytes() == network(x).tobytes()
    assert given[0] % 4 == 0


# Other builds


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    """The bits, mutants and damage once more, all sanitized but the kernels: the memory of those has guards at its ends
    (docs/native.md, "Memory")."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g"
    program = build("sanitized", monkeypatch, "g++", flags, sanitized=True)
    for guard in ("", "reads", "writes", "start"):
        check_bits(Judge(program, environment={"LBS_GUARD": guard}), tmp_path, SMALL)
    check_verdicts(Judge(program), tmp_path, [*mutants(tmp_path, SEED + 2, 1000), *damaged(saved)])


@pytest.mark.slow
def test_arm_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed")
    program = build("aarch64", monkeypatch, "aarch64-linux-gnu-g++", "-static")
    for processor in ("cortex-a53", "max"):
        check_bits(Judge(program, (emulator, "-cpu", processor)), tmp_path, SMALL)
