"""Small files, large work: what one image costs is told when a file is loaded, by shapes, and so is what cannot run."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pack_nets
import pytest
import torch
from test_pack_checkpoint import assert_refused_within, header_of, rewrite
from torch import Tensor, nn

import lbs
import lbs.zoo
from lbs.packing.packing import pack
from lbs.packing.work import MAX_ELEMENTS, MAX_OPERATIONS, MAX_PRODUCTS, check_work
from lbs_kernels.errors import CheckpointError, GraphError

SHAPE = (3, 8, 8)


class Tail(nn.Module):
    """A packed layer, and a float part of every way to be called: a module, a function, a method, a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Conv2d(3, 8, 3, padding=1), nn.LSTM(8, 8, batch_first=True)
        self.shift = nn.Parameter(torch.randn(8, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        lines = self.stem(x).flatten(2).transpose(1, 2)
        return torch.cumsum(self.rnn(lines)[0] + self.shift, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("work") / "net"
    pack(pack_nets.quantized(Tail(), SHAPE)).save(path)
    return path


@pytest.fixture
def saved(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "net"
    path.write_bytes(whole.read_bytes())
    return path


def call(name: str, target: str, *args: Any) -> dict[str, Any]:
    """A node; texts that begin with % are nodes, lists stay lists."""

    def value(arg: Any) -> Any:
        if isinstance(arg, str) and arg.startswith("%"):
            return {"node": arg[1:]}
        return {"list": [value(item) for item in arg]} if isinstance(arg, list) else arg

    op = "call_function" if "." in target else "call_method"
    return {"name": name, "op": op, "target": target, "args": {"tuple": [value(arg) for arg in args]}}


def append(path: Path, nodes: list[dict[str, Any]]) -> None:
    """Put nodes behind the last one of a file, whose name they know as `last`; the network returns the last of them."""
    header, data = header_of(path)
    graph = json.loads(header["__metadata__"]["graph"])
    *before, output = graph["nodes"]
    last, made = before[-1]["name"], nodes[-1]["name"]
    told = json.dumps([*before, *nodes, output]).replace('{"node": "last"}', json.dumps({"node": last}))
    graph["nodes"] = json.loads(told)
    graph["nodes"][-1]["args"] = {"tuple": [{"node": made}]}
    header["__metadata__"]["graph"] = json.dumps(graph)
    rewrite(path, header, data)


def doubled(times: int) -> list[dict[str, Any]]:
    names = ["last", *(f"d{i}" for i in range(times))]
    pairs = itertools.pairwise(names)
    return [call(new, "torch.cat", [f"%{old}", f"%{old}"], 1) for old, new in pairs]


BOMBS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "doubled": (doubled(24), "elements, at node d"),
    "repeated": ([call("y", "repeat", "%last", 1, 1 << 20, 64)], "elements, at node y"),
    "expanded": ([call("y", "expand", "%last", 1 << 20, 64, 8), call("z", "mul", "%y", 2.0)], "elements, at node z"),
    "outer": (
        [
            call("y", "flatten", "%last"),
            *(call(f"y{i}", "torch.kron", f"%y{i - 1}" if i else "%y", "%y") for i in (0, 1, 2)),
        ],
        "elements, at node y",
    ),
    "multiplied": (
        [
            call("y", "repeat", "%last", 1, 256, 512),
            call("t", "transpose", "%y", 1, 2),
            call("z", "torch.matmul", "%y", "%t"),
        ],
        "(elements|products), at node",
    ),
    "long": (
        [call(f"n{i}", "neg", f"%n{i - 1}" if i else "%last") for i in range(MAX_OPERATIONS)],
        "operations, at node",
    ),
    "unbound": ([call("y", "expand", "%last", 1 << 26, 64, 8), call("z", "unbind", "%y")], "operations, at node z"),
    "split": ([call("y", "expand", "%last", 1 << 26, 64, 8), call("z", "split", "%y", 2)], "operations, at node z"),
    "chunked": (
        [call("y", "expand", "%last", 1 << 26, 64, 8), call("z", "chunk", "%y", 1 << 25)],
        "operations, at node z",
    ),
    "windows": (
        [
            call("y", "repeat", "%last", 1, 64, 512),
            call("z", "torch.nn.functional.avg_pool2d", "%y", 2001, 1, 1000),
        ],
        "products, at node z",
    ),
    "python_power": (
        [call("s", "size", "%last", 1), call("p", "operator.pow", "%s", 10**9), call("y", "mul", "%last", "%p")],
        "fails at node p",
    ),
    "python_list": (
        [call("s", "size", "%last"), call("p", "operator.mul", "%s", 10**9), call("y", "reshape", "%last", "%p")],
        "fails at node p",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_of_large_work_is_refused_when_it_is_loaded(saved: Path, name: str) -> None:
    nodes, says = BOMBS[name]
    append(saved, nodes)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=says):
        lbs.load(saved)
    assert time.perf_counter() - started < 20  # seconds of a busy machine; some of these run for hours


def test_it_is_refused_before_memory_is_taken(saved: Path) -> None:
    append(saved, doubled(22))
    assert_refused_within(saved, 128, "elements", "lbs.packing.checkpoint, torch._dynamo", timeout=300)


def test_who_trusts_a_file_raises_its_budget(saved: Path) -> None:
    append(saved, doubled(16))  # 64 million elements and as many again
    work = check_work(lbs.load(saved).body, SHAPE, torch.float32, 1.0)
    assert 2**25 < work.elements < MAX_ELEMENTS
    with pytest.raises(CheckpointError, match=r"more than 67108864 elements, at node d15 .*give a larger budget"):
        lbs.load(saved, budget=0.5)
    for budget in (2.0, None):
        assert lbs.load(saved, budget=budget).input_shape == SHAPE
    for odd in (0.0, -1.0, float("nan")):
        with pytest.raises(CheckpointError, match="give a positive number"):
            lbs.load(saved, budget=odd)


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "dimension": ([call("y", "mean", "%last", 7)], "fails at node y .*Dimension out of range"),
    "dimension_of_softmax": ([call("y", "softmax", "%last", -1000)], "fails at node y .*dimension -1000 of 3"),
    "dimension_of_sort": ([call("y", "torch.argsort", "%last", 3)], "fails at node y .*dimension 3 of 3"),
    "arguments": ([call("y", "torch.roll", "%last")], "fails at node y"),
    "number_of_arguments": ([call("y", "relu", "%last", 1, 2, 3)], "fails at node y"),
    "shapes": ([call("y", "torch.cat", ["%last", "%x"], 1)], "fails at node y"),
    "kinds": ([call("y", "torch.matmul", "%last", "text")], "fails at node y"),
    "by_values": ([call("m", "gt", "%last", 0), call("y", "operator.getitem", "%last", "%m")], "depends on values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_run_is_found_when_it_is_loaded(saved: Path, name: str) -> None:
    nodes, says = WRONG[name]
    append(saved, nodes)
    with pytest.raises(CheckpointError, match=says):
        lbs.load(saved)


# What shapes alone do not tell: kernels that do not exist for a type, numbers that do not fit it, divisors of 0.
LATE: dict[str, list[dict[str, Any]]] = {
    "type": [call("b", "gt", "%last", 0), call("y", "relu", "%b")],
    "type_of_operator": [call("y", "operator.and_", "%last", 1)],
    "number": [call("y", "clamp", "%last", 0, 1e300)],
    "divisor": [call("i", "long", "%last"), call("y", "remainder", "%i", 0)],
    "index": [call("i", "long", "%last"), call("y", "operator.getitem", "%last", "%i")],
}


@pytest.mark.parametrize("name", LATE)
def test_what_fails_by_values_and_types_is_one_error_of_the_family(saved: Path, name: str) -> None:
    append(saved, LATE[name])
    packed = lbs.load(saved)
    for run in (packed, packed.run_traced, lambda x: lbs.explain(packed, batch=1)):
        with pytest.raises(GraphError, match="fails in its float parts \\("):
            run(100 * packed.random_images(2))


def test_errors_of_hooks_and_of_memory_stay_what_they_are(saved: Path) -> None:
    packed = lbs.load(saved)
    x = packed.random_images(1)

    def raising(error: type[Exception]) -> Any:
        def hook(*_: object) -> None:
            raise error("mine")

        return hook

    handle = packed.body.rnn.register_forward_hook(raising(KeyError))
    with pytest.raises(KeyError, match="mine"):
        packed(x)
    handle.remove()
    packed.body.rnn.forward = raising(MemoryError)
    with pytest.raises(MemoryError, match="mine"):
        packed(x)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([3, 8, 9], "fails at"),
        ([3, 1 << 20, 1 << 20], "it takes images of"),
        ([3, 8], "fails at"),
        ([1 << 62], "it takes"),
    ],
)
def test_an_input_shape_that_does_not_fit(saved: Path, shape: list[int], says: str) -> None:
    header, data = header_of(saved)
    model = json.loads(header["__metadata__"]["model"])
    header["__metadata__"]["model"] = json.dumps({**model, "input_shape": shape})
    rewrite(saved, header, data)
    with pytest.raises(CheckpointError, match=says):
        lbs.load(saved)


@pytest.mark.parametrize("path", ["region0", "region0.inner"])
def test_a_module_named_like_a_region(saved: Path, path: str) -> None:
    header, data = header_of(saved)
    graph = json.loads(header["__metadata__"]["graph"])
    graph["modules"][path] = {"class": "Identity", "arguments": {"dict": {}}}
    header["__metadata__"]["graph"] = json.dumps(graph)
    rewrite(saved, header, data)
    with pytest.raises(CheckpointError, match=f"float module {path} has the name of a packed part"):
        lbs.load(saved)


def enlarge(path: Path, size: int) -> None:
    """Make images of 8 x 8 pixels larger, in the first program and in what the file takes."""
    header, data = header_of(path)
    text, model = (header["__metadata__"][key] for key in ("program0", "model"))
    for side in ("height", "width"):
        text = text.replace(f'"{side}":8', f'"{side}":{size}')
    header["__metadata__"] |= {"program0": text, "model": model.replace("[3, 8, 8]", f"[3, {size}, {size}]")}
    rewrite(path, header, data)


def test_devices_that_a_file_names_are_not_looked_for(saved: Path) -> None:
    append(
        saved,
        [call("y", "to", "%last", "cpu"), {**call("z", "to", "%y"), "kwargs": {"dict": {"device": {"device": "cpu"}}}}],
    )
    assert lbs.load(saved)(torch.zeros(2, *SHAPE, dtype=torch.float32)).shape == (2, 64, 8)


def test_a_recurrence_is_counted_step_by_step(saved: Path) -> None:
    short = check_work(lbs.load(saved).body, SHAPE, torch.float32, 1.0)
    assert short.operations > 64 * 5
    enlarge(saved, 512)
    with pytest.raises(CheckpointError, match="more than 8192 operations, at node rnn"):
        lbs.load(saved)


def test_large_programs_of_few_bytes(tmp_path: Path) -> None:
    """Layers of 3 x 3 taps on an image of 16 million pixels: a text of 2 kB."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    pack(pack_nets.quantized(net, SHAPE)).save(tmp_path / "net")
    enlarge(tmp_path / "net", 4096)
    with pytest.raises(CheckpointError, match="elements, at its programs"):
        lbs.load(tmp_path / "net")
    assert lbs.load(tmp_path / "net", budget=8).input_shape == (3, 4096, 4096)


def test_networks_of_the_zoo_are_far_below_the_budget() -> None:
    for name in lbs.zoo.ENTRIES:
        packed = lbs.load(lbs.zoo.entry(name).path)
        work = check_work(packed.body, packed.input_shape, packed.input_dtype, 1.0)
        assert work.elements < MAX_ELEMENTS / 64
        assert 1 << 20 < work.products < MAX_PRODUCTS / 64
        assert len(packed.programs[0].steps) <= work.operations < MAX_OPERATIONS / 64
